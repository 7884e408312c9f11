"""A quarantine as a whole on an RP2040: PPP on its emulated UART, a real mosquitto, `stonechat collect` and
`stonechat command`.

    python -m stonechat_tools.proofs.boards.quarantine       as root: a network namespace

A product with the full profile and its own MQTT client learns, and then asks a stranger for orders. The alarm begins a
lease: strangers are refused, the product and the reports go on, and it opens by itself at its end. A second one is
opened by the operator's signed command. Windows are in virtual time (lab/firmware/sensor.py), sockets and messages are
real.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stonechat.errors import ConfigError, StonechatError
from stonechat.policy import OBSERVE, QUARANTINE

from stonechat_tools.fleet.store import Store
from stonechat_tools.proofs.boards import ppp
from stonechat_tools.proofs.boards.firmware import Board, BuildError, build_all
from stonechat_tools.proofs.boards.handshake import clock
from stonechat_tools.proofs.boards.machine import BoardError, Machine
from stonechat_tools.proofs.boards.trials import product_files

LEASE_S = 60
MOST_WINDOWS = 400  # of each phase
COMMAND_S = 120  # of this machine, for the command's answer
START = """
from stonechat.board import hooks
counter = hooks.install()
import gc, socket, time
from stonechat import policy
from stonechat.board import full, guard
from stonechat.errors import StonechatError
from stonechat_device import device
from stonechat_tools.lab.firmware import sensor
sensor.HOME, sensor.STRANGER = {home!r}, {stranger!r}
class Product(sensor.Firmware):
    reached = refused = early = 0
    def infected(self):
        if self.seconds % 2:
            return
        try:
            self.beacon()
            self.reached += 1
            if response.real.action and self.now_ms - began_ms[0] < {lease}000:
                self.early += 1
        except OSError:
            self.refused += 1
response = guard.respond(policy.ON, ((policy.QUARANTINE, 2, policy.NETWORK, 0, {lease}, {lease}),))
watch = full.start(**device, heartbeat_windows=1, bytes_per_day=0, outbox_bytes=16384, learn_peers_hours=0,
    response=response)
agent, reporter = watch.agent, watch.agent.reporter
product = Product(socket, {port}, 77, counter.beat)
guard.ticks_ms = lambda: product.now_ms
def messages():
    watch._poll()
    try:
        if agent._status_due:
            agent._status_due = not reporter.send_status(agent.publish, agent.status)
        reporter.pump(agent.publish, product.now_ms)
    except (StonechatError, OSError):
        pass
def close():
    agent.end_window(product.now_ms)
    response.turn()
    messages()
def state():
    gc.collect()
    print("STATE", response.real.action, int(agent.learning), agent.windows, agent.channels[0].scorer.verdict.level,
        agent.channels[0].scorer.verdict.evidence_q8, product.reached, product.refused,
        max(0, response.real.pause_until_s - reporter.uptime_s), product.early, watch.errors + agent.errors,
        gc.mem_free(), watch.last_error or agent.last_error or "-")
