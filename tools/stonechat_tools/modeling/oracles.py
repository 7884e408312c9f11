"""The reference runtimes that the agent's int8 arithmetic is compared with: TFLite Micro and tflite-runtime."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stonechat.errors import ModelError
from stonechat.linux.tflite_runtime import TfliteRuntime


class TfliteMicro:
    """TFLite Micro, as its Python package builds it; `run` as the agent's interpreter has it."""

    macs = 0

    def __init__(self, data: bytes, keep_layers: bool = False) -> None:
        try:
            from tflite_micro.python.tflite_micro import runtime
        except ImportError as error:
            raise ModelError(f"tflite-micro is not installed: {error}") from error
        kinds = runtime.InterpreterConfig
        config = kinds.kPreserveAllTensors if keep_layers else kinds.kAllocationRecording
        self._interpreter = runtime.Interpreter.from_bytes(data, intrepreter_config=config)
        self._shape = self._interpreter.get_input_details(0)["shape"]
        self.input_size = int(np.prod(self._shape))
        self.output_size = int(np.prod(self._interpreter.get_output_details(0)["shape"]))

    def run(self, x: bytes) -> bytes:
        self._interpreter.set_input(np.frombuffer(x, np.int8).reshape(self._shape), 0)
        self._interpreter.invoke()
        return bytes(self._interpreter.get_output(0).tobytes())

    def layer(self, tensor: int) -> bytes:
        """The value of an intermediate tensor in the last run; needs keep_layers."""
        return bytes(self._interpreter.GetTensor(tensor, 0)["tensor_data"].tobytes())


ORACLES: Mapping[str, Any] = {"tflite-micro": TfliteMicro, "tflite-runtime BUILTIN_REF": TfliteRuntime}


def outputs(runner: Any, inputs: NDArray[np.int8]) -> NDArray[np.int8]:
    """All outputs of anything with run(x), one row per input."""
    rows = [bytes(runner.run(row.tobytes())) for row in inputs]
    return np.frombuffer(b"".join(rows), np.int8).reshape(len(inputs), -1)


def inputs(generator: np.random.Generator, width: int, count: int) -> NDArray[np.int8]:
    """`count` input vectors: a tenth of them at the ends of the range, the rest uniform."""
    values = generator.integers(-128, 128, (count, width)).astype(np.int8)
    ends = max(3, count // 10)
    values[:ends] = generator.choice(np.array([-128, 127], np.int8), values[:ends].shape)
    values[0], values[1 % count], values[2 % count] = -128, 127, 0
    return values
