"""Random .tflite models for tests, fuzzing and benchmarks: every corner that the arithmetic has, from a seed.

The rows keep what the format promises: no accumulator, shifted, can reach 2^31 (what happens there is undefined in the
reference). Up to there the biases go to their ends.
"""

from collections.abc import Sequence

import numpy as np
import tflite
from stonechat import model_file
from stonechat.metadata import Metadata
from stonechat.model_file import pack_normalization

from ..modeling.tflite_writer import ACTIVATIONS, Layer, Writer, write

ZERO_POINTS = (-128, 127, 0, -1, 64)
KINDS = ("chain", "ops")


def chain(
    generator: np.random.Generator,
    widths: Sequence[int],
    per_channel: bool,
    extreme: bool = False,
) -> bytes:
    """A chain of dense layers of these widths (the input's first). `extreme`: biases and weights at their ends."""
    layers = []
    input_scale, input_zero_point = float(generator.uniform(0.002, 0.2)), int(generator.choice(ZERO_POINTS))
    scale = input_scale
    for inputs, outputs in zip(widths, widths[1:], strict=False):
        layer = _layer(generator, inputs, outputs, scale, per_channel, extreme)
        layers.append(layer)
        scale = layer.output_scale
    return write(layers, input_scale=input_scale, input_zero_point=input_zero_point)


def autoencoder(generator: np.random.Generator, widths: Sequence[int]) -> bytes:
    """A chain as training leaves it: relu inside, a linear output, values spread over their range, none at its end."""
    layers = []
    for number, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False)):
        last = number == len(widths) - 2
        weights = np.clip(generator.normal(0, 40, (outputs, inputs)).round(), -127, 127)
        layers.append(
            Layer(
                weights=weights,
                bias=generator.integers(-3000, 3000, outputs),
                weight_scale=generator.uniform(0.8, 1.2, outputs) / (40 * np.sqrt(inputs)),
                output_scale=1 / 16,
                output_zero_point=0 if last else -128,
                activation="none" if last else "relu",
            )
        )
    return write(layers, input_scale=1 / 16)


def planned(data: bytes, features: int, schema_id: bytes = bytes(8)) -> bytes:
    """The file with metadata for N features behind it, and the plan that a board runs by."""
    meta = Metadata()
    meta.schema_id, meta.window_ms = schema_id, 1000
    meta.normalization = pack_normalization([100] * features, [64] * features)
    meta.knots, meta.tail_q8, meta.alarm_rules = ((0, 77), (900, 300), (2000, 700)), 256, ((256, 512, 1280),)
    return bytes(model_file.seal(data + model_file.content(data, meta)))


def _layer(
    generator: np.random.Generator, inputs: int, outputs: int, input_scale: float, per_channel: bool, extreme: bool
) -> Layer:
    weights = generator.integers(-128, 128, (outputs, inputs))
    if extreme:
        weights[generator.random(weights.shape) < 0.5] = generator.choice([-128, 127])
    reach = 255 * np.abs(weights).sum(axis=1)
    output_scale = float(generator.uniform(0.01, 0.2))
    # a multiplier that spreads the accumulators over the int8 range, or, at the extremes, anything down to 2^-33
    spread = 64 / np.maximum(1, np.sqrt(inputs) * 5000) * generator.uniform(0.2, 4, outputs)
    if extreme:
        spread = np.exp2(generator.uniform(-33, -1, outputs))
    weight_scale = np.maximum(spread * output_scale / input_scale, 1e-30)
    bias = generator.integers(-reach // 4 - 1, reach // 4 + 1)
    if extreme:
        limit = (2**31 - 1 - reach) * generator.choice([-1, 1], outputs)
        bias = np.where(generator.random(outputs) < 0.5, limit, bias)
    return Layer(
        weights=weights,
        bias=bias,
        weight_scale=weight_scale if per_channel else float(weight_scale[0]),
        output_scale=output_scale,
        output_zero_point=int(generator.choice(ZERO_POINTS)),
        activation=str(generator.choice(list(ACTIVATIONS))),
    )


def claim_models(seed: int = 2026) -> dict[str, bytes]:
    """The models of the bit-exactness claim: depths 1 to 8, widths 1 to 640, both kinds of scales, every corner."""
    generator = np.random.default_rng(seed)
    models = {}
    shapes = [[1, 1], [640, 1], [1, 640], [640, 8, 640], [640, 320, 13, 24]]
    for depth in range(1, 9):
        for _ in range(3):
            shapes.append([int(width) for width in generator.integers(1, 65, depth + 1)])
    shapes += [[32, 48, 24, 8, 24, 48, 32], [24, 16, 8, 16, 24], [255, 3, 255], [128, 64, 128]]
    for number, widths in enumerate(shapes):
        for per_channel in (False, True):
            name = f"{number:02d}-{'-'.join(map(str, widths))}-{'channel' if per_channel else 'tensor'}"
            models[name] = chain(generator, widths, per_channel, extreme=number % 3 == 2)
    for number in range(6):
        models[f"operators-{number}"] = operators(generator, int(generator.integers(1, 41)))
    return models


def operators(generator: np.random.Generator, width: int) -> bytes:
    """One graph with every operator: two dense branches, sums and products, tables, a concatenation, a reshape."""
    codes, kinds = tflite.BuiltinOperator, tflite.BuiltinOptions
    writer = Writer()

    def tensor(name: str, scale: float | None = None, zero_point: int | None = None, length: int = width) -> int:
        scale = float(generator.uniform(0.02, 0.15)) if scale is None else scale
        zero_point = int(generator.choice(ZERO_POINTS)) if zero_point is None else zero_point
        return writer.activation([1, length], name, scale, zero_point)

    source = tensor("input")
    layer = _layer(generator, width, width, 0.1, True, False)
    layer.activation = "none"
    dense = writer.dense(source, layer, "dense")
    curves = [tensor("logistic", 1 / 256, -128), tensor("tanh", 1 / 128, 0)]
    writer.operator(codes.LOGISTIC, [dense], [curves[0]])
    writer.operator(codes.TANH, [dense], [curves[1]])
    total, difference, product = tensor("sum"), tensor("difference"), tensor("product")
    constant = writer.constant(generator.integers(-128, 128, (1, width)).astype(np.int8), "constant", [0.07], 5)
    writer.operator(codes.ADD, [curves[0], dense], [total], (kinds.AddOptions, ACTIVATIONS["none"]))
    writer.operator(codes.SUB, [source, total], [difference], (kinds.SubOptions, ACTIVATIONS["relu6"]))
    writer.operator(codes.MUL, [constant, dense], [product], (kinds.MulOptions, ACTIVATIONS["none"]))
    rectified = tensor("relu")
    writer.operator(codes.RELU, [difference], [rectified])
    parts = []
    for number, part in enumerate((curves[1], product, rectified)):
        parts.append(tensor(f"part{number}", 0.05, 3))
        writer.operator(codes.QUANTIZE, [part], [parts[-1]])
    joined = tensor("joined", 0.05, 3, 3 * width)
    writer.operator(codes.CONCATENATION, parts, [joined], (kinds.ConcatenationOptions, 1))
    flat = writer.activation([3 * width], "output", 0.05, 3)
    shape = writer.constant(np.array([3 * width], np.int32), "shape", [])
    writer.operator(codes.RESHAPE, [joined, shape], [flat])
    writer.inputs, writer.outputs = [source], [flat]
    return writer.finish()
