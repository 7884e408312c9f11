"""The MQTT client against a broker that the test itself plays, byte by byte, on loopback."""

import os
import socket

from share import EVERY
from stonechat.compat import sleep_ms, ticks_diff, ticks_ms
from stonechat.errors import MQTTError
from stonechat.mqtt import Client

CONNACK = b"\x20\x02\x00\x00"


class Broker:
    """One listening socket, one client at a time; the test says what it answers."""

    def __init__(self):
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for _ in range(50):  # MicroPython can't say which port it was given, so choose
            number = os.urandom(2)
            self.port = 20000 + (number[0] << 8 | number[1]) % 12000
            try:
                self.listener.bind(socket.getaddrinfo("127.0.0.1", self.port)[0][-1])
                break
            except OSError:
                pass
        self.listener.listen(2)
        self.stream = None

    def accept(self):
        if self.stream is not None:
            self.stream.close()
        self.stream = self.listener.accept()[0]
        self.stream.settimeout(5)

    def read(self, count):
        """Exactly count bytes."""
        got = b""
        while len(got) < count:
            piece = self.stream.recv(count - len(got))
            assert piece, "the client hung up after %r" % got
            got += piece
        return got

    def packet(self):
        """(first byte, body) of the client's next packet."""
        first = self.read(1)[0]
        length = shift = 0
        while True:
            byte = self.read(1)[0]
            length |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return first, self.read(length)

    def send(self, data):
        self.stream.send(data)

    def greet(self, client):
        """Take the client's connection -> the body of its CONNECT."""
        client.connect(False)
        self.accept()
        settle(client, lambda: not client._write or client._queue)
        first, hello = self.packet()
        assert first == 0x10
        return hello

    def welcome(self, client):
        """Let the client in -> the body of its CONNECT."""
        hello = self.greet(client)
        self.send(CONNACK)
        settle(client, lambda: not client.connected)
        return hello

    def close(self):
        if self.stream is not None:
            self.stream.close()
        self.listener.close()


def settle(client, busy, limit_ms=3000):
    """Poll until not busy()."""
    start_ms = ticks_ms()
    while busy():
        client.poll()
        assert ticks_diff(ticks_ms(), start_ms) < limit_ms, "still busy"
        sleep_ms(1)


def fails(call, limit_ms=3000):
    """Call until it raises an MQTTError or OSError -> that error's text."""
    start_ms = ticks_ms()
    while ticks_diff(ticks_ms(), start_ms) < limit_ms:
        try:
            call()
        except (MQTTError, OSError) as error:
            return str(error)
        sleep_ms(1)
    raise AssertionError("no error in %d ms" % limit_ms)


def client_of(port, **options):
    """A Client; its handlers and its will may be among the options."""
    attributes = [(name, options.pop(name)) for name in ("will", "on_message", "on_connect") if name in options]
    client = Client("id", "127.0.0.1", port, **options)
    for name, value in attributes:
        setattr(client, name, value)
    return client


def pair(**options):
    broker = Broker()
    client = client_of(broker.port, **options)
    hello = broker.welcome(client)
    return broker, client, hello


def test_connect_carries_will_user_and_password():
    broker, client, hello = pair(user="u", password=b"p", keepalive_s=300, will=("w", b"gone", 1, True))
    assert hello == b"\x00\x04MQTT\x04\xec\x01\x2c\x00\x02id\x00\x01w\x00\x04gone\x00\x01u\x00\x01p"
    client.close()
    assert broker.read(2) == b"\xe0\x00"
    broker.close()


def test_plain_connect_keeps_the_session():
    broker, client, hello = pair()
    assert hello == b"\x00\x04MQTT\x04\x00\x00\x3c\x00\x02id"
    client.close()
    broker.close()


def test_publish_at_0_and_1_and_the_acknowledgement():
    broker, client, _ = pair()
    client.publish("a/b", b"x" * 200)
    client.publish("a/b", b"y", 1, True)
    assert broker.packet() == (0x30, b"\x00\x03a/b" + b"x" * 200)
    assert broker.packet() == (0x33, b"\x00\x03a/b\x00\x01y")
    assert len(client.in_flight) == 1
    broker.send(b"\x40\x02\x00\x07")  # not ours: passed over
    broker.send(b"\x40\x02\x00\x01")
    settle(client, lambda: client.in_flight)
    broker.close()
    client.close()


def test_no_connection_means_not_taken():
    client = Client("id", "127.0.0.1", 1)
    assert "not connected" in fails(lambda: client.publish("t", b""))
    assert not client.in_flight


def test_in_flight_is_bounded():
    broker, client, _ = pair(max_in_flight=2)
    client.publish("t", b"1", 1)
    client.publish("t", b"2", 1)
    assert "busy" in fails(lambda: client.publish("t", b"3", 1))
    client.publish("t", b"4")  # QoS 0 waits for nothing
    broker.close()
    client.close()


