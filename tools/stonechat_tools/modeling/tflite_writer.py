"""Writes int8 .tflite files: `write(layers, ...)` for a dense network, `Writer` for any graph of tensors and operators.

    layers = [Layer(weights=W0, bias=b0, weight_scale=s0, output_scale=0.05, output_zero_point=-128, activation="relu"),
              Layer(weights=W1, bias=b1, weight_scale=s1, output_scale=1 / 16)]
    data = write(layers, input_scale=1 / 16, metadata={"stonechat": PLACEHOLDER})  # seal.py fills it

The same layers always give the same bytes. Buffers are aligned to 16, as the schema's force_align asks and no exporter
but this one does; every layer gets a bias tensor, because tflite-runtime's ARM kernels crash without one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flatbuffers
import numpy as np
import tflite
from numpy.typing import ArrayLike, NDArray

ACTIVATIONS = {"none": 0, "relu": 1, "relu_n1_to_1": 2, "relu6": 3}
_ALIGNMENT = 16


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


class Writer:
    """Collects tensors and operators, then finish() lays the file out. Tensors are named by the numbers it returns."""

    def __init__(self, description: str = "stonechat") -> None:
        self.inputs: list[int] = []
        self.outputs: list[int] = []
        self._description = description
        self._buffers: list[bytes] = [b""]  # buffer 0 is the empty one by convention
        self._tensors: list[dict[str, Any]] = []
        self._codes: list[tuple[int, int]] = []
        self._operators: list[tuple[int, list[int], list[int], tuple[Any, ...] | None]] = []
        self._metadata: list[tuple[str, int]] = []

    def activation(
        self, shape: Sequence[int], name: str, scale: float, zero_point: int = 0, kind: int = tflite.TensorType.INT8
    ) -> int:
        """A tensor that operators fill."""
        return self._tensor(shape, kind, name, [scale], [zero_point], 0)

    def constant(
        self,
        values: NDArray[Any],
        name: str,
        scales: Sequence[float] | NDArray[Any],
        zero_point: int = 0,
        axis: int = 0,
    ) -> int:
        """A tensor that the file holds; int8, int32 and float32 arrays are taken."""
        kinds = {"int8": tflite.TensorType.INT8, "int32": tflite.TensorType.INT32, "float32": tflite.TensorType.FLOAT32}
        self._buffers.append(values.astype(values.dtype.newbyteorder("<")).tobytes())
        points = [zero_point] * len(scales)
        return self._tensor(values.shape, kinds[values.dtype.name], name, scales, points, len(self._buffers) - 1, axis)

    def operator(
        self,
        code: int,
        inputs: Sequence[int],
        outputs: Sequence[int],
        options: tuple[Any, ...] | None = None,
        version: int = 1,
    ) -> None:
        """options: (union type, (field, value), ...) such as (tflite.BuiltinOptions.AddOptions, ("Add...", 0))."""
        if (code, version) not in self._codes:
            self._codes.append((code, version))
        self._operators.append((self._codes.index((code, version)), list(inputs), list(outputs), options))

    def dense(self, source: int, layer: Layer, name: str) -> int:
        """A FULLY_CONNECTED operator on tensor `source`; returns its output tensor."""
        weights = _integers(layer.weights, np.int8, name + " weights")
        bias = _integers(layer.bias, np.int32, name + " bias")
        before = self._tensors[source]
        if weights.ndim != 2 or bias.shape != weights.shape[:1] or weights.shape[1] != before["shape"][-1]:
            raise ValueError(f"{name}: weights {weights.shape}, bias {bias.shape}, input {before['shape']}")
        scales = np.atleast_1d(np.asarray(layer.weight_scale, dtype=np.float32))
        if len(scales) not in (1, len(weights)) or not (np.isfinite(scales) & (scales > 0)).all():
            raise ValueError(f"{name}: {len(scales)} weight scales, all must be above 0")
        if layer.activation not in ACTIVATIONS:
            raise ValueError(f"{name}: activation {layer.activation!r}, known: {', '.join(ACTIVATIONS)}")
        bias_scales = (np.float64(before["scales"][0]) * scales.astype(np.float64)).astype(np.float32)
        inputs = [
            source,
            self.constant(weights, name + "/weights", scales),
            self.constant(bias, name + "/bias", bias_scales),
        ]
        output = self.activation([1, len(weights)], name, layer.output_scale, layer.output_zero_point)
        options = (tflite.BuiltinOptions.FullyConnectedOptions, ACTIVATIONS[layer.activation])
        self.operator(tflite.BuiltinOperator.FULLY_CONNECTED, inputs, [output], options, version=4)
        return output

    def metadata(self, name: str, value: bytes) -> None:
        self._buffers.append(bytes(value))
        self._metadata.append((name, len(self._buffers) - 1))

    def finish(self) -> bytes:
        return _lay_out(self)

    def _tensor(
        self,
        shape: Sequence[int],
        kind: int,
        name: str,
        scales: Sequence[float] | NDArray[Any],
        zero_points: Sequence[int],
        buffer: int,
        axis: int = 0,
    ) -> int:
        scales = [float(np.float32(scale)) for scale in scales]
        if not all(-128 <= point <= 127 for point in zero_points):
            raise ValueError(f"{name}: zero points {zero_points}")
        self._tensors.append(
            {
                "shape": [int(length) for length in shape],
                "kind": kind,
                "name": name,
                "scales": scales,
                "zero_points": list(zero_points),
                "buffer": buffer,
                "axis": axis,
            }
        )
        return len(self._tensors) - 1


def _integers(values: ArrayLike, kind: Any, what: str) -> NDArray[Any]:
    given = np.asarray(values)
    taken = given.astype(kind)
    if not np.array_equal(given, taken):
        raise ValueError(f"{what}: not all are whole numbers that fit {np.dtype(kind).name}")
    return np.ascontiguousarray(taken)


# --- FlatBuffer layout: children before parents, as the format asks ---


def _lay_out(writer: Writer) -> bytes:
    builder = flatbuffers.Builder(4096)
    buffers = [_buffer(builder, data) for data in writer._buffers]
    tensors = [_tensor(builder, tensor) for tensor in writer._tensors]
    operators = [_operator(builder, *operator) for operator in writer._operators]
    subgraph = _subgraph(builder, writer, tensors, operators)
    codes = [_code(builder, *code) for code in writer._codes]
    entries = [_metadata(builder, *entry) for entry in writer._metadata]
    code_vector = _vector(builder, tflite.ModelStartOperatorCodesVector, codes, "UOffsetTRelative")
    subgraph_vector = _vector(builder, tflite.ModelStartSubgraphsVector, [subgraph], "UOffsetTRelative")
    buffer_vector = _vector(builder, tflite.ModelStartBuffersVector, buffers, "UOffsetTRelative")
    metadata_vector = _vector(builder, tflite.ModelStartMetadataVector, entries, "UOffsetTRelative") if entries else 0
    description = builder.CreateString(writer._description)
    tflite.ModelStart(builder)
    tflite.ModelAddVersion(builder, 3)
    tflite.ModelAddOperatorCodes(builder, code_vector)
    tflite.ModelAddSubgraphs(builder, subgraph_vector)
    tflite.ModelAddDescription(builder, description)
    tflite.ModelAddBuffers(builder, buffer_vector)
    if metadata_vector:
        tflite.ModelAddMetadata(builder, metadata_vector)
    builder.Finish(tflite.ModelEnd(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def _vector(builder: Any, start: Any, items: Sequence[Any], kind: str) -> int:
    start(builder, len(items))
    for item in reversed(items):
        getattr(builder, "Prepend" + kind)(item)
    return int(builder.EndVector())


def _buffer(builder: Any, data: bytes) -> int:
    vector = 0
    if data:
        builder.StartVector(1, len(data), _ALIGNMENT)
        builder.head -= len(data)
        builder.Bytes[builder.head : builder.head + len(data)] = data
        vector = builder.EndVector()
    tflite.BufferStart(builder)
    if vector:
        tflite.BufferAddData(builder, vector)
    return int(tflite.BufferEnd(builder))


def _tensor(builder: Any, tensor: Mapping[str, Any]) -> int:
    name = builder.CreateString(tensor["name"])
    shape = _vector(builder, tflite.TensorStartShapeVector, tensor["shape"], "Int32")
    scales = _vector(builder, tflite.QuantizationParametersStartScaleVector, tensor["scales"], "Float32")
    points = _vector(builder, tflite.QuantizationParametersStartZeroPointVector, tensor["zero_points"], "Int64")
    tflite.QuantizationParametersStart(builder)
    tflite.QuantizationParametersAddScale(builder, scales)
    tflite.QuantizationParametersAddZeroPoint(builder, points)
    tflite.QuantizationParametersAddQuantizedDimension(builder, tensor["axis"])
    quantization = tflite.QuantizationParametersEnd(builder)
    tflite.TensorStart(builder)
    tflite.TensorAddShape(builder, shape)
    tflite.TensorAddType(builder, tensor["kind"])
    tflite.TensorAddBuffer(builder, tensor["buffer"])
    tflite.TensorAddName(builder, name)
    if tensor["scales"]:
        tflite.TensorAddQuantization(builder, quantization)
    return int(tflite.TensorEnd(builder))


def _options(builder: Any, options: tuple[Any, ...]) -> int:
    """The options table of the operators that have fields we set: the fused activation, or the concatenation's axis."""
    kinds = tflite.BuiltinOptions
    kind, *values = options
    if kind == kinds.ConcatenationOptions:
        tflite.ConcatenationOptionsStart(builder)
        tflite.ConcatenationOptionsAddAxis(builder, values[0])
        return int(tflite.ConcatenationOptionsEnd(builder))
    name = {
        kinds.FullyConnectedOptions: "FullyConnectedOptions",
        kinds.AddOptions: "AddOptions",
        kinds.SubOptions: "SubOptions",
        kinds.MulOptions: "MulOptions",
    }[kind]
    getattr(tflite, name + "Start")(builder)
    getattr(tflite, name + "AddFusedActivationFunction")(builder, values[0])
    return int(getattr(tflite, name + "End")(builder))


