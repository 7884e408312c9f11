"""A signed model over the air to an RP2040: PPP on its emulated UART, a real mosquitto, `stonechat collect` and
`stonechat release`.

    python -m stonechat_tools.proofs.boards.updates       as root: a network namespace

Version 2 is pulled in chunks, verified, tried after a reset (restart=machine.reset) and final with the collector's
confirmation. Version 3 is pulled and tried while the collector is away: at its third start without a confirmation the
board goes back to version 2 by itself, and the collector hears of it.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from stonechat.board.schema import MICROPYTHON_1
from stonechat.errors import ConfigError, StonechatError

from stonechat_tools.fleet.store import Store
from stonechat_tools.proofs.boards import ppp
from stonechat_tools.proofs.boards.firmware import Board, BuildError, build_all
from stonechat_tools.proofs.boards.handshake import clock
from stonechat_tools.proofs.boards.machine import BoardError, Machine, package
from stonechat_tools.proofs.rollout_fleet import SECRET, model, tool
from stonechat_tools.release import keys as release_keys

WINDOW_MS = 2000
WINDOWS = 5  # of its own that the board proves a model on
STEP_MS = 4000
WITHIN_S = 1800.0  # of this machine, each wait
START = """
from stonechat.board import hooks
hooks.install()
import gc, machine, time
from stonechat.board import full
from stonechat.updater import Updater
from stonechat_device import device
gc.collect()
watch = full.start(**device, heartbeat_windows=1, bytes_per_day=0, outbox_bytes=32768, update=Updater(
    "sensor", {keys!r}, windows={windows}, restart=machine.reset, bytes_per_day=10000000))
agent, update = watch.agent, watch.agent.update
longest_us = 0
def live(ms):
    global longest_us
    start_ms = time.ticks_ms()
    while time.ticks_diff(time.ticks_ms(), start_ms) < ms:
        tick_us = time.ticks_us()
        watch.tick()
        longest_us = max(longest_us, time.ticks_diff(time.ticks_us(), tick_us))
        time.sleep_ms(20)
    gc.collect()
    print("BOARD", *update.status, update.update.offered, int(update.update.whole), agent.windows,
        agent.errors + watch.errors, longest_us, gc.mem_free(), watch.last_error or agent.last_error or "-")
"""


@dataclass(frozen=True)
class State:
    """What the board says of itself. version: final; slot, trial: slots; tried, result: how the last update ended;
    offered: the version that is being pulled; whole: it is there and verified; errors: of the agent."""

    last_error: str
    version: int
    slot: int
    trial: int
    tried: int
    result: int
    refusals: int
    offered: int
    whole: int
    windows: int
    errors: int
    longest_us: int
    free: int


@dataclass
class Life:
    """The board from power-on to power-off, over its resets."""

    board: Board
    there: ppp.Site
    scratch: Path
    script: str
    files: dict[str, bytes]
    starts: int = 0
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    machine: Machine | None = None
    on_reset: Callable[[], None] | None = None  # before it starts again

    def start(self) -> None:
        """Power on, with the flash as the last reset left it."""
        kept = self.scratch / "flash"
        disk = kept.read_bytes() if self.starts else None
        machine = Machine(self.board, files=self.files, disk=disk, kept=kept, uart=self.there.uart, paced=True)
        self.machine = self.stack.enter_context(machine)
        self.starts += 1
        clock(machine)
        ppp.connect(machine)
        machine.run(self.script, ppp.WITHIN_S)

    def reset(self) -> None:
        with contextlib.suppress(BoardError):
            self._run("machine.reset()")
        self.stack.close()
        self.start()

    def step(self) -> State:
        """STEP_MS of its life; over a reset that it asks for itself."""
        for _ in range(3):
            try:
                printed = self._run(f"live({STEP_MS})")
            except BoardError as error:
                if "the emulator ended" not in str(error):
                    raise
                self.stack.close()
                if self.on_reset is not None:
                    self.on_reset()
                self.start()
                continue
            words = printed.strip().splitlines()[-1].split(" ", 13)
            return State(words[13], *map(int, words[1:13]))
        raise BoardError("the board resets itself again and again")

    def until(self, what: str, reached: Callable[[State], bool]) -> State:
        """Raises BoardError where it does not come within WITHIN_S."""
        began = time.monotonic()
        while not reached(state := self.step()):
            if time.monotonic() - began > WITHIN_S:
                raise BoardError(f"{what}: not within {WITHIN_S:.0f} s; {state}")
        print(f"{what}: start {self.starts}, {time.monotonic() - began:.0f} s of this machine; {state}", flush=True)
        return state

    def _run(self, script: str) -> str:
        assert self.machine is not None
        return self.machine.run(script, ppp.WITHIN_S)


def known(there: ppp.Site) -> dict[str, object]:
    """What the collector's database has of the board's updates."""
    with contextlib.suppress(StonechatError), Store(there.database) as store:
        for device in store.devices():
            found = device.get("update")
            return dict(found) if found else {}
    return {}


def rolled_out(there: ppp.Site) -> str:
    """The state of the newest roll-out."""
    state: str = json.loads(tool("release", "status", "--json", "--db", str(there.database)))["rollouts"][-1]["state"]
    return state


def publish(there: ppp.Site, scratch: Path, version: int) -> None:
    """Signs a new model as `version` and stages it for the board's class. Raises ConfigError."""
    path, out = scratch / f"{version}.tflite", str(scratch / f"release-{version}")
    path.write_bytes(model(MICROPYTHON_1, version, WINDOW_MS))
    public = str(scratch / "vendor.key.pub")
    key = ["--key", str(scratch / "vendor.key"), "--passphrase-file", str(scratch / "passphrase")]
    tool("release", "sign", str(path), "--class", "sensor", "--version", str(version), "--out", out, *key)
    tool("release", "publish", out, "--keys", public, "--db", str(there.database))
    tool("release", "stage", "sensor", str(version), "--stages", "1:1s,100%:1s", "--db", str(there.database))


