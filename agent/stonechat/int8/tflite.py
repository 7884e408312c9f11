"""Reads a .tflite (a FlatBuffer, schema version 3) where it lies: in memory, in ROM or in an open file.

Every offset, length, type and shape is checked before it is used, so a hostile file raises ModelError and nothing else.
The weights are not copied: tensors hand out memoryviews, or positions in the file. interpreter.py says what the
operators mean. Field numbers: tensorflow/lite/schema/schema.fbs.
"""

from struct import unpack_from

from ..compat import const
from ..errors import ModelError
from .network import Source

FLOAT32 = const(0)
INT32 = const(2)
INT8 = const(9)

MAX_OPERATORS = const(64)
MAX_ELEMENTS = const(4096)  # of one activation, as in network.py; constants are bounded by the file that holds them
_MAX_RANK = const(6)
_MAX_BYTES = const(0x3FFFFFFF)
_PAGE_BYTES = const(128)


class Tensor:
    """`size` in elements; `data_at`, `data_bytes`: where a constant's data lies, data_bytes 0 for an activation;
    `scales`: how many, from position `scale_at` of the file; `scale`: the first one's float32 bits, 0 without any."""

    def __init__(self, kind, shape, size, data_at, data_bytes):
        self.kind = kind
        self.shape = shape
        self.size = size
        self.data_at = data_at
        self.data_bytes = data_bytes
        self.scale_at = self.scales = self.scale = 0
        self.zero_point = 0
        self.axis = 0


