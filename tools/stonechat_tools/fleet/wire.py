"""The host's side of the wire: decoding and sealing each message. stonechat.cddl (in the agent package) is the text.

Written on cbor2, not on the device's own modules, so that each checks the other. Nothing of a message is decoded
before its tag verifies: what others send is compared, counted and dropped.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import cbor2
from stonechat import limits

from .keyring import MAX_MESSAGE_BYTES, MAX_VERIFIED_BYTES, DeviceKeys, Rejected
from .wire_release import UpdateState, update_state

VERSION = 1
PREFIX = "stonechat/1/fleet/"
LEVELS = ("normal", "watch", "alarm")
FLAGS = {1: "learning", 2: "muted", 4: "maintenance", 8: "model does not fit", 16: "changed and steady"}
RESULTS = ("accepted", "not supported", "expired", "bad arguments", "clock not set", "failed")
COMMANDS = {
    "mute": 1,
    "maintenance": 2,
    "was-normal": 3,
    "calibrate": 4,
    "report-now": 5,
    "stop-responding": 6,
    "release": 7,
    "own-model": 8,
}
OWN_MODEL = {"forbid": 0, "again": 1}  # arguments of that command

_COUNT_MAX = 0xFFFFFFFF
LATE_KEY = 23  # of a report; appended last, by the device, as it sends


def result_name(result: int) -> str:
    return RESULTS[result] if result < len(RESULTS) else f"result {result}"


@dataclass(frozen=True, slots=True)
class Feature:
    """One feature of an explanation: its index in the schema, deviation in sd, share of the score in percent."""

    index: int
    deviation: float
    share_percent: int


@dataclass(slots=True)
class Report:
    """A report as stored; numbers in Q8 are as the device computed them. `windows` is 1 for a single window, more for
    a summary and 0 for the answer to a command; `late_s` is the age of history, -1 where the device does not know
    it."""

    device: str
    sequence: int
    boot: int
    time_s: int | None
    uptime_s: int | None
    stream: bytes = b""
    level: int = 0
    flags: int = 0
    windows: int = 1
    score_q8: int | None = None
    score_min_q8: int | None = None
    score_max_q8: int | None = None
    surprise_q8: int | None = None
    evidence_q8: int | None = None
    packed: bytes = b""  # `features`, as the device packed them
    detail: str | None = None
    lost: int = 0
    channel: int = 0  # which of the status's channels carries it, from 1; 0 is the device itself
    late_s: int | None = None
    answer: tuple[int, int] | None = None
    body: bytes = b""  # without the age, which differs each time that the report is sent
    key: str = ""  # fingerprint of the key that it verified with,
    current: bool = True  # which is the device's current one, not one that is being rotated out

    @property
    def features(self) -> list[Feature]:
        return list(_features(self.packed))


@dataclass(slots=True)
class OwnModel:
    """A device's own model: its phase (an index of PHASES), windows so far of those wanted, models that failed their
    trial, and its digest, empty while there is none."""

    phase: int
    done: int
    wanted: int
    refused: int
    digest: bytes

    PHASES: ClassVar[tuple[str, ...]] = ("off", "collecting", "training", "on trial", "deciding")

    def __str__(self) -> str:
        name = self.PHASES[self.phase]
        return f"{name} {self.done}/{self.wanted}" if self.wanted else name


@dataclass(slots=True)
class Status:
    """A device's retained status, or its last will (`online` False)."""

    device: str
    boot: int
    time_s: int | None
    uptime_s: int
    online: bool
    stream: bytes = b""
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
    unscored: tuple[int, ...] = ()
    channels: tuple[str, ...] = ()  # names of those beside the device's own
    own: "OwnModel | None" = None
    heartbeat_s: int | None = None
    steady_s: int | None = None  # changed and steady for so long
    sleep_s: int | None = None  # the device sleeps now, for so long
    update: UpdateState | None = None  # None: this device takes no updates


