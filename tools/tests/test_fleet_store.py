"""The database: names of reports, the newest event, presence, files that are moved, damaged or full."""

import contextlib
import io
import itertools
import os
import random
import sqlite3
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agent_process import open_the_way
from fleet_support import FakeVerdict
from rich.console import Console
from stonechat.agent import Agent
from stonechat.delivery import Delivery
from stonechat.features import LEVEL
from stonechat.model import load_model
from stonechat.outbox import Outbox
from stonechat.outbox_memory import MemoryOutbox
from stonechat.replay import Replay
from stonechat.schema import Schema
from stonechat.state import State
from stonechat_tools.fleet import keyring, overview, wire
from stonechat_tools.fleet.store import CONFLICT, DUPLICATE, STORED, Keep, Store, StoreError, ingest
from stonechat_tools.fleet.store.retention import Trust
from stonechat_tools.modeling.device_path import features_q8
from stonechat_tools.modeling.fit import fit

KEYS = keyring.DeviceKeys(bytes(32), "pump-1")
NOW_S = 1_795_000_000
A, B = b"aaaa", b"bbbb"


def report(
    sequence: int,
    level: int = 0,
    *,
    time_s: int | None = NOW_S,
    stream: bytes = A,
    keys: keyring.DeviceKeys = KEYS,
    **more: Any,
) -> wire.Report:
    """more: k14=3 sets key 14."""
    fields = {0: 1, 1: sequence, 2: 7, 5: level, 7: 256, 8: 1, 9: 1, 16: stream}
    if time_s is not None:
        fields[3] = time_s
    fields |= {int(name[1:]): value for name, value in more.items()}
    return wire.open_report("pump-1", keys, keys.report.seal(wire.encode(fields)))


def status(number: int, *, stream: bytes = A, online: bool = True, time_s: int | None = None) -> wire.Status:
    fields: dict[int, Any] = {0: 1, 2: 3, 4: 600, 5: online, 16: stream}
    if online:
        fields[6] = number
    if time_s is not None:
        fields[3] = time_s
    return wire.open_status("pump-1", KEYS, KEYS.status.seal(wire.encode(fields)))


def level(store: Store) -> int:
    return int(store.devices()[0]["level"])


# --- names of reports -------------------------------------------------------------------------------------------------


def test_a_report_sent_again_with_its_age_is_a_duplicate(tmp_path: Path) -> None:
    with Store(":memory:") as store:
        assert store.put([report(1), report(1)]) == [STORED, DUPLICATE]
        assert store.put([report(1, k23=90), report(1, k23=True)]) == [DUPLICATE] * 2
        assert store.count() == 1


def test_the_same_number_in_another_stream_is_another_report() -> None:
    with Store(":memory:") as store:
        assert store.put([report(1), report(1, 2, stream=B)]) == [STORED, STORED]
        assert level(store) == 2
        assert store.devices()[0]["conflicts"] == 0


def test_a_thief_who_uses_a_number_first_keeps_no_alarm_out() -> None:
    with Store(":memory:") as store:
        assert store.put([report(5, 0)], now_s=NOW_S) == [STORED]
        assert store.put([report(5, 2, time_s=NOW_S + 1)], now_s=NOW_S + 1) == [CONFLICT]
        assert store.put([report(5, 2, time_s=NOW_S + 1)], now_s=NOW_S + 2) == [DUPLICATE]
        assert level(store) == 2
        assert [(row.level, bool(row.variant)) for row in store.history("pump-1")] == [(0, False), (2, True)]
        assert store.devices()[0]["conflicts"] == 1
        assert store.rejections() == {"pump-1": {"conflict": 1}}


def test_one_bit_that_differs_is_no_duplicate() -> None:
    with Store(":memory:") as store:
        assert store.put([report(5, 2), report(5, 2, k14=1), report(5, 2, k13="x")]) == [STORED, CONFLICT, CONFLICT]


# --- the newest event -------------------------------------------------------------------------------------------------


