"""Makes the metadata and the plan that a board reads at the end of a model file, and proves those of a given file.

For the tools, and for Linux at start: it needs the full reader (int8/tflite.py, int8/interpreter.py). Boards get the
result.
"""

from binascii import crc32
from struct import pack as struct_pack
from struct import unpack_from

from .compat import const
from .errors import FeatureError, ModelError
from .int8 import interpreter, tflite
from .metadata import FORM, Metadata
from .model import END, END_BYTES, MAGIC

BUFFER = "stonechat"  # what the file ends in: read by the device
INFO_BUFFER = "stonechat.info"  # columns, provenance, training figures: read by the tools only
RECONSTRUCTION = const(0)  # the output is the input rebuilt: the residual is x - y
RESIDUAL = const(1)  # the output is the (whitened) residual itself
WEIGHT_ONE = const(16)  # of the score
STEPS_PER_DEVIATION = const(16)  # see features.py
MAX_KNOTS = const(64)
MAX_ALARM_RULES = const(4)
MAX_GOLDEN = const(8)
MAX_FEATURES = const(640)
_MOST = const(0x7FFF)
_INT_MAX = const(0x3FFFFFFF)


def pack(meta) -> bytes:
    """Metadata -> its bytes, which Metadata(...) reads. Raises ModelError as check does."""
    check(meta)
    n = len(meta)
    out = struct_pack(
        FORM,
        meta.schema_id,
        meta.version,
        meta.window_ms,
        n,
        meta.tail_q8,
        meta.location_q8,
        meta.scale_q8,
        meta.learn_windows,
        meta.drift_shift,
        meta.drift_cap,
        meta.kind,
        len(meta.knots),
        len(meta.alarm_rules),
        len(meta.golden),
    )
    out += meta.normalization + (bytes([WEIGHT_ONE]) * n if meta.weights is None else meta.weights)
    for knot in meta.knots:
        out += struct_pack("<HH", *knot)
    for rule in meta.alarm_rules:
        out += struct_pack("<HHI", *rule)
    for x, y, score_q8 in meta.golden:
        out += x + y + struct_pack("<H", score_q8)
    return out + ("%s\n%s" % (meta.name, meta.schema_name)).encode()


def check(meta) -> None:
    """Raises ModelError where a number of a Metadata is out of range, naming it."""
    n = len(meta)
    if len(meta.schema_id) != 8 or 5 * n != len(meta.normalization) or not 0 < n <= MAX_FEATURES:
        raise ModelError("metadata: schema id of %d bytes, %d features" % (len(meta.schema_id), n))
    for what, text in (("name", meta.name), ("schema name", meta.schema_name)):
        if "\n" in text:
            raise ModelError("metadata: a %s of two lines" % what)
        _int(len(text.encode()), 0, 255, what + " bytes")
    _int(meta.version, 0, _INT_MAX, "version")
    _int(meta.window_ms, 1, _INT_MAX, "window_ms")
    if meta.kind not in (RECONSTRUCTION, RESIDUAL):
        raise ModelError("metadata: output kind %d" % meta.kind)
    for i in range(n):
        _, inv, shift = unpack_from("<hHB", meta.normalization, 5 * i)
        if not 0 < inv < 1 << 14 or shift & 31 > 29:
            raise ModelError("metadata: normalization of feature %d: inv %d shift %d" % (i, inv, shift))
    if meta.weights is not None and (len(meta.weights) != n or not any(meta.weights)):
        raise ModelError("metadata: %d score weights for %d features" % (len(meta.weights), n))
    _check_table(meta)
    _int(meta.learn_windows, 0, 4096, "learn_windows")
    _int(meta.drift_shift, 1, 16, "drift_shift")
    _int(meta.drift_cap, 0, 64, "drift_cap")
    if meta.learn_windows % 2:
        raise ModelError("metadata: learning takes an even number of windows, not %d" % meta.learn_windows)
    _int(len(meta.golden), 0, MAX_GOLDEN, "golden vectors")
    for x, y, score_q8 in meta.golden:
        if len(x) != n or len(y) != n:
            raise ModelError("metadata: a golden vector of %d and %d bytes for %d features" % (len(x), len(y), n))
        _int(score_q8, 0, _MOST, "golden score")


