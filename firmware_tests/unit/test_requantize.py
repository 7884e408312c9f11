"""The arithmetic itself: multipliers, rounding, bounds, and that a run allocates nothing."""

import gc

from stonechat.errors import ModelError
from stonechat.int8 import requantize as multipliers
from stonechat.int8.plain import requantize
from stonechat.model import load_model
from test_golden import kernels, models, read

# float32 bits of source, weight and output scale, then m and shift: from TFLite's QuantizeMultiplier with doubles
MULTIPLIERS = (
    (0x3A875C0E, 0x39A3BDE6, 0x3B8ED74A, (1301624346, -13), (1301624343, -13)),
    (0x3A0280E2, 0x396B7814, 0x3B962240, (1716988079, -15), (1716988095, -15)),
    (0x3EF4AC20, 0x3E29F4E2, 0x3DF76B36, (1409873322, 0), (1409873346, 0)),
    (0x3A6E69A1, 0x3C7D3342, 0x3AC32046, (1297591339, -6), (1297591307, -6)),
    (0x3A190786, 0x39A83FCA, 0x3A5ECB95, (1938839101, -12), (1938839112, -12)),
    (0x3F0547E2, 0x3E5B967B, 0x3E33B5B1, (1366136534, 0), (1366136532, 0)),
    (0x3E29F31E, 0x3A387C3D, 0x3B037FEC, (2000079635, -4), (2000079590, -4)),
    (0x3D0EABF8, 0x3DB7667C, 0x3E8A66D1, (1585940249, -6), (1585940227, -6)),
    (0x3EADF3CD, 0x398D3637, 0x3CEBF0CF, (1746699934, -8), (1746699992, -8)),
    (0x3D556189, 0x3C400755, 0x3A20410E, (2144877202, 0), (2144877257, 0)),
    (0x3C0F809B, 0x3990976A, 0x3F0E177B, (1224962618, -17), (1224962609, -17)),
    (0x3E989436, 0x3C8BB922, 0x3AF13897, (1482749324, 2), (1482749376, 2)),
    (0x3EE17698, 0x3CAE8CF3, 0x3EB18982, (1859506723, -5), (1859506756, -5)),
    (0x3E826A3B, 0x3C444122, 0x3BA7CA9F, (1279578266, 0), (1279578260, 0)),
    (0x00000001, 0x3F800000, 0x3F800000, (0, 0), (0, 0)),
    (0x00800000, 0x00800000, 0x7F7FFFFF, (0, 0), (0, 0)),
    (0x3F800000, 0x3F800000, 0x3F800000, (1073741824, 1), (1073741824, 1)),
    (0x3F7FFFFF, 0x3F7FFFFF, 0x3F800000, (2147483392, 0), (2147483392, 0)),
    (0x3F800000, 0x3F7FFFFF, 0x3F800001, (2147483264, 0), (2147483264, 0)),
    (0x0000FFFF, 0x41234567, 0x00000123, (1204867874, 12), (1204868294, 12)),
    (0x3CDDA7E1, 0x3BC3B3CD, 0x3A0A2D49, (1316738556, -1), (1316738588, -1)),
    (0x3AFC04FD, 0x3E3D9412, 0x393EF706, (2098742851, 1), (2098742918, 1)),
    (0x394456BA, 0x3D0DDF25, 0x3AC9D333, (1157755032, -7), (1157755011, -7)),
    (0x3C788D9B, 0x3C0C807F, 0x3B30F6B1, (1655417139, -4), (1655417115, -4)),
    (0x3F79CE82, 0x3A3C11C0, 0x3BA60FCE, (1186621924, -2), (1186621878, -2)),
    (0x3A48795B, 0x3D162ADE, 0x3AC276B6, (1298629539, -5), (1298629553, -5)),
    (0x3B46E7E7, 0x3DD1FFC3, 0x3B10F2B0, (1208683646, -2), (1208683656, -2)),
    (0x3C9A1C75, 0x3ED8682C, 0x39A08D0B, (1742538057, 5), (1742538009, 5)),
    (0x39614CF8, 0x3A7DC81A, 0x3DF76B01, (1938569192, -19), (1938569207, -19)),
    (0x3D0097E4, 0x3A8909AB, 0x3B1F2AE9, (1857478905, -6), (1857478803, -6)),
)


def layer_multiplier(source, weight, output, per_channel):
    product = multipliers.times(multipliers.real(source), multipliers.real(weight))
    if not per_channel:
        product = multipliers.single(product)
    return multipliers.quantized(multipliers.divided(product, multipliers.real(output)))


def test_multipliers_are_those_of_doubles():
    for source, weight, output, tensor, channel in MULTIPLIERS:
        assert layer_multiplier(source, weight, output, False) == tensor, (source, weight, output)
        assert layer_multiplier(source, weight, output, True) == channel, (source, weight, output)


def test_requantize_rounds_half_away_from_zero_twice():
    half = 1 << 30  # m = 2^30 is 1/2
    assert [requantize(acc, half, 0) for acc in (-3, -2, -1, 0, 1, 2, 3)] == [-1, -1, 0, 0, 1, 1, 2]
    assert [requantize(acc, half, 1) for acc in (-3, 0, 3)] == [-3, 0, 3]
    assert [requantize(acc, half, -1) for acc in (-6, -5, -2, 2, 5, 6)] == [-2, -1, -1, 1, 2, 2]
    assert requantize(1 << 29, half, -31) == 0
    assert requantize(-0x7FFFFFFF, 0x7FFFFFFF, 0) == -0x7FFFFFFE


def test_scales_that_are_no_numbers_are_refused():
    for bits in (0, 0x80000000, 0xBF800000, 0x7F800000, 0x7FC00000, 0xFFFFFFFF):
        try:
            multipliers.real(bits)
        except ModelError as error:
            assert "scale" in str(error)
        else:
            assert False, "0x%08x passed" % bits
    assert multipliers.real(1) == (1 << 23, -149 - 23)  # the smallest subnormal
    assert multipliers.real(0x3F800000) == (1 << 23, -23)


def test_a_run_takes_the_size_it_says():
    model = load_model(read(models()[0] + "/model.tflite"))
    for size in (0, model.input_size - 1, model.input_size + 1):
        try:
            model.run(bytes(size))
        except ModelError as error:
            assert "input" in str(error)
        else:
            assert False, "%d bytes passed" % size
    assert len(model.run(bytes(model.input_size))) == model.output_size


def test_the_same_buffer_comes_back():
    model = load_model(read(models()[0] + "/model.tflite"))
    assert model.run(bytes(model.input_size)) is model.run(bytes(model.input_size))


def test_unknown_kernels_are_refused():
    try:
        load_model(read(models()[0] + "/model.tflite"), "fast")
    except ModelError as error:
        assert "fast" in str(error)
    else:
        assert False


def test_viper_allocates_nothing():
    """Measured with the collector off: after one run, a second takes not a byte of heap, on 32 bit too."""
    if "viper" not in kernels():
        return
    for path in models():
        model = load_model(read(path + "/model.tflite"), "viper")
        if path.endswith(("/operators", "/extreme")):  # in plain Python, or with rows that need 64 bits
            continue
        x = bytes([(i * 37) & 255 for i in range(model.input_size)])
        model.run(x)
        gc.collect()
        gc.disable()
        before = gc.mem_alloc()
        model.run(x)
        after = gc.mem_alloc()
        gc.enable()
        assert after == before, "%s: %d B" % (path, after - before)
