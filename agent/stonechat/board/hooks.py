"""Counts what the firmware does through socket, asyncio, ssl, open and getaddrinfo. First in boot.py:

    from stonechat.board import hooks
    hooks.install()             # hooks.remove() turns it off again

Every later `import socket` gets a module whose sockets pass each call on, unchanged in result and exception, and count
it. A socket that was made before, or a `from socket import socket` that ran before, is not seen. What the agent itself
does, in the thread that `quiet` names, is not counted. install() returns the board's collector; schema.py names
its columns.

Threads of a port without a global lock (RP2040) run side by side: what two of them may change is changed under `_lock`
only. A callback that the scheduler runs in the middle of that, in the same thread, goes on without the lock.

A peer becomes known after 12 windows in which it was seen, not at first sight: a beacon stays new for that long, and a
scan, which never meets a peer twice, teaches nothing. At most 48 are remembered; the longest unseen is dropped.
"""

import builtins
import errno
import io
import os
import sys
from struct import pack, unpack

from ..compat import const, mem_alloc, mem_free, sha256, ticks_diff
from ..errors import CollectorError
from . import hooked_socket

try:
    import select
    import socket as _socket
except ImportError:  # a board without a network: files, memory and the lag of its loop remain
    _socket = None  # type: ignore[assignment]

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

_KEY = const(0)  # places in a socket's notes: of the peer that this device chose, None for one that came by itself
_MUTE_SO_FAR = const(1)  # connected out, and nothing has come back
_POLLER = const(2)

_FRAMES = const(1600)  # bytes of C stack from a caller of the stream protocol to _asked_by_c: 752 on ARM, 1360 on x64


class _Aside(io.IOBase):
    """A stream that notes where the bytes for it lie."""

    at = 0

    def write(self, data):
        self.at = id(data)
        return len(data)


try:
    from _thread import allocate_lock
    from _thread import get_ident as get_ident

    _lock = allocate_lock()
    _acquire = _lock.acquire
    _release = _lock.release
except ImportError:  # a port without threads

    def get_ident() -> int:
        return 1

    _acquire = _release = get_ident  # type: ignore[assignment]


int = int  # noqa: A001, PLW0127 - a port looks through its built-ins one by one
isinstance = isinstance  # noqa: A001, PLW0127
real_socket = _socket  # without the hook: for the agent's own connection
_unlocked = _Aside()  # also what no firmware hands in: before what accept() gave, and for no argument at all
_nobody = (_unlocked, None, (None, None))


class Columns:
    """schema.MICROPYTHON_1 without the names and units, which take a kilobyte; a test holds the two together."""

    name = "micropython-1"
    id = b"\xf1\x01\xd4\xec\x11\x16\xf2\x38"
    kinds = ["rate"] * 23
    kinds[9] = kinds[12] = kinds[17] = kinds[22] = "level"
    kinds[21] = "share"

    def __len__(self):
        return len(self.kinds)


