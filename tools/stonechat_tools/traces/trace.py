"""A trace: what a device recorded, one window a row, as CSV (gzip or not) or Parquet.

    # stonechat trace schema=linux-proc-1 id=0011223344556677 window_ms=2000 device=sensor-1
    # columns [["rx_bytes", "B", "rate"], ...]
    # note interfaces=eth0,lo
    t_s,elapsed_ms,label,rx_bytes,...
    1763824800.0,2001,benign,4120,...

t_s is the Unix time of the window's end; label is `benign` (or empty) or the name of what happened in it; each feature
column holds the window's delta (rate) or reading (level, share), exactly what window.Window left in `deltas`. The
second line makes a file readable without knowing the schema; it may be missing for the schemas that stonechat ships.
A trace of several devices has a column `device` after `label`.
"""

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt
from stonechat.errors import StonechatError
from stonechat.features import LEVEL, RATE, SHARE
from stonechat.schema import Schema
from stonechat.window import DELTA_MAX

BENIGN = "benign"
FIXED_COLUMNS = ("t_s", "elapsed_ms", "label")
KINDS = (RATE, LEVEL, SHARE)
_MAGIC = "# stonechat trace "
_COLUMNS = "# columns "
_NOTE = "# note "

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Texts = npt.NDArray[np.object_]


class TraceError(StonechatError):
    """A trace is malformed; the message begins with FILE:LINE."""


def is_benign(label: str) -> bool:
    return label in ("", BENIGN)


def check_columns(columns: Iterable[Sequence[str]], where: str) -> tuple[tuple[str, str, str], ...]:
    """columns: (name, unit, kind) each -> the same as a tuple of tuples. Raises TraceError for an unknown kind, a name
    that a CSV header can't hold, or one that comes twice."""
    checked: list[tuple[str, str, str]] = []
    for column in columns:
        if len(column) != 3 or not all(isinstance(part, str) for part in column):
            raise TraceError(f"{where}: a column is [name, unit, kind], got {column!r}")
        name, unit, kind = column
        if kind not in KINDS:
            raise TraceError(f"{where}: column {name!r} has kind {kind!r}; one of {', '.join(KINDS)}")
        if not name or any(letter in name for letter in ',"\r\n#') or name in (*FIXED_COLUMNS, "device"):
            raise TraceError(f"{where}: {name!r} can't be a column's name")
        checked.append((name, unit, kind))
    if len({name for name, _, _ in checked}) != len(checked):
        raise TraceError(f"{where}: a column's name comes twice")
    return tuple(checked)


def known_schemas() -> list[Schema]:
    """The schemas that stonechat ships, as far as this installation has them."""
    import importlib

    found: list[Schema] = []
    for module in ("stonechat.linux.schemas", "stonechat.board.schema"):
        try:
            room = importlib.import_module(module)
        except ImportError:
            continue
        found += [value for value in vars(room).values() if isinstance(value, Schema)]
    return found


@dataclass
class Trace:
    """n windows of one schema. All arrays have n rows; deltas is n x len(schema), int64."""

    schema: Schema
    window_ms: int
    t_s: Floats
    elapsed_ms: Ints
    labels: Texts
    devices: Texts
    deltas: Ints
    notes: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.t_s)

    @property
    def benign(self) -> npt.NDArray[np.bool_]:
        """A mask of the windows that carry no attack."""
        return np.array([is_benign(label) for label in self.labels], dtype=bool)

    @property
    def device_names(self) -> list[str]:
        """The devices in the order of their first window."""
        return list(dict.fromkeys(self.devices.tolist()))

    def select(self, rows: Any) -> "Trace":
        """rows: a mask, a slice or indices -> a trace of these windows, in that order."""
        return Trace(
            self.schema,
            self.window_ms,
            self.t_s[rows],
            self.elapsed_ms[rows],
            self.labels[rows],
            self.devices[rows],
            self.deltas[rows],
            dict(self.notes),
        )

    def of_device(self, name: str) -> "Trace":
        return self.select(self.devices == name)


