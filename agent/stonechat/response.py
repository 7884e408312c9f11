"""The response to alarms: policy.py decides, a Lease carries it out for a bounded time, and every decision is reported.

    agent = Agent(..., response=Response(enforcer, mode=ON))

An operator's commands reach it: release, stop responding (which lasts until the command to respond again, also across a
restart) and renew. The collector's renewals are sealed with a key of their own. While the operator has announced
maintenance or muted the device, decisions are recorded and not carried out.
"""

from .commands import RELEASE, RENEW, RESPOND, STOP_RESPONDING, WrongArguments
from .compat import const
from .cose_open import is_count
from .errors import WireError
from .lease import CLOSED, EXPIRED, RELEASED, REPLACED, STOPPED, SWITCHED_OFF, Lease, LeaseRefused, Nothing
from .policy import DRY_RUN, HOOK, ON, QUARANTINE, RULES, THROTTLE, History, check, decide, families_of, seconds_of

# Kinds of a decision in a report; stonechat.cddl describes them.
BEGAN = const(0)
ENDED = const(1)
FAILED = const(2)

_BLIND_S = const(30)
_FEATURES = const(6)  # of an explanation, that name families
_MOST = const(0xFFFFFFFF)
_SECTION = b"respond"  # of the state: b"\0" after "stop responding"

# The families of micropython-1's columns: the network, files, the machine.
MICROPYTHON_1 = b"\x01" * 19 + b"\x04\x04\x08\x08"


def _nothing(action, families, verdict) -> None:
    pass


