"""The fleet's keys: those of one device by direction, and the folder of key files."""

import contextlib
import os
import re
import secrets
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from stonechat.errors import ConfigError

from .seals import MAX_MESSAGE_BYTES, REASONS, Mac, Rejected, context_of, derive, fingerprint, open_, seal
from .watch import Watch

__all__ = [
    "COLLECTOR_LABELS", "HOT_LABELS", "LABELS", "MAX_MESSAGE_BYTES", "MAX_VERIFIED_BYTES", "OPERATOR_LABELS", "REASONS",
    "SECRET_BYTES", "DeviceKeys", "HotKeys", "Keys", "Mac", "Rejected", "Signer", "check_device_id", "derive",
    "derived_text", "fingerprint", "new_secret", "read_derived", "read_secrets",
]  # fmt: skip

MAX_VERIFIED_BYTES = 4096  # a report larger than a message may be is refused by name, if the device has signed it
SECRET_BYTES = 32
MAX_FILE_BYTES = 16_384
LABELS = ("report", "status", "ack", "renew", "offer", "want", "command")
COLLECTOR_LABELS = LABELS[:6]  # a collector reads, acknowledges, extends and offers; it can't command
OPERATOR_LABELS = ("command",)
HOT_LABELS = ("report", "status", "ack")  # held in memory; the others are read from the file where they are needed


_LAYOUTS: "dict[tuple[tuple[str, ...], bool], _Layout]" = {}
_FOLDER = ""  # no device's id
_DEVICE = re.compile(r"(?=.*[A-Za-z0-9])[A-Za-z0-9_.-]{1,64}")


def check_device_id(device: str) -> str:
    if not _DEVICE.fullmatch(device):
        raise ConfigError(f"device id {device!r}: 1 to 64 letters, digits, '-', '_' and '.'")
    return device


class _Layout:
    """Which keys of a device are held, and where: one for all devices of a kind. cold(): reads those that are not."""

    __slots__ = ("offsets", "current", "cold")

    def __init__(
        self, labels: tuple[str, ...], current: bool, cold: "Callable[[DeviceKeys, str], bytes | None] | None"
    ) -> None:
        self.offsets = {label: n * SECRET_BYTES for n, label in enumerate(labels)}
        self.current = current  # False for keys that are being rotated out
        self.cold = cold


class DeviceKeys:
    """The keys of one device, from its secret or, with derived(), those of some directions only."""

    __slots__ = ("_layout", "_packed", "device")

    def __init__(self, secret: bytes, device: str, current: bool = True) -> None:
        if len(secret) != SECRET_BYTES:
            raise ConfigError(f"the secret of {device} has {len(secret)} bytes, want {SECRET_BYTES}")
        self._take({label: derive(secret, label.encode()) for label in LABELS}, device, current)

    def _take(self, keys: dict[str, bytes], device: str, current: bool) -> None:
        labels = tuple(label for label in LABELS if label in keys)
        layout = _LAYOUTS.get((labels, current))
        self._layout = layout or _LAYOUTS.setdefault((labels, current), _Layout(labels, current, None))
        shown = fingerprint(keys.get("report") or next(iter(keys.values())))
        self._packed = b"".join(keys[label] for label in labels) + bytes.fromhex(shown)
        self.device = device

    @classmethod
    def derived(cls, keys: dict[str, bytes], device: str, current: bool = True) -> "DeviceKeys":
        """keys: 32 bytes for each label."""
        made = cls.__new__(cls)
        made._take(keys, device, current)
        return made

    @classmethod
    def _of_hot(cls, hot: "HotKeys", layout: _Layout, device: str) -> "DeviceKeys":
        made = cls.__new__(cls)
        made._packed = bytes(hot)
        made._layout = layout
        made.device = device
        return made

    def _hot(self) -> "HotKeys | None":
        """None where one of the keys is not there."""
        offsets = self._layout.offsets
        if not all(label in offsets for label in HOT_LABELS):
            return None
        keys = [self._packed[offsets[label] : offsets[label] + SECRET_BYTES] for label in HOT_LABELS]
        return HotKeys(b"".join(keys) + self._packed[-8:])

    @property
    def current(self) -> bool:
        """False for keys that are being rotated out."""
        return self._layout.current

    @property
    def fingerprint(self) -> str:
        return self._packed[-8:].hex()

    def seal(self, label: str, payload: bytes, device: str | None = None) -> bytes:
        """Raises ConfigError where there are keys of other directions only. device: as in HotKeys; it is known here."""
        return seal(self._key(label), context_of(self.device), payload)

    def open(self, label: str, message: bytes, max_bytes: int = MAX_MESSAGE_BYTES, device: str | None = None) -> bytes:
        """The payload of an authentic message. Raises Rejected for any other, ConfigError as seal()."""
        return open_(self._key(label), context_of(self.device), message, max_bytes)

    def _mac(self, label: str) -> Mac:
        return Mac(self._key(label), self.device)

    def _key(self, label: str) -> bytes:
        layout = self._layout
        at = layout.offsets.get(label)
        if at is not None:
            return self._packed[at : at + SECRET_BYTES]
        key = layout.cold(self, label) if layout.cold else None
        if key is None:
            side = "the operator" if label in OPERATOR_LABELS else "the collector"
            raise ConfigError(f"{self.device}: no key for {label} here; {side} has it")
        return key

    @property
    def report(self) -> Mac:
        return self._mac("report")

    @property
    def status(self) -> Mac:
        return self._mac("status")

    @property
    def ack(self) -> Mac:
        return self._mac("ack")

    @property
    def renew(self) -> Mac:
        return self._mac("renew")

    @property
    def offer(self) -> Mac:
        return self._mac("offer")

    @property
    def want(self) -> Mac:
        return self._mac("want")

    @property
    def command(self) -> Mac:
        return self._mac("command")


