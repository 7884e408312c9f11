"""A model at work on one device: normalization, network, detection and adaptation behind one call a window.

    head = Head(load_model(data), schema, state)
    verdict = head.score(window.deltas, window.elapsed_ms)

A fresh device learns for the model's first N windows: the first half gives the offset of each feature's centre, the
second the place and spread of its log score under that offset. Until then the verdict says `learning` and its level
stays normal. What was learned, the evidence and a learning half done survive a restart through the state.
"""

from array import array

from .adaptation import Adaptation
from .compat import const
from .detection import NORMAL, Detector, Verdict
from .errors import ModelError
from .features import Normalization

_PLACE_MAX_Q8 = const(1024)  # a device's benign score may lie four doublings over the model's, no further
_SPREAD_LOW_Q8 = const(205)  # and its spread between .8 ...
_SPREAD_HIGH_Q8 = const(512)  # ... and twice the model's


class Head:
    """model: from load_model; schema: of the collector; state: State, or None to keep nothing.

    Raises ModelError where the model is not for this schema, carries no metadata, or its golden vectors do not come
    out bit for bit on this runtime."""

    def __init__(self, model, schema, state=None):
        meta = model.metadata
        if meta is None:
            raise ModelError("the model carries no stonechat metadata: make it with `stonechat train`")
        if meta.schema_id != schema.id or len(meta) != len(schema):
            raise ModelError(
                "the model is for schema %s of %d features, this device gives %s of %d"
                % (meta.schema_name, len(meta), schema.name, len(schema))
            )
        if model.input_size != len(meta) or model.output_size != len(meta):
            raise ModelError(
                "the network is %d to %d, its metadata %d" % (model.input_size, model.output_size, len(meta))
            )
        self.model = model
        self.meta = meta
        self.window_ms = meta.window_ms
        self.normalization = Normalization(schema, meta.normalization)
        self.adaptation = Adaptation(self.normalization, meta.drift_shift, meta.drift_cap)
        self.verdict = Verdict(len(meta))
        self.detector = Detector(meta, self.verdict, self.normalization.beyond)
        self._state = state
        self._norm_section = b"norm" + schema.id
        self._cal_section = b"cal" + model.digest
        self._f_q8 = [0] * len(meta)
        self._x = bytearray(len(meta))
        self._seen = 0
        self._rows = bytearray()
        self.self_test()
        self._restore()

    def self_test(self):
        """Run the golden vectors. Raises ModelError at the first byte that differs."""
        for x, y, score_q8 in self.meta.golden:
            got = bytes(self.model.run(x))
            if got != y:
                raise ModelError("golden vector: the network gives other bytes on this runtime")
            if self.detector.score(x, got) != score_q8:
                raise ModelError("golden vector: score %d, want %d" % (self.verdict.score_q8, score_q8))

    @property
    def learning(self):
        return self._seen < self.meta.learn_windows

    @property
    def progress_percent(self):
        """How far the learning is; 100 where nothing is left to learn."""
        return self._seen * 100 // self.meta.learn_windows if self.learning else 100

    def score(self, deltas, elapsed_ms):
        """deltas: n ints of one window (Window.deltas), elapsed_ms: its length -> the Verdict (reused)."""
        self.normalization.fill_q8(deltas, elapsed_ms, self.window_ms, self._f_q8)
        return self.score_q8(self._f_q8)

    def score_q8(self, f_q8):
        """f_q8: n features as Normalization.fill_q8 gives them -> the Verdict (reused)."""
        self.normalization.fill(f_q8, self._x)
        detector = self.detector
        surprise_q8 = detector.surprise(detector.score(self._x, self.model.run(self._x)))
        verdict = self.verdict
        verdict.learning = self.learning
        if verdict.learning:
            verdict.surprise_q8 = surprise_q8
            verdict.changed = False
            self._learn()
            return verdict
        detector.weigh(surprise_q8)
        self.adaptation.step(self._x, verdict.evidence_q8)
        return verdict

    def _learn(self):
        half = self.meta.learn_windows >> 1
        if self._seen < half:
            self._rows.extend(self._x)
        else:
            score_q8 = self.verdict.score_q8
            self._rows.extend(bytes((score_q8 >> 8, score_q8 & 255)))
        self._seen += 1
        if self._seen == half:
            self.adaptation.learn(self._rows)
            self._rows = bytearray()
        elif self._seen == self.meta.learn_windows:
            self._settle()
            self._rows = bytearray()

    def _settle(self):
        rows = self._rows
        scores = sorted([rows[i] << 8 | rows[i + 1] for i in range(0, len(rows), 2)])
        meta = self.meta
        place_q8 = scores[len(scores) >> 1]
        spread_q8 = scores[len(scores) * 7 >> 3] - place_q8
        self.detector.place_q8 = min(place_q8, meta.place_q8 + _PLACE_MAX_Q8)
        low = meta.spread_q8 * _SPREAD_LOW_Q8 >> 8
        high = meta.spread_q8 * _SPREAD_HIGH_Q8 >> 8
        self.detector.spread_q8 = max(1, low, min(spread_q8, high))

    def relearn(self):
        """Begin the learning anew (an operator's command, a new firmware): what was learned is forgotten."""
        self._seen = 0
        self._rows = bytearray()
        self.adaptation.forget()
        self.detector.place_q8 = self.meta.place_q8
        self.detector.spread_q8 = self.meta.spread_q8
        self.detector.forgive()

    def forgive(self):
        """An operator says that this was normal: drop the evidence, keep what was learned."""
        self.detector.forgive()

    def save(self):
        """Put what was learned into the state's sections; the caller saves the state."""
        if self._state is None:
            return
        detector = self.detector
        centred = self._seen >= self.meta.learn_windows >> 1
        self._state.put(self._norm_section, self.adaptation.dump() if centred else b"")
        kept = array("i", [self._seen, detector.place_q8, detector.spread_q8, self.verdict.level] + detector.evidence)
        self._state.put(self._cal_section, bytes(kept) + self._rows)

    def _restore(self):
        if self._state is None:
            return
        half = self.meta.learn_windows >> 1
        centred = self.adaptation.restore(self._state.get(self._norm_section))
        detector = self.detector
        size = 16 + 4 * len(detector.evidence)
        kept = self._state.get(self._cal_section, b"")
        if len(kept) < size:
            # another model of the same schema learned the centres: only the score's place is left to learn
            self._seen = half if centred else 0
            return
        numbers = array("i", kept[:size])
        if numbers[0] >= half and not centred:
            return
        self._seen = numbers[0]
        detector.place_q8 = numbers[1]
        detector.spread_q8 = numbers[2]
        self.verdict.level = numbers[3]
        detector.evidence[:] = list(numbers[4:])
        self._rows = bytearray(kept[size:])

    def facts(self):
        """-> what the status tells of this head: [learned offset in 1/16 deviation, drift in percent of its bound,
        the device's place of the log score less the model's, in Q8]."""
        learned, drift_percent = self.adaptation.distance()
        return [learned, drift_percent, self.detector.place_q8 - self.meta.place_q8]


