"""Look after the fleet: who is there, name and group devices, remove them, and handle incidents.

What is changed here is in the database; a collector that runs takes it within seconds.

Examples:
  stonechat fleet                                          # each device: state, since when, why
  stonechat fleet set sensor-7 --name "Pump 1" --site berlin --class pump --tag outdoor
  stonechat fleet set 'sensor-*' --site berlin
  stonechat fleet remove sensor-7                          # hidden until it reports again; revoke its key first
  stonechat fleet trust sensor-7                           # it was called lying, and you have looked into that
  stonechat fleet incidents
  stonechat fleet acknowledge 12
  stonechat fleet decisions --since 1d                     # what devices have done about alarms, or would have done
  stonechat fleet silence site=berlin --for 2h --comment "network maintenance"
  stonechat fleet unsilence 1a2b3c4d
  stonechat fleet example > alerts.toml                    # for `stonechat collect --alerts alerts.toml`
  stonechat fleet try alerts.toml                          # does each receiver take a notification?
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from stonechat.errors import ConfigError

from ..console import plain_table, say, user_name
from . import alert_settings, alerts, labels
from .command import span_s
from .database import add_database_arguments, take_after_verbs
from .history import feature_names, name_of
from .incidents import LABELS, Incident, Notification, split_matcher
from .labels import NONE
from .monitor_notes import incidents_in, silences_in
from .overview import shown_states
from .presence import span
from .store import Store

HELP = "name, group and remove devices; see and handle incidents"
MAX_SILENCES = 200
MAX_SILENCE_S = 366 * 86_400
MAX_TEXT = 500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_database_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    verbs = parser.add_subparsers(dest="what", metavar="WHAT")
    verbs.add_parser("states", help="each device: state, since when, why (the default)")
    change = verbs.add_parser("set", help="name devices and put them into a class, a site, tags")
    change.add_argument("device", nargs="+", help="ids or patterns with *")
    change.add_argument("--name", help="to be shown in place of the id; '' for none")
    change.add_argument("--class", dest="group", metavar="CLASS", help="devices that should behave alike")
    change.add_argument("--site", help="devices that share a network")
    change.add_argument("--tag", action="append", default=[], help="may be repeated")
    change.add_argument("--untag", action="append", default=[], metavar="TAG", help="may be repeated")
    for name, text in (
        ("remove", "hide devices until they report again; their reports stay until retention deletes them"),
        ("restore", "show removed devices again"),
        ("trust", "take back that a device is lying, after its key was looked into"),
    ):
        verbs.add_parser(name, help=text).add_argument("device", nargs="+", help="ids or patterns with *")
    incidents = verbs.add_parser("incidents", help="what goes on; --all: also what has ended")
    incidents.add_argument("--all", action="store_true", help="also those that have ended")
    decisions = verbs.add_parser("decisions", help="what devices have done about alarms, or would have done")
    decisions.add_argument("device", nargs="?", help="default: all")
    decisions.add_argument("--since", default="7d", metavar="TIME", help="90s, 30m, 2h or 7d ago (default %(default)s)")
    acknowledge = verbs.add_parser("acknowledge", help="an incident is known: it is not sent again")
    acknowledge.add_argument("incident", nargs="+", type=int, help="its number")
    silence = verbs.add_parser("silence", help="send nothing about what matches, until its end")
    silence.add_argument("matcher", nargs="+", help="label=value or label=~pattern; labels: " + " ".join(LABELS))
    silence.add_argument("--for", dest="for_s", required=True, metavar="TIME", help="90s, 30m, 2h or 1d")
    silence.add_argument("--comment", default="", help="why")
    verbs.add_parser("silences", help="the silences that hold")
    verbs.add_parser("unsilence", help="end silences now").add_argument("silence", nargs="+", help="its id")
    verbs.add_parser("example", help="print a configuration for `stonechat collect --alerts`, every key explained")
    tried = verbs.add_parser("try", help="send a test to each receiver of a configuration")
    tried.add_argument("file", metavar="FILE", help="as for `stonechat collect --alerts`")
    take_after_verbs(verbs)


def run(args: argparse.Namespace) -> int:
    if args.what == "example":
        sys.stdout.write(alert_settings.example())
        return 0
    if args.what == "try":
        return _try(args)
    if "://" not in args.db and not Path(args.db).exists():
        raise ConfigError(f"{args.db}: no such database; `stonechat collect` makes it")
    with Store(args.db) as store:
        return ACTIONS[args.what or "states"](store, args)


def _try(args: argparse.Namespace) -> int:
    """The exit status is 1 where a receiver did not take it."""
    settings = alert_settings.load(args.file)
    if not settings.receivers:
        raise ConfigError(f"{args.file}: no receiver; `stonechat fleet example` shows how one is written")
    now_s = time.time()
    title = f"a test by {user_name()}: nothing is wrong"
    labels_of_test = {"kind": "test", "severity": "info"}
    test = Incident(0, "test", "test", "info", title, labels_of_test, {}, [], 0, now_s, now_s, now_s + 1)
    failed = 0
    for receiver in settings.receivers:
        error = ""
        try:
            alerts.send(receiver, Notification("firing", "", (test,), now_s), "", os.urandom(12).hex(), now_s)
        except Exception as failure:  # a receiver's library may raise anything
            error = str(failure) if isinstance(failure, ConfigError | alerts.DeliveryError) else repr(failure)
            failed += 1
        said = {"receiver": receiver.name, "taken": not error, "error": error}
        say(json.dumps(said) if args.json else error or f"{receiver.name}: taken")
    return 1 if failed else 0


def _states(store: Store, args: argparse.Namespace) -> int:
    states, now_s, stale = shown_states(store)
    if stale:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now_s))
        print(f"stonechat fleet: as of {when}, when a collector was last connected", file=sys.stderr)
    updates = {row["device"]: row["update"] for row in store.devices() if row.get("update")}
    rows = []
    for seen in states:
        update = updates.get(seen.device)
        if args.json:
            print(json.dumps(asdict(seen) | {"update": update}))
            continue
        state, known = seen.state, seen.labels
        words = [state.why, seen.cause and f"with others: {seen.cause}", "comes and goes" if seen.flapping else ""]
        words += [f"lost {seen.lost}" if seen.lost else ""]
        words += [f"lost, unexplained: {seen.unexplained}" if seen.unexplained else ""]
        rows.append(
            (
                seen.device + (f" ({known.name})" if known.name else ""),
                state.state,
                span(max(0.0, now_s - state.since_s)),
                ", ".join([known.site, known.group, *known.tags]).strip(", "),
                update["shown"] if update else "",
                "; ".join(word for word in words if word),
            )
        )
    if not args.json:
        print(plain_table(("device", "state", "for", "site, class, tags", "release", "why"), rows))
    return 0


def _done(args: argparse.Namespace, text: str, **facts: Any) -> None:
    print(json.dumps(facts) if args.json else text)


def _devices(store: Store, patterns: Sequence[str]) -> list[str]:
    """Raises ConfigError for one that matches nothing."""
    known = [row["device"] for row in store.devices()]
    found: dict[str, None] = {}
    for pattern in patterns:
        matches = [name for name in known if fnmatchcase(name, pattern)]
        if not matches:
            raise ConfigError(f"{pattern}: no such device; `stonechat fleet` shows them")
        found |= dict.fromkeys(matches)
    return list(found)


def _set(store: Store, args: argparse.Namespace) -> int:
    before = labels.read(store)
    after: dict[str, labels.Labels] = {}
    try:
        for device in _devices(store, args.device):
            found = before.get(device, NONE)
            found = replace(
                found,
                name=found.name if args.name is None else labels.checked(args.name, "name"),
                group=found.group if args.group is None else labels.checked(args.group, "class"),
                site=found.site if args.site is None else labels.checked(args.site, "site"),
                tags=labels.changed_tags(found.tags, args.tag, args.untag),
            )
            after[device] = found
    except ValueError as error:
        raise ConfigError(str(error)) from None
    labels.write(store, after)
    _done(
        args, f"{len(after)} devices changed" if len(after) > 1 else f"{next(iter(after))}: changed", changed=[*after]
    )
    return 0


def _remove(store: Store, args: argparse.Namespace) -> int:
    before, now_s = labels.read(store), time.time()
    devices = _devices(store, args.device)
    labels.write(store, {device: replace(before.get(device, NONE), removed_s=now_s) for device in devices})
    named = f"{', '.join(devices[:5])}{' ...' if len(devices) > 5 else ''}"
    _done(args, f"{named}: removed; a new report shows it again", removed=devices)
    return 0


def _restore(store: Store, args: argparse.Namespace) -> int:
    before = labels.read(store)
    devices = _devices(store, args.device)
    labels.write(store, {device: replace(before.get(device, NONE), removed_s=None) for device in devices})
    _done(args, f"{len(devices)} restored", restored=devices)
    return 0


def _request(store: Store, **what: Any) -> None:
    store.note("request", {os.urandom(6).hex(): what})
    labels.touch(store)


def _trust(store: Store, args: argparse.Namespace) -> int:
    devices = _devices(store, args.device)
    for device in devices:
        _request(store, do="trust", device=device)
    _done(args, f"{', '.join(devices)}: noted for the collector; a new sign makes it lying again", trusted=devices)
    return 0


def _incidents(store: Store, args: argparse.Namespace) -> int:
    found = incidents_in(store)
    found = sorted((each for each in found if args.all or each.end_s is None), key=lambda each: each.id)
    if args.json:
        for incident in found:
            print(json.dumps(incident.dump()))
        return 0
    rows = []
    for each in found:
        lasted_s = (each.end_s or time.time()) - each.start_s
        state = (
            "over" if each.end_s else "acknowledged" if each.acknowledged_s else "silenced" if each.silenced else "open"
        )
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.start_s))
        rows.append((str(each.id), each.severity, state, began, span(max(0.0, lasted_s)), each.title))
    print(plain_table(("id", "severity", "state", "since", "lasts", "incident"), rows) if rows else "no incidents")
    return 0


def _decisions(store: Store, args: argparse.Namespace) -> int:
    found = store.decisions(args.device, time.time() - span_s(args.since))
    if args.json:
        for entry in found:
            print(json.dumps(entry))
        return 0
    devices = {row["device"]: row for row in store.devices()}
    rows = []
    for each in found:
        at_s = each["end_s"] if each["began_s"] is None else each["began_s"]
        names = feature_names(devices.get(each["device"], {}), each["channel"])
        cause = ", ".join(f"{name_of(index, names)} {z:+.1f}" for index, z, _ in each["features"])
        effect = ""
        if each["end_s"] is not None:
            sent = f"a window's packets {each['before']} before, {each['after']} after"
            effect = sent + (f"; {each['stopped']} stopped, {each['passed']} passed" if each["done"] else "")
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_s))
        rows.append((when, each["device"], each["text"], cause, effect))
    header = ("began", "device", "decision", "cause", "effect")
    print(plain_table(header, rows) if rows else "no decisions")
    return 0


def acknowledge(store: Store, numbers: Sequence[int], by: str) -> None:
    """Ask the collector to note incidents as known. Raises ConfigError."""
    known = store.notes("incident")
    for number in numbers:
        if str(number) not in known:
            raise ConfigError(f"incident {number}: there is none; `stonechat fleet incidents` shows them")
    for number in numbers:
        _request(store, do="acknowledge", incident=number, by=by)


def _acknowledge(store: Store, args: argparse.Namespace) -> int:
    acknowledge(store, args.incident, user_name())
    _done(args, "noted for the collector", acknowledged=args.incident)
    return 0


def silence(store: Store, matchers: Sequence[str], lasts: str, comment: str, by: str) -> tuple[str, dict[str, Any]]:
    """lasts: 90s, 30m, 2h or 1d -> (id, the silence as it is kept). Raises ConfigError."""
    try:
        for matcher in matchers:
            split_matcher(matcher)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    lasts_s, now_s = span_s(lasts), time.time()
    for text in (*matchers, comment):
        if not text.isprintable():
            raise ConfigError(f"{text[:70]!r}: printable characters only")
        if len(text) > MAX_TEXT:
            raise ConfigError(f"{text[:70]!r}...: at most {MAX_TEXT} characters")
    if not lasts_s:
        raise ConfigError(f"--for {lasts}: a silence of no length; `stonechat fleet unsilence` ends one")
    if lasts_s > MAX_SILENCE_S:
        raise ConfigError(f"--for {lasts}: at most {MAX_SILENCE_S // 86_400} days; a silence has an end")
    held = store.notes("silence")
    readable = {each.id: each for each in silences_in(store)}
    over = {name: None for name in held if name not in readable or readable[name].until_s < now_s}
    if len(held) - len(over) >= MAX_SILENCES:
        raise ConfigError(f"{MAX_SILENCES} silences hold already; end some: stonechat fleet silences")
    identity = os.urandom(4).hex()
    value = {"matchers": list(matchers), "until_s": now_s + lasts_s, "by": by, "comment": comment[:200]}
    store.note("silence", {**over, identity: value})
    labels.touch(store)
    return identity, value


def _silence(store: Store, args: argparse.Namespace) -> int:
    identity, value = silence(store, args.matcher, args.for_s, args.comment, user_name())
    until = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value["until_s"]))
    _done(args, f"{identity}: silent until {until}", id=identity, **value)
    return 0


def _silences(store: Store, args: argparse.Namespace) -> int:
    rows = []
    for each in silences_in(store):
        if each.until_s > time.time():
            until = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.until_s))
            rows.append((each.id, ", ".join(each.matchers), until, each.by, each.comment))
            if args.json:
                print(json.dumps(asdict(each)))
    if not args.json:
        print(plain_table(("id", "matches", "until", "by", "comment"), rows) if rows else "no silences")
    return 0


def unsilence(store: Store, silences: Sequence[str]) -> None:
    """Raises ConfigError."""
    held = store.notes("silence")
    for name in silences:
        if name not in held:
            raise ConfigError(f"{name}: no such silence; `stonechat fleet silences` shows them")
    store.note("silence", dict.fromkeys(silences))
    labels.touch(store)


def _unsilence(store: Store, args: argparse.Namespace) -> int:
    unsilence(store, args.silence)
    _done(args, "ended", ended=args.silence)
    return 0


ACTIONS = {
    "states": _states,
    "set": _set,
    "remove": _remove,
    "restore": _restore,
    "trust": _trust,
    "incidents": _incidents,
    "decisions": _decisions,
    "acknowledge": _acknowledge,
    "silence": _silence,
    "silences": _silences,
    "unsilence": _unsilence,
}
