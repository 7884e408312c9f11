"""A device and its network as two namespaces of this machine: nothing that happens there leaves it. Root makes them as
`ip netns` does; anybody else makes them inside a user namespace, where the kernel allows that.

with pair() as net:
    device = benign.spawn("sensor", 60, net.peers, net.router, prefix=net.device)
    attack = attacks.spawn("scan_connect", 20, net.network, prefix=net.device)
    attack = attacks.spawn("brute_in", 20, net.address, prefix=net.outside)
"""

import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from stonechat.errors import ConfigError

from stonechat_tools.lab.bounds import started, stopped

NETWORK = "10.77.0.0/16"
PEERS = "10.77.0.1"
ROUTER = "10.77.0.2"
DEVICE = "10.77.200.2"
INTERFACE = "eth0"
TAP = "tap0"
# All through one neighbour: a scan of the whole network would fill the table of neighbours that all namespaces share.
ROUTES = ((PEERS,), (NETWORK, "via", PEERS))
_numbers = itertools.count()


@dataclass(frozen=True)
class Pair:
    """`device`, `outside`: commands to run something under, at either end. On the outside `peers` answer at every
    address of `network`, `peers` and `router` being those that the device knows; `address` is the device's own."""

    device: tuple[str, ...]
    outside: tuple[str, ...]
    network: str = NETWORK
    peers: str = PEERS
    router: str = ROUTER
    address: str = DEVICE


@contextlib.contextmanager
def pair(seconds: float = 3600, before: tuple[str, ...] = ()) -> Iterator[Pair]:
    """Raises ConfigError where this process may not make namespaces. The peers end after `seconds` at the latest;
    before: a command prefix that they run under."""
    with contextlib.ExitStack() as stack:
        outside, device = stack.enter_context(_named_spaces() if os.geteuid() == 0 else _user_spaces())
        peer = ("type", "veth", "peer", "name", INTERFACE, "netns", device.name)
        for space in (device, outside):
            _ip(space.enter, "link", "set", "lo", "up")
        _ip(outside.enter, "link", "add", INTERFACE, *peer)
        _ip(device.enter, "addr", "add", DEVICE + "/32", "dev", INTERFACE)
        _ip(device.enter, "link", "set", INTERFACE, "up")
        for words in ROUTES:
            _ip(device.enter, "route", "add", *words, "dev", INTERFACE)
        stack.enter_context(_serving(outside.enter, INTERFACE, seconds, before))
        yield Pair(device.enter, outside.enter)


@contextlib.contextmanager
def tap(seconds: float = 3600) -> Iterator[tuple[str, ...]]:
    """The outside alone, with a tap device TAP in it for a virtual machine at DEVICE -> the command under which the
    machine must be started."""
    if os.geteuid():
        raise ConfigError("network namespaces need root")
    with _space(f"stonechat-{os.getpid()}-{next(_numbers)}-outside") as outside:
        _ip(outside.enter, "link", "set", "lo", "up")
        _ip(outside.enter, "tuntap", "add", TAP, "mode", "tap")
        with _serving(outside.enter, TAP, seconds):
            yield outside.enter


@dataclass(frozen=True)
class _Space:
    """A network namespace. name: as `ip link` takes it, a name or a process id; enter: the command prefix."""

    name: str
    enter: tuple[str, ...]


@contextlib.contextmanager
def _named_spaces() -> Iterator[tuple[_Space, _Space]]:
    """-> (outside, device), as root."""
    name = f"stonechat-{os.getpid()}-{next(_numbers)}"
    with _space(name + "-outside") as outside, _space(name + "-device") as device:
        yield outside, device


@contextlib.contextmanager
def _space(name: str) -> Iterator[_Space]:
    _ip((), "netns", "add", name)
    try:
        # `ip netns exec` would hide /sys/fs/cgroup
        yield _Space(name, ("nsenter", f"--net=/run/netns/{name}"))
    finally:
        _ip((), "netns", "delete", name)


@contextlib.contextmanager
def _user_spaces() -> Iterator[tuple[_Space, _Space]]:
    """-> (outside, device) in a user namespace of this user's own, whose root is this user."""
    with _held(("unshare", "--user", "--map-root-user", "--net")) as outside:
        enter = ("nsenter", "--preserve-credentials", "--user", "--target", outside)
        with _held((*enter, "unshare", "--net")) as device:
            yield _Space(outside, (*enter, "--net")), _Space(device, (*enter[:-1], device, "--net"))


@contextlib.contextmanager
def _held(command: tuple[str, ...]) -> Iterator[str]:
    """A namespace that lives while a process in it waits for this one to end -> its process id. Raises ConfigError."""
    words = [*command, "sh", "-c", "echo up; exec cat"]
    try:
        holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except FileNotFoundError:
        raise ConfigError(f"network namespaces need {command[0]} (apt-get install util-linux)") from None
    try:
        if not holder.stdout or not holder.stdout.readline():
            _, errors = holder.communicate(timeout=20)
            reason = errors.decode(errors="replace").strip()
            raise ConfigError(f"network namespaces need root or user namespaces, and there are none: {reason}")
        yield str(holder.pid)
    finally:
        holder.kill()
        holder.communicate()


@contextlib.contextmanager
def _serving(outside: tuple[str, ...], interface: str, seconds: float, before: tuple[str, ...] = ()) -> Iterator[None]:
    """The outside takes every address of the network for its own, except the device's, and serves there."""
    _ip(outside, "addr", "add", PEERS + "/16", "dev", interface)
    _ip(outside, "link", "set", interface, "up")
    _ip(outside, "route", "add", DEVICE, "dev", interface, "table", "local")
    _ip(outside, "route", "add", "local", NETWORK, "dev", "lo", "table", "local")
    module = "stonechat_tools.lab.peers"
    peers = started([*outside, *before, sys.executable, "-m", module, "--bind", "0.0.0.0", "--seconds", str(seconds)])
    try:
        yield
    finally:
        stopped(peers)


def _ip(prefix: tuple[str, ...], *words: str) -> None:
    try:
        subprocess.run([*prefix, "ip", *words], check=True, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise ConfigError(
            f"network namespaces need {(*prefix, 'ip')[0]} (apt-get install iproute2 util-linux)"
        ) from None
    except subprocess.CalledProcessError as error:
        raise ConfigError(f"ip {' '.join(words)}: {error.stderr.strip()}") from None
