"""The byte budget holds in every case, and the least that is allowed still gives a heartbeat."""

import stonechat.budget
from share import EVERY, some
from stonechat.budget import Budget
from stonechat.cose import Mac
from stonechat.cose_open import unseal
from stonechat.errors import ConfigError
from stonechat.state import State
from test_delivery import NOW_S, SECRET, Bench, on_clock

DAY_WINDOWS = 2160 // min(EVERY, 6)
WINDOW_MS = 86_400_000 // DAY_WINDOWS


class Life:
    """A device that lives through starts and cuts; what it published, as (window, bytes)."""

    def __init__(self, now_s, bytes_per_day, **options):
        self.now_s = now_s
        self.options = options
        self.options["bytes_per_day"] = bytes_per_day
        self.state = State()
        self.at = 0
        self.sent = []
        self.statuses = 0
        self.reports = 0
        self.start()

    def start(self):
        """A start; what the state has in RAM and not on the medium is lost."""
        self.bench = Bench(now_s=self.now_s, state=Saved(self.state), **self.options)
        self.status_due = True

    def publish(self, topic, payload, qos, retain):
        if retain:
            self.statuses += 1
        else:
            self.reports += 1
        self.sent.append(self.at << 12 | len(payload))  # small ints: a board has to hold them all

    def status(self):
        texts = ["source %d of the counters" % i for i in range(8)]
        return self.bench.reporter.status(firmware="1.4.2", sources=texts, agent="0.1.0")

    def window(self, level=0):
        bench = self.bench
        reporter = bench.reporter
        bench.pass_time(WINDOW_MS)
        self.now_s = bench.now_s
        self.at += 1
        bench.verdict.changed = level != bench.verdict.level
        bench.verdict.level = level
        reporter.observe(bench.verdict, bench.now_ms)
        if self.status_due:
            self.status_due = not reporter.send_status(self.publish, self.status)
        reporter.pump(self.publish, bench.now_ms)

    def reconnect(self):
        self.bench.reporter.reconnected()
        self.status_due = True

    def ack(self):
        reporter = self.bench.reporter
        reporter.outbox.ack(0, reporter.outbox.sequence, reporter.stream)

    def worst_day(self):
        """The most bytes that any 24 hours have seen."""
        most = total = first = 0
        for one in self.sent:
            total += one & 4095
            while self.sent[first] >> 12 <= (one >> 12) - DAY_WINDOWS:
                total -= self.sent[first] & 4095
                first += 1
            most = max(most, total)
        return most


class Saved:
    """A State whose put() is on the medium only after save()."""

    def __init__(self, medium):
        self.medium = medium
        self.sections = dict(medium.sections)

    def get(self, section, default=None):
        return self.sections.get(section, default)

    def put(self, section, value):
        self.sections[section] = value

    def save(self):
        self.medium.sections = dict(self.sections)


@on_clock
def test_a_link_that_breaks_all_the_time_costs_no_more():
    for budget in some((1_000, 5_000, 40_000)):
        life = Life(NOW_S, budget, heartbeat_windows=3)
        for i in range(3 * DAY_WINDOWS // 2):
            life.reconnect()
            life.window(i // 25 % 3)
        assert budget // 3 < life.worst_day() <= budget, (budget, life.worst_day())
        assert life.reports and life.statuses


@on_clock
def test_starts_cost_no_more_with_and_without_a_clock():
    for now_s in some((NOW_S, 0)):
        for every in some((2, 30, 125)):
            life = Life(now_s, 5_000, heartbeat_windows=2)
            for i in range(DAY_WINDOWS):
                if i % every == 0:
                    life.start()
                life.window(i // 12 % 3)
                life.ack()
            assert life.worst_day() <= 5_000, (now_s, every, life.worst_day())
            assert life.reports
            if now_s or every == 125:
                assert life.reports > 20, (now_s, every, life.reports)


@on_clock
def test_the_least_that_is_allowed_gives_a_heartbeat_each_day():
    for budget in some((1_000, 1_500, 2_000, 3_000)):
        life = Life(NOW_S, budget, heartbeat_windows=15)
        for _ in range(7 * DAY_WINDOWS // 4):
            life.bench.pass_time(3 * WINDOW_MS)  # a week in a quarter of the windows
            life.window()
            life.ack()
        assert life.statuses == 1
        assert life.reports >= 7 * 3, (budget, life.reports)
    for budget in (1, 999):
        try:
            Budget(budget, None)
            assert False, budget
        except ConfigError as error:
            assert "1000" in str(error)


@on_clock
def test_an_alarm_is_sent_though_repeats_and_statuses_took_the_budget():
    life = Life(NOW_S, 5_000, heartbeat_windows=1)
    for _ in range(DAY_WINDOWS // 2):
        life.reconnect()
        life.window()
    bench = life.bench
    heard = []
    life.publish = lambda topic, payload, qos, retain: heard.append((retain, bytes(payload)))
    life.reconnect()
    life.window(2)
    mac = Mac(SECRET, b"report", "pump-1")
    from stonechat.cbor_decode import loads

    assert [loads(unseal(mac, payload))[5] for retain, payload in heard if not retain][-1] == 2
    assert bench.reporter.held_back == 0


@on_clock
def test_the_state_is_written_rarely():
    state = State()
    writes = [0]

    class Counting(Saved):
        def save(self):
            writes[0] += 1

    stonechat.budget.epoch_s = lambda: NOW_S
    budget = Budget(40_000, Counting(state))
    for i in range(DAY_WINDOWS):
        budget.pass_time(WINDOW_MS)
        if i % 8 == 0:
            budget.spend(60, 0)
    assert 20 < writes[0] < 120, writes
