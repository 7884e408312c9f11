"""The device's integer path in numpy: the same bytes as agent/stonechat/{features,int8,detection,adaptation,scorer}.py,
a few hundred times faster, so that the suite can run weeks of windows. Tests hold the two equal, byte for byte.

    network = Network.from_layers(layers)        # or Network.from_file(tflite_bytes)
    replay = Replay(meta, network)               # a device's living state
    result = replay.run(features_q8(schema, deltas, elapsed_ms, window_ms))
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from stonechat import adaptation, detection, features, scorer
from stonechat.adaptation import Adaptation
from stonechat.detection import ALARM, NORMAL, WATCH
from stonechat.features import LEVEL, RATE, SHARE, Normalization
from stonechat.metadata import Metadata
from stonechat.model import load_model
from stonechat.model_file import RECONSTRUCTION, WEIGHT_ONE
from stonechat.schema import Schema

from ..traces.trace import Trace
from .steady_path import SecondReference
from .tflite_writer import Layer

Ints = npt.NDArray[np.int64]
CLEAR_Q8, WATCH_Q8, ALARM_Q8 = detection._CLEAR_Q8, detection._WATCH_Q8, detection._ALARM_Q8
SURPRISE_MAX_Q8 = detection._SURPRISE_MAX_Q8
DRIFT_CLIP = adaptation._CLIP_STEPS
EXCESS_MAX = features._BEYOND_MAX
ABOVE_MAX_Q8, BELOW_MAX_Q8 = scorer._ABOVE_MAX_Q8, scorer._BELOW_MAX_Q8
NEAR_LOW_Q8, NEAR_HIGH_Q8 = scorer._NEAR_LOW_Q8, scorer._NEAR_HIGH_Q8
MARGIN_Q8 = scorer._MARGIN_Q8
_LOG2_TABLE = np.array([*features._LOG2_Q8, 256], dtype=np.int64)


def log2_q8(values: npt.ArrayLike) -> Ints:
    """features.log2_q8 for an array of ints of at least 1."""
    v = np.asarray(values, dtype=np.int64).copy()
    octave = np.frexp(v.astype(np.float64))[1].astype(np.int64) - 1
    octave -= (np.left_shift(1, octave) > v).astype(np.int64)  # a float rounds up just below a power of two
    down = np.maximum(octave - 14, 0)
    up = np.maximum(14 - octave, 0)
    v = (v >> down) << up
    step = (v >> 8) & 63
    low, high = _LOG2_TABLE[step], _LOG2_TABLE[step + 1]
    out: Ints = (octave << 8) + low + (((high - low) * (v & 255) + 128) >> 8)
    return out


def features_q8(schema: Schema, deltas: npt.ArrayLike, elapsed_ms: npt.ArrayLike, window_ms: int) -> Ints:
    """deltas: (windows, n) ints, elapsed_ms: (windows,) -> f_q8 (windows, n), as Normalization.fill_q8 gives them."""
    d = np.asarray(deltas, dtype=np.int64)
    stretch = log2_q8(elapsed_ms) - features.log2_q8(window_ms)
    out = np.empty(d.shape, dtype=np.int64)
    for i, column in enumerate(schema.columns):
        values = d[:, i]
        if column[2] == SHARE:
            out[:, i] = np.clip(values, 0, 25600)
            continue
        logs = log2_q8(1 + np.maximum(values, 0))
        if column[2] == RATE:
            logs = np.maximum(0, logs - stretch)
        else:
            assert column[2] == LEVEL
        out[:, i] = np.where(values > 0, logs, 0)
    return out


def to_features(trace: Trace) -> Ints:
    """A trace -> f_q8, in the device's own arithmetic."""
    return features_q8(trace.schema, trace.deltas, trace.elapsed_ms, trace.window_ms)


def quantize_multiplier(real: float) -> tuple[int, int]:
    """TFLite's QuantizeMultiplier: real -> (m below 2^31, shift)."""
    if real == 0:
        return 0, 0
    mantissa, shift = math.frexp(real)
    m = math.floor(mantissa * (1 << 31) + 0.5)
    if m == 1 << 31:
        m, shift = m // 2, shift + 1
    return (0, 0) if shift < -31 else (m, shift)


