"""The lease over an enforcer that keeps time as a kernel does: what is in force ends by itself."""

from share import some
from stonechat.lease import Lease, LeaseRefused
from stonechat.policy import OBSERVE, QUARANTINE, THROTTLE

T1_S = 120
ALARM = 2


class Kernel:
    """An enforcer and its clock."""

    def __init__(self):
        self.now_s = 0
        self.action = QUARANTINE  # left behind by an earlier start
        self.until_s = 1 << 30
        self.broken = False
        self.alive = True
        self.blocked_s = 0

    def apply(self, action, seconds):
        self._work()
        self.action = action
        self.until_s = self.now_s + seconds

    def extend(self, seconds):
        self._work()
        if self.action != OBSERVE:
            self.until_s = self.now_s + seconds

    def release(self):
        self._work()
        self.action = OBSERVE

    def counts(self):
        self._work()
        return 3, 40

    def essential(self):
        return self.alive

    def close(self):
        self.action = OBSERVE

    def _work(self):
        if self.broken:
            raise OSError(1, "refused")

    def pass_s(self, seconds):
        for _ in range(seconds):
            self.now_s += 1
            if self.now_s >= self.until_s:
                self.action = OBSERVE
            self.blocked_s += self.action != OBSERVE


def make(self_total_s=0):
    kernel = Kernel()
    return kernel, Lease(kernel, self_total_s)


def refused(call, *arguments):
    try:
        call(*arguments)
    except LeaseRefused as error:
        return str(error)
    return ""


def test_a_new_start_opens():
    kernel, lease = make()
    assert kernel.action == OBSERVE == lease.action


def test_it_ends_by_itself_and_the_record_has_its_length():
    kernel, lease = make()
    lease.begin(1, QUARANTINE, T1_S, 0)
    kernel.pass_s(T1_S - 1)
    assert kernel.action == QUARANTINE and not lease.turn(kernel.now_s)
    kernel.pass_s(1)
    assert kernel.action == OBSERVE
    assert lease.turn(kernel.now_s) and not lease.turn(kernel.now_s)
    assert lease.action == OBSERVE and lease.last == (QUARANTINE, 1, lease.number, T1_S, 0, 3, 40)


def test_the_agent_may_die():
    kernel, lease = make()
    lease.begin(1, QUARANTINE, T1_S, 0)
    kernel.pass_s(10 * T1_S)
    assert kernel.blocked_s == T1_S - 1


def test_a_renewal_extends_it_from_now_on():
    kernel, lease = make()
    lease.begin(1, QUARANTINE, T1_S, 0)
    for number in range(1, 5):
        kernel.pass_s(100)
        lease.renew(lease.number, number, kernel.now_s, ALARM)
    assert lease.renewals == 4 and lease.until_s == kernel.until_s == 400 + T1_S


def test_two_collectors_whose_clocks_differ_renew_and_nothing_that_was_heard_counts_again():
    kernel, lease = make()
    lease.begin(1, QUARANTINE, T1_S, 0)
    heard = []
    for turn in range(12):
        base = 0xFFFFE000 + turn * 1000  # past the end of 32 bits
        for number in (base & 0xFFFFFFFF, base - 700 & 0xFFFFFFFF):
            for old in heard:
                assert refused(lease.renew, lease.number, old, kernel.now_s, ALARM) == "heard before", (turn, old)
            lease.renew(lease.number, number, kernel.now_s, ALARM)
            heard.append(number)
        kernel.pass_s(40)
    assert lease.renewals == 24 and 0xFFFFE000 in heard and 808 in heard
    lease.renew(lease.number, None, kernel.now_s, ALARM)  # a command, whose own number was checked


def test_a_renewal_is_refused_for_another_lease_a_replay_and_without_a_reason():
    kernel, lease = make()
    lease.begin(1, QUARANTINE, T1_S, 0)
    first = lease.number
    kernel.pass_s(50)
    lease.renew(first, 7, 50, ALARM)
    assert refused(lease.renew, first, 7, 60, ALARM) == "heard before"
    kernel.alive = False
    assert "died of it" in refused(lease.renew, first, 8, 60, ALARM)
    kernel.alive = True
    assert refused(lease.renew, first + 1, 8, 60, ALARM) == "not in force"
    assert refused(lease.renew, first, 8, 60, 0) == "the evidence is gone"
    assert kernel.until_s == 50 + T1_S and lease.refused == 4
    kernel.pass_s(T1_S)
    assert refused(lease.renew, first, 9, kernel.now_s, ALARM) == "not in force"  # over, and not begun anew by it
    lease.turn(kernel.now_s)
    lease.begin(1, QUARANTINE, T1_S, kernel.now_s + T1_S)
    assert lease.number != first and refused(lease.renew, first, 10, kernel.now_s + T1_S, ALARM) == "not in force"


