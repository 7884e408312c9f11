"""Does a response ever lock anybody out, or leave a rule behind? Seeded chaos in network namespaces.

Each run is a device with a response, an outside with its broker, name servers, operator and attacker, and a random
sequence of what goes wrong: the agent or the collector killed, the broker away, the clocks jump, the machine suspended
or rebooted, the allow-list, address or gateway changed, the tables deleted or damaged from outside; in some runs the
attacker has the operator's address, or the kernel has no egress chain. All the while datagrams and connections go every
way. The lease, the enforcer and the allow-list are the agent's own (respond_agent.py); its alarms are given.

A lock-out is a flow of the allow-list that is stopped at any time, or any other flow that is stopped when no lease is
in force: later than its seconds after the last renewal that was accepted, after its end, a reboot, or a new start.

Examples:
  python -m stonechat_tools.proofs.respond --runs 100 --parallel 8
  python -m stonechat_tools.proofs.respond --seed 17             # one run, with what happened
  python -m stonechat_tools.proofs.respond --runs 10 --seconds 120
"""

import argparse
import contextlib
import errno
import json
import os
import random
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stonechat.errors import ConfigError
from stonechat.linux import netfilter_rules, nfnetlink
from stonechat.policy import QUARANTINE, THROTTLE

from ..lab import spaces
from .respond_agent import BROKER, BROKER_PORT, OPERATOR

RUNS = 990
LONG_RUNS = 10
T1_S = 2
LONG_T1_S = 120
PARALLEL = 10
ATTACKER, ATTACKER6 = "10.88.7.7", "fd88::77"
DNS, DNS6, NEW_DNS = "10.88.0.53", "fd88::5", "10.88.0.54"
PROBE_EVERY_S = 0.02
ANSWERS_S = 1.0  # at the end, for those that are under way,
IDLE_TIMES = 3  # and so often must the other end have had nothing to do; a busy machine takes its time
SLACK_S = 0.1  # between the kernel's clock tick and ours
FOLLOWS_WITHIN_S = 5.0  # a changed allow-list, on a busy machine
MODULE = "stonechat_tools.proofs.respond"
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


