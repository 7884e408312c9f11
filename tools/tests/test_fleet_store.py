"""The database: identities of reports, times, presence."""

from pathlib import Path

from fleet_support import FakeVerdict
from stonechat.delivery import Delivery
from stonechat.outbox import Outbox
from stonechat_tools.fleet import keyring, wire
from stonechat_tools.fleet.store import Store

STREAM = b"boot"


def messages_of(folder: Path, count: int) -> tuple[bytes, list[bytes]]:
    secret = keyring.new_secret()
    sent: list[bytes] = []
    reporter = Delivery("pump-1", secret, Outbox(str(folder / "box")), heartbeat_windows=1, bytes_per_day=0)
    for i in range(count):
        reporter.observe(FakeVerdict(i % 3), 1000 * i)
        reporter.pump(lambda topic, payload, qos: sent.append(bytes(payload)), 1000 * i)
    return secret, sent


def test_a_wiped_device_is_a_conflict_and_is_not_told_to_forget(tmp_path: Path) -> None:
    secret, (message,) = messages_of(tmp_path, 1)
    keys = keyring.DeviceKeys(secret, "pump-1")
    report = wire.open_report("pump-1", keys, message)
    with Store(":memory:") as store:
        assert store.put([report, report]) == ["stored", "again"]
        fields = {
            0: 1,
            1: report.sequence,
            2: report.boot + 1,
            3: 1_800_000_000,
            5: 2,
            7: 1,
            8: 1,
            9: 1,
            16: report.stream,
        }
        other = wire.open_report("pump-1", keys, keys.report.seal(wire.encode(fields)))
        assert store.put([other]) == ["conflict"]
        assert store.rejections() == {"pump-1": {"conflict": 1}}
        assert store.count() == 1


def test_history_of_a_device_without_a_clock_gets_its_time_later(tmp_path: Path) -> None:
    keys = keyring.DeviceKeys(keyring.new_secret(), "pump-1")

    def report(sequence: int, late: int | None = None) -> wire.Report:
        fields = {0: 1, 1: sequence, 2: 7, 4: 100 + sequence, 5: 0, 7: 256, 8: 1, 9: 1, 16: STREAM}
        if late is not None:
            fields[17] = late
        return wire.open_report("pump-1", keys, keys.report.seal(wire.encode(fields)))

    with Store(":memory:") as store:
        store.put([report(1), report(2, late=50)], now_s=1_800_000_000.0)
        rows = store.history("pump-1")
        assert [row.time_known for row in rows] == [False, True]
        assert rows[1].time_s == 1_800_000_000 - 50
        status = {0: 1, 2: 7, 3: 1_800_000_500, 4: 600, 5: True, 6: 1, 16: STREAM}
        store.put([], [wire.open_status("pump-1", keys, keys.status.seal(wire.encode(status)))])
        rows = store.history("pump-1")
        assert [row.time_s for row in rows] == [1_800_000_001, 1_800_000_002]
        assert all(row.time_known for row in rows)


def test_status_will_and_replays(tmp_path: Path) -> None:
    keys = keyring.DeviceKeys(keyring.new_secret(), "pump-1")

    def status(boot: int, number: int, online: bool = True) -> wire.Status:
        fields = {0: 1, 2: boot, 4: 5, 5: online, 16: STREAM} | ({6: number} if online else {})
        return wire.open_status("pump-1", keys, keys.status.seal(wire.encode(fields)))

    with Store(":memory:") as store:

        def online() -> bool:
            return bool(store.devices()[0]["online"])

        store.put([], [status(1, 1), status(1, 2)])
        assert online()
        store.put([], [status(1, 0, online=False)])
        assert not online()
        store.put([], [status(1, 1)])  # replayed by the broker
        store.put([], [status(1, 2)])  # the retained copy again
        assert not online()
        store.put([], [status(1, 3)])
        assert online()
        store.put([], [status(0, 9), status(0, 0, online=False)])
        assert online()
        assert store.rejections() == {"pump-1": {"stale": 3}}


def test_a_wiped_device_that_has_a_clock_is_heard_again(tmp_path: Path) -> None:
    keys = keyring.DeviceKeys(keyring.new_secret(), "pump-1")

    def status(boot: int, time_s: int, online: bool = True) -> wire.Status:
        fields = {0: 1, 2: boot, 3: time_s, 4: 5, 5: online, 16: STREAM} | ({6: 1} if online else {})
        return wire.open_status("pump-1", keys, keys.status.seal(wire.encode(fields)))

    with Store(":memory:") as store:
        store.put([], [status(40, 1_800_000_000), status(41, 1_800_100_000)])
        store.put([], [status(40, 1_800_000_000, online=False), status(1, 1_800_100_000)])  # older, or no later
        assert store.rejections() == {"pump-1": {"stale": 2}}
        assert store.devices()[0]["online"] and store.devices()[0]["boot"] == 41
        store.put([], [status(1, 1_800_200_000)])  # its flash was wiped
        assert store.devices()[0]["boot"] == 1
        store.put([], [status(1, 1_800_200_000, online=False)])
        assert not store.devices()[0]["online"]