class _Fields:
    """Typed access to a decoded map: a device that signs nonsense is refused as well."""

    def __init__(self, payload: bytes) -> None:
        try:
            decoded = cbor2.loads(payload)
        except Exception as error:  # whatever a decoder raises on nonsense that a device has signed
            raise Rejected("malformed", str(error)) from None
        if not isinstance(decoded, dict):
            raise Rejected("malformed", "not a map")
        self.all = decoded
        if decoded.get(0) != VERSION:
            raise Rejected("version", repr(decoded.get(0))[:20])

    def __contains__(self, key: int) -> bool:
        return key in self.all

    def count(self, key: int, top: int = _COUNT_MAX) -> int:
        value = self.all.get(key)
        if type(value) is not int or not 0 <= value <= top:
            raise Rejected("malformed", f"key {key}")
        return value

    def maybe(self, key: int, top: int = _COUNT_MAX) -> int | None:
        return self.count(key, top) if key in self.all else None

    def own(self, key: int) -> OwnModel | None:
        value = self.all.get(key)
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or len(value) != 5:
            raise Rejected("malformed", f"key {key}")
        *counts, digest = value
        if (
            any(type(item) is not int or not 0 <= item <= _COUNT_MAX for item in counts)
            or counts[0] >= len(OwnModel.PHASES)
            or not isinstance(digest, bytes)
            or len(digest) > limits.DIGEST_BYTES
        ):
            raise Rejected("malformed", f"key {key}")
        phase, done, wanted, refused = counts
        return OwnModel(phase, done, wanted, refused, digest)

    def counts(self, key: int, size: int | None) -> tuple[int, ...]:
        """size: how many, or None for up to limits.CAUSES."""
        value = self.all.get(key)
        if (
            not isinstance(value, (list, tuple))
            or (len(value) > limits.CAUSES if size is None else len(value) != size)
            or any(type(item) is not int or not 0 <= item <= _COUNT_MAX for item in value)
        ):
            raise Rejected("malformed", f"key {key}")
        return tuple(value)

    def text(self, key: int, most_bytes: int) -> str | None:
        value = self.all.get(key)
        if value is not None and not isinstance(value, str):
            raise Rejected("malformed", f"key {key}")
        return None if value is None else plain(value, most_bytes)

    def texts(self, key: int, most: int, most_bytes: int) -> tuple[str, ...]:
        """The first `most` of a list; empty where there is none."""
        value = self.all.get(key)
        if value is None:
            return ()
        if not isinstance(value, (list, tuple)) or any(not isinstance(item, str) for item in value):
            raise Rejected("malformed", f"key {key}")
        return tuple(plain(item, most_bytes) for item in value[:most])

    def detail(self) -> str | None:
        value = self.all.get(13)
        if value is not None and (not isinstance(value, str) or value != plain(value, limits.DETAIL_BYTES)):
            raise Rejected("malformed", "key 13")
        return value

    def octets(self, key: int, most: int) -> bytes | None:
        value = self.all.get(key)
        if value is not None and (not isinstance(value, bytes) or len(value) > most):
            raise Rejected("malformed", f"key {key}")
        return value

    def stream(self) -> bytes:
        value = self.octets(16, limits.STREAM_BYTES)
        if value is None or len(value) != limits.STREAM_BYTES:
            raise Rejected("malformed", "key 16")
        return value

    def flag(self, key: int) -> bool | None:
        value = self.all.get(key)
        if value is not None and not isinstance(value, bool):
            raise Rejected("malformed", f"key {key}")
        return value

    def raw(self, key: int) -> Any:
        return self.all.get(key)


def open_report(device: str, keys: DeviceKeys, message: bytes) -> Report:
    """A report that verifies and fits the CDDL. Raises Rejected; where the device's key has signed what will never be
    taken, with the `identity` under which the device keeps it."""
    body = keys.report.open(message, MAX_VERIFIED_BYTES)
    try:
        if len(message) > MAX_MESSAGE_BYTES:
            raise Rejected("too large", f"{len(message)} bytes")
        report = _report(device, body)
    except Rejected as rejected:
        rejected.identity = _identity(body)
        raise
    report.key = keys.fingerprint
    report.current = keys.current
    return report


