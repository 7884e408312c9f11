"""Signed releases on Linux: the configuration's [update], the folder of the slots, and which model a start runs."""

import os
from contextlib import contextmanager
from stat import S_IMODE

from .. import lms, slh_dsa  # noqa: F401 - a manifest is verified after the change of user, who may not read them here
from ..compat import sha256
from ..errors import ConfigError
from ..int8 import interpreter  # noqa: F401 - for a release's model without a plan
from ..manifest import MAX_KEYS
from ..updater import Updater
from . import files

_ROLES = {"release": 0, "officer": 1}
_KEY_BYTES = {"SLH-DSA-SHA2-128s": (32,), "HSS/LMS-SHA256-H10-W4": (52, 60)}
_KEYS_BYTES = 65_536  # of a file of public keys
RESULTS = (
    "",
    "confirmed",
    "its manifest is malformed",
    "no valid signature by the keys in [update] keys",
    "it is for another class of devices than [update] class",
    "its model is for another schema",
    "its version is not higher than the one that runs, or not the one that was offered",
    "its version is below the floor",
    "it has expired",
    "it is not valid yet",
    "this device's clock is not set",
    "it is larger than [update] most_bytes",
    "what arrived has another digest than the manifest names",
    "its model can't be used here",
    "its model alarms on this device's own last windows",
    "nobody confirmed it within a day",
    "too many starts without a confirmation",
    "withdrawn",
    "the folder of updates can't be written",
    "it holds nothing for this device",
)


def open_updater(config: dict, user_id: "int | None", check: bool, on_change) -> Updater:
    """user_id: of the user that the agent becomes, where it is root now; check: change nothing. Raises ConfigError."""
    options = config["update"]
    for name in ("class", "keys"):
        if not options[name]:
            raise ConfigError(
                '[update] needs %s: class = "pump", keys = ["/etc/stonechat/vendor.key.pub"]; see docs/releases.md'
                % name
            )
    folder = options["folder"]
    if not check:
        if user_id is not None:
            _try(files.grant_folder, folder, user_id)
        with as_user(user_id):
            _try(files.make_folder, folder)
    if os.path.isdir(folder) and S_IMODE(os.stat(folder).st_mode) & 0o022:
        raise ConfigError("[update] folder %s can be written by others: chmod 700 %s" % (folder, folder))
    return Updater(
        options["class"],
        read_keys(options["keys"]),
        folder,
        options["most_bytes"],
        options["bytes_per_day"],
        options["windows"],
        on_change=on_change,
    )


def _try(call, *arguments) -> None:
    try:
        call(*arguments)
    except OSError:
        pass  # the folder's own checks say what is wrong with it


@contextmanager
def as_user(user_id: "int | None"):
    """What is done in a folder of that user is done as that user. Raises OSError."""
    if user_id is None:
        yield
        return
    os.seteuid(user_id)
    try:
        yield
    finally:
        os.seteuid(0)


def read_keys(paths) -> list:
    """Files of public keys as `stonechat release keygen` writes them -> [[role, key], ...]. Raises ConfigError."""
    found = []
    for path in paths:
        data, mode = files.read_regular(path, _KEYS_BYTES, "[update] keys")
        if S_IMODE(mode) & 0o022:
            raise ConfigError("[update] keys: %s can be written by others: chmod 644 %s" % (path, path))
        for number, line in enumerate(data.decode("utf-8", "replace").split("\n"), 1):
            words = line.partition("#")[0].split()
            if words:
                found.append(_key(words, "%s line %d" % (path, number)))
    if len({key for _, key in found}) != len(found):
        raise ConfigError(
            "[update] keys: one key is there twice in %s; each role needs a key of its own" % ", ".join(paths)
        )
    if not 1 <= len(found) <= MAX_KEYS:
        raise ConfigError("[update] keys: %d keys in %s, want 1 to %d" % (len(found), ", ".join(paths), MAX_KEYS))
    return found


def _key(words, where) -> list:
    try:
        role, algorithm, text = words
        data = bytes.fromhex(text)
        if len(data) not in _KEY_BYTES[algorithm]:
            raise ValueError
        return [_ROLES[role], data]
    except (ValueError, KeyError):
        raise ConfigError(
            "[update] keys: %s is no public key; take the .pub that `stonechat release keygen` made" % where
        )


def first_model(update: Updater, config: dict, key: bytes, user_id: "int | None", check: bool, read_model, say):
    """The model that this start runs: that of a slot, or [model] file. read_model(path, backend) -> Model; say(level,
    text): the log. Raises ConfigError, ModelError for [model] file."""
    path = config["model"]["file"]
    backend = config["model"]["backend"]
    factory = read_model(path, backend)

    def read(file):
        return factory if file == path else read_model(file, backend, "model")

    tried = update.store.trial
    with as_user(None if check else user_id):
        model = update.open(path, read, factory.metadata.schema_id, key, not check)
    if update.store.trial or tried:
        say(*text(update))
    return model


def digest(path: str) -> bytes:
    """As Model.digest, of a file. Raises ConfigError."""
    return sha256(files.read_file(path, "model")).digest()[:8]


def text(update: Updater) -> "tuple[str, str]":
    """For the log: (level, sentence) of what has become of the last update."""
    store = update.store
    if store.trial:
        return "info", "update: release %d is on trial until the collector confirms it" % store.tried
    if store.result == 1:
        return "info", "update: release %d is confirmed" % store.version
    if not store.result and getattr(getattr(update, "update", None), "offered", 0) == store.tried:
        return "info", "update: release %d is taken again" % store.tried
    if not store.result:  # its start could not be counted
        text = "update: release %d on trial does not run: the folder of updates can't be written; version %d runs"
        return "warning", text % (store.tried, store.version)
    why = RESULTS[store.result] if store.result < len(RESULTS) else "result %d" % store.result
    return "warning", "update: release %d ended: %s; version %d runs" % (store.tried, why, store.version)
