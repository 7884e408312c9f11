"""What the monitor keeps in the database: presence, causes, usual rates, open incidents; and what an operator changed.

Written beside the reports, so that a restart of the collector goes on where the last one ended.
"""

from collections.abc import Callable
from itertools import islice
from typing import Any

from . import labels as labels_of_devices
from . import wire
from .incidents import Incident, Incidents, Silence
from .judgements import Judgements
from .labels import readable
from .presence import Device, Fleet
from .shards import Shard
from .store import Store, StoreError

SAVE_S = 300.0
MAX_SAVED = 5000  # devices whose presence is written in one step
MAX_IDS = 100_000_000  # of incidents of one collector among several
UNSENT = "unsent"  # the kind of note


class Notes:
    """undelivered() -> ids of the incidents whose notification is on its way: those are sent again after a restart.
    Every method raises StoreError."""

    def __init__(self, store: Store, shard: Shard, undelivered: Callable[[], set[int]]) -> None:
        self._store = store
        self._shard = shard
        self._part = f"{shard.name} " if shard.of > 1 else ""  # before names that are this collector's own
        self._undelivered = undelivered
        self._unsent: list[int] | None = None  # as in the database
        self._saved_s = -1e18  # when the rates were
        self._changed: Any = None
        self._generation = store.engine.generation

    # --- from the database ----------------------------------------------------------------------------------------

    def load(self, judged: Judgements, now_s: float) -> tuple[list[Incident], list[int]]:
        """Into `judged` -> (the incidents, ids of those to notify again)."""
        store = self._store
        judged.labels = labels_of_devices.read(store)
        saved = store.notes("presence")
        for row in store.devices():
            name = row["device"]
            if name in self._shard:
                facts = (row.get("schema") or "", row.get("model") or "", row.get("firmware") or "")
                device = readable(_device, row, saved.get(name), now_s) or _device(row, None, now_s)
                if device.not_after(now_s):
                    judged.fleet.changed.add(device)
                judged.add(device, row["level"], facts, now_s)
        for key, value in store.notes("cause").items():
            if key.startswith(self._part):
                readable(judged.causes.load, key[len(self._part) :], value)
        for name, value in store.notes("rate").items():
            if name.startswith(self._part):
                readable(judged.sense.load_rate, name[len(self._part) :], value, now_s)
        for cause in judged.causes.open:
            cause.start_s, cause.last_s = min(cause.start_s, now_s), min(cause.last_s, now_s)
        known = incidents_in(store)
        own = [each.not_after(now_s) for each in known if each.id // MAX_IDS == self._shard.number - 1]
        open_keys = {each.key for each in own if each.end_s is None}
        if not any(key.startswith(("outbreak-", "model-")) for key in open_keys):  # those account for alarms
            for name in judged.in_alarm():
                if f"alarm-{name}" not in open_keys:  # the last collector was killed before it could make one
                    self._alarm(judged, name)
        unsent = store.notes(UNSENT, self._part or "all").get(self._part or "all", [])
        return own, [number for number in unsent if type(number) is int] if isinstance(unsent, list) else []

    def _alarm(self, judged: Judgements, name: str) -> None:
        query = (
            "SELECT body FROM reports WHERE device = (SELECT id FROM devices WHERE name = ?)"
            " AND level = 2 AND windows > 0 AND late_s IS NULL ORDER BY at_s DESC LIMIT 1"
        )
        for (body,) in self._store.rows(query, (name,)):
            judged.alarmed(wire.reread(name, bytes(body)))

    def look(self, judged: Judgements, incidents: Incidents, now_s: float) -> None:
        """At what an operator has changed."""
        store = self._store
        changed = store.notes(labels_of_devices.CHANGED)
        if changed == self._changed:
            return
        self._changed = changed
        judged.relabel(labels_of_devices.read(store), now_s)
        incidents.silences = silences_in(store)
        done = []
        for name, request in store.notes("request").items():
            if readable(self._asked, request, judged, incidents, now_s) is not False:
                done.append(name)
        if done:
            store.note("request", dict.fromkeys(done))

    def _asked(self, request: dict[str, Any], judged: Judgements, incidents: Incidents, now_s: float) -> bool:
        """-> whether it is done; what is for another collector stays."""
        if request["do"] == "acknowledge" and incidents.get(request["incident"]) is not None:
            incidents.acknowledge(request["incident"], request["by"], now_s)
            return True
        if request["do"] == "trust" and request["device"] in self._shard:
            judged.fleet.trust(request["device"])
            return True
        return False

    # --- to the database ------------------------------------------------------------------------------------------

    def save(self, judged: Judgements, incidents: Incidents, now_s: float) -> None:
        """What has changed since the last time."""
        store = self._store
        if store.engine.generation != self._generation:  # another database: what is known goes into it
            self._generation = store.engine.generation
            self._all_anew(judged, incidents)
        self._save_presence(judged.fleet, MAX_SAVED)
        open_causes = {cause.key: cause.dump() for cause in judged.causes.open if cause.dirty}
        if open_causes or judged.causes.over:
            changes = {**open_causes, **dict.fromkeys(judged.causes.over)}
            store.note("cause", {self._part + key: value for key, value in changes.items()})
            judged.causes.over.clear()
            for cause in judged.causes.open:
                cause.dirty = False
        if now_s - self._saved_s >= SAVE_S:
            self._saved_s = now_s
            store.note("rate", {self._part + name: rate for name, rate in judged.sense.dump_rates().items()})
        # before the incidents, which are then noted as sent: killed between both, it is sent twice, not never
        unsent = sorted(self._undelivered() | incidents.held)
        if unsent != self._unsent:
            store.note(UNSENT, {self._part or "all": unsent or None})
            self._unsent = unsent
        if incidents.changed:
            changed, incidents.changed = incidents.changed, set()
            values: dict[str, Any] = {}
            for number in changed:
                incident = incidents.get(number)
                values[str(number)] = None if incident is None else incident.dump()
            try:
                store.note("incident", values)
            except StoreError:
                incidents.changed |= changed
                raise

    def _save_presence(self, fleet: Fleet, most: int) -> None:
        """Of up to `most` devices at once; of the others the next time."""
        part = list(islice(fleet.changed, most))
        if part:
            self._store.note("presence", {device.name: device.dump() for device in part})
            if len(part) == len(fleet.changed):
                fleet.changed = set()  # an emptied one keeps its memory, after a start 40 bytes of each device
            else:
                fleet.changed.difference_update(part)

    def save_all(self, judged: Judgements, incidents: Incidents, now_s: float) -> None:
        """At the end, with what changes too often to be written each time."""
        judged.fleet.changed.update(judged.fleet)
        self._saved_s = -1e18
        while judged.fleet.changed:
            self._save_presence(judged.fleet, MAX_SAVED)
        self.save(judged, incidents, now_s)

    def _all_anew(self, judged: Judgements, incidents: Incidents) -> None:
        self._saved_s = -1e18
        self._unsent = None
        judged.fleet.changed.update(judged.fleet)
        for cause in judged.causes.open:
            cause.dirty = True
        incidents.changed |= {incident.id for incident in incidents.open.values()}

    def shown(self, judged: Judgements, device: str) -> None:
        """A removed device that sends something new is there after all."""
        labels_of_devices.write(self._store, {device: judged.labels[device]})

    def forget_times(self) -> None:
        """The clock was set: what is due by it is due now."""
        self._saved_s = -1e18


def incidents_in(store: Store) -> list[Incident]:
    found = [readable(Incident.load, value) for value in store.notes("incident").values()]
    return [incident for incident in found if incident is not None]


def silences_in(store: Store) -> list[Silence]:
    found = [readable(Silence.load, name, value) for name, value in store.notes("silence").items()]
    return [silence for silence in found if silence is not None]


def _device(row: dict[str, Any], saved: dict[str, Any] | None, now_s: float) -> Device:
    """Of the table of devices, and its note of presence if it has one."""
    name = row["device"]
    if saved is None:  # of a database from before there was presence
        device = Device(name, row["last_seen_s"])
        device.online = row["online"]
        if row["online_since_s"]:
            device.own().will_s = row["online_since_s"]
        if row["conflicts"]:
            device.lie("its key is used twice", row["conflict_s"] or row["last_seen_s"])
    else:
        device = Device.load(name, saved)
    if row["last_seen_s"] <= now_s or device.heard_s > now_s:
        device.heard_s = max(device.heard_s, row["last_seen_s"])
    device.window_s = (row["window_ms"] or 0) / 1000
    device.announced_s = row.get("heartbeat_s") or 0
    device.windows = max(device.windows, row["heartbeat_windows"])
    return device
