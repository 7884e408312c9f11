"""The collector as a process, with a real broker or a hostile one: one key file, topic, packet, pipe, disk or database
costs at most its own device or batch, and every outage has its line."""

import contextlib
import json
import os
import signal
import socket
import sqlite3
import ssl
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet_support import FakeVerdict, Mosquitto, Peer, broker, free_port, needs_mosquitto, wait_for
from stonechat.delivery import Delivery
from stonechat.outbox import Outbox
from stonechat_tools import cli, console
from stonechat_tools.fleet import certificates, keyring, provision, services, wire
from stonechat_tools.fleet.collector import Collector
from stonechat_tools.fleet.mqtt_codec import Message
from stonechat_tools.fleet.store import Store

__all__ = ["broker"]
pytestmark = pytest.mark.slow(4)
PREFIX = "stonechat/1/fleet/"


def secret_of(n: int) -> bytes:
    return bytes([n + 1]) * 32


def message(n: int, sequence: int, level: int = 0, **more: Any) -> bytes:
    """A report of device dev-N; more: k14=3 sets key 14."""
    fields = {0: 1, 1: sequence, 2: 1, 3: int(time.time()), 5: level, 7: 256, 8: 1, 9: 1, 16: b"abcd"}
    fields |= {int(name[1:]): value for name, value in more.items()}
    return keyring.DeviceKeys(secret_of(n), f"dev-{n}").report.seal(wire.encode(fields))


class Process:
    """`stonechat collect` with keys of dev-0 to dev-4."""

    def __init__(self, folder: Path, port: int, *more: str, stdout: Any = subprocess.DEVNULL) -> None:
        self.keys = folder / "keys"
        self.keys.mkdir(exist_ok=True)
        for n in range(5):
            (self.keys / f"dev-{n}.key").write_text(secret_of(n).hex() + "\n")
        self.db = folder / "fleet.db"
        self.log = folder / "collect.log"
        command = [sys.executable, "-m", "stonechat_tools.cli", "collect", "--broker", f"127.0.0.1:{port}", "--plain"]
        command += ["--keys", str(self.keys), "--db", str(self.db), *more]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=stdout, stderr=log)

    def said(self) -> str:
        return self.log.read_text()

    def stored(self, device: str = "dev-0") -> list[int]:
        with contextlib.suppress(sqlite3.Error):
            db = sqlite3.connect(f"file:{self.db}?mode=ro", uri=True)
            try:
                return [
                    row[0]
                    for row in db.execute(
                        "SELECT sequence FROM reports WHERE device = (SELECT id FROM devices WHERE name = ?)"
                        " ORDER BY sequence",
                        (device,),
                    )
                ]
            finally:
                db.close()
        return []

    def rss_kb(self) -> int:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(40)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)


@contextlib.contextmanager
def ready(process: Process, port: int) -> Iterator[Peer]:
    """A sender, once the collector is subscribed."""
    sender = Peer(port, "sender")
    sender.topics = [PREFIX + "+/ack"]
    with sender:
        assert wait_for(sender.connected.is_set)

        def heard() -> bool:
            sender.client.publish(PREFIX + "dev-4/report", message(4, 1), 1)
            time.sleep(0.1)
            return bool(process.stored("dev-4"))

        assert wait_for(heard, 30), process.said()
        yield sender


def send(sender: Peer, topic: str, payload: bytes, qos: int = 1) -> None:
    sender.client.publish(PREFIX + topic, payload, qos)


BAD_KEYS: dict[str, Callable[[Path], object]] = {
    "bad-1": lambda path: path.write_text(""),
    "bad-2": lambda path: path.mkdir(),
    "bad-3": lambda path: os.mkfifo(path),
    "bad-4": lambda path: path.symlink_to(path.name),
    "bad-5": lambda path: path.write_bytes(b"\xff\xfe" + b"0" * 64),
    "bad-6": lambda path: path.symlink_to("/dev/zero"),
}


