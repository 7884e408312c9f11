"""The same store on a real PostgreSQL server: the same answers as SQLite, restarts, two collectors, roll-ups."""

import contextlib
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cbor2
import pytest
from dashboard_support import PASSWORD, dashboard
from fleet_support import Mosquitto, Peer, broker, needs_mosquitto, wait_for
from postgres_support import needs_postgres, postgres, postgres_server
from stonechat.errors import ConfigError
from stonechat_tools import cli
from stonechat_tools.dashboard import accounts
from stonechat_tools.fleet import collect, keyring, wire
from stonechat_tools.fleet.shards import Shard
from stonechat_tools.fleet.store import DUPLICATE, STORED, Store, StoreError
from stonechat_tools.fleet.store.retention import Keep
from stonechat_tools.proofs.postgres_server import Server

__all__ = ["broker", "postgres", "postgres_server"]
pytestmark = [needs_postgres, pytest.mark.slow(2)]
NOW_S = 1_795_000_000
A, B = b"aaaa", b"bbbb"
KEYS = {name: keyring.DeviceKeys(bytes([n + 1]) * 32, name) for n, name in enumerate(("pump-1", "pump-2"))}


def report(sequence: int, level: int = 0, *, device: str = "pump-1", stream: bytes = A, **more: Any) -> wire.Report:
    """more: k14=3 sets key 14."""
    fields = {0: 1, 1: sequence, 2: 7, 3: NOW_S, 5: level, 7: 256, 8: 1, 9: 1, 16: stream}
    fields |= {int(name[1:]): value for name, value in more.items()}
    fields = {key: value for key, value in fields.items() if value is not None}
    return wire.open_report(device, KEYS[device], KEYS[device].report.seal(wire.encode(fields)))


def status(number: int, **more: Any) -> wire.Status:
    fields: dict[int, Any] = {0: 1, 2: 3, 4: 600, 5: True, 6: number, 16: A} | {
        int(name[1:]): value for name, value in more.items()
    }
    return wire.open_status("pump-1", KEYS["pump-1"], KEYS["pump-1"].status.seal(wire.encode(fields)))


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield str(tmp_path / "db")
    else:
        yield request.getfixturevalue("postgres").url


def everything(store: Store) -> list[object]:
    return [
        store.devices(),
        [store.history(name, answers=True) for name in KEYS],
        store.rejections(),
        [store.commands(name) for name in KEYS],
        store.decisions(),
        store.decisions("pump-1", NOW_S, 1),
        store.listening(),
        store.count(),
        [store.sequences(name) for name in KEYS],
        [store.rollup(name, table) for name in KEYS for table in ("hourly", "daily")],
    ]


def a_life(store: Store) -> list[object]:
    """Every kind of thing that a batch can do -> the results."""
    results: list[object] = []

    def put(*args: Any, now_s: float, **more: Any) -> None:
        results.append(store.put(*args, now_s=now_s, **more))

    put([report(n) for n in range(5)], [status(1, k3=NOW_S)], now_s=NOW_S)
    put([report(1), report(3), report(9), report(9, 1), report(7, k14=3)], now_s=NOW_S + 1)
    put([report(8, 2, device="pump-2", k10=b"\x01\x10\x32", k13="text")], now_s=NOW_S + 2)
    put([report(1, stream=B, k3=None, k4=5), report(2, 2, stream=B, k3=None, k4=9, k23=7)], now_s=NOW_S + 3)
    put([], [status(1), status(2, k16=B, k3=NOW_S + 50)], [("pump-9", "forged")] * 3, ["pump-1"], now_s=NOW_S + 60)
    results.append(store.next_command("pump-1", 4, [1, 2], NOW_S))
    results.append(store.next_command("pump-1", 4, [], NOW_S))
    answer = {"k5": None, "k7": None, "k8": None, "k9": None, "k15": [NOW_S, 0]}
    put([report(20, **answer)], now_s=NOW_S + 61)
    decided = {"k5": None, "k7": None, "k8": None, "k9": None}
    for n, numbers in ((21, [0, 3, 1, 0, 0x3FFFFFFF, 120, 1]), (22, [2, 4, 1, 0, 0, 13])):
        put([report(n, **decided, k18=numbers)], now_s=NOW_S + 62)
    ended = [1, 3, 1, 0, 0x3FFFFFFF, 120, 0, 2, 0xFFFFFFFF, 0xFFFFFFFF, 9, 1]
    put([report(23, **decided, k18=ended)], now_s=NOW_S + 63)
    store.listened(NOW_S, NOW_S + 63)
    retention = store.retention(Keep())
    while retention.step(NOW_S + 4000):
        pass
    return results


