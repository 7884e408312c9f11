"""MQTT through paho-mqtt, without its thread and without its blocking connect(): the agent's loop drives both.

The import costs about 12 MB of memory; own_client.OwnClient is the small choice with the same interface. Name look-up,
TCP and TLS are made here, step by step, as in mqtt.Client; paho gets a stream that is ready, and that shows it no
packet of more than MAX_PACKET bytes.
"""

import os
import select
import socket
from errno import EINPROGRESS
from typing import Any

from ..compat import ticks_add, ticks_diff, ticks_ms
from ..errors import ConfigError, MQTTError
from .resolver import Resolver, RoundBackoff

CONNECT_MS = 10_000  # from the start of TCP to CONNACK
MAX_PACKET = 1024
MAX_QUEUED = 64  # messages that wait inside paho; the outbox keeps the rest
MISC_EVERY_MS = 1000
_SKIPS_PER_READ = 16  # pieces of an oversize packet that one read() throws away
_PIECE_BYTES = 16_384
_CONNACK_CODES = {132: 1, 133: 2, 136: 3, 134: 4, 135: 5}  # paho's reason codes of MQTT 5 -> return codes of 3.1.1


def load():
    """Import paho-mqtt, while the process may still read wherever it is installed. Raises ConfigError."""
    try:
        from paho.mqtt import client
    except ImportError:
        raise ConfigError(
            '[mqtt] transport = "paho" needs paho-mqtt: pip install "stonechat[linux]", '
            'in a clone ".[linux]"; or transport = "auto"'
        )
    if not hasattr(client.Client, "_create_socket"):
        raise ConfigError('[mqtt] transport = "paho" needs paho-mqtt 2.x; or transport = "auto"')
    return client


