"""What a response does on a board: connections and datagrams to peers that the device has not learned are refused, or
limited; those to known peers, and the agent's own, pass whatever is in force.

    from stonechat.board import full, guard
    watch = full.start(..., response=guard.respond(mode=ON))

It takes the place of the hook's methods (hooks.py) only while something is in force, ends by the clock even if the loop
does not run, and raises what the firmware would see where a network has no way there: EHOSTUNREACH from connect() and
sendto(), ECONNRESET from a stream. Attempts are counted all the same.
"""

import errno

from ..compat import const, ticks_add, ticks_diff, ticks_ms
from ..policy import DRY_RUN, OBSERVE, QUARANTINE, RULES
from ..response import MICROPYTHON_1, Response
from . import hooks

_RATE = const(4)  # calls a second to unknown peers under a throttle, and to those that came by themselves,
_BURST = const(8)  # after a pause
_CONN_OUT = const(1)  # columns, as in hooks.py
_UDP_OUT = const(18)


class Guard:
    """Enforcer (protocols.pyi). allow: addresses of hosts that are always reached. apply() raises OSError for a name
    that is not found."""

    def __init__(self, allow=()):
        self._allow = allow
        self._action = OBSERVE
        self._until_ms = self._last_ms = self._milli = 0
        self._kept = {}  # the hook's own methods
        self._keys: list = []
        self.passed = self.stopped = 0

    def apply(self, action: int, seconds: int) -> None:
        look_up = hooks.real_socket.getaddrinfo  # pyright: ignore[reportOptionalMemberAccess]
        self._keys = [hooks.active.meet(look_up(host, 0)[0][-1])[0] for host in self._allow]
        if not self._kept:
            for name in ("connect", "sendto", "send", "sendall", "write"):
                kept = getattr(hooks.socket, name, None)
                if kept is not None:
                    self._kept[name] = kept
                    setattr(hooks.socket, name, self._guarded(name, kept))
        self._action = action
        self._milli = _BURST * 1000
        self._last_ms = ticks_ms()
        self.passed = self.stopped = 0
        self.extend(seconds)

    def extend(self, seconds: int) -> None:
        self._until_ms = ticks_add(ticks_ms(), seconds * 1000)

    def release(self) -> None:
        for name in self._kept:
            setattr(hooks.socket, name, self._kept[name])
        self._kept = {}

    def counts(self) -> tuple:
        return self.passed, self.stopped

    def essential(self) -> bool:
        return True  # known peers are not touched

    close = release

    def _lets(self, key) -> bool:
        """Whether a call to this peer goes on; None: one that came by itself."""
        now_ms = ticks_ms()
        if ticks_diff(self._until_ms, now_ms) <= 0:
            self.release()
            return True
        active = hooks.active
        if key in active.known or key in self._keys or active.quiet == hooks.get_ident():
            return True
        lets = False
        if key is None or self._action != QUARANTINE:
            milli = self._milli + _RATE * min(ticks_diff(now_ms, self._last_ms), 10000)
            self._last_ms = now_ms
            lets = milli >= 1000
            self._milli = min(milli, _BURST * 1000) - 1000 * lets
        self.passed += lets
        self.stopped += not lets
        return lets

    def _guarded(self, name: str, kept):
        chosen = name in ("connect", "sendto")  # this call chooses the peer

        def call(me, *args):
            key = me._notes[0]
            port = None
            if chosen and args:
                key, port = hooks.active.meet(args[-1])
            if chosen and port is None or self._lets(key):
                return kept(me, *args)
            if chosen:
                hooks.active.add(_CONN_OUT if name == "connect" else _UDP_OUT, 0, key, port)
            error = errno.EHOSTUNREACH if chosen else errno.ECONNRESET
            hooks.active.failed(error)
            if args and hooks._asked_by_c(args[0]):
                return -error
            raise OSError(error)

        return call


def respond(mode: int = DRY_RUN, rules=RULES, allow=(), **options) -> Response:
    """A board's Response; allow: as for Guard; options: as Response takes them (hook, self_total_s, on_decision)."""
    return Response(Guard(allow), mode=mode, rules=rules, families={hooks.Columns.id: MICROPYTHON_1}, **options)
