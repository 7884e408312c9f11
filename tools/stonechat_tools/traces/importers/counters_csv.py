"""Any CSV of counters (gzip or not) -> a Trace under a schema of its own.

Each row is a window (its cells count what happened in it) or, with cumulative=True, a reading of counters that only
grow. Both go through the device's own window.Window. A device counts in whole numbers: a column with decimals needs a
scale (NAME=UNIT=KIND=SCALE: N steps a unit) and is refused without one. A share is given in percent.
"""

import csv
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from stonechat.features import RATE, SHARE
from stonechat.schema import Schema
from stonechat.window import DELTA_MAX, Window

from ...console import clipped
from ..format import TraceError, check_columns, opened_text, parse_moment, plain_label
from ..trace import Trace, make_trace

Rows = list[tuple[int, dict[str, str]]]
_TOO_MANY = "\0more"
_GREATEST = 1e18
_EPOCH_S = 978_307_200.0
_LONGEST_ROW_S = 366 * 86_400.0
_CLOCK_ROWS = 1000
_ROWS_A_STEP = 100  # a clock that goes back in more than one of N rows is a file out of order


@dataclass
class Layout:
    """Which column is what. columns: (name, unit, kind) of the features; None takes every column that is not time,
    elapsed or label as a rate."""

    time: str
    time_unit_s: float | None = None  # None: by the size of the numbers (parse_moment)
    elapsed: str | None = None  # seconds that a row covers; else the difference of times
    label: str | None = None
    columns: Sequence[tuple[str, str, str]] | None = None
    cumulative: bool = False
    window_ms: int | None = None  # by default the median of what the rows cover, rounded by nominal_ms
    scales: dict[str, int] = field(default_factory=dict)  # steps a unit of each column that has decimals


def parse_columns(text: str) -> tuple[list[tuple[str, str, str]], dict[str, int]]:
    """NAME[=UNIT[=KIND[=SCALE]]] separated by commas -> (name, unit, kind) each, by default unit 1 and kind rate, and
    the scales."""
    columns = []
    scales = {}
    for word in text.split(","):
        parts = word.strip().split("=")
        if len(parts) > 4:
            raise TraceError(
                f"--columns: {clipped(word)} is not NAME, NAME=UNIT, NAME=UNIT=KIND or NAME=UNIT=KIND=SCALE"
            )
        name, unit, kind, scale = [*parts, *["", "1", RATE, ""][len(parts) :]]
        if scale:
            if not (scale.isascii() and scale.isdigit() and len(scale) <= 7 and 1 <= int(scale) <= 1_000_000):
                raise TraceError(f"--columns: {clipped(word)}: a scale is a whole number from 1 to 1000000")
            if kind == SHARE:
                raise TraceError(f"--columns: {clipped(word)}: a share is kept in 1/256 percent and takes no scale")
            scales[name] = int(scale)
        columns.append((name, f"{unit}/{int(scale)}" if scale not in ("", "1") else unit, kind))
    return list(check_columns(columns, "--columns")), scales


def nominal_ms(measured_ms: float) -> int:
    """The length that rows of about measured_ms were meant to have: the roundest number within 1 %, so that recordings
    of 5,013 and of 5,017 ms are both of windows of 5 s."""
    for digits in (1, 2, 3):
        step = 10.0 ** (math.floor(math.log10(max(measured_ms, 1))) + 1 - digits)
        rounded = round(measured_ms / step) * step
        if abs(rounded - measured_ms) <= 0.01 * measured_ms:
            return max(1, round(rounded))
    return max(1, round(measured_ms))


def import_csv(path: str, schema_name: str, layout: Layout, device: str = "", label: str = "") -> Trace:
    """Raises TraceError (FILE:LINE) or OSError. `dropped` and `resets` in the notes say what Window made of it."""
    with opened_text(path) as file:
        reader = csv.DictReader(file, restkey=_TOO_MANY)
        try:
            names = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = names
            rows = [(reader.line_num, row) for row in reader]
        except csv.Error as error:
            raise TraceError(f"{path}:{reader.line_num + 1}: not a line of CSV: {error}") from None
    for line, row in rows:
        if _TOO_MANY in row or None in row.values():
            raise TraceError(f"{path}:{line}: it has not as many cells as the header ({len(names)})")
    if len(rows) < 2:
        raise TraceError(f"{path}: {len(rows)} rows; at least two are needed")
    columns = _columns(names, layout, rows, path)
    times_s = [_moment(row, layout, path, line) for line, row in rows]
    covers_s = _covers(rows, times_s, layout, path)
    window_ms = layout.window_ms or nominal_ms(statistics.median(covers_s) * 1000)
    schema = Schema(schema_name, columns)
    window = Window(schema, window_ms)
    totals = [0] * len(columns)
    now_ms = 0.0
    if not layout.cumulative:
        window.push(totals, 0)
    out: list[tuple[float, int, str, list[int]]] = []
    for (line, row), t_s, cover_s in zip(rows, times_s, covers_s, strict=True):
        values = [_value(row, name, kind, layout.scales.get(name, 1), path, line) for name, _, kind in columns]
        for i, (_, _, kind) in enumerate(columns):
            totals[i] = values[i] if kind != RATE or layout.cumulative else totals[i] + values[i]
        now_ms += cover_s * 1000
        if window.push(totals, round(now_ms)):
            text = label or (row.get(layout.label) or "" if layout.label else "")
            out.append((t_s, window.elapsed_ms, plain_label(text), list(window.deltas)))
    notes = {"source": "csv", "dropped": str(window.dropped), "resets": str(window.resets)}
    notes |= {f"scale of {name}": str(scale) for name, scale in layout.scales.items()}
    return make_trace(schema, window_ms, out, device, notes)