@needs_mosquitto
def test_key_files_topics_and_payloads_cost_their_own_device_only(tmp_path: Path, broker: Mosquitto) -> None:
    with Process(tmp_path, broker.port) as collector, ready(collector, broker.port) as sender:
        for name, make in BAD_KEYS.items():
            make(collector.keys / f"{name}.key")
            send(sender, f"{name}/report", message(0, 1))
            send(sender, f"{name}/status", b"x")
        for device in ("\u00e9", "x" * 3000, "[red]", "..", "-", "\U0001f426", " "):
            send(sender, f"{device}/report", b"x" * 600)
        for payload in (b"", b"\x84", b"\x9f" * 500, bytes(60_000), message(0, 1)[:-1], b"\x84\x43\xa1\x01\x04\xa0"):
            send(sender, "dev-0/report", payload)
            send(sender, "dev-0/status", payload)
        for n in range(5, 15):
            send(sender, "dev-0/report", message(0, n))
        assert wait_for(lambda: collector.stored() == list(range(5, 15))), collector.said()
        assert wait_for(lambda: sum(topic == PREFIX + "dev-0/ack" for topic, _ in sender.got) >= 1)
        assert wait_for(lambda: all(f"{name}.key" in collector.said() for name in BAD_KEYS)), collector.said()
        assert collector.end() == 0
        said = collector.said()
        assert "Traceback" not in said and "unknown device" in said


@needs_mosquitto
def test_a_folder_of_keys_that_is_away_is_said_once_and_once_when_it_is_back(tmp_path: Path, broker: Mosquitto) -> None:
    with Process(tmp_path, broker.port) as collector, ready(collector, broker.port) as sender:
        os.rename(collector.keys, tmp_path / "away")
        for n in range(5, 20):
            send(sender, "dev-0/report", message(0, n))
        assert wait_for(lambda: f"{collector.keys}: no such folder" in collector.said()), collector.said()
        assert wait_for(lambda: _rejected(collector.db).get("key file") == 15), collector.said()
        assert collector.stored() == [] and "well again" not in collector.said()
        os.rename(tmp_path / "away", collector.keys)
        for n in range(5, 20):  # as a device does, which keeps what nobody has acknowledged
            send(sender, "dev-0/report", message(0, n))
        assert wait_for(lambda: collector.stored() == list(range(5, 20))), collector.said()
        assert wait_for(lambda: "well again" in collector.said()), collector.said()
        assert collector.end() == 0
        assert collector.said().count("no such folder") == collector.said().count("well again") == 1, collector.said()
        assert set(_rejected(collector.db)) == {"key file"}  # nobody is called unknown for it


def _rejected(path: Path) -> dict[str, int]:
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        return dict(db.execute("SELECT reason, sum(count) FROM rejections GROUP BY reason"))


@needs_mosquitto
@pytest.mark.parametrize("how", ["page killed", "collector killed"])
def test_the_dashboard_of_a_collector_holds_no_key_and_ends_with_it(
    tmp_path: Path, broker: Mosquitto, how: str
) -> None:
    with Process(tmp_path, broker.port, "--dashboard", "127.0.0.1:0") as process, ready(process, broker.port) as sender:
        url = process.said().partition("the fleet is at ")[2].split()[0]
        with urllib.request.urlopen(url + "api/fleet", timeout=30) as answer:
            assert answer.status == 200
        (page,) = Path(f"/proc/{process.process.pid}/task/{process.process.pid}/children").read_text().split()
        held = Path(f"/proc/{page}/cmdline").read_bytes().split(b"\0")
        assert b"dashboard" in held and not any(b"keys" in word for word in held)
        if how == "page killed":
            os.kill(int(page), signal.SIGKILL)
            assert wait_for(lambda: "dashboard has ended" in process.said(), 30), process.said()
            send(sender, "dev-0/report", message(0, 1))
            assert wait_for(lambda: process.stored() == [1], 30), process.said()
            assert process.end() == 0
        else:
            process.process.kill()
            process.process.wait(10)
            assert wait_for(lambda: not _answers(url), 30)


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
        return True
    return False


@needs_mosquitto
def test_a_dashboard_that_does_not_start_is_said_at_the_start(tmp_path: Path, broker: Mosquitto) -> None:
    with Process(tmp_path, broker.port, "--dashboard", "192.0.2.1:1") as process:
        assert process.process.wait(60) == 1
        assert "--dashboard 192.0.2.1:1" in process.said() and "Traceback" not in process.said()


