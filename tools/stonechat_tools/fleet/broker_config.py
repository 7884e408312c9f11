"""Write a mosquitto configuration for the fleet: TLS, one account a device, its own topics and no others.

The access list, the passwords or the revocation list are those of `stonechat provision` in the same folder; after a
change there, send mosquitto a SIGHUP. A device's user name is its id (the certificate's CN with mutual TLS) and becomes
its client id too, so that no device can take over another's session.

Examples:
  stonechat broker-config --name broker.example.org
  stonechat broker-config --dir fleet --listen 127.0.0.1 --name localhost --name 127.0.0.1
  mosquitto -c fleet/broker/mosquitto.conf
"""

import argparse
import os
import pwd
import shutil
from pathlib import Path

from stonechat.errors import ConfigError

from .provision import Fleet, pem, pem_key, write_file

HELP = "write a mosquitto configuration for the fleet"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dir", default="fleet", metavar="FOLDER", help="the fleet's folder (default %(default)s)")
    parser.add_argument("--listen", default="", metavar="ADDRESS", help="default: every interface")
    parser.add_argument("--name", action="append", default=[], help="name or address that devices know the broker by")
    parser.add_argument(
        "--user", default="mosquitto", help="who mosquitto becomes when started as root (default %(default)s)"
    )


def configuration(fleet: Fleet, listen: str, user: str) -> str:
    """The text of mosquitto.conf (mosquitto 2.0)."""
    place = (fleet.folder / "broker").resolve()
    settings = fleet.settings
    lines = [
        f"# mosquitto for the fleet {settings.fleet}, written by `stonechat broker-config`.",
        f"user {user}",
        "per_listener_settings true",
        "persistence true",
        f"persistence_location {place}/state/",
        "# Not durable, and need not be: devices keep a report until the collector has it in its database.",
        "autosave_interval 60",
        "# For a collector that is away.",
        "max_queued_messages 20000",
        "max_packet_size 65536",
        f"listener {settings.port} {listen}".rstrip(),
        f"acl_file {place}/acl",
    ]
    if settings.auth == "plain":
        lines += ["# plain: no TLS and no accounts, for one machine only", "allow_anonymous true"]
        return "\n".join(line for line in lines if not line.startswith("acl_file")) + "\n"
    lines += [
        "allow_anonymous false",
        "# TLS 1.2 and 1.3 are mosquitto's default.",
        f"cafile {place}/ca.crt",
        f"certfile {place}/server.crt",
        f"keyfile {place}/server.key",
        "use_username_as_clientid true",
    ]
    if settings.auth == "mtls":
        lines += ["require_certificate true", "use_identity_as_username true", f"crlfile {place}/crl.pem"]
    else:
        lines += [f"password_file {place}/passwd"]
    return "\n".join(lines) + "\n"


def write(fleet: Fleet, listen: str = "", names: list[str] | None = None, user: str = "mosquitto") -> Path:
    """Everything into the fleet's broker/ -> the path of mosquitto.conf."""
    if fleet.settings.auth == "managed":
        raise ConfigError("this fleet's broker is managed elsewhere: upload devices/NAME/client.crt there")
    place = fleet.folder / "broker"
    (place / "state").mkdir(mode=0o700, exist_ok=True)
    fleet.write_broker_lists()
    if fleet.settings.auth != "plain":
        certificate, key = fleet.certificate("broker", names or [fleet.settings.broker])
        write_file(place / "server.key", pem_key(key))
        write_file(place / "server.crt", pem(certificate), 0o644)
        shutil.copyfile(fleet.folder / "ca.crt", place / "ca.crt")
    path = place / "mosquitto.conf"
    write_file(path, configuration(fleet, listen, user), 0o644)
    _give_to(user, place)
    return path


def _give_to(user: str, place: Path) -> None:
    """Started as root, mosquitto reads its files as `user`."""
    if os.geteuid() != 0:
        return
    try:
        account = pwd.getpwnam(user)
    except KeyError:
        return
    for path in (place, *place.rglob("*")):
        os.chown(path, account.pw_uid, account.pw_gid)


def run(args: argparse.Namespace) -> int:
    fleet = Fleet(Path(args.dir))
    path = write(fleet, args.listen, args.name or None, args.user)
    print(f"{path}: mosquitto -c {path}")
    return 0
