"""Every option and argument of the fleet's verbs, each with values that nobody means: one line says what is wrong."""

import argparse
import importlib
import io
import itertools
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from stonechat_tools import cli
from stonechat_tools.dashboard import home_assistant, serving
from stonechat_tools.fleet import collect, keyring, operator
from stonechat_tools.fleet.store import Store
from stonechat_tools.simulate import simulate

LONG = 5000
ODD = {
    "empty": "",
    "blank": " ",
    "negative": "-1",
    "zero": "0",
    "no number": "nan",
    "no end": "inf",
    "too large": "1e400",
    "huge": "9" * 400,
    "other digits": "\u0663\u0664",
    "unicode": "h\u00e9llo \u202e\u2603",
    "no text": "\udcff",
    "two lines": "a\nb",
    "escape": "\x1b[2J",
    "long": "x" * LONG,
    "a folder": ".",
    "missing": "missing/nowhere",
    "below a file": "a-file/x",
    "endless": "endless",  # a device of the test's own: root could replace the machine's
    "full": "full",
    "a path up": "../../x",
}
ALWAYS, MORE = ("empty", "huge", "no text", "endless"), 2  # all of them take a minute
# What a verb needs so that the value of one option is all that is odd. It ends at once: see `ends_at_once`.
BASE: dict[str, list[str]] = {
    "fleet": ["--db=a.db"],
    "fleet set": ["dev-1", "--name=x"],
    "fleet silence": ["site=x", "--for=2h"],
    "fleet acknowledge": ["1"],
    "dashboard": ["--db=a.db", "--listen=127.0.0.1:0"],
    "dashboard user add": ["otto", "--password-file=password"],
    "dashboard user remove": ["nobody"],
    "home-assistant": ["--db=a.db", "--broker=127.0.0.1:1", "--plain"],
    "export": ["--db=a.db", "-oout.csv"],
    "report": ["--db=a.db"],
    "command": ["dev-1", "report-now", "--keys=keys", "--broker=127.0.0.1:1", "--plain", "--db=c.db"],
    "operator": ["--keys=keys", "--broker=127.0.0.1:1", "--plain", "--db=c.db"],
    "collect": ["--keys=keys", "--broker=127.0.0.1:1", "--plain", "--db=c.db"],
    "provision init": ["--broker=localhost"],
    "provision add": ["dev-9"],
    "provision rotate": ["dev-9"],
    "provision finish-rotation": ["dev-9"],
    "provision revoke": ["dev-9"],
    "broker-config": [],
    "simulate": ["--for=0", "--devices=1", "--broker=127.0.0.1:1", "--keys-out=simulated"],
}
ALONE = {"fleet", "dashboard", "provision"}  # verbs with verbs of their own


class _Ended(threading.Event):
    """A verb that goes on until it is stopped: it is."""

    def is_set(self) -> bool:
        return True

    def wait(self, timeout: float | None = None) -> bool:
        return True


def _device(name: str, number: int) -> tuple[Path, os.stat_result]:
    """As /dev/zero (5) or /dev/full (7); a link to that where only root may make one."""
    path = Path(name)
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, number))
        path.open("rb").close()  # a file system may be mounted without devices
    except OSError:
        path.unlink(missing_ok=True)
        path.symlink_to("/dev/zero" if number == 5 else "/dev/full")
    return path, path.lstat()


