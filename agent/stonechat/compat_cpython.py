"""CPython's bodies of the names in compat.py. MicroPython has none of these modules, and no board gets this file."""

import os
import stat
import time
from _operator import mul as _mul  # operator is Python, and larger
from os import replace, urandom
from time import clock_gettime_ns as _now_ns

try:
    from time import CLOCK_BOOTTIME as _CLOCK
except ImportError:  # the tools on macOS
    from time import CLOCK_MONOTONIC as _CLOCK

# SHA-256: CPython's own C module where it is to be had, because hashlib loads all of OpenSSL (3.7 MB).
try:
    from _sha2 import sha256  # type: ignore[import-not-found]  # CPython 3.12 and later
except ImportError:
    try:
        from _sha256 import sha256  # type: ignore[import-not-found]  # CPython 3.11
    except ImportError:
        from hashlib import sha256  # noqa: F401

__all__ = (
    "const",
    "epoch_s",
    "mem_alloc",
    "mem_free",
    "replace",
    "sha256",
    "sleep_ms",
    "sync_file",
    "ticks_add",
    "ticks_diff",
    "ticks_ms",
    "ticks_us",
    "tidy",
    "urandom",
    "write_atomic",
)

_EARLIEST_EPOCH_S = 1_700_000_000  # a wall clock before November 2023 has not been set,
_LATEST_EPOCH_S = 4_000_000_000  # nor has one after 2096; messages hold 32 bits
_FLIP = bytes(i ^ 128 for i in range(256))


def const(value):
    return value


def ticks_ms():
    return _now_ns(_CLOCK) // 1_000_000


def ticks_us():
    return _now_ns(_CLOCK) // 1_000


def ticks_diff(new, old):
    return new - old


def ticks_add(ticks, delta):
    return ticks + delta


def sleep_ms(ms):
    time.sleep(ms / 1000)


def epoch_s():
    now_s = int(time.time())
    return now_s if _EARLIEST_EPOCH_S <= now_s < _LATEST_EPOCH_S else 0


def sync_file(file):
    file.flush()
    os.fsync(file.fileno())


def write_atomic(path, parts):
    temporary = path + ".tmp"
    try:
        if not stat.S_ISREG(os.lstat(temporary).st_mode):
            os.remove(temporary)  # a FIFO would block, a link would lead elsewhere
    except FileNotFoundError:
        pass
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    with open(os.open(temporary, flags, 0o600), "wb") as file:
        for part in parts:
            file.write(part)
        sync_file(file)
    replace(temporary, path)
    # POSIX: the rename is durable only once its folder is
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def tidy():
    """Nothing to do where the heap is large."""


def mem_alloc():
    """CPython has no such heap."""
    return 0


mem_free = mem_alloc


def dot(weights, at, count, x):  # int8/plain.py's, as is flip
    return sum(map(_mul, weights[at : at + count], x))


def flip(source, target, count, at):
    target[:count] = bytes(source[at : at + count]).translate(_FLIP)