class HotKeys(bytes):
    """The keys of HOT_LABELS of one device, and their fingerprint: as DeviceKeys, for a message of a large fleet, with
    no object of its own to make for each. They are a device's current keys. Which device's, the caller knows."""

    __slots__ = ()
    current = True

    @property
    def fingerprint(self) -> str:
        return self[-8:].hex()

    def seal(self, label: str, payload: bytes, device: str) -> bytes:
        at = _HOT_AT[label]
        return seal(self[at : at + SECRET_BYTES], context_of(device), payload)

    def open(self, label: str, message: bytes, max_bytes: int, device: str) -> bytes:
        """As DeviceKeys.open()."""
        at = _HOT_AT[label]
        return open_(self[at : at + SECRET_BYTES], context_of(device), message, max_bytes)


_HOT_AT = {label: n * SECRET_BYTES for n, label in enumerate(HOT_LABELS)}
Signer = DeviceKeys | HotKeys


def _read(path: Path) -> list[str]:
    """The lines of a small regular file, without comments and empty ones. Raises OSError or ConfigError; waits for
    nothing (a FIFO) and reads no more than MAX_FILE_BYTES."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ConfigError(f"{path}: not a regular file")
        raw = os.read(handle, MAX_FILE_BYTES + 1)
    finally:
        os.close(handle)
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: more than {MAX_FILE_BYTES} bytes")
    lines = [line.strip() for line in raw.decode("ascii", "replace").split("\n")]
    return [line for line in lines if line and not line.startswith("#")]


def _key(text: str) -> bytes | None:
    try:
        value = bytes.fromhex(text)
    except ValueError:
        return None
    return value if len(value) == SECRET_BYTES else None


def read_secrets(path: Path) -> list[bytes]:
    """A file of secrets: 64 hex digits a line, the current one first, then those being rotated out. Raises OSError or
    ConfigError."""
    values = [_key(line) for line in _read(path)]
    found = [value for value in values if value is not None]
    if not found or len(found) != len(values):
        raise ConfigError(f"{path}: want one secret of 64 hex digits a line")
    return found


def read_derived(path: Path) -> list[dict[str, bytes]]:
    """A file of derived keys, as derived_text() makes it -> keys by label, the current ones first. Raises OSError or
    ConfigError."""
    found = []
    for line in _read(path):
        pairs = [part.partition("=") for part in line.split()]
        keys = {label: key for label, _, text in pairs if label in LABELS and (key := _key(text)) is not None}
        if not keys or len(keys) != len(pairs):
            raise ConfigError(f"{path}: want LABEL=64 hex digits ... in each line, labels {', '.join(LABELS)}")
        found.append(keys)
    if not found:
        raise ConfigError(f"{path}: holds no keys")
    return found


def derived_text(of: list[bytes], labels: tuple[str, ...]) -> str:
    """The keys of some directions of each secret: from them neither the secret nor another direction's key follows."""
    lines = [" ".join(f"{label}={derive(secret, label.encode()).hex()}" for label in labels) for secret in of]
    return "".join(line + "\n" for line in lines)


