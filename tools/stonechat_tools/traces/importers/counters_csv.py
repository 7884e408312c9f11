"""Any CSV of counters (gzip or not) -> a Trace under a schema of its own.

Each row is a window (its cells count what happened in it) or, with cumulative=True, a reading of counters that only
grow. Both go through the device's own window.Window. Cells are rounded to whole numbers; a share is given in percent.
"""

import csv
import gzip
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from stonechat.features import RATE, SHARE
from stonechat.schema import Schema
from stonechat.window import DELTA_MAX, Window

from ..format import TraceError, check_columns
from ..trace import Trace, make_trace


@dataclass
class Layout:
    """Which column is what. columns: (name, unit, kind) of the features; None takes every column that is not time,
    elapsed or label as a rate."""

    time: str
    time_unit_s: float = 1.0
    elapsed: str | None = None  # seconds that a row covers; else the difference of times
    label: str | None = None
    columns: Sequence[tuple[str, str, str]] | None = None
    cumulative: bool = False
    window_ms: int | None = None  # by default the median of what the rows cover


def parse_columns(text: str) -> list[tuple[str, str, str]]:
    """NAME[=UNIT[=KIND]] separated by commas -> (name, unit, kind) each, by default unit 1 and kind rate."""
    columns = []
    for word in text.split(","):
        parts = word.strip().split("=")
        if len(parts) > 3:
            raise TraceError(f"--columns: {word!r} is not NAME, NAME=UNIT or NAME=UNIT=KIND")
        columns.append((parts[0], parts[1] if len(parts) > 1 else "1", parts[2] if len(parts) > 2 else RATE))
    return list(check_columns(columns, "--columns"))


def import_csv(path: str, schema_name: str, layout: Layout, device: str = "", label: str = "") -> Trace:
    """Raises TraceError (FILE:LINE) or OSError. `dropped` and `resets` in the notes say what Window made of it."""
    opener = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            names = list(reader.fieldnames or [])
            columns = _columns(names, layout, path)
            rows = [(reader.line_num, row) for row in reader]
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: {error}") from None
    if len(rows) < 2:
        raise TraceError(f"{path}: {len(rows)} rows; at least two are needed")
    times_s = [_number(row, layout.time, path, line) * layout.time_unit_s for line, row in rows]
    covers_s = _covers(rows, times_s, layout, path)
    window_ms = layout.window_ms or max(1, round(statistics.median(covers_s) * 1000))
    schema = Schema(schema_name, columns)
    window = Window(schema, window_ms)
    totals = [0] * len(columns)
    now_ms = 0.0
    if not layout.cumulative:
        window.push(totals, 0)
    out: list[tuple[float, int, str, list[int]]] = []
    for (line, row), t_s, cover_s in zip(rows, times_s, covers_s, strict=True):
        values = [_value(row, name, kind, path, line) for name, _, kind in columns]
        for i, (_, _, kind) in enumerate(columns):
            totals[i] = values[i] if kind != RATE or layout.cumulative else totals[i] + values[i]
        now_ms += cover_s * 1000
        if window.push(totals, round(now_ms)):
            text = label or (row.get(layout.label) or "" if layout.label else "")
            out.append((t_s, window.elapsed_ms, text.replace(",", ";").replace('"', ""), list(window.deltas)))
    notes = {"source": "csv", "dropped": str(window.dropped), "resets": str(window.resets)}
    return make_trace(schema, window_ms, out, device, notes)


def _columns(names: list[str], layout: Layout, path: str) -> tuple[tuple[str, str, str], ...]:
    special = {layout.time, layout.elapsed, layout.label} - {None}
    missing = [name for name in special if name not in names]
    chosen = layout.columns or [(name, "1", RATE) for name in names if name not in special]
    missing += [name for name, _, _ in chosen if name not in names]
    if missing:
        raise TraceError(f"{path}:1: no column {', '.join(map(repr, missing))}; it has {', '.join(names[:12])} ...")
    return check_columns(chosen, f"{path}:1")


def _covers(rows: list[tuple[int, dict[str, str]]], times_s: list[float], layout: Layout, path: str) -> list[float]:
    """How many seconds each row covers. The first row of a file without an elapsed column covers as long as
    the median one (its time only, where the cells are cumulative)."""
    if layout.elapsed is not None:
        covers_s = [_number(row, layout.elapsed, path, line) for line, row in rows]
        for (line, _), cover_s in zip(rows, covers_s, strict=True):
            if cover_s <= 0:
                raise TraceError(f"{path}:{line}: {layout.elapsed} is {cover_s}, not a length of time")
        return covers_s
    covers_s = [later - earlier for earlier, later in zip(times_s, times_s[1:], strict=False)]
    for (line, _), cover_s in zip(rows[1:], covers_s, strict=True):
        if cover_s <= 0:
            raise TraceError(f"{path}:{line}: {layout.time} does not grow; sort the file by it")
    return [statistics.median(covers_s), *covers_s]


def _number(row: dict[str, str], name: str, path: str, line: int) -> float:
    try:
        value = float(row[name])
    except (TypeError, ValueError):
        raise TraceError(f"{path}:{line}: {name} is {row[name]!r}, not a number") from None
    if not math.isfinite(value):
        raise TraceError(f"{path}:{line}: {name} is {row[name]!r}")
    return value


def _value(row: dict[str, str], name: str, kind: str, path: str, line: int) -> int:
    value = _number(row, name, path, line)
    if value < 0:
        raise TraceError(f"{path}:{line}: {name} is {value:g}; counts and readings are not negative")
    if kind == SHARE:
        if value > 100:
            raise TraceError(f"{path}:{line}: {name} is {value:g}, a share is at most 100 percent")
        return round(value * 256)
    return round(value) if kind == RATE else min(round(value), DELTA_MAX)
