"""Send a device an authenticated command and wait for its answer, which the collector stores.

Commands: mute and maintenance (with --until), was-normal (with --report), calibrate, report-now, own-model (with --own
again or forbid: the model that a device trains itself); and of the response to alarms: release what is in force, renew
it, stop-responding until the command respond. A device answers "not supported"
to those that it can't execute. Each is numbered and expires, so that a broker can neither repeat it nor keep it for
later. Use the account `operator` of `stonechat provision`, not the collector's: a broker allows one connection each.

Examples:
  stonechat command pump-1 report-now --keys fleet/operator/keys
  stonechat command pump-1 mute --until 2h --keys fleet/operator/keys --broker localhost --plain
  stonechat command pump-1 was-normal --report 4711 --keys fleet/operator/keys
  stonechat command pump-1 release --keys fleet/operator/keys
  stonechat command pump-1 own-model --own again --keys fleet/operator/keys
"""

import argparse
import contextlib
import json
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from stonechat.errors import ConfigError, MQTTError

from . import keyring, wire
from .broker import add_broker_arguments, broker_options
from .store import URLS, Store

HELP = "send a device an authenticated command"
HOLDS_KEYS = True
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
CONNECT_S = 10.0
EXPIRES_S = 600
MAX_LINE_BYTES = 4096  # of a request to the operator
IDLE_S = 30.0  # for its reply
MAX_LIFE_S = 23 * 3600  # a device takes 24 hours by its own clock, which may be an hour behind
MAX_AHEAD_S = 31 * 86_400  # no mute or maintenance is longer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", help="id of the device")
    parser.add_argument("command", choices=wire.COMMANDS, help="what the device should do")
    parser.add_argument("--until", metavar="TIME", help="for mute and maintenance: 90s, 30m, 2h, 1d from now")
    parser.add_argument("--report", type=int, metavar="NUMBER", help="for was-normal: the report's sequence number")
    parser.add_argument(
        "--what",
        type=int,
        metavar="NUMBER",
        help="for release and renew: the lease (default: all, and the one in the collector's database)",
    )
    parser.add_argument("--own", choices=wire.OWN_MODEL, help="for own-model: make it again, or forbid it")
    parser.add_argument("--expires", default="10m", metavar="TIME", help="not executed later (default 10m, most 23h)")
    parser.add_argument("--wait", type=float, default=30.0, metavar="SECONDS", help="for the answer (default 30)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "--socket", metavar="PATH", help="of `stonechat operator`, which has the keys and the connection"
    )
    add_broker_arguments(parser, keys_required=False)


def span_s(text: str) -> int:
    """ "2h" -> 7200. Raises ConfigError."""
    number, unit = text[:-1], text[-1:]
    if not (number.isascii() and number.isdigit() and len(number) < 10) or unit not in UNITS_S:
        raise ConfigError(f"{text[:40]!r}: want a time like 90s, 30m, 2h or 1d")
    return int(number) * UNITS_S[unit]


def arguments_of(args: argparse.Namespace, now_s: int) -> list[int]:
    """The command's own arguments. Raises ConfigError where one is missing or does not belong."""
    wants = {
        "mute": "until",
        "maintenance": "until",
        "was-normal": "report",
        "release": "what",
        "renew": "what",
        "own-model": "own",
    }.get(args.command)
    for name in ("until", "report", "what", "own"):
        if getattr(args, name) is not None and name != wants:
            raise ConfigError(f"{args.command} takes no --{name}")
    if wants == "what" and args.what is None:
        return [_lease(args)] if args.command == "renew" else []
    if wants and getattr(args, wants) is None:
        raise ConfigError(f"{args.command} needs --{wants}")
    if wants == "own":
        return [wire.OWN_MODEL[args.own]]
    found = [now_s + span_s(args.until) if wants == "until" else getattr(args, wants)] if wants else []
    check_arguments(args.command, found, now_s)
    return found


def _lease(args: argparse.Namespace) -> int:
    """The lease that is in force at the device, as the collector's database has it. Raises ConfigError."""
    if Path(args.db).exists() or args.db.startswith(URLS):
        with Store(args.db) as store:
            for entry in store.decisions(args.device, limit=20):
                if entry["lease"] and entry["done"] and entry["end_s"] is None:
                    return int(entry["lease"])
    raise ConfigError(f"renew: the database {args.db} knows no lease of {args.device} in force; give its --what NUMBER")


