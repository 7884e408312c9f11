"""Cumulative counters in, what happened in one window out.

A collector fills a list of integers, one per column of its schema. Columns of kind RATE are cumulative counters, of
which the window takes the difference; LEVEL and SHARE columns are readings and pass through. Nothing comes out until
two readings stand, so a restart never looks like an attack.
"""

from .compat import const, ticks_diff
from .features import RATE

DELTA_MAX = const(0x3FFFFFFE)  # a small int on every board; 1 + delta must stay one too


class Window:
    """schema: the columns; window_ms: how long a window should be. `deltas` and `elapsed_ms` hold the last one."""

    def __init__(self, schema, window_ms: int) -> None:
        self._rates = tuple([kind == RATE for kind in schema.kinds])
        self._last = [0] * len(self._rates)
        self._last_ms = 0
        self._primed = False
        self.deltas = [0] * len(self._rates)
        self.elapsed_ms = 0
        self.window_ms = window_ms
        self.dropped = 0  # windows thrown away: too long (a suspend, a stalled loop) or of no length
        self.resets = 0  # counters that fell without wrapping: an interface or a namespace began anew

    def restart(self) -> None:
        """Forget the last reading: the next one only primes."""
        self._primed = False

    def push(self, values: list[int], now_ms: int) -> bool:
        """values: n readings taken at now_ms (ticks) -> True if `deltas` holds a window, False if this one only
        primed or had to be dropped (longer than 1.5 window lengths, or shorter than half)."""
        elapsed_ms = ticks_diff(now_ms, self._last_ms)
        usable = self._primed and 2 * elapsed_ms >= self.window_ms and 2 * elapsed_ms <= 3 * self.window_ms
        last = self._last
        deltas = self.deltas
        for i, is_rate in enumerate(self._rates):
            value = values[i]
            if is_rate:
                delta = value - last[i]
                if delta < 0:
                    delta = self._after_fall(value, last[i])
                last[i] = value
                value = delta
            deltas[i] = value if value < DELTA_MAX else DELTA_MAX
        self._last_ms = now_ms
        if self._primed and not usable:
            self.dropped += 1
        self._primed = True
        self.elapsed_ms = elapsed_ms
        return usable

    def _after_fall(self, value: int, last: int) -> int:
        # The two widths that kernels and boards count in; a fall from the upper half to the lower half is a wrap.
        for bits in (30, 32):
            if last < 1 << bits:
                if last >> (bits - 1) and not value >> (bits - 1):
                    return value - last + (1 << bits)
                break
        self.resets += 1
        return 0
