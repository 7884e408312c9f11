"""The runtime seam: one name, two bodies. Nothing else in the package asks which runtime this is.

Clocks: `ticks_ms()` counts milliseconds and keeps counting through suspend where the system can (CLOCK_BOOTTIME on
Linux); on boards it wraps at 2^30, so subtract only with `ticks_diff(new, old)`, which is right for spans of up to
2^29 ms (six days). `epoch_s()` is the wall clock in Unix seconds, 0 while it is unset.
"""

import os
import time

try:
    from micropython import const
except ImportError:

    def const(value):
        return value


try:
    from time import ticks_add, ticks_diff, ticks_ms, ticks_us

    _EPOCH_OFFSET_S = 946_684_800 if time.gmtime(0)[0] == 2000 else 0
except ImportError:
    _EPOCH_OFFSET_S = 0

    def ticks_ms():
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000

    def ticks_us():
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000

    def ticks_diff(new, old):
        return new - old

    def ticks_add(ticks, delta):
        return ticks + delta


try:
    from time import sleep_ms
except ImportError:

    def sleep_ms(ms):
        time.sleep(ms / 1000)


# SHA-256: CPython's own C module where it is to be had, because hashlib loads all of OpenSSL (3.7 MB).
try:
    from _sha2 import sha256  # CPython 3.12 and later
except ImportError:
    try:
        from _sha256 import sha256  # CPython 3.11
    except ImportError:
        from hashlib import sha256  # noqa: F401

try:
    from os import fsync as _fsync
except ImportError:
    _fsync = None

try:
    from os import replace
except ImportError:
    from os import rename as replace

_EARLIEST_EPOCH_S = const(1_700_000_000)  # a wall clock before November 2023 has not been set


def epoch_s():
    """Wall clock in Unix seconds, or 0 while the clock has not been set."""
    now_s = int(time.time()) + _EPOCH_OFFSET_S
    return now_s if now_s >= _EARLIEST_EPOCH_S else 0


def sync_file(file):
    """Push what was written to `file` down to the medium (littlefs does so at flush)."""
    file.flush()
    if _fsync is not None:
        _fsync(file.fileno())


def write_atomic(path, data):
    """Replace the file at `path` by `data`: after a power cut it holds the old bytes or the new, never a mixture."""
    temporary = path + ".tmp"
    with open(temporary, "wb") as file:
        file.write(data)
        sync_file(file)
    replace(temporary, path)
    if _fsync is not None:  # POSIX: the rename is durable only once its folder is
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        try:
            _fsync(folder)
        finally:
            os.close(folder)


try:
    from gc import collect as tidy
    from gc import mem_free  # only where the heap is small  # noqa: F401
except ImportError:

    def tidy():
        """Collect garbage before something large is made, so that a small heap has room for it in one piece."""


try:
    from _operator import mul as _mul  # CPython's own; MicroPython has none
    from array import array as _array

    _FLIP = bytes(i ^ 128 for i in range(256))

    def int8_array(data):
        """The bytes as dot() and row_sums() want them, and the kernels too: a copy here, the very bytes on a board."""
        return _array("b", bytes(data))

    def dot(weights, at, count, x):
        """Sum of the int8 weights[at : at + count] times the unsigned bytes of x."""
        return sum(map(_mul, weights[at : at + count], x))

    def row_sums(weights, at, count):
        """The int8 weights[at : at + count]: (their sum, the sum of their absolute values)."""
        row = weights[at : at + count]
        return sum(row), sum(map(abs, row))

    def flip(source, target, count):
        """target[:count] = source[:count] with the top bit of each byte turned: int8 to value + 128, and back."""
        target[:count] = bytes(source).translate(_FLIP)

except ImportError:

    def int8_array(data):
        return data

    def dot(weights, at, count, x):
        total = 0
        for i in range(count):
            total += ((weights[at + i] ^ 128) - 128) * x[i]
        return total

    def row_sums(weights, at, count):
        total = size = 0
        for i in range(at, at + count):
            weight = (weights[i] ^ 128) - 128
            total += weight
            size += weight if weight > 0 else -weight
        return total, size

    def flip(source, target, count):
        for i in range(count):
            target[i] = source[i] ^ 128
