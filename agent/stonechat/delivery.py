"""Reliable delivery: keeps reports until the collector acknowledges them, enforces the daily byte budget, executes
authenticated commands.

Reports wait in the outbox until the collector has committed them; they are sealed when they are sent, and a report that
is sent late carries its age. What a report costs is taken from a bucket that fills by 7/8 of `bytes_per_day` a day and
holds 1/8 of it, so that any 24 hours cost at most `bytes_per_day`. When bytes are short, heartbeats become longer
first; changes of level wait last.

Commands are authenticated, numbered and have an expiry. Mute, maintenance and "report now" are executed here; the codes
named in `supported` are answered "accepted" and handed to the agent; all others are answered "not supported".
"""

from struct import pack, unpack

from . import cbor
from .cbor_decode import loads
from .compat import const, epoch_s
from .cose import HEAD, TAG_BYTES, Mac
from .errors import OutboxError, StonechatError, WireError
from .report import Reporter

_WIRE_VERSION = const(1)

# Codes of commands: stonechat.cddl names them.
_MUTE = const(1)  # [until]: changes of level are not reported until then; heartbeats continue
_MAINTENANCE = const(2)  # [until]: everything is reported, flagged as maintenance
WAS_NORMAL = const(3)  # [sequence number of the report]
CALIBRATE = const(4)
_REPORT_NOW = const(5)

_ACCEPTED = const(0)
_NOT_SUPPORTED = const(1)
_EXPIRED = const(2)
_BAD_ARGUMENTS = const(3)
_CLOCK_UNSET = const(4)

_FLAG_MUTED = const(2)
_FLAG_MAINTENANCE = const(4)

_COMMAND_LIFE_S = const(86_400)  # no command expires later than that
_IN_FLIGHT = const(30)  # numbers on their way; what the outbox can acknowledge out of order
_BURST = const(16)  # reports that one pump() sends
_LATE_S = const(60)
_SEAL_BYTES = const(17)
_RESERVE_BYTES = const(256)  # what heartbeats leave in the bucket for changes of level
_RESEND_MAX_MS = const(3_600_000)


