"""Reliable delivery: keeps reports until the collector acknowledges them, enforces the daily byte budget, and answers
authenticated commands.

Reports wait in the outbox until the collector has committed them; they are sealed as they are sent, and one that is
sent late carries its age. Short of bytes, heartbeats grow longer first and changes of level wait last (budget.py). What
arrives is verified by cose_open.py; commands.py carries it out.
"""

from . import cbor
from .budget import RESERVE_BYTES, Budget
from .cbor_decode import loads
from .commands import Commands
from .compat import const, epoch_s
from .cose import Mac
from .cose_open import fields_of, is_count
from .errors import OutboxError, StonechatError, WireError
from .report import Reporter

_FLAG_MUTED = const(2)
_FLAG_MAINTENANCE = const(4)

_IN_FLIGHT = const(30)  # numbers on their way; what the outbox can acknowledge out of order
_BURST = const(16)  # reports that one pump() sends
_LATE_S = const(60)
_LATE_KEY = const(23)  # the highest that takes one byte: a report's other keys are below it
_SEAL_BYTES = const(17)
_HEARTBEAT_BYTES = const(80)  # of a summary, sealed
_RESEND_MAX_MS = const(3_600_000)


class Delivery(Reporter):
    """device_id, key, prefix, heartbeat_windows: as for the Reporter; outbox: an Outbox or a MemoryOutbox;
    bytes_per_day: 0 sets no limit; state: remembers the last command and the byte budget across restarts;
    free_on_publish: for a fleet without a collector that acknowledges, a report is freed when the broker has
    acknowledged it (what the broker then loses is lost)."""

    _sent: int  # number of the last report that is on its way
    _wait_ms: int  # for an acknowledgement
    _quiet_ms: int  # since the last one, while some are due
    _unpublished: list  # (handle, number, stream) of what the broker has not acknowledged
    on_renewal = None  # (fields, Unix seconds or 0): takes the collector's renewals of a lease (response.py)

    def __init__(
        self,
        device_id: str,
        key: bytes,
        outbox,
        *,
        prefix: str = "stonechat/1/fleet/",
        bytes_per_day: int = 40_000,
        state=None,
        free_on_publish: bool = False,
        resend_ms: int = 30_000,
        **options,
    ) -> None:
        self.outbox = outbox
        options.update(prefix=prefix, sequence=outbox.sequence, boot=outbox.boot, stream=outbox.stream)
        Reporter.__init__(self, device_id, key, **options)
        self.ack_topic = self.topic + "ack"
        self.command_topic = self.topic + "command"
        self.subscriptions = (self.ack_topic, self.command_topic)
        self._ack_mac = Mac(key, b"ack", device_id)
        self._command_mac = Mac(key, b"command", device_id)
        self._renew_mac = Mac(key, b"renew", device_id)
        self.budget = Budget(bytes_per_day, state)
        self.commands = Commands(state)
        self.free_on_publish = free_on_publish
        self.resend_ms = resend_ms
        self.rejected = 0  # messages that were malformed, forged or replayed
        self.unsaved = 0  # reports that the outbox could not write down
        self.held_back = 0  # changes of level that the byte budget or a mute held back
        self.refused = 0  # reports that the collector will never take
        self._changed = False
        self._collector_offset_s = 0  # the collector's clock less our uptime, while our own clock is unset
        self._status_bytes = 0
        self._status_waits = False  # for bytes
        self._spill: list = []  # reports that could not be written down, straight from RAM
        self._made = 0  # number of the last report,
        self._made_s = 0  # and its uptime
        self._highest = 0  # number of the newest report that was ever sent
        self._silent = False
        self._led = 0  # channels that have led in reports of this alarm: bit i is channel i
        self.reconnected()

    # --- making reports -------------------------------------------------------------------------------------------

    def _news(self, verdict) -> int:
        self._changed = verdict.changed
        if self.commands.report_now:
            return 2
        news = Reporter._news(self, verdict)
        if not news and verdict.level > 1 and not self._led >> getattr(verdict, "channel", 0) & 1:
            news = 1  # a channel leads that has not led in this alarm: another cause
        if news and self.uptime_s < self.commands.mute_until_s:
            self.held_back += verdict.changed
            return 0
        return news

    def _flags(self, verdict) -> int:
        if verdict.level or self._level:
            self._fields[17] = getattr(verdict, "channel", 0) or None
        flags = Reporter._flags(self, verdict) | getattr(verdict, "steady", False) << 4
        if self.uptime_s < self.commands.mute_until_s:
            flags |= _FLAG_MUTED
        if self.uptime_s < self.commands.maintenance_until_s:
            flags |= _FLAG_MAINTENANCE
        return flags

    def _said(self) -> None:
        Reporter._said(self)
        self._led = self._led | 1 << (self._fields[17] or 0) if self._level else 0

    def _keep(self, urgent: bool) -> None:
        size = len(self._body) + _SEAL_BYTES
        if (urgent or not self._status_waits) and self.budget.make(size, 0 if urgent else RESERVE_BYTES):
            self._append()
            self.commands.report_now = False
            self._said()
        elif urgent and self._changed:
            self.held_back += 1

    def decided(self, decision: list, verdict) -> None:
        """Report a decision of the response (response.py); verdict: its cause, or None."""
        fields = self._begin()
        fields[18] = decision
        if verdict is not None:
            fields[5] = verdict.level
            fields[6] = self._flags(verdict) or None
            fields[9] = verdict.evidence_q8
            fields[10] = bytes([byte for i, z_q4, share in verdict.explain(3) for byte in (i, z_q4 & 255, share)])
        self._encode()
        if self.budget.make(len(self._body) + _SEAL_BYTES, 0):
            self._append()
        else:
            self.held_back += 1

    def _append(self) -> None:
        body = bytes(self._body)
        self._made = self.sequence
        self._made_s = self.uptime_s
        try:
            self.outbox.append(body)
        except OutboxError:
            self.unsaved += 1
            if self._changed and len(self._spill) >= _BURST:
                self._spill.pop(0)  # a change of level takes the place of the oldest
            if len(self._spill) < _BURST:
                self._spill.append(body)
        self.sequence = self.outbox.sequence
        self.lost = self.outbox.lost or None

    def pass_time(self, now_ms: int) -> int:
        elapsed_ms = Reporter.pass_time(self, now_ms)
        if elapsed_ms:
            self._quiet_ms += elapsed_ms
            self.budget.pass_time(elapsed_ms)
        return elapsed_ms

    # --- sending them ---------------------------------------------------------------------------------------------

    def pump(self, publish, now_ms: int) -> None:
        """Send what is due through publish(topic, payload, qos, retain), at most sixteen at a time, as far as the byte
        budget goes. What `publish` raises goes through, after noting that everything on its way must be sent again."""
        self.pass_time(now_ms)
        outbox = self.outbox
        try:
            while self._spill and self.budget.allows(len(self._spill[0]) + _SEAL_BYTES, 0):
                self._publish(publish, self._spill[0])
                self.budget.spend(len(self._spill.pop(0)) + _SEAL_BYTES, 0)
            if self._sent >= outbox.oldest and self._quiet_ms >= self._wait_ms:
                # Nothing was acknowledged for a while: send only the oldest report, less and less often.
                self._quiet_ms = 0
                self._wait_ms = min(2 * self._wait_ms, _RESEND_MAX_MS)
                self._silent = True
                record = outbox.after(outbox.oldest - 1)
                if record is not None:
                    self._send(publish, record)
            for _ in range(_BURST):
                record = outbox.after(self._sent)
                if record is None or record[0] >= outbox.oldest + _IN_FLIGHT:
                    break
                if self._sent < outbox.oldest:  # nothing was on its way: the wait begins here
                    self._quiet_ms = 0
                if self._send(publish, record):
                    self._sent = record[0]
                    if record[0] == self._made:  # there are no others
                        break
                elif record[0] <= self._highest:
                    self._sent = self._highest  # repeats wait for bytes; a new report does not wait for them
                else:
                    break
        except (StonechatError, OSError):
            self._sent = outbox.oldest - 1
            raise

    def _send(self, publish, record) -> bool:
        """Publish one record of the outbox, if there are bytes for it."""
        number = record[0]
        value = self._dated(record)
        size = len(value) + _SEAL_BYTES
        reserve = 0 if number > self._highest else RESERVE_BYTES
        if not self.budget.allows(size, reserve):
            return False
        handle = self._publish(publish, value)
        self.budget.spend(size, reserve)
        self._highest = max(self._highest, number)
        if self.free_on_publish:
            place = (handle, number, record[1][-4:])  # the stream is the last field of the record
            if handle is None:  # a client that has waited for the broker's acknowledgement itself
                self._free_place(place)
            else:
                oldest = self.outbox.oldest
                self._unpublished = [one for one in self._unpublished if one[0] != handle and one[1] >= oldest]
                self._unpublished.append(place)
        return True

    def on_published(self, handle) -> None:
        """The broker has acknowledged the publish() that returned `handle`."""
        for place in self._unpublished:
            if place[0] == handle:
                self._unpublished.remove(place)
                self._free_place(place)
                break

    def _free_place(self, place) -> None:
        self.outbox.ack(place[1], place[1], place[2])
        self._quiet_ms = 0
        self._wait_ms = self.resend_ms

    def reconnected(self) -> None:
        """A new connection is up: what was on its way is sent again at once."""
        self._sent = self.outbox.oldest - 1
        self._wait_ms = self.resend_ms
        self._quiet_ms = 0
        self._unpublished = []

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
        value.append(_LATE_KEY)
        cbor.encode(age_s, value)
        return value

    def save(self, state) -> None:
        self.budget.save()
        self.outbox.save()

    def send_status(self, publish, make) -> bool:
        self._status_waits = not self.budget.allows(self._status_bytes, RESERVE_BYTES)
        if not self._status_waits:
            message = make()
            self._status_bytes = len(message)
            self._status_waits = not self.budget.allows(len(message), RESERVE_BYTES)
            if not self._status_waits:
                publish(self.status_topic, message, 1, True)
                self.budget.spend(len(message), RESERVE_BYTES)
        return not self._status_waits

    def status(self, **facts) -> bytearray:  # type: ignore[override]
        self.trouble = (self.rejected, self.unsaved + self.commands.unsaved, self.held_back, self.refused)
        heartbeat_windows, window_ms = self.heartbeat_windows, facts.get("window_ms")
        if window_ms:  # short of bytes, reports come less often: what is announced has to hold then, too
            longest = self.budget.interval_ms(_HEARTBEAT_BYTES) // window_ms
            self.heartbeat_windows = max(heartbeat_windows, longest)
        message = Reporter.status(self, **facts)
        self.heartbeat_windows = heartbeat_windows
        return message

    # --- messages from the collector ------------------------------------------------------------------------------

    def on_message(self, topic, payload: bytes) -> None:
        """Take an acknowledgement or a command; a command is answered. Whatever does not verify is counted in
        `rejected`."""
        if not isinstance(topic, str):
            topic = bytes(topic).decode()
        try:
            if topic == self.ack_topic:
                self._on_ack(payload)
            elif topic == self.command_topic:
                self._on_command(fields_of(self._command_mac, payload))
        except WireError:
            self.rejected += 1

    def _on_ack(self, payload):
        try:
            fields = fields_of(self._ack_mac, payload)
        except WireError:
            if self.on_renewal is None:
                raise
            self.on_renewal(fields_of(self._renew_mac, payload), self.now_s())
            return
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
        time_s: int = fields.get(2, -1)
        if is_count(time_s):
            self._collector_offset_s = max(self._collector_offset_s, time_s - self.uptime_s)

    def _free(self, ranges, stream):
        """ranges: first, last, first, last, ... of `stream` -> how many reports of the outbox that has freed."""
        if not isinstance(ranges, list) or len(ranges) % 2 or not all([is_count(n) for n in ranges]):
            raise WireError
        freed = 0
        for i in range(0, len(ranges), 2):
            freed += self.outbox.ack(ranges[i], ranges[i + 1], stream)
        return freed

    def now_s(self) -> int:
        """Unix seconds by the device's clock or the collector's; 0 where neither is known."""
        return epoch_s() or (self._collector_offset_s and self._collector_offset_s + self.uptime_s)

    def _on_command(self, fields):
        answer = self.commands.carry_out(fields, self.now_s(), self.uptime_s)
        self._begin()[15] = answer
        self._encode()
        self.budget.made -= len(self._body) + _SEAL_BYTES  # an operator waits for it: it may overdraw
        self._append()
