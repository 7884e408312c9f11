"""A database as a collector leaves it, with all that the dashboard can show, for its tests, its screenshots and its
benchmark: devices of some sites, classes, models and versions, in every state and level, with incidents."""

import hashlib
import random
import time
from collections.abc import Sequence
from pathlib import Path

from ..fleet import labels, wire
from ..fleet.labels import Labels
from ..fleet.monitor import Monitor
from ..fleet.rollout import STAGES
from ..fleet.store import Store, releases, rollouts
from ..fleet.wire import Feature, Report, Status
from ..schemas import SCHEMAS, by_name

HEARTBEAT_S = 600
LENGTH_S = 3 * 3600
CLASSES = ("camera", "gateway", "meter", "pump", "sensor")
SITES = ("aarhus", "berlin", "cork", "dijon", "essen", "faro", "ghent", "hull", "izmir", "jena", "kiel", "lyon")
VERSIONS = ("1.4.2", "1.4.2", "1.4.2", "1.4.1", "1.3.9")
FEATURES = (Feature(3, 7.5, 62), Feature(11, 6.25, 21), Feature(5, -3.0, 9))
SCHEMA = "micropython-1"


class MadeFleet:
    """count devices in the database at `path` (a file or a URL), from LENGTH_S ago until now. beat() goes on from
    there, as of the real clock."""

    def __init__(self, path: Path | str, count: int, seed: int = 1) -> None:
        self.store = Store(path)
        self._random = random.Random(seed)
        self._now_s = time.time() - LENGTH_S
        self.monitor = Monitor(self.store, clock=lambda: self._now_s, steady=lambda: self._now_s, hold_s=60.0)
        self.names = [f"{CLASSES[n % len(CLASSES)]}-{n:05d}" for n in range(count)]
        self._sequence = dict.fromkeys(self.names, 0)
        found = by_name(SCHEMA) or next(iter(SCHEMAS.values()))
        self._schema = found.id
        self._make()
        self._release()

    def _release(self) -> None:
        """A signed release that is being rolled out to the pumps."""
        now_s = self._now_s - LENGTH_S / 2
        releases.publish(self.store, "pump", 3, self._schema.hex(), b"d" * 32, b"manifest", b"model", "made", now_s)
        for release in releases.releases(self.store, "pump"):
            rollouts.begin(self.store, release, "", STAGES, "made", now_s)

    def site(self, name: str) -> str:
        return SITES[int(name[-5:]) // len(CLASSES) % len(SITES)]

    def _stream(self, name: str) -> bytes:
        return hashlib.sha256(name.encode()).digest()[:4]

    def status(self, name: str, number: int, online: bool = True, sleep_s: int | None = None) -> Status:
        n = int(name[-5:])
        return Status(
            device=name,
            boot=n % 7 + 1,
            time_s=int(self._now_s),
            uptime_s=int(self._now_s) % 86_400,
            online=online,
            stream=self._stream(name),
            number=number if online else 0,
            firmware=VERSIONS[n // 3 % len(VERSIONS)],
            model=hashlib.sha256(b"model %d" % (n % 4)).digest(),
            schema=self._schema,
            window_ms=10_000,
            sources=("sockets", "heap", "tasks"),
            adaptation_q8=12,
            learning=n % 97 == 5,
            agent="0.2.0",
            counters=(1, 2, 3, 4),
            heartbeat_s=HEARTBEAT_S,
            sleep_s=sleep_s,
        )

    def report(self, name: str, level: int = 0) -> Report:
        number = self._sequence[name] = self._sequence[name] + 1
        score = (260, 700, 2400)[level] + self._random.randrange(200)
        evidence = (20, 180, 500)[level] + self._random.randrange(40)
        fields: dict[int, int | bytes] = {
            0: wire.VERSION,
            1: number,
            2: 1,
            3: int(self._now_s),
            5: level,
            7: score,
            8: score - 40,
            9: evidence,
        }
        if level or number % 5 == 1:
            fields[10] = wire.pack_features(FEATURES)
        fields[16] = self._stream(name)
        return wire.reread(name, wire.encode(fields))

    def put(self, reports: Sequence[Report], statuses: Sequence[Status] = ()) -> None:
        results = self.store.put(reports, statuses, now_s=self._now_s)
        self.monitor.took(reports, results, statuses)

    def step(self, now_s: float | None = None) -> None:
        """As the collector does each second."""
        self._now_s = time.time() if now_s is None else now_s
        self.monitor.step()
        self.store.listened(self._began_s, self._now_s)

    def _make(self) -> None:
        began_s = self._began_s = self._now_s
        chance = self._random
        named = {
            name: Labels(
                "Pump by the gate" if n == 3 else "",
                CLASSES[n % len(CLASSES)],
                self.site(name),
                ("outdoor",) if n % 11 == 0 else (),
            )
            for n, name in enumerate(self.names)
        }
        labels.write(self.store, named)
        self.monitor.connected(True)
        silent = {name for n, name in enumerate(self.names) if n % 90 == 17}
        asleep = {name for n, name in enumerate(self.names) if n % 60 == 29}
        watch = {name for n, name in enumerate(self.names) if n % 80 == 41}
        alarm = {name for n, name in enumerate(self.names) if n % 150 == 3}
        thieves = self.names[55:57]
        self.put([], [self.status(name, 1) for name in self.names])
        self.step(began_s)
        steps = list(range(HEARTBEAT_S, LENGTH_S + 1, HEARTBEAT_S))
        for at_s in steps:
            self._now_s = began_s + at_s - chance.random()
            last = at_s == steps[-1]
            reports = []
            for name in self.names:
                if name in silent and at_s > HEARTBEAT_S or name in asleep and at_s > LENGTH_S - 2 * HEARTBEAT_S:
                    continue
                if at_s >= LENGTH_S // 2 and self.site(name) == SITES[5]:
                    continue
                if not (last or at_s <= HEARTBEAT_S or name in alarm) and int(name[-5:]) > 400:
                    continue  # their history is short; heard they are all the same
                level = (
                    2 if name in alarm and at_s >= LENGTH_S - 3 * HEARTBEAT_S else 1 if name in watch and last else 0
                )
                reports.append(self.report(name, level))
            heard = {report.device for report in reports}
            self.put(reports)
            rest = [
                name
                for name in self.names
                if name not in heard
                and name not in silent
                and name not in asleep
                and not (at_s >= LENGTH_S // 2 and self.site(name) == SITES[5])
            ]
            self.put([], [self.status(name, 1 + at_s) for name in rest])
            if at_s == LENGTH_S // 2:  # a router dies
                self.put([], [self.status(name, 0, False) for name in self.names if self.site(name) == SITES[5]])
            if at_s == LENGTH_S - 2 * HEARTBEAT_S:
                self.put([], [self.status(name, 1 + at_s, sleep_s=6 * 3600) for name in sorted(asleep)])
            if last and thieves:
                for name in thieves:
                    self._sequence[name] -= 1
                self.put([self.report(name, 0) for name in thieves])
            self.step(began_s + at_s)
            self.step(began_s + at_s + 1)
        for after_s in (40, 80, 120, 130):  # what has to hold for a while
            self.step(began_s + LENGTH_S + after_s - 130)
        self.monitor.close()

    def beat(self, share: float = 1 / 60) -> int:
        """What a part of the fleet reports now -> how many devices."""
        self._now_s = time.time()
        names = self._random.sample(self.names, max(1, int(len(self.names) * share)))
        self.put([self.report(name, 2 if self._random.random() < 0.003 else 0) for name in names])
        self.step()
        return len(names)

    def close(self) -> None:
        self.store.close()
