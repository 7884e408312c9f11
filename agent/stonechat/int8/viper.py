"""The dense kernel as machine code, by MicroPython's viper emitter. int8/network.py imports it where that exists.

Nothing here is checked: network.py has checked every length and place at load, and interpreter.py proved the bounds.
Integers are 32 bits wide (64 on x86_64) and wrap silently; the table (network.py) says how many bits of the multiplier
can be taken at a time without that. ptr32 does not extend the sign on 64 bits, hence `sign`. The emitter keeps the
first three variables in registers, arguments first: they are what the innermost loop uses.
"""

# place(data) is the address of data. ptr8 and ptr32 are types that only the emitter knows, and its decorator has none.
# ruff: noqa: F821
# mypy: ignore-errors
# pyright: reportUndefinedVariable=false, reportAttributeAccessIssue=false

import micropython
from uctypes import addressof as place  # noqa: F401


@micropython.viper
def layers(p: int, k: int, acc: int, program: ptr32, dense):
    """Runs the layers from number p to before k, the same bytes as plain.layers, for tables whose digit is not 0.
    program: for each layer ten words: the addresses of x, weights, out and table, two words each, the first row and the
    row after the last. acc: anything; dense: what the addresses point to must live."""
    count = k - p
    program = ptr32(int(program) + p * 40)
    while count > 0:
        x_at = int(program[0]) | int(program[1]) << 16 << 16
        k = int(program[2]) | int(program[3]) << 16 << 16
        out = ptr8(int(program[4]) | int(program[5]) << 16 << 16)
        table = ptr32(int(program[6]) | int(program[7]) << 16 << 16)
        first = int(program[8])
        last = int(program[9])
        program = ptr32(int(program) + 40)
        count -= 1
        x_end = x_at + int(table[0])  # int8/network.py's _INPUTS and so on: viper takes no constant of another module
        x_end8 = x_end - 7
        zero = int(table[2])
        low = int(table[3])
        high = int(table[4])
        step = int(table[5]) << 2
        digit = int(table[6])
        sign = 1
        sign = sign << 31
        acc = 0
        p = x_at
        while p < x_end:
            acc += int(ptr8(p)[0])
            p += 1
        correction = acc << 7  # the weights are w + 128, which adds 128 * sum(x)
        bias = int(table) + ((7 + first) << 2)
        q = int(table) + ((7 + int(table[1])) << 2) + first * step
        while first < last:
            acc = ((int(ptr32(bias)[0]) ^ sign) - sign) - correction
            p = x_at
            while p < x_end8:
                acc += (
                    int(ptr8(p)[0]) * int(ptr8(k)[0])
                    + int(ptr8(p)[1]) * int(ptr8(k)[1])
                    + int(ptr8(p)[2]) * int(ptr8(k)[2])
                    + int(ptr8(p)[3]) * int(ptr8(k)[3])
                    + int(ptr8(p)[4]) * int(ptr8(k)[4])
                    + int(ptr8(p)[5]) * int(ptr8(k)[5])
                    + int(ptr8(p)[6]) * int(ptr8(k)[6])
                    + int(ptr8(p)[7]) * int(ptr8(k)[7])
                )
                p += 8
                k += 8
            while p < x_end:
                acc += int(ptr8(p)[0]) * int(ptr8(k)[0])
                p += 1
                k += 1
            m = int(ptr32(q)[0])
            p = int(ptr32(q)[1]) - 32
            if p > 0:
                acc = acc << p
            h = 0
            if digit == 8:
                h = (acc * (m & 255)) >> 8
                h = (h + acc * ((m >> 8) & 255)) >> 8
                h = (h + acc * ((m >> 16) & 255)) >> 8
                h = (h + acc * (m >> 24) + 64) >> 7
            else:
                bit = 0
                while bit < 28:
                    h = (h + acc * ((m >> bit) & 15)) >> 4
                    bit += 4
                h = (h + acc * (m >> 28) + 4) >> 3
            if p < 0:
                p = -1 - p
                acc = 1 << p
                h += acc
                if h < acc:
                    h -= 1
                h = h >> (p + 1)
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
def flip(source: ptr8, target: ptr8, count: int, at: int):
    """plain.flip: int8 from place `at` of source to value + 128, and back."""
    source = ptr8(int(source) + at)
    while count > 0:
        count -= 1
        target[count] = int(source[count]) ^ 128
