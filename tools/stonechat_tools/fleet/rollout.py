"""A staged roll-out: which devices take a release when, and the tests that stop it. Pure: time and facts come in.

Two sequential tests run over the whole roll-out. Each keeps a likelihood ratio of "bad" to "healthy" that is a
martingale while the release is healthy, so it crosses its limit with at most the stated probability however often
somebody looks (Ville's inequality; Wald, Sequential tests of statistical hypotheses, 1945).

Failures: each device that took the release succeeds or fails. A failure is a refusal, a rollback, silence after the
interval that the device announced, or reports that it lost. Healthy: 1 % fail anyway; bad: 10 %.

Alarms: on each day, the devices with an alarm among those that have the release, and among those that do not yet.
While the release is healthy, an alarm falls to either group by its share of the alarms that are usual for its devices,
whatever the day is like: weather, holidays and attacks on the whole fleet cancel, and a device that always alarms does
not count against the release. Bad: twice the rate. A device counts once a day.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

BUCKETS = 10_000
DAY_S = 86_400
HEALTHY_FAILS, BAD_FAILS = 0.01, 0.10
BAD_ALARM_RATIO = 2.0
HISTORY_DAYS = 28  # of alarms before the roll-out, by which devices are compared
PRIOR_DAYS = 7
FAILURE_LIMIT = math.log(1 / 0.012)  # both limits: crossed in .73 % of healthy roll-outs (`bench rollout`)
ALARM_LIMIT = math.log(1 / 0.006)


@dataclass(frozen=True)
class Stage:
    """devices: how many take it, or share: which part of them (0 to 1); soak_s: how long the stage lasts at least."""

    soak_s: int
    devices: int = 0
    share: float = 0.0

    def __str__(self) -> str:
        if self.devices:
            return f"{self.devices} device{'s' if self.devices > 1 else ''}"
        return f"{self.share:.0%}"


STAGES = (
    Stage(3 * DAY_S, devices=5),
    Stage(7 * DAY_S, share=0.01),
    Stage(7 * DAY_S, share=0.05),
    Stage(3 * DAY_S, share=0.25),
    Stage(3 * DAY_S, share=0.50),
    Stage(1 * DAY_S, share=1.0),
)


def bucket(release: bytes, device: str) -> int:
    """Where a device falls in a roll-out: 0 to BUCKETS - 1, another place in each release (release: the digest of its
    manifest), so that the same devices are not first every time."""
    return int.from_bytes(hashlib.sha256(release + device.encode()).digest()[:4], "big") % BUCKETS


def size(stages: tuple[Stage, ...], stage: int, devices: int) -> int:
    """How many of `devices` have the release by the end of a stage (an index of `stages`): no fewer than in a stage
    before it."""
    wanted = max(each.devices or math.ceil(each.share * devices) for each in stages[: stage + 1])
    return min(wanted, devices)


def chosen(release: bytes, devices: Iterable[str], count: int) -> list[str]:
    """The first `count` of the devices, in the order of their buckets."""
    order = sorted((bucket(release, device), device) for device in devices)
    return [device for _, device in order[:count]]


def usual(alarm_days: float, days: float, fleet_rate: float) -> float:
    """The chance of an alarm on one day of a device that had one on `alarm_days` of its last `days`; a short history
    counts for less: as if PRIOR_DAYS more had been like the fleet's, fleet_rate alarm days a device and day."""
    return (alarm_days + PRIOR_DAYS * fleet_rate) / (days + PRIOR_DAYS)


@dataclass
class Failures:
    """The test of single devices. ratio: log of the likelihood ratio so far."""

    ratio: float = 0.0
    succeeded: int = 0
    failed: int = 0

    def add(self, failed: bool) -> None:
        if failed:
            self.failed += 1
            self.ratio += math.log(BAD_FAILS / HEALTHY_FAILS)
        else:
            self.succeeded += 1
            self.ratio += math.log((1 - BAD_FAILS) / (1 - HEALTHY_FAILS))

    @property
    def halts(self) -> bool:
        return self.ratio >= FAILURE_LIMIT

    def __str__(self) -> str:
        return f"{self.failed} of {self.failed + self.succeeded} devices failed; {HEALTHY_FAILS:.0%} fail anyway"


@dataclass
class Alarms:
    """The test of the alarm rate. ratio: log of the likelihood ratio so far; the rest are sums over the days."""

    ratio: float = 0.0
    alarmed_with: int = 0  # device-days with an alarm
    alarmed_without: int = 0
    usual_with: float = 0.0
    usual_without: float = 0.0

    def add(self, alarmed_with: int, usual_with: float, alarmed_without: int, usual_without: float) -> None:
        """One day: devices with an alarm, and how many of them are usual (the sum of usual() over the group); with the
        release and without. A day on which one of the groups is empty says nothing."""
        if not usual_with or not usual_without:
            return
        healthy = usual_with / (usual_with + usual_without)
        bad = BAD_ALARM_RATIO * usual_with / (BAD_ALARM_RATIO * usual_with + usual_without)
        self.ratio += alarmed_with * math.log(bad / healthy) + alarmed_without * math.log((1 - bad) / (1 - healthy))
        self.alarmed_with += alarmed_with
        self.alarmed_without += alarmed_without
        self.usual_with += usual_with
        self.usual_without += usual_without

    @property
    def halts(self) -> bool:
        return self.ratio >= ALARM_LIMIT

    def __str__(self) -> str:
        return (
            f"devices with the release alarmed on {self.alarmed_with} days, where {self.usual_with:.1f} are usual; "
            f"those without it on {self.alarmed_without}, where {self.usual_without:.1f} are"
        )


@dataclass
class Rollout:
    """stage: index in `stages`; since_s: when it began; halted: why it stopped by itself, "" while it has not; paused,
    withdrawn: by the operator."""

    since_s: float
    stages: tuple[Stage, ...] = STAGES
    stage: int = 0
    failures: Failures = field(default_factory=Failures)
    alarms: Alarms = field(default_factory=Alarms)
    halted: str = ""
    paused: bool = False
    withdrawn: bool = False

    def outcome(self, failed: bool) -> None:
        """One device took the release, or failed to."""
        self.failures.add(failed)
        self._judge()

    def day(self, alarmed_with: int, usual_with: float, alarmed_without: int, usual_without: float) -> None:
        """As Alarms.add."""
        self.alarms.add(alarmed_with, usual_with, alarmed_without, usual_without)
        self._judge()

    def _judge(self) -> None:
        for test in (self.failures, self.alarms):
            if test.halts and not self.halted:
                self.halted = str(test)

    def advance(self, now_s: float, waiting: int) -> bool:
        """Go to the next stage, if it is time -> whether it did. waiting: devices of this stage whose outcome is not
        known yet."""
        last = self.stage == len(self.stages) - 1
        if self.halted or self.paused or self.withdrawn or last or waiting:
            return False
        if now_s - self.since_s < self.stages[self.stage].soak_s:
            return False
        self.stage += 1
        self.since_s = now_s
        return True

    @classmethod
    def load(cls, since_s: float, stages: tuple[Stage, ...], stage: int, tests: dict[str, Any]) -> "Rollout":
        """tests: as dump() gave them."""
        return cls(since_s, stages, stage, Failures(**tests["failures"]), Alarms(**tests["alarms"]))

    def dump(self) -> dict[str, Any]:
        return {"failures": asdict(self.failures), "alarms": asdict(self.alarms)}

    def resume(self) -> None:
        """The operator has looked: the tests begin anew, because what stopped it once would stop it at once again."""
        self.halted, self.paused = "", False
        self.failures, self.alarms = Failures(), Alarms()
