"""Alerts as incidents: each with a start, an end, evidence and whom it is about; and when to notify whom.

A judgement that holds is an Alert. Incidents makes an incident of it, and notifications of incidents: one for a group
(group_by), after group_wait, again while nobody acknowledges (repeat), once at the end. A silence covers what its
matchers match until its end. Quiet hours hold back what is not critical; what is only for the digest waits for its
hour. Time is passed in, in seconds; no clock is read here.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from . import patterns

SEVERITIES = ("info", "warning", "critical")
LABELS = ("kind", "severity", "device", "site", "class", "tag", "model")  # that incidents have
MAX_MATCHER = 300  # characters of a silence's label=value
MAX_DEVICES = 50  # named in one incident
MAX_KEPT = 2000  # incidents that have ended
MINUTE_S, HOUR_S, DAY_S = 60.0, 3600.0, 86_400.0
_MOVED = ("opened_s", "first_notified_s", "notified_s", "escalated_s")  # times of an incident that goes on


@dataclass(slots=True)
class Alert:
    """key: what makes it the same alert; hold_s: how long it must hold before it is an incident; count: of
    devices, of which `devices` names some; labels: what silences match, `kind` and `severity` among them."""

    key: str
    kind: str
    severity: str
    title: str
    since_s: float
    labels: dict[str, str] = field(default_factory=dict)
    evidence: dict[str, Any] = field(default_factory=dict)
    devices: list[str] = field(default_factory=list)
    count: int = 1
    hold_s: float = 0.0


@dataclass(slots=True)
class Incident:
    id: int
    key: str
    kind: str
    severity: str
    title: str
    labels: dict[str, str]
    evidence: dict[str, Any]
    devices: list[str]
    count: int
    start_s: float
    opened_s: float  # when it was known
    end_s: float | None = None
    acknowledged_s: float | None = None
    acknowledged_by: str = ""
    silenced: bool = False
    first_notified_s: float | None = None
    notified_s: float | None = None  # the last time
    notifications: int = 0
    escalated_s: float | None = None
    digested: bool = False
    sent_labels: dict[str, str] = field(default_factory=dict)  # of the first notification

    def not_after(self, now_s: float) -> "Incident":
        """Nothing of it was in the future: the clock that its times are of was ahead, and was set since."""
        for name in ("start_s", *_MOVED):
            value = getattr(self, name)
            if value is not None and value > now_s:
                setattr(self, name, now_s)
        return self

    def dump(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def load(cls, saved: Mapping[str, Any]) -> "Incident":
        """Raises KeyError, TypeError or ValueError for what is none."""
        made = cls(**{name: saved[name] for name in cls.__dataclass_fields__ if name in saved})
        times = [getattr(made, name) for name in ("start_s", "opened_s")]
        times += [value for name in (*_MOVED, "end_s") if (value := getattr(made, name)) is not None]
        texts = [made.key, made.kind, made.title, *made.labels.values(), *made.devices]
        if not all(isinstance(value, float | int) for value in times) or not all(
            isinstance(text, str) for text in texts
        ):
            raise TypeError("an incident has times and texts")
        if made.severity not in SEVERITIES or type(made.id) is not int or type(made.count) is not int:
            raise ValueError("an incident has a number, a count of devices and a severity")
        made.evidence.items()
        return made


@dataclass(frozen=True, slots=True)
class Silence:
    """matchers: label=value or label=~pattern, all of which must match; until_s: its end."""

    id: str
    matchers: tuple[str, ...]
    until_s: float
    by: str = ""
    comment: str = ""

    @classmethod
    def load(cls, name: str, saved: Mapping[str, Any]) -> "Silence":
        """Raises KeyError, TypeError or ValueError for what is none."""
        matchers = tuple(str(matcher) for matcher in saved["matchers"])
        for matcher in matchers:
            split_matcher(matcher)
        return cls(name, matchers, float(saved["until_s"]), str(saved.get("by", "")), str(saved.get("comment", "")))

    def covers(self, labels: Mapping[str, str], now_s: float) -> bool:
        return now_s < self.until_s and all(_matches(matcher, labels) for matcher in self.matchers)


def _matches(matcher: str, labels: Mapping[str, str]) -> bool:
    name, sign, value = split_matcher(matcher)
    found = labels.get(name, "")
    return patterns.matches(value, found) if sign == "=~" else found == value


def split_matcher(matcher: str) -> tuple[str, str, str]:
    """-> label, "=" or "=~", value. Raises ValueError with the fix."""
    if len(matcher) > MAX_MATCHER:
        raise ValueError(f"a matcher of {len(matcher)} characters; at most {MAX_MATCHER}")
    name, sign, value = matcher.partition("=")
    if not sign or not name.strip():
        raise ValueError(f"matcher {matcher!r}: write label=value or label=~pattern, for example site=berlin")
    if name.strip() not in LABELS:
        raise ValueError(f"matcher {matcher[:40]!r}: no incident has such a label; labels: {' '.join(LABELS)}")
    if value.startswith("~"):
        try:
            patterns.compiled(value[1:])
        except ValueError as error:
            raise ValueError(f"matcher {matcher!r}: {error}") from None
        return name.strip(), "=~", value[1:]
    return name.strip(), "=", value


@dataclass(frozen=True, slots=True)
class Policy:
    """Times in seconds. quiet: (from, until) in seconds of the local day, or None; digest_s: second of the local day,
    or None; digest: severities that wait for it."""

    group_by: tuple[str, ...] = ("kind", "site")
    group_wait_s: float = 30.0
    group_interval_s: float = 300.0
    repeat_s: float = 4 * HOUR_S
    escalate_s: float | None = None
    quiet: tuple[float, float] | None = None
    digest_s: float | None = 8 * HOUR_S
    digest: tuple[str, ...] = ("info",)
    resolved: bool = True


@dataclass(frozen=True, slots=True)
class Notification:
    """reason: firing, repeat, resolved, escalation or digest."""

    reason: str
    group: str
    incidents: tuple[Incident, ...]
    at_s: float

    @property
    def severity(self) -> str:
        return max((incident.severity for incident in self.incidents), key=SEVERITIES.index)


@dataclass(slots=True)
class _Group:
    first_s: float
    sent_s: float | None = None


class Incidents:
    """step(alerts, now_s): what holds now; due(now_s): the notifications to send now. day_s(now_s) -> the second of the
    local day. `changed` has the ids of the incidents that differ from what is in the database. unsent: ids of those of
    `saved` of which a notification was not delivered: they are sent again."""

    def __init__(
        self,
        policy: Policy,
        saved: Iterable[Incident] = (),
        day_s: Callable[[float], float] = lambda now_s: now_s % DAY_S,
        last_id: int = 0,
        unsent: Collection[int] = (),
    ) -> None:
        self.policy = policy
        self.silences: list[Silence] = []
        self.open: dict[str, Incident] = {}
        self.ended: list[Incident] = []
        self.changed: set[int] = set()
        self._by_id: dict[int, Incident] = {}
        self._day_s = day_s
        self._pending: dict[str, float] = {}  # alert: since when it holds
        self._groups: dict[str, _Group] = {}
        self._resolved: list[Incident] = []
        self._digest_s: float | None = None  # the last hour of a digest
        self._last_id = last_id
        for incident in sorted(saved, key=lambda each: each.id):
            self._by_id[incident.id] = incident
            self._last_id = max(self._last_id, incident.id)
            if incident.id in unsent:
                self._anew(incident)
            if incident.end_s is None:
                self.open[incident.key] = incident
                if incident.first_notified_s is not None:
                    self._groups[self._group(incident)] = _Group(incident.start_s, incident.notified_s)
            else:
                self.ended.append(incident)

    def _anew(self, incident: Incident) -> None:
        """As if it had not been sent yet."""
        self.changed.add(incident.id)
        if incident.end_s is not None and not incident.digested:
            self._resolved.append(incident)
        else:
            incident.notified_s = incident.escalated_s = None
            incident.digested = False

    @property
    def held(self) -> set[int]:
        """Ids of those that ended and of which the end is not sent yet, in quiet hours."""
        return {incident.id for incident in self._resolved}

    def get(self, number: int) -> Incident | None:
        return self._by_id.get(number)

    def step(self, alerts: Mapping[str, Alert], now_s: float) -> None:
        """alerts: by key. What is not among them any more has ended."""
        for key, alert in alerts.items():
            incident = self.open.get(key)
            if incident is None:
                since_s = self._pending.setdefault(key, now_s)
                if now_s - since_s >= alert.hold_s:
                    del self._pending[key]
                    self._open(alert, since_s, now_s)
            elif (alert.title, alert.count, self._labels(alert)) != (incident.title, incident.count, incident.labels):
                incident.title, incident.count, incident.severity = alert.title, alert.count, alert.severity
                incident.evidence, incident.labels = alert.evidence, self._labels(alert)
                incident.devices = alert.devices[:MAX_DEVICES]
                self.changed.add(incident.id)
        for key in [key for key in self._pending if key not in alerts]:
            del self._pending[key]
        for key in [key for key in self.open if key not in alerts]:
            self._end(self.open.pop(key), now_s)
        for incident in self.open.values():
            silenced = any(silence.covers(incident.labels, now_s) for silence in self.silences)
            if silenced != incident.silenced:
                incident.silenced = silenced
                self.changed.add(incident.id)

    @staticmethod
    def _labels(alert: Alert) -> dict[str, str]:
        return {"kind": alert.kind, "severity": alert.severity, **alert.labels}

    def _open(self, alert: Alert, opened_s: float, now_s: float) -> None:
        self._last_id += 1
        incident = Incident(
            self._last_id,
            alert.key,
            alert.kind,
            alert.severity,
            alert.title,
            self._labels(alert),
            alert.evidence,
            alert.devices[:MAX_DEVICES],
            alert.count,
            min(alert.since_s, now_s),
            opened_s,
        )
        self.open[alert.key] = self._by_id[incident.id] = incident
        self.changed.add(incident.id)

    def _end(self, incident: Incident, now_s: float) -> None:
        incident.end_s = now_s
        self.changed.add(incident.id)
        self.ended.append(incident)
        if incident.first_notified_s is not None and not incident.digested and self.policy.resolved:
            self._resolved.append(incident)
        if len(self.ended) > MAX_KEPT:
            old = self.ended.pop(0)
            self._by_id.pop(old.id, None)
            self.changed.add(old.id)  # no longer there: to be deleted

    def acknowledge(self, number: int, by: str, now_s: float) -> Incident | None:
        """It is not repeated and not escalated from now on."""
        incident = self._by_id.get(number)
        if incident is not None and incident.acknowledged_s is None:
            incident.acknowledged_s, incident.acknowledged_by = now_s, by
            self.changed.add(number)
        return incident

    def shift(self, seconds: float) -> None:
        """The clock that now_s comes from was set by so much."""
        for incident in self.open.values():
            incident.start_s += seconds
            for name in _MOVED:
                value = getattr(incident, name)
                if value is not None:
                    setattr(incident, name, value + seconds)
        self._pending = {key: since_s + seconds for key, since_s in self._pending.items()}
        for group in self._groups.values():
            group.first_s += seconds
            group.sent_s = None if group.sent_s is None else group.sent_s + seconds

    # --- notifications --------------------------------------------------------------------------------------------

    def _group(self, incident: Incident) -> str:
        return ",".join(f"{name}={incident.labels.get(name, '')}" for name in self.policy.group_by)

    def _quiet(self, now_s: float) -> bool:
        if self.policy.quiet is None:
            return False
        begin_s, end_s = self.policy.quiet
        day_s = self._day_s(now_s)
        return begin_s <= day_s < end_s if begin_s <= end_s else day_s >= begin_s or day_s < end_s

    def due(self, now_s: float) -> list[Notification]:
        """What has to be sent now; it counts as sent."""
        policy = self.policy
        found: list[Notification] = []
        quiet = self._quiet(now_s)
        by_group: dict[str, list[Incident]] = {}
        for incident in self.open.values():
            if incident.silenced or incident.severity in policy.digest or (quiet and incident.severity != "critical"):
                continue
            by_group.setdefault(self._group(incident), []).append(incident)
        for name, members in by_group.items():
            group = self._groups.setdefault(name, _Group(min(incident.opened_s for incident in members)))
            new = [incident for incident in members if incident.notified_s is None]
            if new and (
                now_s - group.first_s >= policy.group_wait_s
                if group.sent_s is None
                else now_s - group.sent_s >= policy.group_interval_s
            ):
                found.append(self._notify("firing", name, new, now_s))
                group.sent_s = now_s
            again = [
                incident
                for incident in members
                if incident.notified_s is not None
                and incident.acknowledged_s is None
                and now_s - incident.notified_s >= policy.repeat_s
            ]
            if again:
                found.append(self._notify("repeat", name, again, now_s))
                group.sent_s = now_s
            if policy.escalate_s is not None:
                late = [
                    incident
                    for incident in members
                    if incident.first_notified_s is not None
                    and incident.acknowledged_s is None
                    and incident.escalated_s is None
                    and now_s - incident.first_notified_s >= policy.escalate_s
                ]
                if late:
                    for incident in late:
                        incident.escalated_s = now_s
                    found.append(self._notify("escalation", name, late, now_s))
        if len(by_group) < len(self._groups):
            known = {self._group(incident) for incident in self.open.values()}
            self._groups = {name: group for name, group in self._groups.items() if name in known}
        found += self._ends(now_s, quiet)
        found += self._digests(now_s)
        return found

    def _ends(self, now_s: float, quiet: bool) -> list[Notification]:
        ready: list[Incident] = []
        later: list[Incident] = []
        for incident in self._resolved:
            (later if quiet and incident.severity != "critical" else ready).append(incident)
        self._resolved = later
        groups: dict[str, list[Incident]] = {}
        for incident in ready:
            if not incident.silenced:
                groups.setdefault(self._group(incident), []).append(incident)
        return [
            Notification("resolved", name, tuple(replace(each) for each in ended), now_s)
            for name, ended in groups.items()
        ]

    def _digests(self, now_s: float) -> list[Notification]:
        at_s = self.policy.digest_s
        if at_s is None:
            return []
        day_s = self._day_s(now_s)
        hour_s = now_s - day_s + at_s - (0.0 if day_s >= at_s else DAY_S)  # the last one; off by the clock's change
        before_s, self._digest_s = self._digest_s, hour_s
        if before_s is not None and hour_s < before_s + DAY_S / 2:
            return []
        waiting = [
            incident
            for incident in [*self.open.values(), *self.ended]
            if incident.severity in self.policy.digest and not incident.digested and not incident.silenced
        ]
        if before_s is None and all(incident.opened_s >= hour_s for incident in waiting):
            return []  # begun just now, and no digest was missed
        if not waiting:
            return []
        for incident in waiting:
            incident.digested = True
        return [self._notify("digest", "", waiting, now_s)]

    def _notify(self, reason: str, group: str, incidents: list[Incident], now_s: float) -> Notification:
        for incident in incidents:
            incident.sent_labels = incident.sent_labels or incident.labels
            incident.first_notified_s = incident.first_notified_s or now_s
            incident.notified_s = now_s
            incident.notifications += 1
            self.changed.add(incident.id)
        # what is sent is how it was then: the incidents go on
        return Notification(reason, group, tuple(replace(incident) for incident in incidents), now_s)
