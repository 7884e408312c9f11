"""Show live features, their distance from normal, and the verdict.

With a model (the shipped one of this device's schema unless --model names another) z and the verdict are those of the
agent; --state adds what a running agent has learned. Without a model, the first windows define what is normal, for
display only.

Keys: q quits, s sorts by how unusual a feature is or by the schema, r starts the learning of this view again.

Examples:
  stonechat top
  stonechat top --no-model --interval 2 --interface eth0 --interface lo
  stonechat top --once --json
  stonechat top --json --windows 100 > windows.jsonl
"""

import argparse
import contextlib
import json
import os
import select
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stonechat.compat import ticks_ms
from stonechat.detection import NORMAL
from stonechat.errors import ConfigError, ModelError, StateError, StonechatError
from stonechat.features import LEVEL, RATE, SHARE, Normalization
from stonechat.linux import schemas, shipped
from stonechat.linux.collector import LinuxCollector
from stonechat.model import load_model
from stonechat.model_file import pack_normalization
from stonechat.schema import Schema
from stonechat.scorer import Scorer
from stonechat.state import State
from stonechat.steady import SteadyChannel
from stonechat.window import Window

from ..console import has, plain_table, read_file

DEFAULT_INTERVAL_S = 2.0
LEARN_WINDOWS = 30  # of the display's own learning
FIRST_LOOK_WINDOWS = 5  # it shows z from here on
_FLOOR_Q8 = {RATE: 64, LEVEL: 64, SHARE: 256}  # a quarter of a doubling; one percent
_LEVELS = ("normal", "watch", "alarm")
_LEVEL_STYLES = ("green", "yellow", "bold red")
_BAR_CELLS = 16
_BAR_DEVIATIONS = 8
_KEY_WAIT_S = 0.25
_LINES_AROUND_TABLE = 6


class Usual:
    """What is usual without a model: median and spread of each feature over the first windows."""

    def __init__(self, schema: Schema) -> None:
        self._kinds = [kind for _, _, kind in schema.columns]
        self._rows: list[list[int]] = []
        self._centre: list[float] = []
        self._scale: list[float] = []

    @property
    def windows(self) -> int:
        return len(self._rows)

    def z(self, f_q8: list[int]) -> list[float | None]:
        """Learn from f_q8 while there are windows to learn from -> the distance of each in deviations."""
        if len(self._rows) < LEARN_WINDOWS:
            self._rows.append(list(f_q8))
            if len(self._rows) >= FIRST_LOOK_WINDOWS:
                self._fit_location_scale()
        if not self._scale:
            return [None] * len(f_q8)
        return [(f - centre) / scale for f, centre, scale in zip(f_q8, self._centre, self._scale, strict=True)]

    def _fit_location_scale(self) -> None:
        columns = list(zip(*self._rows, strict=True))
        self._centre = [statistics.median(column) for column in columns]
        self._scale = []
        for kind, column, centre in zip(self._kinds, columns, self._centre, strict=True):
            spread = 1.48 * statistics.median(abs(value - centre) for value in column)
            self._scale.append(max(spread, statistics.pstdev(column) / 2, _FLOOR_Q8[kind]))


