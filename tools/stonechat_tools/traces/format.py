"""The format of a trace, and the writer of a growing one, with the standard library only.

A trace is what a device recorded, one window a row, as CSV (gzip or not) or Parquet.

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

import contextlib
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import IO, Any, cast

from stonechat.errors import StonechatError
from stonechat.features import LEVEL, RATE, SHARE
from stonechat.schema import Schema

from ..console import clipped, reason, write_atomic

BENIGN = "benign"
FIXED_COLUMNS = ("t_s", "elapsed_ms", "label")
KINDS = (RATE, LEVEL, SHARE)
MAGIC = "# stonechat trace "
COLUMNS = "# columns "
NOTE = "# note "
_MAX_LINE_BYTES = 1 << 20
FIRST_S, LAST_S = -62_135_596_800, 253_402_300_799  # the years 1 and 9999
# a number from so much on is a time since 1970 in this unit: milliseconds from 1973 on, seconds until the year 5138
_UNITS = ((1e17, 1e-9), (1e14, 1e-6), (1e11, 1e-3))


class TraceError(StonechatError):
    """A trace is malformed; the message begins with FILE:LINE."""


def is_benign(label: str) -> bool:
    return label in ("", BENIGN)


def check_label(label: str) -> None:
    """Raises TraceError for a label or a name that a line of the file can't hold."""
    if any(letter in label for letter in ',"\r\n\0') or not label.isprintable():
        raise TraceError(f"label {clipped(label)}: no commas, quotes or what is not printable")


def plain_label(text: str) -> str:
    """A label as somebody's capture has it -> one that a line of the file can hold."""
    text = text.replace(",", ";").replace('"', "")
    return "".join(letter if letter.isprintable() else " " for letter in text).strip()


def check_line(text: str, what: str) -> None:
    """Raises TraceError for a text with which no line of the file could be read again."""
    if not text.isprintable():
        raise TraceError(f"{what} {clipped(text)}: no line breaks, only what is printable")


def check_columns(columns: Iterable[Sequence[str]], where: str) -> tuple[tuple[str, str, str], ...]:
    """columns: (name, unit, kind) each -> the same as a tuple of tuples. Raises TraceError for an unknown kind, a name
    that a CSV header can't hold, or one that comes twice."""
    checked: list[tuple[str, str, str]] = []
    for column in columns:
        if (
            not isinstance(column, list | tuple)
            or len(column) != 3
            or not all(isinstance(part, str) for part in column)
        ):
            raise TraceError(f"{where}: a column is [name, unit, kind], got {clipped(column)}")
        name, unit, kind = column
        if kind not in KINDS:
            raise TraceError(f"{where}: column {clipped(name)} has kind {clipped(kind)}; one of {', '.join(KINDS)}")
        if not name or any(letter in name for letter in ',"\r\n\0#') or name in (*FIXED_COLUMNS, "device"):
            raise TraceError(f"{where}: {clipped(name)} can't be a column's name")
        checked.append((name, unit, kind))
    if len({name for name, _, _ in checked}) != len(checked):
        raise TraceError(f"{where}: a column's name comes twice")
    return tuple(checked)


def header_lines(schema: Schema, window_ms: int, device: str, notes: dict[str, str]) -> list[str]:
    words = f"schema={schema.name} id={schema.id.hex()} window_ms={window_ms}"
    if device and not any(letter.isspace() for letter in device):
        words += f" device={device}"
    lines = [MAGIC + words, COLUMNS + json.dumps([list(column) for column in schema.columns])]
    return lines + [f"{NOTE}{key}={' '.join(value.split())}" for key, value in sorted(notes.items())]


@contextlib.contextmanager
def opened(path: str) -> Iterator[IO[bytes]]:
    """A file to read, unpacked where it is gzip, whatever its name. Raises TraceError where the gzip data are damaged,
    also while the file is read, or OSError."""
    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            yield cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if packed else raw
    except EOFError:
        raise TraceError(f"{path}: the gzip data end too early; the file was cut short") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise TraceError(f"{path}: not a sound gzip file: {reason(error)}") from None


@contextlib.contextmanager
def opened_text(path: str) -> Iterator[Iterator[str]]:
    """The lines of a UTF-8 text without its byte-order mark, their ends as they are. Raises TraceError as opened() does
    and for a line longer than any that counters or flows make."""
    with opened(path) as file:
        try:
            yield _bounded_lines(file, path)
        except UnicodeDecodeError as error:
            raise TraceError(f"{path}: {reason(error)}") from None


def _bounded_lines(file: IO[bytes], path: str) -> Iterator[str]:
    encoding = "utf-8-sig"
    while line := file.readline(_MAX_LINE_BYTES):
        if len(line) == _MAX_LINE_BYTES:
            raise TraceError(f"{path}: a line of more than {_MAX_LINE_BYTES} bytes; is it the right file?")
        yield line.decode(encoding)
        encoding = "utf-8"


def parse_moment(text: str, unit_s: float | None = None) -> float:
    """A number, or ISO 8601 (UTC where it names no zone) -> Unix seconds. unit_s: what a number counts in; None: by its
    size seconds, milliseconds, microseconds or nanoseconds. Raises TraceError, also for what is no time of a year
    from 1 to 9999."""
    try:
        number = float(text)
    except ValueError:
        try:
            moment = datetime.fromisoformat(text.strip())
        except ValueError:
            raise TraceError(f"{clipped(text)} is neither a number of seconds nor an ISO 8601 time") from None
        seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        if not FIRST_S <= seconds <= LAST_S:  # by its zone
            raise TraceError(f"{clipped(text)} is not a time of the years 1 to 9999 in UTC") from None
        return seconds
    if unit_s is None:
        unit_s = next((unit for least, unit in _UNITS if abs(number) >= least), 1.0)
    if not FIRST_S <= number * unit_s <= LAST_S:
        raise TraceError(f"{clipped(text)} is not a time before the year 10000; is its unit right?")
    return number * unit_s


