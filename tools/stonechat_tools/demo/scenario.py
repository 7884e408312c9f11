"""What each device of the demo goes through: it learns, lives ordinary windows, then meets each attack in turn.

Everything is counted in windows, never in seconds: a slow host makes the demo slower, and changes no result.
"""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from stonechat.errors import StonechatError

from stonechat_tools.fleet.wire import Report

ALARM = 2
LEARNING = 1  # the flag of a report
ATTACK_WINDOWS = 12  # that an attack may last before it counts as missed
MOST_WINDOWS = 24  # of an attack, those in which the host disturbed the device included
SHADOW_WINDOWS = 3  # in which what a disturbed window leaves in the evidence may still alarm
CALM_WINDOWS = 24  # after an attack at most, until the level is normal and the evidence gone
CALM_EVIDENCE_Q8 = 13  # 5 % of an alarm
_POLL_S = 0.25

Say = Callable[[str], None]


class Stopped(StonechatError):
    """The pipeline did not do its part; the message says which part, and its last words."""


class Feed:
    """The reports of one device in the order in which the collector committed them."""

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self._waiting: queue.Queue[Report] = queue.Queue()

    def put(self, report: Report) -> None:
        self._waiting.put(report)

    def next(self, patience_s: float, alive: Callable[[], str | None]) -> Report:
        """The next report. alive() says why the device can't send one, None while it can. Raises Stopped."""
        give_up_s = time.monotonic() + patience_s
        while True:
            try:
                return self._waiting.get(timeout=_POLL_S)
            except queue.Empty:
                why = alive()
                if self.stopping.is_set():
                    raise Stopped("interrupted") from None
                if why is not None:
                    raise Stopped(why) from None
                if time.monotonic() > give_up_s:
                    raise Stopped(f"no report arrived for {patience_s:.0f} s") from None


@dataclass(frozen=True)
class Infection:
    """name: as the device knows it; what: in words; features: those that belong to it."""

    name: str
    what: str
    features: tuple[str, ...]


class Device(Protocol):
    """A simulated device with an agent. `ordinary`: benign windows before the first attack; `starved`: whether the
    host was too busy to give this device its time, so that nothing follows from what its agent said; `disturbed`: the
    same of the window that window() gave last."""

    name: str
    title: str
    learn_windows: int
    window_s: float
    ordinary: int
    columns: list[str]
    infections: list[Infection]

    @property
    def starved(self) -> bool: ...
    @property
    def disturbed(self) -> bool: ...
    def window(self) -> Report: ...
    def infect(self, name: str) -> None: ...
    def recover(self) -> None: ...
    def end(self) -> int: ...


@dataclass
class Outcome:
    """What became of one attack. windows_to_alarm: those that ended since it began, the alarm's own included."""

    name: str
    what: str
    alarmed: bool = False
    windows_to_alarm: int | None = None
    top_features: list[str] = field(default_factory=list)
    explained: bool = False


@dataclass
class Figures:
    """What was seen of one device. verdict: passed, failed, or not judged (`why` says the reason)."""

    device: str
    title: str
    window_s: float
    learning_windows: int = 0
    benign_windows: int = 0
    disturbed_windows: int = 0  # ordinary ones in which the host withheld the processor: no alarm in them is judged
    false_alarms: int = 0
    false_alarm_features: list[list[str]] = field(default_factory=list)  # what the agent named, of each
    attacks: list[Outcome] = field(default_factory=list)
    reports_published: int = 0
    reports_received: int = 0
    starved: bool = False
    stopped: str = ""  # why it ended before its time
    verdict: str = "not judged"
    why: str = ""

    @property
    def caught(self) -> int:
        return sum(outcome.alarmed for outcome in self.attacks)


