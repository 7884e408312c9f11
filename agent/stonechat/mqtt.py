"""An MQTT 3.1.1 client (OASIS Standard, 2014) for QoS 0 and 1, whose waits are all bounded.

    client = Client("sensor-7", "broker.lan", 8883, tls=context)
    client.connect()                                # waits at most CONNECT_MS, plus the name look-up
    client.publish("home/sensor-7/report", payload, 1)
    client.poll()                                   # often: reads, writes, pings, reconnects; does not block

Only the look-up of the broker's name can block longer, as MicroPython gives it no time-out: it happens in connect() and
in a poll() that reconnects, after the address of the last connection was tried; an address in place of a name avoids
it. A name with several addresses is tried one address an attempt. A TLS handshake goes on in poll() step by step; its
arithmetic takes a slow board a second or two.

A QoS 1 publish stays in RAM until the broker acknowledges it, and is sent again, marked as a duplicate, after a
reconnect: wait until `in_flight` is empty before a reset or a deep sleep. The session is persistent (clean session
off), so that the broker keeps what comes for a device that sleeps.

Reconnects wait with exponential back-off and jitter, so that a fleet does not come back in one second. Source:
"Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
"""

from errno import EAGAIN, EINPROGRESS

from .compat import const, ticks_add, ticks_diff, ticks_ms, urandom
from .errors import MQTTError

_POLLIN = const(1)  # as every port and Linux have them
_POLLOUT = const(4)
_CONNECT_MS = const(10_000)  # from the start of TCP to CONNACK
_READS_PER_POLL = const(48)  # some twenty packets
_STRIKES = const(3)  # half keep-alives that a publish may stay unacknowledged while pings are answered
_FIRST_MS = const(1_000)  # of the back-off
_LONGEST_MS = const(120_000)


class Backoff:
    """due() is whether to try now; failed() and worked() report to it how the attempt went."""

    _span_ms: int
    _due_ms: int

    def __init__(self) -> None:
        self.worked()

    def due(self) -> bool:
        return ticks_diff(ticks_ms(), self._due_ms) >= 0

    def failed(self) -> None:
        """Wait a random time between half of the span and the span, and double the span up to its limit."""
        random = urandom(2)
        half_ms = self._span_ms // 2
        self._due_ms = ticks_add(ticks_ms(), half_ms + (random[0] << 8 | random[1]) % (half_ms + 1))
        self._span_ms = min(2 * self._span_ms, _LONGEST_MS)

    def worked(self) -> None:
        self._span_ms = _FIRST_MS
        self._due_ms = ticks_ms()


