"""A connection to the broker for a collector: packets are read and acknowledged by the hundred.

One thread owns the socket. It stops reading while its owner has no space (back-pressure: the broker, and behind it the
devices, keep what waits), and goes on with its keep-alive meanwhile. It connects again after 0.1 to 1 s, then after
twice as long each time, up to 30 s.
"""

import contextlib
import importlib.util
import os
import random
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence

from stonechat.errors import ConfigError, StonechatError

from ..console import install_command
from . import mqtt_codec
from .connection import certificate_alert, explain, lost, refused, unanswered

KEEPALIVE_S = 30
CONNECT_S = 10.0
ANSWER_S = 15.0
FIRST_ANSWER_S = 5.0  # while it is not known which version the broker speaks: some say nothing to version 5
LONGEST_WAIT_S = 30.0
STABLE_S = 10.0  # a connection that lasted so long is followed by a quick one
READ_BYTES = 262_144
MAX_UNSENT_BYTES = 4_000_000  # of acknowledgements to a broker that does not read
MAX_PENDING = 1000  # published with QoS 1 and not acknowledged


def _versions(version: str) -> list[str]:
    """What to try, in this order. Raises ConfigError."""
    has_5 = importlib.util.find_spec("mqtt5") is not None
    if version == "5" and not has_5:
        raise ConfigError(f"--mqtt 5 needs the package mqtt5, or leave --mqtt out: {install_command('tools')}")
    if version != "auto":
        return [version]
    return ["5", "3.1.1"] if has_5 else ["3.1.1"]