class FirmwareCollector:
    """What was counted since the hook was installed, the peers and ports of this window, and the peers learned.
    `secret`: bytes of this device, so that learned peers mean nothing elsewhere; set it before the first window."""

    schema = Columns()
    sources = (("firmware", "hook", ""), ("heap", "gc", ""))

    def __init__(self):
        self.counts = [0] * len(self.schema)
        self.quiet: int | None = None  # the thread in which the agent is at work
        self._owner: int | None = None  # the thread that has _lock
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
        self._free = 0
        self._heap = (mem_free() + mem_alloc() >> 4) or 1  # CPython has none
        self._last: tuple = _nobody  # the last address if it can't change, its host, what it met

    def read(self, values):
        """Fill `values` (len(schema) ints) and begin the next window."""
        me = get_ident()
        own = me != self._owner
        if own:
            _acquire()
            self._owner = me
        try:
            values[:] = self.counts
            values[_PEERS] = len(self._peers)
            values[_DPORTS] = len(self._ports)
            self._window += 1
            for key in self._peers:
                self._sighted(key)
            self.contacts = self._peers
            self._peers = {}
            self._ports = {}
            self._last = _nobody  # it was met with another secret perhaps
        finally:
            if own:
                self._owner = None
                _release()
        writes = values[_WRITES] - self._writes & _MASK
        if writes:
            values[_MEAN_WRITE] = (values[_BYTES_OUT] - self._sent & _MASK) // writes
        self._sent = values[_BYTES_OUT]
        self._writes = values[_WRITES]
        self._free = -self._free
        values[_LOOP_LAG] = self._lag_ms
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
        return pack(">%dI" % len(self.known), *sorted(self.known))

    def restore(self, packed):
        """packed: what dump() gave. Raises CollectorError for anything else."""
        number = len(packed) // 4
        if number > _MAX_KNOWN or len(packed) != 4 * number:
            raise CollectorError("learned peers: damaged")
        self.known = {key & _MASK: 0 for key in unpack(">%dI" % number, packed)}  # a new one: other threads look it up

    def close(self):
        """Take the hook out."""
        remove()

    def beat(self, now_ms):
        """Once a turn of the main loop: how long did the turn take? The first turn of a window looks at the free heap:
        that takes a large heap as long as all the rest of a window does. What counts is the heap that the last
        collection has left free: in a large one hours may pass until the next, and what is free falls all that time."""
        last_ms = self._beat_ms
        self._beat_ms = now_ms
        if last_ms is not None:
            last_ms = ticks_diff(now_ms, last_ms)
            if last_ms > self._lag_ms:
                self._lag_ms = last_ms
        if self._free <= 0:  # the last look, negative while this window has had none
            free = mem_free()
            if free > -self._free:  # more than then: collected since; in percent Q8, a small int below 650 KB
                self.counts[_HEAP_FREE] = (free >> 4) * 25600 // self._heap
            self._free = free

    def meet(self, address):
        """address: whatever connect() or sendto() was given, (host, port) as boards have it or the unix port's packed
        sockaddr -> (key, port); (None, None) for anything else: the call itself says what is wrong with it."""
        try:
            _, last, met = self._last
            host, port = address[:2]
            if isinstance(address, (bytes, bytearray)):
                host = bytes(address[4:8] if host == 2 else address[8:24]) or bytes(address)
                port = address[2] << 8 | address[3]
            key = met[0]
            if type(last) is not type(host) or last != host:
                digest = sha256(self.secret + (host.encode() if isinstance(host, str) else host)).digest()
                key = unpack(">I", digest[:4])[0] & _MASK
            met = key, port & 0xFFFF
            self._last = address if isinstance(address, tuple) else _unlocked, host, met
            return met
        except Exception:  # of a kind that the address chose, or no memory
            return None, None

    def add(self, place, size=0, key=None, port=None):
        """One more in `place`. size: of a read or a write, a number of bytes or what has that length. key, port: the
        peer that it went to, as meet() gives them; port only where this call chose the peer.
        -> False while the agent itself is at work in this thread: nothing is counted then."""
        own = False
        try:
            me = get_ident()
            if me == self.quiet:
                return False
            if me != self._owner:
                _acquire()
                own = True
                self._owner = me
            counts = self.counts
            counts[place] = counts[place] + 1 & _MASK
            if port is not None:
                if place == _WRITES:
                    counts[_UDP_OUT] = counts[_UDP_OUT] + 1 & _MASK
                if port not in self._ports and len(self._ports) < _MAX_SEEN:
                    self._ports[port] = None
            elif not isinstance(size, int):
                size = len(size)
            if size:  # of a read or a write
                place += _BYTES_IN - _READS  # their bytes are in the column two before
                counts[place] = counts[place] + size & _MASK
            if key is not None:
                peers = self._peers
                new = key not in self.known
                if key not in peers:
                    if len(peers) < _MAX_SEEN:
                        peers[key] = new
                    if new:  # beyond _MAX_SEEN in one window each meeting counts
                        counts[_NEW_PEERS] = counts[_NEW_PEERS] + 1 & _MASK
                if new:
                    counts[_NEW_PEER_BYTES] = counts[_NEW_PEER_BYTES] + size & _MASK
        except Exception:  # no memory, or a length that it does not have
            pass  # the firmware's call went well: that this one is not counted must not make it fail
        finally:
            if own:
                self._owner = None
                _release()
        return True

    def failed(self, number):
        """A call on a socket has raised OSError(number)."""
        if number in _FAILURES:
            self.add(_FAILURES[number])


_FAILURES = {
    errno.ECONNREFUSED: _REFUSED,
    errno.ECONNRESET: _REFUSED,
    errno.ETIMEDOUT: _UNANSWERED,
    errno.EHOSTUNREACH: _UNANSWERED,
}
active: FirmwareCollector = None  # type: ignore[assignment]  # from the first install() on
_open = builtins.open


def install():
    """Put the hook in place -> its FirmwareCollector. A second call changes nothing."""
    global active
    if open is not _opened:
        active = FirmwareCollector()
        names = hooked_socket.__dict__
        if real_socket:
            names.update(real_socket.__dict__)
        names.pop("__file__", None)  # it would be printed; a frozen module has none
        names["getaddrinfo"] = _getaddrinfo
        names["socket"] = socket
        _put(hooked_socket, _opened)
    return active


def remove():
    """Take the hook out. Sockets that were made under it go on working."""
    if open is _opened:
        _put(real_socket, _open)


def _put(module, opener):
    if real_socket:
        sys.modules["socket"] = sys.modules["usocket"] = module
    builtins.open = opener


def _opened(*args, **options):
    active.add(_OPENS)
    mode = args[1] if len(args) > 1 else options.get("mode")
    if isinstance(mode, str) and mode.strip("rbt"):
        active.add(_OPENS_WRITE)
    return _open(*args, **options)


def _getaddrinfo(*args, **options):
    active.add(_LOOKUPS)
    try:
        return real_socket.getaddrinfo(*args, **options)  # pyright: ignore[reportOptionalMemberAccess]
    except OSError:
        active.add(_LOOKUP_FAIL)
        raise


