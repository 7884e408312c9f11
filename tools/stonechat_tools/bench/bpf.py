"""What the BPF programs add to a system call and to a packet: the same loop with and without them, interleaved.

`measure()` is called by `stonechat bench collect`. The loops run in a child, since the collector leaves out its own
process; each figure is the best of thousands of slices of a fraction of a millisecond, because other work on the
machine only adds time, and only a short slice escapes it on a busy machine."""

import os
import socket
import time
from collections.abc import Callable
from typing import Any

from stonechat.linux import bpf
from stonechat.linux.connections import Connections
from stonechat.linux.syscalls import Syscalls

SYSCALLS_A_SLICE = 2_000
PACKETS_A_SLICE = 200
SLICES_A_TURN = 50
TURNS = 100


class Loop:
    """A child that runs `body` each time it is asked. `run()` -> nanoseconds that one slice took."""

    def __init__(self, body: Callable[[], None]) -> None:
        asks, self._ask = os.pipe()
        self._answer, answers = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._ask)  # else the child would hold its own end open and outlive a killed parent
            try:
                while os.read(asks, 1):
                    began_ns = time.perf_counter_ns()
                    body()
                    os.write(answers, (time.perf_counter_ns() - began_ns).to_bytes(8, "little"))
            finally:
                os._exit(0)
        os.close(asks)
        os.close(answers)

    def run(self) -> int:
        os.write(self._ask, b"x")
        return int.from_bytes(os.read(self._answer, 8), "little")

    def close(self) -> None:
        os.close(self._ask)
        os.close(self._answer)
        os.waitpid(self._pid, 0)


def syscalls() -> None:
    getppid = os.getppid
    for _ in range(SYSCALLS_A_SLICE):
        getppid()


def packets(peers: int = 1) -> Callable[[], None]:
    """-> a body that sends and receives PACKETS_A_SLICE / 2 datagrams over loopback: each is one packet out and one
    in. peers: to how many addresses of 127.0.0.0/8 in turn."""
    receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind(("0.0.0.0", 0))
    port = receiver.getsockname()[1]
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    targets = [(f"127.0.{1 + i // 250}.{1 + i % 250}", port) for i in range(peers)]

    def body() -> None:
        for i in range(PACKETS_A_SLICE // 2):
            sender.sendto(b"x" * 64, targets[i % peers])
            receiver.recv(128)

    return body


def added_ns(body: Callable[[], None], units: int, attach: Callable[[], Any], turns: int) -> dict[str, float]:
    """The loop without and with what attach() returns, turn by turn -> nanoseconds a unit of each, and the
    difference of the two best."""
    loop = Loop(body)
    without, beside = [], []
    try:
        loop.run()
        for _ in range(turns):
            without.append(min(loop.run() for _ in range(SLICES_A_TURN)))
            attached = attach()
            try:
                beside.append(min(loop.run() for _ in range(SLICES_A_TURN)))
            finally:
                attached.close()
    finally:
        loop.close()
    base = min(without) / units
    return {"base_ns": base, "with_ns": min(beside) / units, "added_ns": (min(beside) - min(without)) / units}


def empty_program(result: int) -> bpf.Program:
    program = bpf.Program()
    program.move(bpf.R0, result)
    program.exit()
    return program


class EmptySyscalls(Syscalls):
    def _sys_enter(self) -> bpf.Program:
        return empty_program(0)


class EmptyConnections(Connections):
    def _program(self, outward: bool) -> bpf.Program:
        return empty_program(1)


def measure(turns: int = TURNS) -> dict[str, dict[str, float]]:
    """-> {"syscall", "packet, 1 peer", "packet, 256 peers", and both with an empty program}: base_ns, with_ns, added_ns
    each. The empty program is the floor: what this kernel and CPU ask for calling any program at all. Raises
    CollectorError or OSError where BPF does not start here."""
    lo = ["lo"]
    return {
        "syscall": added_ns(syscalls, SYSCALLS_A_SLICE, Syscalls, turns),
        "syscall, empty program": added_ns(syscalls, SYSCALLS_A_SLICE, EmptySyscalls, turns),
        "packet, 1 peer": added_ns(packets(1), PACKETS_A_SLICE, lambda: Connections(lo), turns),
        "packet, 256 peers": added_ns(packets(256), PACKETS_A_SLICE, lambda: Connections(lo), turns),
        "packet, empty program": added_ns(packets(1), PACKETS_A_SLICE, lambda: EmptyConnections(lo), turns),
    }
