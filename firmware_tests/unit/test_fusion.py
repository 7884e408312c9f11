from stonechat.detection import ALARM, NORMAL, WATCH, Verdict
from stonechat.fusion import fuse


def verdict_of(level, evidence, n=2):
    verdict = Verdict(n)
    verdict.level = level
    verdict.evidence_q8 = evidence
    verdict.surprise_q8 = evidence
    for i in range(n):
        verdict.parts[i] = i + 1
        verdict.x[i] = 16
    return verdict


def test_heads_are_fused_by_their_worst():
    calm = verdict_of(NORMAL, 10)
    watch = verdict_of(WATCH, 140, 3)
    fused = fuse([calm, watch])
    assert fused.level == WATCH and fused.evidence_q8 == 140 and fused.changed
    assert fused.channel == 1 and fused.explain(1) == [(2, 16, 50)]
    assert not fuse([calm, watch], fused).changed
    alarm = verdict_of(ALARM, 300)
    fuse([alarm, watch], fused)
    assert fused.level == ALARM and fused.changed and fused.channel == 0 and fused.explain(1)[0][0] == 1
    fuse([calm, calm], fused)
    assert fused.level == NORMAL and fused.changed


def test_the_channel_that_raises_its_alarm_explains():
    standing = verdict_of(ALARM, 384)
    raised = verdict_of(ALARM, 256)
    raised.changed = True
    assert fuse([standing, None, raised]).channel == 2
    raised.changed = False
    assert fuse([standing, None, raised]).channel == 0


def test_without_evidence_the_devices_own_channel_explains():
    own = verdict_of(NORMAL, 0)
    loud = verdict_of(NORMAL, 0)
    loud.surprise_q8 = 900
    assert fuse([own, loud]).channel == 0
    loud.evidence_q8 = 1
    assert fuse([own, loud]).channel == 1


def test_fused_learning_only_while_all_learn():
    one = verdict_of(NORMAL, 0)
    other = verdict_of(NORMAL, 0)
    one.learning = True
    assert not fuse([one, other]).learning
    other.learning = True
    assert fuse([one, other]).learning


def test_one_model_that_does_not_fit_is_said():
    one = verdict_of(NORMAL, 0)
    other = verdict_of(NORMAL, 0)
    assert not fuse([one, other]).unfit
    other.unfit = True
    assert fuse([one, other]).unfit
