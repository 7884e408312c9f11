"""Home Assistant by MQTT device discovery, from the agent itself: no collector is needed.

The device announces itself and publishes its state as JSON. Both are in the clear and not authenticated: whoever may
write to these topics can show a state that the device does not have. Nothing is taken from Home Assistant but the word
that it has started. See https://www.home-assistant.io/integrations/mqtt/#device-discovery-payload.
"""

import json
import os

from .. import __version__
from ..compat import ticks_add, ticks_diff, ticks_ms
from ..detection import ALARM
from ..errors import ConfigError, StonechatError
from ..policy import ACTIONS
from .verdict_log import LEVEL_NAMES

TOPICS = ("ha/state", "ha/online", "ha/event")  # below the device's own
RESTART_MS = 10_000  # at most, after Home Assistant has started, so that a fleet does not answer in one moment
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
_TEXT_CHARACTERS = 255  # of a state in Home Assistant


class HomeAssistant:
    """device: its id; topic: of the device, with the / at its end; prefix: of Home Assistant's discovery; name: what
    people call the device, "" for its id; heartbeat_windows: the state is renewed after as many; expire_s: a state that
    is not renewed by then is unknown there; remove: take the device out of Home Assistant; updates: the device takes
    releases. Raises ConfigError for an id that Home Assistant does not take."""

    def __init__(
        self,
        device: str,
        topic: str,
        *,
        prefix: str = "homeassistant",
        name: str = "",
        heartbeat_windows: int = 60,
        expire_s: int = 1800,
        remove: bool = False,
        updates: bool = False,
    ) -> None:
        if set(device) - _LETTERS:
            raise ConfigError(
                "[device] id %s: Home Assistant takes letters, digits, _ and - only; choose another id or set"
                " [homeassistant] discovery = false" % device
            )
        self.status_topic = prefix + "/status"
        self.config_topic = "%s/device/%s/config" % (prefix, device)
        self._device = device
        self._topic = topic
        self._name = name or device
        self._heartbeat_windows = heartbeat_windows
        self._expire_s = expire_s
        self._remove = self._removed = remove
        self._updates = updates
        self._announce_due_ms: int | None = None
        self._said: tuple | None = None  # level, learning and versions of the state that was last due
        self._windows = 0  # since then
        self._state: bytes | None = None
        self._state_due = False
        self._event: bytes | None = None

    def config(self) -> bytes:
        """The discovery message for this device, JSON."""
        sensor = {"platform": "sensor", "expire_after": self._expire_s}
        binary = {
            "platform": "binary_sensor",
            "expire_after": self._expire_s,
            "payload_on": "True",
            "payload_off": "False",
        }
        components: dict[str, dict] = {
            "anomaly": dict(binary, name="Anomaly", device_class="problem", value_template="{{ value_json.alarm }}"),
            "level": dict(
                sensor,
                name="Level",
                device_class="enum",
                options=list(LEVEL_NAMES),
                value_template="{{ value_json.level }}",
            ),
            "score": dict(
                sensor,
                name="Anomaly score",
                state_class="measurement",
                suggested_display_precision=2,
                icon="mdi:pulse",
                value_template="{{ value_json.score }}",
            ),
            "cause": dict(sensor, name="Cause", icon="mdi:magnify", value_template="{{ value_json.cause }}"),
            "response": dict(
                sensor, name="Response", icon="mdi:shield-lock", value_template="{{ value_json.response }}"
            ),
            "learning": dict(
                binary,
                name="Learning",
                entity_category="diagnostic",
                icon="mdi:school",
                value_template="{{ value_json.learning }}",
            ),
            "model": dict(
                sensor,
                name="Model",
                entity_category="diagnostic",
                icon="mdi:brain",
                value_template="{{ value_json.model }}",
            ),
            "event": {
                "platform": "event",
                "name": "Change of level",
                "icon": "mdi:shield-alert",
                "event_types": list(LEVEL_NAMES),
                "state_topic": self._topic + "ha/event",
            },
        }
        if self._updates:
            components["release"] = {
                "platform": "update",
                "name": "Release",
                "entity_category": "diagnostic",
                "icon": "mdi:package-up",
                "value_template": "{{ value_json.version }}",
                "latest_version_topic": self._topic + "ha/state",
                "latest_version_template": "{{ value_json.latest }}",
            }
        for key, component in components.items():
            component["unique_id"] = "stonechat_%s_%s" % (self._device, key)
        return _json(
            {
                "device": {
                    "identifiers": ["stonechat_" + self._device],
                    "name": self._name,
                    "manufacturer": "stonechat",
                    "model": "stonechat agent",
                    "sw_version": __version__,
                },
                "origin": {"name": "stonechat", "sw_version": __version__},
                "availability_topic": self._topic + "ha/online",
                "state_topic": self._topic + "ha/state",
                "qos": 1,
                "components": components,
            }
        )

    # --- what happens -----------------------------------------------------------------------------------------------

    def observe(self, verdict, agent) -> None:
        """After each scored window."""
        response = _response(agent)
        version, latest = _versions(agent.update) if self._updates else (0, 0)
        news = (verdict.level, bool(verdict.learning), response, version, latest)
        self._windows += 1
        facts = {
            "level": LEVEL_NAMES[verdict.level],
            "alarm": verdict.level == ALARM,
            "score": round(verdict.score_q8 / 256, 2),
            "evidence": round(verdict.evidence_q8 / 256, 2),  # 1 is the threshold
            "cause": _cause(verdict, agent) if verdict.level else "",
            "response": response,
            "learning": news[1],
            "model": agent.model_name,
        }
        if self._updates:
            facts["version"], facts["latest"] = str(version), str(latest)
        if verdict.changed:
            self._event = _json({"event_type": facts["level"], "score": facts["score"], "cause": facts["cause"]})
        if news != self._said or self._windows >= self._heartbeat_windows:
            self._said = news
            self._windows = 0
            self._state_due = True
        self._state = _json(facts)

    def connected(self) -> None:
        """There is a connection to the broker."""
        self._announce_due_ms = ticks_ms()

    def on_message(self, topic: str, payload: bytes) -> bool:
        """-> whether the message was Home Assistant's: it has started, and what is retained may not have reached it."""
        if topic != self.status_topic:
            return False
        if bytes(payload) == b"online":
            delay_ms = int.from_bytes(os.urandom(2), "little") * RESTART_MS >> 16
            self._announce_due_ms = ticks_add(ticks_ms(), delay_ms)
        return True

    def turn(self, transport) -> None:
        """Publish what is due. Raises StonechatError, and tries again at the next turn."""
        if not transport.connected:
            return
        if self._remove:
            for topic in (self.config_topic, self._topic + "ha/online", self._topic + "ha/state"):
                transport.publish(topic, b"", 0, True)
            self._remove = False
        if self._removed:
            return
        if self._announce_due_ms is not None and ticks_diff(ticks_ms(), self._announce_due_ms) >= 0:
            transport.publish(self.config_topic, self.config(), 0, True)
            transport.publish(self._topic + "ha/online", b"online", 0, True)
            self._announce_due_ms = None
            self._state_due = self._state is not None
        if self._state_due and self._state is not None:
            transport.publish(self._topic + "ha/state", self._state, 0, True)
            self._state_due = False
        if self._event is not None:
            transport.publish(self._topic + "ha/event", self._event, 0, False)
            self._event = None

    def goodbye(self, transport) -> None:
        """Before the agent ends. A device that is lost has no time for it: its states expire."""
        if self._removed:
            return
        try:
            transport.publish(self._topic + "ha/online", b"offline", 0, True)
        except (StonechatError, OSError):
            pass  # no connection: the states expire


