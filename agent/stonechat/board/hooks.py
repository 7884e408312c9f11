"""Counts what the firmware does through socket, asyncio, ssl, open and getaddrinfo. First in boot.py:

    from stonechat.board import hooks
    hooks.install()             # hooks.remove() turns it off again

Every later `import socket` gets a module whose sockets pass each call on, unchanged in result and exception, and count
it. A socket that was made before, or a `from socket import socket` that ran before, is not seen. While `quiet` is set
(the agent at work) nothing is counted. install() returns the board's collector; schema.py names its columns.

A peer becomes known after 12 windows in which it was seen, not at first sight: a beacon stays new for that long, and a
scan, which never meets a peer twice, teaches nothing. At most 48 are remembered; the longest unseen is dropped.
"""

import builtins
import errno
import io
import os
import select
import socket
import sys
from struct import pack, unpack

from ..compat import const, mem_alloc, mem_free, sha256, ticks_diff
from ..errors import CollectorError

_MAX_KNOWN = const(48)
_MAX_CANDIDATES = const(48)
_KNOWN_AFTER = const(12)  # windows
_MAX_SEEN = const(64)  # peers and ports distinguished in one window
_MASK = const(0x3FFFFFFF)  # counters wrap as small ints do: no big int is ever made

# places in `counts`, in the order of schema.COLUMNS
_SOCKETS = const(0)
_CONN_OUT = const(1)
_REFUSED = const(2)
_UNANSWERED = const(3)
_MUTE = const(4)
_CONN_IN = const(5)
_LISTENS = const(6)
_LOOKUPS = const(7)
_LOOKUP_FAIL = const(8)
_PEERS = const(9)
_NEW_PEERS = const(10)
_NEW_PEER_BYTES = const(11)
_DPORTS = const(12)
_BYTES_IN = const(13)
_BYTES_OUT = const(14)
_READS = const(15)
_WRITES = const(16)
_MEAN_WRITE = const(17)
_UDP_OUT = const(18)
_OPENS = const(19)
_OPENS_WRITE = const(20)
_HEAP_FREE = const(21)
_LOOP_LAG = const(22)

_POLL = const(3)  # what the stream protocol asks a Python object through ioctl
_CLOSE = const(4)
_FILENO = const(10)


class Columns:
    """schema.MICROPYTHON_1 without the names and units, which take a kilobyte; a test holds the two together."""

    name = "micropython-1"
    id = b"\xf1\x01\xd4\xec\x11\x16\xf2\x38"
    kinds = tuple([("rate", "level", "share")[int(kind)] for kind in "00000000010010000100021"])

    def __len__(self):
        return len(self.kinds)