def test_the_level_is_that_of_the_newest_event_whatever_its_number() -> None:
    with Store(":memory:") as store:
        store.put([report(100, 2, time_s=NOW_S)], now_s=NOW_S)
        store.put([report(7, 0, time_s=NOW_S - 50)], now_s=NOW_S + 1)  # older, though it arrives later
        assert level(store) == 2
        store.put([report(6, 0, time_s=NOW_S + 5)], now_s=NOW_S + 6)
        assert level(store) == 0
        store.put([report(1, 2, time_s=NOW_S - 3600, stream=B, k23=3600)], now_s=NOW_S + 9)
        assert level(store) == 0


def test_a_jump_to_the_last_number_does_no_lasting_harm() -> None:
    with Store(":memory:") as store:
        store.put([report(0xFFFFFFFF, 0, time_s=NOW_S)], now_s=NOW_S)
        store.put([report(0xFFFFFFFE, 0, time_s=0xFFFFFFFF)], now_s=NOW_S)  # and to the end of time
        store.put([report(0xFFFFFFFE, 0, time_s=None, k4=0xFFFFFFFF)], now_s=NOW_S)
        for n in range(10, 20):
            store.put([report(n, 2, time_s=NOW_S + n)], now_s=NOW_S + n)
        assert level(store) == 2
        assert store.history("pump-1", limit=1)[0].sequence == 19


@pytest.mark.parametrize("clock", [None, NOW_S - 86_400 * 400, NOW_S - 3000, NOW_S + 3000])
def test_a_device_with_a_wrong_clock_after_a_restart_is_believed(clock: int | None) -> None:
    """Its first life had the right time; now it has none, an old one, one that is slow, one that is fast."""
    with Store(":memory:") as store:
        store.put([report(n, 0, time_s=NOW_S + n) for n in range(5)], now_s=NOW_S + 5)
        for n in range(1, 4):
            own = {"time_s": None, "k4": n} if clock is None else {"time_s": clock + n}
            store.put([report(n, 2, stream=B, **own)], now_s=NOW_S + 10 + n)
        assert level(store) == 2
        assert [row.level for row in store.history("pump-1", limit=3)] == [2, 2, 2] or clock == NOW_S - 3000


def test_history_without_a_clock_does_not_set_the_level() -> None:
    with Store(":memory:") as store:
        store.put([report(1, 0, stream=B, time_s=None, k4=5)], now_s=NOW_S)
        store.put([report(9, 2, time_s=None, k4=500, k23=True)], now_s=NOW_S + 1)  # of an earlier start
        assert level(store) == 0


def test_a_rotated_key_begins_the_device_anew() -> None:
    with Store(":memory:") as store:
        old, new = (keyring.DeviceKeys(bytes([n]) * 32, "pump-1", current=n == 2) for n in (1, 2))
        store.put([report(1, 0, time_s=NOW_S + 90, keys=old), report(1, 1, keys=old)], now_s=NOW_S + 90)
        assert store.devices()[0]["conflicts"] == 1
        store.put([report(1, 2, stream=B, keys=new, time_s=NOW_S)], now_s=NOW_S + 100)
        assert level(store) == 2 and store.devices()[0]["conflicts"] == 0
        assert store.put([report(2, 0, time_s=NOW_S + 101, keys=old)], now_s=NOW_S + 101) == [STORED]
        assert level(store) == 2  # whoever has the old key says no more what level it is


# --- times, presence --------------------------------------------------------------------------------------------------


def messages_of(folder: Path, count: int) -> tuple[bytes, list[bytes]]:
    secret = keyring.new_secret()
    sent: list[bytes] = []
    reporter = Delivery("pump-1", secret, Outbox(str(folder / "box")), heartbeat_windows=1, bytes_per_day=0)
    for i in range(count):
        reporter.observe(FakeVerdict(i % 3), 1000 * i)
        reporter.pump(lambda topic, payload, qos, retain: sent.append(bytes(payload)), 1000 * i)
    return secret, sent


def test_what_a_real_device_sends_is_stored_once(tmp_path: Path) -> None:
    secret, sent = messages_of(tmp_path, 9)
    keys = keyring.DeviceKeys(secret, "pump-1")
    with Store(":memory:") as store:
        reports = [wire.open_report("pump-1", keys, message) for message in sent]
        assert set(store.put(reports)) == {STORED} and set(store.put(reports)) == {DUPLICATE}
        assert [row.level for row in store.history("pump-1")] == [i % 3 for i in range(9)]


