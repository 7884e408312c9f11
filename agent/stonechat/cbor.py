"""Deterministic CBOR (RFC 8949 section 4.2.1), as much of it as reports, commands and metadata need.

Encodes None, bool, int (-2^64..2^64-1), bytes, str, list, tuple and dict with int or str keys; keys are sorted by
their encoding. Decodes the same, definite lengths only, strictly: shortest form, sorted keys, no
duplicates, nothing left over. Floats and tags are refused: nothing that stonechat sends holds one.
"""

from struct import pack

from .compat import const
from .errors import WireError

MAX_DEPTH = const(8)
_SIMPLE = {0xF4: False, 0xF5: True, 0xF6: None}


def head(out: bytearray, major: int, n: int) -> None:
    """Append the first bytes of an item: its major type and its value or length."""
    major <<= 5
    if n < 24:
        out.append(major | n)
        return
    form = 0 if n < 0x100 else 1 if n < 0x10000 else 2 if n < 0x100000000 else 3
    if n >= 1 << 64:
        raise WireError("cbor: %d does not fit" % n)
    out.append(major | 24 + form)
    if form > 1:
        out.extend(pack(">I" if form == 2 else ">Q", n))
        return
    if form:
        out.append(n >> 8)
    out.append(n & 255)


def dumps(value) -> bytes:
    """value -> bytes. Raises WireError for a type that the module's docstring does not name."""
    out = bytearray()
    encode(value, out)
    return bytes(out)


def dumps_fields(fields: list) -> bytearray:
    """fields: at most 24 values, the index is the key, None is absent -> the map, without a dict or a sort."""
    out = bytearray(1)
    n = 0
    for key in range(len(fields)):  # enumerate() would allocate a tuple for each
        if fields[key] is not None:
            n += 1
            out.append(key)
            encode(fields[key], out)
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
        head(out, value < 0, value if value >= 0 else -1 - value)
    elif isinstance(value, (bytes, bytearray, memoryview)):
        head(out, 2, len(value))
        out.extend(value)
    elif isinstance(value, str):
        text = value.encode()
        head(out, 3, len(text))
        out.extend(text)
    elif isinstance(value, (list, tuple)):
        head(out, 4, len(value))
        for item in value:
            encode(item, out, depth + 1)
    elif isinstance(value, dict):
        head(out, 5, len(value))
        for key, item in sorted([(dumps(key), value[key]) for key in value], key=_first):
            out.extend(key)
            encode(item, out, depth + 1)
    else:
        raise WireError("cbor: can't encode %s" % type(value).__name__)


def _first(pair):
    return pair[0]


def loads(data):
    """data: bytes or memoryview -> the value; byte strings come as bytes. Raises WireError, saying where, on anything
    else than one deterministic item that fills `data`."""
    reader = _Reader(data)
    value = reader.item(0)
    if reader.at != len(data):
        reader.refuse()
    return value


class _Reader:
    def __init__(self, data) -> None:
        self.data = data
        self.at = 0

    def refuse(self) -> None:
        raise WireError("cbor: malformed at byte %d" % self.at)

    def _take(self, n: int) -> bytes:
        start = self.at
        if n > len(self.data) - start:
            self.refuse()
        self.at = start + n
        return bytes(self.data[start : start + n])

    def _argument(self, low: int) -> int:
        if low < 24:
            return low
        size = 1 << (low - 24)
        n = 0
        for byte in self._take(size if size < 16 else 0):
            n = n << 8 | byte
        if n < (24 if size == 1 else 1 << (4 * size)):  # not its shortest form, or a form that is not ours
            self.refuse()
        return n

    def item(self, depth: int):
        first = self._take(1)[0]
        if depth > MAX_DEPTH:
            self.refuse()
        if first in _SIMPLE:
            return _SIMPLE[first]
        major = first >> 5
        n = self._argument(first & 31)
        if major < 2:
            return -1 - n if major else n
        if major == 2:
            return self._take(n)
        if major == 3:
            try:
                return self._take(n).decode()
            except (UnicodeError, ValueError):
                self.refuse()
        if major > 5 or n > len(self.data) - self.at:  # every item takes a byte: no length is believed beyond that
            self.refuse()
        return self._map(n, depth + 1) if major == 5 else [self.item(depth + 1) for _ in range(n)]

    def _map(self, n: int, depth: int) -> dict:
        out = {}
        last = b""
        for _ in range(n):
            start = self.at
            key = self.item(depth)
            encoded = bytes(self.data[start : self.at])
            if not isinstance(key, (int, str)) or encoded <= last:  # out of order, or twice
                self.refuse()
            last = encoded
            out[key] = self.item(depth)
        return out
