"""The shell commands of docs/releases.md and docs/response.md, as they are on the page, from an empty folder: a real
broker, collector and agents, in a network of their own."""

import os
import pty
import re
import select
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet_support import needs_mosquitto
from netns import needs_root
from stonechat.model import load_model
from stonechat.own_model_file import seal
from stonechat_tools.console import model_path

DOCS = Path(__file__).resolve().parents[2] / "docs"
LIMIT_S = 500.0
# What the page leaves to its reader: a network, and to end what was begun. `set -e`: each command has to succeed.
BEFORE = "set -e\nip link set lo up\ntrap 'kill $(jobs -p) 2> /dev/null; wait' EXIT\n"


@pytest.fixture
def folder() -> Iterator[Path]:
    """Below a folder that the agents' user can pass through."""
    made = Path(tempfile.mkdtemp(prefix="stonechat-docs-"))
    made.chmod(0o711)
    yield made
    shutil.rmtree(made, ignore_errors=True)


def commands_of(page: str) -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```$", (DOCS / page).read_text(), flags=re.MULTILINE | re.DOTALL)


def at_a_terminal(script: str, folder: Path) -> tuple[int, str]:
    """Run a script at a terminal of its own, whose user gives one passphrase -> its exit status, what it printed."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        os.execvpe("unshare", ["unshare", "--net", "bash", "-c", script], {**os.environ, "PATH": path})
    said = b""
    answered = 0
    end_s = time.monotonic() + LIMIT_S
    try:
        while time.monotonic() < end_s:
            if select.select([terminal], [], [], 0.5)[0]:
                try:
                    said += os.read(terminal, 4096)
                except OSError:  # its end
                    break
                asked = len(re.findall(rb"passphrase: |again: ", said))
                for _ in range(asked - answered):
                    os.write(terminal, b"correct horse\n")
                answered = asked
        else:
            os.kill(child, signal.SIGTERM)
    finally:
        os.close(terminal)
        _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), said.decode(errors="replace")


@needs_mosquitto
@needs_root
@pytest.mark.slow(85)
@pytest.mark.timeout(600)
def test_the_commands_of_the_page_run_as_they_are(folder: Path) -> None:
    blocks = commands_of("releases.md")
    assert len(blocks) >= 7
    status, said = at_a_terminal(BEFORE + "".join(blocks), folder)
    logs = "".join(path.read_text()[-800:] for path in sorted(folder.glob("agents/*/log")))
    assert status == 0, said[-4000:] + logs
    for words in (
        "pump 3: published",
        "to 2 devices begins with 1 device",
        "the halting rule: done",
        "(it was a trial)",
    ):
        assert words in said, said[-4000:]
    with sqlite3.connect(folder / "fleet.db") as db:
        query = "SELECT d.name, m.state FROM rollout_devices m JOIN devices d ON d.id = m.device ORDER BY 1"
        assert db.execute(query).fetchall() == [("pump-1", "good"), ("pump-2", "good")]
        assert db.execute("SELECT version, trial FROM updates").fetchall() == [(0, 0)] * 2
        assert db.execute("SELECT sum(lost), sum(conflicts) FROM devices").fetchall() == [(0, 0)]


@needs_mosquitto
@needs_root
@pytest.mark.slow(85)
@pytest.mark.timeout(300)
def test_a_dry_run_as_the_page_on_the_response_shows_it(folder: Path) -> None:
    """But with a model that learns for 4 s in place of 60."""
    (commands,) = commands_of("response.md")
    shipped = model_path("linux-proc-1-demo").read_bytes()
    meta = load_model(shipped).metadata
    assert meta is not None
    meta.learn_windows = 8
    (folder / "quick.tflite").write_bytes(seal(shipped, meta))
    short = commands
    for long, quick in (
        ('"linux-proc-1-demo"', '"$PWD/quick.tflite"'),
        ("\nsleep 75\n", "\nsleep 7\n"),
        ("\nkill $(jobs -p)\n", "\nkill $(jobs -p) || true\n"),  # 1 where one of them has ended by itself
    ):
        assert long in short
        short = short.replace(long, quick)
    status, said = at_a_terminal(BEFORE + short, folder)
    log = (folder / "agent.log").read_text()
    assert status == 0, said[-2000:] + log[-2000:]
    assert "would have been: throttle for 120 s" in said and "response (dry run): would throttle for 120 s" in log
