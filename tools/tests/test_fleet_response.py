"""What a device decides, from its own code to the collector's database and back: the real agent, reports, commands."""

import dataclasses
import json
import re
import sys
import time
from pathlib import Path

import cbor2
import pycddl
import pytest
from stonechat.policy import DRY_RUN, HOOK, QUARANTINE
from stonechat_tools import cli
from stonechat_tools.fleet import keyring, wire, wire_response
from stonechat_tools.fleet.monitor import Monitor
from stonechat_tools.fleet.renewals import Renewals
from stonechat_tools.fleet.store import Store
from test_fleet_wire import CDDL, KEYS, SECRET

sys.path.append(str(Path(__file__).resolve().parents[2] / "firmware_tests" / "unit"))

from test_response import LOUD, Device, on_clock  # noqa: E402

DEVICE = "pump-1"
REPORT = pycddl.Schema(f"start = report\n{CDDL}")
STATUS = pycddl.Schema(f"start = status\n{CDDL}")


def sealed(device: Device) -> tuple[list[bytes], list[bytes]]:
    """Lets the device's messages be kept as they were sent -> (reports, statuses), which grow."""
    reports: list[bytes] = []
    statuses: list[bytes] = []
    take = device.publish

    def publish(topic: str, payload: bytes, qos: int, retain: bool) -> None:
        (statuses if topic == device.reporter.status_topic else reports).append(bytes(payload))
        take(topic, payload, qos, retain)

    device.agent.publish = publish
    return reports, statuses


def opened(reports: list[bytes], statuses: list[bytes]) -> tuple[list[wire.Report], list[wire.Status]]:
    """Each held to the CDDL and decoded by the collector's code."""
    for message in reports:
        REPORT.validate_cbor(KEYS.report.open(message))
    for message in statuses:
        STATUS.validate_cbor(KEYS.status.open(message))
    return (
        [wire.open_report(DEVICE, KEYS, message) for message in reports],
        [wire.open_status(DEVICE, KEYS, message) for message in statuses],
    )


@on_clock
def test_a_lease_and_its_effect_are_in_the_database() -> None:
    device = Device()
    messages = sealed(device)
    device.alarm()
    device.windows(30, 50)
    reports, statuses = opened(*messages)
    with Store(":memory:") as store:
        store.put(reports, statuses, now_s=device.now_s)
        (entry,) = store.decisions()
        assert entry["device"] == DEVICE and entry["action"] == QUARANTINE and entry["done"] and entry["kind"] == 1
        assert entry["end"] == "expired" and entry["seconds"] == 20 and 20 <= entry["end_s"] - entry["began_s"] <= 21
        assert (entry["before"], entry["after"], entry["passed"], entry["stopped"]) == (LOUD, 50, 3, 40)
        assert entry["level"] == 2 and entry["features"][0][0] == 1 and entry["families"] == ["network"]
        assert store.put(reports, [], now_s=device.now_s) == ["duplicate"] * len(reports)
        assert len(store.decisions()) == len(store.decisions(DEVICE)) == 1 and not store.decisions("pump-2")
        assert not store.decisions(since_s=device.now_s + 1)
        row = store.devices()[0]
        assert row["response"]["decisions"] == 1 and row["response"]["action"] == 0 and row["off_since_s"] is None
        assert [row.windows for row in store.history(DEVICE)] == [1, 1]  # a decision is no window


@on_clock
def test_a_lease_in_force_and_one_whose_begin_is_missing_are_shown_too() -> None:
    device = Device(DRY_RUN)
    messages = sealed(device)
    device.alarm()
    reports, statuses = opened(*messages)
    with Store(":memory:") as store:
        store.put(reports, statuses, now_s=device.now_s)
        (entry,) = store.decisions()
        assert entry["end_s"] is None and not entry["done"] and entry["text"] == "would have been: quarantine for 20 s"
    device.windows(30)
    reports, _ = opened(*messages)
    with Store(":memory:") as store:
        store.put(
            [r for r in reports if not (r.decision and r.decision.kind == wire_response.BEGAN)],
            [],
            now_s=device.now_s,
        )
        (entry,) = store.decisions()
        assert entry["began_s"] is None and entry["end"] == "expired"


