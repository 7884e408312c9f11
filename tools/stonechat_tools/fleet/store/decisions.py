"""Decisions of the devices' responses: a row is one report; what began and what ended are joined as they are read."""

import json
from dataclasses import asdict
from typing import Any

from ..wire import Report
from ..wire_response import BEGAN, ENDED, ENDS, FAMILIES, Decision
from .base import Db, Engine


def decision_row(device: int, stream: int, report: Report, at_s: float) -> tuple[Any, ...]:
    assert report.decision is not None
    facts = asdict(report.decision) | {
        "level": report.level,
        "channel": report.channel,
        "features": [[f.index, f.deviation, f.share_percent] for f in report.features],
    }
    decided = report.decision
    return (device, stream, report.sequence, at_s, decided.lease, decided.kind, json.dumps(facts))


def put_decisions(db: Db, rows: list[tuple[Any, ...]]) -> None:
    if rows:
        db.executemany(
            "INSERT INTO decisions (device, stream, sequence, at_s, lease, kind, facts) VALUES (?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT DO NOTHING",
            rows,
        )


def decisions(engine: Engine, device: str | None, since_s: float, limit: int) -> list[dict[str, Any]]:
    """Newest first, one entry for each: began_s, or None where that report has not arrived (yet); end_s and `end`, or
    None while it is in force or where it has none; the rest as in a Decision, and level, channel and features of the
    cause. A failure is an entry of its own."""
    where, values = ("", []) if device is None else (" AND v.name = ?", [device])
    rows = engine.rows(
        "SELECT v.name, d.stream, d.sequence, d.at_s, d.facts FROM decisions d JOIN devices v ON v.id = d.device"
        f" WHERE d.at_s >= ?{where} ORDER BY d.at_s DESC, d.stream DESC, d.sequence DESC LIMIT ?",
        (since_s, *values, 2 * limit),
    )
    found: list[dict[str, Any]] = []
    ended: dict[tuple[str, int, int], dict[str, Any]] = {}
    for name, stream, _, at_s, text in rows:
        facts = json.loads(text)
        more = {key: facts.pop(key) for key in ("level", "channel", "features")}
        decided = Decision(**facts)
        entry = {"device": name, "began_s": at_s, "end_s": None, "text": str(decided)} | facts | more
        entry["end"] = None
        entry["families"] = [word for bit, word in FAMILIES.items() if decided.families & bit]
        key = (name, stream, decided.lease)
        if decided.kind == ENDED:
            entry |= {"began_s": None, "end_s": at_s, "end": ENDS[decided.end]}
            ended[key] = entry
        elif decided.kind == BEGAN and decided.lease and key in ended:
            later = ended.pop(key)
            later |= {"began_s": at_s} | more | {"families": entry["families"]}
            continue
        found.append(entry)
    return found[:limit]
