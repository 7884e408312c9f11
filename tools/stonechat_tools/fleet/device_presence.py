"""One device's presence: what was heard of it, what it announced, and the state that follows. States: presence.py.

A fleet has many of these, so what most devices have is in few slots, and what only some have (sleeps, last wills, lies,
gaps, outages) in an object of its own that the others share.
"""

from dataclasses import dataclass
from math import inf
from typing import Any

STATES = ("reporting", "asleep", "off", "silent", "gone", "lying", "unknown")
AWAY = ("silent", "gone")
SLACK_S = 30.0  # least time that a report may be late: the network, the broker, a batch
RECONNECT_S = 150.0  # after the collector is back: the longest back-off of a device, and its handshake
RESENT = 64  # numbers that a device may send again: what is on its way at most (30), and a margin
SETTLED_S = 7200.0  # a gap that nothing has filled by then stays
MAX_STREAMS = 4  # starts of a device that are remembered
UNDATED_S = 60.0 + SLACK_S  # a report that carries no age is not older than that as it arrives
RETURNS = 2  # times in a day that an earlier start has to go on until two starts are proved
DAY_S = 86_400.0
FLAPS = 5  # outages a day from which on a device counts as flapping
NO_FACTS = ("", "", "")  # schema, model, firmware: of the last status
HALF_S = DAY_S  # outages count half after that time
MAX_PATIENCE_S = 6 * 3600.0
MAX_SHARED = 4096  # different announced lengths of a window that are kept once


@dataclass(frozen=True, slots=True)
class State:
    """What is shown of a device: since when it is so, and why."""

    state: str
    since_s: float
    why: str


@dataclass(frozen=True, slots=True)
class Change:
    device: "Device"
    before: str
    at_s: float


class Stream:
    """One start of a device: the numbers of its reports and statuses."""

    __slots__ = ("announced", "base", "began_s", "identity", "newest", "seen", "status")

    def __init__(self, identity: bytes, began_s: float, status: int = 0, newest: int = -1) -> None:
        self.identity = identity
        self.began_s = began_s  # when it was first heard, or heard again after another one
        self.base = -1  # the first number that is counted
        self.newest = newest
        self.seen = 0  # different numbers from base on
        self.status = status  # number of its last status
        self.announced = 0  # reports that the device said a full outbox has dropped

    @property
    def missing(self) -> int:
        return 0 if self.base < 0 else self.newest - self.base + 1 - self.seen


class Odd:
    """What only some devices have. Times are 0 where there was none."""

    __slots__ = (
        "gap_s",
        "left_s",
        "lie_s",
        "lies",
        "lost",
        "missing",
        "off_s",
        "outage_s",
        "outages",
        "outages_s",
        "return_s",
        "returns",
        "sleep_s",
        "sleep_until_s",
        "unexplained",
        "why_lying",
        "will_s",
    )

    def __init__(self) -> None:
        self.sleep_s = 0.0  # when it announced a sleep, 0 where it did not
        self.sleep_until_s = 0.0
        self.off_s: float | None = None
        self.will_s = 0.0
        self.returns = 0
        self.return_s = 0.0
        self.lies = 0
        self.lie_s = 0.0
        self.why_lying = ""
        self.lost = 0  # reports that the device said are lost,
        self.missing = 0  # of streams that are no longer remembered
        self.unexplained = 0  # reports that nobody accounts for
        self.gap_s = 0.0  # when the last gap appeared
        self.left_s = 0.0  # since when it is away, 0 while it is not
        self.outages = 0.0  # of the last days, old ones count less
        self.outages_s = 0.0  # when that was counted
        self.outage_s = 0.0  # how long they last


_NOTHING = Odd()  # of devices with nothing odd; never written to
_WINDOWS: dict[float, float] = {}