def make_trace(
    schema: Schema,
    window_ms: int,
    rows: Sequence[tuple[float, int, str, Sequence[int]]],
    device: str = "",
    notes: dict[str, str] | None = None,
) -> Trace:
    """rows: (t_s, elapsed_ms, label, deltas) each -> a Trace of one device."""
    n = len(rows)
    return Trace(
        schema,
        window_ms,
        np.array([row[0] for row in rows], dtype=np.float64),
        np.array([row[1] for row in rows], dtype=np.int64),
        _texts([row[2] for row in rows]),
        _texts([device] * n),
        np.array([row[3] for row in rows], dtype=np.int64).reshape(n, len(schema)),
        dict(notes or {}),
    )


def join(traces: Sequence[Trace]) -> Trace:
    """Traces of one schema and window -> one, in the order given. Raises TraceError where they don't fit together."""
    if not traces:
        raise TraceError("nothing to join: give at least one trace")
    first = traces[0]
    for other in traces[1:]:
        if other.schema.id != first.schema.id:
            raise TraceError(
                f"can't join schema {first.schema.name} ({first.schema.id.hex()}) "
                f"with {other.schema.name} ({other.schema.id.hex()})"
            )
        if other.window_ms != first.window_ms:
            raise TraceError(f"can't join windows of {first.window_ms} ms with windows of {other.window_ms} ms")
    notes: dict[str, str] = {}
    for trace in traces:
        for key, value in trace.notes.items():
            if value not in notes.get(key, "").split("; "):
                notes[key] = f"{notes[key]}; {value}" if key in notes else value
    return Trace(
        first.schema,
        first.window_ms,
        np.concatenate([trace.t_s for trace in traces]),
        np.concatenate([trace.elapsed_ms for trace in traces]),
        np.concatenate([trace.labels for trace in traces]),
        np.concatenate([trace.devices for trace in traces]),
        np.concatenate([trace.deltas for trace in traces]),
        notes,
    )


# ------------------------------------------------------------------------------------------------------------ reading


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """The trace in a .csv, .csv.gz or .parquet file. Raises TraceError (FILE:LINE: what is wrong) or OSError.

    A row that a crash cut short at the very end is left out; anything else that does not fit is an error."""
    name = os.fspath(path)
    if name.endswith(".parquet"):
        return _read_parquet(name)
    return _read_csv(name)


def _lines(path: str) -> Iterator[str]:
    # A recorder that was killed leaves a gzip member without its end and perhaps half a line: both are expected.
    with open(path, "rb") as raw:
        file: IO[bytes] = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if path.endswith(".gz") else raw
        try:
            for line in file:
                if not line.endswith(b"\n"):
                    return
                yield line.decode("utf-8")
        except EOFError:
            return
        except (gzip.BadGzipFile, zlib.error) as error:
            raise TraceError(f"{path}: not a sound gzip file: {error}") from None
        except UnicodeDecodeError as error:
            raise TraceError(f"{path}: not UTF-8 text: {error.reason}") from None


def _read_csv(path: str) -> Trace:
    lines = enumerate(_lines(path), 1)
    header: list[str] = []
    names: list[str] | None = None
    for _, line in lines:
        if not line.startswith("#"):
            names = next(csv.reader([line]))
            break
        header.append(line.rstrip("\r\n"))
    facts, columns, notes = _parse_header(header, path)
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
        cells = line.rstrip("\r\n").split(",") if '"' not in line else next(csv.reader([line]))
        if len(cells) != len(expected):
            raise TraceError(f"{path}:{number}: {len(cells)} cells, the header names {len(expected)}")
        try:
            t_s.append(float(cells[0]))
            elapsed_ms.append(int(cells[1]))
            values.append([int(cell) for cell in cells[start:]])
        except ValueError:
            raise TraceError(f"{path}:{number}: {_bad_cell(cells, expected, start)}") from None
        labels.append(cells[2])
        devices.append(cells[3] if has_device else facts.get("device", ""))
    trace = Trace(
        schema,
        int(facts["window_ms"]),
        np.array(t_s, dtype=np.float64),
        np.array(elapsed_ms, dtype=np.int64),
        _texts(labels),
        _texts(devices),
        _int_matrix(values, len(schema), path, len(header) + 2),
        notes,
    )
    _validate(trace, path, len(header) + 2)
    return trace


