"""Show the fleet in a browser: a map, each device, incidents, models in the field, search.

It reads the collector's database and holds no key. On loopback everybody who reaches it is a viewer; to acknowledge,
silence or command, log in with an account of the role operator. Bound to anything else it wants a log-in and TLS.
Commands are signed by `stonechat operator`, whose socket is given with --operator.

Examples:
  stonechat dashboard                                      # http://127.0.0.1:8440, of ./stonechat.db
  stonechat dashboard user add alice --role operator
  stonechat dashboard --operator fleet/operator/socket
  stonechat dashboard --listen 0.0.0.0:8440 --cert fleet.crt --key fleet.key
  stonechat dashboard --proxy 127.0.0.1 --host fleet.example.org    # behind HAProxy or nginx, which adds TLS
  stonechat dashboard audit --verify
  stonechat dashboard grafana > fleet.json
"""

import argparse
import getpass
import ipaddress
import json
import os
import ssl
import stat
import sys
import time
from importlib import resources
from pathlib import Path
from typing import Any

from stonechat.errors import ConfigError

from ..console import plain_table, read_file, user_name
from ..fleet.broker import load_certificate, split_host
from ..fleet.database import add_database_arguments, take_after_verbs
from ..fleet.store import URLS, Store
from . import accounts, audit

HELP = "show the fleet in a browser"
LISTEN = "127.0.0.1:8440"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_database_arguments(parser)
    parser.add_argument(
        "--listen", default=LISTEN, metavar="HOST:PORT", help="where; port 0 chooses one (default %(default)s)"
    )
    parser.add_argument("--cert", metavar="FILE", help="certificate for TLS, PEM, with its chain")
    parser.add_argument("--key", metavar="FILE", help="its private key")
    parser.add_argument("--login", action="store_true", help="want a log-in on loopback, too: behind a proxy")
    parser.add_argument("--plain", action="store_true", help="no TLS beyond loopback: passwords can be read on the way")
    parser.add_argument("--host", action="append", default=[], metavar="NAME", help="a name that it may be called by")
    parser.add_argument(
        "--proxy",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="address or network of a proxy with TLS, whose X-Forwarded-For and -Proto count; may be repeated",
    )
    parser.add_argument("--operator", metavar="SOCKET", help="of `stonechat operator`, which signs commands")
    parser.add_argument("--metrics-token", metavar="FILE", help="a file with the token that Prometheus sends")
    parser.add_argument("--json", action="store_true", help="the address, or what a sub-command prints, as JSON")
    verbs = parser.add_subparsers(dest="what", metavar="WHAT")
    user = verbs.add_parser("user", help="accounts")
    acts = user.add_subparsers(dest="act", metavar="ACT", required=True)
    add = acts.add_parser("add", help="make an account, or give it another password or role")
    add.add_argument("name", help="letters, digits, -, _ and .")
    add.add_argument("--role", choices=accounts.ROLES, default="viewer", help="default %(default)s")
    add.add_argument("--password-file", metavar="FILE", help="its first line is the password; - for standard input")
    acts.add_parser("list", help="the accounts and their roles")
    acts.add_parser("remove", help="remove an account; its sessions end").add_argument("name", help="of the account")
    verbs.add_parser("grafana", help="print a Grafana dashboard of the metrics, JSON to import")
    log = verbs.add_parser("audit", help="who did what, the newest first")
    log.add_argument("--verify", action="store_true", help="check the chain, and print how long it is and its head")
    log.add_argument(
        "--head", default="", metavar="DIGEST", help="with --verify: one noted before must be in the chain"
    )
    log.add_argument("--last", type=int, default=50, metavar="N", help="entries (default %(default)s)")
    take_after_verbs(verbs)
    take_after_verbs(acts)


def run(args: argparse.Namespace) -> int:
    if args.what == "grafana":
        sys.stdout.write(resources.files(__package__).joinpath("grafana.json").read_text())
        return 0
    if not args.db.startswith(URLS) and not Path(args.db).exists():
        raise ConfigError(f"{args.db}: no such database; `stonechat collect` makes it")
    with Store(args.db, lambda line: _say(line), make=False) as store:
        if args.what == "user":
            return _user(store, args)
        if args.what == "audit":
            return _audit(store, args)
        return _serve(store, args)


def _say(text: str) -> None:
    print(f"stonechat dashboard: {text}", file=sys.stderr, flush=True)


# --- accounts and the audit log ---------------------------------------------------------------------------------------


def _who() -> str:
    return f"{user_name()} (command line)"


def _user(store: Store, args: argparse.Namespace) -> int:
    if args.act == "list":
        found = accounts.read(store)
        if args.json:
            for account in found:
                print(json.dumps({"name": account.name, "role": account.role, "changed_s": account.changed_s}))
            return 0
        rows = [
            (each.name, each.role, time.strftime("%Y-%m-%d %H:%M", time.localtime(each.changed_s))) for each in found
        ]
        print(plain_table(("name", "role", "changed"), rows) if rows else "no accounts")
        return 0
    if args.act == "remove":
        accounts.remove(store, args.name)
        audit.note(store, _who(), "account removed", name=args.name)
    else:
        accounts.check_name(args.name)
        accounts.put(store, args.name, args.role, _password(args.password_file))
        audit.note(store, _who(), "account", name=args.name, role=args.role)
    print(
        json.dumps({"name": args.name})
        if args.json
        else f"{args.name}: {'removed' if args.act == 'remove' else args.role}"
    )
    return 0


