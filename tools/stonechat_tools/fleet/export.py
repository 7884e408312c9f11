"""Write the stored reports into a file that other programs read: CSV, JSON lines, Parquet or SenML (RFC 8428).

One row a report, oldest first, device by device; the database may be in use meanwhile. Parquet needs the extra
`parquet`.

Examples:
  stonechat export -o reports.parquet
  stonechat export --device pump-1 --since 7d -o week.csv
  stonechat export --format jsonl | jq 'select(.level == "alarm")'
  stonechat export --db postgresql:///fleet --format senml -o reports.json
"""

import argparse
import contextlib
import csv
import datetime
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from stonechat.errors import ConfigError

from ..console import counted, printable, replacing
from .command import span_s
from .database import add_database_arguments
from .history import as_json
from .store import URLS, Row, Store

HELP = "write the stored reports as CSV, JSON lines, Parquet or SenML"
FORMATS = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".senml": "senml"}
BATCH_ROWS = 10_000  # of a Parquet row group
FEATURES = 3  # columns for as many; a report has no more
SLICE_S = 86_400  # read at a time
_FORMULA = tuple("=+-@\uff1d\uff0b\uff0d\uff20")  # a formula's first sign


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_database_arguments(parser)
    parser.add_argument("--device", nargs="+", metavar="DEVICE", help="only these (default: all)")
    parser.add_argument("--since", metavar="TIME", help="90s, 30m, 2h or 7d ago (default: everything)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: standard output")
    parser.add_argument(
        "--format", choices=sorted(set(FORMATS.values())), help="default: by the name of the file, else csv"
    )


def run(args: argparse.Namespace) -> int:
    if not args.db.startswith(URLS) and not Path(args.db).exists():
        raise ConfigError(f"{args.db}: no such database; `stonechat collect` makes it")
    name = args.format or FORMATS.get(args.output.suffix if args.output else "", "csv")
    if name == "parquet" and args.output is None:
        raise ConfigError("a Parquet file can't go to standard output: give -o FILE")
    since_s = time.time() - span_s(args.since) if args.since else 0.0
    with Store(args.db) as store:
        known = {device["device"]: device for device in store.devices()}
        for device in args.device or ():
            if device not in known:
                others = f"there are those of {', '.join(known)}" if known else "no device has sent one yet"
                raise ConfigError(f"{device}: no reports; {others}")
        rows = _rows(store, {device: known[device] for device in args.device or known}, since_s)
        if args.output is None:
            count = _WRITERS[name](rows, sys.stdout)
        else:
            with replacing(args.output) as temporary:
                if name == "parquet":
                    count = _parquet(rows, temporary)
                else:
                    with open(temporary, "w", newline="", encoding="utf-8") as file:
                        count = _WRITERS[name](rows, file)
    about = f"{counted(count, 'report')} of {counted(len(args.device or known), 'device')}"
    print(f"{printable(str(args.output or 'standard output'))}: {about}", file=sys.stderr)
    return 0


def _rows(store: Store, devices: dict[str, dict[str, Any]], since_s: float) -> Iterator[tuple[Row, dict[str, Any]]]:
    """(report, its device), a day at a time: a slice is all that is in memory."""
    shows = sys.stderr.isatty()
    for number, (name, device) in enumerate(devices.items(), 1):
        oldest_s, newest_s = store.span(name)
        start_s = max(since_s, oldest_s)
        while start_s <= newest_s:
            if shows:
                day = time.strftime("%Y-%m-%d", time.gmtime(start_s))
                print(f"\r{number} of {len(devices)}: {name} {day}\x1b[K", end="", file=sys.stderr)
            for row in store.history(name, since_s=start_s, until_s=start_s + SLICE_S - 1, limit=1 << 31):
                yield row, device
            start_s += SLICE_S
    if shows:
        print("\r\x1b[K", end="", file=sys.stderr)


