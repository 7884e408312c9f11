"""A device and its outside in network namespaces, with datagrams, frames and connections that go every way, and what of
them was stopped."""

import contextlib
import errno
import select
import selectors
import socket
import struct
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ..lab import spaces
from .respond_agent import BROKER, BROKER_PORT, OPERATOR

ATTACKER, ATTACKER6 = "10.88.7.7", "fd88::77"
DNS, DNS6, NEW_DNS = "10.88.0.53", "fd88::5", "10.88.0.54"
PROBE_EVERY_S = 0.02
ANSWERS_S = 1.0  # at the end, for those that are under way,
IDLE_TIMES = 3  # and so often must the other end have had nothing to do; a busy machine takes its time
FOLLOWS_WITHIN_S = 5.0  # a changed allow-list, on a busy machine
_RCVBUFFORCE = 33
_TCP_INFO_BYTES, _RETRANSMITS_AT = 104, 100  # tcpi_total_retrans
_FRAME_MARK = b"stonechat frame "


@dataclass
class Outcome:
    seed: int
    lock_outs: list[str] = field(default_factory=list)
    left_behind: int = 0
    probes: int = 0
    stopped: int = 0
    leases: int = 0
    renewals: int = 0
    inert: int = 0  # tables of a killed agent that stop nothing any more, until the next start
    events: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)  # where something was wrong
    broken: str = ""  # why the run could not be carried out


@dataclass
class Flow:
    """A datagram there and back. listed: on the allow-list; outward: from the device."""

    name: str
    sock: socket.socket
    target: Any
    listed: bool
    since_s: float = 0.0
    sent: dict[int, float] = field(default_factory=dict)


