"""What a batch of reports and statuses does to the database, decided in memory and written in a few statements.

A report is named by (device, stream, sequence number): the device draws the stream at every start, so a number that
comes again after a flash was erased or an image restored is another report. The same bytes again are a duplicate. Other
bytes under the same name are a conflict: both are kept, so that whoever holds a stolen key can't keep a report out by
using its number first.

Of each device and its streams a few numbers stay in memory (known.py). A number above the highest of its stream is new;
the database is asked for all others only.
"""

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

from ..keyring import Rejected
from ..wire import Report, Status
from .base import CONFLICT, DAY_S, DUPLICATE, MAX_CACHED, STORED, Db, Engine, marks, pieces
from .decisions import decision_row, put_decisions
from .known import NONE, Known, key_number
from .rejections import put_rejections
from .schema import REPORT_COLUMNS
from .statuses import put_status

BEHIND_S = 5  # by which a stream's smallest delay has to fall until that is noted


class Ingest:
    """Holds what is remembered between batches; forget() drops it all, and the database is read again."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.forget()

    def forget(self) -> None:
        self._generation = -1
        self.known = Known()
        # Places of the streams that are not their device's last, by (row of the device, name of the stream).
        self._others: OrderedDict[tuple[int, bytes], int] = OrderedDict()

    def deleted(self, streams: dict[int, int]) -> None:
        """Reports were deleted: the highest number of each stream that was."""
        self.known.forget(streams)

    def put(
        self,
        db: Db,
        reports: Sequence[Report],
        statuses: Sequence[Status],
        rejections: Iterable[tuple[str, str]],
        refused: Iterable[str],
        now_s: float,
        stale: list[Status],
    ) -> list[str]:
        """One batch, within a transaction that the caller commits or, after an error, ends with forget()."""
        if self._generation != self._engine.generation:
            self.forget()
            self._generation = self._engine.generation
        refusals = Counter(refused)
        places = self.known.places
        missing = {report.device for report in reports if report.device not in places}
        missing |= {name for name in (*refusals, *(status.device for status in statuses)) if name not in places}
        if missing:
            self._load_devices(db, sorted(missing), now_s)
        counted = Counter(rejections)
        results = _Batch(self, db, now_s).put(reports, refusals, counted) if reports or refusals else []
        for status in statuses:
            device = places[status.device]
            stream = self.streams(db, [(device, status.stream, status.boot)], now_s)[0]
            try:
                put_status(db, self.known, device, stream, status, now_s)
            except Rejected as rejected:
                counted[status.device, rejected.reason] += 1
                stale.append(status)
        put_rejections(db, counted, now_s)
        while len(self._others) > MAX_CACHED:
            self.known.drop_stream(self._others.popitem(last=False)[1])
        return results

    def _load_devices(self, db: Db, missing: Sequence[str], now_s: float) -> None:
        for part in pieces(missing):
            wanted = {name: name for name in part}  # the caller's strings, which others keep, too
            for again in (False, True):
                columns = "name, id, key, newest_s, heartbeat_windows"
                query = f"SELECT {columns} FROM devices WHERE name IN ({marks(len(wanted))})"
                for name, *facts in db.execute(query, tuple(wanted)).fetchall():
                    self.known.add(wanted.pop(name), *facts)
                if again or not wanted:
                    break
                db.executemany(
                    "INSERT INTO devices (name, first_seen_s, last_seen_s) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                    [(name, now_s, now_s) for name in sorted(wanted)],
                )

    def streams(self, db: Db, wanted: Sequence[tuple[int, bytes, int]], now_s: float) -> list[int]:
        """wanted: (place of the device, stream, boot) -> the places of their streams, in this order."""
        known = self.known
        missing: dict[tuple[int, bytes], tuple[int, int]] = {}
        for device, name, boot in wanted:
            row = known.device[device]
            if not self._is_current(device, name) and (row, name) not in self._others:
                missing[row, name] = (device, boot)
        if missing:
            self._load_streams(db, missing, now_s)
        return [
            known.stream[device] if self._is_current(device, name) else self._others[known.device[device], name]
            for device, name, _ in wanted
        ]

    def _is_current(self, device: int, name: bytes) -> bool:
        return self.known.stream[device] >= 0 and self.known.stream_name[device] == int.from_bytes(name)

    def _load_streams(self, db: Db, missing: dict[tuple[int, bytes], tuple[int, int]], now_s: float) -> None:
        for part in pieces(list(missing)):
            wanted = set(part)
            ids = {device for device, _ in wanted}
            for again in (False, True):
                query = (
                    "SELECT s.device, s.stream, s.id, s.forgotten, s.began_s, s.behind_s,"
                    " (SELECT max(sequence) FROM reports r WHERE r.stream = s.id)"
                    f" FROM streams s WHERE s.device IN ({marks(len(ids))}) AND s.stream IN ({marks(len(wanted))})"
                )
                rows = db.execute(query, (*ids, *(name for _, name in wanted))).fetchall()
                for device, name, row, forgotten, began_s, behind_s, highest in rows:
                    key = (device, bytes(name))
                    if key in wanted:
                        wanted.discard(key)
                        highest = max(-1 if highest is None else highest, forgotten)
                        stream = self.known.add_stream(row, highest, forgotten, began_s, behind_s)
                        self._remember(missing[key][0], key, stream)
                if again or not wanted:
                    break
                db.executemany(
                    "INSERT INTO streams (device, stream, boot, first_seen_s) VALUES (?, ?, ?, ?)"
                    " ON CONFLICT DO NOTHING",
                    [(*key, missing[key][1], now_s) for key in sorted(wanted)],
                )

    def _remember(self, device: int, key: tuple[int, bytes], stream: int) -> None:
        """The stream that came last is its device's; the one before it goes among the others."""
        known = self.known
        if known.stream[device] >= 0:
            name = known.stream_name[device].to_bytes(len(key[1]))
            self._others[known.device[device], name] = known.stream[device]
        known.stream[device], known.stream_name[device] = stream, int.from_bytes(key[1])


