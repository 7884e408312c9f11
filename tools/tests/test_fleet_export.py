"""`stonechat export`: every report once, in each format, read back by a reader of the format."""

import csv
import datetime
import json
import time
from pathlib import Path
from typing import Any

import cbor2
import pytest
from stonechat_tools.cli import main
from stonechat_tools.fleet import export as export_module
from stonechat_tools.fleet import wire
from stonechat_tools.fleet.keyring import DeviceKeys
from stonechat_tools.fleet.store import Store

COUNT = 40
T_S = int(time.time()) - 3600 * (COUNT - 1)


@pytest.fixture
def db(tmp_path: Path) -> Path:
    """pump-1: a report every hour, most of them sent late; pump-2: one whose text looks like a formula."""
    reports = []
    for device, texts in (("pump-1", ["x"] * COUNT), ("pump-2", ["=cmd|' /C calc'!A0"])):
        keys = DeviceKeys(b"\1" * 32, device)
        for i, text in enumerate(texts):
            at_s = T_S + 3600 * i
            fields = {0: 1, 1: i + 1, 2: 1, 3: at_s, 5: i % 3, 7: 512, 8: 256, 9: 128, 13: text, 16: b"abcd"}
            fields[10] = bytes((3, 64, 90))
            if i < COUNT - 1:
                fields[23] = 3600 * (COUNT - 1 - i)
            reports.append(wire.open_report(device, keys, keys.report.seal(cbor2.dumps(fields, canonical=True))))
    with Store(tmp_path / "db") as store:
        store.put(reports, [])
    return tmp_path / "db"


def export(db: Path, *more: str) -> int:
    return main(["export", "--db", str(db), *more])


def test_csv_has_every_report_once(db: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(db, "-o", str(tmp_path / "out.csv")) == 0
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({(row["device"], row["stream"], row["sequence"]) for row in rows}) == len(rows) == COUNT + 1
    times = [datetime.datetime.fromisoformat(row["time"]).timestamp() for row in rows[:COUNT]]
    assert times == [T_S + 3600 * i for i in range(COUNT)]
    first = rows[0]
    assert (first["level"], float(first["score"]), float(first["surprise"])) == ("normal", 2.0, 1.0)
    assert (float(first["deviation_1"]), first["share_percent_1"], first["feature_2"]) == (4.0, "90", "")
    assert rows[-1]["detail"].startswith("'=")  # no spreadsheet runs it
    assert f"{COUNT + 1} reports of 2 devices" in capsys.readouterr().err


@pytest.mark.parametrize("before", ["", " ", "\n", "\t", "\u3000", "\xa0"])
@pytest.mark.parametrize("sign", "=+-@\uff1d\uff0b\uff0d\uff20")
def test_no_text_is_a_formula(before: str, sign: str) -> None:
    assert export_module._safe(before + sign + "1") == "'" + before + sign + "1"
    assert export_module._safe("a" + sign) == "a" + sign and export_module._safe(-1.5) == -1.5


def test_json_lines_and_senml(db: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(db, "--format", "jsonl", "--device", "pump-2") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["detail"] for line in lines] == ["=cmd|' /C calc'!A0"]
    assert export(db, "-o", str(tmp_path / "out.senml")) == 0
    pack = json.loads((tmp_path / "out.senml").read_text())
    resolved = resolve(pack)
    assert len(resolved) == (COUNT + 1) * 5
    assert resolved[0] == ("urn:dev:ops:pump-1:level", T_S, 0)
    assert ("urn:dev:ops:pump-1:score", T_S, 2.0) in resolved


def resolve(pack: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """RFC 8428 section 4.6: base values hold until the next one."""
    base: dict[str, Any] = {"bn": "", "bt": 0}
    out = []
    for record in pack:
        base |= {key: value for key, value in record.items() if key in ("bn", "bt")}
        assert set(record) <= {"bn", "bt", "n", "v"}
        out.append((base["bn"] + record["n"], base["bt"] + record.get("t", 0), record["v"]))
    return out


def test_parquet(db: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    assert export(db, "-o", str(tmp_path / "out.parquet")) == 0
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table.num_rows == COUNT + 1
    assert table.column("sequence").to_pylist()[:3] == [1, 2, 3]
    assert str(table.schema.field("score").type) == "double"


def test_since_device_and_an_empty_database(db: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(db, "--since", "150m", "--device", "pump-1") == 0
    assert len(capsys.readouterr().out.splitlines()) == 4  # the header and three hours
    with Store(tmp_path / "empty"):
        pass
    assert export(tmp_path / "empty") == 0
    assert capsys.readouterr().out == ""
    assert export(tmp_path / "empty", "-o", str(tmp_path / "x.parquet")) == 1
    assert "no reports" in capsys.readouterr().err
    assert not (tmp_path / "x.parquet").exists()


def test_errors_name_the_fix(db: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, error in (
        (["--db", str(tmp_path / "none")], "no such database"),
        (["--device", "pump-9"], "there are those of pump-1, pump-2"),
        (["--format", "parquet"], "give -o FILE"),
        (["-o", str(tmp_path / "none" / "x.csv")], "No such file"),
    ):
        assert export(db, *more) == 1
        assert error in capsys.readouterr().err
