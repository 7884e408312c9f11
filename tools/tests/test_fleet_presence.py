"""Who is there, in virtual time: true silence is seen within two intervals, and nobody is silent who is not."""

from typing import Any

import cbor2
import pytest
from rich.console import Console
from stonechat_tools.fleet import keyring, overview, wire
from stonechat_tools.fleet.presence import common_cause, presence
from stonechat_tools.fleet.store import Store

WINDOW_S, HEARTBEAT = 10, 30
INTERVAL_S = WINDOW_S * HEARTBEAT
BEGAN_S = 1_795_000_000


class Fleet:
    """Devices that report every INTERVAL_S into a store, at the time that the test sets."""

    def __init__(self, store: Store, count: int = 1) -> None:
        self.store = store
        self.now_s = float(BEGAN_S)
        self.since_s = float(BEGAN_S)
        self.keys = {f"d-{n}": keyring.DeviceKeys(bytes([n % 256]) * 32, f"d-{n}") for n in range(count)}
        self.sequence = dict.fromkeys(self.keys, 0)
        self.number = dict.fromkeys(self.keys, 0)
        for name in self.keys:
            self.status(name)

    def status(self, name: str, stream: bytes = b"aaaa", online: bool = True) -> None:
        fields: dict[int, Any] = {0: 1, 2: 1, 4: 1, 5: online, 10: WINDOW_S * 1000, 16: stream}
        if online:
            self.number[name] += 1
            fields[6] = self.number[name]
        message = self.keys[name].status.seal(cbor2.dumps(fields, canonical=True))
        self.store.put([], [wire.open_status(name, self.keys[name], message)], now_s=self.now_s)

    def report(self, name: str, windows: int = HEARTBEAT, **more: Any) -> None:
        self.sequence[name] += 1
        fields: dict[Any, Any] = {0: 1, 1: self.sequence[name], 2: 1, 3: int(self.now_s), 5: 0, 9: 1}
        fields |= {11: windows, 12: [1, 1, 1]} if windows > 1 else {7: 1, 8: 1}
        fields |= {16: b"aaaa"} | {int(key[1:]): value for key, value in more.items()}
        message = self.keys[name].report.seal(cbor2.dumps(fields, canonical=True))
        self.store.put([wire.open_report(name, self.keys[name], message)], now_s=self.now_s)

    def live(self, seconds: float, *silent: str) -> None:
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s = min(end_s, self.now_s + INTERVAL_S)
            for name in self.keys:
                if name not in silent:
                    self.report(name)

    def states(self) -> dict[str, str]:
        found = self.store.devices()
        return {device["device"]: presence(device, self.now_s, self.since_s).state for device in found}


def test_silence_is_seen_within_two_intervals_and_not_before() -> None:
    with Store(":memory:") as store:
        fleet = Fleet(store, 2)
        assert set(fleet.states().values()) == {"unknown"}
        fleet.live(3 * INTERVAL_S)
        assert set(fleet.states().values()) == {"reporting"}
        fleet.live(INTERVAL_S, "d-1")
        fleet.now_s += INTERVAL_S - 1
        assert fleet.states() == {"d-0": "reporting", "d-1": "reporting"}
        fleet.report("d-0")
        fleet.now_s += 32
        assert fleet.states() == {"d-0": "reporting", "d-1": "silent"}
        fleet.report("d-1")
        assert fleet.states()["d-1"] == "reporting"


def test_a_collector_that_was_away_makes_nobody_silent() -> None:
    with Store(":memory:") as store:
        fleet = Fleet(store, 3)
        fleet.live(2 * INTERVAL_S)
        fleet.now_s += 86_400  # the collector, the broker or this machine was down
        fleet.since_s = fleet.now_s - 10
        assert set(fleet.states().values()) == {"reporting"}
        fleet.live(3 * INTERVAL_S, "d-2")
        assert fleet.states() == {"d-0": "reporting", "d-1": "reporting", "d-2": "silent"}


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
        fleet.status("d-0", online=False)
        found = presence(store.devices()[0], fleet.now_s + 100, fleet.since_s)
        assert (found.state, found.since_s) == ("gone", fleet.now_s)
        fleet.now_s += 60
        fleet.status("d-0")
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
        assert presence(store.devices()[1], fleet.now_s, fleet.since_s).since_s == fleet.now_s


def test_devices_behind_one_dead_router_are_one_line() -> None:
    with Store(":memory:") as store:
        fleet = Fleet(store, 40)
        fleet.live(INTERVAL_S)
        dead = [f"d-{n}" for n in range(30)]
        fleet.live(4 * INTERVAL_S, "d-39")  # one alone
        pairs = [(device, presence(device, fleet.now_s, fleet.since_s)) for device in store.devices()]
        assert sum(found.state == "silent" for _, found in pairs) == 1 and common_cause(pairs) == ""
        fleet.live(4 * INTERVAL_S, "d-39", *dead)
        pairs = [(device, presence(device, fleet.now_s, fleet.since_s)) for device in store.devices()]
        assert sum(found.state == "silent" for _, found in pairs) == 31
        assert common_cause(pairs).startswith("30 of 40 devices left together")


def test_the_table_cuts_off_nothing_in_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "living-room-camera-0123456789-9876543210-0123456789"
    with Store(":memory:") as store:
        fleet = Fleet(store, 12)
        fleet.live(INTERVAL_S)
        rows = store.devices()
        rows[3].update(device=name, conflicts=31, refused=4217, learning=True, reports=123_456, lost=9_999)
        monkeypatch.setattr(store, "devices", lambda: rows)
        Console(width=80).print(overview.fleet_table(store))
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    assert "…" not in text and text.count("reporting") == 11 and text.count("lying") == 1
    assert all(len(line) <= 80 for line in lines)
    for word in ("device", "presence", "(learning)", "123456", "9999", "last seen", "notes"):
        assert word in text
    first = next(n for n, line in enumerate(lines) if line.startswith(name[:10]))
    assert "".join(line[:10].strip() for line in lines[first : first + 5]).startswith(name[:45])
    words = " ".join(line[70:] for line in lines[first : first + 5]).split()
    assert words[:6] == ["key", "used", "twice", "(31),", "4217", "refused"]


def test_the_table_says_when_no_collector_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with Store(":memory:") as store:
        fleet = Fleet(store)
        fleet.live(INTERVAL_S)
        store.listened(fleet.since_s, fleet.now_s + 5)
        Console(width=160).print(overview.fleet_table(store))
        said = capsys.readouterr().out
        assert "reporting" in said and "when a collector was last connected" in said
