"""What a response on Linux stops, how fast, and what it costs those who did nothing.

Attacks of the laboratory run in a network namespace; the other end of its cable counts what arrives there. The alarm is
given, so that the figures are those of the response alone and not of the detection before it. Then devices on an
ordinary day are throttled for no reason, each beside a twin that is not. As root.

Examples:
  stonechat bench respond
  stonechat bench respond --attack scan_raw --attack frames --seconds 3
"""

import argparse
import contextlib
import os
import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stonechat.errors import ConfigError
from stonechat.policy import QUARANTINE, THROTTLE

from ..console import plain_table
from ..lab import attacks, benign, spaces
from ..lab.bounds import Deadline, started, stopped
from ..lab.peers import PORTS
from .respond_live import WINDOW_MS, live
from .respond_world import BROKER, CLOCK, DNS, FRAMES, OPERATOR, SEEN, Capture, World, world

HELP = "what a response stops, how fast, and what it costs"
NAMES = {THROTTLE: "throttle", QUARANTINE: "quarantine"}
WITHIN_S = 1.0  # an answer to a benign flow
_POOL = "10.88.6.6"


# --- benign flows while something is in force -------------------------------------------------------------------------


@dataclass
class Tally:
    tried: int = 0
    harmed: int = 0


@dataclass
class Benign:
    """What a device does anyway, again and again in a thread; `listed`: of the allow-list."""

    world: World
    listed: Tally = field(default_factory=Tally)
    other: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        self._login = self.world.do(socket.socket)
        self._login.bind((spaces.DEVICE, 22))
        self._login.listen(16)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stopping = True
        self._thread.join(30)
        self._login.close()

    def _run(self) -> None:
        device, outside = self.world.net.device, self.world.net.outside
        turn = 0
        while not self._stopping:
            for host, port in ((DNS, 53), (spaces.GATEWAY, 9999), *([(CLOCK, 123)] if turn % 16 == 0 else [])):
                self._count(self.listed, self._datagram, host, port)
            self._count(self.listed, self._ask, device, BROKER, PORTS["broker"], b"\x32hello")
            self._count(self.listed, self._come_in, outside)
            self._count(self.other, self._ask, device, BROKER, PORTS["http"], b"GET / HTTP/1.0\r\n\r\n")
            turn += 1
            time.sleep(0.2)

    def _count(self, tally: Tally, flow: Callable[..., None], *arguments: Any) -> None:
        tally.tried += 1
        try:
            flow(*arguments)
        except OSError:
            tally.harmed += 1

    def _datagram(self, host: str, port: int) -> None:
        with self.world.do(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(WITHIN_S)
            sock.sendto(b"x" * 48, (host, port))
            sock.recv(64)

    def _ask(self, space: spaces.Space, host: str, port: int, data: bytes) -> None:
        with space.do(socket.socket) as sock:
            sock.settimeout(WITHIN_S)
            sock.connect((host, port))
            sock.sendall(data)
            if not sock.recv(64):
                raise OSError("no answer")

    def _come_in(self, outside: spaces.Space) -> None:
        """The operator logs in."""
        with outside.do(socket.socket) as sock:
            sock.settimeout(WITHIN_S)
            sock.bind((OPERATOR, 0))
            sock.connect((spaces.DEVICE, 22))
            with self._login.accept()[0] as accepted:
                accepted.sendall(b"login:")
                sock.recv(64)


# --- attacks ----------------------------------------------------------------------------------------------------------


def _send_frames(seconds: float) -> None:
    """The attack `frames`: UDP to anyone, 160 times a second, written by AF_PACKET past IP and its filters."""
    deadline = Deadline(seconds)
    rng = random.Random(3)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sock:
        sock.bind((spaces.INTERFACE, 0x0806))  # said to be ARP
        print("started", flush=True)
        while deadline.live():
            for _ in range(16):
                udp = struct.pack("!HHHH", 4000, 7, 28, 0) + bytes(20)
                head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0)
                target = socket.inet_aton(f"10.88.{rng.randrange(256)}.{rng.randrange(256)}")
                with contextlib.suppress(OSError):
                    sock.send(
                        b"\xff" * 6 + b"\2\0\0\0\0\1\x08\0" + head + socket.inet_aton(spaces.DEVICE) + target + udp
                    )
            deadline.sleep(0.1)


