"""A private broker on loopback, for the demo and tests: mosquitto where it is installed, else amqtt from pip."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

START_S = 15.0

_AMQTT = """
import asyncio, sys
from amqtt.broker import Broker
config = {"listeners": {"default": {"type": "tcp", "bind": "127.0.0.1:" + sys.argv[1]}},
          "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}}
async def main():
    broker = Broker(config)
    await broker.start()
    await asyncio.sleep(86400)
asyncio.run(main())
"""


def free_port() -> int:
    """A TCP port on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def mosquitto_path() -> str | None:
    return shutil.which("mosquitto", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


class LocalBroker:
    """Runs while the `with` block does. `kind` is "mosquitto" or "amqtt", `port` where it listens on 127.0.0.1.

    config: lines of a mosquitto.conf in place of the plain anonymous one; they must listen on `port`. Raises OSError
    if no broker comes up."""

    def __init__(self, config: str | None = None, port: int | None = None) -> None:
        self.port = port or free_port()
        self.kind = "mosquitto" if mosquitto_path() else "amqtt"
        self._config = config or (
            f"listener {self.port} 127.0.0.1\nallow_anonymous true\npersistence false\nmax_queued_messages 100000\n"
        )
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    def start(self) -> "LocalBroker":
        self._folder = self._folder or Path(tempfile.mkdtemp(prefix="stonechat-broker-"))
        log = open(self._folder / "broker.log", "ab")  # noqa: SIM115 - the child keeps it
        if self.kind == "mosquitto":
            (self._folder / "mosquitto.conf").write_text(self._config)
            command = [str(mosquitto_path()), "-c", str(self._folder / "mosquitto.conf")]
        else:
            command = [sys.executable, "-c", _AMQTT, str(self.port)]
        self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        log.close()
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1.0).close()
                return self
            except OSError:
                time.sleep(0.05)
        running = self._process.poll() is None
        said = (self._folder / "broker.log").read_text(errors="replace").strip().splitlines()
        self.stop()
        if running:
            raise OSError(
                f"{self.kind} runs, but 127.0.0.1:{self.port} can't be reached: is loopback up (ip link set lo up)?"
            )
        raise OSError(f"{self.kind} did not come up on port {self.port}: {said[-1] if said else 'it said nothing'}")

    def kill(self) -> None:
        """End it as a crash would (SIGKILL); start() brings it back on the same port."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __enter__(self) -> "LocalBroker":
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
