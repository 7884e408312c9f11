"""What a batch of reports and statuses does to the database, decided in memory and written in a few statements.

A report is named by (device, stream, sequence number): the device draws the stream at every start, so a number that
comes again after a flash was erased or an image restored is another report. The same bytes again are a duplicate. Other
bytes under the same name are a conflict: both are kept, so that whoever holds a stolen key can't keep a report out by
using its number first.

Of each device and its current stream a few numbers stay in memory, those of large fleets packed until a batch has them.
A number above the highest of its stream is new; the database is asked for all others only.
"""

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

from ..keyring import Rejected
from ..wire import Report, Status
from .base import (
    CONFLICT,
    DAY_S,
    DUPLICATE,
    MAX_CACHED,
    STORED,
    Db,
    Device,
    Engine,
    Stream,
    marks,
    packed_stream,
    pieces,
)
from .decisions import decision_row, put_decisions
from .rejections import put_rejections
from .schema import REPORT_COLUMNS
from .statuses import put_status

_by_id = attrgetter("id")
MAX_LIVE = 20_000  # devices that are not packed between batches: quicker, at three times the memory
BEHIND_S = 5  # by which a stream's smallest delay has to fall until that is noted


class Ingest:
    """Holds what is remembered between batches; forget() drops it all, and the database is read again."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._generation = -1
        self._kept: dict[str, Device | bytes] = {}  # every device that was heard, between batches
        self._live = 0  # of these, how many are not packed
        self._devices: dict[str, Device] = {}  # those of this batch
        self._others: OrderedDict[tuple[int, bytes], Stream] = OrderedDict()  # streams that are not their device's last

    def forget(self) -> None:
        self._generation = -1
        self._kept.clear()
        self._live = 0
        self._devices.clear()
        self._others.clear()

    def deleted(self, streams: dict[int, int]) -> None:
        """Reports were deleted: the highest number of each stream that was."""
        held = [*self._others.values()]
        for name, kept in self._kept.items():
            if not isinstance(kept, bytes):
                held += [] if kept.stream is None else [kept.stream]
            elif packed_stream(kept) in streams:
                device = Device.unpack(kept)
                assert device.stream is not None
                device.stream.forgotten = max(device.stream.forgotten, streams[device.stream.id])
                self._kept[name] = device.pack()
        for stream in held:
            stream.forgotten = max(stream.forgotten, streams.get(stream.id, -1))

    def put(
        self,
        db: Db,
        reports: Sequence[Report],
        statuses: Sequence[Status],
        rejections: Iterable[tuple[str, str]],
        refused: Iterable[str],
        now_s: float,
    ) -> list[str]:
        """One batch, within a transaction that the caller commits or, after an error, ends with forget()."""
        if self._generation != self._engine.generation:
            self.forget()
            self._generation = self._engine.generation
        refusals = Counter(refused)
        self._load_devices(db, {r.device for r in reports} | {s.device for s in statuses} | refusals.keys(), now_s)
        counted = Counter(rejections)
        results = _Batch(self, db, now_s).put(reports, refusals, counted) if reports or refusals else []
        for status in statuses:
            device = self._devices[status.device]
            stream = self.streams(db, [(device, status.stream, status.boot)], now_s)[0]
            try:
                put_status(db, device, stream, status, now_s)
            except Rejected as rejected:
                counted[status.device, rejected.reason] += 1
        put_rejections(db, counted, now_s)
        for name, device in self._devices.items():
            kept = self._kept.get(name)
            if kept is device:
                device.begin()
            elif kept is None and self._live < MAX_LIVE:
                self._live += 1
                self._kept[name] = device
                device.begin()
            else:
                self._kept[name] = device.pack()
        self._devices.clear()
        return results

    def device(self, name: str) -> Device:
        return self._devices[name]

    def changed(self) -> Iterable[Device]:
        """The devices of this batch; some may be as they were."""
        return self._devices.values()

    def _load_devices(self, db: Db, names: set[str], now_s: float) -> None:
        missing = []
        for name in names:
            kept = self._kept.get(name)
            if kept is None:
                missing.append(name)
            else:
                self._devices[name] = Device.unpack(kept) if isinstance(kept, bytes) else kept
        missing.sort()
        for part in pieces(missing):
            wanted = {name: name for name in part}  # the caller's strings, which others keep, too
            for again in (False, True):
                columns = "name, id, key, newest_s, heartbeat_windows"
                query = f"SELECT {columns} FROM devices WHERE name IN ({marks(len(wanted))})"
                for name, *facts in db.execute(query, tuple(wanted)).fetchall():
                    self._devices[wanted.pop(name)] = Device(*facts)
                if again or not wanted:
                    break
                db.executemany(
                    "INSERT INTO devices (name, first_seen_s, last_seen_s) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                    [(name, now_s, now_s) for name in sorted(wanted)],
                )

    def streams(self, db: Db, wanted: Sequence[tuple[Device, bytes, int]], now_s: float) -> list[Stream]:
        """wanted: (device, stream, boot) -> their streams, in this order."""
        missing: dict[tuple[int, bytes], tuple[Device, int]] = {}
        for device, name, boot in wanted:
            if device.name != name and (device.id, name) not in self._others:
                missing[device.id, name] = (device, boot)
        if missing:
            self._load_streams(db, missing, now_s)
        found = []
        for device, name, _ in wanted:
            stream = device.stream if device.name == name else self._others[device.id, name]
            assert stream is not None
            found.append(stream)
        while len(self._others) > MAX_CACHED:
            self._others.popitem(last=False)
        return found

    def _load_streams(self, db: Db, missing: dict[tuple[int, bytes], tuple[Device, int]], now_s: float) -> None:
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
                        self._remember(missing[key][0], key, Stream(row, highest, forgotten, began_s, behind_s))
                if again or not wanted:
                    break
                db.executemany(
                    "INSERT INTO streams (device, stream, boot, first_seen_s) VALUES (?, ?, ?, ?)"
                    " ON CONFLICT DO NOTHING",
                    [(*key, missing[key][1], now_s) for key in sorted(wanted)],
                )

    def _remember(self, device: Device, key: tuple[int, bytes], stream: Stream) -> None:
        """The stream that came last is its device's; the one before it goes among the others."""
        if device.stream is not None:
            self._others[device.id, device.name] = device.stream
        self._others.pop(key, None)
        device.name, device.stream = key[1], stream