class Paho:
    """One broker. Connects by itself, again and again with jittered back-off; `on_message(topic, payload)` is called
    from poll(), `on_connect()` after every CONNACK. `in_flight`: the message ids of QoS 1 publishes without a PUBACK;
    `refused`: subscriptions that the broker refused since it connected; `oversize`: messages thrown away. `will`,
    `resend`, `on_published`: as in mqtt.Client; set `will` before the first poll()."""

    def __init__(
        self,
        client_id: str,
        host: str,
        port: int,
        *,
        resolver: Resolver | None = None,
        user: str | None = None,
        password: str | None = None,
        tls: Any = None,
        keepalive_s: int = 60,
    ) -> None:
        paho: Any = load()
        self._paho = paho
        self._tls = tls
        self._resolver = resolver or Resolver(host, port, socket)
        self._backoff = RoundBackoff(self._resolver)
        self._stable_ms = keepalive_s * 500
        self._began_ms = ticks_ms()
        self._misc_due_ms = ticks_ms()
        self._topics: list[tuple[str, int]] = []
        self.on_message: Any = None
        self.on_connect: Any = None
        self.on_published: Any = None
        self.resend = True
        self.will: tuple[str, bytes, int, bool] | None = None
        self.connected = False
        self.in_flight: list[int] = []
        self.refused = 0
        self.oversize = 0
        self._stream: Any = None  # while paho has none: connecting, or in the TLS handshake
        self._wrapped = False  # TLS has begun
        self._writes = True  # the stream is waited for to be writable, else readable
        self._bounded: BoundedStream | None = None
        self._lost: Exception | None = None
        transport = self

        class Client(paho.Client):  # type: ignore[misc]  # paho may not be installed
            def _create_socket(self):
                return transport._bounded

        client = Client(
            paho.CallbackAPIVersion.VERSION2, client_id=client_id, protocol=paho.MQTTv311, clean_session=False
        )
        client.max_queued_messages_set(MAX_QUEUED)
        if user is not None:
            client.username_pw_set(user, password)
        client.on_connect = self._connected
        client.on_disconnect = self._disconnected
        client.on_message = self._message
        client.on_subscribe = self._subscribed
        client.on_publish = self._published
        client.connect_async(host, port, keepalive_s)
        self._client = client

    def publish(self, topic: str, payload: bytes, qos: int = 0, retain: bool = False):
        """Hand over one message. With QoS 1 -> its handle, for on_published. Raises MQTTError while there is no
        connection or the queue is full."""
        if not self.connected:
            raise MQTTError("not connected")
        info = self._client.publish(topic, payload, qos, retain)
        if info.rc != self._paho.MQTT_ERR_SUCCESS:
            raise MQTTError("busy" if info.rc == self._paho.MQTT_ERR_QUEUE_SIZE else "publish: %s" % info.rc)
        if not qos:
            return None
        self.in_flight.append(info.mid)
        return info.mid

    def subscribe(self, topic: str, qos: int = 1) -> None:
        """Holds for every later connection too."""
        self._topics.append((topic, qos))
        if self.connected:
            self._client.subscribe(topic, qos)

    def poll(self, wait_s: float = 0.0) -> None:
        """Move bytes; waits at most wait_s. Raises OSError or MQTTError once when the connection, or a try to make one,
        fails; tries again when that is due."""
        try:
            if self._lost is not None:  # a publish() has met the end of the connection
                pass
            elif self._client.socket() is None:
                self._connect(wait_s)
            else:
                self._move(wait_s)
                self._clock()
        except (OSError, MQTTError) as error:  # first: ssl's verification errors are ValueErrors too
            self._lost = error
        except ValueError as error:  # of ssl, for a stream that has ended meanwhile
            self._lost = MQTTError(str(error))
        if self._lost is None:
            return
        lost, self._lost = self._lost, None
        was_connected = self.connected
        self._drop()
        self._backoff.failed()
        if was_connected or not self._backoff.silent:  # else the next address is tried first
            raise lost

    def close(self) -> None:
        """Say goodbye to the broker (it keeps the last will to itself then)."""
        if self._client.socket() is not None:
            self._client.disconnect()
            self._client.loop_write()
        self._drop()

    def _drop(self) -> None:
        self.connected = False
        for stream in (self._stream, self._bounded):
            if stream is not None:
                stream.close()
        self._stream = self._bounded = None
        if self._client.socket() is not None:
            self._client._sock_close()
        self._lost = None  # what closing it has reported is known
        if not self.resend:
            self._client._out_messages.clear()
            self._client._inflight_messages = 0
            self.in_flight = []

    def _connect(self, wait_s: float) -> None:
        """One step towards a stream for paho."""
        if self._stream is None:
            if not (self._backoff.due() and self._resolver.ready()):
                if wait_s:
                    select.select([], [], [], wait_s)
                return
            family, kind, _, _, address = self._resolver.getaddrinfo()[0]
            self._began_ms = ticks_ms()
            self._wrapped = False
            self._writes = True
            self._stream = socket.socket(family, kind)
            self._stream.setblocking(False)
            try:
                self._stream.connect(address)
            except OSError as error:
                if error.errno != EINPROGRESS:
                    raise
        if self._moves(self._stream, self._writes, wait_s) and self._shake_hands():
            self._bounded = BoundedStream(self._stream)
            self._stream = None
            if self.will is not None:
                self._client.will_set(*self.will)
            self._client.reconnect()
        self._clock()

    def _shake_hands(self) -> bool:
        """True once the stream is ready for MQTT."""
        if not self._wrapped:
            code = self._stream.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code))
            if self._tls is None:
                return True
            self._stream = self._tls.wrap_socket(
                self._stream, server_hostname=self._resolver.host, do_handshake_on_connect=False
            )
            self._wrapped = True
        try:
            self._stream.do_handshake()
        except OSError as error:
            if error.errno not in (2, 3):  # want read, want write
                raise
            self._writes = error.errno == 3
            return False
        return True

    def _move(self, wait_s: float) -> None:
        client = self._client
        stream: Any = client.socket()
        pending = stream.pending()  # TLS may hold bytes that poll() can't see
        writes = client.want_write()
        poller = select.poll()
        poller.register(stream, select.POLLIN | (select.POLLOUT if writes else 0))
        poller.poll(0 if pending else int(wait_s * 1000))
        client.loop_read()
        if writes and client.socket() is not None:
            client.loop_write()
        now_ms = ticks_ms()
        if ticks_diff(now_ms, self._misc_due_ms) >= 0:
            self._misc_due_ms = ticks_add(now_ms, MISC_EVERY_MS)
            client.loop_misc()
        if client.socket() is None and self._lost is None:
            self._lost = MQTTError("closed")
        if self._lost is not None and self._bounded is not None and self._bounded.error is not None:
            self._lost = self._bounded.error  # paho keeps what the stream said to its own log

    def _clock(self) -> None:
        elapsed_ms = ticks_diff(ticks_ms(), self._began_ms)
        if not self.connected:
            if elapsed_ms >= CONNECT_MS:
                raise MQTTError("no answer")
        elif elapsed_ms >= self._stable_ms and self._began_ms:
            self._began_ms = ticks_ms()
            self._backoff.worked()

    def _moves(self, stream, writes: bool, wait_s: float) -> bool:
        poller = select.poll()
        poller.register(stream, select.POLLOUT if writes else select.POLLIN)
        return bool(poller.poll(int(wait_s * 1000)))

    def _connected(self, client, userdata, flags, reason, properties) -> None:
        if reason.is_failure:
            self._lost = MQTTError("refused, code %d" % _CONNACK_CODES.get(reason.value, reason.value))
            return
        self.connected = True
        self._began_ms = ticks_ms()
        self.refused = 0
        for topic, qos in self._topics:
            client.subscribe(topic, qos)
        if self.on_connect is not None:
            self.on_connect()

    def _disconnected(self, client, userdata, flags, reason, properties) -> None:
        if self._lost is None:
            timed_out = reason.value == self._paho.MQTT_ERR_KEEPALIVE or "Keep alive" in str(reason)
            self._lost = MQTTError("no answer" if timed_out else "closed")

    def _subscribed(self, client, userdata, mid, reasons, properties) -> None:
        self.refused += sum([reason.is_failure for reason in reasons])

    def _published(self, client, userdata, mid, reason, properties) -> None:
        if mid in self.in_flight:
            self.in_flight.remove(mid)
            if self.on_published is not None:
                self.on_published(mid)

    def _message(self, client, userdata, message) -> None:
        if self._bounded is not None and self._bounded.oversize:
            self.oversize += self._bounded.oversize
            self._bounded.oversize = 0
            return  # what is left of it: topic and id
        if self.on_message is not None:
            self.on_message(message.topic, message.payload)


