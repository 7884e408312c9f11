"""Simulate staged roll-outs with the code that stops real ones, and openmv-ota's rule beside it.

Releases in a fleet whose devices alarm once a week each: a healthy one (1 % of the devices fail anyway), the same in a
fleet in which 2 % of the devices alarm on nine days of ten, one that fails on 10 %, one that doubles the alarm rate,
one that raises it tenfold. A run is a whole roll-out, all stages, with both tests. openmv-ota's rule stops at
failures/attempted > .05, from the first device on.

Examples:
  stonechat bench rollout
  stonechat bench rollout --runs 1000 --devices 500
"""

import argparse
import math
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..console import plain_table
from ..fleet.rollout import DAY_S, HISTORY_DAYS, STAGES, Rollout, usual

HELP = "how soon a staged roll-out stops a bad release, and how often a healthy one"
ALARMS_PER_DAY = 1 / 7
NOISY_CHANCE = 0.9  # of an alarm on a day of a noisy device
OPENMV_SHARE = 0.05


@dataclass(frozen=True)
class Release:
    name: str
    fails: float
    alarm_ratio: float
    noisy: float = 0.0


RELEASES = (
    Release("healthy", 0.01, 1.0),
    Release("healthy, noisy devices", 0.01, 1.0, noisy=0.02),
    Release("10 % fail", 0.10, 1.0),
    Release("alarms doubled", 0.01, 2.0),
    Release("alarms tenfold", 0.01, 10.0),
)


@dataclass(frozen=True)
class End:
    """devices: how many had taken the release when it stopped; stage: index; by: which test, "" where it went through.
    openmv: devices at which openmv-ota's rule stops, 0 for never."""

    devices: int
    stage: int
    by: str
    openmv: int


def simulate(release: Release, devices: int, rng: np.random.Generator) -> End:
    """One roll-out, until it stops or is through."""
    outcomes = rng.random(devices) < release.fails
    failed = np.cumsum(outcomes)
    over = np.nonzero(failed / np.arange(1, devices + 1) > OPENMV_SHARE)[0]
    openmv = int(over[0]) + 1 if len(over) else 0
    noisy = rng.random(devices) < release.noisy
    without = np.where(noisy, NOISY_CHANCE, 1 - math.exp(-ALARMS_PER_DAY))
    with_it = np.where(noisy, NOISY_CHANCE, 1 - math.exp(-release.alarm_ratio * ALARMS_PER_DAY))
    history: Any = rng.binomial(HISTORY_DAYS, without)
    expected: Any = usual(history, HISTORY_DAYS, history.mean() / HISTORY_DAYS)
    rollout = Rollout(0.0)
    now_s = 0.0
    done = 0
    while True:
        stage = STAGES[rollout.stage]
        wanted = stage.devices or max(math.ceil(stage.share * devices), STAGES[0].devices)
        for outcome in outcomes[done:wanted].tolist():
            done += 1
            rollout.outcome(outcome)
            if rollout.halted:
                return End(done, rollout.stage, "failures", openmv)
        for _ in range(stage.soak_s // DAY_S):
            now_s += DAY_S
            draws = rng.random(devices)
            rollout.day(
                int((draws[:done] < with_it[:done]).sum()),
                float(expected[:done].sum()),
                int((draws[done:] < without[done:]).sum()),
                float(expected[done:].sum()),
            )
            if rollout.halted:
                return End(done, rollout.stage, "alarms", openmv)
        if not rollout.advance(now_s, 0):
            return End(done, rollout.stage, "", openmv)


def upper_bound(found: int, of: int, confidence: float = 0.95) -> float:
    """One-sided upper bound of a rate, Clopper and Pearson (1934), by bisection."""
    if found == of:
        return 1.0
    low, high = found / of, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        log_terms = [
            math.lgamma(of + 1)
            - math.lgamma(i + 1)
            - math.lgamma(of - i + 1)
            + i * math.log(rate)
            + (of - i) * math.log1p(-rate)
            for i in range(found + 1)
        ]
        if sum(math.exp(term) for term in log_terms) > 1 - confidence:
            low = rate
        else:
            high = rate
    return high


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=10_000, help="roll-outs of each release (default 10000)")
    parser.add_argument("--devices", type=int, default=2000, help="devices in the fleet (default 2000)")
    parser.add_argument("--seed", type=int, default=1, help="of the random numbers (default 1)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    print(
        f"{args.runs} roll-outs each, {args.devices} devices, one alarm a device and week; stages: "
        + ", ".join(f"{stage} for {stage.soak_s // DAY_S} d" for stage in STAGES)
    )
    rng = np.random.default_rng(args.seed)
    figures: dict[str, Any] = {}
    rows = []
    for release in RELEASES:
        ends = [simulate(release, args.devices, rng) for _ in range(args.runs)]
        halted = [end for end in ends if end.by]
        openmv = [end.openmv for end in ends if end.openmv]
        by_stage = [sum(end.stage <= i for end in halted) / args.runs for i in range(len(STAGES))]
        figures[release.name] = {
            "halted": len(halted) / args.runs,
            "halted_bound_95": upper_bound(len(halted), args.runs),
            "by_failures": sum(end.by == "failures" for end in halted) / args.runs,
            "by_alarms": sum(end.by == "alarms" for end in halted) / args.runs,
            "median_devices": statistics.median(end.devices for end in halted) if halted else None,
            "halted_by_stage": {str(stage): share for stage, share in zip(STAGES, by_stage, strict=True)},
            "openmv_halted": len(openmv) / args.runs,
            "openmv_median_devices": statistics.median(openmv) if openmv else None,
        }
        figure = figures[release.name]
        rows.append(
            [
                release.name,
                f"{figure['halted']:.2%} (95 %: below {figure['halted_bound_95']:.2%})",
                f"{figure['by_failures']:.2%} / {figure['by_alarms']:.2%}",
                "-" if figure["median_devices"] is None else f"{figure['median_devices']:.0f}",
                f"{by_stage[1]:.1%} / {by_stage[2]:.1%}",
                f"{figure['openmv_halted']:.1%}, {figure['openmv_median_devices'] or 0:.0f} devices",
            ]
        )
    header = [
        "release",
        "stopped",
        "by failures / alarms",
        "devices (median)",
        "by the end of 1 % / 5 %",
        "openmv-ota's rule",
    ]
    print(plain_table(header, rows), end="")
    return figures
