"""What Home Assistant is shown of the fleet, and what is pressed there, as messages. Nothing here sends them."""

import contextlib
import hashlib
import json
from collections.abc import Callable
from typing import Any

from stonechat import __version__
from stonechat.errors import ConfigError

from ..fleet import keyring
from ..fleet.broker_lists import BRIDGE_COMMANDS, BRIDGE_ONLINE
from ..fleet.history import feature_names, name_of
from ..fleet.overview import channel_name
from ..fleet.presence import STATES
from ..fleet.store import Store
from ..fleet.wire import LEVELS
from .view import View

MAX_TEXT = 255  # characters of a state in Home Assistant
HERE = ("reporting", "asleep")

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
        more; "" for all others. Whoever may write there may have written anything."""
        wrong = (ConfigError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)
        with contextlib.suppress(*wrong):
            found = json.loads(payload)
            device = str(found["device"]["identifiers"][0]).removeprefix("stonechat_")
            keyring.check_device_id(device)  # it becomes part of a topic
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
