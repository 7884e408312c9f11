"""The host's side of the wire: decoding and sealing each message. stonechat.cddl (in the agent package) is the text.

Written on cbor2, not on the device's own modules, so that each checks the other. Nothing of a message is decoded
before its tag verifies: what others send is compared, counted and dropped.
"""

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import cbor2
from stonechat import limits

from .keyring import MAX_MESSAGE_BYTES, MAX_VERIFIED_BYTES, DeviceKeys, Rejected, Signer
from .messages import (
    COMMANDS,
    FLAGS,
    LEVELS,
    OWN_MODEL,
    RESULTS,
    Feature,
    OwnModel,
    Report,
    Status,
    pack_features,
    result_name,
)
from .wire_fields import COUNT_MAX, VERSION, Fields, plain
from .wire_release import update_state
from .wire_response import decision, response_state

__all__ = [
    "COMMANDS", "FLAGS", "LATE_KEY", "LEVELS", "OWN_MODEL", "PREFIX", "RESULTS", "VERSION", "Feature", "OwnModel",
    "Report", "Status", "encode", "open_report", "open_status", "pack_features", "plain", "ranges_of", "reread",
    "result_name", "seal_ack", "seal_command", "seal_one_ack",
]  # fmt: skip

PREFIX = "stonechat/1/fleet/"
LATE_KEY = 23  # of a report; appended last, by the device, as it sends


def open_report(device: str, keys: Signer, message: bytes) -> Report:
    """A report that verifies and fits the CDDL. Raises Rejected; where the device's key has signed what will never be
    taken, with the `identity` under which the device keeps it."""
    body = keys.open("report", message, MAX_VERIFIED_BYTES, device)
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
    except Exception:  # as in Fields
        return None
    if type(stream) is not bytes or len(stream) != limits.STREAM_BYTES:
        return None
    return (stream, sequence) if type(sequence) is int and 0 <= sequence <= COUNT_MAX else None


def _undated(body: bytes, late: int | bool) -> bytes:
    """The report as the device keeps it: without the age, its last pair."""
    pair = bytes((LATE_KEY,)) + encode(late)
    if body.endswith(pair) and 0xA1 < body[0] <= 0xB7:
        return bytes((body[0] - 1,)) + body[1 : -len(pair)]
    return body


def _usual(device: str, body: bytes, fields: dict[Any, Any]) -> Report | None:
    """As _report(), for what most reports are: one window, dated, on time. None for anything else."""
    if len(fields) != 9 + (6 in fields) + (10 in fields):  # besides those below there are others, or one is missing
        return None
    get = fields.get
    sequence, boot, time_s, level, flags = get(1), get(2), get(3), get(5), get(6, 0)
    score, surprise, evidence, packed, stream = get(7), get(8), get(9), get(10, b""), get(16)
    if not (
        type(sequence) is type(boot) is type(time_s) is type(level) is int
        and type(score) is type(surprise) is type(evidence) is type(flags) is int
        and type(stream) is type(packed) is bytes
        and 0 <= sequence <= COUNT_MAX
        and 0 <= boot <= COUNT_MAX
        and 0 <= time_s <= COUNT_MAX
        and 0 <= score <= COUNT_MAX
        and 0 <= surprise <= COUNT_MAX
        and 0 <= evidence <= COUNT_MAX
        and 0 <= level <= 2
        and 0 <= flags <= 0xFF
        and len(stream) == limits.STREAM_BYTES
        and len(packed) <= limits.FEATURES_BYTES
        and not len(packed) % 3
    ):
        return None
    return Report(
        device, sequence, boot, time_s, None, stream, level, flags, 1, score, score, score, surprise, evidence, packed,
        None, 0, 0, None, None, None, body,
    )  # fmt: skip


def _report(device: str, body: bytes) -> Report:
    fields = Fields(body)
    return _usual(device, body, fields.all) or _any_report(device, body, fields)


def _any_report(device: str, body: bytes, fields: Fields) -> Report:
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
    if 18 in fields:
        report.decision = decision(fields.raw(18))
        report.windows = 0
        if 9 in fields:
            report.level = fields.count(5, 2)
            report.evidence_q8 = fields.count(9)
            report.packed = fields.features()
        return report
    report.level = fields.count(5, 2)
    report.evidence_q8 = fields.count(9)
    if 12 in fields:
        report.windows = fields.count(11)
        report.score_min_q8, report.score_q8, report.score_max_q8 = fields.counts(12, 3)
        return report
    report.score_q8 = report.score_min_q8 = report.score_max_q8 = fields.count(7)
    report.surprise_q8 = fields.count(8)
    report.packed = fields.features()
    return report


def reread(device: str, body: bytes) -> Report:
    """A report out of the database: its body, as open_report() gave it, decoded once more."""
    return _report(device, body)


def open_status(device: str, keys: DeviceKeys, message: bytes) -> Status:
    """A status that verifies and fits the CDDL. Raises Rejected."""
    fields = Fields(keys.status.open(message, limits.STATUS_BYTES))
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
        response=response_state(fields.raw(22)),
        off_for_s=fields.maybe(23),
    )


def seal_ack(
    keys: Signer,
    stream: bytes,
    ranges: Sequence[tuple[int, int]],
    refused: Sequence[tuple[int, int]] = (),
    time_s: int | None = None,
    device: str = "",
) -> bytes:
    """ranges: (first, last) of the stream's sequence numbers that are committed; refused: of those that will never be
    taken -> the acknowledgement. device: needed with HotKeys."""
    dated = _dated(int(time.time()) if time_s is None else time_s)
    head = b"\xa5\x00\x01\x01" if refused else b"\xa4\x00\x01\x01"
    tail = b"\x04" + _ranges(refused) if refused else b""
    return keys.seal("ack", head + _ranges(ranges) + dated + stream + tail, device)


def seal_one_ack(device: str, keys: Signer, stream: bytes, number: int, time_s: int) -> bytes:
    """As seal_ack(), of one report."""
    shown = _uint(number)
    return keys.seal("ack", b"\xa4\x00\x01\x01\x82" + shown + shown + _dated(time_s) + stream, device)


@lru_cache(4)
def _dated(time_s: int) -> bytes:
    return b"\x02" + _uint(time_s) + b"\x03\x44"


def _uint(value: int) -> bytes:
    if value < 24:
        return bytes((value,))
    if value < 0x100:
        return bytes((0x18, value))
    if value < 0x10000:
        return b"\x19" + value.to_bytes(2)
    return b"\x1a" + value.to_bytes(4) if value <= COUNT_MAX else b"\x1b" + value.to_bytes(8)


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
