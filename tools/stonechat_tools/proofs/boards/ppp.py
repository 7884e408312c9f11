"""A Pico with a network: PPP over its emulated UART to a network namespace of this machine, where a real mosquitto and
a real `stonechat collect` run. As root only (a network namespace and a TUN device).

    python -m stonechat_tools.proofs.boards.ppp --reports 3

`Peer` is the other end of the line, as much of PPP (RFC 1661, 1662, 1332) as lwIP needs: LCP, IPCP, IPv4.
"""

import argparse
import contextlib
import fcntl
import os
import select
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stonechat.errors import StonechatError

from stonechat_tools.board_files import read_board
from stonechat_tools.console import working_copy
from stonechat_tools.fleet import broker_config, provision
from stonechat_tools.fleet.local_broker import mosquitto_path
from stonechat_tools.fleet.store import Store
from stonechat_tools.lab.bounds import stopped
from stonechat_tools.proofs.boards.firmware import Board, BuildError, build_all
from stonechat_tools.proofs.boards.machine import BoardError, Machine, package
from stonechat_tools.proofs.boards.uart import wire

HOST, BOARD, STRANGER = "10.77.0.1", "10.77.0.2", "10.77.0.6"
MTU = 1500
WITHIN_S = 600.0
_IP, _LCP, _IPCP = 0x0021, 0xC021, 0x8021
_REQUEST, _ACK, _NAK, _REJECT, _END, _END_ACK, _ECHO, _ECHO_REPLY, _NO_PROTOCOL = 1, 2, 3, 4, 5, 6, 9, 10, 8
_ADDRESS = 3  # IPCP's option
_TAKEN = {_LCP: (1, 2, 5, 7, 8), _IPCP: (_ADDRESS,)}  # options: MRU, control characters, magic, compressed fields
_TUNSETIFF, _TUN_NO_HEADER = 0x400454CA, 0x1001


def _fcs_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x8408 if value & 1 else 0)
        table.append(value)
    return table


_FCS = _fcs_table()


def fcs(data: bytes) -> int:
    """RFC 1662's checksum; 0xF0B8 over a frame with its own."""
    value = 0xFFFF
    for byte in data:
        value = value >> 8 ^ _FCS[(value ^ byte) & 255]
    return value


def framed(protocol: int, payload: bytes) -> bytes:
    body = struct.pack(">HH", 0xFF03, protocol) + payload
    body += struct.pack("<H", fcs(body) ^ 0xFFFF)
    inside = b"".join(bytes((0x7D, b ^ 0x20)) if b < 0x20 or b in (0x7D, 0x7E) else bytes((b,)) for b in body)
    return b"\x7e" + inside + b"\x7e"


def unframed(frame: bytes) -> tuple[int, bytes] | None:
    """What lies between two flags -> (protocol, payload), None where it is damaged."""
    out = bytearray()
    escaped = False
    for byte in frame:
        if byte == 0x7D:
            escaped = True
        else:
            out.append(byte ^ 0x20 if escaped else byte)
            escaped = False
    if len(out) < 4 or fcs(bytes(out)) != 0xF0B8:
        return None
    body = bytes(out[:-2])
    if body[:2] == b"\xff\x03":
        body = body[2:]
    if body[:1] and body[0] & 1:  # the protocol in one byte
        return body[0], body[1:]
    return (int.from_bytes(body[:2], "big"), body[2:]) if len(body) >= 2 else None


