"""Channels beside the device's own (a vendor's counters, one service each, a second model), and one verdict out of all
channels' verdicts of the same window."""

from .compat import sha256
from .detection import ALARM, NORMAL, Verdict
from .steady import SteadyChannel


class SideChannel(SteadyChannel):
    """A channel beside the device's own. name: as the status lists it, unique; "": "counters" and the schema's name.

    `id` names what it has learned in the state: the schema's where that is enough. `absent`: what it watches is not
    there; it has no window then, and learns nothing."""

    def __init__(self, collector, model, state, name: str = "") -> None:
        schema = collector.schema
        self.id = sha256(schema.id + name.encode()).digest()[:8] if name else schema.id
        self.name = (name or "counters " + schema.name)[:24]  # limits.CHANNEL_BYTES
        SteadyChannel.__init__(self, collector, model, _Sections(state, self.id))

    @property
    def absent(self) -> bool:
        return getattr(self.collector, "absent", False)

    def end_window(self, now_ms: int):
        """As Channel does. While what it watches is absent the evidence ebbs, as in windows without surprise."""
        verdict = SteadyChannel.end_window(self, now_ms)
        if not self.absent:
            return verdict
        self.window.primed = False
        scorer = self.scorer
        if scorer.learning:
            return None
        scorer.verdict.score_q8 = 0
        return scorer.detector.weigh(0)


class _Sections:
    """The state as a scorer sees it whose schema others have as well: its sections end in the channel's id."""

    def __init__(self, state, channel_id: bytes) -> None:
        self._state = state
        self._id = channel_id

    def get(self, section: bytes, default=None):
        return self._state.get(section[:-8] + self._id, default)

    def put(self, section: bytes, value: bytes) -> None:
        self._state.put(section[:-8] + self._id, value)


class FusedVerdict(Verdict):
    """`channel`: the number of the channel that leads, whose explanation this is; 0 is the device's own."""

    channel = 0


def fuse(verdicts, fused=None):
    """Several channels' verdicts of one window -> one: the greatest evidence and level; None: a channel has none.
    `fused` is the FusedVerdict to fill (made where None), whose last level decides whether the level changed.

    Channels are fused by their worst, not by their sum: each keeps its own budget, and together they alarm at most as
    often as the channels together. The channel that leads explains: the one that raises its alarm in this window, else
    that of the highest level, then of the greatest evidence, then of the greatest surprise; without evidence the
    device's own. Learning is true only while every channel learns."""
    if fused is None:
        fused = FusedVerdict(0)
    level = NORMAL
    lead = 0
    learning = True
    unfit = False
    steady = False
    best = (False, -1, 0, 0)
    for i in range(len(verdicts)):
        verdict = verdicts[i]
        if verdict is None:
            continue
        level = max(level, verdict.level)
        learning = learning and verdict.learning
        unfit = unfit or verdict.unfit
        steady = steady or getattr(verdict, "steady", False)
        evidence_q8 = verdict.evidence_q8
        raised = verdict.changed and verdict.level == ALARM
        rank = (raised, verdict.level, evidence_q8, verdict.surprise_q8 if evidence_q8 else 0)
        if rank > best:
            best = rank
            lead = i
    verdict = verdicts[lead]
    fused.channel = lead
    fused.parts = verdict.parts
    fused.x = verdict.x
    fused.score_q8 = verdict.score_q8
    fused.surprise_q8 = verdict.surprise_q8
    fused.evidence_q8 = verdict.evidence_q8
    fused.learning = learning
    fused.unfit = unfit
    fused.steady = steady
    fused.changed = level != fused.level
    fused.level = level
    return fused
