"""Budgets, alarm rules and the bound: the constants are earned, and nothing is claimed that the recording can't
show."""

import json

import numpy as np
import pytest
from stonechat.errors import ModelError
from stonechat.features import RATE
from stonechat.model import load_model
from stonechat.own_model_file import replace_metadata
from stonechat.schema import Schema
from stonechat_tools import cli
from stonechat_tools.modeling import calibrate
from stonechat_tools.modeling.alarm_rules import (
    ALARM_RULES,
    FASTEST,
    AlarmRule,
    CalibrationError,
    choose,
    excursions,
    parse_budget,
    poisson_bound,
    rate_above,
)
from stonechat_tools.modeling.device_path import features_q8
from stonechat_tools.modeling.fit import DEFAULT_ALARM_RULES, fit
from stonechat_tools.traces.files import write_trace
from stonechat_tools.traces.trace import make_trace

SCHEMA = Schema("calibrate-1", tuple((f"c{i}", "1", RATE) for i in range(6)))
MINUTE_MS = 60_000


def quiet(count: int, seed: int = 0) -> np.ndarray:
    """Surprise of a well calibrated benign stream."""
    return (256 * -np.log10(np.random.default_rng(seed).random(count))).astype(np.int64)


def counts(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.poisson(np.exp(rng.normal(5, 0.4, (count, 1)) + rng.normal(0, 0.2, (count, 6))))


def trace(count: int, seed: int, label: str = "benign", device: str = "d"):
    rows = [(60.0 * i, MINUTE_MS, label, row) for i, row in enumerate(counts(count, seed).tolist())]
    return make_trace(SCHEMA, MINUTE_MS, rows, device)


@pytest.fixture(scope="module")
def model() -> bytes:
    f = features_q8(SCHEMA, counts(1500, 1), np.full(1500, MINUTE_MS), MINUTE_MS)
    return fit(f, SCHEMA, MINUTE_MS, learn_windows=64).to_tflite("calibrate-test", 3)


@pytest.mark.parametrize(
    ("text", "per_day"), [("1/30d", 1 / 30), ("2/7d", 2 / 7), ("1/12h", 2), ("3/week", 3 / 7), ("1/month", 1 / 30)]
)
def test_budgets_are_read(text, per_day):
    assert parse_budget(text).per_day == pytest.approx(per_day)


@pytest.mark.parametrize("text", ["", "1", "1/", "0/30d", "1/0d", "-1/3d", "one/30d", "1/30y"])
def test_other_budgets_are_refused(text):
    with pytest.raises(CalibrationError):
        parse_budget(text)


def test_the_bound_is_poissons():
    assert poisson_bound(0) == pytest.approx(2.996, abs=0.001)
    assert poisson_bound(1) == pytest.approx(4.744, abs=0.001)
    assert poisson_bound(5) == pytest.approx(10.513, abs=0.001)


def test_excursions_are_the_peaks_between_zeros():
    constants = (256, 512, 99999)
    assert excursions([0, 512, 512, 0, 0, 512, 0], constants) == [512, 256]
    assert excursions([512, 512], constants) == [512]
    assert excursions([0, 0], constants) == []


def test_the_rate_is_counted_and_beyond_it_extrapolated():
    peaks = list(range(1, 101))
    assert rate_above(peaks, 50, 10) == 5.1
    beyond = rate_above(peaks, 150, 10)
    assert 0 < beyond < 0.1
    assert rate_above(peaks, 400, 10) < beyond
    assert rate_above([], 10, 1) == 0


def test_a_short_recording_earns_the_default_rung_and_claims_nothing():
    choice = choose([quiet(1000)], MINUTE_MS, parse_budget("1/30d"))
    assert choice.rule == "steady" and choice.windows_to_alarm == 20
    assert not choice.proven and "too short" in choice.sentence() and "raised" not in choice.sentence()
    assert choice.bound_per_30d == pytest.approx(30 * 2.996 / (1000 / 1440), rel=0.01)


def test_a_long_quiet_recording_earns_a_faster_rung():
    windows = {choose([quiet(n)], MINUTE_MS, parse_budget("1/30d")).windows_to_alarm for n in (1000, 4000, 7000)}
    assert windows == {20, 10}


def test_a_budget_that_the_recording_shows_is_proven():
    choice = choose([quiet(10 * 1440)], MINUTE_MS, parse_budget("1/1d"))
    assert choice.proven and choice.alarms == 0
    assert choice.windows_to_alarm < 20


def test_bursts_cost_the_fast_rules():
    stream = quiet(9000)
    for start in range(500, 9000, 2000):
        stream[start : start + 20] = 1000
    choice = choose([stream], MINUTE_MS, parse_budget("1/30d"))
    assert choice.rule == "calm" and choice.windows_to_alarm == 40 and choice.alarms == 0


def test_what_even_the_slowest_rung_can_not_keep_is_raised():
    stream = quiet(3000)
    stream[1000:1080] = 1000
    choice = choose([stream], MINUTE_MS, parse_budget("1/30d"))
    assert choice.rule == "patient" and choice.alarm_rules[0][2] > ALARM_RULES[0].constants[0][2]
    assert "patient, its threshold raised" in choice.sentence()
    assert choice.alarms == 0


def test_the_fastest_stays_silent_is_long_enough_and_finds_what_is_faint():
    long = 14 * 1440
    choice = choose([quiet(long)], MINUTE_MS, parse_budget("1/30d"), fastest=True)
    assert (choice.rule, choice.windows_to_alarm) == ("swift", 3)
    assert not choice.proven and "soonest of those" in choice.sentence() and "too short" in choice.sentence()
    burst = quiet(long)
    burst[500:503] = 4000  # three windows as loud as can be: enough for an alarm by the fastest alarm rules
    choice = choose([burst], MINUTE_MS, parse_budget("1/30d"), fastest=True)
    assert choice.windows_to_alarm > 3 and choice.alarms == 0
    burst[500:580] = 4000
    with pytest.raises(CalibrationError, match="no alarm rule stays silent.*patient"):
        choose([burst], MINUTE_MS, parse_budget("1/30d"), fastest=True)
    # of those that stay silent it is not the one with the fewest windows, but the one that sees what is faint soonest
    assert all(rule.rules[0][0] <= 1 for rule in (*ALARM_RULES, *FASTEST))
    loud = AlarmRule("loud", ((1.0, 8.0, 14.0),), 0, 1.0)
    both = AlarmRule("both", ((1.0, 1.5, 3.0),), 0, 1.0)
    assert loud.windows < both.windows and both.mean_windows < loud.mean_windows


def test_a_recording_too_short_for_the_budget_is_refused_with_the_length_that_would_do():
    with pytest.raises(CalibrationError, match=r"0.69 benign device-days.*needs at least 9.0 device-days"):
        choose([quiet(1000)], MINUTE_MS, parse_budget("1/30d"), fastest=True)
    assert choose([quiet(1000)], MINUTE_MS, parse_budget("1/1d"), fastest=True).rule == FASTEST[-1].name


def test_the_model_is_rewritten_and_nothing_else_moves(model):
    data, choice = calibrate.calibrate(model, trace(2000, 5), parse_budget("1/30d"))
    old, new = load_model(model), load_model(data)
    assert new.metadata.alarm_rules == choice.alarm_rules
    assert new.metadata.knots == old.metadata.knots and new.metadata.version == 3
    for x in (bytes(6), bytes((127, 128, 3, 4, 5, 200))):
        assert bytes(old.run(x)) == bytes(new.run(x))
    again, _ = calibrate.calibrate(data, trace(2000, 5), parse_budget("1/30d"))
    assert len(again) == len(data)  # calibrating over and over does not let the file grow


def test_the_table_can_be_renewed(model):
    data, _ = calibrate.calibrate(model, trace(2000, 5), parse_budget("1/30d"), renew_table=True)
    assert load_model(data).metadata.knots != load_model(model).metadata.knots


def test_what_does_not_fit_is_refused(model):
    other = make_trace(Schema("other", SCHEMA.columns[:3]), MINUTE_MS, [(0.0, MINUTE_MS, "", [1, 2, 3])])
    with pytest.raises(CalibrationError, match="recording holds"):
        calibrate.calibrate(model, other, parse_budget("1/30d"))
    with pytest.raises(CalibrationError, match="at least 200"):
        calibrate.calibrate(model, trace(120, 5), parse_budget("1/30d"))
    with pytest.raises(ModelError, match="carries no"):
        replace_metadata(model, "nothing", b"")


def test_the_command(model, tmp_path, capsys):
    path, recording, out = tmp_path / "m.tflite", tmp_path / "later.csv.gz", tmp_path / "out.tflite"
    path.write_bytes(model)
    write_trace(trace(1500, 6), recording)
    assert cli.main(["calibrate", str(path), str(recording), "--budget", "1/30d", "-o", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rule"] == "steady" and load_model(out.read_bytes()).metadata.alarm_rules == DEFAULT_ALARM_RULES
    assert cli.main(["calibrate", str(path), str(recording)]) == 0
    assert "nothing written" in capsys.readouterr().out
    out.unlink()
    assert cli.main(["calibrate", str(path), str(recording), "--fastest", "-o", str(out)]) == 1
    assert "device-days" in capsys.readouterr().err and not out.exists()
    fastest = ["calibrate", str(path), str(recording), "--fastest", "--budget", "1/1d"]
    assert cli.main([*fastest, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["windows_to_alarm"] < 20
    assert cli.main(fastest) == 0
    assert "stays silent" in capsys.readouterr().out
    assert cli.main(["calibrate", str(path), str(recording), "--budget", "often"]) == 1
    assert "1/30d" in capsys.readouterr().err


def test_a_recording_too_short_for_the_budget_is_not_said_to_keep_it(model, tmp_path, capsys):
    (tmp_path / "model.tflite").write_bytes(model)
    write_trace(trace(600, 5), tmp_path / "later.csv.gz")
    words = ["calibrate", str(tmp_path / "model.tflite"), str(tmp_path / "later.csv.gz"), "--budget"]
    for budget, shown in (("1/30d", False), ("30/1d", True)):
        assert cli.main([*words, budget]) == 0
        assert ("keeps" in capsys.readouterr().out) is shown
        assert cli.main([*words, budget, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["shows"] is shown
