"""The fleet's database as the other modules call it."""

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from ..wire import Report, Status
from . import decisions as decided
from . import read
from .base import Db, Engine, Row, next_number
from .ingest import Ingest
from .retention import Keep, Retention
from .sqlite import Sqlite

MOST_UNUSED_S = 10 * 365 * 86_400  # an operator's own database: others may command meanwhile
URLS = ("postgresql://", "postgres://")


class Store:
    """path: a file, made where there is none (mode 0600), ":memory:" for tests, or a URL postgresql://... One collector
    writes, see collecting(); others may read. say: called with a line about a database that was moved, damaged or
    lost. make: False to make no file and set none aside. Every method raises StoreError, with nothing changed."""

    def __init__(
        self, path: str | Path, say: Callable[[str], None] | None = None, shard: str = "", make: bool = True
    ) -> None:
        self.path = str(path)
        self._shard = shard  # the name of this collector among several that share a PostgreSQL
        say = say or (lambda line: None)
        self.engine: Engine
        if self.path.startswith(URLS):
            from .postgres import Postgres

            self.engine = Postgres(self.path, say, shard)
        else:
            self.engine = Sqlite(self.path, say, make)
        self._ingest = Ingest(self.engine)

    @property
    def name(self) -> str:
        """For messages: the path, or the URL without its password."""
        return self.engine.name

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def collecting(self) -> AbstractContextManager[None]:
        """Held by the collector that fills this database. Raises StoreError while another one does."""
        return self.engine.collecting()

    @contextmanager
    def transaction(self) -> Iterator[Db]:
        """Commits at its end; after an error nothing of it is there. For modules with tables of their own."""
        with self.engine.transaction() as db:
            yield db

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """`?` in the query for each value, in both engines."""
        return self.engine.rows(query, values)

    # --- writing --------------------------------------------------------------------------------------------------

    def put(
        self,
        reports: Sequence[Report],
        statuses: Sequence[Status] = (),
        rejections: Iterable[tuple[str, str]] = (),
        refused: Iterable[str] = (),
        now_s: float | None = None,
        stale: list[Status] | None = None,
    ) -> list[str]:
        """Commit a batch as one transaction -> for each report STORED, DUPLICATE (the same bytes are there already) or
        CONFLICT (stored beside another report of the same name: somebody else has the device's key).
        rejections: (device, reason); refused: devices of reports that will never be taken; stale: is given the statuses
        that are older than what is known, which say nothing of now."""
        now_s = time.time() if now_s is None else now_s
        try:
            with self.engine.transaction() as db:
                return self._ingest.put(
                    db, reports, statuses, rejections, refused, now_s, [] if stale is None else stale
                )
        except BaseException:
            self._ingest.forget()
            raise

    def retention(self, keep: Keep) -> Retention:
        """What rolls up and deletes, for the collector that fills this database."""
        return Retention(self.engine, keep, self._ingest.deleted)

    def listened(self, since_s: float, until_s: float) -> None:
        """Note that this collector was subscribed from since_s to until_s: only then does silence say something."""
        with self.engine.transaction() as db:
            db.execute(
                "INSERT INTO listening VALUES (?, ?, ?) ON CONFLICT (collector) DO UPDATE SET"
                " since_s = excluded.since_s, until_s = excluded.until_s",
                (self._shard, since_s, until_s),
            )

    def next_command(self, device: str, code: int, arguments: Sequence[int], now_s: float | None = None) -> int:
        """Note a command that is about to be sent -> its sequence number: the clock's seconds, or one more than the
        last, so that a new database goes on where the old one was."""
        now_s = time.time() if now_s is None else now_s
        with self.engine.transaction() as db:
            db.execute(
                "INSERT INTO devices (name, first_seen_s, last_seen_s) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                (device, now_s, now_s),
            )
            row, last = db.execute("SELECT id, last_command FROM devices WHERE name = ?", (device,)).fetchone()
            sequence = next_number(int(last), now_s, MOST_UNUSED_S)
            db.execute("UPDATE devices SET last_command = ? WHERE id = ?", (sequence, row))
            db.execute(
                "INSERT INTO commands (device, sequence, sent_s, code, arguments) VALUES (?, ?, ?, ?, ?)",
                (row, sequence, now_s, code, json.dumps(list(arguments))),
            )
        return sequence

    def sent_command(self, device: str, sequence: int, code: int, arguments: Sequence[int], now_s: float) -> None:
        """Note a command that the operator's process has numbered and sent: the device's answer will be beside it."""
        with self.engine.transaction() as db:
            db.execute(
                "INSERT INTO commands (device, sequence, sent_s, code, arguments)"
                " SELECT id, ?, ?, ?, ? FROM devices WHERE name = ? ON CONFLICT (device, sequence) DO UPDATE SET"
                " sent_s = excluded.sent_s, code = excluded.code, arguments = excluded.arguments",
                (sequence, now_s, code, json.dumps(list(arguments)), device),
            )

    def note(self, kind: str, values: Mapping[str, Any]) -> None:
        """Keep small values (JSON) by kind and name; None deletes one. For labels, presence, incidents, silences."""
        with self.engine.transaction() as db:
            gone = [(kind, name) for name, value in values.items() if value is None]
            kept = [(kind, name, json.dumps(value)) for name, value in values.items() if value is not None]
            if gone:
                db.executemany("DELETE FROM notes WHERE kind = ? AND name = ?", gone)
            if kept:
                db.executemany(
                    "INSERT INTO notes VALUES (?, ?, ?) ON CONFLICT (kind, name) DO UPDATE SET value = excluded.value",
                    kept,
                )

    # --- reading --------------------------------------------------------------------------------------------------

    def count(self, device: str | None = None) -> int:
        """Reports stored, of one device or of all."""
        return read.count(self.engine, device)

    def sequences(self, device: str) -> list[int]:
        """Of all streams, in the order in which the streams were first seen."""
        return read.sequences(self.engine, device)

    def devices(self, device: str | None = None, since_s: float | None = None) -> list[dict[str, Any]]:
        """What is known of each device, or of one, by name; scores as numbers, not Q8. since_s: only those that were
        heard, connected or found out since then."""
        return read.devices(self.engine, device, since_s)

    def history(
        self,
        device: str,
        *,
        since_s: float = 0.0,
        until_s: float | None = None,
        limit: int = 1000,
        answers: bool = False,
    ) -> list[Row]:
        """The latest `limit` reports of a device in the order of their events, oldest first. An event whose clock was
        unset gets its time from the status of the same start, else from when it was received."""
        return read.history(self.engine, device, since_s, until_s, limit, answers)

    def span(self, device: str) -> tuple[float, float]:
        """Unix seconds of the oldest and the newest event of a device; (0, -1) without one."""
        return read.span(self.engine, device)

    def rollup(
        self, device: str, table: str = "hourly", since_s: float = 0.0, until_s: float | None = None
    ) -> list[dict[str, Any]]:
        """A device's hours or days (table "hourly" or "daily"), oldest first, some minutes behind the reports."""
        return read.rollup(self.engine, device, table, since_s, until_s)

    def listening(self) -> tuple[float, float] | None:
        """(since, until): when a collector was subscribed last; None before the first one was."""
        return read.listening(self.engine)

    def listened_until(self, collector: str) -> float | None:
        """When one collector (the name of its shard) was subscribed last; None before it first was."""
        rows = self.engine.rows("SELECT until_s FROM listening WHERE collector = ?", (collector,))
        return float(rows[0][0]) if rows else None

    def notes(self, kind: str, name: str | None = None) -> dict[str, Any]:
        """name -> value of one kind, or of one name. One that is no JSON, as a hand may leave it, is left out."""
        where, values = ("", (kind,)) if name is None else (" AND name = ?", (kind, name))
        query = f"SELECT name, value FROM notes WHERE kind = ?{where} ORDER BY name"
        found = {}
        for row in self.engine.rows(query, values):
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                found[row[0]] = json.loads(row[1])
        return found

    def note_texts(self, kind: str) -> dict[str, str]:
        """As notes(), without decoding the values: for whoever compares them with those of before."""
        return dict(self.engine.rows("SELECT name, value FROM notes WHERE kind = ?", (kind,)))

    def rejections(self) -> dict[str, dict[str, int]]:
        """device -> reason -> count."""
        return read.rejections(self.engine)

    def answer(self, device: str, sequence: int) -> int | None:
        """The result code that the device gave to a command, None before it does."""
        return read.answer(self.engine, device, sequence)

    def decisions(self, device: str | None = None, since_s: float = 0.0, limit: int = 200) -> list[dict[str, Any]]:
        """What devices have decided about alarms, done or what would have been done; newest first."""
        return decided.decisions(self.engine, device, since_s, limit)

    def commands(self, device: str) -> list[dict[str, Any]]:
        return read.commands(self.engine, device)
