"""The byte budget: no 24 hours send more than `bytes_per_day`, whatever is sent, restarts included.

Two buckets of the same size, filled at the same rate. Whatever is published is taken from `sent`, and waits until the
bytes are there: a report, the same report again, a status. Making a report takes its size from `made`, and so does
sending anything but a new report, so that no more reports are made than can be sent. The state keeps a level of `sent`
that the real one has not yet fallen to: a start goes on from there, with credit for the time since if the clock is set.
"""

from struct import pack, unpack

from .compat import const, epoch_s
from .errors import ConfigError, StonechatError

RESERVE_BYTES = const(256)  # what heartbeats, statuses and repeated reports leave for new changes of level
_LEAST = const(1000)
_LARGEST_MESSAGE = const(640)  # a bucket holds at least that: the largest message, and a report
_DAY_MS = const(86_400_000)


class Budget:
    """bytes_per_day: at least 1,000, or 0 for no limit; state: keeps the level across restarts, or None. Raises
    ConfigError."""

    def __init__(self, bytes_per_day: int, state) -> None:
        if 0 < bytes_per_day < _LEAST:
            raise ConfigError("bytes_per_day is %d: at least %d, or 0 for no limit" % (bytes_per_day, _LEAST))
        self.limited = bytes_per_day > 0
        self.most = max(bytes_per_day >> 3, _LARGEST_MESSAGE)
        self.sent = self.made = self._kept = self.most  # _kept: what a start would go on from now
        self._rate = bytes_per_day - self.most  # bytes a day
        self._part = 0  # of a byte, times _DAY_MS
        self._state = state
        self._gained = 0  # bytes since the state was written
        self._uptime_ms = 0
        self._since_s = 0  # when the state that this start found was written, until that time is credited
        kept = state.get(b"budget") if state and self.limited else None
        if kept is not None:
            level, self._since_s = unpack("<II", kept)
            self.sent = self.made = self._kept = min(level, self.most)

    def pass_time(self, elapsed_ms: int) -> None:
        self._fill(elapsed_ms)
        self._uptime_ms += elapsed_ms
        if self._since_s or self._gained > self.most >> 4:
            now_s = epoch_s()
            if self._since_s and now_s:
                self._fill(max(0, min(now_s - self._since_s, 86_400) * 1000 - self._uptime_ms))
                self._since_s = 0
                self._write(0)  # so that the next start is not credited with the same time
            elif not now_s:
                self._write(0)  # the next start may have no clock that knows of this time
            self._gained = 0

    def _fill(self, elapsed_ms: int) -> None:
        self._part += self._rate * elapsed_ms
        gained = self._part // _DAY_MS
        if gained:
            self._part -= gained * _DAY_MS
            self._gained += gained
            self.sent = min(self.sent + gained, self.most)
            self.made = min(self.made + gained, self.most)
            self._kept = min(self._kept + gained, self.most)

    def make(self, count: int, reserve: int) -> bool:
        """Take `count` bytes for a new report, if `reserve` bytes stay -> whether they were there."""
        if self.limited:
            if self.made < min(count + reserve, self.most):
                return False
            self.made -= count
        return True

    def interval_ms(self, count: int) -> int:
        """How often `count` bytes can be sent, even after a storm of alarms took all that was there: half of the time
        until they are there again beside RESERVE_BYTES, because silence is two intervals. 0 without a limit."""
        return (min(count + RESERVE_BYTES, self.most) * _DAY_MS // self._rate) >> 1 if self.limited else 0

    def allows(self, count: int, reserve: int) -> bool:
        """Whether `count` bytes may be published now, leaving `reserve`."""
        return not self.limited or self.sent >= min(count + reserve, self.most)

    def spend(self, count: int, reserve: int) -> None:
        """Take `count` bytes for what was published. With a reserve it was no new report."""
        if self.limited:
            self.sent -= count
            if reserve:
                self.made -= count
            if self.sent < self._kept:
                self._write(self.most >> 4)  # so much below: the next bytes need no write

    def save(self, below: int = 0) -> None:
        """Put the level, less `below` bytes, into the state."""
        if self._state and self.limited:
            self._gained = 0
            self._kept = max(0, self.sent - below)
            self._state.put(b"budget", pack("<II", self._kept, epoch_s()))

    def _write(self, below: int) -> None:
        self.save(below)
        if self._state:
            try:
                self._state.save()
            except StonechatError:
                pass  # a medium that refuses: the next change is another try
