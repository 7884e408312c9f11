import stonechat.budget
import stonechat.delivery
import stonechat.report
from cbor_maps import dumps
from share import EVERY, some
from stonechat.cbor_decode import loads
from stonechat.commands import CALIBRATE
from stonechat.cose import Mac
from stonechat.cose_open import unseal
from stonechat.delivery import Delivery
from stonechat.errors import MQTTError, OutboxError, StateError, WireError
from stonechat.outbox_memory import MemoryOutbox

# The codes of stonechat.cddl
MUTE, MAINTENANCE, REPORT_NOW, RELEASE = 1, 2, 5, 7
ACCEPTED, NOT_SUPPORTED, EXPIRED, BAD_ARGUMENTS, CLOCK_UNSET, FAILED = range(6)
FLAG_LEARNING, FLAG_MUTED, FLAG_MAINTENANCE = 1, 2, 4

CLOCKS = (stonechat.report, stonechat.delivery, stonechat.budget)
SECRET = bytes(range(32))
NOW_S = 1800000000
WINDOW_MS = 10000


class Verdict:
    def __init__(self):
        self.score_q8 = 300
        self.surprise_q8 = 200
        self.evidence_q8 = 10
        self.level = 0
        self.changed = False
        self.learning = False
        self.unfit = False

    def explain(self, k):
        return [(41, -128, 55), (3, 80, 30), (78, 127, 15)][:k]


class Memory:
    """The part of State that a Reporter uses."""

    def __init__(self):
        self.sections = {}
        self.saved = 0
        self.full = False

    def get(self, section, default=None):
        return self.sections.get(section, default)

    def put(self, section, value):
        self.sections[section] = value

    def save(self):
        if self.full:
            raise StateError("full")
        self.saved += 1


class Bench:
    """A Reporter, a clock, a broker that can be cut and a collector that answers on request."""

    def __init__(self, now_s=NOW_S, **options):
        self.now_s = now_s
        self.now_ms = 5000
        self.set_clock(now_s)
        options.setdefault("outbox", MemoryOutbox())
        supported = options.pop("supported", ())
        self.reporter = Delivery("pump-1", SECRET, options.pop("outbox"), **options)
        self.acted = []
        for code in supported:
            self.reporter.commands.actions[code] = lambda arguments, code=code: self.acted.append((code, arguments))
        self.verdict = Verdict()
        self.heard = []
        self.sizes = []
        self.cut = False
        self.report_mac = Mac(SECRET, b"report", "pump-1")

    def set_clock(self, now_s):
        self.now_s = now_s
        for room in CLOCKS:
            room.epoch_s = lambda: self.now_s

    def publish(self, topic, payload, qos, retain):
        if self.cut:
            raise MQTTError("cut")
        assert topic == "stonechat/1/fleet/pump-1/report" and qos == 1 and not retain
        self.sizes.append(len(payload))
        self.heard.append(loads(unseal(self.report_mac, payload)))

    def pump(self, ms=0):
        self.pass_time(ms)
        try:
            self.reporter.pump(self.publish, self.now_ms)
        except MQTTError:
            return False
        return True

    def pass_time(self, ms):
        self.now_ms += ms
        if self.now_s:
            self.now_s += ms // 1000

    def window(self, level=None, **values):
        if level is not None:
            self.verdict.changed = level != self.verdict.level
            self.verdict.level = level
        else:
            self.verdict.changed = False
        for name in values:
            setattr(self.verdict, name, values[name])
        self.pass_time(WINDOW_MS)
        self.reporter.observe(self.verdict, self.now_ms)
        return self.pump()

    def ack(self, first, last, **extra):
        fields = {0: 1, 1: [first, last], 3: self.reporter.stream}
        fields.update({int(key[1:]): extra[key] for key in extra})
        return self.down(b"ack", "ack", fields)

    def command(self, sequence, code, arguments=None, expires_s=None):
        fields = {0: 1, 1: sequence, 2: self.now_s + 60 if expires_s is None else expires_s, 3: code}
        if arguments is not None:
            fields[4] = arguments
        return self.down(b"command", "command", fields)

    def down(self, label, name, fields, secret=SECRET, device="pump-1"):
        message = Mac(secret, label, device).seal(dumps(fields))
        self.acted.clear()
        self.reporter.on_message(self.reporter.topic + name, message)
        return self.acted

    def answers(self):
        self.pump()
        return [tuple(fields[15]) for fields in self.heard if 15 in fields]


