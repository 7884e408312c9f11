"""Import, join, label, split and look at traces.

Captures become windows through the device's own window.Window. Splits are by device and by time, never by row, because
neighbouring windows are too alike to test each other.

Examples:
  stonechat dataset import --format zeek conn.log.gz -o zeek.csv.gz --window 60 --device 192.168.1.195=camera
  stonechat dataset import --format pcap lamp.pcapng -o lamp.csv.gz --window 10
  stonechat dataset import --format csv pi.csv.gz -o pi.csv.gz --time time --elapsed seconds --columns iface0RX=B,cs
  stonechat dataset join monday.csv.gz tuesday.csv.gz -o week.csv.gz
  stonechat dataset label week.csv.gz -o labelled.csv.gz --intervals attacks.csv
  stonechat dataset append week.csv.gz scan.csv.gz -o stream.csv.gz --after 500
  stonechat dataset overlay week.csv.gz mirai.csv.gz -o infected.csv.gz --after 500
  stonechat dataset split week.csv.gz -o parts/ --fractions train=0.6,threshold=0.2,test=0.2
  stonechat dataset split fleet.csv.gz -o parts/ --hold-out camera-3
  stonechat dataset info parts/*.csv.gz
"""

import argparse
import csv
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from stonechat.features import RATE, SHARE
from stonechat.window import DELTA_MAX

from ..console import printable, spare_inputs
from .files import read_all, read_trace, write_trace
from .format import BENIGN, TraceError, check_label, is_benign, opened_text, parse_moment
from .trace import Trace, join

Outcome = dict[str, Any]
_UNITS_S = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _import_arguments(_action(actions, "import", "turn captures into windows", _import))

    sub = _action(actions, "join", "join several traces in the given order", _join)
    sub.add_argument("traces", nargs="+", help="the traces to read")
    _output(sub)

    sub = _action(actions, "label", "name what happened in some of the windows", _label)
    sub.add_argument("trace", help="the trace to read")
    _output(sub)
    sub.add_argument("--label", help="the label; with --from and --to (Unix seconds or ISO 8601) only between them")
    sub.add_argument("--from", dest="start", help="first moment")
    sub.add_argument("--to", dest="end", help="last moment")
    sub.add_argument("--intervals", metavar="CSV", help="a CSV with the columns start, end, label")
    sub.add_argument("--device", help="only this device's windows")

    sub = _action(actions, "append", "append an attack to N benign windows as one stream", _append)
    sub.add_argument("benign", help="the benign trace")
    sub.add_argument("attack", help="the trace of the attack")
    _output(sub)
    sub.add_argument("--after", type=int, metavar="N", help="how many benign windows come first (default: all)")

    sub = _action(actions, "overlay", "add an attack's counts to benign windows", _overlay)
    sub.add_argument("benign", help="the benign trace")
    sub.add_argument("attack", help="the trace of the attack")
    _output(sub)
    sub.add_argument("--after", type=int, default=0, metavar="N", help="how many benign windows stay alone (default 0)")
    sub.add_argument("--label", help="label of these windows (default: the attack's own)")

    sub = _action(actions, "split", "split by device and time", _split)
    sub.add_argument("traces", nargs="+", help="the traces to read")
    _output(sub, "the folder for the parts")
    sub.add_argument(
        "--fractions",
        default="train=0.6,threshold=0.2,test=0.2",
        help="NAME=SHARE,... in the order of time (default %(default)s)",
    )
    sub.add_argument("--hold-out", action="append", default=[], metavar="DEVICE", help="a part `held-out` of its own")

    sub = _action(actions, "info", "show what is in a trace", _info)
    sub.add_argument("traces", nargs="+", help="the traces to read")


def _action(actions: Any, name: str, text: str, call: Any) -> argparse.ArgumentParser:
    sub: argparse.ArgumentParser = actions.add_parser(name, help=text, description=text)
    sub.add_argument("--json", action="store_true", help="print the outcome as JSON")
    sub.set_defaults(call=call)
    return sub


def _output(sub: argparse.ArgumentParser, text: str = "the trace to write: .csv, .csv.gz or .parquet") -> None:
    sub.add_argument("-o", "--output", required=True, help=text)


def run(args: argparse.Namespace) -> int:
    read = [vars(args)[name] for name in ("trace", "benign", "attack") if name in args]
    read += vars(args).get("traces", []) + vars(args).get("files", [])
    if args.action == "split":
        for name in [*parse_fractions(args.fractions), *(["held-out"] if args.hold_out else [])]:
            spare_inputs(os.path.join(args.output, name + ".csv.gz"), read)
    elif args.action != "info":
        spare_inputs(args.output, read)
    outcomes: list[Outcome] = args.call(args)
    if args.json:
        print(json.dumps(outcomes if args.action == "info" else outcomes[0] if len(outcomes) == 1 else outcomes))
    else:
        _show(outcomes)
    return 0