@pytest.fixture
def ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder with a database, keys and a file; whatever serves or goes on ends as it begins."""
    monkeypatch.chdir(tmp_path)
    Store("a.db").close()
    Path("keys").mkdir()
    Path("keys/dev-1.key").write_text(keyring.new_secret().hex() + "\n")
    Path("password").write_text("correct horse battery\n")
    Path("a-file").touch()
    devices = [_device(name, number) for name, number in (("endless", 5), ("full", 7))]
    threads = types.SimpleNamespace(**vars(threading) | {"Event": _Ended})
    for module in (collect, operator, home_assistant):
        monkeypatch.setattr(module, "threading", threads)
    monkeypatch.setattr(serving.Server, "run", lambda *_, **__: None)
    monkeypatch.setattr(collect, "Page", lambda *_: types.SimpleNamespace(url="", error=None, close=lambda: None))
    for name in ("start", "close"):
        monkeypatch.setattr(home_assistant.Connection, name, lambda _: None)
    monkeypatch.setattr(simulate, "_live", lambda *_: {})
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for path, before in devices:
        assert path.lstat().st_ino == before.st_ino, f"{path} was replaced"
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


def leaves(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """(words, parser) of each verb that can be called."""
    subs = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for sub in subs:
        for word, each in sub.choices.items():
            yield from leaves(each, f"{name} {word}")
    if not subs or not subs[0].required:
        yield name, parser


def calls(verb: str) -> Iterator[tuple[str, list[str]]]:
    """(what is odd, words): of each option and argument ALWAYS, and some others in turn."""
    others = itertools.cycle([what for what in ODD if what not in ALWAYS])
    parser = cli.Parser(prog=verb)
    importlib.import_module(cli.VERBS[verb][0]).add_arguments(parser)
    for name, leaf in leaves(parser, verb):
        words = name.split()
        above = BASE.get(verb, []) if verb in ALONE else []
        base = BASE.get(name, []) if name != verb or verb not in ALONE else []
        for action in leaf._actions:
            if action.nargs == 0 or isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
                continue
            for what in (*ALWAYS, *itertools.islice(others, MORE)):
                value = ODD[what]
                if action.option_strings:
                    kept = [word for word in base if not word.startswith(tuple(action.option_strings))]
                    odd = [f"{action.option_strings[-1]}={value}"]
                else:
                    kept = [word for word in base if word.startswith("-")] if base else []
                    odd = ["--", value]
                shown = f"{name} {(action.option_strings or [action.dest])[-1]}: {what}"
                yield shown, [words[0], *above, *words[1:], *kept, *odd]


@pytest.mark.parametrize("verb", sorted({name.split()[0] for name in BASE}))
def test_any_value_costs_one_line(verb: str, ends_at_once: None, capsys: pytest.CaptureFixture[str]) -> None:
    tried = 0
    for what, words in calls(verb):
        began_s = time.process_time()
        try:
            status = cli.main(words)
        except SystemExit as ended:
            status = ended.code
        except BaseException as error:
            raise AssertionError(f"{what}: {words}: {type(error).__name__}: {error}") from error
        written = capsys.readouterr()
        tried += 1
        assert status in (0, 1, 2), (what, words, status)
        assert "unexpected" not in written.err and "Traceback" not in written.err, (what, words, written.err)
        if status:
            assert written.err.strip() and written.err.count("\n") <= 3, (what, words, written.err)
        assert "\x1b[2J" not in written.err + written.out, (what, words)
        assert len(written.err) < LONG and time.process_time() - began_s < 20, (what, written.err)
    assert tried >= 20


@pytest.mark.slow
@pytest.mark.parametrize("where", [">&-", "> /dev/full", "2>&-", "> /dev/full 2>&1"])
def test_closed_or_full_standard_files_cost_no_traceback(tmp_path: Path, where: str) -> None:
    Store(tmp_path / "a.db").close()
    script = "".join(
        f"{sys.executable} -m stonechat_tools.cli {words} {where} < /dev/null; echo $? >> codes\n"
        for words in ("fleet --db a.db --json", "fleet example", "export --db a.db", "dashboard --db a.db user list")
    )
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    codes = (tmp_path / "codes").read_text().split()
    assert len(codes) == 4 and set(codes) <= {"0", "1"}, (codes, done.stderr)
    assert "Traceback" not in done.stdout + done.stderr and "Exception ignored" not in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) <= 4, done.stderr
    if where == "> /dev/full":
        assert codes[1] == "1" and "No space left" in done.stderr, (codes, done.stderr)
