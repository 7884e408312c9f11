"""Two brokers behind HAProxy, two collectors, one PostgreSQL, and real agents; a broker and a collector are killed.

HAProxy sends each device to the broker that its client id gives. Each collector listens to both brokers and takes the
devices of its shard. Each device is the agent's own outbox, delivery and MQTT client, many in one process. Required:
each report in the database once, none taken for a replay, and all devices back within BACK_S of the broker's loss.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from stonechat.delivery import Delivery
from stonechat.errors import StonechatError
from stonechat.mqtt import Client
from stonechat.outbox_memory import MemoryOutbox

from ..fleet import keyring, shards
from ..fleet.local_broker import LocalBroker, free_port, mosquitto_path
from ..fleet.store import Store
from .postgres_server import Server, missing

DEVICES, REPORTS = 200, 50
BACK_S = 5.0
SUPERVISOR_S = 10.0
LIMIT_S = 400.0
HAPROXY = shutil.which("haproxy", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
CONFIG = """
global
  maxconn 2000
defaults
  mode tcp
  timeout connect 2s
  timeout client 120s
  timeout server 120s
frontend mqtt
  bind 127.0.0.1:{front}
  tcp-request inspect-delay 5s
  tcp-request content reject unless {{ req.payload(0,0),mqtt_is_valid }}
  default_backend brokers
backend brokers
  balance hash req.payload(0,0),mqtt_field_value(connect,client_identifier)
  hash-type consistent
  option redispatch
  server m1 127.0.0.1:{first} check inter 250 fall 2 on-marked-down shutdown-sessions
  server m2 127.0.0.1:{second} check inter 250 fall 2 on-marked-down shutdown-sessions
"""


def what_is_missing() -> str:
    """Why it can't run here, "" where it can."""
    if HAPROXY is None or mosquitto_path() is None:
        return "haproxy or mosquitto is not installed (make setup, as root)"
    return missing()


class Verdict:
    score_q8, surprise_q8, evidence_q8, level = 300, 250, 20, 0
    changed = learning = unfit = False

    def explain(self, k: int = 3) -> list[tuple[int, int, int]]:
        return [(41, -100, 55), (3, 80, 30), (78, 20, 15)][:k]


class Device:
    """One agent, moved by step() as its loop would."""

    def __init__(self, name: str, secret: bytes, port: int) -> None:
        self.name = name
        self.delivery = Delivery(
            name, secret, MemoryOutbox(65_536), heartbeat_windows=1, bytes_per_day=0, resend_ms=2000
        )
        self.client = cast(Any, Client(name, "127.0.0.1", port, keepalive_s=30))
        self.client.resend = False
        self.client.on_message = self.delivery.on_message
        self.client.on_connect = self.delivery.reconnected
        self.client.on_published = self.delivery.on_published
        for topic in self.delivery.subscriptions:
            self.client.subscribe(topic)
        self.made: list[int] = []
        self.back_s: float | None = None  # when it was connected again after a loss

    def step(self, make: bool) -> None:
        now_ms = time.monotonic_ns() // 1_000_000
        with contextlib.suppress(StonechatError, OSError):
            self.client.poll()
        if self.client.connected and self.back_s is None:
            self.back_s = time.monotonic()
        if not self.client.connected:
            self.back_s = None
        if make:
            self.made.append(self.delivery.outbox.sequence)
            self.delivery.observe(Verdict(), now_ms)
        if self.client.connected:
            with contextlib.suppress(StonechatError, OSError):
                self.delivery.pump(self.client.publish, now_ms)

    @property
    def empty(self) -> bool:
        return self.delivery.outbox.after(0) is None


