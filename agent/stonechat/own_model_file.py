"""Writes int8 .tflite files without a package: the FlatBuffer, the graph's tables, and the metadata at the file's end.

The tools' writer (modeling/tflite_writer.py) adds what needs numpy; a device writes its own model with this alone. The
same calls always give the same bytes. Field numbers: tensorflow/lite/schema/schema.fbs. Buffers are aligned to 16, as
the schema's force_align asks; every layer gets a bias tensor, because tflite-runtime's ARM kernels crash without one.
"""

from struct import calcsize, pack, pack_into, unpack

from . import model_file
from .compat import const
from .errors import ModelError
from .int8 import tflite

NONE = const(0)  # no activation is fused into the layer
PLACEHOLDER = bytes(16)  # what a metadata buffer holds until the file is sealed
_FULLY_CONNECTED = const(9)
_FULLY_CONNECTED_OPTIONS = const(8)
_ALIGNMENT = const(16)
_FIRST_BYTES = const(4096)
_LAST_BYTES = const(1 << 24)


def float32(value: float) -> float:
    """value, rounded to the float32 that a file holds."""
    rounded: float = unpack("<f", pack("<f", value))[0]
    return rounded


class FlatBuffer:
    """Builds a FlatBuffer from its end to its beginning, children before parents, as the format asks; offsets are
    counted from the end. Raises ModelError where it would grow beyond 16 MB."""

    def __init__(self) -> None:
        self._bytes = bytearray(_FIRST_BYTES)
        self._head = _FIRST_BYTES
        self._align = 1
        self._vtables: dict = {}

    @property
    def offset(self) -> int:
        return len(self._bytes) - self._head

    def _prepare(self, size: int, more: int) -> None:
        """Pad, so that after `more` bytes an item of `size` bytes is aligned."""
        self._align = max(self._align, size)
        padding = -(self.offset + more) & (size - 1)
        while self._head < padding + more + size:
            if len(self._bytes) >= _LAST_BYTES:
                raise ModelError("a model of more than 16 MB")
            self._head += len(self._bytes)
            self._bytes = bytearray(len(self._bytes)) + self._bytes
        self._head -= padding
        self._bytes[self._head : self._head + padding] = bytes(padding)

    def _put(self, data) -> int:
        self._head -= len(data)
        self._bytes[self._head : self._head + len(data)] = data
        return self.offset

    def _item(self, form: str, value) -> int:
        """form: of struct, or "o" for the offset of a child."""
        if form == "o":
            self._prepare(4, 0)
            return self._put(pack("<I", self.offset - value + 4))
        self._prepare(calcsize("<" + form), 0)
        return self._put(pack("<" + form, value))

    def vector(self, form: str, items) -> int:
        """form: of struct for one item, or "o" for offsets of children."""
        size = 4 if form == "o" else calcsize("<" + form)
        self._prepare(4, size * len(items))
        self._prepare(size, size * len(items))
        for i in range(len(items) - 1, -1, -1):
            self._item(form, items[i])
        return self._put(pack("<I", len(items)))

    def data(self, content) -> int:
        """A vector of bytes, aligned to 16."""
        self._prepare(4, len(content))
        self._prepare(_ALIGNMENT, len(content))
        self._put(content)
        return self._put(pack("<I", len(content)))

    def text(self, text: str) -> int:
        content = text.encode()
        self._prepare(4, len(content) + 1)
        self._put(content + b"\0")
        return self._put(pack("<I", len(content)))

    def table(self, *fields) -> int:
        """fields: (slot, form, value) or (slot, form, value, default) each; a value that is the default is left out."""
        end = self.offset
        slots: dict = {}
        for field in fields:
            slot, form, value = field[:3]
            if value != (field[3] if len(field) > 3 else 0):
                slots[slot] = self._item(form, value)
        start = self._item("i", 0)
        distances = [start - slots[slot] if slot in slots else 0 for slot in range(max(slots, default=-1) + 1)]
        key = (start - end, tuple(distances))
        at = self._vtables.get(key)
        if at is None:
            for distance in reversed(distances):
                self._item("H", distance)
            self._item("H", start - end)
            at = self._vtables[key] = self._item("H", 2 * len(distances) + 4)
        pack_into("<i", self._bytes, len(self._bytes) - start, at - start)
        return start

    def finish(self, root: int, mark: bytes) -> bytes:
        """root: the offset of its table; mark: the file identifier -> the file."""
        self._prepare(self._align, 8)
        self._put(mark)
        self._item("o", root)
        return bytes(self._bytes[self._head :])


