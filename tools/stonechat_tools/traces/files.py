"""Trace files: read and write .csv, .csv.gz and .parquet (format.py documents them)."""

import csv
import gzip
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from stonechat.features import SHARE
from stonechat.schema import Schema
from stonechat.window import DELTA_MAX

from ..console import clipped, install_command, reason, replacing, write_atomic
from ..schemas import SCHEMAS
from .format import (
    COLUMNS,
    FIRST_S,
    FIXED_COLUMNS,
    LAST_S,
    TraceError,
    check_columns,
    check_line,
    check_window,
    header_lines,
    parse_header,
    whole_lines,
)
from .trace import Ints, Trace, join, texts

_DAY_MS = 86_400_000


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """The trace in a .csv, .csv.gz or .parquet file. Raises TraceError (FILE:LINE: what is wrong) or OSError.

    A row that a crash cut short at the very end is left out; anything else that does not fit is an error."""
    name = os.fspath(path)
    if name.endswith(".parquet"):
        return _read_parquet(name)
    return _read_csv(name)


def _read_csv(path: str) -> Trace:
    lines = enumerate(whole_lines(path), 1)
    header: list[str] = []
    names: list[str] | None = None
    for _, line in lines:
        if not line.startswith("#"):
            names = _cells(line, f"{path}:{len(header) + 1}")
            break
        header.append(line.rstrip("\r\n"))
    facts, columns, notes = parse_header(header, path)
    if names is None:
        raise TraceError(f"{path}:{len(header) + 1}: the line with the columns' names is missing")
    schema = _schema_of(facts, columns, path)
    has_device = names[3:4] == ["device"]
    feature_names = [column[0] for column in schema.columns]
    expected = [*FIXED_COLUMNS, *(["device"] if has_device else []), *feature_names]
    if names != expected:
        raise TraceError(
            f"{path}:{len(header) + 1}: columns {_difference(names, expected)} for schema {schema.name} "
            f"({len(feature_names)} features)"
        )
    start = len(expected) - len(feature_names)
    t_s: list[float] = []
    elapsed_ms: list[int] = []
    labels: list[str] = []
    devices: list[str] = []
    values: list[list[int]] = []
    for number, line in lines:
        cells = line.rstrip("\r\n").split(",") if '"' not in line else _cells(line, f"{path}:{number}")
        if len(cells) != len(expected):
            raise TraceError(f"{path}:{number}: {len(cells)} cells, the header names {len(expected)}")
        try:
            t_s.append(float(cells[0]))
            elapsed_ms.append(int(cells[1]))
            values.append([int(cell) for cell in cells[start:]])
        except ValueError:
            raise TraceError(f"{path}:{number}: {_bad_cell(cells, expected, start)}") from None
        if abs(elapsed_ms[-1]) > 2 * _DAY_MS:
            raise TraceError(f"{path}:{number}: elapsed_ms is {clipped(cells[1])}")
        labels.append(cells[2])
        devices.append(cells[3] if has_device else facts.get("device", ""))
    trace = Trace(
        schema,
        int(facts["window_ms"]),
        np.array(t_s, dtype=np.float64),
        np.array(elapsed_ms, dtype=np.int64),
        texts(labels),
        texts(devices),
        _int_matrix(values, len(schema), path, len(header) + 2),
        notes,
    )
    _validate(trace, path, len(header) + 2)
    return trace


def _schema_of(facts: dict[str, str], columns: Any, where: str) -> Schema:
    if columns is not None:
        schema = Schema(facts["schema"], check_columns(columns, where))
        if schema.id.hex() != facts["id"]:
            raise TraceError(f"{where}:1: id={facts['id']}, but the columns in line 2 make {schema.id.hex()}")
        return schema
    for known in SCHEMAS.values():
        if known.id.hex() == facts["id"]:
            return known
    raise TraceError(
        f"{where}:1: schema {facts['schema']} (id {facts['id']}) is not one that stonechat ships; "
        f"add the line '{COLUMNS}[[name, unit, kind], ...]'"
    )


