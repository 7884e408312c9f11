"""Fits a device's own model: its windows -> a linear autoencoder in closed form, in steps that a device takes between
its windows.

    steps = fit(rows, schema, window_ms, meta)      # a generator
    for _ in steps: ...                             # a few milliseconds each; the device does other work between them
    data = write(fitted, meta, ...)

The network is the linear autoencoder whose optimum is known in closed form: the principal components of the benign
covariance, which is shrunk towards the identity (Ledoit and Wolf, 2004) because a device has few windows of its own.
Each output's squared residual is weighted by the inverse of its benign variance. All is plain float arithmetic in a
fixed order, so the same windows give the same bytes.

modeling/fit.py of the tools does the same with numpy, for recordings of many devices; the calibration table is
made here for both."""

from math import ceil, log, log2, log10, sqrt

from .compat import const
from .errors import StonechatError

try:
    from .compat_cpython import dot as dot
except ImportError:

    def dot(weights, at, count, x):
        """Sum of the products of weights[at : at + count] and x."""
        total = 0
        for k in range(count):
            total += weights[at + k] * x[k]
        return total


STEP = 16  # of a deviation
BLOCK = const(20)  # windows: what is trimmed is trimmed in blocks, because an attack lasts
_DEVIATION_FLOOR_Q8 = 5.12  # .02 log2 units; under it a counter that hardly moves would explode
_SPARSE_FLOOR_Q8 = 64.0  # for counters that are zero in most windows
_SPARSE_SHARE = 0.3
_SD_SHARE = 0.7
_HUBER_ROUNDS = const(20)
RESIDUAL_FLOOR = 0.125  # deviations; below it rounding to 1/16 would be the residual
_OWN_LATENT = 0.8  # share of one feature in a component that then is that feature's own
_SWEEPS = const(12)

# p of a knot, and the standard normal's quantile at 1 - p
_KNOTS = (
    (0.5, 0.0),
    (0.4, 0.2533471031357997),
    (0.3, 0.5244005127080407),
    (0.25, 0.6744897501960817),
    (0.2, 0.8416212335729143),
    (0.15, 1.0364333894937898),
    (0.12, 1.1749867920660904),
    (0.1, 1.2815515655446008),
    (0.08, 1.4050715603096329),
    (0.06, 1.5547735945968535),
    (0.05, 1.6448536269514722),
    (0.04, 1.75068607125217),
    (0.03, 1.8807936081512509),
    (0.02, 2.053748910631823),
)
_COUNTING_PART = (0.09 * 16) ** 2 * 255 / 16  # the weighted square of the least residual (.09 deviations) that counts
_EXCESS_FLOOR = 48.0  # Q8 of the log score: a tail no steeper than that of a dozen normal residuals
_LEAST_IN_KNOT = const(8)
REACH_CODES = const(5)
_REACH_SLACK = const(2)


class FitError(StonechatError):
    """The windows given can't be trained on."""


# ----------------------------------------------------------------------------------------------------- order statistics


def quantile(ordered, share):
    """ordered: numbers, rising -> the value below which `share` of them lie, between two neighbours in proportion."""
    at = (len(ordered) - 1) * share
    low = int(at)
    part = at - low
    if low + 1 >= len(ordered):
        return float(ordered[-1])
    a, b = ordered[low], ordered[low + 1]
    return b - (b - a) * (1 - part) if part >= 0.5 else a + (b - a) * part


def centre_and_deviation(values):
    """values: one feature's f_q8 -> (centre_q8, deviation_q8).

    The centre is the point about which deviations clipped at one balance (Huber's location), because that is where
    the device's own drift comes to rest. The deviation is what the middle of the distribution says, or a share of the
    standard deviation where that is more (rare bursts), over a floor."""
    ordered = sorted(values)
    count = len(ordered)
    median = quantile(ordered, 0.5)
    away = sorted([abs(value - median) for value in ordered])
    mean = sum(ordered) / count
    spread = sqrt(sum([(value - mean) ** 2 for value in ordered]) / count)
    filled = sum([value > 0 for value in ordered])
    deviation = max(
        _SD_SHARE * spread,
        1.4826 * quantile(away, 0.5),
        (quantile(ordered, 0.95) - quantile(ordered, 0.05)) / 3.29,
        _SPARSE_FLOOR_Q8 if filled < _SPARSE_SHARE * count else _DEVIATION_FLOOR_Q8,
    )
    sums = [0]
    for value in ordered:
        sums.append(sums[-1] + value)
    centre = median
    for _ in range(_HUBER_ROUNDS):
        low, high = _below(ordered, centre - deviation), _below(ordered, centre + deviation)
        inside = (sums[high] - sums[low] - (high - low) * centre) / deviation
        centre += deviation * (inside + (count - high) - low) / count
    return int(centre + 0.5), deviation


