"""The response within an agent: real rules, lease, reports and commands over an enforcer that keeps time as a kernel
does. A window is a second."""

import stonechat.agent
import stonechat.delivery
import stonechat.loop
import stonechat.report
from cbor_maps import dumps
from stonechat.agent import Agent
from stonechat.cbor_decode import loads
from stonechat.cose import Mac
from stonechat.cose_open import unseal
from stonechat.delivery import Delivery
from stonechat.errors import CollectorError, StateError
from stonechat.outbox_memory import MemoryOutbox
from stonechat.policy import ALERT, DRY_RUN, HOOK, NETWORK, OBSERVE, ON, QUARANTINE, THROTTLE
from stonechat.response import BEGAN, ENDED, FAILED, Response
from stonechat.state import State
from test_agent import SCHEMA, EchoModel
from test_lease import Kernel

SECRET = bytes(range(32))
NOW_S = 1800000000
T1_S = 20
EXPIRED, RELEASED, STOPPED, SWITCHED_OFF, REPLACED, FAILED_END, CLOSED = range(7)
ACCEPTED, NOT_SUPPORTED, LATE, BAD_ARGUMENTS, CLOCK_UNSET, NOT_DONE = range(6)
MAINTENANCE, WAS_NORMAL, STOP, RELEASE, RENEW, RESPOND = 2, 3, 6, 7, 9, 10
RULES = ((QUARANTINE, 2, NETWORK, 0, T1_S, 4 * T1_S),)
QUIET = 100
LOUD = 100_000
CLOCKS = (stonechat.report, stonechat.delivery, stonechat.agent)
TICKS = (stonechat.agent, stonechat.loop)


class Counters:
    """A collector; whether it is read is what monitoring off is about."""

    schema = SCHEMA
    sources = (("test", "counters", ""),)

    def __init__(self):
        self.totals = [0, 0]
        self.reads = 0
        self.broken = False

    def read(self, values):
        self.reads += 1
        if self.broken:
            raise CollectorError("broken")
        values[:] = self.totals

    def close(self):
        pass


class Device:
    """An agent on a clock of its own, a broker that keeps what was sent, and an operator and a collector."""

    def __init__(self, mode=ON, rules=RULES, state=None, now_s=NOW_S, **options):
        self.now_s = now_s
        self.ms = 1000
        for module in CLOCKS:
            module.epoch_s = lambda: self.now_s
        for module in TICKS:
            module.ticks_ms = lambda: self.ms
        self.kernel = Kernel()
        self.counters = Counters()
        self.response = Response(
            self.kernel, mode=mode, rules=rules, sent=1, families={SCHEMA.id: bytes((NETWORK, NETWORK))}, **options
        )
        self.reporter = Delivery("pump-1", SECRET, MemoryOutbox(), bytes_per_day=0, heartbeat_windows=1000)
        self.sent = []
        self.statuses = []
        self.state = state or State()
        self.agent = Agent(
            self.counters,
            EchoModel(),
            reporter=self.reporter,
            state=self.state,
            publish=self.publish,
            response=self.response,
            firmware="1.0",
        )
        self.number = 0

    def publish(self, topic, payload, qos, retain):
        if topic == self.reporter.status_topic:
            assert retain
            self.statuses.append(loads(unseal(Mac(SECRET, b"status", "pump-1"), payload)))
        else:
            self.sent.append(loads(unseal(Mac(SECRET, b"report", "pump-1"), payload)))

    def windows(self, count, sent=QUIET):
        """`count` seconds, each with a window."""
        for _ in range(count):
            self.now_s += 1
            self.ms += 1000
            self.kernel.pass_s(1)
            self.counters.totals[0] += QUIET
            self.counters.totals[1] += sent
            self.agent.tick()
        return self

    def alarm(self):
        """Until the quarantine, or what the rules ask for, has begun."""
        self.windows(6)
        for _ in range(8):
            self.windows(1, LOUD)
            if self.began:
                return self
        raise AssertionError("nothing began: %r" % self.sent)

    @property
    def decisions(self):
        return [fields[18] for fields in self.sent if 18 in fields]

    @property
    def began(self):
        return [decision for decision in self.decisions if decision[0] == BEGAN]

    @property
    def ended(self):
        return [decision for decision in self.decisions if decision[0] == ENDED]

    def command(self, code, arguments=(), label=b"command", topic="command", secret=SECRET, device="pump-1", **changes):
        """-> the result that the device answers with, None where it does not answer."""
        self.number += 1
        fields = {0: 1, 1: changes.get("number", self.number), 2: self.now_s + changes.get("expires", 60), 3: code}
        if arguments:
            fields[4] = list(arguments)
        before = len(self.answers)
        self.message = Mac(secret, label, device).seal(dumps(fields))
        self.agent.on_message(self.reporter.topic + topic, self.message)
        self.windows(1, LOUD if self.agent.reporter._level else QUIET)
        return self.answers[before][1] if len(self.answers) > before else None

    @property
    def answers(self):
        return [fields[15] for fields in self.sent if 15 in fields]

    def renewal(self, lease, **changes):
        self.command(RENEW, (lease,), b"renew", "ack", **changes)


