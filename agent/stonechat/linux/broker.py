"""The connection to the broker, from the configuration: which client, with which credentials, which can be read again.

Everything that needs files is read by prepare(), before the process becomes another user.
"""

from ..errors import ConfigError
from .files import read_secret, read_text
from .resolver import Resolver


class Credentials:
    """What identifies this device at the broker, and the broker to it. Raises ConfigError."""

    def __init__(self, mqtt: dict) -> None:
        self.user: str | None = mqtt["username"] or None
        if mqtt["username_file"]:
            self.user = read_text(mqtt["username_file"], "[mqtt] username_file")
        self.password: bytes | None = None
        if mqtt["password_file"]:
            self.password = read_secret(mqtt["password_file"], "[mqtt] password_file")
        self.tls = None
        if mqtt["tls"]:
            from .tls import tls_context

            self.tls = tls_context(mqtt["ca_file"], mqtt["cert_file"], mqtt["cert_key_file"], mqtt["alpn"])


class Connectable:
    """Makes the client, which Agent.connect() takes, for credentials. `resolver` knows the broker's addresses."""

    def __init__(self, make: type, resolver: Resolver, config: dict) -> None:
        self.resolver = resolver
        self._make = make
        self._config = config

    def __call__(self, credentials: Credentials):
        mqtt = self._config["mqtt"]
        return self._make(
            self._config["device"]["id"],
            mqtt["host"],
            mqtt["port"],
            resolver=self.resolver,
            user=credentials.user,
            password=credentials.password,
            tls=credentials.tls,
            keepalive_s=mqtt["keepalive_s"],
        )


def prepare(config: dict) -> Connectable:
    """Raises ConfigError."""
    mqtt = config["mqtt"]
    if mqtt["transport"] == "paho":
        from .paho import Paho, load

        load()
        make: type = Paho
    else:
        from .own_client import OwnClient

        make = OwnClient
    if mqtt["tls"] or make.__name__ == "Paho":
        import socket as module  # what ssl wraps
    else:
        import _socket as module  # type: ignore[no-redef]  # all that a plain connection needs, and smaller
    try:
        resolver = Resolver(mqtt["host"], mqtt["port"], module)
    except UnicodeError:
        raise ConfigError("[mqtt] host %r is no name of a host" % mqtt["host"])
    return Connectable(make, resolver, config)
