"""A simulated device as a machine of its own: a guest under User-mode Linux, whose processor, memory, paging and disk
are nobody else's. For recordings of linux-proc-1, whose counters no cgroup can take apart, beside other work.

The guest's root is this machine's; its disk, which holds its temporary files, is its own; its peers are outside, across
a tap device. This file is both sides: machine() starts a guest, and the guest's kernel runs the file as its init.
Needs root and User-mode Linux (apt install user-mode-linux); leaves nothing behind.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tty
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

KERNEL = "linux.uml"
MEMORY_MIB = 256
INTERFACE = "vec0"
DISK_FOLDER = "/mnt"
_CLEAN_UP_S = 20.0
_MS_NOATIME = 1024


@contextlib.contextmanager
def machine(seconds: float, workload: list[str], watcher: list[str]) -> "Iterator[subprocess.Popen[str]]":
    """A guest in which `workload` runs, and then `watcher` to its end, which ends the guest -> its process; what both
    say on standard error is its standard output. The peers are at netns.PEERS. Raises ConfigError, OSError."""
    with _started(seconds, {"workload": workload, "watcher": watcher}, (), ()) as (guest, _):
        yield guest


class Console:
    """A guest that takes commands. `windows`: the watcher's standard output; `outside`: the command prefix of what
    is to run where the guest's peers are."""

    def __init__(
        self,
        guest: "subprocess.Popen[str]",
        windows: IO[str],
        asks: IO[str],
        answers: IO[str],
        outside: tuple[str, ...],
    ) -> None:
        self._guest = guest
        self.windows = windows
        self.outside = outside
        self._asks = asks
        self._answers = answers

    def start(self, command: list[str]) -> None:
        """Start a command in the guest, one at a time, and wait for its first line. Raises OSError."""
        self._ask("start", command)

    def stop(self) -> None:
        """End it with SIGTERM, and wait for it. Raises OSError."""
        self._ask("stop", [])

    def kill(self) -> None:
        """From another thread: the guest ends, and so do its windows."""
        _kill(self._guest)

    def _ask(self, verb: str, command: list[str]) -> None:
        self._asks.write(json.dumps([verb, command]) + "\n")
        self._asks.flush()
        answer = self._answers.readline().strip()
        if answer != "done":
            raise OSError(f"{verb} {' '.join(command)}: {answer or 'the guest has ended'}")


@contextlib.contextmanager
def console(seconds: float, workload: list[str], watcher: list[str]) -> Iterator[Console]:
    """The same guest, which lives until it is left."""
    with contextlib.ExitStack() as stack:
        (asked, asks), (answers, answered), (windows, seen) = os.pipe(), os.pipe(), os.pipe()
        theirs = (asked, answered, seen)
        with contextlib.ExitStack() as halves:
            for fd in theirs:
                halves.callback(os.close, fd)
            ours = [
                stack.enter_context(os.fdopen(fd, mode)) for fd, mode in ((asks, "w"), (answers, "r"), (windows, "r"))
            ]
            lines = (f"ssl0=fd:{asked},fd:{answered}", f"ssl1=null,fd:{seen}")
            spec = {"workload": workload, "watcher": watcher, "console": True}
            guest, outside = stack.enter_context(_started(seconds, spec, lines, theirs))
        yield Console(guest, ours[2], ours[0], ours[1], outside)