def _identity(body: bytes) -> tuple[bytes, int] | None:
    """(stream, sequence number) of an authentic report that is not one of version 1, if it has them."""
    try:
        fields = cbor2.loads(body)
        stream, sequence = fields[16], fields[1]
    except Exception:  # as in _Fields
        return None
    if type(stream) is not bytes or len(stream) != limits.STREAM_BYTES:
        return None
    return (stream, sequence) if type(sequence) is int and 0 <= sequence <= _COUNT_MAX else None


def _undated(body: bytes, late: int | bool) -> bytes:
    """The report as the device keeps it: without the age, its last pair."""
    pair = bytes((LATE_KEY,)) + encode(late)
    if body.endswith(pair) and 0xA1 < body[0] <= 0xB7:
        return bytes((body[0] - 1,)) + body[1 : -len(pair)]
    return body


_UNUSUAL = frozenset((4, 12, 13, 14, 15, 17, LATE_KEY))


def _usual(device: str, body: bytes, fields: dict[Any, Any]) -> Report | None:
    """As _report(), for what most reports are: one window, dated, on time. None for anything else."""
    if not _UNUSUAL.isdisjoint(fields):
        return None
    get = fields.get
    sequence, boot, time_s, level, flags = get(1), get(2), get(3), get(5), get(6, 0)
    score, surprise, evidence, packed, stream = get(7), get(8), get(9), get(10, b""), get(16)
    if not (
        type(sequence) is type(boot) is type(time_s) is type(level) is int
        and type(score) is type(surprise) is type(evidence) is type(flags) is int
        and type(stream) is type(packed) is bytes
        and 0 <= sequence <= _COUNT_MAX
        and 0 <= boot <= _COUNT_MAX
        and 0 <= time_s <= _COUNT_MAX
        and 0 <= score <= _COUNT_MAX
        and 0 <= surprise <= _COUNT_MAX
        and 0 <= evidence <= _COUNT_MAX
        and 0 <= level <= 2
        and 0 <= flags <= 0xFF
        and len(stream) == limits.STREAM_BYTES
        and len(packed) <= limits.FEATURES_BYTES
        and not len(packed) % 3
    ):
        return None
    return Report(
        device, sequence, boot, time_s, None, stream, level, flags, 1, score, score, score, surprise, evidence, packed,
        None, 0, 0, None, None, body,
    )  # fmt: skip


def _report(device: str, body: bytes) -> Report:
    fields = _Fields(body)
    return _usual(device, body, fields.all) or _any_report(device, body, fields)


def _any_report(device: str, body: bytes, fields: _Fields) -> Report:
    report = Report(
        device=device,
        sequence=fields.count(1),
        boot=fields.count(2),
        time_s=fields.maybe(3),
        uptime_s=fields.maybe(4),
        stream=fields.stream(),
        flags=fields.maybe(6, 0xFF) or 0,
        detail=fields.detail(),
        lost=fields.maybe(14) or 0,
        channel=fields.maybe(17, limits.CHANNELS) or 0,
        body=body,
    )
    if report.time_s is None and report.uptime_s is None:
        raise Rejected("malformed", "no time")
    if LATE_KEY in fields:
        report.late_s = -1 if fields.raw(LATE_KEY) is True else fields.count(LATE_KEY)
        report.body = _undated(body, fields.raw(LATE_KEY))
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
    report.packed = fields.octets(10, limits.FEATURES_BYTES) or b""
    if len(report.packed) % 3:
        raise Rejected("malformed", "features")
    return report


def reread(device: str, body: bytes) -> Report:
    """A report out of the database: its body, as open_report() gave it, decoded once more."""
    return _report(device, body)


def pack_features(features: Sequence[Feature]) -> bytes:
    """As a device packs them: index, sixteenths of a deviation, share."""
    return bytes([byte for f in features for byte in (f.index, round(f.deviation * 16) & 255, f.share_percent)])


