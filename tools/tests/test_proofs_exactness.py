"""Bit for bit: the agent's kernels against TFLite Micro and tflite-runtime's reference kernels (`stonechat soak exact`
is the full claim), and the multipliers against the doubles that TFLite derives them with."""

import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stonechat.int8 import requantize
from stonechat.model import load_model
from stonechat_tools.modeling import oracles
from stonechat_tools.proofs import exactness, generated
from stonechat_tools.proofs.interpreters import interpreter

pytest.importorskip("tflite_micro")
pytest.importorskip("tflite_runtime")
MODELS = generated.claim_models()
VIPER = interpreter("unix-x64").missing is None


def test_the_claim_covers_what_it_says() -> None:
    models = [load_model(data) for data in MODELS.values()]
    assert len(models) >= 40
    digits = {digit for model in models for digit in model.digits}
    assert digits == {0, 4, 8}
    assert {1, 640} <= {model.input_size for model in models}
    assert {1, 8} <= {len(model.digits) for model in models}


@pytest.mark.parametrize("name", list(MODELS)[::5])
def test_no_byte_differs(name: str) -> None:
    data = MODELS[name]
    inputs = oracles.inputs(np.random.default_rng(3), load_model(data).input_size, 60)
    assert not any(exactness.differences(data, inputs, viper=VIPER).values())


@settings(max_examples=200, deadline=None)
@given(
    widths=st.lists(st.integers(1, 40), min_size=2, max_size=6),
    seed=st.integers(0, 2**32 - 1),
    per_channel=st.booleans(),
    extreme=st.booleans(),
)
def test_any_chain_is_exact(widths: list[int], seed: int, per_channel: bool, extreme: bool) -> None:
    generator = np.random.default_rng(seed)
    data = generated.chain(generator, widths, per_channel, extreme)
    inputs = oracles.inputs(generator, widths[0], 20)
    assert not any(exactness.differences(data, inputs, viper=False).values())


@settings(max_examples=60, deadline=None)
@given(widths=st.lists(st.integers(1, 60), min_size=2, max_size=7), seed=st.integers(0, 2**32 - 1))
def test_any_autoencoder_is_exact(widths: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    data = generated.autoencoder(generator, widths)
    inputs = generator.normal(0, 16, (20, widths[0])).clip(-128, 127).astype(np.int8)
    assert not any(exactness.differences(data, inputs, viper=False).values())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), width=st.integers(1, 12))
def test_any_graph_of_all_operators_is_exact(seed: int, width: int) -> None:
    generator = np.random.default_rng(seed)
    data = generated.operators(generator, width)
    inputs = oracles.inputs(generator, width, 20)
    own = oracles.outputs(load_model(data), inputs)
    assert (oracles.outputs(oracles.TfliteMicro(data), inputs) == own).all()


def bits(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def quantize_multiplier(value: float) -> tuple[int, int]:
    """TFLite's QuantizeMultiplier, in doubles (tensorflow/lite/kernels/internal/quantization_util.cc)."""
    fraction, shift = math.frexp(value)
    m = math.floor(fraction * (1 << 31) + 0.5)
    if m == 1 << 31:
        m //= 2
        shift += 1
    return (0, 0) if shift < -31 else (m, shift)


scales = st.floats(min_value=2.0**-126, max_value=2.0**40, width=32)


@settings(max_examples=2000, deadline=None)
@given(source=scales, weight=scales, output=scales)
def test_multipliers_are_those_of_doubles(source: float, weight: float, output: float) -> None:
    with np.errstate(over="ignore", under="ignore"):
        single = float(np.float32(source) * np.float32(weight))
    exact = requantize.times(requantize.real(bits(source)), requantize.real(bits(weight)))
    for rounded, product in ((False, source * weight), (True, single)):
        if not product:
            continue
        expected = quantize_multiplier(product / output)
        if expected[1] > 30:
            continue  # refused: beyond the arithmetic
        pair = requantize.single(exact) if rounded else exact
        assert requantize.quantized(requantize.divided(pair, requantize.real(bits(output)))) == expected
