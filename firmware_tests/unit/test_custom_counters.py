"""A vendor's own counters, portable: the door lock and the wearable of the manual."""

import os

from stonechat.custom_counters import CounterCollector, FileCounters, counter_schema, from_config
from stonechat.errors import CollectorError, ConfigError
from stonechat.features import LEVEL, RATE, SHARE
from stonechat.window import Window

DOOR = (("openings", "openings", RATE), ("wrong_codes", "attempts", RATE), ("battery", "%", SHARE))


def refuses(error, call, *args):
    try:
        call(*args)
    except error as caught:
        return str(caught)
    raise AssertionError("nothing raised")


class Lock:
    def __init__(self):
        self.openings = 1000
        self.wrong_codes = 3
        self.battery = 88

    def counters(self):
        return (self.openings, self.wrong_codes, self.battery)


def test_a_lock_becomes_windows():
    lock = Lock()
    collector = CounterCollector(counter_schema("door-lock-1", DOOR), lock.counters)
    window = Window(collector.schema, 60000)
    values = [0] * 3
    collector.read(values)
    assert not window.push(values, 0)
    lock.openings += 4
    lock.battery = 87.5
    collector.read(values)
    assert window.push(values, 60000)
    assert window.deltas == [4, 0, 22400]


def test_schema_id_follows_from_the_counters_alone():
    door = counter_schema("door-lock-1", DOOR)
    assert door.id == counter_schema("another name", [list(column) for column in DOOR]).id
    assert door.id != counter_schema("door-lock-1", DOOR[:2]).id
    steps = counter_schema("wearable-1", (("steps", "steps", RATE), ("heart_rate", "1/min", LEVEL)))
    assert steps.id != door.id and len(steps) == 2


def test_bad_counters_are_refused_by_name():
    assert "0 of them" in refuses(ConfigError, counter_schema, "x", ())
    assert "65 of them" in refuses(ConfigError, counter_schema, "x", [("c%d" % i, "1", RATE) for i in range(65)])
    assert "kind 'gauge'" in refuses(ConfigError, counter_schema, "x", (("a", "1", "gauge"),))
    assert "'a,b'" in refuses(ConfigError, counter_schema, "x", (("a,b", "1", RATE),))
    assert "taken" in refuses(ConfigError, counter_schema, "x", (("a", "1", RATE), ("a", "2", RATE)))
    assert "want (name, unit, kind)" in refuses(ConfigError, counter_schema, "x", (("a", "1"),))


def test_bad_readings_are_refused_by_name():
    schema = counter_schema("door-lock-1", DOOR)
    values = [0] * 3
    for reading, word in (
        ((1, 2), "2 counters, want 3"),
        ((1, -1, 50), "wrong_codes is -1"),
        ((1, 1, 100.5), "battery is 100.5"),
        ((1, None, 50), "wrong_codes is None"),
    ):
        message = refuses(CollectorError, CounterCollector(schema, lambda reading=reading: reading).read, values)
        assert word in message, message


def test_counters_from_files():
    path = "counter_file.tmp"
    rows = [{"name": "openings", "unit": "openings", "kind": "rate", "path": path}]
    try:
        collector = from_config("door-lock-1", rows)
        values = [0]
        with open(path, "wb") as file:
            file.write(b"1234\n")
        collector.read(values)
        assert values == [1234]
        with open(path, "wb") as file:
            file.write(b"open")
        assert path in refuses(CollectorError, collector.read, values)
    finally:
        os.remove(path)
    try:
        FileCounters(("nowhere.tmp",))()
    except OSError:
        pass
    else:
        raise AssertionError("a missing file was read")
    assert "path" in refuses(ConfigError, from_config, "x", [{"name": "a", "unit": "1", "kind": "rate"}])
    wrong = dict(rows[0])
    wrong["file"] = "x"
    assert "'file'" in refuses(ConfigError, from_config, "x", [wrong])
