"""What keeps a workload bounded: it ends by its deadline, with its parent, or at SIGTERM, and leaves nothing behind."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

LONGEST_S = 7 * 24 * 3600.0
_PARENT_CHECK_S = 1.0
_MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")


class Deadline:
    """`live()` until `seconds` have passed, `max_events` events were counted, or the parent process is gone."""

    def __init__(self, seconds: float, max_events: int = 1_000_000_000) -> None:
        self.end_s = time.monotonic() + min(seconds, LONGEST_S)
        self.events_left = max_events
        self._parent = os.getppid()
        self._check_s = 0.0

    def live(self) -> bool:
        now_s = time.monotonic()
        if now_s >= self.end_s or self.events_left <= 0:
            return False
        if now_s >= self._check_s:
            self._check_s = now_s + _PARENT_CHECK_S
            if os.getppid() != self._parent:
                self.end_s = now_s
                return False
        return True

    def count(self, events: int = 1) -> None:
        self.events_left -= events

    def left_s(self) -> float:
        return max(0.0, self.end_s - time.monotonic())

    def sleep(self, seconds: float) -> None:
        """At most `seconds`, in pieces of a second so that a lost parent is noticed."""
        until_s = time.monotonic() + seconds
        while self.live() and (rest_s := until_s - time.monotonic()) > 0:
            time.sleep(min(rest_s, _PARENT_CHECK_S, self.left_s()))


def _leave(_signal: int, _frame: FrameType | None) -> None:
    sys.exit(0)  # unwinds the context managers, which is the clean-up


def leave_cleanly_on_signals() -> None:
    """SIGTERM, SIGHUP and SIGINT end the process through its context managers, with status 0."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, _leave)


@contextlib.contextmanager
def scratch_folder(parent: str | None = None) -> Iterator[Path]:
    """A folder of one's own that goes away at the end; on a disk where there is one, because what is written to a
    memory file system never shows in the kernel's disk counters."""
    with tempfile.TemporaryDirectory(prefix=f"stonechat-{os.getpid()}-", dir=parent or disk_folder()) as folder:
        yield Path(folder)


def disk_folder() -> str:
    """The first writable one of the temporary folder, /var/tmp and the home that is not held in memory."""
    first = tempfile.gettempdir()
    for folder in (first, "/var/tmp", str(Path.home())):
        if os.access(folder, os.W_OK) and _file_system(folder) not in _MEMORY_FILE_SYSTEMS:
            return folder
    return first


def _file_system(folder: str) -> str:
    path = os.path.realpath(folder)
    best, kind = "", ""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, name, *_ = line.split(" ")
        inside = path == mount or path.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, name
    return kind


def started(command: list[str]) -> "subprocess.Popen[str]":
    """Start a workload and wait until it prints its first line, which says that it is at work. Raises OSError with
    what it wrote to stderr when it ends before that."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if process.stdout and process.stdout.readline():
        return process
    _, errors = process.communicate(timeout=10)
    raise OSError(f"{' '.join(command)}: status {process.returncode}: {errors.strip()[-500:]}")


def stopped(process: "subprocess.Popen[str] | subprocess.Popen[bytes]", within_s: float = 10.0) -> int:
    """End a workload with SIGTERM, so that it cleans up, and wait for it. -> its status."""
    process.terminate()
    try:
        process.communicate(timeout=within_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
    return process.returncode
