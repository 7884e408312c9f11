"""Every runtime makes of a window what the tools made of it: counters -> int8 input -> output -> score -> surprise, for
the shipped models' own recorded windows and for the ends of the range."""

import gc
import json
import os
from binascii import hexlify

from stonechat.detection import Detector, Verdict
from stonechat.features import Normalization
from stonechat.model import load_model

HERE = __file__.rsplit("/", 1)[0] if "/" in __file__ else "."
MODELS = HERE + "/../../models"


class Columns:
    """What Normalization asks of a schema, from golden.json: a board need not carry the Linux schemas for this."""

    def __init__(self, kinds):
        self.kinds = kinds

    def __len__(self):
        return len(self.kinds)


def shipped():
    found = []
    for name in sorted(os.listdir(MODELS)):
        path = MODELS + "/" + name
        try:
            os.stat(path + "/golden.json")
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


def test_windows_of_the_shipped_models():
    checked = 0
    for path in shipped():
        record = read_json(path + "/golden.json")
        model = load_model(read(path + "/model.tflite"))
        meta = model.metadata
        normalization = Normalization(Columns(record["kinds"]), meta.normalization)
        detector = Detector(meta, Verdict(len(meta)), normalization.excess)
        f_q8, x = [0] * len(meta), bytearray(len(meta))
        for window in record["windows"]:
            normalization.fill_q8(window["deltas"], window["elapsed_ms"], meta.window_ms, f_q8)
            normalization.fill(f_q8, x)
            assert hexlify(x).decode() == window["x"], path
            y = bytes(model.run(x))
            assert hexlify(y).decode() == window["y"], path
            score_q8 = detector.score(x, y)
            assert score_q8 == window["score_q8"], (path, score_q8)
            assert detector.surprise(score_q8) == window["surprise_q8"], path
            checked += 1
        gc.collect()
    assert checked >= 12
