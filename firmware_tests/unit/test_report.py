"""The Reporter alone, as the core profile has it: nothing is kept but the report that is due."""

import stonechat.report
from stonechat.cbor_decode import loads
from stonechat.cose import Mac
from stonechat.cose_open import unseal
from stonechat.errors import MQTTError, WireError
from stonechat.report import Reporter
from stonechat.state import State

SECRET = bytes(range(32))
NOW_S = 1800000000


class Verdict:
    score_q8 = 300
    surprise_q8 = 200
    evidence_q8 = 10
    level = 0
    changed = False
    learning = False
    unfit = False

    def explain(self, k):
        return [(41, -128, 55), (3, 80, 30), (78, 127, 15)][:k]


class Bench:
    """A Reporter, and a broker that can be cut; without a clock, unless one is given."""

    def __init__(self, **options):
        self.reporter = Reporter("pump-1", SECRET, prefix="stonechat/1/fleet/", **options)
        self.verdict = Verdict()
        self.heard = []
        self.cut = False
        self.now_ms = 5000
        self.mac = Mac(SECRET, b"report", "pump-1")

    def publish(self, topic, payload, qos, retain):
        if self.cut:
            raise MQTTError("cut")
        assert topic == "stonechat/1/fleet/pump-1/report" and qos == 1 and not retain
        self.heard.append(loads(unseal(self.mac, payload)))

    def window(self, level=None, score_q8=300):
        if level is not None:
            self.verdict.level = level
        self.verdict.score_q8 = score_q8
        self.now_ms += 10000
        self.reporter.observe(self.verdict, self.now_ms)
        try:
            self.reporter.pump(self.publish, self.now_ms)
        except MQTTError:
            assert self.cut


def without_clock(test):
    def run():
        clock = stonechat.report.epoch_s
        stonechat.report.epoch_s = lambda: 0
        try:
            test()
        finally:
            stonechat.report.epoch_s = clock

    return run


@without_clock
def test_heartbeats_and_changes_of_level():
    bench = Bench(heartbeat_windows=5, sequence=70, boot=3, stream=b"boot")
    for score in (500, 100, 300, 200, 400):
        bench.window(score_q8=score)
    bench.window(level=2, score_q8=9000)
    bench.window(level=2)
    bench.window(level=0)
    assert bench.heard[0] == {0: 1, 1: 70, 2: 3, 4: 40, 5: 0, 9: 10, 11: 5, 12: [100, 300, 500], 16: b"boot"}
    alarm = bytes((41, 128, 55, 3, 80, 30, 78, 127, 15))
    assert bench.heard[1] == {0: 1, 1: 71, 2: 3, 4: 50, 5: 2, 7: 9000, 8: 200, 9: 10, 10: alarm, 16: b"boot"}
    assert [fields[5] for fields in bench.heard] == [0, 2, 0]
    assert bench.reporter.published == 3


@without_clock
def test_the_median_is_that_of_the_last_windows_and_the_ends_those_of_all():
    bench = Bench(heartbeat_windows=100)
    for score in range(100):
        bench.window(score_q8=score * 7 % 101)
    last = sorted([score * 7 % 101 for score in range(36, 100)])
    assert bench.heard[0][12] == [0, last[32], 100 if 100 in [s * 7 % 101 for s in range(100)] else 99]


@without_clock
def test_while_the_broker_is_away_a_change_of_level_waits_and_is_told():
    bench = Bench(heartbeat_windows=3)
    bench.cut = True
    bench.window(level=2)
    for _ in range(8):
        bench.window(level=2)
    bench.cut = False
    bench.window(level=2)
    assert [fields[5] for fields in bench.heard] == [2]
    assert bench.heard[0][4] == 90  # as of the last window: each made it anew
    bench.cut = True
    bench.window(level=0)
    bench.window(level=2)
    bench.window(level=2)
    bench.cut = False
    bench.window(level=2)
    assert [fields[5] for fields in bench.heard] == [2, 0, 2] or [fields[5] for fields in bench.heard] == [2, 0]


@without_clock
def test_while_the_broker_is_away_summaries_grow():
    bench = Bench(heartbeat_windows=3)
    bench.cut = True
    for score in (700, 100, 300, 300, 300, 300, 300):
        bench.window(score_q8=score)
    bench.cut = False
    bench.window()
    assert bench.heard[0][11] == 8
    assert bench.heard[0][12] == [100, 300, 700]
    for _ in range(3):
        bench.window()
    assert bench.heard[1][11] == 3 and bench.heard[1][12] == [300, 300, 300]


@without_clock
def test_no_number_is_used_twice_in_a_stream():
    bench = Bench(heartbeat_windows=1)
    for i in range(60):
        bench.cut = i % 3 == 1
        bench.window(level=i // 2 % 3)
    numbers = [fields[1] for fields in bench.heard]
    assert len(numbers) == 40
    assert all([numbers[i] < numbers[i + 1] for i in range(39)])
    state = State()
    bench.reporter.save(state)
    assert state.get(b"device") == bytes(4)


@without_clock
def test_every_start_has_a_stream_of_its_own():
    streams = set()
    for _ in range(20):
        bench = Bench(heartbeat_windows=1)
        bench.window()
        bench.window()
        assert bench.heard[0][16] == bench.heard[1][16] == bench.reporter.stream
        assert [fields[1] for fields in bench.heard] == [1, 2]
        streams.add(bench.reporter.stream)
    assert len(streams) == 20 and set([len(stream) for stream in streams]) == {4}


@without_clock
def test_status_and_will():
    bench = Bench(boot=9, stream=b"boot")
    mac = Mac(SECRET, b"status", "pump-1")
    assert bench.reporter.status_topic == "stonechat/1/fleet/pump-1/status"
    facts = {"firmware": "1.0", "model": b"12345678", "window_ms": 10000, "sources": ["hook"], "adaptation_q8": 5}
    status = loads(unseal(mac, bench.reporter.status(learning=True, agent="0.1", unscored=[1, 2, 3, 4], **facts)))
    assert status == {
        0: 1,
        2: 9,
        4: 0,
        5: True,
        6: 1,
        7: "1.0",
        8: b"12345678",
        10: 10000,
        11: ["hook"],
        12: 5,
        13: True,
        14: "0.1",
        16: b"boot",
        17: [1, 2, 3, 4],
        20: 10 * bench.reporter.heartbeat_windows,
    }
    bench.reporter.more = [None, None, None, 3600]
    assert loads(unseal(mac, bench.reporter.status(window_ms=10000)))[21] == 3600
    bench.reporter.more = [None, None, None]
    assert loads(unseal(mac, bench.reporter.status(online=False))) == {0: 1, 2: 9, 4: 0, 5: False, 16: b"boot"}


def test_a_clock_dates_the_reports():
    clock = stonechat.report.epoch_s
    stonechat.report.epoch_s = lambda: NOW_S
    try:
        bench = Bench(heartbeat_windows=1)
        bench.verdict.learning = True
        bench.window()
    finally:
        stonechat.report.epoch_s = clock
    assert bench.heard[0][3] == NOW_S and 4 not in bench.heard[0]
    assert bench.heard[0][6] == 1


def test_a_device_id_that_is_no_topic_level_is_refused():
    for bad in ("", "..", "a/b", "x" * 65):
        try:
            Reporter(bad, SECRET, prefix="p")
            assert False, bad
        except WireError:
            pass