# ------------------------------------------------------------------------------------------------------------- import


def _import_arguments(sub: argparse.ArgumentParser) -> None:
    add = sub.add_argument
    add("files", nargs="+", help="the captures to read")
    _output(sub)
    add("--format", required=True, choices=("zeek", "pcap", "csv"), help="kind of the captures")
    add(
        "--window",
        type=float,
        metavar="S",
        help="length of a window in seconds (zeek, pcap: 60; csv: that of the rows)",
    )
    add(
        "--device", action="append", default=[], metavar="ADDRESS[=NAME]", help="whose windows (csv: the device's name)"
    )
    add("--label", default="", help="label of all windows (zeek takes its own label column where there is one)")
    add("--schema", help="csv: name of the schema (default: the file's name)")
    add("--time", help="csv: the column with the time")
    add("--time-unit", choices=("auto", *_UNITS_S), default="auto", help="csv: of the time (default: by its size)")
    add("--elapsed", help="csv: the column with the seconds that a row covers (default: from the times)")
    add("--label-column", help="csv: the column with the labels")
    add(
        "--columns",
        metavar="NAME[=UNIT[=KIND[=SCALE]]],...",
        help="csv: the features (default: all others but further times, as rates); SCALE: steps a unit, for decimals",
    )
    add("--max-gap", type=float, metavar="S", help="zeek, pcap: a longer silence is a stopped capture (default 86400)")
    add(
        "--exclude",
        action="append",
        default=[],
        metavar="WHAT",
        help="zeek, pcap: a peer (ADDRESS or NETWORK/BITS) that does not count, or a time (FROM/TO) to leave out",
    )
    add("--cumulative", action="store_true", help="csv: cells are counters that only grow, not counts per row")


def _import(args: argparse.Namespace) -> list[Outcome]:
    if args.window is not None and not 0.05 <= args.window <= 86_400:
        raise TraceError(f"--window {args.window}: want 0.05 to 86400 seconds")
    check_label(args.label)
    window_ms = round((args.window or 60.0) * 1000)
    if args.format == "zeek":
        from .importers.zeek import import_zeek

        traces = import_zeek(args.files, window_ms, _selection(args))
        if args.label:
            for trace in traces:
                trace.labels[:] = args.label
    elif args.format == "pcap":
        from .importers.pcap import import_pcap

        traces = import_pcap(args.files, window_ms, _selection(args), args.label)
    else:
        traces = _import_csv(args)
    whole = join(traces)
    for name in whole.device_names:
        if not whole.of_device(name).benign.any():
            print(
                f"stonechat dataset: note: every window of {printable(name or args.output)} is labelled as an attack. "
                "A device would learn it as its normal: put benign windows of the same device first (stonechat dataset "
                "append)",
                file=sys.stderr,
            )
    return [_write(whole, args.output)]


def _selection(args: argparse.Namespace) -> Any:
    from .importers.network import MAX_GAP_S, Selection

    return Selection.of(args.device, MAX_GAP_S if args.max_gap is None else args.max_gap, args.exclude)


def _import_csv(args: argparse.Namespace) -> list[Trace]:
    from .importers.counters_csv import Layout, import_csv, parse_columns

    if args.time is None:
        raise TraceError("--format csv needs --time COLUMN")
    if len(args.device) > 1:
        raise TraceError("--format csv: one --device; import each device by itself and join them")
    if args.max_gap is not None or args.exclude:
        raise TraceError("--max-gap and --exclude are for zeek and pcap")
    columns, scales = parse_columns(args.columns) if args.columns else (None, {})
    layout = Layout(
        args.time,
        _UNITS_S.get(args.time_unit),
        args.elapsed,
        args.label_column,
        columns,
        args.cumulative,
        round(args.window * 1000) if args.window else None,
        scales,
    )
    traces = []
    for path in args.files:
        stem = Path(path).name.split(".")[0]
        trace = import_csv(path, args.schema or stem, layout, args.device[0] if args.device else stem, args.label)
        if layout.window_ms is None:  # files that are joined share the first one's window
            layout.window_ms = trace.window_ms
        traces.append(trace)
    return sorted(traces, key=lambda trace: float(trace.t_s[0]) if len(trace) else 0.0)


# ----------------------------------------------------------------------------------------------- join, label, append


def _join(args: argparse.Namespace) -> list[Outcome]:
    return [_write(read_all(args.traces), args.output)]


