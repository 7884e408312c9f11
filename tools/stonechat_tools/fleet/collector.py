"""Verifies and stores what arrives, in batches: commit, then the broker's acknowledgement, then the device's.

The connection's thread hands messages on; the worker's thread opens, stores and acknowledges them. Between both is a
queue of bounded size: while it is full nothing is read from the broker.
"""

import contextlib
import functools
import gc
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from . import keyring, wire, wire_release
from .monitor import Monitor
from .mqtt_codec import Message
from .opening import Batch
from .renewals import Renewals
from .shards import Shard
from .store import DUPLICATE, STORED, Store, StoreError
from .store.retention import Keep, Trust
from .updates import Outgoing, Updates
from .waiting import Source, Waiting

BATCH_WAIT_S = 0.005
RETRY_S = 1.0
LISTENED_S = 10.0
RETAIN_S, RETAIN_BUSY_S = 30.0, 90.0
STEP_S = 1.0
PAUSED_S = 20.0  # a turn of the worker that took longer: what came meanwhile is not stored yet
YOUNG = 100_000  # objects; more than a batch makes
MQTT = ("auto", "5", "3.1.1", "paho")

_NOT_YET = "not connected yet"

OnReport = Callable[[wire.Report], None]


def collect_garbage_rarely() -> None:
    """For the whole process: a batch makes objects by the ten thousand, none of them in a circle, and drops them all at
    its end. At Python's own threshold every few batches have all that is kept of the fleet looked through, a third of
    the CPU of 100,000 devices."""
    gc.set_threshold(YOUNG, *gc.get_threshold()[1:])