@needs_mosquitto
def test_whoever_reads_the_lines_may_go_away_or_sleep(tmp_path: Path, broker: Mosquitto) -> None:
    read, write = os.pipe()
    with Process(tmp_path, broker.port, "--json", stdout=write) as collector:
        os.close(write)
        with ready(collector, broker.port) as sender:
            line = b""
            while not line.endswith(b"\n"):
                line += os.read(read, 1)
            assert json.loads(line)["device"] == "dev-4"
            for n in range(1, 800):  # more than a pipe holds, and nobody reads
                send(sender, "dev-0/report", message(0, n))
            assert wait_for(lambda: len(collector.stored()) == 799, 60), collector.said()
            os.close(read)
            for n in range(800, 830):
                send(sender, "dev-0/report", message(0, n))
            assert wait_for(lambda: len(collector.stored()) == 829), collector.said()
            assert wait_for(lambda: "its reader is gone" in collector.said())
            assert collector.process.poll() is None
        assert collector.end() == 0
        assert "Traceback" not in collector.said() and "Exception" not in collector.said()


@needs_mosquitto
@pytest.mark.parametrize("closed", ["0", "1", "2", "12"])
def test_closed_standard_files_are_not_taken_for_the_database(tmp_path: Path, broker: Mosquitto, closed: str) -> None:
    words = [sys.executable, "-m", "stonechat_tools.cli", "collect", "--plain", "--broker", f"127.0.0.1:{broker.port}"]
    with Process(tmp_path, broker.port, "--for", "0") as first:
        first.process.wait(30)
    words += ["--keys", str(first.keys), "--db", str(first.db), "--json"]
    shell = " ".join(f"{number}>&-" if number != "0" else "0<&-" for number in closed)
    process = subprocess.Popen(
        ["sh", "-c", f'exec "$0" "$@" {shell}', *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        with ready(first, broker.port) as sender:
            send(sender, "dev-0/report", message(0, 1))
            assert wait_for(lambda: first.stored() == [1])
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        with Store(first.db) as store:
            assert store.sequences("dev-0") == [1]
    finally:
        process.kill()
        process.wait()


class HostileBroker:
    """Accepts everybody, answers CONNECT and SUBSCRIBE, then sends `packets` and reads nothing more."""

    def __init__(self, packets: list[bytes | Callable[[socket.socket], None]]) -> None:
        self.packets = packets
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError, IndexError), client:
            five = client.recv(4096)[8:9] == b"\x05"
            client.sendall(b"\x20\x03\x00\x00\x00" if five else b"\x20\x02\x00\x00")
            asked = client.recv(4096)
            client.sendall((b"\x90\x05%s\x00\x01\x01" if five else b"\x90\x04%s\x01\x01") % asked[2:4])
            self.five = five
            for packet in self.packets if self.connections == 1 else self.packets[-1:]:
                if callable(packet):
                    packet(client)
                else:
                    client.sendall(with_properties(packet) if five else packet)
            while client.recv(4096):
                pass

    def close(self) -> None:
        self._listener.close()


def with_properties(packet: bytes) -> bytes:
    """A PUBLISH of version 3.1.1, of up to 127 bytes, as one of version 5; anything else as it is."""
    if packet[0] & 0xF0 != 0x30 or len(packet) < 8 or packet[1] != len(packet) - 2 or packet[1] > 126:
        return packet
    end = 4 + int.from_bytes(packet[2:4]) + (2 if packet[0] & 6 else 0)
    return packet[:1] + bytes([packet[1] + 1]) + packet[2:end] + b"\x00" + packet[end:]


def publish_packet(topic: bytes, payload: bytes, qos: int = 0) -> bytes:
    body = struct.pack(">H", len(topic)) + topic + (b"\x00\x07" if qos else b"") + payload
    length, rest = b"", len(body)
    while True:
        length += bytes([rest & 127 | (128 if rest > 127 else 0)])
        rest >>= 7
        if not rest:
            return bytes([0x30 | qos << 1]) + length + body


def huge(client: socket.socket) -> None:
    """256 MB less one byte, as one PUBLISH."""
    topic = (PREFIX + "dev-0/report").encode()
    client.sendall(b"\x32\xff\xff\xff\x7f" + struct.pack(">H", len(topic)) + topic + b"\x00\x09")
    left = 268_435_455 - 4 - len(topic)
    block = bytes(1 << 20)
    while left:
        left -= client.send(block[: min(left, len(block))])


@pytest.mark.parametrize("mqtt", ["5", "3.1.1", "paho"])
def test_a_packet_of_256_mb_costs_next_to_nothing(tmp_path: Path, mqtt: str) -> None:
    good = publish_packet((PREFIX + "dev-0/report").encode(), message(0, 3))
    hostile = HostileBroker([huge, good])
    most = begin = 0
    with Process(tmp_path, hostile.port, "--mqtt", mqtt) as collector:
        assert wait_for(lambda: hostile.connections, 30)
        begin = collector.rss_kb()
        end_s = time.monotonic() + 90
        while not collector.stored() and time.monotonic() < end_s:
            most = max(most, collector.rss_kb())
            time.sleep(0.02)
        assert collector.stored() == [3], collector.said()
        assert hostile.connections == 1  # it was read over, not run away from
        assert most - begin < 16_000, (begin, most)
        assert collector.end() == 0
    hostile.close()


@pytest.mark.parametrize("mqtt", ["5", "3.1.1", "paho"])
def test_packets_that_no_broker_sends_end_only_the_connection(tmp_path: Path, mqtt: str) -> None:
    good = publish_packet((PREFIX + "dev-0/report").encode(), message(0, 3))
    strange = [
        publish_packet(b"\xff\xfe", b"x"),
        publish_packet((PREFIX + "dev-0/report/more").encode(), message(0, 1)),
        publish_packet(b"elsewhere/dev-0/report", message(0, 1)),
        b"\x40\x02\xff\xff",  # an acknowledgement of nothing
        b"\x90\x03\x00\x01\x80",
        b"\x30\x01\x00",  # shorter than its topic's length
        b"\x32\x02\x00\x00",
        b"\x3f\x02\x00\x00",
        publish_packet((PREFIX + "dev-0/report").encode(), message(0, 9), 2),  # QoS 2, which nobody has asked for
        b"\xd0\xff\xff\xff\xff\x01",
        b"\x00\x00",
        b"\xf0\x00",
        b"\x20\x7f" + bytes(127),
    ]
    for i in range(len(strange)):
        folder = tmp_path / str(i)
        folder.mkdir()
        hostile = HostileBroker([strange[i], good])
        secrets = {"dev-0": secret_of(0)}
        with Store(folder / "db") as store:
            with Collector(store, keyring.Keys(secrets), host="127.0.0.1", port=hostile.port, mqtt=mqtt) as collector:
                assert wait_for(lambda store=store: store.sequences("dev-0") == [3], 20), (strange[i], collector.error)
            assert collector.failure is None
        hostile.close()


@needs_mosquitto
@pytest.mark.parametrize("mqtt", ["5", "3.1.1", "paho"])
def test_a_flood_during_a_lock_takes_bounded_memory_and_loses_no_report(
    tmp_path: Path, broker: Mosquitto, mqtt: str
) -> None:
    with Process(tmp_path, broker.port, "--mqtt", mqtt) as collector, ready(collector, broker.port) as sender:
        begin = collector.rss_kb()
        lock = sqlite3.connect(collector.db)
        lock.execute("BEGIN IMMEDIATE")
        most, blob = 0, os.urandom(60_000)
        for i in range(600):
            send(sender, "dev-1/report", blob, qos=i % 2)
            if i % 20 == 0:
                send(sender, "dev-0/report", message(0, i))
                time.sleep(0.05)
                most = max(most, collector.rss_kb())
        assert wait_for(lambda: "locked" in collector.said(), 30), collector.said()
        assert not sender.got or all(topic != PREFIX + "dev-0/ack" for topic, _ in sender.got)
        lock.rollback()
        lock.close()
        assert wait_for(lambda: collector.stored() == list(range(0, 600, 20)), 60), collector.said()
        assert most - begin < 40_000, (begin, most)
        assert collector.end() == 0


@needs_mosquitto
def test_a_database_that_is_moved_or_damaged_while_it_runs(tmp_path: Path, broker: Mosquitto) -> None:
    with Process(tmp_path, broker.port) as collector, ready(collector, broker.port) as sender:
        send(sender, "dev-0/report", message(0, 1))
        assert wait_for(lambda: collector.stored() == [1])
        os.rename(collector.db, tmp_path / "moved.db")
        send(sender, "dev-0/report", message(0, 2))
        assert wait_for(lambda: collector.stored() == [2]), collector.said()
        with Store(tmp_path / "moved.db") as moved:
            assert moved.sequences("dev-0") == [1]
        collector.db.write_bytes(b"overwritten by somebody" * 1000)
        for n in range(3, 40):
            send(sender, "dev-0/report", message(0, n))
            time.sleep(0.02)
        assert wait_for(lambda: collector.stored()[-1:] == [39], 30), collector.said()
        assert collector.process.poll() is None
        assert collector.end() == 0
        assert "moved" in collector.said() and "Traceback" not in collector.said()


@needs_mosquitto
def test_a_second_collector_on_the_same_database_is_refused(tmp_path: Path, broker: Mosquitto) -> None:
    with Process(tmp_path, broker.port) as first, ready(first, broker.port) as sender:
        second = Process(tmp_path, broker.port, "--client-id", "other")
        with second:
            assert second.process.wait(30) == 1
        assert f"another collector (process {first.process.pid})" in first.said()
        send(sender, "dev-0/report", message(0, 1))
        assert wait_for(lambda: first.stored() == [1])
        limits = Path(f"/proc/{first.process.pid}/limits").read_text()
        assert "Max core file size        0" in limits  # no key in a core dump


@needs_mosquitto
def test_a_fault_of_its_own_ends_it_with_nothing_acknowledged(tmp_path: Path, broker: Mosquitto) -> None:
    class Faulty(Store):
        def put(self, *args: Any, **more: Any) -> list[str]:
            raise RuntimeError("not foreseen")

    with Faulty(tmp_path / "db") as store:
        collector = Collector(store, keyring.Keys({"dev-0": secret_of(0)}), host="127.0.0.1", port=broker.port)
        sender = Peer(broker.port, "sender")
        sender.topics = [PREFIX + "+/ack"]
        with collector, sender:
            assert collector.connected.wait(20) and sender.connected.wait(20)
            send(sender, "dev-0/report", message(0, 1))
            assert wait_for(lambda: collector.failure is not None)
        assert isinstance(collector.failure, RuntimeError) and not sender.got
    keys = keyring.Keys({"dev-0": secret_of(0)})
    with Store(tmp_path / "db") as store, Collector(store, keys, host="127.0.0.1", port=broker.port):
        assert wait_for(lambda: store.sequences("dev-0") == [1])  # the broker has kept it


def test_a_message_that_cant_be_stored_costs_itself(tmp_path: Path) -> None:
    class Picky(Store):
        def put(self, reports: Any, *args: Any, **more: Any) -> list[str]:
            if any(report.sequence == 2 for report in reports):
                raise OverflowError("too large for the database")
            return super().put(reports, *args, **more)

    acked: list[int] = []

    class Client:
        def send(self, mids: list[int], publishes: list[tuple[str, bytes]], epoch: int | None = None) -> None:
            acked.extend(mids)

    with Picky(":memory:") as store:
        collector = Collector(store, keyring.Keys({"dev-0": secret_of(0)}))
        collector._clients = [Client()]
        collector._store([Message(PREFIX + "dev-0/report", message(0, n), n, 1) for n in (1, 2, 3)])
        assert store.sequences("dev-0") == [1, 3] and acked == [1, 2, 3]
        assert collector.counts["malformed"] == 1


def test_a_report_that_is_never_taken_is_refused_and_frees_its_place(tmp_path: Path) -> None:
    """Reports that a device has signed and that are none: what lies behind them arrives all the same."""
    pending: list[tuple[str, bytes]] = []

    class Client:
        def send(self, mids: list[int], publishes: list[tuple[str, bytes]], epoch: int | None = None) -> None:
            pending.extend(publishes)

    with Store(":memory:") as store:
        collector = Collector(store, keyring.Keys({"dev-0": secret_of(0)}))
        collector._clients = [Client()]
        device = Delivery(
            "dev-0", secret_of(0), Outbox(str(tmp_path / "box")), heartbeat_windows=1, bytes_per_day=0, resend_ms=1000
        )
        keys = keyring.DeviceKeys(secret_of(0), "dev-0")

        def spoiled(payload: bytes) -> bytes:
            """What the agent made, changed as another agent's fault or a wild clock might have."""
            import cbor2

            fields = cbor2.loads(keys.report.open(payload))
            change = {2: {3: 1 << 33}, 4: {0: 2}, 6: {5: 3}, 8: {13: "x" * 600}, 10: {9: None}}
            fields |= change.get(fields[1], {})
            return keys.report.seal(wire.encode(fields))

        def publish(topic: str, payload: bytes, qos: int, retain: bool) -> None:
            collector.take([Message(topic, spoiled(bytes(payload)), 1, 1)])

        for i in range(1, 40):
            if i <= 12:
                device.observe(FakeVerdict(), i * 10_000)
            device.pump(publish, i * 10_000)
            while pending:
                device.on_message(*pending.pop(0))
        assert store.sequences("dev-0") == [1, 3, 5, 7, 9, 11, 12]
        assert device.outbox.after(0) is None and device.refused == 5
        assert store.devices()[0]["refused"] == 5
        assert store.rejections() == {"dev-0": {"malformed": 3, "version": 1, "too large": 1}}


@contextlib.contextmanager
def tls_server(folder: Path, port: int, *, client_certificates: bool) -> Iterator[provision.Fleet]:
    fleet = provision.Fleet.init(folder / "fleet", provision.Settings("localhost", port))
    certificate, key = fleet.certificate("broker", ["wrong.example"] if not client_certificates else ["localhost"])
    (folder / "server.pem").write_bytes(certificates.pem(certificate) + certificates.pem_key(key))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    if client_certificates:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(fleet.folder / "ca.crt")
    listener = socket.create_server(("127.0.0.1", port))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                with contextlib.suppress(OSError), context.wrap_socket(client, server_side=True) as wrapped:
                    wrapped.recv(100)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield fleet
    finally:
        listener.close()


def outcome(tmp_path: Path, *more: str) -> tuple[int, str]:
    keys = tmp_path / "keys"
    keys.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "stonechat_tools.cli", "collect", "--keys", str(keys), "--for", "6"]
    done = subprocess.run(
        [*command, "--db", str(tmp_path / "db"), *more], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize("case", ["closed", "unresolved", "silent", "wrong name", "no certificate", "plain to TLS"])
def test_a_collector_that_never_connects_says_why(tmp_path: Path, case: str) -> None:
    port = free_port()
    if case == "closed":
        code, said = outcome(tmp_path, "--plain", "--broker", f"127.0.0.1:{port}")
        assert "refused" in said and str(port) in said
    elif case == "unresolved":
        code, said = outcome(tmp_path, "--plain", "--broker", "nohost.invalid")
        assert "can't be resolved" in said and "nohost.invalid" in said
    elif case == "silent":
        with socket.create_server(("127.0.0.1", port)):
            code, said = outcome(tmp_path, "--plain", "--broker", f"127.0.0.1:{port}", "--for", "12")
        assert "no answer" in said and str(port) in said
    else:
        with tls_server(tmp_path, port, client_certificates=case != "wrong name") as fleet:
            more = ["--broker", f"localhost:{port}"]
            more += ["--plain"] if case == "plain to TLS" else ["--cafile", str(fleet.folder / "ca.crt")]
            code, said = outcome(tmp_path, *more)
        wanted = {"wrong name": "certificate is not accepted", "no certificate": "--cert", "plain to TLS": "want TLS"}
        assert wanted[case] in said, said
    assert code == 1 and "never connected" in said


@needs_mosquitto
@pytest.mark.parametrize(
    ("prefix", "name", "device_id"),
    [("vendor/canary", "west", "pump-1"), ("a/b/" + "c" * 90 + "/" + "d" * 32, "f" * 40, "x" * 64)],
    ids=["ordinary", "longest that AWS IoT Core takes"],
)
def test_a_fleet_of_another_name_is_found_by_its_folder(
    tmp_path: Path, broker: Mosquitto, prefix: str, name: str, device_id: str
) -> None:
    services.check_topics("aws-iot-core", prefix, name)
    settings = provision.Settings("127.0.0.1", broker.port, fleet=name, prefix=prefix, auth="plain")
    fleet = provision.Fleet.init(tmp_path / "west", settings)
    place = fleet.add(device_id)
    command = [sys.executable, "-m", "stonechat_tools.cli", "collect", "--keys", str(tmp_path / "west/keys")]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*command, "--db", str(tmp_path / "db")], stdout=log, stderr=log)
    try:
        device = Delivery(
            device_id,
            keyring.read_secrets(place / "device.key")[0],
            Outbox(str(tmp_path / "box")),
            prefix=f"{prefix}/{name}/",
            heartbeat_windows=1,
            resend_ms=1000,
        )
        peer = Peer(broker.port, device_id)
        peer.topics = list(device.subscriptions)
        peer.on_message = device.on_message
        with peer:
            assert wait_for(peer.connected.is_set)
            device.observe(FakeVerdict(2), 1000)
            for i in range(1, 600):
                device.pump(peer.publish, 1000 + 100 * i)
                if device.outbox.after(0) is None:
                    break
                time.sleep(0.05)
        assert device.outbox.after(0) is None, (tmp_path / "log").read_text()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