class FirmwareCollector:
    """What was counted since the hook was installed, the peers and ports of this window, and the peers learned.
    `secret`: bytes of this device, so that learned peers mean nothing elsewhere; set it before the first window."""

    schema = Columns()
    sources = (("firmware", "hook", ""), ("heap", "gc", ""))

    def __init__(self):
        self.counts = [0] * len(self.schema)
        self.quiet = False
        self.secret = os.urandom(16)
        self.known = {}  # peers that the device has learned: key -> window in which it was last seen
        self.hold = False  # True while the device is under suspicion: nobody becomes known
        self._candidates = {}  # key -> windows in which it was seen
        self._window = 0
        self._peers = {}  # of this window: key -> whether it is one to be learned
        self._ports = {}
        self._sent = self._writes = 0  # as of the window before
        self._lag_ms = 0
        self._beat_ms = None
        self._last = None  # the last address and its key: a flood needs no second hash
        self._last_key = None

    def read(self, values):
        """Fill `values` (len(schema) ints) and begin the next window."""
        values[:] = self.counts
        values[_PEERS] = len(self._peers)
        values[_DPORTS] = len(self._ports)
        writes = values[_WRITES] - self._writes & _MASK
        if writes:
            values[_MEAN_WRITE] = (values[_BYTES_OUT] - self._sent & _MASK) // writes
        self._sent = values[_BYTES_OUT]
        self._writes = values[_WRITES]
        free = mem_free()
        whole = free + mem_alloc()
        while whole > 40000:  # times 25600 must stay a small int
            free >>= 1
            whole >>= 1
        values[_HEAP_FREE] = free * 25600 // whole if whole else 0  # percent in Q8
        values[_LOOP_LAG] = self._lag_ms
        self._window += 1
        for key in self._peers:
            self._sighted(key)
        self._peers.clear()
        self._ports.clear()
        self._last = None
        self._lag_ms = 0

    def hold_peers(self, hold):
        """True while the device is under suspicion: no peer becomes known."""
        self.hold = hold

    def _sighted(self, key):
        known = self.known
        candidates = self._candidates
        if key in known:
            known[key] = self._window
        elif not self.hold:
            windows = candidates.pop(key, 0) + 1
            if windows >= _KNOWN_AFTER:
                if len(known) >= _MAX_KNOWN:
                    del known[min(known, key=known.get)]  # type: ignore[arg-type]  # all are there
                known[key] = self._window
                return
            if len(candidates) >= _MAX_CANDIDATES:
                candidates.popitem()
            candidates[key] = windows

    def dump(self):
        """The known peers for the state, four bytes each."""
        return b"".join([pack(">I", key) for key in sorted(self.known)])

    def restore(self, packed):
        """packed: what dump() gave. Raises CollectorError for anything else."""
        if len(packed) % 4 or len(packed) > 4 * _MAX_KNOWN:
            raise CollectorError("learned peers: %d bytes" % len(packed))
        self.known.clear()
        for at in range(0, len(packed), 4):
            self.known[unpack(">I", packed[at : at + 4])[0] & _MASK] = 0

    def close(self):
        """Take the hook out."""
        remove()

    def add(self, place, number=1):
        if not self.quiet:
            self.counts[place] = self.counts[place] + number & _MASK

    def beat(self, now_ms):
        """Once a turn of the main loop: how long did the turn take?"""
        if self._beat_ms is not None:
            self._lag_ms = max(self._lag_ms, ticks_diff(now_ms, self._beat_ms))
        self._beat_ms = now_ms

    def meet(self, address):
        """A peer is connected or sent to -> its key, None while quiet."""
        if self.quiet:
            return None
        if address == self._last:
            return self._last_key
        host, port = split(address)
        if len(self._ports) < _MAX_SEEN:
            self._ports[port] = None
        digest = sha256(self.secret + host).digest()
        self._last = address
        self._last_key = key = unpack(">I", digest[:4])[0] & _MASK
        self.seen(key)
        return key

    def seen(self, key):
        """Note a peer of this window -> whether it is one that the device has not learned."""
        new = key not in self.known
        if key not in self._peers:
            if len(self._peers) < _MAX_SEEN:
                self._peers[key] = new
            if new:
                self.add(_NEW_PEERS)  # beyond _MAX_SEEN in one window each meeting counts
        return new

    def call(self, function, *args):
        """function(*args), unchanged in result and exception; an OSError of a socket is looked at on its way."""
        try:
            return function(*args)
        except OSError as error:
            number = error.errno
            if number in (errno.ECONNREFUSED, errno.ECONNRESET):
                self.add(_REFUSED)
            elif number in (errno.ETIMEDOUT, errno.EHOSTUNREACH):
                self.add(_UNANSWERED)
            raise


def split(address):
    """address: (host, port, ...) as boards have it, or the unix port's packed sockaddr -> (host bytes, port)."""
    if isinstance(address, tuple):
        host = address[0]
        return host.encode() if isinstance(host, str) else bytes(host), address[1]
    raw = bytes(address)
    return raw[4:8] if raw[0] == 2 else raw[8:24] or raw, raw[2] << 8 | raw[3] if len(raw) > 3 else 0


active: FirmwareCollector = None  # type: ignore[assignment]  # from the first install() on
real_socket = socket  # without the hook: for the agent's own connection
_open = builtins.open


