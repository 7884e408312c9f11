"""Writes int8 .tflite files: `write(layers, ...)` for a dense network, `Writer` for any graph of tensors and operators.

    layers = [Layer(weights=W0, bias=b0, weight_scale=s0, output_scale=0.05, output_zero_point=-128, activation="relu"),
              Layer(weights=W1, bias=b1, weight_scale=s1, output_scale=1 / 16)]
    data = write(layers, input_scale=1 / 16, metadata={"stonechat": PLACEHOLDER})  # own_model_file.seal fills it

The file is laid out by the agent's own writer (own_model_file.py); here is what takes arrays and refuses what can't be.
The same layers always give the same bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tflite
from numpy.typing import ArrayLike, NDArray
from stonechat import own_model_file

ACTIVATIONS = {"none": 0, "relu": 1, "relu_n1_to_1": 2, "relu6": 3}
_KINDS = {"int8": tflite.TensorType.INT8, "int32": tflite.TensorType.INT32, "float32": tflite.TensorType.FLOAT32}


@dataclass
class Layer:
    """One FULLY_CONNECTED layer: y = activation(weights @ x + bias), all of it quantized.

    weights            int8, shape (outputs, inputs); zero point 0 by the int8 specification
    bias               int32, shape (outputs,), in units of input_scale * weight_scale
    weight_scale       one float (per tensor) or one per output (per channel); stored as float32
    output_scale       the real size of one step of the output; stored as float32
    output_zero_point  -128..127; with a relu, -128 uses the whole range
    activation         "none", "relu", "relu6" or "relu_n1_to_1", fused into the layer
    """

    weights: ArrayLike
    bias: ArrayLike
    weight_scale: float | Sequence[float] | NDArray[Any]
    output_scale: float
    output_zero_point: int = 0
    activation: str = "none"
    name: str = field(default="")


def write(
    layers: Sequence[Layer],
    *,
    input_scale: float,
    input_zero_point: int = 0,
    metadata: Mapping[str, bytes] | None = None,
    description: str = "stonechat",
) -> bytes:
    """The .tflite of a chain of dense layers. Raises ValueError where shapes, ranges or scales don't fit together."""
    if not layers:
        raise ValueError("a model needs at least one layer")
    writer = Writer(description)
    for key, value in (metadata or {}).items():  # what comes first lies last in the file
        writer.metadata(key, value)
    width = np.asarray(layers[0].weights).shape[-1]
    current = writer.activation([1, width], "input", input_scale, input_zero_point)
    writer.inputs = [current]
    for number, layer in enumerate(layers):
        name = layer.name or ("output" if number == len(layers) - 1 else f"dense{number}")
        current = writer.dense(current, layer, name)
    writer.outputs = [current]
    return writer.finish()


class Writer(own_model_file.Graph):
    """Collects tensors and operators, then finish() lays the file out. Tensors are named by the numbers it returns."""

    def constant(
        self,
        values: NDArray[Any],
        name: str,
        scales: Sequence[float] | NDArray[Any],
        zero_point: int = 0,
        axis: int = 0,
    ) -> int:
        """A tensor that the file holds; int8, int32 and float32 arrays are taken."""
        content = values.astype(values.dtype.newbyteorder("<")).tobytes()
        kind = _KINDS[values.dtype.name]
        return self.stored(content, values.shape, kind, name, [float(scale) for scale in scales], zero_point, axis)

    def operator(
        self,
        code: int,
        inputs: Sequence[int],
        outputs: Sequence[int],
        options: tuple[Any, ...] | None = None,
        version: int = 1,
    ) -> None:
        """options: (union type, value of its one field that is set), such as (tflite.BuiltinOptions.AddOptions, 0): the
        fused activation, or the concatenation's axis."""
        if options and not isinstance(options[1], tuple):
            form = "i" if options[0] == tflite.BuiltinOptions.ConcatenationOptions else "b"
            options = (options[0], (0, form, options[1]))
        super().operator(code, inputs, outputs, options, version)

    def dense(self, source: int, layer: Layer, name: str) -> int:
        """A FULLY_CONNECTED operator on tensor `source`; returns its output tensor."""
        weights = _integers(layer.weights, np.int8, name + " weights")
        bias = _integers(layer.bias, np.int32, name + " bias")
        width = self.shape(source)[-1]
        if weights.ndim != 2 or bias.shape != weights.shape[:1] or weights.shape[1] != width:
            raise ValueError(f"{name}: weights {weights.shape}, bias {bias.shape}, input of {width}")
        scales = np.atleast_1d(np.asarray(layer.weight_scale, dtype=np.float32))
        if len(scales) not in (1, len(weights)) or not (np.isfinite(scales) & (scales > 0)).all():
            raise ValueError(f"{name}: {len(scales)} weight scales, all must be above 0")
        if layer.activation not in ACTIVATIONS:
            raise ValueError(f"{name}: activation {layer.activation!r}, known: {', '.join(ACTIVATIONS)}")
        output = (float(layer.output_scale), layer.output_zero_point)
        scale_list = [float(scale) for scale in scales]
        activation = ACTIVATIONS[layer.activation]
        return self.connected(source, weights.tobytes(), bias.tolist(), scale_list, output, activation, name)


def _integers(values: ArrayLike, kind: Any, what: str) -> NDArray[Any]:
    given = np.asarray(values)
    taken = given.astype(kind)
    if not np.array_equal(given, taken):
        raise ValueError(f"{what}: not all are whole numbers that fit {np.dtype(kind).name}")
    return np.ascontiguousarray(taken)
