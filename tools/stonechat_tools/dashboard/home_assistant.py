"""Show the fleet in Home Assistant, from what the collector has verified: MQTT device discovery for each device.

It reads the collector's database and announces each device with its presence, level, score and cause, an event for each
alarm and, with --operator, buttons to calibrate and to release a quarantine and a switch for maintenance, which
`stonechat operator` signs. It holds no key. Devices that announce themselves ([homeassistant] in their configuration)
need none of this.

Whoever may write to Home Assistant's command topics can press the button: the broker's access list, not a signature,
keeps others out. `stonechat provision home-assistant --bridge` and `stonechat broker-config` make it so.

Examples:
  stonechat provision home-assistant --bridge && stonechat broker-config
  stonechat home-assistant
  stonechat home-assistant --operator fleet/operator/socket --maintenance 4h
  stonechat home-assistant --remove            # take the fleet out of Home Assistant again
"""

import argparse
import contextlib
import os
import queue
import signal
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from stonechat.errors import ConfigError, StonechatError

from ..console import counted
from ..fleet import keyring
from ..fleet.broker import add_broker_arguments, broker_options
from ..fleet.broker_lists import BRIDGE_COMMANDS, BRIDGE_ONLINE
from ..fleet.command import MAX_AHEAD_S, ask, span_s
from ..fleet.connection import BoundedClient, explain, lost, refused
from ..fleet.store import URLS, Store, StoreError
from . import audit
from .home_messages import Bridge

HELP = "show the fleet in Home Assistant"
POLL_S = 2.0
RESTART_S = 10.0  # at most, after Home Assistant has started
BATCH = 200  # messages that are handed to the broker before it has acknowledged them
BATCH_S = 30.0
MAX_ASKED = 100  # presses that wait for the operator
WHO = "home assistant"
CONNECT_S = 20.0
NOT_YET = "not connected yet"


class Connection:
    """The broker: publishes with QoS 1, keeps what arrives for take()."""

    def __init__(self, options: dict[str, Any], prefix: str, controls: bool) -> None:
        self._where = options["host"], options["port"]
        topics = options["prefix"].rstrip("/") + "/"
        self.topics = topics
        self._online = topics + BRIDGE_ONLINE
        self._wanted = [prefix + "/status", prefix + "/device/+/config"]
        self._wanted += [f"{topics}+/{name}" for name in BRIDGE_COMMANDS] if controls else []
        self._presses = tuple("/" + name for name in BRIDGE_COMMANDS)
        self.error: str | None = NOT_YET
        self.connected = threading.Event()
        self.began = 0  # connections so far
        self._arrived: queue.Queue[tuple[str, bytes]] = queue.Queue(10_000)
        self._pending: deque[Any] = deque()
        options = {name: options.get(name) for name in ("username", "password", "tls")}
        client = self._client = BoundedClient("stonechat-home-assistant", **options)
        client.will_set(self._online, b"offline", 1, True)
        client.on_connect = self._on_connect
        client.on_connect_fail = lambda *_: self._lost(explain(*self._where, sys.exc_info()[1]))
        client.on_disconnect = lambda *_: self._lost(lost(*self._where))
        client.on_message = self._on_message

    def start(self) -> None:
        self._client.connect_async(*self._where, keepalive=30)
        self._client.loop_start()

    def _on_connect(self, client: Any, _user: object, _flags: object, reason: Any, _properties: object) -> None:
        if reason.is_failure:
            self._lost(refused(*self._where, reason))
            return
        client.subscribe([(topic, 1) for topic in self._wanted])
        client.publish(self._online, b"online", 1, True)
        self.error = None
        self.began += 1
        self.connected.set()

    def _lost(self, why: str) -> None:
        self.error = why
        self.connected.clear()

    def _on_message(self, _client: Any, _user: object, message: Any) -> None:
        if message.retain and message.topic.endswith(self._presses):
            return  # pressed at some time: the broker would repeat it at each connection
        with contextlib.suppress(queue.Full):  # nobody presses a button as often
            self._arrived.put_nowait((message.topic, bytes(message.payload)))

    def publish(self, topic: str, payload: bytes) -> None:
        """Raises StonechatError where the broker does not take it."""
        if not self.connected.is_set():
            raise StonechatError(self.error or "no connection to the broker")
        self._pending.append(self._client.publish(topic, payload, 1, not topic.endswith("/event")))
        if len(self._pending) > BATCH:
            self.flush(BATCH // 2)

    def flush(self, left: int = 0) -> None:
        """Wait until the broker has acknowledged all but `left`. Raises StonechatError."""
        end_s = time.monotonic() + BATCH_S
        while len(self._pending) > left:
            try:
                self._pending[0].wait_for_publish(max(0.0, min(1.0, end_s - time.monotonic())))
                done = self._pending[0].is_published()
            except (ValueError, RuntimeError):
                done = False
            if not done and (not self.connected.is_set() or time.monotonic() >= end_s):
                self._pending.clear()
                raise StonechatError(self.error or "the broker acknowledges nothing")
            if done:
                self._pending.popleft()

    def take(self, wait_s: float) -> tuple[str, bytes] | None:
        with contextlib.suppress(queue.Empty):
            return self._arrived.get(timeout=wait_s)
        return None

    def close(self) -> None:
        if self.connected.is_set():
            with contextlib.suppress(StonechatError, ValueError, RuntimeError):
                self.publish(self._online, b"offline")
                self.flush()
        self._client.disconnect()
        self._client.loop_stop()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--account",
        default="fleet/homebridge",
        metavar="FOLDER",
        help="its account at the broker, as `stonechat provision` makes it (default %(default)s)",
    )
    parser.add_argument("--discovery", default="homeassistant", metavar="PREFIX", help="default %(default)s")
    parser.add_argument("--operator", metavar="SOCKET", help="of `stonechat operator`: calibrate, release, maintenance")
    parser.add_argument(
        "--maintenance", default="8h", metavar="TIME", help="the switch turns itself off after that (default 8h)"
    )
    parser.add_argument("--remove", action="store_true", help="take the fleet out of Home Assistant, and end")
    add_broker_arguments(parser, keys_required=None)


