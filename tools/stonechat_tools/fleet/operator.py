"""Sign the commands that other programs ask for, in a process that alone holds the keys for it.

A dashboard or a home automation runs beside the collector, whose keys can't command. It asks this process over a local
socket; without one it has no controls. Who may open the socket may ask: its mode is 0660, so give its folder or its
group to those that may. Only the commands of --allow are signed, at most MAX_PER_MINUTE of them a minute; each is
logged with the user who asked. From another machine, forward the socket (ssh -L).

A request is one line of JSON, {"device": "pump-1", "command": "mute", "arguments": [1800000000]}; so is the reply:
{"sequence": 1795000000} once the broker has the command, or {"error": "..."}. The device's answer is in the collector's
database, under the sequence number.

Examples:
  stonechat operator --keys fleet/operator/keys
  stonechat operator --keys fleet/operator/keys --socket /run/stonechat/operator --allow mute,maintenance,report-now
  stonechat command pump-1 report-now --socket fleet/operator/socket
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import stat
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stonechat.errors import ConfigError, StonechatError

from ..console import printable
from . import keyring, wire
from .broker import add_broker_arguments, broker_options
from .command import EXPIRES_S, IDLE_S, MAX_AHEAD_S, MAX_LINE_BYTES, check_arguments, send
from .store import Store

HELP = "sign the commands that a dashboard or home automation asks for"
HOLDS_KEYS = True
MAX_CONNECTIONS = 8
MAX_PER_MINUTE = 30


class Operator:
    """keys: with those of the direction "command"; store: keeps the numbers; publish(topic, payload) raises where the
    broker does not take it; allow: names of commands. Raises ConfigError for a command that there is not."""

    def __init__(
        self,
        keys: keyring.Keys,
        store: Store,
        publish: Callable[[str, bytes], None],
        *,
        prefix: str = wire.PREFIX,
        allow: tuple[str, ...] = tuple(wire.COMMANDS),
    ) -> None:
        for name in allow:
            if name not in wire.COMMANDS:
                raise ConfigError(f"--allow {name}: want some of {', '.join(wire.COMMANDS)}")
        self._keys = keys
        self._store = store
        self._publish = publish
        self._prefix = prefix.rstrip("/") + "/"
        self._allow = allow
        self._lock = threading.Lock()
        self._sent_s: deque[float] = deque(maxlen=MAX_PER_MINUTE)

    def command(self, device: str, command: str, arguments: list[int]) -> int:
        """Sign and send one command -> its sequence number. Raises StonechatError."""
        keyring.check_device_id(device)
        if command not in self._allow:
            raise ConfigError(f"{command}: not among the commands that this operator signs: {', '.join(self._allow)}")
        now_s = int(time.time())
        check_arguments(command, arguments, now_s)
        with self._lock:
            if len(self._sent_s) == MAX_PER_MINUTE and time.monotonic() - self._sent_s[0] < 60:
                raise ConfigError(f"more than {MAX_PER_MINUTE} commands in a minute; try again later")
            mac = self._keys.of(device)[0].command
            code = wire.COMMANDS[command]
            sequence = self._store.next_command(device, code, arguments)
            fields: dict[int, Any] = {0: wire.VERSION, 1: sequence, 2: now_s + EXPIRES_S, 3: code}
            if arguments:
                fields[4] = arguments
            self._publish(f"{self._prefix}{device}/command", mac.seal(wire.encode(fields)))
            self._sent_s.append(time.monotonic())
        return sequence

    def reply(self, line: bytes, user: str) -> bytes:
        """The reply to one request; whatever it holds, it costs that request only."""
        try:
            asked = json.loads(line)
            if not isinstance(asked, dict) or not isinstance(asked.get("device"), str):
                raise ValueError("want an object with device, command and arguments")
            arguments = asked.get("arguments", [])
            if not isinstance(arguments, list) or any(type(item) is not int for item in arguments):
                raise ValueError("arguments: want a list of numbers")
            sequence = self.command(asked["device"], str(asked.get("command"))[:40], arguments)
        except (StonechatError, OSError, ValueError, RecursionError) as error:
            return json.dumps({"error": str(error)[:300]}).encode() + b"\n"
        _say(f"{user}: {asked['device']} {asked['command']} {arguments}, number {sequence}")
        return json.dumps({"sequence": sequence}).encode() + b"\n"


class Door:
    """The socket: MAX_CONNECTIONS at a time, lines of MAX_LINE_BYTES, closed after IDLE_S without one."""

    def __init__(self, path: Path, operator: Operator) -> None:
        self._path = path
        self._operator = operator
        self._free = threading.Semaphore(MAX_CONNECTIONS)
        self._listener = _listen(path)
        self._inode = os.stat(path).st_ino
        threading.Thread(target=self._accept, name="operator", daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if not self._free.acquire(blocking=False):
                client.close()
                continue
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            with client, contextlib.suppress(OSError):
                client.settimeout(IDLE_S)
                _, user, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
                waiting = b""
                while len(waiting) <= MAX_LINE_BYTES:
                    line, feed, rest = waiting.partition(b"\n")
                    if feed:
                        client.sendall(self._operator.reply(line, f"user {user}"))
                        waiting = rest
                        continue
                    got = client.recv(MAX_LINE_BYTES)
                    if not got:
                        return
                    waiting += got
                client.sendall(b'{"error": "line too long"}\n')
        finally:
            self._free.release()

    def close(self) -> None:
        self._listener.close()
        with contextlib.suppress(OSError):
            if os.stat(self._path).st_ino == self._inode:
                os.unlink(self._path)


def _listen(path: Path) -> socket.socket:
    """A socket of mode 0660; one that nobody listens on any more is replaced, nothing else is. Raises ConfigError."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise ConfigError(f"{path}: is there already, and is no socket")
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(str(path)) == 0:
                    raise ConfigError(f"{path}: another operator listens there")
            os.unlink(path)
        before = os.umask(0o117)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        listener.listen(64)
    except OSError as error:
        listener.close()
        raise ConfigError(f"--socket {path}: {error.strerror or error}") from None
    except BaseException:
        listener.close()
        raise
    return listener


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"stonechat operator: {text}", file=sys.stderr, flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--socket", metavar="PATH", help="where to listen (default: `socket` beside the folder of --keys)"
    )
    parser.add_argument(
        "--allow",
        default=",".join(wire.COMMANDS),
        metavar="COMMANDS",
        help=f"which commands to sign, separated by commas, of {', '.join(wire.COMMANDS)} (default: all)",
    )
    add_broker_arguments(parser)
    parser.set_defaults(db=None)


def run(args: argparse.Namespace) -> int:
    keys = keyring.Keys(args.keys)  # first: a wrong folder is named before anything is made beside it
    home = Path(args.keys).resolve().parent
    options = broker_options(args, "operator")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    with Store(args.db or home / "operator.db", _say) as store:
        operator = Operator(
            keys,
            store,
            lambda topic, payload: send(options, topic, payload),
            prefix=options["prefix"],
            allow=tuple(name.strip() for name in args.allow.split(",") if name.strip()),
        )
        path = Path(args.socket) if args.socket else home / "socket"
        door = Door(path, operator)
        about = f"signs commands to devices of {options['prefix']}; latest expiry {MAX_AHEAD_S} s"
        _say(f"listening on {printable(str(path))}; {about}")
        stop.wait()
        door.close()
    return 0
