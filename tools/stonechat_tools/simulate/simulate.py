"""A simulated fleet: N real agents in one process, over replayed windows, through a real broker, some of them attacked.

Each device is the agent's own code (scorer, reports, delivery, MQTT client) with a connection of its own. Its windows
come from recordings (--trace; attacks are windows that are labelled so), or are drawn from the model. Without --broker
a broker and a collector run for the time of the simulation, and what the collector says of the fleet is printed.

Examples:
  stonechat simulate --devices 200 --attack mirai:5%
  stonechat simulate --devices 50 --speed 20 --for 60 --json
  stonechat simulate --devices 100 --trace benign.csv --trace attacks.csv --attack scan_connect:10%
  stonechat simulate --devices 500 --broker localhost:1883 --keys-out simulated/keys
"""

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stonechat.agent import Agent
from stonechat.delivery import Delivery
from stonechat.errors import ConfigError, MQTTError, StonechatError
from stonechat.mqtt import Client
from stonechat.outbox_memory import MemoryOutbox
from stonechat.replay import Replay
from stonechat.schema import Schema
from stonechat.state import State

from ..console import printable, write_atomic
from ..fleet import keyring, wire
from ..fleet.broker import split_host
from ..fleet.collector import Collector
from ..fleet.incidents import Notification, Policy
from ..fleet.local_broker import LocalBroker
from ..fleet.monitor import Monitor
from ..fleet.store import Store
from .windows import FAMILIES, Windows, endless, learned_state, read_attack, read_model, windows_of

HELP = "run a simulated fleet of real agents, some of them attacked"
MAX_DEVICES = 5000
MOST_S = 86_400
POLL_S = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--devices", type=int, default=100, metavar="N", help="how many (default %(default)s)")
    parser.add_argument(
        "--attack",
        action="append",
        default=[],
        metavar="NAME:SHARE",
        help=f"attack this share of the devices, as mirai:5%%; NAME: {', '.join(FAMILIES)}, or a label of --trace",
    )
    parser.add_argument("--attack-after", type=float, default=20.0, metavar="SECONDS", help="default %(default)s")
    parser.add_argument("--for", dest="for_s", type=float, default=60.0, metavar="SECONDS", help="default %(default)s")
    parser.add_argument(
        "--speed", type=int, default=10, help="windows are that many times shorter (default %(default)s)"
    )
    parser.add_argument(
        "--model", default="micropython-1", help="a shipped model's name or a file (default %(default)s)"
    )
    parser.add_argument("--trace", action="append", default=[], metavar="FILE", help="recorded windows of its schema")
    parser.add_argument("--heartbeat", type=int, default=6, metavar="WINDOWS", help="default %(default)s")
    parser.add_argument("--broker", metavar="HOST[:PORT]", help="a broker without TLS (default: one of its own)")
    parser.add_argument("--keys-out", metavar="FOLDER", help="write the devices' keys there, for a collector of yours")
    parser.add_argument("--seed", type=int, default=1, help="default %(default)s")
    parser.add_argument("--json", action="store_true", help="one JSON object at the end, nothing else on stdout")


def run(args: argparse.Namespace) -> int:
    if not 1 <= args.devices <= MAX_DEVICES:
        raise ConfigError(f"--devices {args.devices}: from 1 to {MAX_DEVICES} in one process")
    if not 1 <= args.speed <= 100:
        raise ConfigError(f"--speed {args.speed}: from 1 to 100")
    if not 1 <= args.heartbeat <= 100_000:
        raise ConfigError(f"--heartbeat {args.heartbeat}: from 1 to 100000 windows")
    for name, seconds in (("--for", args.for_s), ("--attack-after", args.attack_after)):
        if not 0 <= seconds <= MOST_S:  # no NaN either
            raise ConfigError(f"{name} {seconds}: from 0 to {MOST_S} seconds")
    if args.broker and not args.keys_out:
        raise ConfigError("--broker needs --keys-out FOLDER: the collector has to know the devices' keys")
    model, schema = read_model(args.model, args.speed)
    chance = random.Random(args.seed)
    benign, attacks = windows_of(args, model, schema, chance)
    wanted = [read_attack(text, attacks) for text in args.attack]
    names = [f"sim-{n:04d}" for n in range(args.devices)]
    secrets = {name: keyring.new_secret() for name in names}
    if args.keys_out:
        _write_keys(Path(args.keys_out), secrets)
    learned = learned_state(model, schema, benign, chance)
    say = _say if not args.json else lambda text: print(text, file=sys.stderr, flush=True)
    with contextlib.ExitStack() as opened:
        host, port, watcher = _place(args, opened, secrets, say)
        devices = [
            Simulated(name, secrets[name], model, schema, endless(benign, chance), learned, args.heartbeat)
            for name in names
        ]
        for device in devices:
            device.connect(host, port)
        say(f"{len(devices)} devices, model {args.model}, windows of {model.metadata.window_ms / 1000:g} s")
        taken = _take(devices, wanted, chance)
        found = _live(args, devices, taken, attacks, say, watcher)
        for device in devices:
            device.close()
    if args.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name}: {value}")
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