@contextlib.contextmanager
def _started(
    seconds: float, spec: dict[str, Any], lines: tuple[str, ...], fds: tuple[int, ...]
) -> "Iterator[tuple[subprocess.Popen[str], tuple[str, ...]]]":
    from stonechat.errors import ConfigError

    from stonechat_tools.lab import box, netns

    box.need_root()
    if not shutil.which(KERNEL):
        raise ConfigError(f"guests need {KERNEL}: apt install user-mode-linux")
    with contextlib.ExitStack() as stack:
        outside = stack.enter_context(netns.tap(seconds))
        image = stack.enter_context(box.image())
        environment = {name: value for name, value in os.environ.items() if name.startswith(("PYTHON", "VIRTUAL"))}
        spec = spec | {
            "environment": environment | {"PATH": os.environ["PATH"], "TMPDIR": DISK_FOLDER},
            "folder": os.getcwd(),
            "network": [f"addr add {netns.DEVICE}/32 dev {INTERFACE}", f"link set {INTERFACE} up"]
            + [f"route add {' '.join(words)} dev {INTERFACE}" for words in netns.ROUTES],
        }
        file = stack.enter_context(tempfile.NamedTemporaryFile("w", suffix=".json"))
        json.dump(spec, file)
        file.flush()
        command = [*outside, KERNEL, f"mem={MEMORY_MIB}M", "root=/dev/root", "rootfstype=hostfs", "rootflags=/", "rw"]
        command += ["quiet", f"ubd0={image}", f"vec0:transport=tap,ifname={netns.TAP},depth=64,gro=1", *lines]
        mine = stack.enter_context(tempfile.TemporaryDirectory(prefix="stonechat-uml-"))  # else it writes to ~/.uml
        command += [
            f"uml_dir={mine}",
            "con0=null,fd:1",
            "con=null",
            f"init={sys.executable}",
            "--",
            __file__,
            file.name,
        ]
        guest = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            pass_fds=fds,
        )
        stack.callback(_end, guest)
        yield guest, outside


def _kill(guest: "subprocess.Popen[str]") -> None:
    """The kernel and the processes of its guest, which are this system's processes too, in a session of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(guest.pid, signal.SIGKILL)


def _end(guest: "subprocess.Popen[str]") -> None:
    _kill(guest)
    guest.communicate()


# ---------------------------------------------------------------------------------------------------- inside the guest


def main(path: str) -> None:
    """The guest's init."""
    spec = json.loads(Path(path).read_text())
    for kind, folder in (("proc", "/proc"), ("sysfs", "/sys")):
        _mount(kind, folder, kind)
    _mount("/dev/ubda", DISK_FOLDER, "ext4")
    os.environ.update(spec["environment"])
    os.chdir(spec["folder"])
    for words in ("link set lo up", *spec["network"]):
        subprocess.run(["ip", *words.split()], check=True)
    device = subprocess.Popen(spec["workload"], stdout=subprocess.PIPE)
    _first_line(device.stdout)
    if spec.get("console"):
        _serve(spec["watcher"])
        return
    status = subprocess.run(spec["watcher"], check=False).returncode
    print(f"the watcher ended with status {status}", flush=True)


def _serve(watcher: list[str]) -> None:
    """Take commands from the first serial line, while what the watcher prints goes to the second."""
    with open("/dev/ttyS0", "r+b", buffering=0) as asked, open("/dev/ttyS1", "r+b", buffering=0) as seen:
        for line in (asked, seen):
            tty.setraw(line.fileno())
        subprocess.Popen(watcher, stdout=seen)
        running: subprocess.Popen[bytes] | None = None
        while text := asked.readline():
            verb, command = json.loads(text)
            answer = "done"
            try:
                if verb == "start":
                    running = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
                    _first_line(running.stdout)
                elif running is not None:
                    _stop(running)
            except OSError as error:
                answer = str(error)
            asked.write(answer.encode() + b"\n")


def _stop(running: "subprocess.Popen[bytes]") -> None:
    """SIGTERM, so that it cleans up; what is left of its session after that is killed."""
    running.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        running.wait(timeout=_CLEAN_UP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    if running.stdout:
        running.stdout.close()


def _mount(source: str, folder: str, kind: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source.encode(), folder.encode(), kind.encode(), _MS_NOATIME, None):
        raise OSError(ctypes.get_errno(), f"mount {source} on {folder}")


def _first_line(stream: "IO[bytes] | None") -> None:
    if stream is None or not stream.readline():
        raise OSError("the workload did not start")


def _power_off() -> None:
    os.sync()
    Path("/proc/sysrq-trigger").write_text("o")
    time.sleep(10)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except (OSError, subprocess.CalledProcessError) as error:
        print(error, flush=True)
    finally:
        _power_off()