class Keys:
    """The fleet's keys: a folder as `stonechat provision` makes it, with a file DEVICE.keys (derived keys) or
    DEVICE.key (the secret) for each device, or a mapping of device ids to secrets. A device that is provisioned later
    is found without a restart. `problems` says which device's file can't be used, and why, and under "" that the folder
    is away. It takes little memory: of most devices only HotKeys.

    hot: those, by device, as of the last refresh(): for a batch, before it asks held()."""

    def __init__(self, source: "Path | str | dict[str, bytes]") -> None:
        self.folder = None if isinstance(source, dict) else Path(source)
        self.problems: dict[str, str] = {}
        self.hot: dict[str, HotKeys] = {}
        self._known: dict[str, tuple[DeviceKeys, ...]] = {}  # those of all other devices
        self._layout = _Layout(HOT_LABELS, True, self._cold)
        self._files: dict[str, object] = {}  # what a file was when it was read, for those that are not watched
        self._watch: Watch | None = None
        if isinstance(source, dict):
            self._known = {name: (DeviceKeys(secret, name),) for name, secret in source.items()}
        elif not self.folder or not self.folder.is_dir():
            raise ConfigError(f"{source}: no such folder of keys; `stonechat provision` makes one")
        else:
            self._begin_watch()

    def of(self, device: str) -> Sequence[DeviceKeys]:
        """The device's keys, the current ones first, as its file is now. Raises Rejected for a device that is not in
        the fleet, or whose file can't be used."""
        self.refresh()
        return self.held(device)

    def held(self, device: str) -> Sequence[DeviceKeys]:
        """As of(), with the files as they were at the last refresh() or are now: for a batch."""
        hot = self.hot.get(device)
        if hot is not None:
            return (DeviceKeys._of_hot(hot, self._layout, device),)
        known = self._known.get(device)
        if known is not None and device not in self._files:
            return known
        if self.folder is None or not _DEVICE.fullmatch(device):
            raise Rejected("unknown device", repr(device[:64]))
        return self._look(self.folder, device)

    def refresh(self) -> None:
        """Drop what has changed since the last call. One system call or two, whatever the number of devices."""
        if self.folder is None:
            return
        if self._watch is None:
            if _FOLDER in self.problems or not self.folder.is_dir():
                self._begin_watch()
            return
        try:
            names = self._watch.changed()
        except OSError:  # no folder: nobody is in the fleet until it is there again
            names = None
        if names is None:
            self._begin_watch()
            names = {""}
        for name in names:
            device, _, ending = name.rpartition(".")
            if ending in ("keys", "key"):
                self._forget(device)
            elif not name:
                self._forget_all()

    def _begin_watch(self) -> None:
        assert self.folder is not None
        if self._watch is not None:
            self._watch.close()
        try:
            self._watch = Watch(self.folder)
        except (OSError, AttributeError, ValueError):
            self._watch = None  # each file is looked at each time
            self._forget_all()
        if self.folder.is_dir():
            self.problems.pop(_FOLDER, None)
        else:
            self.problems[_FOLDER] = (
                f"{self.folder}: no such folder of keys; no message is taken until it is there again"
            )

    def _look(self, folder: Path, device: str) -> Sequence[DeviceKeys]:
        if self._watch is None and not self._files:
            self._begin_watch()
        for ending, read in ((".keys", self._derived), (".key", self._secrets)):
            path = folder / (device + ending)
            try:
                found = path.stat()
                changed = (ending, found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino)
                known = self._known.get(device)
                if self._files.get(device) != changed or known is None:
                    known = tuple(read(path, device))
                    hot = known[0]._hot() if len(known) == 1 else None
                    if self._watch is None or path.is_symlink():
                        self._known[device] = known
                        self._files[device] = changed
                    elif hot is not None:
                        self.hot[device] = hot
                    else:
                        self._known[device] = known
                self.problems.pop(device, None)
                return known
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (OSError, ConfigError) as error:
                self._forget(device)
                self.problems[device] = str(error) if isinstance(error, ConfigError) else f"{path}: {error.strerror}"
                raise Rejected("key file", device) from None
        self._forget(device)
        self.problems.pop(device, None)
        raise Rejected("key file" if _FOLDER in self.problems else "unknown device", device)

    def _cold(self, held: DeviceKeys, label: str) -> bytes | None:
        """A key that is not held, out of the device's file as it is now."""
        assert self.folder is not None
        for ending, read in ((".keys", self._derived), (".key", self._secrets)):
            with contextlib.suppress(OSError, ConfigError):
                for keys in read(self.folder / (held.device + ending), held.device):
                    at = keys._layout.offsets.get(label)
                    if at is not None and keys._packed[-8:] == held._packed[-8:]:
                        return keys._packed[at : at + SECRET_BYTES]
        return None

    def _forget(self, device: str) -> None:
        for kept in (self.hot, self._known, self._files):
            kept.pop(device, None)

    def _forget_all(self) -> None:
        for kept in (self.hot, self._known, self._files):
            kept.clear()

    @staticmethod
    def _derived(path: Path, device: str) -> list[DeviceKeys]:
        return [DeviceKeys.derived(keys, device, not i) for i, keys in enumerate(read_derived(path))]

    @staticmethod
    def _secrets(path: Path, device: str) -> list[DeviceKeys]:
        return [DeviceKeys(secret, device, not i) for i, secret in enumerate(read_secrets(path))]


def new_secret() -> bytes:
    return secrets.token_bytes(SECRET_BYTES)
