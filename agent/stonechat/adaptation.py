"""Bounded learning on the device: where its own baseline is.

Two parts, both visible in the status and both bounded, so that nobody can move the baseline far:

    learned   the offset of each feature's centre, taken once from the first windows of a fresh device: at most 4
              deviations up, down to where the feature is 0 (an idle device is as normal as a busy one); a restart keeps
              it, an operator's command or a new firmware starts it again. Where that does not make the device's own
              windows normal, the model does not fit, and the verdict says so (scorer.py)
    drift     a slow movement of the centre after that: clip(z, 1 deviation) / 2^drift_shift a window, at most drift_cap
              steps (1/16 deviation) away from what was learned, and none under suspicion (evidence of half the
              threshold)

The location of the score is never tracked: the shift of a quiet attack is the signal (measured: tracking it hid two of
eight attacks). A change beyond the bound alarms, however slowly it came; one that stays inside it is not detected.
"""

from array import array

from .compat import const

_LEARNED_MAX_STEPS = const(64)  # 4 deviations
_CLIP_STEPS = const(16)  # one deviation
_HUBER_ROUNDS = const(6)
_FROZEN_FROM_Q8 = const(128)  # evidence from which the drift stops: the level `watch`


class Adaptation:
    """normalization: the Normalization whose offset_q8 this owns; drift_shift, drift_cap: from the metadata."""

    def __init__(self, normalization, drift_shift: int, drift_cap: int) -> None:
        n = len(normalization.inv)
        self._normalization = normalization
        self._shift = drift_shift
        self._bound = drift_cap << drift_shift
        self._deviation_q8 = [max(1, (16 << normalization.shift[i]) // normalization.inv[i]) for i in range(n)]
        self.forget()

    def forget(self):
        """Back to the model's own centres."""
        n = len(self._deviation_q8)
        self.learned_q8 = [0] * n
        self.drift = [0] * n  # in steps / 2^drift_shift
        self._apply()

    def learn(self, rows: bytes | bytearray, low_q8) -> None:
        """rows: the inputs x of the learning windows, one after the other, made with no offset; low_q8: for each
        feature, what it was where x was at its lower end -> the learned offset: each feature's Huber location (a median
        moved to the point where clipped deviations balance, where the drift would carry it)."""
        self.forget()
        n = len(self.drift)
        for i in range(n):
            column = [rows[j] - 256 if rows[j] > 127 else rows[j] for j in range(i, len(rows), n)]
            column.sort()
            centre_q4 = column[len(column) >> 1] << 4
            if centre_q4 == -2048:
                self._learn(i, low_q8[i] - self._normalization.centre_q8[i])
                continue
            for _ in range(_HUBER_ROUNDS):
                pull = 0
                for x in column:
                    pull += _clip((x << 4) - centre_q4, 256)
                centre_q4 += pull // len(column)
            self._learn(i, (centre_q4 * self._deviation_q8[i] + 128) >> 8)
        self._apply()

    def _learn(self, i, offset_q8):
        """Up to the bound above the model's centre; down to where the feature is 0: a device that does less than the
        model's is no less normal, and hides nothing by it."""
        bound = _LEARNED_MAX_STEPS * self._deviation_q8[i] >> 4
        self.learned_q8[i] = max(-self._normalization.centre_q8[i], min(offset_q8, bound))

    def step(self, x, evidence_q8):
        """x: the window's input; evidence_q8 after it. Moves the drift, unless there is suspicion."""
        if evidence_q8 < _FROZEN_FROM_Q8:
            drift = self.drift
            for i in range(len(drift)):
                z = x[i]
                if z > 127:
                    z -= 256
                drift[i] = _clip(drift[i] + _clip(z, _CLIP_STEPS), self._bound)
            self._apply()

    def _apply(self):
        offset_q8 = self._normalization.offset_q8
        shift = self._shift + 4
        for i in range(len(offset_q8)):
            offset_q8[i] = self.learned_q8[i] + (self.drift[i] * self._deviation_q8[i] + (1 << shift - 1) >> shift)

    def dump(self):
        """-> what the state keeps, bytes: the learned centres (absolute, Q8, so that a later model of the same schema
        finds them) and the drift, 32 bits each."""
        centre_q8 = self._normalization.centre_q8
        return bytes(array("i", [centre_q8[i] + self.learned_q8[i] for i in range(len(centre_q8))] + self.drift))

    def restore(self, packed):
        """packed: what dump() gave -> True, or False where it is not for this schema (then nothing changes)."""
        n = len(self.drift)
        if len(packed) != 8 * n:
            return False
        kept = array("i", packed)
        for i in range(n):
            self._learn(i, kept[i] - self._normalization.centre_q8[i])
            self.drift[i] = _clip(kept[n + i], self._bound)
        self._apply()
        return True

    def distance(self):
        """-> the greatest learned offset, in steps of 1/16 deviation."""
        learned = 0
        for i in range(len(self.drift)):
            learned = max(learned, abs(self.learned_q8[i]) * 16 // self._deviation_q8[i])
        return learned


def _clip(value, bound):
    return bound if value > bound else -bound if value < -bound else value
