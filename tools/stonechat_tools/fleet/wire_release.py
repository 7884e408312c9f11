"""Messages about a release, on the host's side: release.cddl (in the agent package) is the text. The collector seals
offers, chunks, confirmations and withdrawals for a device's topic `model`, and opens what the device wants."""

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

import cbor2
from stonechat import limits, slots

from .keyring import DeviceKeys, Rejected

MODEL_TOPIC = "model"
WANT_TOPIC = "want"
CHUNK_BYTES = limits.CHUNK_BYTES
OFFER, CONFIRM, WITHDRAW = 0, 1, 2
MANIFEST, MODEL = 0, 1  # parts of a release
_VERSION = 1
_COUNT_MAX = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Want:
    """The chunk that a device misses: of which version and part, from which byte; stream: of the device's start."""

    version: int
    part: int
    offset: int
    stream: bytes


@dataclass(frozen=True, slots=True)
class UpdateState:
    """What a status reports about updates: the final version (0: the model that the device came with), its slot, the
    slot on trial (0 for none), the version of the last update that was begun, how that ended (an index of RESULTS), and
    releases and messages refused since this start."""

    version: int
    slot: int
    trial: int
    tried: int
    result: int
    refusals: int

    RESULTS: ClassVar[tuple[str, ...]] = (
        "none", "confirmed", "malformed", "signature", "class", "schema", "version", "floor", "expired", "early",
        "clock not set", "too large", "digest", "model", "unsuited", "unconfirmed", "restarts", "withdrawn", "storage",
        "nothing for this device",
    )  # fmt: skip

    @property
    def reason(self) -> str:
        return self.RESULTS[self.result] if self.result < len(self.RESULTS) else f"result {self.result}"

    @property
    def failed(self) -> bool:
        """Whether the last update ended otherwise than by a confirmation."""
        return self.result > slots.CONFIRMED

    def __str__(self) -> str:
        if self.trial:
            return f"version {self.version}, {self.tried} on trial"
        tried = f", {self.tried} ended: {self.reason}" if self.failed else ""
        return f"version {self.version}{tried}"


def update_state(value: object) -> UpdateState | None:
    """A status's key 24. Raises Rejected."""
    if value is None:
        return None
    if (
        not isinstance(value, (list, tuple))
        or len(value) != 6
        or any(type(item) is not int or not 0 <= item <= _COUNT_MAX for item in value)
        or value[1] > 2
        or value[2] > 2
    ):
        raise Rejected("malformed", "key 24")
    return UpdateState(*value)


def seal_offer(keys: DeviceKeys, version: int, manifest: bytes, stream: bytes, number: int) -> bytes:
    """manifest: the signed message, as in manifest.cbor; stream: of the device's start, from its last status; number:
    rising with each offer to the device."""
    fields = {1: version, 2: OFFER, 3: number, 5: hashlib.sha256(manifest).digest(), 6: len(manifest), 7: stream}
    return _seal(keys, fields)


def seal_chunk(keys: DeviceKeys, want: Want, content: bytes) -> bytes:
    """What the device wants of a part. content: the whole part. Raises ValueError behind its end."""
    version, part, offset = want.version, want.part, want.offset
    data = content[offset : offset + CHUNK_BYTES]
    if not data:
        raise ValueError(f"part {part} has {len(content)} bytes, none at {offset}")
    return _seal(keys, {1: version, 2: part, 3: offset, 4: data, 7: want.stream})


def seal_confirm(keys: DeviceKeys, version: int, stream: bytes) -> bytes:
    """stream: as for an offer."""
    return _seal(keys, {1: version, 2: CONFIRM, 7: stream})


def seal_withdraw(keys: DeviceKeys, version: int, stream: bytes) -> bytes:
    """As seal_confirm()."""
    return _seal(keys, {1: version, 2: WITHDRAW, 7: stream})


def _seal(keys: DeviceKeys, fields: dict[int, Any]) -> bytes:
    return keys.offer.seal(cbor2.dumps({0: _VERSION, **fields}, canonical=True))


def open_want(device: str, keys: DeviceKeys, message: bytes) -> Want:
    """What a device wants. Raises Rejected."""
    payload = keys.want.open(message)
    try:
        fields = cbor2.loads(payload)
    except Exception as error:  # whatever a decoder raises on nonsense that a device has signed
        raise Rejected("malformed", str(error)) from None
    if not isinstance(fields, dict):
        raise Rejected("malformed", "not a map")
    if fields.get(0) != _VERSION:
        raise Rejected("version", repr(fields.get(0))[:20])
    counts: list[int] = []
    for key, low, high in ((1, 1, _COUNT_MAX), (2, 0, 1), (3, 0, _COUNT_MAX)):
        value = fields.get(key)
        if type(value) is not int or not low <= value <= high:
            raise Rejected("malformed", f"key {key}")
        counts.append(value)
    stream = fields.get(7)
    if not isinstance(stream, bytes) or len(stream) != limits.STREAM_BYTES:
        raise Rejected("malformed", "key 7")
    version, part, offset = counts
    return Want(version, part, offset, stream)
