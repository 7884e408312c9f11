"""MQTT through paho-mqtt, without its thread: the agent's loop drives it, so nothing runs as another user.

The import costs about 12 MB of memory; mqtt.Client has the same interface and is smaller.
"""

import select
from typing import Any

from ..compat import ticks_diff, ticks_ms
from ..errors import ConfigError, MQTTError
from ..mqtt import Backoff

CONNECT_TIMEOUT_S = 5.0
MAX_QUEUED = 64  # messages that wait inside paho; the outbox keeps the rest
MISC_EVERY_MS = 1000


def load():
    """Import paho-mqtt, while the process may still read wherever it is installed. Raises ConfigError."""
    try:
        from paho.mqtt import client
    except ImportError:
        raise ConfigError(
            '[mqtt] transport = "paho" needs paho-mqtt: pip install "stonechat[linux]", or transport = "lean"'
        )
    return client


class Paho:
    """One broker. Connects by itself, again and again with jittered back-off; `on_message(topic, payload)` is called
    from poll(), `on_connect()` after every CONNACK."""

    def __init__(
        self,
        client_id: str,
        host: str,
        port: int,
        *,
        user: str | None = None,
        password: str | None = None,
        tls: Any = None,
        keepalive_s: int = 60,
        will: tuple[str, bytes, int, bool] | None = None,
        on_message=None,
        on_connect=None,
    ) -> None:
        self._paho = paho = load()
        self._where = (host, port, keepalive_s)
        self._backoff = Backoff()
        self._misc_due_ms = ticks_ms()
        self._topics: list[tuple[str, int]] = []
        self._on_message = on_message
        self._on_connect = on_connect
        self.connected = False
        self.last_error: str | None = None
        client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id=client_id, protocol=paho.MQTTv311)
        client.connect_timeout = CONNECT_TIMEOUT_S
        client.max_queued_messages_set(MAX_QUEUED)
        if user is not None:
            client.username_pw_set(user, password)
        if tls is not None:
            client.tls_set_context(tls)
        if will is not None:
            client.will_set(*will)
        client.on_connect = self._connected
        client.on_disconnect = self._disconnected
        client.on_message = self._message
        self._client = client

    def publish(self, topic: str, payload: bytes, qos: int = 1, retain: bool = False) -> None:
        """Hand over one message. Raises MQTTError while there is no connection or the queue is full."""
        if not self.connected:
            raise MQTTError("not connected to %s:%d: %s" % (self._where[0], self._where[1], self.last_error))
        info = self._client.publish(topic, payload, qos, retain)
        if info.rc != self._paho.MQTT_ERR_SUCCESS:
            raise MQTTError("publish: " + self._paho.error_string(info.rc))

    def subscribe(self, topic: str, qos: int = 1) -> None:
        """Holds for every later connection too."""
        self._topics.append((topic, qos))
        if self.connected:
            self._client.subscribe(topic, qos)

    def poll(self, wait_s: float = 0.0) -> None:
        """Move bytes; blocks at most wait_s, and CONNECT_TIMEOUT_S (plus the name look-up) where it must reconnect."""
        client = self._client
        socket: Any = client.socket()
        if socket is None:
            if self._backoff.due():
                self._connect()
            elif wait_s:
                select.select([], [], [], wait_s)
            return
        wanted = [socket] if client.want_write() else []
        pending = getattr(socket, "pending", None)  # TLS may hold bytes that select can't see
        wait_s = 0.0 if pending and pending() else wait_s
        readable, writable, _ = select.select([socket], wanted, [], wait_s)
        if readable or (pending and pending()):
            client.loop_read()
        if writable and client.socket() is not None:
            client.loop_write()
        now_ms = ticks_ms()
        if ticks_diff(now_ms, self._misc_due_ms) >= 0:
            self._misc_due_ms = now_ms + MISC_EVERY_MS
            client.loop_misc()

    def close(self) -> None:
        """Say goodbye to the broker (it keeps the last will to itself then)."""
        if self._client.socket() is not None:
            self._client.disconnect()
            self._client.loop_write()

    def _connect(self) -> None:
        try:
            self._client.connect(*self._where)
        except (OSError, ValueError) as error:  # refused, unreachable, unknown host, bad certificate
            self.last_error = str(error)
            self._backoff.failed()

    def _connected(self, client, userdata, flags, reason, properties) -> None:
        if reason.is_failure:
            self.last_error = "the broker refused: %s" % reason
            self._backoff.failed()
            return
        self.connected = True
        self.last_error = None
        self._backoff.worked()
        for topic, qos in self._topics:
            client.subscribe(topic, qos)
        if self._on_connect is not None:
            self._on_connect()

    def _disconnected(self, client, userdata, flags, reason, properties) -> None:
        if self.connected:
            self._backoff.failed()
        self.connected = False
        self.last_error = self.last_error or str(reason)

    def _message(self, client, userdata, message) -> None:
        if self._on_message is not None:
            self._on_message(message.topic, message.payload)