def test_both_databases_give_the_same_answers(tmp_path: Path, postgres: Server) -> None:
    with Store(tmp_path / "db") as file, Store(postgres.url) as server:
        assert a_life(file) == a_life(server)
        assert everything(file) == everything(server)
        assert file.count() == 15 and [entry["kind"] for entry in file.decisions()] == [1, 2]
        assert file.devices()[0]["conflicts"] == 1
    with Store(tmp_path / "db") as file, Store(postgres.url) as server:  # and after a restart
        again = [
            [report(3), report(9, 1), report(10)],
            [report(8, 2, device="pump-2", k10=b"\x01\x10\x32", k13="text")],
        ]
        for batch in again:
            results = file.put(batch, now_s=NOW_S + 99)
            assert results == server.put(batch, now_s=NOW_S + 99)
        assert everything(file) == everything(server)


def test_rollups_count_each_report_once_and_outlive_it(place: str) -> None:
    with Store(place) as store:
        retention = store.retention(Keep(reports=1, hourly=10, daily=100))
        for hour in range(5):
            at_s = NOW_S + 3600 * hour
            made = [report(100 * hour + n, 2 * (n == 7), k3=at_s, k7=256 * n) for n in range(1, 9)]
            store.put(made, now_s=at_s)
            retention.step(at_s + 10)  # too fresh to count
            retention.step(at_s + 400)
            retention.step(at_s + 400)
        hours = store.rollup("pump-1")
        assert [(h["reports"], h["alarms"], h["level"], h["score_max"]) for h in hours] == [(8, 1, 2, 8.0)] * 5
        assert hours[0]["score_mean"] == 4.5 and sum(d["reports"] for d in store.rollup("pump-1", "daily")) == 40
        late = report(5000, 1, k3=NOW_S + 60, k23=30_000)  # of the first hour, long after it
        store.put([late], now_s=NOW_S + 30_000)
        while retention.step(NOW_S + 31_000):
            pass
        assert store.rollup("pump-1")[0]["reports"] == 9
        while retention.step(NOW_S + 2 * 86_400):
            pass
        assert store.count() == 0 and sum(h["reports"] for h in store.rollup("pump-1")) == 41
        assert store.put([late, report(101, k3=NOW_S + 3600, k7=256)], now_s=NOW_S + 2 * 86_400) == [DUPLICATE] * 2
    with Store(place) as store:  # what was deleted is known after a restart, too
        assert store.put([late, report(6000)], now_s=NOW_S + 2 * 86_400) == [DUPLICATE, STORED]
        retention = store.retention(Keep(reports=1, hourly=10, daily=100))
        while retention.step(NOW_S + 50 * 86_400):
            pass
        assert store.rollup("pump-1") == [] and len(store.rollup("pump-1", "daily")) >= 1


def test_a_server_that_restarts_is_only_a_wait(postgres: Server) -> None:
    with Store(postgres.url) as store, store.collecting():
        assert store.put([report(1)]) == [STORED]
        postgres.kill()
        with pytest.raises(StoreError) as error:
            store.put([report(2)])
        assert "\n" not in str(error.value) and "secret" not in str(error.value)
        with pytest.raises(StoreError):
            store.devices()
        postgres.start()
        assert wait_for(lambda: _tries(store, [report(1), report(2)]) == [DUPLICATE, STORED])
        with pytest.raises(StoreError, match="another collector"), Store(postgres.url) as second, second.collecting():
            pass  # the claim was taken again, too
        with Store(postgres.url, shard="2/2") as other, other.collecting():
            assert other.put([report(1, device="pump-2")]) == [STORED]
        assert store.sequences("pump-1") == [1, 2]


