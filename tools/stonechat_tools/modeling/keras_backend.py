"""`--backend keras`: the usual workflow, Keras and TFLiteConverter, ending in the same kind of file.

The converter's int8 file is read with the agent's own reader's rules and written again with the metadata; its weights,
biases, scales and zero points stay what the converter chose. Two things are pinned by specification instead: the input
range, by representative rows that reach its ends one feature at a time, and the output's scale, which is free to choose
because only the last requantization depends on it.
"""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from stonechat.errors import ConfigError, ModelError
from stonechat.int8 import tflite as reader
from stonechat.metadata import Metadata
from stonechat.model_file import pack_normalization
from stonechat.schema import Schema

from ..console import install_command
from .device_path import Network, Replay
from .fit import STEP, FittedModel, assemble, front_end, set_table
from .tflite_writer import Layer

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
EPOCHS = 60
BATCH_ROWS = 256
_LOW, _HIGH = -8.0, 127 * STEP
_REPRESENTATIVE_ROWS = 2_000


def fit_keras(f_q8: Ints, schema: Schema, window_ms: int, calibration: Ints, seed: int, units: int) -> FittedModel:
    """As fit.fit, with a ReLU autoencoder trained by Keras. Raises ConfigError where TensorFlow is not installed."""
    centre, deviation = front_end(f_q8)
    meta = Metadata()
    meta.schema_name, meta.schema_id, meta.window_ms = schema.name, schema.id, window_ms
    meta.normalization = pack_normalization(centre, deviation)
    x = Replay(meta, Network([]), learn=False).inputs(f_q8) * STEP
    layers = layers_of(convert(x, units, seed))
    fitted = assemble(meta, schema, layers, x, np.zeros((units, len(schema))))
    set_table(fitted, [f_q8, calibration])
    fitted.figures |= {"windows": len(f_q8), "calibration_windows": len(calibration), "units": units}
    return fitted


def convert(x: Floats, units: int, seed: int) -> bytes:
    """x: rows in deviations -> the int8 .tflite as TFLiteConverter makes it."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ConfigError(f"--backend keras needs TensorFlow ({error}): {install_command('keras')}") from None
    tf.keras.utils.set_random_seed(seed)
    n = x.shape[1]
    hidden = max(2 * units, n // 2)
    model = tf.keras.Sequential(
        [
            tf.keras.layers.Input(batch_shape=(1, n)),
            tf.keras.layers.Dense(hidden, activation="relu"),
            tf.keras.layers.Dense(units),
            tf.keras.layers.Dense(hidden, activation="relu"),
            tf.keras.layers.Dense(n),
        ]
    )
    free = tf.keras.Sequential([tf.keras.layers.Input((n,)), *model.layers])  # the same layers, any batch
    free.compile(optimizer=tf.keras.optimizers.Adam(2e-3), loss="mse")
    free.fit(x.astype(np.float32), x.astype(np.float32), epochs=EPOCHS, batch_size=BATCH_ROWS, verbose=0)
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: _representative(x)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.int8
    return bytes(converter.convert())


def _representative(x: Floats) -> Iterator[list[Any]]:
    for row in x[:: max(1, len(x) // _REPRESENTATIVE_ROWS)]:
        yield [row[None].astype(np.float32)]
    for i in range(x.shape[1]):
        for end in (_LOW, _HIGH):
            row = np.zeros((1, x.shape[1]), dtype=np.float32)
            row[0, i] = end
            yield [row]


def layers_of(data: bytes) -> list[Layer]:
    """The dense layers of a converted file, read by the agent's own reader; the output's scale is set to 1/16. Raises
    ModelError where the file holds anything else."""
    import tflite

    reader.read(data)  # refuses what a device would refuse
    model = tflite.Model.GetRootAs(data, 0)
    graph = model.Subgraphs(0)
    layers = []
    for i in range(graph.OperatorsLength()):
        operator = graph.Operators(i)
        code = model.OperatorCodes(operator.OpcodeIndex())
        if max(code.BuiltinCode(), code.DeprecatedBuiltinCode()) != tflite.BuiltinOperator.FULLY_CONNECTED:
            raise ModelError("the converter wrote another operator than FULLY_CONNECTED")
        layers.append(_layer(model, graph, operator))
    first = graph.Tensors(graph.Operators(0).Inputs(0)).Quantization()
    if abs(first.Scale(0) - STEP) > 1e-6 or first.ZeroPoint(0) != 0:
        raise ModelError(f"the converter chose input scale {first.Scale(0)}, zero point {first.ZeroPoint(0)}")
    layers[-1].output_scale, layers[-1].output_zero_point = STEP, 0
    return layers


def _layer(model: Any, graph: Any, operator: Any) -> Layer:
    import tflite

    weights = graph.Tensors(operator.Inputs(1))
    output = graph.Tensors(operator.Outputs(0))
    shape = weights.ShapeAsNumpy()
    values = model.Buffers(weights.Buffer()).DataAsNumpy().view(np.int8).reshape(shape)
    bias = np.zeros(shape[0], dtype=np.int32)
    if operator.InputsLength() > 2 and operator.Inputs(2) >= 0:
        bias = model.Buffers(graph.Tensors(operator.Inputs(2)).Buffer()).DataAsNumpy().view(np.int32)
    options = tflite.FullyConnectedOptions()
    table = operator.BuiltinOptions()
    options.Init(table.Bytes, table.Pos)
    names = {0: "none", 1: "relu"}
    if options.FusedActivationFunction() not in names:
        raise ModelError(f"the converter fused activation {options.FusedActivationFunction()}")
    quantization = output.Quantization()
    return Layer(
        values,
        bias,
        weights.Quantization().ScaleAsNumpy(),
        float(quantization.Scale(0)),
        int(quantization.ZeroPoint(0)),
        names[options.FusedActivationFunction()],
    )
