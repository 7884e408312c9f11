"""The same connection as bulk_client.BulkClient, by paho-mqtt: one callback a message. For a comparison, and for
whoever wants it."""

import contextlib
import ssl
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .connection import BoundedClient, explain, refused, unanswered
from .mqtt_codec import OVERSIZE, Message

if TYPE_CHECKING:
    from paho.mqtt.client import MQTTMessageInfo

MAX_ACKS_UNSENT = 1000
SPACE_WAIT_S = 10.0


class PahoClient:
    """As BulkClient. wait_space(seconds): blocks until the owner has space; False where it has none by then."""

    def __init__(
        self,
        client_id: str,
        where: tuple[str, int],
        topics: Sequence[str],
        *,
        on_messages: Callable[[list[Message]], None],
        on_state: Callable[[bool, str], None],
        wait_space: Callable[[float], bool],
        username: str | None = None,
        password: str | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._where = where
        self._topics = list(topics)
        self._on_messages = on_messages
        self._on_state = on_state
        self._wait_space = wait_space
        self._tls = tls is not None
        self._answered = self._stopping = False
        self._unsent: deque[MQTTMessageInfo] = deque()
        self.epoch = 0
        self.failure: BaseException | None = None
        client = BoundedClient(
            client_id, username=username, password=password, tls=tls, clean_session=False, manual_ack=True
        )
        client.on_pre_connect = self._on_pre_connect
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_subscribe = self._on_subscribe
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        self._client = client

    def start(self) -> None:
        self._client.connect_async(*self._where, keepalive=30)
        self._client.loop_start()

    def stop(self, wait_s: float = 10.0) -> None:
        self._stopping = True
        self._client.disconnect()
        self._client.loop_stop()

    def wake(self) -> None:
        pass

    def send(self, mids: Sequence[int], publishes: Sequence[tuple[str, bytes]], epoch: int | None = None) -> None:
        if epoch in (None, self.epoch):
            for mid in mids:
                self._client.ack(mid, 1)
        while self._unsent and (self._unsent[0].rc or self._unsent[0].is_published()):
            self._unsent.popleft()
        if len(self._unsent) > MAX_ACKS_UNSENT:  # the broker does not read: what is not acknowledged comes again
            self.break_off()
            return
        for topic, payload in publishes:
            info = self._client.publish(topic, payload, 0)
            if not info.rc:
                self._unsent.append(info)

    def publish(self, topic: str, payload: bytes, qos: int = 1, retain: bool = False) -> bool:
        return not self._client.publish(topic, payload, qos, retain).rc

    def break_off(self) -> None:
        self._client.break_off()

    # --- paho's thread --------------------------------------------------------------------------------------------

    def _on_pre_connect(self, _client: Any, _user: Any) -> None:
        self._answered = False

    def _on_connect_fail(self, _client: Any, _user: Any) -> None:
        self._on_state(False, explain(*self._where, sys.exc_info()[1]))  # paho calls this where it has caught it

    def _on_connect(self, client: Any, _user: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        self._answered = True
        if reason.is_failure:
            self._on_state(False, refused(*self._where, reason))
            return
        self.epoch += 1  # a broker that kept the session sends what waits before it answers the subscription
        client.subscribe([(topic, 1) for topic in self._topics])

    def _on_subscribe(self, _client: Any, _user: Any, _mid: int, reasons: Any, _properties: Any) -> None:
        if any(reason.is_failure for reason in reasons):
            self._on_state(False, f"broker refuses the subscription to {self._topics[0]}: is --prefix the fleet's?")
            self.break_off()
            return
        self._on_state(True, "")

    def _on_disconnect(self, _client: Any, _user: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if self._stopping:
            return
        if not self._answered:
            self._on_state(False, unanswered(*self._where, self._tls))
        else:
            self._on_state(False, f"broker {self._where[0]}:{self._where[1]}: connection lost ({reason})")

    def _on_message(self, _client: Any, _user: Any, message: Any) -> None:
        # What paho kept of a longer packet is less than it had: the collector gets the length that it refuses.
        payload = message.payload if len(message.payload) < len(OVERSIZE) else OVERSIZE
        with contextlib.suppress(UnicodeDecodeError):
            self._take(Message(message.topic, payload, message.mid, min(message.qos, 1)))
            return
        self._take(Message("", b"", message.mid, min(message.qos, 1)))

    def _take(self, message: Message) -> None:
        if message.qos and not self._wait_space(SPACE_WAIT_S):
            self.break_off()  # it is sent again
            return
        self._on_messages([message])
