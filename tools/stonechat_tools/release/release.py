"""Sign models for a class of devices, check what was signed, and roll it out to the fleet in stages.

A release is a folder: manifest.cbor (what the devices verify), model.tflite, sbom.cdx.json. Sign on a machine that is
not on a network; the folder holds no secret. Two algorithms: slh-dsa (SLH-DSA-SHA2-128s, FIPS 205) keeps no state and
is the default; hss (HSS/LMS, RFC 8554, 1,024 signatures) makes manifests of 2.6 KB instead of 8 and is verified in a
twentieth of the time, but each signature uses up a leaf: its state file must never be copied or restored.

Examples:
  stonechat release keygen vendor.key
  stonechat release keygen officer.key --role officer --algorithm hss
  stonechat release sign model.tflite --key vendor.key --class pump --version 3 --out releases/pump-3
  stonechat release sign --add releases/pump-3 --key officer.key
  stonechat release verify releases/pump-3 --keys vendor.key.pub officer.key.pub
  stonechat release inspect releases/pump-3
  stonechat release sign --next-keys new.key.pub --key vendor.key --class pump --version 4 --out releases/pump-4
  stonechat release sign --policy response.toml --key vendor.key --class pump --version 5 --out releases/pump-5

publish, stage, pause, resume, withdraw and status work on the fleet's database; the collector does the rest. A roll-out
stops by itself where devices fail, or where those that have the release alarm more than those without it.

  stonechat release publish releases/pump-3 --keys vendor.key.pub officer.key.pub --db fleet.db
  stonechat release stage pump 3 --db fleet.db
  stonechat release stage pump 3 --site berlin --stages 2:1d,50%:1d,100%:1d --db fleet.db
  stonechat release status pump 3 --db fleet.db
  stonechat release withdraw pump 3 --comment "alarms at night" --db fleet.db
"""

import argparse
import datetime
import hashlib
import json
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import cbor2
from stonechat import manifest, policy
from stonechat.errors import ConfigError
from stonechat.linux import respond
from stonechat.model import load_model
from stonechat.model_file import prove

from ..console import model_path, named, plain_table, read_file, write_atomic
from . import keys, make, operate, sbom

HELP = "sign models for a class of devices, and roll them out in stages"
HOLDS_KEYS = True
MANIFEST, MODEL, SBOM = "manifest.cbor", "model.tflite", "sbom.cdx.json"
MOST_MODEL_BYTES = 1 << 20
_DAY_S = 86_400
_DAYS = 365
_ROLES = {number: name for name, number in keys.ROLES.items()}
_MOST_VERSION = 0xFFFFFFFF


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    keygen = actions.add_parser("keygen", help="make a key pair: FILE, FILE.pub and, for hss, FILE.state")
    keygen.add_argument("file", type=Path, metavar="FILE", help="the key to make")
    keygen.add_argument(
        "--role", choices=sorted(keys.ROLES), default="release", help="whose key it is (default: release)"
    )
    keygen.add_argument("--algorithm", choices=sorted(keys.ALGORITHMS), default="slh-dsa", help="default: slh-dsa")

    sign = actions.add_parser("sign", help="make and sign a manifest, or add a signature to one")
    sign.add_argument("model", nargs="?", metavar="MODEL", help="a .tflite, or the name of a shipped model")
    sign.add_argument("--key", type=Path, required=True, metavar="FILE", help="the key to sign with")
    sign.add_argument("--add", type=Path, metavar="RELEASE", help="add a signature to this release instead")
    sign.add_argument("--out", type=Path, metavar="RELEASE", help="folder to make")
    sign.add_argument("--class", dest="device_class", metavar="NAME", help="class of devices that may take it")
    sign.add_argument(
        "--version", type=operate.version, metavar="N", help="version of the release; devices take only a higher one"
    )
    sign.add_argument(
        "--floor",
        type=operate.version,
        metavar="N",
        help="lowest version a device may go back to (default: the one it came with)",
    )
    sign.add_argument(
        "--not-before",
        type=_date,
        metavar="DATE",
        help="first day, UTC (default: 24 hours ago, for devices whose clock is behind)",
    )
    sign.add_argument("--days", type=operate.version, metavar="N", help=f"days until it expires (default: {_DAYS})")
    sign.add_argument("--notes", default="", metavar="TEXT", help="at most 200 bytes; `inspect` shows them")
    sign.add_argument("--forbid-own-model", action="store_true", help="devices may not train a model of their own")
    sign.add_argument(
        "--rule",
        type=_rule,
        action="append",
        default=[],
        metavar="ALLOWANCE:CAP:THRESHOLD",
        help="alarm rule in place of the model's own, such as 1.5:4:12; may be repeated, and needs no MODEL",
    )
    sign.add_argument(
        "--policy",
        type=Path,
        metavar="FILE",
        help="rules of the response: TOML with rules = [...] as in [response] of an agent; needs no MODEL",
    )
    sign.add_argument(
        "--next-keys", type=Path, nargs="+", metavar="FILE", help="public keys that replace those in the devices"
    )

    verify = actions.add_parser("verify", help="check a release as a device does, and its model and bill of materials")
    verify.add_argument("release", type=Path, metavar="RELEASE", help="the folder")
    verify.add_argument(
        "--keys", type=Path, nargs="+", required=True, metavar="FILE", help="public keys of the devices"
    )

    inspect = actions.add_parser("inspect", help="show a manifest; checks nothing")
    inspect.add_argument("release", type=Path, metavar="RELEASE", help="a release, or its manifest")

    operate.add_arguments(actions)
    for action in (keygen, sign):
        action.add_argument(
            "--passphrase-file", type=Path, metavar="FILE", help="holds the passphrase in its first line"
        )
    for action in (verify, inspect):
        action.add_argument("--json", action="store_true", help="for machines")


