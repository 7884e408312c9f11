"""An alarm that never ends: changed, and steady. Windows of a minute: an hour is 60 of them, 64 are the least."""

from stonechat.detection import ALARM, NORMAL
from stonechat.fusion import fuse
from stonechat.state import State
from stonechat.steady import SteadyScorer
from test_scorer import SCHEMA, Zero, quiet

STATED = 64


def scorer_of(state=None, window_ms=60_000):
    model = Zero()
    model.metadata.window_ms = window_ms
    scorer = SteadyScorer(model, SCHEMA, state)
    feed(scorer, 30)
    assert not scorer.learning
    return scorer


def feed(scorer, count, shift=0, on_top=0):
    """-> the verdicts' (level, steady) over `count` windows in which one feature is `shift` higher, one `on_top`."""
    seen = []
    for i in range(count):
        row = quiet(i)
        row[0] += shift
        row[1] += on_top
        verdict = scorer.score(row, scorer.window_ms)
        seen.append((verdict.level, verdict.steady))
    return seen


def test_an_alarm_that_does_not_end_becomes_steady_once():
    scorer = scorer_of()
    seen = feed(scorer, 300, shift=25)
    first = seen.index((ALARM, False))
    assert seen[first : first + STATED] == [(ALARM, False)] * STATED
    assert seen[first + STATED :] == [(NORMAL, True)] * (300 - first - STATED)
    assert not scorer.verdict.steady and scorer.steady


def test_the_state_begins_with_a_change_of_level():
    scorer = scorer_of()
    changed = []
    for i in range(200):
        row = quiet(i)
        row[0] += 25
        if scorer.score(row, 60_000).changed:
            changed.append(i)
    assert len(changed) in (2, 3)  # (watch,) alarm, steady


def test_an_hour_of_short_windows_is_needed():
    scorer = scorer_of(window_ms=10_000)
    seen = feed(scorer, 420, shift=25)
    assert seen.count((ALARM, False)) == 360 and seen[-1] == (NORMAL, True)


def test_what_is_new_on_top_alarms_as_soon_as_without():
    plain = feed(scorer_of(), 60, on_top=25).index((ALARM, False))
    scorer = scorer_of()
    feed(scorer, 200, shift=25)
    seen = feed(scorer, 40, shift=25, on_top=25)
    assert seen.index((ALARM, True)) <= plain
    assert feed(scorer, 60, shift=25)[-1] == (NORMAL, True)  # it ends with its cause


def test_the_old_normal_ends_the_state_without_an_alarm():
    scorer = scorer_of()
    feed(scorer, 200, shift=25)
    seen = feed(scorer, 60)
    assert seen[-1] == (NORMAL, False) and ALARM not in [level for level, _ in seen]
    assert (ALARM, False) in feed(scorer, 60, shift=25)  # and the same change is one again


def test_a_level_that_is_not_constant_stays_an_alarm():
    scorer = scorer_of()
    seen = []
    for step in range(20):
        seen += feed(scorer, 15, shift=25 * 2 ** (step % 10))
    assert seen[-1] == (ALARM, False) and (NORMAL, True) not in seen


def test_steps_can_not_be_walked_silently():
    """Each new level costs an alarm of an hour, on top of another two."""
    scorer = scorer_of()
    hours = 0
    for step in range(1, 4):
        seen = feed(scorer, 400, shift=25 * 8**step)
        alarms = [level for level, _ in seen].count(ALARM)
        assert alarms >= STATED * (1 if step == 1 else 2), (step, alarms)
        assert seen[-1] == (NORMAL, True)
        hours += alarms
    assert hours >= 5 * STATED


def test_was_normal_takes_the_change_over_and_recalibrate_forgets_it():
    scorer = scorer_of()
    feed(scorer, 200, shift=8)
    assert scorer.steady
    scorer.clear_evidence()
    assert not scorer.steady
    assert feed(scorer, 200, shift=8) == [(NORMAL, False)] * 200
    scorer = scorer_of()
    feed(scorer, 200, shift=25)
    scorer.recalibrate()
    assert scorer.learning and not scorer.steady
    scorer = scorer_of()
    feed(scorer, 60, shift=25)
    scorer.clear_evidence()  # an alarm that is not steady yet: only its evidence goes
    assert scorer.verdict.level == NORMAL and (ALARM, False) in feed(scorer, 60, shift=25)


def test_a_restart_keeps_the_state():
    state = State()
    scorer = scorer_of(state)
    feed(scorer, 200, shift=25)
    scorer.save()
    age = scorer.age
    model = Zero()
    model.metadata.window_ms = 60_000
    again = SteadyScorer(model, SCHEMA, state)
    assert again.steady and again.age == age
    assert feed(again, 50, shift=25) == [(NORMAL, True)] * 50
    for damaged in (b"", b"model--1", bytes(80), state.get(b"new" + SCHEMA.id)[:-1]):
        state.put(b"new" + SCHEMA.id, damaged)
        assert not SteadyScorer(model, SCHEMA, state).steady


def test_one_steady_channel_makes_the_fused_verdict_steady():
    scorer = scorer_of()
    feed(scorer, 200, shift=25)
    other = scorer_of()
    verdicts = [other.score(quiet(0), 60_000), scorer.score([40, 15, 15], 60_000)]
    assert verdicts[1].steady and fuse(verdicts).steady
