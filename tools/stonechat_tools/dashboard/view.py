"""The fleet as browsers show it: one row a device, and which rows have changed since a browser last heard.

A View reads what the collector has committed. poll() looks at what is new; snapshot() is all of it, by columns, which
compress well; changes() is what has happened since a version. Texts that many devices share are sent once, as a list
that only grows; when it holds too many that nobody has any more, a new epoch begins and browsers start again.
"""

import gzip
import json
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from ..fleet import labels as labels_of_devices
from ..fleet.incidents import Incident
from ..fleet.labels import NONE, Labels
from ..fleet.overview import STALE_S, marks
from ..fleet.presence import STATES, Device
from ..fleet.store import Store
from ..fleet.wire import LEVELS

# What a row has, in this order. "since" and "seen" are seconds after `base`; score and evidence are hundredths.
TEXTS = ("name", "class", "site", "tags", "model", "firmware", "schema", "why", "marks", "cause", "response", "update")
NUMBERS = ("state", "since", "level", "score", "evidence", "seen", "lost", "unexplained", "reports")
FIELDS = ("device", *TEXTS, *NUMBERS)
AGAIN_S = 30.0  # a commit may be as much later than the time that it notes
MODEL_DIGITS = 16
MOST_GROUPS = 20  # classes and models that are counted by name; the rest is OTHER
OTHER = "other"
Row = tuple[Any, ...]


