"""Show a device's reports: a table, JSON lines, a plot in the terminal, or a PNG.

Without a device: the fleet, one line each.

Examples:
  stonechat report
  stonechat report pump-1 --last 20
  stonechat report pump-1 --since 2h --plot pump-1.png
  stonechat report pump-1 --since 1d --json
  stonechat report pump-1 --terminal
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stonechat.errors import ConfigError

from ..console import counted
from . import wire
from .command import span_s
from .database import add_database_arguments
from .overview import COLOURS, channel_name, figure, fleet_table, shown_states
from .store import URLS, Row, Store

HELP = "show a device's history as a table or a plot"
PLOT_ROWS = 12
PLOT_COLUMNS = 72
OWN_MODEL = "own model"  # the channel of the model that the device has trained: of the device's own schema
BARS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", nargs="?", help="default: an overview of all")
    add_database_arguments(parser)
    parser.add_argument("--last", type=int, default=200, metavar="N", help="at most N reports (default 200)")
    parser.add_argument("--since", metavar="TIME", help="90s, 30m, 2h or 1d ago")
    parser.add_argument("--json", action="store_true", help="one JSON object a report")
    parser.add_argument("--plot", metavar="FILE.png", help="draw score and evidence into a PNG")
    parser.add_argument("--terminal", action="store_true", help="draw the score in the terminal")


def run(args: argparse.Namespace) -> int:
    if not args.db.startswith(URLS) and not Path(args.db).exists():
        raise ConfigError(f"{args.db}: no such database; `stonechat collect` makes it")
    with Store(args.db) as store:
        if args.device is None:
            return _overview(store, args.json)
        since_s = time.time() - span_s(args.since) if args.since else 0.0
        device = next((known for known in store.devices() if known["device"] == args.device), None)
        if device is None:
            others = ", ".join(known["device"] for known in store.devices())
            raise ConfigError(
                f"{args.device}: no reports; "
                + (f"there are those of {others}" if others else "no device has sent one yet")
            )
        rows = store.history(args.device, since_s=since_s, limit=args.last)
    if args.json:
        for row in rows:
            print(json.dumps(as_json(row, device)))
        return 0
    if args.plot:
        plot_png(rows, args.device, Path(args.plot))
        print(f"{args.plot}: {counted(len(rows), 'report')} of {args.device}")
    if args.terminal:
        print(plot_text(rows))
    if not args.plot and not args.terminal:
        _table(rows, device)
    return 0


def _overview(store: Store, as_lines: bool) -> int:
    if as_lines:
        seen = {each.device: each for each in shown_states(store)[0]}
        for device in store.devices():
            if device["device"] in seen:
                print(json.dumps(device | {"presence": asdict(seen[device["device"]].state)}))
        return 0
    from rich.console import Console

    rejected = store.rejections()
    caption = "; ".join(f"{name}: {reasons}" for name, reasons in rejected.items())
    caption = f"rejected: {caption}" if caption else ""
    if not store.devices():
        caption = caption or "no message has arrived: is the --prefix of `stonechat collect` the fleet's?"
    Console().print(fleet_table(store, caption))
    return 0


def feature_names(device: dict[str, Any], channel: int = 0) -> Sequence[str]:
    """The names of the columns of a device's channel; empty where this package does not know its schema, as for a
    vendor's own."""
    from stonechat.lasting_peers import LastingPeers
    from stonechat.linux.schemas import LINUX_SERVICE_1
    from stonechat.linux.sent_to_peers import SentToPeers

    from ..schemas import SCHEMAS

    name = channel_name(device, channel)
    if name.startswith("counters "):
        return ()
    for peers in (LastingPeers, SentToPeers):
        if name == peers.name:
            return [column[0] for column in peers.schema.columns]
    of_device = not name or name == OWN_MODEL
    schema = SCHEMAS.get(bytes.fromhex(device.get("schema") or "")) if of_device else LINUX_SERVICE_1
    return [column[0] for column in schema.columns] if schema else ()


def name_of(index: int, names: Sequence[str]) -> str:
    return names[index] if index < len(names) else f"feature {index}"


def as_json(row: Row, device: dict[str, Any]) -> dict[str, Any]:
    names = feature_names(device, row.channel)
    values = asdict(row)
    values["channel"] = channel_name(device, row.channel) or None
    values["level"] = wire.LEVELS[row.level]
    values["flags"] = [name for bit, name in wire.FLAGS.items() if row.flags & bit]
    for feature in values["features"]:
        feature["name"] = name_of(feature["index"], names)
    return values


