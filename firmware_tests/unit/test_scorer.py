from share import some
from stonechat.detection import ALARM, NORMAL
from stonechat.errors import ModelError
from stonechat.features import LEVEL
from stonechat.metadata import Metadata
from stonechat.model_file import RECONSTRUCTION, pack_normalization
from stonechat.schema import Schema
from stonechat.scorer import Scorer
from stonechat.state import State

SCHEMA = Schema("test-3", (("a", "1", LEVEL), ("b", "1", LEVEL), ("c", "1", LEVEL)))


class Zero:
    """A network that reconstructs the centre: the residual is the input."""

    def __init__(self, digest=b"model--1", learn=8):
        meta = Metadata()
        meta.name = "test"
        meta.schema_name = SCHEMA.name
        meta.schema_id = SCHEMA.id
        meta.window_ms = 1000
        meta.normalization = pack_normalization((1024, 1024, 1024), (64, 64, 64))
        meta.kind = RECONSTRUCTION
        meta.knots = ((1024, 77), (2048, 512))
        meta.tail_q8 = 512
        meta.location_q8 = 1024
        meta.scale_q8 = 256
        meta.alarm_rules = ((256, 768, 2048),)
        meta.learn_windows = learn
        self.metadata = meta
        self.digest = digest
        self.input_size = self.output_size = 3
        self.out = bytearray(3)

    def run(self, x):
        return self.out


def quiet(i):
    """Readings about 15 (log2 of 16 is the centre), a little up and down."""
    return [15 + (i % 3 - 1), 15 - (i % 2), 15]


def run(scorer, count, shift=0):
    for i in range(count):
        verdict = scorer.score([v + shift for v in quiet(i)], 1000)
    return verdict


def test_a_fresh_device_learns_then_watches():
    scorer = Scorer(Zero(), SCHEMA, State())
    for i in range(8):
        assert scorer.learning and scorer.seen == i
        verdict = scorer.score(quiet(i), 1000)
        assert verdict.learning and verdict.level == NORMAL
    assert not scorer.learning and scorer.seen == 8
    assert not run(scorer, 30).learning
    assert scorer.verdict.level == NORMAL
    assert run(scorer, 20, shift=200).level == ALARM
    features = [row[0] for row in scorer.verdict.explain()]
    assert sorted(features) == [0, 1, 2]


def test_a_loud_learner_does_not_alarm():
    scorer = Scorer(Zero(), SCHEMA, State())
    verdict = run(scorer, 8, shift=500)
    assert verdict.level == NORMAL and verdict.evidence_q8 == 0


def test_what_the_learning_can_not_make_normal_is_refused_and_learned_again():
    state = State()
    scorer = Scorer(Zero(), SCHEMA, state)
    for _ in range(3):
        for i in range(8):
            far = [v + 20_000 for v in quiet(i)]  # ten octaves above the model: four deviations are learned
            verdict = scorer.score(far, 1000)
            assert verdict.level == NORMAL and verdict.learning and not verdict.changed
        assert verdict.unfit and scorer.seen == 0
    scorer.save()
    scorer = Scorer(Zero(), SCHEMA, state)
    assert scorer.verdict.unfit
    run(scorer, 8)
    assert not scorer.verdict.unfit and not scorer.learning
    run(scorer, 1)
    scorer.save()
    assert not Scorer(Zero(), SCHEMA, state).verdict.unfit


def of_scores(scorer):
    """-> what gives the scorer's verdict of a window with this score."""

    def verdict_of(score_q8):
        scorer.detector.score = lambda x, y: setattr(scorer.verdict, "score_q8", score_q8) or score_q8
        return scorer.score([15, 15, 15], 1000)

    return verdict_of


def learned_scale(scores, model_scale_q8=256):
    """The scale that a device learns from these scores, whatever its features were, and whether the model fits."""
    model = Zero(learn=2 * len(scores))
    model.metadata.scale_q8 = model_scale_q8
    scorer = Scorer(model, SCHEMA)
    verdict_of = of_scores(scorer)
    for score_q8 in scores * 2:
        verdict_of(score_q8)
    return scorer.detector.scale_q8, not scorer.learning


def test_the_learned_scale_does_not_depend_on_luck():
    quiet = [1024 + 40 * (i % 5) for i in range(64)]
    lively = [1024 + 150 * (i % 5) for i in range(64)]
    burst = quiet[:54] + [1800] * 10  # 7/8 of the windows are below it
    for scores in (quiet, lively, burst, [1024] * 64):
        scale_q8, fits = learned_scale(scores)
        assert fits and 240 <= scale_q8 <= 282, scale_q8
    assert learned_scale(quiet)[0] < learned_scale(lively)[0]


def test_a_device_whose_scale_differs_learns_its_own():
    wide = [1024] * 37 + [1900] * 27  # these would alarm by the model's scale
    scale_q8, fits = learned_scale(wide)
    assert fits and scale_q8 == 512
    assert not learned_scale([1024] * 33 + [9000] * 31)[1]  # beyond twice the model's


def test_the_scale_of_a_device_near_an_alarm_is_never_narrower():
    assert learned_scale([1024] * 61 + [2044] * 3) == (240, True)  # its own scale is 0, and three windows come near


