"""Every verb with every kind of bad argument: one line on stderr, a status from 0 to 2, nothing left behind."""

import argparse
import contextlib
import gzip
import importlib
import io
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from stonechat.linux.schemas import LINUX_PROC_1
from stonechat_tools import cli
from stonechat_tools.traces.files import write_trace
from stonechat_tools.traces.trace import make_trace

MODEL = "linux-proc-1"
NUMBERS = ["-1", "0", "nan", "-inf", "1e308", "1" + "0" * 30, "9" * 5000, "x", "", "²"]
FILES = {
    "empty": b"",
    "binary": bytes(range(256)) * 8,
    "brackets": b"[" * 5000,
    "digits": b"9" * 5000,
    "deep.toml": b"x = " + b"[" * 5000,
    "digits.toml": b"x = " + b"9" * 5000,
    "nul.toml": b'name = "a\\u0000"\nrecordings = "b\\u0000"\nschema = "c\\u0000"\n',
    "latin.toml": 'name = "é"\n'.encode("latin-1"),
    "utf16.csv": "t,n\n1,2\n".encode("utf-16"),
    "cut.csv.gz": gzip.compress(b"x" * 9000)[:30],
    "object.json": b"{}",
    "number.json": b"3",
    "model.tflite": b"\x1c\0\0\0TFL3" + b"\xff" * 200,
    "weights.npz": b"PK\x03\x04" + b"\0" * 60,
    "plain.txt": b"hello\n",
}
WORDS = [
    *FILES,
    "missing",
    "no/such/folder/x.csv",
    "folder",
    "shut.csv",
    "/dev/zero",
    "/dev/full",
    "",
    "x" * 5000,
    "é\udcff",
]
# the shortest arguments with which a verb works, or fails for another reason than its arguments
BASE = {
    "home-assistant": ["--remove"],  # else it goes on for ever
    "record": ["o.csv", "--window", "0.05", "--windows", "1", "--collector", "proc"],
    "train": ["good.csv", "-o", "out", "--seeds", "1"],
    "quantize": ["weights.npz", "good.csv", "-o", "q.tflite"],
    "calibrate": [MODEL, "good.csv", "-o", "c.tflite"],
    "evaluate": [MODEL, "good.csv"],
    "trial": [MODEL, "--figures", "object.json"],
    "inspect": [MODEL],
    "report": ["d-1", "--db", "r.db"],
    "command": ["d-1", "calibrate", "--keys", "folder"],
    "broker-config": ["folder"],
    "top": ["--once", "--interval", "0.1", "--collector", "proc", "--no-model"],
    "build": ["--out", "b", "--model", "missing"],
    "deploy": ["--port", "/dev/null", "--arch", "armv6m", "--dry-run"],  # else each case starts mpremote
    "dataset import": ["good.csv", "-o", "o.csv", "--format", "csv", "--time", "t_s"],
    "dataset info": ["good.csv"],
    "dataset split": ["good.csv", "-o", "parts"],
    "dataset append": ["good.csv", "good.csv", "-o", "o.csv"],
    "dataset": ["good.csv", "-o", "o.csv"],
}
NOT_HERE = {"demo", "collect", "bench", "simulate", "soak"}  # they wait for others or work for minutes
PATIENCE_S = 20.0
MORE_BYTES = 3 << 30  # of address space, for one test


