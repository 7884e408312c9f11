"""What is read from the database for tables, plots and checks. Each function raises StoreError."""

import json
from typing import Any

from .. import wire
from .base import Engine, Row, number

_DEVICE_COLUMNS = (
    "d.name, d.online, d.last_seen_s, d.reports, d.level, d.score_q8, d.evidence_q8, d.lost, s.facts,"
    " d.newest_sequence, d.conflicts, d.refused, d.online_since_s, d.conflict_s, d.heartbeat_windows, d.first_seen_s,"
    " d.key, d.flags"
)


def device_id(engine: Engine, device: str) -> int:
    """-1 for one that the database does not know."""
    rows = engine.rows("SELECT id FROM devices WHERE name = ?", (device,))
    return int(rows[0][0]) if rows else -1


def count(engine: Engine, device: str | None) -> int:
    if device is None:
        return int(engine.rows("SELECT count(*) FROM reports")[0][0])
    return int(engine.rows("SELECT count(*) FROM reports WHERE device = ?", (device_id(engine, device),))[0][0])


def sequences(engine: Engine, device: str) -> list[int]:
    query = "SELECT sequence FROM reports WHERE device = ? ORDER BY stream, sequence"
    return [row[0] for row in engine.rows(query, (device_id(engine, device),))]


def devices(engine: Engine, device: str | None = None, since_s: float | None = None) -> list[dict[str, Any]]:
    where: str = ""
    values: tuple[Any, ...] = ()
    if device is not None:
        where, values = " WHERE d.name = ?", (device,)
    elif since_s is not None:
        where = " WHERE d.last_seen_s >= ? OR d.online_since_s >= ? OR d.conflict_s >= ?"
        values = (since_s,) * 3
    query = f"SELECT {_DEVICE_COLUMNS} FROM devices d LEFT JOIN statuses s ON s.device = d.id{where} ORDER BY d.name"
    return [
        {
            "device": row[0],
            "online": None if row[1] is None else bool(row[1]),
            "last_seen_s": row[2],
            "reports": row[3],
            "level": row[4],
            "score": number(row[5]),
            "evidence": number(row[6]),
            "lost": row[7],
            "newest_sequence": row[9],
            "boot": None,
            "conflicts": row[10],
            "refused": row[11],
            "online_since_s": row[12],
            "conflict_s": row[13],
            "heartbeat_windows": row[14],
            "first_seen_s": row[15],
            "key": row[16],
            "flags": [name for bit, name in wire.FLAGS.items() if row[17] & bit],
            "window_ms": None,
            **json.loads(row[8] or "{}"),
        }
        for row in engine.rows(query, values)
    ]


def history(engine: Engine, device: str, since_s: float, until_s: float | None, limit: int, answers: bool) -> list[Row]:
    where = "" if answers else "AND r.windows > 0"
    rows = engine.rows(
        "SELECT s.stream, r.sequence, r.variant, r.at_s, r.at_known, r.late_s, r.body"
        " FROM reports r JOIN streams s ON s.id = r.stream"
        f" WHERE r.device = ? {where} AND r.at_s >= ? AND r.at_s <= ?"
        " ORDER BY r.at_s DESC, r.received_s DESC, r.stream DESC, r.sequence DESC, r.id DESC LIMIT ?",
        (device_id(engine, device), since_s, 1e12 if until_s is None else until_s, limit),
    )
    return [_row(device, row) for row in reversed(rows)]


def span(engine: Engine, device: str) -> tuple[float, float]:
    query = "SELECT MIN(at_s), MAX(at_s) FROM reports WHERE device = ?"
    oldest_s, newest_s = engine.rows(query, (device_id(engine, device),))[0]
    return (0.0, -1.0) if oldest_s is None else (oldest_s, newest_s)


def _row(device: str, row: tuple[Any, ...]) -> Row:
    report = wire.reread(device, bytes(row[6]))
    return Row(
        device=device,
        stream=bytes(row[0]).hex(),
        sequence=row[1],
        variant=row[2],
        boot=report.boot,
        time_s=row[3],
        time_known=bool(row[4]),
        late_s=row[5],
        level=report.level,
        flags=report.flags,
        windows=report.windows,
        score=number(report.score_q8),
        score_min=number(report.score_min_q8),
        score_max=number(report.score_max_q8),
        surprise=number(report.surprise_q8),
        evidence=number(report.evidence_q8),
        features=report.features,
        detail=report.detail,
        lost=report.lost,
        channel=report.channel,
    )


def listening(engine: Engine) -> tuple[float, float] | None:
    """Of the collectors that were there last: since when all of them, until when."""
    rows = engine.rows("SELECT since_s, until_s FROM listening")
    if not rows:
        return None
    until_s = max(row[1] for row in rows)
    return max(row[0] for row in rows if row[1] > until_s - 60.0), until_s


def rejections(engine: Engine) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for device, reason, times in engine.rows("SELECT device, reason, count FROM rejections ORDER BY 1, 2"):
        found.setdefault(device, {})[reason] = times
    return found


def answer(engine: Engine, device: str, sequence: int) -> int | None:
    values = (device_id(engine, device), sequence)
    rows = engine.rows("SELECT result FROM commands WHERE device = ? AND sequence = ?", values)
    return None if not rows or rows[0][0] is None else int(rows[0][0])


def commands(engine: Engine, device: str) -> list[dict[str, Any]]:
    rows = engine.rows(
        "SELECT sequence, sent_s, code, arguments, result, answered_s FROM commands WHERE device = ? ORDER BY sequence",
        (device_id(engine, device),),
    )
    names = ("sequence", "sent_s", "code", "arguments", "result", "answered_s")
    return [dict(zip(names, row[:3] + (json.loads(row[3]),) + row[4:], strict=True)) for row in rows]


def rollup(engine: Engine, device: str, table: str, since_s: float, until_s: float | None) -> list[dict[str, Any]]:
    """table: "hourly" or "daily" -> one entry for each hour or day that had reports."""
    assert table in ("hourly", "daily")
    rows = engine.rows(
        f"SELECT at_s, reports, windows, level, alarms, score_sum_q8, scored, score_max_q8 FROM {table}"
        " WHERE device = ? AND at_s >= ? AND at_s <= ? ORDER BY at_s",
        (device_id(engine, device), since_s, 1e12 if until_s is None else until_s),
    )
    return [
        {
            "time_s": row[0],
            "reports": row[1],
            "windows": row[2],
            "level": row[3],
            "alarms": row[4],
            "score_mean": row[5] / row[6] / 256 if row[6] else None,
            "score_max": number(row[7]),
        }
        for row in rows
    ]