def test_evidence_that_would_rise_for_ever_is_not_learned():
    """The average surprise is what counts: these windows, again and again, must not alarm under what they taught."""
    for high in some((1500, 2100, 2850)):
        for often in some((2, 3)):
            scores = [high if i % often == 0 else 1024 + 40 * (i % 5) for i in range(64)]
            verdict_of = of_scores(Scorer(Zero(learn=128), SCHEMA))
            assert ALARM not in [verdict_of(score_q8).level for score_q8 in scores * 22], (high, often)


def test_an_idle_device_is_as_normal_as_a_busy_one():
    scorer = Scorer(Zero(), SCHEMA, State())
    for _ in range(100):
        verdict = scorer.score([0, 0, 0], 1000)
        assert verdict.level == NORMAL and not verdict.unfit
    assert not scorer.learning and verdict.evidence_q8 == 0
    for _ in range(20):
        verdict = scorer.score(quiet(1), 1000)
    assert verdict.level == ALARM


def test_a_model_made_for_one_device_needs_no_learning():
    scorer = Scorer(Zero(learn=0), SCHEMA)
    assert not scorer.learning
    assert run(scorer, 20, shift=200).level == ALARM


def test_a_restart_continues_bit_for_bit():
    for cut in (2, 5, 8, 13):
        state = State()
        scorer = Scorer(Zero(), SCHEMA, state)
        whole = Scorer(Zero(), SCHEMA, State())
        for i in range(30):
            if i == cut:
                scorer.save()
                scorer = Scorer(Zero(), SCHEMA, state)
            want = whole.score(quiet(i * 7), 1000)
            got = scorer.score(quiet(i * 7), 1000)
            pair = [(v.score_q8, v.surprise_q8, v.evidence_q8, v.level, v.learning) for v in (got, want)]
            assert pair[0] == pair[1], (cut, i)
        assert scorer.normalization.offset_q8 == whole.normalization.offset_q8


def test_a_restart_in_the_learning_forgets_no_idle_window():
    """Idle for most of the first half, then busy: after a restart in between, the idle windows are no longer seen."""

    def learned(restart):
        state = State()
        scorer = Scorer(Zero(learn=16), SCHEMA, state)
        for i in range(16):
            if i == restart:
                scorer.save()
                scorer = Scorer(Zero(learn=16), SCHEMA, state)
            scorer.score([15, 15, 15] if 5 <= i < 8 else [2, 2, 2], 1000)
        return scorer.adaptation.learned_q8, scorer.verdict.unfit, scorer.learning, scorer.detector.location_q8

    whole = learned(-1)
    assert whole[0] == [406 - 1024] * 3 and whole[1:3] == (False, False)
    for restart in range(16):
        assert learned(restart) == whole, restart


def test_the_learning_of_an_earlier_version_goes_on():
    """Its state held no readings at the lower end."""
    state = State()
    scorer = Scorer(Zero(learn=16), SCHEMA, state)
    run(scorer, 5)
    scorer.save()
    state.put(b"norm" + SCHEMA.id, b"")
    other = Scorer(Zero(learn=16), SCHEMA, state)
    assert other.seen == 5
    run(other, 11)
    run(scorer, 11)
    assert not other.learning and other.adaptation.learned_q8 == scorer.adaptation.learned_q8


def test_another_model_of_the_schema_learns_only_its_scores():
    state = State()
    scorer = Scorer(Zero(), SCHEMA, state)
    run(scorer, 10, shift=4)
    learned = list(scorer.normalization.offset_q8)
    scorer.save()
    scorer = Scorer(Zero(digest=b"model--2"), SCHEMA, state)
    assert scorer.learning and scorer.seen == 4
    assert scorer.normalization.offset_q8 == learned


def test_relearn_and_forgive():
    state = State()
    scorer = Scorer(Zero(), SCHEMA, state)
    run(scorer, 8, shift=4)
    run(scorer, 30, shift=300)
    assert scorer.verdict.level == ALARM
    scorer.clear_evidence()
    assert scorer.verdict.level == NORMAL and not scorer.learning
    scorer.recalibrate()
    assert scorer.learning and scorer.normalization.offset_q8 == [0, 0, 0]
    run(scorer, 8)
    assert not scorer.learning
    assert scorer.adaptation.drift == [0, 0, 0]
    scorer.recalibrate()
    scorer.save()
    assert Scorer(Zero(), SCHEMA, state).seen == 0


def refused(model, schema=SCHEMA):
    try:
        Scorer(model, schema)
    except ModelError:
        return True
    return False


def test_what_does_not_fit_is_refused():
    model = Zero()
    model.metadata = None
    assert refused(model)
    assert refused(Zero(), Schema("other", SCHEMA.columns[:2]))
    model = Zero()
    model.output_size = 2
    assert refused(model)


def test_golden_vectors_are_run():
    model = Zero()
    model.metadata.golden = ((bytes((1, 0, 0)), bytes(3), 256),)
    assert not refused(model)
    model.metadata.golden = ((bytes((1, 0, 0)), bytes((0, 0, 1)), 256),)
    assert refused(model)
    model.metadata.golden = ((bytes((1, 0, 0)), bytes(3), 257),)
    assert refused(model)