def _parse_header(header: list[str], path: str) -> tuple[dict[str, str], Any, dict[str, str]]:
    if not header or not header[0].startswith(_MAGIC):
        raise TraceError(f"{path}:1: not a stonechat trace (its first line begins with '{_MAGIC.strip()}')")
    facts = dict(word.partition("=")[::2] for word in header[0][len(_MAGIC) :].split())
    for key in ("schema", "id", "window_ms"):
        if key not in facts:
            raise TraceError(f"{path}:1: the header lacks {key}=")
    if not facts["window_ms"].isdigit() or not 0 < int(facts["window_ms"]) <= 86_400_000:
        raise TraceError(f"{path}:1: window_ms={facts['window_ms']} is not a length from 1 ms to a day")
    columns = None
    notes: dict[str, str] = {}
    for number, line in enumerate(header[1:], 2):
        if line.startswith(_COLUMNS):
            try:
                columns = json.loads(line[len(_COLUMNS) :])
            except ValueError as error:
                raise TraceError(f"{path}:{number}: the columns are not JSON: {error}") from None
            if not isinstance(columns, list):
                raise TraceError(f"{path}:{number}: the columns are not a list")
        elif line.startswith(_NOTE):
            key, _, value = line[len(_NOTE) :].partition("=")
            notes[key] = value
    return facts, columns, notes


def _schema_of(facts: dict[str, str], columns: Any, where: str) -> Schema:
    if columns is not None:
        schema = Schema(facts["schema"], check_columns(columns, where))
        if schema.id.hex() != facts["id"]:
            raise TraceError(f"{where}:1: id={facts['id']}, but the columns in line 2 make {schema.id.hex()}")
        return schema
    for known in known_schemas():
        if known.id.hex() == facts["id"]:
            return known
    raise TraceError(
        f"{where}:1: schema {facts['schema']} (id {facts['id']}) is not one that stonechat ships; "
        f"add the line '{_COLUMNS}[[name, unit, kind], ...]'"
    )


def _difference(names: list[str], expected: list[str]) -> str:
    for i, (got, want) in enumerate(zip(names, expected, strict=False)):
        if got != want:
            return f"differ at column {i + 1}: got {got!r}, want {want!r}"
    return f"differ in number: got {len(names)}, want {len(expected)}"


def _bad_cell(cells: list[str], expected: list[str], start: int) -> str:
    for i, (cell, name) in enumerate(zip(cells, expected, strict=True)):
        if 2 <= i < start:  # label and device are text
            continue
        try:
            _ = float(cell) if i == 0 else int(cell)
        except ValueError:
            return f"{name} is {cell!r}, not {'a number' if i == 0 else 'a whole number'}"
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

    complain(~np.isfinite(trace.t_s), "t_s is not a time")
    complain(trace.elapsed_ms <= 0, "elapsed_ms is not above 0")
    complain(2 * trace.elapsed_ms > 3 * trace.window_ms, "elapsed_ms is more than 1.5 windows: no device scores it")
    for i, (name, _, kind) in enumerate(trace.schema.columns):
        column = trace.deltas[:, i]
        top = 25600 if kind == SHARE else DELTA_MAX
        complain((column < 0) | (column > top), f"{name} is out of 0..{top}")


# ------------------------------------------------------------------------------------------------------------ writing


def header_lines(schema: Schema, window_ms: int, device: str, notes: dict[str, str]) -> list[str]:
    words = f"schema={schema.name} id={schema.id.hex()} window_ms={window_ms}"
    if device and not any(letter.isspace() for letter in device):
        words += f" device={device}"
    lines = [_MAGIC + words, _COLUMNS + json.dumps([list(column) for column in schema.columns])]
    return lines + [f"{_NOTE}{key}={' '.join(value.split())}" for key, value in sorted(notes.items())]


