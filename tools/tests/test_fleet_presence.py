"""Who is there, in virtual time: true silence is seen within two intervals, and nobody is silent who is not."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import cbor2
import pytest
from rich.console import Console
from stonechat_tools.fleet import keyring, labels, overview, wire
from stonechat_tools.fleet.collector import Collector
from stonechat_tools.fleet.monitor import Monitor, read_states
from stonechat_tools.fleet.mqtt_codec import Message
from stonechat_tools.fleet.presence import AWAY, State
from stonechat_tools.fleet.store import Store, StoreError
from stonechat_tools.proofs import fleet_replay as replay

WINDOW_S, HEARTBEAT = 10, 30
INTERVAL_S = WINDOW_S * HEARTBEAT
BEGAN_S = 1_795_000_000


class Fleet:
    """Devices that report every INTERVAL_S into a store and its monitor, at the time that the test sets."""

    def __init__(self, store: Store, count: int = 1) -> None:
        self.store = store
        self.now_s = float(BEGAN_S)
        self.keys = {f"d-{n}": keyring.DeviceKeys(bytes([n % 256]) * 32, f"d-{n}") for n in range(count)}
        self.sequence = dict.fromkeys(self.keys, 0)
        self.number = dict.fromkeys(self.keys, 0)
        self.monitor = self.collector()
        for name in self.keys:
            self.status(name)

    def collector(self) -> Monitor:
        """A collector that begins now."""
        self.monitor = Monitor(self.store, clock=lambda: self.now_s, steady=lambda: self.now_s)
        self.monitor.connected(True)
        return self.monitor

    def put(self, reports: list[wire.Report], statuses: list[wire.Status]) -> None:
        results = self.store.put(reports, statuses, now_s=self.now_s)
        self.monitor.took(reports, results, statuses)

    def status(self, name: str, stream: bytes = b"aaaa", online: bool = True, **more: Any) -> None:
        fields: dict[int, Any] = {0: 1, 2: 1, 4: 1, 5: online, 16: stream}
        if online:
            self.number[name] += 1
            fields |= {6: self.number[name], 10: WINDOW_S * 1000, 15: [0, 0, 0, 0], 20: INTERVAL_S}
        fields |= {int(key[1:]): value for key, value in more.items()}
        message = self.keys[name].status.seal(cbor2.dumps(fields, canonical=True))
        self.put([], [wire.open_status(name, self.keys[name], message)])

    def report(self, name: str, windows: int = HEARTBEAT, stream: bytes = b"aaaa", **more: Any) -> None:
        self.sequence[name] += 1
        fields: dict[Any, Any] = {0: 1, 1: self.sequence[name], 2: 1, 3: int(self.now_s), 5: 0, 9: 1}
        fields |= {11: windows, 12: [1, 1, 1]} if windows > 1 else {7: 1, 8: 1}
        fields |= {16: stream} | {int(key[1:]): value for key, value in more.items()}
        message = self.keys[name].report.seal(cbor2.dumps(fields, canonical=True))
        self.put([wire.open_report(name, self.keys[name], message)], [])

    def live(self, seconds: float, *silent: str) -> None:
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s = min(end_s, self.now_s + INTERVAL_S)
            for name in self.keys:
                if name not in silent:
                    self.report(name)
            self.monitor.step()

    def states(self) -> dict[str, str]:
        """By the running collector, which the database agrees with."""
        self.monitor.step()
        found = {seen.device: seen.state.state for seen in self.monitor.states()}
        read = read_states(self.store, self.now_s, self.monitor.fleet.listening_s)
        assert {seen.device: seen.state.state for seen in read} == found
        return found


def test_silence_is_seen_within_two_intervals_and_not_before() -> None:
    with Store(":memory:") as store:
        fleet = Fleet(store, 2)
        assert set(fleet.states().values()) == {"unknown"}
        fleet.live(3 * INTERVAL_S)
        assert set(fleet.states().values()) == {"reporting"}
        fleet.live(INTERVAL_S, "d-1")
        fleet.now_s += INTERVAL_S - 2
        assert fleet.states() == {"d-0": "reporting", "d-1": "reporting"}
        fleet.report("d-0")
        fleet.now_s += 2
        assert fleet.states() == {"d-0": "reporting", "d-1": "silent"}
        fleet.report("d-1")
        assert fleet.states()["d-1"] == "reporting"


def test_a_collector_that_was_away_makes_nobody_silent() -> None:
    with Store(":memory:") as store:
        fleet = Fleet(store, 3)
        fleet.live(2 * INTERVAL_S)
        fleet.now_s += 86_400  # the collector, the broker or this machine was down
        fleet.collector()
        assert set(fleet.states().values()) == {"reporting"}
        fleet.live(3 * INTERVAL_S, "d-2")
        assert fleet.states() == {"d-0": "reporting", "d-1": "reporting", "d-2": "silent"}
        fleet.monitor.connected(False)
        fleet.now_s += 86_400
        assert fleet.states() == {"d-0": "reporting", "d-1": "reporting", "d-2": "silent"}
        fleet.monitor.connected(True)
        fleet.now_s += INTERVAL_S
        assert fleet.states()["d-0"] == "reporting"


def test_a_change_of_level_does_not_shorten_the_interval_much() -> None:
    with Store(":memory:") as store:
        fleet = Fleet(store)
        fleet.live(2 * INTERVAL_S)
        fleet.report("d-0", windows=1)
        fleet.report("d-0", windows=1)
        fleet.now_s += INTERVAL_S
        assert fleet.states()["d-0"] == "reporting"


@pytest.mark.parametrize("clock_s", [1_700_000_000, BEGAN_S + 86_400 * 365])
def test_the_devices_own_clock_has_no_say(clock_s: int) -> None:
    with Store(":memory:") as store:
        fleet = Fleet(store)
        for _ in range(3):
            fleet.now_s += INTERVAL_S
            fleet.report("d-0", k3=clock_s)
        assert fleet.states()["d-0"] == "reporting"


def test_the_last_will_and_the_way_back() -> None:
    with Store(":memory:") as store:
        fleet = Fleet(store)
        fleet.live(INTERVAL_S)
        fleet.now_s += 5
        gone_s = fleet.now_s
        fleet.status("d-0", online=False)
        assert fleet.states()["d-0"] == "gone"
        fleet.now_s += 100
        assert fleet.monitor.states()[0].state.since_s == gone_s
        fleet.status("d-0")
        assert fleet.states()["d-0"] == "reporting"


def test_a_planned_sleep() -> None:
    with Store(":memory:") as store:
        fleet = Fleet(store, 2)
        fleet.live(INTERVAL_S)
        fleet.status("d-0", k21=7200)
        fleet.now_s += 90
        fleet.status("d-0", online=False)  # the broker missed it: that is what a sleep looks like
        for _ in range(24):
            fleet.now_s += INTERVAL_S
            fleet.report("d-1")
            assert fleet.states() == {"d-0": "asleep", "d-1": "reporting"}
        fleet.collector()  # one that begins anew knows of it, too
        fleet.now_s += INTERVAL_S
        assert fleet.states()["d-0"] == "asleep"
        fleet.now_s += 2 * INTERVAL_S
        fleet.report("d-1")
        assert fleet.states()["d-0"] == "silent"
        fleet.status("d-0", b"bbbb")
        assert fleet.states()["d-0"] == "reporting"


def test_a_key_that_is_used_twice_is_seen() -> None:
    with Store(":memory:") as store:
        fleet = Fleet(store, 2)
        fleet.live(INTERVAL_S)
        fleet.sequence["d-0"] -= 1
        fleet.report("d-0", k14=7)  # the same number, other bytes
        assert fleet.states()["d-0"] == "lying" and store.count("d-0") == 2
        for stream in (b"bbbb", b"aaaa"):  # one image runs on two devices
            fleet.status("d-1", stream)
        assert fleet.states()["d-1"] == "lying"
        assert fleet.monitor.states()[1].state.since_s == fleet.now_s
        fleet.monitor.fleet.trust("d-1")
        assert fleet.states()["d-1"] == "reporting"


def test_lost_reports_are_announced_or_unexplained() -> None:
    with Store(":memory:") as store:
        fleet = Fleet(store, 3)
        fleet.live(INTERVAL_S)
        fleet.sequence["d-0"] += 5
        fleet.report("d-0", k14=5)  # its outbox was full, and it says so
        fleet.sequence["d-1"] += 7
        fleet.report("d-1")
        late = fleet.sequence["d-2"] + 1
        fleet.sequence["d-2"] += 1
        fleet.report("d-2")
        fleet.sequence["d-2"], after = late - 1, fleet.sequence["d-2"]
        fleet.report("d-2", k23=500)  # out of order, and whole again
        fleet.sequence["d-2"] = after
        fleet.live(3 * 3600)
        found = {seen.device: (seen.lost, seen.unexplained) for seen in fleet.monitor.states()}
        assert found == {"d-0": (5, 0), "d-1": (0, 7), "d-2": (0, 0)}
        assert [incident.key for incident in fleet.monitor.incidents.open.values()] == ["lost-d-1"]


def test_a_removed_device_stays_away_until_it_says_something_new() -> None:
    with Store(":memory:") as store:
        fleet = Fleet(store, 2)
        fleet.live(INTERVAL_S)
        labels.write(store, {"d-1": labels.Labels(site="berlin", removed_s=fleet.now_s)})
        fleet.now_s += 3
        assert list(fleet.states()) == ["d-0"]
        fleet.collector()
        fleet.number["d-1"] -= 1
        fleet.status("d-1")  # the broker's retained copy
        fleet.status("d-1", online=False)
        assert list(fleet.states()) == ["d-0"]
        fleet.report("d-1")
        assert fleet.states() == {"d-0": "reporting", "d-1": "reporting"}
        assert labels.read(store)["d-1"] == labels.Labels(site="berlin")


def collector_of(fleet: Fleet) -> Collector:
    """One that is not started, connected."""
    collector = Collector(fleet.store, keyring.Keys({}), monitor=fleet.monitor)
    collector.connected.set()
    return collector


def test_a_database_that_takes_nothing_makes_nobody_silent_and_is_an_incident(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full, locked, away: what the devices sent meanwhile waits at the broker. Whoever is notified hears of it."""
    with Store(":memory:") as store:
        fleet = Fleet(store, 20)
        fleet.live(3600)
        collector = collector_of(fleet)
        put, end_s = store.put, fleet.now_s + 7200

        def refuse(*values: Any, **more: Any) -> list[str]:
            fleet.now_s += 30
            if fleet.now_s < end_s:
                raise StoreError("database or disk is full", True)
            assert away(fleet) == ["collector"]
            return put(*values, **more)

        with monkeypatch.context() as patch:
            patch.setattr("stonechat_tools.fleet.collector.RETRY_S", 0.0)
            patch.setattr(store, "put", refuse)
            collector._store([])
        (incident,) = fleet.monitor.incidents.open.values()
        assert "database or disk is full" in incident.title and incident.notifications == 1
        collector._judge()
        fleet.now_s += 100
        assert not away(fleet) and set(fleet.states().values()) == {"reporting"}
        fleet.live(600)
        assert not fleet.monitor.causes.open and not any(device.odd.outages for device in fleet.monitor.fleet)