@contextlib.contextmanager
def _attack(name: str, where: World, seconds: float) -> Iterator[None]:
    victim = contextlib.ExitStack()
    with victim:
        if name == FRAMES:
            words = [sys.executable, "-m", __name__, FRAMES, str(seconds)]
            process = started([*where.inside, *words])
        elif attacks.ATTACKS[name].at_device:
            serve = ["-m", "stonechat_tools.lab.peers", "--bind", spaces.DEVICE, "--seconds", str(seconds + 10)]
            victim.callback(stopped, started([*where.inside, sys.executable, *serve]))
            process = attacks.spawn(name, seconds, spaces.DEVICE, prefix=where.outside)
        else:
            process = attacks.spawn(name, seconds, spaces.NETWORK, prefix=where.inside)
        victim.callback(stopped, process)
        yield


def measure(name: str, action: int, seconds: float) -> dict[str, Any]:
    """One attack that runs for `seconds` before the alarm and as long after it."""
    with world(4 * seconds + 60) as where:
        capture, flows = Capture(where.net.outside), Benign(where)
        try:
            with _attack(name, where, 4 * seconds + 20):
                time.sleep(0.5)
                from_s = time.time()
                time.sleep(seconds)
                flows.listed, flows.other = Tally(), Tally()
                alarm_s = time.time()
                where.do(where.response.apply, action, int(2 * seconds) + 30)
                took_s = time.time() - alarm_s
                time.sleep(max(0.0, alarm_s + seconds - time.time()))
                counts = where.do(where.response.counts)
                until_s = time.time()
        finally:
            flows.close()
            capture.close()
    mine = [packet for packet in capture.packets if SEEN[name](packet)]
    before = [packet for packet in mine if from_s <= packet.at_s < alarm_s]
    after = [packet for packet in mine if alarm_s <= packet.at_s < until_s]
    if not before:
        raise ConfigError(f"{name}: no packet of the attack was seen")
    longer = (until_s - alarm_s) / (alarm_s - from_s)
    return {
        "attack": name,
        "action": NAMES[action],
        "rules_in_force_ms": 1000 * took_s,
        "last_packet_s": max((packet.at_s - alarm_s for packet in after), default=0.0),
        "packets_before": len(before),
        "packets_after": len(after),
        "stopped_share": 1 - len(after) / (len(before) * longer),
        "stopped_bytes_share": 1 - sum(p.n_bytes for p in after) / (sum(p.n_bytes for p in before) * longer),
        "stopped_by_rules": counts[1],
        "benign_listed": [flows.listed.harmed, flows.listed.tried],
        "benign_other": [flows.other.harmed, flows.other.tried],
    }


def untouched(name: str, seconds: float) -> dict[str, Any]:
    """ransom or miner -> how much of its work goes on in a quarantine, and its packets."""
    with world(4 * seconds + 60) as where:
        capture = Capture(where.net.outside)
        process = attacks.spawn(name, 4 * seconds + 20, spaces.NETWORK, prefix=where.inside)
        try:
            time.sleep(0.5)
            marks = [(time.time(), _work(name, process.pid))]
            time.sleep(seconds)
            marks.append((time.time(), _work(name, process.pid)))
            where.do(where.response.apply, QUARANTINE, int(2 * seconds) + 30)
            time.sleep(seconds)
            marks.append((time.time(), _work(name, process.pid)))
        finally:
            stopped(process)
            capture.close()
    (a_s, a), (b_s, b), (c_s, c) = marks
    pool = [packet.at_s for packet in capture.packets if packet.target == _POOL]
    return {
        "attack": name,
        "work_goes_on_share": ((c - b) / (c_s - b_s)) / max(1e-9, (b - a) / (b_s - a_s)),
        "packets_before": sum(at_s < b_s for at_s in pool),
        "packets_after": sum(at_s >= b_s + 0.1 for at_s in pool),
    }


def _work(name: str, pid: int) -> int:
    """Bytes written by ransom, processor time of the miner."""
    if name == "ransom":
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
        return int(dict(line.split(": ") for line in lines)["wchar"])
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11])


# --- a false alarm ----------------------------------------------------------------------------------------------------


def false_alarm(kind: str, seconds: float, throttled: bool) -> dict[str, Any]:
    """A device on an ordinary day -> the bytes that it moved, both ways, and packets that were stopped."""
    with world(seconds + 60) as where:
        device = benign.spawn(kind, seconds + 30, BROKER, spaces.GATEWAY, prefix=where.inside, pace=4.0)
        try:
            time.sleep(1.0)
            if throttled:
                where.do(where.response.apply, THROTTLE, int(seconds) + 30)
            before = where.do(_moved)
            time.sleep(seconds)
            after = where.do(_moved)
            stopped_packets = where.do(where.response.counts)[1] if throttled else 0
        finally:
            stopped(device)
    return {"bytes": after - before, "stopped": stopped_packets}


