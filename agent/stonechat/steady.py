"""An alarm that never ends becomes a state of its own: changed, and steady.

    alarm      for _COLLECT windows the features are collected: their medians are a second reference, for those that lie
               far off; the fewer are moved, the better it lasts
    on trial   every window is scored against it, while the alarm goes on. Where the second evidence comes to half of a
               threshold, the level is not constant, or the explanation not the same: collected anew
    steady     after an hour of that, and not before the 64th window. The level is the second evidence's: what is new on
               top of the change. A window counts by the lesser of both surprises, so that the old normal is normal too

The first reference and its evidence live on. When that evidence has gone, the device is back where it was and the state
ends; otherwise an operator ends it: "was normal" takes the second reference over, within the bounds of learning,
"calibrate" starts the learning again. Until then reports and status say it, and no peer becomes known. Nothing moves
silently: each new level takes an alarm of an hour, and a second one on top as much again."""

from array import array

from .compat import const
from .detection import ALARM, WATCH, Detector, Verdict
from .loop import Channel
from .scorer import Scorer

_COLLECT = const(24)
_FAR_STEPS = const(40)  # 2.5 deviations, and half a deviation less with each trial that fails,
_LEAST_STEPS = const(16)
_THRESHOLD_Q8 = const(256)  # evidence of a threshold
_STATED_LEAST = const(64)
_HOUR_MS = const(3_600_000)
_HELD_FROM_Q8 = const(128)  # as in adaptation.py


class SteadyScorer(Scorer):
    """A Scorer whose verdict has `steady` set while what it watches is changed and steady; `age`: for how many windows
    the alarm, and what follows it, has lasted."""

    _alarmed: int  # windows for which what is new on top has alarmed
    _tries: int  # trials that failed in this alarm

    def __init__(self, model, schema, state=None):
        Scorer.__init__(self, model, schema, state)
        meta = self.meta
        n = len(meta)
        self._stated = max(_STATED_LEAST, _HOUR_MS // meta.window_ms)
        self._on_top = Detector(meta, Verdict(n), self.normalization.excess)
        self._collected = array("h")
        self._moved_q8 = [0] * n
        self._forget()
        if state:
            self._restore_second(state.get(b"new" + meta.schema_id, b""))

    @property
    def steady(self):
        return self.age > self._stated

    def score(self, deltas, elapsed_ms):
        verdict = Scorer.score(self, deltas, elapsed_ms)
        verdict.steady = False
        if verdict.evidence_q8 == 0 if self.steady else verdict.level < ALARM:
            if self.steady:  # it is back where it was
                verdict.changed = self._on_top.verdict.level != verdict.level
            if self.age or self._tries:
                self._forget()
            return verdict
        if self.age < _COLLECT:
            self._collected.extend(array("h", self._f_q8))
        else:
            if self.age == _COLLECT:
                self._move()
            self._score_second(verdict)
            if not self.steady and self._on_top.verdict.level >= WATCH:
                tries = self._tries + 1
                self._forget()
                self._tries = tries
                return verdict
        self.age += 1
        if not self.steady:
            return verdict
        on_top = self._on_top.verdict
        if self.age == self._stated + 1:
            on_top.changed = True
        self._alarmed = self._alarmed + 1 if on_top.evidence_q8 >= _THRESHOLD_Q8 else 0
        if self._alarmed > self._stated:  # it has changed once more: the first reference's alarm again
            self._forget()
            return verdict
        return on_top

    def _move(self):
        """The second reference: the medians of what was collected, where they lie far off."""
        rows = self._collected
        n = len(self._moved_q8)
        norm = self.normalization
        far_steps = max(_LEAST_STEPS, _FAR_STEPS - 8 * self._tries)
        for i in range(n):
            column = sorted([rows[j] for j in range(i, len(rows), n)])
            moved_q8 = column[len(column) >> 1] - norm.centre_q8[i] - norm.offset_q8[i]
            far = abs(moved_q8) * norm.inv[i] >> norm.shift[i] > far_steps
            self._moved_q8[i] = moved_q8 if far else 0
        self._collected = array("h")

    def _score_second(self, verdict):
        on_top = self._on_top
        norm = self.normalization
        x = self._x
        for i in range(len(x)):
            norm.offset_q8[i] += self._moved_q8[i]
        norm.fill(self._f_q8, x)
        for i in range(len(x)):
            norm.offset_q8[i] -= self._moved_q8[i]
        on_top.location_q8 = self.detector.location_q8
        on_top.scale_q8 = self.detector.scale_q8
        surprise_q8 = on_top.surprise(on_top.score(x, self.model.run(x)))
        if self.steady:
            surprise_q8 = min(surprise_q8, verdict.surprise_q8)
        on_top.weigh(surprise_q8)
        if self.steady and verdict.evidence_q8 >= _HELD_FROM_Q8:  # else the drift follows the first reference
            self.adaptation.step(x, on_top.verdict.evidence_q8)

    def _forget(self):
        self.age = 0
        self._alarmed = 0
        self._tries = 0
        self._collected = array("h")
        self._on_top.clear_evidence()
        self._on_top.verdict.steady = True  # it is returned in this state only

    def recalibrate(self):
        self._forget()
        Scorer.recalibrate(self)

    def clear_evidence(self):
        """An operator says that it was normal: a steady change is taken over, within the bounds of learning."""
        if self.age:
            if self.steady:
                kept = array("i", self.adaptation.dump())
                for i in range(len(self._moved_q8)):
                    kept[i] += self._moved_q8[i]
                self.adaptation.restore(bytes(kept))
            self._forget()
        Scorer.clear_evidence(self)

    def save(self):
        Scorer.save(self)
        on_top = self._on_top
        kept = b""
        if self.age > _COLLECT:
            numbers = [self.age, self._alarmed, on_top.verdict.level] + on_top.evidence
            kept = self.model.digest + bytes(array("i", numbers + self._moved_q8))
        state = self._state
        section = b"new" + self.meta.schema_id
        if kept or state.get(section):  # pyright: ignore[reportOptionalMemberAccess]
            state.put(section, kept)  # pyright: ignore[reportOptionalMemberAccess]

    def _restore_second(self, kept):
        on_top = self._on_top
        rules = len(on_top.evidence)
        if len(kept) == 8 + 4 * (3 + rules + len(self._moved_q8)) and kept[:8] == self.model.digest:
            numbers = list(array("i", kept[8:]))
            self.age, self._alarmed = numbers[:2]
            on_top.verdict.level = numbers[2] & 3
            on_top.evidence = numbers[3 : 3 + rules]
            self._moved_q8 = numbers[3 + rules :]


class SteadyChannel(Channel):
    """A channel whose scorer knows when a change is steady."""

    _scorer_type = SteadyScorer
    scorer: SteadyScorer
