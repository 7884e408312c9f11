"""What the pages ask for, as values for JSON. All of it reads or writes the database; nothing here knows of HTTP."""

import contextlib
import re
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stonechat.errors import ConfigError

from ..fleet import manage, wire
from ..fleet.command import ask, check_arguments
from ..fleet.history import feature_names, name_of
from ..fleet.incidents import Incident
from ..fleet.monitor_notes import silences_in
from ..fleet.overview import channel_name
from ..fleet.presence import Device
from ..fleet.store import Row, Store, StoreError
from ..fleet.store import rollouts as kept
from ..release import operate
from . import audit
from .view import View, shown

MAX_POINTS = 2000
MAX_LISTED = 50  # reports in the table below the plot
MAX_INCIDENTS = 300
MAX_COMMANDS = 20
DAY_S = 86_400.0
# name: (seconds back, table; "" for the reports themselves)
SPANS = {
    "1h": (3600.0, ""),
    "6h": (6 * 3600.0, ""),
    "1d": (DAY_S, ""),
    "7d": (7 * DAY_S, "hourly"),
    "90d": (90 * DAY_S, "hourly"),
    "2y": (730 * DAY_S, "daily"),
}
# What the buttons of a device's page send; the times are seconds from now. own-model is left to the command line.
COMMANDS = ("report-now", "mute", "maintenance", "calibrate", "was-normal", "stop-responding", "respond", "release")
LASTING = ("mute", "maintenance")
MAX_ROLLOUTS = 50
ROLLOUT_ACTS = {  # as `stonechat release`: from which states, to which
    "pause": ((kept.RUNNING,), kept.PAUSED),
    "resume": ((kept.PAUSED, kept.HALTED), kept.RUNNING),
    "withdraw": ((*kept.LIVE, kept.DONE), kept.WITHDRAWN),
}


def device(store: Store, view: View, name: str, span: str, now_s: float | None = None) -> dict[str, Any] | None:
    """A device's page; None for a device that there is not."""
    facts = view.facts(name)
    rows = store.devices(name) if facts is not None else []
    if facts is None or not rows:
        return None
    now_s = time.time() if now_s is None else now_s
    back_s, table = SPANS[span]
    row = rows[0]
    held = store.notes("presence", name).get(name)
    presence = Device.load(name, held) if held else Device(name, row["first_seen_s"])
    presence.window_s = (row["window_ms"] or 0) / 1000
    presence.announced_s = row.get("heartbeat_s") or 0
    points = (
        _rolled(store.rollup(name, table, now_s - back_s))
        if table
        else _points(store.history(name, since_s=now_s - back_s, limit=MAX_POINTS))
    )
    latest = store.history(name, limit=MAX_LISTED)
    own = row.get("own_model")
    return {
        "row": facts,
        "span": span,
        "now": now_s,
        "from": now_s - back_s,
        "points": points,
        "reports": [_report(report, row) for report in reversed(latest)],
        "incidents": [_incident(each) for each in view.incidents if name in each.devices][:MAX_LISTED],
        "commands": [_command(each) for each in reversed(store.commands(name)[-MAX_COMMANDS:])],
        "facts": {
            "model": row.get("model"),
            "schema": facts["schema"] or row.get("schema"),
            "firmware": row.get("firmware"),
            "agent": row.get("agent"),
            "sources": row.get("sources") or [],
            "channels": row.get("channels") or [],
            "window_s": presence.window_s or None,
            "heartbeat_s": row.get("heartbeat_s"),
            "interval_s": presence.interval_s or None,
            "boot": row.get("boot"),
            "key": row["key"],
            "first_seen_s": row["first_seen_s"],
            "last_seen_s": row["last_seen_s"],
            "learning": row.get("learning"),
            "flags": row["flags"],
            "adaptation": None if row.get("adaptation_q8") is None else row["adaptation_q8"] / 256,
            "steady_since_s": row.get("steady_since_s"),
            "own_model": own and f"{own['shown']}" + (f", {own['refused']} failed" if own["refused"] else ""),
            "unscored": row.get("unscored") or [],
            "conflicts": row["conflicts"],
            "refused": row["refused"],
            "response": shown(row.get("response")),
            "update": shown(row.get("update")),
        },
    }


def _points(rows: list[Row]) -> dict[str, list[Any]]:
    """Columns, oldest first."""
    return {
        "time": [row.time_s for row in rows],
        "score": [row.score for row in rows],
        "low": [row.score_min if row.score_min is not None else row.score for row in rows],
        "high": [row.score_max if row.score_max is not None else row.score for row in rows],
        "evidence": [row.evidence for row in rows],
        "level": [row.level for row in rows],
    }


