"""Home Assistant's discovery by the agent itself: the messages, held to Home Assistant's rules, and a real broker."""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_process import DEVICE, AgentProcess, quick_model
from fleet_support import Mosquitto, Peer, needs_mosquitto, wait_for
from stonechat.errors import ConfigError
from stonechat.linux.homeassistant import HomeAssistant

TOPIC = f"stonechat/1/fleet/{DEVICE}/"
CONFIG = f"homeassistant/device/{DEVICE}/config"

# Home Assistant 2025.4, homeassistant/components/mqtt: what a device discovery message may hold, by its own schemas.
DEVICE_KEYS = {
    "configuration_url",
    "connections",
    "identifiers",
    "manufacturer",
    "model",
    "model_id",
    "name",
    "hw_version",
    "serial_number",
    "suggested_area",
    "sw_version",
    "via_device",
}
ORIGIN_KEYS = {"name", "sw_version", "support_url"}
SHARED_KEYS = {
    "availability",
    "availability_mode",
    "availability_template",
    "availability_topic",
    "command_topic",
    "encoding",
    "payload_available",
    "payload_not_available",
    "qos",
    "state_topic",
}
ENTITY_KEYS = {
    "enabled_by_default",
    "entity_category",
    "entity_picture",
    "icon",
    "json_attributes_template",
    "json_attributes_topic",
    "name",
    "object_id",
    "platform",
    "unique_id",
} | SHARED_KEYS
PLATFORM_KEYS = {
    "sensor": {
        "device_class",
        "expire_after",
        "force_update",
        "last_reset_value_template",
        "options",
        "state_class",
        "suggested_display_precision",
        "unit_of_measurement",
        "value_template",
    },
    "binary_sensor": {
        "device_class",
        "expire_after",
        "force_update",
        "off_delay",
        "payload_off",
        "payload_on",
        "value_template",
    },
    "event": {"device_class", "event_types", "value_template"},
    "update": {
        "command_topic",
        "device_class",
        "latest_version_template",
        "latest_version_topic",
        "payload_install",
        "release_summary",
        "release_url",
        "retain",
        "title",
        "value_template",
    },
    "button": {"command_template", "device_class", "payload_press", "retain"},
    "switch": {
        "command_template",
        "device_class",
        "optimistic",
        "payload_off",
        "payload_on",
        "retain",
        "state_off",
        "state_on",
        "value_template",
    },
}
DEVICE_CLASSES = {
    "sensor": {"enum", None},
    "binary_sensor": {"connectivity", "problem", None},
    "event": {None},
    "update": {"firmware", None},
    "button": {None},
    "switch": {None},
}


def check(message: dict[str, Any]) -> None:
    """Raises AssertionError for what Home Assistant would refuse."""
    assert set(message) <= {"device", "origin", "components"} | SHARED_KEYS
    assert set(message["device"]) <= DEVICE_KEYS
    assert message["device"]["identifiers"] or message["device"]["connections"]
    assert set(message["origin"]) <= ORIGIN_KEYS and message["origin"]["name"]
    unique = [component["unique_id"] for component in message["components"].values()]
    assert unique and len(set(unique)) == len(unique)
    for key, component in message["components"].items():
        assert re.fullmatch("[a-zA-Z0-9_-]+", key)
        platform = component["platform"]
        assert set(component) <= ENTITY_KEYS | PLATFORM_KEYS[platform], key
        assert component.get("device_class") in DEVICE_CLASSES[platform], key
        assert component.get("state_class", "measurement") == "measurement"
        assert component.get("entity_category", "diagnostic") in ("config", "diagnostic")
        if platform == "sensor":
            enum = component.get("device_class") == "enum"
            assert ("options" in component) == enum
            assert not (enum and {"state_class", "unit_of_measurement"} & set(component))
        if platform == "event":
            assert component["event_types"]
        if "expire_after" in component:
            assert type(component["expire_after"]) is int and component["expire_after"] > 0
        if "icon" in component:
            assert component["icon"].startswith("mdi:")
        if platform in ("button", "switch"):
            command = component["command_topic"]
            assert command and not set(command) & set("+#\0") and not component.get("retain")
        if platform == "update":  # nothing is commanded from there
            assert "command_topic" not in component
            assert component["latest_version_topic"] == message["state_topic"]
        topic = component.get("state_topic", message.get("state_topic"))
        assert topic and not set(topic) & set("+#\0") and len(topic) < 65_536


def render(template: str, state: dict[str, Any]) -> str:
    """The templates here are all `{{ value_json.NAME }}`; Jinja renders a bool as True or False."""
    found = re.fullmatch(r"\{\{ value_json\.(\w+) \}\}", template)
    assert found, template
    return str(state[found[1]])


def check_state(message: dict[str, Any], state: dict[str, Any]) -> None:
    """Every template finds a value that its entity takes."""
    for component in message["components"].values():
        if "value_template" in component:
            value = render(component["value_template"], state)
            assert len(value) <= 255
            if component["platform"] == "binary_sensor":
                assert value in (component["payload_on"], component["payload_off"])
            if "options" in component:
                assert value in component["options"]
            if component["platform"] == "update":
                assert value and render(component["latest_version_template"], state)
            if component["platform"] == "switch":
                assert value in (component["state_on"], component["state_off"])
            if "state_class" in component:
                assert value == "None" or float(value) >= 0  # None: unknown


