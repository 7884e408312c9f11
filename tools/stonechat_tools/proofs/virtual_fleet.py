"""Simulated devices in virtual time before the collector's own monitor: their messages are those that the agent sends,
without the seal."""

import heapq
import random
from collections.abc import Callable
from itertools import count
from typing import Any

from ..fleet.incidents import Notification, Policy
from ..fleet.monitor import Monitor
from ..fleet.store import STORED
from ..fleet.wire import Feature, Report, Status, pack_features

BEGAN_S = 1_795_000_000.0
WINDOW_S, HEARTBEAT = 10, 30
EVERY_S = WINDOW_S * HEARTBEAT
KEEPALIVE_S = 60.0
HOUR_S, DAY_S, MONTH_S = 3600.0, 86_400.0, 30 * 86_400.0
SCHEMA = bytes(8)
MODEL = b"model-01"


class World:
    """Virtual time, a monitor, and what happens next. skew_s: what the collector's clock is off."""

    def __init__(self, seed: int, policy: Policy | None = None) -> None:
        self.random = random.Random(seed)
        self.now_s = BEGAN_S
        self.skew_s = 0.0
        self.notified: list[Notification] = []
        self.states: list[tuple[float, str, str]] = []  # (when, device, new state)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self.policy = policy or Policy(digest_s=None)
        self.monitor = self.new_monitor()
        self.monitor.connected(True)
        self.up = True  # the collector hears

    def new_monitor(self, **options: Any) -> Monitor:
        return Monitor(
            options.pop("store", None),
            self.policy,
            self.notified.append,
            clock=lambda: self.now_s + self.skew_s,
            steady=lambda: self.now_s,
            day_s=lambda now_s: now_s % DAY_S,
            on_change=lambda change: self.states.append((self.now_s, change.device.name, change.device.state)),
            **options,
        )

    def at(self, at_s: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._order), what))

    def run(self, until_s: float, step_s: float = 1.0) -> None:
        """until_s: from BEGAN_S on."""
        until_s += BEGAN_S
        while self.now_s < until_s:
            self.now_s = min(until_s, self.now_s + step_s)
            while self._events and self._events[0][0] <= self.now_s:
                at_s, _, what = heapq.heappop(self._events)
                what()
            if self.up:
                self.monitor.step()

    def heard(self, reports: list[Report], result: str = STORED) -> None:
        if self.up:
            self.monitor.took(reports, [result] * len(reports))

    def said(self, status: Status) -> None:
        if self.up:
            self.monitor.took([], [], [status])

    def ever(self, state: str) -> set[str]:
        return {name for _, name, found in self.states if found == state}

    def firing(self) -> list[Notification]:
        return [each for each in self.notified if each.reason == "firing"]


class Simulated:
    """A device: heartbeats, an outbox, a clock, a connection that may be down."""

    def __init__(self, world: World, name: str, every_s: float = EVERY_S, will: bool = True) -> None:
        self.world, self.name, self.every_s, self.will = world, name, every_s, will
        self.sequence, self.boot, self.number = 0, 0, 0
        self.stream = b""
        self.connected = False
        self.alive = True
        self.skew_s = 0.0
        self.waiting: list[Report] = []
        self.life = 0  # what was planned for an earlier life does not happen

    def start(self, at_s: float) -> None:
        self.world.at(at_s, self.begin)

    def begin(self) -> None:
        self.life += 1
        self.alive = True
        self.boot += 1
        self.number = 0
        self.stream = self.world.random.randbytes(4)
        self.connect()
        self._beat(self.life)

    def _beat(self, life: int) -> None:
        def beat() -> None:
            if self.alive and self.life == life:
                self.report()
                self.world.at(self.world.now_s + self.every_s, beat)

        self.world.at(self.world.now_s + self.every_s, beat)

    def connect(self) -> None:
        self.connected = True
        self.status()
        for report in self.waiting:
            report.late_s = int(self.world.now_s + self.skew_s - (report.time_s or 0))
            if report.late_s < 60:
                report.late_s = None
        self.world.heard(self.waiting)
        self.waiting = []

    def drop(self) -> None:
        """The connection is lost; the broker publishes the last will when the keep-alive time is over."""
        self.connected = False
        stream, began_s = self.stream, self.world.now_s
        if self.will:

            def will() -> None:
                if not self.connected and self.stream == stream:
                    self.world.said(Status(self.name, self.boot, None, 0, False, stream))

            self.world.at(began_s + self.world.random.uniform(0.5, 1.5) * KEEPALIVE_S, will)

    def die(self) -> None:
        self.alive = False
        if self.connected:
            self.drop()

    def status(self, sleep_s: int | None = None) -> None:
        self.number += 1
        now_s = int(self.world.now_s + self.skew_s)
        self.world.said(
            Status(
                self.name,
                self.boot,
                now_s,
                1,
                True,
                self.stream,
                self.number,
                model=MODEL,
                schema=SCHEMA,
                window_ms=WINDOW_S * 1000,
                counters=(0, 0, 0, 0),
                heartbeat_s=int(self.every_s),
                sleep_s=sleep_s,
            )
        )

    def report(self, level: int = 0, features: list[Feature] | None = None, **more: Any) -> Report:
        self.sequence += 1
        report = Report(
            self.name,
            self.sequence,
            self.boot,
            int(self.world.now_s + self.skew_s),
            None,
            self.stream,
            level=level,
            windows=1 if level else max(1, int(self.every_s / WINDOW_S)),
            score_q8=self.world.random.randrange(200, 400) if not level else 3000,
            packed=pack_features(features or []),
            **more,
        )
        if self.connected and self.world.up:
            self.world.heard([report])
        else:
            self.waiting.append(report)
        return report


def fleet(world: World, size: int, spread_s: float = EVERY_S, **options: Any) -> list[Simulated]:
    found = [Simulated(world, f"d-{n}", **options) for n in range(size)]
    for device in found:
        device.start(BEGAN_S + world.random.uniform(0, spread_s))
    return found


def all_of(what: Callable[[Simulated], None], devices: list[Simulated]) -> None:
    for device in devices:
        what(device)
