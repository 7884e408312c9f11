"""Subscribe to the fleet's reports, verify and store each of them once, and acknowledge what is committed.

A device keeps a report until this acknowledgement. The broker's acknowledgement is not durable and does not free it.

Examples:
  stonechat collect --keys fleet/keys
  stonechat collect --broker broker.example:8883 --cafile ca.crt --cert me.crt --key me.key --keys fleet/keys
  stonechat collect --broker localhost --plain --keys fleet/keys --json --for 60
"""

import argparse
import contextlib
import json
import os
import queue
import signal
import ssl
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from stonechat import limits
from stonechat.errors import ConfigError, StonechatError

from . import keyring, wire
from .broker import add_broker_arguments, broker_options
from .overview import fleet_table
from .store import DUPLICATE, STORED, Store, StoreError

if TYPE_CHECKING:
    from paho.mqtt.client import MQTTMessageInfo

HELP = "subscribe to the fleet's reports and store them"
HOLDS_KEYS = True
MAX_BATCH = 500
MAX_WAITING = 4000  # messages between the network thread and the database; the broker keeps the others,
MAX_WAITING_BYTES = 4_000_000  # with all that they take in memory
MESSAGE_BYTES = 1000  # of memory for a message, beside its payload
BATCH_WAIT_S = 0.02
MAX_ACK_RANGES = limits.ACK_NUMBERS // 2
MAX_ACKS_UNSENT = 1000
RETRY_S = 1.0
SUBSCRIBE_AGAIN_S = 30.0
SAY_AFTER_S = 10.0
LISTENED_S = 10.0
MAX_LINES = 10_000  # of --json that wait for whoever reads them

OnReport = Callable[[wire.Report], None]