def test_a_change_that_is_steady_crosses_from_the_agent_to_the_table() -> None:
    """A real agent on a counter that stays higher: one alarm, one report and a status that say that it is steady, and
    the fleet's table says so until the operator answers."""
    rng = np.random.default_rng(2)
    schema = Schema("steady-1", tuple((f"c{i}", "1", LEVEL) for i in range(6)))
    values = np.exp(rng.normal(6, 0.3, (1600, 1)) + rng.normal(0, 0.1, (1600, 6))).astype(int)
    minutes = np.full(1600, 60_000)
    model = fit(features_q8(schema, values[:1000], minutes[:1000], 60_000), schema, 60_000)
    values[1200:, 2] *= 3
    replay = Replay(schema, [(60_000, row) for row in values[1000:].tolist()])
    reporter = Delivery("pump-1", bytes(32), MemoryOutbox(), heartbeat_windows=30, bytes_per_day=0)
    agent = Agent(replay, load_model(model.to_tflite("steady", 1)), reporter=reporter, state=State())
    reports: list[wire.Report] = []
    statuses: list[wire.Status] = []

    def publish(topic: str, payload: bytes, qos: int, retain: bool) -> None:
        if topic.endswith("/status"):
            statuses.append(wire.open_status("pump-1", KEYS, bytes(payload)))
        else:
            reports.append(wire.open_report("pump-1", KEYS, bytes(payload)))

    for now_ms in replay:
        agent.end_window(now_ms)
        if agent._status_due:
            agent._status_due = False
            publish("x/status", agent.status(), 1, True)
        reporter.pump(publish, now_ms)
        if reports:
            committed = [(reports[0].sequence, reports[-1].sequence)]
            reporter.on_message(reporter.topic + "ack", wire.seal_ack(KEYS, reporter.stream, committed))
    alarms = [two for one, two in itertools.pairwise(reports) if one.level < 2 == two.level]
    said = [one for one in reports if one.flags & 16 and one.windows == 1]
    assert len(alarms) == 1 and len(said) == 1 and said[0].level == 0
    assert all(one.flags & 16 for one in reports if one.sequence > said[0].sequence)
    assert [one.steady_s is not None for one in statuses].count(True) == 1
    assert 3600 <= (statuses[-1].steady_s or 0) <= 3600 + 5 * 60
    with Store(":memory:") as store:
        store.put(reports, statuses, now_s=NOW_S)
        device = store.devices()[0]
        assert device["flags"] == ["changed and steady"]
        assert device["steady_since_s"] == NOW_S - (statuses[-1].steady_s or 0)
        assert "changed and steady since" in table_of(store) and "was-normal or calibrate" in table_of(store)
        agent.reporter.commands.actions[3]([1])  # was normal
        agent.announce()
        reporter.commands.report_now = True
        agent.end_window(now_ms + 60_000)
        reporter.pump(publish, now_ms + 60_000)
        publish("x/status", agent.status(), 1, True)
        store.put(reports, statuses, now_s=NOW_S + 60)
        assert store.devices()[0]["flags"] == [] and "steady" not in table_of(store)


def test_a_model_that_does_not_fit_is_in_the_table() -> None:
    with Store(":memory:") as store:
        store.put([report(1, k6=9)], now_s=NOW_S)
        assert store.devices()[0]["flags"] == ["learning", "model does not fit"]
        assert "(model does not fit)" in table_of(store) and "train a model" in table_of(store)
        store.put([report(2, time_s=NOW_S + 1)], now_s=NOW_S + 1)
        assert "does not fit" not in table_of(store)


def table_of(store: Store) -> str:
    out = io.StringIO()
    Console(width=250, file=out).print(overview.fleet_table(store))
    return out.getvalue()


