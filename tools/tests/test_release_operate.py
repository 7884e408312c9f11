"""`stonechat release publish | stage | pause | resume | withdraw | status` on a fleet's database."""

import contextlib
import json
import shutil
import sqlite3
import time
from pathlib import Path
from typing import Any

import cbor2
import pytest
from stonechat_tools import cli
from stonechat_tools.fleet import keyring, labels, wire
from stonechat_tools.fleet.labels import Labels
from stonechat_tools.fleet.store import Store, rollouts, schema
from stonechat_tools.release import keys

SECRET = b"correct horse"


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with vendor.key and the releases pump-2 and pump-3."""
    folder = tmp_path_factory.mktemp("vendor")
    (folder / "pw").write_bytes(SECRET + b"\n")
    (folder / "pw").chmod(0o600)
    keys.make(folder / "vendor.key", "release", keys.SLH_DSA, SECRET)
    for version in ("2", "3"):
        words = ["release", "sign", "linux-1", "--key", str(folder / "vendor.key"), "--class", "pump"]
        words += ["--version", version, "--out", str(folder / f"pump-{version}")]
        assert cli.main([*words, "--passphrase-file", str(folder / "pw")]) == 0
    return folder


class Operator:
    """Runs the verbs against one database, and keeps what they print."""

    def __init__(self, signed: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.signed, self.db, self.capsys = signed, folder / "fleet.db", capsys
        Store(self.db).close()
        capsys.readouterr()

    def __call__(self, *words: str) -> str:
        assert cli.main(["release", *words, "--db", str(self.db)]) == 0
        return self.capsys.readouterr().out

    def refuses(self, *words: str) -> str:
        assert cli.main(["release", *words, "--db", str(self.db)]) == 1
        error = self.capsys.readouterr().err
        assert error.count("\n") == 1 and "Traceback" not in error
        return error

    def publish(self, version: int = 2) -> str:
        return self("publish", str(self.signed / f"pump-{version}"), "--keys", str(self.signed / "vendor.key.pub"))

    def devices(self, *names: str, group: str = "pump", updates: bool = True) -> None:
        with Store(self.db) as store:
            for name in names:
                made = keyring.DeviceKeys(bytes(32), name)
                fields: dict[int, Any] = {0: 1, 2: 1, 4: 1, 5: True, 6: 1, 16: b"boot"}
                fields |= {24: [0, 0, 0, 0, 0, 0]} if updates else {}
                store.put([], [wire.open_status(name, made, made.status.seal(cbor2.dumps(fields, canonical=True)))])
            labels.write(store, {name: Labels(group=group) for name in names})

    def state(self) -> str:
        found: list[dict[str, Any]] = json.loads(self("status", "--json"))["rollouts"]
        return str(found[-1]["state"])


@pytest.fixture
def operator(signed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Operator:
    return Operator(signed, tmp_path, capsys)


def test_publish_stage_pause_resume_withdraw(operator: Operator) -> None:
    operator.devices("pump-1", "pump-2")
    assert "pump 2: published" in operator.publish()
    assert "pump 2: published" in operator.publish()  # the same bytes again change nothing
    assert "to 2 devices begins with 5 devices" in operator("stage", "pump", "2")
    assert "paused" in operator("pause", "pump", "2", "--comment", "holidays")
    assert operator.state() == "paused"
    assert "is paused: nothing to pause" in operator.refuses("pause", "pump", "2")
    assert "running" in operator("resume", "pump", "2")
    operator.publish(3)
    assert "pump 2 is running; end that one first" in operator.refuses("stage", "pump", "3")
    assert json.loads(operator("withdraw", "pump", "2", "--json"))["state"] == "withdrawn"
    assert "make a new version" in operator.refuses("stage", "pump", "2")
    assert json.loads(operator("stage", "pump", "3", "--json", "--stages", "1:1h,100%:1h"))["devices"] == 2
    page = operator("status", "pump", "2")
    assert "withdrawn" in page and "paused (holidays)" in page
    found = json.loads(operator("status", "--json"))
    assert [each["version"] for each in found["releases"]] == [2, 3]
    assert found["rollouts"][1]["stages"] == ["1:1h", "100%:1h"]
    assert found["versions"] == [{"class": "pump", "version": 0, "devices": 2, "on trial": 0}]


def test_what_no_roll_out_can_begin_with(operator: Operator, tmp_path: Path) -> None:
    assert "pump 2: is not published; `stonechat release publish` does that" in operator.refuses("stage", "pump", "2")
    operator.publish()
    assert "of this class: 2" in operator.refuses("stage", "pump", "7")
    assert "no device is in the class pump" in operator.refuses("stage", "pump", "2")
    operator.devices("pump-1", updates=False)
    assert "takes updates" in operator.refuses("stage", "pump", "2")
    operator.devices("pump-2")
    assert "class pump at oslo" in operator.refuses("stage", "pump", "2", "--site", "oslo")
    for version, option, value, why in (
        ("6", "--not-before", "2100-01-01", "is not valid before 2100-01-01"),
        ("7", "--days", "1", "expired on"),
    ):
        words = ["release", "sign", "linux-1", "--key", str(operator.signed / "vendor.key"), "--class", "pump"]
        words += ["--version", version, option, value, "--out", str(tmp_path / version)]
        assert cli.main([*words, "--passphrase-file", str(operator.signed / "pw")]) == 0
        operator("publish", str(tmp_path / version), "--keys", str(operator.signed / "vendor.key.pub"))
        with pytest.MonkeyPatch.context() as patch:
            now_s = time.time()
            patch.setattr(time, "time", lambda now_s=now_s: now_s + 2 * 86_400)
            assert why in operator.refuses("stage", "pump", version)
    assert "has no roll-out" in operator.refuses("withdraw", "pump", "2")
    for stages in ("", "5", "5:3d", "0:1d,100%:1d", "-1:1d,100%:1d", "nan%:1d,100%:1d", "5:3y,100%:1d", "x:1d,100%:1d"):
        with pytest.raises(SystemExit):
            cli.main(["release", "stage", "pump", "2", "--stages", stages, "--db", str(operator.db)])
        assert operator.capsys.readouterr().err.count("\n") == 1
    for action in ("stage", "pause", "resume", "withdraw", "status"):
        for version in ("x", "-5", "0", "1.5", "", "4294967296", "9" * 5000, "²"):
            with pytest.raises(SystemExit):
                cli.main(["release", action, "--db", str(operator.db), "pump", version])
            error = operator.capsys.readouterr().err
            assert error.count("\n") == 1 and "want 1 to 4294967295" in error
        assert "printable characters" in operator.refuses(action, "\udcff", "1")
    operator.db.unlink()
    assert "no such database" in operator.refuses("status")


def test_only_what_verifies_is_published(operator: Operator, tmp_path: Path) -> None:
    public = str(operator.signed / "vendor.key.pub")
    keys.make(tmp_path / "other.key", "release", keys.SLH_DSA, SECRET)
    other = str(tmp_path / "other.key.pub")
    assert "no valid signature" in operator.refuses("publish", str(operator.signed / "pump-2"), "--keys", other)
    for name in ("manifest.cbor", "model.tflite", "sbom.cdx.json"):
        copy = tmp_path / name.partition(".")[0]
        shutil.copytree(operator.signed / "pump-2", copy)
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        operator.refuses("publish", str(copy), "--keys", public)
    assert json.loads(operator("status", "--json"))["releases"] == []
    operator.publish()
    words = ["release", "sign", "linux-1", "--key", str(operator.signed / "vendor.key"), "--class", "pump"]
    words += ["--version", "2", "--notes", "another", "--out", str(tmp_path / "again")]
    assert cli.main([*words, "--passphrase-file", str(operator.signed / "pw")]) == 0
    operator.capsys.readouterr()
    refused = operator.refuses("publish", str(tmp_path / "again"), "--keys", public)
    assert "pump 2 is published already, with another manifest" in refused


def test_a_database_from_before_there_were_releases(operator: Operator) -> None:
    operator.db.unlink()
    with contextlib.closing(sqlite3.connect(operator.db)) as db:
        types = {"integer": "INTEGER", "real": "REAL", "blob": "BLOB", "key": "INTEGER PRIMARY KEY"}
        db.executescript((schema.FIRST + schema.NOTES).format(**types))
        db.execute("ALTER TABLE devices ADD COLUMN flags INTEGER NOT NULL DEFAULT 0")
        db.execute("PRAGMA user_version = 6")
    assert "no roll-outs" in operator("status")
    with Store(operator.db) as store:
        assert rollouts.rollouts(store) == []