def test_unacknowledged_publishes_come_again_marked_and_in_order():
    broker, client, _ = pair()
    for payload in (b"1", b"2", b"3"):
        client.publish("t", payload, 1)
        broker.packet()
    broker.send(b"\x40\x02\x00\x02")
    settle(client, lambda: len(client.in_flight) > 2)
    broker.stream.close()
    broker.stream = None
    assert fails(client.poll)
    assert not client.connected
    broker.welcome(client)
    assert broker.packet() == (0x3A, b"\x00\x01t\x00\x011")
    assert broker.packet() == (0x3A, b"\x00\x01t\x00\x033")
    broker.close()
    client.close()


def test_ids_wrap_over_those_in_flight():
    broker, client, _ = pair()
    client._id = 65533
    seen = []
    for payload in (b"1", b"2", b"3"):
        client.publish("t", payload, 1)
        seen.append(broker.packet()[1][3:5])
    assert seen == [b"\xff\xfe", b"\xff\xff", b"\x00\x01"]
    client._id = 65533
    client.publish("t", b"4", 1)
    assert broker.packet()[1][3:5] == b"\x00\x02"
    broker.close()
    client.close()


def test_subscriptions_hold_for_every_connection():
    taken = []
    broker = Broker()
    client = client_of(broker.port, on_message=lambda topic, payload: taken.append((topic, payload)))
    client.subscribe("c/1", 1)
    broker.welcome(client)
    assert broker.packet() == (0x82, b"\x00\x01\x00\x03c/1\x01")
    broker.send(b"\x90\x03\x00\x01\x01")
    client.subscribe("d", 0)
    settle(client, lambda: client._queue)
    assert broker.packet() == (0x82, b"\x00\x02\x00\x01d\x00")
    broker.send(b"\x90\x03\x00\x02\x80")
    settle(client, lambda: not client.refused)
    broker.send(b"\x30\x06\x00\x01dabc" + b"\x32\x08\x00\x03c/1\x12\x34z")
    settle(client, lambda: len(taken) < 2)
    assert taken == [("d", b"abc"), ("c/1", b"z")]
    assert broker.read(4) == b"\x40\x02\x12\x34"
    broker.welcome(client)
    assert broker.packet()[1][2:] == b"\x00\x03c/1\x01"
    assert broker.packet()[1][2:] == b"\x00\x01d\x00"
    broker.close()
    client.close()


class CountingNet:
    """The socket module, counting look-ups."""

    def __init__(self):
        self.socket = socket.socket
        self.SOCK_STREAM = socket.SOCK_STREAM
        self.lookups = 0

    def getaddrinfo(self, *where):
        self.lookups += 1
        return socket.getaddrinfo(*where)


def test_a_lost_connection_comes_back_without_a_look_up():
    net = CountingNet()
    broker = Broker()
    client = client_of(broker.port, socket=net)
    broker.welcome(client)
    broker.stream.close()
    fails(client.poll)
    broker.welcome(client)
    assert net.lookups == 1
    broker.stream.close()
    fails(client.poll)
    broker.greet(client)  # the known address is tried once; what follows asks again
    broker.stream.close()
    fails(client.poll)
    broker.welcome(client)
    assert net.lookups == 2
    broker.close()


def test_one_byte_at_a_time():
    taken = []
    broker, client, _ = pair(on_message=lambda topic, payload: taken.append((topic, payload)))
    body = b"\x00\x01t" + b"p" * 300
    for byte in b"\x30\xaf\x02" + body:
        broker.send(bytes((byte,)))
        client.poll()
    settle(client, lambda: not taken)
    assert taken == [("t", b"p" * 300)]
    broker.close()
    client.close()


def test_partial_writes_lose_nothing():
    broker, client, _ = pair()
    whole = client._write
    blocked = [0]

    def three_bytes_or_none(view):
        blocked[0] += 1
        return None if blocked[0] & 1 else whole(view[:3])

    client._write = three_bytes_or_none
    client.publish("topic", b"payload", 1)
    client.publish("topic", b"second", 0)
    settle(client, lambda: client._queue)
    assert broker.packet() == (0x32, b"\x00\x05topic\x00\x01payload")
    assert broker.packet() == (0x30, b"\x00\x05topicsecond")
    broker.close()
    client.close()


def test_oversize_messages_are_passed_over_and_acknowledged():
    taken = []
    broker, client, _ = pair(max_packet=64, on_message=lambda topic, payload: taken.append(payload))
    broker.send(b"\x32\xad\x02\x00\x01t\x00\x09" + b"x" * 296 + b"\x30\x04\x00\x01tz")
    settle(client, lambda: not taken)
    assert taken == [b"z"]
    assert client.oversize == 1
    assert broker.read(4) == b"\x40\x02\x00\x09"
    broker.close()
    client.close()


