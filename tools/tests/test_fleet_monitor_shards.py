"""Two collectors of one fleet, on one database: each judges its own devices, and nobody is judged twice."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from postgres_support import Server, needs_postgres, postgres, postgres_server
from stonechat_tools import cli
from stonechat_tools.fleet.incidents import Policy
from stonechat_tools.fleet.monitor import MAX_IDS, Monitor, read_states
from stonechat_tools.fleet.shards import Shard
from stonechat_tools.fleet.store import STORED, Store
from stonechat_tools.fleet.wire import Report, Status

__all__ = ["Server", "postgres", "postgres_server"]
BEGAN_S = 1_795_000_000.0
NAMES = [f"d-{n}" for n in range(24)]


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=[needs_postgres, pytest.mark.slow])])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield str(tmp_path / "db") if request.param == "sqlite" else request.getfixturevalue("postgres").url


def test_two_collectors_share_a_database(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now_s = [BEGAN_S]
    shards = [Shard("1/2"), Shard("2/2")]
    with Store(place, shard="1/2") as first, Store(place, shard="2/2") as second:
        stores = [first, second]

        def begin() -> list[Monitor]:
            found = []
            for store, shard in zip(stores, shards, strict=True):
                clock = {"clock": lambda: now_s[0], "steady": lambda: now_s[0]}
                found.append(Monitor(store, Policy(group_wait_s=0), shard=shard, **clock))
                found[-1].connected(True)
            return found

        monitors = begin()
        for number in range(1, 8):
            for name in NAMES if number < 3 else NAMES[2:]:  # d-0 and d-1 are silent from then on
                for store, monitor, shard in zip(stores, monitors, shards, strict=True):
                    if name in shard:
                        status = Status(name, 1, None, 1, True, b"aaaa", number, window_ms=10_000, heartbeat_s=300)
                        report = Report(name, number, 1, int(now_s[0]), None, b"aaaa", windows=30)
                        report.body = b"%d" % number
                        results = store.put([report], [status], now_s=now_s[0])
                        assert results == [STORED]
                        monitor.took([report], results, [status])
            now_s[0] += 300
            for monitor in monitors:
                monitor.step()
        counts = [len(monitor.states()) for monitor in monitors]
        assert sum(counts) == len(NAMES) and min(counts) > 4
        silent = {seen.device for monitor in monitors for seen in monitor.states() if seen.state.state == "silent"}
        assert silent == {"d-0", "d-1"}
        keys = [incident.key for monitor in monitors for incident in monitor.incidents.open.values()]
        assert sorted(keys) == ["away-d-0", "away-d-1"]
        for monitor in monitors:
            monitor.close()
        monitors = begin()  # both begin anew, each with what is its own
        for monitor in monitors:
            monitor.step()
        keys = [incident.key for monitor in monitors for incident in monitor.incidents.open.values()]
        assert sorted(keys) == ["away-d-0", "away-d-1"]
        owner = 0 if "d-0" in shards[0] else 1
        incident = next(each for each in monitors[owner].incidents.open.values() if each.key == "away-d-0")
        assert incident.id // MAX_IDS == owner
        url_file = tmp_path / "url"  # a password has no place on the command line
        url_file.touch(mode=0o600)
        url_file.write_text(place)
        named = ["--database-file", str(url_file)] if "://" in place else ["--db", place]
        assert cli.main(["fleet", *named, "acknowledge", str(incident.id)]) == 0
        for _ in range(2):
            now_s[0] += 3
            for monitor in monitors:
                monitor.step()
        assert incident.acknowledged_s is not None and not first.notes("request")
        # read as a whole, as a dashboard does
        assert len(read_states(first, now_s[0], BEGAN_S)) == len(NAMES)
    capsys.readouterr()