def flat(row: Row, device: dict[str, Any]) -> dict[str, Any]:
    """A report as one row of columns: the three features in columns of their own."""
    values = as_json(row, device)
    features = values.pop("features")
    values["time"] = datetime.datetime.fromtimestamp(row.time_s, datetime.UTC).isoformat(timespec="seconds")
    values["flags"] = " ".join(values["flags"])
    for i in range(FEATURES):
        feature = features[i] if i < len(features) else {}
        values[f"feature_{i + 1}"] = feature.get("name")
        values[f"deviation_{i + 1}"] = feature.get("deviation")
        values[f"share_percent_{i + 1}"] = feature.get("share_percent")
    return values


def _csv(rows: Iterator[tuple[Row, dict[str, Any]]], file: IO[str]) -> int:
    count = 0
    writer = None
    for row, device in rows:
        values = flat(row, device)
        if writer is None:
            writer = csv.DictWriter(file, list(values), lineterminator="\n")
            writer.writeheader()
        writer.writerow({name: _safe(value) for name, value in values.items()})
        count += 1
    return count


def _safe(value: Any) -> Any:
    """A text that a spreadsheet would take for a formula gets an apostrophe: names and details come from devices. Some
    pass over spaces, and take the wide signs of East Asia for the narrow ones."""
    return "'" + value if isinstance(value, str) and value.lstrip()[:1] in _FORMULA else value


def _jsonl(rows: Iterator[tuple[Row, dict[str, Any]]], file: IO[str]) -> int:
    count = 0
    for row, device in rows:
        file.write(json.dumps(as_json(row, device)) + "\n")
        count += 1
    return count


def _senml(rows: Iterator[tuple[Row, dict[str, Any]]], file: IO[str]) -> int:
    """One pack: for each report a base name (urn:dev:ops:DEVICE:, RFC 9039), a base time and its values."""
    count = 0
    file.write("[")
    for row, _ in rows:
        values: list[tuple[str, float]] = [("level", row.level), ("windows", row.windows)]
        numbers = (("score", row.score), ("surprise", row.surprise), ("evidence", row.evidence))
        values += [(name, value) for name, value in numbers if value is not None]
        records: list[dict[str, Any]] = [{"n": name, "v": value} for name, value in values]
        records[0] = {"bn": f"urn:dev:ops:{row.device}:", "bt": row.time_s, **records[0]}
        for record in records:
            file.write((",\n" if count or record is not records[0] else "\n") + json.dumps(record))
        count += 1
    file.write("\n]\n")
    return count


def _parquet(rows: Iterator[tuple[Row, dict[str, Any]]], path: str) -> int:
    import pyarrow as pa
    from pyarrow import parquet

    kinds = {"text": pa.string(), "number": pa.float64(), "count": pa.int64(), "flag": pa.bool_()}
    texts = ("device", "time", "level", "flags", "channel", "detail", "stream")
    counts = ("sequence", "variant", "boot", "windows", "late_s", "lost")
    count = 0
    writer: Any = None
    batch: list[dict[str, Any]] = []

    def write() -> None:
        writer.write_table(pa.Table.from_pylist(batch, schema=writer.schema))
        batch.clear()

    def kind(name: str) -> Any:
        if name in texts or name.startswith("feature_"):
            return kinds["text"]
        if name == "time_known":
            return kinds["flag"]
        return kinds["count"] if name in counts or name.startswith("share_") else kinds["number"]

    with contextlib.ExitStack() as stack:
        for row, device in rows:
            values = flat(row, device)
            if writer is None:
                schema = pa.schema([(name, kind(name)) for name in values])
                writer = stack.enter_context(parquet.ParquetWriter(path, schema))
            batch.append(values)
            count += 1
            if len(batch) == BATCH_ROWS:
                write()
        if writer is None:
            raise ConfigError("no reports: a Parquet file without rows has no columns either")
        write()
    return count


_WRITERS: dict[str, Callable[[Iterator[tuple[Row, dict[str, Any]]], IO[str]], int]] = {
    "csv": _csv,
    "jsonl": _jsonl,
    "senml": _senml,
}
