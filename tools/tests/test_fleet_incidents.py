"""Incidents and notifications in virtual time: grouped, repeated, silenced, acknowledged, escalated, in the digest."""

import json
from calendar import timegm
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import localtime, process_time, tzset
from typing import Any

import pytest
from stonechat_tools import cli
from stonechat_tools.fleet import keyring, labels, patterns, wire
from stonechat_tools.fleet.incidents import Alert, Incident, Incidents, Notification, Policy, Silence, split_matcher
from stonechat_tools.fleet.monitor import Monitor, _local_day_s
from stonechat_tools.fleet.store import Store, StoreError

HOUR_S, DAY_S = 3600.0, 86_400.0
MIDNIGHT_S = 1_795_046_400.0  # a day that begins then, in UTC


class Time:
    """Incidents, alerts that hold, and a clock."""

    def __init__(self, policy: Policy, hour: float = 12) -> None:
        self.now_s = MIDNIGHT_S + hour * HOUR_S
        self.incidents = Incidents(policy)
        self.alerts: dict[str, Alert] = {}
        self.sent: list[Notification] = []

    def alert(self, key: str, severity: str = "warning", kind: str = "silent", hold_s: float = 0, **more: str) -> None:
        self.alerts[key] = Alert(key, kind, severity, f"{key} is silent", self.now_s, dict(more), hold_s=hold_s)

    def run(self, seconds: float, step_s: float = 5) -> list[Notification]:
        """-> what was sent meanwhile."""
        before, end_s = len(self.sent), self.now_s + seconds
        while self.now_s < end_s:
            self.now_s = min(end_s, self.now_s + step_s)
            self.incidents.step(self.alerts, self.now_s)
            self.sent += self.incidents.due(self.now_s)
        return self.sent[before:]


def shown(notifications: list[Notification]) -> list[tuple[str, list[str]]]:
    return [(each.reason, [incident.key for incident in each.incidents]) for each in notifications]


def test_a_group_waits_for_others_and_is_sent_once() -> None:
    time = Time(Policy(group_wait_s=30, group_interval_s=300, repeat_s=HOUR_S))
    for n in range(50):
        time.alert(f"d-{n}", site="north")
        assert not time.run(0.5, 0.5)
    time.alert("d-99", site="south")
    first = time.run(60)
    assert [len(each.incidents) for each in first] == [50, 1]
    time.alert("d-50", site="north")
    assert not time.run(200)  # within the group's interval
    assert shown(time.run(100)) == [("firing", ["d-50"])]
    assert not time.run(HOUR_S - 600)
    again = time.run(600)
    assert {each.reason for each in again} == {"repeat"} and sum(len(each.incidents) for each in again) == 52


def test_what_is_over_says_so_once_and_what_was_never_sent_does_not() -> None:
    time = Time(Policy(group_wait_s=30))
    time.alert("d-0")
    time.alert("brief")
    time.run(10)
    del time.alerts["brief"]
    assert shown(time.run(60)) == [("firing", ["d-0"])]
    del time.alerts["d-0"]
    ended = time.run(60)
    assert shown(ended) == [("resolved", ["d-0"])]
    assert ended[0].incidents[0].end_s is not None and not time.run(DAY_S, 60)


def test_an_alert_must_hold() -> None:
    time = Time(Policy(group_wait_s=0))
    time.alert("d-0", hold_s=120)
    assert not time.run(110)
    del time.alerts["d-0"]
    time.run(20)
    time.alert("d-0", hold_s=120)
    assert not time.run(110) and shown(time.run(20)) == [("firing", ["d-0"])]


def test_silence_ends_by_itself_and_covers_only_what_it_matches() -> None:
    time = Time(Policy(group_wait_s=0))
    time.incidents.silences = [Silence("x", ("site=~nor.*", "kind=silent"), time.now_s + HOUR_S)]
    time.alert("d-0", site="north")
    time.alert("d-1", site="south")
    time.alert("d-2", site="north", kind="lying")
    assert sorted(key for _, keys in shown(time.run(60)) for key in keys) == ["d-1", "d-2"]
    assert time.incidents.open["d-0"].silenced and not time.run(HOUR_S - 120)
    assert shown(time.run(120)) == [("firing", ["d-0"])]