def test_what_writes_first_after_a_restart_is_written(postgres: Server) -> None:
    """The connection is broken, and nobody has noticed yet."""
    with Store(postgres.url) as store:
        assert store.put([report(0)]) == [STORED]
        postgres.kill()
        postgres.start()
        assert store.put([report(1)]) == [STORED]
        postgres.stop()
        postgres.start()
        assert store.rows("SELECT count(*) FROM reports") == [(2,)]
        with pytest.raises(StoreError), store.transaction() as db:  # half done: never done twice
            db.execute("DELETE FROM reports WHERE sequence = ?", (0,))
            postgres.kill()
            postgres.start()
            db.execute("DELETE FROM reports WHERE sequence = ?", (1,))
        assert store.sequences("pump-1") == [0, 1]


@needs_mosquitto
def test_a_collector_and_a_dashboard_outlive_restarts_of_the_server(
    postgres: Server, tmp_path: Path, broker: Mosquitto
) -> None:
    """Real processes: what is acknowledged is committed, whatever happens to the server; both go on by themselves."""
    names = [f"dev-{n}" for n in range(4)]
    keys = {name: keyring.DeviceKeys(bytes([n + 1]) * 32, name) for n, name in enumerate(names)}
    (tmp_path / "keys").mkdir()
    for n, name in enumerate(names):
        (tmp_path / "keys" / f"{name}.key").write_text((bytes([n + 1]) * 32).hex() + "\n")
    url = tmp_path / "url"
    url.touch(0o600)
    url.write_text(postgres.url + "\n")
    with Store(postgres.url) as store:
        accounts.put(store, "otto", "operator", PASSWORD)
    acked: set[tuple[str, int]] = set()

    def on_ack(topic: str, payload: bytes) -> None:
        name = topic.split("/")[3]
        ranges = cbor2.loads(keys[name].ack.open(payload))[1]
        for first, last in zip(ranges[::2], ranges[1::2], strict=True):
            acked.update((name, number) for number in range(first, last + 1))

    def message(name: str, sequence: int) -> bytes:
        fields = {0: 1, 1: sequence, 2: 1, 3: int(time.time()), 5: 0, 7: 256, 8: 1, 9: 1, 16: b"abcd"}
        return keys[name].report.seal(wire.encode(fields))

    command = [sys.executable, "-m", "stonechat_tools.cli", "collect", "--broker", f"127.0.0.1:{broker.port}"]
    command += ["--plain", "--keys", str(tmp_path / "keys"), "--database-file", str(url), "--dashboard", "127.0.0.1:0"]
    log = tmp_path / "collect.log"
    with contextlib.ExitStack() as opened:
        process = subprocess.Popen(command, stderr=opened.enter_context(log.open("wb")), stdout=subprocess.DEVNULL)
        opened.callback(process.wait, 40)
        opened.callback(process.terminate)
        page = opened.enter_context(dashboard(tmp_path / "none.db", "--login", "--database-file", str(url)))
        sender = Peer(broker.port, "sender")
        sender.topics, sender.on_message = [wire.PREFIX + "+/ack"], on_ack
        opened.enter_context(sender)
        assert wait_for(sender.connected.is_set)
        sent = 0

        def send() -> None:
            nonlocal sent
            sent += 1
            for name in names:
                sender.publish(f"{wire.PREFIX}{name}/report", message(name, sent))

        def committed() -> set[tuple[str, int]]:
            with Store(postgres.url) as store:
                return {(name, number) for name in names for number in store.sequences(name)}

        assert wait_for(lambda: (send(), time.sleep(0.1), acked)[2], 60), log.read_text()
        (own,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert b"secret" not in Path(f"/proc/{own}/cmdline").read_bytes()
        with urllib.request.urlopen(
            log.read_text().partition("the fleet is at ")[2].split()[0] + "api/fleet"
        ) as answer:
            assert answer.status == 200
        me, first = page.log_in("otto"), sent + 1  # what was sent before is lost if nobody had subscribed
        for stop in (postgres.kill, postgres.stop):
            before = log.stat().st_size
            send()
            stop()
            known = set(acked)
            for _ in range(20):
                send()
            assert wait_for(lambda at=before: b"postgresql://" in log.read_bytes()[at:], 30)
            assert len(acked - known) <= 4 * 2  # at most what was committed as it stopped
            status, _, data = page.ask("/api/login", {"name": "otto", "password": PASSWORD})
            assert status == 503 and b"secret" not in data and b"Traceback" not in data
            postgres.start()
            assert acked <= committed()
            me = page.log_in("otto")  # the first write
            silence = {"matcher": {"site": "x"}, "hours": 1}
            assert page.ask("/api/silences", silence, **me)[0] in (200, 400)
            assert wait_for(
                lambda: acked >= {(name, number) for name in names for number in range(first, sent + 1)}, 60
            ), (len(acked), sent, log.read_text())
            assert wait_for(lambda at=before: b"well again" in log.read_bytes()[at:], 30), log.read_text()
        assert committed() == acked
        assert process.poll() is None
    said = log.read_text()
    assert "Traceback" not in said and "secret" not in said, said


def _tries(store: Store, reports: list[wire.Report]) -> list[str] | None:
    try:
        return store.put(reports)
    except StoreError:
        return None


def test_a_table_that_is_locked_is_only_a_wait(postgres: Server) -> None:
    import psycopg

    with Store(postgres.url) as store, psycopg.connect(postgres.url) as other:
        store.put([report(1)])
        other.execute("LOCK TABLE devices IN ACCESS EXCLUSIVE MODE")
        results: list[list[str] | None] = []
        thread = threading.Thread(target=lambda: results.append(_tries(store, [report(2)])))
        thread.start()
        time.sleep(0.3)
        assert not results
        other.rollback()
        thread.join(20)
        assert results == [[STORED]]


def test_two_that_write_the_same_device_store_each_report_once(postgres: Server) -> None:
    """As after a change of shards: what one remembers is old, and the database says so."""
    with Store(postgres.url) as first, Store(postgres.url) as second:
        assert first.put([report(1)]) == [STORED] and second.put([report(2)]) == [STORED]
        with pytest.raises(StoreError):
            first.put([report(2)])
        assert first.put([report(2), report(3)]) == [DUPLICATE, STORED]
        assert second.sequences("pump-1") == [1, 2, 3]


def test_a_database_of_another_version_is_left_alone(postgres: Server) -> None:
    with Store(postgres.url) as store, store.transaction() as db:
        db.execute("UPDATE stonechat SET version = 99")
    with pytest.raises(StoreError, match="another version .99."):
        Store(postgres.url)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://127.0.0.1:1/x",
        "postgresql://a:geheim@nohost.invalid/x",
        "postgres://%",
        "postgresql://a:geheim:geheim@127.0.0.1:1/x",
        "postgresql://a:geheim/geheim@127.0.0.1:1/x",
        "postgresql://a:geheim@geheim@127.0.0.1:1/x",
        "postgresql://a:geheim geheim@127.0.0.1:1/x",
        "postgresql://a:geheim?geheim#geheim@127.0.0.1:1/x",
        "postgresql://a:%geheim@127.0.0.1:1/x",
        "postgresql://127.0.0.1:1/x?user=a&password=geheim@geheim",
    ],
)
def test_a_server_that_is_not_there_is_named_without_its_password(url: str) -> None:
    with pytest.raises((StoreError, ConfigError)) as error:
        Store(url)
    assert "\n" not in str(error.value) and "geheim" not in str(error.value)