class BulkClient:
    """on_messages(messages): called with what arrived; on_state(connected, why): after a subscription, and after it is
    lost or refused. has_space(): whether the owner takes more now; wake() says that it does again. All three are called
    in the client's thread. version: "5", "3.1.1", or "auto" for 5 and, where the broker does not speak it, 3.1.1."""

    def __init__(
        self,
        client_id: str,
        where: tuple[str, int],
        topics: Sequence[str],
        *,
        on_messages: Callable[[list[mqtt_codec.Message]], None],
        on_state: Callable[[bool, str], None],
        has_space: Callable[[], bool],
        username: str | None = None,
        password: str | None = None,
        tls: ssl.SSLContext | None = None,
        version: str = "auto",
    ) -> None:
        self._client_id = client_id
        self._where = where
        self._topics = list(topics)
        self._on_messages = on_messages
        self._on_state = on_state
        self._has_space = has_space
        self._login = (username, password)
        self._tls = tls
        self._versions = _versions(version)
        self._known = len(self._versions) == 1  # which version the broker speaks
        self._lock = threading.Lock()
        self._unsent = bytearray()
        self._codec: mqtt_codec.Codec | None = None  # while logged in
        self._epoch = 0  # counts connections: an acknowledgement belongs to the one that brought its message
        self._pending: dict[int, tuple[str, bytes, bool]] = {}
        self._mid = 0
        self._breaking = False
        self._unanswered = False  # connected, and the log-in is not answered yet
        self._stopping = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="mqtt", daemon=True)
        self.failure: BaseException | None = None

    # --- from any thread --------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def stop(self, wait_s: float = 10.0) -> None:
        """Sends what is to be sent, says goodbye."""
        self._stopping = True
        self.wake()
        if self._thread.is_alive():
            self._thread.join(wait_s)

    def wake(self) -> None:
        os.eventfd_write(self._wake, 1)

    @property
    def epoch(self) -> int:
        return self._epoch

    def send(self, mids: Sequence[int], publishes: Sequence[tuple[str, bytes]], epoch: int | None = None) -> None:
        """Acknowledge messages of a connection (epoch), then publish with QoS 0. What can't be sent is lost: it is
        sent anew by whoever misses its acknowledgement."""
        with self._lock:
            codec = self._codec
            if codec is None:
                return
            if mids and epoch in (None, self._epoch):
                self._unsent += mqtt_codec.acks(mids)
            if publishes:
                self._unsent += codec.notices(publishes)
            if len(self._unsent) > MAX_UNSENT_BYTES:
                self._breaking = True
        self.wake()

    def publish(self, topic: str, payload: bytes, qos: int = 1, retain: bool = False) -> bool:
        """False where it is not taken: without a connection (QoS 0), or with too many on their way (QoS 1)."""
        with self._lock:
            codec, mid = self._codec, 0
            if qos:
                if len(self._pending) >= MAX_PENDING:
                    return False
                mid = self._next_mid()
                self._pending[mid] = (topic, payload, retain)
            elif codec is None:
                return False
            if codec is not None:
                self._unsent += codec.publish(topic, payload, min(qos, 1), retain, mid)
        self.wake()
        return True

    def break_off(self) -> None:
        """End this connection; the client connects again, and the broker repeats what was not acknowledged."""
        self._breaking = True
        self.wake()

    def _next_mid(self) -> int:
        while True:
            self._mid = self._mid % 65_535 + 1
            if self._mid not in self._pending:
                return self._mid

    # --- the client's own thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        wait_s = 1.0
        try:
            while not self._stopping:
                began_s = time.monotonic()
                again = False
                try:
                    why = self._connection()
                except mqtt_codec.WrongVersion as error:
                    again = not self._known
                    self._versions.reverse()
                    why = f"broker {self._where[0]}:{self._where[1]}: {error}"
                except (OSError, ssl.SSLError, ValueError, StonechatError) as error:
                    why = self._explain(error)
                with self._lock:
                    self._codec = None
                    self._unsent.clear()
                if self._stopping:
                    return
                if not again:
                    self._on_state(False, why)
                if time.monotonic() - began_s > STABLE_S:
                    wait_s = 1.0
                self._rest(0.0 if again else wait_s * random.uniform(0.1, 1.0))
                wait_s = min(wait_s * 2, LONGEST_WAIT_S)
                if again:
                    self._known = True  # both versions were tried
        except BaseException as error:
            self.failure = error
            self._on_state(False, f"fault: {error}")

    def _explain(self, error: BaseException) -> str:
        if (  # after the handshake, in which TLS 1.3 says nothing of our certificate
            self._unanswered and isinstance(error, (ssl.SSLError, ConnectionError)) and not certificate_alert(error)
        ):
            return unanswered(*self._where, self._tls is not None)
        if isinstance(error, mqtt_codec.ProtocolFault):
            return f"broker {self._where[0]}:{self._where[1]}: {error}; connecting again"
        if isinstance(error, StonechatError):
            return str(error)
        if isinstance(error, ValueError) and not isinstance(error, OSError):  # a name that is none, as "a..b"
            return f"broker {self._where[0]}:{self._where[1]}: the name {self._where[0]} can't be resolved ({error})"
        return explain(*self._where, error)

    def _rest(self, wait_s: float) -> None:
        end_s = time.monotonic() + wait_s
        while not self._stopping and (left_s := end_s - time.monotonic()) > 0:
            select.select([self._wake], [], [], left_s)
            self._drain()

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def _connection(self) -> str:
        """One connection, from its begin to its end -> why it ended."""
        self._breaking = self._unanswered = False
        sock: socket.socket = socket.create_connection(self._where, CONNECT_S)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_hostname=self._where[0])
            codec = mqtt_codec.codec(self._versions[0])
            self._unanswered = True
            sock.sendall(codec.connect(self._client_id, *self._login, KEEPALIVE_S))
            sock.setblocking(False)
            return self._serve(sock, codec)
        finally:
            sock.close()

    def _serve(self, sock: socket.socket, codec: mqtt_codec.Codec) -> str:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        now_s = time.monotonic()
        answer_by_s: float | None = now_s + (
            ANSWER_S if self._known else FIRST_ANSWER_S
        )  # for the log-in, the subscription, or a ping
        sent_s = now_s
        accepted = subscribed = False
        while True:
            reading = not accepted or self._has_space()
            with self._lock:
                writing = bool(self._unsent)
            poll.register(sock, (select.POLLIN if reading else 0) | (select.POLLOUT if writing else 0))
            pending = reading and isinstance(sock, ssl.SSLSocket) and sock.pending() > 0
            events = dict(poll.poll(0 if pending else 1000))
            now_s = time.monotonic()
            if self._wake in events:
                self._drain()
            if self._breaking:
                return "connection broken off, to have it all repeated"
            if self._stopping:
                self._goodbye(sock)
                return ""
            if writing:
                sent_s = self._write(sock, now_s, sent_s)
            if reading and (pending or sock.fileno() in events):
                data = self._read(sock)
                if data == b"":
                    if not accepted:
                        self._try_other_version()
                        return unanswered(*self._where, self._tls is not None)
                    return lost(*self._where)
                if data:
                    answer_by_s = None if accepted else answer_by_s
                    found = codec.feed(data)
                    if found.refused:
                        if accepted:
                            return f"broker {self._where[0]}:{self._where[1]} ends the connection: {found.refused}"
                        return refused(*self._where, found.refused)
                    if found.accepted and not accepted:
                        accepted = self._known = True
                        self._unanswered = False
                        answer_by_s = now_s + ANSWER_S
                        self._logged_in(codec)
                    if found.subscribed is False:
                        return f"broker refuses the subscription to {self._topics[0]}: is --prefix the fleet's?"
                    if found.subscribed and accepted and not subscribed:
                        subscribed = True
                        answer_by_s = None
                        self._on_state(True, "")
                    for mid in found.acknowledged:
                        self._pending.pop(mid, None)
                    if found.messages:
                        self._on_messages(found.messages)
            if answer_by_s is not None and now_s > answer_by_s and reading:
                self._try_other_version()
                return explain(*self._where, TimeoutError())
            if accepted and now_s - sent_s > KEEPALIVE_S / 2:
                with self._lock:
                    self._unsent += mqtt_codec.PING
                sent_s = now_s
                answer_by_s = now_s + ANSWER_S if answer_by_s is None else answer_by_s

    def _try_other_version(self) -> None:
        """After no answer: perhaps the broker does not speak this one, and does not say so."""
        if not self._known:
            self._versions.reverse()

    def _logged_in(self, codec: mqtt_codec.Codec) -> None:
        """From here on messages come, and have to be acknowledged: a broker that kept the session sends what waits
        before it answers the subscription."""
        with self._lock:
            self._codec = codec
            self._epoch += 1
            self._unsent += codec.subscribe(self._next_mid(), self._topics)
            for mid, (topic, payload, retain) in list(self._pending.items()):
                self._unsent += codec.publish(topic, payload, 1, retain, mid)

    @staticmethod
    def _read(sock: socket.socket) -> bytes | None:
        """None where nothing is there after all, b"" at the end of the connection."""
        try:
            return sock.recv(READ_BYTES)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None
        except ConnectionError:
            return b""

    def _write(self, sock: socket.socket, now_s: float, sent_s: float) -> float:
        with self._lock:
            try:
                with memoryview(self._unsent) as unsent:
                    sent = sock.send(unsent[:READ_BYTES])
            except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
                return sent_s
            del self._unsent[:sent]
        return now_s

    def _goodbye(self, sock: socket.socket) -> None:
        with self._lock, contextlib.suppress(OSError):
            sock.settimeout(2.0)
            sock.sendall(bytes(self._unsent) + mqtt_codec.GOODBYE)
