"""The stonechat metadata at the end of a .tflite, in a fixed layout: the reader.

The file ends in the content of its FlatBuffer metadata buffer named "stonechat", so that a board finds it without
reading the graph:

    metadata      FORM, little-endian, then as many bytes as it states (see Metadata)
    plan          the network's layers, ready to run (int8/network.py), or nothing
    the end       16 bytes (model.END): size of the metadata, size of the plan, a mark that names the format, and a
                  CRC-32 of all the file before it

The reader checks sizes, which memory safety needs. The meaning of the numbers is checked by model_file.check before a
file leaves the tools. A .tflite from another tool has no such end: it runs, but it can't be bound to a device
(scorer.py).
"""

from struct import calcsize, unpack_from

from .compat import const
from .errors import ModelError

FORM = "<8sIIHHHHHBBBBBB"
_FORM_BYTES = const(32)
# of a new one: a scale of 1, a drift of 9 and 8, otherwise nothing
_NEW = b"\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\x09\x08\0\0\0\0\n"


class Metadata:
    """name, version, schema_name, schema_id (8 bytes), window_ms: to what the model is bound.
    normalization: packed, five bytes a feature (features.Normalization reads it).
    kind: model_file.RECONSTRUCTION or RESIDUAL. weights: bytes, one per output in Q4 (16 is 1), or None for all ones.
    knots: ((score_q8, surprise_q8), ...), rising: the calibration table. tail_q8: surprise per doubling of the score
    beyond the last knot. location_q8, scale_q8: median and upper spread of the benign log score behind the table.
    alarm_rules: ((allowance_q8, cap_q8, threshold_q8), ...): CUSUM constants (detection.py).
    learn_windows: what a fresh device learns before it may alarm (0: nothing). drift_shift, drift_cap: adaptation.py.
    golden: ((x, y, score_q8), ...): inputs, the outputs they must give, and their scores.

    block: bytes-like, as model_file.pack makes it; left out, a new one. Raises ModelError where the sizes are wrong, or
    where there is nothing to score with."""

    schema_id: bytes
    version: int
    window_ms: int
    tail_q8: int
    location_q8: int
    scale_q8: int
    learn_windows: int
    drift_shift: int
    drift_cap: int
    kind: int
    weights: bytes | None
    knots: tuple[tuple[int, int], ...]
    alarm_rules: tuple[tuple[int, int, int], ...]
    golden: tuple[tuple[bytes, bytes, int], ...]

    def __init__(self, block: bytes | bytearray | memoryview = _NEW) -> None:
        try:
            if len(block) < _FORM_BYTES:
                raise ValueError
            (
                self.schema_id,
                self.version,
                self.window_ms,
                n,
                self.tail_q8,
                self.location_q8,
                self.scale_q8,
                self.learn_windows,
                self.drift_shift,
                self.drift_cap,
                self.kind,
                knots,
                alarm_rules,
                golden,
            ) = unpack_from(FORM, block, 0)
            at = _FORM_BYTES + 5 * n
            texts = at + n + 4 * knots + 8 * alarm_rules + (2 * n + 2) * golden
            if texts > len(block) or block is not _NEW and 0 in (n, knots, alarm_rules, self.window_ms, self.scale_q8):
                raise ValueError
            self.normalization = bytes(block[_FORM_BYTES:at])
            self.weights = bytes(block[at : at + n]) or None
            at += n
            self.knots = _rows("<HH", block, at, knots)
            at += 4 * knots
            self.alarm_rules = _rows("<HHI", block, at, alarm_rules)
            if 0 in [rule[2] for rule in self.alarm_rules]:
                raise ValueError
            self.golden = _rows("<%ds%dsH" % (n, n), block, at + 8 * alarm_rules, golden)
            self.name, self.schema_name = str(bytes(block[texts:]), "utf-8").split("\n")
        except ValueError:
            raise ModelError("metadata: malformed")

    def __len__(self) -> int:
        """The number of features."""
        return len(self.normalization) // 5


def _rows(form, block, at, count) -> tuple:
    size = calcsize(form)
    return tuple([unpack_from(form, block, at + size * i) for i in range(count)])