def _operator(builder: Any, code: int, inputs: list[int], outputs: list[int], options: tuple[Any, ...] | None) -> int:
    table = _options(builder, options) if options else 0
    input_vector = _vector(builder, tflite.OperatorStartInputsVector, inputs, "Int32")
    output_vector = _vector(builder, tflite.OperatorStartOutputsVector, outputs, "Int32")
    tflite.OperatorStart(builder)
    tflite.OperatorAddOpcodeIndex(builder, code)
    tflite.OperatorAddInputs(builder, input_vector)
    tflite.OperatorAddOutputs(builder, output_vector)
    if options:
        tflite.OperatorAddBuiltinOptionsType(builder, options[0])
        tflite.OperatorAddBuiltinOptions(builder, table)
    return int(tflite.OperatorEnd(builder))


def _subgraph(builder: Any, writer: Writer, tensors: list[int], operators: list[int]) -> int:
    name = builder.CreateString("main")
    tensor_vector = _vector(builder, tflite.SubGraphStartTensorsVector, tensors, "UOffsetTRelative")
    input_vector = _vector(builder, tflite.SubGraphStartInputsVector, writer.inputs, "Int32")
    output_vector = _vector(builder, tflite.SubGraphStartOutputsVector, writer.outputs, "Int32")
    operator_vector = _vector(builder, tflite.SubGraphStartOperatorsVector, operators, "UOffsetTRelative")
    tflite.SubGraphStart(builder)
    tflite.SubGraphAddTensors(builder, tensor_vector)
    tflite.SubGraphAddInputs(builder, input_vector)
    tflite.SubGraphAddOutputs(builder, output_vector)
    tflite.SubGraphAddOperators(builder, operator_vector)
    tflite.SubGraphAddName(builder, name)
    return int(tflite.SubGraphEnd(builder))


def _code(builder: Any, code: int, version: int) -> int:
    tflite.OperatorCodeStart(builder)
    tflite.OperatorCodeAddDeprecatedBuiltinCode(builder, min(code, 127))
    tflite.OperatorCodeAddVersion(builder, version)
    tflite.OperatorCodeAddBuiltinCode(builder, code)
    return int(tflite.OperatorCodeEnd(builder))


def _metadata(builder: Any, name: str, buffer: int) -> int:
    label = builder.CreateString(name)
    tflite.MetadataStart(builder)
    tflite.MetadataAddName(builder, label)
    tflite.MetadataAddBuffer(builder, buffer)
    return int(tflite.MetadataEnd(builder))