class Scenario:
    """One device's run -> its figures, filled in as it goes."""

    def __init__(self, device: Device, say: Say) -> None:
        self._device = device
        self._say = say
        self._in_alarm = False
        self._shadow = 0
        self._last: Report | None = None
        self.figures = Figures(device.name, device.title, device.window_s)

    def run(self) -> None:
        """Raises Stopped where the device ended before its time; the figures then hold what was seen until then."""
        try:
            self._run()
        except Stopped as error:
            self.figures.stopped = str(error)
            raise
        finally:
            self.figures.starved = self._device.starved

    def _run(self) -> None:
        device, figures = self._device, self.figures
        while (first := self._window()).flags & LEARNING:
            figures.learning_windows += 1
        self._count(first)
        self._say(f"{device.name}: learned its normal from {device.learn_windows} windows")
        self._ordinary(device.ordinary)
        self._say(f"{device.name}: {figures.benign_windows} ordinary windows, {figures.false_alarms} false alarms")
        for infection in device.infections:
            self._calm()
            figures.attacks.append(outcome := self._attack(infection))
            after = f"alarm after {_windows(outcome.windows_to_alarm)}" if outcome.alarmed else "NOT CAUGHT"
            self._say(f"{device.name}: {infection.what}: {after}")
        figures.reports_published = device.end()

    def _window(self) -> Report:
        self._last = self._device.window()
        self._shadow = SHADOW_WINDOWS if self._device.disturbed else max(0, self._shadow - 1)
        return self._last

    def _ordinary(self, windows: int) -> None:
        for _ in range(windows):
            self._count(self._window())

    def _count(self, report: Report) -> None:
        """An ordinary window: a rise to an alarm is a false one. What an attack has left is not."""
        alarm = report.level == ALARM
        if self._shadow:
            self.figures.disturbed_windows += 1
        else:
            self.figures.benign_windows += 1
        if alarm and not self._in_alarm and not self._shadow:
            self.figures.false_alarms += 1
            self.figures.false_alarm_features.append(self._named(report))
        self._in_alarm = alarm

    def _named(self, report: Report) -> list[str]:
        return [self._device.columns[feature.index] for feature in report.features]

    def _calm(self) -> None:
        """Ordinary windows until nothing is left of the attack before."""
        for _ in range(CALM_WINDOWS):
            if self._last and self._last.level == 0 and (self._last.evidence_q8 or 0) <= CALM_EVIDENCE_Q8:
                return
            self._ordinary(1)

    def _attack(self, infection: Infection) -> Outcome:
        outcome = Outcome(infection.name, infection.what)
        self._device.infect(infection.name)
        try:
            whole = 0
            for window in range(1, MOST_WINDOWS + 1):
                report = self._window()
                whole += not self._shadow
                if report.features:
                    outcome.top_features = self._named(report)
                if report.level == ALARM:
                    outcome.alarmed = self._in_alarm = True
                    outcome.windows_to_alarm = window
                if outcome.alarmed or whole == ATTACK_WINDOWS:
                    break
        finally:
            self._device.recover()
        outcome.explained = bool(set(outcome.top_features) & set(infection.features))
        return outcome


def _windows(count: int | None) -> str:
    return "1 window" if count == 1 else f"{count} windows"


def judge(figures: Figures) -> None:
    """Fill in verdict and why. At most one attack may be missed; ordinary windows raise no alarm; the collector has
    every report that the device published."""
    problems = [figures.stopped] if figures.stopped else []
    if figures.caught < len(figures.attacks) - 1 or not figures.attacks:
        problems.append(f"{figures.caught} of {len(figures.attacks)} attacks were caught")
    if figures.false_alarms:
        named = " and ".join(", ".join(features) for features in figures.false_alarm_features)
        problems.append(f"{figures.false_alarms} false alarms" + (f" ({named})" if named else ""))
    if figures.reports_received < figures.reports_published:
        problems.append(f"{figures.reports_received} of {figures.reports_published} reports arrived")
    figures.verdict = "passed"
    if problems:
        figures.verdict = "not judged" if figures.starved else "failed"
        figures.why = "; ".join(problems)
        if figures.starved:
            figures.why = "this machine was too busy to give the device its time (" + figures.why + ")"
