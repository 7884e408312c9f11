"""How soon the agent finds a beacon to a new host, and more than usual to a known one, in a device's own traffic, and
whether it is silent without.

The flows of captures (Zeek conn logs, or CSV with ts, dur, out, peer, bytes_out, bytes_in, pkts_out, pkts_in) are
replayed through the agent's own code: the columns of BPF from the packets of each window, learned peers, scorer,
fusion. The device learns for --learn-hours; a model is trained on them. Its days are repeated until --windows benign
windows have been judged (--once: no further than the flows go); then beacons start, one after the other, and then
exfiltration to the device's own hosts. Without a file the traffic is that of a made camera.

Examples:
  stonechat bench peers
  stonechat bench peers conn.log --device 192.168.1.20 --jitter 0.25
  stonechat bench peers monday.csv tuesday.csv --window 5 --once --windows 1000000
"""

import argparse
import csv
import ipaddress
import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from stonechat.agent import Agent
from stonechat.delivery import Delivery
from stonechat.errors import ConfigError
from stonechat.linux.bpf_columns import BpfColumns
from stonechat.linux.packet_program import OPENED_TCP, SYN_OUT, SYNACK_IN
from stonechat.linux.schemas import LINUX_1
from stonechat.linux.sent_to_peers import SentToPeers
from stonechat.linux.syscall_classes import CLASSES
from stonechat.linux.syscalls import EXEC, FORK
from stonechat.model import load_model
from stonechat.outbox_memory import MemoryOutbox
from stonechat.state import State
from stonechat.window import Window

from stonechat_tools.modeling.options import Options
from stonechat_tools.modeling.training import train
from stonechat_tools.traces.format import TraceError, opened_text
from stonechat_tools.traces.importers.zeek import read_flows
from stonechat_tools.traces.trace import make_trace

HELP = "a beacon to a new host, exfiltration to a known one in replayed traffic: how soon found, alarms without"
LEARN_WINDOWS = 128
CONTROL = "198.51.100.66"  # where the beacons go (RFC 5737); another one for each
_MOST_PACKETS = 2_000  # of a flow, spread over its life: more would not change which windows it is in
_COLUMN = {name: i for i, (name, _, _) in enumerate(LINUX_1.columns)}

Packets = tuple[int, int, int, int]  # sent bytes, sent packets, received bytes, received packets
Windows = list[dict[str, Packets]]  # for each window: by peer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("flows", nargs="*", type=Path, help="flows of one device, in any order (default: a made camera)")
    add("--device", help="its address, where the files are conn logs")
    add("--window", default="5,60", metavar="S,S", help="window lengths in seconds (default 5,60)")
    add("--learn-hours", type=int, default=24, metavar="N", help="the device learns its own peers for (default 24)")
    add("--windows", type=int, default=2000, metavar="N", help="benign windows to judge (default 2000)")
    add("--period", type=float, default=60.0, metavar="S", help="of the beacon (default 60)")
    add("--jitter", type=float, default=0.0, metavar="SHARE", help="of the period, uniform (default 0)")
    add("--bytes", type=int, default=500, help="of a beacon (default 500)")
    add("--beacons", type=int, default=8, metavar="N", help="beacons that are tried, each at another time (default 8)")
    add("--exfil", type=int, default=2000, metavar="B", help="bytes a second to a known host (default 2000)")
    add("--once", action="store_true", help="judge what follows the learning, and repeat nothing")


_BOUNDS = {  # least and most that make sense
    "learn_hours": (1, 720),
    "windows": (1, 10_000_000),
    "period": (1, 600),
    "jitter": (0, 1),
    "bytes": (1, 1 << 30),
    "beacons": (0, 1000),
    "exfil": (1, 1 << 30),
}


def _check(args: argparse.Namespace) -> list[int]:
    """-> the lengths of windows in seconds. Raises ConfigError, naming the option."""
    for name, (least, most) in _BOUNDS.items():
        if not least <= getattr(args, name) <= most:
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} {getattr(args, name)}: want {least:,} to {most:,}")
    words = args.window.split(",")
    if not all(word.isascii() and word.isdigit() and 1 <= int(word[:9]) <= 3600 for word in words):
        raise ConfigError(f"--window {args.window}: want whole seconds from 1 to 3600, with commas")
    return [int(word) for word in words]


