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
import queue
import signal
import ssl
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from stonechat.errors import StonechatError

from . import keyring, wire
from .broker import add_broker_arguments, broker_options
from .overview import fleet_table
from .store import AGAIN, CONFLICT, STORED, Store

HELP = "subscribe to the fleet's reports and store them"
MAX_BATCH = 500
MAX_WAITING = 20_000  # messages between the network thread and the database; the broker holds what lies beyond
BATCH_WAIT_S = 0.02
MAX_ACK_RANGES = 16

OnReport = Callable[[wire.Report], None]


class Collector:
    """Verifies and stores what arrives, in batches: commit, then the broker's acknowledgement, then the device's.

    store: a Store; keys: keyring.Keys. start() connects in the background and goes on trying; stop() ends it after the
    last batch. `on_report` is called for each report stored for the first time, after its commit, in the worker's
    thread; `counts` has what became of every message."""

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
        from paho.mqtt import client as paho
        from paho.mqtt.enums import CallbackAPIVersion

        self.store = store
        self.keys = keys
        self.prefix = prefix.rstrip("/") + "/"
        self.on_report = on_report
        self.on_status = on_status
        self.counts: dict[str, int] = dict.fromkeys((STORED, AGAIN, "status", *keyring.REASONS), 0)
        self.error: str | None = None  # why there is no connection, or the database does not take a batch
        self.connected = threading.Event()  # set while subscribed
        self._waiting: queue.Queue[Any] = queue.Queue(MAX_WAITING)
        self._stopping = threading.Event()
        self._where = (host, port)
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            clean_session=False,
            protocol=paho.MQTTv311,
            manual_ack=True,
        )
        if username is not None:
            client.username_pw_set(username, password)
        if tls is not None:
            client.tls_set_context(tls)
        client.reconnect_delay_set(1, 30)
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        self._client = client
        self._worker = threading.Thread(target=self._work, name="collector", daemon=True)

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
        """Through the collector's own connection (the `command` verb)."""
        return self._client.publish(topic, payload, qos)

    # --- paho's thread --------------------------------------------------------------------------------------------

    def _on_connect(self, client: Any, _user: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            self.error = f"broker {self._where[0]}:{self._where[1]} refuses: {reason}"
            return
        client.subscribe([(self.prefix + "+/report", 1), (self.prefix + "+/status", 1)])

    def _on_subscribe(self, _client: Any, _user: Any, _mid: int, reasons: Any, _properties: Any) -> None:
        if any(reason.is_failure for reason in reasons):
            self.error = f"broker refuses the subscription to {self.prefix}+"
            return
        self.error = None
        self.connected.set()

    def _on_disconnect(self, _client: Any, _user: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        self.connected.clear()
        if not self._stopping.is_set():
            self.error = f"broker {self._where[0]}:{self._where[1]}: {reason}"

    def _on_message(self, _client: Any, _user: Any, message: Any) -> None:
        with contextlib.suppress(queue.Full):  # then it is not acknowledged: the broker and the device keep it
            self._waiting.put(message, timeout=30)

    # --- the worker's thread --------------------------------------------------------------------------------------

    def _work(self) -> None:
        while not (self._stopping.is_set() and self._waiting.empty()):
            batch = self._take()
            while batch:
                try:
                    self.take(batch)
                    break
                except StonechatError as error:  # the database: keep the batch, nothing of it was acknowledged
                    self.error = str(error)
                    if self._stopping.wait(1.0):
                        return

    def _take(self) -> list[Any]:
        try:
            batch = [self._waiting.get(timeout=BATCH_WAIT_S * 5)]
        except queue.Empty:
            return []
        end_s = time.monotonic() + BATCH_WAIT_S
        while len(batch) < MAX_BATCH:
            try:
                batch.append(self._waiting.get(timeout=max(0.0, end_s - time.monotonic())))
            except queue.Empty:
                break
        return batch

    def take(self, messages: list[Any]) -> None:
        """One batch of messages (with topic, payload, mid, qos). Raises StoreError with nothing acknowledged."""
        reports: list[wire.Report] = []
        signers: list[keyring.DeviceKeys] = []
        statuses: list[wire.Status] = []
        rejections: list[tuple[str, str]] = []
        for message in messages:
            device, kind = self._split(message.topic)
            try:
                opened, keys = self._open(device, kind, message.payload)
            except keyring.Rejected as rejected:
                rejections.append((device, rejected.reason))
                continue
            if isinstance(opened, wire.Report):
                reports.append(opened)
                signers.append(keys)
            else:
                statuses.append(opened)
        results = self.store.put(reports, statuses, rejections)
        for message in messages:
            if message.qos:
                self._client.ack(message.mid, message.qos)
        self._acknowledge(reports, signers, results)
        for _, reason in rejections:
            self.counts[reason] += 1
        self.counts["status"] += len(statuses)
        for report, result in zip(reports, results, strict=True):
            self.counts[result] += 1
            if result == STORED and self.on_report:
                self.on_report(report)
        if self.on_status:
            for status in statuses:
                self.on_status(status)

    def _split(self, topic: str) -> tuple[str, str]:
        device, _, kind = topic[len(self.prefix) :].partition("/")
        return device, kind

    def _open(self, device: str, kind: str, payload: bytes) -> tuple[wire.Report | wire.Status, keyring.DeviceKeys]:
        if len(payload) > keyring.MAX_MESSAGE_BYTES:
            raise keyring.Rejected("too large", f"{len(payload)} bytes")
        failure = keyring.Rejected("unknown device", device)
        for keys in self.keys.of(device):
            try:
                if kind == "report":
                    return wire.open_report(device, keys, payload), keys
                return wire.open_status(device, keys, payload), keys
            except keyring.Rejected as rejected:
                failure = rejected
                if rejected.reason != "forged":
                    break
        raise failure

    def _acknowledge(self, reports: list[wire.Report], signers: list[keyring.DeviceKeys], results: list[str]) -> None:
        committed: dict[tuple[str, bytes], tuple[keyring.DeviceKeys, list[int]]] = {}
        for report, keys, result in zip(reports, signers, results, strict=True):
            if result != CONFLICT:
                committed.setdefault((report.device, report.stream), (keys, []))[1].append(report.sequence)
        for (device, stream), (keys, sequences) in committed.items():
            ranges = wire.ranges_of(sequences)
            for at in range(0, len(ranges), MAX_ACK_RANGES):
                payload = wire.seal_ack(keys, stream, ranges[at : at + MAX_ACK_RANGES])
                self._client.publish(f"{self.prefix}{device}/ack", payload, 0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_broker_arguments(parser)
    parser.add_argument("--client-id", default="stonechat-collector", help="MQTT client id (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object a report on stdout, instead of the table")
    parser.add_argument("--for", dest="for_s", type=float, metavar="SECONDS", help="stop after this time")


def run(args: argparse.Namespace) -> int:
    keys = keyring.Keys(args.keys)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with Store(args.db) as store:
        collector = Collector(
            store,
            keys,
            client_id=args.client_id,
            on_report=_print_json if args.json else None,
            **broker_options(args),
        )
        with collector:
            if args.json or not sys.stdout.isatty():
                _wait(collector, stop, args.for_s)
            else:
                _show(collector, stop, args.for_s)
        print(_line(collector), file=sys.stderr)
    return 0


def _print_json(report: wire.Report) -> None:
    values = {name: value for name, value in asdict(report).items() if name != "body"}
    values["stream"] = report.stream.hex()
    print(json.dumps(values), flush=True)


def _line(collector: Collector) -> str:
    return ", ".join(f"{count} {name}" for name, count in collector.counts.items() if count or name == STORED)


def _wait(collector: Collector, stop: threading.Event, for_s: float | None) -> None:
    end_s = time.monotonic() + (for_s if for_s is not None else float("inf"))
    told: str | None = None
    while time.monotonic() < end_s and not stop.wait(0.2):
        if collector.error != told:
            told = collector.error
            if told:
                print(f"stonechat collect: {told}", file=sys.stderr)


def _show(collector: Collector, stop: threading.Event, for_s: float | None) -> None:
    from rich.live import Live

    end_s = time.monotonic() + (for_s if for_s is not None else float("inf"))
    with Live(refresh_per_second=2) as live:
        while time.monotonic() < end_s and not stop.wait(0.5):
            live.update(fleet_table(collector.store, collector.error or _line(collector)))
