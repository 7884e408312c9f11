"""Roll-outs of releases, and what each device did with them. Each function raises StoreError, with nothing changed.

A roll-out's devices: due (its turn has come), pulling, pulled (it has all of the release), trial, confirmed (final, and
watched for a while), then good, failed, passed (it has a later release by now) or withdrawn; off while its user has
switched monitoring off, then due again.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from stonechat.slots import CONFIRMED, UNCONFIRMED

from ..rollout import Rollout, Stage
from ..wire_release import UpdateState
from .base import DAY_S, Db
from .releases import COLUMNS, Manifests, Release, of_row

if TYPE_CHECKING:
    from .store import Store

RUNNING, PAUSED, HALTED, WITHDRAWN, DONE = "running", "paused", "halted", "withdrawn", "done"
LIVE = (RUNNING, PAUSED, HALTED)
OPEN = ("due", "pulling", "pulled", "trial")
OFF = "off"
LEFT = "is no longer in the class"  # why a device is passed over that may come back
HAVE = ("trial", "confirmed", "good")


@dataclass(slots=True)
class RolloutRow:
    """One roll-out. site: only devices there, empty for all. since_s: of its stage; judged_s: when a collector last
    did; tests: as Rollout.dump() gives them, and "day", the last day that they know."""

    id: int
    release: Release
    site: str
    state: str
    stages: tuple[Stage, ...]
    stage: int
    began_s: float
    since_s: float
    judged_s: float
    tests: dict[str, Any]
    evidence: dict[str, Any]

    @property
    def stage_name(self) -> str:
        return str(self.stages[self.stage])

    def __str__(self) -> str:
        return f"{self.release}" + (f" at {self.site}" if self.site else "")


@dataclass(slots=True)
class Member:
    """A device of a roll-out, and what its last status reports; update is None before there is one. offer: number of
    the last offer to it."""

    rollout: int
    id: int
    name: str
    state: str
    since_s: float
    taken_s: float | None
    until_s: float | None
    lost: int
    result: str = ""
    update: UpdateState | None = None
    stream: bytes = b""
    status_s: float = 0.0
    offer: int = 0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A device that takes updates. online: False after its last will, None where that is not known; ended: the version
    whose update ended otherwise than by a confirmation, 0 for none."""

    id: int
    name: str
    online: bool | None
    last_seen_s: float
    version: int
    ended: int


@dataclass(slots=True)
class DayGroup:
    """One day of the devices with a release, or of those without it. alarmed: devices with an alarm; the shares: sums
    over the group of alarm days / (days + prior) and of 1 / (days + prior), from which the sum of usual() follows."""

    alarmed: int = 0
    alarm_share: float = 0.0
    prior_share: float = 0.0


@dataclass(slots=True)
class Day:
    with_it: DayGroup = field(default_factory=DayGroup)
    without: DayGroup = field(default_factory=DayGroup)
    alarm_days: int = 0  # of all, before
    days: int = 0


# --- roll-outs --------------------------------------------------------------------------------------------------------

_ROLLOUT = "r.id, r.site, r.state, r.stages, r.stage, r.began_s, r.since_s, r.judged_s, r.tests, r.evidence"


def rollouts(store: "Store", device_class: str | None = None, version: int | None = None) -> list[RolloutRow]:
    """The oldest first."""
    values: list[Any] = []
    where = ""
    for name, value in (("class", device_class), ("version", version)):
        if value is not None:
            where += f" AND x.{name} = ?"
            values.append(value)
    return _rollouts(store, where, values)


def _rollouts(source: Any, where: str, values: Sequence[Any]) -> list[RolloutRow]:
    """source: a Store, or a transaction."""
    query = (
        f"SELECT {_ROLLOUT}, {COLUMNS} FROM rollouts r JOIN releases x ON x.id = r.release WHERE 1 = 1{where}"
        " ORDER BY r.id"
    )
    rows = source.rows(query, values) if hasattr(source, "rows") else source.execute(query, values).fetchall()
    return [
        RolloutRow(
            row[0],
            of_row(row[10:]),
            row[1],
            row[2],
            tuple(Stage(**stage) for stage in json.loads(row[3])),
            row[4],
            row[5],
            row[6],
            row[7],
            json.loads(row[8]),
            json.loads(row[9]),
        )
        for row in rows
    ]


