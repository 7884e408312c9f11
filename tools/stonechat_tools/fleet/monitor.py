"""The collector's view of its fleet while it runs: fed with what was committed, it judges, keeps and notifies.

It joins the judgements, which know no clock and no database, with both (judgements.py, monitor_notes.py). The
collector's worker calls took() after each commit and step() about once a second; others read states() from any thread.
"""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from .incidents import Alert, Incident, Incidents, Notification, Policy
from .judgements import HOLD_S, Judgements
from .labels import NONE, Labels
from .monitor_notes import MAX_IDS, Notes
from .presence import Change, Device, State
from .shards import Shard
from .store import DUPLICATE, STORED, Store, StoreError
from .wire import Report, Status

JUMP_S = 2.0  # a clock that is set by more than that is corrected for
LOOK_S = 2.0  # how often the database is asked whether an operator has changed something


@dataclass(frozen=True, slots=True)
class Seen:
    """A device as a table, a page or another program shows it."""

    device: str
    state: State
    level: int
    labels: Labels
    cause: str  # of its absence, where many share it
    flapping: bool
    lost: int  # reports that the device said are lost
    unexplained: int  # reports that nobody accounts for
    interval_s: float
    heard_s: float
    model: str
    schema: str
    firmware: str


def read_states(store: Store, now_s: float, listening_s: float | None) -> list[Seen]:
    """The states out of the database, without a collector: as of now_s. Hidden devices are left out."""
    monitor = Monitor(store, clock=lambda: now_s, steady=lambda: now_s)
    monitor.fleet.listen(listening_s)
    monitor.fleet.step(now_s)
    return monitor.states()


