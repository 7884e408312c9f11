"""What the fleet's tests share: a mosquitto of their own on a free loopback port, devices that really report."""

import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion
from stonechat.errors import MQTTError

MOSQUITTO = shutil.which("mosquitto") or ("/usr/sbin/mosquitto" if Path("/usr/sbin/mosquitto").exists() else None)
needs_mosquitto = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed (make setup, as root)")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    end_s = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value or time.monotonic() > end_s:
            return value
        time.sleep(0.02)


class Mosquitto:
    """One broker process; `conf` may be restarted after kill()."""

    def __init__(self, conf: Path, port: int) -> None:
        self.conf = conf
        self.port = port
        self.process: subprocess.Popen[bytes] | None = None

    @classmethod
    def plain(cls, folder: Path) -> "Mosquitto":
        port = free_port()
        conf = folder / "plain.conf"
        conf.write_text(
            f"user {'root' if os.geteuid() == 0 else 'mosquitto'}\nlistener {port} 127.0.0.1\n"
            "allow_anonymous true\nmax_queued_messages 20000\n"
        )
        return cls(conf, port)

    def start(self) -> "Mosquitto":
        assert MOSQUITTO
        with open(self.conf.with_suffix(".log"), "ab") as log:
            self.process = subprocess.Popen([MOSQUITTO, "-c", str(self.conf)], stdout=log, stderr=log)
        assert wait_for(self._listens), self.conf.with_suffix(".log").read_text()
        return self

    def _listens(self) -> bool:
        assert self.process and self.process.poll() is None, self.conf.with_suffix(".log").read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False

    def signal(self, number: int) -> None:
        assert self.process
        self.process.send_signal(number)

    def reload(self) -> None:
        """Have it read its accounts and lists again, and wait until it does."""
        log = self.conf.with_suffix(".log")
        before = log.read_text().count("Reloading config")
        self.signal(signal.SIGHUP)
        assert wait_for(lambda: log.read_text().count("Reloading config") > before), log.read_text()

    def kill(self) -> None:
        """As by kill -9."""
        if self.process:
            self.process.kill()
            self.process.wait(10)

    def __enter__(self) -> "Mosquitto":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()


class Peer:
    """A paho client in its own thread that keeps what it gets."""

    def __init__(
        self,
        port: int,
        client_id: str,
        *,
        tls: ssl.SSLContext | None = None,
        user: str | None = None,
        password: str | None = None,
        version: int = paho.MQTTv5,
    ) -> None:
        self.got: list[tuple[str, bytes]] = []
        self.pubacks: dict[int, Any] = {}
        self.refused: Any = None
        self.connected = threading.Event()
        self.subscribed = threading.Event()
        self._turned_away = threading.Event()
        self.on_message: Callable[[str, bytes], Any] | None = None
        self.topics: list[str] = []
        client = paho.Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=version)
        if tls:
            client.tls_set_context(tls)
        if user is not None:
            client.username_pw_set(user, password)
        client.on_connect = self._on_connect
        client.on_connect_fail = lambda *_: self._turned_away.set()
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = lambda *_: self.subscribed.set()
        client.on_message = self._on_message
        client.on_publish = lambda _c, _u, mid, reason, _p: self.pubacks.__setitem__(mid, reason)
        client.reconnect_delay_set(1, 2)
        self.client = client
        self.port = port

    def _on_connect(self, client: Any, _user: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            self.refused = reason
            self._turned_away.set()
            return
        if self.topics:
            client.subscribe([(topic, 1) for topic in self.topics])
        self.connected.set()

    def _on_disconnect(self, *_: Any) -> None:
        if not self.connected.is_set():
            self._turned_away.set()
        self.connected.clear()

    def is_refused(self) -> bool:
        """Waits for an attempt to connect that fails -> whether none succeeded."""
        return self._turned_away.wait(20) and not self.connected.is_set()

    def is_ready(self) -> bool:
        """Waits until it is connected and has its subscriptions."""
        return self.connected.wait(20) and (not self.topics or self.subscribed.wait(20))

    def _on_message(self, _client: Any, _user: Any, message: Any) -> None:
        self.got.append((message.topic, message.payload))
        if self.on_message:
            self.on_message(message.topic, message.payload)

    def start(self, host: str = "127.0.0.1") -> "Peer":
        self.client.connect_async(host, self.port, keepalive=10)
        self.client.loop_start()
        return self

    def publish(self, topic: str, payload: bytes, qos: int = 1, retain: bool = False) -> None:
        if not self.connected.is_set():
            raise MQTTError("not connected")
        if self.client.publish(topic, payload, qos, retain).rc:
            raise MQTTError("not taken")

    def stop(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()

    def __enter__(self) -> "Peer":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


class FakeVerdict:
    """A verdict as a head gives it."""

    def __init__(self, level: int = 0, score_q8: int = 300) -> None:
        self.score_q8 = score_q8
        self.surprise_q8 = 250
        self.evidence_q8 = 5000 if level else 20
        self.level = level
        self.changed = False
        self.learning = False
        self.unfit = False

    def explain(self, k: int = 3) -> list[tuple[int, int, int]]:
        return [(41, -100, 55), (3, 80, 30), (78, 20, 15)][:k]


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with Mosquitto.plain(tmp_path) as running:
        yield running