def open_home(config: dict, window_ms: int) -> "HomeAssistant":
    """From the agent's configuration. Raises ConfigError."""
    device = config["device"]
    home = config["homeassistant"]
    heartbeat_windows = config["report"]["heartbeat_windows"]
    return HomeAssistant(
        device["id"],
        "%s/%s/%s/" % (config["mqtt"]["prefix"], device["fleet"], device["id"]),
        prefix=home["prefix"],
        name=home["name"],
        heartbeat_windows=heartbeat_windows,
        expire_s=max(60, 3 * heartbeat_windows * window_ms // 1000),
        remove=home["discovery"] == "remove",
        updates=config["update"]["enabled"],
    )


def _response(agent) -> str:
    """What is in force."""
    response = agent.response
    if response is None:
        return "off"
    if response.real.action:
        return str(ACTIONS[response.real.action])
    if response.dry.action:
        return "dry run: " + ACTIONS[response.dry.action]
    return "stopped" if response.stopped else "none"


def _versions(update) -> "tuple[int, int]":
    """The version that is final, and the one that is pulled or on trial, or the same."""
    store = update.store
    return store.version, update.update.offered or (store.tried if store.trial else store.version)


def _cause(verdict, agent) -> str:
    columns = agent.columns
    causes = ["%s %+.1f sd (%d %%)" % (columns[i], z / 16, share) for i, z, share in verdict.explain(3)]
    lead = getattr(verdict, "channel", 0)
    if lead:
        causes.insert(0, agent.channel_names[lead - 1])
    return ", ".join(causes)[:_TEXT_CHARACTERS]


def _json(value) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