@pytest.mark.parametrize(
    "verb",
    ["fleet", "collect --keys {keys}", "command --keys {keys} d-1 report-now", "export", "dashboard", "report d-1"],
)
def test_a_password_is_taken_from_a_file_and_refused_on_the_command_line(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "keys").mkdir()
    words = [word.format(keys=tmp_path / "keys") for word in verb.split()]
    for url in ("postgresql://a:geheim@127.0.0.1:1/x", "postgresql://127.0.0.1:1/x?user=a&password=geheim"):
        with pytest.raises(SystemExit):
            cli.main([*words, "--db", url])
        said = capsys.readouterr().err
        assert "pgpass" in said and "--database-file" in said and "geheim" not in said
    place = tmp_path / "database"
    place.write_text("postgresql://a:geheim@127.0.0.1:1/x\n")
    place.chmod(0o640)
    with pytest.raises(SystemExit):
        cli.main([*words, "--database-file", str(place)])
    assert f"chmod 600 {place}" in capsys.readouterr().err
    for wrong in (tmp_path, tmp_path / "none", "/dev/null"):
        with pytest.raises(SystemExit):
            cli.main([*words, "--database-file", str(wrong)])
        assert str(wrong) in capsys.readouterr().err


def test_a_file_and_a_passfile_reach_the_server(
    postgres: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Store(postgres.url) as store:
        store.put([report(1)])
    place = tmp_path / "database"
    place.touch(0o600)
    place.write_text(postgres.url + "\n")
    assert cli.main(["fleet", "--json", "--database-file", str(place)]) == 0
    assert "pump-1" in capsys.readouterr().out
    passfile = tmp_path / "pgpass"
    passfile.touch(0o600)
    passfile.write_text(f"127.0.0.1:{postgres.port}:*:tester:secret\n")
    monkeypatch.setenv("PGPASSFILE", str(passfile))
    assert cli.main(["fleet", "--json", "--db", f"postgresql://tester@127.0.0.1:{postgres.port}/postgres"]) == 0
    assert "pump-1" in capsys.readouterr().out


def test_a_killed_collectors_claim_is_waited_for(
    postgres: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server notices a kill -9 or a dead machine later than a supervisor starts the next one."""
    with contextlib.ExitStack() as opened, contextlib.ExitStack() as dead:
        dead.enter_context(dead.enter_context(Store(postgres.url)).collecting())
        timer = threading.Timer(1.5, dead.close)
        timer.start()
        store = collect._open(postgres.url, Shard(), opened, threading.Event(), time.monotonic() + 60)
        assert store.put([report(1)]) == [STORED]
        assert "another collector" in capsys.readouterr().err
        monkeypatch.setattr(collect, "HELD_S", 0.5)
        with pytest.raises(StoreError, match="another collector"):
            collect._open(postgres.url, Shard(), opened, threading.Event(), time.monotonic() + 60)
        timer.join()


def test_a_machine_that_died_leaves_its_claim_for_half_a_minute(postgres: Server) -> None:
    with Store(postgres.url) as store:
        for name, least, most in (("tcp_keepalives_idle", 1, 15), ("tcp_keepalives_interval", 1, 5)):
            ((value,),) = store.rows(f"SHOW {name}")
            assert least <= int(value) <= most, name


def test_the_greatest_numbers_of_a_device_hold_up_no_sum(place: str) -> None:
    """A device's key is enough to send them: they must not keep the others' reports from being counted and deleted."""
    with Store(place) as store:
        retention = store.retention(Keep(reports=1, hourly=400, daily=400))
        top = 0xFFFFFFFF
        most: dict[str, Any] = {"k3": NOW_S, "k4": top, "k7": None, "k9": top, "k11": top, "k12": [top, top, top]}
        for batch in range(3):
            made = [report(100 * batch + n, **most) for n in range(1, 9)]
            store.put([*made, report(100 * batch + 9, k3=NOW_S)], now_s=NOW_S)
            for _ in range(3):
                retention.step(NOW_S + 1000)
        with store.transaction() as db:
            db.execute("UPDATE hourly SET score_sum_q8 = 9000000000000000000")
        store.put([report(900, **most)], now_s=NOW_S)
        retention.step(NOW_S + 1000)
        assert [hour["reports"] for hour in store.rollup("pump-1")] == [28]


def test_what_comes_after_all_was_deleted_counts_in_its_hour(place: str) -> None:
    with Store(place) as store:
        retention = store.retention(Keep(reports=1, hourly=400, daily=400))
        for day in (0, 4):
            now_s = NOW_S + 86_400 * day
            store.put([report(100 * day + n, k3=now_s) for n in range(1, 9)], now_s=now_s)
            for _ in range(4):
                retention.step(now_s + 1000)
            for _ in range(4):
                retention.step(now_s + 2 * 86_400)
            assert store.count() == 0
        assert [hour["reports"] for hour in store.rollup("pump-1")] == [8, 8]