class View:
    """store: read only. poll() raises StoreError with the view as it was; everything else may be called from any
    thread."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()
        self._generation = -1
        self.ready = False  # whether it was read once
        self._begin()

    def _begin(self) -> None:
        """A new epoch: nothing is known."""
        self.epoch = secrets.token_hex(4)
        self.version = 0
        self.base = int(self._clock())
        self.rows: dict[str, Row] = {}
        self._versions: dict[str, int] = {}  # of each row, and of those that are gone
        self._strings: dict[str, int] = {"": 0}
        self._texts: list[str] = [""]  # the same by number
        self._touched: set[str] = set()  # devices whose row is to be made
        self._facts: dict[str, dict[str, Any]] = {}  # as Store.devices() gives them
        self._presence: dict[str, tuple[str, Device]] = {}
        self._labels: dict[str, Labels] = {}
        self._causes: dict[str, str] = {}
        self._notes: dict[str, dict[str, str]] = {}
        self._heard_s: float | None = None
        self._made: tuple[int, bytes] = (-1, b"")
        self.incidents: list[Incident] = []
        self.incidents_version = 0
        self.listening: tuple[float, float] | None = None

    # --- reading the database -------------------------------------------------------------------------------------

    def poll(self) -> bool:
        """-> whether anything has changed."""
        with self._lock:
            listening = self._store.listening()  # first: a database that was moved is opened anew by that
            if self._store.engine.generation != self._generation or len(self._strings) > 4 * len(self.rows) + 2000:
                self._begin()
            changed = self._read(listening)
            self._generation = self._store.engine.generation
            self.ready = True
            return changed

    def _read(self, listening: tuple[float, float] | None) -> bool:
        store, now_s = self._store, self._clock()
        facts = store.devices(since_s=None if self._heard_s is None else self._heard_s - AGAIN_S)
        presence = store.note_texts("presence")
        notes = {kind: store.note_texts(kind) for kind in (labels_of_devices.KIND, "incident", "cause")}
        touched = self._touched  # kept where something below can't be read: what was taken up is not new the next time
        for row in facts:
            name = row["device"]
            if self._facts.get(name) != row:
                self._facts[name] = row
                touched.add(name)
        for name, text in presence.items():
            known = self._presence.get(name)
            if known is None or known[0] is not text and known[0] != text:
                self._presence[name] = (text, Device.load(name, json.loads(text)))
                touched.add(name)
        touched |= self._read_labels(notes[labels_of_devices.KIND])
        before = self.version
        if notes["incident"] != self._notes.get("incident"):
            found = [Incident.load(json.loads(value)) for value in notes["incident"].values()]
            self.incidents = sorted(found, key=lambda incident: -incident.id)
            self.incidents_version += 1
            self.version += 1
        if notes["cause"] != self._notes.get("cause") or notes["incident"] != self._notes.get("incident"):
            touched |= self._read_causes(notes["cause"])
        self._notes = notes
        # by the collector's clock: that of its machine may be behind this one
        self._heard_s = now_s if listening is None else min(now_s, listening[1])
        stale = self._is_stale(self.listening, now_s), listening is None
        self.listening = listening
        if stale != (self._is_stale(listening, now_s), listening is None):
            self.version += 1
        self._make(touched, now_s)
        touched.clear()
        return self.version != before

    def _read_labels(self, texts: dict[str, str]) -> set[str]:
        if texts == self._notes.get(labels_of_devices.KIND):
            return set()
        found = {name: Labels.load(json.loads(text)) for name, text in texts.items()}
        before, self._labels = self._labels, found
        return {name for name in found.keys() | before.keys() if found.get(name) != before.get(name)}

    def _read_causes(self, texts: dict[str, str]) -> set[str]:
        labels = {incident.key: incident.labels for incident in self.incidents if incident.end_s is None}
        found: dict[str, str] = {}
        for key, text in texts.items():
            about = labels.get(key.rsplit(" ", 1)[-1], {})
            shown = " and ".join(f"{kind} {about[kind]}" for kind in ("site", "class", "tag") if kind in about)
            found |= dict.fromkeys(json.loads(text)["away"], shown or "one network")
        before, self._causes = self._causes, found
        return {name for name in found.keys() | before.keys() if found.get(name) != before.get(name)}

    # --- rows -----------------------------------------------------------------------------------------------------

    def _make(self, names: Iterable[str], now_s: float) -> None:
        changed = []
        for name in names:
            row = self._row(name, now_s)
            if row != self.rows.get(name):
                changed.append((name, row))
        if not changed:
            return
        self.version += 1
        for name, row in changed:
            self._versions[name] = self.version
            if row is None:
                self.rows.pop(name, None)
            else:
                self.rows[name] = row

    def _row(self, name: str, now_s: float) -> Row | None:
        labels = self._labels.get(name, NONE)
        facts = self._facts.get(name)
        if labels.removed_s is not None or facts is None:
            return None
        held = self._presence.get(name)
        device = held[1] if held else Device(name, facts["first_seen_s"])
        words = marks(facts) + (["comes and goes"] if device.flapping(now_s) else [])
        text = self._text
        return (
            name,
            text(labels.name),
            text(labels.group),
            text(labels.site),
            text(", ".join(labels.tags)),
            text((facts.get("model") or "")[:MODEL_DIGITS]),
            text(facts.get("firmware") or ""),
            text(schema_name(facts.get("schema") or "")),
            text(device.why),
            text(", ".join(words)),
            text(self._causes.get(name, "")),
            text(shown(facts.get("response"))),
            text(shown(facts.get("update"))),
            STATES.index(device.state) if device.state in STATES else STATES.index("unknown"),
            round(device.since_s) - self.base,
            facts["level"],
            _hundredths(facts["score"]),
            _hundredths(facts["evidence"]),
            round(facts["last_seen_s"]) - self.base,
            facts["lost"],
            device.unexplained,
            facts["reports"],
        )

    def _text(self, text: str) -> int:
        found = self._strings.get(text)
        if found is None:
            found = self._strings[text] = len(self._strings)
            self._texts.append(text)
        return found

    @staticmethod
    def _is_stale(listening: tuple[float, float] | None, now_s: float) -> bool:
        return listening is None or now_s - listening[1] > STALE_S

    # --- what browsers get ----------------------------------------------------------------------------------------

    def _about(self) -> dict[str, Any]:
        now_s = self._clock()
        open_now = [incident for incident in self.incidents if incident.end_s is None]
        return {
            "version": self.version,
            "now": int(now_s),
            "open": len(open_now),
            "news": sum(incident.acknowledged_s is None and not incident.silenced for incident in open_now),
            "incidents": self.incidents_version,
            "listening": None if self.listening is None else [int(self.listening[0]), int(self.listening[1])],
            "stale": self._is_stale(self.listening, now_s),
        }

    def snapshot(self) -> bytes:
        """All devices as JSON, compressed with gzip."""
        with self._lock:
            if self._made[0] != self.version:
                rows = [self.rows[name] for name in sorted(self.rows)]
                about = self._about() | {
                    "epoch": self.epoch,
                    "base": self.base,
                    "fields": FIELDS,
                    "texts": TEXTS,
                    "states": STATES,
                    "levels": LEVELS,
                    "strings": self._texts,
                    "columns": [list(column) for column in zip(*rows, strict=True)] or [[] for _ in FIELDS],
                }
                self._made = self.version, gzip.compress(_json(about), 6, mtime=0)
            return self._made[1]

    def changes(self, epoch: str, version: int, strings: int) -> bytes | None:
        """What has happened since: rows, devices that are gone, and texts from number `strings` on, as JSON; None
        where there is nothing to go on from, and the browser has to start again."""
        with self._lock:
            if epoch != self.epoch or not 0 <= version <= self.version or not 0 < strings <= len(self._strings):
                return None
            names = [name for name, changed in self._versions.items() if changed > version]
            about = self._about()
            about["rows"] = [self.rows[name] for name in names if name in self.rows]
            about["gone"] = [name for name in names if name not in self.rows]
            about["strings"] = self._texts[strings:]
            return _json(about)

    def facts(self, device: str) -> dict[str, Any] | None:
        with self._lock:
            row = self.rows.get(device)
            if row is None:
                return None
            found = dict(zip(FIELDS, row, strict=True))
            found |= {name: self._texts[found[name]] for name in TEXTS}
            return found | {"state": STATES[found["state"]], "since": found["since"] + self.base}

    def summary(self) -> dict[str, Any]:
        """For the metrics: devices by state and by level, reports, losses, incidents that are open."""
        with self._lock:
            at = {name: FIELDS.index(name) for name in FIELDS}
            rows = list(self.rows.values())
            strings = self._texts
            by: dict[str, Counter[tuple[str, str]]] = {}
            for label in ("class", "model"):
                most = {text for text, _ in Counter(row[at[label]] for row in rows).most_common(MOST_GROUPS)}
                by[label] = Counter(
                    (strings[row[at[label]]] if row[at[label]] in most else OTHER, LEVELS[row[at["level"]]])
                    for row in rows
                    if row[at["level"]] < len(LEVELS)
                )
            return {
                **by,
                "states": Counter(STATES[row[at["state"]]] for row in rows),
                "levels": Counter(LEVELS[row[at["level"]]] for row in rows if row[at["level"]] < len(LEVELS)),
                "reports": sum(facts["reports"] for facts in self._facts.values()),
                "lost": sum(facts["lost"] for facts in self._facts.values()),
                "unexplained": sum(row[at["unexplained"]] for row in rows),
                "open": Counter(
                    (incident.kind, incident.severity) for incident in self.incidents if incident.end_s is None
                ),
                "listening": self.listening,
            }


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _hundredths(value: float | None) -> int | None:
    return None if value is None else round(value * 100)


def schema_name(schema: str) -> str:
    from ..schemas import SCHEMAS

    found = SCHEMAS.get(bytes.fromhex(schema)) if schema else None
    return found.name if found else schema[:MODEL_DIGITS]


def shown(value: Any) -> str:
    """What a status says of something that this page knows no more of, as a text of some words."""
    if value in (None, "", [], {}):
        return ""
    if isinstance(value, dict):
        if "shown" in value:
            return str(value["shown"])[:80]
        return ", ".join(f"{name} {each}" for name, each in value.items() if each not in (None, "", []))[:80]
    return (", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value))[:80]