def _cells(line: str, where: str) -> list[str]:
    try:
        return next(csv.reader([line], strict=True))
    except (csv.Error, StopIteration) as error:
        raise TraceError(f"{where}: not a line of CSV: {error}") from None


def _difference(names: list[str], expected: list[str]) -> str:
    for i, (got, want) in enumerate(zip(names, expected, strict=False)):
        if got != want:
            return f"differ at column {i + 1}: got {clipped(got)}, want {want!r}"
    return f"differ in number: got {len(names)}, want {len(expected)}"


def _bad_cell(cells: list[str], expected: list[str], start: int) -> str:
    for i, (cell, name) in enumerate(zip(cells, expected, strict=True)):
        if 2 <= i < start:  # label and device are text
            continue
        try:
            _ = float(cell) if i == 0 else int(cell)
        except ValueError:
            return f"{name} is {clipped(cell)}, not {'a number' if i == 0 else 'a whole number'}"
    return "a cell is not a number"


def _int_matrix(values: list[list[int]], n: int, path: str, first_line: int) -> Ints:
    try:
        return np.array(values, dtype=np.int64).reshape(len(values), n)
    except OverflowError:
        line = next(i for i, row in enumerate(values) if any(abs(value) >= 1 << 63 for value in row))
        raise TraceError(f"{path}:{first_line + line}: a value does not fit 64 bits") from None


def _validate(trace: Trace, path: str, first_line: int) -> None:
    def complain(bad: npt.NDArray[np.bool_], what: str) -> None:
        if bad.any():
            raise TraceError(f"{path}:{first_line + int(np.argmax(bad))}: {what}")

    complain(~((trace.t_s >= FIRST_S) & (trace.t_s <= LAST_S)), "t_s is not a time (Unix seconds, to the year 9999)")
    complain(trace.elapsed_ms <= 0, "elapsed_ms is not above 0")
    complain(2 * trace.elapsed_ms > 3 * trace.window_ms, "elapsed_ms is more than 1.5 windows: no device scores it")
    for i, (name, _, kind) in enumerate(trace.schema.columns):
        column = trace.deltas[:, i]
        top = 25600 if kind == SHARE else DELTA_MAX
        complain((column < 0) | (column > top), f"{name} is out of 0..{top}")