@pytest.mark.parametrize("case", ["cafile", "cert", "key", "password-file"])
def test_a_fifo_in_place_of_a_file_is_not_waited_for(tmp_path: Path, case: str) -> None:
    fleet = provision.Fleet.init(tmp_path / "fleet", provision.Settings("localhost", 8883))
    place = fleet.folder / "collector"
    files = {"cafile": place / "ca.crt", "cert": place / "client.crt", "key": place / "client.key"}
    os.mkfifo(tmp_path / "fifo")
    files[case] = tmp_path / "fifo"
    words = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    code, said = outcome(tmp_path, "--broker", "localhost:1", *words)
    assert code == 1 and f"--{case}" in said and "not a regular file" in said


def test_a_fifo_in_place_of_a_text_is_waited_for_a_short_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Settings and models may come through a pipe, as the shell's <(...); of one that nobody writes it is said."""
    monkeypatch.setattr(console, "PIPE_S", 0.3)
    provision.Fleet.init(tmp_path / "f", provision.Settings("b", 1883, auth="plain"))
    os.mkfifo(tmp_path / "fifo")
    collect = ["collect", "--keys", str(tmp_path / "f/keys"), "--db", str(tmp_path / "db"), "--for", "0"]
    add = ["provision", "--dir", str(tmp_path / "f"), "add", "d-1"]
    for words in ([*collect, "--alerts"], [*add, "--model"]):
        assert cli.main([*words, str(tmp_path / "fifo")]) != 0
        assert "pipe" in capsys.readouterr().err
    writer = threading.Thread(target=(tmp_path / "fifo").write_text, args=["group_wait = '1s'\n"])
    writer.start()
    monkeypatch.setattr(console, "PIPE_S", 30.0)
    assert console.read_toml(tmp_path / "fifo") == {"group_wait": "1s"}
    writer.join()