class View:
    """A collector and what scores it: with a model the agent's own loop.Channel, so that the verdicts are the agent's.
    `step()` waits for nothing: call it when a window has ended."""

    def __init__(self, collector: Any, model: Any, state: State | None, interval_s: float) -> None:
        self.collector = collector
        self.schema: Schema = collector.schema
        self.channel = SteadyChannel(collector, model, state or State()) if model else None
        self.scorer: Scorer | None = self.channel.scorer if self.channel else None
        self.model_name = self.scorer.meta.name if self.scorer else None
        self.window_ms: int = self.scorer.window_ms if self.scorer else round(1000 * interval_s)
        self.windows = 0
        self.shown: dict[str, Any] | None = None
        self._window = self.channel.window if self.channel else Window(self.schema, self.window_ms)
        self._values = [0] * len(self.schema)
        plain = pack_normalization([0] * len(self.schema), [256] * len(self.schema))
        self._features = Normalization(self.schema, plain)
        self._usual = Usual(self.schema)

    def step(self) -> dict[str, Any] | None:
        """Read the counters -> the window that they end, as --json prints it; None while priming or for a dropped
        one. Raises CollectorError or OSError."""
        z: list[float | None]
        shares: list[int] | None = None
        verdict: dict[str, Any] | None = None
        if self.channel:
            warming_up = self.channel.warmup_windows
            scored = self.channel.end_window(ticks_ms())
            if scored is not None:
                self.channel.hold_peers(scored.level != NORMAL)  # as the loop does
                z, shares, verdict = self._verdict_of(scored)
            elif self.channel.warmup_windows < warming_up:
                z = self._inputs(self.channel.scorer)
            else:
                return None
        else:
            self.collector.read(self._values)
            if not self._window.push(self._values, ticks_ms()):
                return None
            z = self._without()
        self.windows += 1
        deltas, elapsed_ms = self._window.deltas, self._window.elapsed_ms
        features = {}
        for i, (name, unit, kind) in enumerate(self.schema.columns):
            features[name] = {"value": _reading(kind, deltas[i], elapsed_ms), "unit": unit, "z": z[i]}
            if shares:
                features[name]["share_percent"] = shares[i]
        self.shown = {
            "time_s": round(time.time(), 1),
            "schema": self.schema.name,
            "model": self.model_name,
            "elapsed_ms": elapsed_ms,
            "dropped": self._window.dropped,
            "deltas": list(deltas),
            "verdict": verdict,
            "features": features,
        }
        return self.shown

    def recalibrate(self) -> None:
        self._usual = Usual(self.schema)
        if self.scorer:
            self.scorer.recalibrate()

    def learning(self) -> str:
        """What is still to be learned, in words; empty when nothing is."""
        if self.channel and self.channel.warmup_windows:
            return f"learning the peers, {self.channel.warmup_windows} windows left"
        if self.scorer:
            percent = 100 * self.scorer.seen // max(1, self.scorer.meta.learn_windows)
            return f"learning, {percent} %" if self.scorer.learning else ""
        left = LEARN_WINDOWS - self._usual.windows
        return f"learning what is usual, {left} windows left" if left else ""

    def _verdict_of(self, verdict: Any) -> tuple[list[float | None], list[int], dict[str, Any]]:
        """A verdict -> deviations and shares of the features, and the verdict for --json."""
        total = sum(verdict.parts) or 1
        names = [name for name, _, _ in self.schema.columns]
        shown = {
            "level": _LEVELS[verdict.level],
            "learning": verdict.learning,
            "steady": getattr(verdict, "steady", False),
            "surprise": round(verdict.surprise_q8 / 256, 2),
            "evidence": round(verdict.evidence_q8 / 256, 3),
            "explain": [
                {"feature": names[i], "z": z_q4 / 16, "share_percent": share} for i, z_q4, share in verdict.explain(3)
            ],
        }
        return _deviations(verdict.x), [round(100 * part / total) for part in verdict.parts], shown

    def _inputs(self, scorer: Scorer) -> list[float | None]:
        f_q8, x = [0] * len(self.schema), bytearray(len(self.schema))
        scorer.normalization.fill_q8(self._window.deltas, self._window.elapsed_ms, self.window_ms, f_q8)
        scorer.normalization.fill(f_q8, x)
        return _deviations(x)

    def _without(self) -> list[float | None]:
        f_q8 = [0] * len(self.schema)
        self._features.fill_q8(self._window.deltas, self._window.elapsed_ms, self.window_ms, f_q8)
        return [z if z is None else round(z, 2) for z in self._usual.z(f_q8)]


def _deviations(x: bytearray) -> list[float | None]:
    return [(byte - 256 if byte > 127 else byte) / 16 for byte in x]


def _reading(kind: str, delta: int, elapsed_ms: int) -> float:
    if kind == RATE:
        return round(1000 * delta / elapsed_ms, 2)
    return round(delta / 256, 2) if kind == SHARE else delta


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        type=shipped.path,
        metavar="FILE",
        help="a .tflite, or the name of a shipped model (default: that of the schema)",
    )
    add("--no-model", action="store_true", help="learn what is usual from the first windows instead")
    add("--state", metavar="FILE", help="the state file of an agent, for what it has learned; it is only read")
    add("--collector", choices=("auto", "proc", "bpf"), default="auto", help="auto: BPF where it starts")
    add("--interface", action="append", metavar="NAME", help="count this interface only (again for more)")
    add("--cgroup", metavar="DIR", help="watch this cgroup v2 folder instead of the whole machine (BPF)")
    add("--disks", metavar="A,B", help="block devices whose reads and writes count (default: all)")
    add("--interval", type=float, metavar="S", help="seconds a window, without a model (default 2)")
    add("--windows", type=int, metavar="N", help="stop after N windows")
    add("--once", action="store_true", help="one window, then stop (the same as --windows 1)")
    add("--json", action="store_true", help="one JSON object a window and nothing else")


