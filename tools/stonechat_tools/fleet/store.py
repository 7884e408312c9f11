"""The fleet's database: SQLite, and the only SQL in the tree.

A report is named by (device, stream, sequence number): the device draws the stream at every start, so a number that
comes again after a flash was erased or an image restored is another report. The same bytes again are a duplicate. Other
bytes under the same name are a conflict: both are kept, so that whoever holds a stolen key can't keep a report out by
using its number first.

WAL with synchronous=FULL: what is acknowledged to a device, which then forgets it, has to survive a power cut of the
host. A database file that is moved away or damaged while the collector runs is replaced by a new one.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stonechat.errors import StonechatError

from .keyring import Rejected
from .wire import Feature, Report, Status


class StoreError(StonechatError):
    """The database can't be opened, read or written."""


STORED, DUPLICATE, CONFLICT = "stored", "duplicate", "conflict"

_SCHEMA = """
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS devices (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    first_seen_s REAL NOT NULL,
    last_seen_s REAL NOT NULL,
    key TEXT NOT NULL DEFAULT '',
    online INTEGER,
    online_since_s REAL,
    conflict_s REAL,
    heartbeat_windows INTEGER NOT NULL DEFAULT 0,
    status_stream INTEGER,
    status_json TEXT NOT NULL DEFAULT '{}',
    reports INTEGER NOT NULL DEFAULT 0,
    conflicts INTEGER NOT NULL DEFAULT 0,
    newest_s INTEGER,
    newest_sequence INTEGER NOT NULL DEFAULT 0,
    level INTEGER NOT NULL DEFAULT 0,
    score_q8 INTEGER,
    evidence_q8 INTEGER,
    lost INTEGER NOT NULL DEFAULT 0,
    refused INTEGER NOT NULL DEFAULT 0,
    last_command INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS streams (
    id INTEGER PRIMARY KEY,
    device INTEGER NOT NULL REFERENCES devices(id),
    stream BLOB NOT NULL,
    boot INTEGER NOT NULL,
    first_seen_s REAL NOT NULL,
    began_s INTEGER,
    behind_s INTEGER,
    status_number INTEGER NOT NULL DEFAULT 0,
    lost INTEGER NOT NULL DEFAULT 0,
    UNIQUE (device, stream)
);
CREATE TABLE IF NOT EXISTS reports (
    device INTEGER NOT NULL REFERENCES devices(id),
    stream INTEGER NOT NULL REFERENCES streams(id),
    sequence INTEGER NOT NULL,
    variant INTEGER NOT NULL,
    boot INTEGER NOT NULL,
    time_s INTEGER,
    uptime_s INTEGER,
    at_s INTEGER NOT NULL,
    at_known INTEGER NOT NULL,
    received_s REAL NOT NULL,
    late_s INTEGER,
    level INTEGER NOT NULL,
    flags INTEGER NOT NULL,
    windows INTEGER NOT NULL,
    score_q8 INTEGER,
    score_min_q8 INTEGER,
    score_max_q8 INTEGER,
    surprise_q8 INTEGER,
    evidence_q8 INTEGER,
    features TEXT,
    detail TEXT,
    lost INTEGER NOT NULL,
    body BLOB NOT NULL,
    PRIMARY KEY (stream, sequence, variant)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS reports_by_time ON reports (device, at_s);
CREATE TABLE IF NOT EXISTS commands (
    device INTEGER NOT NULL REFERENCES devices(id),
    sequence INTEGER NOT NULL,
    sent_s REAL,
    code INTEGER,
    arguments TEXT NOT NULL DEFAULT '[]',
    result INTEGER,
    answered_s REAL,
    PRIMARY KEY (device, sequence)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rejections (
    device TEXT NOT NULL,
    reason TEXT NOT NULL,
    count INTEGER NOT NULL,
    last_s REAL NOT NULL,
    PRIMARY KEY (device, reason)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS listening (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    since_s REAL NOT NULL,
    until_s REAL NOT NULL
);
PRAGMA user_version = 3;
COMMIT;
"""
_INSERT = (
    "INSERT OR IGNORE INTO reports (variant, device, stream, sequence, boot, time_s, uptime_s, at_s, at_known,"
    " received_s, late_s, level, flags, windows, score_q8, score_min_q8, score_max_q8, surprise_q8, evidence_q8,"
    " features, detail, lost, body) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)"
)
_VERSION = 3
_DAY_S = 86_400
_MAX_CACHED = 10_000
_BUSY_S = 10.0
MAX_REJECTED_NAMES = 1000  # devices that rejections are counted for by name; strangers beyond them share one row
_TRANSIENT = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL)
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


@dataclass(frozen=True, slots=True)
class Row:
    """One report out of the database; `time_s` is that of the event where it is known, else when it was received.
    `variant` is 0, or another number for a report whose name another one had taken before."""

    device: str
    stream: str
    sequence: int
    variant: int
    boot: int
    time_s: float
    time_known: bool
    late_s: int | None
    level: int
    flags: int
    windows: int
    score: float | None
    score_min: float | None
    score_max: float | None
    surprise: float | None
    evidence: float | None
    features: list[Feature]
    detail: str | None
    lost: int


class Store:
    """path: the database, made where there is none (mode 0600); ":memory:" for tests. One collector writes, see
    collecting(); others may read. say: called with a line about a file that was moved or damaged."""

    def __init__(self, path: str | Path, say: Callable[[str], None] | None = None) -> None:
        self.path = str(path)
        self._say = say or (lambda line: None)
        self._lock = threading.RLock()  # one transaction at a time, whatever thread it comes from
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None  # device and inode of the open database
        self._bytes = 0  # its size when it was last looked at
        self._ids: dict[str, int] = {}
        self._streams: dict[tuple[int, bytes], int] = {}
        self._clocks: dict[int, tuple[int | None, int | None]] = {}  # stream: began_s, behind_s
        self._trusted: dict[int, str] = {}  # device: fingerprint of the key that says its level
        try:
            self._open()
        except sqlite3.Error as error:
            raise self._error(error) from None

    def close(self) -> None:
        with self._lock, contextlib.suppress(sqlite3.Error):
            if self._connection is not None:
                self._connection.close()
            self._connection = None

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Held by the collector that fills this database. Raises StoreError while another one does."""
        path = os.path.realpath(self.path) + ".lock"  # the same by whatever link it is called
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from None
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                holder = os.pread(lock, 20, 0).decode("ascii", "replace").strip()
                raise StoreError(
                    f"{self.path}: another collector (process {holder or 'unknown'}) fills this database;"
                    " stop it or choose another --db"
                ) from None
            with contextlib.suppress(OSError):  # a full disk: who holds it is only for the message
                os.ftruncate(lock, 0)
                os.pwrite(lock, b"%d\n" % os.getpid(), 0)
            yield
        finally:
            os.close(lock)

    # --- the file -------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Raises StoreError or sqlite3.Error."""
        if self.path != ":memory:":
            try:
                os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            except FileExistsError:
                pass
            except OSError as error:
                raise StoreError(f"{self.path}: {error.strerror}") from None
        db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=_BUSY_S)
        try:
            self._file, self._bytes = self._file_now()
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, _VERSION):
                raise StoreError(
                    f"{self.path}: made by another version ({version}) of stonechat; move it away and start again"
                )
            if db.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            if version == 0:
                if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    raise StoreError(f"{self.path}: a database of something else; choose another --db")
                db.executescript(_SCHEMA)
            self._ids = dict(db.execute("SELECT name, id FROM devices"))
            self._streams, self._trusted, self._clocks = {}, {}, {}
        except BaseException:
            db.close()
            raise
        self._connection = db

    def _file_now(self) -> tuple[tuple[int, int] | None, int]:
        """(device and inode, size) of what is at the path; (None, 0) where there is nothing."""
        try:
            found = os.stat(self.path)
        except OSError:
            return None, 0
        return (found.st_dev, found.st_ino), found.st_size

    @property
    def _db(self) -> sqlite3.Connection:
        """The connection to what is at the path now: opened anew where the file was moved or replaced."""
        if self._connection is not None:
            file, size = self._file_now()
            if file != self._file:
                self._say(f"{self.path}: moved or replaced; going on with what is there now")
                self._leave()
            elif size < self._bytes:  # it never shrinks by itself
                self._set_aside("cut off")
            self._bytes = max(self._bytes, size)
        if self._connection is None:
            self._open()
        assert self._connection is not None
        return self._connection

    def _leave(self) -> None:
        """Close a database that is no longer at the path, or has lost its log, with all that was committed in it."""
        assert self._connection is not None
        with contextlib.suppress(sqlite3.Error):  # closing alone would leave the log at the old path
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self.close()

    def _error(self, error: sqlite3.Error) -> StoreError:
        """SQLite says `disk I/O error` for a full disk, too, and no more of a folder than that it can't be opened."""
        why = ""
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
            folder = os.path.dirname(os.path.abspath(self.path))
            if os.path.exists(self.path) and not os.path.isfile(self.path):
                why = "; it is not a file"
            elif os.path.isdir(folder) and os.statvfs(folder).f_bavail == 0:
                why = "; its disk is full"
            elif not os.access(folder, os.W_OK):
                why = f"; no right to write in {folder}"
        return StoreError(f"{self.path}: {error}{why}")

    def _failed(self, error: sqlite3.Error) -> StoreError:
        """After a write failed: set a damaged file aside, and begin with a new connection unless it is only a wait."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in _DAMAGED:
            self._set_aside(str(error))
        elif code not in _TRANSIENT:
            self.close()
        return self._error(error)

    def _set_aside(self, why: str) -> None:
        self.close()
        aside = f"{self.path}.damaged-{time.strftime('%Y%m%dT%H%M%S')}"
        for end in ("", "-wal", "-shm"):
            with contextlib.suppress(OSError):
                os.rename(self.path + end, aside + end)
        self._say(f"{self.path}: {why}; kept as {aside}, a new database begins")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Commits at the end, into the file that is at the path then. Raises StoreError with nothing stored there."""
        with self._lock:
            try:
                db = self._db
                db.execute("BEGIN IMMEDIATE")
                try:
                    yield db
                    db.execute("COMMIT")
                except BaseException:
                    self._ids, self._streams, self._trusted, self._clocks = {}, {}, {}, {}
                    with contextlib.suppress(sqlite3.Error):
                        if db.in_transaction:  # a full disk has ended it already
                            db.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise self._failed(error) from None
            if self._file != self._file_now()[0]:
                raise StoreError(f"{self.path}: moved while it was written to")
            if self._file is not None and not os.path.exists(self.path + "-wal"):
                self._say(f"{self.path}-wal: was removed; what it held is written to the database")
                self._leave()

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Raises StoreError."""
        with self._lock:
            try:
                return self._db.execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise self._error(error) from None

    # --- writing --------------------------------------------------------------------------------------------------

    def put(
        self,
        reports: Sequence[Report],
        statuses: Sequence[Status] = (),
        rejections: Iterable[tuple[str, str]] = (),
        refused: Iterable[str] = (),
        now_s: float | None = None,
    ) -> list[str]:
        """Commit a batch as one transaction -> for each report STORED, DUPLICATE (the same bytes are there already) or
        CONFLICT (stored beside another report of the same name: somebody else has the device's key).
        rejections: (device, reason); refused: devices of reports that will never be taken. Raises StoreError; then
        nothing of the batch is stored."""
        now_s = time.time() if now_s is None else now_s
        with self._transaction() as db:
            results = [self._put_report(db, report, now_s) for report in reports]
            counted = Counter(rejections)
            for status in statuses:
                try:
                    self._put_status(db, status, now_s)
                except Rejected as rejected:
                    counted[status.device, rejected.reason] += 1
            for report, result in zip(reports, results, strict=True):
                if result == CONFLICT:
                    counted[report.device, "conflict"] += 1
            for (device, reason), count in counted.items():
                self._put_rejection(db, device, reason, count, now_s)
            for device, count in Counter(refused).items():
                row = self._device(db, device, now_s)
                db.execute("UPDATE devices SET refused = refused + ? WHERE id = ?", (count, row))
        return results

    def _device(self, db: sqlite3.Connection, name: str, now_s: float) -> int:
        known = self._ids.get(name)
        if known is None:
            db.execute(
                "INSERT OR IGNORE INTO devices (name, first_seen_s, last_seen_s) VALUES (?, ?, ?)", (name, now_s, now_s)
            )
            known = self._ids[name] = int(db.execute("SELECT id FROM devices WHERE name = ?", (name,)).fetchone()[0])
        return known

    def _stream(self, db: sqlite3.Connection, device: int, stream: bytes, boot: int, now_s: float) -> int:
        known = self._streams.get((device, stream))
        if known is None:
            if len(self._streams) >= _MAX_CACHED:
                self._streams.clear()
            db.execute(
                "INSERT OR IGNORE INTO streams (device, stream, boot, first_seen_s) VALUES (?, ?, ?, ?)",
                (device, stream, boot, now_s),
            )
            row = db.execute("SELECT id FROM streams WHERE device = ? AND stream = ?", (device, stream)).fetchone()
            known = self._streams[device, stream] = int(row[0])
        return known

    def _put_report(self, db: sqlite3.Connection, report: Report, now_s: float) -> str:
        device = self._device(db, report.device, now_s)
        stream = self._stream(db, device, report.stream, report.boot, now_s)
        at_s, known, order_s = self._when(db, stream, report, int(now_s))
        values = (
            device,
            stream,
            report.sequence,
            report.boot,
            report.time_s,
            report.uptime_s,
            at_s,
            known,
            now_s,
            report.late_s,
            report.level,
            report.flags,
            report.windows,
            report.score_q8,
            report.score_min_q8,
            report.score_max_q8,
            report.surprise_q8,
            report.evidence_q8,
            json.dumps([[f.index, f.deviation, f.share_percent] for f in report.features]) if report.features else None,
            report.detail,
            report.lost,
            report.body,
        )
        result = STORED
        if not db.execute(_INSERT, (0, *values)).rowcount:
            (body,) = db.execute(
                "SELECT body FROM reports WHERE stream = ? AND sequence = ? AND variant = 0", (stream, report.sequence)
            ).fetchone()
            variant = 1 + (int.from_bytes(hashlib.sha256(report.body).digest()[:8]) >> 2)
            if body == report.body or not db.execute(_INSERT, (variant, *values)).rowcount:
                return DUPLICATE
            result = CONFLICT
        if report.answer:
            db.execute(
                "INSERT INTO commands (device, sequence, result, answered_s) VALUES (?, ?, ?, ?)"
                " ON CONFLICT (device, sequence) DO UPDATE SET result = excluded.result,"
                " answered_s = excluded.answered_s",
                (device, report.answer[0], report.answer[1], now_s),
            )
        if report.lost:
            db.execute("UPDATE streams SET lost = max(lost, ?) WHERE id = ?", (report.lost, stream))
            db.execute(
                "UPDATE devices SET lost = (SELECT sum(lost) FROM streams WHERE device = ?) WHERE id = ?",
                (device, device),
            )
        trusted = self._trust(db, device, report)
        # How many windows pass between reports: known at once where it grows, slowly where it shrinks.
        db.execute(
            "UPDATE devices SET reports = reports + 1, last_seen_s = ?, heartbeat_windows = iif(? = 0,"
            " heartbeat_windows, max(?, heartbeat_windows - (heartbeat_windows + 7) / 8)) WHERE id = ?",
            (now_s, report.windows, report.windows, device),
        )
        if result == CONFLICT:
            db.execute("UPDATE devices SET conflicts = conflicts + 1, conflict_s = ? WHERE id = ?", (now_s, device))
        if report.windows and trusted:
            db.execute(
                "UPDATE devices SET newest_s = ?, newest_sequence = ?, level = ?, score_q8 = ?, evidence_q8 = ?"
                " WHERE id = ? AND (newest_s IS NULL OR newest_s <= ? OR newest_s > ?)",
                (
                    order_s,
                    report.sequence,
                    report.level,
                    report.score_q8,
                    report.evidence_q8,
                    device,
                    order_s,
                    int(now_s),
                ),
            )
        return result

    def _when(self, db: sqlite3.Connection, stream: int, report: Report, received_s: int) -> tuple[int, bool, int]:
        """-> (time of the event, whether that is known, its place in the order of the device's events).

        The device's own clock counts where it is plausible: not ahead of ours, and not behind it by more than the
        delay of the stream's promptest report. No event is later than its arrival, so a wrong clock, or a report that
        was made up, doesn't outlive the next one."""
        clock = self._clocks.get(stream)
        if clock is None:
            clock = db.execute("SELECT began_s, behind_s FROM streams WHERE id = ?", (stream,)).fetchone()
            if len(self._clocks) >= _MAX_CACHED:
                self._clocks.clear()
            self._clocks[stream] = clock
        began_s, behind_s = clock
        if report.time_s is not None:
            if report.time_s > received_s + _DAY_S:
                return received_s, False, received_s
            if report.late_s is None:
                delay_s = received_s - report.time_s
                if behind_s is None or delay_s < behind_s:
                    behind_s = delay_s
                    db.execute("UPDATE streams SET behind_s = ? WHERE id = ?", (behind_s, stream))
                    self._clocks[stream] = (began_s, behind_s)
            behind_s = max(0, behind_s or 0)
            order_s = min(received_s, report.time_s + behind_s)
            return (order_s, False, order_s) if behind_s > _DAY_S else (report.time_s, True, order_s)
        uptime_s = report.uptime_s or 0
        if report.late_s is None:
            order_s = received_s
        elif report.late_s >= 0:
            order_s = received_s - report.late_s
        else:  # history of an unknown age
            order_s = 0
        if began_s is not None:
            own_s = began_s + uptime_s
            return own_s, True, min(received_s, own_s) if report.late_s == -1 else order_s
        return order_s or received_s, report.late_s is not None and report.late_s >= 0, order_s

    def _trust(self, db: sqlite3.Connection, device: int, report: Report) -> bool:
        """Whether the report may say what level the device has. One under a new key begins the device anew, and from
        then on none under the old key does."""
        if not report.key:
            return True
        if self._trusted.get(device) == report.key:
            return True
        (key,) = db.execute("SELECT key FROM devices WHERE id = ?", (device,)).fetchone()
        if key == report.key:
            self._trusted[device] = key
            return True
        if key and not report.current:
            return False
        db.execute(
            "UPDATE devices SET key = ?, newest_s = NULL, conflicts = 0, refused = 0 WHERE id = ?", (report.key, device)
        )
        self._trusted.pop(device, None)
        return True

    def _put_status(self, db: sqlite3.Connection, status: Status, now_s: float) -> None:
        device = self._device(db, status.device, now_s)
        stream = self._stream(db, device, status.stream, status.boot, now_s)
        (number,) = db.execute("SELECT status_number FROM streams WHERE id = ?", (stream,)).fetchone()
        (current,) = db.execute("SELECT status_stream FROM devices WHERE id = ?", (device,)).fetchone()
        if status.online and status.number < number:
            raise Rejected("stale", "an older status")
        if current not in (None, stream) and (not status.online or status.number == number):
            raise Rejected("stale", "of an earlier start")
        if not status.online:  # the last will was written before the connection: it only says that it ended
            db.execute(
                "UPDATE devices SET online_since_s = iif(online = 0, online_since_s, ?), online = 0, status_stream = ?"
                " WHERE id = ?",
                (now_s, stream, device),
            )
            return
        if status.number == number:
            return  # the broker's retained copy once more: it does not say that the device is there now
        if number and current not in (None, stream):  # a start that another one had followed: two of them run
            db.execute("UPDATE devices SET conflicts = conflicts + 1, conflict_s = ? WHERE id = ?", (now_s, device))
        if status.time_s is not None and status.time_s <= now_s + _DAY_S:
            self._began(db, stream, status.time_s - status.uptime_s)
        facts = {
            "firmware": status.firmware,
            "model": status.model.hex() if status.model else None,
            "schema": status.schema.hex() if status.schema else None,
            "window_ms": status.window_ms,
            "sources": list(status.sources),
            "adaptation_q8": status.adaptation_q8,
            "learning": status.learning,
            "agent": status.agent,
            "counters": list(status.counters),
            "unscored": list(status.unscored),
            "boot": status.boot,
            "stream": status.stream.hex(),
        }
        db.execute("UPDATE streams SET status_number = ? WHERE id = ?", (status.number, stream))
        db.execute(
            "UPDATE devices SET online_since_s = iif(online = 1, online_since_s, ?), online = 1, status_stream = ?,"
            " status_json = ?, last_seen_s = ? WHERE id = ?",
            (now_s, stream, json.dumps(facts), now_s, device),
        )

    def _began(self, db: sqlite3.Connection, stream: int, began_s: int) -> None:
        """The device's clock is set by now: give the stream's reports from before their times."""
        (before,) = db.execute("SELECT began_s FROM streams WHERE id = ?", (stream,)).fetchone()
        if before == began_s:
            return
        self._clocks.pop(stream, None)
        if before is not None and began_s < before - 60:  # its clock was put back: how far it is behind, nobody knows
            db.execute("UPDATE streams SET behind_s = NULL WHERE id = ?", (stream,))
        db.execute("UPDATE streams SET began_s = ? WHERE id = ?", (began_s, stream))
        if before is None or abs(began_s - before) > 2:  # not for the clock's ordinary corrections
            db.execute(
                "UPDATE reports SET at_s = ? + uptime_s, at_known = 1 WHERE stream = ? AND uptime_s IS NOT NULL",
                (began_s, stream),
            )

    def _put_rejection(self, db: sqlite3.Connection, device: str, reason: str, count: int, now_s: float) -> None:
        device = device[:64]
        known = db.execute(
            "SELECT 1 FROM rejections WHERE device = ? UNION ALL SELECT 1 FROM devices WHERE name = ?", (device, device)
        ).fetchone()
        if known is None and db.execute("SELECT count(*) FROM rejections").fetchone()[0] >= MAX_REJECTED_NAMES:
            device = "(others)"
        db.execute(
            "INSERT INTO rejections VALUES (?, ?, ?, ?)"
            " ON CONFLICT (device, reason) DO UPDATE SET count = count + excluded.count, last_s = excluded.last_s",
            (device, reason, count, now_s),
        )

    def listened(self, since_s: float, until_s: float) -> None:
        """Note that a collector was subscribed from since_s to until_s: only then does silence say something."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO listening VALUES (1, ?, ?)", (since_s, until_s))

    def next_command(self, device: str, code: int, arguments: Sequence[int], now_s: float | None = None) -> int:
        """Note a command that is about to be sent -> its sequence number: the clock's seconds, or one more than the
        last, so that a new database goes on where the old one was."""
        now_s = time.time() if now_s is None else now_s
        with self._transaction() as db:
            row = self._device(db, device, now_s)
            last = db.execute("SELECT last_command FROM devices WHERE id = ?", (row,)).fetchone()[0]
            sequence = max(int(now_s), int(last) + 1)
            db.execute("UPDATE devices SET last_command = ? WHERE id = ?", (sequence, row))
            db.execute(
                "INSERT OR REPLACE INTO commands (device, sequence, sent_s, code, arguments) VALUES (?, ?, ?, ?, ?)",
                (row, sequence, now_s, code, json.dumps(list(arguments))),
            )
        return sequence

    # --- reading --------------------------------------------------------------------------------------------------

    def count(self, device: str | None = None) -> int:
        """Reports stored, of one device or of all."""
        if device is None:
            return int(self._rows("SELECT count(*) FROM reports")[0][0])
        return int(self._rows("SELECT count(*) FROM reports WHERE device = ?", (self._id(device),))[0][0])

    def sequences(self, device: str) -> list[int]:
        """Of all streams, in the order in which the streams were first seen."""
        return [
            row[0]
            for row in self._rows(
                "SELECT sequence FROM reports WHERE device = ? ORDER BY stream, sequence", (self._id(device),)
            )
        ]

    def _id(self, device: str) -> int:
        rows = self._rows("SELECT id FROM devices WHERE name = ?", (device,))
        return int(rows[0][0]) if rows else -1

    def devices(self) -> list[dict[str, Any]]:
        """What is known of each device, by name; scores as numbers, not Q8."""
        found = []
        for row in self._rows(
            "SELECT name, online, last_seen_s, reports, level, score_q8, evidence_q8, lost, status_json,"
            " newest_sequence, conflicts, refused, online_since_s, conflict_s, heartbeat_windows"
            " FROM devices ORDER BY name"
        ):
            found.append(
                {
                    "device": row[0],
                    "online": None if row[1] is None else bool(row[1]),
                    "last_seen_s": row[2],
                    "reports": row[3],
                    "level": row[4],
                    "score": _number(row[5]),
                    "evidence": _number(row[6]),
                    "lost": row[7],
                    "newest_sequence": row[9],
                    "boot": None,
                    "conflicts": row[10],
                    "refused": row[11],
                    "online_since_s": row[12],
                    "conflict_s": row[13],
                    "heartbeat_windows": row[14],
                    "window_ms": None,
                    **json.loads(row[8]),
                }
            )
        return found

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
        where = "" if answers else "AND r.windows > 0"
        rows = self._rows(
            "SELECT s.stream, r.sequence, r.variant, r.boot, r.at_s, r.at_known, r.received_s, r.late_s, r.level,"
            " r.flags, r.windows, r.score_q8, r.score_min_q8, r.score_max_q8, r.surprise_q8, r.evidence_q8, r.features,"
            " r.detail, r.lost FROM reports r JOIN streams s ON s.id = r.stream"
            f" WHERE r.device = ? {where} AND r.at_s >= ? AND r.at_s <= ?"
            " ORDER BY r.at_s DESC, r.received_s DESC, r.stream DESC, r.sequence DESC LIMIT ?",
            (self._id(device), since_s, 1e12 if until_s is None else until_s, limit),
        )
        return [_row(device, row) for row in reversed(rows)]

    def listening(self) -> tuple[float, float] | None:
        """(since, until): when a collector was subscribed last; None before the first one was."""
        rows = self._rows("SELECT since_s, until_s FROM listening")
        return (rows[0][0], rows[0][1]) if rows else None

    def rejections(self) -> dict[str, dict[str, int]]:
        """device -> reason -> count."""
        found: dict[str, dict[str, int]] = {}
        for device, reason, count in self._rows("SELECT device, reason, count FROM rejections ORDER BY 1, 2"):
            found.setdefault(device, {})[reason] = count
        return found

    def answer(self, device: str, sequence: int) -> int | None:
        """The result code that the device gave to a command, None before it does."""
        rows = self._rows("SELECT result FROM commands WHERE device = ? AND sequence = ?", (self._id(device), sequence))
        return None if not rows or rows[0][0] is None else int(rows[0][0])

    def commands(self, device: str) -> list[dict[str, Any]]:
        rows = self._rows(
            "SELECT sequence, sent_s, code, arguments, result, answered_s FROM commands WHERE device = ?"
            " ORDER BY sequence",
            (self._id(device),),
        )
        names = ("sequence", "sent_s", "code", "arguments", "result", "answered_s")
        return [dict(zip(names, row[:3] + (json.loads(row[3]),) + row[4:], strict=True)) for row in rows]


def _number(q8: int | None) -> float | None:
    return None if q8 is None else q8 / 256


def _row(device: str, row: tuple[Any, ...]) -> Row:
    return Row(
        device=device,
        stream=row[0].hex(),
        sequence=row[1],
        variant=row[2],
        boot=row[3],
        time_s=row[4],
        time_known=bool(row[5]),
        late_s=row[7],
        level=row[8],
        flags=row[9],
        windows=row[10],
        score=_number(row[11]),
        score_min=_number(row[12]),
        score_max=_number(row[13]),
        surprise=_number(row[14]),
        evidence=_number(row[15]),
        features=[Feature(*item) for item in json.loads(row[16] or "[]")],
        detail=row[17],
        lost=row[18],
    )
