"""The fleet's database: SQLite, and the only SQL in the tree.

A report's key is (device, sequence number), so a report that arrives twice is stored once. WAL with synchronous=FULL:
what is acknowledged to a device, which then forgets it, has to survive a power cut of the host."""

import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stonechat.errors import StonechatError

from .keyring import Rejected
from .wire import Feature, Report, Status


class StoreError(StonechatError):
    """The database can't be opened, read or written."""


STORED, AGAIN, CONFLICT = "stored", "again", "conflict"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS devices (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    first_seen_s REAL NOT NULL,
    last_seen_s REAL NOT NULL,
    online INTEGER,
    status_boot INTEGER NOT NULL DEFAULT -1,
    status_number INTEGER NOT NULL DEFAULT 0,
    status_json TEXT NOT NULL DEFAULT '{}',
    reports INTEGER NOT NULL DEFAULT 0,
    newest_sequence INTEGER NOT NULL DEFAULT 0,
    newest_boot INTEGER NOT NULL DEFAULT -1,
    level INTEGER NOT NULL DEFAULT 0,
    score_q8 INTEGER,
    evidence_q8 INTEGER,
    lost INTEGER NOT NULL DEFAULT 0,
    last_command INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS reports (
    device INTEGER NOT NULL REFERENCES devices(id),
    sequence INTEGER NOT NULL,
    boot INTEGER NOT NULL,
    time_s INTEGER,
    uptime_s INTEGER,
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
    PRIMARY KEY (device, sequence)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS reports_by_time ON reports (device, time_s);
CREATE TABLE IF NOT EXISTS boots (
    device INTEGER NOT NULL REFERENCES devices(id),
    boot INTEGER NOT NULL,
    began_s INTEGER,
    lost INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (device, boot)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS commands (
    device INTEGER NOT NULL REFERENCES devices(id),
    sequence INTEGER NOT NULL,
    sent_s REAL NOT NULL,
    code INTEGER NOT NULL,
    arguments TEXT NOT NULL,
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
PRAGMA user_version = 1;
"""
_VERSION = 1
MAX_REJECTED_NAMES = 1000  # devices whose rejections are counted by name; all others share one row


@dataclass(frozen=True, slots=True)
class Row:
    """One report out of the database; `time_s` is resolved where it can be, else when it was received at the latest."""

    device: str
    sequence: int
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
    """path: the database, made where there is none; ":memory:" for tests. One process writes; others may read."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._lock = threading.Lock()  # one transaction at a time, whatever thread it comes from
        try:
            self._db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=10.0)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, _VERSION):
                raise StoreError(f"{path}: made by another version ({version}) of stonechat")
            self._db.executescript(_SCHEMA)
            self._ids: dict[str, int] = dict(self._db.execute("SELECT name, id FROM devices"))
        except sqlite3.Error as error:
            raise StoreError(f"{path}: {error}") from None

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- writing --------------------------------------------------------------------------------------------------

    def put(
        self,
        reports: Sequence[Report],
        statuses: Sequence[Status] = (),
        rejections: Iterable[tuple[str, str]] = (),
        now_s: float | None = None,
    ) -> list[str]:
        """Commit a batch as one transaction -> for each report STORED, AGAIN (already stored) or CONFLICT (its number
        is taken by another report: a device that was wiped, or a stolen key). Raises StoreError; then nothing of the
        batch is stored."""
        now_s = time.time() if now_s is None else now_s
        with self._lock:
            return self._put(reports, statuses, rejections, now_s)

    def _put(
        self,
        reports: Sequence[Report],
        statuses: Sequence[Status],
        rejections: Iterable[tuple[str, str]],
        now_s: float,
    ) -> list[str]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                results = [self._put_report(report, now_s) for report in reports]
                for status in statuses:
                    try:
                        self._put_status(status, now_s)
                    except Rejected as rejected:
                        self._put_rejection(status.device, rejected.reason, now_s)
                for report, result in zip(reports, results, strict=True):
                    if result == CONFLICT:
                        self._put_rejection(report.device, "conflict", now_s)
                for device, reason in rejections:
                    self._put_rejection(device, reason, now_s)
                self._db.execute("COMMIT")
            except BaseException:
                self._db.execute("ROLLBACK")
                self._ids = dict(self._db.execute("SELECT name, id FROM devices"))
                raise
        except sqlite3.Error as error:
            raise StoreError(f"{self.path}: {error}") from None
        return results

    def _device(self, name: str, now_s: float) -> int:
        known = self._ids.get(name)
        if known is None:
            cursor = self._db.execute(
                "INSERT INTO devices (name, first_seen_s, last_seen_s) VALUES (?, ?, ?)", (name, now_s, now_s)
            )
            known = self._ids[name] = int(cursor.lastrowid or 0)
        return known

    def _put_report(self, report: Report, now_s: float) -> str:
        device = self._device(report.device, now_s)
        inserted = self._db.execute(
            "INSERT OR IGNORE INTO reports VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
            (
                device,
                report.sequence,
                report.boot,
                report.time_s,
                report.uptime_s,
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
                json.dumps([[f.index, f.deviation, f.share_percent] for f in report.features])
                if report.features
                else None,
                report.detail,
                report.lost,
                report.body,
            ),
        ).rowcount
        if not inserted:
            stored = self._db.execute(
                "SELECT boot, time_s, uptime_s, windows, score_q8, evidence_q8 FROM reports"
                " WHERE device = ? AND sequence = ?",
                (device, report.sequence),
            ).fetchone()
            same = (report.boot, report.time_s, report.uptime_s, report.windows, report.score_q8, report.evidence_q8)
            return AGAIN if stored == same else CONFLICT
        if report.answer:
            self._db.execute(
                "UPDATE commands SET result = ?, answered_s = ? WHERE device = ? AND sequence = ?",
                (report.answer[1], now_s, device, report.answer[0]),
            )
        if report.lost:
            self._db.execute(
                "INSERT INTO boots (device, boot, lost) VALUES (?, ?, ?)"
                " ON CONFLICT (device, boot) DO UPDATE SET lost = max(lost, excluded.lost)",
                (device, report.boot, report.lost),
            )
            self._db.execute(
                "UPDATE devices SET lost = (SELECT sum(lost) FROM boots WHERE device = ?) WHERE id = ?",
                (device, device),
            )
        self._db.execute("UPDATE devices SET reports = reports + 1, last_seen_s = ? WHERE id = ?", (now_s, device))
        if report.windows:
            self._db.execute(
                "UPDATE devices SET newest_sequence = ?, newest_boot = ?, level = ?, score_q8 = ?, evidence_q8 = ?"
                " WHERE id = ? AND newest_sequence < ?",
                (
                    report.sequence,
                    report.boot,
                    report.level,
                    report.score_q8,
                    report.evidence_q8,
                    device,
                    report.sequence,
                ),
            )
        return STORED

    def _put_status(self, status: Status, now_s: float) -> None:
        device = self._device(status.device, now_s)
        boot, number = self._db.execute(
            "SELECT status_boot, status_number FROM devices WHERE id = ?", (device,)
        ).fetchone()
        older = status.boot < boot and not self._began_after(device, boot, status)
        if older or (status.online and status.boot == boot and status.number < number):
            raise Rejected("stale", "an older status")
        if status.time_s is not None:
            self._db.execute(
                "INSERT INTO boots (device, boot, began_s) VALUES (?, ?, ?)"
                " ON CONFLICT (device, boot) DO UPDATE SET began_s = excluded.began_s",
                (device, status.boot, status.time_s - status.uptime_s),
            )
        if not status.online:  # the last will was written before the connection: it only says that it ended
            self._db.execute("UPDATE devices SET online = 0, status_boot = ? WHERE id = ?", (status.boot, device))
            return
        if (status.boot, status.number) == (boot, number):
            return  # the broker's retained copy once more: it does not say that the device is there now
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
        }
        self._db.execute(
            "UPDATE devices SET online = 1, status_boot = ?, status_number = ?, status_json = ?, last_seen_s = ?"
            " WHERE id = ?",
            (status.boot, status.number, json.dumps(facts), now_s, device),
        )

    def _began_after(self, device: int, boot: int, status: Status) -> bool:
        """Whether the device's own clock says that it started after boot `boot` did. A device whose memory was wiped
        counts its starts anew; without a clock it can't be distinguished from an old message."""
        row = self._db.execute("SELECT began_s FROM boots WHERE device = ? AND boot = ?", (device, boot)).fetchone()
        if status.time_s is None or row is None or row[0] is None:
            return False
        return bool(status.time_s - status.uptime_s > row[0])

    def _put_rejection(self, device: str, reason: str, now_s: float) -> None:
        if device not in self._ids:
            strangers = self._db.execute("SELECT count(*) FROM rejections").fetchone()[0]
            if strangers >= MAX_REJECTED_NAMES:
                device = "(others)"
        self._db.execute(
            "INSERT INTO rejections VALUES (?, ?, 1, ?)"
            " ON CONFLICT (device, reason) DO UPDATE SET count = count + 1, last_s = excluded.last_s",
            (device[:64], reason, now_s),
        )

    def next_command(self, device: str, code: int, arguments: Sequence[int], now_s: float | None = None) -> int:
        """Note a command that is about to be sent -> its sequence number: the clock's seconds, or one more than the
        last, so that a new database goes on where the old one was."""
        now_s = time.time() if now_s is None else now_s
        try:
            with self._lock, self._db:
                self._db.execute("BEGIN IMMEDIATE")
                row = self._device(device, now_s)
                last = self._db.execute("SELECT last_command FROM devices WHERE id = ?", (row,)).fetchone()[0]
                sequence = max(int(now_s), int(last) + 1)
                self._db.execute("UPDATE devices SET last_command = ? WHERE id = ?", (sequence, row))
                self._db.execute(
                    "INSERT INTO commands VALUES (?, ?, ?, ?, ?, NULL, NULL)",
                    (row, sequence, now_s, code, json.dumps(list(arguments))),
                )
        except sqlite3.Error as error:
            raise StoreError(f"{self.path}: {error}") from None
        return sequence

    # --- reading --------------------------------------------------------------------------------------------------

    def count(self, device: str | None = None) -> int:
        """Reports stored, of one device or of all."""
        if device is None:
            return int(self._db.execute("SELECT count(*) FROM reports").fetchone()[0])
        return int(
            self._db.execute("SELECT count(*) FROM reports WHERE device = ?", (self._ids.get(device, -1),)).fetchone()[
                0
            ]
        )

    def sequences(self, device: str) -> list[int]:
        found = self._db.execute(
            "SELECT sequence FROM reports WHERE device = ? ORDER BY sequence", (self._id(device),)
        ).fetchall()
        return [row[0] for row in found]

    def _id(self, device: str) -> int:
        row = self._db.execute("SELECT id FROM devices WHERE name = ?", (device,)).fetchone()
        return int(row[0]) if row else -1

    def devices(self) -> list[dict[str, Any]]:
        """What is known of each device, by name; scores as numbers, not Q8."""
        found = []
        for row in self._db.execute(
            "SELECT name, online, last_seen_s, reports, level, score_q8, evidence_q8, lost, status_json,"
            " newest_sequence, status_boot FROM devices ORDER BY name"
        ):
            facts = json.loads(row[8])
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
                    "boot": row[10],
                    **facts,
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
        unset gets its time from what the status of the same boot said later, else from when it was received."""
        where = "" if answers else "AND r.windows > 0"
        rows = self._db.execute(
            "SELECT r.sequence, r.boot, COALESCE(r.time_s, b.began_s + r.uptime_s,"
            "   CASE WHEN r.late_s >= 0 THEN r.received_s - r.late_s END) AS at, r.received_s, r.late_s, r.level,"
            " r.flags, r.windows, r.score_q8, r.score_min_q8, r.score_max_q8, r.surprise_q8, r.evidence_q8, r.features,"
            " r.detail, r.lost FROM reports r LEFT JOIN boots b ON b.device = r.device AND b.boot = r.boot"
            f" WHERE r.device = ? {where} AND COALESCE(at, r.received_s) >= ? AND COALESCE(at, r.received_s) <= ?"
            " ORDER BY r.sequence DESC LIMIT ?",
            (self._id(device), since_s, 1e12 if until_s is None else until_s, limit),
        ).fetchall()
        return [_row(device, row) for row in reversed(rows)]

    def rejections(self) -> dict[str, dict[str, int]]:
        """device -> reason -> count."""
        found: dict[str, dict[str, int]] = {}
        for device, reason, count in self._db.execute("SELECT device, reason, count FROM rejections ORDER BY 1, 2"):
            found.setdefault(device, {})[reason] = count
        return found

    def answer(self, device: str, sequence: int) -> int | None:
        """The result code that the device gave to a command, None before it does."""
        row = self._db.execute(
            "SELECT result FROM commands WHERE device = ? AND sequence = ?", (self._id(device), sequence)
        ).fetchone()
        return None if row is None or row[0] is None else int(row[0])

    def commands(self, device: str) -> list[dict[str, Any]]:
        rows = self._db.execute(
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
        sequence=row[0],
        boot=row[1],
        time_s=row[3] if row[2] is None else row[2],
        time_known=row[2] is not None,
        late_s=row[4],
        level=row[5],
        flags=row[6],
        windows=row[7],
        score=_number(row[8]),
        score_min=_number(row[9]),
        score_max=_number(row[10]),
        surprise=_number(row[11]),
        evidence=_number(row[12]),
        features=[Feature(*item) for item in json.loads(row[13] or "[]")],
        detail=row[14],
        lost=row[15],
    )
