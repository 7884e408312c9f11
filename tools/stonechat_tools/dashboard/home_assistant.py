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
import hashlib
import json
import os
import queue
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stonechat import __version__
from stonechat.errors import ConfigError, StonechatError

from ..fleet import keyring
from ..fleet.broker import add_broker_arguments, broker_options
from ..fleet.broker_lists import BRIDGE_COMMANDS, BRIDGE_ONLINE
from ..fleet.command import MAX_AHEAD_S, ask, span_s
from ..fleet.connection import BoundedClient, explain, refused
from ..fleet.history import feature_names, name_of
from ..fleet.overview import channel_name
from ..fleet.presence import STATES
from ..fleet.store import URLS, Store, StoreError
from ..fleet.wire import LEVELS
from . import audit
from .view import View

HELP = "show the fleet in Home Assistant"
POLL_S = 2.0
RESTART_S = 10.0  # at most, after Home Assistant has started
BATCH = 200  # messages that are handed to the broker before it has acknowledged them
BATCH_S = 30.0
MAX_ASKED = 100  # presses that wait for the operator
MAX_TEXT = 255  # characters of a state in Home Assistant
HERE = ("reporting", "asleep")
WHO = "home assistant"
CONNECT_S = 20.0
NOT_YET = "not connected yet"

Publish = Callable[[str, bytes], None]


def node(device: str) -> str:
    """A device's name in discovery topics: letters that Home Assistant takes, and longer than a device's id can be, so
    that no device may write there."""
    return "stonechat-fleet-" + hashlib.sha256(device.encode()).hexdigest()


