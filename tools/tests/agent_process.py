"""The daemon as a process under test: a quick model, a configuration, and what it said."""

import atexit
import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import stonechat
from stonechat.features import RATE, SHARE
from stonechat.linux.schemas import LINUX_PROC_1
from stonechat.schema import Schema
from stonechat_tools.modeling.fit import fit

WINDOW_MS = 400
DEVICE = "tested-1"


def quick_model(path: Path, schema: Schema = LINUX_PROC_1, learn_windows: int = 0, version: int = 1) -> Path:
    """A model with short windows that takes anything for normal: the daemon is under test, not the detection."""
    rng = np.random.default_rng(0)
    middle = np.array([12800 if kind == SHARE else 1500 if kind == RATE else 500 for _, _, kind in schema.columns])
    rows = np.rint(middle + rng.normal(size=(400, len(schema))) * 1200).clip(0, 25600)
    path.write_bytes(fit(rows, schema, WINDOW_MS, learn_windows=learn_windows).to_tflite("quick", version))
    return path


def open_the_way(folder: Path) -> None:
    """An agent that root starts becomes another user, who must reach its folder, wherever pytest keeps it."""
    for parent in [folder, *folder.parents]:
        status = parent.stat()
        if status.st_uid == folder.stat().st_uid and str(parent) not in ("/", tempfile.gettempdir()):
            parent.chmod(status.st_mode | 0o011)


class AgentProcess:
    """stonechat-agent in `folder`, talking to a broker on 127.0.0.1."""

    def __init__(self, folder: Path, port: int, **changes: str) -> None:
        self.folder = folder
        self.secret_file = folder / "device.key"
        if not self.secret_file.exists():
            self.secret_file.touch(mode=0o600)
            self.secret_file.write_text(secrets.token_hex(32) + "\n")
        open_the_way(folder)
        text = f"""[device]
id = "{DEVICE}"
key_file = "{self.secret_file}"
state_file = "{changes.get("state", f"{folder}/state/state")}"
[model]
file = "{changes.get("model", folder / "model.tflite")}"
[collector]
bpf = false
[mqtt]
host = "{changes.get("host", "127.0.0.1")}"
port = {port}
tls = {changes.get("tls", "false")}
transport = "{changes.get("transport", "auto")}"
keepalive_s = 5
[report]
heartbeat_windows = 1
bytes_per_day = 100000000
resend_s = 2
outbox_dir = "{changes.get("outbox_dir", str(folder / "outbox"))}"
{changes.get("more", "")}
"""
        self.config = folder / "stonechat.toml"
        self.config.write_text(text)
        self.log = folder / "agent.log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def secret(self) -> bytes:
        return bytes.fromhex(self.secret_file.read_text().strip())

    @property
    def command(self) -> list[str]:
        return [str(Path(sys.executable).parent / "stonechat-agent"), "--config", str(self.config)]

    def start(self) -> "AgentProcess":
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        return self

    def run_to_end(self) -> "subprocess.CompletedProcess[str]":
        """For what must fail at once."""
        return subprocess.run(self.command, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def stop(self) -> int:
        """SIGTERM -> the exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError("the agent did not stop in 15 s; it said: " + self.said()) from None

    def __enter__(self) -> "AgentProcess":
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.stop()


def wait_for(what: Callable[[], object], timeout_s: float = 30.0, say: Callable[[], object] = lambda: "") -> None:
    """Until what() is true; AssertionError with say() after timeout_s."""
    deadline_s = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline_s, f"waited {timeout_s} s; {say()}"
        time.sleep(0.05)


def is_root() -> bool:
    return os.geteuid() == 0


@functools.cache
def readable_agent() -> Path:
    """The agent's package in a folder that every user can read, wherever the working copy lies."""
    folder = Path(tempfile.mkdtemp(prefix="stonechat-agent-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source = Path(stonechat.__file__).parent
    shutil.copytree(source, folder / "stonechat", ignore=shutil.ignore_patterns("models", "__pycache__"))
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder
