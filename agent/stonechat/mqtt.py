"""An MQTT 3.1.1 client (OASIS Standard, 2014) for QoS 0 and 1, whose waits are all bounded.

    client = Client("sensor-7", "broker.lan", 8883, tls=context)
    client.connect()                                # waits at most CONNECT_MS, plus the name look-up
    client.publish("home/sensor-7/report", payload, 1)
    client.poll()                                   # often: reads, writes, pings, reconnects; does not block

Only the look-up of the broker's name can block longer, as MicroPython gives it no time-out: it happens in connect() and
in a poll() that reconnects; an address in place of a name avoids it. A name with several addresses is tried one address
an attempt. A TLS handshake goes on in poll() step by step; its arithmetic takes a slow board a second or two.

A QoS 1 publish stays in RAM until the broker acknowledges it, and is sent again, marked as a duplicate, after a
reconnect: wait until `in_flight` is empty before a reset or a deep sleep. The session is persistent (clean session
off), so that the broker keeps what comes for a device that sleeps.
"""

import select
from errno import EAGAIN, EINPROGRESS

from .backoff import Backoff
from .compat import const, ticks_diff, ticks_ms
from .errors import MQTTError

CONNECT_MS = const(10_000)  # from the start of TCP to CONNACK
_READS_PER_POLL = const(48)  # some twenty packets
_STRIKES = const(3)  # half keep-alives that a publish may stay unacknowledged while pings are answered