class Collector:
    """store: a Store; keys: keyring.Keys. start() connects in the background and goes on trying; stop() ends it after
    the last batch. `on_report` is called for each report stored for the first time, after its commit, in the worker's
    thread; `counts` has what became of every message; `failure` is what ended the worker, None while it works.
    mqtt: one of MQTT, see bulk_client. keep: what to roll up and delete; None for all as it is.
    shard: which devices are its own; messages of all others are acknowledged to the broker and left to their collector.
    monitor: judges what was committed (monitor.py). updates: offers and serves releases (updates.py). renewals:
    lets leases of devices last (renewals.py).
    also: more brokers, (host, port): devices connect to one of them, and the collector to all."""

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
        mqtt: str = "auto",
        on_report: OnReport | None = None,
        on_status: Callable[[wire.Status], None] | None = None,
        keep: Keep | None = None,
        shard: Shard | None = None,
        monitor: Monitor | None = None,
        updates: Updates | None = None,
        renewals: Renewals | None = None,
        also: Sequence[tuple[str, int]] = (),
    ) -> None:
        self.store = store
        self._retention = None if keep is None else store.retention(keep)
        self._retained_s = time.monotonic()
        self._trust = Trust(None)  # in the clock, for what is to be deleted
        self._shard = None if shard is None or shard.of == 1 else shard
        self.keys = keys
        self.prefix = prefix.rstrip("/") + "/"
        self.on_report = on_report
        self.on_status = on_status
        self.monitor = monitor
        self.updates = updates
        self.renewals = renewals
        self._stepped_s = 0.0  # when the monitor last judged
        self._turned_s = time.monotonic()  # when the worker last did something
        names = (STORED, DUPLICATE, "status", "want", *keyring.REASONS, "refused", "dropped")
        self.counts: dict[str, int] = dict.fromkeys(names, 0)
        self.failure: BaseException | None = None
        self.connected = threading.Event()  # set while subscribed, at each broker
        self.ever_connected = False
        self._store_error: str | None = None
        self._waiting = Waiting()
        self._places: dict[str, tuple[int, bytes, int]] = {}  # of several brokers: whose, by which status
        self._stopping = threading.Event()
        self._since_s = 0.0  # when this connection was subscribed
        self._listened_s = 0.0  # when that was last noted in the database
        options: dict[str, Any] = {"username": username, "password": password, "tls": tls}
        topics = [self.prefix + "+/report", self.prefix + "+/status"]
        topics += [f"{self.prefix}+/{wire_release.WANT_TOPIC}"] if updates is not None else []
        places = [(host, port), *also]
        self._network: list[str | None] = [_NOT_YET] * len(places)  # what is wrong with each broker
        self._clients: list[Any] = []
        for at, where in enumerate(places):
            options["on_messages"] = functools.partial(self._on_messages, at)
            options["on_state"] = functools.partial(self._on_state, at)
            if mqtt == "paho":
                from .paho_client import PahoClient

                client: Any = PahoClient(client_id, where, topics, wait_space=self._waiting.wait_space, **options)
            else:
                from .bulk_client import BulkClient

                space = self._waiting.has_space
                client = BulkClient(client_id, where, topics, has_space=space, version=mqtt, **options)
            self._clients.append(client)
        self._worker = threading.Thread(target=self._work, name="collector", daemon=True)

    @property
    def error(self) -> str | None:
        """Why the database does not take a batch, or why there is no connection; None while all is well."""
        return self._store_error or next((why for why in self._network if why and why != _NOT_YET), None)

    def start(self) -> "Collector":
        for client in self._clients:
            client.start()
        self._worker.start()
        return self

    def stop(self) -> None:
        """Commit what has arrived, acknowledge it, disconnect."""
        self._stopping.set()
        if self._worker.is_alive():
            self._worker.join(timeout=30)
        for client in self._clients:
            client.stop()

    def __enter__(self) -> "Collector":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def publish(self, topic: str, payload: bytes, qos: int = 1, retain: bool = False) -> bool:
        """Through the collector's own connections, to each broker. False where one does not take it."""
        taken = [client.publish(topic, payload, qos, retain) for client in self._clients]
        return all(taken)

    # --- the connection's thread --------------------------------------------------------------------------------------

    def _on_state(self, at: int, connected: bool, why: str) -> None:
        self._network[at] = None if connected else why
        self.ever_connected = self.ever_connected or connected
        if not any(self._network):
            if not self.connected.is_set():
                self._since_s = time.time()
            self.connected.set()
        else:
            self.connected.clear()

    def _on_messages(self, at: int, messages: list[Message]) -> None:
        # Devices send with QoS 1. What is sent with QoS 0 gets half of the space and is never waited for.
        if not self._waiting.has_space(2):
            kept = [message for message in messages if message.qos]
            self.counts["dropped"] += len(messages) - len(kept)
            messages = kept
        if messages:
            self._waiting.put((at, self._clients[at].epoch), messages)

    # --- the worker's thread --------------------------------------------------------------------------------------

    def _work(self) -> None:
        with contextlib.suppress(StoreError):
            if (before := self.store.listening()) is not None:
                self._trust = Trust(before[1])
        try:
            while not (self._stopping.is_set() and not len(self._waiting)):
                for client in self._clients:
                    if client.failure is not None:
                        raise client.failure
                full = not self._waiting.has_space()
                source, batch = self._waiting.take(BATCH_WAIT_S * 20, BATCH_WAIT_S)
                if full:
                    for client in self._clients:
                        client.wake()
                if batch:
                    self._store(batch, source)
                self._notice_pause()
                self._note_listening()
                self._retain(not batch)
                self._judge()
            for part in (self.monitor, self.updates):
                if part is not None:
                    with contextlib.suppress(StoreError):
                        part.close()
        except BaseException as error:
            self.failure = error
            for client in self._clients:
                client.stop()

    def _notice_pause(self) -> None:
        """After a time in which nothing was taken (the process was stopped, the disk did not answer) the fleet's
        silence begins anew: what the devices have sent waits at the broker."""
        now_s = time.monotonic()
        if now_s - self._turned_s > PAUSED_S:
            self._since_s = time.time()
            self._listened_s = 0.0
            if self.monitor is not None:
                self.monitor.connected(self.connected.is_set(), anew=True)
        self._turned_s = now_s

    def _note_listening(self) -> None:
        """Every LISTENED_S: that whoever was silent until now was silent."""
        now_s = time.time()
        if self.connected.is_set() and not 0 <= now_s - self._listened_s < LISTENED_S:
            self._listened_s = now_s
            with contextlib.suppress(StoreError):
                self.store.listened(self._since_s, now_s)

    def _retain(self, idle: bool) -> None:
        """Roll up and delete: every RETAIN_S while nothing waits, and where much waits all the same now and then."""
        since_s = time.monotonic() - self._retained_s
        if self._retention is not None and since_s > (RETAIN_S if idle else RETAIN_BUSY_S):
            more = False
            with contextlib.suppress(StoreError):  # as for the next batch, which says so
                more = self._retention.step(delete=self._trust())
            self._retained_s = time.monotonic() - (RETAIN_S - 0.5 if more else 0.0)

    def _judge(self) -> None:
        """Every STEP_S: who is there, what is wrong, who has to know, and who takes a release."""
        due = time.monotonic() - self._stepped_s >= STEP_S
        if due:
            self._stepped_s = time.monotonic()
        if self.updates is not None:
            with contextlib.suppress(StoreError):
                self._send_all(self.updates.step() if due else self.updates.serve())
        if self.renewals is not None and due:
            self._send_all(self.renewals.step())
        if self.monitor is not None and due:
            self.monitor.connected(self.connected.is_set())
            with contextlib.suppress(StoreError):  # as for the reports, which wait for the database
                self.monitor.step()

    def _store(self, batch: Sequence[Message], source: Source | None = None) -> None:
        """Take a batch, however long the database needs to be well again; a message that it can't hold costs only
        itself."""
        while True:
            try:
                self.take(batch, source)
                self._store_error = None
                return
            except StoreError as error:  # nothing of the batch was acknowledged
                self._store_error = str(error)
                if self.monitor is not None:
                    self.monitor.connected(False, f"can't store what arrives ({error})")
                    with contextlib.suppress(StoreError):
                        self.monitor.step()
                if self._stopping.wait(RETRY_S):
                    return
            except (ValueError, TypeError, OverflowError) as error:  # something that the database can't hold
                if len(batch) == 1:
                    self.counts["malformed"] += 1
                    self._store_error = f"one message can't be stored: {error}"
                    # its device keeps it, the broker need not
                    self._send([batch[0].mid] if batch[0].qos else [], [], source)
                    return
                for message in batch:
                    self._store([message], source)
                return

    def _send(self, mids: list[int], publishes: list[tuple[str, bytes]], source: Source | None) -> None:
        at, epoch = source or (0, None)
        self._clients[at].send(mids, publishes, epoch)

    def _send_all(self, messages: Sequence[Outgoing]) -> None:
        """Each to the broker that its device is connected to, or to all where that is not known."""
        for source, topic, payload in messages:
            for at in range(len(self._clients)) if source is None else (source[0],):
                self._clients[at].send([], [(topic, payload)])

    def take(self, messages: Sequence[Message], source: Source | None = None) -> None:
        """One batch of messages of one connection. Raises StoreError with nothing acknowledged."""
        batch = Batch(self.keys, self.prefix)
        batch.open(messages if self._shard is None else self._own(messages, self._shard))
        reports, statuses, rejections = batch.reports, batch.statuses, batch.rejections
        if len(self._clients) > 1 and source is not None:
            statuses = self._here(source[0], batch.reports, statuses)
        stale: list[wire.Status] = []
        results = self.store.put(reports, statuses, rejections, [device for device, *_ in batch.refused], stale=stale)
        if stale:  # of an earlier start, which may be older than those that presence remembers: a replay
            rejections += [(status.device, "stale") for status in stale]
            statuses = [status for status in statuses if not any(status is each for each in stale)]
        mids = [message.mid for message in messages if message.qos]
        self._send(mids, batch.acknowledgements(), source)
        self._count(reports, results, rejections)
        if self.monitor is not None:
            with contextlib.suppress(StoreError):  # the batch is committed
                self.monitor.took(reports, results, statuses, rejections)
        if self.renewals is not None:
            self.renewals.took(reports, results)
        if self.updates is not None:
            with contextlib.suppress(StoreError):
                self._send_all(self.updates.took(reports, results, statuses, batch.wants, source))
        self.counts["status"] += len(statuses)
        self.counts["want"] += len(batch.wants)
        self.counts["refused"] += len(batch.refused)
        if self.on_report:
            for report, result in zip(reports, results, strict=True):
                if result is not DUPLICATE:
                    self.on_report(report)
        if self.on_status:
            for status in statuses:
                self.on_status(status)

    def _here(self, at: int, reports: Sequence[wire.Report], statuses: Sequence[wire.Status]) -> list[wire.Status]:
        """Of messages of broker `at`, the statuses without the last wills of devices that are at another broker by now:
        the one that they left publishes theirs a minute later, and keeps it for ever."""
        places = self._places
        for report in reports:
            place = places.get(report.device)
            if place is None or place[0] != at:
                places[report.device] = (at, *(place[1:] if place else (b"", 0)))
        kept = []
        for status in statuses:
            where, stream, number = places.get(status.device, (-1, b"", 0))
            if status.online and (status.stream != stream or status.number > number):
                places[status.device] = (at, status.stream, status.number)
            if status.online or where == at:
                kept.append(status)
        return kept

    def _own(self, messages: Sequence[Message], shard: Shard) -> list[Message]:
        start = len(self.prefix)
        return [message for message in messages if message.topic[start:].partition("/")[0] in shard]

    def _count(
        self, reports: Sequence[wire.Report], results: Sequence[str], rejections: Sequence[tuple[str, str]]
    ) -> None:
        for _, reason in rejections:
            self.counts[reason] += 1
        stored = results.count(STORED)
        self.counts[STORED] += stored
        if stored != len(reports):
            for result in results:
                if result is not STORED:
                    self.counts[result] += 1
