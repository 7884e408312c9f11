"""The demo: its judgement of itself, what it prints, and short runs of the whole pipeline."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from stonechat.board.schema import COLUMNS
from stonechat.errors import ConfigError
from stonechat.linux import schemas
from stonechat.model import load_model
from stonechat_tools import demo
from stonechat_tools.demo import board, gateway
from stonechat_tools.demo.scenario import ATTACK_WINDOWS, Feed, Figures, Infection, Outcome, Scenario, Stopped, judge
from stonechat_tools.demo.words import WORDS, plain
from stonechat_tools.fleet.wire import Report
from stonechat_tools.lab import netns

STONECHAT = [sys.executable, "-m", "stonechat_tools.cli"]


def figures(**changes: Any) -> Figures:
    made = Figures("board", "a sensor's firmware", 10.0)
    made.attacks = [Outcome(f"attack{n}", "does harm", True, 2, ["new_peers"], True) for n in range(5)]
    made.benign_windows = 60
    made.reports_published = made.reports_received = 200
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def missed(count: int) -> list[Outcome]:
    return [Outcome("a", "does harm", n >= count, None if n < count else 2) for n in range(5)]


@pytest.mark.parametrize("changes", [{}, {"attacks": missed(1)}, {"starved": True}])
def test_a_whole_run_passes(changes: dict[str, Any]) -> None:
    made = figures(**changes)
    judge(made)
    assert (made.verdict, made.why) == ("passed", "")


PROBLEMS: list[tuple[dict[str, Any], str]] = [
    ({"attacks": missed(2)}, "3 of 5 attacks"),
    ({"attacks": []}, "0 of 0 attacks"),
    ({"false_alarms": 1}, "1 false alarms"),
    ({"reports_received": 199}, "199 of 200 reports"),
    ({"stopped": "no report arrived for 60 s"}, "no report arrived"),
]


@pytest.mark.parametrize(("changes", "says"), PROBLEMS)
def test_what_did_not_work_is_reported(changes: dict[str, Any], says: str) -> None:
    made = figures(**changes)
    judge(made)
    assert made.verdict == "failed" and says in made.why


@pytest.mark.parametrize(("changes", "says"), PROBLEMS)
def test_nothing_follows_from_a_starved_device(changes: dict[str, Any], says: str) -> None:
    made = figures(starved=True, **changes)
    judge(made)
    assert made.verdict == "not judged"
    assert "too busy" in made.why and says in made.why


def test_beats_tell_a_busy_machine_from_an_idle_one() -> None:
    beats = gateway.Beats()
    beats._last = "1000 5"
    assert beats.late_share() < gateway.LATE_SHARE
    beats._last = "1000 200"
    assert beats.late_share() > gateway.LATE_SHARE
    with gateway.Beats() as beats:
        give_up_s = time.monotonic() + 60
        while beats._last == "0 0" and time.monotonic() < give_up_s:
            time.sleep(0.1)
        assert int(beats._last.split()[0]) >= 4


# --- the scenario, on a device that does what the test says ----------------------------------------------------------


class ScriptedDevice:
    """Learns 4 windows; alarms `after` windows of an attack (0: never), and in the ordinary windows of `false`."""

    name = "scripted"
    title = "a device of the test"
    learn_windows = 4
    window_s = 0.5
    ordinary = 6
    columns = ["a", "b"]
    infections = [Infection("loud", "is loud", ("b",)), Infection("mute", "is mute", ("a",))]
    starved = False
    disturbed = False

    def __init__(self, after: dict[str, int], false: tuple[int, ...] = ()) -> None:
        self._after = after
        self._false = false
        self._attack = ""
        self._since = 0
        self.windows = 0

    def window(self) -> Report:
        self.windows += 1
        self._since += 1
        after = self._after.get(self._attack, 0)
        alarm = after and self._since >= after or self.windows in self._false
        report = Report("scripted", self.windows, 1, None, 0, level=2 if alarm else 0, evidence_q8=256 if alarm else 0)
        report.flags = 1 if self.windows <= self.learn_windows else 0
        report.packed = bytes((1, 64, 100)) if alarm else b""
        return report

    def infect(self, name: str) -> None:
        self._attack, self._since = name, 0

    def recover(self) -> None:
        self._attack = ""

    def end(self) -> int:
        return self.windows


def scripted(after: dict[str, int], false: tuple[int, ...] = ()) -> tuple[Figures, list[str]]:
    said: list[str] = []
    scenario = Scenario(ScriptedDevice(after, false), said.append)
    scenario.run()
    return scenario.figures, said


def test_the_scenario_counts_windows() -> None:
    got, said = scripted({"loud": 3})
    assert got.learning_windows == 4
    assert got.benign_windows == 1 + 6 + 1 and got.false_alarms == 0  # ends learning, ordinary, calm again
    loud, mute = got.attacks
    assert (loud.alarmed, loud.windows_to_alarm, loud.explained) == (True, 3, True)
    assert (mute.alarmed, mute.windows_to_alarm, mute.explained) == (False, None, False)
    assert got.reports_published == 4 + 8 + 3 + ATTACK_WINDOWS
    assert any("alarm after 3 windows" in line for line in said)
    assert any("NOT CAUGHT" in line for line in said)


def test_an_alarm_in_ordinary_windows_is_a_false_one() -> None:
    got, _ = scripted({"loud": 2, "mute": 2}, false=(7, 8, 10))
    assert got.false_alarms == 2  # the two windows running are one alarm


def test_what_an_attack_leaves_is_no_false_alarm() -> None:
    got, _ = scripted({"loud": 2, "mute": 2}, false=tuple(range(14, 17)))
    assert got.false_alarms == 0


def test_an_alarm_of_a_disturbed_window_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScriptedDevice, "disturbed", property(lambda self: self.windows in (7, 12)))
    got, _ = scripted({"loud": 2, "mute": 2}, false=(8, 9))
    assert got.false_alarms == 0 and got.disturbed_windows >= 3
    assert got.caught == 2
    got, _ = scripted({"loud": 2, "mute": 2}, false=(11,))  # long after the disturbance
    assert got.false_alarms == 1


def test_only_whole_windows_count_against_an_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScriptedDevice, "disturbed", property(lambda self: self.windows % 20 == 14))
    got, _ = scripted({"loud": ATTACK_WINDOWS + 3})
    assert [outcome.alarmed for outcome in got.attacks] == [True, False]


# --- what it prints -------------------------------------------------------------------------------------------------


def test_the_table_fits_80_columns() -> None:
    everything = [*demo.introduction("mosquitto"), *demo.further()]
    infections = [(infection, [column[0] for column in COLUMNS]) for infection in board.INFECTIONS]
    for schema in (schemas.LINUX_1, schemas.LINUX_PROC_1):
        columns = [column[0] for column in schema.columns]
        infections += [
            (Infection(name, gateway.WHAT[name], ()), columns) for name in gateway.ATTACKS_BY_SCHEMA[schema.name]
        ]
    for infection, columns in infections:
        for i in range(len(columns) - 2):
            outcome = Outcome(infection.name, infection.what, True, 12, columns[i : i + 3])
            everything += demo.table(figures(attacks=[outcome]))
    assert [line for line in everything if len(line) > demo.WIDTH] == []
    for apart in gateway.APART.values():
        assert len(f"GATEWAY: a Linux device in {apart}") <= demo.WIDTH


def test_every_feature_has_plain_words() -> None:
    columns = (*COLUMNS, *schemas.LINUX_1.columns, *schemas.LINUX_PROC_1.columns)
    assert {column[0] for column in columns} <= set(WORDS)
    assert plain(["new_peers", "new_peer_bytes", "bytes_out"], 30) == "new hosts, bytes to new hosts"


def test_the_models_are_those_of_the_devices() -> None:
    for name, schema, model in (
        ("board", "micropython-1", board.MODEL),
        ("gateway", "linux-1", gateway.MODELS["linux-1"]),
        ("gateway", "linux-proc-1", gateway.MODELS["linux-proc-1"]),
    ):
        metadata = load_model(demo.model_file(model).read_bytes()).metadata
        assert metadata.schema_name == schema, name


def test_an_unknown_model_is_one_error() -> None:
    with pytest.raises(demo.StonechatError, match="no-such-model"):
        demo.model_file("no-such-model")


def test_a_feed_gives_up_in_time_and_says_why() -> None:
    feed = Feed()
    with pytest.raises(Stopped, match="the agent ended"):
        feed.next(5, lambda: "the agent ended")
    with pytest.raises(Stopped, match="no report"):
        feed.next(0.3, lambda: None)
    feed.put(Report("board", 1, 1, None, 0))
    assert feed.next(5, lambda: None).sequence == 1


# --- the whole pipeline ---------------------------------------------------------------------------------------------


def run_demo(*words: str, timeout_s: float = 230, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*STONECHAT, "demo", *words],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=dict(os.environ, **environment),
    )


@pytest.mark.slow(15)
def test_the_board_is_learned_attacked_and_reported(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    done = run_demo("--only", "board", "--json", str(tmp_path / "out.json"), TMPDIR=str(tmp_path / "own"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    got = json.loads((tmp_path / "out.json").read_text())
    (device,) = got["devices"]
    assert device["caught"] == 5 and device["false_alarms"] == 0 and device["verdict"] == "passed"
    assert all(attack["explained"] for attack in device["attacks"]), device["attacks"]
    assert device["learning_windows"] == 128
    assert device["reports_received"] == device["reports_published"] == got["reports_stored"] > 128 + board.ORDINARY
    assert max(len(line) for line in done.stdout.splitlines()) <= demo.WIDTH
    assert "stonechat top" in done.stdout.splitlines()[-1] or done.stdout.rstrip().endswith(" top")
    assert list((tmp_path / "own").iterdir()) == []


@pytest.mark.slow(15)
def test_the_board_runs_on_cpython_where_there_is_no_micropython(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(board, "interpreter", lambda: ([sys.executable], "CPython"))
    one = demo.Demo((board.NAME,))
    one.run()
    got = one.figures[board.NAME]
    assert got.verdict == "passed", got
    assert "CPython" in got.title and got.caught >= 4 and got.false_alarms == 0


@pytest.mark.slow(20)
def test_it_works_without_mosquitto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("amqtt")
    monkeypatch.setattr("stonechat_tools.fleet.local_broker.mosquitto_path", lambda: None)
    one = demo.Demo((board.NAME,))
    one.run()
    assert one.broker == "amqtt"
    got = one.figures[board.NAME]
    assert (got.verdict, got.caught, got.false_alarms) == ("passed", 5, 0), got


def can_be_apart() -> bool:
    if not (shutil.which("ip") and shutil.which("nsenter") and shutil.which("unshare")):
        return False
    try:
        with netns.pair(30):
            return True
    except (ConfigError, OSError):
        return False


@pytest.mark.slow(70)
def test_the_gateway_is_learned_attacked_and_reported(tmp_path: Path) -> None:
    if not can_be_apart():
        pytest.skip("no network namespaces here")
    done = run_demo("--only", "gateway", "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    got = json.loads((tmp_path / "out.json").read_text())
    if got["skipped"]:
        pytest.skip(got["skipped"]["gateway"])
    (device,) = got["devices"]
    if device["verdict"] == "not judged":
        pytest.skip(device["why"])
    assert device["caught"] >= 4 and device["false_alarms"] == 0
    assert device["reports_received"] >= device["reports_published"] > 0


def test_a_device_that_cannot_be_made_is_named_and_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_scratch: Path) -> Any:
        raise ConfigError("no namespaces here")

    monkeypatch.setattr(gateway, "place", refuse)
    one = demo.Demo((gateway.NAME,))
    one.run()
    assert one.figures == {} and one.skipped == {"gateway": "no namespaces here"}
    assert "gateway: not shown: no namespaces here" in capsys.readouterr().out


@pytest.mark.slow(6)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*STONECHAT, "demo", "--only", "board"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ, TMPDIR=str(tmp_path)),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    assert process.stdout
    for line in process.stdout:
        if "learned its normal" in line:
            break
    process.send_signal(number)
    _, errors = process.communicate(timeout=100)
    watchdog.cancel()
    assert process.returncode in (130, 143), errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
