from struct import pack

from stonechat.adaptation import Adaptation
from stonechat.features import LEVEL, Normalization
from stonechat.model_file import pack_normalization
from stonechat.schema import Schema

SCHEMA = Schema("test-2", (("a", "1", LEVEL), ("b", "1", LEVEL)))
SUSPICION = 128


def make(deviation_q8=(160, 320), shift=4, cap=8):
    norm = Normalization(SCHEMA, pack_normalization((1000, 2000), deviation_q8))
    return Adaptation(norm, shift, cap), norm


def x_of(norm, f_q8):
    x = bytearray(2)
    norm.fill(f_q8, x)
    return x


def test_drift_is_clipped_slow_and_bounded():
    adaptation, norm = make()
    adaptation.step(bytes((1, 255)), 0)
    assert adaptation.drift == [1, -1]
    adaptation.step(bytes((127, 128)), 0)  # eight deviations pull no more than one
    assert adaptation.drift == [17, -17]
    for _ in range(1000):
        adaptation.step(bytes((127, 128)), 0)
    assert adaptation.drift == [128, -128]  # 8 steps of 1/16, in 16ths
    assert norm.offset_q8 == [80, -160]  # half a deviation
    assert adaptation.distance() == 0


def test_suspicion_freezes():
    adaptation, norm = make()
    adaptation.step(bytes((16, 16)), SUSPICION)
    assert adaptation.drift == [0, 0]
    adaptation.step(bytes((16, 16)), SUSPICION - 1)
    assert adaptation.drift == [16, 16]


def test_a_shift_is_followed_and_then_looks_normal():
    adaptation, norm = make()
    for _ in range(400):
        adaptation.step(x_of(norm, [1000 + 64, 2000]), 0)  # .4 deviations
    x = x_of(norm, [1000 + 64, 2000])
    assert x[0] in (0, 1, 255)
    assert x[1] == 0


def test_what_lies_beyond_the_bound_stays_visible():
    adaptation, norm = make()
    for _ in range(4000):
        adaptation.step(x_of(norm, [1000 + 320, 2000]), 0)  # 2 deviations, bound .5
    assert x_of(norm, [1000 + 320, 2000])[0] == 24


def test_learning_takes_the_centre_of_the_windows():
    adaptation, norm = make()
    rows = bytearray()
    for i in range(33):
        rows.extend(x_of(norm, [1000 + 160 + 10 * (i % 3 - 1), 2000 - 320]))
    adaptation.learn(rows, (0, 0))
    assert abs(norm.offset_q8[0] - 160) <= 1
    assert norm.offset_q8[1] == -320
    assert adaptation.distance() == 16


def test_learning_is_not_moved_by_a_few_wild_windows():
    adaptation, norm = make()
    rows = bytearray()
    for i in range(40):
        rows.extend(bytes((127, 128)) if i % 10 == 0 else bytes(2))
    adaptation.learn(rows, (0, 0))
    assert abs(norm.offset_q8[0]) <= 20  # an eighth of a deviation, for eight deviations in a tenth of the windows


def test_learning_is_bounded_upwards():
    adaptation, norm = make()
    adaptation.learn(bytes((127, 127)) * 16, (0, 0))
    assert norm.offset_q8 == [64 * 10, 64 * 20]


def test_learning_goes_down_to_where_a_feature_is_and_no_further():
    adaptation, norm = make()
    adaptation.learn(bytes((128, 176)) * 16, (0, 0))
    assert norm.offset_q8 == [-1000, -80 * 20]  # the first can't be seen in x: it was 0
    adaptation.learn(bytes((128, 128)) * 16, (-7, 500))
    assert norm.offset_q8 == [-1000, -1500]
    assert bytes(x_of(norm, [0, 500])) == bytes(2)
    assert adaptation.distance() == 16 * 1000 // 160


def test_dump_and_restore():
    adaptation, norm = make()
    adaptation.learn(bytes((20, 236)) * 16, (0, 0))
    for _ in range(5):
        adaptation.step(bytes((9, 250)), 0)
    other, other_norm = make()
    assert other.restore(adaptation.dump())
    assert other_norm.offset_q8 == norm.offset_q8
    assert other.drift == adaptation.drift
    other.forget()
    assert other_norm.offset_q8 == [0, 0]
    for bad in (b"", bytes(15), bytes(17), bytes(24)):
        assert not other.restore(bad), bad


def test_a_later_model_of_the_schema_finds_the_learned_centre():
    adaptation, norm = make()
    adaptation.learn(bytes((16, 0)) * 16, (0, 0))
    later = Normalization(SCHEMA, pack_normalization((1080, 2000), (160, 320)))
    other = Adaptation(later, 4, 8)
    assert other.restore(adaptation.dump())
    assert later.offset_q8 == [80, 0]  # the centre is where it was: 1160


def test_a_forged_record_can_not_pass_the_bounds():
    adaptation, norm = make()
    assert adaptation.restore(pack("<iiii", 30000, -30000, 9999, -9999))
    assert adaptation.drift == [128, -128]
    assert norm.offset_q8 == [640 + 80, -2000 - 160]
