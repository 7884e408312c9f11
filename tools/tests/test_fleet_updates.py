"""Roll-outs in virtual time: the collector's updates and the device's own Update, with sealed messages between them."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cbor2
import pytest
from postgres_support import needs_postgres, postgres, postgres_server
from stonechat import cose, manifest, slots
from stonechat.cose_open import fields_of
from stonechat.errors import ModelError
from stonechat.slots import Slots
from stonechat.update import Update
from stonechat_tools.fleet import keyring, labels, rollout_judge, updates, wire, wire_release
from stonechat_tools.fleet.collector import Collector
from stonechat_tools.fleet.labels import Labels
from stonechat_tools.fleet.monitor import Monitor
from stonechat_tools.fleet.mqtt_codec import Message
from stonechat_tools.fleet.rollout import DAY_S, Stage
from stonechat_tools.fleet.shards import Shard
from stonechat_tools.fleet.store import Keep, Store, releases, rollouts
from stonechat_tools.fleet.store.base import next_number
from stonechat_tools.fleet.updates import Updates
from stonechat_tools.proofs.postgres_server import Server

__all__ = ["postgres", "postgres_server"]
VECTORS = cbor2.loads(
    (Path(__file__).resolve().parents[2] / "firmware_tests/golden/releases/updates.cbor").read_bytes()
)
MODEL = bytes(i * 7 & 255 for i in range(1000))
NOW_S = 1_800_000_000
SCHEMA = b"schema-1"
INTERVAL_S = 300
STAGES = (Stage(2 * 3600, devices=2), Stage(2 * 3600, share=0.5), Stage(2 * 3600, share=1.0))


class Unit:
    """One device: the agent's Update over files, and what it says over the wire. starts: how often it has started;
    dead: it says nothing any more."""

    def __init__(self, name: str, number: int, folder: Path) -> None:
        self.name = name
        self.secret = bytes([number]) * 32
        self.keys = keyring.DeviceKeys(self.secret, name)
        self.folder = folder / name
        self.folder.mkdir()
        self.offers = cose.Mac(self.secret, b"offer", name)
        self.suits: Callable[[object], bool] = lambda model: True
        self.broken = False  # the new model ends the device at each start
        self.dead = False
        self.accepts: Callable[[object], None] | None = None  # of its response, if it has one
        (self.folder / "factory").write_bytes(MODEL)
        self.off = False  # its user has switched monitoring off
        self.sequence = self.number = self.starts = self.chunks = 0
        self.start()

    def start(self) -> None:
        self.starts += 1
        self.stream = hashlib.sha256(f"{self.name} {self.starts}".encode()).digest()[:4]
        self.sequence = self.number = 0
        store = Slots(str(self.folder))
        store.start()
        self.update = Update(
            store,
            self.stream,
            [[0, VECTORS["key"]]],
            "pump",
            SCHEMA,
            16_384,
            self._load,
            lambda model: self.suits(model),
            str(self.folder / "factory"),
            self.accepts,
        )

    @staticmethod
    def _load(path: str, rules: object = None, golden: object = None) -> bytes:
        data = Path(path).read_bytes()
        if data != MODEL:
            raise ModelError("golden vector differs")
        return data

    def status(self, now_s: float) -> wire.Status:
        self.number += 1
        store = self.update.store
        numbers = [store.version, store.slot, store.trial, store.tried, store.result, self.update.refusals]
        fields = {0: 1, 2: self.starts, 3: int(now_s), 4: 9, 5: True, 6: self.number, 9: SCHEMA, 10: 10_000}
        fields |= {15: [0, 0, 0, 0], 16: self.stream, 20: INTERVAL_S, 24: numbers}
        fields |= {23: 0} if self.off else {}
        sealed = self.keys.status.seal(cbor2.dumps(fields, canonical=True))
        return wire.open_status(self.name, self.keys, sealed)

    def report(self, now_s: float, level: int = 0, **more: Any) -> wire.Report:
        self.sequence += 1
        fields = {0: 1, 1: self.sequence, 2: self.starts, 3: int(now_s), 5: level, 9: 1, 11: 30, 12: [1, 1, 1]}
        fields |= {16: self.stream} | {int(key[1:]): value for key, value in more.items()}
        return wire.open_report(self.name, self.keys, self.keys.report.seal(cbor2.dumps(fields, canonical=True)))

    def want(self) -> bytes | None:
        wanted = self.update.want()
        if wanted is None:
            return None
        fields = {0: 1, 1: self.update.offered, 2: wanted[0], 3: wanted[1], 7: self.stream}
        return self.keys.want.seal(cbor2.dumps(fields, canonical=True))


class Fleet:
    """Devices pump-0 ... of class pump, and their collectors (`shards` of them, each with a connection of its own to a
    database at a URL), at the time that the test sets."""

    def __init__(self, folder: Path, count: int, shards: int = 1, url: str = "") -> None:
        self.store = Store(url or ":memory:")
        self.stores = [Store(url) for _ in range(shards)] if url else [self.store] * shards
        self.now_s = float(NOW_S)
        self.units = {f"pump-{n}": Unit(f"pump-{n}", n + 1, folder) for n in range(count)}
        self.keys = keyring.Keys({name: unit.secret for name, unit in self.units.items()})
        self.folder = folder
        self.names = [f"{n}/{shards}" if shards > 1 else "" for n in range(1, shards + 1)]
        self.wrong_s = 0.0  # by which the collectors' clock is ahead
        self.lost = 0.0  # which part of the messages to devices is lost
        self.messages = 0
        labels.write(self.store, {name: Labels(group="pump", site="berlin") for name in self.units})
        for name in ("second", "third"):
            message = VECTORS[name]
            version = 2 if name == "second" else 3
            digest = hashlib.sha256(message).digest()
            releases.publish(self.store, "pump", version, SCHEMA.hex(), digest, message, MODEL, "me", self.now_s)
        self.collectors: list[tuple[Shard, Monitor, Updates]] = []
        self.restart()
        for unit in self.units.values():
            self.say(unit, statuses=[unit.status(self.now_s)])

    def restart(self) -> None:
        """New collectors over the same database."""
        self.collectors = []
        for name, store in zip(self.names, self.stores, strict=True):
            shard = Shard(name)
            monitor = Monitor(store, clock=lambda: self.now_s, steady=lambda: self.now_s - self.wrong_s, shard=shard)
            monitor.connected(True)
            found = Updates(
                store,
                self.keys,
                shard=shard,
                presence=monitor.presence,
                clock=lambda: self.now_s,
                steady=lambda: self.now_s - self.wrong_s,
                rate_bytes=1e6,
            )
            monitor.also(found.alerts)
            self.collectors.append((shard, monitor, found))

    def say(self, unit: Unit, reports: Any = (), statuses: Any = (), wants: Any = ()) -> None:
        results = self.store.put(reports, statuses, now_s=self.now_s)
        for shard, monitor, found in self.collectors:
            if unit.name in shard:
                monitor.took(reports, results, statuses)
                opened = [(wire_release.open_want(unit.name, unit.keys, want), unit.keys) for want in wants]
                self.deliver(found.took(reports, results, statuses, opened, (0, 1)))

    def deliver(self, messages: list[updates.Outgoing]) -> None:
        for _, topic, message in messages:
            assert len(message) <= 512
            self.messages += 1
            unit = self.units[topic.split("/")[-2]]
            if unit.dead or (self.messages * 0.618) % 1 < self.lost:
                continue
            if unit.update.on_message(fields_of(unit.offers, message)):
                self.after(unit)
            else:
                self.say(unit, statuses=[unit.status(self.now_s)])

    def after(self, unit: Unit) -> None:
        """Another model is to run: the device starts anew, as often as that model ends it."""
        unit.start()
        while unit.broken and unit.update.store.trial:
            unit.start()
        self.say(unit, statuses=[unit.status(self.now_s)])

    def live(self, seconds: float, step_s: float = INTERVAL_S, level: Callable[[Unit], int] = lambda unit: 0) -> None:
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s = min(end_s, self.now_s + step_s)
            for unit in self.units.values():
                if not unit.dead:
                    self.say(unit, reports=[unit.report(self.now_s, level(unit))])
                    self.pull(unit)
            for _, monitor, found in self.collectors:
                self.deliver(found.step())
                monitor.step()

    def pull(self, unit: Unit) -> None:
        for _ in range(100):
            want = unit.want()
            if want is None:
                break
            before = unit.update.want()
            self.say(unit, wants=[want])
            self.now_s += 0.06
            if unit.update.want() == before:
                return
        if unit.update.step(int(self.now_s), 10):
            self.after(unit)
        elif unit.update.refusals:
            self.say(unit, statuses=[unit.status(self.now_s)])

    def stage(self, version: int, stages: tuple[Stage, ...] = STAGES, site: str = "") -> int:
        release = next(each for each in releases.releases(self.store, "pump") if each.version == version)
        assert not rollouts.begin(self.store, release, site, stages, "me", self.now_s)
        return self.row(version).id

    def row(self, version: int) -> rollouts.RolloutRow:
        return rollouts.rollouts(self.store, "pump", version)[-1]

    def versions(self) -> list[int]:
        return [unit.update.store.version for unit in self.units.values()]

    def change(self, version: int, state: str) -> None:
        row = self.row(version)
        assert not rollouts.change(self.store, row.id, [row.state], state, "me", "", self.now_s)

    def incidents(self) -> list[str]:
        return [each.title for each in self.collectors[0][1].incidents.open.values() if each.kind == "rollout"]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Callable[..., Fleet]]:
    made: list[Fleet] = []

    def make(count: int, shards: int = 1, url: str = "") -> Fleet:
        made.append(Fleet(tmp_path, count, shards, url))
        return made[-1]

    yield make
    for each in made:
        for store in {each.store, *each.stores}:
            store.close()


def test_a_release_goes_through_its_stages(fleet: Callable[..., Fleet]) -> None:
    pumps = fleet(8)
    pumps.stage(2)
    pumps.live(3600)
    assert sorted(pumps.versions()) == [0] * 6 + [2] * 2
    assert pumps.row(2).stage == 0
    pumps.live(2 * 3600)
    assert sorted(pumps.versions()) == [0] * 4 + [2] * 4
    pumps.live(8 * 3600)
    row = pumps.row(2)
    assert pumps.versions() == [2] * 8 and row.state == "done"
    assert rollouts.counts(pumps.store, row.id) == {"good": 8}
    assert all(unit.update.store.result == slots.CONFIRMED for unit in pumps.units.values())
    assert pumps.store.devices("pump-0")[0]["update"]["shown"] == "version 2"
    # a device that comes later takes it, too
    pumps.units["late"] = Unit("late", 99, pumps.folder)
    pumps.keys = keyring.Keys({name: unit.secret for name, unit in pumps.units.items()})
    pumps.restart()
    labels.write(pumps.store, {"late": Labels(group="pump")})
    pumps.say(pumps.units["late"], statuses=[pumps.units["late"].status(pumps.now_s)])
    pumps.live(2 * 3600)
    assert pumps.units["late"].update.store.version == 2


def test_nothing_is_final_before_a_report_of_the_new_start(fleet: Callable[..., Fleet]) -> None:
    pumps = fleet(1)
    pumps.stage(2)
    unit = pumps.units["pump-0"]
    for _, _, found in pumps.collectors:
        pumps.deliver(found.step())
    for _ in range(3):  # the manifest, the model, its proof
        pumps.pull(unit)
    assert unit.update.store.trial
    pumps.now_s += 20
    _, _, found = pumps.collectors[0]
    pumps.deliver(found.step())
    pumps.say(unit, statuses=[unit.status(pumps.now_s)])
    pumps.say(unit, reports=[unit.report(pumps.now_s, k23=400)])  # history says nothing of the new model,
    pumps.say(unit, reports=[unit.report(pumps.now_s, k15=[1, 0])])  # and the answer to a command neither
    assert unit.update.store.trial
    pumps.say(unit, reports=[unit.report(pumps.now_s)])
    assert not unit.update.store.trial and unit.update.store.version == 2


def test_what_ends_devices_halts_and_is_withdrawn(fleet: Callable[..., Fleet]) -> None:
    pumps = fleet(10)
    for unit in pumps.units.values():
        unit.broken = True
    pumps.stage(2, (Stage(7200, devices=5), Stage(7200, share=1.0)))
    pumps.live(3600)
    row = pumps.row(2)
    assert row.state == "halted" and row.stage == 0
    assert "devices failed" in row.evidence["why"] and row.evidence["test"] == "failures"
    assert {each["why"] for each in row.evidence["failed"]} == {"restarts"}
    assert pumps.versions() == [0] * 10
    assert pumps.incidents() and "halted in stage 5 devices" in pumps.incidents()[0]
    pumps.restart()
    pumps.live(600)
    assert len(pumps.incidents()) == 1
    assert rollouts.log(pumps.store, row.id)[-1]["what"].startswith("halted: ")
    pumps.change(2, "withdrawn")
    pumps.live(1200)
    assert not pumps.incidents() and pumps.row(2).state == "withdrawn"


def test_devices_that_fall_silent_on_trial_halt_it(fleet: Callable[..., Fleet]) -> None:
    pumps = fleet(6)
    pumps.stage(2, (Stage(7200, devices=5), Stage(7200, share=1.0)))

    def dies(unit: Unit) -> int:
        unit.dead = unit.dead or bool(unit.update.store.trial)
        return 0

    pumps.live(2 * 3600, level=dies)
    row = pumps.row(2)
    assert row.state == "halted" and all("silent" in each["why"] for each in row.evidence["failed"])
    assert sum(unit.dead for unit in pumps.units.values()) <= 5


def test_a_release_that_alarms_on_devices_own_windows_halts_it(fleet: Callable[..., Fleet]) -> None:
    pumps = fleet(8)
    for unit in pumps.units.values():
        unit.suits = lambda model: False
    pumps.stage(2, (Stage(7200, devices=5), Stage(7200, share=1.0)))
    pumps.live(3600)
    row = pumps.row(2)
    assert row.state == "halted" and {each["why"] for each in row.evidence["failed"]} == {"unsuited"}
    assert pumps.versions() == [0] * 8


def test_lost_reports_are_a_failure(fleet: Callable[..., Fleet]) -> None:
    pumps = fleet(4)
    pumps.stage(2)
    pumps.live(1500)
    taken = [unit for unit in pumps.units.values() if unit.update.store.version == 2]
    assert len(taken) == 2
    pumps.say(taken[0], reports=[taken[0].report(pumps.now_s, k14=3)])
    pumps.live(2 * 3600)
    assert rollouts.failures(pumps.store, pumps.row(2).id, 9) == [(taken[0].name, "lost 3 reports")]


def test_a_withdrawal_brings_all_back_whoever_was_away(fleet: Callable[..., Fleet]) -> None:
    pumps = fleet(6)
    pumps.stage(2)
    pumps.live(12 * 3600)
    pumps.stage(3)
    pumps.live(3 * 3600)
    assert sorted(set(pumps.versions())) == [2, 3]
    away = next(unit for unit in pumps.units.values() if unit.update.store.version == 3)
    away.dead = True
    pumps.change(3, "withdrawn")
    pumps.live(1800)
    assert pumps.versions().count(3) == 1
    assert rollouts.remaining(pumps.store, pumps.row(3).id, 3) == 1
    pumps.restart()
    away.dead = False
    away.start()
    pumps.say(away, statuses=[away.status(pumps.now_s)])
    pumps.live(1800)
    assert pumps.versions() == [2] * 6
    assert rollouts.remaining(pumps.store, pumps.row(3).id, 3) == 0


def test_devices_that_nobody_confirmed_because_of_a_halt_take_it_after_resume(fleet: Callable[..., Fleet]) -> None:
    pumps = fleet(8)
    pumps.stage(2, (Stage(7200, devices=4), Stage(7200, share=1.0)))
    on_trial: list[Unit] = []
    _, _, found = pumps.collectors[0]
    for _ in range(20):
        pumps.now_s += 30
        pumps.deliver(found.step())
        for unit in pumps.units.values():
            pumps.pull(unit)
        on_trial = [unit for unit in pumps.units.values() if unit.update.store.trial]
        if len(on_trial) == 4:
            break
    assert len(on_trial) == 4
    row = pumps.row(2)
    row.state, row.evidence = "halted", {"why": "a test", "at_s": pumps.now_s, "failed": []}
    with pumps.store.transaction() as db:  # as the halting rule does
        rollouts.save(db, row)
    pumps.restart()
    pumps.live(600)
    for unit in on_trial:
        assert unit.update.store.trial  # nobody confirms
        unit.update.step(int(pumps.now_s), 10)
        assert unit.update.step(int(pumps.now_s), 86_500)
        pumps.after(unit)
    pumps.live(600)
    assert rollouts.counts(pumps.store, row.id) == {"failed": 4}
    assert {why for _, why in rollouts.failures(pumps.store, row.id, 9)} == {"unconfirmed"}
    assert pumps.row(2).state == "halted" and pumps.versions() == [0] * 8
    pumps.change(2, "running")
    pumps.live(3600)
    assert sorted(pumps.versions()) == [0] * 4 + [2] * 4 and rollouts.counts(pumps.store, row.id) == {"confirmed": 4}
    assert pumps.row(2).tests["failures"]["failed"] == 0
    pumps.live(6 * 3600)
    assert pumps.versions() == [2] * 8 and pumps.row(2).state == "done"


def test_a_device_that_can_not_go_below_the_floor_is_asked_less_and_less_often(fleet: Callable[..., Fleet]) -> None:
    pumps = fleet(2)
    pumps.stage(3)  # its floor is 2, and these come from version 0
    pumps.live(8 * 3600)
    assert pumps.versions() == [3, 3]
    pumps.change(3, "withdrawn")
    _, _, found = pumps.collectors[0]
    sent = []
    for _ in range(2):
        before = found.counts["withdrawals"]
        pumps.live(DAY_S, step_s=300.0)
        sent.append(found.counts["withdrawals"] - before)
    assert pumps.versions() == [3, 3] and 10 <= sent[0] <= 40 and sent[1] <= 10, sent
    unit = pumps.units["pump-0"]
    unit.start()  # to a new start at once
    before = found.counts["withdrawals"]
    pumps.say(unit, statuses=[unit.status(pumps.now_s)])
    pumps.live(60, step_s=10.0)
    assert found.counts["withdrawals"] > before


def test_a_policy_that_is_nothing_for_devices_without_a_response_is_no_failure(fleet: Callable[..., Fleet]) -> None:
    pumps = fleet(4)
    message = VECTORS["policy"]
    with pumps.store.transaction() as db:
        db.execute("DELETE FROM releases WHERE version = 3")
    releases.publish(pumps.store, "pump", 3, "", hashlib.sha256(message).digest(), message, None, "me", pumps.now_s)
    for unit in list(pumps.units.values())[:2]:
        unit.accepts = lambda policy: None
        unit.start()
        pumps.say(unit, statuses=[unit.status(pumps.now_s)])
    row = pumps.stage(3, (Stage(600, share=1.0),))
    pumps.live(3 * 3600)
    assert sorted(pumps.versions()) == [0, 0, 3, 3]
    assert rollouts.counts(pumps.store, row) == {"good": 2, "passed": 2}


def test_a_later_release_at_one_site_leaves_the_earlier_one_to_the_others(fleet: Callable[..., Fleet]) -> None:
    pumps = fleet(6)
    sites = {f"pump-{n}": "berlin" if n < 3 else "oslo" for n in range(6)}
    labels.write(pumps.store, {name: Labels(group="pump", site=site) for name, site in sites.items()})
    late = [pumps.units["pump-0"], pumps.units["pump-3"]]
    for unit in late:
        unit.dead = True
    pumps.now_s += 2 * DAY_S
    stages = (Stage(600, share=1.0),)
    pumps.stage(2, stages)
    pumps.live(3 * 3600)
    pumps.stage(3, stages, site="berlin")
    pumps.live(3 * 3600)
    assert pumps.versions() == [0, 3, 3, 0, 2, 2]
    for unit in late:
        unit.dead = False
        unit.start()
        pumps.say(unit, statuses=[unit.status(pumps.now_s)])
    pumps.live(3 * 3600)
    assert pumps.versions() == [3, 3, 3, 2, 2, 2]


def test_a_device_that_missed_two_rotations_of_keys_takes_one_after_the_other(fleet: Callable[..., Fleet]) -> None:
    pumps = fleet(6)
    for version, name, schema in ((4, "keys", ""), (5, "fifth", SCHEMA.hex()), (6, "sixth", SCHEMA.hex())):
        message = VECTORS[name]
        digest = hashlib.sha256(message).digest()
        model = MODEL if schema else None
        releases.publish(pumps.store, "pump", version, schema, digest, message, model, "me", pumps.now_s)
    away = pumps.units["pump-3"]
    away.dead = True
    pumps.now_s += 2 * DAY_S
    stages = (Stage(600, share=1.0),)
    pumps.stage(4, stages)
    pumps.live(3 * 3600)
    assert sorted(pumps.versions()) == [0] + [4] * 5 and pumps.row(4).state == "done"
    pumps.stage(5, stages)
    pumps.live(3 * 3600)
    assert sorted(pumps.versions()) == [0] + [5] * 5 and pumps.row(5).state == "done"
    pumps.stage(6, stages)  # the second one, with a model
    pumps.live(3 * 3600)
    assert sorted(pumps.versions()) == [0] + [6] * 5 and pumps.row(6).state == "done"
    away.dead = False
    away.start()
    pumps.restart()
    pumps.say(away, statuses=[away.status(pumps.now_s)])
    pumps.live(2 * 3600)
    assert away.update.store.version == 6 and away.update.refusals == 0
    for version in (4, 6):
        assert rollouts.counts(pumps.store, pumps.row(version).id) == {"good": 6}


def test_a_device_whose_user_switches_monitoring_off_is_no_failure(fleet: Callable[..., Fleet]) -> None:
    pumps = fleet(4)
    pumps.stage(2)

    def switched_off(unit: Unit) -> int:
        if unit.update.offered and not unit.off:
            unit.off = unit.dead = True
            pumps.say(unit, statuses=[unit.status(pumps.now_s)])
        return 0

    pumps.live(1800, level=switched_off)
    off = [unit for unit in pumps.units.values() if unit.off]
    assert off
    pumps.live(8 * DAY_S, step_s=3600.0)
    found = rollouts.counts(pumps.store, pumps.row(2).id)
    assert found.get("failed", 0) == 0 and found["off"] == len(off), found
    for unit in off:  # it is offered the same release once it is back on
        unit.off = unit.dead = False
        pumps.say(unit, statuses=[unit.status(pumps.now_s)])
    pumps.live(DAY_S, step_s=3600.0)
    assert pumps.versions() == [2] * 4, pumps.versions()


def test_a_device_that_was_replaced_or_comes_back_to_the_class_takes_the_release(fleet: Callable[..., Fleet]) -> None:
    pumps = fleet(4)
    first, last = pumps.units["pump-0"], pumps.units["pump-1"]
    pumps.stage(2, (Stage(600, share=1.0),))
    pumps.live(600)
    labels.write(pumps.store, {"pump-1": Labels(group="valve")})
    pumps.live(4 * 3600)
    assert pumps.row(2).state == "done" and first.update.store.version == 2
    for path in first.folder.iterdir():  # another device of the same name
        if path.name != "factory":
            path.unlink()
    first.start()
    pumps.say(first, statuses=[first.status(pumps.now_s)])
    for path in last.folder.iterdir():
        if path.name != "factory":
            path.unlink()
    last.start()
    pumps.say(last, statuses=[last.status(pumps.now_s)])
    pumps.live(3600)
    assert first.update.store.version == 2 and last.update.store.version == 0
    labels.write(pumps.store, {"pump-1": Labels(group="pump")})
    pumps.live(4 * 3600)
    counts = rollouts.counts(pumps.store, pumps.row(2).id)
    assert pumps.versions() == [2] * 4 and counts == {"good": 4}, counts


def test_a_pause_serves_nothing_and_a_resumed_one_goes_on(fleet: Callable[..., Fleet]) -> None:
    pumps = fleet(4)
    pumps.stage(2)
    unit = None
    _, _, found = pumps.collectors[0]
    pumps.deliver(found.step())
    unit = next(unit for unit in pumps.units.values() if unit.update.offered)
    want = unit.want()
    assert want is not None
    pumps.say(unit, wants=[want])
    assert unit.update.want() == (0, 384)
    pumps.change(2, "paused")
    pumps.live(9 * DAY_S, step_s=3600.0)
    assert unit.update.want() == (0, 384) and pumps.versions() == [0] * 4
    pumps.change(2, "running")
    pumps.live(12 * 3600)
    assert pumps.versions() == [2] * 4 and rollouts.counts(pumps.store, pumps.row(2).id) == {"good": 4}


def test_days_without_a_collector_fail_no_device(fleet: Callable[..., Fleet]) -> None:
    pumps = fleet(4)
    pumps.stage(2)
    for _, _, found in pumps.collectors:
        found.step()  # its offers are lost, and it is gone
    pumps.now_s += 9 * DAY_S
    pumps.restart()
    pumps.live(12 * 3600)
    assert pumps.versions() == [2] * 4 and rollouts.counts(pumps.store, pumps.row(2).id) == {"good": 4}


def test_days_without_a_broker_fail_no_device(fleet: Callable[..., Fleet]) -> None:
    pumps = fleet(4)
    pumps.stage(2)
    pumps.store.listened(pumps.now_s, pumps.now_s)
    for _ in range(9 * 24):  # the collector runs, and its offers reach nobody
        pumps.now_s += 3600
        for _, _, found in pumps.collectors:
            found.step()
    pumps.store.listened(pumps.now_s, pumps.now_s + 12 * 3600)
    pumps.live(12 * 3600)
    assert pumps.versions() == [2] * 4 and rollouts.counts(pumps.store, pumps.row(2).id) == {"good": 4}


def test_a_release_that_expires_on_its_way_is_offered_no_more_and_fails_nobody(fleet: Callable[..., Fleet]) -> None:
    pumps = fleet(6)
    pumps.stage(2)
    pumps.live(1500)
    assert sorted(pumps.versions()) == [0] * 4 + [2] * 2
    expires_s = manifest.read(manifest.payload(VECTORS["second"])).expires_s
    pumps.now_s = expires_s - 600.0
    pumps.live(20 * DAY_S, step_s=3600.0)
    counts = rollouts.counts(pumps.store, pumps.row(2).id)
    assert sorted(pumps.versions())[:2] == [0, 0] and counts.get("failed", 0) == 0, counts
    pumps.stage(3)  # the next version takes its place
    assert pumps.row(2).state == "running" and all(not unit.update.refusals for unit in pumps.units.values())


def test_lost_messages_and_restarts_of_the_collector_only_cost_time(fleet: Callable[..., Fleet]) -> None:
    pumps = fleet(6)
    pumps.lost = 0.3
    pumps.stage(2)
    for _ in range(48):
        pumps.live(1800)
        pumps.restart()
    assert pumps.versions() == [2] * 6


@needs_postgres
@pytest.mark.slow(8)
def test_two_collectors_agree_on_postgresql(fleet: Callable[..., Fleet], postgres: Server) -> None:
    two_collectors_agree(fleet(8, shards=2, url=postgres.url))


@needs_postgres
@pytest.mark.slow(8)
def test_alarms_are_counted_on_postgresql(fleet: Callable[..., Fleet], postgres: Server) -> None:
    alarms_halt_it(fleet(24, url=postgres.url))


def test_two_collectors_agree(fleet: Callable[..., Fleet]) -> None:
    two_collectors_agree(fleet(8, shards=2))


def two_collectors_agree(pumps: Fleet) -> None:
    pumps.stage(2)
    pumps.live(3600)
    assert sorted(pumps.versions()) == [0] * 6 + [2] * 2
    pumps.live(11 * 3600)
    row = pumps.row(2)
    assert row.state == "done" and pumps.versions() == [2] * 8
    steps = [line["what"] for line in rollouts.log(pumps.store, row.id)]
    assert steps == ["begun: 2 devices first", "stage 50% begins", "stage 100% begins", "done"]
    assert row.tests["failures"]["succeeded"] == 8
    for _, _, found in pumps.collectors:
        assert found.counts["confirmations"]  # both have served devices of their own


def test_only_devices_of_the_class_the_site_and_the_schema_take_it(fleet: Callable[..., Fleet]) -> None:
    pumps = fleet(6)
    labels.write(
        pumps.store,
        {"pump-0": Labels(group="valve"), "pump-1": Labels(group="pump", site="oslo"), "pump-2": Labels()},
    )
    pumps.stage(2, (Stage(600, share=1.0),), site="berlin")
    pumps.live(7200)
    assert pumps.versions() == [0, 0, 0, 2, 2, 2]
    release = releases.releases(pumps.store, "pump")[0]
    assert "is done" in rollouts.begin(pumps.store, release, "", STAGES, "me", pumps.now_s)
    assert not rollouts.begin(pumps.store, release, "oslo", STAGES, "me", pumps.now_s)
    other = releases.releases(pumps.store, "pump")[1]
    assert "pump 2 at oslo is running" in rollouts.begin(pumps.store, other, "", STAGES, "me", pumps.now_s)


def test_devices_that_leave_the_fleet_or_the_class_hold_nothing_up(fleet: Callable[..., Fleet]) -> None:
    pumps = fleet(6)
    pumps.stage(2, (Stage(600, devices=3), Stage(600, share=1.0)))
    _, _, found = pumps.collectors[0]
    pumps.deliver(found.step())
    offered = [unit for unit in pumps.units.values() if unit.update.offered]
    assert len(offered) == 3
    for unit in offered:
        unit.dead = True
    labels.write(
        pumps.store, {offered[0].name: Labels(group="valve"), offered[1].name: Labels("", "pump", removed_s=1)}
    )
    pumps.keys = keyring.Keys({name: unit.secret for name, unit in pumps.units.items() if unit is not offered[2]})
    pumps.restart()
    offered[2].dead = False
    pumps.live(4 * 3600)
    assert rollouts.counts(pumps.store, pumps.row(2).id) == {"passed": 3, "good": 3}
    assert pumps.row(2).state == "done" and not rollouts.failures(pumps.store, pumps.row(2).id, 9)


def test_a_device_that_leaves_while_it_is_watched_is_no_failure(fleet: Callable[..., Fleet]) -> None:
    pumps = fleet(6)
    pumps.stage(2, (Stage(7200, devices=3), Stage(600, share=1.0)))
    pumps.live(1800)
    left = [unit for unit in pumps.units.values() if unit.update.store.version == 2]
    assert len(left) == 3
    labels.write(pumps.store, {left[0].name: Labels(group="valve"), left[1].name: Labels("", "pump", removed_s=1)})
    for unit in left:  # without its labels, its silence would count
        unit.dead = unit is not left[2]
    pumps.live(6 * 3600)
    assert rollouts.counts(pumps.store, pumps.row(2).id) == {"passed": 2, "good": 4}
    assert pumps.row(2).state == "done"


def test_a_device_that_forgets_its_trial_holds_nothing_up(fleet: Callable[..., Fleet]) -> None:
    """Its medium was erased, or its folder does not outlive a start."""
    pumps = fleet(4)
    pumps.stage(2, (Stage(600, devices=1), Stage(600, share=1.0)))

    def erased(unit: Unit) -> int:
        if unit.update.store.trial and not pumps.lost:
            pumps.lost = 1
            for path in unit.folder.iterdir():
                path.unlink()
            unit.start()
            pumps.say(unit, statuses=[unit.status(pumps.now_s)])
            pumps.lost = 1e-9
        return 0

    pumps.live(4 * 3600, level=erased)
    row = pumps.row(2)
    assert rollouts.counts(pumps.store, row.id) == {"failed": 1, "good": 3} and row.state == "done"
    ((_, why),) = rollouts.failures(pumps.store, row.id, 9)
    assert why == "does not know of its trial any more"


def test_what_strangers_and_old_starts_want_is_not_served(fleet: Callable[..., Fleet]) -> None:
    pumps = fleet(2)
    pumps.stage(2, (Stage(600, devices=1), Stage(600, share=1.0)))
    _, _, found = pumps.collectors[0]
    pumps.deliver(found.step())
    offered = next(unit for unit in pumps.units.values() if unit.update.offered)
    other = next(unit for unit in pumps.units.values() if not unit.update.offered)
    keys = other.keys
    assert not found.took([], [], [], [(wire_release.Want(2, 0, 0, other.stream), keys)])
    keys = offered.keys
    for want in ((2, 0, 0, b"oldd"), (3, 0, 0, offered.stream), (2, 0, 1 << 30, offered.stream)):
        assert not found.took([], [], [], [(wire_release.Want(*want), keys)])
    for _ in range(50):  # one waits for each device, and one leaves now
        served = found.took([], [], [], [(wire_release.Want(2, 0, 0, offered.stream), keys)] * 3)
        assert len(served) <= 1
    assert found.counts["chunks"] == 1


def test_the_collector_takes_wants_and_answers_to_their_broker(fleet: Callable[..., Fleet]) -> None:
    pumps = fleet(2)
    pumps.stage(2, (Stage(600, share=1.0),))
    found = Updates(pumps.store, pumps.keys, clock=lambda: pumps.now_s)
    collector = Collector(pumps.store, pumps.keys, updates=found, also=[("other", 1883)], port=1)
    sent: list[tuple[int, str, bytes]] = []
    for at, client in enumerate(collector._clients):
        client.send = lambda mids, publishes, epoch=None, at=at: sent.extend((at, *each) for each in publishes)
    unit = pumps.units["pump-0"]
    topic = f"{wire.PREFIX}pump-0/"
    pumps.deliver(found.step())
    want = unit.want()
    assert want is not None
    forged = pumps.units["pump-1"].want() or b""
    collector.take([Message(topic + "want", forged, 1, 1), Message(topic + "want", b"x" * 600, 1, 2)], (1, 1))
    assert not sent and collector.counts["forged"] == 1 and collector.counts["want"] == 0
    collector.take([Message(topic + "want", want, 1, 3)], (1, 1))
    assert [(at, name) for at, name, _ in sent] == [(1, topic + "model")]
    unit.update.on_message(fields_of(unit.offers, sent[0][2]))
    assert unit.update.want() == (0, 384) and collector.counts["want"] == 1


def test_the_rate_is_kept(fleet: Callable[..., Fleet]) -> None:
    pumps = fleet(20)
    pumps.stage(2, (Stage(600, share=1.0),))
    slow = Updates(pumps.store, pumps.keys, clock=lambda: pumps.now_s, rate_bytes=2000)
    slow.step()
    pumps.now_s += 3
    slow.step()
    wants = [(wire_release.Want(2, 0, 0, unit.stream), unit.keys) for unit in pumps.units.values()]
    sent = len(slow.took([], [], [], wants))
    assert 4 <= sent <= 6
    for _ in range(100):
        pumps.now_s += 0.1
        sent += len(slow.serve())
    assert sent == 20


def test_alarms_of_the_updated_halt_it(fleet: Callable[..., Fleet]) -> None:
    alarms_halt_it(fleet(24))


def alarms_halt_it(pumps: Fleet) -> None:
    """Days of a fleet in which half of the devices have the release, and those alarm ten times as often."""
    keep = pumps.store.retention(Keep(0, 0, 0))
    stages = (Stage(10 * DAY_S, share=0.5), Stage(DAY_S, share=1.0))
    pumps.stage(2, stages)
    judged = rollout_judge.Judge(pumps.store, lambda: labels.read(pumps.store), clock=lambda: pumps.now_s)
    pumps.live(7200)
    assert pumps.versions().count(2) == 12

    def day(often: int) -> None:
        pumps.now_s += DAY_S
        for number, unit in enumerate(pumps.units.values()):
            updated = unit.update.store.version == 2
            alarms = number % 7 == int(pumps.now_s // DAY_S) % 7 or updated and number % 2 < often
            pumps.say(unit, reports=[unit.report(pumps.now_s, 2 if alarms else 0)])
        while keep.step(pumps.now_s + 600):
            pass
        judged.step()

    for _ in range(5):
        day(0)
    assert pumps.row(2).state == "running" and pumps.row(2).tests["alarms"]["usual_with"] > 0
    for _ in range(12):
        day(2)
        if pumps.row(2).state == "halted":
            break
    row = pumps.row(2)
    assert row.state == "halted" and row.evidence["test"] == "alarms"
    assert "devices with the release alarmed on" in row.evidence["why"]
    assert row.evidence["alarms"]["alarmed_with"] > row.evidence["alarms"]["alarmed_without"]


def test_a_clock_that_was_far_ahead_once_costs_no_roll_out(fleet: Callable[..., Fleet]) -> None:
    pumps = fleet(6)
    pumps.stage(2)
    taken = []
    for _, _, found in pumps.collectors:
        taken = [pumps.units[topic.split("/")[-2]] for _, topic, _ in found.step()]
    right_s = pumps.now_s
    pumps.now_s, pumps.wrong_s = right_s + 1.3e9, 1.3e9
    for unit in taken:  # by that clock the release has expired
        pumps.say(unit, reports=[unit.report(pumps.now_s)])
        assert unit.update.offered == 0
    pumps.now_s, pumps.wrong_s = right_s + 5 * DAY_S, 5.0 * DAY_S
    for unit in taken:  # the wrong clock offers it, and the device gives it up, in the same start
        pumps.say(unit, reports=[unit.report(pumps.now_s)])
        assert unit.update.offered == 2
        unit.update.failed()
        pumps.say(unit, statuses=[unit.status(pumps.now_s)])
    for _, _, found in pumps.collectors:
        pumps.now_s += 10
        found.step()
    pumps.now_s, pumps.wrong_s = right_s + 10, 0.0
    pumps.live(10 * 3600)
    assert pumps.versions() == [2] * 6 and pumps.row(2).state == "done"
    assert len(taken) == 2 and all(unit.starts == 2 for unit in pumps.units.values())


def test_a_database_from_a_backup_offers_above_every_number_that_was_used() -> None:
    number = NOW_S
    for _ in range(1000):  # more offers than seconds,
        number = next_number(number, NOW_S)
    assert number == NOW_S + 1000
    assert next_number(NOW_S, NOW_S + 3600) == NOW_S + 3600  # of an older state of the database, an hour later
    assert next_number(NOW_S, 4e9) == NOW_S + 1 and next_number(NOW_S, 0) == NOW_S + 1
    assert next_number(0, 9e9) == 1 and next_number(0, NOW_S) == NOW_S
    with Store(":memory:") as store:
        assert store.next_command("pump-1", 5, [], NOW_S) == NOW_S
        assert store.next_command("pump-1", 5, [], 4.2e9) == NOW_S + 1
        assert store.next_command("pump-1", 5, [], NOW_S + 60) == NOW_S + 60
        assert store.next_command("pump-1", 5, [], NOW_S + 900 * DAY_S) == NOW_S + 900 * DAY_S  # others commanded
