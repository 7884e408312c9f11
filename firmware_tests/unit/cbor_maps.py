"""Deterministic CBOR of anything that a message or a model file holds: what the collector and the tools send.

None, bool, int (-2^64..2^64-1), bytes, str, list, tuple and dict with int or str keys, sorted by their encoding. For
tests on every runtime; on CPython it is checked against cbor2."""

from stonechat import cbor
from stonechat.errors import WireError


def dumps(value) -> bytes:
    """value -> bytes. Raises WireError for a type that the module's docstring does not name."""
    out = bytearray()
    _encode(value, out)
    return bytes(out)


def _encode(value, out):
    if value is None:
        out.append(0xF6)
    elif isinstance(value, (bool, bytes, bytearray, memoryview, str)):
        cbor.encode(value, out)
    elif isinstance(value, int):
        if value >> 64 not in (0, -1):
            raise WireError("cbor: %d does not fit" % value)
        if value < 0:
            cbor.head(out, 1, ~value)
        else:
            cbor.encode(value, out)
    elif isinstance(value, (list, tuple)):
        cbor.head(out, 4, len(value))
        for item in value:
            _encode(item, out)
    elif isinstance(value, dict):
        cbor.head(out, 5, len(value))
        for key, item in sorted([(dumps(key), value[key]) for key in value], key=_first):
            out.extend(key)
            _encode(item, out)
    else:
        raise WireError("cbor: can't encode %s" % type(value).__name__)


def _first(pair):
    return pair[0]
