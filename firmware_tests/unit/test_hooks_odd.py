"""Every odd call that a firmware might make, with and without the hook: the same result, the same exception with the
same arguments, the same errno. One line of CALLS is one call; `on` (a World) has the socket module, open() and streams.

A line that asks for what a port does not have ends in the same exception on both sides, so nothing is left out by name.
"""

import sys

from share import some
from stonechat.board import hooks

ON_BOARD = sys.implementation.name == "micropython"
if ON_BOARD:
    import select
    import socket as bare_socket

    bare_open = open
FILE = "hooks-odd.tmp"

ADDRESSES = (
    None, True, 0, 1.5, "", "x", "127.0.0.1", "127.0.0.1:80", b"", b"a", b"ab", b"\x02\x00", bytes(16), bytearray(0),
    bytearray(3), bytearray(40), memoryview(b"1234"), (), ("127.0.0.1",), ("127.0.0.1", 9), ("127.0.0.1", "9"),
    ("127.0.0.1", 9, 0, 0), ("127.0.0.1", -1), ("127.0.0.1", 70000), ("127.0.0.1", None), (None, 9), (1, 2, 3),
    ["127.0.0.1", 9], [], {}, (b"\xff", 1), ("h", []), ([], 9), object, len, ((), ()), range(3), 1 << 70,
)  # fmt: skip
DATA = (None, 0, -1, 1.5, "", "text", b"", b"x", bytearray(b"ab"), memoryview(b"abc"), (), [1], {}, object, b"y" * 3000)
SIZES = (None, -1, 0, 1, 3, "1", 1.5, b"", 1 << 40, [])


if ON_BOARD and getattr(sys.implementation, "_mpy", 0) >> 10 & 15 in range(3, 9):  # ARM: here under qemu-user, which
    ADDRESSES = [a for a in ADDRESSES if a not in ("", b"")]  # aborts on an address of no length


class World:
    """What one side sees: `socket` the module, `open` the function. close() lets go of all that was made."""

    def __init__(self, module, opener):
        self.socket = module
        self.open = opener
        self._made = []

    def keep(self, stream):
        self._made.append(stream)
        return stream

    def file(self, stream, mode):
        """makefile(), closed before its socket: on the unix port it closes the same descriptor when it is collected."""
        return self.keep(stream.makefile(mode))

    def tcp(self):
        return self.keep(self.socket.socket(self.socket.AF_INET, self.socket.SOCK_STREAM))

    def udp(self):
        return self.keep(self.socket.socket(self.socket.AF_INET, self.socket.SOCK_DGRAM))

    def udp_now(self):
        stream = self.udp()
        stream.setblocking(False)
        return stream

    def at(self, port, host="127.0.0.1"):
        return self.socket.getaddrinfo(host, port)[0][-1]

    def closed(self):
        stream = self.tcp()
        stream.close()
        return stream

    def listener(self):
        stream = self.tcp()
        stream.setsockopt(self.socket.SOL_SOCKET, self.socket.SO_REUSEADDR, 1)
        for port in range(20300, 20500):
            try:
                stream.bind(self.at(port))
                break
            except OSError:
                continue
        stream.listen(4)
        self.port = port
        return stream

    def pair(self):
        """-> a connected stream and its peer, which waits 0.3 s at most for what it reads"""
        server = self.listener()
        client = self.tcp()
        client.connect(self.at(self.port))
        peer = self.keep(server.accept()[0])
        peer.settimeout(0.3)
        client.settimeout(0.3)
        return client, peer

    def heard(self, *sent):
        """-> a stream to which its peer has written all of `sent`"""
        client, peer = self.pair()
        for data in sent:
            peer.write(data)
        return client

    def hung_up(self):
        client, peer = self.pair()
        peer.close()
        return client

    def reset(self):
        """-> a stream whose peer has reset the connection: it was closed with bytes unread"""
        client, peer = self.pair()
        client.write(b"unread")
        poll = select.poll()
        poll.register(peer, select.POLLIN)
        poll.poll(300)
        peer.close()
        poll = select.poll()
        poll.register(client, select.POLLIN)
        poll.poll(300)
        return client

    def close(self):
        for stream in reversed(self._made):
            try:
                stream.close()
            except Exception:
                pass