class Client:
    """user, password, client_id: str or bytes; tls: an SSLContext (verifying: see board.tls), None for plain TCP;
    keepalive_s: 2..65535; will: (topic, payload, qos, retain); on_message(topic: str, payload: bytes) and on_connect()
    are called from poll(), at most one a poll(); socket: the module to use in place of the built-in one.
    A message of more than max_packet bytes is thrown away and counted in `oversize`."""

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
        will=None,
        on_message=None,
        on_connect=None,
        socket=None,
        max_packet=1024,
        max_in_flight=8,
    ):
        if socket is None:
            import socket
        self._net = socket
        self._where = (host, port)
        self._tls = tls
        self._half_ms = keepalive_s * 500
        self.on_message = on_message
        self.on_connect = on_connect
        flags = 0
        tail = _text(client_id)
        if will:
            flags = 4 | will[2] << 3 | will[3] << 5
            tail += _text(will[0]) + _text(will[1])
        if user is not None:
            flags |= 128
            tail += _text(user)
        if password is not None:
            flags |= 64
            tail += _text(password)
        self._hello = _packet(0x10, b"\x00\x04MQTT\x04", bytes((flags,)), _u16(keepalive_s), tail)
        self._backoff = Backoff()
        self._tries = 0
        self._topics = []
        self.in_flight = []  # (packet id, packet) of each QoS 1 publish that is not acknowledged
        self._most = max_in_flight
        self._id = 0
        self.oversize = 0
        self.refused = 0  # subscriptions that the broker refused
        self._rx = memoryview(bytearray(max_packet + 5))
        self._start = self._rx[:2]  # so that a poll() that finds nothing allocates nothing
        self._socket = None
        self._call = None  # (callback, arguments) that the packet just read asks for
        self._drop()

    def connect(self, wait=True):
        """Connect and wait for the broker's answer, or leave that to poll(). Raises OSError or MQTTError; a later
        poll() tries again, after a jittered back-off."""
        self._drop()
        self._backoff.failed()  # until the broker has answered
        net = self._net
        infos = net.getaddrinfo(self._where[0], self._where[1], 0, net.SOCK_STREAM)
        info = infos[self._tries % len(infos)]
        self._tries += 1
        stream = self._socket = net.socket(info[0], info[1])
        stream.setblocking(False)
        try:
            stream.connect(info[-1])
        except OSError as error:
            if error.errno != EINPROGRESS:
                self._drop()
                raise
        self._poller.register(stream, select.POLLOUT)
        self._timer_ms = ticks_ms()
        while wait and not self.connected:
            self.poll(0.02)

    def publish(self, topic, payload, qos=0, retain=False):
        """Hand over one message; poll() sees to the rest. Raises MQTTError, and has not taken it, without a connection
        or while max_in_flight others are under way."""
        if not self.connected:
            raise MQTTError("not connected")
        if len(self._queue) >= self._most or qos and len(self.in_flight) >= self._most:
            raise MQTTError("busy")
        number = self._next_id() if qos else b""
        packet = _packet(0x30 | qos << 1 | retain, _text(topic), number, payload)
        if qos:
            self.in_flight.append((number, packet))
        self._send(packet)

    def subscribe(self, topic, qos=1):
        """qos: 0 or 1. Holds for every later connection too."""
        self._topics.append((topic, qos))
        if self.connected:
            self._ask_for(topic, qos)

    def poll(self, wait_s=0.0):
        """Move what can be moved, waiting at most wait_s for something to come. Raises OSError or MQTTError once when
        the connection is lost; reconnects when that is due."""
        if not self._socket:
            if self._backoff.due():
                self.connect(False)
            return
        was_connected = self.connected
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
            if was_connected:
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
        self._poller = select.poll()
        self.connected = False
        self._queue = []  # packets to write; _sent bytes of the first one are written
        self._sent = 0
        self._awaited = True  # CONNACK first, PINGRESP later
        self._strikes = 0
        self._skip = 0  # bytes of an oversize message that are still to come
        self._expect()

    def _open(self, stream):
        """TCP stands (or failed: the first write says so): begin TLS and send CONNECT."""
        self._poller.modify(stream, select.POLLIN)
        if self._tls:
            stream = self._tls.wrap_socket(stream, server_hostname=self._where[0], do_handshake_on_connect=False)
            self._socket = stream
        self._write = getattr(stream, "write", None) or stream.send
        self._read = getattr(stream, "readinto", None) or stream.recv_into
        self._queue.append(self._hello)

    def _clock(self):
        limit_ms = self._half_ms if self.connected else CONNECT_MS
        if ticks_diff(ticks_ms(), self._timer_ms) < limit_ms:
            return
        if self._awaited or self._strikes >= _STRIKES:
            raise MQTTError("no answer in %d ms" % limit_ms)
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

    def _ask_for(self, topic, qos):
        self._queue.append(_packet(0x82, self._next_id(), _text(topic), bytes((qos,))))

    def _send(self, packet):
        self._queue.append(packet)
        try:
            self._flush()
        except OSError:
            pass  # the packet was taken; poll() meets the error again and reports it

    def _flush(self):
        while self._queue:
            # One packet at a time, never joined: TLS must see the same bytes again after it could not write them.
            packet = self._queue[0]
            count = _move(self._write, memoryview(packet)[self._sent :])
            if not count:
                return
            self._sent += count
            if self._sent >= len(packet):
                self._sent = 0
                self._queue.pop(0)

    def _expect(self):
        self._have = 0
        self._need = 2
        self._head = 0  # bytes of the fixed header, 0 while it is not complete
        self._into = self._start

    def _receive(self):
        """Read one piece, and handle the packet if that completes it. False if there was nothing to read."""
        count = _move(self._read, self._into)
        if count is None:
            return False
        if not count:
            raise MQTTError("closed")
        if self._skip and not self._have:
            self._skip -= count
            self._into = self._rx[: self._skip] if self._skip else self._start
            return True
        self._have += count
        if self._have == self._need and not self._head:
            self._measure()
        if self._have < self._need:
            self._into = self._rx[self._have : self._need]
            return True
        body = self._rx[self._head : self._need]
        self._expect()
        if self._skip:
            self._into = self._rx[: self._skip]
        self._handle(self._rx[0], body)
        return True

    def _measure(self):
        rx = self._rx
        last = self._have - 1
        if rx[last] & 128:
            if last == 4:
                raise MQTTError("malformed")
            self._need += 1
            return
        length = 0
        for i in range(last, 0, -1):
            length = length << 7 | rx[i] & 127
        self._head = last + 1
        if length > len(rx) - 5:
            self.oversize += 1
            self._skip = length - len(rx) + 5
            length = len(rx) - 5
        self._need = last + 1 + length

    def _handle(self, first, body):
        kind = first >> 4
        length = len(body)
        if self.connected is (kind == 2):
            kind = 0  # CONNACK comes first, and once
        if kind == 2 and length == 2:
            self._welcome(body[1])
        elif kind == 3:
            self._take(first >> 1 & 3, body)
        elif kind == 4 and length == 2:
            for entry in self.in_flight:
                if entry[0] == bytes(body):
                    self.in_flight.remove(entry)
                    self._strikes = 0
                    break
            self._backoff.worked()
        elif kind == 9 and length == 3:
            self.refused += body[2] >> 7
        elif kind == 13 and not length:
            self._awaited = False
            self._backoff.worked()
        else:
            raise MQTTError("packet %d of %d bytes" % (kind, length))

    def _welcome(self, code):
        if code:
            # 1 protocol, 2 client id, 3 unavailable, 4 user or password, 5 no right to connect
            raise MQTTError("refused, code %d" % code)
        self.connected = True
        self._awaited = False
        self._timer_ms = ticks_ms()
        for topic, qos in self._topics:
            self._ask_for(topic, qos)
        for _, packet in self.in_flight:
            packet[0] |= 8
            self._queue.append(packet)
        if self.on_connect:
            self._call = self.on_connect, ()

    def _take(self, qos, body):
        """A PUBLISH, acknowledged before the callback sees it: one that the callback can't stand must not come back
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
        if self.on_message and not self._skip:
            self._call = self.on_message, (topic, bytes(body[end:]))


def _move(call, view):
    """Bytes moved, None where it would block."""
    try:
        return call(view)
    except OSError as error:
        if error.errno in (EAGAIN, 2, 3):  # CPython's ssl says "want read" and "want write" as 2 and 3
            return None
        raise


def _u16(number):
    return bytes((number >> 8, number & 255))


def _text(text):
    """text: str or bytes -> with its two length bytes, as MQTT wants it."""
    raw = text.encode() if isinstance(text, str) else text
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
