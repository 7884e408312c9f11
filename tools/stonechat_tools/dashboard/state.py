"""What all requests of the dashboard share: its options, its files, and the view that a thread polls."""

import asyncio
import contextlib
import gzip
import hashlib
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from ..fleet.store import Store, StoreError
from . import accounts
from .view import View

LOOPBACK = ("localhost", "127.0.0.1", "::1")
POLL_S, IDLE_POLL_S = 1.0, 10.0  # how often the database is read while somebody looks, and while nobody does
SHARE = 10.0  # a look at the database is followed by a pause of at least that many times its length
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "txt": "text/plain; charset=utf-8",
}


@dataclass(frozen=True, slots=True)
class Options:
    """anonymous: everybody who reaches it is a viewer (loopback); hosts: names that it may be called by, empty for any;
    tls: what is secret goes by TLS alone; proxies: addresses and networks of those whose X-Forwarded-For and
    X-Forwarded-Proto count; operator: the socket of `stonechat operator`; metrics_token: for Prometheus, "" for
    none."""

    anonymous: bool = True
    hosts: tuple[str, ...] = LOOPBACK
    tls: bool = False
    proxies: tuple[str, ...] = ()
    operator: Path | None = None
    metrics_token: str = ""


@dataclass(slots=True)
class File:
    body: bytes
    packed: bytes
    kind: str
    tag: str


def load_files() -> dict[str, File]:
    """The pages, by name."""
    found = {}
    for each in resources.files(__package__).joinpath("static").iterdir():
        body = each.read_bytes()
        tag = '"' + hashlib.sha256(body).hexdigest()[:20] + '"'
        kind = TYPES[each.name.rpartition(".")[2]]
        found[each.name] = File(body, gzip.compress(body, 9, mtime=0), kind, tag)
    return found


@dataclass
class State:
    """What all requests share. The view is polled by a thread of its own. changes: another connection, so that what
    waits to be written while the database is locked holds up nobody who reads; writing: how many may wait in threads,
    of which there are 40 for all."""

    store: Store
    changes: Store
    view: View
    options: Options
    sessions: accounts.Sessions
    tries: accounts.Tries = field(default_factory=accounts.Tries)
    files: dict[str, File] = field(default_factory=load_files)
    live: Counter[str] = field(default_factory=Counter)  # pages that listen, by the account's name
    error: str | None = None
    stopping: bool = False
    wake: threading.Event = field(default_factory=threading.Event)
    news: asyncio.Event | None = None
    loop: asyncio.AbstractEventLoop | None = None
    writing: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(4))
    hashing: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))

    def poll_for_ever(self) -> None:
        while not self.stopping:
            began_s = time.monotonic()
            try:
                changed, error = self.view.poll(), None
            except StoreError as failed:
                changed, error = False, str(failed)
            except Exception as failed:  # what somebody else has written into the database
                changed, error = False, f"the database can't be read: {type(failed).__name__}: {failed}"[:300]
            if changed or error != self.error:
                self.error = error
                self.wake_up()
            spent_s = time.monotonic() - began_s
            often = self.live.total() or error is not None or not self.view.ready
            self.wake.wait(max(POLL_S if often else IDLE_POLL_S, SHARE * spent_s))
            self.wake.clear()

    def end(self) -> None:
        """In the loop: end the streams, which would go on for ever."""
        self.stopping = True
        self.wake.set()
        self._renew()

    def wake_up(self) -> None:
        """Wake up the browsers' streams."""
        if self.loop is not None:
            with contextlib.suppress(RuntimeError):  # it is closed: the server ends
                self.loop.call_soon_threadsafe(self._renew)

    def _renew(self) -> None:
        before, self.news = self.news, asyncio.Event()
        if before is not None:
            before.set()

    def look(self) -> None:
        """Read the database now."""
        self.wake.set()
