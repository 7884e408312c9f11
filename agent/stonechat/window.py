"""Cumulative counters in, the differences of one window out.

A collector fills a list of integers, one per column of its schema. Columns of kind RATE are cumulative counters, of
which the window takes the difference; LEVEL and SHARE columns are readings and pass through. Nothing comes out until
there are two readings, so a restart never looks like an attack.
"""

from .compat import const, ticks_diff
from .features import RATE

DELTA_MAX = const(0x3FFFFFFE)  # a small int on every board; 1 + delta must stay one too


class Window:
    """schema: anything with `kinds`; window_ms: how long a window should be. `deltas` and `elapsed_ms` hold the last
    one. `primed`: there is a reading; set it to False and the next one only primes again."""

    def __init__(self, schema, window_ms: int) -> None:
        self._kinds = schema.kinds
        n = len(schema.kinds)
        self._last = [0] * n
        self._last_ms = 0
        self.primed = False
        self.deltas = [0] * n
        self.elapsed_ms = 0
        self.window_ms = window_ms
        self.dropped = 0  # windows thrown away: too long (a suspend, a stalled loop) or of no length
        self.resets = 0  # counters that fell without wrapping: an interface or a namespace began anew

    def push(self, values: list[int], now_ms: int) -> bool:
        """values: n readings taken at now_ms (ticks) -> True if `deltas` holds a window, False if this one only
        primed or had to be dropped (longer than 1.5 window lengths, or shorter than half)."""
        last = self._last
        kinds = self._kinds
        for i in range(len(last)):
            value = now = values[i]
            if kinds[i] == RATE:
                value -= last[i]
                if value < 0:
                    value = self._after_fall(now, last[i])
                last[i] = now
            self.deltas[i] = min(value, DELTA_MAX)
        self.elapsed_ms = ticks_diff(now_ms, self._last_ms)
        self._last_ms = now_ms
        if not self.primed:
            self.primed = True
            return False
        if self.window_ms <= 2 * self.elapsed_ms <= 3 * self.window_ms:
            return True
        self.dropped += 1
        return False

    def _after_fall(self, value: int, last: int) -> int:
        # The two widths that kernels and boards count in; a fall from the upper half to the lower half is a wrap.
        bits = 30 if last < 0x40000000 else 32
        if last >> bits - 1 == 1 and not value >> bits - 1:
            return value - last + (1 << bits)
        self.resets += 1
        return 0