class _Waiting:
    """Messages on their way to the database, bounded by number and by bytes."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._messages: deque[tuple[Any, int]] = deque()
        self._bytes = 0
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, message: Any, size: int, share: int, wait_s: float) -> bool:
        """False where 1/share of the space stays full for wait_s."""

        def fits() -> bool:
            return len(self._messages) * share < self._most and (self._bytes + size) * share <= self._most_bytes

        with self._changed:
            if not self._changed.wait_for(fits, wait_s):
                return False
            self._messages.append((message, size))
            self._bytes += size
            self._changed.notify_all()
        return True

    def take(self, most: int, first_s: float, more_s: float) -> list[Any]:
        """Up to `most` messages: the first within first_s, the others within more_s of it."""
        found: list[Any] = []
        with self._changed:
            self._changed.wait_for(lambda: self._messages, first_s)
            end_s = time.monotonic() + more_s
            while len(found) < most:
                left_s = end_s - time.monotonic()
                if not self._messages and (left_s <= 0 or not self._changed.wait_for(lambda: self._messages, left_s)):
                    break
                message, size = self._messages.popleft()
                self._bytes -= size
                found.append(message)
            self._changed.notify_all()
        return found


class Collector:
    """Verifies and stores what arrives, in batches: commit, then the broker's acknowledgement, then the device's.

    store: a Store; keys: keyring.Keys. start() connects in the background and goes on trying; stop() ends it after the
    last batch. `on_report` is called for each report stored for the first time, after its commit, in the worker's
    thread; `counts` has what became of every message; `failure` is what ended the worker, None while it works."""

    def __init__(
        self,
        store: Store,
        keys: keyring.Keys,
        *,
        host: str = "localhost",
        port: int = 1883,
        prefix: str = wire.PREFIX,
        username: str | None = None,
        password: str | None = None,
        tls: ssl.SSLContext | None = None,
        client_id: str = "stonechat-collector",
        on_report: OnReport | None = None,
        on_status: Callable[[wire.Status], None] | None = None,
    ) -> None:
        from .connection import BoundedClient

        self.store = store
        self.keys = keys
        self.prefix = prefix.rstrip("/") + "/"
        self.on_report = on_report
        self.on_status = on_status
        names = (STORED, DUPLICATE, "status", *keyring.REASONS, "refused", "dropped")
        self.counts: dict[str, int] = dict.fromkeys(names, 0)
        self.failure: BaseException | None = None
        self.connected = threading.Event()  # set while subscribed
        self.ever_connected = False
        self._network_error: str | None = None
        self._store_error: str | None = None
        self._waiting = _Waiting(MAX_WAITING, MAX_WAITING_BYTES)
        self._stopping = threading.Event()
        self._where = (host, port)
        self._tls = tls is not None
        self._answered = False  # the broker has answered the log-in of this connection
        self._unsubscribed_s: float | None = None  # since when the broker has refused the subscription
        self._repeat = False  # something was dropped that the broker has to send again
        self._acks: deque[MQTTMessageInfo] = deque()  # on their way out
        self._since_s = 0.0  # when this connection was subscribed
        self._listened_s = 0.0  # when that was last noted in the database
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
        self._worker = threading.Thread(target=self._work, name="collector", daemon=True)

    @property
    def error(self) -> str | None:
        """Why the database does not take a batch, or why there is no connection; None while all is well."""
        return self._store_error or self._network_error

    def start(self) -> "Collector":
        self._client.connect_async(*self._where, keepalive=30)
        self._client.loop_start()
        self._worker.start()
        return self

    def stop(self) -> None:
        """Commit what has arrived, acknowledge it, disconnect."""
        self._stopping.set()
        if self._worker.is_alive():
            self._worker.join(timeout=30)
        self._client.disconnect()
        self._client.loop_stop()

    def __enter__(self) -> "Collector":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> Any:
        """Through the collector's own connection."""
        return self._client.publish(topic, payload, qos)

    # --- paho's thread --------------------------------------------------------------------------------------------

    def _on_pre_connect(self, _client: Any, _user: Any) -> None:
        self._answered = False

    def _on_connect_fail(self, _client: Any, _user: Any) -> None:
        from .connection import explain

        self._network_error = explain(*self._where, sys.exc_info()[1])  # paho calls this where it has caught it

    def _on_connect(self, client: Any, _user: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        from .connection import refused

        self._answered = True
        if reason.is_failure:
            self._network_error = refused(*self._where, reason)
            return
        self._subscribe(client)

    def _subscribe(self, client: Any) -> None:
        client.subscribe([(self.prefix + "+/report", 1), (self.prefix + "+/status", 1)])

    def _on_subscribe(self, _client: Any, _user: Any, _mid: int, reasons: Any, _properties: Any) -> None:
        if any(reason.is_failure for reason in reasons):
            self._network_error = f"broker refuses the subscription to {self.prefix}+: is --prefix the fleet's?"
            self._unsubscribed_s = time.monotonic()
            return
        self._unsubscribed_s = None
        self._network_error = None
        self.ever_connected = True
        if not self.connected.is_set():
            self._since_s = time.time()
        self.connected.set()

    def _on_disconnect(self, _client: Any, _user: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        from .connection import unanswered

        self.connected.clear()
        self._unsubscribed_s = None
        if self._stopping.is_set():
            return
        if not self._answered:
            self._network_error = unanswered(*self._where, self._tls)
        elif self._network_error is None:
            self._network_error = f"broker {self._where[0]}:{self._where[1]}: connection lost ({reason})"

    def _on_message(self, _client: Any, _user: Any, message: Any) -> None:
        most = keyring.MAX_VERIFIED_BYTES + 1
        if len(message.payload) > most:
            message.payload = message.payload[:most]  # it is too large all the same
        size = MESSAGE_BYTES + len(message.payload)
        # Devices send with QoS 1. What is sent with QoS 0 gets half of the space and is never waited for.
        if not self._waiting.put(message, size, 1 if message.qos else 2, 10.0 if message.qos else 0.0):
            self.counts["dropped"] += 1
            self._repeat = self._repeat or bool(message.qos)

    # --- the worker's thread --------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while not (self._stopping.is_set() and not self._waiting):
                batch = self._waiting.take(MAX_BATCH, BATCH_WAIT_S * 5, BATCH_WAIT_S)
                if batch:
                    self._store(batch)
                else:
                    self._care()
                self._note_listening()
        except BaseException as error:
            self.failure = error
            self._client.disconnect()

    def _care(self) -> None:
        """For the connection, while nothing waits."""
        if self._repeat:
            self._repeat = False
            self._client.break_off()
        if self._unsubscribed_s is not None and time.monotonic() - self._unsubscribed_s > SUBSCRIBE_AGAIN_S:
            self._unsubscribed_s = time.monotonic()
            self._subscribe(self._client)

    def _note_listening(self) -> None:
        """Every LISTENED_S: that whoever was silent until now was silent."""
        now_s = time.time()
        if self.connected.is_set() and not 0 <= now_s - self._listened_s < LISTENED_S:
            self._listened_s = now_s
            with contextlib.suppress(StoreError):
                self.store.listened(self._since_s, now_s)

    def _store(self, batch: list[Any]) -> None:
        """Take a batch, however long the database needs to be well again; a message that it can't hold costs only
        itself."""
        while True:
            try:
                self.take(batch)
                self._store_error = None
                return
            except StoreError as error:  # nothing of the batch was acknowledged
                self._store_error = str(error)
                if self._stopping.wait(RETRY_S):
                    return
            except (ValueError, TypeError, OverflowError) as error:  # something that the database can't hold
                if len(batch) == 1:
                    self.counts["malformed"] += 1
                    self._store_error = f"one message can't be stored: {error}"
                    self._client.ack(batch[0].mid, batch[0].qos)  # its device keeps it, the broker need not
                    return
                for message in batch:
                    self._store([message])
                return

    def take(self, messages: list[Any]) -> None:
        """One batch of messages (with topic, payload, mid, qos). Raises StoreError with nothing acknowledged."""
        reports: list[wire.Report] = []
        signers: list[keyring.DeviceKeys] = []
        statuses: list[wire.Status] = []
        rejections: list[tuple[str, str]] = []
        refused: list[tuple[str, bytes, int, keyring.DeviceKeys]] = []
        for message in messages:
            device = "(no device)"
            try:
                device, kind = self._split(message.topic)
                opened, keys = self._open(device, kind, message.payload, refused)
            except UnicodeDecodeError:
                rejections.append((device, "malformed"))
                continue
            except keyring.Rejected as rejected:
                rejections.append((device, rejected.reason))
                continue
            if isinstance(opened, wire.Report):
                reports.append(opened)
                signers.append(keys)
            else:
                statuses.append(opened)
        results = self.store.put(reports, statuses, rejections, [device for device, *_ in refused])
        for message in messages:
            if message.qos:
                self._client.ack(message.mid, message.qos)
        self._acknowledge(reports, signers, refused)
        for _, reason in rejections:
            self.counts[reason] += 1
        self.counts["status"] += len(statuses)
        self.counts["refused"] += len(refused)
        for report, result in zip(reports, results, strict=True):
            self.counts[result] += 1
            if result != DUPLICATE and self.on_report:
                self.on_report(report)
        if self.on_status:
            for status in statuses:
                self.on_status(status)

    def _split(self, topic: str) -> tuple[str, str]:
        device, _, kind = topic[len(self.prefix) :].partition("/")
        if not topic.startswith(self.prefix) or kind not in ("report", "status"):
            raise keyring.Rejected("malformed", "topic")
        return device, kind

    def _open(
        self, device: str, kind: str, payload: bytes, refused: list[tuple[str, bytes, int, keyring.DeviceKeys]]
    ) -> tuple[wire.Report | wire.Status, keyring.DeviceKeys]:
        """Raises Rejected; a report that the device has to stop sending is added to `refused`."""
        failure = keyring.Rejected("unknown device", device)
        for keys in self.keys.of(device):
            try:
                if kind == "report":
                    return wire.open_report(device, keys, payload), keys
                return wire.open_status(device, keys, payload), keys
            except keyring.Rejected as rejected:
                failure = rejected
                if rejected.identity:
                    refused.append((device, *rejected.identity, keys))
                if rejected.reason != "forged":
                    break
        raise failure

    def _acknowledge(
        self,
        reports: list[wire.Report],
        signers: list[keyring.DeviceKeys],
        refused: list[tuple[str, bytes, int, keyring.DeviceKeys]],
    ) -> None:
        while self._acks and (self._acks[0].rc or self._acks[0].is_published()):
            self._acks.popleft()
        if len(self._acks) > MAX_ACKS_UNSENT:  # the broker does not read: what is not acknowledged comes again
            self._client.break_off()
            return
        # (device, stream, key) -> the keys, numbers committed, numbers refused
        due: dict[tuple[str, bytes, str], tuple[keyring.DeviceKeys, list[int], list[int]]] = {}
        for report, keys in zip(reports, signers, strict=True):
            name = (report.device, report.stream, keys.fingerprint)
            due.setdefault(name, (keys, [], []))[1].append(report.sequence)
        for device, stream, sequence, keys in refused:
            due.setdefault((device, stream, keys.fingerprint), (keys, [], []))[2].append(sequence)
        for (device, stream, _), (keys, committed, never) in due.items():
            taken, left = wire.ranges_of(committed), wire.ranges_of(never)
            for at in range(0, max(len(taken), len(left)), MAX_ACK_RANGES):
                part = slice(at, at + MAX_ACK_RANGES)
                try:
                    payload = wire.seal_ack(keys, stream, taken[part], left[part])
                except ConfigError:  # a key file without the key for it: the device keeps its reports
                    break
                info = self._client.publish(f"{self.prefix}{device}/ack", payload, 0)
                if info is not None and not info.rc:
                    self._acks.append(info)


class JsonLines:
    """on_report for `--json`: lines on stdout, from a thread of their own. Whoever reads them, slowly or no longer,
    never holds up the collector; what they miss is counted and is in the database. `error` says so."""

    def __init__(self, handle: int = 1) -> None:
        self.error: str | None = None
        self.missed = 0
        self._handle = handle
        self._lines: queue.Queue[bytes | None] = queue.Queue(MAX_LINES)
        self._thread = threading.Thread(target=self._write, name="json", daemon=True)
        self._thread.start()

    def __call__(self, report: wire.Report) -> None:
        values = {name: value for name, value in asdict(report).items() if name not in ("body", "key", "current")}
        values["stream"] = report.stream.hex()
        try:
            self._lines.put_nowait(json.dumps(values).encode() + b"\n")
        except queue.Full:
            self.missed += 1

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                while line:
                    line = line[os.write(self._handle, line) :]
                self.error = None
            except OSError as error:
                self.missed += 1
                gone = isinstance(error, BrokenPipeError)
                self.error = (
                    f"stdout: {'its reader is gone' if gone else error.strerror}; reports are stored all the same"
                )

    def close(self, wait_s: float = 5.0) -> None:
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=wait_s)
            self._thread.join(wait_s)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_broker_arguments(parser)
    parser.add_argument("--client-id", default="stonechat-collector", help="MQTT client id (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object a report on stdout, instead of the table")
    parser.add_argument("--for", dest="for_s", type=float, metavar="SECONDS", help="stop after this time")


def run(args: argparse.Namespace) -> int:
    keys = keyring.Keys(args.keys)
    options = broker_options(args, "collector")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    with Store(args.db, _say) as store, store.collecting():
        lines = JsonLines() if args.json else None
        collector = Collector(store, keys, client_id=args.client_id, on_report=lines, **options)
        with collector:
            end_s = time.monotonic() + (args.for_s if args.for_s is not None else float("inf"))
            if args.json or not sys.stdout.isatty():
                _wait(collector, lines, stop, end_s)
            else:
                _show(collector, stop, end_s)
        if lines:
            lines.close()
            if lines.missed:
                _say(f"{lines.missed} reports are in the database but were not written to stdout")
    if collector.failure is not None:
        error = collector.failure
        raise StonechatError(f"stopped by a fault of its own, nothing is lost: {type(error).__name__}: {error}")
    _say(_line(collector), "")
    if not collector.ever_connected:
        _say(f"never connected: {collector.error or 'no time to'}")
        return 1
    return 0


def _say(text: str, start: str = "stonechat collect: ") -> None:
    """On stderr, if somebody is still there to read it."""
    with contextlib.suppress(OSError, ValueError):
        print(start + text, file=sys.stderr, flush=True)


def _line(collector: Collector) -> str:
    return ", ".join(f"{count} {name}" for name, count in collector.counts.items() if count or name == STORED)


def _wait(collector: Collector, lines: JsonLines | None, stop: threading.Event, end_s: float) -> None:
    said: set[str] = set()
    begin_s = time.monotonic()
    while time.monotonic() < end_s and not stop.wait(0.2) and collector.failure is None:
        problems = list(collector.keys.problems.values())
        now = {text for text in (collector.error, lines and lines.error, *problems) if text}
        if not (now or collector.ever_connected) and time.monotonic() - begin_s > SAY_AFTER_S:
            now.add("no connection to the broker yet")
        for text in sorted(now - said):
            _say(text)
        if said and not now and collector.connected.is_set():
            _say("well again: connected, and the database takes reports")
        said = now


def _show(collector: Collector, stop: threading.Event, end_s: float) -> None:
    from rich.live import Live

    with Live(refresh_per_second=2) as live:
        while time.monotonic() < end_s and not stop.wait(0.5) and collector.failure is None:
            caption = collector.error or _line(collector)
            if collector.connected.is_set() and not any(collector.counts.values()):
                caption = f"connected; nothing yet on {collector.prefix}+: is --prefix the fleet's?"
            for problem in collector.keys.problems.values():
                caption += f"; {problem}"
            with contextlib.suppress(StoreError):
                live.update(fleet_table(collector.store, caption))
