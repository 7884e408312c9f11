"""What the device says, and when. stonechat.cddl, beside this file, describes every message.

Normal windows are summed up (a heartbeat each `heartbeat_windows`: lowest, median and highest score); a change of level
is said at once. What a report costs is taken from a bucket that fills by 7/8 of `bytes_per_day` a day and holds 1/8 of
it, so no 24 hours bring forth more than `bytes_per_day`: short of bytes, heartbeats grow longer first and changes of
level wait last. Reports wait in the outbox until the collector has committed them; they are sealed as they are sent,
and one that is sent late says so.

Commands come authenticated, numbered and with an expiry. Mute, maintenance and "report now" are carried out here; the
codes named in `supported` are answered "accepted" and handed to the agent; all others are answered "not supported".
"""

from struct import pack, unpack

from . import cbor, cose
from .compat import const, epoch_s, ticks_diff
from .errors import OutboxError, StonechatError, WireError
from .outbox import Outbox, Queue

VERSION = const(1)

MUTE = const(1)  # [until]: changes of level are not said until then; heartbeats go on
MAINTENANCE = const(2)  # [until]: everything is said, flagged as maintenance
WAS_NORMAL = const(3)  # [sequence number of the report]
CALIBRATE = const(4)
REPORT_NOW = const(5)
STOP_RESPONDING = const(6)
RELEASE = const(7)  # [what to release]

ACCEPTED = const(0)
NOT_SUPPORTED = const(1)
EXPIRED = const(2)
BAD_ARGUMENTS = const(3)
CLOCK_UNSET = const(4)

FLAG_LEARNING = const(1)
FLAG_MUTED = const(2)
FLAG_MAINTENANCE = const(4)

# The facts that status() takes, in the order of their keys from 5 on.
FACTS = (
    "online",
    "number",
    "firmware",
    "model",
    "schema",
    "window_ms",
    "sources",
    "adaptation_q8",
    "learning",
    "agent",
)

MAX_ID = const(64)
MAX_SCORES = const(64)  # a summary's median is that of so many windows, the last ones
MAX_DETAIL = const(64)
MAX_COMMAND_LIFE_S = const(86_400)
_IN_FLIGHT = const(30)  # numbers on their way; what the outbox can acknowledge out of order
_BURST = const(16)  # reports that one pump() sends
_LATE_S = const(60)
_SEAL_BYTES = const(17)
_RESERVE_BYTES = const(256)  # what heartbeats leave in the bucket for changes of level
_RESEND_MAX_MS = const(3_600_000)
_FIELDS = const(17)


