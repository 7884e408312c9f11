"""The writer: the same bytes for the same layers, what the schema asks for, and refusals that say why."""

import numpy as np
import pytest
import tflite
from stonechat_tools.modeling.tflite_writer import Layer, write


def layers() -> list[Layer]:
    generator = np.random.default_rng(2)
    return [
        Layer(generator.integers(-127, 128, (5, 7)), generator.integers(-99, 99, 5), 0.01, 0.05, -128, "relu"),
        Layer(generator.integers(-127, 128, (7, 5)), generator.integers(-99, 99, 7), np.full(7, 0.02), 1 / 16),
    ]


def test_the_same_layers_give_the_same_bytes() -> None:
    files = [write(layers(), input_scale=1 / 16, metadata={"a": b"1", "b": b"22"}) for _ in range(2)]
    assert files[0] == files[1]


def test_every_buffer_is_aligned_and_every_layer_has_a_bias() -> None:
    data = write(layers(), input_scale=1 / 16, metadata={"stonechat": b"x" * 33})
    model = tflite.Model.GetRootAs(data, 0)
    assert data[4:8] == b"TFL3" and model.Version() == 3
    filled = 0
    for number in range(model.BuffersLength()):
        content = model.Buffers(number).DataAsNumpy()
        if not isinstance(content, int) and content.size:
            filled += 1
            assert (content.__array_interface__["data"][0] - np.frombuffer(data, np.uint8).ctypes.data) % 16 == 0
    assert filled == 5
    graph = model.Subgraphs(0)
    assert [graph.Operators(i).InputsLength() for i in range(graph.OperatorsLength())] == [3, 3]
    assert graph.Tensors(graph.Operators(1).Inputs(1)).Quantization().ScaleLength() == 7
    assert model.Metadata(0).Name() == b"stonechat"
    assert bytes(model.Buffers(model.Metadata(0).Buffer()).DataAsNumpy()) == b"x" * 33


def test_litert_loads_it_too() -> None:
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    runner = interpreter.Interpreter(model_content=write(layers(), input_scale=1 / 16))
    runner.allocate_tensors()
    assert tuple(runner.get_output_details()[0]["shape"]) == (1, 7)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights": [[200]], "bias": [0]}, "int8"),
        ({"weights": [[0.5]], "bias": [0]}, "whole numbers"),
        ({"bias": [2**31]}, "int32"),
        ({"bias": [0, 0]}, "bias"),
        ({"weight_scale": [0.1, 0.1]}, "scales"),
        ({"weight_scale": 0.0}, "above 0"),
        ({"activation": "gelu"}, "gelu"),
        ({"output_zero_point": 128}, "zero point"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], said: str) -> None:
    fields = {"weights": [[1]], "bias": [0], "weight_scale": 0.1, "output_scale": 0.1, **change}
    with pytest.raises(ValueError, match=said):
        write([Layer(**fields)], input_scale=0.1)  # type: ignore[arg-type]


def test_layers_must_chain() -> None:
    with pytest.raises(ValueError, match="input"):
        write([Layer([[1, 2]], [0], 0.1, 0.1), Layer([[1, 2]], [0], 0.1, 0.1)], input_scale=0.1)
    with pytest.raises(ValueError, match="at least one"):
        write([], input_scale=0.1)
