"""`stonechat top`: what it shows is what the agent computes, and it leaves the terminal as it was."""

import argparse
import json
import os
import pty
import select
import subprocess
import sys
import termios
import time

import numpy as np
import pytest
from stonechat.errors import CollectorError, ConfigError, ModelError, StateError
from stonechat.features import RATE
from stonechat.linux.schemas import LINUX_PROC_1
from stonechat.model import load_model
from stonechat.scorer import Scorer
from stonechat.state import State
from stonechat_tools.device import top, top_screen, top_view
from stonechat_tools.modeling.device_path import features_q8
from stonechat_tools.modeling.fit import fit

WINDOW_MS = 1000
NAMES = [name for name, _, _ in LINUX_PROC_1.columns]
COMMAND = [sys.executable, "-m", "stonechat_tools.cli", "top", "--collector", "proc", "--interface", "lo"]


def _day(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    levels = np.exp(np.random.default_rng(1).uniform(1, 8, len(LINUX_PROC_1)))
    deltas = rng.poisson(levels * np.exp(rng.normal(0, 0.3, (count, len(LINUX_PROC_1)))))
    return np.minimum(deltas, 20_000)


@pytest.fixture(scope="module")
def model_bytes():
    elapsed = np.full(900, WINDOW_MS)
    model = fit(features_q8(LINUX_PROC_1, _day(900, 2), elapsed, WINDOW_MS), LINUX_PROC_1, WINDOW_MS, learn_windows=0)
    return model.to_tflite("top-test", 1)


class Replayed:
    """A collector that plays windows of deltas back as counters."""

    schema = LINUX_PROC_1

    def __init__(self, deltas: np.ndarray) -> None:
        self._rows = iter([[0] * len(NAMES), *deltas.tolist()])
        self._totals = [0] * len(NAMES)

    def read(self, values: list[int]) -> None:
        row = next(self._rows)
        for i, (_, _, kind) in enumerate(LINUX_PROC_1.columns):
            self._totals[i] += row[i]
            values[i] = self._totals[i] if kind == RATE else row[i]

    def close(self) -> None:
        pass


@pytest.fixture
def clock(monkeypatch):
    """Each step of a view comes exactly one window after the last."""
    now_ms = [0]

    def ticks_ms() -> int:
        now_ms[0] += WINDOW_MS
        return now_ms[0]

    monkeypatch.setattr(top_view, "ticks_ms", ticks_ms)


def test_with_a_model_it_shows_what_the_agent_computes(model_bytes, clock):
    deltas = _day(12, 3)
    deltas[8:, NAMES.index("bytes_out")] *= 500
    view = top_view.View(Replayed(deltas), load_model(model_bytes), None, 1.0)
    scorer = Scorer(load_model(model_bytes), LINUX_PROC_1)
    assert view.step() is None  # priming
    for row in deltas.tolist():
        shown = view.step()
        verdict = scorer.score(row, WINDOW_MS)
        assert shown["verdict"]["surprise"] == round(verdict.surprise_q8 / 256, 2)
        assert shown["verdict"]["evidence"] == round(verdict.evidence_q8 / 256, 3)
        assert [told["feature"] for told in shown["verdict"]["explain"]] == [NAMES[i] for i, _, _ in verdict.explain(3)]
        assert shown["features"]["bytes_out"]["value"] == row[NAMES.index("bytes_out")]
    assert shown["model"] == "top-test"
    assert shown["features"]["bytes_out"]["z"] > 4
    assert shown["verdict"]["explain"][0]["feature"] == "bytes_out"
    assert json.loads(json.dumps(shown)) == shown


def test_what_the_collector_still_settles_in_is_shown_and_not_scored(model_bytes, clock):
    deltas = _day(6, 7)
    collector = Replayed(deltas)
    collector.warmup_windows = 2
    view = top_view.View(collector, load_model(model_bytes), None, 1.0)
    view.step()
    shown = [view.step() for _ in range(2)]
    assert view.learning() == ""
    scorer = Scorer(load_model(model_bytes), LINUX_PROC_1)
    assert [window["verdict"] for window in shown] == [None, None]
    third = view.step()
    verdict = scorer.score(deltas[2].tolist(), WINDOW_MS)
    assert third["verdict"]["surprise"] == round(verdict.surprise_q8 / 256, 2)
    scorer.normalization.fill_q8(deltas[0].tolist(), WINDOW_MS, WINDOW_MS, f_q8 := [0] * len(NAMES))
    scorer.normalization.fill(f_q8, x := bytearray(len(NAMES)))
    assert [row["z"] for row in shown[0]["features"].values()] == [(b - 256 if b > 127 else b) / 16 for b in x]


def test_no_peer_is_learned_under_suspicion(model_bytes, clock):
    deltas = _day(60, 6)
    deltas[2:, NAMES.index("rst_out")] = 20_000_000
    collector = Replayed(deltas)
    held = []
    collector.hold_peers, collector.dump = held.append, bytes
    view = top_view.View(collector, load_model(model_bytes), None, 1.0)
    shown = [view.step() for _ in range(61)][1:]
    assert held == [window["verdict"]["level"] != "normal" for window in shown]
    assert not held[0] and held[-1]


def test_without_a_model_it_learns_what_is_usual_for_display(clock):
    deltas = _day(40, 4)
    deltas[-1, NAMES.index("conn_out")] *= 300
    view = top_view.View(Replayed(deltas), None, None, 1.0)
    view.step()
    seen = [view.step() for _ in range(40)]
    assert [shown["features"]["forks"]["z"] for shown in seen[: top_view.FIRST_LOOK_WINDOWS - 1]] == [None] * 4
    quiet = [abs(shown["features"]["forks"]["z"]) for shown in seen[top_view.FIRST_LOOK_WINDOWS :]]
    assert np.median(quiet) < 2
    assert seen[-1]["features"]["conn_out"]["z"] > 4
    assert seen[-1]["verdict"] is None
    assert view.learning() == ""
    view.recalibrate()
    assert "30 windows left" in view.learning()


def test_the_screen_fits_the_terminal_and_shows_the_loudest(model_bytes, clock):
    from rich.console import Console

    deltas = _day(3, 5)
    deltas[2, NAMES.index("rst_out")] *= 1000
    view = top_view.View(Replayed(deltas), load_model(model_bytes), None, 1.0)
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(top_screen.screen(view, by_z=False))
    for _ in range(4):
        view.step()
    console.print(top_screen.screen(view, by_z=True, rows=4, next_s=1.0))
    text = console.export_text()
    assert "waiting for the end of the first window" in text
    rows = [line.split()[0] for line in text.splitlines() if line.split() and line.split()[0] in NAMES]
    assert len(rows) == 4
    assert rows[0] == "rst_out"
    assert "22 quieter features need a taller terminal" in text
    assert "verdict normal" in text


def test_numbers_for_humans():
    shown = [top_screen.human(value) for value in (0.0, 3.26, 120.4, 9999, 12_345, 5_600_000, 7_300_000_000, 2.5e12)]
    assert shown == ["0", "3.3", "120", "9999", "12.3k", "5600k", "7300M", "2500G"]


def test_once_and_json_on_this_machine():
    ran = subprocess.run(
        [*COMMAND, "--no-model", "--interval", "0.2", "--windows", "2", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    windows = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(windows) == 2
    assert list(windows[0]["features"]) == NAMES
    assert windows[0]["schema"] == "linux-proc-1"
    ran = subprocess.run(
        [*COMMAND, "--no-model", "--interval", "0.2", "--once"], capture_output=True, text=True, timeout=60, check=True
    )
    assert "mem_avail" in ran.stdout


def test_wrong_arguments_are_told(tmp_path, model_bytes):
    for arguments, error in (
        (["--interval", "0"], ConfigError),
        (["--windows", "0"], ConfigError),
        (["--model", str(tmp_path / "broken.tflite"), "--collector", "proc", "--once"], ModelError),
        (["--model", str(tmp_path / "good.tflite"), "--collector", "bpf", "--once"], (ModelError, CollectorError)),
    ):
        (tmp_path / "broken.tflite").write_bytes(model_bytes[: len(model_bytes) // 2])
        (tmp_path / "good.tflite").write_bytes(model_bytes)  # but for linux-proc-1
        parser = argparse.ArgumentParser()
        top.add_arguments(parser)
        with pytest.raises(error):
            top.run(parser.parse_args(arguments))


def test_an_agents_state_is_only_read(tmp_path, model_bytes):
    path = tmp_path / "state"
    state = State(str(path))
    scorer = Scorer(load_model(model_bytes), LINUX_PROC_1, state)
    scorer.detector.location_q8 += 7
    scorer.save()
    state.save()
    again = Scorer(load_model(model_bytes), LINUX_PROC_1, top.read_state(str(path)))
    assert again.detector.location_q8 == scorer.detector.location_q8
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(StateError, match="--state"):
        top.read_state(str(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]


def test_keys_in_a_terminal_and_the_terminal_afterwards():
    main, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    process = subprocess.Popen(
        [*COMMAND, "--no-model", "--interval", "0.3"],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm", "LINES": "40", "COLUMNS": "100"},
    )
    try:
        text = _read_until(main, b"mem_avail")
        os.write(main, b"s")
        text += _read_until(main, b"conn_out")
        os.write(main, b"q")
        assert _ended(process, main)
    finally:
        process.kill()
        process.wait()
    assert b"Traceback" not in text
    assert process.returncode == 0
    assert termios.tcgetattr(terminal) == before
    os.close(main)
    os.close(terminal)


def _read_until(fd: int, word: bytes) -> bytes:
    text = b""
    until_s = time.monotonic() + 30
    while word not in text:
        assert time.monotonic() < until_s, text[-2000:]
        if select.select([fd], [], [], 0.2)[0]:
            text += os.read(fd, 65536)
    return text


def _ended(process: "subprocess.Popen[bytes]", fd: int) -> bool:
    """Whether it ends, its last words being read so that it can."""
    for _ in range(150):
        if select.select([fd], [], [], 0.1)[0]:
            os.read(fd, 65536)
        elif process.poll() is not None:
            return True
    return False
