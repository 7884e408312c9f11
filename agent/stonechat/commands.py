"""Commands of an operator: checked, carried out here or by an action of the agent, and only then answered.

A command is authentic (delivery.py has verified it), numbered and has an expiry, so that it is carried out once and
not late. Mute, maintenance and "report now" are carried out here; `actions` has what the agent adds.
"""

from struct import pack, unpack

from .compat import const
from .cose_open import is_count
from .errors import StonechatError, WireError

# Codes of commands: stonechat.cddl names them.
_MUTE = const(1)  # [until]: changes of level are not reported until then; heartbeats go on
_MAINTENANCE = const(2)  # [until]: everything is reported, flagged as maintenance
WAS_NORMAL = const(3)  # [sequence number of the report]
CALIBRATE = const(4)
_REPORT_NOW = const(5)
STOP_RESPONDING = const(6)
RELEASE = const(7)  # [], or [number of the lease]
OWN_MODEL = const(8)  # [1]: make the device's own model again; [0]: forbid it
RENEW = const(9)  # [number of the lease]
RESPOND = const(10)  # after STOP_RESPONDING

_ACCEPTED = const(0)
_NOT_SUPPORTED = const(1)
_EXPIRED = const(2)
_BAD_ARGUMENTS = const(3)
_CLOCK_UNSET = const(4)
_FAILED = const(5)

_LIFE_S = const(86_400)  # no command expires later than that


class WrongArguments(StonechatError):
    """An action can't be carried out with these arguments."""


class Commands:
    """state: remembers the number of the last command across restarts, None: nothing does. actions: {code: function}
    of what the agent carries out; each is called with the list of arguments. mute_until_s, maintenance_until_s: in
    seconds since this start, which no change of the clock moves; report_now: an operator waits for a report."""

    def __init__(self, state) -> None:
        self.actions: dict = {}
        self.mute_until_s = 0
        self.maintenance_until_s = 0
        self.report_now = False
        self.unsaved = 0  # numbers of commands that the state could not save
        self._state = state
        self._last = unpack("<I", state.get(b"command", bytes(4)))[0] if state else 0

    def carry_out(self, fields: dict, now_s: int, uptime_s: int) -> tuple:
        """fields: of an authentic command; now_s: Unix seconds, 0 where that is not known -> (its number, the result of
        the wire). Raises WireError for one that is malformed or was heard before."""
        sequence: int = fields.get(1, -1)
        expires_s = fields.get(2)
        code = fields.get(3)
        arguments = fields.get(4, [])
        for value in (sequence, expires_s, code):
            if not is_count(value):
                raise WireError
        if not isinstance(arguments, list) or sequence <= self._last:
            raise WireError
        self._last = sequence
        if self._state is not None:
            self._state.put(b"command", pack("<I", sequence))
            try:
                self._state.save()
            except StonechatError:  # then only its expiry keeps it from being repeated after a restart
                self.unsaved += 1
        return sequence, self._result(code, arguments, expires_s, now_s, uptime_s)

    def _result(self, code, arguments, expires_s, now_s, uptime_s) -> int:
        if not now_s:
            return _CLOCK_UNSET
        if now_s > expires_s or expires_s > now_s + _LIFE_S:
            return _EXPIRED
        if code in (_MUTE, _MAINTENANCE):
            if len(arguments) != 1 or not is_count(arguments[0]):
                return _BAD_ARGUMENTS
            until_s = uptime_s + arguments[0] - now_s
            if code == _MUTE:
                self.mute_until_s = until_s
            else:
                self.maintenance_until_s = until_s
        elif code == _REPORT_NOW:
            self.report_now = True
        elif code in self.actions:
            try:
                self.actions[code](arguments)
            except WrongArguments:
                return _BAD_ARGUMENTS
            except (StonechatError, OSError):
                return _FAILED
        else:
            return _NOT_SUPPORTED
        return _ACCEPTED
