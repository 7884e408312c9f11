"""The host's side of the wire: keys, verifying, decoding, sealing. stonechat.cddl (in the agent package) is the text.

Written on cbor2 and hmac, not on the device's own rooms, so that each checks the other. Nothing of a message is decoded
before its tag verifies: what a stranger sends is compared, counted and dropped.
"""

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cbor2
from stonechat.errors import ConfigError, StonechatError

VERSION = 1
MAX_MESSAGE_BYTES = 512
SECRET_BYTES = 32
PREFIX = "stonechat/1/fleet/"
LEVELS = ("normal", "watch", "alarm")
FLAGS = {1: "learning", 2: "muted", 4: "maintenance"}
RESULTS = ("accepted", "not supported", "expired", "bad arguments", "clock not set")
COMMANDS = {
    "mute": 1,
    "maintenance": 2,
    "was-normal": 3,
    "calibrate": 4,
    "report-now": 5,
    "stop-responding": 6,
    "release": 7,
}

_HEAD = b"\x84\x43\xa1\x01\x04\xa0"
_COUNT_MAX = 0xFFFFFFFF
_DEVICE = re.compile(r"(?=.*[A-Za-z0-9])[A-Za-z0-9_.-]{1,64}")

# Every key that leaves a device, and what it can tell about whom: the README's privacy table. A test holds it to the
# CDDL.
PRIVACY_REPORT = {
    0: ("version", "nothing"),
    1: ("sequence number", "how many reports the device has made"),
    2: ("boot", "how often it has started"),
    3: ("time", "when the window ended"),
    4: ("uptime", "the same, while the clock is unset"),
    5: ("level", "normal, watch or alarm"),
    6: ("flags", "learning, muted, maintenance"),
    7: ("score", "how unusual the window was"),
    8: ("surprise", "the same as -log10 p"),
    9: ("evidence", "the same over windows"),
    10: ("features", "which three counters were unusual (their places in the schema), how far and to what share"),
    11: ("windows", "how many windows a summary covers"),
    12: ("scores", "lowest, median and highest score of a summary"),
    13: ("detail", "ONLY UNDER THE OPT-IN, with changes of level: a text that may hold an address"),
    14: ("lost", "how many reports a full outbox has dropped"),
    15: ("answer", "number of a command and what became of it"),
    16: ("late", "how old the report was as it was sent"),
}
PRIVACY_STATUS = {
    0: ("version", "nothing"),
    2: ("boot", "how often the device has started"),
    3: ("time", "the device's clock"),
    4: ("uptime", "seconds since it started"),
    5: ("online", "connected or not"),
    6: ("number", "how many statuses since the start"),
    7: ("firmware", "the id that the vendor gave the firmware"),
    8: ("model", "which model scores"),
    9: ("schema", "which counters it sees"),
    10: ("window", "length of a window"),
    11: ("sources", "which kinds of counters work (their names in the package)"),
    12: ("adaptation", "how far the device has adapted"),
    13: ("learning", "whether it is still learning"),
    14: ("agent", "version of the agent"),
    15: ("counters", "messages rejected, reports not written down, changes of level held back"),
}


def result_name(result: int) -> str:
    return RESULTS[result] if result < len(RESULTS) else f"result {result}"


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


@dataclass(frozen=True, slots=True)
class Feature:
    """One feature of an explanation: its place in the schema, deviation in sd, share of the score in percent."""

    index: int
    deviation: float
    share_percent: int


@dataclass(slots=True)
class Report:
    """A report as stored; numbers in Q8 are as the device computed them. `windows` is 1 for a single window, more for
    a summary and 0 for the answer to a command; `late_s` is the age of history, -1 where the device can't tell."""

    device: str
    sequence: int
    boot: int
    time_s: int | None
    uptime_s: int | None
    level: int = 0
    flags: int = 0
    windows: int = 1
    score_q8: int | None = None
    score_min_q8: int | None = None
    score_max_q8: int | None = None
    surprise_q8: int | None = None
    evidence_q8: int | None = None
    features: list[Feature] = field(default_factory=list)
    detail: str | None = None
    lost: int = 0
    late_s: int | None = None
    answer: tuple[int, int] | None = None
    body: bytes = b""


@dataclass(slots=True)
class Status:
    """A device's retained status, or its last will (`online` False)."""

    device: str
    boot: int
    time_s: int | None
    uptime_s: int
    online: bool
    number: int = 0
    firmware: str | None = None
    model: bytes | None = None
    schema: bytes | None = None
    window_ms: int | None = None
    sources: tuple[str, ...] = ()
    adaptation_q8: int | None = None
    learning: bool | None = None
    agent: str | None = None
    counters: tuple[int, ...] = ()