def write_trace(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write a .csv, .csv.gz or .parquet file, replacing what is there only once the new one is whole. The same trace
    gives the same bytes."""
    name = os.fspath(path)
    temporary = name + ".tmp"
    if name.endswith(".parquet"):
        _write_parquet(trace, temporary)
    else:
        data = _csv_text(trace).encode()
        with open(temporary, "wb") as file:
            file.write(gzip.compress(data, 6, mtime=0) if name.endswith(".gz") else data)
    os.replace(temporary, name)


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


class TraceWriter:
    """Writes a recording window by window, so that a crash costs at most the window being written.

    path: .csv or .csv.gz. With resume=True a file that is there is continued (TraceError if it is of another schema,
    window or device), what a crash left incomplete at its end being dropped; otherwise it must not exist."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        schema: Schema,
        window_ms: int,
        device: str = "",
        notes: dict[str, str] | None = None,
        resume: bool = False,
    ) -> None:
        self.path = os.fspath(path)
        if not self.path.endswith((".csv", ".csv.gz")):
            raise TraceError(f"{self.path}: a recording grows window by window: name it .csv or .csv.gz")
        if any(letter.isspace() for letter in device):
            raise TraceError(f"device {device!r}: no white space in a device's name")
        self.windows = 0
        exists = os.path.exists(self.path) and os.path.getsize(self.path) > 0
        if exists and not resume:
            raise TraceError(f"{self.path} exists: --resume continues it, or choose another name")
        if exists:
            self._keep_what_is_whole(schema, window_ms, device)
        self._raw = open(self.path, "ab")  # noqa: SIM115 - it lives as long as the writer
        # A sync flush a window costs some bytes and makes every window that was written readable.
        self._deflate = zlib.compressobj(6, zlib.DEFLATED, 31) if self.path.endswith(".gz") else None
        if not exists:
            lines = header_lines(schema, window_ms, device, notes or {})
            names = [*FIXED_COLUMNS, *[column[0] for column in schema.columns]]
            self._write("\n".join([*lines, ",".join(names)]) + "\n")

    def _keep_what_is_whole(self, schema: Schema, window_ms: int, device: str) -> None:
        earlier = read_trace(self.path)
        if earlier.schema.id != schema.id or earlier.window_ms != window_ms:
            raise TraceError(
                f"{self.path}: holds {earlier.schema.name} in windows of {earlier.window_ms} ms, "
                f"not {schema.name} in windows of {window_ms} ms"
            )
        if len(earlier) and earlier.device_names != [device]:
            raise TraceError(f"{self.path}: recorded on {earlier.device_names}, not on {device!r}")
        self.windows = len(earlier)
        if not len(earlier):
            earlier.devices = _texts([device])[:0]
        write_trace(earlier, self.path)

    def append(self, t_s: float, elapsed_ms: int, label: str, deltas: Sequence[int]) -> None:
        if any(letter in label for letter in ',"\r\n'):
            raise TraceError(f"label {label!r}: no commas, quotes or line ends")
        self._write(f"{t_s:.3f},{elapsed_ms},{label},{','.join(map(str, deltas))}\n")
        self.windows += 1

    def _write(self, text: str) -> None:
        data = text.encode()
        if self._deflate is not None:
            data = self._deflate.compress(data) + self._deflate.flush(zlib.Z_SYNC_FLUSH)
        self._raw.write(data)
        self._raw.flush()

    def close(self) -> None:
        if self._raw.closed:
            return
        if self._deflate is not None:
            self._raw.write(self._deflate.flush(zlib.Z_FINISH))
        self._raw.close()

    def __enter__(self) -> "TraceWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ------------------------------------------------------------------------------------------------------------ Parquet


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise TraceError(f"Parquet needs pyarrow ({error}): pip install 'stonechat[parquet]', or use .csv.gz") from None
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
    schema = _schema_of(facts, json.loads(facts["columns"]), path)
    expected = [*FIXED_COLUMNS, "device", *[column[0] for column in schema.columns]]
    if table.column_names != expected:
        raise TraceError(f"{path}: columns {_difference(table.column_names, expected)}")
    n = table.num_rows
    trace = Trace(
        schema,
        int(facts["window_ms"]),
        np.asarray(table["t_s"], dtype=np.float64),
        np.asarray(table["elapsed_ms"], dtype=np.int64),
        _texts(table["label"].to_pylist()),
        _texts(table["device"].to_pylist()),
        np.array([np.asarray(table[c[0]], dtype=np.int64) for c in schema.columns]).T.reshape(n, len(schema)),
        json.loads(facts.get("notes", "{}")),
    )
    _validate(trace, path, 1)
    return trace


def read_all(paths: Sequence[str | os.PathLike[str]]) -> Trace:
    """Several files -> one trace. A file without a device's name gets its own name as device, so that splitting by
    device can tell them apart."""
    traces = []
    for path in paths:
        trace = read_trace(path)
        stem = Path(path).name.split(".")[0]
        trace.devices = _texts([device or stem for device in trace.devices])
        traces.append(trace)
    return join(traces)


def _texts(values: Sequence[str]) -> Texts:
    out = np.empty(len(values), dtype=object)
    out[:] = values
    return out