class Client:
    """user, password, client_id: str or bytes; tls: an SSLContext (verifying: see board.tls), None for plain TCP;
    keepalive_s: 2..65535; socket: the module to use in place of the built-in one. A message of more than max_packet
    bytes is thrown away and counted in `oversize`. To be set before it connects, as Agent.connect() does:

    will: (topic, payload, qos, retain). on_message(topic: str, payload: bytes), on_connect(): called from poll(), at
    most one a poll(). on_published(handle): the broker has acknowledged the QoS 1 publish() that returned `handle`.
    resend: send again after a reconnect what the broker had not acknowledged; False for an agent that does so."""

    will = on_message = on_connect = on_published = None
    resend = True
    connected = False
    _info: tuple | None  # address of the connection, as getaddrinfo gave it

    def __init__(
        self,
        client_id,
        host,
        port=1883,
        *,
        user=None,
        password=None,
        tls=None,
        keepalive_s=60,
        socket=None,
        max_packet=1024,
        max_in_flight=8,
    ):
        if socket is None:
            import socket
        self._net = socket
        self._where = (host, port, 0, socket.SOCK_STREAM)
        self._tls = tls
        self._half_ms = keepalive_s * 500
        self._login = (client_id, user, password)
        self._backoff = Backoff()
        self._tries = urandom(1)[0]  # a fleet spreads over the addresses
        self.in_flight = []  # (packet id, packet) of each QoS 1 publish that is not acknowledged
        self._most = max_in_flight
        self._id = 0
        self._topics = []
        self.oversize = 0
        self.refused = 0  # subscriptions that the broker refused
        self._rx = memoryview(bytearray(max_packet))
        self._start = self._rx[:2]  # so that a poll() that finds nothing allocates nothing
        self._socket = None
        self._call = None  # (callback, arguments) that the packet just read asks for
        self._drop()

    def connect(self, wait=True):
        """Connect and wait for the broker's answer, or leave that to poll(). Raises OSError or MQTTError; a later
        poll() tries again, after a jittered back-off."""
        info = self._info
        self._drop()
        try:
            if not info:
                infos = sorted(self._net.getaddrinfo(*self._where))  # name servers rotate them
                info = infos[self._tries % len(infos)]
                self._tries += 1
            self._info = info  # kept as long as a connection to it worked
            stream = self._socket = self._net.socket(info[0], info[1])
            stream.setblocking(False)
            stream.connect(info[-1])
        except OSError as error:
            if error.errno != EINPROGRESS:
                self._backoff.failed()
                self._drop()
                raise
        self._poller.register(stream, _POLLOUT)
        self._timer_ms = ticks_ms()
        while wait and not self.connected:
            self.poll(0.02)

    def publish(self, topic, payload, qos=0, retain=False):
        """Hand over one message; poll() sees to the rest. With QoS 1 -> its handle, for on_published. Raises MQTTError,
        and has not taken it, without a connection or while max_in_flight others are under way."""
        if not self.connected:
            raise MQTTError("not connected")
        if len(self._queue) >= self._most or qos and len(self.in_flight) >= self._most:
            raise MQTTError("busy")
        number = self._next_id() if qos else b""
        message = _packet(0x30 | qos << 1 | retain, _field(topic), number, payload)
        if qos:
            self.in_flight.append((number, message))
        self._send(message)
        return number

    def subscribe(self, topic, qos=1):
        """qos: 0 or 1. Holds for every later connection too."""
        self._topics.append((topic, qos))
        if self.connected:
            self._ask_for(topic, qos)

    def poll(self, wait_s: float = 0):
        """Move what can be moved, waiting at most wait_s for something to come. Raises OSError or MQTTError once when
        the connection is lost; reconnects when that is due."""
        if not self._socket:
            if self._backoff.due():
                self.connect(False)
            return
        try:
            if (wait_s or not self._write) and self._poller.poll(int(wait_s * 1000)) and not self._write:
                self._open(self._socket)
            if self._write:
                self._flush()
                for _ in range(_READS_PER_POLL):
                    if self._call or len(self._queue) > self._most or not self._receive():
                        break
                self._flush()
            self._clock()
        except (OSError, MQTTError):
            self._backoff.failed()
            self._drop()
            raise
        if self._call:  # last: an exception from a callback must not cost the connection
            callback, arguments = self._call
            self._call = None
            callback(*arguments)

    def close(self):
        """Say goodbye: the broker drops the last will then. A later poll() would connect again."""
        if self.connected:
            self._send(b"\xe0\x00")
        self._drop()

    def _drop(self):
        if self._socket:
            self._socket.close()
        self._socket = self._write = None
        if not self.connected:
            self._info = None
        if not self.resend:
            self.in_flight = []
        from select import poll  # here, because a board without a network may lack it

        self._poller = poll()
        self.connected = False
        self._queue = []  # packets to write; _sent bytes of the first one are written
        self._sent = 0
        self._awaited = True  # CONNACK first, PINGRESP later
        self._strikes = 0
        self._expect()

    def _open(self, stream):
        """TCP is connected (or failed: the first write shows it): begin TLS and send CONNECT."""
        self._poller.modify(stream, _POLLIN)
        if self._tls:
            stream = self._tls.wrap_socket(stream, server_hostname=self._where[0], do_handshake_on_connect=False)
            self._socket = stream
        self._write = getattr(stream, "write", None) or stream.send
        self._read = getattr(stream, "readinto", None) or stream.recv_into
        self._queue.append(self._hello())

    def _hello(self):
        client_id, user, password = self._login
        will = self.will
        flags = 0
        tail = _field(client_id)
        if will:
            flags = 4 | will[2] << 3 | will[3] << 5
            tail += _field(will[0]) + _field(will[1])
        for field, flag in ((user, 128), (password, 64)):
            if field is not None:
                flags |= flag
                tail += _field(field)
        return _packet(0x10, b"\x00\x04MQTT\x04", bytes((flags,)), _u16(self._half_ms // 500), tail)

    def _clock(self):
        limit_ms = self._half_ms if self.connected else _CONNECT_MS
        if ticks_diff(ticks_ms(), self._timer_ms) < limit_ms:
            return
        if self._awaited or self._strikes >= _STRIKES:
            raise MQTTError("no answer")
        if self.in_flight:
            self._strikes += 1
        self._awaited = True
        self._timer_ms = ticks_ms()
        self._queue.append(b"\xc0\x00")

    def _next_id(self):
        """The two bytes of 1..65535, never those of a publish in flight."""
        while True:
            self._id = self._id % 65535 + 1
            number = _u16(self._id)
            for entry in self.in_flight:
                if entry[0] == number:
                    break
            else:
                return number

    def take_up_to(self, max_packet):
        """Take packets of up to max_packet bytes, where it takes less; to be called before it connects."""
        if len(self._rx) < max_packet:
            self._rx = memoryview(bytearray(max_packet))
            self._start = self._rx[:2]

    def _ask_for(self, topic, qos):
        self._queue.append(_packet(0x82, self._next_id(), _field(topic), bytes((qos,))))

    def _send(self, message):
        self._queue.append(message)
        try:
            self._flush()
        except OSError:
            pass  # the packet was taken; poll() meets the error again and reports it

    def _flush(self):
        while self._queue:
            # One packet at a time, never joined: TLS must see the same bytes again after it could not write them.
            message = self._queue[0]
            count = _move(self._write, memoryview(message)[self._sent :])
            if not count:
                return
            self._sent += count
            if self._sent >= len(message):
                self._sent = 0
                self._queue.pop(0)

    def _expect(self):
        self._have = 0
        self._need = 2
        self._body = 0  # where the body begins, 0 while the fixed header is not complete

    def _receive(self):
        """Read one piece, and handle the packet if that completes it. False if there was nothing to read."""
        rx = self._rx
        most = len(rx)
        have = self._have
        view = self._start
        if have:  # what is too long for rx is read into its end, again and again
            at = have if self._need <= most else min(have, most - 8)
            view = rx[at : at + self._need - have]
        count = _move(self._read, view)
        if not count:
            if count is None:
                return False
            raise MQTTError("closed")
        self._have = have = have + count
        if have == self._need and not self._body:  # the fixed header ends with a byte without its top bit
            length = 0
            for i in range(have - 1, 0, -1):
                length = length << 7 | rx[i] & 127
            if rx[have - 1] & 128:
                length = 1
                if have > 4:
                    raise MQTTError("malformed")
            else:
                self._body = have
            self._need += length
        if have == self._need:
            body = rx[self._body : have]
            self._expect()
            self._handle(rx[0], body, have > most)
        return True

    def _handle(self, first, body, oversize):
        kind = first >> 4
        length = len(body)
        if self.connected is (kind == 2):
            kind = 0  # CONNACK comes first, and once
        if kind == 2 and length == 2:
            self._welcome(body[1])
        elif kind == 3:
            self._take(first >> 1 & 3, body, oversize)
        elif kind == 4 and length == 2:
            for entry in self.in_flight:
                if entry[0] == bytes(body):
                    self.in_flight.remove(entry)
                    self._strikes = 0
                    if self.on_published:
                        self.on_published(entry[0])
                    break
        elif kind == 9 and length == 3:
            self.refused += body[2] >> 7
        elif kind == 13 and not length:
            self._awaited = False
            self._backoff.worked()
        else:
            raise MQTTError("packet %d" % first)

    def _welcome(self, code):
        if code:
            # 1 protocol, 2 client id, 3 unavailable, 4 user or password, 5 no right to connect
            raise MQTTError("refused, code %d" % code)
        self.connected = True
        self._awaited = False
        self._timer_ms = ticks_ms()
        for topic, qos in self._topics:
            self._ask_for(topic, qos)
        for _, message in self.in_flight:
            message[0] |= 8
            self._queue.append(message)
        if self.on_connect:
            self._call = self.on_connect, ()

    def _take(self, qos, body, oversize):
        """A PUBLISH, acknowledged before the callback sees it: one that makes the callback fail must not come back
        for ever."""
        try:
            end = start = 2 + (body[0] << 8 | body[1])
            if qos:
                end += 2
            if qos > 1 or end > len(body):
                raise ValueError
            topic = str(body[2:start], "utf-8")
        except (IndexError, ValueError):
            raise MQTTError("malformed")
        if qos:
            self._queue.append(b"\x40\x02" + bytes(body[start:end]))
        if oversize:
            self.oversize += 1
        elif self.on_message:
            self._call = self.on_message, (topic, bytes(body[end:]))


def _move(call, view):
    """Bytes moved, None where it would block."""
    try:
        return call(view)
    except OSError as error:
        if error.errno not in (EAGAIN, 2, 3):  # CPython's ssl says "want read" and "want write" as 2 and 3
            raise


def _u16(number):
    return bytes((number >> 8, number & 255))


def _field(value):
    """value: str or bytes -> with its two length bytes, as MQTT wants it."""
    raw = value.encode() if isinstance(value, str) else value
    if len(raw) > 65535:
        raise MQTTError("field too long")
    return _u16(len(raw)) + raw


def _packet(first, *parts):
    length = 0
    for part in parts:
        length += len(part)
    out = bytearray((first,))
    while length > 127:
        out.append(length & 127 | 128)
        length >>= 7
    out.append(length)
    for part in parts:
        out.extend(part)
    return out
