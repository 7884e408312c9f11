"""The examples of embedding run as they are, but for the broker's port, and say that they are there."""

import os
import queue
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion
from stonechat_tools.device.build import build
from stonechat_tools.fleet import keyring, wire
from stonechat_tools.fleet.local_broker import LocalBroker
from targets import ROOT, Target, targets

KEYS = keyring.DeviceKeys(bytes(32), "sensor-7")
ARCHITECTURE = {"unix-x64": "x64", "unix-i386": "x86", "unix-armhf": "armv6m"}
EXAMPLES = ROOT / "examples"


@contextmanager
def statuses(port: int) -> Iterator["queue.Queue[wire.Status]"]:
    """What a collector hears on the device's status topic."""
    heard: queue.Queue[wire.Status] = queue.Queue()
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id="test")

    def on_connect(*_: Any) -> None:
        client.subscribe("stonechat/1/fleet/sensor-7/status", 1)

    def on_message(_client: Any, _user: Any, message: Any) -> None:
        heard.put(wire.open_status("sensor-7", KEYS, message.payload))

    client.on_connect = on_connect
    client.on_message = on_message
    client.connect("127.0.0.1", port)
    client.loop_start()
    try:
        yield heard
    finally:
        client.disconnect()
        client.loop_stop()


def runs(command: list[str], example: str, model: str, folder: Path, **environment: str) -> None:
    """It says that it is there, and its last will says that it has gone."""
    with LocalBroker() as broker:
        text = (EXAMPLES / example).read_text()
        assert '"localhost"' in text
        there = text.replace('host="localhost"', f'host="127.0.0.1", port={broker.port}')
        (folder / example).write_text(there.replace('"localhost"', f'"127.0.0.1", {broker.port}'))
        shutil.copyfile(ROOT / "models" / model / "model.tflite", folder / "model.tflite")
        with statuses(broker.port) as heard:
            process = subprocess.Popen([*command, example], cwd=folder, env=dict(os.environ, **environment))
            try:
                status = heard.get(timeout=60)
                assert status.online and status.learning and status.window_ms and status.sources
                assert process.poll() is None
            finally:
                process.kill()
                process.wait()
            assert not heard.get(timeout=60).online


def lines(example: str) -> list[str]:
    """Of code, without comments, docstring, blanks and the key."""
    text = (EXAMPLES / example).read_text()
    return [line for line in text.splitlines() if line.strip() and not line.startswith(("#", '"""', "KEY"))]


def test_on_linux(tmp_path: Path) -> None:
    assert len(lines("embed_linux.py")) <= 8
    runs([sys.executable], "embed_linux.py", "linux-proc-1", tmp_path)


@pytest.mark.parametrize("target", targets(), ids=lambda target: target.name)
def test_on_a_board(target: Target, tmp_path: Path) -> None:
    assert len(lines("embed_board.py")) <= 4  # the loop is the firmware's own
    if target.missing:
        pytest.skip(f"{target.name}: {target.missing}")
    build(ARCHITECTURE[target.name], tmp_path / "built")
    runs(target.command, "embed_board.py", "micropython-1", tmp_path, MICROPYPATH=f"{tmp_path}/built:.frozen")
