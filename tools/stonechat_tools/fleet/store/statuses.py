"""What a status, or a last will, does to the database."""

import json
from dataclasses import asdict, astuple

from ..keyring import Rejected
from ..wire import Status
from .base import DAY_S, Db, marks
from .known import NONE, Known


def put_status(db: Db, known: Known, place: int, at: int, status: Status, now_s: float) -> None:
    """place, at: of the device and its stream in `known`. Raises Rejected for one that is older than what is known."""
    device, stream = known.device[place], known.row[at]
    (number,) = db.execute("SELECT status_number FROM streams WHERE id = ?", (stream,)).fetchone()
    (current,) = db.execute("SELECT status_stream FROM devices WHERE id = ?", (device,)).fetchone()
    if status.online and status.number < number:
        raise Rejected("stale", "an older status")
    if current not in (None, stream) and (not status.online or status.number == number):
        raise Rejected("stale", "of an earlier start")
    if not status.online:  # the last will was written before the connection: it only says that it ended
        db.execute(
            "UPDATE devices SET online_since_s = CASE WHEN online = 0 THEN online_since_s ELSE ? END, online = 0,"
            " status_stream = ? WHERE id = ?",
            (now_s, stream, device),
        )
        return
    if status.number == number:
        return  # the broker's retained copy once more: it does not say that the device is there now
    if number and current not in (None, stream):  # a start that another one had followed: two of them run
        db.execute("UPDATE devices SET conflicts = conflicts + 1, conflict_s = ? WHERE id = ?", (now_s, device))
    if status.time_s is not None and status.time_s <= now_s + DAY_S:
        _began(db, known, at, status.time_s - status.uptime_s)
    db.execute("UPDATE streams SET status_number = ? WHERE id = ?", (status.number, stream))
    db.execute(
        "UPDATE devices SET online_since_s = CASE WHEN online = 1 THEN online_since_s ELSE ? END, online = 1,"
        " status_stream = ?, last_seen_s = ? WHERE id = ?",
        (now_s, stream, now_s, device),
    )
    db.execute(
        "INSERT INTO statuses (device, facts) VALUES (?, ?) ON CONFLICT (device) DO UPDATE SET facts = excluded.facts",
        (device, json.dumps(facts_of(status, now_s))),
    )
    update = status.update
    if update is not None:
        names = ("version", "slot", "trial", "tried", "result", "refusals", "stream", "schema_id", "at_s")
        values = (*astuple(update), status.stream, status.schema.hex() if status.schema else "", now_s)
        db.execute(
            f"INSERT INTO updates (device, {', '.join(names)}) VALUES (?, {marks(len(names))}) ON CONFLICT (device)"
            f" DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in names)}",
            (device, *values),
        )


def facts_of(status: Status, now_s: float) -> dict[str, object]:
    """What Store.devices() gives of a status."""
    return {
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
        "heartbeat_s": status.heartbeat_s,
        "sleep_s": status.sleep_s,
        "channels": list(status.channels),
        "own_model": status.own and asdict(status.own) | {"digest": status.own.digest.hex(), "shown": str(status.own)},
        "update": status.update
        and asdict(status.update)
        | {"reason": status.update.reason, "failed": status.update.failed, "shown": str(status.update)},
        "boot": status.boot,
        "stream": status.stream.hex(),
        "response": status.response and asdict(status.response) | {"shown": str(status.response)},
        "off_since_s": None if status.off_for_s is None else now_s - status.off_for_s,
        "steady_since_s": None if status.steady_s is None else now_s - status.steady_s,
    }


def _began(db: Db, known: Known, at: int, began_s: int) -> None:
    """The device's clock is set by now: give the stream's reports from before their times."""
    before, stream = known.began_s[at], known.row[at]
    if before == began_s:
        return
    if before != NONE and began_s < before - 60:  # its clock was put back: how far it is behind, nobody knows
        db.execute("UPDATE streams SET behind_s = NULL WHERE id = ?", (stream,))
        known.behind_s[at] = NONE
    db.execute("UPDATE streams SET began_s = ? WHERE id = ?", (began_s, stream))
    known.began_s[at] = began_s
    if before == NONE or abs(began_s - before) > 2:  # not for the clock's ordinary corrections
        db.execute(
            "UPDATE reports SET at_s = ? + uptime_s, at_known = 1 WHERE stream = ? AND uptime_s IS NOT NULL",
            (began_s, stream),
        )
