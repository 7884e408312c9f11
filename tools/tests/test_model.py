"""load_model: files that nobody here made, big ones, other back ends, metadata, and files that lie on a medium."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from stonechat import model_file
from stonechat.errors import ModelError
from stonechat.int8 import tflite
from stonechat.linux.tflite_runtime import TfliteRuntime
from stonechat.model import load_model
from stonechat_tools.modeling.tflite_writer import Layer, Writer, write
from stonechat_tools.proofs import generated


def small(metadata: dict[str, bytes] | None = None) -> bytes:
    layer = Layer(weights=[[1, 2], [3, -4]], bias=[5, 6], weight_scale=0.5, output_scale=1.0)
    return write([layer], input_scale=1.0, metadata=metadata)


def test_what_a_model_says() -> None:
    data = small()
    model = load_model(data)
    assert (model.input_size, model.output_size, model.macs) == (2, 2, 4)
    assert model.digest == hashlib.sha256(data).digest()[:8]
    assert model.metadata is None
    # acc = 5 + 1 + 2 * 2 = 10 -> 5; 6 + 3 - 8 = 1 -> 0.5, away from zero
    assert bytes(model.run(bytes([1, 2]))) == bytes([5, 1])


def test_metadata_of_others_and_of_an_older_format() -> None:
    data = small({"other": b"x" * 9})
    model_file.prove(data)
    assert bytes(tflite.read(data).metadata("other")) == b"x" * 9
    older = small({"stonechat": b"\xac\x01\x01" + bytes(40)})
    assert load_model(older).metadata is None
    with pytest.raises(ModelError, match="older format"):
        model_file.prove(older)


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_big_model_runs(per_channel: bool) -> None:
    data = generated.chain(np.random.default_rng(5), [640, 200, 8, 200, 405, 88], per_channel)
    assert 250_000 < len(data) <= 276_480
    pytest.importorskip("tflite_runtime")
    x = bytes(range(256)) * 2 + bytes(128)
    assert bytes(load_model(data).run(x)) == bytes(load_model(data, TfliteRuntime).run(x))


def test_from_a_file_as_from_memory(tmp_path: Path) -> None:
    data = generated.chain(np.random.default_rng(6), [64, 40, 33, 64], True)
    path = tmp_path / "model.tflite"
    path.write_bytes(data)
    whole = load_model(data)
    x = np.random.default_rng(1).integers(0, 256, 64).astype(np.uint8).tobytes()
    for resident_bytes in (0, 2000, 3000, 10**6):
        with path.open("rb") as file:
            model = load_model(file, resident_bytes=resident_bytes)
            assert model.digest == whole.digest
            assert model.run(x) == whole.run(x)


def test_memoryviews_and_bytearrays() -> None:
    data = small()
    for given in (bytearray(data), memoryview(data), memoryview(bytearray(data))):
        assert bytes(load_model(given).run(bytes([1, 2]))) == bytes([5, 1])


def test_tflite_runtime_says_what_it_refuses() -> None:
    pytest.importorskip("tflite_runtime")
    backend = load_model(small(), TfliteRuntime)
    with pytest.raises(ModelError, match="input: 3 bytes"):
        backend.run(bytes(3))
    assert bytes(backend.run(bytes([1, 2]))) == bytes([5, 1])


def test_float_edges_are_peeled_off() -> None:
    """A converter's default: float in, QUANTIZE, int8 inside, DEQUANTIZE, float out. We speak the int8 in between."""
    import tflite

    writer = Writer()
    source = writer.activation([1, 2], "float_in", 0.5, 0, tflite.TensorType.FLOAT32)
    inner = writer.activation([1, 2], "quantized", 1.0, 0)
    writer.operator(tflite.BuiltinOperator.QUANTIZE, [source], [inner])
    dense = writer.dense(inner, Layer([[1, 2], [3, -4]], [5, 6], 0.5, 1.0), "dense")
    target = writer.activation([1, 2], "float_out", 1.0, 0, tflite.TensorType.FLOAT32)
    writer.operator(tflite.BuiltinOperator.DEQUANTIZE, [dense], [target])
    writer.inputs, writer.outputs = [source], [target]
    model = load_model(writer.finish())
    assert bytes(model.run(bytes([1, 2]))) == bytes([5, 1])


def test_other_types_at_the_edges_are_refused() -> None:
    """uint8 is not float: its QUANTIZE moves the zero point, and peeling that off would change the numbers."""
    import tflite

    writer = Writer()
    source = writer.activation([1, 2], "input", 1.0, 0, tflite.TensorType.UINT8)
    inner = writer.activation([1, 2], "quantized", 1.0, -128)
    writer.operator(tflite.BuiltinOperator.QUANTIZE, [source], [inner])
    writer.inputs, writer.outputs = [source], [inner]
    with pytest.raises(ModelError, match="int8 activation"):
        load_model(writer.finish())


def test_a_row_that_could_overflow_is_refused() -> None:
    layer = Layer(weights=[[1], [127]], bias=[0, 2**31 - 1], weight_scale=0.5, output_scale=1.0)
    with pytest.raises(ModelError, match="operator 0 FULLY_CONNECTED: row 1 could reach 2\\^31"):
        load_model(write([layer], input_scale=1.0))
    layer.bias = [0, 2**31 - 1 - 127 * 128]
    load_model(write([layer], input_scale=1.0))


def test_work_is_bounded() -> None:
    """Operators that share one weight matrix: a small file could ask for any number of multiplications."""
    writer = Writer()
    width = 512
    layer = Layer(np.ones((width, width)), np.zeros(width), 0.01, 1.0)
    tensor = writer.activation([1, width], "input", 1.0)
    writer.inputs = [tensor]
    for number in range(8):
        tensor = writer.dense(tensor, layer, f"dense{number}")
    writer.outputs = [tensor]
    with pytest.raises(ModelError, match="multiply-accumulates"):
        load_model(writer.finish())


def test_the_daemon_can_compute_with_tflite_runtime() -> None:
    pytest.importorskip("tflite_runtime")
    from stonechat.linux.channels import read_model

    shipped = Path(__file__).resolve().parents[2] / "models" / "micropython-1" / "model.tflite"
    own, other = (read_model(str(shipped), backend) for backend in ("own", "tflite"))
    assert isinstance(other, TfliteRuntime) and not isinstance(own, TfliteRuntime)
    x = bytes(range(own.input_size))
    assert bytes(own.run(x)) == bytes(other.run(x))
    assert own.digest == other.digest