class Peer:
    """line: descriptor of the serial line; tunnel: of the TUN device that packets go to and come from."""

    def __init__(self, line: int, tunnel: int) -> None:
        self._line = line
        self._tunnel = tunnel
        self._buffer = b""
        self.packets = 0

    def serve(self, stop: threading.Event) -> None:
        while not stop.is_set():
            for ready in select.select([self._line, self._tunnel], [], [], 0.2)[0]:
                if ready == self._tunnel:
                    self._send(_IP, os.read(self._tunnel, 2048))
                    continue
                self._buffer += os.read(self._line, 4096)
                *frames, self._buffer = self._buffer.split(b"\x7e")
                for frame in frames:
                    got = unframed(frame)
                    if got:
                        self._take(*got)

    def _send(self, protocol: int, payload: bytes) -> None:
        data = framed(protocol, payload)
        while data:
            data = data[os.write(self._line, data) :]

    def _control(self, protocol: int, code: int, number: int, content: bytes) -> None:
        self._send(protocol, struct.pack(">BBH", code, number, 4 + len(content)) + content)

    def _take(self, protocol: int, payload: bytes) -> None:
        if protocol == _IP:
            self.packets += 1
            os.write(self._tunnel, payload)
        elif protocol not in _TAKEN:
            self._control(_LCP, _NO_PROTOCOL, 1, struct.pack(">H", protocol) + payload)
        elif len(payload) >= 4:
            code, number, length = struct.unpack_from(">BBH", payload)
            content = payload[4:length]
            if code == _REQUEST:
                if self._answer(protocol, number, content):  # ours with each: a board that was reset asks again
                    own = struct.pack(">BB4B", _ADDRESS, 6, *map(int, HOST.split("."))) if protocol == _IPCP else b""
                    self._control(protocol, _REQUEST, 1, own)
            elif code == _END:
                self._control(protocol, _END_ACK, number, b"")
            elif code == _ECHO:
                self._control(protocol, _ECHO_REPLY, number, bytes(4) + content[4:])

    def _answer(self, protocol: int, number: int, content: bytes) -> bool:
        """-> whether the request is accepted as it is."""
        refused = other = b""
        wanted = bytes(map(int, BOARD.split(".")))
        rest = content
        while len(rest) >= 2 and 2 <= rest[1] <= len(rest):
            option, rest = rest[: rest[1]], rest[rest[1] :]
            if option[0] not in _TAKEN[protocol]:
                refused += option
            elif protocol == _IPCP and option[2:] != wanted:
                other += option[:2] + wanted
        code = _REJECT if refused else _NAK if other else _ACK
        self._control(protocol, code, number, refused or other or content)
        return code == _ACK


@contextlib.contextmanager
def namespace(line: str) -> Iterator[str]:
    """A network namespace with HOST, a PPP line away from the board on the terminal `line` -> its name."""
    name = f"stonechat-ppp-{os.getpid()}"
    device = f"scp{os.getpid()}"[:15]
    stop = threading.Event()
    serial = os.open(line, os.O_RDWR | os.O_NOCTTY)
    tunnel = os.open("/dev/net/tun", os.O_RDWR)
    _ip("netns", "add", name)
    try:
        fcntl.ioctl(tunnel, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _TUN_NO_HEADER))
        _ip("link", "set", device, "netns", name)
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "addr", "add", HOST, "peer", BOARD, "dev", device)
        _ip("-n", name, "link", "set", device, "mtu", str(MTU), "up")
        thread = threading.Thread(target=Peer(serial, tunnel).serve, args=(stop,), daemon=True)
        thread.start()
        try:
            yield name
        finally:
            stop.set()
            thread.join(10)
    finally:
        _ip("netns", "delete", name)
        os.close(tunnel)
        os.close(serial)