def _moved() -> int:
    """Bytes in and out of the device's interface."""
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name.strip() == spaces.INTERFACE:
            words = rest.split()
            return int(words[0]) + int(words[8])
    raise ConfigError("the device has no interface")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    help = "this one only (again for more); without it also ransom, miner, and a run of the whole agent"
    parser.add_argument("--attack", action="append", choices=list(SEEN), help=help)
    parser.add_argument("--seconds", type=float, default=5.0, help="before the alarm, and after it (default 5)")
    parser.add_argument(
        "--false-alarm-seconds", type=float, default=60.0, help="of each device's day; 0: without (default 60)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    if os.geteuid():
        raise ConfigError("network namespaces need root: sudo stonechat bench respond")
    rows = []
    found = []
    for name in args.attack or SEEN:
        for action in (QUARANTINE, THROTTLE):
            one = measure(name, action, args.seconds)
            found.append(one)
            last = (
                f"{1000 * one['last_packet_s']:.1f} ms" if one["last_packet_s"] < 1 else f"{one['last_packet_s']:.1f} s"
            )
            listed, other = one["benign_listed"], one["benign_other"]
            rows.append(
                [
                    name,
                    NAMES[action],
                    f"{one['rules_in_force_ms']:.1f} ms",
                    last,
                    f"{100 * one['stopped_share']:.2f} %",
                    f"{100 * one['stopped_bytes_share']:.2f} %",
                    f"{listed[0]} of {listed[1]}",
                    f"{other[0]} of {other[1]}",
                ]
            )
    head = ["attack", "response", "rules in force", "last packet after", "packets stopped", "bytes stopped"]
    print(plain_table([*head, "allow-list harmed", "others harmed"], rows), end="")
    figures: dict[str, Any] = {"attacks": found}
    if not args.attack:
        figures["untouched"] = [untouched(name, args.seconds) for name in ("ransom", "miner")]
        for one in figures["untouched"]:
            print(
                f"{one['attack']} in quarantine: {100 * one['work_goes_on_share']:.0f} % of its work goes on; packets "
                f"to its pool: {one['packets_before']} before, {one['packets_after']} after"
            )
        figures["live"] = _live()
    if args.false_alarm_seconds:
        figures["false_alarms"] = false_alarms(args.false_alarm_seconds)
    return figures


def _live() -> dict[str, Any]:
    found = live()
    log = found.pop("log")
    if "quarantine_seen_s" not in found:
        raise ConfigError("the real agent did not respond:\n" + log[-2000:])
    print(f"the whole agent, windows of {WINDOW_MS / 1000} s, {found['attack']}:")
    print(f"  alarm {found['alarm_after_s']:.1f} s after its begin")
    print(f"  last packet {found['last_packet_after_alarm_s']:.2f} s after the alarm")
    print(
        f"  packets: {found['packets_before_alarm']} before the alarm, {found['packets_in_throttle']} in "
        f"{found['throttle_lasted_s']:.1f} s of throttle, {found['packets_in_quarantine']} in "
        f"{found['quarantine_seen_s']:.1f} s of quarantine"
    )
    print(f"  the hook was called with: {found['hook']}")
    return found


def false_alarms(seconds: float) -> dict[str, Any]:
    """All kinds of devices at once, each with its twin: print the throughput under throttle as a share."""
    jobs = [(kind, throttled) for kind in benign.KINDS for throttled in (False, True)]
    with ThreadPoolExecutor(len(jobs)) as pool:
        done = dict(zip(jobs, pool.map(lambda job: false_alarm(job[0], seconds, job[1]), jobs), strict=True))
    rows = []
    figures = {}
    for kind in benign.KINDS:
        free, slowed = done[kind, False], done[kind, True]
        share = slowed["bytes"] / max(1, free["bytes"])
        figures[kind] = {"bytes": free["bytes"], "throttled_bytes": slowed["bytes"], "stopped": slowed["stopped"]}
        figures[kind]["share"] = share
        rows.append(
            [kind, f"{free['bytes']:,}", f"{slowed['bytes']:,}", f"{100 * share:.1f} %", str(slowed["stopped"])]
        )
    print(plain_table(["device", "bytes", "throttled for no reason", "share", "packets stopped"], rows), end="")
    return figures


if __name__ == "__main__":
    _send_frames(float(sys.argv[2]))
