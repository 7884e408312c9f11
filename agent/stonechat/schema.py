"""Schemas: made on Linux and by the tools. A board needs only `kinds`, `id` and the length of a schema, and has those
of its own ready (board/hooks.py)."""

from . import cbor
from .compat import sha256


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
