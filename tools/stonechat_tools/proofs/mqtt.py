"""70,000 publishes at QoS 1 through stonechat.mqtt to a real broker: none lost, no illegal packet id.

On CPython and on each MicroPython that is here, beyond the wrap of the packet ids at 65,535; the broker's own
subscriber (mosquitto_sub, where it is installed) writes down what arrived.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time

from stonechat_tools.console import working_copy
from stonechat_tools.fleet.local_broker import LocalBroker

PUBLISHES = 70_000
TIMEOUT_S = 900.0


def interpreters() -> dict[str, list[str]]:
    """CPython and the MicroPython targets that are installed -> their commands."""
    sys.path.insert(0, str(working_copy() / "firmware_tests"))
    try:
        from targets import targets
    finally:
        sys.path.pop(0)
    commands = {"cpython": [sys.executable]}
    for target in targets():
        if target.missing is None and target.name != "unix-armhf":  # emulated: too slow to soak
            commands[target.name] = target.command
    return commands


def publish_all(
    command: list[str], port: int, count: int, first_id: int = 1, *more: str, subscriber_port: int = 0
) -> tuple[str, int, float]:
    """Run life/publisher.py under `command` -> (its last line, distinct messages that arrived, seconds); more: the CA
    file, where `port` speaks TLS; subscriber_port: where the broker speaks plainly then. Raises OSError where it
    fails."""
    topic = "soak"
    arrived = tempfile.TemporaryFile("w+")  # noqa: SIM115 - a pipe would fill up, and the broker drop what does not fit
    subscriber = subprocess.Popen(
        ["mosquitto_sub", "-p", str(subscriber_port or port), "-t", topic, "-q", "1", "-i", "count", "-c"],
        stdout=arrived,
    )
    try:
        time.sleep(0.5)
        begun = time.monotonic()
        root = working_copy()
        environment = dict(os.environ, MICROPYPATH=f"{root}/agent:.frozen", PYTHONPATH=f"{root}/agent")
        done = subprocess.run(
            [
                *command,
                str(root / "firmware_tests/life/publisher.py"),
                str(port),
                str(count),
                str(first_id),
                topic,
                *more,
            ],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=environment,
        )
        took_s = time.monotonic() - begun
        if done.returncode:
            raise OSError(done.stdout[-300:] + done.stderr[-600:])
        size = -1
        while size != os.fstat(arrived.fileno()).st_size:  # until no more comes
            size = os.fstat(arrived.fileno()).st_size
            time.sleep(1.5)
        arrived.seek(0)
        numbers = set(arrived.read().split())
    finally:
        subscriber.terminate()
        subscriber.wait(10)
        arrived.close()
    return done.stdout.strip().splitlines()[-1], len(numbers), took_s


def soak(scale: float) -> bool:
    count = max(200, int(PUBLISHES * scale))
    if shutil.which("mosquitto_sub") is None:
        print("mosquitto_sub is not installed: nobody can count what arrives")
        return False
    held = True
    for name, command in interpreters().items():
        with LocalBroker() as broker:
            said, arrived, took_s = publish_all(command, broker.port, count, 1 if scale >= 1 else 65536 - count // 2)
        good = arrived == count and said.startswith(f"published {count} ") and " illegal 0 " in said
        held = held and good
        print(f"{name}: {said}; {arrived} of {count} arrived, {count / took_s:,.0f}/s" + ("" if good else "  WRONG"))
    return held
