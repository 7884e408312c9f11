"""What TLS costs an RP2040: a verified handshake with the fleet's own mosquitto, over PPP on its emulated UART.

    python -m stonechat_tools.proofs.boards.handshake       as root: a network namespace

First the handshake alone, with the time in which the board waited for bytes measured apart; then that of the agent's
own client, which takes a step in each tick(). Cycles at 125 MHz; misses of the flash cache are not modelled.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from stonechat.errors import StonechatError

from stonechat_tools.proofs.boards import ppp
from stonechat_tools.proofs.boards.firmware import Board, BuildError, build_all
from stonechat_tools.proofs.boards.machine import BoardError, Machine, package

ALONE = """
import gc, io, socket, time
from stonechat_device import device
plain = socket.socket()
plain.connect(socket.getaddrinfo(device["host"], device["port"])[0][-1])
class Line(io.IOBase):
    waited_us = read = written = 0
    def readinto(self, buffer):
        start_us = time.ticks_us()
        count = plain.readinto(buffer)
        Line.waited_us += time.ticks_diff(time.ticks_us(), start_us)
        Line.read += count or 0
        return count
    def write(self, data):
        start_us = time.ticks_us()
        count = plain.write(data)
        Line.waited_us += time.ticks_diff(time.ticks_us(), start_us)
        Line.written += count or 0
        return count
    def ioctl(self, request, argument):
        return 0
gc.collect()
held = gc.mem_alloc()
start_us = time.ticks_us()
stream = device["tls"].wrap_socket(Line(), server_hostname=device["host"])
took_us = time.ticks_diff(time.ticks_us(), start_us)
gc.collect()
print("ALONE", took_us, Line.waited_us, Line.read, Line.written, gc.mem_alloc() - held, *stream.cipher())
stream.close()
plain.close()
"""
AGENT = """
from stonechat.board import hooks
hooks.install()
import gc, time
from stonechat.board import full
from stonechat_device import device
watch = full.start(**device)
longest_us = ticks = 0
start_ms = time.ticks_ms()
while not watch.transport.connected and time.ticks_diff(time.ticks_ms(), start_ms) < 120000:
    tick_us = time.ticks_us()
    watch.tick()
    longest_us = max(longest_us, time.ticks_diff(time.ticks_us(), tick_us))
    ticks += 1
print("AGENT", watch.transport.connected, time.ticks_diff(time.ticks_ms(), start_ms), longest_us, ticks, watch.errors,
    watch.last_error or "-")
"""


@dataclass(frozen=True)
class Cost:
    """auth: as `provision init` takes it. handshake_ms: of it waited_ms for the line and the broker; read, written:
    bytes; held: bytes of heap that the open connection keeps; agent_ms: until the agent's client is connected, TCP and
    MQTT in it; longest_tick_ms."""

    auth: str
    cipher: str
    handshake_ms: int
    waited_ms: int
    read: int
    written: int
    held: int
    agent_ms: int
    longest_tick_ms: int

    def __str__(self) -> str:
        return (
            f"{self.auth}, {self.cipher}: handshake {self.handshake_ms} ms, of which {self.waited_ms} ms waiting for "
            f"{self.read} bytes in and {self.written} out; {self.held} bytes of heap held; the agent is connected "
            f"after {self.agent_ms} ms, longest tick {self.longest_tick_ms} ms"
        )


def clock(machine: Machine) -> None:
    """Sets the board's clock, as ntptime would: before, no certificate and no release is valid."""
    now = time.gmtime()
    fields = (now.tm_year, now.tm_mon, now.tm_mday, now.tm_wday, now.tm_hour, now.tm_min, now.tm_sec, 0)
    machine.run(f"import machine\nmachine.RTC().datetime({fields!r})")


def handshake(board: Board, auth: str) -> Cost:
    """Raises BoardError, BuildError, ConfigError."""
    with ppp.site(auth) as there:
        files = {**package(board.architecture), **there.files}
        with Machine(board, files=files, uart=there.uart, paced=True) as machine:
            clock(machine)
            ppp.connect(machine)
            printed = machine.run(ALONE, ppp.WITHIN_S) + machine.run(AGENT, ppp.WITHIN_S)
    found = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line}
    took, waited, read, written, held, *cipher = found["ALONE"]
    connected, agent_ms, longest, _, errors, *why = found["AGENT"]
    if connected != "True" or errors != "0":
        raise BoardError(f"the agent did not connect: {errors} errors, {' '.join(why)}")
    return Cost(
        auth=auth,
        cipher=" ".join(cipher),
        handshake_ms=int(took) // 1000,
        waited_ms=int(waited) // 1000,
        read=int(read),
        written=int(written),
        held=int(held),
        agent_ms=int(agent_ms),
        longest_tick_ms=int(longest) // 1000,
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--auth", default="passwords,mtls", help="with commas (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args(arguments)
    try:
        (board,) = build_all(["rp2040"])
        costs = []
        for auth in args.auth.split(","):
            costs.append(handshake(board, auth))
            print(f"rp2040, {costs[-1]}", flush=True)
    except (BuildError, BoardError, StonechatError) as error:
        print(f"handshake: {error}", file=sys.stderr)
        return 1
    if args.json:
        args.json.write_text(json.dumps([asdict(one) for one in costs], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
