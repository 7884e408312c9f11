"""Who did what: a log of which each entry's digest covers the entry before it.

A changed, removed or inserted entry is found by verify(); entries removed at the end are found where somebody has noted
the digest of a later one (head()).
"""

import contextlib
import hashlib
import json
import random
import time
from typing import Any

from stonechat.errors import ConfigError

from ..fleet.store import Store, StoreError
from .accounts import network

FIRST = "0" * 64  # what the first entry follows
MAX_FACT = 300  # characters of a text
TRIES = 60
LOG_INS = 200  # of an account that are looked at


def _digest(before: str, sequence: int, at_ms: int, who: str, what: str, facts: str) -> str:
    text = json.dumps([before, sequence, at_ms, who, what, facts], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def note(store: Store, who: str, what: str, now_s: float | None = None, **facts: Any) -> str:
    """Append an entry -> its digest. Raises StoreError."""
    at_ms = int((time.time() if now_s is None else now_s) * 1000)
    short = {name: value[:MAX_FACT] if isinstance(value, str) else value for name, value in facts.items()}
    text = json.dumps(short, separators=(",", ":"), sort_keys=True)
    for attempt in range(TRIES):
        try:
            with store.transaction() as db:
                row = db.execute("SELECT sequence, digest FROM audit ORDER BY sequence DESC LIMIT 1").fetchone()
                sequence, before = (int(row[0]) + 1, row[1]) if row else (1, FIRST)
                digest = _digest(before, sequence, at_ms, who, what, text)
                db.execute("INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?)", (sequence, at_ms, who, what, text, digest))
            return digest
        except StoreError as error:
            if "audit_pkey" not in str(error) or attempt == TRIES - 1:
                raise
            time.sleep(random.random() / 50)  # another process was quicker: its entry has the number
    raise AssertionError


def entries(store: Store, limit: int = 200) -> list[dict[str, Any]]:
    """The newest first."""
    rows = store.rows("SELECT sequence, at_ms, who, what, facts FROM audit ORDER BY sequence DESC LIMIT ?", (limit,))
    return [
        {"sequence": row[0], "time_s": _time_s(row[1]), "who": row[2], "what": row[3], "facts": _facts(row[4])}
        for row in rows
    ]


def has_logged_in(store: Store, name: str, address: str) -> bool:
    """Whether the account has logged in from the address, or from its network, not long ago."""
    query = "SELECT facts FROM audit WHERE who = ? AND what = 'log-in' ORDER BY sequence DESC LIMIT ?"
    place = network(address)
    return any(network(str(_facts(row[0]).get("address", ""))) == place for row in store.rows(query, (name, LOG_INS)))


def _facts(text: Any) -> dict[str, Any]:
    """Of an entry that somebody may have changed: it is shown all the same."""
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        found = json.loads(text)
        if isinstance(found, dict):
            return found
    return {"can't be read": str(text)[:MAX_FACT]}


def _time_s(at_ms: Any) -> float:
    return at_ms / 1000 if isinstance(at_ms, int) else 0.0


def verify(store: Store, head: str = "") -> tuple[int, str]:
    """-> (how many entries, the digest of the newest). head: a digest noted before, that an entry must have. Raises
    ConfigError naming the first entry that does not follow from the one before it."""
    before, count, seen = FIRST, 0, not head
    query = "SELECT sequence, at_ms, who, what, facts, digest FROM audit ORDER BY sequence"
    for sequence, at_ms, who, what, facts, digest in store.rows(query):
        count += 1
        values = (sequence, at_ms, who, what, facts)
        if any(isinstance(value, bytes) for value in values) or (sequence, digest) != (count, _digest(before, *values)):
            raise ConfigError(
                f"the audit log is broken at entry {count}: it was changed, or one was removed or inserted there"
            )
        before = digest
        seen = seen or digest == head
    if not seen:
        raise ConfigError(f"no entry has the digest {head[:80]}: entries were removed from the end of the audit log")
    return count, before
