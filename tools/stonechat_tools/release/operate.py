"""The verbs of `stonechat release` that reach the fleet: they change the database, and a collector that runs takes it
within seconds. No key is needed here that could sign a release, and none that could speak to a device."""

import argparse
import hashlib
import json
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

from stonechat import manifest
from stonechat.errors import ConfigError

from ..console import counted, plain_table, user_name
from ..fleet import labels
from ..fleet.command import span_s
from ..fleet.database import add_database_arguments
from ..fleet.labels import NONE
from ..fleet.presence import span
from ..fleet.rollout import STAGES, Stage
from ..fleet.store import Store, releases, rollouts
from ..fleet.store.releases import Release
from ..fleet.store.rollouts import DONE, HALTED, LIVE, PAUSED, RUNNING, WITHDRAWN, RolloutRow

MOST_STAGES = 20
ACTIONS = ("publish", "stage", "pause", "resume", "withdraw", "status")


def add_arguments(actions: Any) -> None:
    publish = actions.add_parser("publish", help="verify a release and keep it in the fleet's database")
    publish.add_argument("release", type=Path, metavar="RELEASE", help="the folder")
    publish.add_argument(
        "--keys", type=Path, nargs="+", required=True, metavar="FILE", help="public keys of the devices"
    )
    stage = actions.add_parser("stage", help="begin the roll-out of a published release")
    stage.add_argument(
        "--stages",
        type=_stages,
        default=STAGES,
        metavar="STAGES",
        help="how many devices or which part of them, and how long at least, such as 5:3d,1%%:7d,100%%:1d"
        f" (default {','.join(_stage_text(each).replace('%', '%%') for each in STAGES)})",
    )
    texts = {
        "pause": "give no more devices their turn, until `resume`",
        "resume": "go on after a pause or a halt; after a halt the tests of the halting rule begin anew",
        "withdraw": "take a release back from all devices that have it",
    }
    others = [actions.add_parser(name, help=text) for name, text in texts.items()]
    for action in (stage, *others):
        action.add_argument("device_class", metavar="CLASS", help="class of devices")
        action.add_argument("version", type=version, metavar="VERSION", help="of the release")
        action.add_argument("--site", default="", help="only devices of this site (default: all)")
    for action in others:
        action.add_argument("--comment", default="", metavar="TEXT", help="why, for the log")
    status = actions.add_parser("status", help="roll-outs, their tests and their devices; versions in the field")
    status.add_argument("device_class", nargs="?", metavar="CLASS", help="class of devices (default: all)")
    status.add_argument("version", type=version, nargs="?", metavar="VERSION", help="with its log (default: all)")
    for action in (publish, stage, *others, status):
        add_database_arguments(action)
        action.add_argument("--json", action="store_true", help="for machines")


def checked(device_class: str) -> None:
    """Raises ConfigError for a class that no device can be in."""
    try:
        labels.checked(device_class, "class")
    except ValueError as error:
        raise ConfigError(str(error)) from None


def version(text: str) -> int:
    """Of a release, and other counts of a manifest, for argparse."""
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:11]) <= 0xFFFFFFFF):
        raise argparse.ArgumentTypeError(f"{text[:40]}: want 1 to 4294967295")
    return int(text)


def _stages(text: str) -> tuple[Stage, ...]:
    found = []
    for part in text.split(","):
        amount, _, soak = part.partition(":")
        try:
            soak_s = span_s(soak)
            number = float(amount.removesuffix("%"))
            if not math.isfinite(number) or number <= 0:
                raise ValueError
            if amount.endswith("%"):
                found.append(Stage(soak_s, share=min(number, 100.0) / 100))
            else:
                found.append(Stage(soak_s, devices=int(amount)))
        except (ValueError, ConfigError):
            raise argparse.ArgumentTypeError(
                f"{part[:40]!r}: want DEVICES:TIME or PART%:TIME, such as 5:3d or 25%:12h"
            ) from None
    if len(found) > MOST_STAGES or found[-1].share != 1.0:
        raise argparse.ArgumentTypeError(f"want at most {MOST_STAGES} stages, of which the last is 100%")
    return tuple(found)


def _stage_text(stage: Stage) -> str:
    for unit, seconds in (("d", 86_400), ("h", 3600), ("m", 60)):
        if stage.soak_s and stage.soak_s % seconds == 0:
            return f"{stage.devices or f'{stage.share:.0%}'}:{stage.soak_s // seconds}{unit}"
    return f"{stage.devices or f'{stage.share:.0%}'}:{stage.soak_s}s"


