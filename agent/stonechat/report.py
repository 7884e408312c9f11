"""Makes the reports and decides when one is due. stonechat.cddl, beside this file, describes every message.

Normal windows are summarized (a heartbeat each `heartbeat_windows`: lowest, median and highest score); a change of
level is reported at once. Reporter alone keeps only the one report that is due: while the broker can't be reached, each
window makes it anew, so that the next one that gets through reports a change of level, or summarizes all windows since
the last. delivery.py keeps reports until a collector has them, bounds their bytes and executes commands."""

from array import array
from struct import pack

from . import cbor
from .compat import const, epoch_s, ticks_diff, urandom
from .cose import Mac
from .errors import WireError

_VERSION = const(1)
_MAX_ID = const(64)
_RING = const(64)  # a summary's median is that of the last 64 windows
_FIELDS = const(19)
_NEWS_Q8 = const(768)  # surprise of a window that may name a new cause: 1 in 1,000


class Reporter:
    """device_id: 1 to 64 letters, digits, '-', '_', '.'; key: the device's secret, 32 bytes; heartbeat_windows: 1
    reports every window. `sequence` is the next report's number; `stream` is drawn at random at every start, so that
    (device, stream, sequence) names one report for ever; `boot` counts the starts."""

    subscriptions: tuple = ()  # topics that the transport should hear
    lost: int | None = None  # reports dropped since this boot
    trouble: tuple | None = None  # for the status: Delivery's counters
    more: "list | tuple" = (None, None, None)  # for the status: the values of its keys from 18; 20 is set here

    def __init__(
        self,
        device_id: str,
        key: bytes,
        *,
        prefix: str,
        heartbeat_windows: int = 30,
        sequence: int = 1,
        boot: int = 0,
        stream: bytes = b"",
    ) -> None:
        for c in (device_id + "/" * (len(device_id) - _MAX_ID) + "/" * (not device_id.strip("-_."))).encode():
            if c not in b"-_." and not (48 <= c < 58 or 97 <= c | 32 < 123):  # digits, letters
                raise WireError("device %r" % device_id)
        self.topic = prefix.rstrip("/") + "/" + device_id + "/"
        self.report_topic = self.topic + "report"
        self.status_topic = self.topic + "status"
        self.heartbeat_windows = heartbeat_windows
        self.sequence = sequence
        self.boot = boot
        self.stream = stream or urandom(4)
        self.published = 0
        self.uptime_s = 0
        self._ms = 0  # of the second that runs
        self._last_ms: int | None = None
        self._mac = Mac(key, b"report", device_id)
        self._status_mac = Mac(key, b"status", device_id)
        self._fields: list = [None] * _FIELDS
        self._blank = self._fields[5:]
        self._body = bytearray(96)
        self._due = 0  # a report is in _body: 1, or 2 where it reports a change of level
        self._scores = array("H", [0] * _RING)
        self._low = self._high = 0  # score
        self._windows = 0  # since the last report
        self._level = 0  # of the last report
        self._named = 0  # features that reports of this level have named: bit i is feature i
        self._status_number = 0

    def observe(self, verdict, now_ms: int) -> None:
        """Take one window's verdict, at now_ms (ticks); a report is made where one is due."""
        self.pass_time(now_ms)
        score_q8 = verdict.score_q8
        windows = self._windows
        if not windows or score_q8 < self._low:
            self._low = score_q8
        if not windows or score_q8 > self._high:
            self._high = score_q8
        self._scores[windows % _RING] = score_q8
        self._windows = windows = windows + 1
        news = self._news(verdict)
        one = news or self.heartbeat_windows == 1
        if not (one or windows >= self.heartbeat_windows) or self._due > 1 and news < 2:
            return
        fields = self._begin()
        fields[5] = self._level
        fields[6] = self._flags(verdict) or None
        fields[9] = verdict.evidence_q8
        if one:
            fields[5] = verdict.level
            fields[7] = score_q8
            fields[8] = verdict.surprise_q8
            if verdict.level or self._level:
                fields[10] = out = bytearray()
                for index, z_q4, share in verdict.explain(3):
                    out.append(index)
                    out.append(z_q4 & 255)
                    out.append(share)
        else:
            fields[11] = windows
            fields[12] = (self._low, sorted(self._scores[:windows])[min(windows, _RING) >> 1], self._high)
        self._encode()
        self._keep(news > 1)

    def _news(self, verdict) -> int:
        """Is this window worth a report of its own? 2: for its level; 1: an alarm goes on, for a cause that no report
        since the last heartbeat has named; 0: no."""
        if verdict.level != self._level:
            return 2
        if verdict.level > 1 and verdict.surprise_q8 >= _NEWS_Q8:
            for index, _, _ in verdict.explain(1):
                return not self._named >> index & 1
        return 0

    def _flags(self, verdict) -> int:
        return verdict.learning | verdict.unfit << 3

    def _begin(self) -> list:
        """-> the fields of a new report, with what all of them carry."""
        fields = self._fields
        fields[5:] = self._blank
        fields[0] = _VERSION
        fields[1] = self.sequence
        fields[2] = self.boot
        fields[3] = now_s = epoch_s() or None
        fields[4] = None if now_s else self.uptime_s
        fields[14] = self.lost
        fields[16] = self.stream
        return fields

    def _encode(self) -> None:
        self._body[:] = b""  # it keeps its memory: only the longest report so far allocates
        cbor.encode_fields(self._fields, self._body)

    def _keep(self, urgent: bool) -> None:
        """See to it that the report in _body is said, and call _said() then. Here pump() says it."""
        self.sequence += 1
        self._due = 1 + urgent

    def _said(self) -> None:
        fields = self._fields
        causes = fields[10]
        if causes is None or fields[5] != self._level:
            self._named = 0
        if causes:
            for i in range(0, len(causes), 3):
                self._named |= 1 << causes[i]
        self._level = fields[5]
        self._windows = 0

    def pass_time(self, now_ms: int) -> int:
        """-> the milliseconds since it was last called, 0 the first time."""
        last_ms = self._last_ms
        self._last_ms = now_ms
        if last_ms is None or last_ms == now_ms:
            return 0
        elapsed_ms = max(0, ticks_diff(now_ms, last_ms))
        self._ms += elapsed_ms
        self.uptime_s += self._ms // 1000
        self._ms %= 1000
        return elapsed_ms

    def pump(self, publish, now_ms: int) -> None:
        """Send what is due through publish(topic, payload, qos, retain); what that raises goes through, and the report
        stays due."""
        if self._due:
            self._publish(publish, self._body)
            self._due = 0
            self._said()

    def _publish(self, publish, value):
        self.published += 1
        return publish(self.report_topic, self._mac.seal(value), 1, False)

    def reconnected(self) -> None:
        """There is a new connection."""

    def save(self, state) -> None:
        """Put the count of the starts into the state."""
        state.put(b"device", pack("<I", self.boot))

    def send_status(self, publish, make) -> bool:
        """Publish the status that make() gives, retained -> False where it has to wait."""
        publish(self.status_topic, make(), 1, True)
        return True

    def status(
        self,
        online: bool = True,
        firmware: str | None = None,
        model: bytes | None = None,
        schema: bytes | None = None,
        window_ms: int | None = None,
        sources=None,
        adaptation_q8: int | None = None,
        learning: bool | None = None,
        agent: str | None = None,
        unscored=None,
    ) -> bytearray:
        """The sealed message for status_topic, retained; with online=False the last will. model, schema: their ids;
        sources: texts; agent: its version; unscored: counts of windows by cause (loop.py)."""
        fields: list = [_VERSION, None, self.boot, epoch_s() or None, self.uptime_s, online, None]
        if online:
            self._status_number += 1
            fields[6] = self._status_number
        fields += (firmware, model, schema, window_ms, sources, adaptation_q8, learning, agent)
        fields += (self.trouble, self.stream, unscored)
        fields += self.more
        fields[20] = window_ms and window_ms * self.heartbeat_windows // 1000
        value = bytearray()
        cbor.encode_fields(fields, value)
        return self._status_mac.seal(value)