class Graph:
    """Collects tensors and operators; finish() lays the file out. Tensors are named by the numbers it returns."""

    def __init__(self, description: str = "stonechat") -> None:
        self.inputs: list = []
        self.outputs: list = []
        self._description = description
        self._buffers: list = [b""]  # buffer 0 is the empty one by convention
        self._tensors: list = []
        self._codes: list = []
        self._operators: list = []
        self._metadata: list = []

    def activation(self, shape, name: str, scale: float, zero_point: int = 0, kind: int = tflite.INT8) -> int:
        """A tensor that operators fill."""
        return self._tensor(shape, kind, name, [scale], [zero_point], 0, 0)

    def stored(self, content: bytes, shape, kind: int, name: str, scales, zero_point: int = 0, axis: int = 0) -> int:
        """A tensor that the file holds. content: its items, little-endian; scales: none, one, or one along the axis."""
        self._buffers.append(content)
        points = [zero_point] * len(scales)
        return self._tensor(shape, kind, name, scales, points, len(self._buffers) - 1, axis)

    def shape(self, tensor: int) -> list:
        return list(self._tensors[tensor][0])

    def operator(self, code: int, inputs, outputs, options=None, version: int = 1) -> None:
        """options: (union type, fields of its table as FlatBuffer.table takes them), or None."""
        if (code, version) not in self._codes:
            self._codes.append((code, version))
        self._operators.append((self._codes.index((code, version)), list(inputs), list(outputs), options))

    def connected(self, source: int, weights: bytes, bias, scales, output: tuple, activation: int, name: str) -> int:
        """A FULLY_CONNECTED operator on tensor `source` -> its output tensor. weights: int8, row by row; bias: int32,
        one a row; scales: of the weights, one or one a row; output: (scale, zero point); activation: 0 is none."""
        before = self._tensors[source]
        width, rows = before[0][-1], len(bias)
        bias_scales = [float32(before[3][0] * float32(scale)) for scale in scales]
        tensors = [
            source,
            self.stored(weights, (rows, width), tflite.INT8, name + "/weights", scales),
            self.stored(pack("<%di" % rows, *bias), (rows,), tflite.INT32, name + "/bias", bias_scales),
        ]
        filled = self.activation((1, rows), name, *output)
        options = (_FULLY_CONNECTED_OPTIONS, (0, "b", activation))
        self.operator(_FULLY_CONNECTED, tensors, [filled], options, version=4)
        return filled

    def metadata(self, name: str, value: bytes) -> None:
        """What comes first lies last in the file."""
        self._buffers.append(bytes(value))
        self._metadata.append((name, len(self._buffers) - 1))

    def finish(self) -> bytes:
        """-> the file."""
        out = FlatBuffer()
        buffers = [out.table((0, "o", out.data(content) if content else 0)) for content in self._buffers]
        tensors = [_lay_tensor(out, *tensor) for tensor in self._tensors]
        operators = [_lay_operator(out, *operator) for operator in self._operators]
        name = out.text("main")
        tensor_vector = out.vector("o", tensors)
        input_vector = out.vector("i", self.inputs)
        output_vector = out.vector("i", self.outputs)
        operator_vector = out.vector("o", operators)
        subgraph = out.table(
            (0, "o", tensor_vector),
            (1, "o", input_vector),
            (2, "o", output_vector),
            (3, "o", operator_vector),
            (4, "o", name),
        )
        codes = [
            out.table((0, "b", min(code, 127)), (2, "i", version, 1), (3, "i", code)) for code, version in self._codes
        ]
        entries = [out.table((0, "o", out.text(label)), (1, "I", buffer)) for label, buffer in self._metadata]
        code_vector = out.vector("o", codes)
        subgraph_vector = out.vector("o", [subgraph])
        buffer_vector = out.vector("o", buffers)
        entry_vector = out.vector("o", entries) if entries else 0
        description = out.text(self._description)
        model = out.table(
            (0, "I", 3),
            (1, "o", code_vector),
            (2, "o", subgraph_vector),
            (3, "o", description),
            (4, "o", buffer_vector),
            (6, "o", entry_vector),
        )
        return out.finish(model, b"TFL3")

    def _tensor(self, shape, kind, name, scales, zero_points, buffer, axis) -> int:
        if not all([-128 <= point <= 127 for point in zero_points]):
            raise ValueError("%s: zero points %s" % (name, zero_points))
        scales = [float32(scale) for scale in scales]
        self._tensors.append(([int(length) for length in shape], kind, name, scales, list(zero_points), buffer, axis))
        return len(self._tensors) - 1