def _password(file: str | None) -> str:
    if file == "-" or (file is None and not sys.stdin.isatty()):
        line = sys.stdin.readline(accounts.MOST_PASSWORD + 2)
    elif file is not None:
        line = _text(file, accounts.MOST_PASSWORD + 2).partition("\n")[0]
    else:
        line = getpass.getpass("password: ")
        if getpass.getpass("again: ") != line:
            raise ConfigError("the two passwords differ")
    return line.rstrip("\r\n")


def _text(path: str, most: int) -> str:
    """A secret in a file: each of its bytes counts. Raises ConfigError, OSError."""
    try:
        return read_file(path, most).decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8") from None


def _audit(store: Store, args: argparse.Namespace) -> int:
    if args.verify or args.head:
        count, head = audit.verify(store, args.head)
        shown = f"{count} {'entry' if count == 1 else 'entries'}, whole; head {head}"
        print(json.dumps({"entries": count, "head": head}) if args.json else shown)
        return 0
    if not 1 <= args.last <= 100_000:
        raise ConfigError(f"--last {args.last}: from 1 to 100000")
    rows = []
    for each in audit.entries(store, args.last):
        if args.json:
            print(json.dumps(each))
            continue
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each["time_s"]))
        facts = ", ".join(f"{name} {value}" for name, value in each["facts"].items())
        rows.append((str(each["sequence"]), when, each["who"], each["what"], facts))
    if not args.json:
        print(plain_table(("number", "time", "who", "what", "about"), rows) if rows else "nothing yet")
    return 0


# --- serving ----------------------------------------------------------------------------------------------------------


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _proxies(given: list[str]) -> tuple[str, ...]:
    """Raises ConfigError."""
    found = []
    for text in given:
        try:
            network = ipaddress.ip_network(text)
        except ValueError as error:
            raise ConfigError(f"--proxy {text!r}: want an address or a network, as 10.0.0.0/24 ({error})") from None
        if not network.prefixlen:
            raise ConfigError(f"--proxy {text}: that is everybody, and everybody could claim any address")
        found.append(str(network))
        if network.version == 4:  # as it connects to a socket of IPv6
            found.append(f"::ffff:{network.network_address}/{96 + network.prefixlen}")
    return tuple(found)


def options_of(args: argparse.Namespace, host: str) -> Any:
    """-> state.Options. Raises ConfigError."""
    from .state import LOOPBACK, Options

    loopback = _is_loopback(host)
    if bool(args.cert) != bool(args.key):
        raise ConfigError("--cert and --key go together")
    tls = bool(args.cert)
    if tls:
        load_certificate(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), args.cert, args.key)
    if not (loopback or tls or args.plain):
        raise ConfigError(f"--listen {host}: beyond loopback it needs --cert and --key (or --plain, in the clear)")
    token = ""
    if args.metrics_token:
        token = _text(args.metrics_token, 4096).strip()
        if os.stat(args.metrics_token).st_mode & stat.S_IRWXO:
            raise ConfigError(f"{args.metrics_token}: anybody may read it: chmod 640 {args.metrics_token}")
        if len(token) < 16:
            raise ConfigError(f"--metrics-token {args.metrics_token}: want at least 16 characters")
    hosts = (*LOOPBACK, host, *args.host) if loopback or args.host else ()
    proxies = _proxies(args.proxy)
    return Options(
        anonymous=loopback and not (args.login or proxies),
        hosts=tuple(dict.fromkeys(name.lower() for name in hosts)),
        tls=tls or bool(proxies) or (args.login and loopback and bool(args.host)),
        proxies=proxies,
        operator=Path(args.operator) if args.operator else None,
        metrics_token=token,
    )


def _serve(store: Store, args: argparse.Namespace) -> int:
    from .app import make
    from .serving import Server, listen
    from .view import View

    host, port = (
        split_host(args.listen, "--listen")
        if args.listen.rpartition(":")[2] != "0"
        else (args.listen.rpartition(":")[0].strip("[]"), 0)
    )
    options = options_of(args, host)
    if not options.anonymous and not accounts.read(store):
        raise ConfigError(
            "a log-in is wanted and there is no account: stonechat dashboard user add NAME --role operator"
        )
    listener = listen(host, 8440 if port is None else port)
    with listener, Store(args.db, make=False) as own, Store(args.db, make=False) as changes:
        app, state = make(store, View(own), options, changes)
        server = Server(app, state, args.cert, args.key)
        shown = f"[{host}]" if ":" in host else host
        url = f"{'https' if args.cert else 'http'}://{shown}:{listener.getsockname()[1]}/"
        print(json.dumps({"url": url}) if args.json else f"the fleet is at {url}", flush=True)
        server.run(sockets=[listener])
    return 0
