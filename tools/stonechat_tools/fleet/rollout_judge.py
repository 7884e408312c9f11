"""Decides for each roll-out, with the tests of rollout.py: whose turn it is, when the next stage begins, when it halts.

Everything that a decision rests on is in the database, and one collector at a time decides, within one transaction:
with several collectors (shards) it does not matter which one does, and a restart changes nothing.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .incidents import Alert
from .labels import NONE, Labels
from .rollout import ALARM_LIMIT, DAY_S, FAILURE_LIMIT, HISTORY_DAYS, PRIOR_DAYS, Rollout, chosen, size
from .store import Store, releases, rollouts
from .store.base import Db, pieces
from .store.rollouts import DONE, HALTED, HAVE, LEFT, LIVE, OPEN, PAUSED, Candidate, RolloutRow

ACTOR = "the halting rule"
MAX_OPEN = 1000  # devices that take a release at the same time
PRESENT_S = 26 * 3600.0  # heard within: a device that reports once a day is there
DAY_LATE_S = 2 * 3600  # after the end of a day, until its reports are in and summed up
MOST_DAYS = 35  # that are counted after a collector was away
DAY_WORK_S = 0.5  # of counting a day in one call: no batch of reports waits longer
LEAST_RATE = 0.001  # alarm days a device and day, where a fleet has never alarmed
BUSY_SHARE = 20  # looking for devices takes at most this part (1/N) of the time
SHOWN = 20  # failed devices in the evidence


@dataclass(frozen=True)
class Step:
    """What one call changed, for tests and logs."""

    rollout: int
    what: str


@dataclass
class _DayWork:
    """A day that is being counted. parts: the devices that are left, in pieces, each of one group."""

    number: int
    day: rollouts.Day
    parts: list[tuple[rollouts.DayGroup, Sequence[int]]]


class Judge:
    """labels(): those of all devices. every_s: how often a roll-out is judged, by whichever collector."""

    def __init__(
        self,
        store: Store,
        labels: Callable[[], Mapping[str, Labels]],
        *,
        clock: Callable[[], float] = time.time,
        every_s: float = 5.0,
        actor: str = ACTOR,
    ) -> None:
        self._store = store
        self._labels = labels
        self._clock = clock
        self._every_s = every_s
        self._actor = actor
        self._manifests = releases.Manifests(store)
        self._rotating: set[int] = set()  # releases
        self._going: list[RolloutRow] = []
        self._filled_s: dict[int, float] = {}  # when devices may be looked for again
        self._days: dict[int, _DayWork] = {}  # days that are being counted
        self._full: dict[int, bool] = {}  # whether all that can take a stage have it

    def step(self) -> list[Step]:
        """Raises StoreError; what was decided before it stays."""
        now_s = self._clock()
        every = rollouts.rollouts(self._store)
        rotating = self._rotating = self._manifests.rotating(row.release.id for row in every)
        self._going = [row for row in every if row.state in (*LIVE, DONE)]
        found: list[Step] = []
        for row in every:
            if row.state not in (*LIVE, DONE) or row.state == DONE and superseded(row, every, rotating):
                continue
            if 0 <= now_s - row.judged_s < self._every_s:
                continue
            with self._store.transaction() as db:
                claimed = rollouts.claim(db, row.id, now_s - self._every_s, now_s)
                if claimed is not None:
                    found += [Step(row.id, what) for what in self._judge(db, claimed, now_s)]
        return found

    def _judge(self, db: Db, row: RolloutRow, now_s: float) -> list[str]:
        outcomes = rollouts.uncounted(db, row.id)
        if row.state == HALTED:  # what it did to devices on trial is no sign of the release
            return []
        if row.state == DONE:
            if not self._manifests.expired(row.release.id, now_s):
                self._fill(db, row, now_s)
            return []
        today = int(now_s // DAY_S)
        last_day = row.tests.get("day", int(row.began_s // DAY_S))
        last_day = max(today - MOST_DAYS, min(last_day, today))  # after a clock that was wrong, too
        rollout = Rollout.load(row.since_s, row.stages, row.stage, row.tests)
        expired = self._manifests.expired(row.release.id, now_s)
        rollout.paused = row.state == PAUSED or expired
        for failed in outcomes:
            rollout.outcome(failed)
        while not rollout.halted and (last_day + 2) * DAY_S + DAY_LATE_S <= now_s:
            if not self._day(db, row, rollout, last_day + 1):
                break
            last_day += 1
        done: list[str] = []
        if rollout.halted:
            row.state, row.evidence = HALTED, self._evidence(db, row, rollout, now_s)
            done.append("halted: " + rollout.halted)
        elif not rollout.paused:
            full = self._fill(db, row, now_s)
            counts = rollouts.counts(db, row.id)
            waiting = sum(counts.get(state, 0) for state in (*OPEN, "confirmed"))
            some = counts.get("good", 0) + counts.get("failed", 0)
            if not full or not some or row.id in self._days:
                waiting += 1
            if rollout.advance(now_s, waiting):
                row.stage, row.since_s = rollout.stage, rollout.since_s
                done.append(f"stage {row.stage_name} begins")
                self._filled_s.pop(row.id, None)
            elif row.stage == len(row.stages) - 1 and not waiting and now_s - row.since_s >= row.stages[-1].soak_s:
                row.state = DONE
                done.append("done")
        row.tests = rollout.dump() | {"day": last_day}
        rollouts.save(db, row)
        for what in done:
            evidence = row.evidence if row.state == HALTED else row.tests
            rollouts.note(db, row.id, now_s, self._actor, what, evidence)
        return done

    # --- whose turn it is -------------------------------------------------------------------------------------------

    def _belongs(self, row: RolloutRow, device: str) -> bool:
        found = self._labels().get(device, NONE)
        at_site = not row.site or found.site == row.site
        return found.group == row.release.device_class and at_site and found.removed_s is None

    def _takes(self, row: RolloutRow, device: Candidate) -> bool:
        """Whether this release is the one that a device takes next: after each rotation of keys before it, and where no
        later one is rolled out to it."""
        for other in self._going:
            version = other.release.version
            before = device.version < version < row.release.version and other.release.id in self._rotating
            later = version > row.release.version and row.release.id not in self._rotating
            if (before or later) and self._belongs(other, device.name):
                return False
        return True

    def _fill(self, db: Db, row: RolloutRow, now_s: float) -> bool:
        """Give devices their turn -> whether the stage has all that it can have now."""
        if 0 <= self._filled_s.get(row.id, 0.0) - now_s < DAY_S:
            return self._full.get(row.id, False)
        began_s = time.monotonic()
        version = row.release.version
        able = [each for each in rollouts.candidates(db, row.release.schema) if self._belongs(row, each.name)]
        able = [each for each in able if each.version <= version]
        members = rollouts.taken(db, row.id)
        have = [each for each in able if each.id in members or each.version == version]
        still_open = sum(state in OPEN for state, *_ in members.values())
        wanted = size(row.stages, row.stage, len(able)) - len(have)
        older = [each for each in able if each.version < version and _present(each, now_s) and self._takes(row, each)]
        there = {each.name: each for each in older if each.id not in members}
        again = [each.id for each in older if each.id in members and _again(members[each.id], each, version)]
        turn = chosen(row.release.digest, there, max(0, min(wanted, MAX_OPEN - still_open)))
        rollouts.join(db, row.id, [there[name].id for name in turn] + again[: max(0, MAX_OPEN - still_open)], now_s)
        self._full[row.id] = not turn and (wanted <= 0 or not there)
        self._filled_s[row.id] = now_s + BUSY_SHARE * (time.monotonic() - began_s)
        return self._full[row.id]

    # --- alarms -----------------------------------------------------------------------------------------------------

    def _day(self, db: Db, row: RolloutRow, rollout: Rollout, number: int) -> bool:
        """Count a day, and give it to the test -> whether it is done; a large fleet takes several calls. number: of the
        day, since 1970."""
        work = self._days.get(row.id)
        if work is None or work.number != number:
            work = self._days[row.id] = self._begin_day(db, row, number)
        first_day = int(row.began_s // DAY_S)
        history = ((first_day - HISTORY_DAYS) * DAY_S, first_day * DAY_S)
        end_s = time.monotonic() + DAY_WORK_S
        while work.parts:
            if time.monotonic() > end_s:
                return False
            group, devices = work.parts.pop()
            rollouts.add_to_day(db, work.day, group, number * DAY_S, history, PRIOR_DAYS, devices)
        del self._days[row.id]
        day = work.day
        rate = max(LEAST_RATE, day.alarm_days / day.days if day.days else 0.0)

        def are_usual(group: rollouts.DayGroup) -> float:  # the sum of usual() over the group
            return group.alarm_share + PRIOR_DAYS * rate * group.prior_share

        rollout.day(day.with_it.alarmed, are_usual(day.with_it), day.without.alarmed, are_usual(day.without))
        return True

    def _begin_day(self, db: Db, row: RolloutRow, number: int) -> "_DayWork":
        """A device that took the release, or lost it, in the middle of the day counts in neither group."""
        begin_s = number * DAY_S
        members = rollouts.taken(db, row.id)
        with_it: list[int] = []
        without: list[int] = []
        for each in rollouts.candidates(db, row.release.schema):
            if not self._belongs(row, each.name):
                continue
            state, taken_s, _ = members.get(each.id, ("", None, ""))
            if taken_s is None or taken_s >= begin_s + DAY_S:
                if each.version < row.release.version or taken_s is not None:
                    without.append(each.id)
            elif taken_s < begin_s and state in HAVE:
                with_it.append(each.id)
        day = rollouts.Day()
        groups = ((day.with_it, with_it), (day.without, without))
        return _DayWork(number, day, [(group, part) for group, devices in groups for part in pieces(devices)])

    def _evidence(self, db: Db, row: RolloutRow, rollout: Rollout, now_s: float) -> dict[str, Any]:
        failures = rollout.failures.halts
        counts = rollouts.counts(db, row.id)
        return {
            "why": rollout.halted,
            "at_s": now_s,
            "test": "failures" if failures else "alarms",
            "log likelihood ratio": round(rollout.failures.ratio if failures else rollout.alarms.ratio, 2),
            "its limit": round(FAILURE_LIMIT if failures else ALARM_LIMIT, 2),
            "stage": row.stage_name,
            "devices": counts,
            "failed": [{"device": device, "why": why} for device, why in rollouts.failures(db, row.id, SHOWN)],
            **rollout.dump(),
        }


def superseded(row: RolloutRow, every: list[RolloutRow], rotating: set[int]) -> bool:
    """Whether a later release is rolled out to all of its devices in its place. rotating: ids of releases that replace
    keys; those are needed for the later ones."""
    return row.release.id not in rotating and any(
        other.release.device_class == row.release.device_class
        and other.release.version > row.release.version
        and other.state in (*LIVE, DONE)
        and other.site in ("", row.site)
        for other in every
    )


def halts(rows: Iterable[RolloutRow]) -> list[Alert]:
    """Of those that have halted."""
    found = []
    for row in rows:
        if row.state == HALTED:
            facts = row.evidence
            labels = {"class": row.release.device_class} | ({"site": row.site} if row.site else {})
            failed = [each["device"] for each in facts["failed"]]
            title = f"the roll-out of {row} halted in stage {row.stage_name}: {facts['why']}"
            about = (title, facts["at_s"], labels, facts, failed, len(failed))
            found.append(Alert(f"rollout-{row.id}", "rollout", "critical", *about))
    return found


def _again(member: tuple[str, float | None, str], device: Candidate, version: int) -> bool:
    """Whether the turn of a device with an older version comes again: it had the release, and is another one or was
    restored from a backup since; or it had left the class."""
    state, _, result = member
    return device.ended != version and (state == "good" or state == "passed" and result == LEFT)


def _present(device: Candidate, now_s: float) -> bool:
    return device.online is not False and now_s - device.last_seen_s < PRESENT_S
