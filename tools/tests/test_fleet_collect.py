"""Every report in the database exactly once, whatever dies on the way."""

import contextlib
import os
import shutil
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
from stonechat_tools.fleet import keyring, wire
from stonechat_tools.fleet.collector import Collector
from stonechat_tools.fleet.mqtt_codec import Message
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


@pytest.mark.slow(20)
@needs_mosquitto
def test_ten_thousand_reports_exactly_once_through_kills_of_broker_and_collector(
    tmp_path: Path, broker: Mosquitto
) -> None:
    keys = tmp_path / "keys"
    keys.mkdir()
    secrets = {f"agent-{i:02}": keyring.new_secret() for i in range(AGENTS)}
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
    secret = keyring.new_secret()
    device = Device("pump-1", secret, tmp_path, broker.port)
    with (
        Collector(store, keyring.Keys({"pump-1": secret}), host="127.0.0.1", port=broker.port) as collector,
        device.peer,
    ):
        assert collector.connected.wait(10) and device.peer.connected.wait(10)
        device.step(make=True)
        assert wait_for(lambda: collector.error == "disk full")
        assert not device.empty
        store.full = False
        assert wait_for(lambda: device.empty)
    assert store.count() == 1
    store.close()


@needs_mosquitto
def test_the_verbs_work_together(tmp_path: Path, broker: Mosquitto, capsys: pytest.CaptureFixture[str]) -> None:
    from stonechat_tools.cli import main

    keys = tmp_path / "keys"
    keys.mkdir()
    secret = keyring.new_secret()
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
    assert main(["command", "pump-1", "calibrate", "--expires", "1d", *base]) == 1
    assert "at most 23h" in capsys.readouterr().err  # a device whose clock is behind would refuse a day
    assert main(["command", "pump-1", "mute", *base]) == 1
    assert main(["command", "pump-9", "calibrate", *base]) == 1
    os.truncate(db, 100)
    assert main(["report", "--db", str(db)]) == 1
    said = capsys.readouterr().err
    assert "needs --until" in said and "Traceback" not in said


class Line:
    """A collector without a broker: what a device publishes is taken at once, acknowledgements wait in `pending`."""

    def __init__(self, store: Store, secret: bytes) -> None:
        self.pending: list[tuple[str, bytes]] = []
        self.collector = Collector(store, keyring.Keys({"board": secret}))
        self.collector._clients = [self]

    def send(self, mids: list[int], publishes: list[tuple[str, bytes]], epoch: int | None = None) -> None:
        self.pending += publishes

    def take(self, topic: str, payload: bytes, qos: int = 1, retain: bool = False) -> None:
        self.collector.take([Message(topic, bytes(payload), 1, 1)])

    def live(self, device: Delivery, windows: int, alarm_from: int = 1 << 30) -> None:
        """windows: of 10 s each, an alarm from `alarm_from` on."""
        self.take(device.status_topic, device.status(agent="1.0"))
        for n in range(windows):
            device.observe(FakeVerdict(2 if n >= alarm_from else 0, 100 + n % 800), n * 10_000)
            device.pump(self.take, n * 10_000)
            while self.pending:
                device.on_message(*self.pending.pop(0))


@pytest.mark.parametrize("clock", ["none", "set"])
def test_a_board_that_was_flashed_anew_is_heard_at_once(
    tmp_path: Path, clock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same id and key, an erased flash: numbers and boots begin again."""
    for module in ("report", "delivery"):
        monkeypatch.setattr(f"stonechat.{module}.epoch_s", lambda: 0 if clock == "none" else int(time.time()))
    secret = keyring.new_secret()
    with Store(":memory:") as store:
        line = Line(store, secret)
        for life in range(3):
            outbox = Outbox(str(tmp_path / str(life)), 8192)
            device = Delivery("board", secret, outbox, heartbeat_windows=6, bytes_per_day=0)
            line.live(device, 600, 300 if life else 1 << 30)
            assert outbox.after(0) is None and outbox.lost == 0
            assert store.devices()[0]["level"] == (2 if life else 0)
        assert store.devices()[0]["conflicts"] == 0 and store.rejections() == {}
        assert store.count() == line.collector.counts["stored"] >= 300
        assert sum(row.level == 2 for row in store.history("board", limit=10_000)) >= 100


def test_an_image_that_was_restored_is_heard_at_once(tmp_path: Path) -> None:
    secret = keyring.new_secret()
    with Store(":memory:") as store:
        line = Line(store, secret)
        for life, alarm_from in enumerate((1 << 30, 1 << 30, 20)):
            folder = tmp_path / str(life)
            if life:
                shutil.copytree(tmp_path / "image", folder)  # both later lives start from the same card
            device = Delivery("board", secret, Outbox(str(folder)), heartbeat_windows=1, bytes_per_day=0)
            line.live(device, 40, alarm_from)
            assert device.outbox.after(0) is None
            if not life:
                shutil.copytree(folder, tmp_path / "image")
        assert store.count() == 120 and store.devices()[0]["level"] == 2
        assert store.rejections() == {}


def test_a_device_that_was_rotated_starts_clean_whatever_a_thief_did(tmp_path: Path) -> None:
    old, new = keyring.new_secret(), keyring.new_secret()
    folder = tmp_path / "keys"
    folder.mkdir()
    (folder / "board.keys").write_text(keyring.derived_text([old], keyring.COLLECTOR_LABELS))
    with Store(":memory:") as store:
        line = Line(store, old)
        line.collector.keys = keyring.Keys(folder)
        device = Delivery("board", old, Outbox(str(tmp_path / "box")), heartbeat_windows=1, bytes_per_day=0)
        line.live(device, 20)
        stolen = keyring.DeviceKeys(old, "board")

        def steal(sequence: int, time_s: int) -> None:
            fields = {0: 1, 1: sequence, 2: 9, 3: time_s, 5: 0, 7: 1, 8: 1, 9: 1, 16: device.outbox.stream}
            line.take("stonechat/1/fleet/board/report", stolen.report.seal(wire.encode(fields)))

        now_s = int(time.time())
        for sequence in (0xFFFFFFFF, *range(21, 200)):
            steal(sequence, now_s)
        line.pending.clear()
        (folder / "board.keys").write_text(keyring.derived_text([new, old], keyring.COLLECTOR_LABELS))
        device = Delivery("board", new, Outbox(str(tmp_path / "box")), heartbeat_windows=1, bytes_per_day=0)
        line.live(device, 60, 30)
        assert device.outbox.after(0) is None
        steal(500, int(time.time()))  # the old key holds until the rotation is finished, but says nothing of the level
        found = store.devices()[0]
        assert found["level"] == 2 and found["conflicts"] == 0
        assert sum(row.level == 2 for row in store.history("board", limit=10_000)) == 30
