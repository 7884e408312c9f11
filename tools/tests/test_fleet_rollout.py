"""Staged roll-outs: who takes a release when, and what stops it. The figures are `stonechat bench rollout`."""

import math

import numpy as np
import pytest
from stonechat_tools.bench import rollout as bench
from stonechat_tools.fleet.rollout import (
    BUCKETS,
    DAY_S,
    STAGES,
    Rollout,
    bucket,
    chosen,
    size,
    usual,
)

DEVICES = [f"pump-{i}" for i in range(400)]


def taken(stage: int, devices: list[str], release: bytes = b"release") -> list[str]:
    return chosen(release, devices, size(STAGES, stage, len(devices)))


def test_each_stage_holds_the_devices_of_the_one_before() -> None:
    before: set[str] = set()
    for stage in range(len(STAGES)):
        now = set(taken(stage, DEVICES))
        assert before <= now
        before = now
    assert before == set(DEVICES)
    assert [size(STAGES, stage, 400) for stage in range(6)] == [5, 5, 20, 100, 200, 400]
    assert [size(STAGES, stage, 3) for stage in range(6)] == [3] * 6
    assert taken(0, []) == []


def test_other_devices_are_first_in_another_release() -> None:
    first = [frozenset(taken(0, DEVICES, bytes([i]))) for i in range(20)]
    assert len(set(first)) == 20
    counts = np.histogram([bucket(b"release", f"device-{i}") for i in range(20_000)], bins=10, range=(0, BUCKETS))[0]
    assert counts.min() > 1800 and counts.max() < 2200


def test_a_stage_lasts_its_time_and_waits_for_its_devices() -> None:
    rollout = Rollout(1000.0)
    assert not rollout.advance(1000.0 + STAGES[0].soak_s - 1, 0)
    assert not rollout.advance(1000.0 + STAGES[0].soak_s, 1)
    assert rollout.advance(1000.0 + STAGES[0].soak_s, 0)
    assert rollout.stage == 1 and rollout.since_s == 1000.0 + STAGES[0].soak_s
    rollout.paused = True
    assert not rollout.advance(1e9, 0)
    rollout.resume()
    for _ in range(10):
        rollout.advance(rollout.since_s + 30 * DAY_S, 0)
    assert rollout.stage == len(STAGES) - 1


def test_a_halt_says_why_and_an_operator_can_resume() -> None:
    rollout = Rollout(0.0)
    for failed in (False, True, True):
        rollout.outcome(failed)
    assert rollout.halted == "2 of 3 devices failed; 1% fail anyway"
    assert not rollout.advance(1e9, 0)
    rollout.resume()
    assert not rollout.halted and rollout.failures.ratio == 0
    for _ in range(8):
        rollout.day(5, 0.7, 280, 280.0)
    assert "alarmed on" in rollout.halted and "are usual" in rollout.halted


def test_one_failure_among_the_first_five_is_no_halt() -> None:
    rollout = Rollout(0.0)
    for failed in (True, False, False, False, False):
        rollout.outcome(failed)
    assert not rollout.halted


def test_what_changes_for_the_whole_fleet_is_no_reason() -> None:
    """Ten times the alarms everywhere, for a week: an attack on the fleet, not the release."""
    rollout = Rollout(0.0)
    rng = np.random.default_rng(3)
    for _ in range(7):
        rollout.day(int(rng.binomial(100, 0.76)), 13.3, int(rng.binomial(1900, 0.76)), 252.7)
    assert not rollout.halted


def test_a_device_that_always_alarms_is_expected_to() -> None:
    assert usual(28, 28, 0.1) == pytest.approx((28 + 0.7) / 35)
    assert usual(0, 0, 0.1) == pytest.approx(0.1)
    rollout = Rollout(0.0)
    noisy = usual(28, 28, 0.133)
    for _ in range(60):
        rollout.day(1, noisy + 4 * 0.133, 265, 265.0)
    assert not rollout.halted


def test_days_on_which_a_group_is_empty_say_nothing() -> None:
    rollout = Rollout(0.0)
    rollout.day(100, 1.0, 0, 0.0)
    rollout.day(0, 0.0, 100, 1.0)
    assert rollout.alarms.ratio == 0


def test_simulated_releases_in_short() -> None:
    rng = np.random.default_rng(1)
    ends = {r.name: [bench.simulate(r, 2000, rng) for _ in range(150)] for r in bench.RELEASES}
    assert sum(bool(end.by) for end in ends["healthy"]) <= 5
    assert sum(bool(end.by) for end in ends["healthy, noisy devices"]) <= 5
    assert all(end.by for name in ("10 % fail", "alarms doubled", "alarms tenfold") for end in ends[name])
    assert np.median([end.devices for end in ends["10 % fail"]]) <= 30
    assert all(end.stage <= 2 for end in ends["alarms doubled"])  # before 25 %
    assert all(end.stage <= 1 for end in ends["alarms tenfold"])  # before 5 %


def test_the_bound_of_a_rate() -> None:
    assert bench.upper_bound(0, 100) == pytest.approx(1 - 0.05 ** (1 / 100))
    assert bench.upper_bound(5, 5) == 1.0
    assert math.isclose(bench.upper_bound(10, 1000), 0.01690, abs_tol=2e-5)
