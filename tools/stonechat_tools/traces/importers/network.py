"""The counters that a network capture gives of a device, as a collector: the schema `network-1`.

Zeek and pcap importers feed NetworkCounters; `Recorder` reads it at each window's end and pushes the readings through
window.Window, so that an imported window is made by the very code that makes it on a device.
"""

import ipaddress
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from stonechat.window import Window

from ...console import clipped
from ...schemas import NETWORK_1
from ..format import BENIGN, TraceError, parse_moment
from ..trace import Trace, make_trace

TCP = 6
UDP = 17
ICMP = (1, 58)
MAX_GAP_S = 24 * 3600.0  # a longer silence is a capture that was stopped, not a quiet device
MAX_WINDOWS = 2_000_000
_LONGEST_GAP_S = 366 * 86_400.0
_RATES = 9


class NetworkCounters:
    """A collector (schema, read, close) of one device, which is given connections and traffic instead of observing
    them."""

    schema = NETWORK_1

    def __init__(self) -> None:
        self._totals = [0] * _RATES
        self._known: set[str] = set()
        self._ports: set[int] = set()
        self._peer_bytes: Counter[str] = Counter()
        self._new = 0
        self._last_bytes_out = 0
        self._last_pkts_out = 0

    def connection(self, outgoing: bool, protocol: int, peer: str, port: int) -> None:
        """A connection or flow began: peer is the other side's address, port the one that it was addressed to."""
        if protocol == TCP:
            self._totals[0 if outgoing else 1] += 1
        elif protocol == UDP:
            self._totals[3] += 1
        elif protocol in ICMP:
            self._totals[4] += 1
        self._meet(peer)
        if outgoing and protocol in (TCP, UDP):
            self._ports.add(port)

    def failed(self) -> None:
        """An outgoing connection was refused or never answered."""
        self._totals[2] += 1

    def traffic(self, peer: str, bytes_out: int, bytes_in: int, pkts_out: int, pkts_in: int) -> None:
        for i, amount in enumerate((bytes_out, bytes_in, pkts_out, pkts_in), 5):
            self._totals[i] += amount
        self._meet(peer)
        self._peer_bytes[peer] += bytes_out + bytes_in

    def _meet(self, peer: str) -> None:
        if peer not in self._known:
            self._known.add(peer)
            self._new += 1
        self._peer_bytes[peer] += 0

    def read(self, values: list[int]) -> None:
        """Fill the cumulative counters, and the readings of the window that ends here."""
        values[:_RATES] = self._totals
        bytes_out = self._totals[5] - self._last_bytes_out
        pkts_out = self._totals[7] - self._last_pkts_out
        all_bytes = sum(self._peer_bytes.values())
        values[_RATES:] = [
            len(self._peer_bytes),
            self._new,
            len(self._ports),
            bytes_out // pkts_out if pkts_out else 0,
            max(self._peer_bytes.values()) * 25600 // all_bytes if all_bytes else 0,
        ]
        self._last_bytes_out = self._totals[5]
        self._last_pkts_out = self._totals[7]
        self._peer_bytes.clear()
        self._ports.clear()
        self._new = 0

    def close(self) -> None:
        pass


class Recorder:
    """One device's counters and its Window: `until(t_s)` closes every window that ends by then. Call it before
    `counters` gets what happened at t_s."""

    def __init__(self, device: str, window_ms: int, max_gap_s: float = MAX_GAP_S) -> None:
        self.device = device
        self.gaps = 0  # silences longer than max_gap_s, which are left out
        self._max_gap_s = max_gap_s
        self.counters = NetworkCounters()
        self._window = Window(NETWORK_1, window_ms)
        self._window_s = window_ms / 1000
        self._start_s = 0.0
        self._ended = 0
        self._values = [0] * len(NETWORK_1)
        self._rows: list[tuple[float, int, str, list[int]]] = []
        self._label = BENIGN
        self._begun = False

    @property
    def next_end_s(self) -> float:
        return self._start_s + (self._ended + 1) * self._window_s

    def label(self, label: str) -> None:
        """The window that is being filled is `label`; the first attack named in it stays."""
        if self._label == BENIGN:
            self._label = label

    def until(self, t_s: float) -> None:
        if self._begun and t_s - self.next_end_s > self._max_gap_s:
            self.gaps += 1
            self._end_window()  # what came before the gap
            self._begin(t_s)
        elif not self._begun:
            self._begin(t_s)
        while t_s >= self.next_end_s:
            self._end_window()

    def _begin(self, t_s: float) -> None:
        self._begun = True
        self._start_s = t_s
        self._ended = 0
        self._label = BENIGN
        self.counters.read(self._values)
        self._window.primed = False
        self._window.push(self._values, 0)

    def _end_window(self) -> None:
        end_s = self.next_end_s
        self._ended += 1
        self.counters.read(self._values)
        if self._window.push(self._values, round(self._ended * self._window_s * 1000)):
            self._rows.append((end_s, self._window.elapsed_ms, self._label, list(self._window.deltas)))
        self._label = BENIGN
        if len(self._rows) > MAX_WINDOWS:
            raise TraceError(f"more than {MAX_WINDOWS} windows: choose a longer --window")

    def trace(self, notes: dict[str, str]) -> Trace:
        if self.gaps:
            notes = notes | {"gaps": f"{self.gaps} of more than {self._max_gap_s:g} s left out"}
        return make_trace(NETWORK_1, round(self._window_s * 1000), self._rows, self.device, notes)