def fuse(verdicts, fused=None):
    """Several heads' verdicts of one window -> one: the greatest evidence, level and surprise; `fused` is the Verdict
    to fill (made where None), whose last level tells whether the level changed.

    Heads are fused by their worst, not by their sum: each keeps its own budget, and the whole rings at most as often
    as the heads together. The features stand one head after the other, and the head that leads explains; learning is
    true only while every head learns."""
    if fused is None:
        fused = Verdict(sum([len(verdict.parts) for verdict in verdicts]))
    level = NORMAL
    lead = verdicts[0]
    learning = True
    for verdict in verdicts:
        level = max(level, verdict.level)
        learning = learning and verdict.learning
        if (verdict.level, verdict.evidence_q8, verdict.surprise_q8) > (lead.level, lead.evidence_q8, lead.surprise_q8):
            lead = verdict
    at = 0
    for verdict in verdicts:  # only the leading head explains: parts of different heads have no common measure
        for i in range(len(verdict.parts)):
            fused.parts[at] = verdict.parts[i] if verdict is lead else 0
            fused.x[at] = verdict.x[i]
            at += 1
    fused.score_q8 = lead.score_q8
    fused.surprise_q8 = lead.surprise_q8
    fused.evidence_q8 = lead.evidence_q8
    fused.learning = learning
    fused.changed = level != fused.level
    fused.level = level
    return fused