def on_clock(test):
    """Puts the modules' clocks back: pytest runs all tests in one process."""

    def run():
        clock, ticks = stonechat.report.epoch_s, stonechat.loop.ticks_ms
        try:
            test()
        finally:
            for module in CLOCKS:
                module.epoch_s = clock
            for module in TICKS:
                module.ticks_ms = ticks

    return run


@on_clock
def test_an_alarm_begins_a_lease_that_ends_by_itself_and_both_are_reported():
    device = Device().alarm()
    assert device.kernel.action == QUARANTINE
    kind, action, done, rule, lease, seconds, families = device.decisions[0]
    assert (kind, action, done, rule, seconds, families) == (BEGAN, QUARANTINE, 1, 0, T1_S, NETWORK)
    cause = [fields for fields in device.sent if 18 in fields][0]
    assert cause[5] == 2 and cause[9] and cause[10][0] == 1  # the level, the evidence and the feature of the cause
    device.windows(T1_S + 1, 50)
    assert device.kernel.action == OBSERVE
    assert device.decisions[1:] == [[ENDED, QUARANTINE, 1, 0, lease, T1_S, EXPIRED, 0, 3, 40, LOUD, 50]]
    assert [status[22][:4] for status in device.statuses[-2:]] == [[ON, 0, QUARANTINE, lease], [ON, 0, OBSERVE, 0]]


@on_clock
def test_a_dry_run_touches_nothing_and_reports_what_would_have_been():
    device = Device(DRY_RUN).alarm()
    device.windows(T1_S + 1)
    assert device.kernel.action == OBSERVE and not device.kernel.blocked_s
    assert [decision[:4] for decision in device.decisions] == [[BEGAN, QUARANTINE, 0, 0], [ENDED, QUARANTINE, 0, 0]]
    assert device.statuses[-1][22][:4] == [DRY_RUN, 0, OBSERVE, 0]


@on_clock
def test_an_alarm_without_end_blocks_once_and_a_new_alarm_again_and_longer():
    device = Device().alarm()
    device.windows(300, LOUD)
    assert device.kernel.blocked_s <= T1_S and len(device.began) == 1
    device.windows(100)
    device.windows(20, LOUD)
    assert [decision[5] for decision in device.began] == [T1_S, 2 * T1_S]


@on_clock
def test_the_collector_keeps_it_and_may_not_once_the_evidence_is_gone():
    device = Device().alarm()
    lease = device.began[0][4]
    for _ in range(5):
        device.windows(T1_S - 5, LOUD)
        device.renewal(lease)
    assert device.kernel.action == QUARANTINE
    device.windows(16)  # the level is normal again
    before_s = device.kernel.until_s
    device.renewal(lease)
    assert device.kernel.until_s == before_s and device.response.real.refused == 1
    device.windows(T1_S)
    assert device.kernel.action == OBSERVE and device.ended[0][7] == 5 and device.statuses[-1][22][6] == 1


