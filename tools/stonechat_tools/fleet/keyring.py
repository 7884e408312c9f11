"""The fleet's keys: HKDF per direction, COSE_Mac0 with HMAC 256/64, and the folder of key files.

Written on cbor2 and hmac, not on the device's own modules, so that each checks the other. Nothing of a message is
decoded before its tag verifies.
"""

import hashlib
import hmac
import re
import secrets
from pathlib import Path

import cbor2
from stonechat.errors import ConfigError, StonechatError

MAX_MESSAGE_BYTES = 512
SECRET_BYTES = 32

_HEAD = b"\x84\x43\xa1\x01\x04\xa0"
_DEVICE = re.compile(r"(?=.*[A-Za-z0-9])[A-Za-z0-9_.-]{1,64}")


class Rejected(StonechatError):
    """A message that is not taken; `reason` is one of REASONS, the counters' names."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason + (": " + detail if detail else ""))
        self.reason = reason


REASONS = ("too large", "malformed", "unknown device", "forged", "version", "stale", "conflict")


def check_device_id(device: str) -> str:
    if not _DEVICE.fullmatch(device):
        raise ConfigError(f"device id {device!r}: 1 to 64 letters, digits, '-', '_' and '.'")
    return device


def derive(secret: bytes, label: bytes) -> bytes:
    """HKDF-SHA256 (RFC 5869), one block, with the salt "stonechat/1"."""
    inner = hmac.digest(b"stonechat/1", secret, "sha256")
    return hmac.digest(inner, label + b"\x01", "sha256")


class Mac:
    """COSE_Mac0, HMAC 256/64, for the messages of one kind of one device."""

    def __init__(self, key: bytes, device: str) -> None:
        self._key = key
        self._context = b"\x84\x64MAC0\x43\xa1\x01\x04" + cbor2.dumps(device.encode())

    def seal(self, payload: bytes) -> bytes:
        wrapped = cbor2.dumps(payload)
        return _HEAD + wrapped + b"\x48" + hmac.digest(self._key, self._context + wrapped, "sha256")[:8]

    def open(self, message: bytes) -> bytes:
        """The payload of an authentic message. Raises Rejected for any other."""
        if len(message) > MAX_MESSAGE_BYTES:
            raise Rejected("too large", f"{len(message)} bytes")
        end = len(message) - 9
        if end < 7 or message[:6] != _HEAD or message[end] != 0x48:
            raise Rejected("malformed", "not a COSE_Mac0 message with HMAC 256/64")
        wrapped = message[6:end]
        if not hmac.compare_digest(hmac.digest(self._key, self._context + wrapped, "sha256")[:8], message[end + 1 :]):
            raise Rejected("forged", "the authentication tag does not fit")
        first = wrapped[0]
        start = 1 if first < 0x58 else 2 if first == 0x58 else 3
        if wrapped[start:] == b"" or cbor2.dumps(wrapped[start:]) != wrapped:
            raise Rejected("malformed", "the payload is not a byte string")
        return wrapped[start:]


class DeviceKeys:
    """The keys of one device from its secret."""

    def __init__(self, secret: bytes, device: str) -> None:
        if len(secret) != SECRET_BYTES:
            raise ConfigError(f"the secret of {device} has {len(secret)} bytes, want {SECRET_BYTES}")
        self.report = Mac(derive(secret, b"report"), device)
        self.status = Mac(derive(secret, b"status"), device)
        self.ack = Mac(derive(secret, b"ack"), device)
        self.command = Mac(derive(secret, b"command"), device)


def read_secrets(path: Path) -> list[bytes]:
    """A key file: one secret of 64 hex digits a line, the current one first, then those being rotated out."""
    found = [line.strip() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    try:
        values = [bytes.fromhex(line) for line in found]
    except ValueError:
        values = []
    if not values or any(len(value) != SECRET_BYTES for value in values):
        raise ConfigError(f"{path}: want one secret of 64 hex digits a line")
    return values


class Keys:
    """The fleet's keys: a folder with a file DEVICE.key for each device (as `stonechat provision` makes it), or a
    mapping of device ids to secrets. A device that is provisioned later is found without a restart."""

    def __init__(self, source: "Path | str | dict[str, bytes]") -> None:
        self._folder = None if isinstance(source, dict) else Path(source)
        self._known: dict[str, tuple[float, list[DeviceKeys]]] = {}
        if isinstance(source, dict):
            self._known = {name: (0.0, [DeviceKeys(secret, name)]) for name, secret in source.items()}
        elif not self._folder or not self._folder.is_dir():
            raise ConfigError(f"{source}: no such folder of keys; `stonechat provision` makes one")

    def of(self, device: str) -> list[DeviceKeys]:
        """The device's keys, the current ones first. Raises Rejected for a device that is not in the fleet."""
        if self._folder is None:
            if device not in self._known:
                raise Rejected("unknown device", device)
            return self._known[device][1]
        if not _DEVICE.fullmatch(device):
            raise Rejected("unknown device", repr(device))
        path = self._folder / (device + ".key")
        try:
            changed = path.stat().st_mtime
        except OSError:
            self._known.pop(device, None)
            raise Rejected("unknown device", device) from None
        known = self._known.get(device)
        if known is None or known[0] != changed:
            known = (changed, [DeviceKeys(secret, device) for secret in read_secrets(path)])
            self._known[device] = known
        return known[1]


def new_secret() -> bytes:
    return secrets.token_bytes(SECRET_BYTES)


def fingerprint(secret: bytes) -> str:
    """What may be shown of a secret."""
    return hashlib.sha256(b"stonechat fingerprint" + secret).hexdigest()[:16]