def install():
    """Put the hook in place -> its FirmwareCollector. A second call changes nothing."""
    global active
    if open is not _opened:
        active = FirmwareCollector()
        names = {name: getattr(real_socket, name) for name in dir(real_socket) if name[:2] != "__"}
        names["getaddrinfo"] = _getaddrinfo
        names["socket"] = Socket
        _put(type("socket", (), names), _opened)
    return active


def remove():
    """Take the hook out. Sockets that were made under it go on working."""
    if open is _opened:
        _put(real_socket, _open)


def _put(module, opener):
    sys.modules["socket"] = sys.modules["usocket"] = module
    builtins.open = opener


def _opened(*args, **options):
    active.add(_OPENS)
    mode = args[1] if len(args) > 1 else options.get("mode", "r")
    if isinstance(mode, str) and mode.strip("rbt"):
        active.add(_OPENS_WRITE)
    return _open(*args, **options)


def _getaddrinfo(*args):
    active.add(_LOOKUPS)
    try:
        return real_socket.getaddrinfo(*args)
    except OSError:
        active.add(_LOOKUP_FAIL)
        raise


class Socket(io.IOBase):
    """Replaces socket.socket. It is an IOBase, because ssl, select and asyncio reach a stream through its C
    protocol, which only that class passes on to Python."""

    _poller = None
    _key = None  # of the peer that this device chose, None for one that came by itself
    _mute = False  # connected out, and nothing has come back

    def __init__(self, *args):
        if len(args) == 1 and isinstance(args[0], real_socket.socket):
            self._real = args[0]  # from accept()
        else:
            self._real = real_socket.socket(*args)
            active.add(_SOCKETS)

    def connect(self, address):
        active.add(_CONN_OUT)
        self._key = active.meet(address)
        try:
            self._mute = not active.quiet
            return active.call(self._real.connect, address)
        except OSError as error:
            if error.errno != errno.EINPROGRESS:
                self._mute = False  # it has failed: that was counted
            raise

    def accept(self):
        stream, address = self._real.accept()
        active.add(_CONN_IN)
        return Socket(stream), address

    def listen(self, *args):
        active.add(_LISTENS)
        return self._real.listen(*args)

    def close(self):
        if self._mute:
            self._mute = False
            active.add(_MUTE)
        return self._real.close()

    def makefile(self, *args):
        return self

    def ioctl(self, request, argument):
        if request == _POLL:
            if self._poller is None:
                self._poller = select.poll()
            self._poller.register(self._real, argument)
            for _, ready in self._poller.poll(0):
                return ready
            return 0
        if request == _CLOSE:
            self.close()
            return 0
        if request == _FILENO and hasattr(self._real, "fileno"):
            return self._real.fileno()  # pyright: ignore[reportAttributeAccessIssue]  # where the port has it
        return -errno.EINVAL

    def __getattr__(self, name):  # setblocking, settimeout, setsockopt, bind, fileno and what a port adds
        return getattr(self._real, name)


def _through(name):
    """The method `name` of Socket, of those that move data."""

    def call(self, *args):
        if name == "sendto":
            active.add(_UDP_OUT)
            self._key = active.meet(args[-1])
        got = active.call(getattr(self._real, name), *args)
        size = args[0] if name == "sendall" else got[0] if name == "recvfrom" else got
        if size and not active.quiet:
            if not isinstance(size, int):
                size = len(size)
            if name[0] == "r":
                self._mute = False
                active.add(_READS)
                active.add(_BYTES_IN, size)
            else:
                active.add(_WRITES)
                active.add(_BYTES_OUT, size)
                if self._key is not None and active.seen(self._key):
                    active.add(_NEW_PEER_BYTES, size)
        return got

    return call


for _name in ["write", "send", "sendto", "sendall", "read", "recv", "recvfrom", "readline", "readinto"]:
    if hasattr(real_socket.socket, _name):
        setattr(Socket, _name, _through(_name))