class Echoes:
    """Answers every datagram and every connection; counts the frames that arrive past IP."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self.connections: list[socket.socket] = []
        self.frames: set[int] = set()
        self.idle = 0  # how often there was nothing to do
        self._stopping = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def add(self, sock: socket.socket, kind: str) -> socket.socket:
        sock.setblocking(False)
        with self._lock:
            self._selector.register(sock, selectors.EVENT_READ, kind)
        return sock

    def drop(self, sock: socket.socket) -> None:
        with self._lock, contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(sock)
        sock.close()

    def close(self) -> None:
        self._stopping = True
        self._thread.join(5)
        for key in list(self._selector.get_map().values()):
            self.drop(key.fileobj)  # type: ignore[arg-type]

    def _serve(self) -> None:
        while not self._stopping:
            found = self._selector.select(0.05)
            self.idle += not found
            for key, _ in found:
                with contextlib.suppress(OSError, KeyError, ValueError):
                    self._handle(key.fileobj, key.data)  # type: ignore[arg-type]

    def _handle(self, sock: socket.socket, kind: str) -> None:
        if kind == "udp":
            for _ in range(64):
                data, sender = sock.recvfrom(64)
                sock.sendto(data, sender)
        elif kind == "frames":
            for _ in range(256):
                data = sock.recv(256)
                at = data.find(_FRAME_MARK)
                if at >= 0:
                    self.frames.add(int.from_bytes(data[at + 16 : at + 20], "big"))
        elif kind == "broker":
            accepted = sock.accept()[0]
            self.connections.append(self.add(accepted, "connection"))
        elif not sock.recv(64):
            self.connections.remove(sock)
            self.drop(sock)


class Traffic:
    """same_address: the attacker has the operator's."""

    def __init__(self, seed: int, same_address: bool = False) -> None:
        self.outcome = Outcome(seed)
        self.same_address = same_address
        self.stack = contextlib.ExitStack()
        self.echoes = Echoes()
        self.flows: list[Flow] = []
        self.stopped_others: list[tuple[float, float, str]] = []  # not before, not after, which flow
        self.broker: socket.socket | None = None
        self.said: list[str] = []
        self.rebooting = False

    def __enter__(self) -> "Self":
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="stonechat-respond-")))
        (self.folder / "etc").mkdir()
        (self.folder / "etc/resolv.conf").write_text(f"nameserver {DNS}\nnameserver {DNS6}\n")
        self.outside = spaces.Space()
        self.stack.callback(self.outside.close)
        self.stack.callback(self.echoes.close)
        self.device = spaces.Space()
        spaces.join(self.device, self.outside)
        for host in (DNS, NEW_DNS, ATTACKER, OPERATOR, spaces.GATEWAY, DNS6, ATTACKER6):
            for port in (53, 9, 9999):
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                sock = self.outside.do(socket.socket, family, socket.SOCK_DGRAM)
                sock.bind((host, port))
                sock.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, 1 << 22)
                self.echoes.add(sock, "udp")
        self.open_broker()
        self.open_device()
        return self

    def __exit__(self, *_: object) -> None:
        if not self.rebooting:
            self.close_device()
        self.stack.close()

    def open_broker(self) -> None:
        if self.broker is None:
            sock = self.outside.do(socket.socket)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((BROKER, BROKER_PORT))
            sock.listen(4096)
            self.broker = self.echoes.add(sock, "broker")

    def close_broker(self) -> None:
        if self.broker is not None:
            self.echoes.drop(self.broker)
            self.broker = None
            for sock in list(self.echoes.connections):
                self.echoes.connections.remove(sock)
                self.echoes.drop(sock)

    def open_device(self) -> None:
        """The sockets at the device's end, and the flows."""
        self.frame_counter = self.outside.do(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        self.frame_counter.bind((spaces.INTERFACE, 3))
        self.frame_counter.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, 1 << 23)
        self.echoes.add(self.frame_counter, "frames")
        self.frames = self.device.do(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0)
        self.frames.bind((spaces.INTERFACE, 0))
        self.frames_sent: dict[int, float] = {}
        self.own = []
        for host, port in ((spaces.DEVICE, 4444), ("127.0.0.1", 5555)):
            sock = self.device.do(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
            sock.bind((host, port))
            sock.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, 1 << 22)
            self.own.append(self.echoes.add(sock, "udp"))
        attacker = OPERATOR if self.same_address else ATTACKER
        self.flows = [
            self._flow("DNS", (DNS, 53), True),
            self._flow("DNS IPv6", (DNS6, 53), True),
            self._flow("gateway", (spaces.GATEWAY, 9999), True),
            self._flow("to the operator", (OPERATOR, 9), True),
            self._flow("from the operator", (spaces.DEVICE, 4444), True, OPERATOR),
            self._flow("loopback", ("127.0.0.1", 5555), True),
            self._flow("to the attacker", (attacker, 9), self.same_address),
            self._flow("to the attacker, IPv6", (ATTACKER6, 9), False),
            self._flow("from the attacker", (spaces.DEVICE, 4444), self.same_address, attacker),
        ]
        self.tcp: socket.socket | None = None
        self.tcp_since_s = 0.0

    def _flow(self, name: str, target: Any, listed: bool, source: str = "") -> Flow:
        family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
        sock = (self.outside if source else self.device).do(socket.socket, family, socket.SOCK_DGRAM)
        if source:
            sock.bind((source, 0))
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, 1 << 22)
        return Flow(name, sock, target, listed)

    def close_device(self) -> None:
        self.finish_probes()
        for sock in (*self.own, self.frame_counter):
            self.echoes.drop(sock)
        self.frames.close()
        for flow in self.flows:
            flow.sock.close()
        if self.tcp:
            self.tcp.close()
        self.device.close()

    def probe(self, seconds: float) -> None:
        """Traffic for `seconds`."""
        until_s = time.monotonic() + seconds
        number = self.outcome.probes
        while True:
            now_s = time.monotonic()
            if now_s >= until_s:
                break
            for flow in self.flows:
                self._collect(flow)
                number += 1
                if now_s >= flow.since_s:
                    self._send(flow, number)
            number += 2
            self._send_frame(number)
            self._connect(now_s)
            time.sleep(PROBE_EVERY_S)
        self.outcome.probes = number

    def _send(self, flow: Flow, number: int) -> None:
        sent_s = time.monotonic()
        try:
            flow.sock.sendto(number.to_bytes(8, "big"), flow.target)
            flow.sent[number] = sent_s
        except PermissionError:
            self._stopped(flow, sent_s, time.monotonic())
        except OSError as error:  # unreachable for a moment, while an interface is made anew
            self.said.append(f"{flow.name}: {error}")

    def _collect(self, flow: Flow) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    data = flow.sock.recv(64)
                except (ConnectionError, PermissionError):
                    continue
                flow.sent.pop(int.from_bytes(data, "big"), None)

    def _stopped(self, flow: Flow, from_s: float, until_s: float) -> None:
        if flow.listed:
            self.outcome.lock_outs.append(f"{flow.name} stopped at {from_s:.3f}")
        else:
            self.stopped_others.append((from_s, until_s, flow.name))

    def _send_frame(self, number: int) -> None:
        udp = struct.pack("!HHHH", 1, 9, 28, 0) + _FRAME_MARK + number.to_bytes(4, "big")
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0)
        packet = head + socket.inet_aton(spaces.DEVICE) + socket.inet_aton(ATTACKER) + udp
        now_s = time.monotonic()
        try:
            self.frames.send(b"\xff" * 6 + b"\2\0\0\0\0\1\x08\0" + packet)
            self.frames_sent[number] = now_s
        except OSError:
            self.stopped_others.append((now_s, time.monotonic(), "frame to the attacker"))

    def _connect(self, now_s: float) -> None:
        """A new connection to the broker again and again. Nothing is lost here: a second SYN means that the first, or
        its answer, was stopped."""
        if self.tcp is None:
            self.tcp = self.device.do(socket.socket)
            self.tcp.setblocking(False)
            self.tcp_since_s = now_s
            with contextlib.suppress(BlockingIOError):
                self.tcp.connect((BROKER, BROKER_PORT))
        elif select.select([], [self.tcp], [], 0)[1]:
            info = self.tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
            code = self.tcp.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if info[_RETRANSMITS_AT : _RETRANSMITS_AT + 4] != bytes(4) or code in (errno.EPERM, errno.ETIMEDOUT):
                self.outcome.lock_outs.append(f"broker stopped at {self.tcp_since_s:.3f}")
            self.tcp.close()
            self.tcp = None

    def finish_probes(self) -> None:
        """Wait for what is under way, then count what never arrived: it was stopped when it was sent, or its answer."""
        until_s, idle = time.monotonic() + ANSWERS_S, self.echoes.idle + IDLE_TIMES
        while time.monotonic() < until_s or self.echoes.idle < idle:
            time.sleep(0.01)
        for flow in self.flows:
            self._collect(flow)
            for sent_s in flow.sent.values():
                self._stopped(flow, sent_s, sent_s + ANSWERS_S)
            flow.sent = {}
        for number in set(self.frames_sent) - self.echoes.frames:
            sent_s = self.frames_sent[number]
            self.stopped_others.append((sent_s, sent_s + ANSWERS_S, "frame to the attacker"))
        self.frames_sent = {}

    def warm_up(self) -> None:
        """Until every flow has had an answer: hosts must find each other first."""
        until_s = time.monotonic() + 20
        while time.monotonic() < until_s:
            before = {flow.name: len(flow.sent) for flow in self.flows}
            self.probe(0.05)
            time.sleep(0.05)
            for flow in self.flows:
                self._collect(flow)
            if all(len(flow.sent) <= before[flow.name] for flow in self.flows):
                break
        for flow in self.flows:
            flow.sent = {}
        self.frames_sent = {}

    def counters(self) -> list[str]:
        """What the kernel has lost at either end."""
        lines = []
        for name, space in (("device", self.device), ("outside", self.outside)):
            text = space.do(Path("/proc/thread-self/net/snmp").read_text)
            lines += [f"{name} {line}" for line in text.splitlines() if line.startswith(("Ip:", "Udp:"))]
        lines += [f"softnet {line[:26]}" for line in Path("/proc/net/softnet_stat").read_text().splitlines()]
        return lines
