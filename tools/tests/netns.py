"""Network namespaces and cgroups for tests that need root: everything is made anew, seen by nobody else, and removed.

    with network() as net, cgroup() as group:
        run(PROGRAM, net=net, group=group)

`network()` has loopback and `out0`, an interface with a default route: whatever is sent out of it is swallowed, because
the other end of the pair takes no packets for another hardware address.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest

_numbers = count()

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: cgroups, network namespaces and BPF")


@contextmanager
def network() -> Iterator[str]:
    name = f"stonechat-{os.getpid()}-{next(_numbers)}"
    _ip("netns", "add", name)
    try:
        for words in (
            "link set lo up",
            "link add out0 type veth peer name far0",
            "link set out0 arp off",
            "addr add 10.77.0.1/16 dev out0",
            "link set far0 up",
            "link set out0 up",
            "route add default dev out0",
        ):
            _ip("-n", name, *words.split())
        yield name
    finally:
        _ip("netns", "delete", name)


@contextmanager
def cgroup() -> Iterator[str]:
    from stonechat.linux.cgroup_id import cgroup_root

    path = Path(cgroup_root()) / f"stonechat-{os.getpid()}-{next(_numbers)}"
    path.mkdir()
    try:
        yield str(path)
    finally:
        path.rmdir()


def start(program: str, *arguments: str, net: str | None = None, group: str | None = None) -> subprocess.Popen[bytes]:
    """A Python program, as text, in a process of its own; pipes on both ends."""

    def join() -> None:
        if group is not None:
            Path(group, "cgroup.procs").write_text(str(os.getpid()))

    command = [sys.executable, "-c", program, *arguments]
    if net is not None:
        command = ["ip", "netns", "exec", net, *command]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=join)


def run(program: str, *arguments: str, net: str | None = None, group: str | None = None) -> str:
    """start(), wait for its end, -> what it printed. Raises where it fails."""
    process = start(program, *arguments, net=net, group=group)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, f"exit status {process.returncode}"
    return printed.decode()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=30)
