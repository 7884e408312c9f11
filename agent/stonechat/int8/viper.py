"""The dense kernel as machine code, by MicroPython's viper emitter. int8/network.py imports it where that exists.

Nothing here is checked: network.py has checked every length and place at load, and interpreter.py proved the bounds.
Integers are 32 bits wide (64 on x86_64) and wrap silently; the table (network.py) says how many bits of the multiplier
can be taken at a time without that. ptr32 does not extend the sign on 64 bits, hence `sign`.
"""

# ptr8 and ptr32 are types that only the emitter knows, and its decorator has none.
# ruff: noqa: F821
# mypy: ignore-errors
# pyright: reportUndefinedVariable=false, reportAttributeAccessIssue=false

import micropython


@micropython.viper
def fully_connected(x: ptr8, weights: ptr8, out: ptr8, table: ptr32, first: int, last: int):
    """plain.fully_connected, the same bytes; for tables whose digit is not 0."""
    inputs = int(table[0])  # int8/network.py's _INPUTS and so on: viper takes no constant from another module
    zero = int(table[2])
    low = int(table[3])
    high = int(table[4])
    step = int(table[5]) << 2
    digit = int(table[6])
    mask = (1 << digit) - 1
    top = 24 if digit == 8 else 28
    down = 31 - top
    half = 1 << (down - 1)
    sign = 1
    sign = sign << 31
    x_at = int(x)
    x_end = x_at + inputs
    x_end4 = x_end - 3
    correction = 0
    p = x_at
    while p < x_end:
        correction += int(ptr8(p)[0])
        p += 1
    correction = correction << 7  # the weights are read as w + 128, which adds 128 * sum(x)
    k = int(weights)
    bias = int(table) + ((7 + first) << 2)
    q = int(table) + ((7 + int(table[1])) << 2) + first * step
    while first < last:
        acc = ((int(ptr32(bias)[0]) ^ sign) - sign) - correction
        p = x_at
        while p < x_end4:
            acc += (
                int(ptr8(p)[0]) * (int(ptr8(k)[0]) ^ 128)
                + int(ptr8(p)[1]) * (int(ptr8(k)[1]) ^ 128)
                + int(ptr8(p)[2]) * (int(ptr8(k)[2]) ^ 128)
                + int(ptr8(p)[3]) * (int(ptr8(k)[3]) ^ 128)
            )
            p += 4
            k += 4
        while p < x_end:
            acc += int(ptr8(p)[0]) * (int(ptr8(k)[0]) ^ 128)
            p += 1
            k += 1
        m = int(ptr32(q)[0])
        shift = int(ptr32(q)[1]) - 32
        if shift > 0:
            acc = acc << shift
        bit = 0
        h = 0
        while bit < top:
            h = (h + acc * ((m >> bit) & mask)) >> digit
            bit += digit
        h = (h + acc * (m >> top) + half) >> down
        if shift < 0:
            shift = -1 - shift
            h += 1 << shift
            if h < (1 << shift):
                h -= 1
            h = h >> (shift + 1)
        h += zero
        if h < low:
            h = low
        if h > high:
            h = high
        out[first] = h
        first += 1
        bias += 4
        q += step


@micropython.viper
def flip(source: ptr8, target: ptr8, count: int):
    """plain.flip: int8 to value + 128, and back."""
    i = 0
    while i < count:
        target[i] = int(source[i]) ^ 128
        i += 1
