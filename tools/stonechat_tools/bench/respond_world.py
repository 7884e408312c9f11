"""A device in a network namespace with a response, its peers outside, and a capture of what arrives there."""

import contextlib
import socket
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stonechat.linux.allow_list import AllowList
from stonechat.linux.netfilter import Netfilter

from ..lab import spaces
from ..lab.bounds import started, stopped
from ..lab.peers import PORTS
from ..proofs.respond_traffic import Echoes

BROKER, DNS, CLOCK, OPERATOR, ATTACKER = "10.88.0.1", "10.88.0.53", "10.88.0.123", "10.88.0.5", "10.88.7.7"
_TIMESTAMP = getattr(socket, "SO_TIMESTAMPNS", 35)
_OUTGOING = 4
FRAMES = "frames"


@dataclass(frozen=True)
class Packet:
    at_s: float  # wall clock, by the kernel
    n_bytes: int
    protocol: int
    target: str
    source_port: int
    target_port: int


def _to(*targets: str) -> Callable[[Packet], bool]:
    return lambda packet: packet.target in targets


# attack: what of it is seen across from the device
SEEN: dict[str, Callable[[Packet], bool]] = {
    "scan_connect": lambda packet: packet.protocol == 6 and packet.target_port in (23, 2323),
    "scan_raw": lambda packet: packet.protocol == 6 and packet.target_port == 23,
    "udp_flood": _to("10.88.1.2"),
    "exfil_burst": _to("10.88.5.5"),
    "brute_in": lambda packet: packet.source_port == PORTS["login"],  # the device's answers
    FRAMES: lambda packet: packet.protocol == 17 and packet.target_port == 7,
}


class Capture:
    """All IPv4 packets that arrive at the other end of the device's cable."""

    def __init__(self, outside: spaces.Space) -> None:
        self._sock = outside.do(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
        self._sock.bind((spaces.INTERFACE, 0x0800))
        self._sock.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)  # SO_RCVBUFFORCE
        self._sock.setsockopt(socket.SOL_SOCKET, _TIMESTAMP, 1)
        self._sock.settimeout(0.2)
        self.packets: list[Packet] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stopping = True
        self._thread.join(5)
        self._sock.close()

    def _serve(self) -> None:
        while not self._stopping:
            with contextlib.suppress(TimeoutError):
                data, ancillary, _, address = self._sock.recvmsg(128, 64, socket.MSG_TRUNC)
                if address[2] == _OUTGOING or len(data) < 38:
                    continue
                seconds, nanoseconds = struct.unpack("qq", ancillary[0][2][:16])
                length, protocol = int.from_bytes(data[16:18], "big"), data[23]
                ports = struct.unpack("!HH", data[34:38])
                at_s = seconds + nanoseconds / 1e9
                self.packets.append(Packet(at_s, length, protocol, socket.inet_ntoa(data[30:34]), *ports))


@dataclass
class World:
    net: spaces.Pair
    echoes: Echoes
    response: Netfilter
    inside: tuple[str, ...]
    outside: tuple[str, ...]

    def do(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return self.net.device.do(work, *arguments)


@contextlib.contextmanager
def world(seconds: float) -> Iterator[World]:
    """A device with a response, and its peers outside, which end after `seconds` at the latest."""
    with contextlib.ExitStack() as stack:
        net = stack.enter_context(spaces.pair())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stonechat-respond-")))
        (folder / "etc").mkdir()
        (folder / "etc/resolv.conf").write_text(f"nameserver {DNS}\n")
        net.outside.ip(f"route replace 10.99.0.0/24 dev {spaces.INTERFACE} src {ATTACKER}")
        echoes = Echoes()
        stack.callback(echoes.close)
        for host, port in ((DNS, 53), (CLOCK, 123), (spaces.GATEWAY, 9999)):
            sock = net.outside.do(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
            sock.bind((host, port))
            echoes.add(sock, "udp")
        outside = ("nsenter", f"--net={net.outside.path}")
        inside = ("nsenter", f"--net={net.device.path}")
        peers = started(
            [
                *outside,
                sys.executable,
                "-m",
                "stonechat_tools.lab.peers",
                "--bind",
                "0.0.0.0",
                "--seconds",
                str(seconds),
            ]
        )
        stack.callback(stopped, peers)
        rows = [{"address": OPERATOR, "reason": "operator"}]
        allow = AllowList(BROKER, PORTS["broker"], rows, root=str(folder), proc="/proc/thread-self")
        response = net.device.do(Netfilter, allow)
        stack.callback(net.device.do, response.close)
        yield World(net, echoes, response, inside, outside)
