"""Traces: what is written is read again, and what does not fit is named with file and line."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from stonechat.features import LEVEL, RATE, SHARE
from stonechat.schema import Schema
from stonechat_tools.traces.files import read_all, read_trace, write_trace
from stonechat_tools.traces.format import BENIGN, TraceError, TraceWriter
from stonechat_tools.traces.trace import Trace, join, make_trace

SCHEMA = Schema("test-1", (("bytes", "B", RATE), ("sockets", "1", LEVEL), ("busy", "%", SHARE)))
ROWS = [(100.0, 1000, BENIGN, [5, 2, 256]), (101.25, 1010, "scan", [1 << 29, 0, 25600]), (102.5, 990, "", [0, 0, 0])]


def same(a: Trace, b: Trace) -> bool:
    return (
        a.schema.id == b.schema.id
        and a.window_ms == b.window_ms
        and np.array_equal(a.t_s, b.t_s)
        and np.array_equal(a.elapsed_ms, b.elapsed_ms)
        and a.labels.tolist() == b.labels.tolist()
        and a.devices.tolist() == b.devices.tolist()
        and np.array_equal(a.deltas, b.deltas)
        and a.notes == b.notes
    )


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.parquet"])
def test_round_trip(tmp_path: Path, name: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    one = make_trace(SCHEMA, 1000, ROWS, "pump-1", {"source": "a test"})
    path = tmp_path / name
    write_trace(one, path)
    assert same(read_trace(path), one)
    first = path.read_bytes()
    write_trace(one, path)
    assert path.read_bytes() == first
    two = join([one, make_trace(SCHEMA, 1000, ROWS[:1], "pump 2")])
    write_trace(two, path)
    assert same(read_trace(path), two)
    assert read_trace(path).benign.tolist() == [True, False, True, True]


def test_contracted_header(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    write_trace(make_trace(SCHEMA, 1000, ROWS), path)
    lines = path.read_text().splitlines()
    assert lines[0] == f"# stonechat trace schema=test-1 id={SCHEMA.id.hex()} window_ms=1000"
    assert lines[2] == "t_s,elapsed_ms,label,bytes,sockets,busy"
    assert lines[3] == "100.000,1000,benign,5,2,256"


GOOD = f"""# stonechat trace schema=test-1 id={SCHEMA.id.hex()} window_ms=1000
# columns [["bytes", "B", "rate"], ["sockets", "1", "level"], ["busy", "%", "share"]]
t_s,elapsed_ms,label,bytes,sockets,busy
100.0,1000,benign,5,2,256
"""


@pytest.mark.parametrize(
    ("old", "new", "place", "word"),
    [
        ("# stonechat trace", "# something", ":1:", "not a stonechat trace"),
        ("window_ms=1000", "", ":1:", "window_ms="),
        ("window_ms=1000", "window_ms=-5", ":1:", "window_ms='-5'"),
        (f"id={SCHEMA.id.hex()}", "id=00", ":1:", SCHEMA.id.hex()),
        ('"rate"', '"gauge"', "t.csv", "gauge"),
        ('["bytes"', '["by,tes"', "t.csv", "by,tes"),
        ("[[", "[", ":2:", "not JSON"),
        ("label,bytes", "label,octets", ":3:", "column 4"),
        ("5,2,256", "5,2", ":4:", "5 cells"),
        ("5,2,256", "5,two,256", ":4:", "sockets is 'two'"),
        ("5,2,256", "5.5,2,256", ":4:", "bytes is '5.5'"),
        ("5,2,256", "-5,2,256", ":4:", "bytes is out of"),
        ("5,2,256", "5,2,25601", ":4:", "busy is out of 0..25600"),
        ("5,2,256", "99999999999999999999,2,256", ":4:", "64 bits"),
        ("100.0,1000", "nan,1000", ":4:", "t_s"),
        ("100.0,1000", "100.0,0", ":4:", "elapsed_ms"),
        ("100.0,1000", "100.0,1501", ":4:", "1.5 windows"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, old: str, new: str, place: str, word: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(GOOD)
    assert len(read_trace(path)) == 1
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert place in str(caught.value) and word in str(caught.value)


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    for name, data, word in (
        ("a.csv", b"", ":1:"),
        ("b.csv", b"\xff\xfe\n", "UTF-8"),
        ("c.csv.gz", b"\x1f\x8bnot gzip\n", "gzip"),
        ("d.csv", GOOD.encode().splitlines(True)[0], "names is missing"),
        ("e.parquet", b"PAR1", "Parquet"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(TraceError, match=word):
            read_trace(tmp_path / name)


def test_unknown_schema_without_columns(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("".join(line for line in GOOD.splitlines(True) if "columns" not in line))
    with pytest.raises(TraceError, match="not one that stonechat ships"):
        read_trace(path)


@pytest.mark.parametrize("name", ["r.csv", "r.csv.gz"])
def test_a_recording_survives_a_crash(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    writer = TraceWriter(path, SCHEMA, 1000, "pump-1", {"source": "a test"})
    for row in ROWS:
        writer.append(*row)
    # Nothing is closed: this is what a power cut leaves, and then half a window more.
    crashed = path.read_bytes()
    assert len(read_trace(path)) == 3
    del writer
    path.write_bytes(crashed + b"103.0,10" if name == "r.csv" else crashed[:-12])
    survivors = len(read_trace(path))
    assert survivors == (3 if name == "r.csv" else 2)
    with pytest.raises(TraceError, match="--resume"):
        TraceWriter(path, SCHEMA, 1000, "pump-1")
    with pytest.raises(TraceError, match="windows of 2000 ms"):
        TraceWriter(path, SCHEMA, 2000, "pump-1", resume=True)
    with pytest.raises(TraceError, match="pump-1"):
        TraceWriter(path, SCHEMA, 1000, "pump-2", resume=True)
    with TraceWriter(path, SCHEMA, 1000, "pump-1", resume=True) as again:
        assert again.windows == survivors
        again.append(*ROWS[0])
    whole = read_trace(path)
    assert len(whole) == survivors + 1
    assert whole.notes == {"source": "a test"} and whole.device_names == ["pump-1"]
    with TraceWriter(path, SCHEMA, 1000, "pump-1", resume=True) as again:
        again.append(*ROWS[0])
    assert len(read_trace(path)) == survivors + 2


def test_writer_refuses_what_no_reader_could_read(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="csv"):
        TraceWriter(tmp_path / "r.parquet", SCHEMA, 1000)
    with pytest.raises(TraceError, match="white space"):
        TraceWriter(tmp_path / "r.csv", SCHEMA, 1000, "pump 1")
    with TraceWriter(tmp_path / "r.csv", SCHEMA, 1000) as writer, pytest.raises(TraceError, match="label"):
        writer.append(1.0, 1000, "a,b", [1, 2, 3])


def test_join_refuses_what_does_not_fit() -> None:
    one = make_trace(SCHEMA, 1000, ROWS)
    with pytest.raises(TraceError, match="2000 ms"):
        join([one, make_trace(SCHEMA, 2000, ROWS)])
    other = Schema("other", SCHEMA.columns[:2])
    with pytest.raises(TraceError, match="other"):
        join([one, make_trace(other, 1000, [(1.0, 1000, "", [1, 2])])])
    with pytest.raises(TraceError, match="at least one"):
        join([])


def test_read_all_names_devices_after_their_files(tmp_path: Path) -> None:
    write_trace(make_trace(SCHEMA, 1000, ROWS), tmp_path / "kitchen.csv.gz")
    later = [(t_s + 60, *rest) for t_s, *rest in ROWS]
    write_trace(make_trace(SCHEMA, 1000, later, "lamp"), tmp_path / "b.csv")
    both = read_all([tmp_path / "kitchen.csv.gz", tmp_path / "b.csv"])
    assert both.device_names == ["kitchen", "lamp"]
    assert len(both.of_device("lamp")) == 3


def test_gzip_member_by_member(tmp_path: Path) -> None:
    data = GOOD.encode()
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(data[:200]) + gzip.compress(data[200:]))
    assert len(read_trace(tmp_path / "t.csv.gz")) == 1


def test_a_window_that_is_in_two_files_is_named(tmp_path: Path) -> None:
    """A recording given twice, under another name or cut short, would prove twice as much."""
    trace = make_trace(SCHEMA, 1000, [(100.0 + n, 1000, BENIGN, [n, 2, 256]) for n in range(40)])
    write_trace(trace, tmp_path / "a.csv")
    write_trace(trace, tmp_path / "copy.csv.gz")
    write_trace(trace.select(slice(10, 30)), tmp_path / "part.parquet")
    for other, number in (("copy.csv.gz", 40), ("part.parquet", 20), ("a.csv", 40)):
        with pytest.raises(TraceError, match=rf"{other}: {number} of its {number} windows are in \S+a.csv too"):
            read_all([tmp_path / "a.csv", tmp_path / other])
    write_trace(join([trace, trace.select(slice(0, 5))]), tmp_path / "twice.csv")
    with pytest.raises(TraceError, match=r"twice.csv: 5 of its 45 windows are in it twice"):
        read_all([tmp_path / "twice.csv"])
    write_trace(trace.select(slice(0, 20)), tmp_path / "first.csv")
    write_trace(trace.select(slice(20, 40)), tmp_path / "second.csv")
    assert len(read_all([tmp_path / "first.csv", tmp_path / "second.csv"])) == 40
