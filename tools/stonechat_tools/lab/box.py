"""A laboratory on one machine: simulated devices, each in a box of its own, so that what else the machine does stays
outside and several boxes can run side by side.

A box is a network namespace with the device's peers across a veth pair, a cgroup of its processes, and a disk of its
own (an ext4 image in memory behind a loop device, so that its writes are counted and nobody else's are). What watches
it runs in its network and outside of its cgroup. Needs root; leaves nothing behind.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stonechat.errors import CollectorError, ConfigError
from stonechat.linux.cgroup_id import cgroup_root

from stonechat_tools.lab import netns

DISK_MIB = 96
_GONE_WITHIN_S = 5.0
MEMORY_FOLDER = "/dev/shm" if os.path.isdir("/dev/shm") else None
_JOIN = 'echo $$ > "$0" && exec "$@"'


@dataclass(frozen=True)
class Box:
    """`inside`: the command prefix of the device's processes; `watching`: that of who watches it; `options`: what
    `stonechat record` and `stonechat top` must be given its interface and cgroup to see this box alone. `folder`: where
    the device writes. `net`: its two ends of the network."""

    net: netns.Pair
    inside: tuple[str, ...]
    watching: tuple[str, ...]
    options: tuple[str, ...]
    folder: str


@contextlib.contextmanager
def box(seconds: float, in_cgroup: bool = True, before: tuple[str, ...] = ()) -> Iterator[Box]:
    """A box whose peers end after `seconds` at the latest. in_cgroup: whether BPF is to see its processes alone;
    before: a command prefix for what runs inside and for the peers.
    Raises ConfigError where this machine or user can't make one."""
    need_root()
    with contextlib.ExitStack() as stack:
        net = stack.enter_context(netns.pair(seconds, before))
        name, folder = stack.enter_context(disk())
        inside = (*net.device, "env", f"TMPDIR={folder}")
        options: tuple[str, ...] = ("--disks", name)
        if in_cgroup:
            group = stack.enter_context(cgroup())
            inside += ("sh", "-c", _JOIN, str(group / "cgroup.procs"))
            options += ("--cgroup", str(group))
        yield Box(net, (*inside, *before), net.device, options, folder)


@contextlib.contextmanager
def disk(mib: int = DISK_MIB) -> Iterator[tuple[str, str]]:
    """-> (the name of a block device, the folder where it is mounted)."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(image(mib))
        folder = tempfile.mkdtemp(prefix=_prefix())
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        device = _run("losetup", "--find", "--show", file)
        try:
            _run("mount", "-o", "noatime", device, folder)
        finally:
            _run("losetup", "--detach", device)  # in fact when it is unmounted, or now if it could not be mounted
        stack.callback(_unmount, folder)
        yield os.path.basename(device), folder


@contextlib.contextmanager
def image(mib: int = DISK_MIB) -> Iterator[str]:
    """-> the path of an empty ext4 file system, in memory where there is a folder for that."""
    with tempfile.NamedTemporaryFile(prefix=_prefix(), suffix=".img", dir=MEMORY_FOLDER) as file:
        os.truncate(file.name, mib << 20)
        # Nothing is left for later, so that what is written after this is the device's doing.
        _run("mke2fs", "-q", "-t", "ext4", "-E", "lazy_itable_init=0,lazy_journal_init=0", file.name)
        yield file.name


@contextlib.contextmanager
def cgroup() -> Iterator[Path]:
    """A cgroup v2 folder that processes can join; those that are still in it at the end are killed. Raises ConfigError
    where none can be made."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=_prefix(), dir=cgroup_root()))
    except (OSError, CollectorError) as error:
        raise ConfigError(f"no cgroup can be made: {error}") from None
    try:
        folder.chmod(0o755)  # as systemd's are: an agent reads it as an ordinary user
        yield folder
    finally:
        remove(folder)


def need_root() -> None:
    if os.geteuid():
        raise ConfigError("the laboratory makes network namespaces: run it as root, or record real devices instead")


def _prefix() -> str:
    return f"stonechat-{os.getpid()}-"


def remove(cgroup: Path) -> None:
    deadline_s = time.monotonic() + _GONE_WITHIN_S
    while time.monotonic() < deadline_s:
        try:
            cgroup.rmdir()
            return
        except OSError:  # somebody is in it, or not yet wholly gone
            with contextlib.suppress(OSError):
                (cgroup / "cgroup.kill").write_text("1")  # Linux 5.14
            time.sleep(0.05)


def _unmount(folder: str) -> None:
    subprocess.run(["umount", "--lazy", folder], capture_output=True, timeout=20, check=False)


def _run(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        raise ConfigError(f"the laboratory needs {words[0]}: apt install e2fsprogs mount") from None
    if done.returncode:
        raise ConfigError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()