def run(args: argparse.Namespace) -> int:
    if not args.db.startswith(URLS) and not Path(args.db).exists():
        raise ConfigError(f"{args.db}: no such database; `stonechat collect` makes it")
    maintenance_s = span_s(args.maintenance)
    if not 60 <= maintenance_s <= MAX_AHEAD_S:
        raise ConfigError(f"--maintenance {args.maintenance}: from 1m to {MAX_AHEAD_S // 86_400}d")
    if not args.discovery.isascii() or not args.discovery.isprintable() or set(args.discovery) & set("+# "):
        raise ConfigError(f"--discovery {args.discovery!r}: want a topic without + and #")
    args.keys = args.account
    options = broker_options(args, "homebridge")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    operator = Path(args.operator) if args.operator else None
    with Store(args.db, _say, make=False) as store:
        link = Connection(options, args.discovery.strip("/"), operator is not None)
        bridge = Bridge(
            store, link.topics, link.publish, prefix=args.discovery.strip("/"), controls=operator is not None
        )
        link.start()
        try:
            if args.remove:
                return _remove(bridge, link)
            _serve(bridge, link, store, operator, maintenance_s, stop)
        finally:
            link.close()
    return 0


def _remove(bridge: Bridge, link: Connection) -> int:
    end_s = time.monotonic() + CONNECT_S
    while not link.connected.wait(0.1):
        if link.error != NOT_YET or time.monotonic() > end_s:
            raise StonechatError(link.error or "no connection to the broker")
    bridge.view.poll()
    for device in sorted(bridge.view.rows):
        bridge.remove(device)
    link.flush()
    print(f"removed from Home Assistant: {counted(len(bridge.view.rows), 'device')}")
    return 0


def _serve(
    bridge: Bridge, link: Connection, store: Store, operator: Path | None, maintenance_s: int, stop: threading.Event
) -> None:
    asked: queue.Queue[tuple[str, str, list[int]]] = queue.Queue(MAX_ASKED)
    if operator is not None:
        threading.Thread(target=_ask, args=(asked, store, operator), name="operator", daemon=True).start()
    began, said, due_s, again_s = 0, "", 0.0, float("inf")
    while not stop.is_set():
        now_s = time.monotonic()
        trouble = link.error or ""
        if link.began != began:
            began, due_s = link.began, 0.0
            bridge.again()
        if now_s >= again_s:
            again_s, due_s = float("inf"), 0.0
            bridge.again()
        if now_s >= due_s and link.connected.is_set():
            try:
                bridge.step()
                link.flush()
            except StonechatError as error:
                trouble = str(error)
                if not isinstance(error, StoreError):
                    bridge.again()
            due_s = time.monotonic() + max(POLL_S, 5 * (time.monotonic() - now_s))
        if trouble != said and (trouble or said):
            _say(trouble or "well again")
        said = trouble
        found = link.take(0.2)
        if found is None:
            continue
        topic, payload = found
        if topic.endswith("/status") and payload == b"online":  # what is retained may not have reached it
            again_s = time.monotonic() + int.from_bytes(os.urandom(2)) / 65_536 * RESTART_S
        elif topic.endswith("/config") and payload and (device := bridge.announced(topic, payload)):
            with contextlib.suppress(StonechatError):
                bridge.remove(device)
        elif operator is not None and (press := bridge.asked(topic, payload, maintenance_s, int(time.time()))):
            with contextlib.suppress(queue.Full):
                asked.put_nowait(press)


def _ask(asked: "queue.Queue[tuple[str, str, list[int]]]", store: Store, operator: Path) -> None:
    """Presses, one after the other: the operator's process may be slow or away."""
    while True:
        device, command, arguments = asked.get()
        try:
            keyring.check_device_id(device)
            audit.note(store, WHO, "command", device=device, command=command, arguments=arguments)
            sequence = ask(operator, device, command, arguments)
            _say(f"{device}: {command} {arguments}, number {sequence}")
        except StonechatError as error:
            _say(f"{device}: {command}: {error}")


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"stonechat home-assistant: {text}", file=sys.stderr, flush=True)
