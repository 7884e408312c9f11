"""Turn the float weights of a trained autoencoder into an int8 .tflite with metadata.

For weights that were trained elsewhere (PyTorch, JAX, ...), or to give another table or name to what
`stonechat train --weights` saved. The .npz holds

    w0, b0, w1, b1, ...   float layers, y = activation(w @ x + b); the input is in benign deviations, the output
                          reconstructs it; biases may be left out
    activation0, ...      "none" (default) or "relu"; the last layer has none
    scale0, ...           optional: the real size of one step of a hidden tensor, else it follows from the recordings
    columns, schema       JSON [[name, unit, kind], ...] and the schema's name; window_ms
    normalization         packed as model_file.pack_normalization does; or centre_q8 and deviation_q8

The recordings (benign) give the ranges of hidden tensors, the weights of the score and the calibration table. Input and
output have 16 steps a deviation by specification, whatever the recordings hold.

Examples:
  stonechat train recordings/*.csv.gz -o my-model/ --weights my-model/weights.npz
  stonechat quantize my-model/weights.npz recordings/*.csv.gz -o model.tflite
"""

import argparse
import io
import json
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from stonechat.errors import FeatureError, StonechatError
from stonechat.features import Normalization
from stonechat.metadata import Metadata
from stonechat.model_file import pack_normalization
from stonechat.schema import Schema

from ..console import reason, say, spare_inputs, write_atomic
from ..traces.dataset import split
from ..traces.files import read_all
from ..traces.format import TraceError, check_columns
from ..traces.trace import Trace, require_change
from .device_path import Network, Replay, to_features
from .fit import DEFAULT_ALARM_RULES, STEP, FittedModel, assemble, check_file, set_table
from .options import QUANTIZE_WINDOWS, check_name
from .provenance import digest_file, sample
from .tflite_writer import Layer

Floats = npt.NDArray[np.float64]
ACTIVATIONS = ("none", "relu")


class WeightsError(StonechatError):
    """The .npz does not describe a network; the message begins with its name."""


@dataclass
class Weights:
    """A float network before quantization: weights (outputs, inputs) and biases of each layer."""

    schema: Schema
    window_ms: int
    normalization: bytes
    weights: list[Floats]
    biases: list[Floats]
    activations: list[str]
    scales: list[float | None]

    def run(self, x: Floats) -> list[Floats]:
        """x in deviations -> every layer's output."""
        outputs = []
        for w, b, activation in zip(self.weights, self.biases, self.activations, strict=True):
            x = x @ w.T + b
            x = np.maximum(x, 0) if activation == "relu" else x
            outputs.append(x)
        return outputs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("weights", help="the float weights, .npz")
    add("recordings", nargs="+", help=f"benign traces of the schema, {QUANTIZE_WINDOWS} windows at least")
    add("-o", "--output", required=True, metavar="FILE", help="the .tflite to write")
    add("--name", help="name of the model (default: that of the file)")
    add("--model-version", type=int, default=1, metavar="N", help="version in the file")
    add("--learn-windows", type=int, default=128, help="what a fresh device learns before it may alarm (default 128)")
    add("--json", action="store_true", help="print the outcome as JSON")


def run(args: argparse.Namespace) -> int:
    spare_inputs(args.output, [args.weights, *args.recordings])
    name = check_name(args.name or Path(args.output).name.split(".")[0], "the name (--name, or that of the file)")
    weights = read_weights(args.weights)
    trace = read_all(args.recordings)
    benign = trace.select(trace.benign)
    fitted, figures = quantize(weights, benign)
    fitted.meta.learn_windows = args.learn_windows
    recordings = {Path(path).name: digest_file(path) for path in args.recordings}
    info = {"provenance": {"recordings": recordings, "windows": sample(benign)}}
    data = fitted.to_tflite(name, args.model_version, info)
    figures |= check_file(data, fitted) | {"file_bytes": len(data)}
    write_atomic(args.output, data)
    if args.json:
        print(json.dumps({"model": args.output, **figures}))
    else:
        say(
            f"{args.output}: {len(data)} bytes, {figures['macs']} MACs; int8 against float over {len(benign)} windows: "
            f"median {figures['output_error_median']:.3f}, 99 % {figures['output_error_q99']:.3f} deviations"
        )
    return 0


def quantize(weights: Weights, benign: Trace) -> tuple[FittedModel, dict[str, Any]]:
    """weights and benign windows in the order of time -> the quantized model with its table, and how far int8 is from
    float. Raises TraceError where the trace does not fit."""
    if benign.schema.id != weights.schema.id or benign.window_ms != weights.window_ms:
        raise TraceError(
            f"the weights are for {weights.schema.name} in windows of {weights.window_ms} ms, the recordings hold "
            f"{benign.schema.name} in windows of {benign.window_ms} ms"
        )
    if len(benign) < QUANTIZE_WINDOWS:
        raise TraceError(f"{len(benign)} benign windows: quantizing needs at least {QUANTIZE_WINDOWS}")
    require_change(benign)
    f_q8 = to_features(benign)
    meta = Metadata()
    meta.schema_name, meta.schema_id, meta.window_ms = weights.schema.name, weights.schema.id, weights.window_ms
    meta.normalization = weights.normalization
    meta.knots, meta.alarm_rules = ((0, 0), (1, 1)), DEFAULT_ALARM_RULES
    x = Replay(meta, Network([]), learn=False).inputs(f_q8)
    outputs = weights.run(x * STEP)
    layers = quantize_layers(weights, outputs)
    y = Network.from_layers(layers).run(x) * STEP
    fitted = assemble(meta, weights.schema, layers, x * STEP, min(weights.weights, key=len))
    parts = split(benign, {"earlier": 0.6, "later": 0.4})
    set_table(fitted, [to_features(part) for part in parts.values()])
    error = np.abs(y - np.clip(outputs[-1], -8, 127 / 16))
    figures = {
        "windows": len(benign),
        "output_error_median": round(float(np.median(error)), 4),
        "output_error_q99": round(float(np.quantile(error, 0.99)), 4),
    }
    return fitted, figures