def test_the_will_at_a_broker_that_a_device_has_left_is_none(tmp_path: Path) -> None:
    """Two brokers: the one that a device went away from publishes the last will later, and keeps it for each collector
    that comes."""
    with Store(":memory:") as store:
        fleet = Fleet(store, 2)
        fleet.live(600)
        sent: list[Message] = []

        def sealed(name: str, online: bool) -> Message:
            fields: dict[int, Any] = {0: 1, 2: 1, 4: 1, 5: online, 16: b"aaaa"}
            if online:
                fleet.number[name] += 1
                fields |= {6: fleet.number[name], 10: WINDOW_S * 1000, 15: [0, 0, 0, 0], 20: INTERVAL_S}
            payload = fleet.keys[name].status.seal(cbor2.dumps(fields, canonical=True))
            sent.append(Message(f"{wire.PREFIX}/{name}/status".replace("//", "/"), payload, 0, 0))
            return sent[-1]

        def collector() -> Collector:
            keys = keyring.Keys({name: bytes([n]) * 32 for n, name in enumerate(fleet.keys)})
            return Collector(store, keys, monitor=fleet.monitor, also=[("localhost", 1884)])

        first = collector()
        first.take([sealed("d-0", True), sealed("d-1", True)], (0, 1))
        second_status = sealed("d-0", True)
        first.take([second_status], (1, 1))
        will = sealed("d-0", False)
        first.take([will], (0, 1))
        assert fleet.states() == {"d-0": "reporting", "d-1": "reporting"}
        assert store.devices("d-0")[0]["online"]
        for order in ([(will, 0), (second_status, 1)], [(second_status, 1), (will, 0)]):
            again = collector()  # that is given what both brokers keep
            for message, at in order:
                with contextlib.suppress(keyring.Rejected):
                    again.take([message], (at, 1))
            assert fleet.states()["d-0"] == "reporting"
        first.take([will], (1, 1))  # where it is
        first.take([sealed("d-1", False)], (0, 1))
        assert fleet.states() == {"d-0": "gone", "d-1": "gone"}