def test_history_of_a_device_without_a_clock_gets_its_time_later() -> None:
    with Store(":memory:") as store:
        store.put([report(1, time_s=None, k4=101), report(2, time_s=None, k4=102, k23=50)], now_s=NOW_S)
        rows = {row.sequence: row for row in store.history("pump-1")}
        assert [rows[n].time_known for n in (1, 2)] == [False, True]
        assert rows[2].time_s == NOW_S - 50
        store.put([], [status(1, time_s=NOW_S + 500)], now_s=NOW_S + 500)
        found = store.history("pump-1")
        assert [row.time_s for row in found] == [NOW_S + 1, NOW_S + 2]
        assert all(row.time_known for row in found)


def test_status_will_and_replays() -> None:
    with Store(":memory:") as store:

        def online() -> bool:
            return bool(store.devices()[0]["online"])

        store.put([], [status(1), status(2)])
        assert online()
        store.put([], [status(0, online=False)])
        assert not online()
        store.put([], [status(1)])  # replayed by the broker
        store.put([], [status(2)])  # the retained copy again
        assert not online()
        store.put([], [status(3)])
        assert online()
        store.put([], [status(1, stream=B)])  # flashed anew: heard at once, though it counts from 1
        assert online() and store.devices()[0]["stream"] == B.hex()
        store.put([], [status(3), status(0, online=False)])  # both of the start before
        assert online() and store.devices()[0]["stream"] == B.hex()
        assert store.rejections() == {"pump-1": {"stale": 3}}


def test_an_old_status_that_a_broker_held_back_does_not_shut_out_the_device() -> None:
    with Store(":memory:") as store:
        store.put([], [status(5, stream=B), status(9)])
        assert store.devices()[0]["stream"] == A.hex()
        store.put([], [status(6, stream=B)])
        assert store.devices()[0]["stream"] == B.hex()
        assert not store.rejections()


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_database_that_is_moved_away_is_followed_by_a_new_one(tmp_path: Path) -> None:
    lines: list[str] = []
    with Store(tmp_path / "db", lines.append) as store:
        store.put([report(1)])
        os.rename(tmp_path / "db", tmp_path / "moved")
        assert store.put([report(2)]) == [STORED]
        assert store.sequences("pump-1") == [2]
    with Store(tmp_path / "moved") as moved:
        assert moved.sequences("pump-1") == [1]
    assert lines and "moved" in lines[0]


def test_a_log_that_somebody_removed_loses_nothing(tmp_path: Path) -> None:
    lines: list[str] = []
    with Store(tmp_path / "db", lines.append) as store:
        store.put([report(1)])
        (tmp_path / "db-wal").unlink()
        assert store.put([report(2)]) == [STORED]
        with sqlite3.connect(f"file:{tmp_path}/db?mode=ro&immutable=1", uri=True) as file:  # what a crash would leave
            assert file.execute("SELECT sequence FROM reports").fetchall() == [(1,), (2,)]
        assert store.put([report(3)]) == [STORED]
    assert "was removed" in lines[0]


@pytest.mark.parametrize("kind", ["folder", "fifo", "link to itself", "device"])
def test_what_can_not_be_a_database_is_an_error_of_one_line(tmp_path: Path, kind: str) -> None:
    with Store(tmp_path / "db") as store:
        store.put([report(1)])
        os.rename(tmp_path / "db", tmp_path / "kept")
        if kind == "folder":
            (tmp_path / "db").mkdir()
        elif kind == "fifo":
            os.mkfifo(tmp_path / "db")
        else:
            (tmp_path / "db").symlink_to("/dev/full" if kind == "device" else tmp_path / "db")
        for _ in range(2):
            with pytest.raises(StoreError) as error:
                store.put([report(2)])
            assert "\n" not in str(error.value)
        (tmp_path / "db").rmdir() if kind == "folder" else (tmp_path / "db").unlink(missing_ok=True)
        assert store.put([report(2)]) == [STORED]
    with Store(tmp_path / "kept") as kept:
        assert kept.sequences("pump-1") == [1]


@pytest.mark.parametrize("size", [1, 15, 511, 512, 5000])
def test_a_file_of_something_else_is_not_written_over(tmp_path: Path, size: int) -> None:
    path = tmp_path / "notes"
    path.write_bytes(b"n" * size)
    with pytest.raises(StoreError, match="not a database"):
        Store(path)
    assert path.read_bytes() == b"n" * size