class _Batch:
    """The reports of one batch. Devices and streams are meant by their places in `known`."""

    def __init__(self, ingest: Ingest, db: Db, now_s: float) -> None:
        self._ingest = ingest
        self._known = ingest.known
        self._db = db
        self._now_s = now_s
        self._now = int(now_s)
        self._clocks: set[int] = set()  # streams with another smallest delay
        # By device:
        self._counts: dict[int, int] = {}  # reports
        self._newest: dict[int, tuple[Any, ...]] = {}  # of its reports, if it is the device's newest
        self._resets: dict[int, str] = {}  # a new key
        self._conflicts: Counter[int] = Counter()

    def put(self, reports: Sequence[Report], refusals: Counter[str], counted: Counter[tuple[str, str]]) -> list[str]:
        known = self._known
        row, highest, newest_s, heartbeat = known.row, known.highest, known.newest_s, known.heartbeat
        devices = [known.places[report.device] for report in reports]
        streams = self._streams(devices, reports)
        bodies = self._stored(streams, reports)
        results = []
        rows: list[tuple[Any, ...]] = []
        answers: list[tuple[Any, ...]] = []
        decisions: list[tuple[Any, ...]] = []
        lost: dict[int, tuple[int, int]] = {}
        for report, device, stream in zip(reports, devices, streams, strict=True):
            sequence = report.sequence
            if sequence > highest[stream]:
                highest[stream] = sequence
                bodies[stream << 32 | sequence] = [report.body]
                result, variant = STORED, 0
            else:
                result, variant = self._name(report, stream, bodies)
            results.append(result)
            if result is DUPLICATE:
                continue
            at_s, at_known, order_s = self._when(stream, report)
            rows.append(
                (
                    known.device[device],
                    row[stream],
                    sequence,
                    variant,
                    at_s,
                    at_known,
                    report.uptime_s,
                    self._now_s,
                    report.late_s,
                    report.level,
                    report.flags,
                    report.windows,
                    report.score_q8,
                    report.score_max_q8,
                    report.body,
                )
            )
            if report.answer:
                answers.append((known.device[device], *report.answer, self._now_s))
            if report.decision and result is not CONFLICT:
                decisions.append(decision_row(known.device[device], row[stream], report, at_s))
            if report.lost:
                lost[stream] = (known.device[device], max(report.lost, lost.get(stream, (0, 0))[1]))
            self._counts[device] = self._counts.get(device, 0) + 1
            key = report.key
            trusted = not key or key_number(key) == known.key[device] or self._begin_anew(report, device)
            if report.windows:
                # How many windows pass between reports: known at once where it grows, slowly where it shrinks.
                beat = heartbeat[device]
                if report.windows != beat:
                    heartbeat[device] = max(report.windows, beat - (beat + 7) // 8)
                if trusted and (newest_s[device] <= order_s or newest_s[device] > self._now):
                    newest_s[device] = order_s
                    self._newest[device] = (
                        sequence,
                        report.level,
                        report.flags,
                        report.score_q8,
                        report.evidence_q8,
                        known.device[device],
                    )
            if result is CONFLICT:
                self._conflicts[device] += 1
                counted[report.device, "conflict"] += 1
        if rows:
            self._ingest._engine.append(self._db, "reports", REPORT_COLUMNS, rows)
        put_decisions(self._db, decisions)
        self._write(answers, lost, {known.places[name]: count for name, count in refusals.items()})
        return results

    def _streams(self, devices: Sequence[int], reports: Sequence[Report]) -> list[int]:
        """Of each report; most are of their device's current one."""
        known = self._known
        current, names, number = known.stream, known.stream_name, int.from_bytes
        streams = [
            current[device] if names[device] == number(report.stream) else -1
            for device, report in zip(devices, reports, strict=True)
        ]
        if -1 not in streams:
            return streams
        wanted = [(device, report.stream, report.boot) for device, report in zip(devices, reports, strict=True)]
        return self._ingest.streams(self._db, wanted, self._now_s)

    def _stored(self, streams: Sequence[int], reports: Sequence[Report]) -> dict[int, list[bytes]]:
        """The bodies in the database under the names of these reports that it may have, by stream << 32 | sequence;
        none for those that have none."""
        highest, row = self._known.highest, self._known.row
        asked = {
            (row[stream], report.sequence): stream << 32 | report.sequence
            for stream, report in zip(streams, reports, strict=True)
            if report.sequence <= highest[stream]
        }
        found: dict[int, list[bytes]] = {}
        for part in pieces(sorted(asked), 400):
            query = (
                f"WITH wanted (s, n) AS (VALUES {','.join(['(?,?)'] * len(part))})"
                " SELECT r.stream, r.sequence, r.body FROM wanted JOIN reports r ON r.stream = s AND r.sequence = n"
                " ORDER BY r.variant"
            )
            for stream, sequence, body in self._db.execute(
                query, [value for name in part for value in name]
            ).fetchall():
                found.setdefault(asked[stream, sequence], []).append(bytes(body))
        return found

    def _name(self, report: Report, stream: int, bodies: dict[int, list[bytes]]) -> tuple[str, int]:
        """Of a number that is not above its stream's highest -> (STORED, DUPLICATE or CONFLICT; the variant to store it
        as)."""
        name = stream << 32 | report.sequence
        stored = bodies.get(name)
        if stored is None:
            if report.sequence <= self._known.forgotten[stream]:  # so long ago that its like is deleted
                return DUPLICATE, 0
            bodies[name] = [report.body]
            return STORED, 0
        if report.body in stored:
            return DUPLICATE, 0
        stored.append(report.body)
        return CONFLICT, 1 + (int.from_bytes(hashlib.sha256(report.body).digest()[:8]) >> 2)

    def _when(self, stream: int, report: Report) -> tuple[int, int, int]:
        """-> (time of the event, 1 where that is known, its place in the order of the device's events).

        The device's own clock counts where it is plausible: not ahead of ours, and not behind it by more than the
        delay of the stream's promptest report. No event is later than its arrival, so a wrong clock, or a report that
        was made up, doesn't outlive the next one."""
        received_s = self._now
        if report.time_s is not None:
            if report.time_s > received_s + DAY_S:
                return received_s, 0, received_s
            behind_s = self._known.behind_s[stream]
            if report.late_s is None:
                delay_s = max(0, received_s - report.time_s)
                if behind_s == NONE or delay_s < behind_s - BEHIND_S or delay_s == 0 < behind_s:
                    behind_s = self._known.behind_s[stream] = delay_s
                    self._clocks.add(stream)
            behind_s = max(0, behind_s)
            order_s = min(received_s, report.time_s + behind_s)
            return (order_s, 0, order_s) if behind_s > DAY_S else (report.time_s, 1, order_s)
        if report.late_s is None:
            order_s = received_s
        elif report.late_s >= 0:
            order_s = received_s - report.late_s
        else:  # history of an unknown age
            order_s = 0
        began_s = self._known.began_s[stream]
        if began_s != NONE:
            own_s = began_s + (report.uptime_s or 0)
            return own_s, 1, min(received_s, own_s) if report.late_s == -1 else order_s
        return order_s or received_s, int(report.late_s is not None and report.late_s >= 0), order_s

    def _begin_anew(self, report: Report, device: int) -> bool:
        """Whether a report under another key than the device's may say what level it has. One under a new key begins
        the device anew, and from then on none under the old key does."""
        known = self._known
        if known.key[device] and not report.current:
            return False
        known.key[device] = key_number(report.key)
        known.newest_s[device] = NONE
        self._resets[device] = report.key
        self._newest.pop(device, None)
        self._conflicts.pop(device, None)
        return True

    def _write(self, answers: list[tuple[Any, ...]], lost: dict[int, tuple[int, int]], refused: dict[int, int]) -> None:
        db, known = self._db, self._known
        if answers:
            db.executemany(
                "INSERT INTO commands (device, sequence, result, answered_s) VALUES (?, ?, ?, ?)"
                " ON CONFLICT (device, sequence) DO UPDATE SET result = excluded.result,"
                " answered_s = excluded.answered_s",
                answers,
            )
        if self._clocks:
            db.executemany(
                "UPDATE streams SET behind_s = ? WHERE id = ?",
                [(known.behind_s[stream], known.row[stream]) for stream in self._clocks],
            )
        if lost:
            db.executemany(
                "UPDATE streams SET lost = CASE WHEN lost < ? THEN ? ELSE lost END WHERE id = ?",
                [(count, count, known.row[stream]) for stream, (_, count) in lost.items()],
            )
            db.executemany(
                "UPDATE devices SET lost = (SELECT sum(lost) FROM streams WHERE device = ?) WHERE id = ?",
                [(device, device) for device in sorted({device for device, _ in lost.values()})],
            )
        now_s = self._now_s
        counts, newest, heartbeat, row = self._counts, self._newest, known.heartbeat, known.device.__getitem__
        # Each in the order of the rows: one order of locks for all collectors.
        if self._resets:
            db.executemany(
                "UPDATE devices SET key = ?, newest_s = NULL, conflicts = 0, refused = 0 WHERE id = ?",
                [(self._resets[device], row(device)) for device in sorted(self._resets, key=row)],
            )
        if newest:
            db.executemany(
                "UPDATE devices SET reports = reports + ?, last_seen_s = ?, heartbeat_windows = ?, newest_s = ?,"
                " newest_sequence = ?, level = ?, flags = ?, score_q8 = ?, evidence_q8 = ? WHERE id = ?",
                [
                    (counts[device], now_s, heartbeat[device], known.newest_s[device], *newest[device])
                    for device in sorted(newest, key=row)
                ],
            )
        if len(newest) < len(counts):
            db.executemany(
                "UPDATE devices SET reports = reports + ?, last_seen_s = ?, heartbeat_windows = ? WHERE id = ?",
                [
                    (counts[device], now_s, heartbeat[device], row(device))
                    for device in sorted(counts.keys() - newest.keys(), key=row)
                ],
            )
        conflicts = self._conflicts
        if conflicts or refused:
            db.executemany(
                "UPDATE devices SET conflicts = conflicts + ?, refused = refused + ?,"
                " conflict_s = CASE WHEN ? > 0 THEN ? ELSE conflict_s END WHERE id = ?",
                [
                    (conflicts[device], refused.get(device, 0), conflicts[device], now_s, row(device))
                    for device in sorted(conflicts.keys() | refused.keys(), key=row)
                ],
            )