def live(windows):
    for _ in range(windows):
        for _ in range(sensor.WINDOW_MS // sensor.TURN_MS):
            product.turn()
            watch._quietly(messages)
        watch._quietly(close)
        if response.real.action != before[0]:
            began_ms[0] = product.now_ms
            break
    state()
def wait(ms):
    start_ms = time.ticks_ms()
    while time.ticks_diff(time.ticks_ms(), start_ms) < ms:
        watch._quietly(messages)
        time.sleep_ms(20)
        watch._quietly(response.turn)
    state()
before, began_ms = [0], [0]
"""


@dataclass(frozen=True)
class State:
    """What the board says of itself. action: in force; reached, refused: calls to the stranger since the start; early:
    those that passed while a lease was in force; pause_s: until a lease may begin again; errors: of the agent."""

    last_error: str
    action: int
    learning: int
    windows: int
    level: int
    evidence: int
    reached: int
    refused: int
    pause_s: int
    early: int
    errors: int
    free: int


class Trial:
    def __init__(self, machine: Machine, there: ppp.Site) -> None:
        self.machine = machine
        self.there = there
        self.began = time.monotonic()

    def said(self, script: str) -> State:
        printed = self.machine.run(script, ppp.WITHIN_S).strip().splitlines()[-1]
        words = printed.split(" ", 12)
        return State(words[12], *map(int, words[1:12]))

    def live(self, what: str, reached: Callable[[State], bool], windows: int = 1, most: int = MOST_WINDOWS) -> State:
        """windows at once, up to `most`, or fewer where an action begins or ends."""
        for _ in range(0, most, windows):
            state = self.said(f"before[0] = response.real.action\nlive({windows})")
            if reached(state):
                print(f"{time.monotonic() - self.began:.0f} s: {what}: {state}", flush=True)
                return state
        raise BoardError(f"{what}: not within {most} windows; {state}")

    def stored(self) -> int:
        with Store(self.there.database) as store:
            return len(store.sequences("sensor-7"))

    def infect(self, infected: bool) -> None:
        self.machine.run(f"product.infection = {'infected' if infected else None!r}")

    def quarantined(self) -> State:
        """From well to quarantine."""
        before = self.live("well", lambda state: not (state.level or state.evidence or state.pause_s))
        self.infect(True)
        state = self.live("quarantine", lambda state: state.action == QUARANTINE, most=6)
        if state.reached <= before.reached:
            raise BoardError(f"the stranger was not reached before: {state}")
        return state

    def released(self) -> dict[str, Any]:
        """The operator's command, while the board only waits for messages -> the command's answer."""
        words = ["-m", "stonechat_tools.cli", "command", "sensor-7", "release", "--plain", "--json"]
        words += ["--keys", str(self.there.fleet.folder / "operator/keys")]
        words += ["--wait", str(COMMAND_S), "--db", str(self.there.database)]
        command = [*self.there.inside, sys.executable, *words]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                while process.poll() is None:
                    self.said("wait(500)")
                out, err = process.communicate()
            finally:
                process.kill()
        if process.returncode:
            raise BoardError(f"stonechat command: {out.strip()} {err.strip()}; {self.said('state()')}")
        found: dict[str, Any] = json.loads(out)
        return found


def quarantine(board: Board) -> str:
    """Raises BoardError, BuildError, ConfigError."""
    with ppp.site() as there, tempfile.TemporaryDirectory(prefix="stonechat-quarantine-") as scratch:
        files = {**product_files(board, Path(scratch)), **there.files}
        with (
            ppp.peers(there.inside[3]) as port,
            Machine(board, files=files, uart=there.uart, paced=True) as machine,
        ):
            clock(machine)
            ppp.connect(machine)
            words = {"home": ppp.HOST, "stranger": ppp.STRANGER, "port": port, "lease": LEASE_S}
            machine.run(START.format(**words), ppp.WITHIN_S)
            trial = Trial(machine, there)
            trial.live("learned", lambda state: not state.learning, 4)
            began = trial.quarantined()
            stored = trial.stored()
            ended = trial.live("opened by itself", lambda state: state.action == OBSERVE, most=12)
            if ended.early or ended.refused - began.refused < LEASE_S // 2 - 6:
                raise BoardError(f"the stranger was reached in quarantine: {began}, {ended}")
            came = trial.stored() - stored
            if came < LEASE_S // 10 - 2:
                raise BoardError(f"{came} reports came in quarantine")
            after = trial.live("the stranger is reached again", lambda state: state.reached > ended.reached, most=3)
            trial.infect(False)
            began = trial.quarantined()
            answer = trial.released()
            opened = trial.said("state()")
            if opened.action != OBSERVE:
                raise BoardError(f"not released: {answer}, {opened}")
            after = trial.live("the stranger is reached again", lambda state: state.reached > opened.reached, most=3)
            if after.errors:
                raise BoardError(f"errors of the agent: {after}")
            trial.live("the collector knows", lambda state: len(decisions(there)) >= 2, most=6)
            ends = [str(row["end"]) for row in decisions(there)]
    return (
        f"quarantine of {LEASE_S} s: {ended.refused} calls to the stranger refused, 0 passed, {came} reports came "
        f"meanwhile, it opened by itself; the second opened by the operator's command ({answer}); the product had no "
        f"error; the collector has {', '.join(ends)}"
    )


def decisions(there: ppp.Site) -> list[dict[str, Any]]:
    with Store(there.database) as store:
        return [row for row in store.decisions("sensor-7") if row["end"]]


def main(arguments: list[str]) -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(
        arguments
    )
    try:
        (board,) = build_all(["rp2040"])
        print(f"rp2040 over PPP: {quarantine(board)}")
    except (BuildError, BoardError, ConfigError, StonechatError) as error:
        print(f"quarantine: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
