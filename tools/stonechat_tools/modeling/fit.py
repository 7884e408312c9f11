"""Training in numpy: windows of benign features -> a fitted autoencoder, and from it the .tflite.

    fitted = fit(f_q8, schema, window_ms)
    data = fitted.to_tflite("sensor", 1)

The network is the autoencoder whose optimum is known in closed form: a linear encoder to a bottleneck of `units`
latents (the principal components, each scaled to unit variance, so that the bottleneck too has 16 steps a deviation)
and a linear decoder back. Each output's squared residual is weighted by the inverse of its benign variance: that is
factor analysis, Mahalanobis's distance for 2 * n * units multiply-accumulates instead of n^2. Being in closed form
it needs no seed, no epochs and no luck. ReLU autoencoders trained by gradient descent were worse and depended on their
seed (the suite's float autoencoder is one); `stonechat quantize` takes any of them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import cbor2
import numpy as np
import numpy.typing as npt
from stonechat.errors import ModelError, StonechatError
from stonechat.features import Normalization
from stonechat.metadata import Metadata
from stonechat.model import load_model
from stonechat.model_file import BUFFER, INFO_BUFFER, pack_normalization
from stonechat.own_model import FORBIDDEN
from stonechat.own_model_file import PLACEHOLDER, seal
from stonechat.schema import Schema

from .device_path import Network, Replay
from .options import FIT_WINDOWS, TABLE_WINDOWS
from .tflite_writer import Layer, write

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

STEP = 1 / 16
UNITS_MAX = 16
_DEVIATION_FLOOR_Q8 = 0.02 * 256  # log2 units; under it a counter that hardly moves would explode
_SD_SHARE = 0.7  # of the standard deviation: rare bursts widen it, and should not widen the scale as much
_SPARSE_FLOOR_Q8 = 0.25 * 256  # for counters that are zero in most windows
_SPARSE_SHARE = 0.3
_RESIDUAL_FLOOR = 0.125  # deviations; below it rounding to 1/16 would be the residual
_COUNTING_RESIDUAL = 0.09  # deviations; a table never gives residuals below it a high surprise
_KNOTS = (0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.12, 0.1, 0.08, 0.06, 0.05, 0.04, 0.03, 0.02)
_EXCESS_FLOOR = 48.0  # Q8 of the log score: a tail no steeper than that of a dozen normal residuals
_BLOCK = 20  # windows: what is trimmed is trimmed in blocks
_TRIM_ROUNDS = 3
_OUTLYING = 4.0  # robust deviations above the ordinary blocks: what stays left out
_OUTLYING_SHARE = 0.3  # of a block's windows that lie there
_OWN_LATENT = 0.8  # share of one feature in a component that then is that feature's own
_REACH_CODES = 5
_CHECKED_ROWS = 200
_REACH_SLACK = 2
# (allowance, cap, threshold) in Q8: 25 windows of p < .03 in a row, or 20 of p < .01
DEFAULT_ALARM_RULES = ((256, 384, 25 * 128), (256, 512, 20 * 256))


class FitError(StonechatError):
    """The windows given can't be trained on."""


@dataclass
class FittedModel:
    """A trained model before it is a file. `meta` is complete but for name and version; `layers` are quantized."""

    schema: Schema
    window_ms: int
    meta: Metadata
    layers: list[Layer]
    encoder: Floats  # (units, n): latents from x in deviations
    decoder: Floats  # (n, units)
    residual_deviation: Floats  # (n,) benign deviation of each output's residual
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def network(self) -> Network:
        return Network.from_layers(self.layers)

    def replay(self, learn: bool = False) -> Replay:
        """A device that runs this model."""
        return Replay(self.meta, self.network, learn)

    def to_tflite(self, name: str, version: int, info: dict[str, Any] | None = None, own_model: bool = True) -> bytes:
        """The file. info: provenance and figures for the tools' buffer (anything CBOR takes; no floats). own_model:
        whether a device may train a model of its own beside it."""
        self.meta.name, self.meta.version = name, version
        self.meta.golden = _golden(self.meta, self.network)
        columns = [list(column) for column in self.schema.columns]
        buffers = {BUFFER: PLACEHOLDER, INFO_BUFFER: cbor2.dumps({"columns": columns, **(info or {})}, canonical=True)}
        if not own_model:
            buffers[FORBIDDEN] = b"\1"
        return seal(write(self.layers, input_scale=STEP, metadata=buffers), self.meta)


