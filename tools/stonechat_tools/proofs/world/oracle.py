"""What must be in the databases at the end, and what the table must show meanwhile.

A device reports every window and numbers its reports without gaps within a stream (one start of the agent), so a
missing number is a missing report, and a missing time is a window that was not scored. Both are allowed only where the
schedule, or a stall of the machine that the idle control measured, is the cause.
"""

import contextlib
import json
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cbor2

from stonechat_tools.proofs.world.devices import Board
from stonechat_tools.proofs.world.fleet import World
from stonechat_tools.proofs.world.parts import COLLECTOR_UID, Site

LEVEL_WITHIN_S = 60.0
ALARM = 2
_SECOND_S = 1.0  # reports carry whole seconds
_LEVELS = """
import json, sqlite3, sys
for line in sys.stdin:
    try:
        database = sqlite3.connect("file:" + sys.argv[1] + "?mode=ro", uri=True, timeout=2)
        rows = dict(database.execute("SELECT name, level FROM devices"))
        database.close()
    except sqlite3.Error as error:
        rows = {"": str(error)}
    print(json.dumps(rows), flush=True)
"""


class Table:
    """The levels that a site's database shows, read as the collector's own user."""

    def __init__(self, site: Site) -> None:
        command = [sys.executable, "-c", _LEVELS, str(site.collector.database)]
        self._reader = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, user=COLLECTOR_UID, group=COLLECTOR_UID,
            extra_groups=[],
        )  # fmt: skip

    def levels(self) -> dict[str, int]:
        assert self._reader.stdin and self._reader.stdout
        self._reader.stdin.write("\n")
        self._reader.stdin.flush()
        rows = json.loads(self._reader.stdout.readline() or "{}")
        return {name: level for name, level in rows.items() if name}

    def close(self) -> None:
        self._reader.kill()
        self._reader.wait(10)


class LevelWatch(threading.Thread):
    """Compares each device's level in the table with what it must be. `wrong`: (device, seconds) for each time that a
    level was wrong for longer than a minute in which nothing stood between the device and the table."""

    def __init__(self, world: World) -> None:
        super().__init__(name="levels", daemon=True)
        self.world = world
        self.wrong: list[tuple[str, float]] = []
        self.slowest_s = 0.0
        self.changes = 0
        self._since: dict[str, float] = {}
        self._reported: set[str] = set()
        self.stopping = threading.Event()

    def run(self) -> None:
        tables = {site.name: Table(site) for site in self.world.sites}
        while not self.stopping.wait(2.0):
            for site in self.world.sites:
                with contextlib.suppress(OSError, ValueError):
                    self._compare(site, tables[site.name].levels())
        for table in tables.values():
            table.close()

    def _compare(self, site: Site, levels: dict[str, int]) -> None:
        now_s = time.monotonic()
        for device in self.world.devices:
            if device.site is not site or not device.can_alarm or device.name not in levels:
                continue
            if (levels[device.name] == ALARM) == device.strange:
                begun_s = self._since.pop(device.name, None)
                if begun_s is not None:
                    self.changes += 1
                    self.slowest_s = max(self.slowest_s, now_s - max(begun_s, self.world.undisturbed_since(device)))
                self._reported.discard(device.name)
                continue
            begun_s = self._since.setdefault(device.name, now_s)
            waited_s = now_s - max(begun_s, self.world.undisturbed_since(device))
            if waited_s > LEVEL_WITHIN_S and device.name not in self._reported:
                self._reported.add(device.name)
                self.wrong.append((device.name, waited_s))


@dataclass
class Stream:
    """The reports of one start of one agent: number -> time of the event, and how often each was stored."""

    times: dict[int, int] = field(default_factory=dict)
    doubled: int = 0

    @property
    def missing(self) -> list[int]:
        return [number for number in range(min(self.times), max(self.times)) if number not in self.times]


@dataclass
class Verdict:
    """Figures of a run; it is good when `failures` is empty."""

    failures: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


def read_streams(database: Path) -> tuple[dict[str, dict[bytes, Stream]], dict[str, list[float]]]:
    """-> ({device: {stream: Stream}}, {device: when each of its reports arrived})."""
    streams: dict[str, dict[bytes, Stream]] = {}
    arrivals: dict[str, list[float]] = {}
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=10)) as opened:
        rows = opened.execute("SELECT d.name, r.body, r.received_s FROM reports r JOIN devices d ON d.id = r.device")
        for name, body, received_s in rows:
            fields = cbor2.loads(body)
            stream = streams.setdefault(name, {}).setdefault(bytes(fields.get(16, b"")), Stream())
            if fields[1] in stream.times:
                stream.doubled += 1
            stream.times[fields[1]] = fields.get(3, 0)
            arrivals.setdefault(name, []).append(received_s)
    return streams, arrivals


