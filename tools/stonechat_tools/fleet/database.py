"""Which database: the arguments of every verb that reads or fills one.

A password on the command line is shown to everybody on the machine (`ps`), so it is refused there. libpq takes it from
~/.pgpass (or PGPASSFILE), from a service file (`postgresql:///?service=NAME`), or from PGPASSWORD; `--database-file`
takes the whole URL from a file.
"""

import argparse
import os
import stat
from typing import Any

from .store import URLS
from .store.postgres import has_password, masked

MAX_BYTES = 4096


def add_database_arguments(parser: argparse.ArgumentParser, what: str = "") -> None:
    """`--db` and `--database-file`, both as `db`."""
    one = parser.add_mutually_exclusive_group()
    text = f"SQLite file, or postgresql://USER@HOST/NAME{what} (default %(default)s)"
    one.add_argument("--db", type=_given, default="stonechat.db", metavar="DATABASE", help=text)
    one.add_argument(
        "--database-file",
        dest="db",
        type=_from_file,
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="a file of mode 0600 with that in its first line, for a URL with a password",
    )


def take_after_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The database and `--json` may come after the verb as well as before it."""
    for parser in verbs.choices.values():
        one = parser.add_mutually_exclusive_group()
        hidden: Any = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        one.add_argument("--db", type=_given, **hidden)
        one.add_argument("--database-file", dest="db", type=_from_file, **hidden)
        parser.add_argument("--json", action="store_true", **hidden)


def _given(text: str) -> str:
    if text.startswith(URLS) and has_password(text):
        raise argparse.ArgumentTypeError(
            f"{masked(text)}: everybody on this machine sees a password on the command line (ps); put it into ~/.pgpass"
            " of mode 0600 (HOST:PORT:NAME:USER:PASSWORD), or the URL into a file for --database-file"
        )
    return _named(text)


def _named(text: str) -> str:
    if not text or "\0" in text or not text.isprintable():
        raise argparse.ArgumentTypeError("want a file's name or a URL")
    return text


def _from_file(name: str) -> str:
    """The first line. Raises ArgumentTypeError, which argparse shows as one line."""
    try:
        handle = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            mode = os.fstat(handle).st_mode
            raw = os.read(handle, MAX_BYTES + 1) if stat.S_ISREG(mode) else b""
        finally:
            os.close(handle)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{name}: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(mode):
        raise argparse.ArgumentTypeError(f"{name}: not a regular file")
    if stat.S_IMODE(mode) & (stat.S_IRWXG | stat.S_IRWXO):
        raise argparse.ArgumentTypeError(f"{name}: others than its owner can read it; run chmod 600 {name}")
    lines = raw.decode("utf-8", "replace").splitlines()
    if len(raw) > MAX_BYTES or not lines or not lines[0].strip():
        raise argparse.ArgumentTypeError(f"{name}: want postgresql://USER:PASSWORD@HOST/NAME in its first line")
    return _named(lines[0].strip())