class _Fields:
    """Typed access to a decoded map: a device that signs nonsense is refused as well."""

    def __init__(self, payload: bytes) -> None:
        try:
            decoded = cbor2.loads(payload)
        except (cbor2.CBORDecodeError, ValueError, RecursionError, OverflowError) as error:
            raise Rejected("malformed", str(error)) from None
        if not isinstance(decoded, dict):
            raise Rejected("malformed", "not a map")
        self._map = decoded
        if decoded.get(0) != VERSION:
            raise Rejected("version", repr(decoded.get(0))[:20])

    def __contains__(self, key: int) -> bool:
        return key in self._map

    def count(self, key: int, top: int = _COUNT_MAX) -> int:
        value = self._map.get(key)
        if type(value) is not int or not 0 <= value <= top:
            raise Rejected("malformed", f"key {key}")
        return value

    def maybe(self, key: int, top: int = _COUNT_MAX) -> int | None:
        return self.count(key, top) if key in self._map else None

    def counts(self, key: int, size: int) -> tuple[int, ...]:
        value = self._map.get(key)
        if (
            not isinstance(value, (list, tuple))
            or len(value) != size
            or any(type(item) is not int or not 0 <= item <= _COUNT_MAX for item in value)
        ):
            raise Rejected("malformed", f"key {key}")
        return tuple(value)

    def text(self, key: int, most: int = 64) -> str | None:
        value = self._map.get(key)
        if value is not None and (not isinstance(value, str) or len(value) > most or not value.isprintable()):
            raise Rejected("malformed", f"key {key}")
        return value

    def octets(self, key: int, most: int) -> bytes | None:
        value = self._map.get(key)
        if value is not None and (not isinstance(value, bytes) or len(value) > most):
            raise Rejected("malformed", f"key {key}")
        return value

    def flag(self, key: int) -> bool | None:
        value = self._map.get(key)
        if value is not None and not isinstance(value, bool):
            raise Rejected("malformed", f"key {key}")
        return value

    def raw(self, key: int) -> Any:
        return self._map.get(key)


def open_report(device: str, keys: DeviceKeys, message: bytes) -> Report:
    """A report that verifies and fits the CDDL. Raises Rejected."""
    body = keys.report.open(message)
    fields = _Fields(body)
    report = Report(
        device=device,
        sequence=fields.count(1),
        boot=fields.count(2),
        time_s=fields.maybe(3),
        uptime_s=fields.maybe(4),
        flags=fields.maybe(6, 0xFF) or 0,
        detail=fields.text(13),
        lost=fields.maybe(14) or 0,
        body=body,
    )
    if report.time_s is None and report.uptime_s is None:
        raise Rejected("malformed", "no time")
    if 16 in fields:
        report.late_s = -1 if fields.raw(16) is True else fields.count(16)
    if 15 in fields:
        command, result = fields.counts(15, 2)
        report.answer = (command, result)
        report.windows = 0
        return report
    report.level = fields.count(5, 2)
    report.evidence_q8 = fields.count(9)
    if 12 in fields:
        report.windows = fields.count(11)
        report.score_min_q8, report.score_q8, report.score_max_q8 = fields.counts(12, 3)
        return report
    report.score_q8 = report.score_min_q8 = report.score_max_q8 = fields.count(7)
    report.surprise_q8 = fields.count(8)
    report.features = list(_features(fields.octets(10, 24) or b""))
    return report


def _features(packed: bytes) -> Iterator[Feature]:
    if len(packed) % 3:
        raise Rejected("malformed", "features")
    for at in range(0, len(packed), 3):
        index, z_q4, share = packed[at : at + 3]
        yield Feature(index, (z_q4 - 256 if z_q4 > 127 else z_q4) / 16, share)


def open_status(device: str, keys: DeviceKeys, message: bytes) -> Status:
    """A status that verifies and fits the CDDL. Raises Rejected."""
    fields = _Fields(keys.status.open(message))
    sources = fields.raw(11)
    if sources is not None and (
        not isinstance(sources, (list, tuple))
        or len(sources) > 32
        or any(not isinstance(source, str) or len(source) > 32 or not source.isprintable() for source in sources)
    ):
        raise Rejected("malformed", "key 11")
    online = fields.flag(5)
    if online is None:
        raise Rejected("malformed", "key 5")
    return Status(
        device=device,
        boot=fields.count(2),
        time_s=fields.maybe(3),
        uptime_s=fields.count(4),
        online=online,
        number=fields.count(6) if online else 0,
        firmware=fields.text(7),
        model=fields.octets(8, 32),
        schema=fields.octets(9, 32),
        window_ms=fields.maybe(10),
        sources=tuple(sources or ()),
        adaptation_q8=fields.maybe(12),
        learning=fields.flag(13),
        agent=fields.text(14),
        counters=fields.counts(15, 3) if 15 in fields else (),
    )


def seal_ack(keys: DeviceKeys, ranges: Sequence[tuple[int, int]], time_s: int | None = None) -> bytes:
    """ranges: (first, last) of sequence numbers that are committed -> the acknowledgement."""
    flat = [number for pair in ranges for number in pair]
    return keys.ack.seal(encode({0: VERSION, 1: flat, 2: int(time.time()) if time_s is None else time_s}))


def seal_command(keys: DeviceKeys, sequence: int, expires_s: int, code: int, arguments: Sequence[int] = ()) -> bytes:
    fields: dict[int, Any] = {0: VERSION, 1: sequence, 2: expires_s, 3: code}
    if arguments:
        fields[4] = list(arguments)
    return keys.command.seal(encode(fields))


def encode(fields: dict[int, Any]) -> bytes:
    return bytes(cbor2.dumps(fields, canonical=True))


def ranges_of(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Sequence numbers in any order -> the runs that they make."""
    runs: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs


def new_secret() -> bytes:
    return secrets.token_bytes(SECRET_BYTES)


def fingerprint(secret: bytes) -> str:
    """What may be shown of a secret."""
    return hashlib.sha256(b"stonechat fingerprint" + secret).hexdigest()[:16]