@on_clock
def test_the_collectors_renewal_is_taken_by_the_device_and_only_by_that_one() -> None:
    device = Device().alarm()
    lease = device.began[0][4]
    device.windows(10, LOUD)
    until_s = device.kernel.until_s
    others = keyring.DeviceKeys(bytes(32), DEVICE)
    second = keyring.DeviceKeys(SECRET, "pump-2")
    for keys in (others, second):
        device.agent.on_message(
            device.reporter.topic + "ack", wire_response.seal_renewal(keys, 1, device.now_s + 60, lease)
        )
    assert device.reporter.rejected == 2 and device.kernel.until_s == until_s
    renewal = wire_response.seal_renewal(KEYS, 1, device.now_s + 60, lease)
    pycddl.Schema(f"start = renewal\n{CDDL}").validate_cbor(KEYS.renew.open(renewal))
    device.agent.on_message(device.reporter.topic + "ack", renewal)
    assert device.kernel.until_s > until_s


@on_clock
def test_monitoring_off_reaches_the_database() -> None:
    device = Device()
    messages = sealed(device)
    device.windows(10)
    device.agent.monitoring(False)
    device.windows(2)
    _, statuses = opened(*messages)
    assert statuses[-1].off_for_s in (0, 1, 2)
    with Store(":memory:") as store:
        store.put([], statuses, now_s=device.now_s)
        assert abs(store.devices()[0]["off_since_s"] - device.now_s) <= 2


def test_a_decision_that_is_none_is_refused() -> None:
    good = [0, 3, 1, 0, 5, 120, 1]
    body = {0: 1, 1: 1, 2: 1, 3: int(time.time()), 16: b"boot", 18: good}
    assert wire.open_report(DEVICE, KEYS, KEYS.report.seal(wire.encode(body))).decision is not None
    wrongs: tuple[object, ...] = (
        [], 7, "x", good[:-1], [*good, 0], [3, *good[1:]], [0, 0, *good[2:]], [0, 5, *good[2:]], [0, 3, 2, *good[3:]],
        [0, 3, 1, 16, *good[4:]], [1, 3, 1, 0, 5, 120, 7, 0, 0, 0, 0, 0], [0, 3, True, 0, 5, 120, 1],
        [0, 3, 1, 0, -1, 1, 1], [0, 3, 1, 0, 1 << 32, 1, 1],
    )  # fmt: skip
    for wrong in wrongs:
        with pytest.raises(keyring.Rejected):
            wire.open_report(DEVICE, KEYS, KEYS.report.seal(wire.encode(body | {18: wrong})))


def test_a_state_that_is_none_is_refused() -> None:
    body = {0: 1, 2: 1, 3: int(time.time()), 4: 5, 5: True, 6: 1, 16: b"boot", 22: [2, 0, 3, 5, 60, 1, 0], 23: 7}
    status = wire.open_status(DEVICE, KEYS, KEYS.status.seal(cbor2.dumps(body, canonical=True)))
    assert str(status.response) == "quarantine for 60 s" and status.off_for_s == 7
    wrongs: tuple[object, ...] = (
        [], [3, 0, 0, 0, 0, 0, 0], [2, 2, 0, 0, 0, 0, 0], [2, 0, 5, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0],
        [2, 0, 0, 0, 0, 0, -1], b"",
    )  # fmt: skip
    for wrong in wrongs:
        with pytest.raises(keyring.Rejected):
            wire.open_status(DEVICE, KEYS, KEYS.status.seal(cbor2.dumps(body | {22: wrong}, canonical=True)))
    with pytest.raises(keyring.Rejected):
        wire.open_status(DEVICE, KEYS, KEYS.status.seal(cbor2.dumps(body | {23: -1}, canonical=True)))


def test_a_decision_is_one_line_for_people() -> None:
    texts = {
        (0, 2, 1, 0, 5, 120, 1): "throttle for 120 s",
        (0, HOOK, 0, 0, 0, 0, 0): "would have been: hook",
        (1, 3, 1, 0, 5, 90, 1, 0, 0, 0, 0, 0): "quarantine ended after 90 s, released",
        (2, 3, 1, 0, 5, 1): "quarantine failed (1)",
    }
    for numbers, text in texts.items():
        assert str(wire_response.decision(list(numbers))) == text


