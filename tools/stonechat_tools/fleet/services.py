"""MQTT services that others run: what each takes as a topic, and whether a fleet's topics fit.

Sources, as published in 2026: AWS "IoT Core message broker and protocol limits and quotas"; EMQX "MQTT configuration"
(defaults); HiveMQ "Configuration" (defaults); Azure "Communicate with an IoT hub using MQTT".
"""

from dataclasses import dataclass

from stonechat import limits
from stonechat.errors import ConfigError
from stonechat.linux.homeassistant import TOPICS

KINDS = ("report", "status", "want", "ack", "command", "model", *TOPICS)  # of a device's topics


@dataclass(frozen=True, slots=True)
class Service:
    """levels: at most, 0 for any number. refused: why no fleet can use it."""

    topic_bytes: int
    levels: int
    client_id_bytes: int
    refused: str = ""


SERVICES = {
    "aws-iot-core": Service(256, 8, 128),
    "emqx": Service(65_535, 128, 65_535),
    "hivemq": Service(65_535, 0, 65_535),
    "azure-iot-hub": Service(
        0,
        0,
        128,
        "it takes devices/DEVICE/messages/events/ only and keeps no status for the collector: use the MQTT broker of"
        " Azure Event Grid, or EMQX or HiveMQ in Azure",
    ),
}


def check_topics(name: str, prefix: str, fleet: str) -> None:
    """Whether the topics of each device of a fleet fit, whatever its id. Raises ConfigError with the fix."""
    service = SERVICES[name]
    if service.refused:
        raise ConfigError(f"--service {name}: {service.refused}")
    for kind in sorted(KINDS, key=lambda kind: (-kind.count("/"), -len(kind))):  # the worst first: its fix fits all
        topic = f"{prefix}/{fleet}/{'x' * limits.DEVICE_ID_BYTES}/{kind}"
        check_topic(name, topic)


def check_topic(name: str, topic: str) -> None:
    service = SERVICES[name]
    if topic.startswith("$"):
        raise ConfigError(f"--prefix: {name} keeps topics that begin with $ for itself")
    levels = topic.count("/") + 1
    if service.levels and levels > service.levels:
        over = levels - service.levels
        raise ConfigError(f"--prefix: {name} takes {service.levels} levels, topics have {levels}; leave out {over}")
    size = len(topic.encode())
    if size > service.topic_bytes:
        over = size - service.topic_bytes
        raise ConfigError(
            f"--prefix, --fleet: {name} takes topics of {service.topic_bytes} bytes, the longest has {size}; shorten"
            f" them by {over}"
        )
