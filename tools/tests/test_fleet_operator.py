"""`stonechat operator`: what a dashboard asks for is signed in a process that alone can; what it may ask is bounded."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet_support import FakeVerdict, Mosquitto, Peer, broker, needs_mosquitto, wait_for
from stonechat.delivery import Delivery
from stonechat.errors import ConfigError, StonechatError
from stonechat.outbox_memory import MemoryOutbox
from stonechat_tools.cli import main
from stonechat_tools.fleet import command, keyring, operator, provision, wire
from stonechat_tools.fleet.collect import Collector
from stonechat_tools.fleet.store import Store

__all__ = ["broker"]


class Sent(list[tuple[str, bytes]]):
    def __call__(self, topic: str, payload: bytes) -> None:
        self.append((topic, payload))


@pytest.fixture
def fleet(tmp_path: Path) -> provision.Fleet:
    made = provision.Fleet.init(tmp_path / "fleet", provision.Settings("127.0.0.1", 1883, auth="plain"))
    made.add("pump-1")
    return made


@pytest.fixture
def sent() -> Sent:
    return Sent()


@pytest.fixture
def door(tmp_path: Path, fleet: provision.Fleet, sent: Sent) -> Iterator[Path]:
    keys = keyring.Keys(fleet.folder / "operator/keys")
    with Store(":memory:") as store:
        signer = operator.Operator(keys, store, sent, allow=("mute", "report-now", "was-normal"))
        opened = operator.Door(tmp_path / "socket", signer)
        yield tmp_path / "socket"
        opened.close()


def raw(path: Path, data: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(20)
        got = b""
        with contextlib.suppress(ConnectionError, BlockingIOError):
            asking.connect(str(path))
            asking.sendall(data)
            asking.shutdown(socket.SHUT_WR)
            while part := asking.recv(4096):
                got += part
        return got


def test_a_request_becomes_a_command_that_the_device_obeys(fleet: provision.Fleet, door: Path, sent: Sent) -> None:
    secret = keyring.read_secrets(fleet.folder / "devices/pump-1/device.key")[0]
    device = Delivery("pump-1", secret, MemoryOutbox())
    first = command.ask(door, "pump-1", "report-now", [])
    second = command.ask(door, "pump-1", "mute", [int(time.time()) + 60])
    assert second > first
    for topic, payload in sent:
        assert topic == "stonechat/1/fleet/pump-1/command"
        device.on_message(topic, payload)
    assert device.rejected == 0 and len(sent) == 2
    assert door.stat().st_mode & 0o777 == 0o660


@pytest.mark.parametrize(
    "request_line",
    [
        b"",
        b"nonsense",
        b"[1]",
        b"{}",
        b"\xff\xfe",
        b"[" * 3000,
        b'{"device": "../x", "command": "mute", "arguments": [1]}',
        b'{"device": "pump-9", "command": "report-now"}',
        b'{"device": "pump-1", "command": "release"}',
        b'{"device": "pump-1", "command": "mute"}',
        b'{"device": "pump-1", "command": "mute", "arguments": [4294967296]}',
        b'{"device": "pump-1", "command": "mute", "arguments": [4294967295]}',
        b'{"device": "pump-1", "command": "mute", "arguments": [true]}',
        b'{"device": "pump-1", "command": "mute", "arguments": "all"}',
        b'{"device": "pump-1", "command": "was-normal", "arguments": [1, 2]}',
        b'{"device": "pump-1", "command": ["mute"], "arguments": [1]}',
        b'{"device": "pump-1", "command": "report-now", "arguments": [' + b"1" * 5000 + b"]}",
    ],
)
def test_a_bad_request_costs_itself(door: Path, sent: Sent, request_line: bytes) -> None:
    assert "error" in json.loads(raw(door, request_line + b"\n").splitlines()[0])
    assert not sent
    good = b'{"device": "pump-1", "command": "report-now"}\n'
    assert [sorted(json.loads(line)) for line in raw(door, good * 2).splitlines()] == [["sequence"]] * 2


def test_nobody_can_flood_a_device_or_hold_all_connections(door: Path, sent: Sent) -> None:
    good = b'{"device": "pump-1", "command": "report-now"}\n'
    replies = [json.loads(line) for line in raw(door, good * (operator.MAX_PER_MINUTE + 5)).splitlines()]
    assert [sorted(reply) for reply in replies] == [["sequence"]] * operator.MAX_PER_MINUTE + [["error"]] * 5
    held = [socket.socket(socket.AF_UNIX) for _ in range(operator.MAX_CONNECTIONS + 5)]
    for each in held:
        each.connect(str(door))
    for each in held:
        each.close()
    assert wait_for(lambda: raw(door, b"{}\n"))
    raw(door, b"x" * 1_000_000)  # one endless line ends its connection
    assert b"error" in raw(door, b"{}\n")


def test_only_a_socket_that_nobody_listens_on_is_replaced(tmp_path: Path, door: Path) -> None:
    signer = object.__new__(operator.Operator)
    with pytest.raises(ConfigError, match="another operator"):
        operator.Door(door, signer)
    (tmp_path / "file").write_text("theirs")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name in ("file", "link"):
        with pytest.raises(ConfigError, match="no socket"):
            operator.Door(tmp_path / name, signer)
    assert (tmp_path / "file").read_text() == "theirs"
    with pytest.raises(ConfigError, match="No such file"):
        operator.Door(tmp_path / "none/socket", signer)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "stale"))
    operator.Door(tmp_path / "stale", signer).close()
    assert not (tmp_path / "stale").exists()
    with pytest.raises(ConfigError, match="is `stonechat operator` running"):
        command.ask(tmp_path / "stale", "pump-1", "report-now", [])


def test_the_collectors_keys_can_not_command(
    fleet: provision.Fleet, sent: Sent, capsys: pytest.CaptureFixture[str]
) -> None:
    with Store(":memory:") as store:
        signer = operator.Operator(keyring.Keys(fleet.folder / "keys"), store, sent)
        with pytest.raises(ConfigError, match="the operator has it"):
            signer.command("pump-1", "report-now", [])
    assert not sent
    db = str(fleet.folder / "db")
    assert main(["command", "pump-1", "report-now", "--keys", str(fleet.folder / "keys"), "--db", db]) == 1
    assert main(["command", "pump-1", "report-now", "--db", db]) == 1
    said = capsys.readouterr().err
    assert "the operator has it" in said and "--socket" in said


@pytest.mark.parametrize("keys", ["fleet/operator/keys", "keys"])
def test_a_folder_of_keys_that_is_not_there_is_named(
    keys: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["operator", "--keys", keys]) == 1
    expected = f"stonechat operator: {keys}: no such folder of keys; `stonechat provision` makes one\n"
    assert capsys.readouterr().err == expected and not list(tmp_path.iterdir())


@needs_mosquitto
def test_from_the_dashboards_side_to_the_device_and_back(tmp_path: Path, broker: Mosquitto) -> None:
    settings = provision.Settings("127.0.0.1", broker.port, auth="plain")
    fleet = provision.Fleet.init(tmp_path / "fleet", settings)
    place = fleet.add("pump-1")
    log = (tmp_path / "log").open("wb")
    words = [sys.executable, "-m", "stonechat_tools.cli", "operator", "--keys", str(fleet.folder / "operator/keys")]
    process = subprocess.Popen(words, stderr=log)
    device = Delivery("pump-1", keyring.read_secrets(place / "device.key")[0], MemoryOutbox(), heartbeat_windows=1)
    peer = Peer(broker.port, "pump-1")
    peer.topics = list(device.subscriptions)
    peer.on_message = device.on_message
    stop = threading.Event()

    def life() -> None:
        at_ms = 0
        while not stop.wait(0.05):
            at_ms += 50
            with contextlib.suppress(StonechatError):
                device.pump(peer.publish, at_ms)

    thread = threading.Thread(target=life)
    try:
        with (
            Store(tmp_path / "db") as store,
            Collector(store, keyring.Keys(fleet.folder / "keys"), host="127.0.0.1", port=broker.port) as collector,
            peer,
        ):
            assert collector.connected.wait(20) and wait_for(peer.connected.is_set)
            thread.start()
            path = fleet.folder / "operator/socket"
            assert wait_for(path.exists), (tmp_path / "log").read_text()
            device.observe(FakeVerdict(), 1)
            arguments = ["command", "pump-1", "report-now", "--socket", str(path), "--db", str(tmp_path / "db")]
            assert main(arguments) == 0
            assert store.commands("pump-1")[0]["result"] == 0
            limits = Path(f"/proc/{process.pid}/limits").read_text()
            assert "Max core file size        0" in limits or "Max core file size        1" in limits
            assert main([*arguments[:-2], "--db", str(tmp_path / "none")]) == 0
    finally:
        stop.set()
        if thread.ident:
            thread.join()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        log.close()
    assert not path.exists()
    assert f"user {os.getuid()}: pump-1 report-now [], number" in (tmp_path / "log").read_text()
    assert wire.COMMANDS["report-now"] == 5