def test_a_folder_that_is_gone_for_a_while_costs_nothing(tmp_path: Path) -> None:
    home = tmp_path / "disk"
    home.mkdir()
    with Store(home / "db") as store:
        store.put([report(1)])
        os.rename(home, tmp_path / "unmounted")
        with pytest.raises(StoreError):
            store.put([report(2)])
        os.rename(tmp_path / "unmounted", home)
        assert store.put([report(2)]) == [STORED]
        assert store.sequences("pump-1") == [1, 2]


@pytest.mark.parametrize("damage", ["garbage", "cut off", "replaced", "head"])
def test_a_damaged_database_is_kept_and_followed_by_a_new_one(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "db"
    with Store(path) as store:
        store.put([report(n, k13="x" * 60) for n in range(400)])
        store.close()
        store.put([report(400)])
        if damage == "cut off":
            os.truncate(path, 5000)
        elif damage == "replaced":
            (tmp_path / "other").write_bytes(b"no database" * 500)
            os.replace(tmp_path / "other", path)
        else:
            size = path.stat().st_size
            store.close()
            with path.open("r+b") as file:
                file.write(os.urandom(size if damage == "garbage" else 100))
        for _ in range(3):
            try:
                results = store.put([report(500)])
                break
            except StoreError:
                continue
        assert results == [STORED] and store.sequences("pump-1") == [500]
    assert len(list(tmp_path.glob("db.damaged-*"))) >= 1


def test_a_database_that_an_operator_compacts_is_not_damaged(tmp_path: Path) -> None:
    path, lines = tmp_path / "fleet.db", []
    with Store(path, lines.append) as store:
        store.put([report(n) for n in range(1, 3000)])
        with store.transaction() as db:
            db.execute("DELETE FROM reports WHERE sequence < 2900")
        with contextlib.closing(sqlite3.connect(path)) as other:
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            store.count()
            before = path.stat().st_size
            other.execute("VACUUM")
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        assert path.stat().st_size < before / 2
        assert store.put([report(3000), report(2950)]) == ["stored", "duplicate"]
        assert store.count() == 101 and not lines


def test_a_file_that_was_no_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "letter.txt"
    path.write_text("dear reader " * 100)
    before = path.read_bytes()
    with pytest.raises(StoreError):
        Store(path)
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE theirs (x)")
    other.commit()
    other.close()
    with pytest.raises(StoreError, match="something else"):
        Store(tmp_path / "other.db")
    assert path.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["letter.txt", "other.db"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_full_disk_loses_nothing_and_confuses_no_device(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(tmp_path)], check=True)
    try:
        keys = {name: keyring.DeviceKeys(bytes([i]) * 32, name) for i, name in enumerate("abc")}

        def of(name: str, sequence: int) -> wire.Report:
            made = report(sequence, k13="x" * 64)
            made.device = name
            return made

        with Store(tmp_path / "db") as store:
            store.put([of("a", n) for n in range(20)])
            with (tmp_path / "fill").open("wb", buffering=0) as fill, pytest.raises(OSError, match="No space"):
                while True:
                    fill.write(bytes(4096))
            failed = 0
            for name in keys:
                try:
                    store.put([of(name, n) for n in range(100, 400)])
                except StoreError:
                    failed += 1
            assert failed
            (tmp_path / "fill").unlink()
            for name in keys:
                store.put([of(name, n) for n in range(5)])
            for name in "bc":
                assert store.sequences(name)[:5] == list(range(5))
            rows = store.rows("SELECT count(*) FROM reports WHERE device NOT IN (SELECT id FROM devices)")
            assert rows == [(0,)]
            assert sum(device["reports"] for device in store.devices()) == store.count()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_disk_that_is_full_at_the_start_is_named_and_holds_up_no_lock(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(tmp_path)], check=True)
    try:
        with Store(tmp_path / "db") as store:
            store.put([report(1)])
        with (tmp_path / "fill").open("wb", buffering=0) as fill, pytest.raises(OSError, match="No space"):
            while True:
                fill.write(bytes(4096))
        with pytest.raises(StoreError, match=r"db: .*full"):
            Store(tmp_path / "db")
        with Store(":memory:") as store:
            store.engine.path = str(tmp_path / "other")  # type: ignore[attr-defined]
            with store.collecting():
                pass
        (tmp_path / "fill").unlink()
        with Store(tmp_path / "db") as store:
            assert store.sequences("pump-1") == [1]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("kind", ["folder", "fifo"])
