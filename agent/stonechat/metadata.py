"""What a model file says about itself: a CBOR map in the .tflite's metadata buffer named "stonechat".

The map has small integer keys (the constants below). `Metadata` is its parsed and checked form; `parse` and `pack`
are each other's inverse. A file from somebody else's hand has no such buffer: it runs, but it can't be bound to a
device (head.py refuses it).
"""

from struct import unpack_from

from . import cbor
from .compat import const
from .errors import ModelError, WireError

BUFFER = "stonechat"  # read by the device
INFO_BUFFER = "stonechat.info"  # columns, provenance, training figures: read by the tools only
FORMAT = const(1)

RECONSTRUCTION = const(0)  # the output is the input rebuilt: the residual is x - y
RESIDUAL = const(1)  # the output is the (whitened) residual itself

MAX_KNOTS = const(64)
MAX_RUNGS = const(4)
MAX_GOLDEN = const(8)
MAX_FEATURES = const(640)

_TEXT = ((2, "name"), (4, "schema_name"))
_INTS = ((3, "version"), (6, "window_ms"), (8, "kind"))


class Metadata:
    """name, version, schema_name, schema_id (8 bytes), window_ms: to what the model is bound.
    normalization: packed, five bytes a feature (features.Normalization reads it).
    kind: RECONSTRUCTION or RESIDUAL. weights: bytes, one per output in Q4 (16 is 1), or None for all ones.
    knots: ((score_q8, surprise_q8), ...), rising: the calibration table. tail_q8: surprise per doubling of the score
    beyond the last knot. place_q8, spread_q8: median and upper spread of the benign log score behind the table.
    rungs: ((k_q8, cap_q8, alarm_q8), ...): the evidence charts (detection.py).
    learn_windows: what a fresh device learns before it may alarm (0: nothing). drift_shift, drift_cap: adaptation.py.
    golden: ((x, y, score_q8), ...): inputs, the outputs they must give, and their scores."""

    def __init__(self) -> None:
        self.name = ""
        self.version = 0
        self.schema_name = ""
        self.schema_id = b""
        self.window_ms = 0
        self.normalization = b""
        self.kind = RECONSTRUCTION
        self.weights: bytes | None = None
        self.knots: tuple[tuple[int, int], ...] = ()
        self.tail_q8 = 0
        self.place_q8 = 0
        self.spread_q8 = 1
        self.rungs: tuple[tuple[int, int, int], ...] = ()
        self.learn_windows = 0
        self.drift_shift = 9
        self.drift_cap = 8
        self.golden: tuple[tuple[bytes, bytes, int], ...] = ()

    def __len__(self) -> int:
        """The number of features."""
        return len(self.normalization) // 5


def pack(meta: Metadata) -> bytes:
    """Metadata -> bytes for the buffer. Checks as `parse` does, so that no file leaves that could not be read."""
    fields = {
        1: FORMAT,
        2: meta.name,
        3: meta.version,
        4: meta.schema_name,
        5: meta.schema_id,
        6: meta.window_ms,
        7: meta.normalization,
        8: meta.kind,
        10: [[score, surprise] for score, surprise in meta.knots] + [meta.tail_q8, meta.place_q8, meta.spread_q8],
        11: [list(rung) for rung in meta.rungs],
        12: [meta.learn_windows, meta.drift_shift, meta.drift_cap],
        13: [list(vector) for vector in meta.golden],
    }
    if meta.weights is not None:
        fields[9] = meta.weights
    data = cbor.dumps(fields)
    parse(data)
    return data


