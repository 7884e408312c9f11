"""A recorded trace as a collector: the same windows again, for tests, tools and simulation.

replay = Replay(schema, windows)
agent = Agent(replay, model, publish=publish, reporter=reporter, state=State())
for now_ms in replay:
    verdict = agent.end_window(now_ms)
"""

from .errors import CollectorError
from .features import RATE


class Replay:
    """schema; windows: an iterable of (elapsed_ms, deltas) as a trace holds them. Iterating yields the trace's own
    clock, first 0 (that reading primes), then the end of each window, whose counters read() gives."""

    def __init__(self, schema, windows) -> None:
        self.schema = schema
        self.sources = (("replay", "trace", ""),)
        self._windows = windows
        self._rates = [kind == RATE for kind in schema.kinds]
        self._counters = [0] * len(schema)

    def __iter__(self):
        now_ms = 0
        yield now_ms
        for elapsed_ms, deltas in self._windows:
            if len(deltas) != len(self._rates):
                raise CollectorError("trace: %d columns, the schema has %d" % (len(deltas), len(self._rates)))
            now_ms += elapsed_ms
            for i, is_rate in enumerate(self._rates):
                self._counters[i] = self._counters[i] + deltas[i] if is_rate else deltas[i]
            yield now_ms

    def read(self, values: list[int]) -> None:
        """Fill `values` with the counters at the end of the window that the iteration has reached."""
        values[:] = self._counters

    def close(self) -> None:
        pass