@on_clock
def test_who_may_not_renew_is_refused_and_counted():
    device = Device().alarm()
    lease = device.began[0][4]
    until_s = device.kernel.until_s
    attempts = (
        ("the key of another device", {"secret": bytes(32)}),
        ("another device's renewal", {"device": "pump-2"}),
        ("the key for acknowledgements", {"label": b"ack"}),
        ("on the wrong topic", {"topic": "command"}),
        ("expired", {"expires": -1}),
        ("never expires", {"expires": 90_000}),
    )
    for rejected in range(len(attempts)):
        changes = dict({"label": b"renew", "topic": "ack"})
        changes.update(attempts[rejected][1])
        device.command(RENEW, (lease,), **changes)
        assert device.kernel.until_s == until_s, attempts[rejected][0]
        # an acknowledgement without a stream is about nothing: it is not malformed
        assert device.reporter.rejected >= rejected, attempts[rejected][0]
    assert device.reporter.rejected >= 5
    device.renewal(lease)
    renewed_s = device.kernel.until_s
    assert renewed_s > until_s
    device.windows(3, LOUD)
    device.agent.on_message(device.reporter.topic + "ack", device.message)  # replayed
    assert device.kernel.until_s == renewed_s and device.response.real.refused == 1
    device.renewal(lease + 1)
    assert device.kernel.until_s == renewed_s and device.response.real.refused == 2


@on_clock
def test_a_device_that_sees_nothing_has_no_evidence():
    device = Device(rules=((QUARANTINE, 2, NETWORK, 0, 100, 100),)).alarm()
    device.counters.broken = True
    device.windows(20, LOUD)
    device.renewal(device.began[0][4])
    assert device.response.real.renewals == 1
    device.windows(20, LOUD)
    device.renewal(device.began[0][4])
    assert device.response.real.renewals == 1 and device.response.real.refused == 1


@on_clock
def test_an_enforcer_that_does_not_know_its_flows_is_not_renewed():
    device = Device(self_total_s=1000).alarm()

    def essential():
        raise OSError(5)

    device.kernel.essential = essential
    device.renewal(device.began[0][4])
    assert device.response.real.refused == 1
    device.windows(100, LOUD)
    assert len(device.began) == 1 and not device.agent.errors


@on_clock
def test_a_renewal_begins_nothing():
    device = Device()
    device.windows(10)
    device.renewal(1)
    assert device.kernel.action == OBSERVE and device.response.real.refused == 1 and not device.decisions


@on_clock
def test_an_operator_renews_releases_stops_and_lets_respond_again():
    state = State()
    device = Device(state=state).alarm()
    lease = device.began[0][4]
    assert device.command(RENEW, (lease,)) == ACCEPTED
    assert device.command(RENEW, (lease + 2,)) == NOT_DONE
    assert device.command(RENEW) == device.command(RELEASE, (lease + 2,)) == BAD_ARGUMENTS
    assert device.kernel.action == QUARANTINE
    assert device.command(RELEASE, (lease,)) == ACCEPTED
    assert device.kernel.action == OBSERVE and device.ended[-1][6] == RELEASED
    device.windows(100, LOUD)
    assert len(device.began) == 1  # not again in this alarm
    assert device.command(STOP, (1,)) == BAD_ARGUMENTS
    assert device.command(STOP) == ACCEPTED and device.statuses[-1][22][1] == 1
    device.windows(60)
    device = Device(state=state)  # a restart
    device.number = 100
    device.alarm()
    assert device.kernel.action == OBSERVE and device.began[0][2] == 0
    assert device.command(RESPOND) == ACCEPTED
    device.windows(60)
    device.windows(8, LOUD)
    assert device.kernel.action == QUARANTINE and device.began[-1][2] == 1
    assert device.command(STOP) == ACCEPTED
    assert device.kernel.action == OBSERVE and device.ended[-1][6] == STOPPED


