"""One verdict out of several scorers' verdicts of the same window."""

from .detection import NORMAL, Verdict


def fuse(verdicts, fused=None):
    """Several scorers' verdicts of one window -> one: the greatest evidence, level and surprise; `fused` is the Verdict
    to fill (made where None), whose last level decides whether the level changed.

    Heads are fused by their worst, not by their sum: each keeps its own budget, and together they alarm at most as
    often as the scorers together. The features are in the order of the scorers, and the scorer that leads explains;
    learning is true only while every scorer learns."""
    if fused is None:
        fused = Verdict(sum([len(verdict.parts) for verdict in verdicts]))
    level = NORMAL
    lead = verdicts[0]
    learning = True
    unfit = False
    for verdict in verdicts:
        level = max(level, verdict.level)
        learning = learning and verdict.learning
        unfit = unfit or verdict.unfit
        if (verdict.level, verdict.evidence_q8, verdict.surprise_q8) > (lead.level, lead.evidence_q8, lead.surprise_q8):
            lead = verdict
    at = 0
    for verdict in verdicts:  # only the leading scorer explains: parts of different scorers have no common measure
        for i in range(len(verdict.parts)):
            fused.parts[at] = verdict.parts[i] if verdict is lead else 0
            fused.x[at] = verdict.x[i]
            at += 1
    fused.score_q8 = lead.score_q8
    fused.surprise_q8 = lead.surprise_q8
    fused.evidence_q8 = lead.evidence_q8
    fused.learning = learning
    fused.unfit = unfit
    fused.changed = level != fused.level
    fused.level = level
    return fused
