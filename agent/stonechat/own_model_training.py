"""Makes a device's own model of its windows: trimmed, fitted, calibrated and written, in steps of a few milliseconds.

    training = Training(rows, schema, window_ms, meta)
    for _ in training.steps():  # between the windows, as the device has time
        ...
    training.data               # the .tflite

rows: f_q8 of the windows, one after the other in the order of time; the first three quarters make the network, the
later quarter the calibration table. A share of the 20-window blocks of the first part is left out as contaminated."""

from math import sqrt
from struct import pack

from . import __version__, cbor
from .compat import const
from .detection import Detector, Verdict
from .features import Normalization
from .metadata import Metadata
from .model import load_model
from .model_file import BUFFER, INFO_BUFFER, pack_normalization
from .own_model_file import PLACEHOLDER, Graph, seal
from .own_model_fit import (
    BLOCK,
    RESIDUAL_FLOOR,
    STEP,
    FitError,
    autoencoder,
    centre_and_deviation,
    covariance,
    dot,
    eigen,
    limit_code,
    quantile,
    quantized,
    shrinkage,
    solve,
    table,
    upper,
)

LEAST_WINDOWS = const(240)
TRIM = 0.1  # of the blocks
LATENT_RANGE = 3.0  # deviations; beyond it a latent saturates: what goes further than benign windows is not rebuilt
_FEATURES_A_UNIT = const(6)
_RARE = 0.998  # a residual that is seldom large, but then very, does not hide small shifts of the others:
_RARE_DEVIATIONS = 3.2  # its benign spread is at least this quantile of it divided by that of a normal one
_TRIM_ROUNDS = const(2)
_OUTLYING = 4.0  # robust deviations above the ordinary blocks: what stays left out
_OUTLYING_SHARE = 0.3  # of a block's windows that lie there
_ROWS_A_STEP = const(24)
_SPARE = const(12)  # windows of each part that may lie beyond a feature's limit: those of an attack that a block keeps


