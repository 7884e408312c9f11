"""Golden vectors: what a model's reference runtime answers, so that every other runtime can be held to it.

    python -m stonechat_tools.modeling.golden models/linux-proc-1      writes golden.json beside model.tflite
    python -m stonechat_tools.modeling.golden --fixtures               remakes the tests' own models

golden.json: {"format": 1, "runtime": ..., "resolver": ..., "agrees": [...], "sha256": of model.tflite,
"tensors": [number of each layer's output], "vectors": [[input, output, [layers]], ...]}, int8 bytes in hex. The
layers and outputs come from TFLite Micro; tflite-runtime with its integer reference kernels must agree on the outputs,
else nothing is written. (Its layers can't be read back: operators that work in place share their memory, whatever
preserve_all_tensors says.) Small enough for MicroPython's json.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stonechat.errors import ModelError
from stonechat.int8 import tflite
from stonechat.linux.tflite_runtime import TfliteRuntime

from ..proofs import generated
from ..proofs.exactness import TfliteMicro, outputs

VECTORS = 32
FIXTURES = Path(__file__).resolve().parents[3] / "firmware_tests" / "golden"


def make(data: bytes, count: int = VECTORS, seed: int = 1) -> dict[str, Any]:
    """The golden record of a model file. Raises ModelError where a runtime is missing or the two disagree."""
    micro = TfliteMicro(data, keep_layers=True)
    inputs = _inputs(micro.input_size, count, seed)
    tensors = _layer_tensors(data)
    vectors = []
    for x in inputs:
        output = micro.run(x.tobytes())
        vectors.append([x.tobytes().hex(), output.hex(), [micro.layer(number).hex() for number in tensors]])
    other = outputs(TfliteRuntime(data), inputs)
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


def write_golden(model: Path, count: int = VECTORS) -> Path:
    """Makes golden.json beside `model` (a model.tflite, or its folder); returns its path."""
    path = model / "model.tflite" if model.is_dir() else model
    target = path.with_name("golden.json")
    record = make(path.read_bytes(), count)
    vectors = ",\n".join(json.dumps(vector, separators=(",", ":")) for vector in record.pop("vectors"))
    target.write_text(json.dumps(record, indent=0)[:-2] + ',\n"vectors": [\n' + vectors + "\n]}\n")
    return target


def make_fixtures() -> None:
    """The small models that the tests always have: each kind of scale, every operator, accumulators of every size."""
    generator = np.random.default_rng(3)
    models = {
        "dense-tensor": generated.chain(generator, [24, 16, 8, 16, 24], False),
        "dense-channel": generated.chain(generator, [19, 11, 5, 11, 19], True),
        "extreme": generated.chain(generator, [7, 9, 6], True, extreme=True),
        "wide": generated.chain(generator, [640, 3, 4], False),
        "operators": generated.operators(generator, 6),
    }
    for name, data in models.items():
        folder = FIXTURES / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.tflite").write_bytes(data)
        write_golden(folder, 6 if name == "wide" else 12)


def _inputs(width: int, count: int, seed: int) -> NDArray[np.int8]:
    """The ends, then by halves what is uniform and what benign data looks like: small values around zero."""
    generator = np.random.default_rng(seed)
    values = generated.inputs(generator, width, count)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="*", type=Path, help="a model.tflite, or the folder that has one")
    parser.add_argument("--fixtures", action="store_true", help="remake firmware_tests/golden")
    args = parser.parse_args()
    if args.fixtures:
        make_fixtures()
    for model in args.model:
        print(write_golden(model))


if __name__ == "__main__":
    main()