def _lay_tensor(out, shape, kind, name, scales, zero_points, buffer, axis) -> int:
    label = out.text(name)
    shape_vector = out.vector("i", shape)
    scale_vector = out.vector("f", scales)
    point_vector = out.vector("q", zero_points)
    quantization = out.table((2, "o", scale_vector), (3, "o", point_vector), (6, "i", axis))
    return int(
        out.table(
            (0, "o", shape_vector),
            (1, "b", kind),
            (2, "I", buffer),
            (3, "o", label),
            (4, "o", quantization if scales else 0),
        )
    )


def _lay_operator(out, code, inputs, outputs, options) -> int:
    table = out.table(*options[1:]) if options else 0
    input_vector = out.vector("i", inputs)
    output_vector = out.vector("i", outputs)
    fields = [(0, "I", code), (1, "o", input_vector), (2, "o", output_vector)]
    if options:
        fields += [(3, "B", options[0]), (4, "o", table)]
    return int(out.table(*fields))


def seal(data, meta) -> bytes:
    """data: a .tflite that has a stonechat metadata buffer, whatever is in it; meta: Metadata -> the file that a board
    runs. Raises ModelError where the metadata or the graph can't be."""
    sealed = model_file.seal(replace_metadata(data, model_file.BUFFER, model_file.content(data, meta)))
    model_file.prove(sealed)
    return sealed


def replace_metadata(data, name: str, value: bytes) -> bytes:
    """The .tflite with another content in a metadata buffer that it has: the new bytes are at its end, the buffer
    points there, the old ones are blanked. Nothing else moves, so weights and operators stay as they were. Raises
    ModelError."""
    at, start, size = _metadata_place(tflite.read(data), name.encode())
    if not at:
        raise ModelError("the model carries no %s metadata: make it with `stonechat train`" % name)
    out = bytearray(data)
    if start + size == len(out):  # it is already at the end: put the new one in its place
        del out[start - 4 :]
    else:
        out[start : start + size] = bytes(size)
    while (len(out) + 4) % _ALIGNMENT:
        out.append(0)
    pack_into("<I", out, at, len(out) - at)
    return bytes(out + pack("<I", len(value)) + value)


def _metadata_place(graph, name: bytes) -> tuple:
    """-> where the offset of the metadata buffer `name` is, where its bytes begin, how many; zeros without one."""

    def follow(at):
        return at + graph.u32(at)

    model = follow(0)
    buffers, _ = graph.vector(model, 4, 4)
    entries, count = graph.vector(model, 6, 4)
    for i in range(count):
        entry = follow(entries + 4 * i)
        at, size = graph.vector(entry, 0, 1)
        if bytes(graph.bytes(at, size)) == name:
            buffer = follow(buffers + 4 * graph.u32(graph.field(entry, 1)))
            start, size = graph.vector(buffer, 0, 1)
            return graph.field(buffer, 0), start, size
    return 0, 0, 0
