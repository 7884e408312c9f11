"""One attack against the whole of it: the real agent with its configuration, a real broker, and nothing given by hand.

The device's ordinary day is recorded for half a minute, and a model made of it that looks at the network only: what
else the machine does meanwhile is not the device's. Then the agent watches with the default rules (throttle at the
alarm, quarantine three windows later, the hook), and the attack begins.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from stonechat.errors import ConfigError
from stonechat.linux.respond import family_of
from stonechat.linux.schemas import LINUX_PROC_1
from stonechat.policy import NETWORK

from ..fleet.local_broker import mosquitto_path
from ..lab import attacks, benign, spaces
from ..lab.bounds import stopped
from ..modeling.device_path import features_q8
from ..modeling.fit import fit
from .respond_world import BROKER, SEEN, Capture, World, world

WINDOW_MS = 500
RECORDED = 60  # windows
QUIET_S = 15.0  # without an alarm, before the attack
ATTACK_S = 20.0
PORT = 1883
_JITTER = 48  # a fifth of an octave on top of what was seen
_RECORD = """
import json, sys, time
from stonechat.linux.proc import ProcCollector
from stonechat.linux.schemas import LINUX_PROC_1 as schema
from stonechat.window import Window
collector, window = ProcCollector(("eth0",)), Window(schema, int(sys.argv[1]))
values, rows = [0] * len(schema), []
due_s = time.monotonic()
while len(rows) < int(sys.argv[2]):
    collector.read(values)
    if window.push(values, int(time.monotonic() * 1000)):
        rows.append([window.elapsed_ms, *window.deltas])
    due_s += int(sys.argv[1]) / 1000
    time.sleep(max(0, due_s - time.monotonic()))
print(json.dumps(rows))
"""
_CONFIG = """[device]
id = "bench-1"
key_file = "{folder}/device.key"
state_file = "{folder}/state/state"
[model]
file = "{folder}/model.tflite"
[collector]
bpf = false
interfaces = ["eth0"]
learn_peers_hours = 0
[mqtt]
host = "{broker}"
port = {port}
tls = false
[report]
outbox_dir = "{folder}/outbox"
[response]
mode = "on"
hook = ["{folder}/hook"]
"""


def _model(where: World, path: Path) -> None:
    """Of the device's network alone: other features may be anything."""
    words = [*where.inside, sys.executable, "-c", _RECORD, str(WINDOW_MS), str(RECORDED)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=True)
    seen = np.array(json.loads(done.stdout))
    found = features_q8(LINUX_PROC_1, seen[:, 1:], seen[:, 0], WINDOW_MS)
    rng = np.random.default_rng(0)
    rows = found[rng.integers(len(found), size=800)] + rng.normal(0, _JITTER, (800, found.shape[1])).round()
    for i, column in enumerate(LINUX_PROC_1.columns):
        if family_of(column[0]) != NETWORK:
            rows[:, i] = rng.integers(0, 25_600, 800)
    path.write_bytes(fit(rows.clip(0).astype(int), LINUX_PROC_1, WINDOW_MS).to_tflite("bench-network", 1))


def live(attack: str = "scan_connect") -> dict[str, Any]:
    """Raises ConfigError where mosquitto is missing, or nothing happens."""
    broker = mosquitto_path()
    if broker is None:
        raise ConfigError("the run with the real agent needs mosquitto (apt-get install mosquitto)")
    with contextlib.ExitStack() as stack:
        where = stack.enter_context(world(600))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stonechat-respond-")))
        folder.chmod(0o711)
        device = benign.spawn("sensor", 300, BROKER, spaces.GATEWAY, prefix=where.inside, pace=4.0)
        stack.callback(stopped, device)
        _model(where, folder / "model.tflite")
        for name, mode, text in (
            ("device.key", 0o600, os.urandom(32).hex() + "\n"),
            ("hook", 0o755, f'#!/bin/sh\necho "$STONECHAT_LEVEL $STONECHAT_FAMILIES" >> {folder}/marks/called\n'),
            ("mosquitto.conf", 0o644, f"listener {PORT} {BROKER}\nallow_anonymous true\nuser root\n"),
            ("stonechat.toml", 0o644, _CONFIG.format(folder=folder, broker=BROKER, port=PORT)),
        ):
            (folder / name).write_text(text)
            (folder / name).chmod(mode)
        (folder / "marks").mkdir()
        (folder / "marks").chmod(0o777)
        started = subprocess.Popen(
            [*where.outside, broker, "-c", str(folder / "mosquitto.conf")], stderr=subprocess.DEVNULL
        )
        stack.callback(stopped, started, 20.0)
        log = folder / "log"
        with log.open("wb") as file:
            words = [*where.inside, str(Path(sys.executable).parent / "stonechat-agent"), "--config"]
            agent = subprocess.Popen([*words, str(folder / "stonechat.toml")], stdout=file, stderr=file)
        stack.callback(stopped, agent, 20.0)
        capture = Capture(where.net.outside)
        stack.callback(capture.close)
        time.sleep(QUIET_S)
        quiet = log.read_text()
        if "alarm" in quiet or agent.poll() is not None:
            raise ConfigError("the agent is not quiet on an ordinary day:\n" + quiet[-2000:])
        times = _attack(where, attack, log)
        return {
            "attack": attack,
            **times,
            **_figures(capture, attack, times),
            "hook": _hook(folder),
            "log": log.read_text(),
        }


def _attack(where: World, attack: str, log: Path) -> dict[str, float]:
    """-> wall clock at the attack's begin, the alarm, the throttle and the quarantine, as the log says them."""
    process = attacks.spawn(attack, ATTACK_S + 5, spaces.NETWORK, prefix=where.inside)
    times = {"began_s": time.time()}
    words = {
        "alarm_s": "alarm: score",
        "throttle_s": "response: throttle for",
        "quarantine_s": "response: quarantine for",
    }
    try:
        while time.time() < times["began_s"] + ATTACK_S:
            text = log.read_text()
            for name, word in words.items():
                if name not in times and word in text:
                    times[name] = time.time()
            time.sleep(0.005)
    finally:
        stopped(process)
    return times


def _figures(capture: Capture, attack: str, times: dict[str, float]) -> dict[str, Any]:
    if "quarantine_s" not in times:
        return {}
    mine = [packet.at_s for packet in capture.packets if SEEN[attack](packet) and packet.at_s >= times["began_s"]]
    return {
        "alarm_after_s": times["alarm_s"] - times["began_s"],
        "last_packet_after_alarm_s": max(mine) - times["alarm_s"],
        "packets_before_alarm": sum(at_s < times["alarm_s"] for at_s in mine),
        "packets_in_throttle": sum(times["throttle_s"] <= at_s < times["quarantine_s"] for at_s in mine),
        "packets_in_quarantine": sum(at_s >= times["quarantine_s"] for at_s in mine),
        "throttle_lasted_s": times["quarantine_s"] - times["throttle_s"],
        "quarantine_seen_s": times["began_s"] + ATTACK_S - times["quarantine_s"],
    }


def _hook(folder: Path) -> str:
    called = folder / "marks/called"
    return called.read_text().strip() if called.exists() else ""