@on_clock
def test_the_collector_renews_while_the_evidence_goes_on_and_not_for_ever() -> None:
    device = Device()
    messages = sealed(device)
    device.alarm()
    reports, _ = opened(*messages)
    with Store(":memory:") as store:
        store.put(reports, [], now_s=device.now_s)
        clock = [float(device.now_s)]
        keys = keyring.Keys({DEVICE: SECRET})
        for renewals in (
            Renewals(store, keys, most_s=100, clock=lambda: clock[0]),  # a restart finds it in the database
            Renewals(Store(":memory:"), keys, most_s=100, clock=lambda: clock[0]),
        ):
            clock[0] = float(device.now_s)
            renewals.took(reports, ["stored"] * len(reports))
            sent = []
            for _ in range(200):
                clock[0] += 1
                sent += renewals.step()
            assert 12 <= len(sent) <= 15  # each third of 20 s, for 100 s
            numbers = [cbor2.loads(KEYS.renew.open(message))[1] for _, _, message in sent]
            assert numbers == sorted(set(numbers)) and {topic for _, topic, _ in sent} == {f"{wire.PREFIX}{DEVICE}/ack"}
        renewals = Renewals(store, keys, clock=lambda: device.now_s)
        renewals.took(reports, ["stored"] * len(reports))
        for keep_on in (0, LOUD):  # a quiet device is not renewed, a loud one is
            device.windows(16, keep_on or 100)
            fresh = opened(*messages)[0][len(reports) :]
            fresh = [report for report in fresh if not report.decision]
            renewals.took(fresh, ["stored"] * len(fresh))
            assert bool(renewals.step()) == bool(keep_on)
        ended = [r for r in opened(*messages)[0] if r.decision and r.decision.kind == wire_response.ENDED]
        assert ended
        renewals.took(ended, ["stored"] * len(ended))
        assert not renewals.step()
        assert not Renewals(store, keyring.Keys({}), clock=lambda: device.now_s).step()  # a key that is not here


@on_clock
def test_two_collectors_in_one_second_and_a_restart_of_one_renew_without_a_refusal() -> None:
    device = Device()
    messages = sealed(device)
    device.alarm()
    reports, _ = opened(*messages)
    others = {f"pump-{n}": bytes([n]) * 32 for n in range(2, 40)}  # a collector renews for many in each second
    keys = keyring.Keys({DEVICE: SECRET, **others})
    clock = [0.0]

    def collector(behind_s: float) -> Renewals:
        made = Renewals(Store(":memory:"), keys, clock=lambda: clock[0] - behind_s)
        for name in (DEVICE, *others):
            took = [dataclasses.replace(report, device=name) for report in reports]
            made.took(took, ["stored"] * len(took))
        return made

    clock[0] = float(device.now_s)
    collectors = [collector(0.0), collector(0.2)]
    for second in range(60):
        device.windows(1, LOUD)
        for each in collectors:
            clock[0] = device.now_s + 0.25 * (each is collectors[1])
            for _, topic, message in each.step():
                if DEVICE in topic.split("/"):
                    device.agent.on_message(device.reporter.ack_topic, message)
        if second == 30:
            collectors[0] = collector(0.0)
    state = device.response.status
    assert state[2] == QUARANTINE and state[6] == 0, state
    assert device.response.real.renewals >= 10


@on_clock
def test_a_lease_of_an_earlier_start_is_renewed_no_more() -> None:
    device = Device()
    messages = sealed(device)
    device.alarm()
    reports, _ = opened(*messages)
    keys = keyring.Keys({DEVICE: SECRET})
    with Store(":memory:") as store:
        renewals = Renewals(store, keys, clock=lambda: device.now_s)
        renewals.took(reports, ["stored"] * len(reports))
        assert renewals._held
        again = Device()  # its power was cut: no report of an end
        messages = sealed(again)
        again.windows(60)
        again.agent.reporter.commands.report_now = True
        again.windows(5)
        fresh, _ = opened(*messages)
        assert fresh and fresh[-1].stream != reports[-1].stream
        renewals.took(fresh, ["stored"] * len(fresh))
        device.now_s += 60
        assert not renewals.step() and not renewals._held


