"""Who is there, proved: by messages that verify, by their numbers and starts, by last wills, and by what was announced.

reporting   messages arrive as often as the device announced
asleep      it announced a sleep, and should be back by then
off         its user switched monitoring off, and the device said so
silent      nothing for two announced intervals, while a collector listened
gone        the broker published the device's last will: its connection has ended
lying       its key is used twice, or old messages are sent again
unknown     no report yet

Time is passed in, in seconds; no clock is read here. The devices' own clocks have no part in a state. While no
collector listens, nobody becomes silent. A Fleet is fed by the collector or made from the database, both by
monitor.py, and gives the same states.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import inf
from typing import Any

from .wire import Report, Status

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


class Device:
    """All that presence knows of one device. `state`, `since_s` and `why` are current as of the last step()."""

    __slots__ = (
        "announced_s",
        "counted",
        "dirty",
        "due_s",
        "facts",
        "gap_s",
        "heard_s",
        "left_s",
        "lie_s",
        "lies",
        "lost",
        "missing",
        "name",
        "off_s",
        "online",
        "outage_s",
        "outages",
        "outages_s",
        "return_s",
        "returns",
        "since_s",
        "sleep_s",
        "sleep_until_s",
        "state",
        "streams",
        "unexplained",
        "why",
        "why_lying",
        "will_s",
        "window_s",
        "windows",
    )

    def __init__(self, name: str, now_s: float) -> None:
        self.name = name
        self.state, self.since_s, self.why = "unknown", now_s, "no report yet"
        self.heard_s = now_s
        self.due_s = 0.0  # when the state has to be looked at again
        self.announced_s = 0  # heartbeat, 0 where the device does not say
        self.window_s = 0.0
        self.windows = 0  # that the device lately put into one report
        self.sleep_s = 0.0  # when it announced a sleep, 0 where it did not
        self.sleep_until_s = 0.0
        self.off_s: float | None = None
        self.online: bool | None = None
        self.will_s = 0.0
        self.streams: list[Stream] = []  # the current one last
        self.returns = 0
        self.return_s = 0.0
        self.lies = 0
        self.lie_s = 0.0
        self.why_lying = ""
        self.counted = False  # it keeps reports until they are acknowledged: a number that is missing is a report
        self.lost = 0  # reports that the device said are lost,
        self.missing = 0  # of streams that are no longer remembered
        self.unexplained = 0  # reports that nobody accounts for
        self.gap_s = 0.0  # when the last gap appeared
        self.left_s = 0.0  # since when it is away, 0 while it is not
        self.outages = 0.0  # of the last days, old ones count less
        self.outages_s = now_s  # when that was counted
        self.outage_s = 0.0  # how long they last
        self.facts = NO_FACTS
        self.dirty = True  # differs from what is in the database

    # --- derived --------------------------------------------------------------------------------------------------

    @property
    def interval_s(self) -> float:
        """Seconds between two reports, at most; 0 where that is not known."""
        return max(self.announced_s, self.windows * self.window_s)

    def outages_at(self, now_s: float) -> float:
        """Outages of the last days, as they count at now_s."""
        return float(self.outages * 0.5 ** (max(0.0, now_s - self.outages_s) / HALF_S))

    def flapping(self, now_s: float) -> bool:
        return self.outages_at(now_s) >= FLAPS

    def patience_s(self, now_s: float) -> float:
        """How long this device's outages last as a rule: an outage is news only after that."""
        return min(1.5 * self.outage_s, MAX_PATIENCE_S) if self.outages_at(now_s) >= 1.5 else 0.0

    def judge(self, now_s: float, listening_s: float | None) -> tuple[State, float]:
        """-> (the state at now_s, when it has to be judged again if nothing is heard). listening_s: since when a
        collector has heard everything, None while none does."""
        if self.lies:
            return State("lying", self.lie_s, f"{self.why_lying} ({self.lies} signs)"), inf
        if self.off_s is not None:
            return State("off", self.off_s, "its user switched monitoring off"), inf
        every_s = self.interval_s
        late_s = max(2 * every_s - 1, every_s + SLACK_S)
        if self.sleep_until_s and self.sleep_s >= self.heard_s:
            due_s = self._due(max(self.sleep_until_s, self.heard_s), late_s, listening_s)
            if now_s < due_s:
                return State("asleep", self.sleep_s, f"announced for {span(self.sleep_until_s - self.sleep_s)}"), due_s
            why = f"did not wake up {span(late_s)} after the announced end of its sleep"
            return State("silent", self.sleep_until_s, why), inf
        if self.state == "silent" and self.heard_s <= self.since_s:
            return State(self.state, self.since_s, self.why), inf  # whatever the collector did since
        if self.online is False:
            return State("gone", self.will_s, "its connection to the broker ended (last will)"), inf
        if not every_s:
            return State("unknown", self.since_s, "no report yet"), inf
        due_s = self._due(max(self.heard_s, self.sleep_until_s), late_s, listening_s)
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

    def stream(self, identity: bytes) -> Stream | None:
        for stream in self.streams:
            if stream.identity == identity:
                return stream
        return None

    def begin(self, stream: Stream, current: bool) -> Stream:
        if current:
            self.streams.append(stream)
        else:
            self.streams.insert(max(0, len(self.streams) - 1), stream)
        if len(self.streams) > MAX_STREAMS:
            old = self.streams.pop(0)
            self.missing += old.missing
            self.lost += old.announced
        return stream

    def lie(self, why: str, now_s: float) -> None:
        if not self.lies:
            self.lie_s = now_s
        self.lies += 1
        self.why_lying = why
        self.due_s = 0.0

    def returned(self, stream: Stream, now_s: float) -> None:
        """An earlier start goes on with what was made after a later one began: two devices hold the key."""
        self.returns = self.returns + 1 if now_s - self.return_s < DAY_S else max(1, self.returns)
        self.return_s = stream.began_s = now_s
        self.streams.remove(stream)
        self.streams.append(stream)
        if self.returns >= RETURNS:
            self.lie("its key is used twice: two starts run side by side", now_s)

    def settle(self, now_s: float) -> bool:
        """Count the gaps that nothing has filled in time -> whether they are settled."""
        if now_s - self.gap_s < SETTLED_S:
            return False
        missing = self.missing + sum([stream.missing for stream in self.streams])
        announced = self.lost + sum([stream.announced for stream in self.streams])
        if self.counted:
            self.unexplained = max(0, missing - announced)
        return True

    @property
    def lost_announced(self) -> int:
        return self.lost + sum([stream.announced for stream in self.streams])

    # --- the database ---------------------------------------------------------------------------------------------

    def dump(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in _SAVED}
        found["streams"] = [[s.identity.hex(), s.newest, s.status, s.missing, s.announced] for s in self.streams]
        return found

    @classmethod
    def load(cls, name: str, saved: dict[str, Any]) -> "Device":
        device = cls(name, saved.get("heard_s", 0.0))
        for key in _SAVED:
            if key in saved:
                setattr(device, key, saved[key])
        for identity, newest, status, missing, announced in saved.get("streams", ()):
            # what arrived since this was written is not known: gaps are counted anew from the next number on
            device.streams.append(Stream(bytes.fromhex(identity), 0.0, status, newest))
            device.missing += missing
            device.streams[-1].announced = announced
        device.dirty = False
        return device