def begin(store: "Store", release: Release, site: str, stages: tuple[Stage, ...], by: str, now_s: float) -> str:
    """Begin a roll-out, unless one of the same class and of the same devices goes on -> what that is, or "". One of an
    older version that has expired goes on for nobody."""
    manifests = Manifests(store)
    known = rollouts(store, release.device_class)
    over = {
        row.id for row in known if manifests.expired(row.release.id, now_s) and row.release.version < release.version
    }
    with store.transaction() as db:
        db.execute("UPDATE releases SET class = class WHERE class = ?", (release.device_class,))  # one at a time
        for other in _rollouts(db, " AND x.class = ?", (release.device_class,)):
            same = other.site == site or not site or not other.site
            later = other.state == DONE and other.release.version > release.version
            if same and (other.state in LIVE and other.id not in over or later or other.release.id == release.id):
                return f"{other} is {other.state}"
        tests = Rollout(now_s).dump()
        db.execute(
            "INSERT INTO rollouts (release, site, state, stages, stage, began_s, since_s, tested_s, judged_s, tests,"
            " evidence) VALUES (?, ?, ?, ?, 0, ?, ?, ?, 0, ?, '{}')",
            (
                release.id,
                site,
                RUNNING,
                json.dumps([asdict(stage) for stage in stages]),
                now_s,
                now_s,
                now_s,
                json.dumps(tests),
            ),
        )
        (number,) = db.execute("SELECT max(id) FROM rollouts").fetchone()
        note(db, number, now_s, by, f"begun: {stages[0]} first", {})
    return ""


