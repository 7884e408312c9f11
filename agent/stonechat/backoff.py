"""When to try again: exponential back-off with full jitter, so that a fleet does not come back in one second.

Source: "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
"""

import os

from .compat import const, ticks_add, ticks_diff, ticks_ms

FIRST_MS = const(1_000)
LONGEST_MS = const(120_000)


class Backoff:
    """due() tells whether to try now; failed() and worked() tell it how the try went."""

    def __init__(self, first_ms: int = FIRST_MS, longest_ms: int = LONGEST_MS) -> None:
        self._first_ms = first_ms
        self._longest_ms = longest_ms
        self._span_ms = first_ms
        self._due_ms = ticks_ms()

    def due(self) -> bool:
        return ticks_diff(ticks_ms(), self._due_ms) >= 0

    def failed(self) -> None:
        """Wait a random time between half of the span and the span, and double the span up to its limit."""
        random = os.urandom(2)
        half_ms = self._span_ms // 2
        self._due_ms = ticks_add(ticks_ms(), half_ms + (random[0] << 8 | random[1]) % (half_ms + 1))
        self._span_ms = min(2 * self._span_ms, self._longest_ms)

    def worked(self) -> None:
        self._span_ms = self._first_ms
        self._due_ms = ticks_ms()