def test_acknowledged_is_not_repeated_and_not_escalated() -> None:
    time = Time(Policy(group_wait_s=0, repeat_s=HOUR_S, escalate_s=600, group_by=("device",)))
    time.alert("d-0", device="d-0")
    time.alert("d-1", device="d-1")
    time.run(60)
    assert time.incidents.acknowledge(time.incidents.open["d-0"].id, "me", time.now_s) is not None
    assert shown(time.run(700)) == [("escalation", ["d-1"])]
    assert shown(time.run(HOUR_S)) == [("repeat", ["d-1"])]
    assert time.incidents.acknowledge(999, "me", time.now_s) is None


def test_quiet_hours_hold_back_what_is_not_critical() -> None:
    time = Time(Policy(group_wait_s=0, quiet=(22 * HOUR_S, 7 * HOUR_S), repeat_s=DAY_S), hour=23)
    time.alert("d-0")
    time.alert("d-1", severity="critical", kind="lying")
    time.alert("short")
    assert shown(time.run(HOUR_S, 60)) == [("firing", ["d-1"])]
    del time.alerts["short"]
    assert not time.run(6 * HOUR_S, 60)
    assert shown(time.run(2 * HOUR_S, 60)) == [("firing", ["d-0"])]


def test_the_digest_comes_once_a_day_at_its_hour() -> None:
    time = Time(Policy(group_wait_s=0, digest_s=8 * HOUR_S), hour=9)
    time.alert("clock-0", severity="info", kind="clock")
    time.run(60)
    del time.alerts["clock-0"]  # over before the digest, and in it all the same
    time.alert("clock-1", severity="info", kind="clock")
    assert not time.run(22 * HOUR_S, 60)
    assert shown(time.run(2 * HOUR_S, 60)) == [("digest", ["clock-1", "clock-0"])]
    assert not time.run(22 * HOUR_S, 60)
    assert not time.run(5 * DAY_S, 60)  # each incident once
    del time.alerts["clock-1"]
    assert not time.run(HOUR_S, 60)


def test_a_restart_goes_on_without_sending_again() -> None:
    time = Time(Policy(group_wait_s=0, repeat_s=HOUR_S))
    time.alert("d-0")
    time.run(60)
    saved = [Incident.load(time.incidents.open["d-0"].dump())]
    time.incidents = Incidents(time.incidents.policy, saved)
    assert not time.run(HOUR_S - 120)
    assert shown(time.run(120)) == [("repeat", ["d-0"])]
    assert time.incidents.open["d-0"].id == 1
    time.alert("d-1", kind="lying")
    time.run(60)
    assert time.incidents.open["d-1"].id == 2


def test_a_clock_that_is_set_changes_nothing() -> None:
    time = Time(Policy(group_wait_s=0, repeat_s=HOUR_S, digest_s=None))
    time.alert("d-0")
    time.run(60)
    for jump_s in (5 * HOUR_S, -9 * HOUR_S):
        time.now_s += jump_s
        time.incidents.shift(jump_s)
        assert not time.run(600)
    assert time.incidents.open["d-0"].end_s is None


