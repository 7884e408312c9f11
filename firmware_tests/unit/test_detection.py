from stonechat.detection import ALARM, NORMAL, WATCH, Detector, Verdict
from stonechat.errors import ModelError
from stonechat.features import log2_q8
from stonechat.metadata import Metadata
from stonechat.model_file import RECONSTRUCTION, RESIDUAL, pack, pack_normalization


def make_meta(n=4):
    meta = Metadata()
    meta.name = "test"
    meta.version = 3
    meta.schema_name = "test-1"
    meta.schema_id = b"12345678"
    meta.window_ms = 1000
    meta.normalization = pack_normalization([100] * n, [64] * n)
    meta.kind = RESIDUAL
    meta.knots = ((1000, 77), (1500, 256), (2000, 512))
    meta.tail_q8 = 256
    meta.location_q8 = 1000
    meta.scale_q8 = 500
    meta.alarm_rules = ((256, 512, 1280),)
    meta.learn_windows = 8
    meta.drift_shift = 4
    meta.drift_cap = 8
    return meta


def make_detector(**changes):
    meta = make_meta()
    for name in changes:
        setattr(meta, name, changes[name])
    return Detector(meta, Verdict(4))


def test_score_of_a_residual():
    detector = make_detector()
    assert detector.score(bytes(4), bytes((0, 0, 0, 0))) == 0
    assert detector.score(bytes(4), bytes((1, 0, 0, 0))) == 256
    assert detector.score(bytes(4), bytes((128, 0, 0, 0))) == 3584  # (-128)^2 = 2^14, and 1 + 2^14 rounds to it
    assert detector.verdict.parts == [0, 0, 0, 0]  # no feature itself has moved: none to blame


def test_score_of_a_reconstruction_and_weights():
    detector = make_detector(kind=RECONSTRUCTION)
    x = bytes((10, 246, 0, 127))
    assert detector.score(x, x) == 0
    assert detector.score(x, bytes((0, 0, 0, 128))) == log2_q8(1 + 100 + 100 + 255 * 255)
    assert detector.verdict.parts == [100, 100, 0, 255 * 127]
    detector = make_detector(kind=RECONSTRUCTION, weights=bytes((16, 64, 4, 0)))
    assert detector.score(x, bytes((0, 0, 3, 0))) == log2_q8(1 + 100 + 400 + 2)
    assert detector.verdict.parts == [100, 200, 0, 0]  # by the root of the weight
    assert detector.score(x, bytes((30, 0, 0, 127))) == log2_q8(1 + 400 + 400)
    assert detector.verdict.parts == [100, 200, 0, 0]  # a residual against the feature's own way counts half


def test_what_lies_beyond_the_reach_counts_in_full():
    detector = Detector(make_meta(), Verdict(4), [0, 100, -1792, 0])
    x = bytes((0, 127, 128, 0))
    assert detector.score(x, bytes((0, 20, 236, 0))) == log2_q8(1 + 120 * 120 + 1812 * 1812)
    assert detector.verdict.parts == [0, 120 * 127, 1812 * 128, 0]


def test_surprise_follows_the_table_and_its_tail():
    detector = make_detector()
    for score, want in (
        (0, 77),
        (1000, 77),
        (1250, 166),
        (1500, 256),
        (1750, 384),
        (2000, 512),
        (2256, 768),
        (30000, 4096),
    ):
        assert detector.surprise(score) == want, (score, detector.surprise(score))


def test_surprise_on_a_device_of_another_place_and_spread():
    detector = make_detector()
    detector.location_q8 = 2000
    detector.scale_q8 = 1000
    assert detector.surprise(2000) == 77
    assert detector.surprise(3000) == 256


def test_evidence_levels_and_hysteresis():
    detector = make_detector()
    verdict = detector.verdict
    levels = []
    changes = 0
    for surprise in [4096] * 9 + [0] * 7:
        detector.weigh(surprise)
        levels.append(verdict.level)
        changes += verdict.changed
    # +1 a window up to a ceiling of 1.5 alarms, -1 a window down; normal again only below a quarter
    assert levels == [NORMAL, NORMAL, WATCH, WATCH, ALARM, ALARM, ALARM, ALARM, ALARM] + [ALARM] * 6 + [NORMAL]
    assert changes == 3
    assert detector.evidence[0] < 320


def test_one_window_never_alarms_by_itself():
    detector = make_detector()
    assert detector.weigh(30000).level == NORMAL
    assert detector.verdict.evidence_q8 == 51


def test_the_eager_rung_rings_first():
    detector = make_detector(alarm_rules=((256, 384, 2560), (512, 2048, 3072)))
    for _ in range(2):
        detector.weigh(4096)
    assert detector.verdict.level == ALARM
    detector = make_detector(alarm_rules=((256, 384, 2560), (512, 2048, 3072)))
    windows = 0
    while detector.verdict.level != ALARM:
        detector.weigh(400)
        windows += 1
    assert windows == 20


def test_forgive_drops_the_evidence():
    detector = make_detector()
    for _ in range(6):
        detector.weigh(4096)
    detector.clear_evidence()
    assert detector.evidence == [0]
    assert detector.verdict.level == NORMAL and detector.verdict.changed


def test_explanation_is_signed_and_its_shares_add_up():
    detector = make_detector()
    detector.score(bytes((16, 240, 0, 32)), bytes((16, 240, 4, 32)))
    out = detector.verdict.explain(4)
    assert [row[0] for row in out] == [3, 0, 1, 2]
    assert [row[1] for row in out] == [32, 16, -16, 0]
    assert sum([row[2] for row in out]) == 100
    assert detector.verdict.explain(2) == out[:2]
    assert Verdict(4).explain() == []


def test_metadata_round_trip():
    meta = make_meta()
    meta.weights = bytes((1, 2, 3, 255))
    meta.golden = ((bytes(4), b"\x01\x02\x03\x04", 1250),)
    got = Metadata(pack(meta))
    for name in (
        "name",
        "version",
        "schema_id",
        "window_ms",
        "normalization",
        "kind",
        "weights",
        "knots",
        "alarm_rules",
        "golden",
    ):
        assert getattr(got, name) == getattr(meta, name), name
    assert (got.tail_q8, got.location_q8, got.scale_q8) == (256, 1000, 500)
    assert (got.learn_windows, got.drift_shift, got.drift_cap) == (8, 4, 8)
    assert len(got) == 4


def refused(**changes):
    meta = make_meta()
    for name in changes:
        setattr(meta, name, changes[name])
    try:
        pack(meta)
    except ModelError:
        return True
    return False


def test_unsound_metadata_is_refused():
    assert not refused()
    assert refused(schema_id=b"123")
    assert refused(window_ms=0)
    assert refused(kind=2)
    assert refused(normalization=b"\x00" * 20)  # a reciprocal of zero
    assert refused(normalization=b"\x01" * 19)
    assert refused(weights=bytes(4))
    assert refused(weights=bytes((1, 2, 3)))
    assert refused(knots=((1, 1),))
    assert refused(knots=((2, 1), (2, 3)))
    assert refused(knots=((1, 3), (2, 1)))
    assert refused(alarm_rules=())
    assert refused(alarm_rules=((256, 256, 1000),))
    assert refused(alarm_rules=((256, 512, 0),))
    assert refused(scale_q8=0)
    assert refused(learn_windows=7)
    assert refused(golden=((b"1", b"1", 1),))
    assert refused(golden=((bytes(4), bytes(4), -1),))
    for data in (b"", b"\x00", b"\xa0", b"\xa1\x01\x02", b"\xff" * 9):
        try:
            Metadata(data)
        except ModelError:
            continue
        assert False, data