@dataclass
class Selection:
    """What of a capture is imported. devices: address -> name, empty for the busiest; max_gap_s: a longer silence is a
    capture that was stopped; exclude: networks whose traffic does not count, and times whose windows are left out."""

    devices: dict[str, str] = field(default_factory=dict)
    max_gap_s: float = MAX_GAP_S
    networks: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = ()
    times: tuple[tuple[float, float], ...] = ()

    @classmethod
    def of(cls, devices: Sequence[str] = (), max_gap_s: float = MAX_GAP_S, exclude: Sequence[str] = ()) -> "Selection":
        """devices: ADDRESS[=NAME] each; exclude: ADDRESS, NETWORK/BITS or FROM/TO (ISO 8601 or Unix seconds) each.
        Raises TraceError."""
        if not 0 < max_gap_s <= _LONGEST_GAP_S:
            raise TraceError(f"--max-gap {max_gap_s:g}: want more than 0 and at most {_LONGEST_GAP_S:g} seconds")
        networks, times = [], []
        for word in exclude:
            try:
                networks.append(ipaddress.ip_network(word, strict=False))
                continue
            except ValueError:
                start, slash, end = word.partition("/")
            if not slash:
                raise TraceError(f"--exclude {clipped(word)}: not ADDRESS, NETWORK/BITS or FROM/TO")
            try:
                times.append((parse_moment(start), parse_moment(end)))
            except TraceError as error:
                raise TraceError(f"--exclude {clipped(word)}: {error}") from None
        return cls(parse_devices(devices), max_gap_s, tuple(networks), tuple(times))

    def excludes(self, address: str) -> bool:
        """Does traffic with this peer not count?"""
        if not self.networks:
            return False
        parsed = ipaddress.ip_address(address)
        return any(parsed in network for network in self.networks)

    def without_times(self, trace: Trace) -> Trace:
        """The trace without the windows that overlap an excluded time. Raises TraceError where none is left."""
        starts = trace.t_s - trace.elapsed_ms / 1000
        keep = [
            not any(start < end_s and end > start_s for start_s, end_s in self.times)
            for start, end in zip(starts.tolist(), trace.t_s.tolist(), strict=True)
        ]
        if self.times and not any(keep):
            raise TraceError("--exclude leaves no window")
        return trace.select(np.array(keep, dtype=bool)) if self.times else trace


def is_local(address: str) -> bool:
    """Can it be the address of a device in a private network? Not a broadcast, multicast or loopback one."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    never = parsed.is_loopback or parsed.is_multicast or parsed.is_unspecified or parsed.is_reserved
    return parsed.is_private and not never and str(parsed) != "255.255.255.255"


def parse_devices(words: Sequence[str]) -> dict[str, str]:
    """ADDRESS[=NAME] each -> address: name."""
    devices: dict[str, str] = {}
    for word in words:
        address, _, name = word.partition("=")
        try:
            address = str(ipaddress.ip_address(address))
        except ValueError:
            raise TraceError(f"--device {clipped(word)}: not an IP address (ADDRESS or ADDRESS=NAME)") from None
        if any(letter in name for letter in ',"\r\n\0'):
            raise TraceError(f"--device {clipped(word)}: a name has no comma, quote, line end or NUL")
        devices[address] = name or address
    return devices


def busiest(counts: Counter[str], path: str) -> dict[str, str]:
    """How often each local address was seen -> the device that a capture without --device is about."""
    if not counts:
        raise TraceError(f"{path}: no local address in it; name the device: --device ADDRESS")
    address = max(sorted(counts), key=lambda candidate: counts[candidate])
    return {address: address}