def test_what_is_no_file_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "db"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(StoreError, match="db: .*not a file"):
        Store(path)


def test_a_locked_database_is_only_a_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stonechat_tools.fleet.store.sqlite._BUSY_S", 0.1)
    with Store(tmp_path / "db") as store:
        store.put([report(1)])
        other = sqlite3.connect(tmp_path / "db")
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="locked"):
            store.put([report(2)])
        with Store(tmp_path / "db") as reader:  # looking at it goes on
            assert reader.count() == 1
        other.rollback()
        other.close()
        assert store.put([report(2)]) == [STORED]


def test_one_collector_for_each_database(tmp_path: Path) -> None:
    with Store(tmp_path / "db") as store, store.collecting(), Store(tmp_path / "db") as second:
        with pytest.raises(StoreError, match=f"another collector .process {os.getpid()}"), second.collecting():
            pass
        with Store(tmp_path / "other") as third, third.collecting():
            pass
    (tmp_path / "link").symlink_to(tmp_path / "db")
    with Store(tmp_path / "db") as store, store.collecting(), Store(tmp_path / "link") as alias:
        held = alias.collecting()
        with pytest.raises(StoreError, match="another collector"):
            held.__enter__()
    assert (tmp_path / "db").stat().st_mode & 0o777 == 0o600
    os.link(tmp_path / "db", tmp_path / "hard")  # two names, two logs: SQLite would damage it
    with pytest.raises(StoreError, match="hard link"):
        Store(tmp_path / "hard")


# --- versions ---------------------------------------------------------------------------------------------------------

VERSION_3 = """
CREATE TABLE devices (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, first_seen_s REAL NOT NULL,
 last_seen_s REAL NOT NULL, key TEXT NOT NULL DEFAULT '', online INTEGER, online_since_s REAL, conflict_s REAL,
 heartbeat_windows INTEGER NOT NULL DEFAULT 0, status_stream INTEGER, status_json TEXT NOT NULL DEFAULT '{}',
 reports INTEGER NOT NULL DEFAULT 0, conflicts INTEGER NOT NULL DEFAULT 0, newest_s INTEGER,
 newest_sequence INTEGER NOT NULL DEFAULT 0, level INTEGER NOT NULL DEFAULT 0, score_q8 INTEGER, evidence_q8 INTEGER,
 lost INTEGER NOT NULL DEFAULT 0, refused INTEGER NOT NULL DEFAULT 0, last_command INTEGER NOT NULL DEFAULT 0);
CREATE TABLE streams (id INTEGER PRIMARY KEY, device INTEGER NOT NULL, stream BLOB NOT NULL, boot INTEGER NOT NULL,
 first_seen_s REAL NOT NULL, began_s INTEGER, behind_s INTEGER, status_number INTEGER NOT NULL DEFAULT 0,
 lost INTEGER NOT NULL DEFAULT 0, UNIQUE (device, stream));
CREATE TABLE reports (device INTEGER NOT NULL, stream INTEGER NOT NULL, sequence INTEGER NOT NULL,
 variant INTEGER NOT NULL, boot INTEGER NOT NULL, time_s INTEGER, uptime_s INTEGER, at_s INTEGER NOT NULL,
 at_known INTEGER NOT NULL, received_s REAL NOT NULL, late_s INTEGER, level INTEGER NOT NULL, flags INTEGER NOT NULL,
 windows INTEGER NOT NULL, score_q8 INTEGER, score_min_q8 INTEGER, score_max_q8 INTEGER, surprise_q8 INTEGER,
 evidence_q8 INTEGER, features TEXT, detail TEXT, lost INTEGER NOT NULL, body BLOB NOT NULL,
 PRIMARY KEY (stream, sequence, variant)) WITHOUT ROWID;
CREATE INDEX reports_by_time ON reports (device, at_s);
CREATE TABLE commands (device INTEGER NOT NULL, sequence INTEGER NOT NULL, sent_s REAL, code INTEGER,
 arguments TEXT NOT NULL DEFAULT '[]', result INTEGER, answered_s REAL, PRIMARY KEY (device, sequence)) WITHOUT ROWID;
CREATE TABLE rejections (device TEXT NOT NULL, reason TEXT NOT NULL, count INTEGER NOT NULL, last_s REAL NOT NULL,
 PRIMARY KEY (device, reason)) WITHOUT ROWID;
CREATE TABLE listening (id INTEGER PRIMARY KEY CHECK (id = 1), since_s REAL NOT NULL, until_s REAL NOT NULL);
PRAGMA user_version = 3;
PRAGMA journal_mode = WAL;
"""


