"""Name look-ups that the agent's loop never waits for: each runs in a short-lived thread.

getaddrinfo() blocks for as long as the resolver's servers are silent (20 s and more with glibc's defaults), and an
attacker who drops DNS packets must not stop the scoring. The last good answer is kept: while the name can't be looked
up, it is tried in place of a new one.
"""

import _socket
import _thread

from ..compat import ticks_diff, ticks_ms
from ..mqtt import Backoff

MAX_ADDRESSES = 16  # of one name; more are left out
PATIENCE_MS = 2000  # for a new answer, where an old one is at hand
_STACK_BYTES = 262_144  # of the thread: musl's default is half of that, glibc's 8 MB


class Resolver:
    """host: a name or an address; module: whose sockets are used, socket for TLS, _socket (smaller) for plain TCP.

    What mqtt.Client takes as `socket`: getaddrinfo() gives the one address to try next, at once, once ready() is true.
    Addresses are tried in the order of the answer, the least tried first, so that each is tried however the name
    server rotates them."""

    SOCK_STREAM = _socket.SOCK_STREAM

    def __init__(self, host: str, port: int, module) -> None:
        self.socket = module.socket
        # The codec takes 1 MB, and is a file that can't be read any more once the user has been changed.
        self.host = host.encode() if host.isascii() else host.encode("idna")
        self._port = port
        self._answer: list = []  # (family, socket address)
        self._tried: dict = {}  # socket address: how often, since one of them worked
        self._attempts = 0  # in this round through the answer
        self._current = None
        self._error: OSError | None = None  # of the last look-up, None where it succeeded
        self._looking = False
        self._fresh = False  # the answer is of a look-up made for the next attempt
        self._result: list = []  # what the thread leaves
        self._began_ms = 0
        address = literal(host, port)
        self._literal = address is not None
        if address is not None:
            self._answer = [address]

    @property
    def addresses(self) -> list:
        """The last good answer: texts."""
        return [address[0] for _, address in self._answer]

    def ready(self) -> bool:
        """Is there an address to try, or an error to report? Starts a look-up where none runs; never waits."""
        if self._literal:
            return True
        if self._looking and self._result:
            self._looking = False
            self._take(self._result.pop())
        if self._fresh:
            return True
        if not self._looking:
            self._start()
        return self._fresh or bool(self._answer) and ticks_diff(ticks_ms(), self._began_ms) >= PATIENCE_MS

    def getaddrinfo(self, *_) -> list:
        """-> [(family, type, 0, "", socket address)], the one to try now. Raises OSError where the name was never
        found."""
        self._fresh = False
        if not self._answer:
            self._attempts = 0
            raise self._error or OSError("no address yet")
        family, address = min(self._answer, key=self._times_tried)  # the first of those least tried
        self._tried[address] = self._tried.get(address, 0) + 1
        self._current = address
        self._attempts += 1
        return [(family, self.SOCK_STREAM, 0, "", address)]

    @property
    def round_over(self) -> bool:
        """False while the answer has addresses that this round has not tried."""
        if self._attempts < len(self._answer):
            return False
        self._attempts = 0
        return True

    def worked(self) -> None:
        """The address tried last is good: it comes first next time."""
        self._tried = {self._current: -1}
        self._attempts = 0

    def _times_tried(self, entry: tuple) -> int:
        return self._tried.get(entry[1], 0)

    def _start(self) -> None:
        self._began_ms = ticks_ms()
        self._looking = True
        before = _thread.stack_size(_STACK_BYTES)
        try:
            _thread.start_new_thread(self._look_up, ())
        except RuntimeError as error:  # a limit on tasks
            self._looking = False
            self._take(OSError("can't start a thread to look the name up: %s" % error))
        finally:
            _thread.stack_size(before)

    def _look_up(self) -> None:
        """In the thread: touches nothing but _result."""
        try:
            self._result.append(_socket.getaddrinfo(self.host, self._port, 0, self.SOCK_STREAM))
        except OSError as error:
            self._result.append(error)
        except Exception as error:  # noqa: BLE001 - whatever it is, the loop must get an answer
            self._result.append(OSError(str(error)))

    def _take(self, result) -> None:
        self._fresh = True
        if isinstance(result, OSError):
            self._error = result
            return
        self._error = None
        self._answer = list(dict.fromkeys([(entry[0], entry[4]) for entry in result]))[:MAX_ADDRESSES]
        addresses = [entry[1] for entry in self._answer]
        self._tried = {address: count for address, count in self._tried.items() if address in addresses}


class RoundBackoff(Backoff):
    """Doubles its wait after each round through the addresses of a name; the next address is tried within a second."""

    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver
        Backoff.__init__(self)
        self.silent = False  # the last failure was not that of a whole round

    def failed(self) -> None:
        self.silent = not self._resolver.round_over
        if not self.silent:
            Backoff.failed(self)
            return
        span_ms = self._span_ms
        Backoff.worked(self)
        Backoff.failed(self)
        self._span_ms = span_ms

    def worked(self) -> None:
        self._resolver.worked()
        Backoff.worked(self)


def literal(host: str, port: int):
    """(family, socket address) of an address written in numbers, None for a name."""
    for family in (_socket.AF_INET, _socket.AF_INET6):
        try:
            _socket.inet_pton(family, host)
        except (OSError, ValueError):
            continue
        return (family, (host, port)) if family == _socket.AF_INET else (family, (host, port, 0, 0))
    return None