@on_clock
def test_marked_as_normal_it_opens():
    device = Device().alarm()
    assert device.command(WAS_NORMAL, (1,)) == ACCEPTED
    assert device.kernel.action == OBSERVE and device.ended[0][6] == RELEASED


@on_clock
def test_in_maintenance_nothing_is_done():
    device = Device()
    device.windows(6)
    assert device.command(MAINTENANCE, (device.now_s + 1000,)) == ACCEPTED
    device.alarm()
    assert device.kernel.action == OBSERVE and device.began[0][2] == 0


@on_clock
def test_without_the_response_its_commands_are_not_supported():
    device = Device()
    for code in (STOP, RELEASE, RENEW, RESPOND):
        del device.reporter.commands.actions[code]
        assert device.command(code) == NOT_SUPPORTED
    device.reporter.on_renewal = None
    device.renewal(1)
    assert device.reporter.rejected == 1


@on_clock
def test_the_throttle_is_replaced_by_the_quarantine():
    device = Device(rules=((THROTTLE, 2, NETWORK, 0, T1_S, T1_S), (QUARANTINE, 2, NETWORK, 3, T1_S, T1_S))).alarm()
    assert device.kernel.action == THROTTLE
    device.windows(3, LOUD)
    assert device.kernel.action == QUARANTINE
    assert [decision[:2] for decision in device.decisions] == [
        [BEGAN, THROTTLE],
        [ENDED, THROTTLE],
        [BEGAN, QUARANTINE],
    ]
    assert device.ended[0][5:7] == [3, REPLACED]


@on_clock
def test_what_fails_is_reported_once_and_nothing_is_in_force():
    device = Device()
    device.kernel.broken = True
    device.windows(6)
    device.windows(10, LOUD)
    assert [decision[:5] + decision[5:] for decision in device.decisions] == [[FAILED, QUARANTINE, 1, 0, 0, 1]]
    assert device.kernel.action == OBSERVE and device.agent.errors == 0


@on_clock
def test_the_hook_is_called_once_an_alarm_and_its_failure_is_reported():
    called = []

    def hook(action, families, verdict):
        called.append((action, families, verdict.level))
        raise ValueError("a vendor's")

    rules = ((HOOK, 2, 0, 0, 0, 0), (ALERT, 1, 0, 0, 0, 0))
    device = Device(rules=rules, hook=hook).alarm()
    device.windows(5, LOUD)
    assert called == [(HOOK, NETWORK, 2)]
    assert [decision[:2] for decision in device.decisions if decision[1] == HOOK] == [[BEGAN, HOOK], [FAILED, HOOK]]
    assert [decision[:2] for decision in device.decisions if decision[1] == ALERT] == [[BEGAN, ALERT]]
    called.clear()
    Device(DRY_RUN, rules=rules, hook=hook).alarm().windows(5, LOUD)
    assert not called


@on_clock
def test_a_device_without_a_collector_renews_itself_within_its_total():
    device = Device(self_total_s=50).alarm()
    device.windows(500, LOUD)
    assert device.kernel.blocked_s in range(2 * T1_S - 4, 2 * T1_S + 1) and len(device.began) == 2
    assert len({decision[4] for decision in device.began}) == 2


@on_clock
def test_an_orderly_end_opens():
    device = Device().alarm()
    device.agent.close()
    assert device.kernel.action == OBSERVE and device.reporter.outbox.after(0) is not None


@on_clock
def test_switched_off_nothing_is_read_or_sent_but_one_status_for_each_connection():
    device = Device().alarm()
    lease = device.began[0][4]
    device.agent.monitoring(False)
    assert device.kernel.action == OBSERVE
    device.windows(1, LOUD)
    reads, statuses, sent = device.counters.reads, len(device.statuses), len(device.sent)
    assert device.statuses[-1][23] in (0, 1) and device.statuses[-1][5] is True
    device.agent.monitoring(False)
    device.windows(300, LOUD)
    device.renewal(lease)
    assert device.command(RELEASE) is None and device.command(5) is None  # the switch is the user's
    assert (device.counters.reads, len(device.statuses), len(device.sent)) == (reads, statuses, sent)
    device.agent.connected()
    device.windows(1)
    assert len(device.statuses) == statuses + 1 and 300 <= device.statuses[-1][23] <= 310
    assert len(device.sent) == sent


