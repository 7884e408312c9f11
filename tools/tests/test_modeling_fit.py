"""The fit: what it guarantees whatever it is trained on, and that contamination and odd counters don't break it."""

import numpy as np
import pytest
from stonechat.features import RATE
from stonechat.model import load_model
from stonechat.schema import Schema
from stonechat_tools.modeling.device_path import Network, features_q8
from stonechat_tools.modeling.fit import FitError, fit, front_end, table

N = 12
SCHEMA = Schema("fit-1", tuple((f"c{i}", "1", RATE) for i in range(N)))
WINDOW_MS = 1000


def benign(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(5).normal(0, 0.5, (3, N))
    counts = rng.poisson(np.exp(rng.normal(0, 1, (count, 3)) @ mixing + rng.normal(0, 0.15, (count, N)) + 6))
    return features_q8(SCHEMA, counts, np.full(count, WINDOW_MS), WINDOW_MS)


def strange(count: int, seed: int) -> np.ndarray:
    """Two counters that stop going together."""
    f = benign(count, seed)
    f[:, 0] += 300
    f[:, 1] -= 300
    return f


def auc(replay, quiet, loud) -> float:
    a, b = replay.scores(replay.steps(loud)), replay.scores(replay.steps(quiet))
    return float((a[:, None] > b[None, :]).mean())


@pytest.fixture(scope="module")
def model():
    return fit(benign(2000, 1), SCHEMA, WINDOW_MS)


def test_the_file_is_an_autoencoder_within_the_contract(model):
    data = model.to_tflite("fit-test", 7)
    loaded = load_model(data)
    assert loaded.input_size == loaded.output_size == N
    assert loaded.macs == 2 * N * 4
    meta = loaded.metadata
    assert (meta.name, meta.version, meta.schema_id, len(meta.golden)) == ("fit-test", 7, SCHEMA.id, 3)
    x = np.random.default_rng(0).integers(-128, 128, (200, N))
    y = Network.from_file(data).run(x)
    assert (y == model.network.run(x)).all()
    assert [bytes(loaded.run(bytes((row & 255).astype(np.uint8)))) for row in x[:20]] == [
        bytes((row & 255).astype(np.uint8)) for row in y[:20]
    ]


def test_it_reconstructs_what_is_benign(model):
    x = model.replay().inputs(benign(500, 2))
    residual = x - model.network.run(x)
    assert (residual**2).mean() < 0.3 * (x**2).mean()


def test_the_same_windows_give_the_same_file():
    f = benign(600, 3)
    assert fit(f, SCHEMA, WINDOW_MS).to_tflite("a", 1) == fit(f, SCHEMA, WINDOW_MS).to_tflite("a", 1)


def test_it_finds_what_no_single_counter_shows(model):
    assert auc(model.replay(), benign(500, 2), strange(300, 4)) > 0.95


def test_trimming_survives_a_run_of_attack_in_training():
    f = benign(2000, 1)
    f[700:740] = strange(40, 9)
    dirty, trimmed = fit(f, SCHEMA, WINDOW_MS), fit(f, SCHEMA, WINDOW_MS, trim=0.1)
    quiet, loud = benign(500, 2), strange(300, 4)
    clean = auc(fit(benign(2000, 1), SCHEMA, WINDOW_MS).replay(), quiet, loud)
    assert auc(trimmed.replay(), quiet, loud) > clean - 0.01
    assert auc(trimmed.replay(), quiet, loud) >= auc(dirty.replay(), quiet, loud)
    assert 40 <= trimmed.figures["trimmed_windows"] <= 100


def test_trimming_leaves_a_clean_recording_alone():
    assert fit(benign(2000, 1), SCHEMA, WINDOW_MS, trim=0.1).figures["trimmed_windows"] <= 40


def test_no_latent_belongs_to_a_single_counter():
    """A loud counter that goes with no other would take a latent, be copied through it and so never be strange."""
    f = benign(2000, 1)
    f[:, 7] = np.random.default_rng(3).normal(2000, 900, len(f)).astype(np.int64)
    model = fit(f, SCHEMA, WINDOW_MS)
    impulse = np.zeros((1, N), dtype=np.int64)
    impulse[0, 7] = 64
    assert model.replay().residuals(impulse)[0, 7] > 48


def test_what_goes_far_beyond_benign_windows_counts_in_full(model):
    quiet = model.replay()
    far, farther = (np.zeros((1, N), dtype=np.int64) for _ in range(2))
    far[0, 3], farther[0, 3] = 128, 640
    assert quiet.scores(farther)[0] > quiet.scores(far)[0] + 256
    f = benign(2000, 1)
    f[::400, 3] = 8000  # a counter that is thrown that far now and then
    used = fit(f, SCHEMA, WINDOW_MS).replay()
    assert used.scores(farther)[0] == used.scores(far)[0]


def test_a_counter_that_never_moved_does_not_explode():
    f = benign(1200, 1)
    f[:, 5] = 0
    model = fit(f, SCHEMA, WINDOW_MS)
    later = benign(400, 2)
    later[:, 5] = 0
    later[::50, 5] = 20  # a ripple: an event or two in a while
    assert not model.replay().run(later).alarms


def test_a_device_that_slept_through_the_calibration_may_wake():
    f = benign(2000, 1)
    f[1500:] = 0
    model = fit(f[:1500], SCHEMA, WINDOW_MS, calibration=f[1500:])
    replay = model.replay()
    replay.run(f[1500:1600])
    assert not replay.calm().run(benign(600, 8)).alarms


def test_too_little_is_refused():
    with pytest.raises(FitError, match="at least"):
        fit(benign(50, 1), SCHEMA, WINDOW_MS)
    with pytest.raises(FitError, match="features"):
        fit(np.zeros((200, 3)), SCHEMA, WINDOW_MS)
    with pytest.raises(FitError, match="bottleneck"):
        fit(benign(300, 1), SCHEMA, WINDOW_MS, units=40)


def test_the_front_end_centres_where_clipped_deviations_balance():
    f = np.column_stack([np.r_[np.zeros(900), np.full(100, 3000)], np.arange(1000)]).astype(np.int64)
    centre, deviation = front_end(f)
    z = np.clip((f - centre) / deviation, -1, 1).mean(axis=0)
    assert np.abs(z).max() < 0.02


def test_the_table_rises_and_ends_in_a_tail():
    scores = np.sort(np.random.default_rng(1).normal(3000, 200, 4000)).astype(np.int64)
    knots, tail_q8 = table([scores], 0)
    assert all(a[0] < b[0] and a[1] <= b[1] for a, b in zip(knots, knots[1:], strict=False))
    assert knots[0] == (int(np.quantile(scores, 0.5)), 77)
    assert knots[-1][1] == 435  # p = .02
    assert 0 < tail_q8 < 0x7FFF
    wider, _ = table([scores, scores + 100], 0)
    assert wider[-1][0] > knots[-1][0]  # the stranger segment rules


def test_a_slow_benign_drift_is_followed_and_stays_silent(model):
    f = benign(4000, 11)
    deviation = np.array(front_end(benign(2000, 1))[1])
    drifting = f + np.rint(np.linspace(0, 0.35, len(f))[:, None] * deviation).astype(np.int64)
    assert not model.replay().run(drifting).alarms


def test_a_slow_ramp_can_not_walk_the_centre_away(model):
    """Two counters part from each other over 2,000 windows: the drift follows half a deviation and no further."""
    f = benign(2400, 12)
    growth = np.minimum(1.0, np.arange(len(f)) / 2000)
    f[:, 0] += np.rint(growth * 400).astype(np.int64)
    f[:, 1] -= np.rint(growth * 400).astype(np.int64)
    replay = model.replay()
    result = replay.run(f)
    assert result.alarms and result.alarms[0] < 2000
    assert np.abs(replay.drift).max() <= model.meta.drift_cap << model.meta.drift_shift


def test_tied_scores_are_as_usual_as_the_most_usual_of_them():
    """A silent or periodic device has one score, or a few: none of them may be as surprising as the rarest share."""
    for scores in (np.full(2000, 700), np.r_[np.full(1900, 700), np.full(100, 900)], np.tile([500, 600, 700], 700)):
        knots, tail_q8 = table([np.sort(scores)], 0)
        surprise = {
            int(score): np.interp(score, [k[0] for k in knots], [k[1] for k in knots]) / 256 for score in scores
        }
        for score, told in surprise.items():
            share = float((scores >= score).mean())
            assert told <= max(-np.log10(share), 0.31) + 0.31, (score, told, share)
        assert tail_q8 > 0
