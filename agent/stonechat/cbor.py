"""Deterministic CBOR (RFC 8949 section 4.2.1), as much of it as reports, commands and metadata need.

Encodes None, bool, int (-2^64..2^64-1), bytes, str, list, tuple and dict with int or str keys; keys are sorted by
their encoding. Decodes the same, definite lengths only, strictly: shortest form, sorted keys, no
duplicates, nothing left over. Floats and tags are refused: nothing that stonechat sends holds one.
"""

from .compat import const
from .errors import WireError

MAX_DEPTH = const(8)


def _head(out: bytearray, major: int, n: int) -> None:
    major <<= 5
    if n < 24:
        out.append(major | n)
        return
    size = 1 if n < 0x100 else 2 if n < 0x10000 else 4 if n < 0x100000000 else 8
    if n >= 1 << 64:
        raise WireError("cbor: %d does not fit" % n)
    out.append(major | (24 if size == 1 else 25 if size == 2 else 26 if size == 4 else 27))
    while size:
        size -= 1
        out.append(n >> (8 * size) & 255)


def dumps(value) -> bytes:
    """value -> bytes. Raises WireError for a type that the module's docstring does not name."""
    out = bytearray()
    encode(value, out)
    return bytes(out)


def dumps_fields(fields: list) -> bytearray:
    """fields: at most 24 values, the index is the key, None is absent -> the map, without a dict or a sort."""
    out = bytearray(1)
    n = 0
    for key, value in enumerate(fields):
        if value is not None:
            n += 1
            out.append(key)
            encode(value, out)
    out[0] = 0xA0 | n
    return out


def encode(value, out: bytearray, depth: int = 0) -> None:
    """Append `value` to `out`; dumps() says what it may be."""
    if depth > MAX_DEPTH:
        raise WireError("cbor: deeper than %d" % MAX_DEPTH)
    if value is None:
        out.append(0xF6)
    elif value is True or value is False:
        out.append(0xF5 if value else 0xF4)
    elif isinstance(value, int):
        if value >= 0:
            _head(out, 0, value)
        else:
            _head(out, 1, -1 - value)
    elif isinstance(value, (bytes, bytearray, memoryview)):
        _head(out, 2, len(value))
        out.extend(value)
    elif isinstance(value, str):
        text = value.encode()
        _head(out, 3, len(text))
        out.extend(text)
    elif isinstance(value, (list, tuple)):
        _head(out, 4, len(value))
        for item in value:
            encode(item, out, depth + 1)
    elif isinstance(value, dict):
        _head(out, 5, len(value))
        for key, item in sorted([(dumps(key), value[key]) for key in value], key=_first):
            out.extend(key)
            encode(item, out, depth + 1)
    else:
        raise WireError("cbor: can't encode %s" % type(value).__name__)


def _first(pair):
    return pair[0]


def loads(data):
    """data: bytes or memoryview -> the value; byte strings come as bytes. Raises WireError on anything else than one
    deterministic item that fills `data`."""
    reader = _Reader(data)
    value = reader.item(0)
    if reader.at != len(data):
        raise WireError("cbor: %d bytes left over" % (len(data) - reader.at))
    return value


class _Reader:
    def __init__(self, data) -> None:
        self.data = data
        self.at = 0

    def _take(self, n: int) -> bytes:
        start = self.at
        if n > len(self.data) - start:
            raise WireError("cbor: truncated at %d" % start)
        self.at = start + n
        return bytes(self.data[start : start + n])

    def _argument(self, low: int) -> int:
        if low < 24:
            return low
        if low > 27:
            raise WireError("cbor: length form %d" % low)
        size = 1 << (low - 24)
        n = 0
        for byte in self._take(size):
            n = n << 8 | byte
        if n < (24 if size == 1 else 1 << (4 * size)):
            raise WireError("cbor: %d is not in its shortest form" % n)
        return n

    def item(self, depth: int):
        if depth > MAX_DEPTH:
            raise WireError("cbor: deeper than %d" % MAX_DEPTH)
        first = self._take(1)[0]
        major = first >> 5
        if major == 7:
            if first == 0xF6:
                return None
            if first in (0xF4, 0xF5):
                return first == 0xF5
            raise WireError("cbor: item 0x%02x" % first)
        n = self._argument(first & 31)
        if major == 0:
            return n
        if major == 1:
            return -1 - n
        if major == 2:
            return self._take(n)
        if major == 3:
            try:
                return self._take(n).decode()
            except (UnicodeError, ValueError):
                raise WireError("cbor: text is not UTF-8")
        if n > len(self.data) - self.at:  # every item takes a byte: an impossible length is refused before it is used
            raise WireError("cbor: truncated at %d" % self.at)
        if major == 4:
            return [self.item(depth + 1) for _ in range(n)]
        if major == 5:
            return self._map(n, depth)
        raise WireError("cbor: tag %d" % n)

    def _map(self, n: int, depth: int) -> dict:
        out = {}
        last = b""
        for _ in range(n):
            start = self.at
            key = self.item(depth + 1)
            encoded = bytes(self.data[start : self.at])
            if not isinstance(key, (int, str)) or encoded <= last:
                raise WireError("cbor: map keys must be sorted ints or texts")
            last = encoded
            out[key] = self.item(depth + 1)
        return out