def _below(ordered, value):
    """-> how many of the rising numbers are below value."""
    low, high = 0, len(ordered)
    while low < high:
        middle = (low + high) >> 1
        if ordered[middle] < value:
            low = middle + 1
        else:
            high = middle
    return low


# ---------------------------------------------------------------------------------------------------- calibration table


def table(scores, n):
    """scores: log scores of benign windows, one rising list a segment; n: outputs of the network (0: scores of another
    measure, without a floor) -> (knots, tail_q8): surprise = -log10 of the share above.

    Each knot is the highest that any segment has at its probability, and at least what residuals of .09 deviations
    would give, so that a counter which never moved does not make the first ripple a catastrophe. Beyond the last knot
    there is an exponential tail with the longest mean excess seen."""
    longest = max([len(part) for part in scores])
    usable = [knot for knot in _KNOTS if knot[0] * longest >= _LEAST_IN_KNOT] or [_KNOTS[0], _KNOTS[4]]
    curve = [max(upper(scores, p), _floor(normal, n)) for p, normal in usable]
    knots: list = []
    for i in range(len(usable)):
        score = int(curve[i])
        if not knots or score > knots[-1][0]:  # tied scores are as usual as the most usual of them
            knots.append((score, round(-256 * log10(usable[i][0]))))
    if len(knots) < 2:
        knots.append((knots[-1][0] + 64, knots[-1][1] + 77))
    last = usable[-1][0]
    excess = [_EXCESS_FLOOR, (curve[-1] - _at_a_tenth(usable, curve)) / log(0.1 / last) if last != 0.1 else 0.0]
    for part in scores:
        line = quantile(part, 1 - last)
        above = [score - line for score in part if score > line]
        if above:
            excess.append(sum(above) / len(above))
    return tuple(knots), min(0x7FFF, round(256 * 256 / (max(excess) * log(10))))


def upper(scores, p):
    """-> the highest score that any segment has at the upper probability p."""
    return max([quantile(part, 1 - p) for part in scores])


def _at_a_tenth(usable, curve):
    """The curve at p = .1, on the line between its knots."""
    for i in range(len(usable) - 1, 0, -1):
        if usable[i - 1][0] > 0.1:
            slope = (curve[i - 1] - curve[i]) / (usable[i - 1][0] - usable[i][0])
            return slope * (max(0.1, usable[i][0]) - usable[i][0]) + curve[i]
    return curve[0]


def _floor(normal, n):
    """The log score, at the upper probability whose normal quantile is given, of n normal residuals of the least
    deviation that counts: a chi-square quantile by Wilson and Hilferty."""
    if not n:
        return 0.0
    chi = n * (1 - 2 / (9 * n) + normal * sqrt(2 / (9 * n))) ** 3
    return 256 * log2(1 + _COUNTING_PART * chi)


def limit_code(farthest):
    """farthest: how far a feature went in benign windows, in 1/16 deviation -> the code of its limit (features.py):
    twice as far, rounded up to 8, 16, 32 ... deviations."""
    return min(max(ceil(log2(_REACH_SLACK * max(farthest, 1) / 64)), 1), REACH_CODES)


# -------------------------------------------------------------------------------------------------------------- network


def covariance(columns, out):
    """columns: one list of numbers a feature, about their centres -> out: the matrix of second moments, in rows; one
    row a step."""
    count = len(columns[0])
    out[:] = [[0.0] * len(columns) for _ in columns]
    for i in range(len(columns)):
        first = columns[i]
        for j in range(i + 1):
            out[i][j] = out[j][i] = dot(first, 0, count, columns[j]) / count
        yield