def into(stream, size, *more):
    buffer = bytearray(size)
    got = stream.readinto(buffer, *more)
    return got, bytes(buffer)


def rounds(call, number):
    """The outcomes of `number` calls one after the other."""
    return [outcome(call) for _ in range(number)]


def polled(on, stream, flags, change=None):
    poll = select.poll()
    poll.register(stream, flags)
    if change is not None:
        poll.modify(stream, change)
    found = [(one is stream, ready) for one, ready in poll.poll(30)]
    found += [(one is stream, ready) for one, ready in poll.ipoll(0)]
    poll.unregister(stream)
    return found, poll.poll(0)


def starred(on, name):
    scope = {}
    sys.modules["odd_socket"] = on.socket
    try:
        exec("from odd_socket import *", scope)
    finally:
        del sys.modules["odd_socket"]
    return callable(scope[name])


def derived(on):
    class Loud(on.socket.socket):
        def __init__(self, *args):
            super().__init__(*args)
            self.said = []

        def send(self, data):
            self.said.append(data)
            return super().send(data)

        def settimeout(self, seconds):
            return super().settimeout(seconds)

    stream = on.keep(Loud(on.socket.AF_INET, on.socket.SOCK_DGRAM))
    stream.settimeout(1)
    stream.connect(on.at(9))
    stream.extra = 5
    return stream.send(b"abc"), stream.said, stream.extra, isinstance(stream, on.socket.socket)


def written(on, *args, **options):
    with on.open(*args, **options) as file:
        file.write("abc")
    with on.open(FILE) as file:
        return file.read()


def lines(on):
    with on.open(FILE, "wb") as file:
        file.write(b"one\ntwo\n")
    with on.open(FILE) as file:
        return [line for line in file], type(file) is type(bare_open(FILE))


def dumped(on, stream):
    import json

    return json.dump({"a": [1, 2]}, stream)


def deadline(stream, seconds, read):
    stream.settimeout(seconds)
    return rounds(lambda: read(stream), 2)


def without_memory(stream, data):
    """Calls that need no memory, while there is none."""
    import micropython

    buffer = bytearray(4)
    micropython.heap_lock()
    try:
        sent = stream.send(data)
        got = stream.readinto(buffer)
    finally:
        micropython.heap_unlock()
    return sent, got, bytes(buffer)


def echo(on):
    client, peer = on.pair()
    peer.write(b"abcd")
    return without_memory(client, b"xy"), peer.recv(9)


def use_of(methods, size):
    """name -> what a call of it on a plain number gives; a line for each method that any port has"""
    return [("%s()" % name, lambda on, name=name: getattr(on.tcp(), name)()) for name in methods] + [
        ("%s(%d too many)" % (name, size), lambda on, name=name: getattr(on.tcp(), name)(*range(size)))
        for name in methods
    ]


METHODS = [
    name
    for names in (
        ("accept", "bind", "close", "connect", "fileno", "listen", "setblocking", "setsockopt"),
        ("read", "readinto", "readline", "recv", "recvfrom", "send", "sendall", "sendto", "settimeout", "write"),
    )
    for name in names
]

CALLS = [("connect udp %r" % (a,), lambda on, a=a: on.udp_now().connect(a)) for a in ADDRESSES]
CALLS += [("bind %r" % (a,), lambda on, a=a: on.udp().bind(a)) for a in ADDRESSES]
CALLS += [("sendto %r" % (a,), lambda on, a=a: on.udp_now().sendto(b"x", a)) for a in ADDRESSES]
CALLS += [("sendto flags %r" % (a,), lambda on, a=a: on.udp_now().sendto(b"x", 0, a)) for a in ADDRESSES]
CALLS += [("socket(%r)" % (a,), lambda on, a=a: on.socket.socket(a)) for a in ADDRESSES[:9]]
CALLS += [("getaddrinfo host %r" % (a,), lambda on, a=a: on.socket.getaddrinfo(a, 80) and 1) for a in ADDRESSES[:4]]
CALLS += [("getaddrinfo port %r" % (a,), lambda on, a=a: on.at(a) and 1) for a in ADDRESSES if a != b""]
for _name in ("send", "write", "sendall"):
    CALLS += [("%s %r" % (_name, d), lambda on, n=_name, d=d: getattr(on.pair()[0], n)(d)) for d in DATA]
    CALLS += [("%s unconnected %r" % (_name, d), lambda on, n=_name, d=d: getattr(on.tcp(), n)(d)) for d in DATA[:8]]
