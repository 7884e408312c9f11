"""Dense int8 layers at work, and the reader of the plan that lets a board run a .tflite without reading its graph.

A plan is what interpreter.py makes of a chain of dense layers: for each one the position of its weights in the file and
its table, ready to use. model_file.py writes it behind the metadata at the end of the file and proves it. Here only
what memory safety needs is checked again, because the viper kernel checks nothing: sizes, positions, and that the
layers fit together. The golden vectors (scorer.py) show whether the numbers are right. interpreter.py describes the
arithmetic."""

from array import array
from binascii import crc32
from struct import pack, pack_into, unpack_from

from ..compat import const, sha256
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

# What the kernels take of a layer is an entry of `program`: where x, weights, out and table lie (for viper's), the
# first of the rows to compute, and the one after the last.
_ENTRY_BYTES = const(40)
_ROWS_AT = const(32)


class Source:
    """A file's bytes, `size` of them. data: bytes, bytearray, memoryview, or a file open for reading in binary, which
    then stays in use; `held`: the bytes where they are in memory, None where they are in a file."""

    def __init__(self, data):
        in_file = hasattr(data, "readinto")
        self._file = data
        self.held = None if in_file else memoryview(data)
        self.size = data.seek(0, 2) if in_file else len(data)

    def bytes(self, at, size, out=None):
        """`size` bytes from position `at`: a view where the file is in memory, else `out`, filled, or a new bytearray.
        Raises ModelError beyond the end."""
        if size >= 0 and 0 <= at <= self.size - size:
            if self.held is not None:
                return self.held[at : at + size]
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
    is held in memory. The kernels take the weights as value + 128, like x."""

    weights: bytearray | memoryview

    def __init__(self, network, source, at, table, x, out):
        self.at = at
        self.table = table
        self.x = x
        self.out = out
        self.kernels = network.kernels
        if not table[_DIGIT]:  # rows that need 64 bits
            self.kernels = choose("plain")
            network.mixed = True
        self._network = network
        self._source = source
        self._number = len(network.layers)
        network.layers.append(self)
        width = table[_INPUTS]
        rows = table[_ROWS]
        network.resident_bytes -= width * rows
        self._stays = network.resident_bytes >= 0
        if self._stays:
            self.weights = bytearray(width * rows)
            self.fetch(0)
        else:  # read at each run: as many rows as fit a chunk and divide them all
            network.mixed = True
            network.resident_bytes += width * rows
            while rows > 1 and (rows * width > _CHUNK_BYTES or table[_ROWS] % rows):
                rows -= 1
            if len(network.chunk) < rows * width:
                network.chunk = bytearray(rows * width)
            self.weights = memoryview(network.chunk)[: rows * width]
        self.rows_at_once = rows
        place = self.kernels.place  # pyright: ignore[reportPrivateImportUsage]
        network.program.extend(pack("<QQQQII", place(x), place(self.weights), place(out), place(table), 0, rows))

    def run(self):
        number = self._number
        program = self._network.program
        first = 0
        while first < self.table[_ROWS]:
            if not self._stays:
                self.fetch(first)
            last = first + self.rows_at_once
            pack_into("<II", program, _ENTRY_BYTES * number + _ROWS_AT, first, last)
            self.kernels.layers(number, number + 1, 0, program, self._network.layers)
            first = last

    def fetch(self, first):
        """Read the weights of rows first .. first + rows_at_once - 1, value + 128."""
        weights = self.weights
        at = self.at + first * self.table[_INPUTS]
        data = self._source.held
        if data is None:
            data = self._source.bytes(at, len(weights), weights)
            at = 0
        self.kernels.flip(data, weights, len(weights), at)  # pyright: ignore[reportArgumentType] - viper's ptr8


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
        self.layers: list = []  # the dense ones, in order,
        self.program = bytearray()  # and what the kernels take of each
        self.steps = self.layers  # those and others
        self.mixed = False  # True where one kernel can't run all layers in one call

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
        flip(x, self._x, self.input_size, 0)
        if self.mixed:
            for step in self.steps:
                step.run()
        else:
            kernel = self.kernels.layers
            kernel(0, len(self.layers), 0, self.program, self.layers)  # pyright: ignore[reportArgumentType]
        flip(self._y, self._out, self.output_size, 0)  # pyright: ignore[reportArgumentType] - viper's ptr8
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
                raise ModelError("plan: layer %d" % len(self.layers))
            x = x or bytearray(inputs)
            first = first or x
            layer = Layer(self, source, start, table, x, bytearray(rows))
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