def run(args: argparse.Namespace) -> int:
    interval_s = args.interval if args.interval is not None else DEFAULT_INTERVAL_S
    if not 0.1 <= interval_s <= 3600:
        raise ConfigError(f"--interval {interval_s}: want 0.1 to 3600 seconds")
    if args.windows is not None and args.windows < 1:
        raise ConfigError(f"--windows {args.windows}: want at least 1")
    interfaces = tuple(args.interface) if args.interface else None
    model = named_model(args.model) if args.model and not args.no_model else None
    disks = tuple(word for word in args.disks.split(",") if word) if args.disks else None
    collector = open_matching(args.collector, interfaces, model, args.cgroup, disks)
    if model is None and not args.no_model:
        model = shipped_model(collector.schema.name)
    try:
        state = read_state(args.state) if args.state else None
        view = View(collector, model, state, interval_s)
        limit = 1 if args.once else args.windows
        interactive = not args.json and not args.once and sys.stdout.isatty() and has("rich")
        return watch_live(view, limit) if interactive else watch_plain(view, limit, args.json)
    finally:
        collector.close()


def read_state(path: str) -> State:
    """What an agent has learned, from a copy: State sets a damaged file aside, which is the agent's business alone.
    Raises OSError where there is none, StateError where it can't be read."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "state")
        copy.write_bytes(read_file(path))
        state = State(str(copy))
        state.path = None
    if state.damaged:
        raise StateError(f"--state {path}: {state.damaged}")
    return state


def named_model(path: str) -> Any:
    """Raises OSError, ModelError."""
    try:
        return _load(Path(path))
    except ModelError as error:
        raise ModelError(f"--model {path}: {error}") from None


def open_matching(
    kind: str,
    interfaces: tuple[str, ...] | None,
    model: Any,
    cgroup: str | None = None,
    disks: tuple[str, ...] | None = None,
) -> LinuxCollector:
    """The collector that `kind` asks for; with "auto" the one of the model's schema, if there is a model."""
    use_bpf: bool | str = "auto" if kind == "auto" else kind == "bpf"
    if model and model.metadata and kind == "auto":
        use_bpf = bool(model.metadata.schema_id == schemas.LINUX_1.id)
    return LinuxCollector(interfaces, use_bpf=use_bpf, cgroup=cgroup, disks=disks)


def shipped_model(schema_name: str) -> Any:
    return _load(Path(shipped.path(schema_name))) if schema_name in shipped.names() else None


def _load(file: Path) -> Any:
    return load_model(read_file(file))


def watch_plain(view: View, limit: int | None, as_json: bool) -> int:
    for shown in _windows(view, limit):
        if as_json:
            print(json.dumps(shown), flush=True)
        elif not has("rich"):
            print(_plain(view), flush=True)
        else:
            from rich.console import Console

            Console().print(_screen(view, by_z=False))
    return 0


def _windows(view: View, limit: int | None) -> Iterator[dict[str, Any]]:
    due_s = time.monotonic()
    while limit is None or view.windows < limit:
        shown = view.step()
        if shown:
            yield shown
        due_s = max(due_s + view.window_ms / 1000, time.monotonic())
        if limit is None or view.windows < limit:
            time.sleep(max(0.0, due_s - time.monotonic()))


def watch_live(view: View, limit: int | None) -> int:
    from rich.live import Live

    by_z = False
    error = ""
    due_s = time.monotonic()
    with _keys() as key_within, Live(auto_refresh=False, screen=True) as live:
        while limit is None or view.windows < limit:
            now_s = time.monotonic()
            if now_s >= due_s:
                due_s = max(due_s + view.window_ms / 1000, now_s)
                try:
                    view.step()
                    error = ""
                except (StonechatError, OSError) as problem:  # the next window is another try
                    error = str(problem)
            rows = max(3, live.console.height - _LINES_AROUND_TABLE)
            next_s = max(0.0, due_s - time.monotonic())
            live.update(_screen(view, by_z, rows, next_s, error), refresh=True)
            key = key_within(min(_KEY_WAIT_S, max(0.0, due_s - time.monotonic())))
            if key in ("q", "\x03", "\x1b"):
                break
            if key == "s":
                by_z = not by_z
            if key == "r":
                view.recalibrate()
    return 0


@contextlib.contextmanager
def _keys() -> Iterator[Any]:
    """Keys one by one without Enter -> a function that waits N seconds and returns the key or "". Where stdin
    is no terminal, it only waits."""
    if not sys.stdin.isatty():
        yield _no_key
        return
    import termios
    import tty

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield lambda seconds: os.read(fd, 1).decode("latin-1") if select.select([fd], [], [], seconds)[0] else ""
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _no_key(seconds: float) -> str:
    time.sleep(seconds)
    return ""