# --- the devices ------------------------------------------------------------------------------------------------------


class Simulated:
    """One agent with its connection; tick() when it is due."""

    def __init__(
        self,
        name: str,
        secret: bytes,
        model: Any,
        schema: Schema,
        windows: Iterator[tuple[int, list[int]]],
        learned: dict[bytes, bytes],
        heartbeat: int,
    ) -> None:
        self.name = name
        self.source = windows
        self.alarms = 0
        self.first_alarm_s: float | None = None
        self._replay = Replay(schema, self._windows())
        self._turn = iter(self._replay)
        state = State(None)
        state.sections.update(learned)
        self._reporter = Delivery(
            name, secret, MemoryOutbox(8192), heartbeat_windows=heartbeat, bytes_per_day=0, state=state
        )
        self.agent = Agent(self, model, reporter=self._reporter, state=state, on_verdict=self._on_verdict)
        self.client: Any = None

    def _windows(self) -> Iterator[tuple[int, list[int]]]:
        while True:
            yield next(self.source)

    # a collector, as the agent wants one: the replay, one window further at each reading

    @property
    def schema(self) -> Schema:
        return self._replay.schema  # type: ignore[no-any-return]

    @property
    def sources(self) -> tuple[tuple[str, str, str], ...]:
        return (("simulated", "trace", ""),)

    def read(self, values: list[int]) -> None:
        next(self._turn)
        self._replay.read(values)

    def close(self) -> None:
        if self.client is not None:
            self.client.close()

    def connect(self, host: str, port: int) -> None:
        self.client = self.agent.connect(Client(self.name, host, port, keepalive_s=30))

    def tick(self) -> None:
        self.agent.tick()
        with contextlib.suppress(OSError, MQTTError):
            self.client.poll(0)

    def _on_verdict(self, verdict: Any, _agent: Agent) -> None:
        if verdict.level == 2 and verdict.changed:
            self.alarms += 1
            if self.first_alarm_s is None:
                self.first_alarm_s = time.monotonic()

    @property
    def published(self) -> int:
        return int(self._reporter.published)


