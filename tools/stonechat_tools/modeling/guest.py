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
from collections.abc import Iterator
from pathlib import Path
from typing import IO

KERNEL = "linux.uml"
MEMORY_MIB = 256
INTERFACE = "vec0"
DISK_FOLDER = "/mnt"
_MS_NOATIME = 1024


@contextlib.contextmanager
def machine(seconds: float, workload: list[str], watcher: list[str]) -> "Iterator[subprocess.Popen[str]]":
    """A guest in which `workload` runs, and then `watcher` to its end, which ends the guest -> its process; what both
    say on standard error is its standard output. The peers are at netns.PEERS. Raises ConfigError, OSError."""
    from stonechat.errors import ConfigError

    from stonechat_tools.modeling import lab
    from stonechat_tools.workloads import netns

    lab.need_root()
    if not shutil.which(KERNEL):
        raise ConfigError(f"guests need {KERNEL}: apt install user-mode-linux")
    with contextlib.ExitStack() as stack:
        outside = stack.enter_context(netns.tap(seconds))
        image = stack.enter_context(lab.image())
        environment = {name: value for name, value in os.environ.items() if name.startswith(("PYTHON", "VIRTUAL"))}
        spec = {
            "environment": environment | {"PATH": os.environ["PATH"], "TMPDIR": DISK_FOLDER},
            "folder": os.getcwd(),
            "network": [f"addr add {netns.DEVICE}/32 dev {INTERFACE}", f"link set {INTERFACE} up"]
            + [f"route add {' '.join(words)} dev {INTERFACE}" for words in netns.ROUTES],
            "workload": workload,
            "watcher": watcher,
        }
        file = stack.enter_context(tempfile.NamedTemporaryFile("w", suffix=".json"))
        json.dump(spec, file)
        file.flush()
        command = [
            *outside,
            KERNEL,
            f"mem={MEMORY_MIB}M",
            "root=/dev/root",
            "rootfstype=hostfs",
            "rootflags=/",
            "rw",
            "quiet",
        ]
        command += [f"ubd0={image}", f"vec0:transport=tap,ifname={netns.TAP},depth=64,gro=1"]
        command += ["con0=null,fd:1", "con=null", f"init={sys.executable}", "--", __file__, file.name]
        guest = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        stack.callback(_end, guest)
        yield guest


def _end(guest: "subprocess.Popen[str]") -> None:
    """The kernel and the processes of its guest, which are this system's processes too, in a session of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(guest.pid, signal.SIGKILL)
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
    status = subprocess.run(spec["watcher"], check=False).returncode
    print(f"the watcher ended with status {status}", flush=True)


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