def test_a_database_of_an_older_version_keeps_all_it_has(tmp_path: Path) -> None:
    old = sqlite3.connect(tmp_path / "db")
    old.executescript(VERSION_3)
    facts = '{"firmware": "2.0", "window_ms": 5000, "boot": 3}'
    old.execute(
        "INSERT INTO devices (id, name, first_seen_s, last_seen_s, status_json, reports)"
        " VALUES (4, 'pump-1', ?, ?, ?, 3)",
        (NOW_S, NOW_S, facts),
    )
    old.execute("INSERT INTO streams (id, device, stream, boot, first_seen_s) VALUES (9, 4, ?, 7, ?)", (A, NOW_S))
    old.execute("INSERT INTO listening VALUES (1, ?, ?)", (NOW_S - 50, NOW_S))
    old.execute("INSERT INTO commands (device, sequence, code) VALUES (4, 77, 5)")
    made = [report(n, n % 3, k13=f"of {n}", k10=b"\x01\x10\x32") for n in range(3)]
    for one in made:
        old.execute(
            "INSERT INTO reports VALUES (4, 9, ?, 0, 7, ?, NULL, ?, 1, ?, NULL, ?, 0, 1, 256, 256, 256, 1, 1, NULL,"
            " NULL, 0, ?)",
            (one.sequence, NOW_S, NOW_S, NOW_S, one.level, one.body),
        )
    old.commit()
    old.close()
    said: list[str] = []
    with Store(tmp_path / "db", said.append) as store:
        assert "version 3" in said[0] and len(said) == 1
        rows = store.history("pump-1")
        assert [(row.sequence, row.level, row.detail) for row in rows] == [(n, n, f"of {n}") for n in range(3)]
        assert rows[0].features == [wire.Feature(1, 1.0, 50)]
        device = store.devices()[0]
        assert device["firmware"] == "2.0" and device["window_ms"] == 5000 and device["reports"] == 3
        assert store.listening() == (NOW_S - 50, NOW_S) and store.commands("pump-1")[0]["sequence"] == 77
        assert store.put([made[0], report(9)]) == [DUPLICATE, STORED]
    with Store(tmp_path / "db", said.append) as store, Store(tmp_path / "new") as new:
        assert len(said) == 1 and store.count() == 4
        columns = (
            "SELECT t.name, c.name, c.type FROM sqlite_master t, pragma_table_info(t.name) c"
            " UNION SELECT name, tbl_name, '' FROM sqlite_master WHERE type = 'index' AND name NOT LIKE 'sqlite_%'"
        )
        assert sorted(store.rows(columns)) == sorted(new.rows(columns))


