"""A staged roll-out to real agents, on Linux and on MicroPython, through a real broker, collector and command line.

Version 2 goes to all devices in stages; version 3 alarms on what is normal, so devices refuse it and the roll-out halts
by itself; then version 2 is withdrawn and all devices are back on the model that they came with. Meanwhile the
collector is killed once. Required: each step within its time, and no report lost or double.
"""

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import stonechat
from stonechat.board.schema import MICROPYTHON_1
from stonechat.errors import ConfigError
from stonechat.features import RATE, SHARE
from stonechat.linux.schemas import LINUX_PROC_1
from stonechat.schema import Schema

from ..fleet.local_broker import LocalBroker
from ..modeling.fit import fit
from ..release import keys as release_keys
from .interpreters import Interpreter, interpreters

LINUX, BOARDS = 12, 8
WINDOW_MS = 1000
WINDOWS = 5  # of its own that a device proves a new model on
STAGES = "2:10s,50%:5s,100%:5s"
STEP_S = 600.0
SECRET = b"of this proof only"
BOARD_SCRIPT = Path(__file__).with_name("update_board.py")
CLASSES: dict[str, Schema] = {"gateway": LINUX_PROC_1, "board": MICROPYTHON_1}


def tool(*words: str) -> str:
    """Run one command of `stonechat` to its end -> what it printed. Raises ConfigError with its message."""
    command = [str(Path(sys.executable).parent / "stonechat"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise ConfigError(f"stonechat {' '.join(words[:3])}: {done.stderr.strip()}")
    return done.stdout


def model(schema: Schema, seed: int, window_ms: int, alarming: bool = False) -> bytes:
    """A quick model with short windows that takes ordinary windows for normal, or for an alarm."""
    rng = np.random.default_rng(seed)
    middle = np.array([12800 if kind == SHARE else 1500 if kind == RATE else 500 for _, _, kind in schema.columns])
    rows = np.rint(middle + rng.normal(size=(400, len(schema))) * 4000).clip(0, 25600)
    fitted = fit(rows, schema, window_ms)
    fitted.meta.alarm_rules = ((1, 1024, 2),) if alarming else ((1024, 1536, 60 * 256),)
    return fitted.to_tflite(schema.name, seed)


class Agent:
    """One device and its process."""

    def __init__(self, name: str, world: "World") -> None:
        self.name = name
        self.folder = world.folder / name
        self.folder.mkdir(mode=0o755)
        self.world = world
        self.log = self.folder / "log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def group(self) -> str:
        raise NotImplementedError

    def command(self) -> Sequence[str]:
        raise NotImplementedError

    def start(self) -> None:
        environment = {**os.environ, "MICROPYPATH": f"{Path(stonechat.__file__).parent.parent}:.frozen"}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command(), stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment
            )

    def stop(self) -> None:
        _end(self.process)

    @property
    def secret(self) -> str:
        return (self.world.fleet / "devices" / self.name / "device.key").read_text().split()[0]


class LinuxAgent(Agent):
    group = "gateway"

    def command(self) -> Sequence[str]:
        key = self.folder / "device.key"
        key.touch(mode=0o600)
        key.write_text(self.secret + "\n")
        keys = self.folder / "vendor.key.pub"
        shutil.copyfile(self.world.folder / "vendor.key.pub", keys)
        config = self.folder / "stonechat.toml"
        config.write_text(f"""[device]
id = "{self.name}"
key_file = "{key}"
state_file = "{self.folder}/state/state"
[model]
file = "{self.world.folder}/gateway-1.tflite"
[collector]
bpf = false
[mqtt]
host = "127.0.0.1"
port = {self.world.broker.port}
tls = false
keepalive_s = 10
[report]
heartbeat_windows = 1
bytes_per_day = 100000000
resend_s = 3
outbox_dir = "{self.folder}/outbox"
[update]
enabled = true
class = "gateway"
keys = ["{keys}"]
folder = "{self.folder}/update"
windows = {self.world.windows}
bytes_per_day = 10000000
""")
        return [str(Path(sys.executable).parent / "stonechat-agent"), "--config", str(config)]


class BoardAgent(Agent):
    group = "board"

    def __init__(self, name: str, world: "World", interpreter: Interpreter) -> None:
        super().__init__(name, world)
        self._interpreter = interpreter

    def command(self) -> Sequence[str]:
        (self.folder / "data").mkdir(exist_ok=True)
        public = release_keys.read_public(self.world.folder / "vendor.key.pub")
        values = {
            "device": self.name,
            "fleet": "fleet",
            "key": self.secret,
            "model": str(self.world.folder / "board-1.tflite"),
            "folder": str(self.folder),
            "host": "127.0.0.1",
            "port": self.world.broker.port,
            "class": "board",
            "keys": [[release_keys.ROLES[key.role], key.data.hex()] for key in public],
            "windows": self.world.windows,
        }
        (self.folder / "config.json").write_text(json.dumps(values))
        return [*self._interpreter.command, "-X", "heapsize=4m", str(BOARD_SCRIPT), str(self.folder / "config.json")]


class World:
    """Broker, collector and devices below a folder. say(line): progress. stages: as `stonechat release stage` takes.
    windows: on which devices prove a model; bad: the version that alarms; collect_by: the collector's command."""

    def __init__(
        self,
        folder: Path,
        linux: int,
        boards: int,
        say: Callable[[str], None],
        window_ms: int,
        stages: str,
        windows: int = WINDOWS,
        bad: int = 3,
        collect_by: Sequence[str] = (),
    ) -> None:
        self.windows = windows
        self.bad = bad
        self.collect_by = collect_by or [str(Path(sys.executable).parent / "stonechat")]
        self.folder = folder
        self.window_ms = window_ms
        self.stages = stages
        self.fleet = folder / "fleet"
        self.db = folder / "fleet.db"
        self.say = say
        self.broker = LocalBroker()
        self.collector: subprocess.Popen[bytes] | None = None
        self.failures: list[str] = []
        found = [one for one in interpreters() if one.missing is None]
        self.agents: list[Agent] = [LinuxAgent(f"gateway-{n}", self) for n in range(linux)]
        self.agents += [BoardAgent(f"board-{n}", self, found[n % len(found)]) for n in range(boards if found else 0)]
        self.classes = sorted({agent.group for agent in self.agents})

    # --- the parts --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self.broker.start()
        place = f"127.0.0.1:{self.broker.port}"
        tool("provision", "--dir", str(self.fleet), "init", "--broker", place, "--auth", "plain")
        tool("provision", "--dir", str(self.fleet), "add", *[agent.name for agent in self.agents])
        release_keys.make(self.folder / "vendor.key", "release", release_keys.SLH_DSA, SECRET)
        (self.folder / "passphrase").touch(mode=0o600)
        (self.folder / "passphrase").write_bytes(SECRET + b"\n")
        for group in self.classes:
            for version in (1, 2, 3):
                path = self.folder / f"{group}-{version}.tflite"
                path.write_bytes(model(CLASSES[group], version, self.window_ms, alarming=version == self.bad))
        self.collect()
        for agent in self.agents:
            agent.start()
        self.wait("all devices report", lambda: len(self.versions()) == len(self.agents) and self.reporting())
        for group in self.classes:
            tool("fleet", "--db", str(self.db), "set", f"{group}-*", "--class", group)

    def collect(self) -> None:
        command = [*self.collect_by, "collect", "--keys", str(self.fleet / "keys")]
        with open(self.folder / "collector.log", "ab") as log:
            self.collector = subprocess.Popen(
                [*command, "--db", str(self.db), "--json"],
                stdout=subprocess.DEVNULL,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )

    def kill_collector(self) -> None:
        assert self.collector is not None
        self.collector.kill()
        self.collector.wait(20)
        self.collect()

    def stop(self) -> None:
        for agent in self.agents:
            agent.stop()
        _end(self.collector)
        self.broker.stop()

    # --- what is known ------------------------------------------------------------------------------------------------

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with (
            contextlib.suppress(sqlite3.OperationalError),
            contextlib.closing(sqlite3.connect(f"file:{self.db}?mode=ro", uri=True, timeout=20)) as db,
        ):
            return db.execute(query, values).fetchall()
        return []

    def versions(self) -> dict[str, int]:
        query = "SELECT d.name, u.version FROM updates u JOIN devices d ON d.id = u.device"
        return dict(self.rows(query))

    def reporting(self) -> bool:
        return self.rows("SELECT count(*) FROM devices WHERE reports > 3") == [(len(self.agents),)]

    def state(self, version: int) -> dict[str, str]:
        query = (
            "SELECT x.class, r.state FROM rollouts r JOIN releases x ON x.id = r.release WHERE x.version = ?"
            " ORDER BY r.id"
        )
        return dict(self.rows(query, version))

    def wait(self, what: str, condition: Callable[[], bool], limit_s: float = STEP_S) -> float:
        """-> seconds. Raises ConfigError with what the parts said."""
        began_s = time.monotonic()
        while not condition():
            for agent in self.agents:
                if agent.process is not None and agent.process.poll() is not None:
                    raise ConfigError(f"{agent.name} ended: {_last_words(agent.log)}")
            if time.monotonic() - began_s > limit_s:
                raise ConfigError(f"{what}: not within {limit_s:.0f} s; {self.explain()}")
            time.sleep(0.5)
        took_s = time.monotonic() - began_s
        self.say(f"{what}: after {took_s:.0f} s")
        return took_s

    def explain(self) -> str:
        members = self.rows(
            "SELECT d.name, m.state, m.result FROM rollout_devices m JOIN devices d ON d.id = m.device ORDER BY d.name"
        )
        logs = [f"{agent.name}: {_last_words(agent.log)}" for agent in self.agents if agent.log.exists()]
        return f"{self.versions()}; {members}; {'; '.join(logs)[:2000]}; {_last_words(self.folder / 'collector.log')}"

    # --- the steps ----------------------------------------------------------------------------------------------------

    def release(self, version: int) -> None:
        for group in self.classes:
            out = str(self.folder / f"{group}-{version}")
            made = ["release", "sign", str(self.folder / f"{group}-{version}.tflite"), "--class", group]
            made += ["--version", str(version), "--key", str(self.folder / "vendor.key"), "--out", out]
            tool(*made, "--passphrase-file", str(self.folder / "passphrase"))
            public = str(self.folder / "vendor.key.pub")
            tool("release", "publish", out, "--keys", public, "--db", str(self.db))
            tool("release", "stage", group, str(version), "--stages", self.stages, "--db", str(self.db))

    def withdraw(self, version: int) -> None:
        for group in self.classes:
            tool("release", "withdraw", group, str(version), "--db", str(self.db))

    def all_at(self, version: int) -> bool:
        return set(self.versions().values()) == {version}

    def check_reports(self) -> int:
        """Each number of each start is there once -> how many reports."""
        rows = self.rows(
            "SELECT d.name, s.stream, count(*), count(DISTINCT r.sequence), min(r.sequence), max(r.sequence),"
            " max(r.variant) FROM reports r JOIN streams s ON s.id = r.stream JOIN devices d ON d.id = r.device"
            " GROUP BY d.name, s.stream"
        )
        total = 0
        for name, stream, count, different, first, last, variant in rows:
            total += count
            if count != different or variant:
                self.failures.append(f"{name}: {count - different} reports of start {bytes(stream).hex()} are double")
            if different != last - first + 1 or first > 1:
                self.failures.append(f"{name}: start {bytes(stream).hex()}: {different} of {first} to {last}")
        for name, lost, conflicts in self.rows("SELECT name, lost, conflicts FROM devices"):
            if lost or conflicts:
                self.failures.append(f"{name}: {lost} reports lost, {conflicts} conflicts")
        for name, reason, count in self.rows("SELECT device, reason, count FROM rejections WHERE reason <> 'stale'"):
            self.failures.append(f"{name}: {count} messages rejected: {reason}")
        return total


def _end(process: "subprocess.Popen[bytes] | None") -> None:
    if process is not None and process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(15)


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return " | ".join(lines[-3:])


def run(
    folder: Path,
    linux: int,
    boards: int,
    say: Callable[[str], None],
    window_ms: int = WINDOW_MS,
    stages: str = STAGES,
) -> list[str]:
    """At least two devices of a class, because one failure halts nothing -> what failed. Raises ConfigError where a
    step does not come to its end."""
    world = World(folder, linux, boards, say, window_ms, stages)
    try:
        world.start()
        world.release(2)
        world.wait("some have version 2", lambda: 2 in world.versions().values())
        early = sum(version == 2 for version in world.versions().values())
        if early == len(world.agents) > 4:
            world.failures.append("the first stage was no stage: all devices have version 2")
        world.kill_collector()
        world.wait("all have version 2", lambda: world.all_at(2))
        world.wait("the roll-out is done", lambda: set(world.state(2).values()) == {"done"})
        world.release(3)
        world.wait("version 3 is halted", lambda: set(world.state(3).values()) == {"halted"})
        if not world.all_at(2):
            world.failures.append(f"after the halt: {world.versions()}")
        found = json.loads(tool("release", "status", "--json", "--db", str(world.db)))["rollouts"]
        for row in found:
            if row["version"] == 3:
                why = {each["why"] for each in row["failed"]}
                say(f"{row['class']} 3: {row['evidence']['why']}: {', '.join(sorted(why))}")
        incidents = [
            json.loads(line) for line in tool("fleet", "--db", str(world.db), "--json", "incidents").splitlines()
        ]
        if sum(incident["kind"] == "rollout" for incident in incidents) != len(world.classes):
            world.failures.append(f"incidents: {[incident['title'] for incident in incidents]}")
        world.withdraw(3)
        world.withdraw(2)
        world.wait("all are back", lambda: world.all_at(0))
        time.sleep(2 * window_ms / 1000)
        for agent in world.agents:
            agent.stop()
        time.sleep(3)
        total = world.check_reports()
        say(f"{len(world.agents)} agents, {total} reports, {len(world.failures)} failures")
        return world.failures
    finally:
        world.stop()