def _label(args: argparse.Namespace) -> list[Outcome]:
    trace = read_trace(args.trace)
    intervals: list[tuple[float, float, str]] = []
    if args.label is not None:
        start = parse_moment(args.start) if args.start else -math.inf
        intervals.append((start, parse_moment(args.end) if args.end else math.inf, args.label))
    if args.intervals is not None:
        intervals += read_intervals(args.intervals)
    if not intervals:
        raise TraceError("nothing to label: give --label or --intervals")
    label_windows(trace, intervals, args.device)
    return [_write(trace, args.output)]


def label_windows(trace: Trace, intervals: Sequence[tuple[float, float, str]], device: str | None = None) -> None:
    """Every window that overlaps [start, end] gets the interval's label; a later interval overrides an earlier one."""
    ends = trace.t_s
    starts = ends - trace.elapsed_ms / 1000
    own = np.ones(len(trace), dtype=bool) if device is None else trace.devices == device
    for start, end, label in intervals:
        check_label(label)
        trace.labels[(starts < end) & (ends > start) & own] = label


def read_intervals(path: str) -> list[tuple[float, float, str]]:
    intervals = []
    with opened_text(path) as file:
        reader = csv.DictReader(file)
        try:
            if not {"start", "end", "label"} <= set(reader.fieldnames or []):
                raise TraceError(f"{path}:1: it needs the columns start, end, label")
            for row in reader:
                start, end, label = (row[name] or "" for name in ("start", "end", "label"))
                intervals.append((parse_moment(start), parse_moment(end), label))
        except (TraceError, csv.Error) as error:
            where = str(error) if str(error).startswith(path) else f"{path}:{reader.line_num}: {error}"
            raise TraceError(where) from None
    return intervals


def _append(args: argparse.Namespace) -> list[Outcome]:
    return [_write(append(read_trace(args.benign), read_trace(args.attack), args.after), args.output)]


def append(benign: Trace, attack: Trace, after: int | None = None) -> Trace:
    """The first `after` windows of `benign`, then `attack` as if it went on at once on the same device: detection is
    measured from a living state, not from a fresh one."""
    if after is not None and not 0 < after <= len(benign):
        raise TraceError(f"--after {after}: the benign trace has {len(benign)} windows")
    first = benign.select(slice(0, after))
    if not first.benign.all():
        raise TraceError(f"the first windows are not benign: {sorted(set(first.labels[~first.benign]))}")
    if not len(first) or not len(attack):
        raise TraceError("a trace without windows can't be appended")
    follow = attack.select(slice(None))
    step_s = follow.elapsed_ms[0] / 1000
    follow.t_s = follow.t_s - follow.t_s[0] + first.t_s[-1] + step_s
    follow.devices = follow.devices.copy()
    follow.devices[:] = first.devices[-1]
    return join([first, follow])


def _overlay(args: argparse.Namespace) -> list[Outcome]:
    if args.label is not None:
        check_label(args.label)
    return [_write(overlay(read_trace(args.benign), read_trace(args.attack), args.after, args.label), args.output)]


def overlay(benign: Trace, attack: Trace, after: int = 0, label: str | None = None) -> Trace:
    """`benign` with the counts of `attack` added from its window `after` on, as long as both last: rates add up, of
    levels and shares the higher one counts. Raises TraceError."""
    if benign.schema.id != attack.schema.id or benign.window_ms != attack.window_ms:
        raise TraceError("the two traces differ in schema or window")
    if not 0 <= after < len(benign) or not len(attack):
        raise TraceError(f"--after {after}: the benign trace has {len(benign)} windows, the attack {len(attack)}")
    out = benign.select(slice(None))
    out.deltas, out.labels = out.deltas.copy(), out.labels.copy()
    n = min(len(benign) - after, len(attack))
    rows = slice(after, after + n)
    both, rates = out.deltas[rows], [kind == RATE for _, _, kind in benign.schema.columns]
    added = np.minimum(both + attack.deltas[:n], DELTA_MAX)
    out.deltas[rows] = np.where(rates, added, np.maximum(both, attack.deltas[:n]))
    own = [label or (text if not is_benign(text) else "overlay") for text in attack.labels[:n]]
    out.labels[rows] = own
    return out


# -------------------------------------------------------------------------------------------------------------- split


def _split(args: argparse.Namespace) -> list[Outcome]:
    trace = read_all(args.traces)
    parts = split(trace, parse_fractions(args.fractions), args.hold_out)
    os.makedirs(args.output, exist_ok=True)
    return [_write(part, os.path.join(args.output, name + ".csv.gz")) for name, part in parts.items()]


