"""Dense int8 layers at work, and the reader of the plan that lets a board run a .tflite without reading its graph.

A plan is what interpreter.py makes of a chain of dense layers: for each one the position of its weights in the file and
its table, ready to use. model_file.py writes it behind the metadata at the end of the file and proves it. Here only
what memory safety needs is checked again, because the viper kernel checks nothing: sizes, positions, and that the
layers fit together. The golden vectors (scorer.py) show whether the numbers are right. interpreter.py describes the
arithmetic."""

from array import array
from binascii import crc32
from struct import unpack_from

from ..compat import const, int8_array, sha256
from ..errors import ModelError

_MAX_ELEMENTS = const(4096)  # of one activation; constants are bounded by the file that holds them
_MAX_MACS = const(1048576)  # what a file may ask for at each run; 270 KB of weights are a quarter of it
_CHUNK_BYTES = const(1024)  # how much of a layer that stays in its file is read at a time, unless a row is longer
_PAGE_BYTES = const(256)

# The table of one dense layer, an array('i'): a header, a bias per row, then [m, shift + 32] per row or one for all.
_INPUTS = const(0)
_ROWS = const(1)
_ZERO = const(2)  # output zero point + 128
_LOW = const(3)  # the clamp's lower end + 128
_HIGH = const(4)
_STEP = const(5)  # 2: a multiplier per row, 0: one for all
_DIGIT = const(6)  # bits of a multiplier that 32-bit arithmetic takes at a time: 8, 4, or 0 where even 4 could overflow
_HEADER = const(7)


class Source:
    """A file's bytes, `size` of them. data: bytes, bytearray, memoryview, or a file open for reading in binary, which
    then stays in use (`in_file`)."""

    def __init__(self, data):
        self.in_file = hasattr(data, "readinto")
        self._file = data
        self._view = b"" if self.in_file else memoryview(data)
        self.size = data.seek(0, 2) if self.in_file else len(data)

    def bytes(self, at, size, out=None):
        """`size` bytes from position `at`: a view where the file is in memory, else `out`, filled, or a new bytearray.
        Raises ModelError beyond the end."""
        if size >= 0 and 0 <= at <= self.size - size:
            if not self.in_file:
                return self._view[at : at + size]
            out = bytearray(size) if out is None else out
            self._file.seek(0)  # littlefs up to 2.8 reads another block behind a read that ended with one
            self._file.seek(at)
            if self._file.readinto(out) == size:
                return out
        raise ModelError("%d bytes at %d of %d" % (size, at, self.size))

    def digests(self):
        """-> (the first 8 bytes of the SHA-256, the CRC-32) of all the bytes."""
        page = memoryview(bytearray(_PAGE_BYTES))
        sha = sha256()
        crc = at = 0
        while at < self.size:
            part = page[: self.size - at]
            part = self.bytes(at, len(part), part)
            sha.update(part)
            crc = crc32(part, crc)
            at += _PAGE_BYTES
        return sha.digest()[:8], crc


class Layer:
    """One dense layer: `run()` computes `out` from `x`. at: where its weights lie in the source; network: bounds what
    is held in memory."""

    def __init__(self, network, source, at, table, x, out):
        self.at = at
        self.table = table
        self.x = x
        self.out = out
        self.kernel = network.kernels.fully_connected
        self._source = source
        self._view = None
        width = table[_INPUTS]
        self.rows_at_once = rows = table[_ROWS]
        if source.in_file:
            network.resident_bytes -= width * rows
            if network.resident_bytes < 0:  # read at each run: as many rows as fit a chunk and divide them all
                network.resident_bytes += width * rows
                while rows > 1 and (rows * width > _CHUNK_BYTES or self.rows_at_once % rows):
                    rows -= 1
                self.rows_at_once = rows
                if len(network.chunk) < rows * width:
                    network.chunk = int8_array(bytearray(rows * width))
                self._weights = network.chunk
                self._view = memoryview(network.chunk)[: rows * width]
                return
        self._weights = int8_array(source.bytes(at, width * rows))

    def run(self):
        first = 0
        while first < self.table[_ROWS]:
            last = first + self.rows_at_once
            if self._view:
                self.fetch(first)
            self.kernel(self.x, self._weights, self.out, self.table, first, last)
            first = last

    def fetch(self, first):
        """The weights of rows first .. first + rows_at_once - 1."""
        if self._view:
            self._source.bytes(self.at + first * self.table[_INPUTS], len(self._view), self._view)
        return self._weights


class Network:
    """A chain of steps from an int8 input to an int8 output. kernels: "plain", "viper", or None for the fastest that
    this runtime has. `resident_bytes` bounds the weights that are taken into memory when the source is a file: the
    layers beyond it are read at each run. `macs` counts multiply-accumulates. Raises ModelError."""

    digest: bytes  # both: see model.py
    metadata: object

    def __init__(self, kernels=None, resident_bytes=16384):
        self.kernels = choose(kernels)
        self.resident_bytes = resident_bytes
        self.chunk = b""  # where the layers that stay in the file pass through
        self.macs = 0
        self.steps = []

    def lead(self, x, y):
        """x, y: where the steps find the input and leave the output, value + 128."""
        self._x = x
        self._y = y
        self.input_size = len(x)
        self.output_size = len(y)
        self._out = bytearray(len(y))

    def run(self, x):
        """x: `input_size` bytes, int8 in two's complement -> the output likewise, the same bytearray at each call."""
        if len(x) != self.input_size:
            raise ModelError("input: %d bytes" % len(x))
        flip = self.kernels.flip
        flip(x, self._x, self.input_size)
        for step in self.steps:
            step.run()
        flip(self._y, self._out, self.output_size)  # pyright: ignore[reportArgumentType] - viper's ptr8
        return self._out

    def load_plan(self, source, at, end):
        """Take the layers of the plan that lies in source from `at` to `end`: a position and a table each."""
        x = first = bytearray()
        while at != end:
            start, inputs, rows, _, low, high, step, digit = unpack_from("<8i", source.bytes(at, 32), 0)
            self.macs += inputs * rows
            sound = (
                0 < inputs <= _MAX_ELEMENTS
                and 0 < rows <= _MAX_ELEMENTS
                and self.macs <= _MAX_MACS
                and 0 <= low <= high < 256
                and step in (0, 2)
                and digit in (0, 4, 8)
                and 0 <= start <= source.size - inputs * rows
                and len(x) in (0, inputs)
            )
            if sound:
                size = 4 * (_HEADER + rows + (step * rows or 2))
                table = array("i", bytes(source.bytes(at + 4, size)))
                at += 4 + size
                for q in range(_HEADER + rows + 1, len(table), 2):
                    sound = sound and 0 < table[q] < 63
            if not sound or at > end:
                raise ModelError("plan: layer %d" % len(self.steps))
            x = x or bytearray(inputs)
            first = first or x
            layer = Layer(self, source, start, table, x, bytearray(rows))
            if not digit:
                layer.kernel = choose("plain").fully_connected
            self.steps.append(layer)
            x = layer.out
        self.lead(first, x)


def choose(kernels):
    """The module of the kernels by name, None for the best there are: its fully_connected and its flip."""
    try:
        if kernels in (None, "viper"):
            from . import viper

            return viper
    except (ImportError, ValueError, SyntaxError):  # no such module; .mpy for another machine; no viper emitter
        pass
    try:
        if kernels in (None, "plain"):
            from . import plain

            return plain
    except ImportError:
        pass
    raise ModelError("no %s kernels here" % (kernels or "plain"))
