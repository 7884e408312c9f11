"""A recorded trace as a collector: the same windows again, for tests, tools and simulation."""

from .errors import CollectorError
from .features import RATE


class Replay:
    """schema; windows: an iterable of (elapsed_ms, deltas) as a trace holds them. The first read() primes, each one
    after it plays a window; `now_ms` is the trace's own clock, to be handed to Agent.end_window()."""

    def __init__(self, schema, windows) -> None:
        self.schema = schema
        self.sources = (("replay", "trace", ""),)
        self.now_ms = 0
        self.ended = False
        self._windows = iter(windows)
        self._rates = [column[2] == RATE for column in schema.columns]
        self._counters = [0] * len(schema)
        self._primed = False

    def read(self, values: list[int]) -> None:
        """Fill `values` with the counters after the next window. Raises CollectorError at the end of the trace."""
        if not self._primed:
            self._primed = True
            values[:] = self._counters
            return
        try:
            elapsed_ms, deltas = next(self._windows)
        except StopIteration:
            self.ended = True
            raise CollectorError("the trace has ended")
        if len(deltas) != len(self._rates):
            raise CollectorError("trace: %d columns, the schema has %d" % (len(deltas), len(self._rates)))
        self.now_ms += elapsed_ms
        for i, is_rate in enumerate(self._rates):
            self._counters[i] = self._counters[i] + deltas[i] if is_rate else deltas[i]
        values[:] = self._counters

    def close(self) -> None:
        pass