def on_clock(test):
    """Puts the modules' clocks back: pytest runs all tests in one process."""

    def run():
        clock = stonechat.report.epoch_s
        try:
            test()
        finally:
            for room in CLOCKS:
                room.epoch_s = clock

    return run


@on_clock
def test_normal_windows_are_summed_up():
    bench = Bench(heartbeat_windows=6, resend_ms=10_000_000)
    for score in (500, 100, 300, 200, 400, 65535):
        assert bench.window(score_q8=score)
    (summary,) = bench.heard
    assert summary[0] == 1 and summary[5] == 0 and summary[11] == 6
    assert summary[12] == [100, 400, 65535]
    assert summary[3] == NOW_S + 60
    assert 6 not in summary and 10 not in summary
    for _ in range(6):
        bench.window(score_q8=250, learning=True)
    assert bench.heard[1][12] == [250, 250, 250] and bench.heard[1][6] == FLAG_LEARNING


@on_clock
def test_every_window_where_asked():
    bench = Bench(heartbeat_windows=1, bytes_per_day=0, resend_ms=10_000_000)
    for _ in range(5):
        bench.window()
    assert [fields[7] for fields in bench.heard] == [300] * 5
    assert [fields[1] - bench.heard[0][1] for fields in bench.heard] == [0, 1, 2, 3, 4]


@on_clock
def test_a_change_of_level_is_said_at_once_with_what_carries_it():
    bench = Bench()
    bench.window()
    assert bench.heard == []
    bench.window(level=2, score_q8=9000, surprise_q8=1200, evidence_q8=5200)
    (alarm,) = bench.heard
    assert (alarm[5], alarm[7], alarm[8], alarm[9]) == (2, 9000, 1200, 5200)
    assert alarm[10] == bytes((41, 0x80, 55, 3, 80, 30, 78, 127, 15))
    bench.window()
    assert len(bench.heard) == 1
    bench.window(level=0)
    assert bench.heard[1][5] == 0 and bench.heard[1][10]


@on_clock
def test_the_largest_messages_keep_their_sizes():
    for clock in (0, 0xFFFFFFFF):
        bench = Bench(now_s=clock, outbox=MemoryOutbox(sequence=0xFFFFFFF0), heartbeat_windows=6)
        bench.reporter.boot = 65535
        bench.reporter.uptime_s = 0x10000
        bench.set_clock(clock and clock - 100)
        bench.window(level=2, score_q8=65535, surprise_q8=65535, evidence_q8=65535)
        assert bench.sizes[-1] <= 70, bench.sizes
        for _ in range(6):
            bench.window(score_q8=65535)
        assert bench.heard[-1][11] == 6
        assert bench.sizes[-1] <= 66, bench.sizes


DAY_WINDOWS = 8640 // min(EVERY, 8)


def day(bench, level_at, windows=DAY_WINDOWS):
    """A day of windows (on an emulated board three hours) -> bytes published, everything acknowledged."""
    sent = 0
    for i in range(windows):
        level = level_at(i)
        bench.window(level=level)
        sent += sum(bench.sizes)
        bench.sizes.clear()
        bench.heard.clear()
        bench.reporter.outbox.ack(0, bench.reporter.outbox.sequence, bench.reporter.stream)
    return sent


@on_clock
def test_a_quiet_day_at_defaults():
    bench = Bench()
    sent = day(bench, lambda i: 0)
    assert 10_000 // min(EVERY, 8) < sent <= 20_000, sent


