"""Every report in the database exactly once, whatever dies on the way."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fleet_support import FakeVerdict, Mosquitto, Peer, broker, needs_mosquitto, wait_for
from stonechat.delivery import Delivery
from stonechat.errors import StonechatError
from stonechat.outbox import Outbox
from stonechat_tools.fleet import wire
from stonechat_tools.fleet.collect import Collector
from stonechat_tools.fleet.store import Store

__all__ = ["broker"]
AGENTS = 20
REPORTS = 500


class Device:
    """A reporter with its outbox on the medium and its own connection, driven as the agent's loop would."""

    def __init__(self, name: str, secret: bytes, folder: Path, port: int) -> None:
        self.name = name
        self.reporter = Delivery(
            name, secret, Outbox(str(folder / name), 131_072), heartbeat_windows=1, bytes_per_day=0, resend_ms=1000
        )
        self.peer = Peer(port, name)
        self.peer.topics = list(self.reporter.subscriptions)
        self.peer.on_message = self._on_message
        self.lock = threading.Lock()
        self.made: list[int] = []

    def _on_message(self, topic: str, payload: bytes) -> None:
        with self.lock:
            self.reporter.on_message(topic, payload)

    def now_ms(self) -> int:
        return time.monotonic_ns() // 1_000_000

    def step(self, make: bool) -> None:
        with self.lock:
            if make:
                self.made.append(self.reporter.outbox.sequence)
                self.reporter.observe(FakeVerdict(), self.now_ms())
            with contextlib.suppress(StonechatError, OSError):
                self.reporter.pump(self.peer.publish, self.now_ms())

    @property
    def empty(self) -> bool:
        with self.lock:
            return self.reporter.outbox.after(0) is None


