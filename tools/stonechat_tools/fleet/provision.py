"""Make, rotate and revoke the identities of a fleet's devices.

One folder holds the fleet: its CA, the devices' secrets, what each device, the broker, the collector and the operator
get. It is made with mode 0700 and every secret in it with 0600; none is ever printed. Copy `devices/NAME.tar` to the
device and run `stonechat-agent install` there; copy `broker/` to the broker, `keys/` and `collector/` to the
collector's machine, `operator/` to the operator's; keep `ca.key`, `secrets/` and `devices/` where none of them is. The
collector's keys verify and acknowledge; they can't command.

Examples:
  stonechat provision init --broker broker.example.org
  stonechat provision init --broker localhost:8883 --auth passwords --fleet west
  stonechat provision init --broker xyz.iot.example.com:443 --auth managed --service aws-iot-core \
    --alpn x-amzn-mqtt-ca --prefix vendor/canary
  stonechat provision add pump-1 pump-2
  stonechat provision add sensor-7 --board      # and files for a MicroPython board, which `stonechat deploy` copies
  stonechat provision rotate pump-1             # a new secret and certificate beside the old ones
  stonechat provision finish-rotation pump-1    # the new ones are installed: end the old ones
  stonechat provision revoke pump-2
  stonechat provision home-assistant            # devices may announce themselves to Home Assistant
  stonechat provision list
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from stonechat.errors import ConfigError

from ..board_files import FOLDER
from ..console import model_path
from . import keyring
from .broker import split_host
from .changes import alone
from .fleet_folder import AUTHS, FOLDERS, RESERVED, Fleet, make_folder, no_link, write_file
from .fleet_settings import ACCOUNTS, Settings
from .services import SERVICES, check_topics

__all__ = ["ACCOUNTS", "AUTHS", "FOLDERS", "RESERVED", "Fleet", "Settings", "make_folder", "no_link", "write_file"]
HELP = "make, rotate and revoke device identities"
HOLDS_KEYS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dir", default="fleet", metavar="FOLDER", help="the fleet's folder (default %(default)s)")
    acts = parser.add_subparsers(dest="act", metavar="WHAT", required=True)
    init = acts.add_parser("init", help="begin a fleet: settings, CA, the accounts of collector and operator")
    init.add_argument("--broker", required=True, metavar="HOST[:PORT]", help="default port 8883, 1883 for plain")
    init.add_argument(
        "--auth", choices=AUTHS, default="mtls", help="how devices authenticate at the broker (default mtls)"
    )
    init.add_argument("--fleet", default="fleet", help="name of the fleet, a level of every topic")
    init.add_argument("--prefix", default="stonechat/1", help="where the topics start (default %(default)s)")
    init.add_argument(
        "--service", choices=SERVICES, help="whose broker it is: the topics are checked against what it takes"
    )
    init.add_argument("--alpn", default="", help="ALPN protocol name, for managed brokers on port 443")
    init.add_argument("--username-file", default="", help="file on the device with its user name (managed brokers)")
    init.add_argument(
        "--install-dir", default="/etc/stonechat", help="folder of the files on a device (default %(default)s)"
    )
    for act, text in (
        ("add", "new devices"),
        ("rotate", "make new keys; the old ones are valid until `finish-rotation`"),
        ("finish-rotation", "end the keys that `rotate` replaced"),
        ("revoke", "take devices out of the fleet"),
    ):
        one = acts.add_parser(act, help=text)
        one.add_argument("device", nargs="+", help="ids of the devices")
        if act == "add":
            one.add_argument(
                "--model",
                type=model_path,
                metavar="FILE",
                help="a .tflite, or the name of a shipped model, for the bundle (default: the device takes the shipped "
                "model that works there)",
            )
        if act in ("add", "rotate"):
            one.add_argument(
                "--board",
                action="store_true",
                help="also make what a MicroPython board needs, in devices/DEVICE/board: the arguments of start() as a "
                "module, certificates as DER",
            )
    acts.add_parser(
        "home-assistant",
        help="let the devices announce themselves to Home Assistant, and make its account at the broker",
    ).add_argument(
        "--bridge",
        action="store_true",
        help="`stonechat home-assistant` announces them, beside the collector; make its account, too",
    )
    acts.add_parser("list", help="list the devices").add_argument(
        "--json", action="store_true", help="print the list as JSON"
    )


def run(args: argparse.Namespace) -> int:
    folder = Path(args.dir)
    if args.act == "init":
        return _init(folder, args)
    fleet = Fleet(folder)
    if args.act == "list":
        _list(fleet, args.json)
        return 0
    with alone(folder):
        return _change(fleet, args)


def _change(fleet: Fleet, args: argparse.Namespace) -> int:
    if args.act == "home-assistant":
        place = fleet.add_home_assistant(args.bridge)
        steps = _BRIDGE_STEPS if args.bridge else _HOME_STEPS
        print(f"{place}: the account for Home Assistant's MQTT integration; next: {steps}")
        return 0
    for device in args.device:
        more = {"board": args.board} if args.act in ("add", "rotate") else {}
        if args.act == "add":
            more["model"] = args.model
        place = getattr(fleet, args.act.replace("-", "_"))(device, **more)
        done = {"add": "added", "rotate": "new keys", "finish-rotation": "old keys ended", "revoke": "revoked"}[
            args.act
        ]
        where = f"; copy {fleet.bundle(device)} to it, and there: stonechat-agent install --bundle {device}.tar"
        if place and device in fleet.settings.accounts:
            where = f"; start again what uses {place}"
        elif place and (place / FOLDER).is_dir():
            where = _board_steps(place / FOLDER, fleet.settings)
        print(f"{device}: {done}" + (where if place else ""))
    if fleet.settings.auth in ("mtls", "passwords"):
        print("the broker takes up broker/ on SIGHUP; connections that are open last until they end")
    return 0


_HOME_STEPS = (
    "stonechat broker-config, and on each device that is in the fleet already: [homeassistant] discovery = true in its "
    "stonechat.toml (devices that are added from now on have it)"
)

_BRIDGE_STEPS = (
    "stonechat broker-config, and beside the collector: stonechat home-assistant, whose account is in homebridge/"
)

BOARD_MODEL = "micropython-1"  # what a board takes where no other is named


def _board_steps(folder: Path, settings: Settings) -> str:
    """What to do with the files of a board, and who can read them."""
    lines = [f"; {folder}:"]
    lines += [f"  {path.stat().st_mode & 0o777:o} {path.name}" for path in sorted(folder.iterdir())]
    own = folder.parent / "model.tflite"  # that was named by --model
    model = shlex.quote(str(own)) if own.exists() else BOARD_MODEL
    identity = shlex.quote(str(folder))
    lines.append(f"  next: stonechat deploy --port PORT --model {model} --hook --identity {identity}")
    lines.append("  a board has no file modes: whoever has its serial port or its flash has the key")
    if settings.auth == "managed":
        lines.append(
            "  no broker in it: a managed broker's CA is not known here, and boards have no ALPN; hand in publish="
        )
    return "\n".join(lines)


def _init(folder: Path, args: argparse.Namespace) -> int:
    host, port = split_host(args.broker, "--broker")
    for name, value in (("--fleet", args.fleet), ("--prefix", args.prefix)):
        if not value.strip("/") or set(value) & set("+#\0 "):
            raise ConfigError(f"{name} {value}: not a topic level")
    if args.service:
        check_topics(args.service, args.prefix.strip("/"), args.fleet)
    settings = Settings(
        broker=host,
        port=port if port else 1883 if args.auth == "plain" else 8883,
        fleet=args.fleet,
        prefix=args.prefix.strip("/"),
        auth=args.auth,
        alpn=args.alpn,
        username_file=args.username_file,
        install_dir=args.install_dir,
    )
    fleet = Fleet.init(folder, settings)
    print(f"{folder}: fleet {fleet.settings.fleet}, {fleet.settings.auth}; next: stonechat provision add DEVICE")
    if settings.auth in ("mtls", "passwords"):
        print("and: stonechat broker-config")
    return 0


def _list(fleet: Fleet, as_json: bool) -> None:
    rows: list[dict[str, Any]] = []
    for device in fleet.devices:
        try:
            current = fleet.secrets(device)
        except ConfigError as error:  # of one device: the others are listed
            rows.append({"device": device, "key": None, "rotating": False})
            print(f"stonechat provision: {error}; restore it from a backup, or `revoke` and `add`", file=sys.stderr)
            continue
        rows.append({"device": device, "key": keyring.fingerprint(current[0]), "rotating": len(current) > 1})
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(f"{row['device']:32} key {row['key'] or 'damaged'}" + ("  being rotated" if row["rotating"] else ""))