def run(args: argparse.Namespace, folder: tuple[bytes, bytes | None, manifest.Manifest] | None = None) -> int:
    """folder: for publish: manifest, model and what they hold, verified. Raises StonechatError, OSError."""
    if getattr(args, "device_class", None):
        checked(args.device_class)
    if "://" not in args.db and not Path(args.db).exists():
        raise ConfigError(f"{args.db}: no such database; `stonechat collect` makes it")
    with Store(args.db) as store:
        if folder is not None:
            return _publish(store, args, *folder)
        return {"stage": _stage, "status": _status}.get(args.action, _change)(store, args)


def _done(args: argparse.Namespace, text: str, **facts: Any) -> int:
    print(json.dumps(facts) if args.json else text)
    return 0


def _publish(
    store: Store, args: argparse.Namespace, message: bytes, model: bytes | None, found: manifest.Manifest
) -> int:
    digest = hashlib.sha256(message).digest()
    schema = "" if found.model is None else found.model[2].hex()
    name, version = found.device_class, found.version
    there = releases.publish(store, name, version, schema, digest, message, model, user_name(), time.time())
    if there != digest:
        raise ConfigError(
            f"{name} {version} is published already, with another manifest ({there.hex()[:16]}): a release never"
            " changes; sign a new version"
        )
    facts = {"class": name, "version": version, "digest": digest.hex(), "bytes": len(message) + len(model or b"")}
    return _done(
        args, f"{name} {version}: published; `stonechat release stage {name} {version}` begins its roll-out", **facts
    )


def _release(store: Store, args: argparse.Namespace) -> Release:
    known = releases.releases(store, args.device_class)
    for each in known:
        if each.version == args.version:
            return each
    versions = ", ".join(str(each.version) for each in known)
    raise ConfigError(
        f"{args.device_class} {args.version}: is not published; "
        + (f"of this class: {versions}" if versions else "`stonechat release publish` does that")
    )


def _in_time(store: Store, release: Release) -> None:
    """Raises ConfigError where no device would take it today."""
    found = manifest.read(manifest.payload(releases.content(store, release.id)[0]))
    now_s = time.time()
    if not found.not_before_s <= now_s < found.expires_s:
        over = now_s >= found.expires_s
        day = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(found.expires_s if over else found.not_before_s))
        raise ConfigError(
            f"{release}: {'expired on' if over else 'is not valid before'} {day}, every device would refuse it: "
            + ("sign a new version" if over else "stage it then")
        )


def _stage(store: Store, args: argparse.Namespace) -> int:
    release = _release(store, args)
    _in_time(store, release)
    able = {name for name, _, _ in rollouts.versions(store)}
    of_class = {
        name
        for name, each in labels.read(store).items()
        if each.group == release.device_class and (not args.site or each.site == args.site)
    }
    where = release.device_class + (f" at {args.site}" if args.site else "")
    if not of_class:
        raise ConfigError(
            f"no device is in the class {where}: `stonechat fleet set DEVICE --class {release.device_class}`"
        )
    if not of_class & able:
        raise ConfigError(f"no device of the class {where} takes updates: set [update] in their configuration")
    other = rollouts.begin(store, release, args.site, args.stages, user_name(), time.time())
    if other:
        raise ConfigError(
            f"{release}: the roll-out of {other}; "
            + (
                "make a new version"
                if other.startswith(f"{release}")
                else "end that one first, or choose another --site"
            )
        )
    count = len(of_class & able)
    text = f"{release}: the roll-out to {counted(count, 'device')} begins with {args.stages[0]}"
    return _done(args, text, **{"class": release.device_class, "version": release.version, "devices": count})


def _change(store: Store, args: argparse.Namespace) -> int:
    """pause, resume, withdraw."""
    if not args.comment.isprintable() or len(args.comment) > 200:
        raise ConfigError("--comment: at most 200 printable characters")
    release = _release(store, args)
    found = [
        row
        for row in rollouts.rollouts(store, args.device_class, args.version)
        if not args.site or row.site == args.site
    ]
    if not found:
        raise ConfigError(
            f"{release}: has no roll-out{f' at {args.site}' if args.site else ''}; `stonechat release stage` begins one"
        )
    wanted = {
        "pause": ((RUNNING,), PAUSED),
        "resume": ((PAUSED, HALTED), RUNNING),
        "withdraw": ((*LIVE, DONE), WITHDRAWN),
    }
    states, state = wanted[args.action]
    if args.action == "resume":
        _in_time(store, release)
    by, now_s = user_name(), time.time()
    instead = [rollouts.change(store, row.id, states, state, by, args.comment, now_s) for row in found]
    if all(instead):
        raise ConfigError(f"{release}: its roll-out is {instead[-1]}: nothing to {args.action}")
    changed = [row.id for row, other in zip(found, instead, strict=True) if not other]
    floor = manifest.read(manifest.payload(releases.content(store, release.id)[0])).floor
    kept = state == WITHDRAWN and floor > 0
    return _done(
        args,
        f"{release}: {state}"
        + (f"; its floor is {floor}: a device that ran a lower version before keeps it" if kept else ""),
        **{"class": release.device_class, "version": release.version, "state": state, "rollouts": changed},
    )