class Run:
    def __init__(self, seed: int, t1_s: int) -> None:
        self.rng = random.Random(seed)
        self.t1_s = t1_s
        self.outcome = Outcome(seed)
        self.no_egress = self.rng.random() < 0.15
        self.same_address = self.rng.random() < 0.3  # the attacker has the operator's
        self.stack = contextlib.ExitStack()
        self.echoes = Echoes()
        self.agent: subprocess.Popen[str] | None = None
        self.flows: list[Flow] = []
        self.lock = threading.Lock()
        self.may_stop: list[list[float]] = []  # [from, until]: when others may be stopped
        self.pending_s: float | None = None  # `applying` or `renewing` without an end
        self.stopped_others: list[tuple[float, float, str]] = []  # not before, not after, which flow
        self.collector = True
        self.broker: socket.socket | None = None
        self.said: list[str] = []
        self.rebooting = False

    # --- the world ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> "Run":
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="stonechat-respond-")))
        (self.folder / "etc").mkdir()
        (self.folder / "etc/resolv.conf").write_text(f"nameserver {DNS}\nnameserver {DNS6}\n")
        self.outside = spaces.Space()
        self.stack.callback(self.outside.close)
        self.stack.callback(self.echoes.close)
        self.device = spaces.Space()
        spaces.join(self.device, self.outside)
        for family in (socket.AF_INET, socket.AF_INET6):
            for port in (53, 9, 9999):
                sock = self.outside.do(socket.socket, family, socket.SOCK_DGRAM)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                else:
                    sock.setsockopt(socket.IPPROTO_IP, 8, 1)  # IP_PKTINFO: answers come from the address that was asked
                self._bind_all(sock, family, port)
        self.open_broker()
        self.open_device()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        if not self.rebooting:
            self.close_device()
        self.stack.close()

    def _bind_all(self, sock: socket.socket, family: int, port: int) -> None:
        sock.close()
        hosts = (DNS, NEW_DNS, ATTACKER, OPERATOR, spaces.GATEWAY) if family == socket.AF_INET else (DNS6, ATTACKER6)
        for host in hosts:
            each = self.outside.do(socket.socket, family, socket.SOCK_DGRAM)
            each.bind((host, port))
            each.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, 1 << 22)
            self.echoes.add(each, "udp")

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

    # --- the agent ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        words = [sys.executable, "-m", "stonechat_tools.proofs.respond_agent", str(self.folder)]
        words.append("0" if self.no_egress else "1")

        def begin() -> "subprocess.Popen[str]":
            return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

        self.agent = self.device.do(begin)
        self.reader = threading.Thread(target=self._listen, args=(self.agent,), daemon=True)
        self.ready = threading.Event()
        self.reader.start()
        if not self.ready.wait(60):
            raise RuntimeError("the agent does not start")

    def _listen(self, agent: "subprocess.Popen[str]") -> None:
        assert agent.stdout is not None
        for line in agent.stdout:
            word, *_, at = line.split()
            at_s = float(at)
            self.said.append(line.strip())
            with self.lock:
                self._heard(word, at_s)
            if word == "started":
                self.ready.set()

    def _heard(self, word: str, at_s: float) -> None:
        if word in ("applying", "renewing"):
            self.pending_s = at_s
            if word == "applying" and not (self.may_stop and at_s < self.may_stop[-1][1]):
                self.may_stop.append([at_s, float("inf")])
        elif word in ("applied", "renewed"):
            self.pending_s = None
            self.may_stop[-1][1] = at_s + self.t1_s
            self.outcome.leases += word == "applied"
            self.outcome.renewals += word == "renewed"
        elif word == "refused":
            self.pending_s = None
            if self.may_stop and self.may_stop[-1][1] == float("inf"):
                self.may_stop[-1][1] = at_s
        elif word in ("ended", "started", "closed"):
            self._no_longer(at_s)

    def _no_longer(self, at_s: float) -> None:
        if self.may_stop:
            self.may_stop[-1][1] = min(self.may_stop[-1][1], at_s)

    def tell(self, line: str) -> None:
        if self.agent and self.agent.stdin:
            with contextlib.suppress(OSError):
                self.agent.stdin.write(line + "\n")
                self.agent.stdin.flush()

    def kill(self) -> None:
        if self.agent is None:
            return
        self.agent.kill()
        self.agent.wait()
        self.reader.join(10)
        for pipe in (self.agent.stdin, self.agent.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()
        self.agent = None
        with self.lock:
            if self.pending_s is not None:  # it may have done it, and had no time to say so
                self.may_stop[-1][1] = time.monotonic() + self.t1_s
                self.pending_s = None

    def close_agent(self) -> None:
        if self.agent is None:
            return
        self.tell("close")
        try:
            self.agent.wait(30)
        except subprocess.TimeoutExpired:
            self.outcome.lock_outs.append("the agent does not end")
        self.kill()

    # --- traffic ------------------------------------------------------------------------------------------------------

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

    # --- what goes wrong ----------------------------------------------------------------------------------------------

    def happen(self, name: str) -> None:
        self.outcome.events.append(name)
        self.said.append(f"-- {name} {time.monotonic():.6f}")
        getattr(self, "_" + name)()

    def _alarm(self) -> None:
        self.tell(f"alarm {self.rng.choice((QUARANTINE, QUARANTINE, THROTTLE))} {self.t1_s}")

    def _renew(self) -> None:
        """By the collector, while it and the broker are there."""
        if self.collector:
            for sock in list(self.echoes.connections):
                with contextlib.suppress(OSError):
                    sock.send(b"r")

    def _kill_agent(self) -> None:
        self.kill()

    def _start_agent(self) -> None:
        if self.agent is None:
            self.start()

    def _kill_collector(self) -> None:
        self.collector = False

    def _broker_away(self) -> None:
        self.close_broker()

    def _broker_back(self) -> None:
        self.open_broker()
        self.collector = True

    def _wall_clock_jumps(self) -> None:
        self.tell(f"wall {self.rng.choice((-(10**9), -86_400, 86_400, 10**9))}")

    def _suspended(self) -> None:
        self.tell(f"suspended {self.rng.choice((1, self.t1_s, 3600))}")

    def _evidence_gone(self) -> None:
        self.tell("level 0")

    def _release(self) -> None:
        self.tell("release")

    def _allow_list_changed(self) -> None:
        path = self.folder / "etc/resolv.conf"
        path.with_suffix(".new").write_text(f"nameserver {DNS}\nnameserver {DNS6}\nnameserver {NEW_DNS}\n")
        os.replace(path.with_suffix(".new"), path)
        flow = self._flow("new DNS", (NEW_DNS, 53), self.agent is not None)
        flow.since_s = time.monotonic() + FOLLOWS_WITHIN_S
        self.flows.append(flow)

    def _address_changed(self) -> None:
        self.device.ip(
            f"addr replace 10.99.0.3/24 dev {spaces.INTERFACE}",
            f"route replace default via {spaces.GATEWAY} src 10.99.0.3",
        )

    def _reboot(self) -> None:
        """The agent gone, and its network made anew."""
        self.kill()
        self.rebooting = True
        self.close_device()
        with contextlib.suppress(ConfigError):  # it goes with the namespace of its other end, soon or now
            self.outside.ip(f"link del {spaces.INTERFACE}")
        with self.lock:
            self._no_longer(time.monotonic())
        self.device = spaces.Space()
        spaces.join(self.device, self.outside)
        self.open_device()
        self.rebooting = False

    def _tables_deleted(self) -> None:
        self._damage(lambda batch, family: netfilter_rules.delete_table(batch, family))

    def _rules_flushed(self) -> None:
        table = nfnetlink.text(1, netfilter_rules.TABLE)
        self._damage(lambda batch, family: batch.add("rules", 8, family, table))  # NFT_MSG_DELRULE

    def _damage(self, change: Any) -> None:
        def run() -> None:
            kernel = nfnetlink.NfTables()
            for family in (nfnetlink.INET, nfnetlink.NETDEV):
                batch = nfnetlink.Batch()
                change(batch, family)
                with contextlib.suppress(FileNotFoundError):
                    kernel.run(batch)
            kernel.close()

        self.device.do(run)

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

    def play(self) -> None:
        self.warm_up()
        self.start()
        self.probe(0.1)
        chances = {
            "alarm": 8, "renew": 8, "kill_agent": 2, "start_agent": 3, "kill_collector": 1, "broker_away": 1,
            "broker_back": 1, "wall_clock_jumps": 1, "suspended": 1, "evidence_gone": 1, "release": 1,
            "allow_list_changed": 1, "address_changed": 1, "reboot": 1, "tables_deleted": 1, "rules_flushed": 1,
        }  # fmt: skip
        self.happen("alarm")
        self.probe(self.rng.uniform(0.1, 0.5))
        for _ in range(self.rng.randrange(3, 8)):
            self.happen(self.rng.choices(list(chances), list(chances.values()))[0])
            self.probe(self.rng.uniform(0.02, 0.9))
        with self.lock:
            last_s = max([until_s for _, until_s in self.may_stop if until_s < float("inf")], default=0.0)
        self.probe(max(0.0, last_s + SLACK_S - time.monotonic()))
        self.probe(0.3)  # all must pass now
        if self.agent is None:
            self.outcome.inert = self.device.do(tables)
            self.start()  # as the service manager does
        self.close_agent()
        self.probe(0.1)
        self.outcome.left_behind = self.device.do(tables)
        self.finish_probes()
        self.judge()
        if self.outcome.lock_outs or self.outcome.left_behind:
            self.outcome.log = self.said + self.counters()

    def judge(self) -> None:
        for least_s, most_s, name in self.stopped_others:
            self.outcome.stopped += 1
            if not any(from_s <= most_s and least_s <= until_s + SLACK_S for from_s, until_s in self.may_stop):
                self.outcome.lock_outs.append(f"{name} stopped at {least_s:.3f}, when nothing was in force")


def tables() -> int:
    """How many tables of ours are in this namespace."""
    kernel = nfnetlink.NfTables()
    found = 0
    for family in (nfnetlink.INET, nfnetlink.NETDEV):
        with contextlib.suppress(FileNotFoundError):
            found += len(list(kernel.ask(nfnetlink.GET_TABLE, family, nfnetlink.text(1, netfilter_rules.TABLE))))
    kernel.close()
    return found


def one(seed: int, t1_s: int = T1_S) -> tuple[Outcome, list[str]]:
    with Run(seed, t1_s) as run:
        run.play()
    return run.outcome, run.said


def many(seeds: list[int], t1_s: int, parallel: int) -> Iterator[Outcome]:
    """Each run in a process of its own: its namespaces go with it, however it ends."""

    def start(seed: int) -> Outcome:
        words = [sys.executable, "-m", MODULE, "--seed", str(seed), "--seconds", str(t1_s), "--json"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300 + 10 * t1_s, check=False)
        if done.returncode not in (0, 1) or not done.stdout:
            return Outcome(seed, broken=done.stderr.strip()[-1000:] or "no answer")
        return Outcome(**json.loads(done.stdout))

    with ThreadPoolExecutor(parallel) as pool:
        yield from pool.map(start, seeds)


def prove(runs: int, t1_s: int, parallel: int = PARALLEL, first: int = 0) -> bool:
    """Print the figures -> no lock-out, and nothing left behind."""
    total = Outcome(first)
    counts: dict[str, int] = {}
    broken = 0
    began_s = time.monotonic()
    for number, outcome in enumerate(many(list(range(first, first + runs)), t1_s, parallel), 1):
        for name in ("left_behind", "probes", "stopped", "leases", "renewals", "inert"):
            setattr(total, name, getattr(total, name) + getattr(outcome, name))
        total.lock_outs += outcome.lock_outs
        if outcome.broken:
            broken += 1
            print(f"  seed {outcome.seed} could not be carried out: {outcome.broken}", flush=True)
        for name in outcome.events:
            counts[name] = counts.get(name, 0) + 1
        if outcome.lock_outs or outcome.left_behind:
            what = "; ".join(outcome.lock_outs[:3]) or f"{outcome.left_behind} tables left"
            print(f"  seed {outcome.seed}: {what}", flush=True)
            print("".join(f"    {line}\n" for line in outcome.log), end="", flush=True)
        if number % 50 == 0:
            print(f"  {number} runs, {len(total.lock_outs)} lock-outs, {time.monotonic() - began_s:.0f} s", flush=True)
    print("  " + ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in sorted(counts.items())))
    print(
        f"  {runs - broken} runs with leases of {t1_s} s: {total.leases} leases, {total.renewals} renewals, "
        f"{total.probes} probes, {total.stopped} of them stopped within a lease;\n"
        f"  {len(total.lock_outs)} lock-outs, {total.left_behind} tables left behind ({total.inert} of killed agents "
        "stopped nothing any more and went with the next start)",
        flush=True,
    )
    return not total.lock_outs and not total.left_behind and not broken and total.stopped > 0


def soak(scale: float) -> bool:
    if os.geteuid():
        print("  needs root: network namespaces")
        return False
    held = prove(max(1, round(RUNS * scale)), T1_S)
    long_runs = max(1, round(LONG_RUNS * scale))
    return prove(long_runs, LONG_T1_S, long_runs, first=1_000_000) and held


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="one run")
    parser.add_argument("--runs", type=int, default=20, help="how many (default 20)")
    parser.add_argument("--seconds", type=int, default=T1_S, help="of a lease (default 2)")
    parser.add_argument("--parallel", type=int, default=PARALLEL, help="how many at once (default 10)")
    parser.add_argument("--json", action="store_true", help="print one run for machines")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if args.seed is None:
        return 0 if prove(args.runs, args.seconds, args.parallel) else 1
    outcome, said = one(args.seed, args.seconds)
    if args.json:
        print(json.dumps(asdict(outcome)))
    else:
        print("\n".join(said))
        print(outcome)
    return 1 if outcome.lock_outs or outcome.left_behind else 0


if __name__ == "__main__":
    raise SystemExit(main())