@pytest.mark.parametrize("day", [(2026, 3, 27), (2026, 10, 23)])
def test_a_digest_a_day_where_the_clocks_change(day: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    tzset()
    try:
        time = Time(Policy(digest_s=8 * HOUR_S))
        time.now_s = timegm((*day, 12, 0, 0))
        time.incidents = Incidents(time.incidents.policy, day_s=_local_day_s)
        hours = []
        for n in range(4 * 24):
            time.alert(f"clock-{n}", "info", "clock")
            hours += [localtime(each.at_s)[2:5] for each in time.run(HOUR_S, 600) if each.reason == "digest"]
        assert hours == [(day[2] + n, 8, 0) for n in range(1, 5)]
    finally:
        monkeypatch.undo()
        tzset()


def test_a_digest_that_a_restart_missed_is_made_up_for() -> None:
    time = Time(Policy(digest_s=8 * HOUR_S), hour=7)
    time.alert("clock-1", "info", "clock")
    time.run(600)
    saved = [Incident.load(time.incidents.open["clock-1"].dump())]
    time.now_s += 2 * HOUR_S
    time.incidents = Incidents(time.incidents.policy, saved)
    assert shown(time.run(60)) == [("digest", ["clock-1"])]
    saved = [Incident.load(time.incidents.open["clock-1"].dump())]
    time.incidents = Incidents(time.incidents.policy, saved)
    assert not time.run(600)


def test_a_fleet_that_comes_back_at_once_is_handled_at_once() -> None:
    time = Time(Policy(group_by=("device",), group_wait_s=0, digest_s=None))
    for n in range(20_000):
        time.alert(f"d-{n}", device=f"d-{n}")
    begin_s = process_time()
    assert len(time.run(5)) == 20_000
    time.incidents.policy = replace(time.incidents.policy, quiet=(0, DAY_S))
    assert not time.run(5)
    time.incidents.policy = replace(time.incidents.policy, quiet=None)
    time.alerts.clear()
    assert len(time.run(5)) == 20_000
    assert process_time() - begin_s < 20  # some minutes where each is compared with all


class Judged:
    """A collector's Monitor with a database in memory, in virtual time, which may be restarted."""

    def __init__(self) -> None:
        self.now_s = MIDNIGHT_S + 12 * HOUR_S
        self.store = Store(":memory:")
        self.sent: list[tuple[str, list[str]]] = []
        self.unsent: set[int] = set()
        self.start()

    def start(self) -> None:
        self.monitor = Monitor(
            self.store,
            Policy(group_wait_s=0, digest_s=None),
            lambda each: self.sent.append((each.reason, [incident.key for incident in each.incidents])),
            clock=lambda: self.now_s,
            steady=lambda: self.now_s,
            hold_s=0,
            unsent=lambda: self.unsent,
        )
        self.monitor.connected(True)

    def take(self, number: int, level: int) -> None:
        keys = keyring.DeviceKeys(bytes(32), "d-1")
        fields = {0: 1, 1: number, 2: 7, 3: int(self.now_s), 5: level, 7: 256, 8: 1, 9: 1, 16: b"aaaa"}
        report = wire.open_report("d-1", keys, keys.report.seal(wire.encode(fields)))
        states = [wire.Status("d-1", 7, None, 0, True, b"aaaa", number, heartbeat_s=600)]
        self.monitor.took([report], self.store.put([report], states, now_s=self.now_s), states)

    def run(self, seconds: int) -> list[tuple[str, list[str]]]:
        self.sent.clear()
        for _ in range(seconds):
            self.now_s += 1
            self.monitor.step()
        return list(self.sent)


def test_an_alarm_goes_on_over_a_restart_and_ends_by_a_report() -> None:
    judged = Judged()
    judged.take(1, 2)
    assert judged.run(3) == [("firing", ["alarm-d-1"])]
    judged.start()
    assert not judged.run(300)
    judged.take(2, 2)
    assert not judged.run(10)
    judged.start()
    assert not judged.run(10)
    judged.take(3, 0)
    assert judged.run(3) == [("resolved", ["alarm-d-1"])]


def test_what_no_receiver_took_is_sent_again_after_a_restart() -> None:
    judged = Judged()
    judged.take(1, 2)
    judged.unsent = {1}
    assert judged.run(3) == [("firing", ["alarm-d-1"])]
    judged.start()
    judged.unsent = set()
    assert judged.run(3) == [("firing", ["alarm-d-1"])]
    judged.start()
    assert not judged.run(3)
    judged.take(2, 0)
    judged.unsent = {1}
    assert judged.run(3) == [("resolved", ["alarm-d-1"])]
    judged.start()
    judged.unsent = set()
    assert judged.run(3) == [("resolved", ["alarm-d-1"])]
    judged.start()
    assert not judged.run(3)


class Killed(BaseException):
    """As by kill -9."""


@pytest.mark.parametrize("level", [2, 0])
def test_a_collector_that_is_killed_at_any_write_loses_no_notification(
    level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no receiver has taken by then is sent by the next collector: the beginning of an incident, and its end."""
    for writes in range(20):
        judged = Judged()
        judged.take(1, 2)
        if not level:
            judged.run(3)
            judged.take(2, 0)
        judged.unsent = {1}
        note, left = judged.store.note, iter(range(writes))

        def killed(*values: Any, note: Any = note, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise Killed
            note(*values)

        with monkeypatch.context() as patch:
            patch.setattr(judged.store, "note", killed)
            try:
                judged.run(1)
            except Killed:
                pass
            else:
                break
        judged.unsent = set()
        judged.start()
        if not level:
            judged.take(3, 0)
        assert ("firing" if level else "resolved", ["alarm-d-1"]) in judged.run(3), writes
    assert writes >= 3


def test_what_a_clock_that_was_ahead_has_written_holds_back_nothing() -> None:
    judged = Judged()
    judged.take(1, 2)
    judged.now_s += 400 * DAY_S
    judged.take(2, 2)
    assert judged.run(3) == [("firing", ["alarm-d-1"])]
    judged.now_s -= 400 * DAY_S  # set right while no collector runs
    judged.start()
    judged.monitor.incidents.policy = replace(judged.monitor.incidents.policy, group_interval_s=60, repeat_s=300)
    assert not judged.run(50)
    for _ in range(12):
        judged.monitor.took([], [], [], [("d-9", "forged")])
    assert ("firing", ["rejected-d-9-forged"]) in judged.run(30)
    assert ("repeat", ["alarm-d-1"]) in judged.run(300)


def test_an_incident_follows_its_device_to_another_site() -> None:
    judged = Judged()
    judged.take(1, 2)
    judged.run(3)
    labels.write(judged.store, {"d-1": labels.Labels(site="south")})
    judged.run(5)
    (incident,) = judged.monitor.incidents.open.values()
    assert incident.labels["site"] == "south" and incident.notifications == 1
    judged.monitor.incidents.silences = [Silence("s", ("site=south",), judged.now_s + 60)]
    judged.run(1)
    assert incident.silenced


def test_a_database_that_fails_holds_back_no_notification(monkeypatch: pytest.MonkeyPatch) -> None:
    judged = Judged()
    judged.take(1, 2)

    def fail(*_: object) -> None:
        raise StoreError("the disk is full", True)

    with monkeypatch.context() as patch:
        patch.setattr(judged.store, "note", fail)
        with pytest.raises(StoreError):
            judged.run(1)
    assert judged.sent == [("firing", ["alarm-d-1"])]


@pytest.mark.parametrize("wrong", ["site", "=x", "site=~(", ""])
def test_a_matcher_that_can_not_be_read(wrong: str) -> None:
    with pytest.raises(ValueError, match="matcher"):
        split_matcher(wrong)


@pytest.mark.parametrize(
    "hostile",
    ["(a+)+", "(a|a)*", "(a|b|ab)*c", r"(\w+\s?)*", ".*.*.*.*.*x", r"(a)\1", "(?=a+)a", "a{99999}", "(?:a{9}){9}"]
    + ["x" * 500, "(" * 90 + ")" * 90, "((((a*)))*)", "(?>a+)+", "[a-z]*[a-z]*[a-z]*[a-z]*$"]
    + ["(a|a)" * 39 + "b", "(a|ab)" * 28 + "c", "(|a)" * 45 + "b", "((a|aa)|(aa|a))" * 12 + "b"]
    + ["|".join([".*.*.*x"] * 25), "(a|aa)(a|aa)(a|aa)(a|aa)(a|aa)(a|aa)(a|aa)(a|aa)(a|aa).*.*.*x"],
)
def test_a_pattern_costs_no_more_than_its_text_is_long(hostile: str) -> None:
    """Each is refused, or matched in bounded time against the longest text that a label can have."""
    began_s = process_time()
    try:
        split_matcher(f"device=~{hostile}")
    except ValueError as error:
        assert "matcher" in str(error) and len(str(error)) < 700
    else:
        for text in ("a" * 200, "ab" * 100, "a" * 127 + "!", "z" * 300):
            patterns.matches(hostile, text)
    assert process_time() - began_s < 2


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [("pump-.*", "pump-1", "a-pump-1"), ("(pump|fan)-[0-9]+", "fan-12", "fan-x"), ("a.c", "abc", "abcd")]
    + [("(de|uk)-(north|south)-(1|10|11)", "uk-north-10", "fr-north-1")]
    + [(".*-north-.*", "de-north-4", "de-south-4"), (r"dev\.1", "dev.1", "devx1"), ("(?i)pump", "PUMP", "pum")],
)
def test_a_pattern_covers_the_whole_label(pattern: str, yes: str, no: str) -> None:
    assert patterns.matches(pattern, yes) and not patterns.matches(pattern, no)


def test_notes_that_another_version_or_a_hand_wrote_are_passed_over() -> None:
    """None of them may end the collector, or hide those beside them."""
    odd: list[Any] = [None, 7, "x", [], {}, {"matchers": 5, "until_s": 9e9}, {"matchers": ["site=~("], "until_s": 9e9}]
    odd += [
        {"matchers": ["(a+)+"], "until_s": "soon"},
        {"do": "acknowledge"},
        {"do": "sing"},
        {"heard_s": "x", "streams": 4},
    ]
    odd += [{"key": 1}, {"id": "x"}, {"members": 1}, {"learned": []}, {"tags": 4}, {"name": [1], "site": {}}]
    kinds = ("silence", "request", "incident", "label", "cause", "rate", "presence", "unsent")
    with Store(":memory:") as store:
        good = {"matchers": ["site=berlin"], "until_s": 9e12, "by": "me", "comment": ""}
        store.put([wire.Report("d-1", 1, 1, None, 5, b"abcd", body=b"x")])
        for n, value in enumerate(odd):
            for kind in kinds:
                if value is not None:
                    store.note(kind, {f"n{n}": value, "d-1": value, "all": value})
        store.note("silence", {"good": good})
        with store.transaction() as db:
            db.execute("UPDATE notes SET value = '{' WHERE name = 'n3'")
        monitor = Monitor(store)
        for _ in range(3):
            monitor.connected(True)
            monitor.step()
        assert [silence.id for silence in monitor.incidents.silences] == ["good"]
        assert [seen.device for seen in monitor.states()] == ["d-1"]
        monitor.close()


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def db(tmp_path: Path) -> Iterator[str]:
    path = str(tmp_path / "fleet.db")
    with Store(path) as store:
        from stonechat_tools.fleet.wire import Status

        for name in ("pump-1", "pump-2", "door-1"):
            store.put([], [Status(name, 1, None, 1, True, name.encode()[:4], 1, window_ms=10_000, heartbeat_s=300)])
    yield path


def fleet(db: str, *words: str) -> int:
    return cli.main(["fleet", "--db", db, *words])


@pytest.mark.parametrize(
    "words",
    [
        "set pump-1 --site x",
        "remove pump-1",
        "restore pump-1",
        "trust pump-1",
        "silence site=x --for 1h",
        "silences",
        "incidents",
        "",
    ],
)
def test_each_verb_has_json_for_machines(db: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fleet(db, "--json", *words.split()) == 0
    for line in capsys.readouterr().out.splitlines():
        assert isinstance(json.loads(line), dict)


def test_the_database_may_be_named_before_the_verb_or_after_it(db: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["fleet", "states"], ["fleet", "incidents"], ["dashboard", "user", "list"], ["dashboard", "audit"]):
        said = []
        for order in ([words[0], "--db", db, "--json", *words[1:]], [*words, "--json", "--db", db]):
            assert cli.main(order) == 0
            said.append(capsys.readouterr().out)
        assert said[0] == said[1] and "no such database" not in said[0]


def test_devices_are_named_grouped_removed(db: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fleet(db, "set", "pump-*", "--site", "berlin", "--class", "pump", "--tag", "outdoor") == 0
    assert fleet(db, "set", "pump-1", "--name", "Pump in the yard", "--untag", "outdoor") == 0
    assert fleet(db, "remove", "door-1") == 0
    assert fleet(db) == 0
    said = capsys.readouterr().out
    assert "pump-1 (Pump in the yard)" in said and "berlin, pump, outdoor" in said
    assert "door-1" not in said.split("state")[1]
    assert fleet(db, "restore", "door-1") == 0 and fleet(db, "--json") == 0
    assert '"device": "door-1"' in capsys.readouterr().out
    with Store(db) as store:
        assert labels.read(store)["pump-1"] == labels.Labels("Pump in the yard", "pump", "berlin", ())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("remove", "nobody"), "no such device"),
        (("set", "pump-1", "--site", "a=b"), "without = and ,"),
        (("set", "pump-1", "--name", "x" * 65), "at most 64"),
        (("silence", "berlin", "--for", "2h"), "label=value"),
        (("silence", "site=~(", "--for", "2h"), "matcher"),
        (("silence", "sit=", "--for", "2h"), "labels: kind severity device site class"),
        (("silence", "site=x", "--for", "0s"), "no length"),
        (("silence", "site=x", "--for", "9999d"), "a silence has an end"),
        (("acknowledge", "7"), "there is none"),
        (("unsilence", "abc"), "no such silence"),
    ],
)
def test_wrong_wishes_cost_one_line(
    db: str, words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fleet(db, *words) == 1
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_a_running_collector_takes_silences_and_acknowledgements(db: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Store(db) as store:
        now_s = [0.0]
        sent: list[Notification] = []
        policy = Policy(group_wait_s=0, repeat_s=HOUR_S)
        monitor = Monitor(store, policy, sent.append, clock=lambda: MIDNIGHT_S + now_s[0], steady=lambda: now_s[0])
        monitor.connected(False)
        monitor.step()
        now_s[0] = 300
        monitor.step()
        assert [incident.kind for each in sent for incident in each.incidents] == ["collector"]
        assert fleet(db, "incidents") == 0 and "no connection to its broker" in capsys.readouterr().out
        assert fleet(db, "acknowledge", "1") == 0
        assert fleet(db, "silence", "kind=collector", "--for", "1h", "--comment", "works at the line") == 0
        now_s[0] = 310
        monitor.step()
        incident = monitor.incidents.open["collector"]
        assert incident.acknowledged_s is not None and len(monitor.incidents.silences) == 1
        assert not store.notes("request")
        capsys.readouterr()
        assert fleet(db, "silences") == 0
        said = capsys.readouterr().out
        assert "works at the line" in said
        assert fleet(db, "unsilence", monitor.incidents.silences[0].id) == 0
        now_s[0] = 320
        monitor.step()
        assert not monitor.incidents.silences
        monitor.connected(True)
        now_s[0] = 330
        monitor.step()
        assert sent[-1].reason == "resolved"
        again = Monitor(store, policy, clock=lambda: MIDNIGHT_S + now_s[0], steady=lambda: now_s[0])
        assert again.incidents.ended[0].end_s == MIDNIGHT_S + 330
        assert replace(again.incidents.ended[0]).acknowledged_by == incident.acknowledged_by