def shrinkage(matrix, columns):
    """-> the share of Ledoit and Wolf (2004), 0 to 1, by which a matrix of second moments is drawn towards the identity
    (times its mean variance); one column a step."""
    n, count = len(matrix), len(columns[0])
    mean = sum([matrix[i][i] for i in range(n)]) / n
    norm = sum([value * value for row in matrix for value in row])
    distance = norm - n * mean * mean
    squares = [0] * count
    for column in columns:
        for k in range(count):
            squares[k] += column[k] * column[k]
        yield
    fourth = sum([float(square) * square for square in squares])
    scatter = (fourth / count - norm) / count
    return min(1.0, max(0.0, scatter / distance)) if distance > 0 else 0.0


def eigen(matrix, vectors):
    """Jacobi's rotations on a symmetric matrix, in place, one row a step: afterwards its diagonal holds the
    eigenvalues, and row i of `vectors` the i-th eigenvector."""
    n = len(matrix)
    vectors[:] = [[float(i == j) for j in range(n)] for i in range(n)]
    size = sum([matrix[i][i] ** 2 for i in range(n)])
    for _ in range(_SWEEPS):
        if sum([matrix[i][j] ** 2 for i in range(n) for j in range(i)]) <= 1e-18 * size:
            return
        for p in range(n - 1):
            for q in range(p + 1, n):
                _rotate(matrix, vectors, p, q)
            yield


def _rotate(matrix, vectors, p, q):
    first, second = matrix[p], matrix[q]
    if abs(first[q]) < 1e-300:
        return
    theta = (second[q] - first[p]) / (2 * first[q])
    t = (1.0 if theta >= 0 else -1.0) / (abs(theta) + sqrt(theta * theta + 1))
    c = 1 / sqrt(t * t + 1)
    s = t * c
    pp, qq, pq = first[p], second[q], first[q]
    for row in matrix:
        a, b = row[p], row[q]
        row[p], row[q] = c * a - s * b, s * a + c * b
    for k in range(len(first)):
        first[k] = matrix[k][p]
        second[k] = matrix[k][q]
    first[p], second[q] = pp - t * pq, qq + t * pq
    first[q] = second[p] = 0.0
    a, b = vectors[p], vectors[q]
    for k in range(len(a)):
        u, v = a[k], b[k]
        a[k], b[k] = c * u - s * v, s * u + c * v


def autoencoder(matrix, vectors, units):
    """A decomposed covariance -> the best linear reconstruction through `units` latents of unit variance: (encoder, a
    row a latent; decoder, a row a feature).

    A component that is nearly one feature's own comes last: through it the network would only copy that feature, and
    be blind to it."""
    n = len(matrix)
    order = []
    for k in range(n):
        largest = max([value * value for value in vectors[k]])
        order.append((largest > _OWN_LATENT, -matrix[k][k], k))
    encoder: list = []
    decoder: list = [[] for _ in range(n)]
    for _, _, k in sorted(order)[:units]:
        vector = vectors[k]
        size = sqrt(max(matrix[k][k], 1e-3))
        encoder.append([value / size for value in vector])
        for i in range(n):
            decoder[i].append(vector[i] * size)
    return encoder, decoder


def solve(matrix, right):
    """matrix: symmetric and positive, in rows; right: one row of right-hand sides for each of its rows -> the solution,
    in rows. Both are used up (Gauss's elimination)."""
    size = len(matrix)
    for p in range(size):
        for q in range(p + 1, size):
            factor = matrix[q][p] / matrix[p][p]
            matrix[q] = [b - factor * a for a, b in zip(matrix[p], matrix[q])]
            right[q] = [b - factor * a for a, b in zip(right[p], right[q])]
    for p in range(size - 1, -1, -1):
        row = right[p]
        for q in range(p + 1, size):
            row = [a - matrix[p][q] * b for a, b in zip(row, right[q])]
        right[p] = [a / matrix[p][p] for a in row]
    return right


def quantized(row):
    """One output's weights -> (its int8 weights, their scale)."""
    scale = max(max([abs(weight) for weight in row]), 1e-6) / 127
    return [int(round(weight / scale)) for weight in row], scale