class Monitor:
    """store: the database, or None for a replay without one; notify: takes what has to be sent; clock, steady: the
    wall's clock and one that is never set, in seconds; on_change: called for each change of a state, from step().
    shard: which devices are this collector's; the others are judged by their own. unsent() -> ids of the incidents
    whose notification is on its way: those are sent again after a restart."""

    def __init__(
        self,
        store: Store | None = None,
        policy: Policy | None = None,
        notify: Callable[[Notification], None] | None = None,
        *,
        clock: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
        day_s: Callable[[float], float] | None = None,
        hold_s: float = HOLD_S,
        on_change: Callable[[Change], None] | None = None,
        shard: Shard | None = None,
        unsent: Callable[[], set[int]] = set,
    ) -> None:
        shard = shard or Shard()
        self._notify = notify
        self._more: Callable[[float], Iterable[Alert]] = lambda now_s: ()
        self._clock, self._steady = clock, steady
        self._offset_s = clock() - steady()
        self._lock = threading.RLock()
        self._on_change = on_change
        self._looked_s = -1e18
        self._judged = Judgements(hold_s)
        self.fleet, self.causes, self.sense = self._judged.fleet, self._judged.causes, self._judged.sense
        self._notes = None if store is None else Notes(store, shard, unsent)
        incidents: list[Incident] = []
        again: list[int] = []
        if self._notes is not None:
            incidents, again = self._notes.load(self._judged, self.now_s)
        first = (shard.number - 1) * MAX_IDS
        self.incidents = Incidents(policy or Policy(), incidents, day_s or _local_day_s, first, again)
        self._judged.hold(self.incidents.open.values(), self.now_s)
        if self._notes is not None:
            self._notes.look(self._judged, self.incidents, self.now_s)

    @property
    def labels(self) -> dict[str, Labels]:
        return self._judged.labels

    @labels.setter
    def labels(self, labels: dict[str, Labels]) -> None:
        self._judged.relabel(labels, self.now_s)

    def close(self) -> None:
        """Write down what is known. Raises StoreError."""
        with self._lock:
            if self._notes is not None:
                self._notes.save_all(self._judged, self.incidents, self.now_s)

    # --- what the collector reports -------------------------------------------------------------------------------

    @property
    def now_s(self) -> float:
        """The wall's clock, without its jumps since the last step()."""
        return self._steady() + self._offset_s

    def connected(self, is_connected: bool, why: str = "has no connection to its broker", anew: bool = False) -> None:
        """The collector takes messages, or does not and why. anew: it did not for a while, and nobody saw it."""
        judged = self._judged
        with self._lock:
            if is_connected:
                judged.deaf_s = None
                if anew or self.fleet.listening_s is None:
                    self.fleet.listen(self.now_s)
            else:
                judged.deaf_why = why
                if judged.deaf_s is None:
                    judged.deaf_s = self.now_s
                self.fleet.listen(None)

    def took(
        self,
        reports: Sequence[Report],
        results: Sequence[str],
        statuses: Iterable[Status] = (),
        rejections: Iterable[tuple[str, str]] = (),
    ) -> None:
        """What was committed: reports with what put() said of each; statuses that verified; (device, reason)."""
        judged = self._judged
        with self._lock:
            now_s = self.now_s
            for report, result in zip(reports, results, strict=True):
                if result == STORED:
                    judged.stored(report, now_s)
                    if report.device in judged.labels:
                        self._shown_again(report.device)
                elif result == DUPLICATE:
                    self.fleet.report(report, now_s, False)
                else:
                    judged.conflicts(report, now_s)
            for status in statuses:
                if judged.status(status, now_s) and status.device in judged.labels:
                    self._shown_again(status.device)
            for device, reason in rejections:
                judged.reject(device, reason)

    def _shown_again(self, device: str) -> None:
        found = self._judged.labels[device]
        if found.removed_s is not None:
            self._judged.labels[device] = replace(found, removed_s=None)
            if self._notes is not None:
                self._notes.shown(self._judged, device)

    def step(self) -> None:
        """Judge, keep, notify. Raises StoreError; the next step is another try."""
        with self._lock:
            jump_s = self._clock() - self.now_s
            if abs(jump_s) > JUMP_S:  # the wall's clock was set, or the machine was suspended
                self._shift(jump_s)
            now_s = self.now_s
            failure: StoreError | None = None
            if self._notes is not None and now_s - self._looked_s >= LOOK_S:
                try:
                    self._notes.look(self._judged, self.incidents, now_s)
                    self._looked_s = now_s
                except StoreError as error:  # that, too, somebody has to know
                    failure = error
            for change in self._judged.step(now_s):
                if self._on_change is not None:
                    self._on_change(change)
            alerts = self._judged.alerts(self.incidents.open, now_s)
            for alert in self._more(now_s):
                alerts[alert.key] = alert
            self.incidents.step(alerts, now_s)
            for notification in self.incidents.due(now_s):
                if self._notify is not None:
                    self._notify(notification)
            if failure is not None:
                raise failure
            if self._notes is not None:  # after that: what is lost here is sent twice, not never
                self._notes.save(self._judged, self.incidents, now_s)

    def _shift(self, jump_s: float) -> None:
        self._offset_s += jump_s
        self._judged.shift(jump_s)
        self.incidents.shift(jump_s)
        self._looked_s = -1e18
        if self._notes is not None:
            self._notes.forget_times()

    def also(self, alerts: Callable[[float], Iterable[Alert]]) -> None:
        """alerts(now_s): what somebody else judges, at each step()."""
        self._more = alerts

    def presence(self, device: str) -> Device | None:
        """What is known of a device, as of the last step()."""
        return self.fleet.devices.get(device)

    # --- reading --------------------------------------------------------------------------------------------------

    def states(self) -> list[Seen]:
        """All devices that are not removed, by name, as of the last step()."""
        with self._lock:
            found = []
            now_s = self.now_s
            for name in sorted(self.fleet.devices):
                device = self.fleet.devices[name]
                labels = self.labels.get(name, NONE)
                if labels.removed_s is not None:
                    continue
                cause = self.causes.cause_of(name)
                schema, model, firmware = device.facts
                found.append(
                    Seen(
                        name,
                        State(device.state, device.since_s, device.why),
                        self._judged.level(name),
                        labels,
                        cause.name if cause else "",
                        device.flapping(now_s),
                        device.lost_announced,
                        device.unexplained,
                        device.interval_s,
                        device.heard_s,
                        model,
                        schema,
                        firmware,
                    )
                )
            return found

    def acknowledge(self, number: int, by: str) -> bool:
        with self._lock:
            return self.incidents.acknowledge(number, by, self.now_s) is not None


def _local_day_s(now_s: float) -> float:
    there = time.localtime(now_s)
    return there.tm_hour * 3600.0 + there.tm_min * 60 + there.tm_sec + now_s % 1