def _rule(text: str) -> tuple[int, int, int]:
    try:
        allowance, cap, threshold = (round(float(part) * 256) for part in text.split(":"))
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text[:40]}: want ALLOWANCE:CAP:THRESHOLD, three numbers such as 1.5:4:12"
        ) from None
    return allowance, cap, threshold


def policy_of(path: Path) -> bytes:
    """A TOML file with `rules`, as in [response] of an agent's configuration -> the policy of a manifest. Raises
    ConfigError, OSError."""
    try:
        found = tomllib.loads(read_file(path, 65_536).decode("utf-8-sig").replace("\r\n", "\n"))
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, UnicodeDecodeError, brackets in thousands
        raise ConfigError(f"{path}: not TOML: {str(error)[:200]}") from None
    rows = found.pop("rules", None)
    if found or not rows:
        raise ConfigError(f'{path}: want nothing but rules, such as rules = [{{action = "throttle", seconds = 60}}]')
    wrong = respond.check(rows)
    if wrong:
        raise ConfigError(f"{path}: rules must be {wrong}")
    wrong = respond.check_together(rows, policy.T1_S)
    if wrong:
        raise ConfigError(f"{path}: {wrong}")
    packed = cbor2.dumps([list(rule) for rule in respond.rules_of(rows, policy.T1_S)], canonical=True)
    if len(packed) > 512:
        raise ConfigError(f"{path}: {len(packed)} bytes of policy, at most 512: fewer rules")
    return packed


def _date(text: str) -> int:
    try:
        day = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: want a date such as 2027-01-31") from None
    found = int(day.replace(tzinfo=day.tzinfo or datetime.UTC).timestamp())
    if not 0 <= found <= 0xFFFFFFFF:
        raise argparse.ArgumentTypeError(f"{text}: outside of what a manifest can hold")
    return found


def run(args: argparse.Namespace) -> int:
    """Raises StonechatError, OSError."""
    if args.action in operate.ACTIONS:
        return operate.run(args, _verified(args) if args.action == "publish" else None)
    actions = {"keygen": _keygen, "sign": _sign, "verify": _verify, "inspect": _inspect}
    return actions[args.action](args)


def _keygen(args: argparse.Namespace) -> int:
    secret = keys.passphrase(args.passphrase_file, new=True)
    algorithm = keys.ALGORITHMS[args.algorithm]
    if algorithm == keys.HSS:
        print("making a tree of 1,024 one-time keys: some seconds ...", file=sys.stderr)
    public = keys.make(args.file, args.role, algorithm, secret)
    print(public.line())
    name, public_name = _text(args.file), _text(keys.public_path(args.file))
    print(f"{name}: keep it off the network; {public_name}: for the devices", file=sys.stderr)
    if algorithm == keys.HSS:
        state = _text(keys.state_path(args.file))
        print(
            f"{state}: never copy or restore it; a leaf that signs twice gives the key away",
            file=sys.stderr,
        )
    return 0


