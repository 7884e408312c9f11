"""Residual -> score -> surprise -> evidence -> level, in integers.

    residual   r = x - y where the model reconstructs, r = y where it gives the residual itself; 16 steps a deviation,
               and on top what lies beyond the feature's reach (features.py)
    score      256 * log2(1 + sum of weight * r^2): a doubling of the squared residual is one step of 256
    surprise   -log10 of how often a benign window scores as high: the table, and beyond its last knot a straight line
               in the log score (an exponential tail of the log score, a Pareto tail of the score)
    evidence   one or more charts E += min(surprise, cap) - k, never below 0 nor above 1.5 alarms (CUSUM; Page 1954)
    level      alarm where a chart reaches its alarm line, watch from half of it, back to normal below a quarter

The cap is what keeps a false-alarm budget: benign bursts look like attacks for minutes, and with a cap no chart
alarms before alarm / (cap - k) windows in a row, however loud one of them was. Several charts side by side answer
loud and long, because a patient chart has a small cap and an eager one a large k.
"""

from .compat import const
from .features import log2_q8
from .metadata import RECONSTRUCTION

NORMAL = const(0)
WATCH = const(1)
ALARM = const(2)

ALARM_Q8 = const(256)  # evidence_q8 of a verdict is in alarm lines: 256 is an alarm
_WATCH_Q8 = const(128)
_CLEAR_Q8 = const(64)
_CEILING_Q8 = const(384)
SURPRISE_MAX_Q8 = const(4096)  # 10^-16: beyond it the number says nothing
WEIGHT_ONE = const(16)


class Verdict:
    """One window's result; one object, filled anew each window.

    score_q8, surprise_q8 (-log10 p), evidence_q8 (256: the alarm line), level, changed (the level is another than a
    window ago), learning (calibrating: it can't alarm yet)."""

    def __init__(self, n: int) -> None:
        self.score_q8 = 0
        self.surprise_q8 = 0
        self.evidence_q8 = 0
        self.level = NORMAL
        self.changed = False
        self.learning = False
        self.parts = [0] * n  # what each feature carries (see explain)
        self.x = bytearray(n)  # the input the parts belong to, int8

    def explain(self, k=3):
        """The k features that carry the score -> list of (feature index, z_q4, share_percent), greatest first.

        A feature's part is root(weight) * |residual * z|: strange to the network and strange by itself; half of it
        where the two point different ways, for so do the features that a strange one drags along. z_q4: how
        far the feature itself lies from its benign centre, signed, 16 a deviation. Shares are rounded so that those
        of all features add up to 100; where nothing stands out the list is empty."""
        parts = self.parts
        total = sum(parts)
        if not total:
            return []
        order = sorted(range(len(parts)), key=self._rank)
        out = []
        told = 0
        so_far = 0
        for i in order[:k]:
            so_far += parts[i]
            upto = (200 * so_far + total) // (2 * total)
            z = self.x[i]
            out.append((i, z - 256 if z > 127 else z, upto - told))
            told = upto
        return out

    def _rank(self, i):
        return (-self.parts[i], i)


class Detector:
    """meta: Metadata with the table and the rungs; verdict: the Verdict to fill; beyond: of the Normalization, which
    fills it (None: nothing ever lies beyond).

    `place_q8` and `spread_q8` are this device's own location and spread of the log score (the model's until learned);
    `evidence` holds one chart per rung, in surprise Q8."""

    def __init__(self, meta, verdict, beyond=None):
        self._beyond = beyond or [0] * len(verdict.parts)
        self._rebuilds = meta.kind == RECONSTRUCTION
        self._weights = meta.weights or bytes([WEIGHT_ONE]) * len(verdict.parts)
        self._roots = bytes([_root(weight << 8) for weight in self._weights])
        self._knots = meta.knots
        self._tail_q8 = meta.tail_q8
        self._table_place_q8 = meta.place_q8
        self._table_spread_q8 = meta.spread_q8
        self.place_q8 = meta.place_q8
        self.spread_q8 = meta.spread_q8
        self.rungs = meta.rungs
        self.evidence = [0] * len(meta.rungs)
        self.verdict = verdict

    def score(self, x, y):
        """x, y: the model's input and output, n bytes each -> score_q8; keeps x and the parts for `explain`."""
        parts = self.verdict.parts
        weights = self._weights
        roots = self._roots
        self.verdict.x[:] = x
        total = 0
        for i in range(len(parts)):
            z = x[i]
            if z > 127:
                z -= 256
            r = y[i]
            if r > 127:
                r -= 256
            if self._rebuilds:
                r = z - r
            r += self._beyond[i]
            total += r * r * weights[i] >> 4
            part = r * z * roots[i] >> 6
            parts[i] = part if part > 0 else -part >> 1
        self.verdict.score_q8 = log2_q8(1 + total)
        return self.verdict.score_q8

    def surprise(self, score_q8):
        """score_q8 -> -log10 p in Q8, through this device's place and spread and the model's table."""
        s = (score_q8 - self.place_q8) * self._table_spread_q8 // self.spread_q8 + self._table_place_q8
        knots = self._knots
        if s >= knots[-1][0]:
            high = knots[-1][1] + ((s - knots[-1][0]) * self._tail_q8 >> 8)
            return high if high < SURPRISE_MAX_Q8 else SURPRISE_MAX_Q8
        below = knots[0]
        if s <= below[0]:
            return below[1]
        for knot in knots:
            if s < knot[0]:
                break
            below = knot
        return below[1] + (s - below[0]) * (knot[1] - below[1]) // (knot[0] - below[0])

    def weigh(self, surprise_q8):
        """Add one window's surprise to the charts and settle the level; fills and returns the verdict."""
        share_q8 = 0
        for i, (k_q8, cap_q8, alarm_q8) in enumerate(self.rungs):
            e = self.evidence[i] + (surprise_q8 if surprise_q8 < cap_q8 else cap_q8) - k_q8
            ceiling_q8 = alarm_q8 + (alarm_q8 >> 1)
            e = 0 if e < 0 else e if e < ceiling_q8 else ceiling_q8
            self.evidence[i] = e
            share_q8 = max(share_q8, (e << 8) // alarm_q8)
        verdict = self.verdict
        level = verdict.level
        if share_q8 >= ALARM_Q8:
            level = ALARM
        elif share_q8 < _CLEAR_Q8:
            level = NORMAL
        elif share_q8 >= _WATCH_Q8 and level == NORMAL:
            level = WATCH
        verdict.surprise_q8 = surprise_q8
        verdict.evidence_q8 = share_q8
        verdict.changed = level != verdict.level
        verdict.level = level
        return verdict

    def forgive(self):
        """Drop all evidence: an operator says that this was normal, or calibration begins."""
        for i in range(len(self.evidence)):
            self.evidence[i] = 0
        verdict = self.verdict
        verdict.evidence_q8 = 0
        verdict.changed = verdict.level != NORMAL
        verdict.level = NORMAL


def _root(square):
    """The whole square root, by integers: boards have floats of 32 bits."""
    root = 0
    while (root + 1) * (root + 1) <= square:
        root += 1
    return root
