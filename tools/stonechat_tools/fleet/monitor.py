"""The collector's view of its fleet while it runs: fed with what was committed, it judges, keeps and notifies.

It joins presence, causes, sense and incidents, which know no clock and no database, and has both. The collector's
worker calls took() after each commit and step() about once a second; others read states() from any thread.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from ..schemas import SCHEMAS
from . import labels as labels_of_devices
from .causes import Causes, Label
from .incidents import Alert, Incident, Incidents, Notification, Policy, Silence
from .labels import NONE, Labels
from .presence import AWAY, NO_FACTS, Change, Device, Fleet, State
from .sense import Outbreak, Sense
from .shards import Shard
from .store import DUPLICATE, STORED, Store, StoreError
from .wire import Report, Status

JUMP_S = 2.0  # a clock that is set by more than that is corrected for
LOOK_S = 2.0  # how often the database is asked whether an operator has changed something
MINUTE_S = 60.0
HOUR_S = 3600.0
SAVE_S = 300.0
MAX_IDS = 100_000_000  # of incidents of one collector among several
HOLD_S = 120.0  # how long a device has to be away until that is an incident; a cause is known before
SETTLED_S, GROWING_S = 15.0, 90.0  # a cause is shown when nobody left for so long, or after so long
REJECTED = 10  # messages of a device in an hour
MAX_REJECTED = 1000  # devices that are counted for that by name
REASONS = ("forged", "conflict", "unknown device")
# Incidents that are judged from what a restart forgets: how long each goes on after one without a new sign of it. An
# alarm goes on until its device reports another level.
HELD_S = {"alarm": inf, "outbreak": 1800.0, "model": 86_400.0, "clock": 7200.0, "apart": 93_600.0, "rejected": HOUR_S}
UNSENT = "unsent"  # the kind of note


@dataclass(frozen=True, slots=True)
class Seen:
    """A device as a table, a page or another program shows it."""

    device: str
    state: State
    level: int
    labels: Labels
    cause: str  # of its absence, where many share it
    flapping: bool
    lost: int  # reports that the device said are lost
    unexplained: int  # reports that nobody accounts for
    interval_s: float
    heard_s: float
    model: str
    schema: str
    firmware: str


def read_states(store: Store, now_s: float, listening_s: float | None) -> list[Seen]:
    """The states out of the database, without a collector: as of now_s. Hidden devices are left out."""
    monitor = Monitor(store, clock=lambda: now_s, steady=lambda: now_s)
    monitor.fleet.listen(listening_s)
    monitor.fleet.step(now_s)
    return monitor.states()


class Monitor:
    """store: the database, or None for a replay without one; notify: takes what has to be sent; clock, steady: the
    wall's clock and one that is never set, in seconds; on_change: called for each change of a state, from step().
    shard: which devices are this collector's; the others are judged by their own. unsent() -> ids of the incidents
    whose notification is on its way: those are sent again after a restart."""

    def __init__(
        self,
        store: Store | None = None,
        policy: Policy | None = None,
        notify: Callable[[Notification], None] | None = None,
        *,
        clock: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
        day_s: Callable[[float], float] | None = None,
        hold_s: float = HOLD_S,
        on_change: Callable[[Change], None] | None = None,
        shard: Shard | None = None,
        unsent: Callable[[], set[int]] = set,
    ) -> None:
        self._store = store
        self._undelivered = unsent
        self._unsent: list[int] | None = None  # as in the database
        self._notify = notify
        self._clock, self._steady = clock, steady
        self._offset_s = clock() - steady()
        self._lock = threading.RLock()
        self._hold_s = hold_s
        self._on_change = on_change
        self._shard = shard or Shard()
        self._part = f"{self._shard.name} " if self._shard.of > 1 else ""  # before names that are this collector's own
        self.labels: dict[str, Labels] = {}
        self._shared: dict[tuple[str, str, str], tuple[str, str, str]] = {}
        self._alarmed: dict[str, Report] = {}
        self._levels: dict[str, int] = {}  # of those that are not normal
        self._odd: set[str] = set()  # devices that alerts may be about
        self._rejected: Counter[tuple[str, str]] = Counter()
        self._hour_s = 0.0
        self._disconnected_s: float | None = None
        self._looked_s = self._minute_s = self._saved_s = -1e18
        self._changed: Any = None
        self.fleet = Fleet()
        self.causes = Causes(self._labels)
        self.sense = Sense(self._class_and_model)
        incidents: list[Incident] = []
        again: list[int] = []
        if store is not None:
            incidents = self._load(store)
            again = store.notes(UNSENT, self._part or "all").get(self._part or "all", [])
        first = (self._shard.number - 1) * MAX_IDS
        self.incidents = Incidents(policy or Policy(), incidents, day_s or _local_day_s, first, again)
        self._held = {  # incidents from before a restart, and until when they go on without a new sign
            incident.key: self.now_s + HELD_S[incident.kind]
            for incident in self.incidents.open.values()
            if incident.kind in HELD_S
        }
        self._generation = 0
        if store is not None:
            self._look(store)
            self._generation = store.engine.generation

    # --- from and to the database ---------------------------------------------------------------------------------

    def _load(self, store: Store) -> list[Incident]:
        self.labels = labels_of_devices.read(store)
        saved = store.notes("presence")
        for row in store.devices():
            name = row["device"]
            if name not in self._shard:
                continue
            found = saved.get(name)
            if found is None:  # of a database from before there was presence
                device = Device(name, row["last_seen_s"])
                device.online, device.will_s = row["online"], row["online_since_s"] or 0.0
                if row["conflicts"]:
                    device.lie("its key is used twice", row["conflict_s"] or row["last_seen_s"])
            else:
                device = Device.load(name, found)
            device.heard_s = max(device.heard_s, row["last_seen_s"])
            device.window_s = (row["window_ms"] or 0) / 1000
            device.announced_s = row.get("heartbeat_s") or 0
            device.windows = max(device.windows, row["heartbeat_windows"])
            self.fleet.devices[name] = device
            self._set_facts(device, row.get("schema") or "", row.get("model") or "", row.get("firmware") or "")
            if row["level"]:
                self._levels[name] = row["level"]
            self._odd.add(name)
            self.sense.moved(name, self.now_s)
        for key, value in store.notes("cause").items():
            if key.startswith(self._part):
                self.causes.load(key[len(self._part) :], value)
        for name, value in store.notes("rate").items():
            if name.startswith(self._part):
                self.sense.load_rate(name[len(self._part) :], value, self.now_s)
        found = [Incident.load(value) for value in store.notes("incident").values()]
        return [incident for incident in found if incident.id // MAX_IDS == self._shard.number - 1]

    def _set_facts(self, device: Device, *facts: str) -> None:
        triple = (facts[0], facts[1], facts[2])
        if len(self._shared) > 1000 + 2 * len(self.fleet.devices):  # mostly of devices that have others now
            self._shared = {each.facts: each.facts for each in self.fleet}
        device.facts = self._shared.setdefault(triple, triple)

    def _facts(self, name: str) -> tuple[str, str, str]:
        """Schema, model and firmware of a device."""
        device = self.fleet.devices.get(name)
        return NO_FACTS if device is None else device.facts

    def _labels(self, device: str) -> Sequence[Label]:
        found = self.labels.get(device)
        return () if found is None else found.all

    def _class_and_model(self, device: str) -> tuple[str, str]:
        schema, model, _ = self._facts(device)
        label = self.labels.get(device, NONE).group
        return f"{label}/{schema}" if label else schema, model

    def _look(self, store: Store) -> None:
        """At what an operator has changed."""
        changed = store.notes(labels_of_devices.CHANGED)
        if changed == self._changed:
            return
        self._changed = changed
        before, self.labels = self.labels, labels_of_devices.read(store)
        for device in self.labels.keys() | before.keys():
            if self.labels.get(device) != before.get(device) and device in self.sense.devices:
                self.sense.moved(device, self.now_s)
        self.incidents.silences = [
            Silence(name, tuple(value["matchers"]), value["until_s"], value.get("by", ""), value.get("comment", ""))
            for name, value in store.notes("silence").items()
        ]
        done = []
        for name, request in store.notes("request").items():
            if request["do"] == "acknowledge" and self.incidents.get(request["incident"]) is not None:
                self.incidents.acknowledge(request["incident"], request["by"], self.now_s)
                done.append(name)
            elif request["do"] == "trust" and request["device"] in self._shard:
                self.fleet.trust(request["device"])
                done.append(name)
        if done:
            store.note("request", dict.fromkeys(done))

    def _save(self, store: Store) -> None:
        dirty = [device for device in self.fleet if device.dirty]
        if dirty:
            store.note("presence", {device.name: device.dump() for device in dirty})
            for device in dirty:
                device.dirty = False
        open_causes = {cause.key: cause.dump() for cause in self.causes.open if cause.dirty}
        if open_causes or self.causes.over:
            changes = {**open_causes, **dict.fromkeys(self.causes.over)}
            store.note("cause", {self._part + key: value for key, value in changes.items()})
            self.causes.over.clear()
            for cause in self.causes.open:
                cause.dirty = False
        if self.now_s - self._saved_s >= SAVE_S:
            self._saved_s = self.now_s
            store.note("rate", {self._part + name: rate for name, rate in self.sense.dump_rates().items()})
        if self.incidents.changed:
            changed, self.incidents.changed = self.incidents.changed, set()
            values: dict[str, Any] = {}
            for number in changed:
                incident = self.incidents.get(number)
                values[str(number)] = None if incident is None else incident.dump()
            try:
                store.note("incident", values)
            except StoreError:
                self.incidents.changed |= changed
                raise
        unsent = sorted(self._undelivered() | self.incidents.held)
        if unsent != self._unsent:
            store.note(UNSENT, {self._part or "all": unsent or None})
            self._unsent = unsent

    def _all_anew(self) -> None:
        """The database is another one: what is known goes into it."""
        for device in self.fleet:
            device.dirty = True
        for cause in self.causes.open:
            cause.dirty = True
        self.incidents.changed |= {incident.id for incident in self.incidents.open.values()}

    def close(self) -> None:
        """Write down what is known. Raises StoreError."""
        with self._lock:
            if self._store is not None:
                for device in self.fleet:
                    device.dirty = True
                self._saved_s = -1e18
                self._save(self._store)

    # --- what the collector says ----------------------------------------------------------------------------------

    @property
    def now_s(self) -> float:
        """The wall's clock, without its jumps since the last step()."""
        return self._steady() + self._offset_s

    def connected(self, is_connected: bool) -> None:
        """The collector has subscribed, or has lost its broker."""
        with self._lock:
            if is_connected:
                self._disconnected_s = None
                if self.fleet.listening_s is None:
                    self.fleet.listen(self.now_s)
            else:
                if self._disconnected_s is None:
                    self._disconnected_s = self.now_s
                self.fleet.listen(None)

    def took(
        self,
        reports: Sequence[Report],
        results: Sequence[str],
        statuses: Iterable[Status] = (),
        rejections: Iterable[tuple[str, str]] = (),
    ) -> None:
        """What was committed: reports with what put() said of each; statuses that verified; (device, reason)."""
        with self._lock:
            now_s = self.now_s
            for report, result in zip(reports, results, strict=True):
                if result == STORED:
                    self.fleet.report(report, now_s)
                    self.sense.report(report, now_s)
                    if report.level or report.device in self._levels:
                        self._level(report)
                    if report.device in self.labels:
                        self._shown_again(report.device)
                elif result == DUPLICATE:
                    self.fleet.report(report, now_s, False)
                else:
                    self.fleet.report(report, now_s, True, True)
                    self._reject(report.device, "conflict")
            for status in statuses:
                self._status(status, now_s)
            for device, reason in rejections:
                self._reject(device, reason)

    def _level(self, report: Report) -> None:
        if report.late_s is not None or not report.windows:
            return
        if report.level:
            self._levels[report.device] = report.level
        else:
            self._levels.pop(report.device, None)
        if report.level == 2:
            if report.packed or report.device not in self._alarmed:
                self._alarmed[report.device] = report
            self._odd.add(report.device)
        else:
            self._alarmed.pop(report.device, None)

    def _status(self, status: Status, now_s: float) -> None:
        known = self.fleet.devices.get(status.device)
        before = known.streams[-1].status if known and known.streams else 0
        self.fleet.status(status, now_s, getattr(status, "off_s", None))
        if status.online:
            schema = status.schema.hex() if status.schema else ""
            model = status.model.hex() if status.model else ""
            self._set_facts(self.fleet.devices[status.device], schema, model, status.firmware or "")
            self.sense.moved(status.device, now_s)
            stream = self.fleet.devices[status.device].streams[-1]
            if stream.status != before and status.device in self.labels:
                self._shown_again(status.device)

    def _shown_again(self, device: str) -> None:
        """A removed device that says something new is there after all."""
        found = self.labels[device]
        if found.removed_s is not None:
            self.labels[device] = replace(found, removed_s=None)
            if self._store is not None:
                labels_of_devices.write(self._store, {device: self.labels[device]})

    def _reject(self, device: str, reason: str) -> None:
        key = (device[:64], reason)
        if key not in self._rejected and len(self._rejected) >= MAX_REJECTED:
            key = ("(others)", reason)
        self._rejected[key] += 1

    def step(self) -> None:
        """Judge, keep, notify. Raises StoreError; the next step is another try."""
        with self._lock:
            jump_s = self._clock() - self.now_s
            if abs(jump_s) > JUMP_S:  # the wall's clock was set, or the machine was suspended
                self._offset_s += jump_s
                self.fleet.shift(jump_s)
                self.incidents.shift(jump_s)
                self.causes.shift(jump_s)
                self.sense.shift(jump_s)
                self._looked_s = self._minute_s = self._saved_s = self._hour_s = -1e18
                self._held = {key: until_s + jump_s for key, until_s in self._held.items()}
            now_s = self.now_s
            if self._store is not None and self._store.engine.generation != self._generation:
                self._generation = self._store.engine.generation
                self._all_anew()
            if self._store is not None and now_s - self._looked_s >= LOOK_S:
                self._looked_s = now_s
                self._look(self._store)
            for change in self.fleet.step(now_s):
                self._change(change, now_s)
            self.causes.step(now_s, self._present, self._leaving)
            self.sense.step(now_s)
            if now_s - self._minute_s >= MINUTE_S:
                self._minute_s = now_s
                self._each_minute(now_s)
            self.incidents.step(self._alerts(now_s), now_s)
            for notification in self.incidents.due(now_s):
                if self._notify is not None:
                    self._notify(notification)
            if self._store is not None:  # after that: what is lost here is sent twice, not never
                self._save(self._store)

    def _change(self, change: Change, now_s: float) -> None:
        device = change.device
        if device.state in AWAY:
            if change.before not in AWAY:
                self.causes.left(device.name, device.since_s, now_s)
            self._odd.add(device.name)
        elif change.before in AWAY:
            self.causes.back(device.name)
            if device.flapping(now_s):
                self._odd.add(device.name)
        if device.state == "lying":
            self._odd.add(device.name)
        if self._on_change is not None:
            self._on_change(change)

    def _present(self) -> Iterable[str]:
        return [device.name for device in self.fleet if device.state in ("reporting", *AWAY)]

    def _leaving(self, name: str) -> float:
        device = self.fleet.devices.get(name)
        return 0.0 if device is None else device.outages_at(self.now_s) / 86_400

    def _each_minute(self, now_s: float) -> None:
        if now_s - self._hour_s >= HOUR_S:
            self._hour_s = now_s
            self._rejected.clear()
        settled = {device for device in self.fleet.gaps if device.settle(now_s)}
        self.fleet.gaps -= settled
        self._odd |= {device.name for device in settled if device.unexplained}

    # --- alerts ---------------------------------------------------------------------------------------------------

    def _alerts(self, now_s: float) -> dict[str, Alert]:
        found: list[Alert] = []
        if self._disconnected_s is not None:
            text = "the collector has no connection to its broker: no device is judged meanwhile"
            found.append(Alert("collector", "collector", "critical", text, self._disconnected_s, hold_s=self._hold_s))
        for cause in self.causes.open:
            self.causes.name(cause, self._present)
            labels = {kind: name for kind, name in cause.labels if name}
            title = f"{len(cause.away)} of {len(cause.members)} devices left together: {cause.name}"
            evidence = {"by chance": cause.chance, "left": len(cause.members), "away": len(cause.away)}
            members = sorted(cause.away)
            alert = Alert(
                cause.key, "cause", "critical", title, cause.start_s, labels, evidence, members[:50], len(members)
            )
            if now_s - cause.last_s < SETTLED_S:
                alert.hold_s = GROWING_S  # others still leave: how many it are, and what they share, is not known yet
            found.append(alert)
        claimed: set[str] = set()
        for outbreak in self.sense.open.values():
            claimed |= outbreak.devices.keys()
            found.append(self._outbreak(outbreak))
        for name in list(self._odd):
            alerts = self._of_device(name, claimed, now_s)
            if alerts is None:
                self._odd.discard(name)
            else:
                found += alerts
        for name, off_s in self.sense.wrong_clocks.items():
            title = f"{name}: its clock is {abs(off_s) / 60:.0f} min {'behind' if off_s > 0 else 'ahead'}"
            found.append(self._alert(f"clock-{name}", "clock", "info", title, now_s, name, {"seconds": round(off_s)}))
        for name, since_s in self.sense.apart.items():
            title = f"{name}: scores unlike its siblings', hour after hour"
            found.append(self._alert(f"apart-{name}", "apart", "warning", title, since_s, name, {}))
        for (name, reason), count in self._rejected.items():
            if count >= REJECTED and reason in REASONS:
                title = f"{name}: {reason} messages arrive under its name"
                found.append(
                    self._alert(
                        f"rejected-{name}-{reason}", "rejected", "warning", title, now_s, name, {"count": count}
                    )
                )
        made = {alert.key: alert for alert in found}
        for key, until_s in list(self._held.items()):
            incident = self.incidents.open.get(key)
            if key in made or incident is None or now_s >= until_s or not self._goes_on(incident):
                del self._held[key]
            else:
                about = (incident.title, incident.start_s, incident.labels, incident.evidence, incident.devices)
                made[key] = Alert(key, incident.kind, incident.severity, *about, incident.count)
        return made

    def _goes_on(self, incident: Incident) -> bool:
        """Whether nothing speaks against an incident from before a restart."""
        if incident.kind != "alarm":
            return True
        name = incident.devices[0]
        device = self.fleet.devices.get(name)
        shown = device is not None and device.state == "reporting" and self.labels.get(name, NONE).removed_s is None
        return shown and self._levels.get(name) == 2

    def _alert(
        self, key: str, kind: str, severity: str, title: str, since_s: float, device: str, evidence: dict[str, Any]
    ) -> Alert:
        labels = {"device": device}
        known = self.labels.get(device)
        if known is not None:
            labels |= {kind: name for kind, name in (("site", known.site), ("class", known.group)) if name}
        return Alert(key, kind, severity, title, since_s, labels, evidence, [device])

    def _of_device(self, name: str, claimed: set[str], now_s: float) -> list[Alert] | None:
        """None where there is nothing odd about it any more."""
        device = self.fleet.devices.get(name)
        if device is None or self.labels.get(name, NONE).removed_s is not None:
            return None
        found: list[Alert] = []
        odd = False
        if device.state in AWAY:
            odd = True
            if self.causes.cause_of(name) is None and self._disconnected_s is None:
                alert = self._alert(
                    f"away-{name}",
                    device.state,
                    "warning",
                    f"{name} is {device.state}: {device.why}",
                    device.left_s or device.since_s,
                    name,
                    {"since": device.since_s, "last heard": device.heard_s, "interval s": device.interval_s},
                )
                alert.hold_s = max(self._hold_s, device.patience_s(now_s))
                found.append(alert)
        if device.state == "lying":
            odd = True
            evidence = {"signs": device.lies, "last heard": device.heard_s}
            title = f"{name} is lying: {device.why_lying}"
            found.append(self._alert(f"lying-{name}", "lying", "critical", title, device.lie_s, name, evidence))
        if device.flapping(now_s):
            odd = True
            title = f"{name} comes and goes: {device.outages_at(now_s):.0f} outages in the last days"
            found.append(self._alert(f"flapping-{name}", "flapping", "info", title, device.outages_s, name, {}))
        if device.unexplained:
            odd = True
            title = f"{name}: {device.unexplained} reports are lost, unexplained"
            evidence = {"unexplained": device.unexplained, "announced": device.lost_announced}
            found.append(self._alert(f"lost-{name}", "lost", "info", title, device.gap_s, name, evidence))
        report = self._alarmed.get(name)
        if report is not None:
            odd = True
            if name not in claimed and device.state == "reporting":
                found.append(self._alarm(name, report, now_s))
        return found if odd else None

    def _alarm(self, name: str, report: Report, now_s: float) -> Alert:
        siblings, with_it, expected = self.sense.siblings(name, now_s)
        evidence: dict[str, Any] = {
            "features": self._features(name, report),
            "evidence": None if report.evidence_q8 is None else report.evidence_q8 / 256,
            "report": report.sequence,
            "siblings": siblings,
            "siblings in alarm": with_it,
            "expected by chance": round(expected, 2),
        }
        alert = self._alert(f"alarm-{name}", "alarm", "warning", f"{name} is in alarm", now_s, name, evidence)
        alert.title += ": " + ", ".join(evidence["features"][:3]) if evidence["features"] else ""
        known = self.incidents.open.get(alert.key)
        alert.since_s = known.start_s if known else now_s
        if known:
            alert.title = known.title
        return alert

    def _columns(self, schema: str) -> list[str]:
        found = SCHEMAS.get(bytes.fromhex(schema)) if schema else None
        return [column[0] for column in found.columns] if found else []

    def _features(self, name: str, report: Report) -> list[str]:
        columns = self._columns(self._facts(name)[0])
        if getattr(report, "channel", 0):
            columns = []
        return [
            f"{columns[f.index] if f.index < len(columns) else f'feature {f.index}'} {f.deviation:+.1f} sd"
            f" ({f.share_percent} %)"
            for f in report.features
        ]

    def _outbreak(self, outbreak: Outbreak) -> Alert:
        devices = sorted(outbreak.devices)
        evidence: dict[str, Any] = {
            "expected by chance": round(outbreak.expected, 3),
            "chance": outbreak.chance,
            "within s": outbreak.span_s,
        }
        if outbreak.kind == "model":
            title = f"model {outbreak.of[:8]}: {len(devices)} of its devices alarm, more than their class does"
            labels = {"model": outbreak.of[:16]}
            return Alert(
                outbreak.key, "model", "warning", title, outbreak.start_s, labels, evidence, devices[:50], len(devices)
            )
        group, _, schema = outbreak.of.rpartition("/")
        columns = self._columns(schema)
        signs = [
            f"{columns[index] if index < len(columns) else f'feature {index}'} {'up' if sign > 0 else 'down'}"
            for index, sign in outbreak.signs
        ]
        evidence["explanation"] = signs
        title = f"{len(devices)} devices of one class alarm with one explanation ({', '.join(signs[:3])}): a botnet?"
        labels = {"class": group} if group else {}
        return Alert(
            outbreak.key, "outbreak", "critical", title, outbreak.start_s, labels, evidence, devices[:50], len(devices)
        )

    # --- reading --------------------------------------------------------------------------------------------------

    def states(self) -> list[Seen]:
        """All devices that are not removed, by name, as of the last step()."""
        with self._lock:
            found = []
            now_s = self.now_s
            for name in sorted(self.fleet.devices):
                device = self.fleet.devices[name]
                labels = self.labels.get(name, NONE)
                if labels.removed_s is not None:
                    continue
                cause = self.causes.cause_of(name)
                schema, model, firmware = device.facts
                found.append(
                    Seen(
                        name,
                        State(device.state, device.since_s, device.why),
                        self._levels.get(name, 0),
                        labels,
                        cause.name if cause else "",
                        device.flapping(now_s),
                        device.lost_announced,
                        device.unexplained,
                        device.interval_s,
                        device.heard_s,
                        model,
                        schema,
                        firmware,
                    )
                )
            return found

    def acknowledge(self, number: int, by: str) -> bool:
        with self._lock:
            return self.incidents.acknowledge(number, by, self.now_s) is not None


def _local_day_s(now_s: float) -> float:
    there = time.localtime(now_s)
    return there.tm_hour * 3600.0 + there.tm_min * 60 + there.tm_sec + now_s % 1