def _features(packed: bytes) -> Iterator[Feature]:
    for at in range(0, len(packed), 3):
        index, z_q4, share = packed[at : at + 3]
        yield Feature(index, (z_q4 - 256 if z_q4 > 127 else z_q4) / 16, share)


def open_status(device: str, keys: DeviceKeys, message: bytes) -> Status:
    """A status that verifies and fits the CDDL. Raises Rejected."""
    fields = _Fields(keys.status.open(message, limits.STATUS_BYTES))
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
        firmware=fields.text(7, limits.FIRMWARE_BYTES),
        model=fields.octets(8, limits.DIGEST_BYTES),
        schema=fields.octets(9, limits.DIGEST_BYTES),
        window_ms=fields.maybe(10),
        sources=fields.texts(11, limits.SOURCES, limits.SOURCE_BYTES),
        adaptation_q8=fields.maybe(12),
        learning=fields.flag(13),
        agent=fields.text(14, limits.AGENT_BYTES),
        counters=fields.counts(15, 4) if 15 in fields else (),
        stream=fields.stream(),
        unscored=fields.counts(17, None) if 17 in fields else (),
        channels=fields.texts(25, limits.CHANNELS, limits.CHANNEL_BYTES),
        own=fields.own(19),
        heartbeat_s=fields.maybe(20),
        steady_s=fields.maybe(18),
        sleep_s=fields.maybe(21),
        update=update_state(fields.raw(24)),
    )


def plain(text: str, most_bytes: int) -> str:
    """What a terminal, a page and a mail may show of a text that came over the network, cut where it is too long. A
    status is never refused for a text that its device has signed."""
    if len(text.encode()) > most_bytes:
        text = text.encode()[:most_bytes].decode(errors="ignore")
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def seal_ack(
    keys: DeviceKeys,
    stream: bytes,
    ranges: Sequence[tuple[int, int]],
    refused: Sequence[tuple[int, int]] = (),
    time_s: int | None = None,
) -> bytes:
    """ranges: (first, last) of the stream's sequence numbers that are committed; refused: of those that will never be
    taken -> the acknowledgement."""
    dated = b"\x02" + _uint(int(time.time()) if time_s is None else time_s) + b"\x03\x44"
    if len(ranges) == 1 and not refused:
        ((first, last),) = ranges
        return keys.ack.seal(b"\xa4\x00\x01\x01\x82" + _uint(first) + _uint(last) + dated + stream)
    head = b"\xa5\x00\x01\x01" if refused else b"\xa4\x00\x01\x01"
    tail = b"\x04" + _ranges(refused) if refused else b""
    return keys.ack.seal(head + _ranges(ranges) + dated + stream + tail)


def _uint(value: int) -> bytes:
    if value < 24:
        return bytes((value,))
    if value < 0x100:
        return bytes((0x18, value))
    if value < 0x10000:
        return b"\x19" + value.to_bytes(2)
    return b"\x1a" + value.to_bytes(4) if value <= _COUNT_MAX else b"\x1b" + value.to_bytes(8)


def _ranges(ranges: Sequence[tuple[int, int]]) -> bytes:
    count = 2 * len(ranges)
    head = _uint(count)
    head = bytes((head[0] | 0x80,)) + head[1:]  # an array's head is that of a number, of another major type
    return head + b"".join([_uint(first) + _uint(last) for first, last in ranges])


def seal_command(keys: DeviceKeys, sequence: int, expires_s: int, code: int, arguments: Sequence[int] = ()) -> bytes:
    fields: dict[int, Any] = {0: VERSION, 1: sequence, 2: expires_s, 3: code}
    if arguments:
        fields[4] = list(arguments)
    return keys.command.seal(encode(fields))


def encode(value: Any) -> bytes:
    return bytes(cbor2.dumps(value, canonical=True))


def ranges_of(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Sequence numbers in any order -> the runs that they make."""
    if len(numbers) == 1:
        return [(numbers[0], numbers[0])]
    runs: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs
