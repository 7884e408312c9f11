"""golden.json of a model: golden.py's vectors of the bare network, and beside them whole windows.

"windows": [{"deltas": [...], "elapsed_ms": n, "x": hex of the int8 input, "y": hex of the output, "score_q8": n,
"surprise_q8": n}, ...]: each by itself, on a fresh device that has learned nothing, made by the device's own code.
Where the reference runtimes are not installed, the bare vectors come from the agent's own interpreter and say so.
"""

import hashlib
import json
from typing import Any

import numpy as np
from stonechat import __version__
from stonechat.detection import Detector, Verdict
from stonechat.errors import ModelError
from stonechat.features import Normalization
from stonechat.model import load_model
from stonechat.schema import Schema
from stonechat.window import DELTA_MAX

from ..traces.trace import Trace

REAL_WINDOWS = 8


def golden(data: bytes, schema: Schema, trace: Trace) -> dict[str, Any]:
    """data: the .tflite; trace: windows to take some from -> what golden.json holds."""
    document = _network_vectors(data)
    document |= {"schema": schema.name, "schema_id": schema.id.hex(), "kinds": [column[2] for column in schema.columns]}
    document["windows"] = _window_vectors(data, schema, trace)
    return document


def _network_vectors(data: bytes) -> dict[str, Any]:
    from . import golden as reference

    try:
        return reference.make(data)
    except (ImportError, ModelError):
        model = load_model(data)
        rng = np.random.default_rng(1)
        inputs = [rng.integers(0, 256, model.input_size, dtype=np.uint8).tobytes() for _ in range(reference.VECTORS)]
        return {
            "format": 1,
            "runtime": "stonechat " + __version__,
            "resolver": "own interpreter",
            "agrees": [],
            "sha256": hashlib.sha256(data).hexdigest(),
            "tensors": [],
            "vectors": [[x.hex(), bytes(model.run(x)).hex(), []] for x in inputs],
        }


def _window_vectors(data: bytes, schema: Schema, trace: Trace) -> list[dict[str, Any]]:
    model = load_model(data)
    meta = model.metadata
    norm = Normalization(schema, meta.normalization)
    detector = Detector(meta, Verdict(len(meta)), norm.excess)
    f_q8, x = [0] * len(meta), bytearray(len(meta))
    vectors = []
    for deltas, elapsed_ms in _windows(trace, meta.window_ms):
        norm.fill_q8(deltas, elapsed_ms, meta.window_ms, f_q8)
        norm.fill(f_q8, x)
        y = bytes(model.run(x))
        score_q8 = detector.score(x, y)
        vector = {"deltas": deltas, "elapsed_ms": elapsed_ms, "x": bytes(x).hex(), "y": y.hex()}
        vectors.append(vector | {"score_q8": score_q8, "surprise_q8": detector.surprise(score_q8)})
    return vectors


def _windows(trace: Trace, window_ms: int) -> list[tuple[list[int], int]]:
    """Some real windows spread over the trace, and the ends of the range."""
    rows = np.linspace(0, len(trace) - 1, REAL_WINDOWS).astype(int)
    windows = [(trace.deltas[row].tolist(), int(trace.elapsed_ms[row])) for row in rows]
    top = [25600 if kind == "share" else DELTA_MAX for _, _, kind in trace.schema.columns]
    windows.append(([0] * len(top), window_ms))
    windows.append((top, window_ms))
    windows.append(([value if i % 2 else 0 for i, value in enumerate(top)], window_ms * 3 // 2))
    windows.append(([1] * len(top), (window_ms + 1) // 2))
    return windows


def golden_text(document: dict[str, Any]) -> str:
    """One vector a line, so that a change can be read."""
    lists = ("windows", "vectors")
    head = json.dumps({key: value for key, value in document.items() if key not in lists}, indent=0)[:-2]
    for key in lists:
        lines = ",\n".join(json.dumps(vector, separators=(",", ":")) for vector in document[key])
        head += f',\n"{key}": [\n{lines}\n]'
    return head + "}\n"
