from stonechat.features import LEVEL, RATE, SHARE, Normalization, log2_q8
from stonechat.model_file import pack_normalization
from stonechat.schema import Schema
from stonechat.window import Window

SCHEMA = Schema("test-1", (("bytes", "B", RATE), ("sockets", "1", LEVEL), ("busy", "%", SHARE)))


def test_nothing_until_primed():
    window = Window(SCHEMA, 1000)
    assert not window.push([1000000, 3, 256], 5000)
    assert window.push([1000010, 4, 512], 6000)
    assert window.deltas == [10, 4, 512]
    assert window.elapsed_ms == 1000


def test_long_and_short_windows_are_dropped_and_counted():
    window = Window(SCHEMA, 1000)
    window.push([0, 0, 0], 0)
    assert not window.push([5, 0, 0], 1501)
    assert window.push([9, 0, 0], 2501)
    assert window.deltas[0] == 4
    assert not window.push([10, 0, 0], 2600)
    assert window.dropped == 2


def test_wrap_and_reset():
    window = Window(SCHEMA, 1000)
    window.push([0xFFFFFFFE, 0, 0], 0)
    assert window.push([3, 0, 0], 1000)
    assert window.deltas[0] == 5
    window.push([700000, 0, 0], 2000)
    assert window.push([12, 0, 0], 3000)
    assert window.deltas[0] == 0
    assert window.resets == 1


def test_log2_published_vectors():
    vectors = (
        (1, 0),
        (2, 256),
        (3, 406),
        (4, 512),
        (5, 594),
        (7, 719),
        (10, 850),
        (15, 1000),
        (16, 1024),
        (31, 1268),
        (100, 1701),
        (255, 2047),
        (256, 2048),
        (1000, 2551),
        (1500, 2701),
        (4097, 3072),
        (65535, 4096),
        (1000000, 5102),
        (123456789, 6881),
        (1073741823, 7680),
    )
    for value, want in vectors:
        assert log2_q8(value) == want, (value, log2_q8(value), want)


def test_features_and_normalization():
    norm = Normalization(SCHEMA, pack_normalization((850, 512, 2560), (128, 64, 256)))
    f_q8 = [0] * 3
    norm.fill_q8([9, 3, 2560], 1000, 1000, f_q8)
    assert f_q8 == [850, 512, 2560]
    x = bytearray(3)
    norm.fill(f_q8, x)
    assert x == b"\x00\x00\x00"
    norm.fill([850 + 128, 512 - 64, 25600], x)
    assert x == bytes((16, 256 - 16, 127))
    norm.fill_q8([19, 3, 99999], 2000, 1000, f_q8)
    assert f_q8[0] == log2_q8(20) - 256
    assert f_q8[2] == 25600