def inside(moment_s: float, spans: Iterable[tuple[float, float]]) -> bool:
    return any(begin_s <= moment_s <= end_s for begin_s, end_s in spans)


def overlaps(begin_s: float, end_s: float, spans: Iterable[tuple[float, float]]) -> bool:
    return any(begin_s <= other_end_s and other_begin_s <= end_s for other_begin_s, other_end_s in spans)


def judge(world: World, levels: LevelWatch, began_s: float, ended_s: float) -> Verdict:
    """began_s, ended_s: Unix seconds between which every window had to be scored."""
    verdict = Verdict(failures=list(world.failures))
    window_s = world.window_s
    stored = missing = counted = doubled = gaps = excused = 0
    known = {device.name for device in [*world.devices, *world.victims]}
    for site in world.sites:
        streams, arrivals = read_streams(site.collector.database)
        foreign = {name for name in streams if name not in known and not name.startswith("later-")}
        verdict.failures += [f"{site.name}: reports under an unknown name {name!r}" for name in sorted(foreign)]
        for name, spans in world.revoked.items():
            late = [at_s for at_s in arrivals.get(name, []) if inside(at_s, [(b + 5.0, e) for b, e in spans])]
            if late:
                verdict.failures.append(f"{name}: {len(late)} reports taken while it was revoked")
        for device in world.devices:
            if device.site is not site:
                continue
            found = streams.get(device.name, {})
            if not found:
                verdict.failures.append(f"{device.name}: no report at all")
                continue
            stored += sum(len(stream.times) for stream in found.values())
            doubled += sum(stream.doubled for stream in found.values())
            if not (isinstance(device, Board) and device.profile == "core"):
                for identity, stream in found.items():
                    for number in stream.missing:
                        if (identity, number) in world.lost[device.name]:
                            continue
                        if _near(stream, number, world.unsaved.get(device.name, [])):
                            counted += 1
                            continue
                        missing += 1
                        verdict.failures.append(f"{device.name}: report {number} of {identity.hex()} is missing")
            for begin_s, end_s in _silences(found, began_s, ended_s, 2 * window_s + 2 * _SECOND_S):
                gaps += 1
                spans = world.excuses(device)
                if isinstance(device, Board):
                    # The core profile keeps no reports; a firmware's own client may block the loop that it shares.
                    blocks = device.profile == "core" or device.client != "own"
                    spans += world.cut[device.name] if blocks else world.unresolved
                if overlaps(begin_s, end_s, spans):
                    excused += 1
                else:
                    verdict.failures.append(
                        f"{device.name}: no window was scored from {begin_s - began_s:.0f} to {end_s - began_s:.0f} s"
                    )
    if doubled:
        verdict.failures.append(f"{doubled} reports are in a database twice")
    verdict.failures += [
        f"{name}: the level in the table was wrong for {seconds:.0f} s" for name, seconds in levels.wrong
    ]
    verdict.figures = {
        "agents": len(world.devices) + len(world.victims),
        "reports stored": stored,
        "missing": missing,
        "lost while a disk was full": counted,
        "doubled": doubled,
        "silences": gaps,
        "of them caused by the schedule or the machine": excused,
        "stalls of the machine": len(world.control.stalls),
        "longest stall, s": round(max((length for _, length in world.control.stalls), default=0.0), 2),
        "changes of level seen": levels.changes,
        "slowest change in the table, s": round(levels.slowest_s, 1),
    }
    return verdict


def _near(stream: Stream, number: int, spans: list[tuple[float, float]]) -> bool:
    """Was the report made while a disk was full? By the times of its neighbours."""
    before = max((other for other in stream.times if other < number), default=number)
    after = min((other for other in stream.times if other > number), default=number)
    return overlaps(stream.times.get(before, 0) - 2, stream.times.get(after, 0) + 2, spans)


def _silences(
    streams: dict[bytes, Stream], began_s: float, ended_s: float, longest_s: float
) -> list[tuple[float, float]]:
    """The spans longer than `longest_s` without a report of an event in them."""
    times = sorted(time_s for stream in streams.values() for time_s in stream.times.values())
    moments: list[float] = [began_s, *(time_s for time_s in times if began_s <= time_s <= ended_s), ended_s]
    return [(one, two) for one, two in zip(moments, moments[1:], strict=False) if two - one > longest_s]