class Graph(Source):
    """data: as for network.Source.

    Raises ModelError. `inputs`, `outputs`, operator(i) and tensor(i) speak in the file's own tensor numbers.
    """

    def __init__(self, data):
        Source.__init__(self, data)
        self._view = memoryview(bytearray(_PAGE_BYTES)) if self.held is None else self.held
        if self.held is None:
            self._page_at = -_PAGE_BYTES
        if not 16 <= self.size <= _MAX_BYTES or bytes(self.bytes(4, 4)) != b"TFL3":
            raise ModelError("not a .tflite file (no TFL3 mark)")
        model = self._follow(0)
        version = self._number(model, 0)
        if version != 3:
            raise ModelError("schema version %d, only 3 is supported" % version)
        self._codes, self._code_count = self.vector(model, 1, 4)
        subgraphs, count = self.vector(model, 2, 4)
        if count != 1:
            raise ModelError("%d subgraphs, only 1 is supported" % count)
        self._buffers, self._buffer_count = self.vector(model, 4, 4)
        self._metadata, self._metadata_count = self.vector(model, 6, 4)
        subgraph = self._follow(subgraphs)
        self._tensors, self.tensor_count = self.vector(subgraph, 0, 4)
        self.inputs = self._numbers(subgraph, 1)
        self.outputs = self._numbers(subgraph, 2)
        self._operators, self.operator_count = self.vector(subgraph, 3, 4)
        if self.operator_count > MAX_OPERATORS:
            raise ModelError("%d operators, at most %d" % (self.operator_count, MAX_OPERATORS))

    def operator(self, number):
        """The operator as (builtin code, input tensors, output tensors, position of its options table or 0)."""
        table = self._follow(self._operators + 4 * number)
        index = self._number(table, 0)
        if index >= self._code_count:
            raise ModelError("operator %d: code %d of %d" % (number, index, self._code_count))
        code = self._follow(self._codes + 4 * index)
        builtin = max(self.byte(code, 0), self._number(code, 3))
        options = self.field(table, 4)
        return builtin, self._numbers(table, 1), self._numbers(table, 2), self._follow(options) if options else 0

    def tensor(self, number):
        if not 0 <= number < self.tensor_count:
            raise ModelError("tensor %d of %d" % (number, self.tensor_count))
        table = self._follow(self._tensors + 4 * number)
        if self.byte(table, 5) or self.field(table, 6):
            raise ModelError("tensor %d: variable and sparse tensors are not supported" % number)
        shape, size = self._shape(table, number)
        tensor = Tensor(self.byte(table, 1), shape, size, *self._buffer(self._number(table, 2)))
        self._quantization(table, tensor, number)
        return tensor

    def metadata(self, name):
        """The metadata buffer called `name` as a memoryview (bytes when the graph is a file), or None."""
        wanted = name.encode()
        for i in range(min(self._metadata_count, MAX_OPERATORS)):
            entry = self._follow(self._metadata + 4 * i)
            at, size = self.vector(entry, 0, 1)
            if size == len(wanted) and bytes(self.bytes(at, size)) == wanted:
                return self.bytes(*self._buffer(self._number(entry, 1)))
        return None

    def field(self, table, slot):
        """Position of a table's field, 0 where it is left out."""
        vtable = table - self._unpack("<i", table, 4)
        entry = 4 + 2 * slot
        if entry + 2 > self._unpack("<H", vtable, 2):
            return 0
        offset = self._unpack("<H", vtable + entry, 2)
        return table + offset if offset else 0

    def byte(self, table, slot):
        at = self.field(table, slot)
        return self._unpack("B", at, 1) if at else 0

    def vector(self, table, slot, item_bytes):
        """A vector field as (position of item 0, count); (0, 0) where it is left out."""
        at = self.field(table, slot)
        if not at:
            return 0, 0
        at = self._follow(at)
        count = self.u32(at)
        if at + 4 + count * item_bytes > self.size:
            raise ModelError("truncated: %d items at %d of %d" % (count, at, self.size))
        return at + 4, count

    def _shape(self, table, number):
        at, rank = self.vector(table, 0, 4)
        if rank > _MAX_RANK:
            raise ModelError("tensor %d: rank %d" % (number, rank))
        shape = tuple([self._unpack("<i", at + 4 * i, 4) for i in range(rank)])
        size = 1
        for length in shape:
            size *= length
            if length < 1 or size > self.size + MAX_ELEMENTS:
                raise ModelError("tensor %d: shape %s" % (number, shape))
        return shape, size

    def _buffer(self, number):
        if number >= self._buffer_count:
            raise ModelError("buffer %d of %d" % (number, self._buffer_count))
        table = self._follow(self._buffers + 4 * number)
        if self.field(table, 1):
            raise ModelError("buffer %d: data outside the FlatBuffer is not supported" % number)
        return self.vector(table, 0, 1)

    def _quantization(self, table, tensor, number):
        at = self.field(table, 4)
        if not at:
            return
        table = self._follow(at)
        if self.byte(table, 4):
            raise ModelError("tensor %d: custom quantization is not supported" % number)
        tensor.scale_at, tensor.scales = self.vector(table, 2, 4)
        if tensor.scales > min(max(tensor.shape or (1,)), MAX_ELEMENTS):
            raise ModelError("tensor %d: %d scales" % (number, tensor.scales))
        if tensor.scales:
            tensor.scale = self.u32(tensor.scale_at)
        at, count = self.vector(table, 3, 8)
        for i in range(min(count, tensor.scales)):
            point = self._unpack("<q", at + 8 * i, 8)
            if i == 0 and -128 <= point <= 127:
                tensor.zero_point = point
            elif point != tensor.zero_point:
                raise ModelError("tensor %d: zero point %d" % (number, point))
        tensor.axis = self._number(table, 6)

    def _numbers(self, table, slot):
        at, count = self.vector(table, slot, 4)
        if count > MAX_OPERATORS:
            raise ModelError("%d tensors in one list" % count)
        return tuple([self._unpack("<i", at + 4 * i, 4) for i in range(count)])

    def _number(self, table, slot):
        """An unsigned field of 32 bits, 0 where it is left out."""
        at = self.field(table, slot)
        return self.u32(at) if at else 0

    def _follow(self, at):
        return at + self.u32(at)

    def int32(self, at):
        return self._unpack("<i", at, 4)

    def u32(self, at):
        return self._unpack("<I", at, 4)

    def _unpack(self, form, at, size):
        if at < 0 or at + size > self.size:
            raise ModelError("truncated: %d bytes at %d of %d" % (size, at, self.size))
        if self.held is None:
            if not self._page_at <= at <= self._page_at + _PAGE_BYTES - size:
                self._page_at = at
                page = self._view[: self.size - at]
                self.bytes(at, len(page), page)
            at -= self._page_at
        return unpack_from(form, self._view, at)[0]


def read(data):
    """data: the file in memory or an open file -> Graph. Raises ModelError."""
    return Graph(data)
