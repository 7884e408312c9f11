"""The reader: what it finds in a file, and that a hostile file gets a ModelError and nothing else.

The corpus holds mutated files, one for each way of being refused, and whatever fuzzing found (`stonechat soak reader`).
"""

import os

from share import EVERY, some
from stonechat.errors import ModelError
from stonechat.int8 import tflite
from stonechat.model import load_model
from test_golden import HERE, models, read

CORPUS = HERE + "/../corpus/tflite"


def refusal(data):
    """What the ModelError says, or None where the file loads and runs."""
    try:
        model = load_model(data)
        model.run(bytes(model.input_size))
        return None
    except ModelError as error:
        return str(error)


def dense():
    return [path for path in models() if path.endswith("/dense-channel")][0] + "/model.tflite"


def test_it_reads_what_is_there():
    graph = tflite.read(read(dense()))
    assert graph.operator_count == 4
    assert graph.inputs == (0,) and graph.outputs == (12,)
    code, inputs, outputs, options = graph.operator(0)
    assert (code, inputs, outputs) == (9, (0, 1, 2), (3,))
    weights = graph.tensor(1)
    assert (weights.kind, weights.shape, weights.size, weights.data_bytes) == (tflite.INT8, (11, 19), 209, 209)
    assert weights.scales == 11 and weights.zero_point == 0 and weights.axis == 0
    assert graph.tensor(2).kind == tflite.INT32 and graph.tensor(2).data_bytes == 44
    assert graph.tensor(0).data_bytes == 0 and graph.tensor(0).zero_point in (-128, 127, 0, -1, 64)
    assert graph.metadata("stonechat") is None


def test_a_file_reads_as_its_bytes_do():
    data = read(dense())
    with open(dense(), "rb") as file:
        lazy, whole = tflite.read(file), tflite.read(data)
        assert lazy.held is None and whole.held == data
        for number in range(whole.tensor_count):
            a, b = lazy.tensor(number), whole.tensor(number)
            assert (a.kind, a.shape, a.scale, a.zero_point) == (b.kind, b.shape, b.scale, b.zero_point)
            assert (a.data_at, a.data_bytes) == (b.data_at, b.data_bytes)
            assert bytes(lazy.bytes(a.data_at, a.data_bytes)) == bytes(whole.bytes(b.data_at, b.data_bytes))
        assert lazy.operator(3) == whole.operator(3)


def test_weights_are_not_copied():
    data = read(dense())
    graph = tflite.read(data)
    weights = graph.tensor(1)
    view = graph.bytes(weights.data_at, weights.data_bytes)
    assert isinstance(view, memoryview)
    assert bytes(view) == data[weights.data_at : weights.data_at + weights.data_bytes]


def test_every_truncation_is_refused_or_runs():
    """Cut at each place: the writer puts the root table first, so nothing short of a few bytes at the end survives."""
    data = read(dense())
    step = 7 * EVERY
    refused = 0
    for size in range(0, len(data), step):
        refused += refusal(data[:size]) is not None
    assert refused >= len(range(0, len(data), step)) - 4, refused


def test_every_flipped_bit_of_the_structure_is_survived():
    data = bytearray(read(dense()))
    outcomes = {}
    for at in some(range(0, len(data), 11)):
        for bit in (0, 7):
            data[at] ^= 1 << bit
            outcome = refusal(bytes(data)) is None
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            data[at] ^= 1 << bit
    assert outcomes[True] > 20 // EVERY and outcomes[False] > 20 // EVERY, outcomes


def test_the_corpus_is_refused():
    names = sorted(os.listdir(CORPUS))
    assert len(names) >= 40
    for name in names:
        said = refusal(read(CORPUS + "/" + name))
        assert (said is None) == name.startswith("loads"), "%s: %s" % (name, said)


def test_an_unsupported_operator_is_named():
    assert refusal(read(CORPUS + "/operator-softmax.tflite")).endswith("SOFTMAX is not supported")


def test_other_things_are_no_models():
    for data in (b"", b"TFL3", bytes(1000), b"\xff" * 1000, bytes(4) + b"TFL3" + bytes(100), b"\xff" * 4 + b"TFL3" * 9):
        assert refusal(data), data[:8]