class _Dense:
    """One FULLY_CONNECTED layer in the DOUBLE arithmetic of the reference kernels."""

    def __init__(self, layer: Layer, input_scale: float, input_zero_point: int) -> None:
        weights = np.asarray(layer.weights, dtype=np.int64)
        self.weights = weights.T.astype(np.float64)  # sums stay below 2^53: a float product is exact, and fast
        self.bias = np.asarray(layer.bias, dtype=np.int64) - input_zero_point * weights.sum(axis=1)
        scales = np.atleast_1d(np.asarray(layer.weight_scale, dtype=np.float32))
        s_in, s_out = np.float32(input_scale), np.float32(layer.output_scale)
        if len(scales) > 1:
            reals = [float(s_in) * float(s) / float(s_out) for s in scales]
        else:
            reals = [float(np.float32(s_in * scales[0])) / float(s_out)] * len(weights)
        pairs = [quantize_multiplier(real) for real in reals]
        self.multiplier = np.array([pair[0] for pair in pairs], dtype=np.int64)
        self.left = np.array([max(pair[1], 0) for pair in pairs], dtype=np.int64)
        self.right = np.array([max(-pair[1], 0) for pair in pairs], dtype=np.int64)
        self.half = np.where(self.right > 0, np.left_shift(1, np.maximum(self.right - 1, 0)), 0)
        self.zero_point = layer.output_zero_point
        self.low, self.high = _activation_range(layer.activation, float(s_out), layer.output_zero_point)

    def __call__(self, x: Ints) -> Ints:
        acc = np.rint(x @ self.weights).astype(np.int64) + self.bias
        h = ((acc << self.left) * self.multiplier + (1 << 30)) >> 31
        y = np.where(self.right > 0, (h + self.half - (h < 0)) >> self.right, h)
        return np.clip(y + self.zero_point, self.low, self.high)


def _activation_range(activation: str, scale: float, zero_point: int) -> tuple[int, int]:
    def at(value: float) -> int:
        return zero_point + round(value / scale)

    if activation == "none":
        return -128, 127
    low = at(-1.0) if activation == "relu_n1_to_1" else at(0.0)
    high = {"relu": 127, "relu6": at(6.0), "relu_n1_to_1": at(1.0)}[activation]
    return max(-128, low), min(127, high)


class Network:
    """x (windows, n) int8 values -> y (windows, n): a chain of dense layers, or any file through the device's own
    interpreter row by row."""

    def __init__(self, steps: Sequence[Any]) -> None:
        self._steps = list(steps)

    @classmethod
    def from_layers(cls, layers: Sequence[Layer], input_scale: float = 1 / 16, input_zero_point: int = 0) -> "Network":
        steps = []
        scale, zero_point = input_scale, input_zero_point
        for layer in layers:
            steps.append(_Dense(layer, scale, zero_point))
            scale, zero_point = layer.output_scale, layer.output_zero_point
        return cls(steps)

    @classmethod
    def from_file(cls, data: bytes) -> "Network":
        """A .tflite's network: in numpy where it is a chain of dense layers, else row by row in the interpreter."""
        layers = _dense_chain(data)
        if layers is None:
            return cls([_Interpreted(data)])
        return cls.from_layers(layers[1:], layers[0].output_scale, layers[0].output_zero_point)

    def run(self, x: npt.ArrayLike) -> Ints:
        y = np.asarray(x, dtype=np.int64)
        for step in self._steps:
            y = step(y)
        return y


class _Interpreted:
    def __init__(self, data: bytes) -> None:
        self._run = load_model(data).run

    def __call__(self, x: Ints) -> Ints:
        rows = np.atleast_2d(x)
        out = [np.frombuffer(bytes(self._run(bytes((row & 255).astype(np.uint8)))), dtype=np.int8) for row in rows]
        y: Ints = np.array(out, dtype=np.int64).reshape(*x.shape[:-1], -1)
        return y