def test_an_encrypted_key_asks_nobody_for_a_password(tmp_path: Path) -> None:
    fleet = provision.Fleet.init(tmp_path / "fleet", provision.Settings("localhost", 8883))
    place = fleet.folder / "collector"
    subprocess.run(
        ["openssl", "pkey", "-in", str(place / "client.key"), "-aes128", "-passout", "pass:x"]
        + ["-out", str(tmp_path / "locked.key")],
        check=True,
        capture_output=True,
    )
    code, said = outcome(
        tmp_path, "--broker", "localhost:1", "--cafile", str(place / "ca.crt"), "--cert", str(place / "client.crt"),
        "--key", str(tmp_path / "locked.key"),
    )  # fmt: skip
    assert code == 1 and "is encrypted" in said and "Enter PEM" not in said


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_disk_that_is_full_at_the_start_is_waited_for(tmp_path: Path, broker: Mosquitto) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)], check=True)
    try:
        with (disk / "fill").open("wb", buffering=0) as fill, pytest.raises(OSError, match="No space"):
            while True:
                fill.write(bytes(4096))
        with Process(tmp_path, broker.port, "--db", str(disk / "fleet.db")) as collector:
            collector.db = disk / "fleet.db"
            assert wait_for(lambda: "waiting for it" in collector.said(), 60), collector.said()
            assert "full" in collector.said() or "No space" in collector.said()
            (disk / "fill").unlink()
            with ready(collector, broker.port) as sender:
                send(sender, "dev-0/report", message(0, 1))
                assert wait_for(lambda: collector.stored() == [1], 60), collector.said()
            assert collector.end() == 0 and "Traceback" not in collector.said()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
