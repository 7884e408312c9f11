"""A chaos run of the response with everything real: the daemon, mosquitto, the collector's signed renewals, signed
commands, and a broker that sends again what it has heard.

An alarm is the device's own counter, which moves a thousand times as fast; it goes through detection, rules and lease
as any other."""

import contextlib
import os
import secrets
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar, Self

from paho.mqtt import publish
from stonechat.commands import RELEASE
from stonechat.policy import ACTIONS, QUARANTINE, THROTTLE

from ..fleet import keyring, wire, wire_response
from ..fleet.collector import Collector
from ..fleet.local_broker import mosquitto_path
from ..fleet.renewals import Renewals
from ..fleet.store import Store
from .respond_agent import BROKER, BROKER_PORT, OPERATOR
from .respond_run import Run
from .world.devices import ALARM_FACTOR, JOBS_PER_S

DEVICE = "device-1"
PREFIX = wire.PREFIX.rstrip("/")
WINDOW_MS = 400
COUNT_EVERY_S = 0.05


class _Kept(Renewals):
    """Renewals that a hostile broker keeps."""

    kept: list[tuple[str, bytes]]

    def step(self) -> list[tuple[None, str, bytes]]:
        found = super().step()
        self.kept += [(topic, message) for _, topic, message in found]
        return found


class DaemonRun(Run):
    """models: a folder that make_models() has filled."""

    PACE = 3.0  # an alarm takes some windows, and a start a second or two
    CHANCES: ClassVar[dict[str, int]] = {
        **Run.CHANCES,
        "renew": 4,
        "kill_agent": 4,
        "start_agent": 5,
        "evidence_gone": 2,
    }

    def __init__(self, seed: int, t1_s: int, models: Path) -> None:
        super().__init__(seed, t1_s)
        self.models = models
        self.secret = secrets.token_bytes(32)
        self.device_keys = keyring.DeviceKeys(self.secret, DEVICE)
        self.renewals: list[tuple[str, bytes]] = []  # that were sent
        self.strange = False
        self.mosquitto: subprocess.Popen[bytes] | None = None
        self.ear: Collector | None = None
        self.number = int(time.time())

    def __enter__(self) -> "Self":
        super().__enter__()
        self.folder.chmod(0o711)
        self.store = Store(self.folder / "fleet.db")
        self.stack.callback(self.store.close)
        self.stack.callback(self.close_broker)
        self.stack.callback(self._stop_collector)
        self._write_files()
        self.counting = threading.Event()
        counter = threading.Thread(target=self._count, daemon=True)
        counter.start()
        self.stack.callback(counter.join)
        self.stack.callback(self.counting.set)
        self._start_collector()
        return self

    def _write_files(self) -> None:
        key = self.folder / "device.key"
        key.touch(mode=0o600)
        key.write_text(self.secret.hex() + "\n")
        self.jobs = self.folder / "jobs"
        self.jobs.write_text("0\n")
        action = ACTIONS[self.rng.choice((QUARANTINE, QUARANTINE, THROTTLE))]
        (self.folder / "stonechat.toml").write_text(f"""[device]
id = "{DEVICE}"
key_file = "{key}"
state_file = "{self.folder}/state/state"
[model]
file = "{self.models}/linux-proc-1.tflite"
[collector]
bpf = false
[counters]
list = [{{name = "jobs", unit = "jobs/s", kind = "rate", path = "{self.jobs}"}}]
schema = "jobs-1"
model = "{self.models}/jobs.tflite"
[mqtt]
host = "{BROKER}"
port = {BROKER_PORT}
tls = false
keepalive_s = 5
[report]
heartbeat_windows = 1
bytes_per_day = 100000000
resend_s = 2
outbox_dir = "{self.folder}/outbox"
[response]
mode = "on"
rules = [{{action = "{action}", seconds = {self.t1_s}, most_seconds = {self.t1_s}}}]
allow = [{{address = "{OPERATOR}", reason = "operator"}}]
""")

    def _count(self) -> None:
        """The product's own counter."""
        count = 0.0
        with open(self.jobs, "r+b", buffering=0) as file:
            while not self.counting.wait(COUNT_EVERY_S):
                count += COUNT_EVERY_S * JOBS_PER_S * (ALARM_FACTOR if self.strange else 1)
                os.pwrite(file.fileno(), b"%d\n" % count, 0)

    # --- the parts ----------------------------------------------------------------------------------------------------

    def command(self) -> list[str]:
        frames = "0" if self.no_egress else "1"
        module = "stonechat_tools.proofs.respond_daemon_agent"
        return [sys.executable, "-m", module, str(self.folder / "stonechat.toml"), str(self.folder), frames]

    def open_broker(self) -> None:
        if self.mosquitto is None:
            path = self.folder / "mosquitto.conf"
            path.write_text(
                f"listener {BROKER_PORT} 0.0.0.0\nallow_anonymous true\npersistence false\nuser root\nlog_dest none\n"
            )
            command = [str(mosquitto_path()), "-c", str(path)]
            self.mosquitto = self.outside.do(lambda: subprocess.Popen(command, stderr=subprocess.DEVNULL))

    def close_broker(self) -> None:
        if self.mosquitto is not None:
            self.mosquitto.kill()
            self.mosquitto.wait()
            self.mosquitto = None

    def _start_collector(self) -> None:
        if self.ear is None:
            keys = keyring.Keys({DEVICE: self.secret})
            renewals = _Kept(self.store, keys, prefix=PREFIX)
            renewals.kept = self.renewals
            self.ear = Collector(
                self.store, keys, host=BROKER, port=BROKER_PORT, prefix=PREFIX, renewals=renewals, mqtt="paho"
            )
            self.outside.do(self.ear.start)

    def _stop_collector(self) -> None:
        if self.ear is not None:
            self.ear.stop()
            self.ear = None

    def _publish(self, topic: str, message: bytes) -> None:
        def once() -> None:
            with contextlib.suppress(OSError):
                publish.single(topic, message, 1, hostname=BROKER, port=BROKER_PORT)

        self.outside.do(once)

    # --- what happens -------------------------------------------------------------------------------------------------

    def _alarm(self) -> None:
        self.strange = True

    def _evidence_gone(self) -> None:
        self.strange = False

    def _renew(self) -> None:
        """The collector renews by itself; here a hostile broker does, with a message of before, or with another key."""
        if self.renewals:
            topic, message = self.rng.choice(self.renewals)
            if self.rng.random() < 0.3:
                lease = next((each["lease"] for each in self.store.decisions(DEVICE) if each["lease"]), 1)
                thief = keyring.DeviceKeys(secrets.token_bytes(32), DEVICE)
                message = wire_response.seal_renewal(thief, int(time.time() * 1000) & 0xFFFFFFFF, 0xFFFFFFFF, lease)
            self._publish(topic, message)

    def _release(self) -> None:
        self.number += 1
        message = wire.seal_command(self.device_keys, self.number, int(time.time()) + 60, RELEASE)
        self._publish(f"{PREFIX}/{DEVICE}/command", message)

    def _kill_collector(self) -> None:
        self._stop_collector()

    def _broker_back(self) -> None:
        super()._broker_back()
        self._start_collector()

    def settle(self) -> None:
        """Nobody renews any more, and the alarm ends."""
        self.strange = False
        self._stop_collector()

    def judge(self) -> None:
        super().judge()
        if self.outcome.renewals > len(self.renewals):
            text = f"{self.outcome.renewals} renewals were taken, {len(self.renewals)} were sent"
            self.outcome.lock_outs.append(text)