class Device:
    """All that presence knows of one device. `state`, `since_s` and `why` are current as of the last step(). odd: for
    reading; own() gives one to write to."""

    __slots__ = (
        "_window_s",
        "announced_s",
        "counted",
        "current",
        "due_s",
        "facts",
        "heard_s",
        "name",
        "odd",
        "older",
        "online",
        "since_s",
        "state",
        "why",
        "windows",
    )

    def __init__(self, name: str, now_s: float) -> None:
        self.name = name
        self.state, self.since_s, self.why = "unknown", now_s, "no report yet"
        self.heard_s = now_s
        self.due_s = 0.0  # when the state has to be looked at again
        self.announced_s = 0  # heartbeat, 0 where the device does not say
        self._window_s = 0.0
        self.windows = 0  # that the device lately put into one report
        self.online: bool | None = None
        self.current: Stream | None = None
        self.older: tuple[Stream, ...] = ()  # earlier starts, the last one last
        self.counted = False  # it keeps reports until they are acknowledged: a number that is missing is a report
        self.facts = NO_FACTS
        self.odd = _NOTHING

    def own(self) -> Odd:
        if self.odd is _NOTHING:
            self.odd = Odd()
        return self.odd

    # --- derived --------------------------------------------------------------------------------------------------

    @property
    def window_s(self) -> float:
        return self._window_s

    @window_s.setter
    def window_s(self, window_s: float) -> None:
        if len(_WINDOWS) < MAX_SHARED:  # most of a fleet have the same
            window_s = _WINDOWS.setdefault(window_s, window_s)
        self._window_s = _WINDOWS.get(window_s, window_s)

    @property
    def interval_s(self) -> float:
        """Seconds between two reports, at most; 0 where that is not known."""
        return max(self.announced_s, self.windows * self._window_s)

    def outages_at(self, now_s: float) -> float:
        """Outages of the last days, as they count at now_s."""
        odd = self.odd
        return float(odd.outages * 0.5 ** (max(0.0, now_s - odd.outages_s) / HALF_S)) if odd.outages else 0.0

    def flapping(self, now_s: float) -> bool:
        return self.outages_at(now_s) >= FLAPS

    def patience_s(self, now_s: float) -> float:
        """How long this device's outages last as a rule: an outage is news only after that."""
        return min(1.5 * self.odd.outage_s, MAX_PATIENCE_S) if self.outages_at(now_s) >= 1.5 else 0.0

    def judge(self, now_s: float, listening_s: float | None) -> tuple[State, float]:
        """-> (the state at now_s, when it has to be judged again if nothing is heard). listening_s: since when a
        collector has heard everything, None while none does."""
        odd = self.odd
        if odd.lies:
            return State("lying", odd.lie_s, f"{odd.why_lying} ({odd.lies} signs)"), inf
        if odd.off_s is not None:
            return State("off", odd.off_s, "its user switched monitoring off"), inf
        every_s = self.interval_s
        late_s = max(2 * every_s - 1, every_s + SLACK_S)
        if odd.sleep_until_s and odd.sleep_s >= self.heard_s:
            due_s = self._due(max(odd.sleep_until_s, self.heard_s), late_s, listening_s)
            if now_s < due_s:
                return State("asleep", odd.sleep_s, f"announced for {span(odd.sleep_until_s - odd.sleep_s)}"), due_s
            why = f"did not wake up {span(late_s)} after the announced end of its sleep"
            return State("silent", odd.sleep_until_s, why), inf
        if self.state == "silent" and self.heard_s <= self.since_s:
            return State(self.state, self.since_s, self.why), inf  # whatever the collector did since
        if self.online is False:
            return State("gone", odd.will_s, "its connection to the broker ended (last will)"), inf
        if not every_s:
            return State("unknown", self.since_s, "no report yet"), inf
        due_s = self._due(max(self.heard_s, odd.sleep_until_s), late_s, listening_s)
        if now_s >= due_s:
            return State("silent", self.heard_s + every_s, f"no report for two intervals of {span(every_s)}"), inf
        if not self.windows:
            return State("unknown", self.since_s, "no report yet"), due_s
        return State("reporting", self.since_s if self.state == "reporting" else self.heard_s, ""), due_s

    @staticmethod
    def _due(heard_s: float, late_s: float, listening_s: float | None) -> float:
        if listening_s is None:
            return inf
        return max(heard_s + late_s, listening_s + late_s + RECONNECT_S)

    # --- what is heard --------------------------------------------------------------------------------------------

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The current one last."""
        return self.older if self.current is None else (*self.older, self.current)

    def stream(self, identity: bytes) -> Stream | None:
        for stream in self.streams:
            if stream.identity == identity:
                return stream
        return None

    def begin(self, stream: Stream, current: bool) -> Stream:
        if self.current is None:
            self.current = stream
        elif current:
            self.older = (*self.older, self.current)
            self.current = stream
        else:
            self.older = (*self.older, stream)
        if len(self.older) >= MAX_STREAMS:
            old, *rest = self.older
            self.older = tuple(rest)
            if old.missing or old.announced:
                odd = self.own()
                odd.missing += old.missing
                odd.lost += old.announced
        return stream

    def again(self, stream: Stream) -> None:
        """An earlier start is the current one."""
        self.older = tuple([each for each in self.streams if each is not stream])
        self.current = stream

    def lie(self, why: str, now_s: float) -> None:
        odd = self.own()
        if not odd.lies:
            odd.lie_s = now_s
        odd.lies += 1
        odd.why_lying = why
        self.due_s = 0.0

    def returned(self, stream: Stream, now_s: float) -> None:
        """An earlier start goes on with what was made after a later one began: two devices hold the key."""
        odd = self.own()
        odd.returns = odd.returns + 1 if now_s - odd.return_s < DAY_S else max(1, odd.returns)
        odd.return_s = stream.began_s = now_s
        self.again(stream)
        if odd.returns >= RETURNS:
            self.lie("its key is used twice: two starts run side by side", now_s)

    def settle(self, now_s: float) -> bool:
        """Count the gaps that nothing has filled in time -> whether they are settled."""
        if now_s - self.odd.gap_s < SETTLED_S:
            return False
        if self.counted:
            missing = self.odd.missing + sum([stream.missing for stream in self.streams])
            self.own().unexplained = max(0, missing - self.lost_announced)
        return True

    @property
    def unexplained(self) -> int:
        return self.odd.unexplained

    @property
    def lost_announced(self) -> int:
        return self.odd.lost + sum([stream.announced for stream in self.streams])

    def outage(self, now_s: float) -> None:
        """Learn from one that has ended."""
        odd = self.own()
        kept = 0.5 ** (max(0.0, now_s - odd.outages_s) / HALF_S)
        odd.outages = self.outages_at(now_s) + 1
        odd.outages_s = now_s
        lasted_s = now_s - odd.left_s
        odd.outage_s = max(lasted_s, odd.outage_s * kept) if lasted_s < DAY_S else odd.outage_s
        odd.left_s = 0.0

    def shift(self, seconds: float) -> None:
        """The clock was set by so much: what was heard before keeps its age."""
        self.due_s += seconds
        self.heard_s += seconds
        self.since_s += seconds
        if self.odd is not _NOTHING:
            for name in _TIMES:
                value = getattr(self.odd, name)
                if value:
                    setattr(self.odd, name, value + seconds)

    def not_after(self, now_s: float) -> bool:
        """Nothing was heard in the future: the clock that these times are of was ahead, and was set since -> whether
        it was so."""
        ahead = max(self.heard_s, self.since_s) > now_s
        self.heard_s, self.since_s = min(self.heard_s, now_s), min(self.since_s, now_s)
        odd = self.odd
        if odd is not _NOTHING:
            sleeps_s = odd.sleep_until_s - odd.sleep_s
            for name in _TIMES:
                value = getattr(odd, name)
                if value and value > now_s:
                    setattr(odd, name, now_s)
            odd.sleep_until_s = odd.sleep_s + sleeps_s
        return ahead

    # --- the database ---------------------------------------------------------------------------------------------

    def dump(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in _SAVED}
        if self.odd is not _NOTHING:
            found |= {name: value for name in Odd.__slots__ if (value := getattr(self.odd, name))}
        found["streams"] = [[s.identity.hex(), s.newest, s.status, s.missing, s.announced] for s in self.streams]
        return found

    @classmethod
    def load(cls, name: str, saved: dict[str, Any]) -> "Device":
        device = cls(name, saved.get("heard_s", 0.0))
        for key in _SAVED:
            if key in saved:
                setattr(device, key, saved[key])
        for key in Odd.__slots__:
            if saved.get(key):
                setattr(device.own(), key, saved[key])
        for identity, newest, status, missing, announced in saved.get("streams", ()):
            # what arrived since this was written is not known: gaps are counted anew from the next number on
            stream = device.begin(Stream(bytes.fromhex(identity), 0.0, status, newest), True)
            stream.announced = announced
            if missing:
                device.own().missing += missing
        return device


_SAVED = ("announced_s", "counted", "heard_s", "online", "since_s", "state", "why", "window_s", "windows")
_TIMES = tuple(name for name in Odd.__slots__ if name.endswith("_s") and name != "outage_s")


def span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