class Reporter:
    """device_id: letters, digits, '-', '_', '.'; key: the device's secret, 32 bytes; outbox: an Outbox, or None for a
    small queue in RAM; heartbeat_windows: 1 reports every window; bytes_per_day: 0 sets no limit; state: remembers the
    last command across restarts; free_on_publish: for a fleet without a collector that acknowledges, the outbox is
    freed as soon as the broker has the report (what the broker then loses is lost); disclose: send the `detail` that
    observe() is given (it may hold addresses) with changes of level."""

    def __init__(
        self,
        device_id: str,
        key: bytes,
        outbox=None,
        *,
        prefix: str = "stonechat/1/fleet/",
        heartbeat_windows: int = 30,
        bytes_per_day: int = 40_000,
        state=None,
        supported: tuple = (),
        free_on_publish: bool = False,
        disclose: bool = False,
        resend_ms: int = 30_000,
    ) -> None:
        _check_id(device_id)
        base = prefix.rstrip("/") + "/" + device_id + "/"
        self.topics = {name: base + name for name in ("report", "status", "ack", "command", "model")}
        self.subscriptions = (self.topics["ack"], self.topics["command"])
        self.outbox: Outbox | Queue = Queue() if outbox is None else outbox
        self.heartbeat_windows = heartbeat_windows
        self.bytes_per_day = bytes_per_day
        self.supported = supported
        self.free_on_publish = free_on_publish
        self.disclose = disclose
        self.resend_ms = resend_ms
        self.rejected = 0  # messages that were malformed, forged or replayed
        self.unsaved = 0  # reports that the outbox could not write down
        self.held_back = 0  # changes of level that the bucket, or a mute, kept from being said
        self.published = 0
        self.published_bytes = 0
        self._report_mac = cose.Mac(cose.derive(key, cose.REPORT), device_id)
        self._status_mac = cose.Mac(cose.derive(key, cose.STATUS), device_id)
        self._ack_mac = cose.Mac(cose.derive(key, cose.ACK), device_id)
        self._command_mac = cose.Mac(cose.derive(key, cose.COMMAND), device_id)
        self._state = state
        self._last_command = unpack("<I", state.get(b"command", bytes(4)))[0] if state else 0
        self._fields: list = [None] * _FIELDS
        self._scores: list = []
        self._windows = 0
        self._score_min = 0
        self._score_max = 0
        self._level = 0
        self._report_now = False
        self._mute_until_s = 0
        self._maintenance_until_s = 0
        self._uptime_ms = 0
        self._last_ms: int | None = None
        self._collector_offset_s = 0  # the collector's clock less our uptime, while our own clock is unset
        self._status_number = 0
        self._bucket = bytes_per_day // 8 * 1000  # thousandths of a byte
        self._unfilled_ms = 0
        self._spill: list = []  # reports that could not be written down, straight from RAM
        self._sent = self.outbox.oldest - 1
        self._made = 0  # number of the last report,
        self._made_ms = 0  # and its uptime
        self._wait_ms = resend_ms
        self._quiet_ms = 0  # since the last acknowledgement, while some are due
        self._silent = False

    # --- making reports -------------------------------------------------------------------------------------------

    def observe(self, verdict, now_ms: int, detail: str | None = None) -> None:
        """Take one window's verdict; a report is put into the outbox where one is due. Raises nothing of its own: a
        medium that refuses is counted in `unsaved`, and the report goes out from RAM."""
        self._advance(now_ms)
        score = min(verdict.score_q8, 0xFFFF)
        if not self._windows:
            self._score_min = self._score_max = score
        self._windows += 1
        self._score_min = min(self._score_min, score)
        self._score_max = max(self._score_max, score)
        if len(self._scores) >= MAX_SCORES:
            self._scores.pop(0)
        self._scores.append(score)
        changed = verdict.level != self._level
        if changed and epoch_s() < self._mute_until_s:
            changed = False
            if verdict.changed:
                self.held_back += 1
        if changed or self._report_now or self.heartbeat_windows == 1:
            body = self._window_report(verdict, score, detail if changed and self.disclose else None)
            if self._afford(len(body), 0 if changed or self._report_now else _RESERVE_BYTES):
                self._keep(body)
                self._level = verdict.level
                self._report_now = False
                self._begin_summary()
                return
            if changed and verdict.changed:
                self.held_back += 1
        if self._windows >= self.heartbeat_windows > 1:
            body = self._summary(verdict)
            if self._afford(len(body), _RESERVE_BYTES):
                self._keep(body)
                self._begin_summary()

    def _begin_summary(self) -> None:
        self._windows = 0
        self._scores.clear()

    def _head(self) -> list:
        """Version, sequence number and time: what every report begins with."""
        fields = self._fields
        for i in range(_FIELDS):
            fields[i] = None
        now_s = epoch_s()
        fields[0] = VERSION
        fields[1] = self.outbox.sequence
        fields[2] = self.outbox.boot
        if now_s:
            fields[3] = now_s
        else:
            fields[4] = self._uptime_ms // 1000
        fields[14] = self.outbox.lost or None
        return fields

    def _flags(self, verdict) -> int | None:
        now_s = epoch_s()
        flags = FLAG_LEARNING if verdict.learning else 0
        if now_s < self._mute_until_s:
            flags |= FLAG_MUTED
        if now_s < self._maintenance_until_s:
            flags |= FLAG_MAINTENANCE
        return flags or None

    def _window_report(self, verdict, score: int, detail: str | None) -> bytearray:
        fields = self._head()
        fields[5] = verdict.level
        fields[6] = self._flags(verdict)
        fields[7] = score
        fields[8] = min(verdict.surprise_q8, 0xFFFF)
        fields[9] = min(verdict.evidence_q8, 0xFFFF)
        if verdict.level or self._level:
            fields[10] = _features(verdict.explain(3))
        if detail:
            fields[13] = detail[:MAX_DETAIL]
        return cbor.dumps_fields(fields)

    def _summary(self, verdict) -> bytearray:
        fields = self._head()
        fields[5] = self._level
        fields[6] = self._flags(verdict)
        fields[9] = min(verdict.evidence_q8, 0xFFFF)
        fields[11] = self._windows
        fields[12] = (self._score_min, sorted(self._scores)[len(self._scores) // 2], self._score_max)
        return cbor.dumps_fields(fields)

    def _answer(self, command: int, result: int) -> None:
        fields = self._head()
        fields[15] = (command, result)
        body = cbor.dumps_fields(fields)
        self._afford(len(body), -self.bytes_per_day)  # an operator waits for it: it may overdraw the bucket
        self._keep(body)

    def _keep(self, body: bytearray) -> None:
        self._made = self.outbox.sequence
        self._made_ms = self._uptime_ms
        try:
            self.outbox.append(body)
        except OutboxError:
            self.unsaved += 1
            if self.outbox.spare and len(self._spill) < _BURST:
                self._spill.append(body)

    def _afford(self, size: int, reserve: int) -> bool:
        """Take the sealed size from the bucket, if `reserve` bytes stay in it."""
        if not self.bytes_per_day:
            return True
        cost = (size + _SEAL_BYTES) * 1000
        if self._bucket < cost + reserve * 1000:
            return False
        self._bucket -= cost
        return True

    def _advance(self, now_ms: int) -> None:
        elapsed_ms = 0 if self._last_ms is None else max(0, ticks_diff(now_ms, self._last_ms))
        self._last_ms = now_ms
        self._uptime_ms += elapsed_ms
        self._quiet_ms += elapsed_ms
        self._unfilled_ms += elapsed_ms
        if self._unfilled_ms >= 1000:
            fill = self.bytes_per_day // 8 * 7 * self._unfilled_ms // 86_400
            self._bucket = min(self._bucket + fill, self.bytes_per_day // 8 * 1000)
            self._unfilled_ms = 0

    # --- sending them ---------------------------------------------------------------------------------------------

    def pump(self, publish, now_ms: int) -> None:
        """Send what is due through publish(topic, payload, qos), at most sixteen at a time. What `publish` raises goes
        through, after noting that everything on its way must be sent again."""
        self._advance(now_ms)
        outbox = self.outbox
        try:
            while self._spill:
                self._publish(publish, self._spill[0])
                self._spill.pop(0)
            self._resend(publish)
            for _ in range(_BURST):
                record = outbox.after(self._sent)
                if record is None or record[0] >= outbox.oldest + _IN_FLIGHT:
                    break
                if self._sent < outbox.oldest:  # nothing was on its way: the wait begins here
                    self._quiet_ms = 0
                self._publish(publish, self._dated(record))
                self._sent = record[0]
                if self.free_on_publish:
                    outbox.ack(record[0], record[0])
        except (StonechatError, OSError):
            self._sent = outbox.oldest - 1
            raise

    def reconnected(self) -> None:
        """A new connection stands: what was on its way goes again, at once."""
        self._sent = self.outbox.oldest - 1
        self._wait_ms = self.resend_ms
        self._quiet_ms = 0

    def _resend(self, publish) -> None:
        """Nothing was acknowledged for a while: knock with the oldest report alone, less and less often."""
        outbox = self.outbox
        if self._sent < outbox.oldest or self._quiet_ms < self._wait_ms:
            return
        self._quiet_ms = 0
        self._wait_ms = min(2 * self._wait_ms, _RESEND_MAX_MS)
        self._silent = True
        record = outbox.after(outbox.oldest - 1)
        if record is not None:
            body = self._dated(record)
            self._afford(len(body), -self.bytes_per_day)
            self._publish(publish, body)

    def _publish(self, publish, body) -> None:
        message = self._report_mac.seal(body)
        publish(self.topics["report"], message, 1)
        self.published += 1
        self.published_bytes += len(message)

    def _dated(self, record: tuple):
        """The body of a record, marked as history where it comes late: with its age in seconds, or true where that is
        not known (another boot, clock unset)."""
        sequence, body = record
        if sequence == self._made and self._uptime_ms - self._made_ms < _LATE_S * 1000:
            return body
        fields = cbor.loads(bytes(body))
        age_s = True
        if fields.get(3) and epoch_s():
            age_s = max(0, epoch_s() - fields[3])
        elif 4 in fields and fields[2] == self.outbox.boot:
            age_s = max(0, self._uptime_ms // 1000 - fields[4])
        if age_s is not True and age_s < _LATE_S:
            return body
        late = bytearray(body)
        late[0] += 1  # one more pair; its key is the highest, so the order stands
        late.append(16)
        cbor.encode(age_s, late)
        return late

    # --- status ---------------------------------------------------------------------------------------------------

    def status(self, online: bool = True, **facts) -> bytes:
        """The sealed message for topics["status"], retained; with online=False the last will. facts: those of FACTS
        (firmware, agent: text; model, schema: their ids; sources: texts; window_ms; adaptation_q8; learning). Raises
        WireError for another."""
        fields = self._head()
        fields[1] = fields[14] = None
        fields[4] = self._uptime_ms // 1000
        fields[5] = online
        if online:
            self._status_number += 1
            fields[6] = self._status_number
        for name, value in facts.items():
            if name not in FACTS:
                raise WireError("status: no fact is called %s" % name)
            fields[5 + FACTS.index(name)] = value
        fields[15] = (self.rejected, self.unsaved, self.held_back)
        return self._status_mac.seal(cbor.dumps_fields(fields))

    # --- messages from the collector ------------------------------------------------------------------------------

    def on_message(self, topic, payload: bytes) -> list:
        """Take an acknowledgement or a command -> the commands for the agent as (code, arguments). Whatever does not
        verify is counted in `rejected`."""
        if isinstance(topic, (bytes, bytearray)):
            topic = bytes(topic).decode()
        try:
            if topic == self.topics["ack"]:
                self._on_ack(_fields_of(self._ack_mac, payload))
            elif topic == self.topics["command"]:
                return self._on_command(_fields_of(self._command_mac, payload))
        except WireError:
            self.rejected += 1
        return []

    def _on_ack(self, fields):
        ranges = fields.get(1)
        if not isinstance(ranges, list) or len(ranges) % 2 or not all([_is_count(n) for n in ranges]):
            raise WireError("ack: ranges")
        for i in range(0, len(ranges), 2):
            self.outbox.ack(ranges[i], ranges[i + 1])
        self._quiet_ms = 0
        self._wait_ms = self.resend_ms
        if self._silent:  # the collector is back: what it missed goes again
            self._silent = False
            self._sent = self.outbox.oldest - 1
        time_s = fields.get(2)
        if _is_count(time_s):
            self._collector_offset_s = time_s - self._uptime_ms // 1000

    def _on_command(self, fields):
        sequence = fields.get(1)
        expires_s = fields.get(2)
        code = fields.get(3)
        arguments = fields.get(4, [])
        if not (_is_count(sequence) and _is_count(expires_s) and _is_count(code) and isinstance(arguments, list)):
            raise WireError("command: fields")
        if sequence <= self._last_command:
            raise WireError("command: %d again" % sequence)
        self._last_command = sequence
        if self._state is not None:
            self._state.put(b"command", pack("<I", sequence))
            try:
                self._state.save()
            except StonechatError:  # then only its expiry keeps it from being repeated after a restart
                self.unsaved += 1
        result = self._judge(code, arguments, expires_s)
        self._answer(sequence, result)
        return [(code, tuple(arguments))] if result == ACCEPTED else []

    def _judge(self, code: int, arguments: list, expires_s: int) -> int:
        now_s = epoch_s() or (self._collector_offset_s and self._collector_offset_s + self._uptime_ms // 1000)
        if not now_s:
            return CLOCK_UNSET
        if now_s > expires_s or expires_s > now_s + MAX_COMMAND_LIFE_S:
            return EXPIRED
        if code in (MUTE, MAINTENANCE):
            if len(arguments) != 1 or not _is_count(arguments[0]):
                return BAD_ARGUMENTS
            if code == MUTE:
                self._mute_until_s = arguments[0]
            else:
                self._maintenance_until_s = arguments[0]
            return ACCEPTED
        if code == REPORT_NOW:
            self._report_now = True
            return ACCEPTED
        return ACCEPTED if code in self.supported else NOT_SUPPORTED


def _fields_of(mac, payload: bytes) -> dict:
    fields = cbor.loads(mac.open(payload))
    if not isinstance(fields, dict) or fields.get(0) != VERSION:
        raise WireError("not a message of version %d" % VERSION)
    return fields


def _is_count(value) -> bool:
    return isinstance(value, int) and value is not True and 0 <= value <= 0xFFFFFFFF


def _features(explained: list) -> bytes:
    """Three bytes a feature: index, deviation in 1/16 sd as int8, share in percent."""
    out = bytearray()
    for index, z_q4, share in explained:
        out.append(index)
        out.append(min(127, max(-128, z_q4)) & 0xFF)
        out.append(share)
    return bytes(out)


def _check_id(device_id: str) -> None:
    plain = device_id.replace("-", "").replace("_", "").replace(".", "")
    if not 1 <= len(device_id) <= MAX_ID or not plain or not all([_is_plain(c) for c in plain]):
        raise WireError("device id %r: 1 to %d letters, digits, '-', '_' and '.'" % (device_id, MAX_ID))


def _is_plain(c: str) -> bool:
    return "a" <= c <= "z" or "A" <= c <= "Z" or "0" <= c <= "9"
