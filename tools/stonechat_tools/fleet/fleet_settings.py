"""fleet.toml: what all devices of one fleet share, and the configuration of a device that follows from it."""

import json
from dataclasses import dataclass
from typing import Any

from stonechat.errors import ConfigError
from stonechat.linux import config

ACCOUNTS = ("collector", "operator")  # the collector may read reports and acknowledge; the operator may command


@dataclass(frozen=True)
class Settings:
    """fleet.toml: what all devices of the fleet share. auth: mtls, passwords, managed (a broker that is run elsewhere:
    certificates from our CA, no files for the broker) or plain (no TLS, for tests on one machine)."""

    broker: str
    port: int
    fleet: str = "fleet"
    prefix: str = "stonechat/1"
    auth: str = "mtls"
    alpn: str = ""
    username_file: str = ""
    install_dir: str = "/etc/stonechat"
    home_assistant: bool = False  # devices announce themselves
    home_bridge: bool = False  # `stonechat home-assistant` announces them

    @property
    def topics(self) -> str:
        return f"{self.prefix}/{self.fleet}/"

    def check(self) -> None:
        """Raises ConfigError for what the agent would refuse in its configuration."""
        if not self.install_dir.startswith("/"):
            raise ConfigError(f"--install-dir {self.install_dir}: want an absolute path")
        try:
            config.check(self.device_sections("x"), "the devices' configuration")
        except UnicodeEncodeError:
            raise ConfigError("the devices' configuration: want UTF-8 text in every setting") from None

    def device_sections(self, device: str) -> dict[str, dict[str, Any]]:
        """The agent's configuration for one device; what is not named has its default."""
        where = self.install_dir
        mqtt: dict[str, Any] = {"host": self.broker, "port": self.port, "prefix": self.prefix}
        if self.auth == "plain":
            mqtt["tls"] = False
        if self.auth in ("mtls", "passwords"):
            mqtt["ca_file"] = f"{where}/ca.crt"
        if self.auth in ("mtls", "managed"):
            mqtt |= {"cert_file": f"{where}/client.crt", "cert_key_file": f"{where}/client.key"}
        if self.auth == "passwords":
            mqtt["password_file"] = f"{where}/password"
            if not self.username_file:
                mqtt["username"] = device
        if self.username_file:
            mqtt["username_file"] = self.username_file
        if self.alpn:
            mqtt["alpn"] = self.alpn
        sections: dict[str, dict[str, Any]] = {
            "device": {"id": device, "fleet": self.fleet, "key_file": f"{where}/device.key"},
            "model": {"file": f"{where}/model.tflite"},
            "mqtt": mqtt,
        }
        if self.home_assistant:
            sections["homeassistant"] = {"discovery": True}
        return sections

    @property
    def accounts(self) -> tuple[str, ...]:
        """At the broker, beside the devices."""
        home = ("homeassistant",) if self.home_assistant or self.home_bridge else ()
        return (*ACCOUNTS, *home, "homebridge") if self.home_bridge else (*ACCOUNTS, *home)

    def to_toml(self) -> str:
        lines = ["# Made by `stonechat provision init`; shared by all devices of this fleet."]
        return "\n".join(lines + [f"{name} = {json.dumps(value)}" for name, value in vars(self).items()]) + "\n"
