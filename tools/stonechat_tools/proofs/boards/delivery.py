"""The agent brought to an RP2040 as the documentation says, until the board reports: by `stonechat deploy` over its
serial port, and by mip over the network (PPP on its emulated UART).

    python -m stonechat_tools.proofs.boards.delivery       as root: a network namespace

The emulated board begins with an empty flash. Its network is a namespace with a real mosquitto and `stonechat collect`.
"""

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
import tty
from collections.abc import Iterator
from pathlib import Path

from stonechat.errors import ConfigError, StonechatError

from stonechat_tools.console import working_copy
from stonechat_tools.device.deploy import mpremote
from stonechat_tools.fleet.store import Store
from stonechat_tools.proofs.boards import ppp
from stonechat_tools.proofs.boards.firmware import Board, BuildError, build_all
from stonechat_tools.proofs.boards.handshake import clock
from stonechat_tools.proofs.boards.machine import BoardError, Machine, simulator

HTTP = 8000
FOR_S = 25  # of the board's life: two windows of the model
WAIT_S = 900.0
TURN = f"""
start_ms = time.ticks_ms()
while time.ticks_diff(time.ticks_ms(), start_ms) < {FOR_S}000:
    watch.tick()
    time.sleep_ms(20)
print("RUNS", watch.agent.windows, watch.agent.errors, watch.errors, watch.last_error or "-")
"""


def main_of_the_readme() -> str:
    """Its main.py, as far as the loop, and with a report of each window."""
    text = (working_copy() / "README.md").read_text()
    section = text.partition("\n## A board in three commands\n")[2].partition("\n## ")[0]
    main: str = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[1]
    begin = main.partition("while True")[0]
    if begin.count('firmware="1.4.2")') != 1:
        raise BoardError("README.md: its main.py is another one")
    return begin.replace('firmware="1.4.2")', 'firmware="1.4.2", heartbeat_windows=1)')


@contextlib.contextmanager
def serial_port(board: Board, there: ppp.Site) -> Iterator[str]:
    """The board with an empty file system, its UART on the PPP line -> its serial port, a terminal of this machine."""
    master, slave = os.openpty()
    tty.setraw(slave)
    command = ["setpriv", "--pdeathsig", "KILL", "node", str(simulator()), str(board.path), "--paced"]
    with subprocess.Popen(
        [*command, f"--uart={there.uart.fileno()}"],
        stdin=master,
        stdout=master,
        stderr=subprocess.DEVNULL,
        pass_fds=[there.uart.fileno()],
    ) as process:
        try:
            yield os.ttyname(slave)
        finally:
            process.kill()
            os.close(master)
            os.close(slave)


def run(*command: str, folder: Path | None = None) -> str:
    """-> what it printed. Raises BoardError."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=WAIT_S, cwd=folder, stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        raise BoardError(f"{' '.join(command[:4])}: {(done.stderr or done.stdout).strip()[-400:]}")
    return done.stdout


def stonechat(*words: str) -> str:
    return run(sys.executable, "-m", "stonechat_tools.cli", *words)


def heard(there: ppp.Site, printed: str) -> str:
    """What the collector has of the board, once its first report is there. Raises BoardError."""
    windows = re.search(r"RUNS (\d+) 0 0", printed)
    if not windows:
        raise BoardError(printed.strip()[-300:])
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with contextlib.suppress(StonechatError), Store(there.database) as store:
            for device in store.devices():
                if device["firmware"] == "1.4.2" and store.count("sensor-7"):
                    return f"{windows[1]} windows, {store.count('sensor-7')} reports of firmware 1.4.2 stored"
        time.sleep(1)
    raise BoardError(f"the collector has nothing of it: {there.log.read_text()[-300:]}")


def deployed(board: Board) -> str:
    """Raises BoardError, BuildError, ConfigError."""
    with ppp.site() as there, serial_port(board, there) as port:
        identity = str(there.fleet.folder / "devices/sensor-7/board")
        printed = stonechat(
            *("deploy", "--port", port, "--model", "micropython-1", "--hook", "--identity", identity, "--no-reset")
        )
        if "golden vectors: byte-equal on the board" not in printed:
            raise BoardError(printed)
        script = f"import boot\n{ppp.CONNECT}\n{main_of_the_readme()}\n{TURN}"
        return "deploy: " + heard(there, run(*mpremote(), "connect", port, "exec", script))


def installed(board: Board) -> str:
    """Raises BoardError, BuildError, ConfigError."""
    with ppp.site() as there, tempfile.TemporaryDirectory(prefix="stonechat-mip-") as scratch:
        url = f"http://{ppp.HOST}:{HTTP}"
        stonechat("build", "--arch", board.architecture, "--model", "micropython-1", "--url", url, "--out", scratch)
        served = str(Path(scratch) / board.architecture)
        server = [sys.executable, "-m", "http.server", str(HTTP), "--bind", ppp.HOST, "--directory", served]
        with (
            there.running(server),
            Machine(board, files=there.identity, uart=there.uart, paced=True) as machine,
        ):
            clock(machine)
            ppp.connect(machine)
            machine.run(f"import mip\nmip.install({url + '/package.json'!r})", WAIT_S)
            boot = "from stonechat.board import hooks\nhooks.install()\n"
            return "mip: " + heard(there, machine.run(f"{boot}import time\n{main_of_the_readme()}\n{TURN}", WAIT_S))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("deploy", "mip"), help="default both")
    args = parser.parse_args(arguments)
    try:
        (board,) = build_all(["rp2040"])
        for name, one in (("deploy", deployed), ("mip", installed)):
            if args.only in (None, name):
                began = time.monotonic()
                print(f"rp2040, {one(board)} ({time.monotonic() - began:.0f} s)", flush=True)
    except (BuildError, BoardError, ConfigError, StonechatError) as error:
        print(f"delivery: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
