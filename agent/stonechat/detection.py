"""Residual -> score -> surprise -> evidence -> level, in integers.

    residual   r = x - y where the model reconstructs, r = y where it gives the residual itself; 16 steps a deviation,
               plus the excess over the feature's benign limit (features.py)
    score      256 * log2(1 + sum of weight * r^2): a doubling of the squared residual is one step of 256
    surprise   -log10 of how often a benign window scores as high: the calibration table, and beyond its last knot a
               straight line in the log score (an exponential tail of the log score, a Pareto tail of the score)
    evidence   for each alarm rule, E += min(surprise, cap) - allowance, never below 0 nor above 1.5 thresholds
               (a one-sided CUSUM; Page 1954)
    level      alarm where the evidence of a rule reaches its threshold, watch from half of it, normal again below a
               quarter

The cap keeps the false-alarm budget: benign bursts look like attacks for minutes, and with a cap no rule alarms before
threshold / (cap - allowance) windows in a row, however loud one of them was. Several alarm rules run in parallel: a
small cap detects long faint changes, a large allowance detects loud ones.
"""

from .compat import const
from .features import log2_q8

NORMAL = const(0)
WATCH = const(1)
ALARM = const(2)

_ALARM_Q8 = const(256)  # evidence_q8 of a verdict is in thresholds: 256 is an alarm
_WATCH_Q8 = const(128)
_CLEAR_Q8 = const(64)
_SURPRISE_MAX_Q8 = const(4096)  # 10^-16: beyond it the number means nothing
_RESIDUAL = const(1)  # model_file.RESIDUAL


class Verdict:
    """One window's result; one object, filled anew each window.

    score_q8, surprise_q8 (-log10 p), evidence_q8 (256: the threshold), level, changed (the level is another than a
    window ago), learning (calibrating: it can't alarm yet), unfit (the model did not fit what was learned, which is
    learned again), steady (changed for an hour, and constant: the level is that of what is new on top; steady.py)."""

    steady: bool  # absent where the scorer does not know the state

    def __init__(self, n: int) -> None:
        self.score_q8 = 0
        self.surprise_q8 = 0
        self.evidence_q8 = 0
        self.level = NORMAL
        self.changed = False
        self.learning = False
        self.unfit = False
        self.parts = [0] * n  # what each feature carries (see explain)
        self.x = bytearray(n)  # the input the parts belong to, int8

    def explain(self, k=3):
        """The k features that carry the score -> list of (feature index, z_q4, share_percent), greatest first.

        A feature's part is root(weight) * |residual * z|: unusual for the network and unusual by itself; half of it
        where the two have different signs, as for features that only follow an unusual one. z_q4: distance of the
        feature itself from its benign centre, signed, 16 a deviation. Shares are rounded so that those of all features
        add up to 100; where nothing is unusual the list is empty."""
        parts = self.parts
        total = sum(parts)
        out: list = []
        given = so_far = 0
        while total and len(out) < min(k, len(parts)):
            part = max(parts)  # the first of them, where several are as great
            i = parts.index(part)
            parts[i] = ~part  # below 0: out of the way of the next
            so_far += part
            upto = (200 * so_far + total) // (2 * total)
            z = self.x[i]
            out.append((i, z - 256 if z > 127 else z, upto - given))
            given = upto
        for i, _, _ in out:
            parts[i] = ~parts[i]
        return out


class Detector:
    """meta: Metadata with the table and the alarm rules; verdict: the Verdict to fill; excess: that of the
    Normalization, which fills it (None: no excess).

    `location_q8` and `scale_q8` are this device's own location and scale of the log score (the model's until learned);
    `evidence` holds one sum per alarm rule, in surprise Q8."""

    def __init__(self, meta, verdict, excess=None):
        self.meta = meta
        self._excess = excess or [0] * len(verdict.parts)
        self._weights = meta.weights or b"\x10" * len(verdict.parts)  # 16 is 1
        self._roots = bytes([_root(weight << 8) for weight in self._weights])
        self.location_q8 = meta.location_q8
        self.scale_q8 = meta.scale_q8
        self.evidence = [0] * len(meta.alarm_rules)
        self.verdict = verdict

    def score(self, x, y):
        """x, y: the model's input and output, n bytes each -> score_q8; keeps x and the parts for `explain`."""
        verdict = self.verdict
        parts = verdict.parts
        rebuilds = self.meta.kind != _RESIDUAL
        verdict.x[:] = x
        total = 0
        for i in range(len(parts)):
            z = x[i]
            if z > 127:
                z -= 256
            r = y[i]
            if r > 127:
                r -= 256
            if rebuilds:
                r = z - r
            r += self._excess[i]
            total += r * r * self._weights[i] >> 4
            part = r * z * self._roots[i] >> 6
            parts[i] = part if part > 0 else -part >> 1
        verdict.score_q8 = score_q8 = log2_q8(1 + total)
        return score_q8

    def surprise(self, score_q8):
        """score_q8 -> -log10 p in Q8, through this device's location and scale and the model's table."""
        meta = self.meta
        s = (score_q8 - self.location_q8) * meta.scale_q8 // self.scale_q8 + meta.location_q8
        low, value = meta.knots[0]
        s = max(s, low)
        for knot in meta.knots:
            if s < knot[0]:
                return value + (s - low) * (knot[1] - value) // (knot[0] - low)
            low, value = knot
        return min(value + ((s - low) * meta.tail_q8 >> 8), _SURPRISE_MAX_Q8)

    def weigh(self, surprise_q8):
        """Add one window's surprise to the evidence and set the level; fills and returns the verdict."""
        share_q8 = 0
        for i in range(len(self.evidence)):
            allowance_q8, cap_q8, threshold_q8 = self.meta.alarm_rules[i]
            e = self.evidence[i] + min(surprise_q8, cap_q8) - allowance_q8
            self.evidence[i] = e = max(0, min(e, threshold_q8 + (threshold_q8 >> 1)))
            share_q8 = max(share_q8, (e << 8) // threshold_q8)
        self.verdict.surprise_q8 = surprise_q8
        return self._hysteresis(share_q8)

    def _hysteresis(self, share_q8):
        verdict = self.verdict
        level = verdict.level
        if share_q8 >= _ALARM_Q8:
            level = ALARM
        elif share_q8 < _CLEAR_Q8:
            level = NORMAL
        elif share_q8 >= _WATCH_Q8 and level == NORMAL:
            level = WATCH
        verdict.evidence_q8 = share_q8
        verdict.changed = level != verdict.level
        verdict.level = level
        return verdict

    def clear_evidence(self):
        """Drop all evidence: an operator has marked it as normal, or calibration begins."""
        self.evidence[:] = [0] * len(self.evidence)
        self._hysteresis(0)


def _root(square):
    """The whole square root, by integers: boards have floats of 32 bits."""
    root = 0
    while (root + 1) * (root + 1) <= square:
        root += 1
    return root