class Response:
    """enforcer: an Enforcer (protocols.pyi), None: nothing acts on the network; mode, rules: policy.py's; families: by
    schema id, the family of each feature; sent: index of the column of the device's own channel that counts what it
    sends, -1: none; self_total_s: how long the device may keep itself in without anybody's renewal, in one alarm;
    hook(action, families, verdict): the vendor's own, what it raises is recorded; on_decision(decision): for a log.
    Raises ConfigError for rules out of range, OSError where the enforcer can't open what was left behind."""

    def __init__(
        self,
        enforcer=None,
        *,
        mode: int = DRY_RUN,
        rules=RULES,
        families=None,
        sent: int = 16,
        self_total_s: int = 0,
        hook=None,
        on_decision=None,
    ) -> None:
        check(rules)
        self.mode = mode
        self.rules = rules
        self.enforcer = enforcer
        self.hook = hook
        self.on_decision = on_decision
        self.history = History(rules)
        self.real = Lease(enforcer or Nothing(), self_total_s)
        self.dry = Lease(Nothing(), self_total_s)
        self.stopped = False
        self.decisions = 0
        self._families = families or {}
        self._sent = sent
        self._sent_now = 0  # in the last window,
        self._before = 0  # in the one in which the lease began,
        self._after = self._windows = 0  # in all since, and how many these are
        self._level = 0  # of the last window,
        self._level_s = 0  # and when that was
        self._turned_s = 0
        self._hook_rule = 0

    def attach(self, agent) -> None:
        """To be called by the agent that it belongs to."""
        self._agent = agent
        self._reporter = agent.reporter
        agent.reporter.on_renewal = self._on_renewal
        actions = agent.reporter.commands.actions
        actions[STOP_RESPONDING] = self._stop
        actions[RELEASE] = self._release
        actions[RENEW] = self._renew
        actions[RESPOND] = self._respond
        self.stopped = agent.state.get(_SECTION) == b"\0"

    def follow(self, rules, only_check: bool = False) -> None:
        """Decide by other rules from now on, those of a release; a lease that is in force goes on. only_check: change
        nothing. Raises ConfigError for rules out of range."""
        check(rules)
        if not only_check and rules != self.rules:
            self.rules = rules
            self.history = History(rules)
            self.real.forget()  # its rule may be another one now
            self.dry.forget()

    @property
    def acting(self) -> bool:
        """Whether what is decided now is carried out."""
        commands = self._reporter.commands
        until_s = max(commands.mute_until_s, commands.maintenance_until_s)
        return self.mode == ON and not self.stopped and self._reporter.uptime_s >= until_s

    @property
    def status(self) -> list:
        """For the status: mode, whether an operator has stopped it, action and number of the lease that is in force,
        seconds left of it, decisions since the start, renewals refused since the start."""
        real = self.real
        left_s = max(0, real.until_s - self._reporter.uptime_s) if real.action else 0
        number = real.number if real.action else 0
        return [self.mode, int(self.stopped), real.action, number, left_s, self.decisions, real.refused]

    # --- the agent's windows and turns ------------------------------------------------------------------------------

    def window(self, verdict) -> None:
        """After each scored window."""
        self._level = verdict.level
        self._level_s = self._reporter.uptime_s
        if self._sent >= 0:
            self._sent_now = self._agent.channels[0].window.deltas[self._sent]
        if self.real.action or self.dry.action:
            self._after += self._sent_now
            self._windows += 1
        families = 0
        if verdict.level:
            channel = self._agent.channels[getattr(verdict, "channel", 0)]
            table = self._families.get(channel.collector.schema.id, b"")
            families = families_of(verdict.explain(_FEATURES), table)
        else:
            self.real.forget()
            self.dry.forget()
        for number in decide(self.rules, self.history, verdict.level, families):
            action = self.rules[number][0]
            if action in (THROTTLE, QUARANTINE):
                self._lease(number, families, verdict)
            else:
                self._once(number, families, verdict)
        now_s = self._reporter.uptime_s
        for lease in (self.real, self.dry):
            if lease.may_repeat(now_s, verdict.level) and (lease is self.dry or self.acting):
                self._begin(lease, lease.rule, lease.last[0], lease.seconds, families, verdict, True)

    def turn(self) -> None:
        """To be called often: what has ended by itself is recorded."""
        now_s = self._reporter.uptime_s
        if now_s != self._turned_s:
            self._turned_s = now_s
            for lease in (self.real, self.dry):
                if lease.action and now_s >= lease.until_s:
                    self._end(lease, EXPIRED)

    def was_normal(self) -> None:
        """An operator has marked the alarm as normal."""
        self._open(RELEASED)

    def switch_off(self) -> None:
        """The user has switched monitoring off."""
        self._end(self.real, SWITCHED_OFF)
        self._end(self.dry, SWITCHED_OFF)

    def close(self) -> None:
        """The agent ends: nobody would renew. Errors are not raised: the enforcer's own timeout ends it."""
        self._end(self.real, CLOSED)
        if self.enforcer is not None:
            try:
                self.enforcer.close()
            except OSError:
                pass

    def _lease(self, number: int, families: int, verdict) -> None:
        rule = self.rules[number]
        history = self.history
        lease = self.real if self.acting and self.enforcer is not None else self.dry
        if lease is self.dry and self.real.action:
            return  # it began before the maintenance: it ends by itself
        ago_s = self._reporter.uptime_s - history.last_s[number]
        seconds = seconds_of(rule, history.leases[number], ago_s)
        self._begin(lease, number, rule[0], seconds, families, verdict, False)

    def _begin(self, lease, number: int, action: int, seconds: int, families: int, verdict, again: bool) -> None:
        now_s = self._reporter.uptime_s
        weaker = lease.action
        try:
            lease.begin(number, action, seconds, now_s, again)
        except LeaseRefused:
            return  # it is due again in the next window
        except OSError as error:
            self.history.carried_out(number, now_s)
            self._record([FAILED, action, 1, number, 0, error.errno or 0], verdict)
            if weaker:
                self._record_end(lease, CLOSED)
            return
        if weaker:
            self._record_end(lease, REPLACED)
        if lease is self.real:
            self._end(self.dry, REPLACED)
        self._before = self._sent_now
        self._after = self._windows = 0
        self.history.carried_out(number, now_s)
        self._record([BEGAN, action, int(lease is self.real), number, lease.number, seconds, families], verdict)

    def _once(self, number: int, families: int, verdict) -> None:
        """A decision without a lease: an alert of its own, or the vendor's hook."""
        action = self.rules[number][0]
        hook = self.hook if action == HOOK else _nothing
        self.history.carried_out(number, self._reporter.uptime_s)
        if hook is None:
            return
        done = self.acting
        self._record([BEGAN, action, int(done), number, 0, 0, families], verdict)
        if done:
            self._hook_rule = number
            try:
                hook(action, families, verdict)
            except Exception as error:  # noqa: BLE001 - a vendor's: the response goes on without it
                self.hook_failed(getattr(error, "errno", None) or 0)

    def hook_failed(self, code: int) -> None:
        """The vendor's hook that was called last has not worked; code: its exit status, or an errno."""
        self._record([FAILED, HOOK, 1, self._hook_rule, 0, code], None)

    def _end(self, lease, cause: int) -> None:
        if lease.action:
            try:
                lease.end(self._reporter.uptime_s)
            except OSError as error:
                self._record([FAILED, lease.last[0], 1, lease.rule, lease.number, error.errno or 0], None)
            self._record_end(lease, cause)

    def _record_end(self, lease, cause: int) -> None:
        action, rule, number, lasted_s, renewals, passed, stopped = lease.last
        after = self._after // self._windows if self._windows else 0
        head = [ENDED, action, int(lease is self.real), rule, number, lasted_s, cause, renewals]
        self._record(head + [min(count, _MOST) for count in (passed, stopped, self._before, after)], None)

    def _record(self, decision: list, verdict) -> None:
        self.decisions += decision[0] == BEGAN
        reporter = self._reporter
        if decision[2] or reporter.uptime_s >= reporter.commands.mute_until_s:
            reporter.decided(decision, verdict)
        if decision[2]:
            self._agent.announce()
        if self.on_decision is not None:
            self.on_decision(decision)

    # --- commands and renewals --------------------------------------------------------------------------------------

    def _stop(self, arguments) -> None:
        self._take(arguments, ())
        self._open(STOPPED)  # first: also where the medium refuses
        self._remember(True)

    def _respond(self, arguments) -> None:
        self._take(arguments, ())
        self._remember(False)

    def _release(self, arguments) -> None:
        """[] whatever is in force, or [number] that lease only."""
        if arguments:
            self._take(arguments, (self.real.number, self.dry.number))
        self._open(RELEASED)

    def _renew(self, arguments) -> None:
        """[number of the lease]; the command's own number has been checked. Raises LeaseRefused."""
        if len(arguments) != 1:
            raise WrongArguments
        self._renewed(arguments[0], None)

    def _on_renewal(self, fields: dict, now_s: int) -> None:
        """The map of an authentic renewal of the collector: as a command; now_s: Unix seconds, 0 where that is not
        known. One that the lease refuses is counted. Raises WireError for one that is malformed or comes late."""
        number: int = fields.get(1, -1)
        expires_s: int = fields.get(2, -1)
        arguments = fields.get(4)
        if not (is_count(number) and is_count(expires_s) and fields.get(3) == RENEW and isinstance(arguments, list)):
            raise WireError
        if len(arguments) != 1 or not now_s or not now_s <= expires_s <= now_s + 86_400:
            raise WireError
        try:
            self._renewed(arguments[0], number)
        except LeaseRefused:
            pass  # counted
        except OSError as error:
            lease = self.real
            self._record([FAILED, lease.action, 1, lease.rule, lease.number, error.errno or 0], None)

    def _renewed(self, lease, number) -> None:
        now_s = self._reporter.uptime_s
        blind_s = (
            now_s - self._level_s - 3 * self._agent.window_ms // 1000
        )  # without a scored window there is no evidence
        for one in (self.real, self.dry):
            if one is self.real and one.action and not self.acting:
                one.refused += 1
                raise LeaseRefused("maintenance")
            if one.action:
                level = self._level if blind_s <= _BLIND_S else 0
                one.renew(lease, number, now_s, level)
                return
        self.real.refused += 1
        raise LeaseRefused("not in force")

    def _take(self, arguments, wanted) -> None:
        if len(arguments) != min(1, len(wanted)) or wanted and arguments[0] not in wanted:
            raise WrongArguments

    def _open(self, cause: int) -> None:
        """Open, and begin nothing more in this alarm."""
        for lease in (self.real, self.dry):
            self._end(lease, cause)
            lease.forget()
        for i in range(len(self.rules)):
            self.history.done[i] = True

    def _remember(self, stopped: bool) -> None:
        """Raises StateError where the medium refuses; it holds until the next start then."""
        self.stopped = stopped
        state = self._agent.state
        state.put(_SECTION, b"\0" if stopped else b"\1")
        self._agent.announce()
        state.save()