def test_the_throttle_gives_way_to_the_quarantine_not_the_reverse():
    kernel, lease = make()
    lease.begin(0, THROTTLE, T1_S, 0)
    throttle = lease.number
    lease.begin(1, QUARANTINE, T1_S, 10)
    assert kernel.action == QUARANTINE and kernel.until_s == T1_S  # the clock of this kernel has not moved
    assert lease.number != throttle and lease.last == (THROTTLE, 0, throttle, 10, 0, 3, 40)
    assert refused(lease.begin, 0, THROTTLE, T1_S, 20) == refused(lease.begin, 1, QUARANTINE, T1_S, 20) == "in force"


def test_after_its_end_there_is_a_pause():
    kernel, lease = make()
    lease.begin(1, QUARANTINE, T1_S, 0)
    kernel.pass_s(T1_S)
    lease.turn(kernel.now_s)
    for now_s in (T1_S, 2 * T1_S - 1):
        assert refused(lease.begin, 1, QUARANTINE, T1_S, now_s) == "pause"
    lease.begin(1, QUARANTINE, T1_S, 2 * T1_S)


def test_an_alarm_without_end_blocks_no_longer_than_the_device_may():
    for total_s, longest_s in some(((0, T1_S), (500, 480))):
        kernel, lease = make(total_s)
        lease.begin(1, QUARANTINE, T1_S, 0)
        begins = [0]
        for _ in range(20_000):
            kernel.pass_s(1)
            lease.turn(kernel.now_s)
            if lease.may_repeat(kernel.now_s, ALARM):
                lease.begin(lease.rule, lease.last[0], lease.seconds, kernel.now_s, True)
                begins.append(kernel.now_s)
        assert longest_s - 8 <= kernel.blocked_s <= longest_s
        pauses = [begins[i + 1] - begins[i] - T1_S for i in range(len(begins) - 1)]
        assert pauses == [120, 240, 480][: len(pauses)], pauses


def test_the_devices_own_total_begins_anew_after_the_alarm():
    kernel, lease = make(T1_S)
    lease.begin(1, QUARANTINE, T1_S, 0)
    kernel.pass_s(3 * T1_S)
    lease.turn(kernel.now_s)
    kernel.pass_s(T1_S)
    assert not lease.may_repeat(kernel.now_s, ALARM)
    lease.forget()
    assert not lease.may_repeat(kernel.now_s, ALARM)  # the policy begins the first one of an alarm


def test_it_is_not_repeated_when_a_flow_has_died_or_the_alarm_is_over():
    kernel, lease = make(10_000)
    lease.begin(1, QUARANTINE, T1_S, 0)
    kernel.pass_s(3 * T1_S)
    lease.turn(kernel.now_s)
    kernel.pass_s(T1_S)
    assert lease.may_repeat(kernel.now_s, ALARM)
    assert not lease.may_repeat(kernel.now_s, 1)
    kernel.alive = False
    assert not lease.may_repeat(kernel.now_s, ALARM)


def refuses(lease):
    try:
        lease.begin(1, QUARANTINE, T1_S, 0)
        raise AssertionError("begun")
    except OSError:
        pass
    assert lease.action == OBSERVE


def test_a_system_that_refuses_leaves_nothing_in_force():
    kernel, lease = make()
    kernel.broken = True
    refuses(lease)
    kernel.broken = False
    lease.begin(0, THROTTLE, T1_S, 0)
    kernel.broken = True
    refuses(lease)


def test_released_it_is_open_at_once():
    kernel, lease = make()
    lease.end(0)
    lease.begin(1, QUARANTINE, T1_S, 0)
    lease.end(5)
    assert kernel.action == lease.action == OBSERVE and lease.last[3] == 5
    assert refused(lease.begin, 1, QUARANTINE, T1_S, 6) == "pause"
