"""MQTT as bytes, without a socket: version 5 on mqtt5 (a codec in Rust), version 3.1.1 by hand.

feed() takes what the socket gave and returns whole packets. A packet takes memory by its length only up to
MAX_PACKET_BYTES: of a longer one topic and packet id are kept, enough to acknowledge it, and the rest is dropped
as it comes. A PUBLISH that can't be decoded is handed on without topic and payload, so that it is acknowledged and not
sent again for ever.
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from stonechat.errors import StonechatError

MAX_PACKET_BYTES = 8192
MAX_REASON = 200  # characters of a broker's text
OVERSIZE = bytes(MAX_PACKET_BYTES)  # in place of a longer payload
SESSION_S = 86_400  # how long a broker of version 5 keeps what a collector that is away has not taken
RECEIVE_MAX = 8192  # messages of QoS 1 that a broker of version 5 may send ahead of their acknowledgement
_CONNACK, _PUBLISH, _PUBACK, _SUBACK, _DISCONNECT = 2, 3, 4, 9, 14
PING = b"\xc0\x00"
GOODBYE = b"\xe0\x00"


class ProtocolFault(StonechatError):
    """What no broker sends: the connection has to end."""


class WrongVersion(StonechatError):
    """The broker does not speak this version of MQTT."""


class Message(NamedTuple):
    topic: str
    payload: bytes
    mid: int  # packet id, to acknowledge it; 0 for QoS 0
    qos: int


class Arrived:
    """What feed() found."""

    __slots__ = ("messages", "accepted", "refused", "subscribed", "acknowledged")

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.accepted = False  # the log-in
        self.refused = ""  # why the log-in is refused, or the broker ends the connection
        self.subscribed: bool | None = None  # False where the broker refuses one of the topics
        self.acknowledged: list[int] = []


def _words(reason: object) -> str:
    """ConnAckReasonCode.NOT_AUTHORIZED -> "not authorized"; of the broker's own text what a terminal may show."""
    if isinstance(reason, str):
        return "".join(letter if letter.isprintable() else " " for letter in reason[:MAX_REASON])
    return str(getattr(reason, "name", reason)).rpartition(".")[2].replace("_", " ").lower()


class Codec(Protocol):
    version: str

    def connect(self, client_id: str, username: str | None, password: str | None, keepalive_s: int) -> bytes: ...

    def subscribe(self, mid: int, topics: Sequence[str]) -> bytes: ...

    def publish(self, topic: str, payload: bytes, qos: int, retain: bool, mid: int) -> bytes: ...

    def notices(self, publishes: Sequence[tuple[str, bytes]]) -> bytes: ...

    def feed(self, data: bytes) -> Arrived: ...


def acks(mids: Sequence[int]) -> bytes:
    """PUBACK for each, in both versions."""
    return struct.pack(f">{len(mids)}I", *[0x40020000 | mid for mid in mids])


def _length(count: int) -> bytes:
    made = bytearray()
    while True:
        made.append(count & 127 | (128 if count > 127 else 0))
        count >>= 7
        if not count:
            return bytes(made)


def _notices(publishes: Sequence[tuple[str, bytes]], properties: bytes) -> bytes:
    """A PUBLISH of QoS 0 for each (topic, payload)."""
    made = []
    for topic, payload in publishes:
        raw = topic.encode()
        size, total = len(raw), len(raw) + len(payload) + 2 + len(properties)
        if total < 128:
            made.append(bytes((0x30, total, size >> 8, size & 255)) + raw + properties + payload)
        else:
            made.append(b"\x30" + _length(total) + size.to_bytes(2) + raw + properties + payload)
    return b"".join(made)