def _sign(args: argparse.Namespace) -> int:
    if args.add is not None:
        given = [name for name, value in (("MODEL", args.model), *_of_manifest(args)) if value]
        if given:
            raise ConfigError(f"--add RELEASE takes no {given[0]}: the manifest is made already")
        folder = args.add
        before = read_file(folder / MANIFEST, manifest.MOST_BYTES)
        with named(folder / MANIFEST):
            packed = make.frame(before)[2]
            manifest.read(packed)
        key = _open_key(args, folder)
    else:
        folder, before = _folder(args), None
        key = _open_key(args, folder)
        packed = _new(args, folder)
    if key.public.algorithm == keys.HSS:
        print("signing with HSS/LMS: some seconds ...", file=sys.stderr)
    message = make.sign(packed, key, before)
    write_atomic(folder / MANIFEST, message, 0o644)
    _show(folder, message, as_json=False)
    return 0


def _open_key(args: argparse.Namespace, folder: Path) -> keys.SigningKey:
    key = keys.SigningKey(args.key, keys.passphrase(args.passphrase_file))
    _no_leaf_twice(key, folder)
    return key


def _of_manifest(args: argparse.Namespace) -> list[tuple[str, Any]]:
    """The options that say what a new manifest holds: (name, value)."""
    names = ("out", "class", "version", "floor", "not-before", "days", "notes", "forbid-own-model", "rule", "policy")
    values = vars(args) | {"class": args.device_class}
    return [(f"--{name}", values[name.replace("-", "_")]) for name in (*names, "next-keys")]


def _folder(args: argparse.Namespace) -> Path:
    """Where the new release goes. Raises ConfigError where an argument is missing or a release is there."""
    for what, given in (
        ("--out RELEASE", args.out),
        ("--class NAME", args.device_class),
        ("--version N", args.version),
    ):
        if not given:
            raise ConfigError(f"{what} is missing (see stonechat release sign --help)")
    operate.checked(args.device_class)
    if not args.notes.isprintable():
        raise ConfigError("--notes: want printable characters, at most 200 bytes")
    if not args.model and not args.next_keys and not args.rule and not args.policy:
        raise ConfigError("nothing to release: give a MODEL, a --rule, a --policy, or --next-keys to rotate the keys")
    folder: Path = args.out
    if args.version == _MOST_VERSION:
        raise ConfigError(f"--version {args.version}: is the highest that there is; no release could follow it")
    if (folder / MANIFEST).exists():
        raise ConfigError(f"{folder}: holds a signed release; choose another --out, or --add a signature to it")
    return folder


def _new(args: argparse.Namespace, folder: Path) -> bytes:
    """Write model and bill of materials into the new folder -> the payload of its manifest."""
    model = metadata = None
    if args.model:
        model = read_file(model_path(args.model), MOST_MODEL_BYTES)
        with named(args.model):
            prove(model)
            metadata = load_model(model).metadata
    now_s = int(time.time())
    start_s = now_s if args.not_before is None else args.not_before
    expires_s = start_s + (args.days or _DAYS) * _DAY_S
    if expires_s <= now_s:
        raise ConfigError(f"it would have expired on {_day(expires_s)}, and every device refuse it: give more --days")
    next_keys = tuple(key for path in args.next_keys or () for key in keys.read_public(path))
    if len({key.data for key in next_keys}) != len(next_keys):
        raise ConfigError("--next-keys: one key is there twice; each role needs a key of its own")
    bill = sbom.make(model, metadata, args.version, args.device_class)
    plan = make.Plan(
        version=args.version,
        floor=args.floor or 0,
        device_class=args.device_class,
        not_before_s=now_s - _DAY_S if args.not_before is None else start_s,
        expires_s=expires_s,
        notes=args.notes,
        own_model=not args.forbid_own_model,
        rules=tuple(args.rule),
        policy=policy_of(args.policy) if args.policy else b"",
        next_keys=next_keys,
    )
    packed = make.payload(plan, model, bill)
    folder.mkdir(parents=True, exist_ok=True)
    if model is not None:
        write_atomic(folder / MODEL, model, 0o644)
    write_atomic(folder / SBOM, bill, 0o644)
    return packed


