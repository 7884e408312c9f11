"""Every runtime gives the bytes of the reference: each golden vector of the tests' own models and of the shipped ones.

Output and layer by layer, with plain and (where it exists) viper kernels, from memory and from the open file.
"""

import gc
import json
import os
from binascii import hexlify, unhexlify

from share import some
from stonechat.compat import sha256
from stonechat.errors import ModelError
from stonechat.int8 import interpreter, tflite

HERE = __file__.rsplit("/", 1)[0] if "/" in __file__ else "."
FOLDERS = (HERE + "/../golden", HERE + "/../../models")


def models():
    """Folders with a model.tflite and a golden.json."""
    found = []
    for folder in FOLDERS:
        for name in sorted(os.listdir(folder)):
            path = folder + "/" + name
            try:
                os.stat(path + "/model.tflite")
            except OSError:
                continue
            found.append(path)
    return found


def read(path):
    with open(path, "rb") as file:
        return file.read()


def read_json(path):
    """Piece by piece: the text itself is longer than a gap of a small heap."""
    gc.collect()
    with open(path) as file:
        return json.load(file)


def kernels():
    try:
        interpreter.Interpreter(tflite.read(read(models()[0] + "/model.tflite")), "viper")
        return ("plain", "viper")
    except ModelError:
        return ("plain",)


def check(interpreter, record, name):
    for number, (x, y, layers) in enumerate(record["vectors"]):
        out = interpreter.run(unhexlify(x))
        assert hexlify(out).decode() == y, "%s vector %d: %s, not %s" % (name, number, hexlify(out), y)
        for tensor, expected in zip(record["tensors"], layers):
            value = bytes([byte ^ 128 for byte in interpreter.values[tensor]])
            assert hexlify(value).decode() == expected, "%s vector %d, tensor %d" % (name, number, tensor)


def test_there_are_models():
    assert len([path for path in models() if "/golden/" in path]) >= 5


def test_every_vector_from_memory():
    for path in some(models()):
        data, record = read(path + "/model.tflite"), read_json(path + "/golden.json")
        assert hexlify(sha256(data).digest()).decode() == record["sha256"], path
        assert record["vectors"]
        for name in kernels():
            check(interpreter.Interpreter(tflite.read(data), name), record, path + " " + name)
        gc.collect()


def test_every_vector_with_the_weights_in_the_file():
    for path in some(models()):
        record = read_json(path + "/golden.json")
        for resident_bytes in (0, 200):
            with open(path + "/model.tflite", "rb") as file:
                check(interpreter.Interpreter(tflite.read(file), None, resident_bytes), record, path)
        gc.collect()


def test_the_models_reach_every_width_of_the_arithmetic():
    """Accumulators that are multiplied 8 bits and 4 bits at a time, and by 64 bits, all occur."""
    digits = set()
    for path in models():
        digits.update(interpreter.Interpreter(tflite.read(read(path + "/model.tflite"))).digits)
    assert digits == {0, 4, 8}, digits
