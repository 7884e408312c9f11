"""What only the fleet shows, in virtual time: outbreaks, models, clocks, devices unlike their siblings; and chance."""

import math
import random

import pytest
from stonechat_tools.fleet.chance import normal_quantile, poisson_tail, upper_share
from stonechat_tools.fleet.sense import Sense
from stonechat_tools.fleet.wire import Report
from stonechat_tools.proofs import fleet_replay as replay

BEGAN_S = 1_795_000_000.0
HOUR_S, DAY_S = 3600.0, 86_400.0


def test_the_tail_of_a_poisson_number() -> None:
    for mean in (0.001, 0.5, 3.0, 40.0, 900.0):
        for count in (0, 1, 2, 5, 40, 80, 1000):
            terms = [math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(count)]
            found = poisson_tail(count, mean)
            assert 0 <= found <= 1
            if 1 - math.fsum(terms) > 1e-9:
                assert found == pytest.approx(1 - math.fsum(terms), rel=1e-5)
    assert poisson_tail(30, 1.0) == pytest.approx(1.43e-33, rel=0.01) and poisson_tail(3, 0.0) == 0
    assert normal_quantile(0.5) == pytest.approx(0, abs=1e-6) and normal_quantile(0.975) == pytest.approx(
        1.96, abs=0.001
    )
    assert upper_share(5, 10) == 1 and 0.1 < upper_share(10, 100) < 0.2


@pytest.mark.parametrize("seed", range(3))
def test_an_outbreak_in_three_percent_is_alerted_within_two_minutes(seed: int) -> None:
    assert (replay.outbreak(seed)["seconds until alerted"] or 999) <= 120


def test_an_outbreak_is_alerted_in_a_fleet_that_is_new_and_in_one_that_is_small() -> None:
    assert (replay.outbreak(1, before_days=0.01)["seconds until alerted"] or 999) <= 120
    assert (replay.outbreak(1, size=200, share=0.05)["seconds until alerted"] or 999) <= 120


@pytest.mark.parametrize("seed", range(2))
def test_a_quiet_week_raises_at_most_one_fleet_alert(seed: int) -> None:
    found = replay.quiet(seed)
    assert found["fleet alerts"] <= 1 and found["alarms"] > 300


@pytest.mark.slow(5)
def test_a_noisy_fleet_is_learned() -> None:
    """Ten times the alarms: the first hours teach the rate, then it is as quiet."""
    assert replay.quiet(1, days=4, alarms_per_month=10)["fleet alerts"] <= 1


class Fleet:
    def __init__(self, size: int, models: int = 1) -> None:
        self.now_s = BEGAN_S
        self.sense = Sense(lambda device: ("class", f"model-{int(device[2:]) % models}"))
        self.random = random.Random(5)
        self.names = [f"d-{n}" for n in range(size)]
        self.number = 0
        for name in self.names:
            self.sense.moved(name, self.now_s)
        self.sense.step(self.now_s)

    def report(
        self, name: str, level: int = 0, score_q8: int = 300, off_s: int = 0, signs: tuple[int, ...] = ()
    ) -> None:
        self.number += 1
        packed = b"".join(bytes((index, 80, 30)) for index in signs)  # 5.0 deviations each, 30 percent
        at_s = int(self.now_s - off_s)
        report = Report(name, self.number, 1, at_s, None, b"aaaa", level, score_q8=score_q8, packed=packed)
        self.sense.report(report, self.now_s)

    def run(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s = min(end_s, self.now_s + 60)
            self.sense.step(self.now_s)


def test_a_model_that_alarms_more_than_its_class_is_named() -> None:
    fleet = Fleet(1000, models=4)
    fleet.run(3 * DAY_S)
    for n in range(40):  # over eight hours, each with another explanation
        fleet.report(f"d-{4 * n + 1}", 2, signs=(n, n + 40))
        fleet.run(720)
    assert [each.key for each in fleet.sense.open.values()] == ["model-model-1"]
    fleet.run(2 * DAY_S)
    assert not fleet.sense.open


def test_alarms_that_have_nothing_in_common_are_no_outbreak_and_late_ones_none_at_all() -> None:
    fleet = Fleet(1000)
    fleet.run(3 * DAY_S)
    for n in range(20):
        fleet.number += 1
        late = Report(f"d-{n}", fleet.number, 1, None, 5, b"aaaa", 2, packed=bytes((3, 80, 90)), late_s=9000)
        fleet.sense.report(late, fleet.now_s)
    fleet.run(60)
    assert not fleet.sense.open
    assert fleet.sense.siblings("d-1", fleet.now_s)[:2] == (999, 0)


def test_an_outbreaks_own_alarms_do_not_raise_the_usual_rate() -> None:
    fleet = Fleet(1000)
    fleet.run(3 * DAY_S)
    before = fleet.sense.groups["class"].rate()
    for n in range(60):
        fleet.report(f"d-{n}", 2, signs=(3,))
    fleet.run(60)
    assert [len(each.devices) for each in fleet.sense.open.values()] == [60]
    fleet.run(1500)
    fleet.report("d-900", 2, signs=(3, 4))  # one more joins
    fleet.run(60)
    assert [len(each.devices) for each in fleet.sense.open.values()] == [61]
    fleet.run(3 * HOUR_S)
    assert not fleet.sense.open
    assert fleet.sense.groups["class"].rate() <= before


def test_a_clock_that_is_wrong_and_right_again() -> None:
    fleet = Fleet(3)
    for _ in range(3):
        fleet.report("d-0", off_s=7200)
        fleet.report("d-1", off_s=60)
        fleet.run(60)
    assert fleet.sense.wrong_clocks.keys() == {"d-0"}
    fleet.report("d-0")
    assert not fleet.sense.wrong_clocks


@pytest.mark.slow(5)
def test_a_device_that_drifts_away_from_its_siblings_and_nobody_else() -> None:
    fleet = Fleet(60)
    for hour in range(24 * 10):
        day = 150 * math.sin(hour / 24 * 2 * math.pi)  # all of them do more at noon
        for n, name in enumerate(fleet.names):
            drift = 200 if n == 7 and hour > 24 * 6 else 0
            for _ in range(3):
                score = 400 + day + 4 * n + drift + fleet.random.gauss(0, 60)  # some are always louder
                fleet.report(name, score_q8=max(1, int(score)))
        fleet.run(HOUR_S)
        if hour == 24 * 6:
            assert not fleet.sense.apart
    assert fleet.sense.apart.keys() == {"d-7"}


def test_a_storm_of_alarms_costs_little() -> None:
    fleet = Fleet(20_000)
    for n in range(20_000):
        fleet.report(f"d-{n}", 2, signs=(n % 50, 50 + n % 7))
        if n % 1000 == 0:
            fleet.now_s += 1
            fleet.sense.step(fleet.now_s)
    assert any(each.kind == "outbreak" for each in fleet.sense.open.values())
    for group in fleet.sense.groups.values():
        assert len(group.onsets) <= 50_000 and len(group.news) <= 120


def test_a_device_that_names_a_new_schema_each_time_leaves_nothing_behind() -> None:
    facts = {"d-0": ("a", "m")}
    sense = Sense(lambda device: facts[device])
    for n in range(1000):
        facts["d-0"] = (f"class-{n}", f"model-{n}")
        sense.moved("d-0", BEGAN_S)
    assert len(sense.groups) == 1 and len(sense.groups["class-999"].models) == 1
