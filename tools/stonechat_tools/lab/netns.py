"""A device and its network as two namespaces of this machine: nothing that happens there leaves it. Needs root.

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
def pair(seconds: float = 3600) -> Iterator[Pair]:
    """Raises ConfigError where this process may not make namespaces. The peers end after `seconds` at the latest."""
    if os.geteuid():
        raise ConfigError("network namespaces need root")
    name = f"stonechat-{os.getpid()}-{next(_numbers)}"
    device, outside = name + "-device", name + "-outside"
    with contextlib.ExitStack() as stack:
        for space in (device, outside):
            stack.enter_context(_space(space))
        _ip("link", "add", INTERFACE, "netns", device, "type", "veth", "peer", INTERFACE, "netns", outside)
        _ip("-n", device, "addr", "add", DEVICE + "/32", "dev", INTERFACE)
        _ip("-n", device, "link", "set", INTERFACE, "up")
        for words in ROUTES:
            _ip("-n", device, "route", "add", *words, "dev", INTERFACE)
        stack.enter_context(_serving(outside, INTERFACE, seconds))
        yield Pair(_inside(device), _inside(outside))


@contextlib.contextmanager
def tap(seconds: float = 3600) -> Iterator[tuple[str, ...]]:
    """The outside alone, with a tap device TAP in it for a virtual machine at DEVICE -> the command under which the
    machine must be started."""
    if os.geteuid():
        raise ConfigError("network namespaces need root")
    outside = f"stonechat-{os.getpid()}-{next(_numbers)}-outside"
    with _space(outside):
        _ip("-n", outside, "tuntap", "add", TAP, "mode", "tap")
        with _serving(outside, TAP, seconds):
            yield _inside(outside)


@contextlib.contextmanager
def _space(name: str) -> Iterator[None]:
    _ip("netns", "add", name)
    try:
        _ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        _ip("netns", "delete", name)


@contextlib.contextmanager
def _serving(outside: str, interface: str, seconds: float) -> Iterator[None]:
    """The outside takes every address of the network for its own, except the device's, and serves there."""
    _ip("-n", outside, "addr", "add", PEERS + "/16", "dev", interface)
    _ip("-n", outside, "link", "set", interface, "up")
    _ip("-n", outside, "route", "add", DEVICE, "dev", interface, "table", "local")
    _ip("-n", outside, "route", "add", "local", NETWORK, "dev", "lo", "table", "local")
    module = "stonechat_tools.lab.peers"
    command = [*_inside(outside), sys.executable, "-m", module, "--bind", "0.0.0.0", "--seconds", str(seconds)]
    peers = started(command)
    try:
        yield
    finally:
        stopped(peers)


def _inside(space: str) -> tuple[str, ...]:
    return ("nsenter", f"--net=/run/netns/{space}")  # `ip netns exec` would hide /sys/fs/cgroup


def _ip(*words: str) -> None:
    try:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        raise ConfigError("network namespaces need iproute2 (apt-get install iproute2)") from None
    except subprocess.CalledProcessError as error:
        raise ConfigError(f"ip {' '.join(words)}: {error.stderr.strip()}") from None