def _rolled(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    mean = [row["score_mean"] for row in rows]
    return {
        "time": [row["time_s"] for row in rows],
        "score": mean,
        "low": mean,
        "high": [row["score_max"] for row in rows],
        "evidence": [None] * len(rows),
        "level": [row["level"] for row in rows],
    }


def _report(row: Row, about: Mapping[str, Any]) -> dict[str, Any]:
    names = feature_names(dict(about), row.channel)
    return {
        "time": row.time_s,
        "known": row.time_known,
        "number": row.sequence,
        "late": row.late_s,
        "level": row.level,
        "flags": [name for bit, name in wire.FLAGS.items() if row.flags & bit],
        "windows": row.windows,
        "score": row.score,
        "evidence": row.evidence,
        "channel": channel_name(dict(about), row.channel),
        "features": [[name_of(f.index, names), f.deviation, f.share_percent] for f in row.features],
        "detail": row.detail,
    }


def _command(row: Mapping[str, Any]) -> dict[str, Any]:
    names = {code: name for name, code in wire.COMMANDS.items()}
    return {
        "sequence": row["sequence"],
        "time": row["sent_s"],
        "command": names.get(row["code"], "" if row["code"] is None else f"command {row['code']}"),
        "answer": None if row["result"] is None else wire.result_name(row["result"]),
        "answered": row["answered_s"],
    }


def _incident(incident: Incident) -> dict[str, Any]:
    left = ("first_notified_s", "escalated_s", "digested", "key", "sent_labels")
    return {name: value for name, value in asdict(incident).items() if name not in left}


def incidents(store: Store, view: View) -> dict[str, Any]:
    """Those that are open, the latest that are over, and the silences that hold."""
    known = view.incidents
    shown_ones = [each for each in known if each.end_s is None][:MAX_INCIDENTS]
    over = sorted((each for each in known if each.end_s is not None), key=lambda each: -(each.end_s or 0))
    now_s = time.time()
    return {
        "version": view.incidents_version,
        "now": now_s,
        "open": [_incident(each) for each in shown_ones],
        "over": [_incident(each) for each in over[:MAX_INCIDENTS]],
        "more": max(0, len(known) - len(shown_ones) - len(over[:MAX_INCIDENTS])),
        "silences": [asdict(each) for each in silences_in(store) if each.until_s > now_s],
    }


def rollouts(store: Store) -> dict[str, Any]:
    """Roll-outs of signed releases, the newest first, and which version each class runs."""
    found = [operate.facts_of(store, row) for row in kept.rollouts(store)]
    return {
        "now": time.time(),
        "rollouts": sorted(found, key=lambda each: -each["id"])[:MAX_ROLLOUTS],
        "versions": operate.in_the_field(store),
        "acts": {act: list(states) for act, (states, _) in ROLLOUT_ACTS.items()},
    }


# --- what an operator does --------------------------------------------------------------------------------------------


def acknowledge(store: Store, number: int, who: str) -> None:
    """Raises ConfigError."""
    manage.acknowledge(store, [number], who)
    audit.note(store, who, "acknowledge", incident=number)


def silence(store: Store, asked: Mapping[str, Any], who: str) -> str:
    """-> its id. Raises ConfigError."""
    matchers, lasts, comment = asked.get("matchers"), asked.get("for"), asked.get("comment", "")
    texts = isinstance(matchers, list) and 0 < len(matchers) <= 20 and all(isinstance(each, str) for each in matchers)
    if not texts or not isinstance(lasts, str) or not isinstance(comment, str):
        raise ConfigError("want matchers such as site=berlin, for such as 2h, and a comment")
    assert isinstance(matchers, list)
    identity, _ = manage.silence(store, matchers, lasts, comment, who)
    audit.note(store, who, "silence", id=identity, matchers=", ".join(matchers), lasts=lasts, comment=comment)
    return identity


def unsilence(store: Store, identity: str, who: str) -> None:
    """Raises ConfigError."""
    manage.unsilence(store, [identity])
    audit.note(store, who, "end of silence", id=identity)


def command(store: Store, operator: Path, name: str, asked: Mapping[str, Any], who: str) -> int:
    """Have a command signed and sent -> its number. Raises ConfigError."""
    what, lasts_s, number = asked.get("command"), asked.get("lasts_s"), asked.get("report")
    if what not in COMMANDS:
        raise ConfigError(f"command: want one of {', '.join(COMMANDS)}")
    now_s = int(time.time())
    arguments: list[int] = []
    if what in LASTING:
        if type(lasts_s) is not int or lasts_s < 0:
            raise ConfigError(f"{what}: want how long, in seconds; 0 ends it")
        arguments = [now_s + lasts_s]
    elif what == "was-normal":
        if type(number) is not int:
            raise ConfigError("was-normal: want the number of a report")
        arguments = [number]
    check_arguments(what, arguments, now_s)
    if not store.devices(name):
        raise ConfigError(f"{name[:64]}: no such device")
    audit.note(store, who, "command", device=name, command=what, arguments=arguments)
    sequence = ask(operator, name, what, arguments)
    with contextlib.suppress(StoreError):  # it is on its way all the same
        store.sent_command(name, sequence, wire.COMMANDS[what], arguments, now_s)
    return sequence


def change_rollout(store: Store, number: int, act: str, asked: Mapping[str, Any], who: str) -> None:
    """Pause, resume or withdraw. Raises ConfigError."""
    comment = asked.get("comment", "")
    if act not in ROLLOUT_ACTS:
        raise ConfigError(f"want one of {', '.join(ROLLOUT_ACTS)}")
    if not isinstance(comment, str) or not comment.isprintable() or len(comment) > 200:
        raise ConfigError("comment: at most 200 printable characters")
    found = next((row for row in kept.rollouts(store) if row.id == number), None)
    if found is None:
        raise ConfigError(f"roll-out {number}: there is none")
    states, state = ROLLOUT_ACTS[act]
    instead = kept.change(store, number, states, state, who, comment, time.time())
    if instead:
        raise ConfigError(f"{found}: its roll-out is {instead}: nothing to {act}")
    audit.note(store, who, f"roll-out: {act}", rollout=number, release=str(found), comment=comment)


def is_name(text: str) -> bool:
    """Whether a path's last part can be the name of a device, or a silence's id."""
    return re.fullmatch(r"[A-Za-z0-9_.:-]{1,64}", text) is not None
