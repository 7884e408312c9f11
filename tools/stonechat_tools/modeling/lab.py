"""A laboratory for recordings on one machine: each simulated device in a network namespace of its own (so that what
the machine itself does on the network stays outside), with its peers across a veth pair where they are to be remote,
and its processes in a cgroup of their own where BPF is to see them alone. Needs root; leaves nothing behind.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from stonechat.errors import ConfigError

from stonechat_tools.workloads.bounds import started

DEVICE_NETWORK = "10.77.0.0/16"
PEER_HOST = "10.77.0.1"
DEVICE_HOST = "10.77.200.2"
_INTERFACE = "eth0"
_CGROUP_ROOTS = ("/sys/fs/cgroup/unified", "/sys/fs/cgroup")
_RUNNER = 'echo $$ > "$0" && exec "$@"'


class Namespace:
    """A network namespace with loopback up. `prefix` is the command under which something runs in it: nsenter, because
    `ip netns exec` would hide /sys/fs/cgroup."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.prefix = ("nsenter", f"--net=/run/netns/{name}")
        _ip("netns", "add", name)
        try:
            _ip("-n", name, "link", "set", "lo", "up")
        except ConfigError:
            self.close()
            raise

    def close(self) -> None:
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True, check=False)


@contextlib.contextmanager
def device_namespace(name: str, remote_peers: bool, seconds: float) -> Iterator[tuple[tuple[str, ...], str | None]]:
    """-> (the command prefix of the device, where its peers are: None for its own loopback)."""
    need_root()
    with contextlib.ExitStack() as stack:
        device = Namespace(name)
        stack.callback(device.close)
        if not remote_peers:
            yield device.prefix, None
            return
        other = Namespace(name + "-peers")
        stack.callback(other.close)
        _ip("link", "add", _INTERFACE, "netns", device.name, "type", "veth", "peer", _INTERFACE, "netns", other.name)
        for space, host in ((device, DEVICE_HOST), (other, PEER_HOST)):
            _ip("-n", space.name, "addr", "add", host + "/16", "dev", _INTERFACE)
            _ip("-n", space.name, "link", "set", _INTERFACE, "up")
        module = "stonechat_tools.workloads.peers"
        command = [*other.prefix, sys.executable, "-m", module, "--bind", "0.0.0.0", "--seconds", str(seconds)]
        peers = started(command)
        stack.callback(_end, peers)
        yield device.prefix, PEER_HOST


@contextlib.contextmanager
def cgroup(name: str) -> Iterator[Path]:
    """A cgroup v2 folder. A process joins by `joining(folder)` before its command."""
    root = next((root for root in map(Path, _CGROUP_ROOTS) if (root / "cgroup.procs").exists()), None)
    if root is None or not (root / "cgroup.controllers").exists():
        raise ConfigError("no cgroup v2 hierarchy is mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")
    folder = root / name
    folder.mkdir(exist_ok=True)
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


def joining(folder: Path) -> tuple[str, ...]:
    return ("sh", "-c", _RUNNER, str(folder / "cgroup.procs"))


def need_root() -> None:
    if os.geteuid():
        raise ConfigError("the laboratory makes network namespaces: run it as root, or record real devices instead")


def _ip(*words: str) -> None:
    try:
        done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20, check=False)
    except FileNotFoundError:
        raise ConfigError("the laboratory needs iproute2's ip: apt install iproute2") from None
    if done.returncode:
        raise ConfigError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def _end(process: "subprocess.Popen[str]") -> None:
    process.terminate()
    try:
        process.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
