"""Counts what the firmware does through socket, asyncio, ssl, open and getaddrinfo. First thing in boot.py:

    from stonechat.board import hooks
    hooks.install()             # hooks.remove() turns it off again

Every later `import socket` gets a module whose sockets pass each call on, unchanged in result and exception, and count
it. A socket that was made before, or a `from socket import socket` that ran before, is not seen. `counts` has one place
a column of schema.COLUMNS. While `quiet` is set (the agent at work) nothing is counted.
"""

import builtins
import errno
import io
import os
import select
import sys

from ..compat import const, sha256, ticks_diff

MAX_SEEN = const(64)  # peers and ports told apart in one window
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
_NEW_PEERS = const(10)
_NEW_PEER_BYTES = const(11)
_BYTES_IN = const(13)
_BYTES_OUT = const(14)
_READS = const(15)
_WRITES = const(16)
_UDP_OUT = const(18)
_OPENS = const(19)
_OPENS_WRITE = const(20)
PLACES = const(23)

_POLL = const(3)  # what the stream protocol asks a Python object through ioctl
_CLOSE = const(4)
_FILENO = const(10)


class Counter:
    """What was counted since the hook was installed, and the peers and ports of this window."""

    def __init__(self):
        self.counts = [0] * PLACES
        self.quiet = False
        self.secret = os.urandom(16)  # the collector puts the device's own here
        self.known = {}  # peers that the device has learned: key -> anything
        self.window_peers = {}  # key -> True while new
        self.window_ports = {}
        self.lag_ms = 0
        self._beat_ms = None
        self._last = None  # the last address and its key: a flood needs no second hash
        self._last_key = None

    def add(self, place, number=1):
        if not self.quiet:
            self.counts[place] = self.counts[place] + number & _MASK

    def beat(self, now_ms):
        """Once a turn of the main loop: how long did the turn take?"""
        if self._beat_ms is not None:
            self.lag_ms = max(self.lag_ms, ticks_diff(now_ms, self._beat_ms))
        self._beat_ms = now_ms

    def key(self, host):
        digest = sha256(self.secret + host).digest()
        return (digest[0] << 24 | digest[1] << 16 | digest[2] << 8 | digest[3]) & _MASK

    def meet(self, address):
        """A peer is connected or sent to -> its key, None while quiet."""
        if self.quiet:
            return None
        if address == self._last:
            return self._last_key
        host, port = split(address)
        if len(self.window_ports) < MAX_SEEN:
            self.window_ports[port] = None
        self._last = address
        self._last_key = key = self.key(host)
        self.seen(key)
        return key

    def seen(self, key):
        """Note a peer of this window -> whether it is one that the device has not learned."""
        new = key not in self.known
        if key not in self.window_peers:
            if len(self.window_peers) < MAX_SEEN:
                self.window_peers[key] = new
            if new:
                self.add(_NEW_PEERS)  # beyond MAX_SEEN in one window each meeting counts
        return new

    def sent(self, key, size):
        """size bytes went out; key: of the peer that this device chose, None for one that came by itself."""
        if self.quiet:
            return
        self.add(_WRITES)
        self.add(_BYTES_OUT, size)
        if key is not None and self.seen(key):
            self.add(_NEW_PEER_BYTES, size)

    def failed(self, error):
        """An OSError from a socket call, which is raised again."""
        number = error.errno
        if number in (errno.ECONNREFUSED, errno.ECONNRESET):
            self.add(_REFUSED)
        elif number in (errno.ETIMEDOUT, errno.EHOSTUNREACH):
            self.add(_UNANSWERED)

    def end_window(self):
        """Begin to tell peers and ports apart anew."""
        self.window_peers.clear()
        self.window_ports.clear()
        self._last = None
        self.lag_ms = 0


def split(address):
    """address: (host, port, ...) as boards have it, or the unix port's packed sockaddr -> (host bytes, port)."""
    if isinstance(address, tuple):
        host = address[0]
        return host.encode() if isinstance(host, str) else bytes(host), address[1]
    raw = bytes(address)
    if raw[0] == 2:
        return raw[4:8], raw[2] << 8 | raw[3]
    return raw[8:24] or raw, raw[2] << 8 | raw[3] if len(raw) > 3 else 0


active = None  # the Counter while the hook is installed
_socket = None  # the socket module as it was
_open = None


