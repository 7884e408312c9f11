"""Zeek conn logs (TSV with its # header, JSON lines, or CSV with a header row; gzip or not) -> one Trace a device.

Zeek writes a flow once, at its end, with all its bytes; here they are spread evenly over its life, as counters on
the device would have seen them. A `label`/`detailed-label` column, as IoT-23 has them, labels every window in which a
malicious flow lives.
"""

import csv
import heapq
import ipaddress
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...console import clipped, reason
from ..format import BENIGN, TraceError, opened_text, parse_moment, plain_label
from ..trace import Trace
from .network import Recorder, Selection, busiest, is_local

_FAILED_STATES = ("S0", "REJ", "RSTOS0", "SH", "RSTRH")
_PROTOCOLS = {"tcp": 6, "udp": 17, "icmp": 1}
_GREATEST = 1e15  # bytes, packets or seconds of a flow: more is a damaged log
_LONGEST_FLOW_S = 366 * 86_400.0
_NEEDED = ("ts", "id.orig_h", "id.resp_h", "id.resp_p", "proto")


@dataclass(slots=True)
class Flow:
    start_s: float
    duration_s: float
    origin: str
    target: str
    port: int
    protocol: int
    failed: bool
    label: str
    amounts: tuple[int, int, int, int]  # origin's bytes, target's bytes, origin's packets, target's packets


def read_flows(path: str) -> list[Flow]:
    """The flows in order of their start. Raises TraceError (FILE:LINE) or OSError."""
    with opened_text(path) as lines:
        flows = [_flow(row, f"{path}:{number}") for number, row in _rows(lines, path)]
    if not flows:
        raise TraceError(f"{path}: no flows in it")
    flows.sort(key=lambda flow: flow.start_s)
    return flows


def _rows(lines: Iterator[str], path: str) -> Iterator[tuple[int, dict[str, str]]]:
    names: list[str] | None = None
    separator = ","
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r\n")
        if not line:
            continue
        if line.startswith("{"):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise TraceError(f"{path}:{number}: not JSON: {reason(error)}") from None
            yield number, {key: str(value) for key, value in record.items() if value is not None}
        elif line.startswith("#"):
            separator = "\t"
            if line.startswith("#fields"):
                names = line.replace("   ", "\t").split("\t")[1:]
        elif names is None:
            names = _cells(line, f"{path}:{number}")
            missing = [name for name in _NEEDED if name not in names]
            if missing:
                raise TraceError(f"{path}:{number}: not a conn log: no column {', '.join(missing)}")
        else:
            # IoT-23 sets its three label columns apart by three spaces instead of a tab
            cells = line.replace("   ", "\t").split("\t") if separator == "\t" else _cells(line, f"{path}:{number}")
            if len(cells) != len(names):
                raise TraceError(f"{path}:{number}: {len(cells)} cells, the header names {len(names)}")
            yield number, dict(zip(names, cells, strict=True))


def _cells(line: str, where: str) -> list[str]:
    try:
        return next(csv.reader([line]))
    except (csv.Error, StopIteration) as error:
        raise TraceError(f"{where}: not a line of CSV: {error}") from None


def _flow(row: dict[str, str], where: str) -> Flow:
    def number(key: str) -> float:
        text = row.get(key, "")
        value = 0.0 if text in ("", "-", "(empty)", "None") else float(text)
        if not -_GREATEST < value < _GREATEST:
            raise ValueError(f"{key} is {clipped(text)}")
        return value

    try:
        amounts = (
            int(number("orig_ip_bytes") or number("orig_bytes")),
            int(number("resp_ip_bytes") or number("resp_bytes")),
            int(number("orig_pkts")),
            int(number("resp_pkts")),
        )
        flow = Flow(
            parse_moment(row["ts"]),
            max(0.0, number("duration")),
            str(ipaddress.ip_address(row["id.orig_h"])),
            str(ipaddress.ip_address(row["id.resp_h"])),
            int(number("id.resp_p")),
            _PROTOCOLS.get(row["proto"].lower(), 0),
            row.get("conn_state", "") in _FAILED_STATES,
            _label(row),
            amounts,
        )
    except KeyError as error:
        raise TraceError(f"{where}: no {error}") from None
    except (ValueError, TraceError) as error:
        raise TraceError(f"{where}: {reason(error)}") from None
    if flow.duration_s > _LONGEST_FLOW_S:
        raise TraceError(f"{where}: a flow of {flow.duration_s:g} s; duration is in seconds")
    if min(amounts) < 0:
        raise TraceError(f"{where}: a negative count")
    return flow