def _live(
    args: argparse.Namespace,
    devices: list[Simulated],
    taken: dict[str, list[Simulated]],
    attacks: dict[str, Windows],
    say: Callable[[str], None],
    watcher: "_Watcher | None",
) -> dict[str, Any]:
    began_s = time.monotonic()
    attacked_s: float | None = None
    cpu_s = time.process_time()
    said: set[int] = set()
    while (now_s := time.monotonic()) - began_s < args.for_s:
        for device in devices:
            device.tick()
        if attacked_s is None and taken and now_s - began_s >= args.attack_after:
            attacked_s = time.monotonic()
            for name, victims in taken.items():
                windows = attacks[name]
                for device in victims:
                    device.source = endless(windows, random.Random(args.seed))
                    device.alarms, device.first_alarm_s = 0, None
                say(f"{now_s - began_s:.0f} s: {name} attacks {len(victims)} devices")
        if watcher is not None:
            for each in watcher.notified[len(said) :]:
                said.add(len(said))
                for incident in each.incidents:
                    say(f"{now_s - began_s:.0f} s: {each.reason} #{incident.id} {incident.severity}: {incident.title}")
        time.sleep(max(0.0, POLL_S / 4 - (time.monotonic() - now_s)))
    victims = [device for each in taken.values() for device in each]
    spent_s = time.process_time() - cpu_s
    found: dict[str, Any] = {
        "devices": len(devices),
        "connected": sum(bool(device.client.connected) for device in devices),
        "windows": sum(device.agent.windows for device in devices),
        "reports published": sum(device.published for device in devices),
        "CPU ms a window": round(1000 * spent_s / max(1, sum(device.agent.windows for device in devices)), 2),
        "attacked": len(victims),
        "attacked that alarmed": sum(device.first_alarm_s is not None for device in victims),
        "others that alarmed": sum(device.alarms > 0 for device in devices if device not in victims),
    }
    if attacked_s is not None:
        delays = sorted(d.first_alarm_s - attacked_s for d in victims if d.first_alarm_s is not None)
        found["median seconds to the alarm"] = round(delays[len(delays) // 2], 1) if delays else None
    if watcher is not None:
        found |= watcher.found(attacked_s)
    return found


def _take(
    devices: list[Simulated], wanted: list[tuple[str, float]], chance: random.Random
) -> dict[str, list[Simulated]]:
    """name of an attack -> who gets it; no device gets two."""
    free = list(devices)
    chance.shuffle(free)
    taken: dict[str, list[Simulated]] = {}
    for name, share in wanted:
        count = min(len(free), max(1, round(share * len(devices))))
        taken[name], free = free[:count], free[count:]
    return taken


# --- broker and collector ---------------------------------------------------------------------------------------------


class _Watcher:
    """The collector's view, for the summary."""

    def __init__(self, store: Store, collector: Collector, monitor: Monitor) -> None:
        self.notified: list[Notification] = []
        self.store, self.collector, self.monitor = store, collector, monitor
        self.began = time.time() - time.monotonic()

    def found(self, attacked_s: float | None) -> dict[str, Any]:
        found: dict[str, Any] = {
            "reports stored": self.store.count(),
            "presence": dict(Counter(seen.state.state for seen in self.monitor.states())),
            "incidents": dict(Counter(incident.kind for incident in self._incidents())),
        }
        outbreaks = [incident.opened_s for incident in self._incidents() if incident.kind == "outbreak"]
        if attacked_s is not None:
            found["seconds to the outbreak"] = round(min(outbreaks) - self.began - attacked_s, 1) if outbreaks else None
        return found

    def _incidents(self) -> list[Any]:
        return [*self.monitor.incidents.open.values(), *self.monitor.incidents.ended]


def _place(
    args: argparse.Namespace, opened: contextlib.ExitStack, secrets: dict[str, bytes], say: Callable[[str], None]
) -> tuple[str, int, _Watcher | None]:
    """-> (broker's host, port, the collector's view)."""
    if args.broker:
        host, port = split_host(args.broker, "--broker")
        say(
            "collect with: stonechat collect --plain"
            f" --broker {printable(args.broker)} --keys {printable(args.keys_out)}"
        )
        return host, port or 1883, None
    broker = opened.enter_context(LocalBroker())
    folder = opened.enter_context(tempfile.TemporaryDirectory(prefix="stonechat-simulate-"))
    store = opened.enter_context(Store(os.path.join(folder, "fleet.db")))
    notified: list[Notification] = []
    monitor = Monitor(store, Policy(group_wait_s=2, digest_s=None), notified.append)
    collector = Collector(
        store, keyring.Keys(secrets), host="127.0.0.1", port=broker.port, prefix=wire.PREFIX, monitor=monitor
    )
    opened.enter_context(collector)
    if not collector.connected.wait(20):
        raise StonechatError(f"the collector did not connect: {collector.error}")
    watcher = _Watcher(store, collector, monitor)
    watcher.notified = notified
    return "127.0.0.1", broker.port, watcher


def _write_keys(folder: Path, secrets: dict[str, bytes]) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, secret in secrets.items():
        path = folder / f"{name}.key"
        path.unlink(missing_ok=True)  # one that is there would keep a mode that lets others read it
        write_atomic(path, secret.hex() + "\n", 0o600)
