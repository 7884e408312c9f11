"""Golden vectors: what a model's reference runtime answers, so that every other runtime can be held to it.

golden.json: {"format": 1, "runtime": ..., "resolver": ..., "agrees": [...], "sha256": of model.tflite,
"tensors": [number of each layer's output], "vectors": [[input, output, [layers]], ...]}, int8 bytes in hex. The
layers and outputs come from TFLite Micro; tflite-runtime with its integer reference kernels must agree on the outputs,
else nothing is written. (Its layers can't be read back: operators that work in place share their memory, whatever
preserve_all_tensors says.) Small enough for MicroPython's json.

A trained model's has whole windows as well: "schema", "schema_id", "kinds" and "windows": [{"deltas": [...],
"elapsed_ms": n, "x": hex of the int8 input, "y": hex of the output, "score_q8": n, "surprise_q8": n}, ...], each by
itself, on a fresh device that has learned nothing, made by the device's own code. Where the reference runtimes are not
installed, the bare vectors come from the agent's own interpreter, and `resolver` is "own interpreter".
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stonechat import __version__
from stonechat.detection import Detector, Verdict
from stonechat.errors import ModelError
from stonechat.features import Normalization
from stonechat.int8 import tflite
from stonechat.linux.tflite_runtime import TfliteRuntime
from stonechat.model import load_model
from stonechat.schema import Schema
from stonechat.window import DELTA_MAX

from ..console import read_file, write_atomic
from ..traces.trace import Trace
from .oracles import TfliteMicro, inputs, outputs

VECTORS = 32
REAL_WINDOWS = 8


def make(data: bytes, count: int = VECTORS, seed: int = 1) -> dict[str, Any]:
    """The golden record of a model file. Raises ModelError where a runtime is missing or the two disagree."""
    micro = TfliteMicro(data, keep_layers=True)
    rows = _inputs(micro.input_size, count, seed)
    tensors = _layer_tensors(data)
    vectors = []
    for x in rows:
        output = micro.run(x.tobytes())
        vectors.append([x.tobytes().hex(), output.hex(), [micro.layer(number).hex() for number in tensors]])
    other = outputs(TfliteRuntime(data), rows)
    if [row.tobytes().hex() for row in other] != [vector[1] for vector in vectors]:
        raise ModelError("TFLite Micro and tflite-runtime's reference kernels disagree on this model")
    return {
        "format": 1,
        "runtime": "tflite-micro " + _version("tflite-micro"),
        "resolver": "PythonOpsResolver",
        "agrees": ["tflite-runtime " + _version("tflite-runtime") + " BUILTIN_REF"],
        "sha256": hashlib.sha256(data).hexdigest(),
        "tensors": tensors,
        "vectors": vectors,
    }


def runtime_missing(error: ModelError) -> bool:
    """Whether make() failed because a reference runtime is not installed, and not because they disagree."""
    return isinstance(error.__context__, ImportError)


def write_golden(model: Path, count: int = VECTORS) -> Path:
    """Makes golden.json beside `model` (a model.tflite, or its folder); returns its path."""
    path = model / "model.tflite" if model.is_dir() else model
    target = path.with_name("golden.json")
    record = make(read_file(path), count)
    write_atomic(target, golden_text(record))
    return target


def _inputs(width: int, count: int, seed: int) -> NDArray[np.int8]:
    """The ends, then by halves what is uniform and what benign data looks like: small values around zero."""
    generator = np.random.default_rng(seed)
    values = inputs(generator, width, count)
    values[count // 2 :] = np.clip(generator.normal(0, 16, values[count // 2 :].shape).round(), -128, 127)
    return values


def _layer_tensors(data: bytes) -> list[int]:
    """The int8 outputs of the operators, in order."""
    graph = tflite.read(data)
    numbers = [graph.operator(i)[2][0] for i in range(graph.operator_count)]
    return [number for number in numbers if graph.tensor(number).kind == tflite.INT8]


def _version(distribution: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(distribution)


def golden_document(data: bytes, schema: Schema, trace: Trace) -> dict[str, Any]:
    """data: the .tflite; trace: windows to take some from -> what golden.json holds."""
    document = _network_vectors(data)
    document |= {"schema": schema.name, "schema_id": schema.id.hex(), "kinds": [column[2] for column in schema.columns]}
    document["windows"] = _window_vectors(data, schema, trace)
    return document


def _network_vectors(data: bytes) -> dict[str, Any]:
    try:
        return make(data)
    except ModelError as error:
        if not runtime_missing(error):
            raise
        model = load_model(data)
        rng = np.random.default_rng(1)
        rows = [rng.integers(0, 256, model.input_size, dtype=np.uint8).tobytes() for _ in range(VECTORS)]
        return {
            "format": 1,
            "runtime": "stonechat " + __version__,
            "resolver": "own interpreter",
            "agrees": [],
            "sha256": hashlib.sha256(data).hexdigest(),
            "tensors": [],
            "vectors": [[x.hex(), bytes(model.run(x)).hex(), []] for x in rows],
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
    lists = [key for key in ("windows", "vectors") if key in document]
    head = json.dumps({key: value for key, value in document.items() if key not in lists}, indent=0)[:-2]
    for key in lists:
        lines = ",\n".join(json.dumps(vector, separators=(",", ":")) for vector in document[key])
        head += f',\n"{key}": [\n{lines}\n]'
    return head + "}\n"