def parse_fractions(text: str) -> dict[str, float]:
    fractions: dict[str, float] = {}
    for word in text.split(","):
        name, _, share = word.partition("=")
        try:
            fractions[name.strip()] = float(share)
        except ValueError:
            raise TraceError(f"--fractions: {word!r} is not NAME=SHARE") from None
    bad = [name for name, share in fractions.items() if not name or not 0 < share <= 1 or "/" in name]
    if bad or not 0.999 < sum(fractions.values()) < 1.001:
        raise TraceError(f"--fractions {text}: named shares above 0 that add up to 1")
    return fractions


def split(trace: Trace, fractions: dict[str, float], hold_out: Sequence[str] = ()) -> dict[str, Trace]:
    """Each device's windows in the order of time, cut once per part: the parts of a device never overlap in time.
    Devices in hold_out go whole into the part `held-out`. Parts that would be empty raise TraceError."""
    unknown = [name for name in hold_out if name not in trace.device_names]
    if unknown:
        raise TraceError(f"--hold-out {unknown[0]}: the devices are {', '.join(trace.device_names)}")
    picked: dict[str, list[Any]] = {name: [] for name in fractions}
    if hold_out:
        picked["held-out"] = []
    for device in trace.device_names:
        rows = np.flatnonzero(trace.devices == device)
        rows = rows[np.argsort(trace.t_s[rows], kind="stable")]
        if device in hold_out:
            picked["held-out"].append(rows)
            continue
        cuts = np.rint(np.cumsum([0.0, *fractions.values()]) * len(rows)).astype(int)
        for i, name in enumerate(fractions):
            picked[name].append(rows[cuts[i] : cuts[i + 1]])
    parts = {}
    for name, chosen in picked.items():
        indices = np.concatenate(chosen) if chosen else np.array([], dtype=int)
        if not len(indices):
            raise TraceError(
                f"the part {name} would be empty: {len(trace)} windows of {len(trace.device_names)} devices"
            )
        parts[name] = trace.select(indices)
    return parts


# --------------------------------------------------------------------------------------------------------------- info


def _info(args: argparse.Namespace) -> list[Outcome]:
    return [describe(read_trace(path), path, features=True) for path in args.traces]


def _write(trace: Trace, path: str) -> Outcome:
    write_trace(trace, path)
    return describe(trace, path)


def describe(trace: Trace, path: str, features: bool = False) -> Outcome:
    """What a table or JSON says of a trace."""
    out: Outcome = {
        "trace": path,
        "schema": trace.schema.name,
        "schema_id": trace.schema.id.hex(),
        "window_ms": trace.window_ms,
        "windows": len(trace),
        "hours": round(float(trace.elapsed_ms.sum()) / 3.6e6, 3),
        "devices": {name: int((trace.devices == name).sum()) for name in trace.device_names},
        "labels": dict(Counter(BENIGN if is_benign(label) else label for label in trace.labels)),
        "begins": _moment(trace.t_s.min()) if len(trace) else None,
        "ends": _moment(trace.t_s.max()) if len(trace) else None,
        "notes": trace.notes,
    }
    if features and len(trace):
        quantiles = np.quantile(trace.deltas, [0.05, 0.5, 0.95], axis=0)
        out["features"] = [
            {
                "name": name,
                "unit": unit,
                "kind": kind,
                "zero_share": round(float((trace.deltas[:, i] == 0).mean()), 3),
                "q05_median_q95": [_in_unit(float(value), kind) for value in quantiles[:, i]],
            }
            for i, (name, unit, kind) in enumerate(trace.schema.columns)
        ]
    return out


def _in_unit(value: float, kind: str) -> float:
    """A share is kept in 1/256 percent, and shown in percent."""
    return round(value / 256, 1) if kind == SHARE else round(value)


def _moment(t_s: float) -> str:
    return datetime.fromtimestamp(float(t_s), UTC).isoformat(timespec="seconds")


def _show(outcomes: list[Outcome]) -> None:
    from rich.table import Table

    from ..screen import Screen

    console = Screen()
    table = Table("trace", "schema", "window", "windows", "hours", "devices", "labels")
    for out in outcomes:
        table.add_row(
            out["trace"],
            out["schema"],
            f"{out['window_ms'] / 1000:g} s",
            str(out["windows"]),
            f"{out['hours']:.2f}",
            "\n".join(f"{name or '-'} {count}" for name, count in out["devices"].items()),
            "\n".join(f"{name} {count}" for name, count in out["labels"].items()),
        )
    console.print(table)
    for out in outcomes:
        if "features" not in out:
            continue
        table = Table("feature", "unit", "kind", "zero", "5 %", "median", "95 %", title=out["trace"])
        for row in out["features"]:
            shares = [str(value) for value in row["q05_median_q95"]]
            table.add_row(row["name"], row["unit"], row["kind"], f"{row['zero_share']:.0%}", *shares)
        console.print(table)
