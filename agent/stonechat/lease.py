"""A lease: what was decided holds for a bounded time, and longer only while somebody renews it.

The enforcer (protocols.pyi) ends it by itself after `seconds`, even if the agent is gone. A renewal is refused when the
evidence is gone, or when a flow that the device needs has died of it. After its end there is a pause as long as the
lease was. A new start of the agent opens. All times are seconds since this start, which no change of the clock moves.
"""

from .compat import const, urandom
from .errors import StonechatError
from .policy import OBSERVE

_HEARD = const(4)  # renewals that are remembered

# Why a lease has ended
EXPIRED = const(0)
RELEASED = const(1)  # by an operator
STOPPED = const(2)  # stop responding
SWITCHED_OFF = const(3)  # the user has switched monitoring off
REPLACED = const(4)  # by a stronger action
FAILED = const(5)  # the system refused
CLOSED = const(6)  # the agent ends


def _after(a: int, b: int) -> int:
    """a - b, modulo 2**32 as RFC 1982 does: negative where a is the earlier one."""
    return ((a - b + 0x80000000) & 0xFFFFFFFF) - 0x80000000


class LeaseRefused(StonechatError):
    """It can't begin, or can't be renewed; the message says why."""


class Nothing:
    """The enforcer of a dry run."""

    def apply(self, action: int, seconds: int) -> None:
        pass

    def extend(self, seconds: int) -> None:
        pass

    def release(self) -> None:
        pass

    def counts(self) -> tuple:
        return (0, 0)

    def essential(self) -> bool:
        return True

    def close(self) -> None:
        pass


class Lease:
    """enforcer: what acts; self_total_s: how long the device may keep itself in by itself in one alarm, all leases
    together, under growing pauses; 0: it may not. `action` is OBSERVE while none is in force. `last`: what the last one
    that ended was: (action, rule, number, seconds in force, renewals, passed, stopped), the last two as the enforcer
    counted them."""

    def __init__(self, enforcer, self_total_s: int = 0) -> None:
        self.enforcer = enforcer
        self.action = OBSERVE
        self.number = 0  # drawn at random for each: a renewal of an earlier one means nothing
        self.rule = 0
        self.seconds = 0
        self.began_s = self.until_s = 0
        self.renewals = 0
        self.refused = 0  # renewals
        self.last = (OBSERVE, 0, 0, 0, 0, 0, 0)
        self.pause_until_s = 0
        self._self_total_s = self_total_s
        self._self_s = 0  # of that
        self._pause_s = 0
        self._heard: list = []  # the highest numbers of renewals, rising
        enforcer.release()

    def begin(self, rule: int, action: int, seconds: int, now_s: int, again: bool = False) -> None:
        """Put `action` in force for `seconds`; again: the device repeats its last lease by itself, after may_repeat().
        Raises LeaseRefused within the pause and where an action as strong is in force; OSError where the system
        refuses: then nothing is."""
        if self.action >= action:
            raise LeaseRefused("in force")
        if now_s < self.pause_until_s:
            raise LeaseRefused("pause")
        if self.action != OBSERVE:
            self._note(now_s)
        try:
            self.enforcer.apply(action, seconds)
        except OSError:
            self.end(now_s)  # of the weaker one that it should replace
            raise
        self.rule = rule
        self.action = action
        self.number = int.from_bytes(urandom(4), "big") & 0x3FFFFFFF | 1
        self.seconds = seconds
        self.began_s = now_s
        self.until_s = now_s + seconds
        self.renewals = 0
        self._heard = []
        self._self_s = self._self_s + seconds if again else seconds
        self._pause_s = 2 * self._pause_s if again else seconds

    def renew(self, lease: int, number, now_s: int, level: int) -> None:
        """lease: `number` of the lease; number: of the renewal, rising (modulo 2**32) but for what two collectors send,
        None: it has been checked; level: of the last window. Raises LeaseRefused with the reason, or OSError."""
        heard = self._heard
        why = ""
        if self.action == OBSERVE or lease != self.number or now_s >= self.until_s:
            why = "not in force"
        elif number is not None and (number in heard or len(heard) == _HEARD and _after(number, heard[0]) < 0):
            why = "heard before"
        elif not level:
            why = "the evidence is gone"
        elif not self._essential():
            why = "a flow that the device needs has died of it"
        if why:
            self.refused += 1
            raise LeaseRefused(why)
        if number is not None:
            heard.append(number)
            heard.sort(key=lambda one: _after(one, number))
            del heard[:-_HEARD]
        self.enforcer.extend(self.seconds)
        self.until_s = now_s + self.seconds
        self.renewals += 1

    def may_repeat(self, now_s: int, level: int) -> bool:
        """Whether the device may begin the last lease again by itself: allowed, the alarm goes on, the pause is over,
        the total is not used up, and what the device needs still lives."""
        return (
            self.action == OBSERVE
            and self._self_s > 0
            and self._self_s + self.seconds <= self._self_total_s
            and level > 1
            and now_s >= self.pause_until_s
            and self._essential()
        )

    def forget(self) -> None:
        """The alarm is over, or somebody has opened: nothing is repeated, and the total begins anew."""
        self._self_s = 0

    def turn(self, now_s: int) -> bool:
        """To be called about once a second -> whether the lease has ended by itself. Raises OSError as end() does."""
        if self.action == OBSERVE or now_s < self.until_s:
            return False
        self.end(now_s)
        return True

    def end(self, now_s: int) -> None:
        """Open at once, if anything is in force. Raises OSError where the system refuses; its own timeout ends it all
        the same."""
        if self.action == OBSERVE:
            return
        self._note(now_s)
        self.action = OBSERVE
        self.pause_until_s = now_s + self._pause_s
        self.enforcer.release()

    def _essential(self) -> bool:
        try:
            return bool(self.enforcer.essential())
        except OSError:  # not known: then it is not so
            return False

    def _note(self, now_s: int) -> None:
        try:
            passed, stopped = self.enforcer.counts()
        except Exception:  # noqa: BLE001 - whatever it is: what is in force ends
            passed = stopped = 0
        lasted_s = now_s - self.began_s
        self.last = (self.action, self.rule, self.number, lasted_s, self.renewals, passed, stopped)
