"""The demo's board: the simulated firmware with the agent on MicroPython's unix port, in virtual time. Where there is
no MicroPython for this machine, the same files run on CPython."""

import contextlib
import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path

import stonechat
from stonechat.board.schema import COLUMNS
from stonechat.model import load_model

import stonechat_tools
from stonechat_tools.fleet.wire import Report
from stonechat_tools.lab.firmware.peers import Peers

from .scenario import Feed, Infection, Stopped

NAME = "board"
MODEL = "micropython-1"
ORDINARY = 120
PATIENCE_S = 300.0  # for one window of an overloaded machine; an idle one takes 0.02 s
_HEAP = "512k"
_WAIT_S = 30.0

INFECTIONS = [
    Infection(
        "telnet_scan",
        "scans for telnet logins, like Mirai",
        ("new_peers", "peers", "conn_refused", "conn_unanswered", "conn_out", "sockets", "lookups", "dports"),
    ),
    Infection(
        "udp_flood",
        "floods a victim with UDP",
        ("udp_out", "new_peers", "new_peer_bytes", "bytes_out", "writes", "mean_write"),
    ),
    Infection(
        "exfiltration",
        "sends its data to a stranger",
        ("new_peer_bytes", "new_peers", "bytes_out", "conn_mute", "writes", "mean_write"),
    ),
    Infection(
        "beacon",
        "asks a stranger for orders",
        ("new_peers", "new_peer_bytes", "peers", "conn_out", "dports"),
    ),
    Infection(
        "web_shell",
        "lets in somebody who opens files",
        ("listens", "opens", "opens_write", "sockets"),
    ),
]


def interpreter() -> tuple[list[str], str]:
    """-> (the command, its name): MicroPython where its package is installed, else CPython."""
    if importlib.util.find_spec("micropython_unix") and importlib.util.find_spec("micropython_run"):
        return [sys.executable, "-m", "micropython_unix", "-X", "heapsize=" + _HEAP], "MicroPython"
    return [sys.executable], "CPython"


class Board:
    """Runs while the `with` block does. folder: an empty one of its own; model: path of a model for micropython-1."""

    def __init__(self, folder: Path, model: Path, broker_port: int, secret: bytes, feed: Feed) -> None:
        metadata = load_model(model.read_bytes()).metadata
        command, runtime = interpreter()
        self.name = NAME
        self.title = f"a sensor's firmware on {runtime}, in virtual time"
        self.learn_windows = metadata.learn_windows
        self.window_s = metadata.window_ms / 1000
        self.ordinary = ORDINARY
        self.columns = [column[0] for column in COLUMNS]
        self.infections = INFECTIONS
        self.starved = False  # its time is virtual: only a machine that gives it nearly none can starve it
        self.disturbed = False
        self._feed = feed
        self._stack = contextlib.ExitStack()
        self._folder = folder
        self._command = [*command, str(Path(__file__).with_name("on_board.py")), NAME, secret.hex(), str(model)]
        self._broker_port = broker_port
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Board":
        library = self._folder / "library"  # these two packages and nothing else of this machine's Python
        library.mkdir()
        for package in (stonechat, stonechat_tools):
            (library / package.__name__).symlink_to(Path(package.__path__[0]).resolve())
        peers_port = self._stack.enter_context(Peers())
        self._process = subprocess.Popen(
            [*self._command, str(peers_port), str(self._broker_port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self._folder,
            env=dict(os.environ, MICROPYPATH=f"{library}:.frozen"),
        )
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            self._process.kill()
            self._process.communicate()
        self._stack.close()

    def window(self) -> Report:
        self._ask("window")
        return self._feed.next(_WAIT_S + PATIENCE_S, lambda: None)  # it is stored: the board waited for that

    def infect(self, name: str) -> None:
        self._ask("infect " + name)

    def recover(self) -> None:
        self._ask("recover")

    def end(self) -> int:
        """-> how many reports it published."""
        published, errors = self._ask("end").split()[1:]
        if errors != "0":
            raise Stopped(f"the board's agent counted {errors} errors")
        return int(published)

    def _lose_patience(self) -> None:
        """A window takes 0.1 s on an idle machine: thousands of times as long is not the board's fault."""
        self.starved = True
        if self._process:
            self._process.kill()

    def _ask(self, line: str) -> str:
        """Send one command -> the answer. Raises Stopped."""
        process = self._process
        assert process and process.stdin and process.stdout
        if self._feed.stopping.is_set():
            raise Stopped("interrupted")
        watchdog = threading.Timer(PATIENCE_S, self._lose_patience)
        watchdog.start()
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            answer = process.stdout.readline().strip()
        except (BrokenPipeError, ValueError):  # ended, or closed as the demo was interrupted
            answer = ""
        finally:
            watchdog.cancel()
        if not answer.startswith(line.split()[0]):
            rest = process.stdout.read() if process.poll() is not None else ""
            raise Stopped(f"the board stopped; its last words: {(answer + ' ' + rest).strip()[-300:] or 'none'}")
        return answer
