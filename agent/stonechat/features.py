"""The integer arithmetic from a window's deltas to the model's int8 input.

    RATE   a count in the window:    f_q8 = log2_q8(1 + delta) - log2_q8(elapsed / window)
    LEVEL  a reading:                f_q8 = log2_q8(1 + value)
    SHARE  a reading in percent:     f_q8 = value, already percent in Q8 (0..25600)

    x = ((f_q8 - centre_q8) * inv + half) >> shift, clipped to -128..127

One step of x is 1/16 of a benign standard deviation, zero point 0, by specification: the input tensor of every
stonechat model has scale 1/16. Clipping hides how far a counter went, so the excess over each feature's benign limit is
kept separately and added to the residual (detection.py). (inv, shift) is the reciprocal of the deviation with inv below
2^14, so that no product exceeds 2^30 and a 32-bit board uses small ints only.
"""

from struct import unpack_from

from .compat import const
from .errors import ModelError

RATE = "rate"
LEVEL = "level"
SHARE = "share"
_SHARE_MAX = const(25600)
_BEYOND_MAX = const(1792)

# round(256 * log2(1 + i / 64)) for i = 0..63; the next one would be 256
_LOG2_Q8 = (
    b"\x00\x06\x0b\x11\x16\x1c\x21\x26\x2c\x31\x36\x3b\x3f\x44\x49\x4e"
    b"\x52\x57\x5c\x60\x64\x69\x6d\x71\x76\x7a\x7e\x82\x86\x8a\x8e\x92"
    b"\x96\x9a\x9d\xa1\xa5\xa9\xac\xb0\xb3\xb7\xba\xbe\xc1\xc5\xc8\xcb"
    b"\xcf\xd2\xd5\xd8\xdc\xdf\xe2\xe5\xe8\xeb\xee\xf1\xf4\xf7\xfa\xfd"
)


def log2_q8(v: int) -> int:
    """v: an int -> 256 * log2(v), linear between 64 steps an octave (error below 1); 0 for all below 1."""
    if v < 1:
        return 0
    octave = 14
    while v >= 0x8000:
        v >>= 1
        octave += 1
    while v < 0x4000:
        v <<= 1
        octave -= 1
    step = (v >> 8) & 63
    low = _LOG2_Q8[step]
    high = _LOG2_Q8[step + 1] if step < 63 else 256
    return (octave << 8) + low + (((high - low) * (v & 255) + 128) >> 8)


class Normalization:
    """The centre and reciprocal deviation of each feature, as the model's metadata carries them.

    schema: anything with `kinds` and a length; packed: bytes, struct '<hHB' a feature (centre_q8, inv, shift + 32 *
    limit code): five bytes each. A limit is 8 deviations << (code - 1); code 0 means no limit. `offset_q8` is what the
    device itself has learned on top of the model's centres (adaptation.py owns it); `excess`: the steps past the limit
    of the last window filled. Raises ModelError for a reciprocal beyond 32-bit arithmetic."""

    def __init__(self, schema, packed: bytes) -> None:
        n = len(schema)
        self.kinds = schema.kinds
        self.centre_q8 = [0] * n
        self.inv = [0] * n
        self.shift = bytearray(n)
        self.offset_q8 = [0] * n
        self.limit = [0] * n
        self.excess = [0] * n
        for i in range(n):
            self.centre_q8[i], self.inv[i], shift = unpack_from("<hHB", packed, 5 * i)
            self.shift[i] = shift & 31
            self.limit[i] = 64 << (shift >> 5 or 20)
            if not 0 < self.inv[i] < 0x4000 or self.shift[i] > 29:
                raise ModelError("feature %d" % i)

    def fill_q8(self, deltas: list[int], elapsed_ms: int, window_ms: int, out: list[int]) -> None:
        """deltas: n counts or readings of one window -> out: n ints f_q8, before any normalization."""
        stretch_q8 = log2_q8(elapsed_ms) - log2_q8(window_ms)
        kinds = self.kinds
        for i in range(len(out)):  # enumerate() would allocate
            value = deltas[i]
            if kinds[i] == SHARE:
                value = min(value, _SHARE_MAX)
            elif value > 0:
                value = log2_q8(1 + value)
                if kinds[i] == RATE:
                    value -= stretch_q8
            out[i] = value if value > 0 else 0

    def fill(self, f_q8: list[int], x: bytearray) -> None:
        """f_q8: n ints -> x: bytearray(n), int8 as two's complement, 16 steps a deviation, clipped at 8 of them; and
        `excess`, up to 1792 steps, so that the squares of detection.py stay small ints."""
        centre_q8 = self.centre_q8  # a local variable is found faster than an attribute
        offset_q8 = self.offset_q8
        inv = self.inv
        shifts = self.shift
        for i in range(len(x)):
            shift = shifts[i]
            step = (f_q8[i] - centre_q8[i] - offset_q8[i]) * inv[i] + ((1 << shift) >> 1) >> shift
            over = 0
            if step > 127 or step < -128:  # a limit is at least 128
                limit = self.limit[i]
                over = step - limit if step > limit else step + limit if step < -limit else 0
                over = min(max(over, -_BEYOND_MAX), _BEYOND_MAX)
                step = 127 if step > 0 else -128
            x[i] = step & 0xFF
            self.excess[i] = over