class Working(BaseException):
    """A verb took its arguments and went to work."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LANGUAGE", "C")  # else argparse looks for a translation of each message, in files
    refresh(tmp_path)
    return tmp_path


def refresh(folder: Path, count: int = 120) -> None:
    """Write the files of a folder that are missing or not as they were written last."""
    (folder / "folder").mkdir(exist_ok=True)
    for name, data in {**FILES, "shut.csv": b"", "good.csv": good_trace(count)}.items():
        path = folder / name
        if (data, signs(path)) != written.get(path):
            path.write_bytes(data)
            if name == "shut.csv":
                path.chmod(0)
            written[path] = (data, signs(path))


written: dict[Path, tuple[bytes, object]] = {}


def signs(path: Path) -> object:
    """What differs once a file was written to, replaced or removed."""
    with contextlib.suppress(OSError):
        status = path.lstat()
        return status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns
    return None


@cache
def good_trace(count: int) -> bytes:
    rows = np.random.default_rng(1).poisson(50, (count, len(LINUX_PROC_1))).tolist()
    trace = make_trace(LINUX_PROC_1, 5000, [(1000.0 + 5 * i, 5000, "benign", row) for i, row in enumerate(rows)], "d-1")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "good.csv"
        write_trace(trace, path)
        return path.read_bytes()


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    """A verb that reads /dev/zero without a bound fails here, and does not take the machine's memory first."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MORE_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def attempt(argv: list[str]) -> tuple[object, str]:
    """-> (exit status, what it wrote to stderr). A verb that works for PATIENCE_S, or says that it listens, has
    taken its arguments: status 0."""

    def look(*_: object) -> None:
        if time.monotonic() > end_s or " listening on " in err.getvalue():
            raise Working

    out, err = io.StringIO(), io.StringIO()
    end_s = time.monotonic() + PATIENCE_S
    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            return cli.main(argv), err.getvalue()
    except SystemExit as end:
        return end.code, err.getvalue()
    except Working:
        return 0, ""
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def parsers(verb: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser()
    importlib.import_module(cli.VERBS[verb][0]).add_arguments(parser)
    below = [one for one in parser._actions if isinstance(one, argparse._SubParsersAction)]
    if not below:
        yield verb, parser
    for action in below:
        for name, sub in action.choices.items():
            yield f"{verb} {name}", sub


def cases(name: str, parser: argparse.ArgumentParser) -> Iterator[list[str]]:
    """Each argument of a verb with each bad value, in an otherwise good command."""
    base = BASE.get(name, BASE.get(name.split()[0], []))
    first_option = next((i for i, word in enumerate(base) if word.startswith("-")), len(base))
    given, options = base[:first_option], base[first_option:]
    positionals = [one for one in parser._actions if not one.option_strings]
    for action in parser._actions:
        if action.nargs == 0 or isinstance(action, argparse._SubParsersAction):
            continue
        kept = [word for word in options if word != "--dry-run" or action.dest != "port"]  # a port is opened
        for value in NUMBERS if action.type in (int, float) else [*WORDS, *NUMBERS[:6]]:
            if action.option_strings:
                yield [*name.split(), *given, *kept, f"{action.option_strings[-1]}={value}"]
            else:
                at = positionals.index(action)
                yield [*name.split(), *given[:at], value, *given[at + 1 :], *options]


@pytest.mark.slow(3)
@pytest.mark.parametrize("verb", [verb for verb in cli.VERBS if verb not in NOT_HERE])
def test_bad_arguments_cost_one_line(folder: Path, verb: str) -> None:
    wrong = []
    for name, parser in parsers(verb):
        for argv in cases(name, parser):
            if "o.csv" in argv:
                Path("o.csv").unlink(missing_ok=True)
            status, err = attempt(argv)
            fine = status in (0, 1, 2) and "unexpected" not in err and len(err) < 2000
            if not fine or (status != 0 and err.count("\n") != 1 and verb != "doctor") or list(folder.glob("*.tmp")):
                wrong.append(([word[:50] for word in argv], status, err[-300:]))
            refresh(folder)
    assert not wrong, "\n".join(map(str, wrong[:15])) + f"\n{len(wrong)} in all"


def test_an_unforeseen_error_is_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from stonechat_tools.modeling import inspect

    def fail(_args: object) -> int:
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr(inspect, "run", fail)
    status, err = attempt(["inspect", MODEL])
    assert status == 1 and err.count("\n") == 1 and "unexpected ZeroDivisionError: by zero" in err
    monkeypatch.setenv("STONECHAT_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        attempt(["inspect", MODEL])


# ------------------------------------------------------------------------------------- signals, closed pipes, terminals

LONG = {
    "record": ["record", "o.csv", "--window", "0.1", "--collector", "proc"],
    "record parquet": ["record", "o.csv.gz", "--window", "0.1", "--collector", "proc", "--windows", "100000"],
    "top": ["top", "--json", "--interval", "0.1", "--no-model", "--collector", "proc"],
    "train": ["train", "good.csv", "-o", "out", "--seeds", "1000", "--jitter-octaves", "0.5", "--learn-windows", "20"],
    "soak": ["soak", "exact"],
    "bench": ["bench", "inference", "--seconds", "30"],
}


def started(argv: list[str], folder: Path, **more: object) -> "subprocess.Popen[bytes]":
    """A verb as a session of its own, at work: its handlers are installed."""
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    process: subprocess.Popen[bytes] = subprocess.Popen(
        [sys.executable, "-m", "stonechat_tools.cli", *argv],
        cwd=folder,
        env={**os.environ, "TMPDIR": str(scratch)},
        start_new_session=True,
        **more,  # type: ignore[call-overload]
    )
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s and process.poll() is None:
        caught = [line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "SigCgt" in line]
        if int(caught[0].split()[1], 16) >> (signal.SIGTERM - 1) & 1:
            break
        time.sleep(0.01)
    return process


def alive_in_session(session: int) -> list[str]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rsplit(")", 1)[1].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(stat.parent.joinpath("cmdline").read_text().replace("\0", " "))
    return found


@pytest.mark.slow(2)
@pytest.mark.parametrize("delay_s", [0.0, 1.5])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("verb", LONG)
def test_a_signal_leaves_nothing_behind(folder: Path, verb: str, number: signal.Signals, delay_s: float) -> None:
    refresh(folder, 700)
    with open(folder / "said", "wb") as said:
        process = started(LONG[verb], folder, stdout=said, stderr=said, preexec_fn=_default_signals)
        time.sleep(delay_s)  # another moment of its work, not a condition to wait for
        process.send_signal(number)
        status = process.wait(timeout=60)
    text = (folder / "said").read_text()
    complete = (0,) if verb == "record" else ()  # a recording without end is complete whenever it is ended
    complete += (-number,) if not delay_s else ()  # it came before Python had taken over the signals
    assert status in (128 + number, 130, *complete), (status, text[-500:])
    assert "Traceback" not in text, text[-2000:]
    deadline_s = time.monotonic() + 20
    while (left := alive_in_session(process.pid)) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert left == []
    kept = [path for path in (folder / "scratch").iterdir() if path.stat().st_size]  # tempfile tries it with 0 bytes
    assert kept == [] and not list(folder.rglob("*.tmp"))


def _default_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("verb", ["top", "dataset", "inspect", "doctor"])
def test_a_closed_pipe_ends_a_verb_quietly(folder: Path, verb: str) -> None:
    argv = {
        "dataset": ["dataset", "info", "good.csv", "--json"],
        "inspect": ["inspect", MODEL],
        "doctor": ["doctor"],
        "top": LONG["top"],
    }[verb]
    reader, writer = os.pipe()
    os.close(reader)
    process = started(argv, folder, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) in ((0, b""), (1, b"")), err


def test_nohup_keeps_a_recording(folder: Path) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    argv = ["record", "o.csv", "--window", "0.05", "--windows", "20", "--collector", "proc"]
    process = started(argv, folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=ignore)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err


@pytest.mark.slow(4)
def test_the_least_lengths_are_the_same_in_help_message_and_code(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The length that the message asks for is enough, one window less is not, and the help gives the same number."""

    def outcome(count: int, argv: list[str]) -> tuple[int, str]:
        refresh(folder, count)
        return cli.main(argv), capsys.readouterr().err

    def helps(verb: str) -> str:
        with pytest.raises(SystemExit):
            cli.main([verb, "--help"])
        return " ".join(capsys.readouterr().out.split())

    train = ["train", "good.csv", "-o", "out", "--seeds", "1", "--units", "3"]
    for learn, least in ((128, 640), (0, 250)):
        argv = [*train, "--learn-windows", str(learn)]
        status, err = outcome(least - 4, argv)
        assert status == 1 and f"at least {least}" in err
        assert outcome(least, argv)[0] == 0
    assert "250 benign windows at least" in helps("train") and "5 windows for each" in helps("train")
    assert cli.main([*train, "--weights", "w.npz", "--learn-windows", "0"]) == 0
    capsys.readouterr()
    status, err = outcome(299, ["quantize", "w.npz", "good.csv", "-o", "q.tflite"])
    assert status == 1 and "at least 300" in err and "300 windows at least" in helps("quantize")
    assert outcome(300, ["quantize", "w.npz", "good.csv", "-o", "q.tflite"])[0] == 0
    calibrate = ["calibrate", "out/model.tflite", "good.csv", "-o", "c.tflite"]
    assert outcome(199, calibrate)[1].count("at least 200") == 1
    assert "at least 200" not in outcome(200, calibrate)[1] and "200 windows" in helps("calibrate")


def test_help_shows_each_verb_once_in_a_group_within_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert set(cli.GROUPS) <= set(cli.VERBS) and next(iter(cli.VERBS)) in cli.GROUPS
    group = {}
    for line in lines[: lines.index("positional arguments:")]:
        if line.endswith(":") and not line.startswith(" "):
            heading = line[:-1]
        elif line.startswith("  ") and line[2] != " ":
            assert line.split()[0] not in group, line
            group[line.split()[0]] = heading
    assert list(group) == list(cli.VERBS) and set(group.values()) == set(cli.GROUPS.values())
    assert max(map(len, lines)) <= 80


def test_a_port_without_a_board_costs_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    status, err = attempt(["deploy", "--port", str(tmp_path / "ttyACM0"), "--model", MODEL])
    assert status == 1 and err.count("\n") == 1 and "no such port; `mpremote connect list`" in err


def test_a_wrong_word_costs_one_line_that_names_the_right_help(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["colect"], "do you mean collect? (see stonechat --help)"),
        (["broker-config", "--port", "1"], "unrecognized arguments: --port 1 (see stonechat broker-config --help)"),
        (["provision", "add", "x", "--foo"], "unrecognized arguments: --foo (see stonechat provision --help)"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