@on_clock
def test_a_lease_that_ended_unheard_is_not_renewed_after_the_collector_s_restart() -> None:
    device = Device()
    messages = sealed(device)
    device.alarm()
    device.windows(100)
    device.windows(8, LOUD)
    device.windows(100)
    reports, _ = opened(*messages)
    ends = [report for report in reports if report.decision and report.decision.kind == wire_response.ENDED]
    assert len(ends) == 2
    keys = keyring.Keys({DEVICE: SECRET})
    for missing, held in ((ends[0], False), (ends[1], True)):
        with Store(":memory:") as store:
            store.put([report for report in reports if report is not missing], [], now_s=device.now_s)
            assert len([entry for entry in store.decisions() if entry["lease"] and entry["end_s"] is None]) == 1
            assert bool(Renewals(store, keys, clock=lambda: device.now_s)._held) == held


@on_clock
def test_a_lease_and_a_switched_off_device_are_incidents_and_end() -> None:
    device = Device()
    messages = sealed(device)
    device.alarm()
    monitor = Monitor(None, clock=lambda: device.now_s, steady=lambda: device.now_s)
    monitor.connected(True)
    taken = [0, 0]

    def kinds() -> set[str]:
        reports, statuses = opened(*messages)
        fresh = reports[taken[0] :], statuses[taken[1] :]
        taken[:] = len(reports), len(statuses)
        monitor.took(fresh[0], ["stored"] * len(fresh[0]), fresh[1])
        monitor.step()
        return {incident.kind for incident in monitor.incidents.open.values()} & {"response", "off"}

    assert kinds() == {"response"}
    device.windows(30, 50)
    assert kinds() == set()
    device.agent.monitoring(False)
    device.windows(3)
    assert kinds() == {"off"}
    device.agent.monitoring(True)
    device.windows(3)
    assert kinds() == set()


@on_clock
def test_an_incident_of_a_lease_ends_with_the_next_start_of_the_device() -> None:
    now_s = [0]
    for by_status in (True, False):
        device = Device()
        messages = sealed(device)
        device.alarm()
        now_s[0] = device.now_s
        monitor = Monitor(None, clock=lambda: now_s[0], steady=lambda: now_s[0])
        monitor.connected(True)
        reports, statuses = opened(*messages)
        monitor.took(reports, ["stored"] * len(reports), statuses)
        monitor.step()
        assert "response" in {incident.kind for incident in monitor.incidents.open.values()}
        again = Device(now_s=device.now_s + 1)  # its power was cut: no report of an end
        again.reporter.boot = device.reporter.boot + 1
        messages = sealed(again)
        again.windows(60)
        again.agent.reporter.commands.report_now = True
        again.windows(5)
        now_s[0] = again.now_s
        reports, statuses = opened(*messages)
        assert reports and statuses
        if by_status:
            monitor.took([], [], statuses)
        else:
            monitor.took(reports, ["stored"] * len(reports), [])
        monitor.step()
        assert "response" not in {incident.kind for incident in monitor.incidents.open.values()}


def test_the_command_for_people_shows_decisions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fleet.db"

    @on_clock
    def make() -> None:
        device = Device()
        messages = sealed(device)
        device.alarm()
        device.windows(30, 50)
        with Store(path) as store:
            store.put(opened(*messages)[0], [], now_s=device.now_s)

    make()
    assert cli.main(["fleet", "--db", str(path), "decisions", "--since", "1d"]) == 0
    shown = re.sub("  +", "  ", capsys.readouterr().out)
    assert "quarantine ended after 20 s, expired  feature 1 +7.9, feature 0 +0.1" in shown
    assert f"a window's packets {LOUD} before, 50 after; 40 stopped, 3 passed" in shown
    assert cli.main(["fleet", "--db", str(path), "--json", "decisions", DEVICE]) == 0
    assert json.loads(capsys.readouterr().out)["end"] == "expired"
    assert cli.main(["command", DEVICE, "renew", "--db", str(path), "--keys", str(tmp_path)]) == 1
    assert f"knows no lease of {DEVICE} in force" in capsys.readouterr().err