def start_collector(port: int, keys: Path, db: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "stonechat_tools.cli", "collect", "--broker", f"127.0.0.1:{port}", "--plain"]
    command += ["--keys", str(keys), "--db", str(db)]
    with open(db.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


@needs_mosquitto
def test_ten_thousand_reports_exactly_once_through_kills_of_broker_and_collector(
    tmp_path: Path, broker: Mosquitto
) -> None:
    keys = tmp_path / "keys"
    keys.mkdir()
    secrets = {f"agent-{i:02}": wire.new_secret() for i in range(AGENTS)}
    for name, secret in secrets.items():
        (keys / (name + ".key")).write_text(secret.hex() + "\n")
    db = tmp_path / "fleet.db"
    collector = start_collector(broker.port, keys, db)
    devices = [Device(name, secret, tmp_path, broker.port) for name, secret in secrets.items()]
    try:
        for device in devices:
            device.peer.start()
        for i in range(REPORTS):
            for device in devices:
                device.step(make=True)
            if i in (120, 380):  # the broker dies with what it has acknowledged
                broker.kill()
            if i in (140, 400):
                broker.start()
            if i == 250:
                collector.kill()
                collector.wait()
            if i == 270:
                collector = start_collector(broker.port, keys, db)
            if i == 320:  # the network is cut for half of them
                for device in devices[::2]:
                    device.peer.stop()
                    device.peer.connected.clear()
            if i == 340:
                for device in devices[::2]:
                    device.peer.start()
            time.sleep(0.01)
        end_s = time.monotonic() + 100
        while not all(device.empty for device in devices) and time.monotonic() < end_s:
            for device in devices:
                device.step(make=False)
            time.sleep(0.02)
    finally:
        for device in devices:
            device.peer.stop()
        collector.send_signal(signal.SIGTERM)
        collector.wait(30)
    store = Store(db)
    left = {device.name: device.reporter.outbox.oldest for device in devices if not device.empty}
    assert not left, (left, db.with_suffix(".log").read_text()[-500:])
    for device in devices:
        assert store.sequences(device.name) == device.made
    assert store.count() == AGENTS * REPORTS
    assert [d.reporter.outbox.lost for d in devices] == [0] * AGENTS
    assert store.rejections() == {}


@needs_mosquitto
def test_nothing_is_acknowledged_that_is_not_committed(tmp_path: Path, broker: Mosquitto) -> None:
    class FullDisk(Store):
        full = True

        def put(self, *args: object, **more: object) -> list[str]:
            if self.full:
                from stonechat_tools.fleet.store import StoreError

                raise StoreError("disk full")
            return super().put(*args, **more)  # type: ignore[arg-type]

    store = FullDisk(tmp_path / "db")
    secret = wire.new_secret()
    device = Device("pump-1", secret, tmp_path, broker.port)
    with Collector(store, wire.Keys({"pump-1": secret}), host="127.0.0.1", port=broker.port) as collector, device.peer:
        assert collector.connected.wait(10) and device.peer.connected.wait(10)
        device.step(make=True)
        assert wait_for(lambda: collector.error == "disk full")
        assert not device.empty
        store.full = False
        assert wait_for(lambda: device.empty)
    assert store.count() == 1
    store.close()


def messages_of(folder: Path, count: int) -> tuple[bytes, list[bytes]]:
    secret = wire.new_secret()
    sent: list[bytes] = []
    reporter = Delivery("pump-1", secret, Outbox(str(folder / "box")), heartbeat_windows=1, bytes_per_day=0)
    for i in range(count):
        reporter.observe(FakeVerdict(i % 3), 1000 * i)
        reporter.pump(lambda topic, payload, qos: sent.append(bytes(payload)), 1000 * i)
    return secret, sent


def test_a_wiped_device_is_a_conflict_and_is_not_told_to_forget(tmp_path: Path) -> None:
    secret, (message,) = messages_of(tmp_path, 1)
    keys = wire.DeviceKeys(secret, "pump-1")
    report = wire.open_report("pump-1", keys, message)
    with Store(":memory:") as store:
        assert store.put([report, report]) == ["stored", "again"]
        fields = {0: 1, 1: report.sequence, 2: report.boot + 1, 3: 1_800_000_000, 5: 2, 7: 1, 8: 1, 9: 1}
        other = wire.open_report("pump-1", keys, keys.report.seal(wire.encode(fields)))
        assert store.put([other]) == ["conflict"]
        assert store.rejections() == {"pump-1": {"conflict": 1}}
        assert store.count() == 1


def test_history_of_a_device_without_a_clock_gets_its_time_later(tmp_path: Path) -> None:
    keys = wire.DeviceKeys(wire.new_secret(), "pump-1")

    def report(sequence: int, late: int | None = None) -> wire.Report:
        fields = {0: 1, 1: sequence, 2: 7, 4: 100 + sequence, 5: 0, 7: 256, 8: 1, 9: 1}
        if late is not None:
            fields[16] = late
        return wire.open_report("pump-1", keys, keys.report.seal(wire.encode(fields)))

    with Store(":memory:") as store:
        store.put([report(1), report(2, late=50)], now_s=1_800_000_000.0)
        rows = store.history("pump-1")
        assert [row.time_known for row in rows] == [False, True]
        assert rows[1].time_s == 1_800_000_000 - 50
        status = {0: 1, 2: 7, 3: 1_800_000_500, 4: 600, 5: True, 6: 1}
        store.put([], [wire.open_status("pump-1", keys, keys.status.seal(wire.encode(status)))])
        rows = store.history("pump-1")
        assert [row.time_s for row in rows] == [1_800_000_001, 1_800_000_002]
        assert all(row.time_known for row in rows)


def test_status_will_and_replays(tmp_path: Path) -> None:
    keys = wire.DeviceKeys(wire.new_secret(), "pump-1")

    def status(boot: int, number: int, online: bool = True) -> wire.Status:
        fields = {0: 1, 2: boot, 4: 5, 5: online} | ({6: number} if online else {})
        return wire.open_status("pump-1", keys, keys.status.seal(wire.encode(fields)))

    with Store(":memory:") as store:

        def online() -> bool:
            return bool(store.devices()[0]["online"])

        store.put([], [status(1, 1), status(1, 2)])
        assert online()
        store.put([], [status(1, 0, online=False)])
        assert not online()
        store.put([], [status(1, 1)])  # replayed by the broker
        store.put([], [status(1, 2)])  # the retained copy again
        assert not online()
        store.put([], [status(1, 3)])
        assert online()
        store.put([], [status(0, 9), status(0, 0, online=False)])
        assert online()
        assert store.rejections() == {"pump-1": {"stale": 3}}


def test_a_wiped_device_that_has_a_clock_is_heard_again(tmp_path: Path) -> None:
    keys = wire.DeviceKeys(wire.new_secret(), "pump-1")

    def status(boot: int, time_s: int, online: bool = True) -> wire.Status:
        fields = {0: 1, 2: boot, 3: time_s, 4: 5, 5: online} | ({6: 1} if online else {})
        return wire.open_status("pump-1", keys, keys.status.seal(wire.encode(fields)))

    with Store(":memory:") as store:
        store.put([], [status(40, 1_800_000_000), status(41, 1_800_100_000)])
        store.put([], [status(40, 1_800_000_000, online=False), status(1, 1_800_100_000)])  # older, or no later
        assert store.rejections() == {"pump-1": {"stale": 2}}
        assert store.devices()[0]["online"] and store.devices()[0]["boot"] == 41
        store.put([], [status(1, 1_800_200_000)])  # its flash was wiped
        assert store.devices()[0]["boot"] == 1
        store.put([], [status(1, 1_800_200_000, online=False)])
        assert not store.devices()[0]["online"]


@needs_mosquitto
def test_the_verbs_work_together(tmp_path: Path, broker: Mosquitto, capsys: pytest.CaptureFixture[str]) -> None:
    from stonechat_tools.cli import main

    keys = tmp_path / "keys"
    keys.mkdir()
    secret = wire.new_secret()
    (keys / "pump-1.key").write_text(secret.hex() + "\n")
    db = tmp_path / "fleet.db"
    collector = start_collector(broker.port, keys, db)
    device = Device("pump-1", secret, tmp_path, broker.port)
    stop = threading.Event()

    def life() -> None:
        for i in range(10_000):
            device.step(make=i < 5)
            if stop.wait(0.02):
                return

    thread = threading.Thread(target=life)
    try:
        device.peer.start()
        thread.start()
        base = ["--keys", str(keys), "--db", str(db), "--broker", f"127.0.0.1:{broker.port}", "--plain"]
        assert wait_for(lambda: device.peer.connected.is_set() and db.exists() and not device.peer.refused)
        assert main(["command", "pump-1", "mute", "--until", "1h", *base]) == 0
        assert "mute: accepted" in capsys.readouterr().out
        assert main(["command", "pump-1", "release", *base]) == 3
        assert "not supported" in capsys.readouterr().err
        assert wait_for(lambda: device.empty)
    finally:
        stop.set()
        thread.join()
        device.peer.stop()
        collector.send_signal(signal.SIGINT)
        assert collector.wait(30) == 0
    png = tmp_path / "plot.png"
    assert main(["report", "pump-1", "--db", str(db), "--plot", str(png), "--terminal"]) == 0
    assert png.read_bytes()[:4] == b"\x89PNG" and "level" in capsys.readouterr().out
    assert main(["report", "pump-1", "--db", str(db), "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert main(["report", "pump-1", "--db", str(db)]) == 0
    assert main(["report", "--db", str(db)]) == 0
    assert "pump-1" in capsys.readouterr().out
    assert main(["report", "pump-9", "--db", str(db)]) == 1
    assert main(["report", "--db", str(tmp_path / "none.db")]) == 1
    assert main(["command", "pump-1", "mute", *base]) == 1
    assert main(["command", "pump-9", "calibrate", *base]) == 1
    os.truncate(db, 100)
    assert main(["report", "--db", str(db)]) == 1
    said = capsys.readouterr().err
    assert "needs --until" in said and "Traceback" not in said