class _Batch:
    """The reports of one batch."""

    def __init__(self, ingest: Ingest, db: Db, now_s: float) -> None:
        self._ingest = ingest
        self._db = db
        self._now_s = now_s
        self._now = int(now_s)
        self._clocks: set[Stream] = set()

    def put(self, reports: Sequence[Report], refusals: Counter[str], counted: Counter[tuple[str, str]]) -> list[str]:
        devices = [self._ingest.device(report.device) for report in reports]
        pairs = list(zip(devices, reports, strict=True))
        streams = [each.stream for each, report in pairs if each.stream is not None and each.name == report.stream]
        if len(streams) < len(pairs):
            wanted = [(device, report.stream, report.boot) for device, report in pairs]
            streams = self._ingest.streams(self._db, wanted, self._now_s)
        asked = {
            (stream.id, report.sequence)
            for stream, report in zip(streams, reports, strict=True)
            if report.sequence <= stream.highest
        }
        bodies = self._stored(sorted(asked)) if asked else {}
        results = []
        rows: list[tuple[Any, ...]] = []
        answers: list[tuple[Any, ...]] = []
        decisions: list[tuple[Any, ...]] = []
        lost: dict[Stream, tuple[int, int]] = {}
        for report, device, stream in zip(reports, devices, streams, strict=True):
            result, variant = self._name(report, stream, bodies)
            results.append(result)
            if result is DUPLICATE:
                continue
            at_s, known, order_s = self._when(stream, report)
            rows.append(
                (
                    device.id,
                    stream.id,
                    report.sequence,
                    variant,
                    at_s,
                    known,
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
                answers.append((device.id, *report.answer, self._now_s))
            if report.decision and result is not CONFLICT:
                decisions.append(decision_row(device.id, stream.id, report, at_s))
            if report.lost:
                lost[stream] = (device.id, max(report.lost, lost.get(stream, (0, 0))[1]))
            device.reports += 1
            trusted = report.key == device.key or not report.key or self._begin_anew(report, device)
            if report.windows:
                # How many windows pass between reports: known at once where it grows, slowly where it shrinks.
                beat = device.heartbeat
                device.heartbeat = max(report.windows, beat - (beat + 7) // 8)
                if trusted and (device.newest_s is None or device.newest_s <= order_s or device.newest_s > self._now):
                    device.newest_s = order_s
                    device.newest = (
                        report.sequence,
                        report.level,
                        report.flags,
                        report.score_q8,
                        report.evidence_q8,
                    )
            if result is CONFLICT:
                device.conflicts += 1
                counted[report.device, "conflict"] += 1
        for name, count in refusals.items():
            self._ingest.device(name).refused += count
        if rows:
            self._ingest._engine.append(self._db, "reports", REPORT_COLUMNS, rows)
        put_decisions(self._db, decisions)
        self._write(answers, lost)
        return results

    def _stored(self, names: list[tuple[int, int]]) -> dict[tuple[int, int], list[bytes]]:
        """(stream, sequence) -> the bodies in the database under this name; none for those that have none."""
        found: dict[tuple[int, int], list[bytes]] = {}
        for part in pieces(names, 400):
            query = (
                f"WITH wanted (s, n) AS (VALUES {','.join(['(?,?)'] * len(part))})"
                " SELECT r.stream, r.sequence, r.body FROM wanted JOIN reports r ON r.stream = s AND r.sequence = n"
                " ORDER BY r.variant"
            )
            for stream, sequence, body in self._db.execute(
                query, [value for name in part for value in name]
            ).fetchall():
                found.setdefault((stream, sequence), []).append(bytes(body))
        return found

    @staticmethod
    def _name(report: Report, stream: Stream, bodies: dict[tuple[int, int], list[bytes]]) -> tuple[str, int]:
        """-> (STORED, DUPLICATE or CONFLICT; the variant to store it as)."""
        sequence = report.sequence
        name = (stream.id, sequence)
        if sequence > stream.highest:
            stream.highest = sequence
            bodies[name] = [report.body]
            return STORED, 0
        known = bodies.get(name)
        if known is None:
            if sequence <= stream.forgotten:  # so long ago that its like is deleted
                return DUPLICATE, 0
            bodies[name] = [report.body]
            return STORED, 0
        if report.body in known:
            return DUPLICATE, 0
        known.append(report.body)
        return CONFLICT, 1 + (int.from_bytes(hashlib.sha256(report.body).digest()[:8]) >> 2)

    def _when(self, stream: Stream, report: Report) -> tuple[int, int, int]:
        """-> (time of the event, 1 where that is known, its place in the order of the device's events).

        The device's own clock counts where it is plausible: not ahead of ours, and not behind it by more than the
        delay of the stream's promptest report. No event is later than its arrival, so a wrong clock, or a report that
        was made up, doesn't outlive the next one."""
        received_s = self._now
        if report.time_s is not None:
            if report.time_s > received_s + DAY_S:
                return received_s, 0, received_s
            behind_s = stream.behind_s
            if report.late_s is None:
                delay_s = max(0, received_s - report.time_s)
                if behind_s is None or delay_s < behind_s - BEHIND_S or delay_s == 0 < behind_s:
                    behind_s = stream.behind_s = delay_s
                    self._clocks.add(stream)
            behind_s = max(0, behind_s or 0)
            order_s = min(received_s, report.time_s + behind_s)
            return (order_s, 0, order_s) if behind_s > DAY_S else (report.time_s, 1, order_s)
        if report.late_s is None:
            order_s = received_s
        elif report.late_s >= 0:
            order_s = received_s - report.late_s
        else:  # history of an unknown age
            order_s = 0
        if stream.began_s is not None:
            own_s = stream.began_s + (report.uptime_s or 0)
            return own_s, 1, min(received_s, own_s) if report.late_s == -1 else order_s
        return order_s or received_s, int(report.late_s is not None and report.late_s >= 0), order_s

    @staticmethod
    def _begin_anew(report: Report, device: Device) -> bool:
        """Whether a report under another key than the device's may say what level it has. One under a new key begins
        the device anew, and from then on none under the old key does."""
        if device.key and not report.current:
            return False
        device.key = report.key
        device.newest_s = None
        device.reset, device.newest = True, None
        device.conflicts = device.refused = 0
        return True

    def _write(self, answers: list[tuple[Any, ...]], lost: dict[Stream, tuple[int, int]]) -> None:
        db = self._db
        if answers:
            db.executemany(
                "INSERT INTO commands (device, sequence, result, answered_s) VALUES (?, ?, ?, ?)"
                " ON CONFLICT (device, sequence) DO UPDATE SET result = excluded.result,"
                " answered_s = excluded.answered_s",
                answers,
            )
        if self._clocks:
            db.executemany(
                "UPDATE streams SET behind_s = ? WHERE id = ?", [(clock.behind_s, clock.id) for clock in self._clocks]
            )
        if lost:
            db.executemany(
                "UPDATE streams SET lost = CASE WHEN lost < ? THEN ? ELSE lost END WHERE id = ?",
                [(count, count, stream.id) for stream, (_, count) in lost.items()],
            )
            db.executemany(
                "UPDATE devices SET lost = (SELECT sum(lost) FROM streams WHERE device = ?) WHERE id = ?",
                [(device, device) for device in sorted({device for device, _ in lost.values()})],
            )
        changes = sorted(self._ingest.changed(), key=_by_id)  # one order of locks for all collectors
        resets = [(device.key, device.id) for device in changes if device.reset]
        if resets:
            db.executemany(
                "UPDATE devices SET key = ?, newest_s = NULL, conflicts = 0, refused = 0 WHERE id = ?", resets
            )
        now_s = self._now_s
        newest = [
            (device.reports, now_s, device.heartbeat, device.newest_s, *device.newest, device.id)
            for device in changes
            if device.newest
        ]
        if newest:
            db.executemany(
                "UPDATE devices SET reports = reports + ?, last_seen_s = ?, heartbeat_windows = ?, newest_s = ?,"
                " newest_sequence = ?, level = ?, flags = ?, score_q8 = ?, evidence_q8 = ? WHERE id = ?",
                newest,
            )
        rest = [
            (device.reports, now_s, device.heartbeat, device.id)
            for device in changes
            if device.reports and not device.newest
        ]
        if rest:
            db.executemany(
                "UPDATE devices SET reports = reports + ?, last_seen_s = ?, heartbeat_windows = ? WHERE id = ?", rest
            )
        odd = [(d.conflicts, d.refused, d.conflicts, now_s, d.id) for d in changes if d.conflicts or d.refused]
        if odd:
            db.executemany(
                "UPDATE devices SET conflicts = conflicts + ?, refused = refused + ?,"
                " conflict_s = CASE WHEN ? > 0 THEN ? ELSE conflict_s END WHERE id = ?",
                odd,
            )