def _dense_chain(data: bytes) -> list[Layer] | None:
    """The layers of a chain of FULLY_CONNECTED operators, the first entry is the input tensor's scale; None
    where the graph is anything else."""
    import tflite

    model = tflite.Model.GetRootAs(data, 0)
    graph = model.Subgraphs(0)
    current = graph.Inputs(0)
    layers = [_input_of(graph.Tensors(current))]
    names = {0: "none", 1: "relu", 2: "relu_n1_to_1", 3: "relu6"}
    for i in range(graph.OperatorsLength()):
        operator = graph.Operators(i)
        code = model.OperatorCodes(operator.OpcodeIndex())
        builtin = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
        if builtin != tflite.BuiltinOperator.FULLY_CONNECTED or operator.Inputs(0) != current:
            return None
        if operator.InputsLength() != 3 or operator.Inputs(2) < 0:
            return None
        tensors = [graph.Tensors(operator.Inputs(k)) for k in (1, 2)] + [graph.Tensors(operator.Outputs(0))]
        weights, bias, output = tensors
        options = tflite.FullyConnectedOptions()
        options.Init(operator.BuiltinOptions().Bytes, operator.BuiltinOptions().Pos)
        shape = weights.ShapeAsNumpy()
        quantization = output.Quantization()
        layers.append(
            Layer(
                model.Buffers(weights.Buffer()).DataAsNumpy().view(np.int8).reshape(shape),
                model.Buffers(bias.Buffer()).DataAsNumpy().view("<i4"),
                weights.Quantization().ScaleAsNumpy(),
                float(quantization.Scale(0)),
                int(quantization.ZeroPoint(0)),
                names[options.FusedActivationFunction()],
            )
        )
        current = operator.Outputs(0)
    return layers if current == graph.Outputs(0) else None


def _input_of(tensor: Any) -> Layer:
    quantization = tensor.Quantization()
    return Layer([[0]], [0], 1.0, float(quantization.Scale(0)), int(quantization.ZeroPoint(0)))


@dataclass
class Result:
    """What a stream of windows gave, one entry a window. steady: changed, and steady (stonechat.steady)."""

    score_q8: Ints
    surprise_q8: Ints
    evidence_q8: Ints
    level: Ints
    learning: npt.NDArray[np.bool_]
    steady: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.score_q8)

    @property
    def alarms(self) -> list[int]:
        """The windows at which the level became alarm."""
        up = (self.level == ALARM) & (np.concatenate([[NORMAL], self.level[:-1]]) != ALARM)
        return [int(i) for i in np.flatnonzero(up)]

    @property
    def alarm_windows(self) -> int:
        """How many windows it was in alarm."""
        return int((self.level == ALARM).sum())


