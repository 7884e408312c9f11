"""Two slots for models that come as updates, beside the model that the device was delivered with.

A new model is written into the slot that is not in use, runs on trial, and becomes final only when the collector has
acknowledged it. Which slot runs is one small record, replaced atomically: after a power cut at any moment it names a
model that was whole before. A trial counts its starts before the model is loaded, so a model that ends the device at
each start is rolled back by the device itself.

Files in the folder: a.model, b.model, their manifests a.manifest, b.manifest, what else applies while they run,
a.settings, b.settings, keys (only after a rotation), record, and offer (update.py) while a release is pulled.
"""

import os
import sys
from binascii import crc32
from struct import pack, unpack

from .compat import const, sync_file, write_atomic

FACTORY = const(0)  # the model that the device was delivered with; versions count from 1
MOST_STARTS = const(3)  # of one trial

# Why the last update ended (stonechat.cddl: result of an update)
NONE = const(0)
CONFIRMED = const(1)
MALFORMED = const(2)
SIGNATURE = const(3)
CLASS = const(4)
SCHEMA = const(5)
VERSION = const(6)  # not higher than what runs, or than what was rolled back
FLOOR = const(7)
EXPIRED = const(8)
EARLY = const(9)
CLOCK = const(10)  # the device does not know the time
TOO_LARGE = const(11)
DIGEST = const(12)
MODEL = const(13)  # it does not load, or a golden vector differs
UNSUITED = const(14)  # it alarms on this device's own windows
UNCONFIRMED = const(15)  # no acknowledgement in time
RESTARTS = const(16)
WITHDRAWN = const(17)
STORAGE = const(18)
NOTHING = const(19)  # the manifest holds nothing for this device

_RECORD = ("slot", "trial", "starts", "result", "before", "before_version", "version", "floor", "tried")
_FORM = "<BBBBBIIII"
_BYTES = const(21)
_ENDINGS = (".model", ".manifest", ".settings")
_CHECKED_BYTES = const(1024)  # of a file of keys or settings