@on_clock
def test_the_budget_holds_on_the_worst_day():
    for budget in some((40_000, 5_000)):
        bench = Bench(bytes_per_day=budget, heartbeat_windows=3)
        sent = day(bench, lambda i: i % 3)
        assert (EVERY > 1 or budget // 2 < sent) and 0 < sent <= budget, sent
        assert bench.reporter.held_back > 1000 // EVERY


@on_clock
def test_a_change_of_level_goes_out_though_heartbeats_took_the_budget():
    bench = Bench(bytes_per_day=20_000, heartbeat_windows=1)
    day(bench, lambda i: 0, 1000)
    bench.window(level=2)
    assert bench.heard[-1][5] == 2


@on_clock
def test_what_the_broker_did_not_take_costs_nothing():
    bench = Bench(bytes_per_day=5_000)
    bench.cut = True
    bench.window(level=2)
    for _ in range(200):
        bench.pump(10)
    assert bench.reporter.budget.sent == bench.reporter.budget.most
    bench.cut = False
    bench.pump()
    assert bench.reporter.budget.sent < bench.reporter.budget.most


@on_clock
def test_a_level_held_back_is_said_later():
    bench = Bench(bytes_per_day=2_000, heartbeat_windows=1000)
    day(bench, lambda i: i % 3, 300)
    level = (bench.reporter._level + 1) % 3
    held_back = bench.reporter.held_back
    day(bench, lambda i: level, 1)
    assert bench.reporter.held_back == held_back + 1
    said = []
    for _ in range(800):
        bench.window()
        said += bench.heard
        bench.heard.clear()
        bench.reporter.outbox.ack(0, bench.reporter.outbox.sequence, bench.reporter.stream)
    assert [fields[5] for fields in said] == [level]


@on_clock
def test_reports_wait_for_the_collector_not_for_the_broker():
    bench = Bench(heartbeat_windows=1, bytes_per_day=0)
    for _ in range(4):
        bench.window()
    first = bench.heard[0][1]
    assert bench.reporter.outbox.oldest == first
    bench.ack(first, first + 1)
    bench.ack(first + 3, first + 3)
    assert bench.reporter.outbox.oldest == first + 2
    assert bench.reporter.rejected == 0


@on_clock
def test_after_a_cut_everything_on_its_way_goes_again():
    bench = Bench(heartbeat_windows=1, bytes_per_day=0)
    for _ in range(3):
        bench.window()
    bench.cut = True
    assert not bench.window()
    bench.cut = False
    bench.heard.clear()
    bench.pump(100)
    first = bench.reporter.outbox.oldest
    assert [fields[1] for fields in bench.heard] == [first, first + 1, first + 2, first + 3]


@on_clock
def test_a_silent_collector_is_knocked_at_less_and_less():
    bench = Bench(heartbeat_windows=1, bytes_per_day=0)
    for _ in range(3):
        bench.window()
    first = bench.heard[0][1]
    bench.heard.clear()
    for _ in range(24 * 60):
        bench.pump(60_000)
    assert len(bench.heard) < 40
    assert set([fields[1] for fields in bench.heard]) == {first}
    bench.heard.clear()
    bench.ack(first, first)  # it is back
    bench.pump(1000)
    assert [fields[1] for fields in bench.heard] == [first + 1, first + 2]


@on_clock
def test_only_so_many_are_on_their_way():
    bench = Bench(heartbeat_windows=1, bytes_per_day=0, outbox=MemoryOutbox(max_bytes=100000))
    for _ in range(60):
        bench.window()
    first = bench.heard[0][1]
    assert set([fields[1] - first for fields in bench.heard]) == set(range(30))
    bench.heard.clear()
    bench.ack(first, first + 29)
    for _ in range(4):
        bench.pump()
    assert [fields[1] - first for fields in bench.heard] == list(range(30, 60))


@on_clock
def test_an_acknowledgement_of_another_stream_changes_nothing():
    bench = Bench(now_s=0, heartbeat_windows=1, bytes_per_day=0)
    for _ in range(3):
        bench.window()
    first = bench.reporter.outbox.oldest
    for stream in (b"none", b"", 7, None):
        bench.ack(first, first + 2, _2=NOW_S, _3=stream)
    bench.down(b"ack", "ack", {0: 1, 1: [first, first + 2]})  # no stream at all
    assert bench.reporter.outbox.oldest == first and bench.reporter.rejected == 0
    assert bench.command(2, REPORT_NOW, expires_s=NOW_S + 60) == []
    assert bench.answers() == [(2, CLOCK_UNSET)]  # nor did it set the clock
    bench.ack(first, first + 2)
    assert bench.reporter.outbox.oldest == first + 3


@on_clock
def test_what_the_collector_refuses_frees_its_place_and_is_counted_once():
    bench = Bench(heartbeat_windows=1, bytes_per_day=0)
    for _ in range(5):
        bench.window()
    first = bench.reporter.outbox.oldest
    for _ in range(2):
        bench.ack(first + 1, first + 3, _4=[first, first, first + 4, first + 4])
    assert bench.reporter.refused == 2 and bench.reporter.outbox.oldest == first + 5
    status = loads(unseal(Mac(SECRET, b"status", "pump-1"), bench.reporter.status()))
    assert status[15] == [0, 0, 0, 2] and status[16] == bench.reporter.stream
    bench.ack(first, first, _4=[1])
    assert bench.reporter.rejected == 1


@on_clock
def test_the_collectors_time_never_goes_back():
    bench = Bench(now_s=0, supported=(CALIBRATE,))
    bench.window()
    bench.ack(1, 1, _2=NOW_S)
    old = {0: 1, 1: [1, 1], 2: NOW_S, 3: bench.reporter.stream}
    bench.pass_time(3 * 86_400_000)
    bench.pump()
    bench.ack(1, 1, _2=NOW_S + 3 * 86_400)
    bench.down(b"ack", "ack", old)  # the broker repeats it, and then lets an old command through
    assert bench.command(7, CALIBRATE, expires_s=NOW_S + 600) == []
    assert bench.answers()[-1] == (7, EXPIRED)


@on_clock
def test_freed_on_publish_where_chosen():
    bench = Bench(heartbeat_windows=1, bytes_per_day=0, free_on_publish=True)
    for _ in range(5):
        bench.window()
    assert bench.reporter.outbox.after(0) is None


@on_clock
def test_freed_on_publish_means_the_brokers_acknowledgement():
    bench = Bench(heartbeat_windows=1, bytes_per_day=0, free_on_publish=True, resend_ms=1 << 29)
    handles = []

    def publish(topic, payload, qos, retain):
        handles.append("%d" % len(handles))
        return handles[-1]

    bench.publish = publish
    for _ in range(5):
        bench.window()
    outbox = bench.reporter.outbox
    assert len(handles) == 5 and outbox.oldest == 1
    bench.reporter.on_published(handles[1])
    bench.reporter.on_published("never heard of")
    assert outbox.oldest == 1 and outbox.after(1)[0] == 3
    bench.reporter.on_published(handles[0])
    assert outbox.oldest == 3
    bench.reporter.reconnected()  # the client has forgotten what was on its way, and so has the reporter
    bench.reporter.on_published(handles[2])
    assert outbox.oldest == 3
    bench.pump()
    assert len(handles) == 8
    for handle in handles[5:]:
        bench.reporter.on_published(handle)
    assert outbox.after(0) is None
    for _ in range(200):  # a broker that never acknowledges
        bench.window()
    assert len(bench.reporter._unpublished) <= 30


@on_clock
def test_history_says_so_and_how_old_it_is():
    bench = Bench(heartbeat_windows=1, bytes_per_day=0)
    bench.cut = True
    for _ in range(10):
        bench.window()
    bench.cut = False
    bench.pump()
    ages = [fields.get(23) for fields in bench.heard]
    assert ages == [90, 80, 70, 60, None, None, None, None, None, None]


@on_clock
def test_clock_unset_gives_uptime_and_the_status_tells_when_that_was():
    bench = Bench(now_s=0, heartbeat_windows=1, bytes_per_day=0)
    bench.cut = True
    for _ in range(3):
        bench.window()
    bench.set_clock(NOW_S)
    bench.window()
    bench.cut = False
    bench.pump(100_000)
    assert [fields.get(3) for fields in bench.heard] == [None, None, None, NOW_S + 10]
    assert [fields.get(4) for fields in bench.heard] == [0, 10, 20, None]
    assert [fields.get(23) for fields in bench.heard] == [130, 120, 110, 100]
    status = loads(unseal(Mac(SECRET, b"status", "pump-1"), bench.reporter.status()))
    began_s = status[3] - status[4]
    assert began_s == NOW_S - 20  # so the first one was at began_s + 0


@on_clock
def test_status_and_last_will():
    bench = Bench()
    mac = Mac(SECRET, b"status", "pump-1")
    facts = {"firmware": "1.2", "model": b"12345678", "sources": ("net", "snmp"), "learning": True}
    status = loads(unseal(mac, bench.reporter.status(**facts)))
    assert status[5] is True and status[6] == 1 and status[7] == "1.2" and status[8] == b"12345678"
    assert status[11] == ["net", "snmp"] and status[13] is True and status[15] == [0, 0, 0, 0]
    assert loads(unseal(mac, bench.reporter.status()))[6] == 2
    will = loads(unseal(mac, bench.reporter.status(online=False)))
    assert will[5] is False and 6 not in will


@on_clock
def test_commands_are_answered():
    bench = Bench(supported=(CALIBRATE,))
    assert bench.command(1, CALIBRATE) == [(CALIBRATE, [])]
    assert bench.command(2, RELEASE, [7]) == []
    assert bench.command(3, MUTE, [bench.now_s + 100]) == []
    assert bench.command(4, MUTE) == []
    assert bench.command(5, CALIBRATE, expires_s=bench.now_s - 1) == []
    assert bench.command(6, CALIBRATE, expires_s=bench.now_s + 1_000_000) == []
    assert bench.answers() == [
        (1, ACCEPTED),
        (2, NOT_SUPPORTED),
        (3, ACCEPTED),
        (4, BAD_ARGUMENTS),
        (5, EXPIRED),
        (6, EXPIRED),
    ]
    assert bench.reporter.rejected == 0


@on_clock
def test_replayed_forged_and_foreign_commands_are_counted_and_ignored():
    memory = Memory()
    bench = Bench(supported=(CALIBRATE,), state=memory)
    command = {0: 1, 1: 10, 2: NOW_S + 60, 3: CALIBRATE}
    assert bench.down(b"command", "command", command)
    assert memory.saved == 1
    assert bench.down(b"command", "command", command) == []  # replayed
    command[1] = 9
    assert bench.down(b"command", "command", command) == []  # older
    command[1] = 11
    assert bench.down(b"ack", "command", command) == []  # the key of another direction
    assert bench.down(b"report", "command", command) == []
    assert bench.down(b"command", "command", command, device="pump-2") == []
    assert bench.down(b"command", "command", command, secret=SECRET[1:] + b"x") == []
    command[0] = 2
    assert bench.down(b"command", "command", command) == []
    bench.reporter.on_message(bench.reporter.topic + "command", b"\x81" * 1000)
    bench.reporter.on_message("elsewhere", b"")
    assert bench.acted == []
    assert bench.reporter.rejected == 8
    bench.pump()
    assert len(bench.heard) == 1
    again = Delivery("pump-1", SECRET, MemoryOutbox(), state=memory)  # a restart
    again.commands.actions[CALIBRATE] = bench.acted.append
    mac = Mac(SECRET, b"command", "pump-1")
    command[0], command[1] = 1, 10
    again.on_message(again.topic + "command", mac.seal(dumps(command)))
    assert bench.acted == []
    assert again.rejected == 1


@on_clock
def test_a_command_is_carried_out_though_the_state_can_not_be_saved():
    memory = Memory()
    memory.full = True
    bench = Bench(supported=(CALIBRATE,), state=memory)
    assert bench.command(1, CALIBRATE) == [(CALIBRATE, [])]
    assert bench.reporter.commands.unsaved == 1


@on_clock
def test_without_a_clock_a_command_waits_for_the_collectors():
    bench = Bench(now_s=0, supported=(CALIBRATE,))
    assert bench.command(1, CALIBRATE, expires_s=NOW_S + 60) == []
    assert bench.answers() == [(1, CLOCK_UNSET)]
    bench.ack(1, 1, _2=NOW_S)
    assert bench.command(2, CALIBRATE, expires_s=NOW_S + 60) == [(CALIBRATE, [])]
    bench.pass_time(100_000)
    bench.pump()
    assert bench.command(3, CALIBRATE, expires_s=NOW_S + 60) == []


@on_clock
def test_mute_and_maintenance_and_report_now():
    bench = Bench(heartbeat_windows=4)
    bench.pump()
    bench.command(1, MUTE, [bench.now_s + 35])
    bench.command(2, MAINTENANCE, [bench.now_s + 65])
    for level in (0, 2, 2, 2):
        bench.window(level=level)
    reports = [fields for fields in bench.heard if 15 not in fields]
    assert [fields[6] for fields in reports] == [FLAG_MAINTENANCE]  # the mute ended before the fourth window
    assert bench.reporter.held_back == 1
    assert reports[0][5] == 2 and 10 in reports[0]
    bench.heard.clear()
    bench.command(3, REPORT_NOW)
    bench.window(level=2)
    assert [fields.get(7) for fields in bench.heard] == [None, 300]
    bench.command(4, MUTE, [bench.now_s + 10_000])
    for _ in range(4):
        bench.window()
    assert bench.heard[-1][6] == FLAG_MUTED


class BadOutbox(MemoryOutbox):
    """A medium that takes nothing, with numbers to spare."""

    def append(self, body):
        self.sequence += 1
        raise OutboxError("full")


@on_clock
def test_a_full_medium_does_not_silence_the_device():
    bench = Bench(outbox=BadOutbox(), heartbeat_windows=1)
    bench.window(level=2)
    bench.window()
    assert [fields[5] for fields in bench.heard] == [2, 2]
    assert bench.heard[0][1] != bench.heard[1][1]
    assert bench.reporter.unsaved == 2


@on_clock
def test_what_the_ring_dropped_is_told():
    bench = Bench(heartbeat_windows=1, bytes_per_day=0, outbox=MemoryOutbox(max_bytes=200))
    bench.cut = True
    for _ in range(20):
        bench.window()
    bench.cut = False
    bench.pump()
    lost = bench.reporter.outbox.lost
    bench.window()
    assert bench.heard[-1][14] == lost > 10


@on_clock
def test_device_ids_are_checked():
    for bad in ("", "a/b", "+", "#", "a b", "..", "x" * 65, "d\u00e9"):
        try:
            Delivery(bad, SECRET, MemoryOutbox())
            assert False, bad
        except WireError:
            pass
    assert Delivery("Pump_1.a-2", SECRET, MemoryOutbox(), prefix="v/1/west").ack_topic == "v/1/west/Pump_1.a-2/ack"


def failing(arguments):
    raise StateError("full")


@on_clock
def test_a_command_is_answered_after_it_was_carried_out_also_where_that_fails():
    bench = Bench()
    order = []
    append = bench.reporter.outbox.append

    def noting(body):
        order.append("answered")
        return append(body)

    bench.reporter.outbox.append = noting
    bench.reporter.commands.actions = {RELEASE: lambda arguments: order.append(arguments), CALIBRATE: failing}
    bench.command(1, RELEASE, [7])
    assert order == [[7], "answered"]
    bench.command(2, CALIBRATE)
    assert bench.answers() == [(1, ACCEPTED), (2, FAILED)]


@on_clock
def test_a_mute_ends_without_a_clock_and_whatever_the_clock_does():
    for now_s in (0, NOW_S):
        bench = Bench(now_s=now_s, heartbeat_windows=1000, bytes_per_day=0)
        bench.window()
        if not now_s:
            bench.ack(1, 1, _2=NOW_S)
        bench.command(5, MUTE, [NOW_S + 60 + 10 * (now_s > 0)], expires_s=NOW_S + 600)
        bench.window(level=2)
        if now_s:
            bench.set_clock(NOW_S - 10_000_000)
        for _ in range(12):
            bench.window()
        assert [fields[5] for fields in bench.heard if 5 in fields] == [2]


@on_clock
def test_a_new_cause_is_named_while_the_alarm_goes_on_and_only_once_a_heartbeat():
    bench = Bench(heartbeat_windows=20, bytes_per_day=0, resend_ms=1 << 29)
    verdict = bench.verdict
    causes = [[(1, 20, 60), (2, 9, 20), (3, 5, 10)]]
    verdict.explain = lambda k: causes[0][:k]
    bench.window(level=2, surprise_q8=1200)
    for i in range(6):
        causes[0] = [(i, 30, 70), (9, 1, 20), (8, 1, 10)]
        bench.window()
        bench.window()
    named = [[fields[10][i] for i in (0, 3, 6)] for fields in bench.heard if 10 in fields]
    assert named == [[1, 2, 3], [0, 9, 8], [4, 9, 8], [5, 9, 8]]
    bench.window(surprise_q8=300)
    causes[0] = [(20, 30, 70)]
    bench.window()
    assert len(bench.heard) == 4  # a window that is not strange itself names nothing
    for _ in range(30):
        bench.window(surprise_q8=1200)
    assert [list(fields[10]) for fields in bench.heard[4:] if 10 in fields] == [[20, 30, 70]] * 2  # heartbeat between


@on_clock
def test_a_channel_that_leads_is_reported_once_there_are_bytes_for_it():
    bench = Bench(heartbeat_windows=100_000, bytes_per_day=10_000)
    bench.window(level=2, channel=0)
    bench.ack(1, 1)
    bench.reporter.budget.made = 0  # spent by what came before
    bench.window(channel=1)
    assert len(bench.heard) == 1
    for _ in range(1000):
        bench.window()
        if len(bench.heard) > 1:
            bench.ack(2, 2)
    assert [report.get(17) for report in bench.heard] == [None, 1]
