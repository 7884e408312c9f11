"""Recording services by themselves: one trace for each, all in one folder, by one collector."""

import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from stonechat.window import Window

from ..traces.format import TraceWriter


class ServiceTraces:
    """The window and the writer of record.record(), for all services of a collector at once. collector: a
    LinuxCollector with services; folder: gets SERVICE.csv.gz. A service that is not there has no window meanwhile.
    `windows`: as many as the trace that has most. Raises TraceError or OSError."""

    def __init__(
        self, collector: Any, folder: str, window_ms: int, device: str, resume: bool, notes: dict[str, str]
    ) -> None:
        os.makedirs(folder, exist_ok=True)
        self.window_ms = window_ms
        self.elapsed_ms = 0
        self.deltas: list[int] = []
        self._collectors = collector.services
        self._values = [[0] * len(each.schema) for each in self._collectors]
        self._windows = [Window(each.schema, window_ms) for each in self._collectors]
        self._filled = [False] * len(self._collectors)
        self._writers: list[TraceWriter] = []
        try:
            for each in self._collectors:
                stem = each.name.removesuffix(".service")
                path = os.path.join(folder, f"{device}-{stem}.csv.gz" if device else f"{stem}.csv.gz")
                name = f"{device}-{stem}" if device else stem
                self._writers.append(TraceWriter(path, each.schema, window_ms, name, notes, resume))
        except BaseException:
            self.close()
            raise

    @property
    def primed(self) -> bool:
        return all(window.primed for window in self._windows)

    @primed.setter
    def primed(self, value: bool) -> None:
        for window in self._windows:
            window.primed = value

    @property
    def dropped(self) -> int:
        return max(window.dropped for window in self._windows)

    @property
    def resets(self) -> int:
        return max(window.resets for window in self._windows)

    @property
    def windows(self) -> int:
        return max(writer.windows for writer in self._writers)

    @property
    def paths(self) -> list[str]:
        return [writer.path for writer in self._writers]

    def push(self, _values: Sequence[int], now_ms: int) -> bool:
        """As Window.push, after the collector was read -> whether any service has a window."""
        for i, each in enumerate(self._collectors):
            each.read(self._values[i])
            if each.absent:
                self._windows[i].primed = False
            self._filled[i] = self._windows[i].push(self._values[i], now_ms) and not each.absent
        return any(self._filled)

    def append(self, t_s: float, _elapsed_ms: int, label: str, _deltas: Sequence[int]) -> None:
        for window, writer, filled in zip(self._windows, self._writers, self._filled, strict=True):
            if filled:
                writer.append(t_s, window.elapsed_ms, label, window.deltas)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()

    def __enter__(self) -> "ServiceTraces":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