def _text(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return len(raw).to_bytes(2) + raw


class _Framed:
    """Finds the packets in what arrives."""

    def __init__(self) -> None:
        self._rest = b""
        self._skip = 0  # bytes still to come of a packet that is too long

    def feed(self, data: bytes) -> Arrived:
        """Raises ProtocolFault or WrongVersion; then the connection has to end."""
        found = Arrived()
        if self._skip:
            dropped = min(self._skip, len(data))
            self._skip -= dropped
            data = data[dropped:]
        if self._rest:
            data = self._rest + data
        view, at, size = memoryview(data), 0, len(data)
        publish, messages = self._publish, found.messages
        while size - at >= 2:
            start = at + 2
            length = data[at + 1]
            if length > 127:
                length &= 127
                shift = 7
                while True:
                    if start >= size:
                        self._rest = data[at:]
                        return found
                    byte = data[start]
                    length |= (byte & 127) << shift
                    start += 1
                    shift += 7
                    if byte < 128:
                        break
                    if shift > 21:
                        raise ProtocolFault("a length of more than four bytes")
            end = start + length
            kind = data[at] >> 4
            if length > MAX_PACKET_BYTES:
                if kind != _PUBLISH:
                    raise ProtocolFault(f"a packet of kind {kind} with {length} bytes")
                if not self._oversize(data, at, start, length, found):
                    break
                return found
            if end > size:
                break
            if kind == _PUBLISH:
                if data[at] & 4:
                    raise ProtocolFault("QoS 2, which nobody has asked for")
                messages.append(publish(data, view, at, start, end))
            else:
                self._control(kind, data, view, at, start, end, found)
            at = end
        self._rest = data[at:]
        return found

    def _oversize(self, data: bytes, at: int, start: int, length: int, found: Arrived) -> bool:
        """A PUBLISH that is too long: False until enough of it has arrived to acknowledge it."""
        qos = data[at] >> 1 & 3
        if len(data) < start + 2:
            return False
        topic_end = start + 2 + int.from_bytes(data[start : start + 2])
        if len(data) < topic_end + 2:
            return False
        topic = data[start + 2 : topic_end].decode(errors="replace")
        found.messages.append(Message(topic, OVERSIZE, int.from_bytes(data[topic_end : topic_end + 2]), qos & 1))
        self._skip = max(0, start + length - len(data))
        self._rest = data[start + length :]
        if self._rest:  # the next packet is here already
            more = self.feed(b"")
            found.messages += more.messages
            found.acknowledged += more.acknowledged
        return True

    @staticmethod
    def _unreadable(data: bytes, at: int, start: int, end: int) -> Message:
        """A PUBLISH that can't be decoded, to be acknowledged all the same."""
        topic_end = start + 2 + int.from_bytes(data[start : start + 2])
        qos = data[at] >> 1 & 1
        if topic_end + 2 * qos > end or end - start < 2:
            raise ProtocolFault("a PUBLISH that is shorter than its topic")
        return Message("", b"", int.from_bytes(data[topic_end : topic_end + 2]) if qos else 0, qos)

    def _publish(self, data: bytes, view: memoryview, at: int, start: int, end: int) -> Message:
        raise NotImplementedError

    def _control(self, kind: int, data: bytes, view: memoryview, at: int, start: int, end: int, found: Arrived) -> None:
        raise NotImplementedError


class Codec3(_Framed):
    """MQTT 3.1.1."""

    version = "3.1.1"
    _REFUSALS = {
        2: "client id not allowed",
        3: "server unavailable",
        4: "bad user name or password",
        5: "not authorized",
    }

    def connect(self, client_id: str, username: str | None, password: str | None, keepalive_s: int) -> bytes:
        flags = (0x80 if username is not None else 0) | (0x40 if password is not None else 0)
        body = b"\x00\x04MQTT\x04" + bytes([flags]) + keepalive_s.to_bytes(2) + _text(client_id)
        for text in (username, password):
            if text is not None:
                body += _text(text)
        return b"\x10" + _length(len(body)) + body

    def subscribe(self, mid: int, topics: Sequence[str]) -> bytes:
        body = mid.to_bytes(2) + b"".join(_text(topic) + b"\x01" for topic in topics)
        return b"\x82" + _length(len(body)) + body

    def publish(self, topic: str, payload: bytes, qos: int, retain: bool, mid: int) -> bytes:
        body = _text(topic) + (mid.to_bytes(2) if qos else b"")
        return bytes([0x30 | qos << 1 | retain]) + _length(len(body) + len(payload)) + body + payload

    def notices(self, publishes: Sequence[tuple[str, bytes]]) -> bytes:
        return _notices(publishes, b"")

    def _publish(self, data: bytes, view: memoryview, at: int, start: int, end: int) -> Message:
        qos = data[at] >> 1 & 1
        topic_end = start + 2 + (data[start] << 8 | data[start + 1]) if end - start >= 2 else end + 1
        if topic_end + 2 * qos > end:
            raise ProtocolFault("a PUBLISH that is shorter than its topic")
        try:
            topic = data[start + 2 : topic_end].decode()
        except UnicodeDecodeError:
            return self._unreadable(data, at, start, end)
        if qos:
            return Message(topic, data[topic_end + 2 : end], data[topic_end] << 8 | data[topic_end + 1], 1)
        return Message(topic, data[topic_end:end], 0, 0)

    def _control(self, kind: int, data: bytes, view: memoryview, at: int, start: int, end: int, found: Arrived) -> None:
        body = data[start:end]
        if kind == _CONNACK and len(body) == 2:
            if body[1] == 1:
                raise WrongVersion("the broker does not speak MQTT 3.1.1")
            found.accepted = body[1] == 0
            if body[1]:
                found.refused = self._REFUSALS.get(body[1], f"reason {body[1]}")
        elif kind == _SUBACK and len(body) > 2:
            found.subscribed = all(code < 0x80 for code in body[2:])
        elif kind == _PUBACK and len(body) == 2:
            found.acknowledged.append(int.from_bytes(body))
        elif kind != 13 or body:
            raise ProtocolFault(f"a packet of kind {kind} that is none")


class Codec5(_Framed):
    """MQTT 5."""

    version = "5"

    def __init__(self) -> None:
        import mqtt5

        super().__init__()
        self._mqtt5 = mqtt5
        self._read = mqtt5.read

    def connect(self, client_id: str, username: str | None, password: str | None, keepalive_s: int) -> bytes:
        return self._mqtt5.ConnectPacket(
            client_id,
            username=username,
            password=None if password is None else password.encode(),
            keep_alive=keepalive_s,
            session_expiry_interval=SESSION_S,
            receive_max=RECEIVE_MAX,
        ).write()

    def subscribe(self, mid: int, topics: Sequence[str]) -> bytes:
        once = self._mqtt5.QoS.AT_LEAST_ONCE
        filters = [self._mqtt5.TopicFilter(topic, max_qos=once, retain_as_published=False) for topic in topics]
        return self._mqtt5.SubscribePacket(mid, filters).write()

    def publish(self, topic: str, payload: bytes, qos: int, retain: bool, mid: int) -> bytes:
        body = _text(topic) + (mid.to_bytes(2) if qos else b"") + b"\x00"
        return bytes([0x30 | qos << 1 | retain]) + _length(len(body) + len(payload)) + body + payload

    def notices(self, publishes: Sequence[tuple[str, bytes]]) -> bytes:
        return _notices(publishes, b"\x00")

    def _publish(self, data: bytes, view: memoryview, at: int, start: int, end: int) -> Message:
        try:
            data[start + 2 : start + 2 + (data[start] << 8 | data[start + 1])].decode()  # mqtt5 panics at what is none
            packet, _ = self._read(view[at:end])
            return Message(packet.topic, packet.payload, packet.packet_id or 0, data[at] >> 1 & 1)  # type: ignore[union-attr]
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a panic of the codec's is no Exception
            return self._unreadable(data, at, start, end)

    def _control(self, kind: int, data: bytes, view: memoryview, at: int, start: int, end: int, found: Arrived) -> None:
        if kind == _CONNACK and (end - start == 2 or data[start + 1] in (1, 0x84)):
            raise WrongVersion("the broker does not speak MQTT 5")
        try:
            packet, _ = self._read(view[at:end])
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            raise ProtocolFault(f"a packet of kind {kind} that is none: {error}") from None
        if isinstance(packet, self._mqtt5.ConnAckPacket):
            found.accepted = int(packet.reason_code) == 0
            if not found.accepted:
                found.refused = _words(packet.reason_str or packet.reason_code)
        elif isinstance(packet, self._mqtt5.SubAckPacket):
            found.subscribed = all(int(code) < 0x80 for code in packet.reason_codes)
        elif isinstance(packet, self._mqtt5.PubAckPacket):
            found.acknowledged.append(packet.packet_id)
        elif isinstance(packet, self._mqtt5.DisconnectPacket):
            found.refused = _words(packet.reason_str or packet.reason_code)
        elif not isinstance(packet, self._mqtt5.PingRespPacket):
            raise ProtocolFault(f"a packet of kind {kind}, which only a client sends")


def codec(version: str) -> Codec:
    return Codec5() if version == "5" else Codec3()