def _label(row: dict[str, str]) -> str:
    label = row.get("label", "")
    if label.lower() in ("", "-", "(empty)", "benign"):
        return BENIGN
    detailed = row.get("detailed-label", "")
    return plain_label(detailed if detailed not in ("", "-", "(empty)") else label)


def import_zeek(paths: Sequence[str], window_ms: int, selection: Selection | None = None) -> list[Trace]:
    """paths: conn logs of one capture, in any order -> a trace a device (by default of the local address that opens the
    most flows)."""
    chosen = selection or Selection()
    flows = [flow for path in paths for flow in read_flows(path)]
    flows.sort(key=lambda flow: flow.start_s)
    wanted = chosen.devices or busiest(Counter(f.origin for f in flows if is_local(f.origin)), paths[0])
    traces = []
    for address, name in wanted.items():
        own = [
            flow
            for flow in flows
            if address in (flow.origin, flow.target)
            and not chosen.excludes(flow.target if flow.origin == address else flow.origin)
        ]
        if not own:
            raise TraceError(f"{paths[0]}: no flow of {address}")
        traces.append(chosen.without_times(_record(own, address, name, window_ms, chosen.max_gap_s)))
    return traces


def _record(flows: list[Flow], address: str, name: str, window_ms: int, max_gap_s: float) -> Trace:
    recorder = Recorder(name, window_ms, max_gap_s)
    alive: list[_Spread] = []
    for flow in flows:
        _advance(recorder, alive, flow.start_s)
        outgoing = flow.origin == address
        spread = _Spread(flow, outgoing)
        recorder.label(flow.label)
        recorder.counters.connection(outgoing, flow.protocol, spread.peer, flow.port)
        if flow.failed and outgoing and flow.protocol == 6:
            recorder.counters.failed()
        heapq.heappush(alive, spread)
    _advance(recorder, alive, max(flow.start_s + flow.duration_s for flow in flows))
    _advance(recorder, alive, recorder.next_end_s)  # the last window, though the capture fills it only in part
    return recorder.trace({"source": "zeek"})


class _Spread:
    """A living flow, and how much of it has been counted."""

    def __init__(self, flow: Flow, outgoing: bool) -> None:
        self.end_s = flow.start_s + flow.duration_s
        self.peer = flow.target if outgoing else flow.origin
        a, b, c, d = flow.amounts
        self._amounts = (a, b, c, d) if outgoing else (b, a, d, c)
        self._flow = flow
        self._counted = (0, 0, 0, 0)

    def __lt__(self, other: "_Spread") -> bool:
        return self.end_s < other.end_s

    def add_to(self, recorder: Recorder, t_s: float) -> None:
        recorder.label(self._flow.label)
        duration_s = self._flow.duration_s
        part = 1.0 if t_s >= self.end_s else (t_s - self._flow.start_s) / duration_s
        now = (
            int(self._amounts[0] * part),
            int(self._amounts[1] * part),
            int(self._amounts[2] * part),
            int(self._amounts[3] * part),
        )
        counted = self._counted
        recorder.counters.traffic(
            self.peer, now[0] - counted[0], now[1] - counted[1], now[2] - counted[2], now[3] - counted[3]
        )
        self._counted = now


def _advance(recorder: Recorder, alive: list[_Spread], t_s: float) -> None:
    """Close the windows up to t_s, adding to each what its living flows moved in it."""
    while alive and t_s >= recorder.next_end_s:
        end_s = recorder.next_end_s
        for spread in alive:
            spread.add_to(recorder, end_s)
        while alive and alive[0].end_s <= end_s:
            heapq.heappop(alive)
        recorder.until(end_s)
    recorder.until(t_s)
