"""Schemas, and the packed normalization of a model: made on Linux and by the tools. A board needs only `kinds`, `id`
and the length of a schema, and has those of its own ready (board/hooks.py)."""

from struct import pack

from . import cbor
from .compat import const, sha256
from .errors import FeatureError

STEPS_PER_DEVIATION = const(16)  # see features.py


class Schema:
    """name; columns: ((name, unit, kind), ...) in their order; `kinds`: theirs. `id` is eight bytes: the start of
    SHA-256 over the deterministic CBOR of the columns, so that two devices agree on it without a registry."""

    def __init__(self, name: str, columns) -> None:
        self.name = name
        self.columns = tuple(columns)
        self.kinds = tuple([column[2] for column in self.columns])
        packed = bytearray()
        cbor.encode(self.columns, packed)
        self.id = sha256(packed).digest()[:8]

    def __len__(self) -> int:
        return len(self.columns)


def pack_normalization(centre_q8, deviation_q8) -> bytes:
    """centre_q8, deviation_q8: n numbers each (Q8) -> the packed bytes that Normalization reads.

    inv = 16 * 2^shift / deviation, with the greatest shift for which inv stays below 2^14."""
    out = bytearray()
    for centre, deviation in zip(centre_q8, deviation_q8):
        if deviation <= 0:
            raise FeatureError("deviation %r" % deviation)
        shift = 0
        while shift < 29 and (STEPS_PER_DEVIATION << (shift + 1)) / deviation < (1 << 14) - 1:
            shift += 1
        inv = min((1 << 14) - 1, int((STEPS_PER_DEVIATION << shift) / deviation + 0.5))
        out += pack("<hHB", int(centre), inv, shift)
    return bytes(out)