def quantize_layers(weights: Weights, outputs: list[Floats]) -> list[Layer]:
    """int8 weights per output, int32 biases; hidden ranges from `outputs`, the last tensor in 1/16 deviation."""
    layers = []
    scale_in = STEP
    last = len(weights.weights) - 1
    for i, (w, b, activation) in enumerate(zip(weights.weights, weights.biases, weights.activations, strict=True)):
        scale_w = (np.maximum(np.abs(w).max(axis=1), 1e-6) / 127).astype(np.float32).astype(np.float64)
        quantized = np.clip(np.rint(w / scale_w[:, None]), -127, 127).astype(np.int8)
        scale_out, zero_point = _output_range(weights.scales[i], outputs[i], activation, i == last)
        bias = np.rint(b / (scale_in * scale_w)).astype(np.int32)
        name = "output" if i == last else f"dense{i}"
        layers.append(Layer(quantized, bias, scale_w.astype(np.float32), scale_out, zero_point, activation, name))
        # what follows counts in steps of this tensor; its zero point is the reader's business, as in any .tflite
        scale_in = float(np.float32(scale_out))
    return layers


def _output_range(given: float | None, values: Floats, activation: str, last: bool) -> tuple[float, int]:
    if last:
        return STEP, 0
    greatest = max(float(np.abs(values).max()), 1e-3)
    if activation == "relu":
        return given or greatest / 255, -128
    return given or greatest / 127, 0


# ------------------------------------------------------------------------------------------------------------ the .npz


def read_weights(path: str) -> Weights:
    """Raises WeightsError or OSError."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, TypeError, zipfile.BadZipFile, zlib.error, KeyError, EOFError, MemoryError) as error:
        raise WeightsError(f"{path}: not a sound .npz: {reason(error)}") from None
    try:
        schema = Schema(str(arrays["schema"]), check_columns(json.loads(str(arrays["columns"])), path))
        window_ms = int(arrays["window_ms"])
        if "normalization" in arrays:
            packed = arrays["normalization"].astype(np.uint8).tobytes()
        else:
            packed = pack_normalization(arrays["centre_q8"].tolist(), arrays["deviation_q8"].tolist())
        Normalization(schema, packed)
    except KeyError as error:
        raise WeightsError(f"{path}: it has no array {error}") from None
    except (ValueError, TypeError, OverflowError, RecursionError, struct.error, FeatureError) as error:
        raise WeightsError(f"{path}: {reason(error)}") from None
    if not 0 < window_ms <= 86_400_000:
        raise WeightsError(f"{path}: window_ms is {window_ms}, want 1 ms to a day")
    out = Weights(schema, window_ms, packed, [], [], [], [])
    while (name := f"w{len(out.weights)}") in arrays:
        _add_layer(out, arrays, len(out.weights), path)
        if arrays[name].ndim != 2:
            raise WeightsError(f"{path}: {name} has {arrays[name].ndim} dimensions, want 2")
    _check_shape(out, path)
    return out


def _add_layer(out: Weights, arrays: dict[str, Any], i: int, path: str) -> None:
    w = np.asarray(arrays[f"w{i}"], dtype=np.float64)
    b = np.asarray(arrays.get(f"b{i}", np.zeros(len(w))), dtype=np.float64)
    activation = str(arrays.get(f"activation{i}", "none"))
    if activation not in ACTIVATIONS:
        raise WeightsError(f"{path}: activation{i} is {activation!r}, one of {', '.join(ACTIVATIONS)}")
    if not (np.isfinite(w).all() and np.isfinite(b).all()) or b.shape != w.shape[:1]:
        raise WeightsError(f"{path}: w{i} {w.shape} and b{i} {b.shape} must fit together and be finite")
    out.weights.append(w)
    out.biases.append(b)
    out.activations.append(activation)
    scale = arrays.get(f"scale{i}")
    out.scales.append(None if scale is None else float(scale))


def _check_shape(out: Weights, path: str) -> None:
    n = len(out.schema)
    widths = [n, *[len(w) for w in out.weights]]
    if not out.weights or widths[-1] != n or any(w.shape[1] != widths[i] for i, w in enumerate(out.weights)):
        shapes = ", ".join(str(w.shape) for w in out.weights)
        raise WeightsError(f"{path}: layers {shapes or 'none'} do not lead from {n} features back to {n}")
    if out.activations[-1] != "none":
        raise WeightsError(f"{path}: the last layer reconstructs and can't have the activation {out.activations[-1]}")


def packed_weights(fitted: FittedModel) -> bytes:
    """What `stonechat train` fitted, as an .npz that `read_weights` takes."""
    out = io.BytesIO()
    np.savez_compressed(
        out,
        w0=fitted.encoder,
        w1=fitted.decoder,
        scale0=np.float64(STEP),
        columns=json.dumps([list(column) for column in fitted.schema.columns]),
        schema=fitted.schema.name,
        window_ms=fitted.window_ms,
        normalization=np.frombuffer(fitted.meta.normalization, dtype=np.uint8),
    )
    return out.getvalue()