def test_a_status_of_long_ago_is_no_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a start before those that presence remembers, sent again by whoever has kept it, or by a broker that was
    restored."""
    with Store(":memory:") as store:
        fleet = Fleet(store, 2)
        keys = keyring.Keys({name: bytes([n]) * 32 for n, name in enumerate(fleet.keys)})
        collector = Collector(store, keys, monitor=fleet.monitor)
        put = store.put
        monkeypatch.setattr(store, "put", lambda *values, **more: put(*values, **{"now_s": fleet.now_s, **more}))
        kept: list[Message] = []
        for boot in range(8):
            fields = {0: 1, 2: boot + 1, 4: 1, 5: True, 6: 1, 10: WINDOW_S * 1000, 15: [0, 0, 0, 0], 20: INTERVAL_S}
            payload = fleet.keys["d-0"].status.seal(cbor2.dumps(fields | {16: b"s%03d" % boot}, canonical=True))
            kept.append(Message(f"{collector.prefix}d-0/status", payload, 0, 0))
            collector.take(kept[-1:])
            for _ in range(3):
                fleet.now_s += INTERVAL_S
                fleet.report("d-0", stream=b"s%03d" % boot)
                fleet.report("d-1")
                fleet.monitor.step()
        fleet.live(1800, "d-0")
        assert fleet.states() == {"d-0": "silent", "d-1": "reporting"}
        for message in kept:
            collector.take([message])
            assert fleet.states()["d-0"] == "silent"
        assert collector.counts["stale"] == 7  # the last one is what the broker keeps


def test_a_collector_that_was_stopped_makes_nobody_silent() -> None:
    """SIGSTOP, a virtual machine that is moved, a disk that does not answer: no clock and no broker says so."""
    with Store(":memory:") as store:
        fleet = Fleet(store, 20)
        fleet.live(3600)
        collector = collector_of(fleet)
        collector._notice_pause()
        fleet.now_s += 7200
        collector._turned_s -= 7200
        collector._notice_pause()
        collector._judge()
        assert set(fleet.states().values()) == {"reporting"}
        fleet.live(1800, "d-0")
        assert fleet.states()["d-0"] == "silent"


def away(fleet: Fleet) -> list[str]:
    return sorted(each.kind for each in fleet.monitor.incidents.open.values())


def test_what_is_removed_is_in_no_incident_whether_before_or_after() -> None:
    """Devices that are taken out of service together, and one that is shown again although it is away."""
    with Store(":memory:") as store:
        fleet = Fleet(store, 40)
        names = [f"d-{n}" for n in range(40)]
        fleet.live(3600)

        def remove(some: list[str], at_s: float | None) -> None:
            labels.write(store, {name: labels.Labels(removed_s=at_s) for name in some})

        remove(names[:10], fleet.now_s)  # before they are switched off
        fleet.live(3600, *names[:10])
        assert not away(fleet)
        fleet.live(3600, *names[:20])  # and after it
        assert away(fleet) == ["cause"]
        remove(names[10:20], fleet.now_s)
        fleet.live(600, *names[:20])
        assert not away(fleet) and not fleet.monitor.causes.open
        fleet.live(3600, *names[:30])
        assert away(fleet) == ["cause"]
        fleet.monitor.close()
        remove(names[20:30], fleet.now_s)  # while no collector runs
        fleet.collector()
        fleet.live(600, *names[:30])
        assert not away(fleet) and not fleet.monitor.causes.open
        remove(names[:1], None)
        fleet.live(600, *names[:30])
        assert away(fleet) == ["silent"]


def test_a_clock_that_was_ahead_hides_no_silence() -> None:
    """A board without a battery, or a server with a wrong one: set right while no collector runs."""
    with Store(":memory:") as store:
        fleet = Fleet(store, 2)
        fleet.live(3600)
        fleet.now_s += 365 * 86_400
        fleet.live(3600)
        fleet.status("d-1", _21=600)
        fleet.states()
        fleet.monitor.close()
        fleet.now_s -= 365 * 86_400 + 7200
        fleet.collector()
        fleet.live(1800, "d-0", "d-1")
        assert fleet.states() == {"d-0": "silent", "d-1": "silent"}
        assert all(fleet.now_s - 1900 < seen.state.since_s <= fleet.now_s for seen in fleet.monitor.states())


def test_a_database_that_is_moved_away_is_given_what_is_known(tmp_path: Path) -> None:
    path = tmp_path / "fleet.db"
    with Store(path) as store:
        fleet = Fleet(store, 2)
        fleet.live(INTERVAL_S)
        fleet.status("d-0", k21=7200)
        assert fleet.states()["d-0"] == "asleep"
        for end in ("", "-wal", "-shm"):
            if (tmp_path / f"fleet.db{end}").exists():
                (tmp_path / f"fleet.db{end}").rename(tmp_path / f"moved.db{end}")
        fleet.now_s += INTERVAL_S
        fleet.report("d-1")
        fleet.monitor.step()
        assert store.notes("presence").keys() == {"d-0", "d-1"}
        assert fleet.monitor.states()[0].state.state == "asleep"


def test_devices_behind_one_dead_router_are_one_line() -> None:
    with Store(":memory:") as store:
        fleet = Fleet(store, 40)
        labels.write(store, {f"d-{n}": labels.Labels(site="north") for n in range(30)})
        fleet.now_s += 3
        fleet.live(INTERVAL_S)
        dead = [f"d-{n}" for n in range(30)]
        fleet.live(4 * INTERVAL_S, "d-39")  # one alone
        assert sum(state == "silent" for state in fleet.states().values()) == 1
        assert overview.common_causes(fleet.monitor.states()) == ""
        fleet.live(4 * INTERVAL_S, "d-39", *dead)
        assert sum(state == "silent" for state in fleet.states().values()) == 31
        assert overview.common_causes(fleet.monitor.states()) == "30 of 40 devices left together: site north"
        keys = {incident.kind for incident in fleet.monitor.incidents.open.values()}
        assert keys == {"cause", "silent"} and len(fleet.monitor.incidents.open) == 2
        fleet.collector()  # begins anew with the cause that it knew
        assert fleet.states()["d-0"] == "silent" and len(fleet.monitor.incidents.open) == 2
        fleet.live(INTERVAL_S, "d-39")
        assert not fleet.monitor.causes.open


# --- replays: the same scenarios at full size are `stonechat soak fleet` ----------------------------------------------


def test_sleepers() -> None:
    found = replay.sleepers(1, 40, 8)
    assert found["false silent"] == found["false gone"] == 0 and found["known of 5 that never wake"] == 5
    assert found["intervals until known"] <= 2 and found["asleep seen"] == 40


@pytest.mark.slow(5)
def test_flapping_is_learned_and_makes_nobody_silent_or_lying() -> None:
    found = replay.flapping(2, 40, 8)
    assert found["false silent"] == found["false lying"] == found["false lost"] == 0
    assert found["flapping seen"] == 40 and found["notifications"] < found["outages"] / 20


def test_a_killed_broker() -> None:
    found = replay.broker_killed(3, 300)
    assert found["false silent"] == found["false gone"] == found["notifications about devices"] == 0
    assert found["reporting at the end"] == 300


@pytest.mark.slow(5)
def test_a_killed_collector_goes_on_from_its_database() -> None:
    with Store(":memory:") as store:
        found = replay.collector_restarted(4, store, 200)
    assert found["false silent"] == 0 and found["dead found"] == 10
    assert found["notifications before"] == found["notifications after"] == 1


@pytest.mark.slow(5)
def test_clocks_that_jump_by_hours_and_decades() -> None:
    found = replay.clock_jumps(5, 60)
    assert found["false silent"] == found["false lying"] == 0 and found["dead found"] == 1


@pytest.mark.slow(5)
@pytest.mark.parametrize("wills", [True, False])
def test_a_router_that_dies_is_one_notification(wills: bool) -> None:
    found = replay.router(6, 300, 100, wills=wills)
    assert found["notifications"] == found["resolved"] == 1 and found["open at the end"] == 0
    assert found["seconds until notified"] < 500
    if wills:
        assert found["named"] == "300 of 300 devices left together: site north"


@pytest.mark.slow(5)
def test_true_silence_is_known_within_two_intervals() -> None:
    for seed in range(3):
        found = replay.true_silence(seed, 60, 5)
        assert found["known"] == found["died"] > 5 and found["false silent"] == 0
        assert found["intervals until known"] <= 2


def test_thieves_are_seen_and_restarts_are_not() -> None:
    found = replay.key_used_twice(8)
    assert found["thieves seen"] == 3 and found["false lying"] == 0 and found["clone seen after min"] < 20


def test_the_states_of_a_fleet_that_nobody_feeds_are_none() -> None:
    assert set(AWAY) == {"silent", "gone"}
    with Store(":memory:") as store:
        assert read_states(store, 0.0, None) == []


def test_the_table_cuts_off_nothing_in_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "living-room-camera-0123456789-9876543210-0123456789"
    with Store(":memory:") as store:
        fleet = Fleet(store, 12)
        fleet.live(INTERVAL_S)
        rows = store.devices()
        rows[3].update(device=name, refused=4217, learning=True, reports=123_456, lost=9_999)
        monkeypatch.setattr(store, "devices", lambda: rows)
        states = fleet.monitor.states()
        lying = State("lying", 0.0, "its key is used twice: one report number with other bytes (31 signs)")
        states[3] = replace(states[3], device=name, state=lying)
        Console(width=80).print(overview.fleet_table(store, states=states))
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    assert "…" not in text and text.count("reporting") == 11 and text.count("lying") == 1
    assert all(len(line) <= 80 for line in lines)
    for word in ("device", "presence", "(learning)", "123456", "9999", "last seen", "notes"):
        assert word in text
    first = next(n for n, line in enumerate(lines) if line.startswith(name[:10]))
    assert "".join(line[:10].strip() for line in lines[first : first + 5]).startswith(name[:45])
    assert "4217" in text and "signs" in text


def test_the_table_says_when_no_collector_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with Store(":memory:") as store:
        fleet = Fleet(store)
        fleet.live(INTERVAL_S)
        store.listened(BEGAN_S, fleet.now_s + 5)
        Console(width=160).print(overview.fleet_table(store))
        said = capsys.readouterr().out
        assert "reporting" in said and "when a collector was last connected" in said


class Verdict:
    """What a scorer says of one window, quiet or loud."""

    surprise_q8, evidence_q8, score_q8 = 9000, 900, 500
    learning = changed = unfit = False

    def __init__(self, level: int) -> None:
        self.level = level

    def explain(self, k: int = 3) -> list[tuple[int, int, int]]:
        return [(level, 20, 60) for level in range(1, 1 + k)]


@pytest.mark.parametrize("bytes_per_day", [1000, 4000, 40_000])
def test_a_device_short_of_bytes_is_not_silent(bytes_per_day: int) -> None:
    """The real agent with a storm of alarms each six hours, which takes all the bytes there are: what it announces
    holds, and its real silence is seen."""
    from stonechat.delivery import Delivery
    from stonechat.outbox_memory import MemoryOutbox

    secret = bytes(32)
    keys = keyring.DeviceKeys(secret, "d-1")
    device = Delivery("d-1", secret, MemoryOutbox(8192), heartbeat_windows=30, bytes_per_day=bytes_per_day)
    with Store(":memory:") as store:
        now_s = BEGAN_S + 0.0
        monitor = Monitor(store, clock=lambda: now_s, steady=lambda: now_s)
        monitor.connected(True)
        sent = 0

        def publish(topic: str, message: bytes, qos: int = 1, retain: bool = False) -> None:
            nonlocal sent
            sent += len(message)
            if topic.endswith("status"):
                statuses = [wire.open_status("d-1", keys, bytes(message))]
                store.put([], statuses, now_s=now_s)
                monitor.took([], [], statuses)
                return
            report = wire.open_report("d-1", keys, bytes(message))
            monitor.took([report], store.put([report], now_s=now_s))
            device.on_message(device.ack_topic, wire.seal_ack(keys, report.stream, [(report.sequence,) * 2]))

        seen: set[str] = set()
        announced = False
        for window in range(2 * 8640):
            now_s += WINDOW_S
            announced = announced or device.send_status(publish, lambda: device.status(window_ms=WINDOW_S * 1000))
            storm = 1 if window % 2160 < 200 else 0
            device.observe(Verdict(2 * (storm and window % 2)), round(now_s * 1000) & 0x3FFFFFFF)
            device.pump(publish, round(now_s * 1000) & 0x3FFFFFFF)
            if window % 6 == 0:
                monitor.step()
                seen |= {state.state.state for state in monitor.states()}
        assert announced and sent <= 2 * bytes_per_day + 700
        assert "reporting" in seen and not seen & set(AWAY), seen
        (state,) = monitor.states()
        now_s += 2 * state.interval_s + 200
        monitor.step()
        assert monitor.states()[0].state.state == "silent"