def _columns(names: list[str], layout: Layout, rows: Rows, path: str) -> tuple[tuple[str, str, str], ...]:
    special = {layout.time, layout.elapsed, layout.label} - {None}
    missing = [name for name in special if name not in names]
    twice = [name for name in special if names.count(name or "") > 1]
    if twice:
        raise TraceError(f"{path}:1: column {clipped(twice[0])} comes twice")
    chosen = layout.columns
    if not missing and chosen is None:
        chosen = [(name, "1", RATE) for name in names if name not in special and not _is_clock(name, layout, rows)]
        if not chosen:
            raise TraceError(f"{path}:1: no column to count: {', '.join(map(clipped, names[:12]))}")
    missing += [name for name, _, _ in chosen or [] if name not in names]
    if missing:
        has = ", ".join(map(clipped, names[:12]))
        raise TraceError(f"{path}:1: no column {', '.join(map(clipped, missing))}; it has {has} ...")
    return check_columns(chosen or [], f"{path}:1")


def _is_clock(name: str, layout: Layout, rows: Rows) -> bool:
    """Does a column that nobody named hold another form of the time (epoch seconds, milliseconds, ISO 8601)?"""
    try:
        moments = [parse_moment(row[name]) for _, row in rows[:_CLOCK_ROWS]]
        times = [parse_moment(row[layout.time], layout.time_unit_s) for _, row in rows[:_CLOCK_ROWS]]
    except TraceError:
        return False
    if min(moments) < _EPOCH_S:  # 2001: a counter that is no clock seldom has this many seconds
        return False
    return all(
        abs((b - a) - (d - c)) <= 1.0 for a, b, c, d in zip(moments, moments[1:], times, times[1:], strict=False)
    )


def _moment(row: dict[str, str], layout: Layout, path: str, line: int) -> float:
    try:
        return parse_moment(row[layout.time], layout.time_unit_s)
    except TraceError as error:
        raise TraceError(f"{path}:{line}: {layout.time}: {error}") from None


def _covers(rows: Rows, times_s: list[float], layout: Layout, path: str) -> list[float]:
    """How many seconds each row covers. The first row of a file without an elapsed column covers as long as
    the median one (its time only, where the cells are cumulative)."""
    if layout.elapsed is not None:
        covers_s = [_number(row, layout.elapsed, path, line) for line, row in rows]
        for (line, _), cover_s in zip(rows, covers_s, strict=True):
            if not 0 < cover_s <= _LONGEST_ROW_S:
                raise TraceError(f"{path}:{line}: {layout.elapsed} is {cover_s:g}, not the seconds that a row covers")
        return covers_s
    covers_s = [later - earlier for earlier, later in zip(times_s, times_s[1:], strict=False)]
    usual_s = statistics.median(covers_s)
    back = [i for i, cover_s in enumerate(covers_s) if cover_s <= 0]
    if len(back) * _ROWS_A_STEP > len(covers_s) or usual_s <= 0:
        raise TraceError(f"{path}:{rows[back[0] + 1][0]}: {layout.time} does not grow; sort the file by it")
    for i in back:  # a clock that was put back now and then: the row is as long as most
        covers_s[i] = usual_s
    return [usual_s, *covers_s]


def _number(row: dict[str, str], name: str, path: str, line: int) -> float:
    try:
        value = float(row[name])
    except ValueError:
        raise TraceError(f"{path}:{line}: {name} is {clipped(row[name])}, not a number") from None
    if not -_GREATEST < value < _GREATEST:
        raise TraceError(f"{path}:{line}: {name} is {clipped(row[name])}")
    return value


def _value(row: dict[str, str], name: str, kind: str, scale: int, path: str, line: int) -> int:
    value = _number(row, name, path, line)
    if value < 0:
        raise TraceError(f"{path}:{line}: {name} is {value:g}; counts and readings are not negative")
    if kind == SHARE:
        if value > 100:
            raise TraceError(f"{path}:{line}: {name} is {value:g}, a share is at most 100 percent")
        return round(value * 256)
    steps = round(value * scale)
    if abs(value * scale - steps) > 1e-6 * max(1.0, abs(value * scale)):
        raise TraceError(
            f"{path}:{line}: {name} is {clipped(row[name])}, and a device counts in whole numbers: give the column a "
            f"scale, as in --columns {name}=UNIT={kind}={10 * scale}, or leave it out"
        )
    return steps if kind == RATE else min(steps, DELTA_MAX)