def whole_lines(path: str) -> Iterator[str]:
    """The lines of a .csv or .csv.gz without one that was cut short. Raises TraceError or OSError."""
    # A recorder that was killed leaves a gzip member without its end and perhaps half a line: both are expected.
    with open(path, "rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        file: IO[bytes] = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if packed else raw
        mark = True
        try:
            while line := file.readline(_MAX_LINE_BYTES):
                if not line.endswith(b"\n"):
                    if len(line) == _MAX_LINE_BYTES:
                        raise TraceError(f"{path}: a line of more than {_MAX_LINE_BYTES} bytes; not a trace")
                    return
                yield line.decode("utf-8-sig" if mark else "utf-8")
                mark = False
        except EOFError:
            return
        except (gzip.BadGzipFile, zlib.error) as error:
            raise TraceError(f"{path}: not a sound gzip file: {reason(error)}") from None
        except UnicodeDecodeError as error:
            raise TraceError(f"{path}: not a trace: {reason(error)}") from None


def parse_header(header: list[str], path: str) -> tuple[dict[str, str], Any, dict[str, str]]:
    """The lines that begin with # -> (the first line's words, the columns or None, the notes). Raises TraceError."""
    if not header or not header[0].startswith(MAGIC):
        raise TraceError(f"{path}:1: not a stonechat trace (its first line begins with '{MAGIC.strip()}')")
    facts = dict(word.partition("=")[::2] for word in header[0][len(MAGIC) :].split())
    for key in ("schema", "id", "window_ms"):
        if key not in facts:
            raise TraceError(f"{path}:1: the header lacks {key}=")
    check_window(facts["window_ms"], f"{path}:1")
    columns = None
    notes: dict[str, str] = {}
    for number, line in enumerate(header[1:], 2):
        if line.startswith(COLUMNS):
            try:
                columns = json.loads(line[len(COLUMNS) :])
            except (ValueError, RecursionError) as error:
                raise TraceError(f"{path}:{number}: the columns are not JSON: {reason(error)}") from None
            if not isinstance(columns, list):
                raise TraceError(f"{path}:{number}: the columns are not a list")
        elif line.startswith(NOTE):
            key, _, value = line[len(NOTE) :].partition("=")
            notes[key] = value
    return facts, columns, notes


def check_window(text: str, where: str) -> int:
    """window_ms as a file has it -> the number. Raises TraceError."""
    if not (text.isascii() and text.isdigit() and len(text) <= 8 and 0 < int(text) <= 86_400_000):
        raise TraceError(f"{where}: window_ms={clipped(text)} is not a length from 1 ms to a day")
    return int(text)


def resume_file(path: str | os.PathLike[str], schema: Schema, window_ms: int, device: str = "") -> int:
    """Prepare a recording to be continued: drop what a crash left incomplete at its end -> how many windows it holds,
    0 where there is no file. Raises TraceError where it is of another schema, window or device, or damaged."""
    name = os.fspath(path)
    if not os.path.exists(name) or not os.path.getsize(name):
        return 0
    lines = list(whole_lines(name))
    header = [line.rstrip("\r\n") for line in lines if line.startswith("#")]
    facts = parse_header(header, name)[0]
    if facts["id"] != schema.id.hex() or int(facts["window_ms"]) != window_ms:
        raise TraceError(
            f"{name}: holds {facts['schema']} in windows of {facts['window_ms']} ms, "
            f"not {schema.name} in windows of {window_ms} ms"
        )
    names = [*FIXED_COLUMNS, *[column[0] for column in schema.columns]]
    rows = lines[len(header) :]
    for number, row in enumerate(rows, len(header) + 1):
        if row.count(",") != len(names) - 1:
            raise TraceError(f"{name}:{number}: {row.count(',') + 1} cells, want {len(names)}")
    if len(rows) > 1 and facts.get("device", "") != device:
        raise TraceError(f"{name}: recorded on {facts.get('device', '')!r}, not on {device!r}")
    if not rows:
        os.unlink(name)  # it was cut short within the header
        return 0
    data = "".join(lines).encode()
    write_atomic(name, gzip.compress(data, 6, mtime=0) if name.endswith(".gz") else data)
    return len(rows) - 1


class TraceWriter:
    """Writes a recording window by window, so that a crash costs at most the window being written.

    path: .csv or .csv.gz. With resume=True a file that is there is continued (see resume_file), else it must not exist.
    Raises TraceError or OSError."""

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
        if any(letter.isspace() for letter in device) or not device.isprintable():
            raise TraceError(f"device {clipped(device)}: no white space in a device's name, and only what is printable")
        if not resume and os.path.exists(self.path) and os.path.getsize(self.path):
            raise TraceError(f"{self.path} exists: --resume continues it, or choose another name")
        self.windows = resume_file(self.path, schema, window_ms, device) if resume else 0
        exists = os.path.exists(self.path) and os.path.getsize(self.path) > 0
        self._raw = open(self.path, "ab")  # noqa: SIM115 - it lives as long as the writer
        # A sync flush a window costs some bytes and makes every window that was written readable.
        self._deflate = zlib.compressobj(6, zlib.DEFLATED, 31) if self.path.endswith(".gz") else None
        if not exists:
            lines = header_lines(schema, window_ms, device, notes or {})
            names = [*FIXED_COLUMNS, *[column[0] for column in schema.columns]]
            self._write("\n".join([*lines, ",".join(names)]) + "\n")

    def append(self, t_s: float, elapsed_ms: int, label: str, deltas: Sequence[int]) -> None:
        check_label(label)
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