class Delivery(Reporter):
    """device_id, key, prefix, heartbeat_windows: as for the Reporter; outbox: an Outbox or a Queue;
    bytes_per_day: 0 sets no limit; state: remembers the last command across restarts; supported: codes of commands
    that the agent carries out; free_on_publish: for a fleet without a collector that acknowledges, the outbox is freed
    as soon as the broker has the report (what the broker then loses is lost)."""

    _sent: int  # number of the last report that is on its way
    _wait_ms: int  # for an acknowledgement
    _quiet_ms: int  # since the last one, while some are due

    def __init__(
        self,
        device_id: str,
        key: bytes,
        outbox,
        *,
        bytes_per_day: int = 40_000,
        state=None,
        supported: tuple = (),
        free_on_publish: bool = False,
        resend_ms: int = 30_000,
        **options,
    ) -> None:
        self.outbox = outbox
        Reporter.__init__(
            self, device_id, key, sequence=outbox.sequence, boot=outbox.boot, stream=outbox.stream, **options
        )
        self.ack_topic = self.topic + "ack"
        self.command_topic = self.topic + "command"
        self.subscriptions = (self.ack_topic, self.command_topic)
        self._ack_mac = Mac(key, b"ack", device_id)
        self._command_mac = Mac(key, b"command", device_id)
        self.bytes_per_day = bytes_per_day
        self.supported = supported
        self.free_on_publish = free_on_publish
        self.resend_ms = resend_ms
        self.rejected = 0  # messages that were malformed, forged or replayed
        self.unsaved = 0  # reports that the outbox could not write down
        self.held_back = 0  # changes of level that the byte budget or a mute held back
        self.refused = 0  # reports that the collector will never take
        self._changed = False
        self._state = state
        self._last_command = unpack("<I", state.get(b"command", bytes(4)))[0] if state else 0
        self._report_now = False
        self._mute_until_s = 0
        self._maintenance_until_s = 0
        self._collector_offset_s = 0  # the collector's clock less our uptime, while our own clock is unset
        self._bucket = bytes_per_day // 8 * 1000  # thousandths of a byte
        self._unfilled_ms = 0
        self._spill: list = []  # reports that could not be written down, straight from RAM
        self._made = 0  # number of the last report,
        self._made_s = 0  # and its uptime
        self._silent = False
        self.reconnected()

    # --- making reports -------------------------------------------------------------------------------------------

    def _urgent(self, verdict) -> bool:
        self._changed = verdict.changed
        if verdict.level != self._level:
            if epoch_s() >= self._mute_until_s:
                return True
            if verdict.changed:
                self.held_back += 1
        return self._report_now

    def _flags(self, verdict) -> int:
        flags = Reporter._flags(self, verdict)
        if self._mute_until_s or self._maintenance_until_s:
            now_s = epoch_s()
            if now_s < self._mute_until_s:
                flags |= _FLAG_MUTED
            if now_s < self._maintenance_until_s:
                flags |= _FLAG_MAINTENANCE
        return flags

    def _keep(self, urgent: bool) -> None:
        if self._afford(0 if urgent else _RESERVE_BYTES):
            self._append()
            self._report_now = False
            self._said()
        elif urgent and self._changed:
            self.held_back += 1

    def _append(self) -> None:
        outbox = self.outbox
        body = bytes(self._body)
        self._made = self.sequence
        self._made_s = self.uptime_s
        try:
            outbox.append(body)
        except OutboxError:
            self.unsaved += 1
            if len(self._spill) < _BURST:
                self._spill.append(body)
        self.sequence = outbox.sequence
        self.lost = outbox.lost or None

    def _afford(self, reserve: int) -> bool:
        """Take the size of the report in _body from the bucket, if `reserve` bytes stay in it."""
        cost = (len(self._body) + _SEAL_BYTES) * 1000
        if self.bytes_per_day and self._bucket < cost + reserve * 1000:
            return False
        self._bucket -= cost
        return True

    def pass_time(self, now_ms: int) -> int:
        elapsed_ms = Reporter.pass_time(self, now_ms)
        self._quiet_ms += elapsed_ms
        self._unfilled_ms += elapsed_ms
        if self._unfilled_ms >= 1000:
            most = self.bytes_per_day // 8 * 1000
            self._bucket = min(self._bucket + most // 1000 * 7 * self._unfilled_ms // 86_400, most)
            self._unfilled_ms = 0
        return elapsed_ms

    # --- sending them ---------------------------------------------------------------------------------------------

    def pump(self, publish, now_ms: int) -> None:
        """Send what is due through publish(topic, payload, qos), at most sixteen at a time. What `publish` raises goes
        through, after noting that everything on its way must be sent again."""
        self.pass_time(now_ms)
        outbox = self.outbox
        try:
            while self._spill:
                self._publish(publish, self._spill[0])
                self._spill.pop(0)
            if self._sent >= outbox.oldest and self._quiet_ms >= self._wait_ms:
                # Nothing was acknowledged for a while: knock with the oldest report alone, less and less often.
                self._quiet_ms = 0
                self._wait_ms = min(2 * self._wait_ms, _RESEND_MAX_MS)
                self._silent = True
                record = outbox.after(outbox.oldest - 1)
                if record is not None:
                    value = self._dated(record)
                    self._bucket -= (len(value) + _SEAL_BYTES) * 1000
                    self._publish(publish, value)
            for _ in range(_BURST):
                record = outbox.after(self._sent)
                if record is None or record[0] >= outbox.oldest + _IN_FLIGHT:
                    break
                if self._sent < outbox.oldest:  # nothing was on its way: the wait begins here
                    self._quiet_ms = 0
                self._publish(publish, self._dated(record))
                self._sent = record[0]
                if self.free_on_publish:
                    outbox.ack(record[0], record[0], record[1][-4:])  # its stream: the last field
        except (StonechatError, OSError):
            self._sent = outbox.oldest - 1
            raise

    def reconnected(self) -> None:
        """There is a new connection: what was on its way is sent again, at once."""
        self._sent = self.outbox.oldest - 1
        self._wait_ms = self.resend_ms
        self._quiet_ms = 0

    def _dated(self, record: tuple):
        """The body of a record, marked as history where it comes late: with its age in seconds, or true where that is
        not known (another boot, clock unset)."""
        sequence, value = record
        if sequence == self._made and self.uptime_s - self._made_s < _LATE_S:
            return value
        fields = loads(value)
        age_s = True
        if 3 in fields and epoch_s():
            age_s = max(0, epoch_s() - fields[3])
        elif 4 in fields and fields[16] == self.stream:
            age_s = max(0, self.uptime_s - fields[4])
        if age_s is not True and age_s < _LATE_S:
            return value
        value = bytearray(value)
        value[0] += 1  # one more pair; its key is the highest, so the order is kept
        value.append(17)
        cbor.encode(age_s, value)
        return value

    def save(self, state) -> None:
        self.outbox.save()

    def status(self, *facts, online: bool = True) -> bytearray:
        self.trouble = (self.rejected, self.unsaved, self.held_back, self.refused)
        return Reporter.status(self, *facts, online=online)

    # --- messages from the collector ------------------------------------------------------------------------------

    def on_message(self, topic, payload: bytes) -> list:
        """Take an acknowledgement or a command -> the commands for the agent as (code, arguments). Whatever does not
        verify is counted in `rejected`."""
        if not isinstance(topic, str):
            topic = bytes(topic).decode()
        try:
            if topic == self.ack_topic:
                self._on_ack(_fields_of(self._ack_mac, payload))
            elif topic == self.command_topic:
                return self._on_command(_fields_of(self._command_mac, payload))
        except WireError:
            self.rejected += 1
        return []

    def _on_ack(self, fields):
        stream = fields.get(3)
        self._free(fields.get(1, []), stream)
        self.refused += self._free(fields.get(4, []), stream)
        if stream != self.stream:  # of an earlier start, or a replay: nothing in it is about now
            return
        self._quiet_ms = 0
        self._wait_ms = self.resend_ms
        if self._silent:  # the collector is back: what it missed goes again
            self._silent = False
            self.reconnected()
        time_s = fields.get(2)
        if _is_count(time_s):
            self._collector_offset_s = max(self._collector_offset_s, time_s - self.uptime_s)

    def _free(self, ranges, stream):
        """ranges: first, last, first, last, ... of `stream` -> how many reports of the outbox that has freed."""
        if not isinstance(ranges, list) or len(ranges) % 2 or not all([_is_count(n) for n in ranges]):
            raise WireError
        freed = 0
        for i in range(0, len(ranges), 2):
            freed += self.outbox.ack(ranges[i], ranges[i + 1], stream)
        return freed

    def _on_command(self, fields):
        sequence = fields.get(1)
        expires_s = fields.get(2)
        code = fields.get(3)
        arguments = fields.get(4, [])
        if not (_is_count(sequence) and _is_count(expires_s) and _is_count(code) and isinstance(arguments, list)):
            raise WireError
        if sequence <= self._last_command:  # heard before
            raise WireError
        self._last_command = sequence
        if self._state is not None:
            self._state.put(b"command", pack("<I", sequence))
            try:
                self._state.save()
            except StonechatError:  # then only its expiry keeps it from being repeated after a restart
                self.unsaved += 1
        result = self._judge(code, arguments, expires_s)
        fields = self._begin()
        fields[15] = (sequence, result)
        self._encode()
        self._afford(-self.bytes_per_day)  # an operator waits for it: it may overdraw the bucket
        self._append()
        return [] if result else [(code, tuple(arguments))]

    def _judge(self, code, arguments, expires_s):
        now_s = epoch_s() or (self._collector_offset_s and self._collector_offset_s + self.uptime_s)
        if not now_s:
            return _CLOCK_UNSET
        if now_s > expires_s or expires_s > now_s + _COMMAND_LIFE_S:
            return _EXPIRED
        if code in (_MUTE, _MAINTENANCE):
            if len(arguments) != 1 or not _is_count(arguments[0]):
                return _BAD_ARGUMENTS
            if code == _MUTE:
                self._mute_until_s = arguments[0]
            else:
                self._maintenance_until_s = arguments[0]
        elif code == _REPORT_NOW:
            self._report_now = True
        elif code not in self.supported:
            return _NOT_SUPPORTED
        return _ACCEPTED


def unseal(mac, message):
    """The payload of a message that `mac` (cose.Mac) has sealed. Raises WireError for any other."""
    end = len(message) - TAG_BYTES - 1
    wrapped = bytes(message[6 : max(6, end)])
    difference = bytes(message[:6]) != HEAD or end < 7 or message[end] != 0x48
    for want, got in zip(mac.tag(wrapped), message[-TAG_BYTES:]):
        difference |= want ^ got  # all eight, always: the time taken reveals nothing
    value = None if difference else loads(wrapped)
    if not isinstance(value, bytes):
        raise WireError("not sealed with this key")
    return value


def _fields_of(mac, message):
    fields = loads(unseal(mac, message))
    if not isinstance(fields, dict) or fields.get(0) != _WIRE_VERSION:
        raise WireError
    return fields


def _is_count(value):
    return isinstance(value, int) and value is not True and 0 <= value <= 0xFFFFFFFF