# --- status -----------------------------------------------------------------------------------------------------------


def facts_of(store: Store, row: RolloutRow) -> dict[str, Any]:
    """A roll-out for machines."""
    counts = rollouts.counts(store, row.id)
    expired = releases.Manifests(store).expired(row.release.id, time.time())
    return {
        "id": row.id,
        "class": row.release.device_class,
        "version": row.release.version,
        "site": row.site,
        "state": row.state,
        "expired": expired,
        "stage": row.stage_name,
        "stages": [_stage_text(each) for each in row.stages],
        "began_s": row.began_s,
        "since_s": row.since_s,
        "devices": counts,
        "failed": [{"device": device, "why": why} for device, why in rollouts.failures(store, row.id, 50)],
        "remaining": rollouts.remaining(store, row.id, row.release.version) if row.state == WITHDRAWN else None,
        "tests": row.tests,
        "evidence": row.evidence,
    }


def in_the_field(store: Store, device_class: str | None = None) -> list[dict[str, Any]]:
    """How many devices of each class run, and try, which version."""
    known = labels.read(store)
    found: Counter[tuple[str, int]] = Counter()
    trials: Counter[tuple[str, int]] = Counter()
    for name, version, trial in rollouts.versions(store):
        group = known.get(name, NONE).group
        if device_class is None or group == device_class:
            found[group, version] += 1
            if trial:
                trials[group, trial] += 1
    return [
        {"class": group, "version": version, "devices": found[group, version], "on trial": trials[group, version]}
        for group, version in sorted({*found, *trials})
    ]


def _status(store: Store, args: argparse.Namespace) -> int:
    if args.version is not None:
        _release(store, args)
    known = rollouts.rollouts(store, args.device_class, args.version)
    field = in_the_field(store, args.device_class)
    facts = [facts_of(store, row) for row in known]
    if args.version is not None:
        for each in facts:
            each["log"] = rollouts.log(store, each["id"])
    if args.json:
        listed = [
            {
                "class": each.device_class,
                "version": each.version,
                "digest": each.digest.hex(),
                "bytes": each.manifest_bytes + each.model_bytes,
                "published_s": each.published_s,
                "by": each.published_by,
            }
            for each in releases.releases(store, args.device_class)
        ]
        print(json.dumps({"releases": listed, "rollouts": facts, "versions": field}))
        return 0
    now_s = time.time()
    rows = []
    for each in facts:
        counts = each["devices"]
        on_way = sum(counts.get(state, 0) for state in rollouts.OPEN)
        why = each["evidence"].get("why", "")
        if each["expired"] and each["state"] in (RUNNING, PAUSED, HALTED):
            why = "has expired: sign a new version" + (f"; {why}" if why else "")
        if each["remaining"]:
            why = f"{each['remaining']} devices still have it"
        rows.append(
            (
                f"{each['class']} {each['version']}" + (f" at {each['site']}" if each["site"] else ""),
                each["state"],
                f"{each['stage']}, for {span(max(0.0, now_s - each['since_s']))}",
                str(on_way),
                str(counts.get("confirmed", 0)),
                str(counts.get("good", 0)),
                str(counts.get("failed", 0)),
                why,
            )
        )
    header = ("release", "state", "stage", "on the way", "watched", "good", "failed", "why")
    print(plain_table(header, rows) if rows else "no roll-outs")
    if field:
        table = [(each["class"], str(each["version"]), str(each["devices"]), str(each["on trial"])) for each in field]
        print(plain_table(("class", "version", "devices", "on trial"), table))
    for each in facts:
        for failed in each["failed"] if args.version is not None else ():
            print(f"{failed['device']}: {failed['why']}")
        for line in each.get("log", ()):
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(line["at_s"]))
            print(
                f"{when} {line['by']}: {line['what']}"
                + (f" ({line['evidence']['why']})" if "why" in line["evidence"] else "")
            )
    return 0
