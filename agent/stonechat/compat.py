"""The runtime seam: one name, two bodies. Nothing else in the package asks which runtime this is. CPython's bodies are
in compat_cpython.py, which no board gets; MicroPython's are here.

Clocks: `ticks_ms()` counts milliseconds and keeps counting through suspend where the system can (CLOCK_BOOTTIME on
Linux); on boards it wraps at 2^30, so subtract only with `ticks_diff(new, old)`, which is right for spans of up to
2^29 ms (six days). `epoch_s()` is the wall clock in Unix seconds, 0 while it is unset.
"""

try:
    from .compat_cpython import *  # noqa: F403
except ImportError:
    import time
    from gc import collect as tidy  # so that a small heap has space for something large in one piece  # noqa: F401
    from gc import mem_alloc, mem_free  # noqa: F401
    from hashlib import sha256  # noqa: F401
    from os import rename as replace
    from time import sleep_ms, ticks_add, ticks_diff, ticks_ms, ticks_us  # noqa: F401

    from micropython import const  # noqa: F401

    try:
        from os import urandom  # noqa: F401
    except ImportError:  # a port without a random source: whatever differs from one start to the next

        def urandom(n):
            """n bytes, at most 32, that another start will hardly draw again. No secret."""
            return sha256(repr((id([]), mem_free(), time.time(), ticks_us())).encode()).digest()[:n]

    _OFFSET_S = 946_684_800 if time.gmtime(0)[0] == 2000 else 0

    def epoch_s():
        """Wall clock in Unix seconds, or 0 while the clock has not been set."""
        now_s = int(time.time()) + _OFFSET_S
        return now_s if now_s >= 1_700_000_000 else 0  # before November 2023: it has not been set

    def sync_file(file):
        """Push what was written to `file` down to the medium (littlefs does so at flush)."""
        file.flush()

    def write_atomic(path, parts):
        """Replace the file at `path` by `parts`, bytes one after the other: after a power cut it holds the old bytes or
        the new, no mixture."""
        with open(path + ".tmp", "wb") as file:
            for part in parts:
                file.write(part)
        replace(path + ".tmp", path)