_SAVED = tuple(sorted(set(Device.__slots__) - {"name", "streams", "due_s", "dirty", "facts"}))


class Fleet:
    """All devices. report() and status() take what verified and is new; step() gives the changes of state since the
    last one. trust(): an operator has looked into what a device was called lying for."""

    def __init__(self, devices: Iterable[Device] = (), listening_s: float | None = None) -> None:
        self.devices = {device.name: device for device in devices}
        self.listening_s = listening_s
        self.gaps: set[Device] = set()  # devices of which numbers are missing, since their gaps were last settled
        self._touched: set[Device] = set()
        self._next_s = 0.0

    def __iter__(self) -> Iterator[Device]:
        return iter(self.devices.values())

    def device(self, name: str, now_s: float) -> Device:
        found = self.devices.get(name)
        if found is None:
            found = self.devices[name] = Device(name, now_s)
            self._touched.add(found)
        return found

    def listen(self, since_s: float | None) -> None:
        """since_s: since when the collector is subscribed; None: it is not."""
        if since_s != self.listening_s:
            self.listening_s = since_s
            for device in self.devices.values():
                device.due_s = 0.0
            self._next_s = 0.0

    def report(self, report: Report, now_s: float, fresh: bool = True, conflict: bool = False) -> None:
        """A report of the database: fresh: its bytes were not there before; conflict: other bytes under its name
        were."""
        device = self.devices.get(report.device) or self.device(report.device, now_s)
        streams = device.streams
        number = report.sequence
        stream = streams[-1] if streams and streams[-1].identity == report.stream else None
        if stream is None:
            stream = self._other_stream(device, report, now_s, fresh)
        if not fresh:
            self._again(device, stream, number, now_s)
            return
        if conflict:
            device.lie("its key is used twice: one report number with other bytes", now_s)
            self._touched.add(device)
        elif number > stream.newest:
            if stream.base < 0:
                stream.base = number
            elif number > stream.newest + 1:
                device.gap_s = now_s
                self.gaps.add(device)
            stream.newest = number
            stream.seen += 1
        elif number >= stream.base >= 0:
            stream.seen += 1
        if report.lost > stream.announced:
            stream.announced = report.lost
        windows = report.windows
        if windows:
            # How many windows pass between reports: known at once where it grows, slowly where it shrinks.
            device.windows = windows if windows > device.windows else device.windows - (device.windows - windows >> 3)
        if device.sleep_until_s and now_s - device.sleep_s > max(device.interval_s, SLACK_S):
            device.sleep_s = device.sleep_until_s = 0.0
        device.heard_s = now_s
        if device.state != "reporting":
            device.online = True
            self._touched.add(device)

    def _other_stream(self, device: Device, report: Report, now_s: float, fresh: bool) -> Stream:
        """A report that is not of the current start."""
        stream = device.stream(report.stream)
        if stream is None:
            # what waited in an outbox since an earlier start is no new start
            current = not device.streams or (fresh and report.late_s is None)
            stream = device.begin(Stream(report.stream, now_s), current)
            device.dirty = True
        elif fresh and report.late_s is None and report.sequence > stream.newest >= 0:
            prompt = self.listening_s is not None and now_s - self.listening_s > RECONNECT_S
            if prompt and now_s - device.streams[-1].began_s > UNDATED_S:
                device.returned(stream, now_s)
                self._touched.add(device)
        return stream

    def _again(self, device: Device, stream: Stream, number: int, now_s: float) -> None:
        """The same bytes once more. A device sends again what is on its way, never what is long acknowledged. After the
        collector's connection began, the broker may send much again."""
        current = device.streams[-1]
        freed = current.newest - RESENT >= number and (stream is current or 0 <= current.base > number)
        settled = self.listening_s is not None and now_s - self.listening_s > RECONNECT_S
        if freed and settled:
            device.lie(f"old reports are sent again (number {number}, long acknowledged): a replay", now_s)
            self._touched.add(device)

    def status(self, status: Status, now_s: float, off_s: float | None = None) -> None:
        """A status or last will that verified; those that are not new are recognized here. off_s: since when
        monitoring is switched off, where the status says so."""
        device = self.device(status.device, now_s)
        stream = device.stream(status.stream)
        current = device.streams[-1] if device.streams else None
        if not status.online:
            # the last will was written before the connection: it only says that this start's connection ended
            if current in (None, stream):
                if current is None:
                    device.begin(Stream(status.stream, now_s), True)
                if device.online is not False:
                    device.online, device.will_s = False, now_s
                self._touch(device)
            return
        if stream is not None and status.number <= stream.status:
            return  # the broker's retained copy once more, or an older one: not a sign of life
        if stream is None:
            stream = device.begin(Stream(status.stream, now_s), True)
        elif stream is not current and stream.status:  # a start that another one has followed goes on
            device.returns, device.return_s = RETURNS, now_s
            device.returned(stream, now_s)
        elif stream is not current:
            device.streams.remove(stream)
            device.streams.append(stream)
        stream.status = status.number
        device.online = True
        device.heard_s = now_s
        device.off_s = off_s
        if status.window_ms:
            device.window_s = status.window_ms / 1000
        device.announced_s = status.heartbeat_s or 0
        device.counted = bool(status.counters)
        if status.sleep_s:
            device.sleep_s, device.sleep_until_s = now_s, now_s + status.sleep_s
        else:
            device.sleep_s = device.sleep_until_s = 0.0
        self._touch(device)

    def _touch(self, device: Device) -> None:
        device.dirty = True
        device.due_s = 0.0
        self._touched.add(device)

    def trust(self, name: str) -> None:
        device = self.devices.get(name)
        if device is not None:
            device.lies = device.returns = 0
            device.why_lying = ""
            self._touch(device)

    def remove(self, name: str) -> None:
        device = self.devices.pop(name, None)
        if device is not None:
            self._touched.discard(device)
            self.gaps.discard(device)

    def shift(self, seconds: float) -> None:
        """The clock that now_s comes from was set by so much: what was heard before keeps its age."""
        for device in self.devices.values():
            for name in _TIMES:
                value = getattr(device, name)
                if value:
                    setattr(device, name, value + seconds)
        if self.listening_s is not None:
            self.listening_s += seconds
        self._next_s = 0.0

    def step(self, now_s: float) -> list[Change]:
        """Judge who has to be judged -> the changes. Cheap to call often."""
        changes: list[Change] = []
        touched, self._touched = self._touched, set()
        for device in touched:
            self._judge(device, now_s, changes)
        if now_s >= self._next_s:
            next_s = inf
            for device in self.devices.values():
                if device.due_s <= now_s:
                    self._judge(device, now_s, changes)
                if device.due_s < next_s:
                    next_s = device.due_s
            self._next_s = max(next_s, now_s + 1.0)
        return changes

    def _judge(self, device: Device, now_s: float, changes: list[Change]) -> None:
        found, due_s = device.judge(now_s, self.listening_s)
        device.due_s = due_s
        self._next_s = min(self._next_s, due_s)
        if found.state == device.state:
            device.why = found.why
            return
        before = device.state
        device.state, device.since_s, device.why = found.state, found.since_s, found.why
        device.dirty = True
        if found.state in AWAY:
            device.left_s = device.left_s or found.since_s
        elif device.left_s and found.state == "reporting":
            _outage(device, now_s)
            device.left_s = 0.0
        changes.append(Change(device, before, now_s))


def _outage(device: Device, now_s: float) -> None:
    """Learn from an outage that has ended."""
    kept = 0.5 ** (max(0.0, now_s - device.outages_s) / HALF_S)
    device.outages = device.outages_at(now_s) + 1
    device.outages_s = now_s
    lasted_s = now_s - device.left_s
    device.outage_s = max(lasted_s, device.outage_s * kept) if lasted_s < DAY_S else device.outage_s


_TIMES = (
    "due_s",
    "gap_s",
    "heard_s",
    "left_s",
    "lie_s",
    "off_s",
    "outages_s",
    "return_s",
    "since_s",
    "sleep_s",
    "sleep_until_s",
    "will_s",
)


def span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