class Training:
    """rows: array("H") or any sequence; schema: of the collector; window_ms: its windows; origin: of whose windows,
    {text: text or number} for the card in the file; alarm_rules: as in Metadata; name: of the model. `steps()` is a
    generator; after it `data` is the file, `figures` what the fit found. Raises FitError for fewer than LEAST_WINDOWS
    windows."""

    data = b""

    def __init__(self, rows, schema, window_ms, *, name, version, alarm_rules, origin=(), trim=TRIM, units=0) -> None:
        self._n = n = len(schema)
        self._rows = rows
        self._count = count = len(rows) // n
        if count < LEAST_WINDOWS:
            raise FitError("%d windows: an own model needs at least %d" % (count, LEAST_WINDOWS))
        self._fitted = count * 3 // 4
        self._schema = schema
        self._origin = origin
        self._trim = trim
        self._units = units or max(1, n // _FEATURES_A_UNIT)
        self.figures: dict = {}
        self.meta = meta = Metadata()
        meta.name, meta.version = name, version
        meta.schema_name, meta.schema_id, meta.window_ms = schema.name, schema.id, window_ms
        meta.alarm_rules = alarm_rules
        self._layers: list = []  # ([(int8 weights, scale) of a row], scale of the output, name) each

    def steps(self):
        """The whole training; each step is some milliseconds of work."""
        blocks = (self._fitted + BLOCK - 1) // BLOCK
        keep = [True] * blocks
        spare = 0
        if self._trim:
            spare = _SPARE
            strange: list = []
            yield from self._strange_blocks(blocks, strange)
            keep = self._without_worst(strange)
            for _ in range(_TRIM_ROUNDS):
                yield from self._fit(keep)
                scores: list = []
                yield from self._scores(0, self._fitted, scores)
                keep = self._without_worst([sum(part) / len(part) for part in _blocks(scores)])
            yield from self._fit(keep)
            scores = []
            yield from self._scores(0, self._fitted, scores)
            keep = _with_ordinary(keep, _blocks(scores))
        yield from self._fit(keep)
        kept = [k for k in range(self._fitted) if keep[k // BLOCK]]
        yield from self._calibrate(kept, spare)
        self.figures["windows"] = self._count
        self.figures["trimmed_windows"] = self._fitted - len(kept)
        self.data = self._write(True)
        yield

    def _f_q8(self, k):
        return self._rows[k * self._n : (k + 1) * self._n]

    # --- contamination ------------------------------------------------------------------------------------------------

    def _strange_blocks(self, blocks, out):
        """How far the medians of each block lie from those of the others, by the three most unusual features: chosen
        without a model, which contamination could already have influenced."""
        away: list = [[] for _ in range(blocks)]
        for i in range(self._n):
            values = [self._rows[k * self._n + i] for k in range(self._fitted)]
            medians = [quantile(sorted(part), 0.5) for part in _blocks(values)]
            ordered = sorted(medians)
            centre = quantile(ordered, 0.5)
            mad = 1.4826 * quantile(sorted([abs(median - centre) for median in ordered]), 0.5)
            _, deviation = centre_and_deviation(values)
            floor = max(mad, min(deviation, 64.0) if deviation >= 64.0 else 5.12)
            for block in range(blocks):
                away[block].append(min(abs(medians[block] - centre) / floor, 200.0))
            yield
        for block in away:
            out.append(sum(sorted(block)[-3:]) / 3)

    def _without_worst(self, strange):
        """-> whether to keep each block."""
        worst = -(-len(strange) * int(self._trim * 100) // 100)
        order = sorted([(-value, block) for block, value in enumerate(strange)])[:worst]
        left_out = [block for _, block in order]
        return [block not in left_out for block in range(len(strange))]

    # --- the network --------------------------------------------------------------------------------------------------

    def _fit(self, keep):
        """Normalization, network and weights from the windows of the blocks kept."""
        n, meta = self._n, self.meta
        rows = [k for k in range(self._fitted) if keep[k // BLOCK]]
        centres, deviations = [], []
        for i in range(n):
            centre, deviation = centre_and_deviation([self._rows[k * n + i] for k in rows])
            centres.append(centre)
            deviations.append(deviation)
            yield
        meta.normalization = pack_normalization(centres, deviations)
        columns: list = [[] for _ in range(n)]
        normalization = Normalization(self._schema, meta.normalization)
        x = bytearray(n)
        for at, k in enumerate(rows):
            normalization.fill(self._f_q8(k), x)
            for i in range(n):
                columns[i].append((x[i] ^ 128) - 128)
            if at % _ROWS_A_STEP == 0:
                yield
        matrix: list = []
        yield from covariance(columns, matrix)
        share = yield from shrinkage(matrix, columns)
        mean = sum([matrix[i][i] for i in range(n)]) / n / STEP**2
        for i in range(n):
            for j in range(n):
                matrix[i][j] = matrix[i][j] * (1 - share) / STEP**2 + (mean * share if i == j else 0.0)
        vectors: list = []
        yield from eigen(matrix, vectors)
        self.figures["shrinkage_per_mille"] = int(1000 * share)
        self.figures["units"] = units = self._units
        encoder, decoder = autoencoder(matrix, vectors, units)
        first = ([quantized(row) for row in encoder], LATENT_RANGE / 127, "encoder")
        self._layers = [first]
        latents: list = [[] for _ in range(units)]
        yield from self._outputs(rows, latents, normalization)
        yield from _solved(decoder, latents, columns)
        self._layers = [first, ([quantized(row) for row in decoder], 1 / STEP, "output")]
        meta.weights = None
        rebuilt: list = [[] for _ in range(n)]
        yield from self._outputs(rows, rebuilt, normalization)
        out = bytearray(n)
        for i in range(n):
            away = sorted([abs(a - b) for a, b in zip(columns[i], rebuilt[i])])
            spread = max(sqrt(dot(away, 0, len(away), away) / len(away)), quantile(away, _RARE) / _RARE_DEVIATIONS)
            spread = min(max(spread / STEP, RESIDUAL_FLOOR), 16 * RESIDUAL_FLOOR)
            out[i] = min(max(int(round(255 * RESIDUAL_FLOOR**2 / spread**2)), 1), 255)
            yield
        meta.weights = bytes(out)

    def _outputs(self, rows, out, normalization):
        """What the layers so far make of the windows `rows` -> out: one list a feature of the output."""
        model = load_model(self._graph(False))
        x = bytearray(self._n)
        for at, k in enumerate(rows):
            normalization.fill(self._f_q8(k), x)
            y = model.run(x)  # pyright: ignore[reportAttributeAccessIssue]
            for i in range(len(out)):
                out[i].append((y[i] ^ 128) - 128)
            if at % _ROWS_A_STEP == 0:
                yield

    # --- scores and the table -----------------------------------------------------------------------------------------

    def _scores(self, start, stop, out):
        """The log scores of windows, by the model as it is now."""
        meta = self.meta
        model = load_model(self._write(False))
        normalization = Normalization(self._schema, meta.normalization)
        detector = Detector(meta, Verdict(self._n), normalization.excess)
        x = bytearray(self._n)
        for k in range(start, stop):
            normalization.fill(self._f_q8(k), x)
            out.append(detector.score(x, model.run(x)))  # pyright: ignore[reportAttributeAccessIssue]
            if k % _ROWS_A_STEP == 0:
                yield

    def _calibrate(self, kept, spare):
        """Limits, calibration table, location and scale: what the network was fitted to and what came later are parts
        of their own, and the table accepts both."""
        yield from self._set_limits(kept, spare)
        scores: list = []
        yield from self._scores(0, self._count, scores)
        parts = [sorted([scores[k] for k in kept]), sorted(scores[self._fitted :])]
        meta = self.meta
        meta.knots, meta.tail_q8 = table(parts, self._n)
        meta.location_q8 = int(upper(parts, 0.5))
        meta.scale_q8 = max(1, int(upper(parts, 0.125)) - meta.location_q8)

    def _set_limits(self, kept, spare):
        n = self._n
        normalization = Normalization(self._schema, self.meta.normalization)
        packed = bytearray(self.meta.normalization)
        later = list(range(self._fitted, self._count))
        for i in range(n):
            centre, inv, shift = normalization.centre_q8[i], normalization.inv[i], normalization.shift[i]
            farthest = 0
            for part in (kept, later):
                away = [abs(((self._rows[k * n + i] - centre) * inv + ((1 << shift) >> 1)) >> shift) for k in part]
                farthest = max(farthest, sorted(away)[-1 - min(spare, len(away) - 1)])
            packed[5 * i + 4] = packed[5 * i + 4] & 31 | limit_code(farthest) << 5
            yield
        self.meta.normalization = bytes(packed)

    # --- the file -----------------------------------------------------------------------------------------------------

    def _graph(self, whole):
        """-> a .tflite of the layers so far, its metadata still to be filled in; whole: with its card."""
        graph = Graph()
        graph.metadata(BUFFER, PLACEHOLDER)
        if whole:
            graph.metadata(INFO_BUFFER, self._card())
        graph.inputs = [graph.activation((1, self._n), "input", 1 / STEP)]
        current = graph.inputs[0]
        for rows, scale, name in self._layers:
            weights = b"".join([pack("<%db" % len(row), *row) for row, _ in rows])
            scales = [row_scale for _, row_scale in rows]
            current = graph.connected(current, weights, [0] * len(rows), scales, (scale, 0), 0, name)
        graph.outputs = [current]
        return graph.finish()

    def _write(self, whole):
        """-> the .tflite; whole: with its card and golden vectors, as it leaves the training."""
        meta = self.meta
        data = self._graph(whole)
        if not meta.knots:
            meta.knots = ((0, 0), (1, 1))
        meta.golden = ()
        if whole:
            meta.golden = self._golden(load_model(seal(data, meta)))
        return seal(data, meta)

    def _golden(self, model):
        """Three inputs that exercise the whole range, with what they must give."""
        detector = Detector(self.meta, Verdict(self._n))
        rows = [
            bytes([(37 * i + 128) & 255 for i in range(self._n)]),
            bytes([(11 * i % 33 - 16) & 255 for i in range(self._n)]),
            bytes([127 if i % 2 else 128 for i in range(self._n)]),
        ]
        golden = []
        for x in rows:
            y = bytes(model.run(x))
            golden.append((x, y, detector.score(x, y)))
        return tuple(golden)

    def _card(self):
        """The tools' buffer: columns, of whose windows, figures; `stonechat inspect` prints it."""
        facts: list = [("columns", [list(column) for column in self._schema.columns])]
        facts += [("figures", self.figures), ("made_by", "the device itself, stonechat " + __version__)]
        out = bytearray()
        encode_map(sorted(facts + list(self._origin)), out)  # noqa: RUF005 - MicroPython has no [*a]
        return bytes(out)


def _solved(decoder, latents, columns):
    """Fit the decoder again, in place, to the latents that the rounded encoder really gives: inputs are so correlated
    that its rounding would otherwise show in the residual. One latent a step."""
    units, count = len(latents), len(latents[0])
    ridge = 1e-3 * count
    scale = LATENT_RANGE / 127
    gram, right = [], []
    for k in range(units):
        gram.append([dot(latents[k], 0, count, other) * scale * scale for other in latents])
        gram[k][k] += ridge
        row = [dot(latents[k], 0, count, column) * scale / STEP for column in columns]
        right.append([row[i] + ridge * decoder[i][k] for i in range(len(columns))])
        yield
    for k, row in enumerate(solve(gram, right)):
        for i in range(len(columns)):
            decoder[i][k] = row[i]
    yield


def encode_map(items, out):
    """items: (text, value) pairs -> appends a CBOR map; values: what cbor.encode takes, or dicts of such."""
    cbor.head(out, 5, len(items))
    for key, value in items:
        cbor.encode(key, out)
        if isinstance(value, dict):
            encode_map(sorted(value.items()), out)
        else:
            cbor.encode(value, out)


def _blocks(values):
    """-> the values of each block of BLOCK windows."""
    return [values[at : at + BLOCK] for at in range(0, len(values), BLOCK)]


def _with_ordinary(keep, blocks):
    """keep, with the blocks left out that are no outliers by a model of the kept ones: leaving out the busiest tenth of
    a clean recording costs detection. blocks: the scores of each."""
    high = [quantile(sorted(part), 1 - _OUTLYING_SHARE) for part in blocks]
    ordinary = sorted([high[block] for block in range(len(high)) if keep[block]])
    middle = quantile(ordinary, 0.5)
    deviation = 1.4826 * quantile(sorted([abs(value - middle) for value in ordinary]), 0.5)
    return [keep[block] or high[block] <= middle + _OUTLYING * deviation for block in range(len(high))]