def _no_leaf_twice(key: keys.SigningKey, folder: Path) -> None:
    """Refuse a state that is older than a release beside this one. A copy that keeps its inode, as in a snapshot of a
    whole machine, shows nowhere else. Raises ConfigError, OSError."""
    if key.public.algorithm != keys.HSS:
        return
    leaf = keys.leaves_used(key.path)
    for path in sorted(folder.absolute().parent.glob(f"*/{MANIFEST}")):
        try:
            signatures = make.frame(read_file(path, manifest.MOST_BYTES))[3]
        except (ConfigError, OSError):
            continue  # no manifest: nothing that this key has signed
        for _, unprotected, signature in signatures:
            used = make.leaf_of(signature)
            if unprotected == {4: manifest.key_id(key.public.data)} and used is not None and used >= leaf:
                raise ConfigError(
                    f"{path}: this key has signed with leaf {used}, but its state says that {leaf} is next: the state "
                    "is an old copy. A leaf must never sign twice: make a new key and rotate to it (--next-keys)"
                )


def _verify(args: argparse.Namespace) -> int:
    _show(args.release, _verified(args)[0], args.json, verified=True)
    return 0


def _verified(args: argparse.Namespace) -> tuple[bytes, bytes | None, manifest.Manifest]:
    """Manifest, model, and what the manifest holds; all of it was checked. Raises StonechatError, OSError."""
    public = [key for path in args.keys for key in keys.read_public(path)]
    folder: Path = args.release
    message = read_file(folder / MANIFEST, manifest.MOST_BYTES)
    with named(folder / MANIFEST):
        found = manifest.unseal(message, [(keys.ROLES[key.role], key.data) for key in public])
    data = None
    if found.model is not None:
        data = read_file(folder / MODEL, MOST_MODEL_BYTES)
        if [hashlib.sha256(data).digest(), len(data)] != found.model[:2]:
            raise ConfigError(f"{folder / MODEL}: is not the model that was signed")
        with named(folder / MODEL):
            prove(data)
            metadata = load_model(data).metadata
        if metadata is None or bytes(metadata.schema_id) != found.model[2]:
            raise ConfigError(f"{folder / MODEL}: its schema is not the one that was signed")
        if manifest.golden_digest(metadata) != found.model[3]:
            raise ConfigError(f"{folder / MODEL}: its golden vectors are not those that were signed")
    if found.sbom is not None and hashlib.sha256(read_file(folder / SBOM)).digest() != found.sbom:
        raise ConfigError(f"{folder / SBOM}: is not the bill of materials that was signed")
    if time.time() >= found.expires_s:
        raise ConfigError(f"{folder}: expired on {_day(found.expires_s)}; devices refuse it")
    return message, data, found


def _inspect(args: argparse.Namespace) -> int:
    path = args.release / MANIFEST if args.release.is_dir() else args.release
    _show(args.release, read_file(path, manifest.MOST_BYTES), args.json)
    return 0


def _show(folder: Path, message: bytes, as_json: bool, verified: bool = False) -> None:
    with named(folder):
        parts = make.frame(message)
        found = manifest.read(parts[2])
    signatures = [
        {
            "key": unprotected.get(4, b"").hex(),
            "algorithm": keys.SLH_DSA if protected == manifest.algorithm(bytes(32)) else "HSS/LMS",
            "leaf": make.leaf_of(signature),
        }
        for protected, unprotected, signature in parts[3]
    ]
    facts: dict[str, Any] = {
        "release": str(folder),
        "verified": verified,
        "version": found.version,
        "floor": found.floor,
        "class": found.device_class,
        "not before": _day(found.not_before_s),
        "expires": _day(found.expires_s),
        "model": None if found.model is None else {"sha256": found.model[0].hex(), "bytes": found.model[1]},
        "schema": None if found.model is None else found.model[2].hex(),
        "alarm rules": found.rules and [":".join(f"{number / 256:g}" for number in rule) for rule in found.rules],
        "policy": found.policy and [" ".join(map(str, rule)) for rule in cbor2.loads(found.policy)],
        "new keys": found.keys and [f"{_ROLES[role]} {data.hex()}" for role, data in found.keys],
        "own model": found.own_model,
        "notes": found.notes,
        "manifest bytes": len(message),
        "signatures": signatures,
    }
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    lines = [[name, _text(value)] for name, value in facts.items() if value not in (None, []) and name != "verified"]
    print(plain_table(["what", "value"], lines), end="")
    if verified:
        print("verified: signatures, model, golden vectors and bill of materials are those that were signed")


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items() if item is not None)
    if isinstance(value, list):
        return "\n".join(_text(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    # `inspect` checks nothing, and whoever made the manifest chose its texts: no control characters
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in str(value))


def _day(second: int) -> str:
    return datetime.datetime.fromtimestamp(second, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