class Proof:
    def __init__(self, folder: Path, devices: int, reports: int) -> None:
        self.folder = folder
        self.reports = reports
        self.ports = [free_port(), free_port()]
        self.front = free_port()
        self.said: list[str] = []
        keys = folder / "keys"
        keys.mkdir()
        secrets = {f"device-{n:03}": keyring.new_secret() for n in range(devices)}
        for name, secret in secrets.items():
            (keys / f"{name}.keys").write_text(keyring.derived_text([secret], keyring.COLLECTOR_LABELS))
        self.devices = [Device(name, secret, self.front) for name, secret in secrets.items()]
        self.collectors: list[subprocess.Popen[bytes] | None] = [None, None]

    def start_collector(self, at: int, url: str) -> None:
        command = [
            sys.executable,
            "-m",
            "stonechat_tools.cli",
            "collect",
            "--plain",
            "--keys",
            str(self.folder / "keys"),
        ]
        command += ["--broker", f"127.0.0.1:{self.ports[0]}", "--also", f"127.0.0.1:{self.ports[1]}"]
        url_file = self.folder / "database"
        url_file.touch(0o600)
        url_file.write_text(url + "\n")
        command += ["--database-file", str(url_file)]
        with (self.folder / f"collector-{at + 1}.log").open("ab") as log:
            self.collectors[at] = subprocess.Popen([*command, "--shard", f"{at + 1}/2"], stdout=log, stderr=log)

    def turn(self, seconds: float, make_every_s: float = 0.0) -> None:
        """The devices live for a while; with make_every_s each makes a report this often."""
        end_s = time.monotonic() + seconds
        due_s = time.monotonic()
        while time.monotonic() < end_s:
            make = bool(make_every_s) and time.monotonic() >= due_s and len(self.devices[0].made) < self.reports
            due_s += make_every_s if make else 0.0
            for device in self.devices:
                device.step(make)
            time.sleep(0.03)

    def until(self, what: str, done: Any) -> float:
        """-> seconds that it took. Raises OSError after LIMIT_S."""
        began_s = time.monotonic()
        while not done():
            self.turn(0.05)
            for at, collector in enumerate(self.collectors):
                if collector is not None and collector.poll() is not None:
                    said = (self.folder / f"collector-{at + 1}.log").read_text()[-500:]
                    raise OSError(f"{what}: collector {at + 1} has ended by itself ({collector.returncode}): {said}")
            if time.monotonic() - began_s > LIMIT_S:
                logs = [log.read_text()[-300:] for log in self.folder.glob("collector-*.log")]
                left = [
                    (d.name, d.delivery.outbox.oldest, d.delivery.outbox.sequence) for d in self.devices if not d.empty
                ]
                raise OSError(f"{what}: not within {LIMIT_S:.0f} s; outboxes: {left[:5]}; collectors: {logs}")
        return time.monotonic() - began_s

    def run(self, server: Server, brokers: Sequence[LocalBroker]) -> dict[str, Any]:
        for at in (0, 1):
            self.start_collector(at, server.url)
        self.until("all devices connected", lambda: all(d.client.connected for d in self.devices))
        each = max(2, self.reports // 5)
        every_s = 0.5
        self.turn(max(11.0, each * every_s), every_s)  # a stable connection
        lost_s = time.monotonic()
        brokers[0].kill()
        self.until("the loss noticed", lambda: any(not d.client.connected for d in self.devices))
        self.until("all devices back", lambda: all(d.client.connected for d in self.devices))
        back = sorted(d.back_s - lost_s for d in self.devices if d.back_s and d.back_s > lost_s)
        self.turn(each * every_s, every_s)
        killed = self.collectors[0]
        assert killed is not None
        killed.kill()
        killed.wait()
        self.turn(SUPERVISOR_S, every_s)  # its supervisor's wait
        self.start_collector(0, server.url)
        while len(self.devices[0].made) < self.reports:
            self.turn(every_s, every_s)
        drained_s = self.until("all outboxes empty", lambda: all(d.empty for d in self.devices))
        return {"moved": len(back), "back_s": round(back[-1], 2) if back else 0.0, "drained_s": round(drained_s, 1)}

    def check(self, url: str) -> list[str]:
        """What is wrong with the database, one line each."""
        wrong = []
        with Store(url) as store:
            known = {device["device"]: device for device in store.devices()}
            for device in self.devices:
                found = store.sequences(device.name)
                if found != device.made:
                    wrong.append(f"{device.name}: stored {len(found)} of {len(device.made)}, or not in order")
                elif known[device.name]["conflicts"] or device.delivery.outbox.lost:
                    wrong.append(f"{device.name}: {known[device.name]['conflicts']} conflicts")
            if store.rejections():
                wrong.append(f"rejected: {store.rejections()}")
        for log in self.folder.glob("collector-*.log"):
            if "Traceback" in log.read_text():
                wrong.append(log.read_text()[-500:])
        return wrong

    def end(self) -> None:
        for collector in self.collectors:
            if collector is not None and collector.poll() is None:
                collector.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    collector.wait(30)
                collector.kill()


@contextlib.contextmanager
def haproxy(folder: Path, front: int, ports: Sequence[int]) -> Iterator[None]:
    assert HAPROXY
    config = folder / "haproxy.cfg"
    config.write_text(CONFIG.format(front=front, first=ports[0], second=ports[1]))
    with (folder / "haproxy.log").open("ab") as log:
        process = subprocess.Popen([HAPROXY, "-f", str(config), "-db"], stdout=log, stderr=log)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def prove(devices: int = DEVICES, reports: int = REPORTS) -> tuple[dict[str, Any], list[str]]:
    """-> figures, and what is wrong."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stonechat-shards-")))
        folder.chmod(0o755)
        (folder / "pg").mkdir()
        server = Server(folder / "pg")
        server.start()
        stack.callback(server.kill)
        proof = Proof(folder, devices, reports)
        config = "allow_anonymous true\npersistence false\nmax_queued_messages 20000\n"
        brokers = [stack.enter_context(LocalBroker(f"listener {p} 127.0.0.1\n{config}", p)) for p in proof.ports]
        stack.enter_context(haproxy(folder, proof.front, proof.ports))
        stack.callback(proof.end)
        figures = proof.run(server, brokers)
        proof.end()
        wrong = proof.check(server.url)
        figures |= {"devices": devices, "reports": sum(len(device.made) for device in proof.devices)}
        figures["shards"] = [sum(shards.owner(d.name, 2) == n for d in proof.devices) for n in (1, 2)]
        if figures["back_s"] > BACK_S:
            wrong.append(f"the last device was back after {figures['back_s']} s")
        return figures, wrong


def soak(scale: float) -> bool:
    why = what_is_missing()
    if why:
        print(f"left out: {why}")
        return True
    figures, wrong = prove(DEVICES, max(10, int(REPORTS * scale)))
    print(figures)
    for line in wrong[:20]:
        print(f"WRONG: {line}")
    return not wrong