def run(args: argparse.Namespace) -> dict[str, Any]:
    lengths = _check(args)
    flows = [flow for path in args.flows for flow in read(path, args.device)] if args.flows else made_camera()
    if not flows:
        raise TraceError(f"{', '.join(map(str, args.flows))}: no flow that the device opened to one host")
    figures: dict[str, Any] = {"peers": len({peer for _, _, peer, _ in flows}), "windows": {}}
    for seconds in lengths:
        row = measure(flows, seconds, args)
        figures["windows"][seconds] = row
        found = [n if n is not None else "never" for n in row["beacons_to_alarm"]]
        print(
            f"windows of {seconds} s: {row['alarms']} alarms in {row['benign_windows']} benign windows "
            f"({row['peer_alarms']} of lasting peers, {row['sent_alarms']} of sent to peers); "
            f"a beacon every {args.period:g} s of {args.bytes} bytes "
            f"to a new host, beside {row['bytes_a_minute']:,} bytes a minute: found after "
            f"{', '.join(map(str, found))} beacons; {args.exfil:,} bytes a second to known hosts: found after "
            f"{', '.join(str(n or 'no') for n in row['exfil_to_alarm'])} windows"
        )
    return figures


def measure(flows: list[tuple[float, float, str, Packets]], seconds: int, args: argparse.Namespace) -> dict[str, Any]:
    """flows: (start, duration, peer, packets) that the device opened -> the figures of one window length."""
    days = spread(flows, seconds)
    learn = args.learn_hours * 3600 // seconds + LEARN_WINDOWS
    stream = itertools.cycle(days)
    replay = ReplayedConnections()
    collector = Replayed(replay)
    model = load_model(_model(days, seconds, learn))
    reporter = Delivery("bench-1", bytes(32), MemoryOutbox(), state=State())
    sent = SentToPeers(collector, seconds * 1000, args.learn_hours * 3600 // seconds, collector.most_peers)
    hours = args.learn_hours
    agent = Agent(collector, model, reporter=reporter, state=State(), extra=[(sent, None)], learn_peers_hours=hours)
    clock = itertools.count(seconds * 1000, seconds * 1000)

    def step(extra: Packets | None = None, host: str = CONTROL) -> Any:
        peers = dict(next(stream))
        if extra:
            had = peers.get(host, (0, 0, 0, 0))
            peers[host] = (had[0] + extra[0], had[1] + extra[1], had[2] + extra[2], had[3] + extra[3])
        replay.window = peers
        return agent.end_window(next(clock))

    for _ in range(learn):
        step()
    benign = min(args.windows, max(0, len(days) - learn)) if args.once else args.windows
    raised = [0, 0, 0]  # by the agent, the channel of lasting peers, that of what is sent
    was = [0, 0, 0]
    for _ in range(benign):
        levels = [step().level, agent.channels[1].scorer.verdict.level, sent.verdict.level]
        for i, level in enumerate(levels):
            raised[i] += level == 2 and was[i] != 2
        was = levels
    found = []
    rng = random.Random(1)
    for n in range(args.beacons):
        host = str(ipaddress.ip_address(CONTROL) + n)
        found.append(_beacons(step, agent, host, seconds, args, rng))
        for _ in range(2 * 600 // seconds + rng.randrange(1, 40)):  # until the episode is over
            step()
    own = sorted({peer for window in days[:learn] for peer in window})
    hosts = rng.choices([peer for peer in own if sum(peer in window for window in days) >= 12] or own, k=args.beacons)
    exfil = []
    for host in hosts:
        exfil.append(_windows(lambda host=host: step((args.exfil * seconds, 2 * seconds, 0, seconds), host), sent))
        for _ in range(40 + rng.randrange(600 // seconds)):
            step()
    total = sum(packets[0] for window in days for packets in window.values())
    return {
        "alarms": raised[0],
        "peer_alarms": raised[1],
        "sent_alarms": raised[2],
        "benign_windows": benign,
        "beacons_to_alarm": found,
        "exfil_to_alarm": exfil,
        "bytes_a_minute": total * 60 // (len(days) * seconds),
    }


def _beacons(step: Any, agent: Agent, host: str, seconds: int, args: argparse.Namespace, rng: random.Random) -> Any:
    """How many beacons until the peers' channel raises the alarm; None: not within 100."""
    due_s, sent = rng.uniform(0, seconds), 0
    for window in range(100 * int(args.period) // seconds):
        now = 0
        while due_s < (window + 1) * seconds:
            due_s += args.period * (1 + rng.uniform(-args.jitter, args.jitter))
            now += 1
        sent += now
        verdict = step((args.bytes * now, 4 * now, 200 * now, 3 * now) if now else None, host)
        if verdict.level == 2 and agent.channels[1].scorer.verdict.level == 2:
            return sent
    return None


def _windows(step: Any, sent: SentToPeers) -> int | None:
    """How many windows until the channel of what is sent raises the alarm; None: not within 40."""
    for n in range(1, 41):
        step()
        if sent.verdict.level == 2:
            return n
    return None


def _model(days: Windows, seconds: int, learn: int) -> bytes:
    """A model of the device's own learning windows, as bytes."""
    collector = Replayed(ReplayedConnections())
    window = Window(LINUX_1, seconds * 1000)
    rows = []
    values = [0] * len(LINUX_1)
    for n, peers in enumerate(itertools.islice(itertools.cycle(days), max(learn, 5 * LEARN_WINDOWS + 20))):
        collector.connections.window = dict(peers)
        collector.read(values)
        if window.push(values, n * seconds * 1000) and n > collector.warmup_windows:
            rows.append((float(n * seconds), seconds * 1000, "", list(window.deltas)))
    trace = make_trace(LINUX_1, seconds * 1000, rows, "replayed")
    options = Options.of({"learn_windows": LEARN_WINDOWS, "seeds": 1, "units": 9}, "bench peers")
    return train([trace], "bench-peers", 1, options).data


class ReplayedConnections:
    """What connections.Connections gives, from `window`, the packets by peer of the window that ends."""

    own_user_id = 0

    def __init__(self) -> None:
        self.window: dict[str, Packets] = {}
        self.counters = [0] * 7
        self.peers: list[tuple[bytes, int, int]] = []
        self.opened: dict[bytes, int] = {}
        self.distinct_peers = self.distinct_ports = 0
        self.totals = [0] * 4

    def read(self) -> None:
        rows = [(_packed(peer), packets) for peer, packets in self.window.items()]
        self.peers = [(peer, one[1] << 40 | one[0], one[3] << 40 | one[2]) for peer, one in rows]
        self.opened = dict.fromkeys([peer for peer, _ in rows], OPENED_TCP)
        self.distinct_peers = self.distinct_ports = len(rows)
        self.counters[SYN_OUT] += len(rows)
        self.counters[SYNACK_IN] += len(rows)
        for _, one in rows:
            for i, amount in enumerate(one):
                self.totals[i] += amount

    def close(self) -> None:
        pass


class _Calls:
    """No system calls: the replay has packets only."""

    counts = [0] * (max(EXEC, FORK, len(CLASSES)) + 1)
    services = None

    def read(self) -> list[int]:
        return self.counts

    def close(self) -> None:
        pass


class _Logins:
    def read(self) -> int:
        return 0

    def close(self) -> None:
        pass


class Replayed:
    """The columns of BPF and the interfaces' counters of replayed packets, as LinuxCollector gives them."""

    schema = LINUX_1
    sources = (("connections", "replay", ""),)
    most_peers = 256
    warmup_windows = 12

    def __init__(self, connections: ReplayedConnections) -> None:
        self.connections = connections
        self._bpf = BpfColumns([_Calls(), connections, _Logins()], bytes(32))
        self._bpf._opened.clear()  # those of this machine

    def read(self, values: list[int]) -> None:
        self._bpf.fill(values, _COLUMN["sys_rate"])
        names = ("bytes_out", "pkts_out", "bytes_in", "pkts_in")
        for name, total in zip(names, self.connections.totals, strict=True):
            values[_COLUMN[name]] = total
        values[_COLUMN["mem_avail"]] = 12_800

    @property
    def contacts(self) -> list[int]:
        return self._bpf.learned.contacts

    @property
    def sent(self) -> list[int]:
        return self._bpf.sent

    def hold_peers(self, hold: bool) -> None:
        self._bpf.learned.hold = hold

    def dump(self) -> bytes:
        return self._bpf.learned.dump()

    def restore(self, packed: bytes) -> None:
        self._bpf.learned.restore(packed)

    def close(self) -> None:
        self._bpf.close()


def _packed(peer: str) -> bytes:
    address = ipaddress.ip_address(peer)
    return address.packed if address.version == 6 else bytes(10) + b"\xff\xff" + address.packed


def spread(flows: Iterable[tuple[float, float, str, Packets]], seconds: int) -> Windows:
    """The packets of each flow evenly over its life, in windows from the first flow on."""
    flows = list(flows)
    start_s = min(flow[0] for flow in flows)
    windows: dict[int, dict[str, Packets]] = defaultdict(dict)
    for begin_s, duration_s, peer, (sent, sent_packets, got, got_packets) in flows:
        n = max(1, min(sent_packets, _MOST_PACKETS))
        more = (sent // n, max(1, sent_packets // n), got // n, got_packets // n)
        first, last = (int((begin_s - start_s + later_s) // seconds) for later_s in (0, duration_s if n > 1 else 0))
        if first == last:
            counts = {first: n}
        else:
            counts = Counter(int((begin_s - start_s + duration_s * k / (n - 1)) // seconds) for k in range(n))
        for at, times in counts.items():
            a, b, c, d = windows[at].get(peer, (0, 0, 0, 0))
            windows[at][peer] = (a + times * more[0], b + times * more[1], c + times * more[2], d + times * more[3])
    return [windows.get(at, {}) for at in range(max(windows) + 1)]


def read(path: Path, device: str | None) -> list[tuple[float, float, str, Packets]]:
    """The flows of a file that the device opened to one host, in the order of time. Raises TraceError or OSError."""
    with opened_text(str(path)) as lines:
        reader = csv.DictReader(lines)
        if {"ts", "dur", "out", "peer", "pkts_out"} <= set(reader.fieldnames or ()):
            return sorted(_own_rows(reader, path))
    flows = read_flows(str(path))
    if device is None:
        raise TraceError(f"{path}: a conn log has many hosts: name the device with --device")
    return [
        (
            flow.start_s,
            flow.duration_s,
            flow.target,
            (flow.amounts[0], flow.amounts[2], flow.amounts[1], flow.amounts[3]),
        )
        for flow in flows
        if flow.origin == device and flow.amounts[2] and one_host(flow.target)
    ]


def _own_rows(reader: "csv.DictReader[str]", path: Path) -> Iterator[tuple[float, float, str, Packets]]:
    for number, row in enumerate(reader, 2):
        try:
            if row["out"] == "1" and int(row["pkts_out"]) and one_host(row["peer"]):
                amounts = (int(row["bytes_out"]), int(row["pkts_out"]), int(row["bytes_in"]), int(row["pkts_in"]))
                yield float(row["ts"]), float(row["dur"]), row["peer"], amounts
        except (KeyError, ValueError) as error:
            raise TraceError(f"{path}:{number}: {error}") from None


def one_host(address: str) -> bool:
    """Not a multicast or broadcast address."""
    parsed = ipaddress.ip_address(address)
    return not (parsed.is_multicast or address.endswith(".255"))


def made_camera(hours: int = 48, seed: int = 1) -> list[tuple[float, float, str, Packets]]:
    """Two days of a camera that streams to its cloud: keepalives, names, clocks of a pool, updates from a host that is
    another one each time, and viewers who stay for some minutes."""
    rng = random.Random(seed)
    end_s = hours * 3600.0
    flows: list[tuple[float, float, str, Packets]] = []

    def every(low_s: float, high_s: float, flow: Any) -> None:
        t_s = rng.uniform(0, low_s)
        while t_s < end_s:
            duration_s, peer, amounts = flow()
            flows.append((t_s, min(duration_s, end_s - t_s), peer, amounts))
            t_s += rng.uniform(low_s, high_s)

    every(10, 10.5, lambda: (0.0, "203.0.113.10", (2_000_000, 1_500, 60_000, 700)))  # a piece of the stream
    every(50, 55, lambda: (0.1, "203.0.113.11", (180, 2, 120, 2)))
    every(30, 300, lambda: (0.0, "192.0.2.1", (70, 1, 130, 1)))
    every(900, 1_100, lambda: (0.1, f"192.0.2.{rng.randrange(100, 108)}", (76, 1, 76, 1)))
    every(9_000, 20_000, lambda: (rng.uniform(5, 60), f"203.0.113.{rng.randrange(100, 250)}", (900, 12, 40_000, 40)))
    every(
        4_000,
        12_000,
        lambda: (
            rng.uniform(60, 480),
            f"198.18.{rng.randrange(256)}.{rng.randrange(1, 255)}",
            (9_000_000, 900, 9_000, 90),
        ),
    )
    return sorted(flows)