def _screen(view: View, by_z: bool, rows: int = 1000, next_s: float | None = None, error: str = "") -> Any:
    """What to print; of the features at most `rows`, then the most unusual ones."""
    from rich.console import Group
    from rich.text import Text

    lines: list[Any] = [_headline(view, next_s)]
    if error:
        lines.append(Text("the last reading failed: " + error, "red"))
    lines.append(_table(view, by_z, rows) if view.shown else Text("waiting for the end of the first window ..."))
    if next_s is not None:
        hidden = len(view.schema) - rows
        more = f"   {hidden} quieter features need a taller terminal" if hidden > 0 else ""
        lines.append(Text("q quit   s sort   r learn anew" + more, "dim"))
    return Group(*lines)


def _plain(view: View) -> str:
    """The same window without colours: a device has no rich."""
    lines = [f"stonechat top  {view.schema.name}  model {view.model_name or 'none'}  windows {view.windows}"]
    shown = view.shown or {}
    if verdict := shown.get("verdict"):
        lines.append(
            f"verdict {verdict['level']}  evidence {100 * verdict['evidence']:.0f} % of an alarm  "
            f"surprise {verdict['surprise']:.1f}"
        )
    if learning := view.learning():
        lines.append(learning)
    rows = []
    for name, row in shown.get("features", {}).items():
        share = f"{row['share_percent']} %" if row.get("share_percent") else ""
        rows.append([name, _human(row["value"]), row["unit"], "" if row["z"] is None else f"{row['z']:+.1f}", share])
    return "\n".join(lines) + "\n" + plain_table(["feature", "now", "unit", "z", "of score"], rows)


def _headline(view: View, next_s: float | None) -> Any:
    from rich.text import Text

    text = Text.assemble(("stonechat top", "bold"), f"  {view.schema.name}  ")
    text.append(f"model {view.model_name}" if view.model_name else "no model")
    text.append(f"  window {view.window_ms / 1000:g} s, {view.windows} seen")
    if view.shown and view.shown["dropped"]:
        text.append(f", {view.shown['dropped']} dropped", "yellow")
    if next_s is not None:
        text.append(f", next in {next_s:.0f} s")
    verdict = view.shown["verdict"] if view.shown else None
    if verdict:
        evidence = min(1.0, verdict["evidence"])
        text.append("\nverdict ")
        text.append(f"{verdict['level']:<7}", _LEVEL_STYLES[_LEVELS.index(verdict["level"])])
        text.append(" evidence ")
        text.append(_cells(evidence, 20), _LEVEL_STYLES[2 if evidence >= 1 else 1 if evidence >= 0.5 else 0])
        text.append(f" {100 * verdict['evidence']:.0f} % of an alarm   surprise {verdict['surprise']:.1f}")
    if learning := view.learning():
        text.append(f"\n{learning}", "cyan")
    return text


def _table(view: View, by_z: bool, rows: int) -> Any:
    from rich.table import Table
    from rich.text import Text

    features = (view.shown or {}).get("features", {})
    table = Table(box=None, padding=(0, 1), header_style="bold")
    for name, justify in (("feature", "left"), ("now", "right"), ("unit", "left"), ("z", "right"), ("", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    with_shares = any("share_percent" in row for row in features.values())
    if with_shares:
        table.add_column("of score", justify="right")
    unusual = sorted(features, key=lambda name: -abs(features[name]["z"] or 0))[:rows]
    for name in unusual if by_z else [name for name in features if name in unusual]:
        row = features[name]
        z = row["z"]
        style = "dim" if z is None or abs(z) < 1 else "red" if abs(z) >= 4 else "yellow" if abs(z) >= 2 else ""
        cells = [name, _human(row["value"]), row["unit"], "" if z is None else f"{z:+.1f}", _bar(z)]
        if with_shares:
            cells.append(f"{row['share_percent']} %" if row["share_percent"] else "")
        table.add_row(*(Text(cell, style) for cell in cells))
    return table


def _bar(z: float | None) -> str:
    return "" if z is None else _cells(min(1.0, abs(z) / _BAR_DEVIATIONS), _BAR_CELLS)


def _cells(share: float, cells: int) -> str:
    full = round(share * cells)
    return "█" * full + "·" * (cells - full)


def _human(value: float) -> str:
    for limit, factor, suffix in ((1e4, 1, ""), (1e7, 1e3, "k"), (1e10, 1e6, "M")):
        if value < limit:
            scaled = value / factor
            return f"{scaled:.0f}{suffix}" if scaled >= 100 or scaled == int(scaled) else f"{scaled:.1f}{suffix}"
    return f"{value / 1e9:.0f}G"
