"""Joining, labelling, splitting: by device and time, never by row."""

import json
from pathlib import Path

import numpy as np
import pytest
from stonechat.features import RATE
from stonechat.schema import Schema
from stonechat_tools.cli import main
from stonechat_tools.traces.dataset import append, label_windows, overlay, parse_moment, split
from stonechat_tools.traces.files import read_trace, write_trace
from stonechat_tools.traces.format import TraceError
from stonechat_tools.traces.trace import Trace, join, make_trace

SCHEMA = Schema("test-1", (("bytes", "B", RATE),))


def days(device: str, n: int = 100, start_s: float = 0.0, label: str = "benign") -> Trace:
    rows = [(start_s + 10.0 * (i + 1), 10_000, label, [i]) for i in range(n)]
    return make_trace(SCHEMA, 10_000, rows, device)


def test_split_goes_by_device_and_time() -> None:
    shuffled = join([days("a"), days("b", 50, 1e6)])
    shuffled = shuffled.select(np.random.default_rng(1).permutation(len(shuffled)))
    parts = split(shuffled, {"train": 0.6, "threshold": 0.2, "test": 0.2})
    assert [len(part) for part in parts.values()] == [90, 30, 30]
    for device in ("a", "b"):
        train, threshold, test = (part.of_device(device) for part in parts.values())
        assert train.t_s.max() < threshold.t_s.min() and threshold.t_s.max() < test.t_s.min()
        assert (np.diff(train.t_s) > 0).all()
    held = split(shuffled, {"train": 0.5, "test": 0.5}, ["b"])
    assert held["held-out"].device_names == ["b"] and held["train"].device_names == ["a"]
    assert sum(len(part) for part in held.values()) == len(shuffled)
    with pytest.raises(TraceError, match="a, b"):
        split(join([days("a"), days("b")]), {"all": 1.0}, ["c"])
    with pytest.raises(TraceError, match="empty"):
        split(days("a", 1), {"train": 0.5, "test": 0.5})


def test_labels_cover_every_window_that_overlaps() -> None:
    trace = days("a", 10)
    label_windows(trace, [(25.0, 40.0, "scan"), (40.0, 41.0, "flood")])
    assert trace.labels.tolist() == ["benign"] * 2 + ["scan"] * 2 + ["flood"] + ["benign"] * 5
    label_windows(trace, [(-1e9, 1e9, "all")], device="b")
    assert "all" not in trace.labels
    with pytest.raises(TraceError):
        label_windows(trace, [(0.0, 1.0, "a,b")])


def test_append_goes_on_at_once() -> None:
    stream = append(days("a"), days("elsewhere", 5, 5e5, "scan"), 40)
    assert len(stream) == 45 and stream.device_names == ["a"]
    assert np.allclose(np.diff(stream.t_s), 10.0)
    assert stream.labels.tolist() == ["benign"] * 40 + ["scan"] * 5
    with pytest.raises(TraceError, match="100 windows"):
        append(days("a"), days("b"), 101)
    with pytest.raises(TraceError, match="not benign"):
        append(days("a", label="scan"), days("b"))