def _check_table(meta):
    _int(len(meta.knots), 2, MAX_KNOTS, "knots")
    last = (-1, 0)
    for score_q8, surprise_q8 in meta.knots:
        _int(score_q8, 0, _MOST, "knot")
        _int(surprise_q8, 0, _MOST, "knot")
        if score_q8 <= last[0] or surprise_q8 < last[1]:
            raise ModelError("metadata: the calibration table does not rise at %d, %d" % (score_q8, surprise_q8))
        last = (score_q8, surprise_q8)
    _int(meta.tail_q8, 0, _MOST, "tail_q8")
    _int(meta.location_q8, 0, _MOST, "location_q8")
    _int(meta.scale_q8, 1, _MOST, "scale_q8")
    _int(len(meta.alarm_rules), 1, MAX_ALARM_RULES, "alarm rules")
    for allowance_q8, cap_q8, threshold_q8 in meta.alarm_rules:
        _int(allowance_q8, 1, _MOST, "alarm rule's allowance")
        _int(cap_q8, allowance_q8 + 1, _MOST, "alarm rule's cap")  # at k or below it never rises
        _int(threshold_q8, 1, 0xFFFFF, "alarm rule's threshold")


def _int(value, low, high, what):
    if not isinstance(value, int) or not low <= value <= high:
        raise ModelError("metadata: %s %r, want %d to %d" % (what, value, low, high))


def plan(network) -> bytes:
    """Interpreter -> what Network.load_plan reads; nothing where the graph is no chain of dense layers: a
    board then needs the full reader."""
    if not network.is_chain:
        return b""
    out = b""
    for layer in network.layers:
        out += struct_pack("<%di" % (1 + len(layer.table)), layer.at, *layer.table)
    return out


def content(data, meta) -> bytes:
    """data: a .tflite; meta: Metadata -> the metadata buffer's content, but for the CRC, its last 4 bytes, which are
    made when it is at the file's end (`seal`). Raises ModelError."""
    metadata, layers = pack(meta), plan(interpreter.read(data, "plain"))
    return metadata + layers + struct_pack(END, len(metadata), len(layers), MAGIC, 0)


def seal(data) -> bytes:
    """data: a file that ends in `content` -> the file with its CRC."""
    return data[:-4] + struct_pack("<I", crc32(data[:-4]))


def sizes(data) -> tuple:
    """-> bytes of the metadata and of the plan at the end of a model file; (0, 0) where it has none of this format."""
    if len(data) > END_BYTES:
        metadata, layers, magic, _ = unpack_from(END, data, len(data) - END_BYTES)
        if magic == MAGIC:
            return metadata, layers
    return 0, 0


def prove(data) -> None:
    """Raises ModelError unless the metadata and the plan at the end of the file `data` are valid and agree with its
    graph. A file without metadata passes."""
    graph = tflite.read(data)
    held = graph.metadata(BUFFER)
    if held is None:
        return
    held = bytes(held)
    size, layers = sizes(held)
    if not size:
        raise ModelError("metadata of an older format, or none of ours: make the model anew")
    if bytes(data[-len(held) :]) != held or size + layers + END_BYTES != len(held):
        raise ModelError("metadata: not at the end of the file")
    if seal(bytes(data)) != bytes(data):
        raise ModelError("the file is damaged")
    check(Metadata(held[:size]))
    if plan(interpreter.Interpreter(graph, "plain")) != held[size : size + layers]:
        raise ModelError("the plan is not that of the graph")


def pack_normalization(centre_q8, deviation_q8) -> bytes:
    """centre_q8, deviation_q8: n numbers each (Q8) -> the packed bytes that Normalization reads.

    inv = 16 * 2^shift / deviation, with the greatest shift for which inv stays below 2^14."""
    out = bytearray()
    for centre, deviation in zip(centre_q8, deviation_q8):
        if deviation <= 0:
            raise FeatureError("deviation %r" % deviation)
        shift = 0
        while shift < 29 and (STEPS_PER_DEVIATION << (shift + 1)) / deviation < (1 << 14) - 1:
            shift += 1
        inv = min((1 << 14) - 1, int((STEPS_PER_DEVIATION << shift) / deviation + 0.5))
        out += struct_pack("<hHB", int(centre), inv, shift)
    return bytes(out)