def fit(
    f_q8: npt.ArrayLike,
    schema: Schema,
    window_ms: int,
    *,
    calibration: npt.ArrayLike | None = None,
    seed: int = 0,
    units: int | None = None,
    network: str = "linear",
    trim: float = 0.0,
    learn_windows: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> FittedModel:
    """f_q8: benign windows in the order of time, as features_q8 gives them. calibration: later benign windows for the
    table; without them the last quarter of f_q8 is kept from the network and used. units: latents in the bottleneck.
    trim: the share of 20-window blocks to leave out as contaminated. learn_windows: what a fresh device learns before
    it may alarm. Raises FitError where there is too little to train on."""
    show = progress or (lambda what, share: None)
    f = np.asarray(f_q8, dtype=np.int64)
    if f.ndim != 2 or f.shape[1] != len(schema):
        raise FitError(f"windows of shape {f.shape} for a schema of {len(schema)} features")
    if len(f) < FIT_WINDOWS:
        raise FitError(f"{len(f)} windows: training needs at least {FIT_WINDOWS}; record longer")
    if calibration is None:
        split = len(f) * 3 // 4
        f, later = f[:split], f[split:]
    else:
        later = np.asarray(calibration, dtype=np.int64)
    keep = _ordinary_blocks(f, trim) if trim else np.ones(len(f), dtype=bool)
    model = _fit_once(f[keep], schema, window_ms, units, network, seed)
    for round_number in range(_TRIM_ROUNDS if trim else 0):
        show("network", round_number / _TRIM_ROUNDS)
        keep = _clean_blocks(model, f, trim)
        model = _fit_once(f[keep], schema, window_ms, units, network, seed)
    if trim:
        keep |= ~_outlying_blocks(model, f, keep)
        model = _fit_once(f[keep], schema, window_ms, units, network, seed)
        model.figures["trimmed_windows"] = int((~keep).sum())
    model.meta.learn_windows = learn_windows
    show("calibration", 0.9)
    # a block that came back may hold some of an attack's windows, at its beginning and at its end
    set_table(model, [f[keep], later], spare=2 * round(_OUTLYING_SHARE * _BLOCK) if trim else 0)
    model.figures |= {"windows": len(f), "calibration_windows": len(later), "units": model.encoder.shape[0]}
    return model


def front_end(f_q8: Ints) -> tuple[Floats, Floats]:
    """f_q8 -> (centre_q8, deviation_q8) of each feature.

    The centre is the point about which deviations clipped at one balance (Huber's location), because that is where
    the device's own drift comes to rest. The deviation is what the middle of the distribution says, or a
    share of the standard deviation where that is more (rare bursts), over a floor."""
    f = f_q8.astype(np.float64)
    median = np.median(f, axis=0)
    mad = 1.4826 * np.median(np.abs(f - median), axis=0)
    low, high = np.quantile(f, [0.05, 0.95], axis=0)
    floor = np.where((f > 0).mean(axis=0) < _SPARSE_SHARE, _SPARSE_FLOOR_Q8, _DEVIATION_FLOOR_Q8)
    deviation = np.maximum.reduce([_SD_SHARE * f.std(axis=0), mad, (high - low) / 3.29, floor])
    centre = median.copy()
    for _ in range(20):
        centre += np.clip((f - centre) / deviation, -1, 1).mean(axis=0) * deviation
    return np.rint(centre), deviation


def default_units(n: int) -> int:
    return max(1, min(UNITS_MAX, n // 3))


def _fit_once(f: Ints, schema: Schema, window_ms: int, units: int | None, network: str, seed: int) -> FittedModel:
    centre, deviation = front_end(f)
    meta = Metadata()
    meta.schema_name, meta.schema_id, meta.window_ms = schema.name, schema.id, window_ms
    meta.normalization = pack_normalization(centre, deviation)
    meta.knots = ((0, 0), (1, 1))
    meta.alarm_rules = DEFAULT_ALARM_RULES
    x = _inputs(meta, schema, f) * STEP
    b = units or default_units(len(schema))
    if not 0 < b <= len(schema):
        raise FitError(f"a bottleneck of {b} for {len(schema)} features")
    if network != "linear":
        raise FitError(f"network {network!r}: known: linear")
    encoder, decoder = _linear_autoencoder(x, b)
    layers = quantize_linear(encoder, decoder, x)
    residual = x - Network.from_layers(layers).run(np.rint(x / STEP)) * STEP
    spread = np.sqrt((residual**2).mean(axis=0))
    spread = np.clip(spread, _RESIDUAL_FLOOR, 16 * _RESIDUAL_FLOOR)
    weights = np.rint(255 * _RESIDUAL_FLOOR**2 / spread**2)
    meta.weights = bytes(np.clip(weights, 1, 255).astype(np.uint8))
    return FittedModel(schema, window_ms, meta, layers, encoder, decoder, spread)


def _inputs(meta: Metadata, schema: Schema, f: Ints) -> Ints:
    norm = Normalization(schema, meta.normalization)
    inv, shift = np.array(norm.inv), np.array(list(norm.shift))
    x: Ints = np.clip(((f - np.array(norm.centre_q8)) * inv + (np.left_shift(1, shift) >> 1)) >> shift, -128, 127)
    return x


def _linear_autoencoder(x: Floats, units: int) -> tuple[Floats, Floats]:
    """The best linear reconstruction through `units` latents of unit variance: encoder (units, n), decoder
    (n, units). About the centre, not about the mean: the network has no bias, and a residual's mean is signal.

    A component that is nearly one feature's own comes last: through it the network would only copy that feature, and
    be blind to it."""
    covariance = x.T @ x / len(x)
    values, vectors = np.linalg.eigh(covariance)
    order = np.argsort(values)[::-1]
    own = (vectors[:, order] ** 2).max(axis=0) > _OWN_LATENT
    order = np.concatenate([order[~own], order[own]])[:units]
    vectors = vectors[:, order]
    vectors *= np.sign(vectors[np.argmax(np.abs(vectors), axis=0), np.arange(units)])  # the same bytes on every LAPACK
    scale = np.sqrt(np.maximum(values[order], 1e-3))
    return vectors.T / scale[:, None], vectors * scale


def quantize_linear(encoder: Floats, decoder: Floats, x: Floats | None = None) -> list[Layer]:
    """int8 weights per output channel; every tensor in 1/16 deviation, as the contract asks of input and output.

    x: training windows in deviations. With them the decoder is solved again for the latents that the rounded encoder
    really gives: inputs are so correlated that its rounding would otherwise show in the residual."""
    first = quantized(encoder, "encoder")
    if x is not None:
        z = Network.from_layers([first]).run(np.rint(x / STEP)) * STEP
        gram = z.T @ z + 1e-3 * len(z) * np.eye(z.shape[1])
        decoder = np.linalg.solve(gram, z.T @ x + 1e-3 * len(z) * decoder.T).T
    return [first, quantized(decoder, "output")]


def quantized(weights: Floats, name: str) -> Layer:
    scale = np.maximum(np.abs(weights).max(axis=1), 1e-6) / 127
    rounded = np.rint(weights / scale[:, None]).astype(np.int8)
    return Layer(rounded, np.zeros(len(weights), dtype=np.int32), scale.astype(np.float32), STEP, 0, "none", name)


def _ordinary_blocks(f: Ints, trim: float) -> npt.NDArray[np.bool_]:
    """A mask without the worst `trim` of the blocks, chosen without a model, which contamination could already have
    influenced: the medians of each block against those of the others, by the three most unusual features."""
    blocks = np.arange(len(f)) // _BLOCK
    medians = np.array([np.median(f[blocks == block], axis=0) for block in range(int(blocks[-1]) + 1)])
    centre = np.median(medians, axis=0)
    floor = np.where((f > 0).mean(axis=0) < _SPARSE_SHARE, _SPARSE_FLOOR_Q8, _DEVIATION_FLOOR_Q8)
    deviation = np.maximum(1.4826 * np.median(np.abs(medians - centre), axis=0), floor)
    strange = np.sort(np.minimum(np.abs(medians - centre) / deviation, 200.0), axis=1)[:, -3:].mean(axis=1)
    return _without_worst(strange, blocks, trim)


def _clean_blocks(model: FittedModel, f: Ints, trim: float) -> npt.NDArray[np.bool_]:
    """A mask without the worst `trim` of the blocks: an attack lasts, so blocks show what single rows can't."""
    replay = model.replay()
    scores = replay.scores(replay.steps(f)).astype(np.float64)
    blocks = np.arange(len(f)) // _BLOCK
    return _without_worst(np.bincount(blocks, scores) / np.bincount(blocks), blocks, trim)


def _outlying_blocks(model: FittedModel, f: Ints, kept: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """A mask of the blocks in which a good share of the windows score far above what the kept blocks do, by a model of
    these. What was left out and is not among them may come back: leaving out the busiest tenth of a clean recording
    costs detection."""
    replay = model.replay()
    scores = replay.scores(replay.steps(f)).astype(np.float64)
    blocks = np.arange(len(f)) // _BLOCK
    high = np.array([np.quantile(scores[blocks == block], 1 - _OUTLYING_SHARE) for block in range(blocks[-1] + 1)])
    ordinary = high[np.unique(blocks[kept])]
    middle = np.median(ordinary)
    deviation = 1.4826 * np.median(np.abs(ordinary - middle))
    mask: npt.NDArray[np.bool_] = (high > middle + _OUTLYING * deviation)[blocks]
    return mask


def _without_worst(strange: Floats, blocks: Ints, trim: float) -> npt.NDArray[np.bool_]:
    worst = np.argsort(strange)[::-1][: math.ceil(trim * len(strange))]
    return ~np.isin(blocks, worst)


def set_table(model: FittedModel, segments: Sequence[Ints], spare: int = 0) -> None:
    """Fill the calibration table from benign windows, segment after segment in the order of time, with the drift
    living. What the network was trained on and what came later are segments of their own: a device has quiet and busy
    days, and the table must accept both. The same windows give each feature's limit, except for
    the `spare` farthest."""
    set_limit(model.meta, segments, spare)
    replay = model.replay()
    scores = [np.sort(replay.run(segment).score_q8) for segment in segments]
    scores = [part for part in scores if len(part) >= TABLE_WINDOWS]
    if not scores:
        raise FitError(f"calibration: at least {TABLE_WINDOWS} windows are needed")
    meta = model.meta
    meta.knots, meta.tail_q8 = table(scores, len(model.schema))
    middle, upper = _quantiles(scores, np.array([0.5, 0.125]))
    meta.location_q8 = int(middle)
    meta.scale_q8 = max(1, int(upper) - meta.location_q8)


def set_limit(meta: Metadata, segments: Sequence[Ints], spare: int = 0) -> None:
    """Write each feature's limit into the normalization: twice as far as it went in benign windows, rounded up to 8,
    16, 32 ... deviations. The input ends at 8, so the network reconstructs no more; the excess over the limit counts as
    residual in full, so that a feature with wide benign swings does not count more."""
    still = Replay(meta, Network([]), learn=False)
    sizes = [np.sort(np.abs(still.steps(segment)), axis=0) for segment in segments if len(segment) > spare]
    farthest = np.max([size[-1 - spare] for size in sizes], axis=0)
    codes = np.clip(np.ceil(np.log2(_REACH_SLACK * np.maximum(farthest, 1) / 64)), 1, _REACH_CODES).astype(int)
    packed = bytearray(meta.normalization)
    for i, code in enumerate(codes.tolist()):
        packed[5 * i + 4] = packed[5 * i + 4] & 31 | code << 5
    meta.normalization = bytes(packed)


def table(scores: Sequence[Ints], n: int) -> tuple[tuple[tuple[int, int], ...], int]:
    """Benign log scores of each segment -> (knots, tail_q8): surprise = -log10 of the share above.

    Each knot is the highest that any segment has at its probability, and at least what residuals of _COUNTING_RESIDUAL
    would give, so that a counter which never moved does not make the first ripple a catastrophe. Beyond the
    last knot there is an exponential tail with the longest mean excess seen."""
    usable = np.array([p for p in _KNOTS if p * max(len(part) for part in scores) >= 8] or [0.5, 0.2])
    curve = np.maximum(_quantiles(scores, usable), _floor_curve(usable, n))
    knots: list[tuple[int, int]] = []
    for p, score in zip(usable.tolist(), curve.astype(int).tolist(), strict=True):
        surprise = round(-256 * math.log10(p))
        if not knots or score > knots[-1][0]:  # tied scores are as usual as the most usual of them
            knots.append((score, surprise))
    if len(knots) < 2:
        knots.append((knots[-1][0] + 64, knots[-1][1] + 77))
    excess = [_EXCESS_FLOOR, float(curve[-1] - np.interp(0.1, usable[::-1], curve[::-1])) / math.log(0.1 / usable[-1])]
    for part in scores:
        last = np.quantile(part, 1 - usable[-1])
        if (part > last).any():
            excess.append(float((part[part > last] - last).mean()))
    return tuple(knots), min(0x7FFF, round(256 * 256 / (max(excess) * math.log(10))))


def _quantiles(scores: Sequence[Ints], p: Floats) -> Floats:
    out: Floats = np.max([np.quantile(part, 1 - p) for part in scores], axis=0)
    return out


def _floor_curve(p: Floats, n: int) -> Floats:
    """The log score at upper probability p of n normal residuals of the least deviation that counts: a chi-square
    quantile by Wilson and Hilferty."""
    if not n:  # scores of another measure: no floor
        return np.zeros(len(p))
    normal = np.array([NormalDist().inv_cdf(1 - share) for share in p.tolist()])
    chi = n * (1 - 2 / (9 * n) + normal * math.sqrt(2 / (9 * n))) ** 3
    part = (_COUNTING_RESIDUAL / STEP) ** 2 * 255 / 16
    curve: Floats = 256 * np.log2(1 + part * chi)
    return curve


def assemble(meta: Metadata, schema: Schema, layers: list[Layer], x: Floats, bottleneck: Floats) -> FittedModel:
    """A network quantized elsewhere -> a model with the weights of its score, still without a table. meta: with schema,
    window and normalization; x: benign rows in deviations."""
    meta.knots, meta.alarm_rules = ((0, 0), (1, 1)), DEFAULT_ALARM_RULES
    residual = x - Network.from_layers(layers).run(np.rint(x / STEP)) * STEP
    deviation = np.clip(np.sqrt((residual**2).mean(axis=0)), _RESIDUAL_FLOOR, 16 * _RESIDUAL_FLOOR)
    meta.weights = bytes(np.clip(np.rint(255 * _RESIDUAL_FLOOR**2 / deviation**2), 1, 255).astype(np.uint8))
    return FittedModel(schema, meta.window_ms, meta, layers, bottleneck, bottleneck.T, deviation)


def check_file(data: bytes, fitted: FittedModel) -> dict[str, Any]:
    """The device's own interpreter must give what the numpy path gave. -> figures of the file."""
    model = load_model(data)
    rng = np.random.default_rng(3)
    x = rng.integers(-128, 128, (_CHECKED_ROWS, model.input_size))
    expected = fitted.network.run(x)
    for row, want in zip(x, expected, strict=True):
        got = model.run(bytes((row & 255).astype(np.uint8)))
        if bytes(got) != bytes((want & 255).astype(np.uint8)):
            raise ModelError("the written file does not compute what was trained; this is a bug, please report it")
    return {"macs": int(model.macs), "digest": model.digest.hex()}


def _golden(meta: Metadata, network: Network) -> tuple[tuple[bytes, bytes, int], ...]:
    """Three inputs that exercise the whole range, with what they must give."""
    n = len(meta)
    rng = np.random.default_rng(12)
    rows = [rng.integers(-128, 128, n), np.clip(np.rint(rng.normal(0, 16, n)), -128, 127).astype(np.int64)]
    rows.append(np.where(np.arange(n) % 2, 127, -128))
    replay = Replay(meta, network, learn=False)
    golden = []
    for row in rows:
        x = row.astype(np.int64)[None]
        y = network.run(x)[0]
        score = int(replay.scores(x)[0])
        golden.append((_bytes(x[0]), _bytes(y), score))
    return tuple(golden)


def _bytes(values: Ints) -> bytes:
    return (values & 255).astype(np.uint8).tobytes()