class Bridge:
    """store: the collector's; topics: of the fleet, with the / at its end; prefix: Home Assistant's; publish(topic,
    payload): retained where it is no event. controls: whether there is an operator to ask."""

    def __init__(self, store: Store, topics: str, publish: Publish, *, prefix: str, controls: bool) -> None:
        self._store = store
        self._topics = topics
        self._publish = publish
        self._prefix = prefix
        self._controls = controls
        self.view = View(store)
        self._shown: dict[str, tuple[str, str]] = {}  # device: its name and firmware as announced, its state
        self._levels: dict[str, int] = {}

    def discovery_topic(self, device: str) -> str:
        return f"{self._prefix}/device/{node(device)}/config"

    def discovery(self, row: dict[str, Any]) -> dict[str, Any]:
        """The message that announces a device. row: of View.facts()."""
        device, base = row["device"], f"{self._topics}{row['device']}/home/"
        components: dict[str, dict[str, Any]] = {
            "anomaly": _binary("Anomaly", "alarm", device_class="problem"),
            "present": _binary("Connected", "present", device_class="connectivity", entity_category="diagnostic"),
            "presence": _sensor("Presence", "presence", device_class="enum", options=list(STATES)),
            "level": _sensor("Level", "level", device_class="enum", options=list(LEVELS)),
            "score": _sensor("Anomaly score", "score", state_class="measurement", suggested_display_precision=2),
            "cause": _sensor("Cause", "cause", icon="mdi:magnify"),
            "model": _sensor("Model", "model", entity_category="diagnostic", icon="mdi:brain"),
            "event": {
                "platform": "event",
                "name": "Change of level",
                "icon": "mdi:shield-alert",
                "event_types": list(LEVELS),
                "state_topic": base + "event",
            },
        }
        if self._controls:
            components["calibrate"] = {
                "platform": "button",
                "name": "Calibrate",
                "icon": "mdi:school",
                "entity_category": "config",
                "command_topic": f"{self._topics}{device}/{BRIDGE_COMMANDS[0]}",
                "payload_press": "PRESS",
            }
            components["release"] = {
                "platform": "button",
                "name": "Release from quarantine",
                "icon": "mdi:lock-open-variant",
                "command_topic": f"{self._topics}{device}/{BRIDGE_COMMANDS[2]}",
                "payload_press": "PRESS",
            }
            components["maintenance"] = {
                "platform": "switch",
                "name": "Maintenance",
                "icon": "mdi:wrench",
                "entity_category": "config",
                "command_topic": f"{self._topics}{device}/{BRIDGE_COMMANDS[1]}",
                "value_template": "{{ value_json.maintenance }}",
                "payload_on": "ON",
                "payload_off": "OFF",
                "state_on": "True",
                "state_off": "False",
                "optimistic": False,
            }
        for key, component in components.items():
            component["unique_id"] = f"stonechat_fleet_{device}_{key}"
        about = {"identifiers": ["stonechat_" + device], "name": row["name"] or device, "manufacturer": "stonechat"}
        about |= {"model": row["class"] or "stonechat agent", "sw_version": row["firmware"] or "unknown"}
        if row["site"]:
            about["suggested_area"] = row["site"]
        return {
            "device": about,
            "origin": {"name": "stonechat fleet", "sw_version": __version__},
            "availability_topic": self._topics + BRIDGE_ONLINE,
            "state_topic": base + "state",
            "qos": 1,
            "components": components,
        }

    def state(self, row: dict[str, Any]) -> dict[str, Any]:
        level = row["level"]
        return {
            "presence": row["state"],
            "present": row["state"] in HERE,
            "why": row["why"],
            "level": LEVELS[level],
            "alarm": level == 2,
            "score": None if row["score"] is None else row["score"] / 100,
            "cause": self._cause(row["device"]) if level else "",
            "model": row["model"],
            "maintenance": "maintenance" in row["marks"].split(", "),
        }

    def _cause(self, device: str) -> str:
        rows, found = self._store.history(device, limit=1), self._store.devices(device)
        if not rows or not found:
            return ""
        names = feature_names(found[0], rows[-1].channel)
        causes = [f"{name_of(f.index, names)} {f.deviation:+.1f} sd ({f.share_percent} %)" for f in rows[-1].features]
        where = channel_name(found[0], rows[-1].channel)
        return ", ".join([where] * bool(where) + causes)[:MAX_TEXT]

    def step(self) -> int:
        """Publish what has changed -> how many messages. Raises StoreError, and StonechatError of publish()."""
        self.view.poll()
        sent = 0
        for device in sorted(self._shown.keys() - self.view.rows.keys()):
            sent += self.remove(device)
        for device in sorted(self.view.rows):
            row = self.view.facts(device)
            if row is not None:
                sent += self._show(device, row)
        return sent

    def _show(self, device: str, row: dict[str, Any]) -> int:
        config, known = _json(self.discovery(row)), self._shown.get(device, ("", ""))
        state = _json(self.state(row))
        sent = 0
        if config.decode() != known[0]:
            self._publish(self.discovery_topic(device), config)
            sent += 1
        if state.decode() != known[1]:
            self._publish(f"{self._topics}{device}/home/state", state)
            sent += 1
        before = self._levels.get(device)
        if before is not None and before != row["level"]:
            facts = json.loads(state)
            event = {"event_type": facts["level"], "score": facts["score"], "cause": facts["cause"]}
            self._publish(f"{self._topics}{device}/home/event", _json(event))
            sent += 1
        self._levels[device] = row["level"]
        self._shown[device] = config.decode(), state.decode()
        return sent

    def again(self) -> None:
        """Home Assistant has started, or the broker has: publish everything at the next step."""
        self._shown = dict.fromkeys(self._shown, ("", ""))

    def remove(self, device: str) -> int:
        """Take a device out of Home Assistant."""
        self._publish(self.discovery_topic(device), b"")
        self._publish(f"{self._topics}{device}/home/state", b"")
        self._shown.pop(device, None)
        self._levels.pop(device, None)
        return 2

    def announced(self, topic: str, payload: bytes) -> str:
        """-> the device that a retained discovery message announces, if it is one of this fleet's that is not there any
        more; "" for all others."""
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            found = json.loads(payload)
            device = str(found["device"]["identifiers"][0]).removeprefix("stonechat_")
            mine = found["state_topic"] == f"{self._topics}{device}/home/state"
            if mine and topic == self.discovery_topic(device) and self.view.ready and device not in self.view.rows:
                return device
        return ""

    def asked(self, topic: str, payload: bytes, maintenance_s: int, now_s: int) -> tuple[str, str, list[int]] | None:
        """A press in Home Assistant -> (device, command, arguments); None for what is none."""
        device, _, what = topic.removeprefix(self._topics).partition("/")
        if not topic.startswith(self._topics) or device not in self.view.rows:
            return None
        if what == BRIDGE_COMMANDS[0] and payload == b"PRESS":
            return device, "calibrate", []
        if what == BRIDGE_COMMANDS[2] and payload == b"PRESS":
            return device, "release", []
        if what == BRIDGE_COMMANDS[1] and payload in (b"ON", b"OFF"):
            return device, "maintenance", [now_s + maintenance_s if payload == b"ON" else now_s]
        return None


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _sensor(name: str, key: str, **more: Any) -> dict[str, Any]:
    return {"platform": "sensor", "name": name, "value_template": "{{ value_json." + key + " }}", **more}


def _binary(name: str, key: str, **more: Any) -> dict[str, Any]:
    return {**_sensor(name, key, **more), "platform": "binary_sensor", "payload_on": "True", "payload_off": "False"}


class Connection:
    """The broker: publishes with QoS 1, keeps what arrives for take()."""

    def __init__(self, options: dict[str, Any], prefix: str, controls: bool) -> None:
        self._where = options["host"], options["port"]
        topics = options["prefix"].rstrip("/") + "/"
        self.topics = topics
        self._online = topics + BRIDGE_ONLINE
        self._wanted = [prefix + "/status", prefix + "/device/+/config"]
        self._wanted += [f"{topics}+/{name}" for name in BRIDGE_COMMANDS] if controls else []
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
        client.on_disconnect = lambda *_: self._lost(f"broker {self._where[0]}:{self._where[1]}: connection lost")
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
    with Store(args.db, _say) as store:
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
    print(f"{len(bridge.view.rows)} devices are removed from Home Assistant")
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
            sequence = ask(operator, device, command, arguments)
            _say(f"{device}: {command} {arguments}, number {sequence}")
            audit.note(store, WHO, "command", device=device, command=command, arguments=arguments)
        except StonechatError as error:
            _say(f"{device}: {command}: {error}")


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"stonechat home-assistant: {text}", file=sys.stderr, flush=True)