def _table(rows: list[Row], device: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(device["device"]))
    for heading in ("time", "level", "windows", "score", "surprise", "evidence", "what carries it"):
        table.add_column(
            heading, justify="right" if heading in ("windows", "score", "surprise", "evidence") else "left"
        )
    for row in rows:
        when = time.strftime("%m-%d %H:%M:%S", time.localtime(row.time_s))
        marks = [name for bit, name in wire.FLAGS.items() if row.flags & bit]
        marks += ["history"] if row.late_s is not None else []
        marks += [] if row.time_known else ["time unknown"]
        marks += ["key used twice"] if row.variant else []
        score = figure(row.score)
        if row.windows > 1:
            score = f"{figure(row.score_min)} .. {score} .. {figure(row.score_max)}"
        names = feature_names(device, row.channel)
        where = channel_name(device, row.channel)
        carries = [f"{name_of(f.index, names)} {f.deviation:+.1f} sd ({f.share_percent} %)" for f in row.features]
        table.add_row(
            when + (f" ({', '.join(marks)})" if marks else ""),
            Text(wire.LEVELS[row.level], COLOURS[row.level]),
            str(row.windows),
            score,
            figure(row.surprise),
            figure(row.evidence),
            Text(f"{where}: " * bool(where) + ", ".join(carries) + (f" [{row.detail}]" if row.detail else "")),
        )
    Console().print(table)


def plot_text(rows: list[Row]) -> str:
    """The highest score of each stretch of time as columns of block characters; alarms are marked below."""
    rows = [row for row in rows if row.score_max is not None]
    if not rows:
        return "no scores"
    begin_s, end_s = rows[0].time_s, max(rows[-1].time_s, rows[0].time_s + 1)
    highest = [0.0] * PLOT_COLUMNS
    levels = [0] * PLOT_COLUMNS
    for row in rows:
        column = min(PLOT_COLUMNS - 1, max(0, int((row.time_s - begin_s) / (end_s - begin_s) * PLOT_COLUMNS)))
        highest[column] = max(highest[column], row.score_max or 0.0)
        levels[column] = max(levels[column], row.level)
    top = max(highest) or 1.0
    lines = []
    for line in range(PLOT_ROWS, 0, -1):
        eighths = [max(0, min(8, round(value / top * PLOT_ROWS * 8) - 8 * (line - 1))) for value in highest]
        label = f"{top * line / PLOT_ROWS:8.2f} " if line in (1, PLOT_ROWS // 2, PLOT_ROWS) else " " * 9
        lines.append(label + "".join(BARS[value] for value in eighths))
    lines.append("   level " + "".join(" w!"[level] for level in levels).rstrip())
    span = f"{time.strftime('%m-%d %H:%M', time.localtime(begin_s))} .. "
    lines.append(" " * 9 + span + time.strftime("%m-%d %H:%M", time.localtime(end_s)))
    return "\n".join(lines)


def plot_png(rows: list[Row], device: str, path: Path) -> None:
    """Score (with the range of each summary) and evidence over time, alarms shaded."""
    import datetime

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    times = [datetime.datetime.fromtimestamp(row.time_s) for row in rows]
    figure, (upper, lower) = pyplot.subplots(2, 1, sharex=True, figsize=(9, 5), height_ratios=(2, 1))
    lows = [row.score_min if row.score_min is not None else float("nan") for row in rows]
    highs = [row.score_max if row.score_max is not None else float("nan") for row in rows]
    upper.fill_between(times, lows, highs, alpha=0.25, step="mid")
    upper.plot(times, [row.score if row.score is not None else float("nan") for row in rows], marker=".", lw=0.8)
    upper.set_ylabel("score")
    lower.plot(times, [row.evidence if row.evidence is not None else float("nan") for row in rows], marker=".", lw=0.8)
    lower.set_ylabel("evidence")
    for axes in (upper, lower):
        for i, row in enumerate(rows):
            if row.level:
                end = times[i + 1] if i + 1 < len(rows) else times[i]
                axes.axvspan(times[i], end, alpha=0.25, lw=0, color=("", "gold", "red")[row.level])
    upper.set_title(device)
    figure.autofmt_xdate()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