@contextlib.contextmanager
def peers(name: str) -> Iterator[int]:
    """The peers of a small product (lab/firmware/peers.py) in the namespace `name`, at HOST and STRANGER -> their first
    port."""
    _ip("-n", name, "addr", "add", STRANGER, "dev", "lo")
    command = ["ip", "netns", "exec", name, sys.executable, "-m", "stonechat_tools.lab.firmware.peers", HOST, STRANGER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield int(process.stdout.readline())
        finally:
            process.kill()


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise BuildError(f"ip {' '.join(words)}: {done.stderr.strip()}; PPP needs root, /dev/net/tun and iproute2")


# What a product's main.py does: the line, then the agent with its own MQTT client.
CONNECT = """
import network, time
from machine import UART, Pin
line = UART(0, baudrate=115200, tx=Pin(0), rx=Pin(1), rxbuf=4096, txbuf=4096)
ppp = network.PPP(line)
ppp.connect()
for _ in range(300):
    time.sleep_ms(100)
    ppp.poll()
    if ppp.isconnected():
        break
print("PPP", ppp.isconnected(), ppp.ifconfig()[0])
"""
WORK = """
from stonechat.board import hooks
hooks.install()
import gc, time
from stonechat.board import PROFILE
from stonechat_device import device
gc.collect()
start_ms = time.ticks_ms()
watch = PROFILE.start(**device, firmware="1.4.2", heartbeat_windows=1)
agent = watch.agent
longest = 0
while agent.windows < WINDOWS and time.ticks_diff(time.ticks_ms(), start_ms) < 300000:
    tick_us = time.ticks_us()
    watch.tick()
    longest = max(longest, time.ticks_diff(time.ticks_us(), tick_us))
    time.sleep_ms(20)
for _ in range(250):
    watch.tick()
    time.sleep_ms(20)
print("AGENT", agent.windows, agent.reporter.published, agent.errors, watch.errors, watch.last_error or "-")
print("TICK", longest, gc.mem_alloc())
if hasattr(agent.reporter, "outbox"):
    print("ACKNOWLEDGED", agent.reporter.outbox.oldest - 1)
"""


@dataclass(frozen=True)
class Arrived:
    """windows, published: on the board; stored: the collector's numbers; acknowledged: reports that the board knows to
    be committed, None in core, which listens to nothing; longest_us: of a tick."""

    windows: int
    published: int
    stored: list[int]
    acknowledged: int | None
    longest_us: int
    errors: str


@dataclass(frozen=True)
class Site:
    """What the board talks to. fleet: with the one device sensor-7; inside: the command before one that is to run in
    the namespace; uart: the board's end of the line; identity: its files, by path on the board."""

    fleet: provision.Fleet
    inside: list[str]
    uart: socket.socket
    identity: dict[str, bytes]
    database: Path
    log: Path

    @contextlib.contextmanager
    def running(self, command: list[str]) -> Iterator[None]:
        """A process at HOST, ended with the block."""
        with self.log.open("ab") as log:
            whole = ["setpriv", "--pdeathsig", "KILL", *self.inside, *command]  # ends with this process
            process = subprocess.Popen(whole, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            yield
        finally:
            stopped(process, 20.0)

    @property
    def files(self) -> dict[str, bytes]:
        """Its identity and the shipped model."""
        model = working_copy() / "models/micropython-1/model.tflite"
        return {**self.identity, "/model.tflite": model.read_bytes()}

    def collector(self) -> contextlib.AbstractContextManager[None]:
        command = [sys.executable, "-m", "stonechat_tools.cli", "collect", "--keys", str(self.fleet.folder / "keys")]
        plain = ["--plain"] if self.fleet.settings.auth == "plain" else []
        return self.running([*command, "--db", str(self.database), *plain])


@contextlib.contextmanager
def site(auth: str = "plain", collecting: bool = True) -> Iterator[Site]:
    """A fleet with its mosquitto, as `stonechat broker-config` configures it, and `stonechat collect`, at HOST behind
    PPP. auth: as `provision init` takes it; collecting: False leaves the collector to the caller. Raises BuildError,
    ConfigError."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stonechat-ppp-")))
        fleet = provision.Fleet.init(
            folder / "fleet", provision.Settings(HOST, 1883 if auth == "plain" else 8883, auth=auth)
        )
        fleet.add("sensor-7", board=True)
        uart, terminal = stack.enter_context(wire())
        inside = ["ip", "netns", "exec", stack.enter_context(namespace(terminal))]
        own = {f"/{path.name}": path.read_bytes() for path in read_board(fleet.folder / "devices/sensor-7/board")}
        there = Site(fleet, inside, uart, own, folder / "reports.db", folder / "log")
        broker = [mosquitto_path() or "mosquitto", "-c", str(broker_config.write(fleet, HOST, user="root"))]
        stack.enter_context(there.running(broker))
        if collecting:
            stack.enter_context(there.collector())
        yield there


def connect(machine: Machine) -> None:
    """Brings the board's line up. Raises BoardError."""
    said = machine.run(CONNECT, WITHIN_S)
    if "PPP True" not in said:
        raise BoardError(f"no PPP: {said.strip()}")


def report(board: Board, reports: int, profile: str = "full") -> Arrived:
    """The board reports `reports` windows to mosquitto and `stonechat collect` over PPP. Raises BoardError, BuildError,
    ConfigError."""
    with site() as there:
        files = {**package(board.architecture, profile), **there.files}
        with Machine(board, files=files, uart=there.uart, paced=True) as machine:
            connect(machine)
            script = WORK.replace("PROFILE", profile).replace("WINDOWS", str(reports))
            found = {line.split()[0]: line.split()[1:] for line in machine.run(script, WITHIN_S).splitlines() if line}
        with Store(there.database) as store:
            stored = store.sequences("sensor-7")
    windows, published, lost, wrong, *last = found["AGENT"]
    errors = "" if lost == wrong == "0" else " ".join(last) or f"{lost} of windows"
    acknowledged = int(found["ACKNOWLEDGED"][0]) if "ACKNOWLEDGED" in found else None
    return Arrived(int(windows), int(published), stored, acknowledged, int(found["TICK"][0]), errors)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=int, default=3, help="default %(default)s")
    parser.add_argument("--profile", choices=("full", "core"), default="full", help="default %(default)s")
    args = parser.parse_args(arguments)
    try:
        (board,) = build_all(["rp2040"])
        arrived = report(board, args.reports, args.profile)
    except (BuildError, BoardError, StonechatError) as error:
        print(f"ppp: {error}", file=sys.stderr)
        return 1
    print(
        f"rp2040, {args.profile}, over PPP: {arrived.windows} windows, {arrived.published} published, "
        f"stored {arrived.stored}, acknowledged {arrived.acknowledged}, longest tick {arrived.longest_us} us, "
        f"errors: {arrived.errors or 'none'}"
    )
    return 0 if len(arrived.stored) >= args.reports and not arrived.errors else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
