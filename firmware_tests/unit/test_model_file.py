"""The plan at the end of a model file: a board runs by it what the full reader proves, and a damaged, cut or hostile
one gives a ModelError and nothing else."""

import gc
import json
from binascii import hexlify, unhexlify

from share import EVERY, some
from stonechat import model_file
from stonechat.errors import ModelError
from stonechat.int8 import interpreter
from stonechat.int8.network import Network, Source
from stonechat.model import END_BYTES, load_model
from test_golden import kernels, models, read


def shipped():
    return [path for path in models() if "/models/" in path]


def small():
    """The smallest of the shipped models."""
    return min([read(path + "/model.tflite") for path in shipped()], key=len)


def end_of(data):
    """Where the content at the end of a model file begins."""
    size, plan = model_file.sizes(data)
    return len(data) - END_BYTES - plan - size


def outcome(data):
    """ "runs", or what the ModelError says."""
    try:
        model = load_model(data)
        model.run(bytes(model.input_size))
        return "runs"
    except ModelError as error:
        return str(error)


def test_shipped_models_run_by_their_plan():
    assert shipped()
    for path in shipped():
        record = json.loads(read(path + "/golden.json"))
        for backend in kernels():
            for resident_bytes in (None, 0, 200, 16384):
                with open(path + "/model.tflite", "rb") as file:
                    if resident_bytes is None:
                        model = load_model(file.read(), backend)
                    else:
                        model = load_model(file, backend, resident_bytes)
                    assert not isinstance(model, interpreter.Interpreter)
                    for x, y, _ in record["vectors"][:8]:
                        assert hexlify(model.run(unhexlify(x))).decode() == y, (path, backend, resident_bytes)
        gc.collect()


def test_the_plan_of_every_chain_runs_as_its_graph():
    """The tests' own models: rows that need 4 bits at a time and 64 bits, a scale per row and one for all."""
    planned = 0
    for path in models():
        data, record = read(path + "/model.tflite"), json.loads(read(path + "/golden.json"))
        graph = interpreter.read(data)
        plan = model_file.plan(graph)
        if not plan:
            assert path.endswith("/operators")
            continue
        network = Network()
        network.load_plan(Source(data + plan), len(data), len(data) + len(plan))
        assert network.macs == graph.macs
        for x, y, _ in record["vectors"]:
            assert hexlify(network.run(unhexlify(x))).decode() == y, path
        planned += 1
        gc.collect()
    assert planned >= 5


def test_shipped_models_are_proved():
    for path in models():
        model_file.prove(read(path + "/model.tflite"))


def test_every_cut_and_every_flipped_bit_is_told():
    data = small()
    for size in some(range(end_of(data), len(data), 23)):
        assert outcome(data[:size]) != "runs" or load_model(data[:size]).metadata is None, size
    damaged = bytearray(data)
    for at in some(range(0, len(data) - 16, 37)):
        damaged[at] ^= 1 << at % 8
        assert outcome(damaged) == "damaged", at
        damaged[at] ^= 1 << at % 8
    for at in range(len(data) - 16, len(data)):
        damaged[at] ^= 4
        assert outcome(damaged) != "runs" or load_model(damaged).metadata is None, at
        damaged[at] ^= 4
    assert outcome(damaged) == "runs"


def test_a_hostile_plan_is_refused_or_runs():
    """Anything at any place, with a checksum that holds: the kernels check nothing, so the reader must."""
    data = bytearray(small())
    start = end_of(data)
    outcomes = {}
    for at in some(range(start, len(data) - 4)):
        kept = data[at]
        for value in (kept ^ 1, kept ^ 0x80, 255, 0):
            data[at] = value
            said = outcome(model_file.seal(bytes(data)))
            outcomes[said] = outcomes.get(said, 0) + 1
        data[at] = kept
        if not at & 31:
            gc.collect()
    least = 100 // EVERY
    assert outcomes["runs"] > least and sum(outcomes.values()) - outcomes["runs"] > least, outcomes


def test_layers_that_do_not_fit_are_refused():
    data = small()
    size, plan = model_file.sizes(data)
    at = len(data) - END_BYTES - plan
    # position, inputs, rows, zero, low, high, step, digit of the first layer; then m and shift of its last row
    for place, value in (
        (0, len(data)),
        (0, -1),
        (4, 0),
        (4, 4097),
        (8, 0),
        (8, -1),
        (8, 1),
        (8, 0x7FFFFFFF),
        (16, -1),
        (20, 256),
        (24, 1),
        (24, -2),
        (28, 1),
        (28, -8),
    ):
        hostile = bytearray(data)
        hostile[at + place : at + place + 4] = model_file.struct_pack("<i", value)
        said = outcome(model_file.seal(bytes(hostile)))
        assert said != "runs", (place, value)


def test_a_plan_that_is_not_the_graphs_is_told():
    data = bytearray(small())
    size, plan = model_file.sizes(data)
    at = len(data) - END_BYTES - plan
    data[at + 32] ^= 1  # a bias
    changed = model_file.seal(bytes(data))
    assert outcome(changed) == "runs"
    for given, word in ((changed, "not that of the graph"), (bytes(data), "damaged")):
        try:
            model_file.prove(given)
        except ModelError as error:
            assert word in str(error)
        else:
            assert False, word