def parse(data: bytes | memoryview) -> Metadata:
    """data: bytes or memoryview of the buffer -> Metadata. Raises ModelError on anything else than a complete, sound
    map of this format; unknown keys are skipped (they belong to a later minor version)."""
    try:
        fields = cbor.loads(data)
    except WireError as error:
        raise ModelError("metadata: %s" % error)
    if not isinstance(fields, dict) or fields.get(1) != FORMAT:
        raise ModelError("metadata: format %r, this agent reads %d" % (_format_of(fields), FORMAT))
    meta = Metadata()
    for key, name in _TEXT:
        setattr(meta, name, _field(fields, key, str))
    for key, name in _INTS:
        setattr(meta, name, _int(_field(fields, key, int), 0, 0x3FFFFFFF, name))
    meta.schema_id = _field(fields, 5, bytes)
    meta.normalization = _field(fields, 7, bytes)
    n = len(meta.normalization) // 5
    if len(meta.schema_id) != 8 or 5 * n != len(meta.normalization) or not 0 < n <= MAX_FEATURES:
        raise ModelError("metadata: schema id of %d bytes, %d features" % (len(meta.schema_id), n))
    if not meta.window_ms or meta.kind not in (RECONSTRUCTION, RESIDUAL):
        raise ModelError("metadata: window of %d ms, output kind %d" % (meta.window_ms, meta.kind))
    for i in range(n):
        _, inv, shift = unpack_from("<hHB", meta.normalization, 5 * i)
        if not 0 < inv < 1 << 14 or shift > 29:
            raise ModelError("metadata: normalization of feature %d: inv %d shift %d" % (i, inv, shift))
    if 9 in fields:
        weights = _field(fields, 9, bytes)
        if len(weights) != n or not any(weights):
            raise ModelError("metadata: %d score weights for %d features" % (len(weights), n))
        meta.weights = weights
    _read_table(meta, _field(fields, 10, list))
    _read_rungs(meta, _field(fields, 11, list))
    _read_learning(meta, _field(fields, 12, list))
    _read_golden(meta, _field(fields, 13, list), n)
    return meta


def _format_of(fields):
    return fields.get(1) if isinstance(fields, dict) else None


def _field(fields, key, kind):
    value = fields.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ModelError("metadata: key %d is missing or not %s" % (key, kind.__name__))
    return value


def _int(value, low, high, what):
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ModelError("metadata: %s %r, want %d to %d" % (what, value, low, high))
    return value


def _ints(row, ranges, what) -> tuple:
    if not isinstance(row, list) or len(row) != len(ranges):
        raise ModelError("metadata: %s %r" % (what, row))
    return tuple([_int(value, low, high, what) for value, (low, high) in zip(row, ranges)])


def _read_table(meta, rows):
    if not 3 + 2 <= len(rows) <= 3 + MAX_KNOTS:
        raise ModelError("metadata: a calibration table of %d rows" % len(rows))
    knots: list[tuple[int, int]] = []
    for row in rows[:-3]:
        knot = _ints(row, ((0, 0x7FFF), (0, 0x7FFF)), "knot")
        if knots and (knot[0] <= knots[-1][0] or knot[1] < knots[-1][1]):
            raise ModelError("metadata: the calibration table does not rise at %r" % (knot,))
        knots.append(knot)
    meta.knots = tuple(knots)
    meta.tail_q8, meta.place_q8, meta.spread_q8 = _ints(
        rows[-3:], ((0, 0x7FFF), (0, 0x7FFF), (1, 0x7FFF)), "calibration"
    )


def _read_rungs(meta, rows):
    if not 1 <= len(rows) <= MAX_RUNGS:
        raise ModelError("metadata: %d alarm rungs, want 1 to %d" % (len(rows), MAX_RUNGS))
    rungs = []
    for row in rows:
        k_q8, cap_q8, alarm_q8 = _ints(row, ((1, 0x7FFF), (1, 0x7FFF), (1, 0xFFFFF)), "alarm rung")
        if cap_q8 <= k_q8:
            raise ModelError("metadata: an alarm rung with cap %d at most k %d never rises" % (cap_q8, k_q8))
        rungs.append((k_q8, cap_q8, alarm_q8))
    meta.rungs = tuple(rungs)


def _read_learning(meta, row):
    meta.learn_windows, meta.drift_shift, meta.drift_cap = _ints(row, ((0, 4096), (1, 16), (0, 64)), "learning")
    if meta.learn_windows % 2:
        raise ModelError("metadata: learning takes an even number of windows, not %d" % meta.learn_windows)


def _read_golden(meta, rows, n):
    if len(rows) > MAX_GOLDEN:
        raise ModelError("metadata: %d golden vectors, at most %d" % (len(rows), MAX_GOLDEN))
    golden = []
    for row in rows:
        if not isinstance(row, list) or len(row) != 3 or not isinstance(row[0], bytes) or not isinstance(row[1], bytes):
            raise ModelError("metadata: a golden vector is malformed")
        if len(row[0]) != n or len(row[1]) != n:
            raise ModelError(
                "metadata: a golden vector of %d and %d bytes for %d features" % (len(row[0]), len(row[1]), n)
            )
        golden.append((row[0], row[1], _int(row[2], 0, 0x7FFF, "golden score")))
    meta.golden = tuple(golden)
