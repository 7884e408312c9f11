"""Address and account of the broker: the arguments of every verb that connects to it."""

import argparse
import ssl
from pathlib import Path
from typing import Any

from stonechat.errors import ConfigError

from . import wire


def add_broker_arguments(parser: argparse.ArgumentParser) -> None:
    """What every verb that talks to the broker takes."""
    parser.add_argument("--broker", default="localhost", metavar="HOST[:PORT]", help="default localhost, port 8883")
    parser.add_argument("--plain", action="store_true", help="no TLS (then the default port is 1883)")
    parser.add_argument("--cafile", help="the CA that signed the broker's certificate (default: the system's)")
    parser.add_argument("--cert", help="client certificate, for mutual TLS")
    parser.add_argument("--key", help="its private key")
    parser.add_argument("--user", help="user name, where the broker wants one")
    parser.add_argument("--password-file", help="a file with the password in its first line")
    parser.add_argument("--prefix", default=wire.PREFIX, help="topic prefix (default %(default)s)")
    parser.add_argument("--keys", required=True, help="folder with DEVICE.key files, as `stonechat provision` makes it")
    parser.add_argument("--db", default="stonechat.db", help="SQLite database (default %(default)s)")


def broker_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of add_broker_arguments -> keywords of Collector. Raises ConfigError."""
    host, _, port = args.broker.partition(":")
    if port and not port.isdigit():
        raise ConfigError(f"--broker {args.broker}: want HOST or HOST:PORT")
    options: dict[str, Any] = {
        "host": host,
        "port": int(port) if port else 1883 if args.plain else 8883,
        "prefix": args.prefix,
        "username": args.user,
    }
    if args.password_file:
        options["password"] = Path(args.password_file).read_text().splitlines()[0]
    if args.plain:
        if args.cafile or args.cert:
            raise ConfigError("--plain and certificates: choose one")
        return options
    context = ssl.create_default_context(cafile=args.cafile)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if int(options["port"]) == 443:
        context.set_alpn_protocols(["x-amzn-mqtt-ca", "mqtt"])
    if args.cert:
        context.load_cert_chain(args.cert, args.key)
    options["tls"] = context
    return options
