"""Roll-ups by hour and by day, and what is deleted after how long. A collector calls step() now and then; each call
does one short transaction, so that no batch waits for it.

A report counts in its hour and day once, some minutes after it was stored: `rolled` has the number of the last one that
counts, changed in the same transaction. It is deleted only after that. The highest deleted number of each stream stays,
so that a report that is sent again after its deletion is still known as a duplicate.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from .base import DAY_S, Db, Engine

BEHIND_S = 300  # a transaction of another collector may be open for this long, with lower numbers
CHUNK = 5_000
LEAP_S, LONG_S, HELD_S = 3600.0, DAY_S, DAY_S
_MOST_WINDOWS = 100_000  # of one report that count for a mean: 2**32 * 1e5 * CHUNK is within a BIGINT
_MOST_SUM = 4 * 10**18
_SUMS = ("reports", "windows", "alarms", "score_sum_q8", "scored")
_TABLES = (("hourly", 3600), ("daily", DAY_S))


@dataclass(frozen=True)
class Keep:
    """For how many days; 0 is for ever."""

    reports: float = 90
    hourly: float = 400
    daily: float = 3650


class Trust:
    """Whether the clock may decide what is old. One that is a year ahead for a minute must not delete a year: after a
    leap of more than LEAP_S, or where nobody has looked at it for LONG_S, it has to be right for HELD_S first.
    looked_s: when it was looked at last, None where that is not known."""

    def __init__(
        self,
        looked_s: float | None,
        clock: Callable[[], float] = time.time,
        steady: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME),  # goes on while suspended
    ) -> None:
        self._clock, self._steady = clock, steady
        self._offset_s = clock() - steady()
        known = looked_s is not None and clock() - looked_s <= LONG_S
        self._until_s = steady() if known else steady() + HELD_S

    def __call__(self) -> bool:
        before_s, self._offset_s = self._offset_s, self._clock() - self._steady()
        if self._offset_s - before_s > LEAP_S:
            self._until_s = self._steady() + HELD_S
        return self._steady() >= self._until_s


class Retention:
    """deleted: called, after a deletion, with the highest number that each stream has lost."""

    def __init__(self, engine: Engine, keep: Keep, deleted: Callable[[dict[int, int]], None]) -> None:
        self._engine = engine
        self._deleted = deleted
        self._gone: dict[int, int] = {}
        self._keep = keep

    def step(self, now_s: float | None = None, delete: bool = True) -> bool:
        """One piece of work -> whether there is more. Raises StoreError with nothing changed."""
        now_s = time.time() if now_s is None else now_s
        self._gone = {}
        with self._engine.transaction() as db:
            more = self._roll(db, now_s)
            if delete and not more:
                more = self._delete_reports(db, now_s) or self._delete_rollups(db, now_s)
        if self._gone:
            self._deleted(self._gone)
        return more

    def _roll(self, db: Db, now_s: float) -> bool:
        db.execute("UPDATE rolled SET report = report WHERE id = 1")  # one collector at a time
        (last,) = db.execute("SELECT report FROM rolled WHERE id = 1").fetchone()
        top, fresh = db.execute(
            "SELECT max(id), min(CASE WHEN received_s > ? AND received_s <= ? THEN id END)"
            " FROM (SELECT id, received_s FROM reports WHERE id > ? ORDER BY id LIMIT ?) AS chunk",
            (now_s - BEHIND_S, now_s, last, CHUNK),
        ).fetchone()
        top = fresh - 1 if fresh is not None else top
        if top is None or top <= last:
            return False
        for table, span_s in _TABLES:
            db.execute(_roll_query(table, span_s), (last, top))
        db.execute("UPDATE rolled SET report = ? WHERE id = 1", (top,))
        return fresh is None

    def _delete_reports(self, db: Db, now_s: float) -> bool:
        if not self._keep.reports:
            return False
        before_s = now_s - self._keep.reports * DAY_S
        (last,) = db.execute("SELECT report FROM rolled WHERE id = 1").fetchone()
        top, count = db.execute(
            "SELECT max(id), count(*) FROM (SELECT id, received_s FROM reports WHERE id <= ? ORDER BY id LIMIT ?)"
            " AS chunk WHERE received_s < ?",
            (last, CHUNK, before_s),
        ).fetchone()
        if not count:
            return False
        old = db.execute(
            "SELECT stream, max(sequence) FROM reports WHERE id <= ? AND received_s < ? GROUP BY stream",
            (top, before_s),
        ).fetchall()
        db.executemany(
            "UPDATE streams SET forgotten = CASE WHEN forgotten < ? THEN ? ELSE forgotten END WHERE id = ?",
            [(sequence, sequence, stream) for stream, sequence in old],
        )
        db.execute("DELETE FROM reports WHERE id <= ? AND received_s < ?", (top, before_s))
        # SQLite gives the numbers above the highest one again: what comes under them counts, too
        (highest,) = db.execute("SELECT coalesce(max(id), 0) FROM reports").fetchone()
        db.execute("UPDATE rolled SET report = ? WHERE id = 1 AND report > ?", (highest, highest))
        self._gone = dict(old)
        return bool(count >= CHUNK)

    def _delete_rollups(self, db: Db, now_s: float) -> bool:
        for (table, _), days in zip(_TABLES, (self._keep.hourly, self._keep.daily), strict=True):
            if days:
                db.execute(f"DELETE FROM {table} WHERE at_s < ?", (int(now_s - days * DAY_S),))
        if self._keep.daily:  # decisions are few, and an auditor asks for them late
            db.execute("DELETE FROM decisions WHERE at_s < ?", (now_s - self._keep.daily * DAY_S,))
        return False


def _roll_query(table: str, span_s: int) -> str:
    """No device's numbers go beyond a BIGINT: an error would hold up the sums and deletions of all."""
    sums = ", ".join(
        f"{name} = CASE WHEN {table}.{name} > {_MOST_SUM} THEN {table}.{name} ELSE {table}.{name} + excluded.{name} END"
        for name in _SUMS
    )
    windows = f"CASE WHEN windows > {_MOST_WINDOWS} THEN {_MOST_WINDOWS} ELSE windows END"
    tops = ", ".join(
        f"{name} = CASE WHEN {table}.{name} IS NULL OR excluded.{name} > {table}.{name} THEN excluded.{name}"
        f" ELSE {table}.{name} END"
        for name in ("level", "score_max_q8")
    )
    columns = (
        "count(*)",
        "CAST(sum(windows) AS BIGINT)",
        "max(level)",
        "CAST(sum(CASE WHEN level = 2 THEN 1 ELSE 0 END) AS BIGINT)",
        f"CAST(coalesce(sum(score_q8 * ({windows})), 0) AS BIGINT)",
        f"CAST(sum(CASE WHEN score_q8 IS NULL THEN 0 ELSE {windows} END) AS BIGINT)",
        "max(score_max_q8)",
    )
    return (
        f"INSERT INTO {table} (device, at_s, reports, windows, level, alarms, score_sum_q8, scored, score_max_q8)"
        f" SELECT device, at_s - at_s % {span_s} AS at, {', '.join(columns)}"
        " FROM reports WHERE id > ? AND id <= ? AND windows > 0 GROUP BY device, at"
        f" ON CONFLICT (device, at_s) DO UPDATE SET {sums}, {tops}"
    )