def install():
    """Put the hook in place -> its Counter. A second call changes nothing."""
    global active, _socket, _open
    if active is None:
        active = counter = Counter()
        _socket = __import__("socket")
        _open = builtins.open
        _put(_hooked_module(_socket, counter), _hooked_open(_open, counter))
    return active


def remove():
    """Take the hook out. Sockets that were made under it go on working and counting for nobody."""
    global active
    if active is not None:
        active = None
        _put(_socket, _open)


def _put(socket, opener):
    sys.modules["socket"] = sys.modules["usocket"] = socket
    builtins.open = opener


def real_socket():
    """The socket module without the hook: for the agent's own connection."""
    return _socket or __import__("socket")


def _hooked_open(real, counter):
    def opened(*args, **options):
        counter.add(_OPENS)
        mode = args[1] if len(args) > 1 else options.get("mode", "r")
        if isinstance(mode, str) and mode.strip("rbt"):
            counter.add(_OPENS_WRITE)
        return real(*args, **options)

    return opened


def _hooked_module(real, counter):
    def getaddrinfo(*args):
        counter.add(_LOOKUPS)
        try:
            return real.getaddrinfo(*args)
        except OSError:
            counter.add(_LOOKUP_FAIL)
            raise

    names = {name: getattr(real, name) for name in dir(real) if not name.startswith("__")}
    names["getaddrinfo"] = getaddrinfo
    names["socket"] = _socket_class(real.socket, counter)
    return type("socket", (), names)


def _socket_class(real, counter):
    """-> the class that stands in for socket.socket. It is an IOBase, because ssl, select and asyncio reach a stream
    through its C protocol, which only that class passes on to Python."""

    def reader(name):
        def read(self, *args):
            try:
                got = getattr(self._real, name)(*args)
            except OSError as error:
                counter.failed(error)
                raise
            data = got[0] if isinstance(got, tuple) else got
            if data:
                self._mute = False
                counter.add(_READS)
                counter.add(_BYTES_IN, data if isinstance(data, int) else len(data))
            return got

        return read

    def writer(name):
        def write(self, *args):
            if name == "sendto":
                counter.add(_UDP_OUT)
                self._key = counter.meet(args[-1])
            try:
                count = getattr(self._real, name)(*args)
            except OSError as error:
                counter.failed(error)
                raise
            size = len(args[0]) if name == "sendall" else count
            if size:
                counter.sent(self._key, size)
            return count

        return write

    class Socket(io.IOBase):
        def __init__(self, *args):
            if len(args) == 1 and isinstance(args[0], real):
                self._real = args[0]  # from accept()
            else:
                self._real = real(*args)
                counter.add(_SOCKETS)
            self._poller = None
            self._key = None
            self._mute = False  # connected out, and nothing has come back

        def connect(self, address):
            counter.add(_CONN_OUT)
            self._key = counter.meet(address)
            self._mute = not counter.quiet
            try:
                return self._real.connect(address)
            except OSError as error:
                if error.errno != errno.EINPROGRESS:
                    self._mute = False  # it has failed: that is counted below
                counter.failed(error)
                raise

        def accept(self):
            stream, address = self._real.accept()
            counter.add(_CONN_IN)
            return Socket(stream), address

        def listen(self, *args):
            counter.add(_LISTENS)
            return self._real.listen(*args)

        def close(self):
            if self._mute:
                self._mute = False
                counter.add(_MUTE)
            return self._real.close()

        def makefile(self, *args):
            return self

        def ioctl(self, request, argument):
            if request == _POLL:
                if self._poller is None:
                    self._poller = select.poll()
                self._poller.register(self._real, argument)
                ready = self._poller.poll(0)
                return ready[0][1] if ready else 0
            if request == _CLOSE:
                self.close()
                return 0
            if request == _FILENO and hasattr(self._real, "fileno"):
                return self._real.fileno()
            return -errno.EINVAL

        def __getattr__(self, name):  # setblocking, settimeout, setsockopt, bind, fileno and what a port adds
            return getattr(self._real, name)

        read = reader("read")
        recv = reader("recv")
        recvfrom = reader("recvfrom")
        readline = reader("readline")
        readinto = reader("readinto")
        write = writer("write")
        send = writer("send")
        sendto = writer("sendto")
        if hasattr(real, "sendall"):
            sendall = writer("sendall")

    return Socket