class BoundedStream:
    """A connected stream as paho reads it, non-blocking. Of a PUBLISH of more than MAX_PACKET bytes it passes on the
    topic and the id, so that it is acknowledged, throws the rest away and counts it in `oversize`; any other packet of
    that size ends the connection. `error`: the OSError that ended the stream."""

    def __init__(self, stream) -> None:
        self._stream = stream
        self.error: OSError | None = None
        self.oversize = 0
        self._head = b""  # of the packet, while it is not complete
        self._out = b""  # to be read next
        self._pass = 0  # bytes of the packet that go through
        self._skip = 0  # and that are thrown away

    def recv(self, count: int) -> bytes:
        try:
            return self._recv(count)
        except OSError as error:
            if not isinstance(error, BlockingIOError) and error.errno not in (2, 3):
                self.error = error
            raise

    def send(self, data) -> int:
        try:
            return int(self._stream.send(data))
        except OSError as error:
            if not isinstance(error, BlockingIOError) and error.errno not in (2, 3):
                self.error = error
            raise

    def pending(self) -> int:
        return int(getattr(self._stream, "pending", int)()) or len(self._out)

    def fileno(self) -> int:
        return int(self._stream.fileno())

    def setblocking(self, flag: bool) -> None:
        self._stream.setblocking(flag)

    def close(self) -> None:
        self._stream.close()

    def _recv(self, count: int) -> bytes:
        for _ in range(_SKIPS_PER_READ):
            if self._out:
                data, self._out = self._out[:count], self._out[count:]
                return data
            if self._pass:
                data = self._stream.recv(min(count, self._pass))
                self._pass -= len(data)
                return data
            if self._skip:
                data = self._stream.recv(min(self._skip, _PIECE_BYTES))
                self._skip -= len(data)
                if not data:
                    return b""
                continue
            data = self._stream.recv(self._missing())
            if not data:
                return b""
            self._head += data
            self._begin()
        raise BlockingIOError

    def _missing(self) -> int:
        """Bytes that the head lacks, as far as they are known."""
        at, length = _fixed_header(self._head)
        if not at:
            return 1
        if len(self._head) < at + 2:
            return at + 2 - len(self._head)
        return self._prefix(at, length) - len(self._head)

    def _begin(self) -> None:
        at, length = _fixed_header(self._head)
        if not at:
            return
        if length <= MAX_PACKET:
            self._out, self._pass, self._head = self._head, length, b""
            return
        if self._head[0] >> 4 != 3:
            raise ConnectionError("a packet of %d bytes from the broker" % length)
        if len(self._head) < at + 2 or len(self._head) < self._prefix(at, length):
            return
        kept = self._head[at:]
        self._out = self._head[:1] + _varint(len(kept)) + kept
        self._skip = length - len(kept)
        self._head = b""
        self.oversize += 1

    def _prefix(self, at: int, length: int) -> int:
        """Where topic and id of the oversize PUBLISH end."""
        size = 2 + (self._head[at] << 8 | self._head[at + 1]) + (2 if self._head[0] & 6 else 0)
        if size > min(length, MAX_PACKET):
            raise ConnectionError("malformed packet from the broker")
        return at + size


def _fixed_header(head: bytes) -> tuple[int, int]:
    """-> (its size, the length that it announces); (0, 0) while it is not complete. Raises ConnectionError."""
    length = shift = 0
    for at in range(1, len(head)):
        if at > 4:
            raise ConnectionError("malformed packet from the broker")
        length |= (head[at] & 127) << shift
        shift += 7
        if head[at] < 128:
            return at + 1, length
    return 0, 0


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)
