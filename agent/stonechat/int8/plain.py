"""The dense kernel in plain Python: on CPython, on boards without machine code, and for the rows that need 64 bits.

interpreter.py describes the arithmetic, network.py the table. A board's core profile leaves this module out: the .mpy
files are made for its processor, and rows of 64 bits are refused there.
"""

from struct import unpack_from

from ..compat import const

try:
    from ..compat_cpython import dot as dot
    from ..compat_cpython import flip as flip  # the same, in C
except ImportError:

    def dot(weights, at, count, x):
        """Sum of weights[at : at + count] times x, all of them unsigned bytes."""
        total = 0
        for i in range(count):
            total += weights[at + i] * x[i]
        return total

    def flip(source, target, count, at):
        """target[:count] = source[at : at + count] with the top bit of each byte turned: int8 to value + 128, and
        back."""
        for i in range(count):
            target[i] = source[at + i] ^ 128


_INPUTS = const(0)
_ROWS = const(1)
_ZERO = const(2)
_LOW = const(3)
_HIGH = const(4)
_STEP = const(5)
_HEADER = const(7)
_ENTRY_BYTES = const(40)  # of `program`: see network.py
_ROWS_AT = const(32)


def requantize(acc, m, shift):
    """MultiplyByQuantizedMultiplier: acc * m * 2^(shift - 31), rounded twice as gemmlowp rounds (see
    interpreter.py)."""
    if shift > 0:
        acc <<= shift
    h = (acc * m + 0x40000000) >> 31
    if shift < 0:
        h = (h + (1 << -shift - 1) - (h < 0)) >> -shift
    return h


def place(data):
    """Where data lies: viper's layers() has to know it."""
    return 0


def layers(number, end, _, program, dense):
    """Runs the layers from `number` to before `end` of dense, a list of network.Layer, each as far as `program` says.
    (The third argument is a register of viper's.)"""
    while number < end:
        layer = dense[number]
        first, last = unpack_from("<II", program, _ENTRY_BYTES * number + _ROWS_AT)
        fully_connected(layer.x, layer.weights, layer.out, layer.table, first, last)
        number += 1


def fully_connected(x, weights, out, table, first, last):
    """Rows first .. last - 1 of a dense layer, `weights` starting at row `first`; x, weights, out: value + 128."""
    inputs, zero, low, high, step = table[_INPUTS], table[_ZERO], table[_LOW], table[_HIGH], table[_STEP]
    correction = sum(x) << 7  # w + 128 in place of w adds 128 * sum(x)
    at = 0
    q = _HEADER + table[_ROWS] + first * step
    for row in range(first, last):
        acc = table[_HEADER + row] + dot(weights, at, inputs, x) - correction
        y = requantize(acc, table[q], table[q + 1] - 32) + zero
        out[row] = low if y < low else high if y > high else y
        at += inputs
        q += step