def write_trace(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write a .csv, .csv.gz or .parquet file, replacing what is there only once the new one is whole. The same trace
    gives the same bytes."""
    name = os.fspath(path)
    if not name.endswith((".csv", ".csv.gz", ".parquet")):
        raise TraceError(f"{name}: name a trace .csv, .csv.gz or .parquet")
    for what, found in (("schema", [trace.schema.name]), ("device", trace.devices), ("label", trace.labels)):
        for text in set(found):
            check_line(text, what)
    if name.endswith(".parquet"):
        with replacing(name) as temporary:
            _write_parquet(trace, temporary)
    else:
        data = _csv_text(trace).encode()
        write_atomic(name, gzip.compress(data, 6, mtime=0) if name.endswith(".gz") else data)


def _csv_text(trace: Trace) -> str:
    names = trace.device_names
    with_device = len(names) > 1 or any(letter.isspace() for letter in "".join(names))
    out = io.StringIO()
    for line in header_lines(trace.schema, trace.window_ms, names[0] if len(names) == 1 else "", trace.notes):
        out.write(line + "\n")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*FIXED_COLUMNS, *(["device"] if with_device else []), *[c[0] for c in trace.schema.columns]])
    for i, row in enumerate(trace.deltas.tolist()):
        device = [trace.devices[i]] if with_device else []
        writer.writerow([f"{trace.t_s[i]:.3f}", int(trace.elapsed_ms[i]), trace.labels[i], *device, *row])
    return out.getvalue()


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise TraceError(f"Parquet needs pyarrow ({error}), or use .csv.gz: {install_command('parquet')}") from None
    return pyarrow, pyarrow.parquet


def _write_parquet(trace: Trace, path: str) -> None:
    pa, pq = _pyarrow()
    columns: dict[str, Any] = {
        "t_s": trace.t_s,
        "elapsed_ms": trace.elapsed_ms,
        "label": trace.labels.tolist(),
        "device": trace.devices.tolist(),
    }
    for i, column in enumerate(trace.schema.columns):
        columns[column[0]] = trace.deltas[:, i]
    facts = {
        "schema": trace.schema.name,
        "id": trace.schema.id.hex(),
        "window_ms": str(trace.window_ms),
        "columns": json.dumps([list(column) for column in trace.schema.columns]),
        "notes": json.dumps(trace.notes),
    }
    table = pa.table(columns).replace_schema_metadata({f"stonechat.{key}": value for key, value in facts.items()})
    pq.write_table(table, path)


def _read_parquet(path: str) -> Trace:
    pa, pq = _pyarrow()
    try:
        table = pq.read_table(path)
    except pa.ArrowException as error:
        raise TraceError(f"{path}: not a sound Parquet file: {error}") from None
    facts = {
        key.decode().partition(".")[2]: value.decode()
        for key, value in (table.schema.metadata or {}).items()
        if key.startswith(b"stonechat.")
    }
    if not {"schema", "id", "window_ms", "columns"} <= facts.keys():
        raise TraceError(f"{path}: a Parquet file, but not a stonechat trace (its metadata lacks stonechat.schema ...)")
    check_window(facts["window_ms"], path)
    try:
        columns, notes = json.loads(facts["columns"]), json.loads(facts.get("notes", "{}"))
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{path}: its metadata are not JSON: {reason(error)}") from None
    if not isinstance(columns, list) or not isinstance(notes, dict):
        raise TraceError(f"{path}: its metadata hold no list of columns, or no notes")
    schema = _schema_of(facts, columns, path)
    expected = [*FIXED_COLUMNS, "device", *[column[0] for column in schema.columns]]
    if table.column_names != expected:
        raise TraceError(f"{path}: columns {_difference(table.column_names, expected)}")
    n = table.num_rows
    trace = Trace(
        schema,
        int(facts["window_ms"]),
        np.asarray(table["t_s"], dtype=np.float64),
        np.asarray(table["elapsed_ms"], dtype=np.int64),
        texts(table["label"].to_pylist()),
        texts(table["device"].to_pylist()),
        np.array([np.asarray(table[c[0]], dtype=np.int64) for c in schema.columns]).T.reshape(n, len(schema)),
        {str(key): str(value) for key, value in notes.items()},
    )
    _validate(trace, path, 1)
    return trace


def read_all(paths: Sequence[str | os.PathLike[str]]) -> Trace:
    """Several files -> one trace. A file without a device's name gets its own name as device, so that splitting by
    device can distinguish them. Raises TraceError also where a window is there twice: it would prove twice as
    much."""
    traces = []
    seen: dict[int, int] = {}
    for number, path in enumerate(paths):
        trace = read_trace(path)
        stem = Path(path).name.split(".")[0]
        trace.devices = texts([device or stem for device in trace.devices])
        _check_new(trace, paths, number, seen)
        traces.append(trace)
    return join(traces)


def _check_new(trace: Trace, paths: Sequence[Any], number: int, seen: dict[int, int]) -> None:
    """trace: of paths[number]; seen: in which of the paths a window was seen first, by its hash. A window is the same
    where its time, its length and all of its counters are. Silent ones are left out, and attacks: several devices may
    be given one."""
    others: list[int] = []
    again = 0
    own: set[int] = set()
    for t_s, elapsed_ms, row, benign in zip(trace.t_s, trace.elapsed_ms, trace.deltas, trace.benign, strict=True):
        if benign and row.any():
            window = hash((t_s, elapsed_ms, row.tobytes()))
            again += window in own
            own.add(window)
            other = seen.setdefault(window, number)
            if other != number:
                others.append(other)
    if others:
        raise TraceError(
            f"{paths[number]}: {len(others)} of its {len(trace)} windows are in {paths[others[0]]} too, and each "
            "counts once: leave out one of the files, or take them one by one"
        )
    if again:
        raise TraceError(f"{paths[number]}: {again} of its {len(trace)} windows are in it twice, and each counts once")