def test_garbage_ends_the_connection_with_an_error():
    for garbage in (
        b"\x00\x00",  # type 0
        b"\x20\x02\x00\x00",  # a second CONNACK
        b"\x30\xff\xff\xff\xff\x7f",  # a length of five bytes
        b"\x30\x01\x00",  # no space for the topic's length
        b"\x30\x03\x00\x09t",  # a topic longer than the packet
        b"\x32\x03\x00\x01t",  # QoS 1 without a packet id
        b"\x36\x05\x00\x01t\x00\x01",  # QoS 3
        b"\x30\x04\x00\x02\xff\xfe",  # a topic that is not UTF-8
        b"\x40\x03\x00\x01\x00",  # PUBACK of three bytes
        b"\xd0\x01\x00",  # PINGRESP with a body
        b"\x90\x02\x00\x01",  # SUBACK without a code
        b"\xf0\x00",
    ):
        broker, client, _ = pair()
        broker.send(garbage)
        assert fails(client.poll), garbage
        assert not client.connected
        broker.close()
        client.close()


def test_garbage_in_place_of_connack():
    for answer, word in ((b"\x20\x02\x00\x05", "code 5"), (b"HTTP/1.1 400 " * 9, "packet"), (b"\x30\x02\x00\x00", "")):
        broker = Broker()
        client = Client("id", "127.0.0.1", broker.port)
        broker.greet(client)
        broker.send(answer)
        assert word in fails(client.poll)
        assert not client.connected
        broker.close()
        client.close()


def test_refused_connection_raises_and_waits_before_the_next():
    broker = Broker()
    broker.listener.close()
    client = Client("id", "127.0.0.1", broker.port)
    assert fails(client.connect)
    assert not client._backoff.due()
    client.poll()  # not due: nothing happens
    assert client._socket is None


def test_silent_broker_is_given_up():
    broker = Broker()
    client = Client("id", "127.0.0.1", broker.port)
    client.connect(False)
    settle(client, lambda: not client._write or client._queue)
    client._timer_ms -= 10001
    assert "no answer" in fails(client.poll)
    broker.close()
    client.close()


def test_ping_and_no_answer_to_it():
    broker, client, _ = pair(keepalive_s=60)
    client._timer_ms -= 30001
    settle(client, lambda: not client._awaited)
    client.poll()
    assert broker.read(2) == b"\xc0\x00"
    broker.send(b"\xd0\x00")
    settle(client, lambda: client._awaited)
    client._timer_ms -= 30001
    client.poll()
    client._timer_ms -= 30001
    assert "no answer" in fails(client.poll)
    broker.close()
    client.close()


def test_a_broker_that_pings_but_never_acknowledges():
    broker, client, _ = pair()
    client.publish("t", b"", 1)
    broker.packet()
    for _ in range(3):
        client._timer_ms -= 30001
        client.poll()
        client.poll()
        assert broker.read(2) == b"\xc0\x00"
        broker.send(b"\xd0\x00")
        settle(client, lambda: client._awaited)
    client._timer_ms -= 30001
    assert "no answer" in fails(client.poll)
    assert len(client.in_flight) == 1
    broker.close()
    client.close()


def test_an_exception_from_a_callback_keeps_the_connection():
    def refuse(topic, payload):
        raise MQTTError("callback")

    broker, client, _ = pair(on_message=refuse)
    broker.send(b"\x32\x06\x00\x01t\x00\x05z")
    assert "callback" in fails(client.poll)
    assert client.connected
    client.poll()
    assert broker.read(4) == b"\x40\x02\x00\x05"
    broker.close()
    client.close()


def test_fields_are_bounded():
    broker, client, _ = pair()
    assert "too long" in fails(lambda: client.publish("t" * 65536, b""))
    assert not client.in_flight and not client._queue
    broker.close()
    client.close()


class Stream:
    """In place of a socket: gives `data` in pieces of up to `step` bytes, then nothing more."""

    def __init__(self, data, step):
        self.data = data
        self.step = step
        self.at = 0

    def read(self, view):
        count = min(self.step, len(view), len(self.data) - self.at)
        if not count:
            return None
        view[:count] = self.data[self.at : self.at + count]
        self.at += count
        return count

    def close(self):
        pass


def test_any_bytes_are_taken_or_refused_and_never_loop():
    state = 4711
    refused = 0
    for number in range(400 // EVERY):
        data = bytearray()
        while len(data) < 60:
            state = state * 25173 + 13849 & 0xFFFF
            kind = state >> 8 & 7
            if kind < 3:  # something that begins like a packet
                data += bytes((0x20 + 0x10 * (state >> 11 & 7), kind * 3 + 1))
            data.append(state >> 5 & 255)
        client = client_of(1, max_packet=16, on_message=lambda topic, payload: None)
        stream = Stream(data, 1 + number % 7)
        client._socket = stream
        client._read = stream.read
        client._write = len
        client.connected = number & 1 == 1
        client._timer_ms = ticks_ms()
        try:
            for _ in range(80):
                client.poll()
        except MQTTError:
            refused += 1
            assert client._socket is None and not client.connected
        else:
            assert stream.at == len(data)
    assert refused > 200 // EVERY