def check_arguments(command: str, arguments: list[int], now_s: int) -> None:
    """Raises ConfigError for what no device would carry out."""
    one = ("mute", "maintenance", "was-normal", "own-model", "renew")
    least, most = (1, 1) if command in one else (0, 1) if command == "release" else (0, 0)
    if not least <= len(arguments) <= most:
        raise ConfigError(f"{command}: {len(arguments)} arguments, want {least if least == most else '0 or 1'}")
    if any(not 0 <= argument <= 0xFFFFFFFF for argument in arguments):
        raise ConfigError(f"{command}: an argument is not a number from 0 to 4294967295")
    if command == "own-model" and arguments[0] not in wire.OWN_MODEL.values():
        raise ConfigError(f"{command}: want 0 (forbid) or 1 (again)")
    if command in ("mute", "maintenance") and arguments[0] > now_s + MAX_AHEAD_S:
        raise ConfigError(f"{command}: until a time more than {MAX_AHEAD_S // 86_400} days ahead")


def send(options: dict[str, Any], topic: str, payload: bytes) -> None:
    """Hand one message to the broker. Raises MQTTError where there is no connection or no acknowledgement in time."""
    from .connection import BoundedClient, explain, refused

    where = (options["host"], options["port"])
    done = threading.Event()
    refusals: list[str] = []

    def connected(client: Any, _user: object, _flags: object, reason: Any, _properties: object) -> None:
        if reason.is_failure:
            refusals.append(refused(*where, reason))
            done.set()
        else:
            client.publish(topic, payload, 1)

    client = BoundedClient(username=options.get("username"), password=options.get("password"), tls=options.get("tls"))
    client.on_connect = connected
    client.on_publish = lambda *_: done.set()
    try:
        client.connect(*where)
    except OSError as error:
        raise MQTTError(explain(*where, error)) from None
    client.loop_start()
    try:
        if not done.wait(CONNECT_S) or refusals:
            raise MQTTError(refusals[0] if refusals else f"broker {where[0]}:{where[1]}: no acknowledgement")
        client.disconnect()
    finally:
        client.loop_stop()


def ask(path: Path, device: str, command: str, arguments: list[int]) -> int:
    """Ask the operator at a socket for one command -> its sequence number. Raises ConfigError."""
    try:
        with socket.socket(socket.AF_UNIX) as asking:
            asking.connect(str(path))  # before the time limit: with one, a short queue would be an error
            asking.settimeout(IDLE_S)
            asking.sendall(json.dumps({"device": device, "command": command, "arguments": arguments}).encode() + b"\n")
            line = b""
            while not line.endswith(b"\n") and (got := asking.recv(MAX_LINE_BYTES)):
                line += got
        reply = json.loads(line)
        if "error" in reply:
            raise ConfigError(str(reply["error"]))
        return int(reply["sequence"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = getattr(error, "strerror", None) or "no reply"
        raise ConfigError(f"--socket {path}: {why}; is `stonechat operator` running?") from None


def run(args: argparse.Namespace) -> int:
    now_s = int(time.time())
    keyring.check_device_id(args.device)
    arguments = arguments_of(args, now_s)
    lasts_s = span_s(args.expires)
    if lasts_s > MAX_LIFE_S:
        raise ConfigError(f"--expires {args.expires}: at most 23h; devices refuse a command that is good for a day")
    code = wire.COMMANDS[args.command]
    with contextlib.ExitStack() as stack:
        store = None
        if args.socket:
            sequence = ask(Path(args.socket), args.device, args.command, arguments)
            if Path(args.db).exists():  # the collector's, if it is on this machine
                store = stack.enter_context(Store(args.db))
        elif args.keys:
            known = keyring.Keys(args.keys)
            try:
                keys = known.of(args.device)[0]
            except keyring.Rejected as error:
                none = f"{error}: no key of it in {args.keys}; want the operator's keys/ folder"
                raise ConfigError(known.problems.get(args.device, none)) from None
            keys.command  # noqa: B018 - raises ConfigError where these are the collector's keys
            options = broker_options(args, "operator")
            topic = f"{options['prefix'].rstrip('/')}/{args.device}/command"
            store = stack.enter_context(Store(args.db))
            sequence = store.next_command(args.device, code, arguments)
            send(options, topic, wire.seal_command(keys, sequence, now_s + lasts_s, code, arguments))
        else:
            raise ConfigError("needs --keys (the operator's, such as fleet/operator/keys) or --socket")
        end_s = time.monotonic() + args.wait
        result = store.answer(args.device, sequence) if store else None
        while store and result is None and time.monotonic() < end_s:
            time.sleep(0.2)
            result = store.answer(args.device, sequence)
    nobody = "sent; the answer will be in the collector's database" if store is None else "no answer yet"
    said = nobody + " (is `stonechat collect` running?)" if result is None else wire.result_name(result)
    if args.json:
        print(json.dumps({"device": args.device, "command": args.command, "sequence": sequence, "answer": said}))
    else:
        print(f"{args.device}: {args.command}: {said}", file=sys.stderr if result else sys.stdout)
    return 0 if result == 0 or store is None else 3
