"""Address and account of the broker: the arguments of every verb that connects to it."""

import argparse
import contextlib
import errno
import os
import ssl
from pathlib import Path
from typing import Any

from stonechat.errors import ConfigError

from ..console import read_toml
from . import wire
from .database import add_database_arguments


def add_broker_arguments(parser: argparse.ArgumentParser, keys_required: bool | None = True) -> None:
    """What every verb that talks to the broker takes. keys_required: None for one that has no keys."""
    if keys_required is not None:
        parser.add_argument(
            "--keys",
            required=keys_required,
            metavar="FOLDER",
            help="folder of key files, as `stonechat provision` makes it",
        )
    parser.add_argument(
        "--broker",
        metavar="HOST[:PORT]",
        help="default: that of the fleet.toml in or above that folder, else localhost, port 8883",
    )
    parser.add_argument("--plain", action="store_true", help="no TLS (then the default port is 1883)")
    parser.add_argument("--cafile", help="the CA that signed the broker's certificate (default: the system's)")
    parser.add_argument("--cert", help="client certificate, for mutual TLS")
    parser.add_argument("--key", help="its private key")
    parser.add_argument("--user", help="user name, where the broker wants one")
    parser.add_argument("--password-file", help="a file with the password in its first line")
    parser.add_argument("--prefix", help=f"topic prefix (default: that of fleet.toml, else {wire.PREFIX})")
    add_database_arguments(parser)


def split_host(text: str, option: str) -> tuple[str, int | None]:
    """ "host:8883" or "[::1]:8883" -> ("host", 8883); None without a port. Raises ConfigError."""
    host, colon, port = text.rpartition(":")
    if not colon or host.count(":") > 0 and not host.endswith("]"):  # no port, or a bare IPv6 address
        host, port = text, ""
    host = host.removeprefix("[").removesuffix("]")
    digits = port.isascii() and port.isdigit() and len(port) <= 5
    if not host or colon and text.endswith(":") or port and not (digits and 0 < int(port) < 65536):
        raise ConfigError(f"{option} {text}: want HOST or HOST:PORT")
    try:
        host.encode("idna")
    except UnicodeError as error:  # a part of more than 63 letters, an empty one, no text
        raise ConfigError(f"{option} {text}: {host} is no name of a host ({error})") from None
    if not host.isprintable() or " " in host:
        raise ConfigError(f"{option} {text}: a name of a host has no spaces")
    return host, int(port) if port else None


def check_text(text: str | None, option: str, most_bytes: int = 65_535) -> None:
    """What MQTT takes for a text. Raises ConfigError."""
    try:
        fits = text is None or len(text.encode()) <= most_bytes and "\0" not in text
    except UnicodeEncodeError:
        fits = False
    if not fits:
        raise ConfigError(f"{option} {text!r}: want UTF-8 of at most {most_bytes} bytes")


def _fleet_settings(keys: Path) -> dict[str, Any]:
    """The fleet.toml in or above a folder of keys; empty where there is none."""
    for folder in (keys, keys.resolve().parent):
        with contextlib.suppress(OSError):
            return read_toml(folder / "fleet.toml")
    return {}


def broker_options(args: argparse.Namespace, account: str = "") -> dict[str, Any]:
    """The arguments of add_broker_arguments -> keywords of Collector. What is not given comes from the fleet's folder,
    if the keys are in one: broker, prefix, CA, and the files of `account`. Raises ConfigError."""
    fleet = _fleet_settings(Path(args.keys))
    plain = args.plain or (args.broker is None and fleet.get("auth") == "plain")
    host, port = split_host(args.broker or str(fleet.get("broker", "localhost")), "--broker")
    if port is None and args.broker is None and isinstance(fleet.get("port"), int):
        port = fleet["port"]
    prefix = args.prefix
    if prefix is None and fleet:
        prefix = f"{fleet.get('prefix', 'stonechat/1')}/{fleet.get('fleet', 'fleet')}/"
    check_text(args.user, "--user")
    if prefix is not None and (not prefix.isprintable() or set(prefix) & set("+#") or len(prefix.encode()) > 1000):
        raise ConfigError(f"--prefix {prefix!r}: want the begin of a topic, without + and #")
    options: dict[str, Any] = {
        "host": host,
        "port": port or (1883 if plain else 8883),
        "prefix": prefix or wire.PREFIX,
        "username": args.user,
    }
    home = Path(args.keys).resolve().parent  # operator/keys lies in the account's folder, keys/ beside the account's
    home = home if home.name == account else home / account
    password = Path(args.password_file) if args.password_file else None
    if args.user is None and not args.cert and fleet.get("auth") == "passwords" and (home / "password").is_file():
        options["username"], password = account, home / "password"
    if password:
        lines = _text(password, "--password-file").splitlines()
        if not lines:
            raise ConfigError(f"--password-file {password}: empty")
        options["password"] = lines[0]
    if plain:
        if args.cafile or args.cert:
            raise ConfigError("--plain and certificates: choose one")
        return options
    certificate, key, ca = args.cert, args.key, args.cafile
    if certificate is None and args.user is None and (home / "client.crt").is_file():
        certificate, key = str(home / "client.crt"), str(home / "client.key")
    if ca is None and fleet.get("auth") in ("mtls", "passwords") and (home / "ca.crt").is_file():
        ca = str(home / "ca.crt")
    options["tls"] = _context(ca, certificate, key, int(options["port"]))
    return options


def _regular(path: Path | str, option: str) -> None:
    """Raises ConfigError for what is there and is no file: a FIFO would be waited for."""
    if Path(path).exists() and not Path(path).is_file():
        raise ConfigError(f"{option} {path}: not a regular file")


def _text(path: Path, option: str) -> str:
    _regular(path, option)
    try:
        return path.read_text()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{option} {path}: {getattr(error, 'strerror', None) or 'not text'}") from None


def _context(ca: str | None, certificate: str | None, key: str | None, port: int) -> ssl.SSLContext:
    if ca is not None:
        _regular(ca, "--cafile")
    try:
        context = ssl.create_default_context(cafile=ca)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--cafile {ca}: {_why(error)}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if port == 443:
        context.set_alpn_protocols(["x-amzn-mqtt-ca", "mqtt"])
    if certificate:
        load_certificate(context, certificate, key)
    return context


def load_certificate(context: ssl.SSLContext, certificate: str, key: str | None) -> None:
    """Raises ConfigError naming the file, or both."""
    for path, option in ((certificate, "--cert"), (key, "--key")):
        if path is not None:
            _regular(path, option)
            if not Path(path).exists():
                raise ConfigError(f"{option} {path}: {os.strerror(errno.ENOENT)}")

    def encrypted() -> str:  # asked for a password; without this, OpenSSL asks at the terminal
        raise ConfigError(
            f"--key {key or certificate}: is encrypted; give a key without a password, readable by its user only"
            " (openssl pkey -in FILE -out NEW)"
        )

    try:
        context.load_cert_chain(certificate, key, encrypted)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--cert {certificate}, --key {key or certificate}: {_why(error)}") from None


def _why(error: BaseException) -> str:
    if isinstance(error, ssl.SSLError):
        return f"no certificate or key in PEM, or they don't belong together ({error.reason or 'unreadable'})"
    return getattr(error, "strerror", None) or str(error)