for _name in ("recv", "read", "readline", "recvfrom", "readinto"):
    CALLS += [
        ("%s(%r)" % (_name, s), lambda on, n=_name, s=s: getattr(on.heard(b"ab\ncdef\n"), n)(s))
        for s in SIZES
        if (_name, s) not in (("readline", 1 << 40), ("read", 1 << 40), ("recv", 1 << 40), ("recvfrom", 1 << 40))
    ]
CALLS += use_of(METHODS, 6)
CALLS += [
    # --- making ---
    ("kind", lambda on: type(on.tcp()) is on.socket.socket),
    ("isinstance", lambda on: isinstance(on.tcp(), on.socket.socket)),
    ("accepted isinstance", lambda on: [isinstance(one, on.socket.socket) for one in on.pair()]),
    ("socket(family=)", lambda on: on.keep(on.socket.socket(family=2)) and 1),
    ("socket(nonsense=)", lambda on: on.keep(on.socket.socket(nonsense=2)) and 1),
    ("socket(1,2,3,4,5)", lambda on: on.socket.socket(1, 2, 3, 4, 5)),
    ("socket(socket)", lambda on: on.socket.socket(on.tcp())),
    ("socket(bad type)", lambda on: on.socket.socket(on.socket.AF_INET, 99)),
    ("derived", lambda on: derived(on)),
    ("class name", lambda on: on.socket.socket.__name__),
    ("class repr", lambda on: repr(on.socket.socket)),
    ("module name", lambda on: on.socket.__name__),
    ("module repr", lambda on: repr(on.socket)),
    ("module missing", lambda on: on.socket.no_such_thing),
    ("module type", lambda on: type(on.socket) is type(sys)),
    ("star socket", lambda on: starred(on, "socket")),
    ("star getaddrinfo", lambda on: starred(on, "getaddrinfo")),
    ("constants", lambda on: [getattr(on.socket, n) for n in dir(bare_socket) if n[0] in "ASI" and n[1] != "_"]),
    ("names", lambda on: sorted(n for n in dir(on.socket) if n[0] != "_")),
    ("sockaddr", lambda on: on.socket.sockaddr(on.at(80))),
    # --- an object like any other ---
    ("str", lambda on: str(on.tcp())[:3]),
    ("format", lambda on: "%s %r" % (on.closed(), on.closed())),
    ("bool", lambda on: bool(on.tcp())),
    ("hash", lambda on: (lambda s: {s: 1}[s])(on.tcp())),
    ("eq", lambda on: (lambda s: (s == s, s == on.tcp(), s != s, s is s))(on.tcp())),
    ("eq None", lambda on: on.tcp() == None),  # noqa: E711
    ("lt", lambda on: on.tcp() < 1),
    ("add", lambda on: on.tcp() + 1),
    ("len", lambda on: len(on.tcp())),
    ("neg", lambda on: -on.tcp()),
    ("int", lambda on: int(on.tcp())),
    ("in", lambda on: 1 in on.tcp()),
    ("index", lambda on: on.tcp()[0]),
    ("call", lambda on: on.tcp()()),
    ("callable", lambda on: callable(on.tcp())),
    ("iter", lambda on: [line for line in on.heard(b"a\nb\n")]),
    ("next", lambda on: next(on.heard(b"a\nb\n"))),
    ("with", lambda on: on.tcp().__enter__()),
    ("bytes", lambda on: bytes(on.tcp())),
    ("attr get", lambda on: on.tcp().no_such_method),
    ("attr get _", lambda on: on.tcp()._no_such_method),
    ("attr set", lambda on: setattr(on.tcp(), "x", 1)),
    ("attr set method", lambda on: setattr(on.tcp(), "send", 1)),
    ("attr del", lambda on: delattr(on.tcp(), "x")),
    ("hasattr", lambda on: [hasattr(on.tcp(), n) for n in METHODS]),
    ("unbound", lambda on: on.socket.socket.close(on.tcp())),
    ("unbound settimeout", lambda on: on.socket.socket.settimeout(on.tcp(), 1)),
    ("unbound names", lambda on: [hasattr(on.socket.socket, n) for n in METHODS]),
    ("methods differ", lambda on: on.tcp().send == on.tcp().send),
    # --- keywords ---
    ("recv(size=)", lambda on: outcome(lambda: on.tcp().recv(size=1))[:2]),
    ("connect(address=)", lambda on: outcome(lambda: on.tcp().connect(address=1))[:2]),
    ("getaddrinfo(port=)", lambda on: on.socket.getaddrinfo("127.0.0.1", port=1)),
    ("getaddrinfo()", lambda on: on.socket.getaddrinfo()),
    ("getaddrinfo(1)", lambda on: on.socket.getaddrinfo("127.0.0.1")),
    ("getaddrinfo 9", lambda on: on.socket.getaddrinfo("127.0.0.1", 1, 2, 1, 6, 0, 0, 0, 0)),
    ("getaddrinfo type", lambda on: on.socket.getaddrinfo("127.0.0.1", 80, 2, 1)[0][:2]),
    ("getaddrinfo unknown", lambda on: on.socket.getaddrinfo("no-such-host.invalid", 1)),
    # --- life of a connection ---
    ("refused", lambda on: on.tcp().connect(on.at(1))),
    ("refused again", lambda on: (lambda s: rounds(lambda: s.connect(on.at(1)), 2))(on.tcp())),
    ("connect twice", lambda on: (lambda p: outcome(lambda: p[0].connect(on.at(on.port))))(on.pair())),
    ("connect non-blocking", lambda on: (lambda s: (s.setblocking(False), s.connect(on.at(1, "127.0.0.9"))))(on.tcp())),
    ("accept nobody", lambda on: (lambda s: (s.setblocking(False), s.accept()))(on.listener())),
    ("accept timeout", lambda on: (lambda s: (s.settimeout(0.05), s.accept()))(on.listener())),
    ("accept unbound", lambda on: on.tcp().accept()),
    ("accept type", lambda on: (lambda s, c: (c.connect(on.at(on.port)), type(s.accept())))(on.listener(), on.tcp())),
    ("bind twice", lambda on: (on.listener(), on.tcp().bind(on.at(on.port)))),
    ("listen none", lambda on: (on.listener().listen(), 1)),
    ("listen minus", lambda on: on.listener().listen(-1)),
    ("listen text", lambda on: on.tcp().listen("4")),
    ("send hung up", lambda on: (lambda s: rounds(lambda: s.send(b"x"), 3))(on.hung_up())[:1]),
    ("recv hung up", lambda on: (lambda s: rounds(lambda: s.recv(4), 2))(on.hung_up())),
    ("read hung up", lambda on: (lambda s: rounds(lambda: s.read(4), 2))(on.hung_up())),
    ("readline hung up", lambda on: (lambda s: rounds(s.readline, 2))(on.hung_up())),
    ("readinto hung up", lambda on: (lambda s: rounds(lambda: into(s, 4), 2))(on.hung_up())),
    ("recv reset", lambda on: (lambda s: rounds(lambda: s.recv(4), 3))(on.reset())),
    ("read reset", lambda on: (lambda s: rounds(lambda: s.read(4), 3))(on.reset())),
    ("read all reset", lambda on: (lambda s: rounds(s.read, 3))(on.reset())),
    ("readinto reset", lambda on: (lambda s: rounds(lambda: into(s, 4), 3))(on.reset())),
    ("send reset", lambda on: (lambda s: rounds(lambda: s.send(b"x"), 3))(on.reset())),
    ("write reset", lambda on: (lambda s: rounds(lambda: s.write(b"x"), 3))(on.reset())),
    ("write bytearray reset", lambda on: (lambda s: rounds(lambda: s.write(bytearray(2)), 3))(on.reset())),
    ("sendall reset", lambda on: (lambda s: rounds(lambda: s.sendall(b"x"), 3))(on.reset())),
    ("print reset", lambda on: (lambda s: rounds(lambda: print("x", file=s), 3))(on.reset())),
    ("dump reset", lambda on: (lambda s: rounds(lambda: dumped(on, s), 3))(on.reset())),
    ("dump", lambda on: (lambda p: (dumped(on, p[0]), p[1].recv(99)[:1]))(on.pair())),
    ("print", lambda on: (lambda p: (print("hi", 1, file=p[0]), p[1].readline()))(on.pair())),
    ("print closed", lambda on: print("hi", file=on.closed())),
    ("read to the end", lambda on: (lambda p: (p[1].write(b"abc"), p[1].close(), p[0].read()))(on.pair())),
    ("lines", lambda on: (lambda s: [s.readline(), s.readline(2), s.readline()])(on.heard(b"one\n", b"two\n"))),
    ("recvfrom tcp", lambda on: on.heard(b"abc").recvfrom(2)[0]),
    ("readinto len", lambda on: into(on.heard(b"abcdef"), 6, 2)),
    ("readinto off", lambda on: into(on.heard(b"abcdef"), 6, 2, 2)),
    ("readinto bytes", lambda on: on.heard(b"abc").readinto(b"123")),
    ("readinto view", lambda on: (lambda b: (on.heard(b"abc").readinto(memoryview(b)[1:3]), b))(bytearray(4))),
    ("write len", lambda on: (lambda p: (p[0].write(b"abcdef", 3), p[1].recv(9)))(on.pair())),
    ("write off", lambda on: (lambda p: (p[0].write(b"abcdef", 2, 3), p[1].recv(9)))(on.pair())),
    ("send flags", lambda on: on.pair()[0].send(b"abc", 0)),
    ("recv flags", lambda on: on.heard(b"abc").recv(2, 0)),
    ("recv peek", lambda on: (lambda s: (s.recv(2, 2), s.recv(9)))(on.heard(b"abc"))),
    ("sendall view", lambda on: (lambda p: (p[0].sendall(memoryview(b"abcdef")[1:3]), p[1].recv(9)))(on.pair())),
    ("much", lambda on: (lambda s: (s.setblocking(False), s.send(b"z" * 100000) > 0))(on.pair()[0])),
    ("too much", lambda on: (lambda s: (s.setblocking(False), full(s)))(on.pair()[0])),
    ("no memory", lambda on: echo(on)),
    # --- waiting ---
    ("recv timeout", lambda on: deadline(on.pair()[0], 0.03, lambda s: s.recv(1))),
    ("read timeout", lambda on: deadline(on.pair()[0], 0.03, lambda s: s.read(1))),
    ("readline timeout", lambda on: deadline(on.pair()[0], 0.03, lambda s: s.readline())),
    ("readinto timeout", lambda on: deadline(on.pair()[0], 0.03, lambda s: into(s, 2))),
    ("recvfrom timeout", lambda on: deadline(on.udp(), 0.03, lambda s: s.recvfrom(2))),
    ("timeout 0", lambda on: deadline(on.pair()[0], 0, lambda s: s.recv(1))),
    ("timeout 0 read", lambda on: deadline(on.pair()[0], 0, lambda s: s.read(1))),
    ("timeout 0 readline", lambda on: deadline(on.pair()[0], 0, lambda s: s.readline())),
    ("timeout 0 readinto", lambda on: deadline(on.pair()[0], 0, lambda s: into(s, 3))),
    ("timeout part", lambda on: deadline(on.heard(b"ab"), 0.03, lambda s: s.read(4))),
    ("non-blocking part", lambda on: (lambda s: (s.setblocking(False), s.read(4)))(on.heard(b"ab"))),
    ("timeout None", lambda on: on.tcp().settimeout(None)),
    ("timeout minus", lambda on: on.tcp().settimeout(-1)),
    ("timeout text", lambda on: on.tcp().settimeout("1")),
    ("setblocking text", lambda on: on.tcp().setblocking("x")),
    ("json from a silent peer", lambda on: deadline(on.pair()[0], 0.03, lambda s: __import__("json").load(s))),
    # --- closed ---
    ("close twice", lambda on: (lambda s: rounds(s.close, 3))(on.tcp())),
    ("closed send", lambda on: on.closed().send(b"x")),
    ("closed write", lambda on: on.closed().write(b"x")),
    ("closed sendto", lambda on: (lambda s: (s.close(), s.sendto(b"x", on.at(9))))(on.udp())),
    ("closed recv", lambda on: on.closed().recv(1)),
    ("closed read", lambda on: on.closed().read(1)),
    ("closed readline", lambda on: on.closed().readline()),
    ("closed readinto", lambda on: into(on.closed(), 2)),
    ("closed connect", lambda on: on.closed().connect(on.at(1))),
    ("closed accept", lambda on: on.closed().accept()),
    ("closed fileno", lambda on: on.closed().fileno()),
    ("closed settimeout", lambda on: on.closed().settimeout(1)),
    ("closed makefile", lambda on: on.file(on.closed(), "rb") and 1),
    ("setsockopt", lambda on: on.tcp().setsockopt(on.socket.SOL_SOCKET, on.socket.SO_REUSEADDR, 1)),
    ("setsockopt bytes", lambda on: on.tcp().setsockopt(on.socket.SOL_SOCKET, on.socket.SO_REUSEADDR, bytes(4))),
    ("setsockopt two", lambda on: on.tcp().setsockopt(1, 2)),
    ("setsockopt bad", lambda on: on.tcp().setsockopt(1, 999, 1)),
    ("setsockopt text", lambda on: on.tcp().setsockopt(1, 2, None)),
    ("makefile reads", lambda on: on.file(on.heard(b"abc\n"), "rb").readline()),
    ("makefile writes", lambda on: (lambda p: (on.file(p[0], "wb").write(b"abc"), p[1].recv(9)))(on.pair())),
    ("makefile()", lambda on: on.keep(on.tcp().makefile()) and 1),
    ("makefile many", lambda on: on.keep(on.tcp().makefile("rb", 1, 2, 3, 4)) and 1),
    ("makefile mode", lambda on: on.file(on.tcp(), "q") and 1),
    ("makefile kind", lambda on: type(on.file(on.tcp(), "rb")).__name__),
    # --- select ---
    ("poll none", lambda on: polled(on, on.pair()[0], select.POLLIN)),
    ("poll in", lambda on: polled(on, on.heard(b"a"), select.POLLIN)),
    ("poll out", lambda on: polled(on, on.pair()[0], select.POLLOUT)),
    ("poll both", lambda on: polled(on, on.heard(b"a"), select.POLLIN | select.POLLOUT)),
    ("poll changed", lambda on: polled(on, on.heard(b"a"), select.POLLOUT, select.POLLIN)),
    ("poll 0", lambda on: polled(on, on.heard(b"a"), 0)),
    ("poll hung up", lambda on: polled(on, on.hung_up(), select.POLLIN)),
    ("poll hung up out", lambda on: polled(on, on.hung_up(), select.POLLOUT)),
    ("poll reset", lambda on: polled(on, on.reset(), select.POLLIN)),
    ("poll closed", lambda on: polled(on, on.closed(), select.POLLIN)),
    ("poll fresh", lambda on: polled(on, on.tcp(), select.POLLIN | select.POLLOUT)),
    ("poll listener", lambda on: polled(on, on.listener(), select.POLLIN)),
    ("poll acceptable", lambda on: (lambda s, c: (c.connect(on.at(on.port)), polled(on, s, select.POLLIN)))(
        on.listener(), on.tcp())),
    ("poll udp", lambda on: polled(on, on.udp(), select.POLLIN | select.POLLOUT)),
    ("poll text", lambda on: select.poll().register(on.tcp(), "x")),
    ("modify stranger", lambda on: select.poll().modify(on.tcp(), 1)),
    ("unregister stranger", lambda on: select.poll().unregister(on.tcp())),
    ("select read", lambda on: (lambda s: [x and x[0] is s for x in select.select([s], [], [], 0.05)])(on.heard(b"a"))),
    ("select none", lambda on: select.select([on.pair()[0]], [], [], 0.03)),
    ("select write", lambda on: (lambda s: [x and x[0] is s for x in select.select([], [s], [], 0.05)])(on.pair()[0])),
    ("select closed", lambda on: [len(x) for x in select.select([on.closed()], [], [], 0.03)]),
    ("select three", lambda on: (lambda s: [len(x) for x in select.select([s], [s], [s], 0.05)])(on.heard(b"a"))),
    # --- open ---
    ("open()", lambda on: on.open()),
    ("open(int)", lambda on: on.open(99999)),
    ("open(None)", lambda on: on.open(None)),
    ("open missing", lambda on: on.open("/no/such/file")),
    ("open missing w", lambda on: on.open("/no/such/file", "w")),
    ("open folder w", lambda on: on.open("/", "w")),
    ("open empty", lambda on: on.open("")),
    ("open NUL", lambda on: on.open("a\x00b")),
    ("open file=", lambda on: on.open(file=FILE, mode="w").close()),
    ("open mode twice", lambda on: on.open(FILE, "r", mode="r")),
    ("open nonsense=", lambda on: on.open(FILE, nonsense=1)),
    ("open many", lambda on: on.open(FILE, "r", 1, 2, 3, 4, 5, 6)),
    ("open encoding=", lambda on: written(on, FILE, "w", encoding="utf-8")),
    ("open buffering", lambda on: written(on, FILE, "w", 1)),
    ("open mode=", lambda on: written(on, FILE, mode="w")),
    ("open w+", lambda on: written(on, FILE, "w+")),
    ("open a", lambda on: written(on, FILE, "a")),
    ("open x", lambda on: written(on, FILE, "x")),
    ("open r+", lambda on: written(on, FILE, "r+")),
    ("open r writes", lambda on: written(on, FILE, "r")),
    ("open lines", lines),
    ("open is callable", lambda on: callable(on.open)),
]  # fmt: skip
CALLS += [
    ("open mode %r" % (mode,), lambda on, mode=mode: written(on, FILE, mode))
    for mode in (None, 5, "", "q", "wq", "rw", "wt", "tw", "bw", b"w", [], ("w",), "rb+", "+", "U", "\u00e4")
]