@pytest.mark.parametrize("most_others", [0, 2, 10_000])
def test_what_is_remembered_between_batches_is_what_the_database_says(
    monkeypatch: pytest.MonkeyPatch, most_others: int
) -> None:
    """Every answer and every row is as from a collector that is started anew for each batch, however many of the
    streams that are not their device's last are remembered."""
    monkeypatch.setattr(ingest, "MAX_CACHED", most_others)
    rng = random.Random(7 + most_others)
    devices = {f"d-{n}": keyring.DeviceKeys(bytes([n]) * 32, f"d-{n}") for n in range(6)}
    others = {name: keyring.DeviceKeys(bytes([n + 9]) * 32, name, n > 2) for n, name in enumerate(devices)}
    streams = [bytes(4), b"aaaa", b"aaaa", b"bbbb", b"cccc"]
    start_s = 1_795_000_000

    def report() -> wire.Report:
        name = rng.choice(list(devices))
        keys = rng.choice([devices, devices, devices, others])[name]
        fields: dict[int, Any] = {0: 1, 1: rng.randrange(12), 2: 3, 5: rng.randrange(3), 9: rng.randrange(3)}
        fields |= {11: rng.randrange(9), 12: [1, 2, 3], 16: rng.choice(streams)}
        fields |= {3: start_s + rng.randrange(-90_000, 90_000)} if rng.random() < 0.7 else {4: rng.randrange(9999)}
        fields |= {23: rng.choice([True, 500])} if rng.random() < 0.3 else {}
        return wire.open_report(name, keys, keys.report.seal(wire.encode(fields)))

    def status() -> wire.Status:
        time_s = start_s + rng.randrange(-90_000, 90_000) if rng.random() < 0.6 else None
        number = rng.choice([0, 1, 2, 5])  # 0: a last will
        return wire.Status(
            rng.choice(list(devices)), 3, time_s, rng.randrange(999), number > 0, rng.choice(streams), number
        )

    def refused() -> list[str]:
        return [rng.choice(list(devices))] * rng.choice([0, 0, 2])

    batches = [
        ([report() for _ in range(rng.randrange(9))], [status() for _ in range(rng.randrange(3))], refused())
        for _ in range(150)
    ]
    tables = ("devices", "streams", "reports", "commands", "rejections", "statuses", "hourly", "daily")
    answers = []
    for anew in (True, False):
        with Store(":memory:") as store:
            retention = store.retention(Keep(reports=0.5, hourly=1, daily=1))
            found: list[Any] = []
            for n, (reports, statuses, of) in enumerate(batches):
                found.append(store.put(reports, statuses, (), of, now_s=start_s + 1000.0 * n))
                if n % 20 == 19:
                    retention.step(start_s + 1000.0 * n)
                if anew:
                    store._ingest.forget()
            found += [store.rows(f"SELECT * FROM {table}") for table in tables]
            found += [store.devices(), [store.history(name) for name in devices]]
            answers.append(found)
    assert answers[0] == answers[1]
    assert {"stored", "duplicate", "conflict"} == {result for each in answers[0][:150] for result in each}


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: owners")
def test_a_database_of_somebody_else_names_its_owner(tmp_path: Path) -> None:
    open_the_way(tmp_path)
    os.chown(tmp_path, 65534, -1)
    path = tmp_path / "f.db"
    Store(path).close()
    path.chmod(0o600)
    os.setresuid(65534, 65534, 0)
    try:
        with pytest.raises(StoreError, match="f.db belongs to root: be that user"):
            Store(path)
    finally:
        os.setresuid(0, 0, 0)


def test_a_clock_that_leaps_ahead_deletes_nothing_for_a_day() -> None:
    """A year ahead for a minute, at the start or later: the reports of a year are not old by that."""
    steady_s, wall_s = 100.0, float(NOW_S)

    def trust(looked_s: float | None) -> Trust:
        return Trust(looked_s, lambda: wall_s, lambda: steady_s)

    clock = trust(NOW_S - 60.0)
    assert clock() and not trust(None)() and not trust(NOW_S - 400 * 86_400.0)()
    for jump_s in (365 * 86_400.0, 7200.0):
        wall_s += jump_s
        assert not clock()
        wall_s -= jump_s  # set right again
        for _ in range(23):
            steady_s, wall_s = steady_s + 3600, wall_s + 3600
            assert not clock()
        steady_s, wall_s = steady_s + 7200, wall_s + 7200
        assert clock()
    wall_s -= 365 * 86_400.0
    assert clock()
    with Store(":memory:") as store:
        store.put([report(1)], now_s=NOW_S)
        retention = store.retention(Keep(reports=1))
        for _ in range(4):
            retention.step(NOW_S + 400 * 86_400, delete=False)
        assert store.count() == 1 and store.rollup("pump-1")
        while retention.step(NOW_S + 400 * 86_400):
            pass
        assert store.count() == 0
