"""The way back from CBOR (cbor.py), strictly: definite lengths, shortest form, sorted keys without duplicates, nothing
left over. What the collector sends to a device, and what the tools read."""

from .compat import const
from .errors import WireError

MAX_DEPTH = const(8)


def loads(data):
    """data: bytes or memoryview -> the value; byte strings come as bytes. Raises WireError, saying where, on anything
    else than one deterministic item that fills `data`."""
    reader = _Reader(data)
    value = reader.item(0)
    if reader.at != len(data):
        reader.refuse()
    return value


class _Reader:
    def __init__(self, data):
        self.data = data
        self.at = 0

    def refuse(self):
        raise WireError("cbor: malformed at byte %d" % self.at)

    def _take(self, n):
        start = self.at
        if n > len(self.data) - start:
            self.refuse()
        self.at = start + n
        return bytes(self.data[start : start + n])

    def item(self, depth):
        first = self._take(1)[0]
        if 0xF4 <= first <= 0xF6:
            return (False, True, None)[first - 0xF4]
        major = first >> 5
        n = first & 31
        if n > 23:
            size = 1 << n - 24
            n = 0
            for byte in self._take(size if size < 16 else 0):
                n = n << 8 | byte
            if n < (24 if size == 1 else 1 << 4 * size):  # not its shortest form, or a form that is not ours
                self.refuse()
        if major < 2:
            return ~n if major else n
        if major < 4:
            text = self._take(n)
            try:
                return text.decode() if major == 3 else text
            except ValueError:  # UnicodeError is one
                self.refuse()
        # Every item takes a byte: no length is believed beyond that.
        if major > 5 or n > len(self.data) - self.at or depth >= MAX_DEPTH:
            self.refuse()
        if major == 4:
            return [self.item(depth + 1) for _ in range(n)]
        out = {}
        last = b""
        for _ in range(n):
            start = self.at
            key = self.item(depth + 1)
            encoded = bytes(self.data[start : self.at])
            if not isinstance(key, (int, str)) or encoded <= last:  # out of order, or twice
                self.refuse()
            last = encoded
            out[key] = self.item(depth + 1)
        return out
