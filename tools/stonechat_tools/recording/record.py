"""Record a device's windows into a trace.

Each window is on disk when it ends, so a recording survives ^C, a crash and a full disk; --resume goes on where it
stopped. Without --windows it records until ^C.

Examples:
  stonechat record office.csv.gz --window 5 --windows 720 --device gateway-1
  stonechat record demo.csv.gz --window 2 --interfaces eth0,lo --label benign
  stonechat record scan.csv.gz --window 5 --windows 60 --label connect-scan
  stonechat record doors.csv.gz --window 60 --counters counters.toml
  stonechat record services/ --window 5 --services ssh.service,nginx.service
  stonechat record --recipe models/linux-1/recipe.toml --part test
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from stonechat.compat import ticks_diff, ticks_ms
from stonechat.errors import CollectorError, ConfigError
from stonechat.window import Window

from ..console import has, say
from ..traces.format import BENIGN, TraceWriter, check_label
from .recipe import PARTS
from .services import ServiceTraces

MAX_WINDOWS = 100_000_000
MAX_READ_ERRORS = 10  # in a row; then the recording ends and says why


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("trace", nargs="?", help="the file to write: .csv, .csv.gz or .parquet; with --services a folder")
    add("--recipe", metavar="TOML", help="record the simulated devices of this recipe in its folder (needs root)")
    add("--part", choices=PARTS, help="with --recipe: those of this part, which the model is not made of")
    add("--windows", type=int, metavar="N", help="how many windows the file shall hold (default: until ^C)")
    add("--window", type=float, default=5.0, metavar="S", help="length of a window in seconds (default 5)")
    add(
        "--warm-up", type=int, default=0, metavar="N", help="let N windows pass first, at least until peers are learned"
    )
    add("--collector", choices=("auto", "proc", "bpf"), default="auto", help="auto: BPF where it starts")
    add("--interfaces", metavar="A,B", help="interfaces to count (default: all but lo)")
    add("--cgroup", metavar="DIR", help="watch this cgroup v2 folder instead of the whole machine (BPF)")
    add("--services", metavar="A,B", help="record these units or cgroups, a trace each, in the folder TRACE (BPF)")
    add("--disks", metavar="A,B", help="block devices whose reads and writes count (default: all)")
    add("--counters", metavar="TOML", help="record the vendor's own counters that this file names instead")
    add("--label", default=BENIGN, help="what is going on: benign (default) or an attack's name")
    add("--device", default="", help="name of the device, by which data sets are split")
    add("--resume", action="store_true", help="continue a file that is already there")
    add("--json", action="store_true", help="print the outcome as JSON, and no progress bar")


def run(args: argparse.Namespace) -> int:
    if (args.trace is None) == (args.recipe is None) or (args.part and not args.recipe):
        raise ConfigError("name the file to write, or a --recipe")
    if args.recipe:
        return _record_recipe(args)
    if not 0.05 <= args.window <= 86_400:
        raise ConfigError(f"--window {args.window}: want 0.05 to 86400 seconds")
    if args.windows is not None and not 1 <= args.windows <= MAX_WINDOWS:
        raise ConfigError(f"--windows {args.windows}: want 1 to {MAX_WINDOWS}")
    check_label(args.label)
    if not 0 <= args.warm_up <= MAX_WINDOWS:
        raise ConfigError(f"--warm-up {args.warm_up}: want 0 to {MAX_WINDOWS}")
    if args.cgroup and (args.collector == "proc" or args.counters):
        raise ConfigError("--cgroup needs BPF: leave out --collector proc and --counters")
    if args.services:
        return _record_services(args)
    disks = _names(args.disks)
    collector = open_collector(args.collector, _names(args.interfaces), args.counters, args.cgroup, disks)
    path = args.trace + ".part.csv" if args.trace.endswith(".parquet") else args.trace
    window = Window(collector.schema, round(args.window * 1000))
    notes = {"interfaces": args.interfaces or "all but lo"} if args.counters is None else {}
    if args.cgroup:
        notes["system calls, connections, processor and memory"] = "of one cgroup"
    if disks:
        notes["disks"] = "of its own" if args.cgroup else ",".join(disks)
    writer = TraceWriter(path, collector.schema, window.window_ms, args.device, notes, args.resume)
    try:
        with writer, _progress(args.json, args.label, args.windows, writer.windows) as shown:
            complete = record(collector, window, writer, args.label, args.windows, shown, warm_up=args.warm_up)
    finally:
        collector.close()
    if path != args.trace:
        from ..traces.files import read_trace, write_trace

        write_trace(read_trace(path), args.trace)
    outcome = {
        "trace": args.trace,
        "schema": collector.schema.name,
        "windows": writer.windows,
        "dropped": window.dropped,
        "resets": window.resets,
        "complete": complete,
    }
    if args.json:
        print(json.dumps(outcome))
    else:
        say(
            f"{args.trace}: {writer.windows} windows of {args.window:g} s, schema {collector.schema.name}, "
            f"{window.dropped} dropped" + ("" if complete else "; interrupted: --resume goes on")
        )
    return 0 if complete or args.windows is None else 130


def _record_services(args: argparse.Namespace) -> int:
    names = _names(args.services) or ()
    if args.collector == "proc" or args.counters or args.cgroup:
        raise ConfigError("--services needs BPF: leave out --collector proc, --counters and --cgroup")
    if args.trace.endswith((".csv", ".csv.gz", ".parquet")):
        raise ConfigError(f"--services writes a trace for each: name a folder, not {args.trace}")
    collector = open_collector("bpf", _names(args.interfaces), services=names)
    notes = {"interfaces": args.interfaces or "all but lo"}
    try:
        window_ms = round(args.window * 1000)
        with (
            ServiceTraces(collector, args.trace, window_ms, args.device, args.resume, notes) as traces,
            _progress(args.json, args.label, args.windows, traces.windows) as shown,
        ):
            complete = record(collector, traces, traces, args.label, args.windows, shown, warm_up=args.warm_up)
            lacks = ", ".join(each.name for each in collector.services if each.missing)
    finally:
        collector.close()
    outcome = {
        "traces": traces.paths,
        "schema": collector.services[0].schema.name,
        "windows": traces.windows,
        "dropped": traces.dropped,
        "resets": traces.resets,
        "complete": complete,
        "lacks": lacks,
    }
    if args.json:
        print(json.dumps(outcome))
    else:
        say(
            f"{args.trace}: {len(traces.paths)} traces of {traces.windows} windows of {args.window:g} s, schema "
            f"{outcome['schema']}" + (f"; lacking {lacks}" if lacks else "") + ("" if complete else "; interrupted")
        )
    return 0 if complete or args.windows is None else 130


def _record_recipe(args: argparse.Namespace) -> int:
    from .recipe import read_recipe
    from .session import record as record_devices

    wanted = read_recipe(args.recipe)
    if args.part:
        wanted = wanted.part(args.part)
    total = wanted.record.get("windows", 0) * len(wanted.record.get("devices", []))
    with _progress(args.json, wanted.name, total, 0) as shown:
        traces = record_devices(wanted, lambda done, _: shown(done))
    if args.json:
        print(json.dumps({"traces": traces}))
    else:
        say(f"{len(traces)} traces in {wanted.recordings}")
    return 0


def open_collector(
    kind: str,
    interfaces: tuple[str, ...] | None,
    counters: str | None = None,
    cgroup: str | None = None,
    disks: tuple[str, ...] | None = None,
    services: tuple[str, ...] = (),
) -> Any:
    """kind: auto, proc or bpf; counters: a TOML file of the vendor's own; services: those with a channel of their own
    -> a collector. Raises CollectorError, ConfigError."""
    if counters is not None:
        from .counters_file import load_counters

        return load_counters(counters)
    if kind != "proc":
        try:
            from stonechat.linux.collector import LinuxCollector

            use_bpf = True if kind == "bpf" else "auto"
            return LinuxCollector(interfaces, use_bpf=use_bpf, cgroup=cgroup, disks=disks, services=services)
        except (ImportError, CollectorError, OSError) as error:
            if kind == "bpf" or cgroup:
                raise CollectorError(f"the BPF collector does not start: {error}") from None
    from stonechat.linux.proc import ProcCollector

    return ProcCollector(interfaces=interfaces, disks=disks)


def record(
    collector: Any,
    window: "Window | ServiceTraces",
    writer: "TraceWriter | ServiceTraces",
    label: str,
    windows: int | None,
    shown: Callable[[int], None],
    stop: Callable[[], bool] = lambda: False,
    warm_up: int = 0,
) -> bool:
    """Append windows until the file holds `windows` of them (None: without end), stop() or ^C -> whether it holds
    them all. shown(n) is called after each. A recording begins after `warm_up` windows, a benign one not before the
    collector has learned its peers (warmup_windows). Raises CollectorError or OSError after MAX_READ_ERRORS failed
    readings."""
    values = [0] * len(collector.schema)
    warming_up = max(warm_up, getattr(collector, "warmup_windows", 0)) if label == BENIGN else warm_up
    errors = 0
    next_ms = ticks_ms()
    try:
        while (windows is None or writer.windows < windows) and not stop():
            now_ms = ticks_ms()
            try:
                collector.read(values)
                errors = 0
            except (CollectorError, OSError):
                errors += 1
                window.primed = False
                if errors >= MAX_READ_ERRORS:
                    raise
            else:
                if not window.push(values, now_ms):
                    pass  # the first reading, or a window that had to be dropped
                elif warming_up:
                    warming_up -= 1
                else:
                    writer.append(time.time(), window.elapsed_ms, label, window.deltas)
                    shown(writer.windows)
            if windows is not None and writer.windows >= windows:
                break
            next_ms = _wait_for_next(next_ms, window.window_ms)
    except KeyboardInterrupt:
        return windows is not None and writer.windows >= windows
    return windows is None or writer.windows >= windows


def _wait_for_next(next_ms: int, window_ms: int) -> int:
    """Sleep until the window after next_ms ends; after a stall begin a new rhythm."""
    next_ms += window_ms
    late_ms = ticks_diff(ticks_ms(), next_ms)
    if late_ms >= 0:
        return next_ms + late_ms
    time.sleep(-late_ms / 1000)
    return next_ms


@contextmanager
def _progress(silent: bool, what: str, total: int | None, completed: int) -> Iterator[Callable[[int], None]]:
    if silent or not sys.stderr.isatty():
        yield lambda done: None
        return
    if not has("rich"):  # on a device
        of = f" of {total}" if total else ""
        yield lambda done: print(f"\rrecording {what}: {done}{of}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from ..screen import Description

    columns = (Description(), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(f"recording {what}", total=total, completed=completed)
        yield lambda done: progress.update(task, completed=done)


def _names(text: str | None) -> tuple[str, ...] | None:
    return tuple(word for word in text.split(",") if word) if text else None