class Replay:
    """One device's living state; `run` takes it further. `fork()` gives a copy to try something from here. steady=False
    leaves out what follows an alarm that does not end: for calibration, which looks at the evidence itself."""

    def __init__(self, meta: Metadata, network: Network, learn: bool = True, steady: bool = True) -> None:
        self.meta = meta
        self.network = network
        n = len(meta)
        schema = Schema("replay", tuple((str(i), "1", LEVEL) for i in range(n)))
        self.normalization = Normalization(schema, meta.normalization)
        self._adaptation = Adaptation(self.normalization, meta.drift_shift, meta.drift_cap)
        self.centre = np.array(self.normalization.centre_q8, dtype=np.int64)
        self.inv = np.array(self.normalization.inv, dtype=np.int64)
        self.shift = np.array(list(self.normalization.shift), dtype=np.int64)
        self._half = np.left_shift(1, self.shift) >> 1
        self._limit = np.array(self.normalization.limit, dtype=np.int64)
        self.deviation_q8 = np.array(self._adaptation._deviation_q8, dtype=np.int64)
        weights = bytes([WEIGHT_ONE]) * n if meta.weights is None else meta.weights
        self._weights = np.frombuffer(weights, dtype=np.uint8).astype(np.int64)
        self._roots = np.array([math.isqrt(weight << 8) for weight in weights], dtype=np.int64)
        self._knot_scores = [knot[0] for knot in meta.knots]
        self.learned = np.zeros(n, dtype=np.int64)
        self.drift = np.zeros(n, dtype=np.int64)
        self.location, self.scale = meta.location_q8, meta.scale_q8
        self.evidence = [0] * len(meta.alarm_rules)
        self.level = NORMAL
        self.seen = 0 if learn else meta.learn_windows
        self.unfit = False  # what was learned did not fit: it is learned again
        self.misfits = 0  # how often that was so
        self._low_q8 = np.zeros(n, dtype=np.int64)  # f_q8 of the last window with x at its lower end
        self._rows: list[Any] = []
        self.second = SecondReference(self) if steady else None

    def fork(self) -> "Replay":
        other = copy.copy(self)
        other.learned, other.drift = self.learned.copy(), self.drift.copy()
        other.evidence, other._rows = list(self.evidence), list(self._rows)
        other._low_q8 = self._low_q8.copy()
        other.second = self.second and self.second.fork()
        return other

    def calm(self, steady: bool = True) -> "Replay":
        """A copy without evidence: what an attack meets on an ordinary day, whatever happened before. steady=False: its
        scores stay those of the first reference, however long the attack lasts."""
        other = self.fork()
        if not steady:
            other.second = None
        if other.second and other.second.steady:
            other.second.evidence, other.second.level = [0] * len(self.meta.alarm_rules), NORMAL
            return other
        other.evidence, other.level = [0] * len(self.meta.alarm_rules), NORMAL
        if other.second:
            other.second.forget(other)
        return other

    @property
    def offset(self) -> Ints:
        shift = self.meta.drift_shift + 4
        return self.learned + ((self.drift * self.deviation_q8 + (1 << (shift - 1))) >> shift)

    def steps(self, f_q8: Ints) -> Ints:
        """f_q8 -> how far each feature lies from its centre under the present offset, in 1/16 deviation, unclipped."""
        out: Ints = ((f_q8 - self.centre - self.offset) * self.inv + self._half) >> self.shift
        return out

    def inputs(self, f_q8: Ints) -> Ints:
        """f_q8 -> x, the network's input: the steps clipped to int8."""
        return np.clip(self.steps(f_q8), -128, 127)

    def scores(self, steps: Ints) -> Ints:
        """steps or x (windows, n) -> score_q8 (windows,)."""
        residual = self.residuals(steps)
        return log2_q8(1 + ((residual * residual * self._weights) >> 4).sum(axis=-1))

    def residuals(self, steps: Ints) -> Ints:
        """The residual: the clipped input less its reconstruction, plus the excess over each feature's limit."""
        x = np.clip(steps, -128, 127)
        y = self.network.run(x)
        excess = np.clip(steps - np.clip(steps, -self._limit, self._limit), -EXCESS_MAX, EXCESS_MAX)
        out: Ints = (x - y if self.meta.kind == RECONSTRUCTION else y) + excess
        return out

    def parts(self, steps: Ints) -> Ints:
        """What each feature carries, as Verdict.explain ranks it."""
        part = (self.residuals(steps) * np.clip(steps, -128, 127) * self._roots) >> 6
        out: Ints = np.where(part > 0, part, -part >> 1)
        return out

    def surprise(self, score_q8: int) -> int:
        meta, knots = self.meta, self.meta.knots
        s = (score_q8 - self.location) * meta.scale_q8 // self.scale + meta.location_q8
        if s >= knots[-1][0]:
            return min(SURPRISE_MAX_Q8, knots[-1][1] + ((s - knots[-1][0]) * meta.tail_q8 >> 8))
        if s <= knots[0][0]:
            return knots[0][1]
        at = int(np.searchsorted(self._knot_scores, s, side="right")) - 1
        (s0, p0), (s1, p1) = knots[at], knots[at + 1]
        return p0 + (s - s0) * (p1 - p0) // (s1 - s0)

    def run(self, f_q8: Ints, adapt: bool = True) -> Result:
        """f_q8: (windows, n) in their order -> the verdicts. adapt=False holds the centre still."""
        count = len(f_q8)
        score, surprises, evidence, level = np.zeros((4, count), dtype=np.int64)
        out = Result(score, surprises, evidence, level, *np.zeros((2, count), dtype=bool))
        start = 0
        bound = self.meta.drift_cap << self.meta.drift_shift
        while start < count and self.seen < self.meta.learn_windows:
            start = self._learn(f_q8, start, out)
        still = None if adapt and bound else self.scores(self.steps(f_q8))
        for i in range(start, count):
            if still is None:
                x = self.steps(f_q8[i])
                score = int(self.scores(x[None])[0])
            else:
                score = int(still[i])
            surprise = self.surprise(score)
            share = self._weigh(surprise)
            if still is None:
                self.follow(x, share)
            found = score, surprise, share, self.level
            if self.second and adapt:
                on_top = self.second.step(self, f_q8[i], surprise, share)
                out.steady[i] = on_top is not None
                found = on_top or found
            out.score_q8[i], out.surprise_q8[i], out.evidence_q8[i], out.level[i] = found
        return out

    def follow(self, steps: Ints, share: int) -> None:
        """The drift after a window, unless its evidence is suspicious."""
        if share < WATCH_Q8:
            bound = self.meta.drift_cap << self.meta.drift_shift
            self.drift = np.clip(self.drift + np.clip(steps, -DRIFT_CLIP, DRIFT_CLIP), -bound, bound)

    def _weigh(self, surprise: int) -> int:
        share, self.level = self.weighed(self.evidence, self.level, surprise)
        return share

    def weighed(self, evidence: list[int], level: int, surprise: int) -> tuple[int, int]:
        """Add a surprise to the evidence, in place -> the greatest share of a threshold, and the level."""
        share = 0
        for i, (k, cap, alarm) in enumerate(self.meta.alarm_rules):
            evidence[i] = e = min(max(0, evidence[i] + min(surprise, cap) - k), alarm + (alarm >> 1))
            share = max(share, (e << 8) // alarm)
        if share >= ALARM_Q8:
            level = ALARM
        elif share < CLEAR_Q8:
            level = NORMAL
        elif share >= WATCH_Q8 and level == NORMAL:
            level = WATCH
        return share, level

    def _learn(self, f_q8: Ints, start: int, out: Result) -> int:
        """Take the windows up to the next half of the learning; returns where it stopped."""
        half = self.meta.learn_windows >> 1
        goal = half if self.seen < half else self.meta.learn_windows
        stop = min(len(f_q8), start + goal - self.seen)
        steps = self.steps(f_q8[start:stop])
        scores = self.scores(steps)
        out.score_q8[start:stop] = scores
        out.surprise_q8[start:stop] = [self.surprise(int(score)) for score in scores]
        out.learning[start:stop] = True
        if self.seen < half:
            self._rows += list(np.clip(steps, -128, 127))
            for f, low in zip(f_q8[start:stop], steps <= -128, strict=True):
                self._low_q8 = np.where(low, f, self._low_q8)
        else:
            self._rows += [int(score) for score in scores]
        self.seen += stop - start
        if self.seen == goal:
            if goal == half:
                rows = (np.array(self._rows) & 255).astype(np.uint8).tobytes()
                self._adaptation.learn(rows, self._low_q8.tolist())
                self.learned = np.array(self._adaptation.learned_q8, dtype=np.int64)
                self.drift[:] = 0
            else:
                self._settle()
            self._rows = []
        return stop

    def _settle(self) -> None:
        meta = self.meta
        ordered = sorted(self._rows)
        location = ordered[len(ordered) >> 1]
        own = ordered[len(ordered) * 7 >> 3] - location
        self.location = max(meta.location_q8 - BELOW_MAX_Q8, min(location, meta.location_q8 + ABOVE_MAX_Q8))
        low, high = meta.scale_q8 * NEAR_LOW_Q8 >> 8, meta.scale_q8 * NEAR_HIGH_Q8 >> 8
        self.scale = max(1, low, min((own + 3 * meta.scale_q8) >> 2, high))
        self.unfit = False
        if self._reaches(WATCH):
            self.scale = max(self.scale, min(own, 2 * meta.scale_q8))
            self.unfit = self._reaches(ALARM)
        self.misfits += self.unfit
        if self.unfit:  # it is learned again, as scorer.py says
            self.seen = 0
            self.learned[:] = 0
            self.location, self.scale = meta.location_q8, meta.scale_q8
        self.evidence, self.level = [0] * len(self.evidence), NORMAL

    def _reaches(self, level: int) -> bool:
        """Whether the windows learned from reach the level, or more like them would: scorer.py's _reach."""
        self.evidence, self.level = [0] * len(self.evidence), NORMAL
        surprises = [self.surprise(score) for score in self._rows]
        for surprise in surprises:
            self._weigh(surprise)
            if self.level >= level:
                return True
        for allowance, cap, _ in self.meta.alarm_rules:
            if sum(min(surprise, cap) for surprise in surprises) > len(surprises) * (allowance - MARGIN_Q8):
                return True
        return False
