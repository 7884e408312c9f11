"""The scorer: normalization, inference, detection and adaptation of one device behind one call a window.

    scorer = Scorer(load_model(data), schema, state)
    verdict = scorer.score(window.deltas, window.elapsed_ms)

A fresh device learns for the model's first N windows: the first half gives the offset of each feature's centre, the
second the location and scale of its log score under that offset. Until then the verdict has `learning` set and its
level stays normal. What was learned, the evidence and an unfinished learning survive a restart through the state."""

from array import array

from .adaptation import Adaptation
from .compat import const
from .detection import ALARM, WATCH, Detector, Verdict
from .errors import ModelError
from .features import Normalization

# A device's benign score may be up to four doublings over the model's, and counts as at most one below it: else the
# drift of an idle device would be a surprise. Its scale is between .94 and 1.1 of the model's, so that starts of one
# device differ by x.85 to x1.18 at most; where its own windows come near an alarm so, it is up to twice the model's.
# The margin is one and a half standard errors of the mean surprise of 64 benign windows.
_ABOVE_MAX_Q8 = const(1024)
_BELOW_MAX_Q8 = const(256)
_NEAR_LOW_Q8 = const(240)
_NEAR_HIGH_Q8 = const(282)
_MARGIN_Q8 = const(24)


class Scorer:
    """model: from load_model; schema: of the collector; state: State, or None to keep nothing.

    Raises ModelError where the model is not for this schema, carries no metadata, or its golden vectors give
    other bytes on this runtime."""

    def __init__(self, model, schema, state=None):
        meta = model.metadata
        if not meta:
            raise ModelError("no metadata")
        n = len(meta)
        if meta.schema_id != schema.id or not n == len(schema) == model.input_size == model.output_size:
            raise ModelError("model for schema %s, %d features" % (meta.schema_name, n))
        self.model = model
        self.meta = meta
        self.window_ms = meta.window_ms
        self.normalization = Normalization(schema, meta.normalization)
        self.adaptation = Adaptation(self.normalization, meta.drift_shift, meta.drift_cap)
        self.verdict = verdict = Verdict(n)
        self.detector = Detector(meta, verdict, self.normalization.excess)
        self._state = state
        self._f_q8 = [0] * n
        self._low_q8 = array("H", bytes(2 * n))  # while learning: f_q8 of the last window with x at its lower end
        self._x = bytearray(n)
        self.seen = 0  # windows learned from
        self._rows = bytearray()
        for x, y, score_q8 in meta.golden:
            if bytes(model.run(x)) != y or self.detector.score(x, y) != score_q8:
                raise ModelError("golden vector differs")
        meta.golden = ()  # verified; drop them to free 400 bytes
        if state:
            self._restore(state, meta.learn_windows >> 1)

    @property
    def learning(self):
        return self.seen < self.meta.learn_windows

    def score(self, deltas, elapsed_ms):
        """deltas: n ints of one window (Window.deltas), elapsed_ms: its length -> the Verdict (reused)."""
        x = self._x
        self.normalization.fill_q8(deltas, elapsed_ms, self.window_ms, self._f_q8)
        self.normalization.fill(self._f_q8, x)
        verdict = self.verdict
        surprise_q8 = self.detector.surprise(self.detector.score(x, self.model.run(x)))
        verdict.learning = self.learning
        if verdict.learning:
            self._learn(x, verdict.score_q8)
            verdict.surprise_q8 = surprise_q8
            verdict.changed = False
        else:
            self.detector.weigh(surprise_q8)
            self.adaptation.step(x, verdict.evidence_q8)
        return verdict

    def _learn(self, x, score_q8):
        half = self.meta.learn_windows >> 1
        if self.seen < half:
            self._rows.extend(x)
            for i in range(len(x)):
                if x[i] == 128:
                    self._low_q8[i] = self._f_q8[i]
        else:
            self._rows.extend(bytes((score_q8 >> 8, score_q8 & 255)))
        self.seen += 1
        if self.seen == half:
            self.adaptation.learn(self._rows, self._low_q8)
        elif not self.learning:
            self._fit_location_scale(self._rows)
        else:
            return
        self._rows = bytearray()

    def _fit_location_scale(self, rows):
        """The location is the device's own median. The scale is the model's, moved a quarter of the way to the device's
        own: that of half a hundred windows depends on luck (measured: x.74 to x1.84 of the median over twelve starts).
        The windows just learned from must not come near an alarm under them: where they do, the device's own scale is
        taken if it is wider. Where they alarm even so, because what is learned is bounded or something happened
        meanwhile, the model does not fit (yet), the verdict says so, and the learning begins again."""
        scores = [rows[i] << 8 | rows[i + 1] for i in range(0, len(rows), 2)]
        order = sorted(scores)
        location_q8 = order[len(order) >> 1]
        own_q8 = order[len(order) * 7 >> 3] - location_q8
        model_q8 = self.meta.location_q8
        detector = self.detector
        detector.location_q8 = max(model_q8 - _BELOW_MAX_Q8, min(location_q8, model_q8 + _ABOVE_MAX_Q8))
        model_q8 = self.meta.scale_q8
        scale_q8 = min(own_q8 + 3 * model_q8 >> 2, model_q8 * _NEAR_HIGH_Q8 >> 8)
        detector.scale_q8 = max(1, model_q8 * _NEAR_LOW_Q8 >> 8, scale_q8)
        self.verdict.unfit = False
        if self._reach(scores, WATCH):
            detector.scale_q8 = max(detector.scale_q8, min(own_q8, 2 * model_q8))
            if self._reach(scores, ALARM):
                self.verdict.unfit = True
                self.recalibrate()
        self.clear_evidence()

    def _reach(self, scores, level):
        """Whether these windows reach the level, or more like them would sooner or later: the evidence of a rule rises
        for ever where the surprise, capped, is above the allowance on average."""
        detector = self.detector
        self.clear_evidence()
        surprises = [detector.surprise(score_q8) for score_q8 in scores]
        for surprise_q8 in surprises:
            if detector.weigh(surprise_q8).level >= level:
                return True
        for allowance_q8, cap_q8, _ in self.meta.alarm_rules:
            if sum([min(q8, cap_q8) for q8 in surprises]) > len(surprises) * (allowance_q8 - _MARGIN_Q8):
                return True
        return False

    def recalibrate(self):
        """Start the learning again (an operator's command, a new firmware): what was learned is forgotten."""
        self.seen = 0
        self._rows = bytearray()
        self.adaptation.forget()
        detector = self.detector
        detector.location_q8 = self.meta.location_q8
        detector.scale_q8 = self.meta.scale_q8
        detector.clear_evidence()

    def clear_evidence(self):
        """Drop the evidence (an operator marked it as normal); keep what was learned."""
        self.detector.clear_evidence()

    def save(self):
        """Put what was learned into the state's sections; the caller saves the state."""
        detector = self.detector
        put = self._state.put  # pyright: ignore[reportOptionalMemberAccess]
        schema_id = self.meta.schema_id
        centred = self.seen >= self.meta.learn_windows >> 1
        put(b"norm" + schema_id, self.adaptation.dump() if centred else bytes(self._low_q8))
        numbers = [self.seen, detector.location_q8, detector.scale_q8, self.verdict.level | self.verdict.unfit << 8]
        put(b"cal" + schema_id, self.model.digest + bytes(array("i", numbers + detector.evidence)) + self._rows)

    def _restore(self, state, half):
        detector = self.detector
        schema_id = self.meta.schema_id
        kept = state.get(b"norm" + schema_id, b"")
        centred = self.adaptation.restore(kept)
        if kept and not centred:
            self._low_q8 = array("H", kept)
        kept = state.get(b"cal" + schema_id, b"")
        size = 24 + 4 * len(detector.evidence)
        if len(kept) >= size and kept[:8] == self.model.digest:
            numbers = list(array("i", kept[8:size]))
            if centred or numbers[0] < half:
                self.seen, detector.location_q8, detector.scale_q8, level = numbers[:4]
                self.verdict.level = level & 3
                self.verdict.unfit = level > 3
                detector.evidence = numbers[4:]
                self._rows = bytearray(kept[size:])
        elif centred:  # another model of the same schema learned the centres: only the score's location is left
            self.seen = half