def full(stream):
    for _ in range(200):
        got = outcome(lambda: stream.send(b"z" * 65536))
        if got[0] == "error":
            return got
    return None


def plain(value):
    """A value in which sockets, functions and numbers of descriptors compare equal."""
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if value is None or isinstance(value, (int, str, bytes, bytearray, bool, type)):
        return value
    return "an object"


def outcome(call):
    """What a call gave: ("value", v) or ("error", name of the type, errno, arguments)."""
    try:
        return "value", plain(call())
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        return "error", type(error).__name__, number, plain(error.args)


def once(call, module, opener):
    world = World(module, opener)
    try:
        return outcome(lambda: call(world))
    finally:
        world.close()


def forget():
    import os

    try:
        os.remove(FILE)
    except OSError:
        pass


def test_no_odd_call_can_tell_the_hook():
    if not ON_BOARD:
        return
    wrong = []
    for name, call in some(CALLS):
        forget()
        bare = once(call, bare_socket, bare_open)
        hooks.install()
        try:
            import socket

            forget()
            under = once(call, socket, open)
        finally:
            hooks.remove()
        if under != bare:
            wrong.append(name)
            print("differs:", name, "bare:", bare, "hooked:", under)
    forget()
    assert len(CALLS) > 500
    assert not wrong, (len(wrong), "of", len(CALLS), wrong)


def test_the_agents_own_calls_are_as_odd_and_not_counted():
    if not ON_BOARD:
        return
    counter = hooks.install()
    counter.quiet = hooks.get_ident()
    try:
        import socket

        for _, call in some(CALLS):
            once(call, socket, open)
        assert not any(counter.counts), counter.counts
        assert not counter._peers and not counter._ports
    finally:
        counter.quiet = None
        hooks.remove()
        forget()