def change(store: "Store", rollout: int, states: Sequence[str], state: str, by: str, why: str, now_s: float) -> str:
    """By an operator, from one of `states` to another one -> "", or the state that it is in instead."""
    with store.transaction() as db:
        db.execute("UPDATE rollouts SET state = state WHERE id = ?", (rollout,))  # no collector judges it meanwhile
        (row,) = _rollouts(db, " AND r.id = ?", (rollout,))
        if row.state not in states:
            return row.state
        db.execute("UPDATE rollouts SET state = ? WHERE id = ?", (state, rollout))
        if state == RUNNING and row.state == HALTED:
            fresh = Rollout(now_s).dump() | {"day": int(now_s // 86_400)}
            db.execute(
                "UPDATE rollouts SET tests = ?, tested_s = ?, evidence = '{}' WHERE id = ?",
                (json.dumps(fresh), now_s, rollout),
            )
            db.execute(  # nobody confirmed them, because of the halt: their turn comes again
                "UPDATE rollout_devices SET state = 'due', since_s = ?, taken_s = NULL, until_s = NULL, counted = 0,"
                " result = '' WHERE rollout = ? AND state = 'failed' AND result = ? AND since_s >= ?",
                (now_s, rollout, UpdateState.RESULTS[UNCONFIRMED], row.evidence.get("at_s", 0.0)),
            )
        if state == RUNNING:  # nothing was served meanwhile
            db.execute(
                "UPDATE rollout_devices SET since_s = ? WHERE rollout = ? AND state IN ('due', 'pulling', 'pulled')",
                (now_s, rollout),
            )
        if state == WITHDRAWN:
            db.execute(
                "UPDATE rollout_devices SET state = 'withdrawn', since_s = ? WHERE rollout = ?"
                " AND state NOT IN ('good', 'failed', 'passed')",
                (now_s, rollout),
            )
        note(db, rollout, now_s, by, state, {"why": why} if why else {})
    return ""


def note(db: Db, rollout: int, now_s: float, actor: str, what: str, evidence: dict[str, Any]) -> None:
    """One line of a roll-out's log."""
    db.execute(
        "INSERT INTO rollout_log (rollout, at_s, actor, what, evidence) VALUES (?, ?, ?, ?, ?)",
        (rollout, now_s, actor, what, json.dumps(evidence)),
    )


def log(store: "Store", rollout: int, limit: int = 50) -> list[dict[str, Any]]:
    """The latest lines, the oldest first."""
    rows = store.rows(
        "SELECT at_s, actor, what, evidence FROM rollout_log WHERE rollout = ? ORDER BY id DESC LIMIT ?",
        (rollout, limit),
    )
    return [
        {"at_s": at_s, "by": actor, "what": what, "evidence": json.loads(evidence)}
        for at_s, actor, what, evidence in reversed(rows)
    ]


def claim(db: Db, rollout: int, before_s: float, now_s: float) -> RolloutRow | None:
    """Be the one that judges a roll-out until the transaction ends; None where another collector has since before_s."""
    ahead_s = now_s + 60  # a clock may have been put back
    if db.execute("UPDATE rollouts SET judged_s = 0 WHERE id = ? AND judged_s > ?", (rollout, ahead_s)).rowcount:
        _put_back(db, rollout, now_s)
    query = "UPDATE rollouts SET judged_s = ? WHERE id = ? AND judged_s <= ?"
    made = db.execute(query, (now_s, rollout, before_s))
    return _rollouts(db, " AND r.id = ?", (rollout,))[0] if made.rowcount else None


def _put_back(db: Db, rollout: int, now_s: float) -> None:
    """The clock was ahead: what was noted by it has happened by now, and nothing waits until then."""
    for table, key, column, latest_s in (
        ("rollouts", "id", "since_s", now_s),
        ("rollout_devices", "rollout", "since_s", now_s),
        ("rollout_devices", "rollout", "taken_s", now_s),
        ("rollout_devices", "rollout", "until_s", now_s + DAY_S),  # they are watched for a day at most
    ):
        query = f"UPDATE {table} SET {column} = ? WHERE {key} = ? AND {column} > ?"
        db.execute(query, (latest_s, rollout, latest_s))


def save(db: Db, row: RolloutRow) -> None:
    db.execute(
        "UPDATE rollouts SET state = ?, stage = ?, since_s = ?, tests = ?, evidence = ? WHERE id = ?",
        (row.state, row.stage, row.since_s, json.dumps(row.tests), json.dumps(row.evidence), row.id),
    )


# --- devices ----------------------------------------------------------------------------------------------------------

_MEMBER = (
    "SELECT m.rollout, m.device, d.name, m.state, m.since_s, m.taken_s, m.until_s, m.lost, m.result, u.version, u.slot,"
    " u.trial, u.tried, u.result, u.refusals, u.stream, u.at_s, u.offer FROM rollout_devices m"
    " JOIN devices d ON d.id = m.device LEFT JOIN updates u ON u.device = m.device"
)


def _member(row: Sequence[Any]) -> Member:
    found = Member(*row[:9])
    if row[9] is not None:
        found.update, found.stream, found.status_s = UpdateState(*row[9:15]), bytes(row[15]), row[16]
        found.offer = row[17]
    return found


def members(store: "Store", rollout: int, states: Sequence[str], limit: int = 10_000) -> list[Member]:
    """Those in one of `states`, the latest first."""
    query = f"{_MEMBER} WHERE m.rollout = ? AND m.state IN ({','.join('?' * len(states))})"
    return [_member(row) for row in store.rows(query + " ORDER BY m.since_s DESC LIMIT ?", (rollout, *states, limit))]


def watched(store: "Store", rollout: int, now_s: float, after: tuple[float, int], limit: int) -> list[Member]:
    """Those confirmed whose time to be watched is over, after (until_s, device), in this order."""
    query = (
        f"{_MEMBER} WHERE m.rollout = ? AND m.state = 'confirmed' AND m.until_s <= ?"
        " AND (m.until_s > ? OR m.until_s = ? AND m.device > ?) ORDER BY m.until_s, m.device LIMIT ?"
    )
    return [_member(row) for row in store.rows(query, (rollout, now_s, after[0], after[0], after[1], limit))]


def to_withdraw(store: "Store", rollout: int, version: int, limit: int) -> list[Member]:
    """Those that have a withdrawn version, or try it, and are there; who was heard last comes first."""
    query = (
        f"{_MEMBER} WHERE m.rollout = ? AND (u.version = ? AND u.trial = 0 OR u.trial <> 0 AND u.tried = ?)"
        " AND (d.online IS NULL OR d.online = 1) ORDER BY d.last_seen_s DESC LIMIT ?"
    )
    return [_member(row) for row in store.rows(query, (rollout, version, version, limit))]


def keep(store: "Store", changed: Iterable[Member], offered: Iterable[Member] = ()) -> None:
    """Write down what devices did, and the numbers of offers before these leave; what has ended stays as it is."""
    with store.transaction() as db:
        db.executemany(
            "UPDATE updates SET offer = ? WHERE device = ? AND offer < ?", [(m.offer, m.id, m.offer) for m in offered]
        )
        db.executemany(
            "UPDATE rollout_devices SET state = ?, since_s = ?, taken_s = ?, until_s = ?, lost = ?, result = ?"
            " WHERE rollout = ? AND device = ? AND state NOT IN ('good', 'failed', 'passed', 'withdrawn')",
            [(m.state, m.since_s, m.taken_s, m.until_s, m.lost, m.result, m.rollout, m.id) for m in changed],
        )


def leave(store: "Store", gone: Iterable[Member]) -> None:
    """Take out devices that were away when their turn came: it comes again."""
    with store.transaction() as db:
        db.executemany(
            "DELETE FROM rollout_devices WHERE rollout = ? AND device = ? AND state = 'due'",
            [(m.rollout, m.id) for m in gone],
        )


def counts(source: Any, rollout: int) -> dict[str, int]:
    """How many devices are in each state. source: a Store, or a transaction."""
    query = "SELECT state, count(*) FROM rollout_devices WHERE rollout = ? GROUP BY state"
    rows = source.rows(query, (rollout,)) if hasattr(source, "rows") else source.execute(query, (rollout,)).fetchall()
    return {state: int(count) for state, count in rows}


def failures(source: Any, rollout: int, limit: int) -> list[tuple[str, str]]:
    """(device, why) of the latest."""
    query = (
        "SELECT d.name, m.result FROM rollout_devices m JOIN devices d ON d.id = m.device WHERE m.rollout = ?"
        " AND m.state = 'failed' ORDER BY m.since_s DESC LIMIT ?"
    )
    values = (rollout, limit)
    rows = source.rows(query, values) if hasattr(source, "rows") else source.execute(query, values).fetchall()
    return [(name, result) for name, result in rows]


def versions(store: "Store") -> list[tuple[str, int, int]]:
    """(device, its final version, the version on trial or 0) of all that take updates, by device."""
    query = (
        "SELECT d.name, u.version, CASE WHEN u.trial <> 0 THEN u.tried ELSE 0 END FROM updates u"
        " JOIN devices d ON d.id = u.device ORDER BY d.name"
    )
    return [(name, version, trial) for name, version, trial in store.rows(query)]


def remaining(store: "Store", rollout: int, version: int) -> int:
    """How many devices still have, or try, a withdrawn version."""
    query = (
        "SELECT count(*) FROM rollout_devices m JOIN updates u ON u.device = m.device WHERE m.rollout = ?"
        " AND (u.version = ? OR u.trial <> 0 AND u.tried = ?)"
    )
    return int(store.rows(query, (rollout, version, version))[0][0])


def uncounted(db: Db, rollout: int) -> list[bool]:
    """Whether each device failed whose outcome no test knows yet, in their order; from now on they are counted."""
    rows = db.execute(
        "UPDATE rollout_devices SET counted = 1 WHERE rollout = ? AND counted = 0 AND state IN ('good', 'failed')"
        " RETURNING since_s, device, state",
        (rollout,),
    ).fetchall()
    return [state == "failed" for _, _, state in sorted(rows)]


def candidates(db: Db, schema: str) -> list[Candidate]:
    """Devices that take updates, of a model's schema or, where that is empty, of any."""
    where, values = (" WHERE u.schema_id = ?", (schema,)) if schema else ("", ())
    query = (
        "SELECT d.id, d.name, d.online, d.last_seen_s, u.version, CASE WHEN u.result > ? THEN u.tried ELSE 0 END"
        " FROM updates u JOIN devices d ON d.id = u.device"
    )
    values = (CONFIRMED, *values)
    return [
        Candidate(row[0], row[1], None if row[2] is None else bool(row[2]), *row[3:])
        for row in db.execute(query + where, values).fetchall()
    ]


def taken(db: Db, rollout: int) -> dict[int, tuple[str, float | None, str]]:
    """By device: its state, when it took the release, and the result."""
    query = "SELECT device, state, taken_s, result FROM rollout_devices WHERE rollout = ?"
    return {row[0]: (row[1], row[2], row[3]) for row in db.execute(query, (rollout,)).fetchall()}


def join(db: Db, rollout: int, devices: Iterable[int], now_s: float) -> None:
    """Their turn has come, or comes again; what the tests know of a device already is not counted twice."""
    db.executemany(
        "INSERT INTO rollout_devices (rollout, device, state, since_s) VALUES (?, ?, 'due', ?) ON CONFLICT"
        " (rollout, device) DO UPDATE SET state = 'due', since_s = excluded.since_s, taken_s = NULL, until_s = NULL,"
        " result = ''",
        [(rollout, device, now_s) for device in devices],
    )


def add_to_day(
    db: Db, found: Day, group: DayGroup, at_s: int, history: tuple[int, int], prior_days: float, devices: Sequence[int]
) -> None:
    """Add some devices of a group (at most MAX_IN) to the day that begins at at_s. history: (from, until) by which
    devices are compared. Only those count that reported on the day."""
    marks = ",".join("?" * len(devices))
    rows = db.execute(
        "SELECT t.alarms, coalesce(h.alarm_days, 0), coalesce(h.days, 0) FROM daily t LEFT JOIN"
        " (SELECT device, sum(CASE WHEN alarms > 0 THEN 1 ELSE 0 END) AS alarm_days, count(*) AS days"
        f" FROM daily WHERE at_s >= ? AND at_s < ? AND device IN ({marks}) GROUP BY device) h"
        f" ON h.device = t.device WHERE t.at_s = ? AND t.device IN ({marks})",
        (*history, *devices, at_s, *devices),
    ).fetchall()
    for alarms, alarm_days, days in rows:
        group.alarmed += alarms > 0
        group.alarm_share += float(alarm_days) / (days + prior_days)
        group.prior_share += 1 / (days + prior_days)
        found.alarm_days += int(alarm_days)
        found.days += days
