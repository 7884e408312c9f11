"""What is wrong in the fleet at one moment: presence, causes, sense, levels and rejections judged into alerts.

It knows no database and reads no clock. monitor.py feeds it with what was committed and makes incidents of its alerts.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import inf
from typing import Any

from ..console import counted
from ..schemas import SCHEMAS
from .causes import Causes, Label
from .incidents import Alert, Incident
from .labels import NONE, Labels
from .presence import AWAY, NO_FACTS, Change, Device, Fleet
from .sense import Outbreak, Sense
from .wire import Report, Status
from .wire_response import ACTIONS, BEGAN, Decision

MINUTE_S = 60.0
HOUR_S = 3600.0
HOLD_S = 120.0  # how long a device has to be away until that is an incident; a cause is known before
SETTLED_S, GROWING_S = 15.0, 90.0  # a cause is shown when nobody left for so long, or after so long
REJECTED = 10  # messages of a device in an hour
MAX_REJECTED = 1000  # devices that are counted for that by name
REASONS = ("forged", "conflict", "unknown device")
# Incidents that are judged from what a restart forgets: how long each goes on after one without a new sign of it. An
# alarm goes on until its device reports another level.
HELD_S = {
    "alarm": inf,
    "response": 600.0,
    "outbreak": 1800.0,
    "model": 86_400.0,
    "clock": 7200.0,
    "apart": 93_600.0,
    "rejected": HOUR_S,
}


class Judgements:
    """hold_s: as HOLD_S. labels: of the devices that have any; whoever replaces one calls relabelled()."""

    def __init__(self, hold_s: float = HOLD_S) -> None:
        self.labels: dict[str, Labels] = {}
        self.fleet = Fleet()
        self.causes = Causes(self.labels_of)
        self.sense = Sense(self._class_and_model)
        self.deaf_s: float | None = None  # since when the collector takes nothing,
        self.deaf_why = ""  # and why
        self._hold_s = hold_s
        self._shared: dict[tuple[str, str, str], tuple[str, str, str]] = {}
        self._alarmed: dict[str, Report] = {}
        self._levels: dict[str, int] = {}  # of those that are not normal
        self._leases: dict[str, tuple[Decision, float, bytes, int]] = {}  # in force, since when, in which start
        self._odd: set[str] = set()  # devices that alerts may be about
        self._rejected: Counter[tuple[str, str]] = Counter()
        self._hour_s = self._minute_s = -1e18
        self._held: dict[str, float] = {}  # incidents from before a restart: until when they go on without a new sign

    # --- what is known of a device --------------------------------------------------------------------------------

    def add(self, device: Device, level: int, facts: tuple[str, str, str], now_s: float) -> None:
        """A device out of the database."""
        self.fleet.devices[device.name] = device
        self._set_facts(device, facts)
        if level:
            self._levels[device.name] = level
        self._odd.add(device.name)
        self.sense.moved(device.name, now_s)

    def hold(self, incidents: Iterable[Incident], now_s: float) -> None:
        """Incidents that were open before a restart."""
        self._held = {each.key: now_s + HELD_S[each.kind] for each in incidents if each.kind in HELD_S}
        for device in self.labels:
            self._relabelled(device)

    def relabel(self, labels: dict[str, Labels], now_s: float) -> None:
        before, self.labels = self.labels, labels
        for device in labels.keys() | before.keys():
            if labels.get(device) != before.get(device):
                if device in self.sense.devices:
                    self.sense.moved(device, now_s)
                self._relabelled(device)

    def _relabelled(self, device: str) -> None:
        """A device that was removed belongs to nothing any more; one that is shown again is looked at again."""
        if self._is_removed(device):
            self.causes.back(device)
            self.sense.wrong_clocks.pop(device, None)
            self.sense.apart.pop(device, None)
        self._odd.add(device)

    def _is_removed(self, device: str) -> bool:
        return self.labels.get(device, NONE).removed_s is not None

    def level(self, device: str) -> int:
        return self._levels.get(device, 0)

    def in_alarm(self) -> list[str]:
        return [name for name, level in self._levels.items() if level == 2]

    def alarmed(self, report: Report) -> None:
        """The report that began an alarm, out of the database."""
        self._alarmed[report.device] = report

    def facts(self, name: str) -> tuple[str, str, str]:
        """Schema, model and firmware of a device."""
        device = self.fleet.devices.get(name)
        return NO_FACTS if device is None else device.facts

    def _set_facts(self, device: Device, facts: tuple[str, str, str]) -> None:
        if len(self._shared) > 1000 + 2 * len(self.fleet.devices):  # mostly of devices that have others now
            self._shared = {each.facts: each.facts for each in self.fleet}
        device.facts = self._shared.setdefault(facts, facts)

    def labels_of(self, device: str) -> Sequence[Label]:
        found = self.labels.get(device)
        return () if found is None else found.all

    def _class_and_model(self, device: str) -> tuple[str, str]:
        schema, model, _ = self.facts(device)
        label = self.labels.get(device, NONE).group
        return f"{label}/{schema}" if label else schema, model

    # --- what the collector reports -------------------------------------------------------------------------------

    def stored(self, report: Report, now_s: float) -> None:
        """A report that was committed for the first time."""
        self.fleet.report(report, now_s)
        self.sense.report(report, now_s)
        if report.level or report.device in self._levels:
            self._level(report)
        held = self._leases.get(report.device)
        if held is not None and report.late_s is None and report.stream != held[2]:
            del self._leases[report.device]  # a new start opens
        if report.decision is not None:
            self._decision(report, report.decision, now_s)

    def conflicts(self, report: Report, now_s: float) -> None:
        self.fleet.report(report, now_s, True, True)
        self.reject(report.device, "conflict")

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

    def _decision(self, report: Report, decided: Decision, now_s: float) -> None:
        device = report.device
        if not (decided.done and decided.lease):
            return
        if decided.kind == BEGAN:
            self._leases[device] = (decided, now_s, report.stream, report.boot)
            self._odd.add(device)
        elif device in self._leases and self._leases[device][0].lease == decided.lease:
            del self._leases[device]

    def status(self, status: Status, now_s: float) -> bool:
        """-> whether it is one that was not known: a sign of life."""
        known = self.fleet.devices.get(status.device)
        before = known.current.status if known and known.current else 0
        self.fleet.status(status, now_s, None if status.off_for_s is None else now_s - status.off_for_s)
        if not status.online:
            return False
        held = self._leases.get(status.device)
        if held is not None and status.stream != held[2] and status.boot > held[3]:
            del self._leases[status.device]
        schema = status.schema.hex() if status.schema else ""
        model = status.model.hex() if status.model else ""
        device = self.fleet.devices[status.device]
        self._set_facts(device, (schema, model, status.firmware or ""))
        self.sense.moved(status.device, now_s)
        return device.current is not None and device.current.status != before

    def reject(self, device: str, reason: str) -> None:
        key = (device[:64], reason)
        if key not in self._rejected and len(self._rejected) >= MAX_REJECTED:
            key = ("(others)", reason)
        self._rejected[key] += 1

    # --- time -----------------------------------------------------------------------------------------------------

    def shift(self, jump_s: float) -> None:
        """The clock that now_s comes from was set by jump_s."""
        self.fleet.shift(jump_s)
        self.causes.shift(jump_s)
        self.sense.shift(jump_s)
        self._minute_s = self._hour_s = -1e18
        self._held = {key: until_s + jump_s for key, until_s in self._held.items()}

    def step(self, now_s: float) -> list[Change]:
        """Judge -> the changes of state."""
        changes = self.fleet.step(now_s)
        for change in changes:
            self._change(change, now_s)
        self.causes.step(now_s, self._present, lambda name: self._leaving(name, now_s))
        self.sense.step(now_s)
        if now_s - self._minute_s >= MINUTE_S:
            self._minute_s = now_s
            self._each_minute(now_s)
        return changes

    def _change(self, change: Change, now_s: float) -> None:
        device = change.device
        if device.state in AWAY:
            if change.before not in AWAY and not self._is_removed(device.name):
                self.causes.left(device.name, device.since_s, now_s)
            self._odd.add(device.name)
        elif change.before in AWAY:
            self.causes.back(device.name)
            if device.flapping(now_s):
                self._odd.add(device.name)
        if device.state in ("lying", "off"):
            self._odd.add(device.name)

    def _present(self) -> Iterable[str]:
        here = ("reporting", *AWAY)
        return [device.name for device in self.fleet if device.state in here and not self._is_removed(device.name)]

    def _leaving(self, name: str, now_s: float) -> float:
        device = self.fleet.devices.get(name)
        return 0.0 if device is None else device.outages_at(now_s) / 86_400

    def _each_minute(self, now_s: float) -> None:
        if now_s - self._hour_s >= HOUR_S:
            self._hour_s = now_s
            self._rejected.clear()
        settled = {device for device in self.fleet.gaps if device.settle(now_s)}
        self.fleet.gaps -= settled
        self._odd |= {device.name for device in settled if device.unexplained}

    # --- alerts ---------------------------------------------------------------------------------------------------

    def alerts(self, known: Mapping[str, Incident], now_s: float) -> dict[str, Alert]:
        """known: the open incidents by key -> the alerts by key."""
        found: list[Alert] = []
        if self.deaf_s is not None:
            text = f"the collector {self.deaf_why}: no device is judged meanwhile"
            found.append(Alert("collector", "collector", "critical", text, self.deaf_s, hold_s=self._hold_s))
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
            alerts = self._of_device(name, claimed, known, now_s)
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
            incident = known.get(key)
            if key in made or incident is None or now_s >= until_s or not self._goes_on(incident):
                del self._held[key]
            else:
                about = (incident.title, incident.start_s, incident.labels, incident.evidence, incident.devices)
                made[key] = Alert(key, incident.kind, incident.severity, *about, incident.count)
        return made

    def _goes_on(self, incident: Incident) -> bool:
        """Whether nothing speaks against an incident from before a restart."""
        if self._is_removed(incident.labels.get("device", "")):
            return False
        if incident.kind != "alarm":
            return True
        name = incident.devices[0]
        device = self.fleet.devices.get(name)
        return device is not None and device.state == "reporting" and self._levels.get(name) == 2

    def _alert(
        self, key: str, kind: str, severity: str, title: str, since_s: float, device: str, evidence: dict[str, Any]
    ) -> Alert:
        labels = {"device": device}
        known = self.labels.get(device)
        if known is not None:
            labels |= {kind: name for kind, name in (("site", known.site), ("class", known.group)) if name}
        return Alert(key, kind, severity, title, since_s, labels, evidence, [device])

    def _of_device(
        self, name: str, claimed: set[str], known: Mapping[str, Incident], now_s: float
    ) -> list[Alert] | None:
        """None where there is nothing odd about it any more."""
        device = self.fleet.devices.get(name)
        if device is None or self._is_removed(name):
            return None
        found: list[Alert] = []
        odd = False
        if device.state in AWAY:
            odd = True
            if self.causes.cause_of(name) is None and self.deaf_s is None:
                alert = self._alert(
                    f"away-{name}",
                    device.state,
                    "warning",
                    f"{name} is {device.state}: {device.why}",
                    device.odd.left_s or device.since_s,
                    name,
                    {"since": device.since_s, "last heard": device.heard_s, "interval s": device.interval_s},
                )
                alert.hold_s = max(self._hold_s, device.patience_s(now_s))
                found.append(alert)
        if device.state == "lying":
            odd = True
            evidence = {"signs": device.odd.lies, "last heard": device.heard_s}
            title = f"{name} is lying: {device.odd.why_lying}"
            found.append(self._alert(f"lying-{name}", "lying", "critical", title, device.odd.lie_s, name, evidence))
        if device.state == "off":
            odd = True
            title = f"{name}: its user has switched monitoring off"
            found.append(self._alert(f"off-{name}", "off", "warning", title, device.since_s, name, {}))
        if name in self._leases:
            odd = True
            decided, since_s, *_ = self._leases[name]
            title = f"{name} is in {ACTIONS[decided.action]}, by its own decision"
            evidence = {"lease": decided.lease, "seconds": decided.seconds, "rule": decided.rule}
            found.append(self._alert(f"response-{name}", "response", "warning", title, since_s, name, evidence))
        if device.flapping(now_s):
            odd = True
            title = f"{name} comes and goes: {device.outages_at(now_s):.0f} outages in the last days"
            found.append(self._alert(f"flapping-{name}", "flapping", "info", title, device.odd.outages_s, name, {}))
        if device.unexplained:
            odd = True
            title = f"{name}: {counted(device.unexplained, 'report')} lost, unexplained"
            evidence = {"unexplained": device.unexplained, "announced": device.lost_announced}
            found.append(self._alert(f"lost-{name}", "lost", "info", title, device.odd.gap_s, name, evidence))
        report = self._alarmed.get(name)
        if report is not None:
            odd = True
            if name not in claimed and device.state == "reporting":
                found.append(self._alarm(name, report, known, now_s))
        return found if odd else None

    def _alarm(self, name: str, report: Report, incidents: Mapping[str, Incident], now_s: float) -> Alert:
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
        known = incidents.get(alert.key)
        alert.since_s = known.start_s if known else now_s
        if known:
            alert.title = known.title
        return alert

    def _columns(self, schema: str) -> list[str]:
        found = SCHEMAS.get(bytes.fromhex(schema)) if schema else None
        return [column[0] for column in found.columns] if found else []

    def _features(self, name: str, report: Report) -> list[str]:
        columns = self._columns(self.facts(name)[0])
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