def test_the_discovery_message_is_one_that_home_assistant_takes() -> None:
    home = HomeAssistant("pump-1", "stonechat/1/fleet/pump-1/", name="Pump, left")
    message = json.loads(home.config())
    check(message)
    assert message["device"]["name"] == "Pump, left"
    assert message["availability_topic"] == "stonechat/1/fleet/pump-1/ha/online"
    assert "release" not in message["components"]
    takes = json.loads(HomeAssistant("pump-1", "stonechat/1/fleet/pump-1/", updates=True).config())
    check(takes)
    assert takes["components"]["release"]["platform"] == "update"


def test_a_mistake_would_be_found() -> None:
    good = json.loads(HomeAssistant("pump-1", "t/").config())
    for where, key, value in (
        ("score", "state_class", "wrong"),
        ("score", "options", ["a"]),
        ("level", "state_class", "measurement"),
        ("anomaly", "device_class", "enum"),
        ("anomaly", "event_types", ["x"]),
        ("event", "event_types", []),
        ("event", "unique_id", good["components"]["score"]["unique_id"]),
        ("cause", "expire_after", 0),
    ):
        bad = json.loads(json.dumps(good))
        bad["components"][where][key] = value
        with pytest.raises(AssertionError):
            check(bad)


def test_an_id_that_home_assistant_would_pass_over_is_refused() -> None:
    with pytest.raises(ConfigError, match="letters, digits, _ and - only"):
        HomeAssistant("pump.1", "t/")


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with Mosquitto.plain(tmp_path) as running:
        yield running


@needs_mosquitto
@pytest.mark.parametrize("transport", ["lean", "paho"])
def test_five_minutes_with_a_real_broker(broker: Mosquitto, tmp_path: Path, transport: str) -> None:
    """As the page says: discovery = true; then Home Assistant restarts; then the agent stops; then it is removed."""
    folder = tmp_path / "device"
    folder.mkdir()
    quick_model(folder / "model.tflite")
    home = Peer(broker.port, "home-assistant")
    home.topics = ["homeassistant/#", TOPIC + "ha/+"]

    def last(topic: str) -> bytes | None:
        return next((payload for name, payload in reversed(home.got) if name == topic), None)

    (folder / "vendor.key.pub").write_text(f"release SLH-DSA-SHA2-128s {'7e' * 32}\n")
    more = (
        f'[update]\nenabled = true\nclass = "pump"\nkeys = ["{folder}/vendor.key.pub"]\nfolder = "{folder}/update"\n'
        '[homeassistant]\ndiscovery = true\nname = "The pump"\n'
    )
    with home, AgentProcess(folder, broker.port, transport=transport, more=more) as agent:
        assert wait_for(lambda: last(TOPIC + "ha/state"), 30), agent.said()
        config = last(CONFIG)
        assert config and last(TOPIC + "ha/online") == b"online"
        message, state = json.loads(config), json.loads(last(TOPIC + "ha/state") or b"")
        check(message)
        check_state(message, state)
        assert message["device"]["name"] == "The pump" and state["level"] in ("normal", "watch", "alarm")
        assert state["response"] in ("none", "dry run: throttle", "dry run: quarantine")
        assert (state["version"], state["latest"]) == ("0", "0")  # the model that it came with
        home.got.clear()
        home.client.publish("homeassistant/status", b"online", 0)
        assert wait_for(lambda: last(CONFIG) and last(TOPIC + "ha/state"), 30), agent.said()
        assert agent.stop() == 0
        assert wait_for(lambda: last(TOPIC + "ha/online") == b"offline", 10)
        # What is retained reaches a Home Assistant that starts later.
        late = Peer(broker.port, "late")
        late.topics = ["homeassistant/#", TOPIC + "ha/+"]
        with late:
            assert wait_for(lambda: {name for name, _ in late.got} >= {CONFIG, TOPIC + "ha/state"}, 10)
    assert "Traceback" not in agent.said()
    with (
        home,
        AgentProcess(
            folder, broker.port, transport=transport, more=more.replace("discovery = true", 'discovery = "remove"')
        ) as agent,
    ):
        home.got.clear()
        assert wait_for(lambda: last(CONFIG) == b"" and last(TOPIC + "ha/state") == b"", 30), agent.said()
    late = Peer(broker.port, "later")
    late.topics = ["homeassistant/#", TOPIC + "ha/+"]
    with late:
        assert wait_for(late.connected.is_set)
        time.sleep(0.5)
        assert not late.got


def test_off_by_default_and_wrong_values_are_named(tmp_path: Path) -> None:
    quick_model(tmp_path / "model.tflite")
    for line, error in (
        ('discovery = "yes"', 'discovery must be one of true, false, "remove"'),
        ('prefix = "a/#"', "prefix must be"),
        ("discover = true", "no key discover"),
    ):
        agent = AgentProcess(tmp_path, 1, more=f"[homeassistant]\n{line}\n")
        done = subprocess.run([*agent.command, "--check"], capture_output=True, text=True, timeout=30)
        assert done.returncode == 1 and error in done.stderr
