"""Recording: windows reach the disk one by one, through interruptions, errors and resumption."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from stonechat.errors import CollectorError
from stonechat.features import LEVEL, RATE
from stonechat.schema import Schema
from stonechat.window import Window
from stonechat_tools.cli import main
from stonechat_tools.recording.record import record
from stonechat_tools.traces.files import read_trace
from stonechat_tools.traces.format import TraceWriter

SCHEMA = Schema("test-1", (("ticks", "1", RATE), ("level", "1", LEVEL)))


class Collector:
    def __init__(self, fails: range = range(0)) -> None:
        self.schema = SCHEMA
        self.reads = 0
        self._fails = fails

    def read(self, values: list[int]) -> None:
        self.reads += 1
        if self.reads in self._fails:
            raise CollectorError("no reading")
        values[:] = [self.reads * 10, 7]

    def close(self) -> None:
        pass


def take(path: Path, collector: Collector, windows: int, resume: bool = False) -> bool:
    window = Window(SCHEMA, 20)
    with TraceWriter(path, SCHEMA, 20, resume=resume) as writer:
        return record(collector, window, writer, "benign", windows, lambda done: None)


def test_windows_are_deltas_and_readings(tmp_path: Path) -> None:
    assert take(tmp_path / "r.csv", Collector(), 5)
    trace = read_trace(tmp_path / "r.csv")
    assert len(trace) == 5
    assert (trace.deltas[:, 1] == 7).all()
    assert set(trace.deltas[:, 0].tolist()) <= {10, 20}  # 20 where a stalled machine cost a window


def test_a_failed_reading_costs_windows_not_the_recording(tmp_path: Path) -> None:
    collector = Collector(range(3, 6))
    assert take(tmp_path / "r.csv", collector, 5)
    trace = read_trace(tmp_path / "r.csv")
    assert len(trace) == 5 and trace.deltas[:, 0].max() < 40  # the gap of three readings is in no window


def test_a_source_that_is_gone_ends_the_recording(tmp_path: Path) -> None:
    with pytest.raises(CollectorError, match="no reading"):
        take(tmp_path / "r.csv", Collector(range(4, 1000)), 50)
    assert len(read_trace(tmp_path / "r.csv")) >= 1


def test_resume_fills_up(tmp_path: Path) -> None:
    take(tmp_path / "r.csv.gz", Collector(), 3)
    collector = Collector()
    assert take(tmp_path / "r.csv.gz", collector, 5, resume=True)
    assert len(read_trace(tmp_path / "r.csv.gz")) == 5
    assert take(tmp_path / "r.csv.gz", Collector(), 5, resume=True)
    assert len(read_trace(tmp_path / "r.csv.gz")) == 5


def test_command_with_a_vendors_counters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counter = tmp_path / "openings"
    counter.write_text("0")
    config = tmp_path / "door.toml"
    config.write_text(
        f'schema = "door-lock-1"\n[[counters]]\nname = "openings"\nunit = "1"\nkind = "rate"\npath = "{counter}"\n'
    )
    stop = threading.Event()

    def open_doors() -> None:
        openings = 0
        while not stop.is_set():
            openings += 1
            temporary = tmp_path / "openings.tmp"
            temporary.write_text(str(openings))
            os.replace(temporary, counter)
            time.sleep(0.01)

    firmware = threading.Thread(target=open_doors)
    firmware.start()
    try:
        out = tmp_path / "door.csv.gz"
        code = main(["record", str(out), "--counters", str(config), "--window", "0.1", "--windows", "4", "--json"])
    finally:
        stop.set()
        firmware.join()
    assert code == 0
    assert json.loads(capsys.readouterr().out)["schema"] == "door-lock-1"
    trace = read_trace(out)
    assert len(trace) == 4 and trace.deltas.min() > 0


@pytest.mark.parametrize("words", [("--collector", "proc"), ("--counters", "c.toml")])
def test_a_cgroup_is_watched_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str]) -> None:
    assert main(["record", str(tmp_path / "r.csv"), "--windows", "1", "--cgroup", "/sys/fs/cgroup", *words]) == 1
    assert "--cgroup needs BPF" in capsys.readouterr().err
    assert not (tmp_path / "r.csv").exists()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("schema = ", "not TOML"),
        ('schema = "a b"\n', "white space"),
        ('schema = "a"\n', r"\[\[counters\]\]"),
        ('schema = "a"\n[[counters]]\nname = "x"\n', "needs unit"),
    ],
)
def test_broken_counters_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, word: str) -> None:
    import re

    (tmp_path / "c.toml").write_text(text)
    assert main(["record", str(tmp_path / "r.csv"), "--counters", str(tmp_path / "c.toml")]) == 1
    message = capsys.readouterr().err
    assert re.search(word, message) and "Traceback" not in message


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed(tmp_path: Path, number: int) -> None:
    out = tmp_path / "r.csv.gz"
    command = [
        sys.executable,
        "-m",
        "stonechat_tools.cli",
        "record",
        str(out),
        "--collector",
        "proc",
        "--window",
        "0.1",
    ]
    process = subprocess.Popen(
        [*command, "--windows", "1000"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (out.exists() and out.stat().st_size and len(read_trace(out)) >= 3):
        time.sleep(0.05)
    process.send_signal(number)
    said, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert "--resume" in said and "Traceback" not in errors
    held = len(read_trace(out))
    assert held >= 3
    done = subprocess.run(
        [*command, "--windows", str(held + 2), "--resume"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert len(read_trace(out)) == held + 2
