"""A trace in memory: numpy arrays with one row for each window. format.py documents the file, files.py reads it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from stonechat.schema import Schema

from .format import TraceError, is_benign

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Texts = npt.NDArray[np.object_]

_FEW = 50  # windows that may all be the same by chance


@dataclass
class Trace:
    """n windows of one schema. All arrays have n rows; deltas is n x len(schema), int64."""

    schema: Schema
    window_ms: int
    t_s: Floats
    elapsed_ms: Ints
    labels: Texts
    devices: Texts
    deltas: Ints
    notes: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.t_s)

    @property
    def benign(self) -> npt.NDArray[np.bool_]:
        """A mask of the windows that carry no attack."""
        return np.array([is_benign(label) for label in self.labels], dtype=bool)

    @property
    def device_names(self) -> list[str]:
        """The devices in the order of their first window."""
        return list(dict.fromkeys(self.devices.tolist()))

    def select(self, rows: Any) -> "Trace":
        """rows: a mask, a slice or indices -> a trace of these windows, in that order."""
        return Trace(
            self.schema,
            self.window_ms,
            self.t_s[rows],
            self.elapsed_ms[rows],
            self.labels[rows],
            self.devices[rows],
            self.deltas[rows],
            dict(self.notes),
        )

    def of_device(self, name: str) -> "Trace":
        return self.select(self.devices == name)


def make_trace(
    schema: Schema,
    window_ms: int,
    rows: Sequence[tuple[float, int, str, Sequence[int]]],
    device: str = "",
    notes: dict[str, str] | None = None,
) -> Trace:
    """rows: (t_s, elapsed_ms, label, deltas) each -> a Trace of one device."""
    n = len(rows)
    return Trace(
        schema,
        window_ms,
        np.array([row[0] for row in rows], dtype=np.float64),
        np.array([row[1] for row in rows], dtype=np.int64),
        texts([row[2] for row in rows]),
        texts([device] * n),
        np.array([row[3] for row in rows], dtype=np.int64).reshape(n, len(schema)),
        dict(notes or {}),
    )


def require_change(benign: Trace) -> None:
    """Raises TraceError for a device none of whose counters ever changes: silence of what was not counted proves
    nothing, and there is nothing to learn."""
    for name in benign.device_names:
        deltas = benign.deltas[benign.devices == name]
        if len(deltas) >= _FEW and (deltas == deltas[0]).all():
            raise TraceError(
                f"no counter of {name or 'the device'} changes in {len(deltas)} benign windows: record it at its "
                "ordinary work (stonechat doctor says which sources work there), or leave it out"
            )


def join(traces: Sequence[Trace]) -> Trace:
    """Traces of one schema and window -> one, in the order given. Raises TraceError where they don't fit together."""
    if not traces:
        raise TraceError("nothing to join: give at least one trace")
    first = traces[0]
    for other in traces[1:]:
        if other.schema.id != first.schema.id:
            raise TraceError(
                f"can't join schema {first.schema.name} ({first.schema.id.hex()}) "
                f"with {other.schema.name} ({other.schema.id.hex()})"
            )
        if other.window_ms != first.window_ms:
            raise TraceError(f"can't join windows of {first.window_ms} ms with windows of {other.window_ms} ms")
    notes: dict[str, str] = {}
    for trace in traces:
        for key, value in trace.notes.items():
            if value not in notes.get(key, "").split("; "):
                notes[key] = f"{notes[key]}; {value}" if key in notes else value
    return Trace(
        first.schema,
        first.window_ms,
        np.concatenate([trace.t_s for trace in traces]),
        np.concatenate([trace.elapsed_ms for trace in traces]),
        np.concatenate([trace.labels for trace in traces]),
        np.concatenate([trace.devices for trace in traces]),
        np.concatenate([trace.deltas for trace in traces]),
        notes,
    )


# ------------------------------------------------------------------------------------------------------------ reading


# ------------------------------------------------------------------------------------------------------------ writing


# ------------------------------------------------------------------------------------------------------------ Parquet


def texts(values: Sequence[str]) -> Texts:
    out = np.empty(len(values), dtype=object)
    out[:] = values
    return out