def run(board: Board, algorithm: str) -> str:
    """Raises BoardError, BuildError, ConfigError."""
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stonechat-updates-")))
        (scratch / "passphrase").touch(mode=0o600)
        (scratch / "passphrase").write_bytes(SECRET + b"\n")
        release_keys.make(scratch / "vendor.key", "release", release_keys.ALGORITHMS[algorithm], SECRET)
        keys = tuple(
            (release_keys.ROLES[key.role], key.data) for key in release_keys.read_public(scratch / "vendor.key.pub")
        )
        there = stack.enter_context(ppp.site(collecting=False))
        files = {**package(board.architecture, "full", ["updater"]), **there.files}
        files["/model.tflite"] = model(MICROPYTHON_1, 1, WINDOW_MS)
        life = Life(board, there, scratch, START.format(keys=keys, windows=WINDOWS), files)
        stack.callback(lambda: life.stack.close())
        collector = stack.enter_context(contextlib.ExitStack())
        collector.enter_context(there.collector())
        life.start()
        life.until("it reports", lambda state: state.windows > 2 and bool(known(there)))
        tool("fleet", "--db", str(there.database), "set", "sensor-7", "--class", "sensor")
        publish(there, scratch, 2)
        life.until("version 2 is final", lambda state: state.version == 2)
        life.until("the collector knows", lambda state: known(there).get("version") == 2)
        life.until("the roll-out is done", lambda state: rolled_out(there) == "done")
        life.on_reset = collector.close  # the collector is away before the trial begins
        publish(there, scratch, 3)
        state = life.until("version 3 is on trial", lambda state: bool(state.trial) and state.tried == 3)
        life.on_reset = None
        starts = life.starts
        while state.trial and life.starts < starts + 5:
            life.reset()
            state = life.step()
        if state.version != 2 or state.trial or state.tried != 3:
            raise BoardError(f"version 3 was not rolled back: {state}")
        after = life.starts - starts
        with there.collector():
            life.until("the collector hears of it", lambda state: known(there).get("tried") == 3)
            facts = known(there)
    return (
        f"version 2 pulled, tried and confirmed; version 3 rolled back by itself at start {after} after its trial "
        f"began, and known to the collector: {facts}"
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithm", choices=("slh-dsa", "hss"), default="slh-dsa", help="default %(default)s")
    args = parser.parse_args(arguments)
    try:
        (board,) = build_all(["rp2040"])
        print(f"rp2040 over PPP, {args.algorithm}: {run(board, args.algorithm)}")
    except (BuildError, BoardError, ConfigError, StonechatError) as error:
        print(f"updates: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