def _asked_by_c(data):
    """Whether readinto() or write() was called by C code (ssl, json), through the stream protocol, not by Python.
    Such a caller wants an error as a number: an exception would go right through mbedtls and leave it in pieces, with
    its memory. The protocol's bytearray lies on the C stack, a few calls above here; any other lies on the heap."""
    if type(data) is not bytearray:
        return False
    here = _Aside()
    print(end="x", file=here)
    return 0 < id(data) - here.at < _FRAMES


_setattr = getattr(object, "__setattr__", setattr)  # ESP8266 has none, and asks no class about it either


class socket(io.IOBase):
    """Replaces socket.socket. It is an IOBase, because ssl, select and asyncio reach a stream through its C
    protocol, which only that class passes on to Python. Its attributes never grow in number: two threads may use it.
    The __init__ of a class derived from it must call this one's."""

    _real: _socket.socket  # pyright: ignore[reportInvalidTypeForm]
    _notes: list

    def __init__(self, *args, **options):
        if args and args[0] is _unlocked:
            real = args[1]
        else:
            real = real_socket.socket(*args, **options)  # pyright: ignore[reportOptionalMemberAccess]
            active.add(_SOCKETS)
        _setattr(self, "_real", real)
        _setattr(self, "_notes", [None, False, None])

    def __repr__(self):
        return repr(self._real)

    def __setattr__(self, name, value):
        if type(self) is socket:
            setattr(self._real, name, value)  # raises: a socket has no place for it
        else:
            _setattr(self, name, value)

    def connect(self, *address):
        notes = self._notes
        key, port = active.meet(address and address[0])
        notes[_MUTE_SO_FAR] = counted = active.add(_CONN_OUT, 0, key, port)
        notes[_KEY] = key if counted else None
        try:
            return self._real.connect(*address)
        except OSError as error:
            if error.errno != errno.EINPROGRESS:
                notes[_MUTE_SO_FAR] = False  # it has failed: that was counted
            active.failed(error.errno)
            raise

    def accept(self, *args):
        stream, address = self._real.accept(*args)
        active.add(_CONN_IN)
        return socket(_unlocked, stream), address

    def listen(self, *args):
        active.add(_LISTENS)
        return self._real.listen(*args)

    def close(self, *args):
        if self._notes[_MUTE_SO_FAR]:
            self._notes[_MUTE_SO_FAR] = False
            active.add(_MUTE)
        return self._real.close(*args)

    def makefile(self, *args, **options):
        got = self._real.makefile(*args, **options)
        return self if got is self._real else got

    def setsockopt(self, *args):
        if len(args) == 3 and callable(args[2]):  # boards call it with the socket when something has come
            wanted = args[2]
            args = args[0], args[1], lambda _: wanted(self)
        return self._real.setsockopt(*args)  # pyright: ignore[reportArgumentType]  # what the firmware gave

    def ioctl(self, request, argument):
        notes = self._notes
        if request == _POLL:
            if notes[_POLLER] is None:
                notes[_POLLER] = select.poll()
            notes[_POLLER].register(self._real, argument)
            for _, ready in notes[_POLLER].poll(0):
                return ready
            return 0
        if request == _CLOSE:
            return self.close() or 0
        if request == _FILENO and hasattr(self, "fileno"):  # where the port has it
            return self.fileno()
        return -errno.EINVAL


def _through(name, place):
    """The method `name` of the real socket; what it moves is counted in the column `place`, _READS or _WRITES."""
    # one variable, not four: a call with more than five values, these among them, takes memory
    how = getattr(real_socket.socket, name), place, name  # pyright: ignore[reportOptionalMemberAccess]

    def call(self, first=_unlocked, second=_unlocked, *more):
        method, place, name = how
        real = self._real
        key = port = None
        if place == _WRITES:
            key = self._notes[_KEY]
            if name == "sendto":
                last = active._last  # a flood, or a sensor's only server: no second look
                key, port = last[2] if second is last[0] else active.meet(more[0] if more else second)
        try:
            if second is not _unlocked:
                got = method(real, first, second, *more) if more else method(real, first, second)
            elif first is _unlocked:
                got = method(real)
            else:
                got = method(real, first)
        except OSError as error:
            if port is not None:
                active.add(_UDP_OUT, 0, key, port)
            active.failed(error.errno)
            if _asked_by_c(first):
                return -error.errno  # type: ignore[operator]  # it has one
            raise
        if place is not None:
            size = first if name == "sendall" else got[0] if name == "recvfrom" else got
            if size:
                if place == _READS:
                    self._notes[_MUTE_SO_FAR] = False
                active.add(place, size, key, port)  # pyright: ignore[reportArgumentType]  # no longer _unlocked
        return got

    return call


if real_socket:
    for _name in real_socket.socket.__dict__:
        if _name[0] != "_" and not hasattr(socket, _name):
            _place = {"writ": _WRITES, "send": _WRITES, "read": _READS, "recv": _READS}.get(_name[:4])
            setattr(socket, _name, _through(_name, _place))