class Slots:
    """folder: start() makes it where it is missing. A record that can't be read is that of a new device: the factory's
    model.

    slot: what runs when no trial does, FACTORY, 1 or 2. trial: the slot on trial, 0 for none. version: of `slot`.
    before, before_version: the slot that ran before it. floor: no lower version is taken. tried: version of the last
    update that was begun; result: how it ended. stale: the medium has refused, and its record may name a slot that is
    spare here."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.stale = False
        self.slot = self.trial = self.starts = self.before = FACTORY
        self.result = NONE
        self.before_version = self.version = self.floor = self.tried = 0
        record = read(folder + "/record", _BYTES + 4)
        if len(record) == _BYTES + 4 and pack("<I", crc32(record[:_BYTES])) == record[_BYTES:]:
            self._unpack(record[:_BYTES])

    def _unpack(self, record):
        for name, value in zip(_RECORD, unpack(_FORM, record)):
            setattr(self, name, value)

    def _pack(self):
        return pack(_FORM, *[getattr(self, name) for name in _RECORD])

    def path(self, slot: int) -> str:
        """Of a slot's model, without its ending."""
        return "%s/%s" % (self.folder, "_ab"[slot])

    def start(self) -> int:
        """To be called once at each start, before a model is loaded -> the slot to run. A trial that has begun too
        often ends here. Raises OSError where the record can't be written: then the slot that is final runs."""
        try:
            os.mkdir(self.folder)
        except OSError:
            pass  # it is there, or save() says what is wrong
        if self.trial:
            if self.starts >= MOST_STARTS:
                self.roll_back(RESTARTS)
            else:
                self.starts += 1
                try:
                    self.save()
                except OSError:
                    self.trial = FACTORY  # an attempt that is not counted must not be made
                    raise
        return self.trial or self.slot

    @property
    def spare(self) -> int:
        """The slot that an update is written into."""
        return 2 if self.slot == 1 else 1

    def free(self) -> int:
        """Empty the spare slot, and with it the way back to the version in it -> its number. Raises OSError."""
        slot = self.spare
        if self.before == slot:
            self.before = FACTORY
            self.before_version = 0
            self.stale = True
        if self.stale:  # no start may run what is written there now
            self.save()
        for ending in _ENDINGS:
            remove(self.path(slot) + ending)
        return slot

    def begin_trial(self, slot: int, version: int) -> None:
        """The model in `slot` is whole and may be tried: from the next start() on it runs. Raises OSError, with nothing
        changed."""
        kept = self._pack()
        self.trial, self.tried, self.starts, self.result = slot, version, 0, NONE
        self._save_or(kept)

    def confirm(self, floor: int) -> None:
        """The trial is final. Raises OSError: it then stays a trial."""
        kept = self._pack()
        self.before, self.before_version = self.slot, self.version
        self.slot, self.version, self.trial, self.starts = self.trial, self.tried, FACTORY, 0
        self.floor = max(self.floor, floor)
        self.result = CONFIRMED
        self._save_or(kept)

    def adopt(self, version: int, floor: int) -> None:
        """A release of keys alone is final: the same slot runs under a higher version, and it is the one to go back to.
        Raises OSError, with nothing changed."""
        kept = self._pack()
        self.before, self.before_version = self.slot, self.version
        self.version = self.tried = version
        self.floor = max(self.floor, floor)
        self.result = CONFIRMED
        self._save_or(kept)

    def broken(self) -> int:
        """The model in the slot that runs can't be loaded -> the slot to run instead. Raises OSError."""
        if self.trial:
            self.roll_back(MODEL)
        else:
            self.slot, self.version, self.result = self.before, self.before_version, MODEL
            self.before, self.before_version = FACTORY, 0
            self.save()
        return self.slot

    def roll_back(self, result: int) -> None:
        """The trial ends; what ran before runs again. Raises OSError: the next start counts on."""
        self.trial, self.starts, self.result = FACTORY, 0, result
        self.save()

    def withdraw(self) -> bool:
        """Go back from the final version to the one before it, if that is still there and not below the floor ->
        whether it was done. Raises OSError."""
        if not self.version or self.before_version < self.floor:
            return False
        self.slot, self.version = self.before, self.before_version
        self.before, self.before_version, self.result = FACTORY, 0, WITHDRAWN
        self.save()
        return True

    def _save_or(self, kept):
        """save(); where the medium refuses, the record is `kept` as before."""
        stale = self.stale
        try:
            self.save()
        except OSError:
            self._unpack(kept)
            self.stale = stale
            raise

    def save(self) -> None:
        """Raises OSError."""
        self.stale = True
        record = self._pack()
        write_atomic(self.folder + "/record", (record, pack("<I", crc32(record))))
        self.stale = False

    def keys(self, own) -> list:
        """The keys that verify a manifest: those of the last rotation, or `own`, those the device came with."""
        rotated = read_checked(self.folder + "/keys")
        return rotated[0] if rotated else own

    def keys_came_with(self, digest) -> bool:
        """Whether the last rotation was by the manifest with this SHA-256."""
        rotated = read_checked(self.folder + "/keys")
        return rotated is not None and rotated[1] == digest

    def put_keys(self, keys, digest) -> None:
        """digest: of the manifest that names them. Raises OSError."""
        write_checked(self.folder + "/keys", [keys, digest])

    def settings(self, slot: int) -> list:
        """[alarm rules in place of the model's, [] for none; policy of the response, b"" for none; whether the device
        may train a model of its own], while `slot` runs."""
        found = read_checked(self.path(slot) + ".settings") if slot else None
        return found if isinstance(found, list) and len(found) == 3 else [[], b"", True]

    def put_settings(self, slot: int, settings: list) -> None:
        """Raises OSError."""
        write_checked(self.path(slot) + ".settings", settings)


def read_checked(path: str):
    """What write_checked() was given, None where the file is not there or damaged."""
    packed = read(path, _CHECKED_BYTES)
    if len(packed) > 4 and pack("<I", crc32(packed[:-4])) == packed[-4:]:
        from .cbor_decode import loads

        return loads(packed[:-4])
    return None


def write_checked(path: str, value) -> None:
    """Replace a file by `value` as CBOR, with its CRC-32. Raises OSError."""
    from .cbor import encode

    packed = bytearray()
    encode(value, packed)
    write_atomic(path, (packed, pack("<I", crc32(packed))))


def append(path: str, data) -> None:
    """Add to a file and push it to the medium. Raises OSError."""
    with open(path, "ab") as file:
        file.write(data)
        sync_file(file)


def size(path: str) -> int:
    """Of a file; 0 where it is not there."""
    try:
        return os.stat(path)[6]
    except OSError:
        return 0


def remove(path: str) -> None:
    """Raises OSError where a file that is there can't be removed."""
    if size(path) or _exists(path):
        os.remove(path)


def _exists(path):
    try:
        os.stat(path)
        return True
    except OSError:
        return False


def read(path: str, most: int) -> bytes:
    """At most `most` bytes of a file; nothing where it is not there."""
    try:
        with open(path, "rb") as file:
            return file.read(min(most, size(path)))  # MicroPython takes memory for what is asked for
    except OSError:
        return b""


def find(path: str) -> str:
    """Where model.open_model() finds the model `path`."""
    for folder in [""] + sys.path:  # noqa: RUF005 - MicroPython has no [*a]
        full = folder + "/" + path if folder else path
        if size(full):
            return full
    return path
