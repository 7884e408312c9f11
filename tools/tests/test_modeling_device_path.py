"""The numpy twin gives the device's bytes: the same stream through Scorer and through Replay, field by field."""

import numpy as np
import pytest
from stonechat.features import LEVEL, RATE, SHARE, Normalization, log2_q8
from stonechat.model import load_model
from stonechat.schema import Schema
from stonechat.scorer import Scorer
from stonechat.state import State
from stonechat.steady import SteadyScorer
from stonechat_tools.modeling import device_path
from stonechat_tools.modeling.device_path import Replay, features_q8
from stonechat_tools.modeling.fit import fit

SCHEMA = Schema("twin-1", tuple((f"c{i}", "1", RATE if i < 8 else LEVEL if i < 10 else SHARE) for i in range(12)))
WINDOW_MS = 1000


def windows(count: int, seed: int, loud: slice | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Correlated counters of a made-up device; with `loud`, an attack there, and now and then a counter at zero."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).normal(0, 0.6, (3, 12))
    rates = np.exp(rng.normal(0, 1, (count, 3)) @ mixing + rng.normal(0, 0.2, (count, 12)) + 5)
    if loud is not None:
        rates[loud, :3] *= 6000
    deltas = rng.poisson(rates)
    deltas[:, 10:] = np.clip(deltas[:, 10:] * 20, 0, 25600)
    if loud is not None:
        deltas[rng.random(deltas.shape) < 0.001] = 0
    return deltas, rng.integers(900, 1400, count)


@pytest.fixture(scope="module")
def fitted():
    deltas, elapsed = windows(1200, 1)
    return fit(features_q8(SCHEMA, deltas, elapsed, WINDOW_MS), SCHEMA, WINDOW_MS, learn_windows=64)


def test_log2_is_the_devices():
    values = [
        1,
        2,
        3,
        4,
        63,
        64,
        65,
        127,
        128,
        999,
        4097,
        32767,
        32768,
        65535,
        1 << 29,
        (1 << 30) - 1,
        (1 << 40) + 12345,
    ]
    assert device_path.log2_q8(values).tolist() == [log2_q8(v) for v in values]


def test_features_are_the_devices(fitted):
    deltas, elapsed = windows(300, 2)
    norm = Normalization(SCHEMA, fitted.meta.normalization)
    out = [0] * len(SCHEMA)
    got = features_q8(SCHEMA, deltas, elapsed, WINDOW_MS)
    for row, ms, want in zip(deltas.tolist(), elapsed.tolist(), got.tolist(), strict=True):
        norm.fill_q8(row, ms, WINDOW_MS, out)
        assert out == want


@pytest.mark.parametrize("learn", [True, False])
def test_a_stream_gives_the_devices_verdicts(fitted, learn):
    fitted.meta.learn_windows = 64 if learn else 0
    scorer = Scorer(load_model(fitted.to_tflite("twin", 1)), SCHEMA, State())
    deltas, elapsed = windows(400, 3, loud=slice(250, 350))
    twin = fitted.replay(learn=True)
    result = twin.run(features_q8(SCHEMA, deltas, elapsed, WINDOW_MS))
    far = 0
    for i, (row, ms) in enumerate(zip(deltas.tolist(), elapsed.tolist(), strict=True)):
        verdict = scorer.score(row, ms)
        got = (verdict.score_q8, verdict.surprise_q8, verdict.evidence_q8, verdict.level, verdict.learning)
        want = [int(getattr(result, key)[i]) for key in ("score_q8", "surprise_q8", "evidence_q8", "level", "learning")]
        assert got == tuple(want), i
        steps = np.frombuffer(bytes(verdict.x), dtype=np.int8).astype(np.int64)
        over = np.array(scorer.normalization.excess)
        steps = np.where(over, over + np.sign(over) * scorer.normalization.limit, steps)
        assert verdict.parts == twin.parts(steps[None])[0].tolist()
        far += int(np.count_nonzero(over))
    assert far > 20
    assert result.alarms and 250 < result.alarms[0] < 350


def test_a_steady_change_gives_the_devices_verdicts():
    """A counter that stays thrice as high, a burst on top of it, a second change, and the way back."""
    minute = 60_000
    deltas, elapsed = windows(1200, 1)
    model = fit(features_q8(SCHEMA, deltas, elapsed * 60, minute), SCHEMA, minute)
    deltas, elapsed = windows(1500, 5)
    deltas[100:, 8] *= 8
    deltas[450:490, :3] *= 400
    deltas[600:1000, 3] *= 9
    deltas[1300:, 8] //= 8
    elapsed = elapsed * 60
    state = State()
    scorer = SteadyScorer(load_model(model.to_tflite("twin", 1)), SCHEMA, state)
    twin = model.replay()
    result = twin.run(features_q8(SCHEMA, deltas, elapsed, minute))
    kept = 0
    for i, (row, ms) in enumerate(zip(deltas.tolist(), elapsed.tolist(), strict=True)):
        if result.steady[i] and i % 50 == 0:  # a restart keeps what was found out
            scorer.save()
            scorer = SteadyScorer(scorer.model, SCHEMA, state)
            kept += 1
        verdict = scorer.score(row, ms)
        got = (verdict.score_q8, verdict.surprise_q8, verdict.evidence_q8, verdict.level, verdict.steady)
        want = [int(getattr(result, key)[i]) for key in ("score_q8", "surprise_q8", "evidence_q8", "level", "steady")]
        assert got == tuple(want), i
    assert kept > 10
    assert result.steady[440] and result.level[440] == 0  # the shift
    assert result.level[480] == 2 and result.steady[480] and result.level[590] == 0  # the burst on top of it
    assert result.steady[990] and result.level[990] == 0  # the second change
    assert result.steady[1290] and result.level[1290] == 0  # its end
    assert not result.steady[-1] and result.level[-1] == 0  # as it was
    assert len(result.alarms) == 4, result.alarms


def test_a_fork_leaves_the_original_alone(fitted):
    deltas, elapsed = windows(200, 4)
    f = features_q8(SCHEMA, deltas, elapsed, WINDOW_MS)
    fitted.meta.learn_windows = 0
    replay = Replay(fitted.meta, fitted.network)
    replay.run(f[:100])
    before = (replay.drift.copy(), list(replay.evidence))
    replay.fork().run(f[100:])
    assert (replay.drift == before[0]).all() and replay.evidence == before[1]