def test_moments() -> None:
    assert parse_moment("12.5") == 12.5
    assert parse_moment("1970-01-01T00:01:00") == 60.0
    assert parse_moment("1970-01-01T01:01:00+01:00") == 60.0
    with pytest.raises(TraceError, match="yesterday"):
        parse_moment("yesterday")


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, week = (str(tmp_path / name) for name in ("a.csv", "b.csv.gz", "week.csv.gz"))
    write_trace(days("lamp"), a)
    write_trace(days("door", start_s=2000.0), b)
    assert main(["dataset", "join", a, b, "-o", week, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"] == {"lamp": 100, "door": 100}
    (tmp_path / "attacks.csv").write_text("start,end,label\n1970-01-01T00:00:00,95,scan\n")
    labelled = str(tmp_path / "labelled.csv")
    assert main(["dataset", "label", week, "-o", labelled, "--intervals", str(tmp_path / "attacks.csv"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["labels"] == {"scan": 10, "benign": 190}
    assert main(["dataset", "split", week, "-o", str(tmp_path / "parts"), "--fractions", "train=0.75,test=0.25"]) == 0
    assert len(read_trace(tmp_path / "parts" / "train.csv.gz")) == 150
    assert main(["dataset", "append", week, a, "-o", str(tmp_path / "s.csv"), "--after", "7"]) == 0
    assert len(read_trace(tmp_path / "s.csv")) == 107
    capsys.readouterr()
    assert main(["dataset", "info", a, "--json"]) == 0
    (info,) = json.loads(capsys.readouterr().out)
    assert info["features"][0]["q05_median_q95"] == [5, 50, 94] and info["hours"] == 0.278
    assert main(["dataset", "info", a]) == 0 and "bytes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["split", "A", "-o", "X", "--fractions", "train=0.5"], "add up to 1"),
        (["split", "A", "-o", "X", "--fractions", "train"], "NAME=SHARE"),
        (["label", "A", "-o", "X"], "--intervals"),
        (["label", "A", "-o", "X", "--intervals", "A"], "start, end, label"),
        (["join", "A", "MISSING", "-o", "X"], "No such file"),
        (["import", "--format", "csv", "A", "-o", "X"], "--time"),
        (["import", "--format", "csv", "A", "-o", "X", "--time", "t_s", "--window", "0"], "--window"),
    ],
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    write_trace(days("a"), tmp_path / "a.csv")
    files = {"A": str(tmp_path / "a.csv"), "MISSING": str(tmp_path / "no.csv"), "X": str(tmp_path / "x.csv")}
    assert main(["dataset", *[files.get(word, word) for word in words]]) == 1
    message = capsys.readouterr().err
    assert said in message and "Traceback" not in message


def test_an_overlay_adds_counts_and_keeps_the_higher_reading() -> None:
    schema = Schema("overlay-1", (("n", "1", "rate"), ("free", "B", "level"), ("busy", "%", "share")))
    base = make_trace(schema, 1000, [(float(i), 1000, "benign", [10, 500, 2560]) for i in range(5)], "d")
    attack = make_trace(schema, 1000, [(float(i), 1000, "scan", [7, 900, 25600]) for i in range(2)], "e")
    both = overlay(base, attack, 1)
    assert both.deltas.tolist() == [[10, 500, 2560], *[[17, 900, 25600]] * 2, *[[10, 500, 2560]] * 2]
    assert both.labels.tolist() == ["benign", "scan", "scan", "benign", "benign"] and both.device_names == ["d"]
    assert base.deltas.tolist() == [[10, 500, 2560]] * 5 and overlay(base, attack, 4).labels.tolist()[4] == "scan"
    assert overlay(base, base.select(slice(0, 2)), 0, "mirai").labels.tolist()[:3] == ["mirai", "mirai", "benign"]
    for after in (-1, 5):
        with pytest.raises(TraceError, match="--after"):
            overlay(base, attack, after)


def test_no_file_that_is_read_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, link = (str(tmp_path / name) for name in ("a.csv", "train.csv.gz", "link.csv"))
    write_trace(days("a", 400), a)
    write_trace(days("b", 30, 1e6), b)
    (tmp_path / "link.csv").symlink_to(a)
    raw = tmp_path / "raw.csv"
    raw.write_text("time,count\n1,1\n2,2\n3,3\n")
    model = str(Path(__file__).parents[2] / "models/linux-1/model.tflite")
    kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for words in (
        ["dataset", "import", str(raw), "--format", "csv", "--time", "time", "-o", str(raw)],
        ["dataset", "join", a, b, "-o", link],
        ["dataset", "label", a, "--label", "x", "-o", a],
        ["dataset", "append", a, b, "-o", b],
        ["dataset", "overlay", a, b, "-o", a],
        ["dataset", "split", a, b, "-o", str(tmp_path)],
        ["calibrate", model, a, "-o", a],
        ["quantize", str(tmp_path / "w.npz"), a, "-o", link],
        ["evaluate", model, a, "--json", a],
        ["evaluate", model, a, "--personalize", "9", "--json", a],
    ):
        assert main(words) == 1, words
        assert "is one of the files to read, and would be lost" in capsys.readouterr().err, words
        assert kept == {path: path.read_bytes() for path in tmp_path.iterdir()}, words


def test_a_share_is_shown_in_percent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schema = Schema("mixed", (("busy", "%", "share"), ("reads", "1", "rate")))
    rows = [(float(i), 1000, "", [12_928, 7]) for i in range(3)]
    write_trace(make_trace(schema, 1000, rows, "d"), tmp_path / "t.csv")
    assert main(["dataset", "info", str(tmp_path / "t.csv"), "--json"]) == 0
    features = json.loads(capsys.readouterr().out)[0]["features"]
    assert [row["q05_median_q95"] for row in features] == [[50.5] * 3, [7] * 3]
