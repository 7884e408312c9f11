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
from math import inf

from .device_presence import (
    AWAY,
    NO_FACTS,
    RECONNECT_S,
    RESENT,
    RETURNS,
    SLACK_S,
    STATES,
    UNDATED_S,
    Change,
    Device,
    State,
    Stream,
    span,
)
from .wire import Report, Status

__all__ = ["AWAY", "NO_FACTS", "STATES", "Change", "Device", "Fleet", "State", "span"]


class Fleet:
    """All devices. report() and status() take what verified and is new; step() gives the changes of state since the
    last one. trust(): an operator has looked into what a device was called lying for."""

    def __init__(self, devices: Iterable[Device] = (), listening_s: float | None = None) -> None:
        self.devices = {device.name: device for device in devices}
        self.listening_s = listening_s
        self.changed: set[Device] = set()  # devices that differ from what is in the database
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
        stream = device.current
        number = report.sequence
        if stream is None or stream.identity != report.stream:
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
                device.own().gap_s = now_s
                self.gaps.add(device)
            stream.newest = number
            stream.seen += 1
        elif number >= stream.base >= 0:
            stream.seen += 1
        if report.lost > stream.announced:
            stream.announced = report.lost
        windows = report.windows
        if windows and windows != device.windows:
            # How many windows pass between reports: known at once where it grows, slowly where it shrinks.
            device.windows = windows if windows > device.windows else device.windows - (device.windows - windows >> 3)
        odd = device.odd
        if odd.sleep_until_s and now_s - odd.sleep_s > max(device.interval_s, SLACK_S):
            odd.sleep_s = odd.sleep_until_s = 0.0
        device.heard_s = now_s
        if device.state != "reporting":
            device.online = True
            if device.state != "unknown" or device.interval_s:  # else nothing can be judged until its status is here
                self._touched.add(device)

    def _other_stream(self, device: Device, report: Report, now_s: float, fresh: bool) -> Stream:
        """A report that is not of the current start."""
        stream = device.stream(report.stream)
        if stream is None:
            # what waited in an outbox since an earlier start is no new start
            stream = device.begin(Stream(report.stream, now_s), fresh and report.late_s is None)
            self.changed.add(device)
        elif fresh and report.late_s is None and report.sequence > stream.newest >= 0:
            prompt = self.listening_s is not None and now_s - self.listening_s > RECONNECT_S
            current = device.current
            if prompt and current is not None and now_s - current.began_s > UNDATED_S:
                device.returned(stream, now_s)
                self._touched.add(device)
        return stream

    def _again(self, device: Device, stream: Stream, number: int, now_s: float) -> None:
        """The same bytes once more. A device sends again what is on its way, never what is long acknowledged. After the
        collector's connection began, the broker may send much again."""
        current = device.current or stream
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
        current = device.current
        if not status.online:
            # the last will was written before the connection: it only says that this start's connection ended
            if current in (None, stream):
                if current is None:
                    device.begin(Stream(status.stream, now_s), True)
                if device.online is not False:
                    device.online = False
                    device.own().will_s = now_s
                self._touch(device)
            return
        if stream is not None and status.number <= stream.status:
            return  # the broker's retained copy once more, or an older one: not a sign of life
        if stream is None:
            stream = device.begin(Stream(status.stream, now_s), True)
        elif stream is not current and stream.status:  # a start that another one has followed goes on
            odd = device.own()
            odd.returns, odd.return_s = RETURNS, now_s
            device.returned(stream, now_s)
        elif stream is not current:
            device.again(stream)
        stream.status = status.number
        device.online = True
        device.heard_s = now_s
        if off_s is not None or device.odd.off_s is not None:
            device.own().off_s = off_s
        if status.window_ms:
            device.window_s = status.window_ms / 1000
        device.announced_s = status.heartbeat_s or 0
        device.counted = bool(status.counters)
        if status.sleep_s or device.odd.sleep_until_s:
            odd = device.own()
            odd.sleep_s, odd.sleep_until_s = (now_s, now_s + status.sleep_s) if status.sleep_s else (0.0, 0.0)
        self._touch(device)

    def _touch(self, device: Device) -> None:
        self.changed.add(device)
        device.due_s = 0.0
        self._touched.add(device)

    def trust(self, name: str) -> None:
        device = self.devices.get(name)
        if device is not None:
            odd = device.own()
            odd.lies = odd.returns = 0
            odd.why_lying = ""
            self._touch(device)

    def remove(self, name: str) -> None:
        device = self.devices.pop(name, None)
        if device is not None:
            self._touched.discard(device)
            self.changed.discard(device)
            self.gaps.discard(device)

    def shift(self, seconds: float) -> None:
        """The clock that now_s comes from was set by so much: what was heard before keeps its age."""
        for device in self.devices.values():
            device.shift(seconds)
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
        self.changed.add(device)
        if found.state in AWAY:
            odd = device.own()
            odd.left_s = odd.left_s or found.since_s
        elif device.odd.left_s and found.state == "reporting":
            device.outage(now_s)
        changes.append(Change(device, before, now_s))