@on_clock
def test_after_it_learning_goes_on_and_what_happened_meanwhile_is_no_window():
    device = Device()
    device.windows(20)
    scored = device.agent.windows
    device.agent.monitoring(False)
    device.windows(100, LOUD)
    device.agent.monitoring(True)
    device.windows(1)
    assert 23 not in device.statuses[-1] and device.agent.windows == scored
    device.windows(10)
    assert device.agent.windows == scored + 10 and not device.began  # nothing loud was seen
    device.alarm()


@on_clock
def test_the_switch_holds_across_a_restart():
    state = State()
    device = Device(state=state)
    device.windows(20)
    device.agent.monitoring(False)
    device.agent.close()
    again = Device(state=state, now_s=NOW_S + 520)
    again.windows(50)
    assert again.agent.off and not again.counters.reads and not again.sent
    assert len(again.statuses) == 1 and 500 <= again.statuses[0][23] <= 530
    again.agent.monitoring(True)
    again.windows(10)
    assert again.counters.reads and not Device(state=state).agent.off


@on_clock
def test_a_medium_that_refuses_does_not_keep_stop_responding_from_opening():
    device = Device().alarm()
    lease = device.began[0][4]

    def save():
        raise StateError("full")

    device.agent.state.save = save
    assert device.command(STOP) == NOT_DONE
    assert device.kernel.action == OBSERVE and device.ended[-1][6] == STOPPED
    device.renewal(lease)
    device.windows(60)
    device.windows(8, LOUD)
    assert device.kernel.action == OBSERVE and device.response.stopped


@on_clock
def test_a_lease_that_began_before_the_maintenance_is_not_renewed_in_it():
    device = Device().alarm()
    lease = device.began[0][4]
    assert device.command(MAINTENANCE, (device.now_s + 1000,)) == ACCEPTED
    device.renewal(lease)
    assert device.command(RENEW, (lease,)) == NOT_DONE
    assert device.response.real.renewals == 0 and device.response.real.refused == 2
    device.windows(T1_S, LOUD)
    assert device.kernel.action == OBSERVE and device.ended[-1][6] == EXPIRED


@on_clock
def test_a_lease_ends_although_nothing_is_read_and_the_broker_is_away():
    device = Device().alarm()
    device.counters.broken = True

    def publish(*_):
        raise OSError(113)

    device.agent.publish = publish
    device.windows(T1_S + 2, LOUD)
    assert device.kernel.action == OBSERVE and not device.response.real.action


@on_clock
def test_other_rules_while_a_lease_of_the_old_ones_may_be_repeated():
    rules = ((ALERT, 2, 0, 0, 0, 0), (ALERT, 2, 0, 0, 0, 0), (QUARANTINE, 2, NETWORK, 0, T1_S, 4 * T1_S))
    device = Device(rules=rules, self_total_s=1000)
    device.windows(6)
    while not device.response.real.action:
        device.windows(1, LOUD)
    device.response.follow(((ALERT, 2, 0, 0, 0, 0),))
    device.windows(10 * T1_S, LOUD)
    assert device.kernel.action == OBSERVE and not device.agent.errors
    assert len([decision for decision in device.began if decision[1] == QUARANTINE]) == 1


@on_clock
def test_whatever_goes_wrong_in_the_response_the_detector_goes_on():
    for name in ("turn", "window", "switch_off", "close"):
        device = Device()
        device.windows(10)

        def fails(*_):
            raise ValueError("not foreseen")

        setattr(device.response, name, fails)
        scored = device.agent.windows
        device.windows(10)
        assert device.agent.windows == scored + 10 and bool(device.agent.errors) == (name in ("turn", "window"))
        device.agent.monitoring(False)
        device.windows(2)
        assert device.agent.off and 23 in device.statuses[-1]
        device.agent.close()
