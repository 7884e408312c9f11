"""Runs an int8 graph with the arithmetic that microcontrollers use, bit for bit, in integers only.

The arithmetic is TFLite's "double rounding" (gemmlowp): TFLite Micro, CMSIS-NN and TFLite's integer reference kernels
up to 2.14 compute it; LiteRT's kernels since 2025 do not. For acc = bias + sum(w * (x - zero point of x)):

    h = ((acc << max(shift, 0)) * m + 2^30) >> 31          gemmlowp SaturatingRoundingDoublingHighMul
    y = (h + 2^(e - 1) - (h < 0)) >> e, e = -shift > 0      gemmlowp RoundingDivideByPOT: half away from zero
    y + zero point, clamped to the fused activation's range

Between the layers a value is held as value + 128, an unsigned byte: the kernels need no sign extension for it, and the
correction is folded into each row's bias at load. Bounds are proved at load: a row whose accumulator could reach 2^31
is refused, and the kernels check nothing. The operators that few models have are in int8_ops.py.
"""

from array import array

from . import quantization, tflite
from .compat import const, dot, flip, int8_array, row_sums, tidy
from .errors import ModelError

_DEQUANTIZE = const(6)
_FULLY_CONNECTED = const(9)
_RESHAPE = const(22)
_QUANTIZE = const(114)

MAX_MACS = const(1048576)  # what a file may ask for at each run; 270 KB of weights are a quarter of it
_CHUNK_BYTES = const(1024)  # how much of a layer that stays in its file is read at a time, unless a row is longer
_EXACT_8 = const(0x200000)  # 2^21: a multiplier taken 8 bits at a time keeps every product under 2^30
_EXACT_4 = const(0x4000000)  # 2^26: the same for 4 bits at a time

# The table of one dense layer, an array('i'): a header, a bias per row, then [m, shift + 32] per row or one for all.
_INPUTS = const(0)
_ROWS = const(1)
_ZERO = const(2)  # output zero point + 128
_LOW = const(3)  # the clamp's lower end + 128
_HIGH = const(4)
_STEP = const(5)  # 2: a multiplier per row, 0: one for all
_DIGIT = const(
    6
)  # bits of the multiplier that 32-bit arithmetic takes at a time: 8, 4, or 0 where even 4 could overflow
_HEADER = const(7)


def fully_connected(x, weights, out, table, first, last):
    """Rows first .. last - 1 of a dense layer, `weights` starting at row `first`; x and out hold value + 128."""
    inputs, zero, low, high, step = table[_INPUTS], table[_ZERO], table[_LOW], table[_HIGH], table[_STEP]
    at = 0
    q = _HEADER + table[_ROWS] + first * step
    for row in range(first, last):
        acc = table[_HEADER + row] + dot(weights, at, inputs, x)
        y = quantization.requantize(acc, table[q], table[q + 1] - 32) + zero
        out[row] = low if y < low else high if y > high else y
        at += inputs
        q += step


class Interpreter:
    """graph: tflite.Graph. kernels: "plain", "viper", or None for the fastest that this runtime has.

    `resident_bytes` bounds the weights that are taken into memory when the graph is a file: the layers beyond it are
    read from the file at each run. `macs` counts multiply-accumulates; `values` is the activations, value + 128, by
    tensor number; `digits`, per dense layer, the bits of a multiplier that 32-bit arithmetic takes at a time (8, 4, or
    0: the plain kernel and 64 bits). Raises ModelError for whatever can't be computed exactly.
    """

    def __init__(self, graph, kernels=None, resident_bytes=16384):
        if len(graph.inputs) != 1 or len(graph.outputs) != 1:
            raise ModelError("%d inputs, %d outputs: 1 and 1 are supported" % (len(graph.inputs), len(graph.outputs)))
        self.graph = graph
        self.macs = 0
        self.resident_bytes = resident_bytes
        self.chunk = b""  # where the layers that stay in the file pass through
        self.values: dict = {}
        self.digits: list = []
        self.dense, self._flip, self.kernels = _choose(kernels)
        self._steps = []
        self._x = b""
        first = graph.tensor(graph.inputs[0])
        if first.kind != tflite.FLOAT32:  # a float input waits for its QUANTIZE
            self._x = self.hold(graph.inputs[0], first)
        for number in range(graph.operator_count):
            self._prepare(number, graph.operator(number))
        if not self._x or graph.outputs[0] not in self.values:
            raise ModelError("the graph does not lead from its input to its output")
        self._y = self.values[graph.outputs[0]]
        self._out = bytearray(len(self._y))
        self.input_size = len(self._x)
        self.output_size = len(self._out)

    def run(self, x):
        """x: `input_size` bytes, int8 in two's complement -> the output likewise, the same bytearray at each call."""
        if len(x) != self.input_size:
            raise ModelError("input: %d bytes, not %d" % (len(x), self.input_size))
        self._flip(x, self._x, self.input_size)
        for step in self._steps:
            step()
        self._flip(self._y, self._out, self.output_size)
        return self._out

    def hold(self, number, tensor):
        """Memory for the value of an int8 activation; raises ModelError if it has one already or can't have one."""
        if tensor.kind != tflite.INT8 or tensor.data_bytes or tensor.scales != 1:
            raise ModelError("tensor %d: not an int8 activation with one scale" % number)
        if tensor.size > tflite.MAX_ELEMENTS or number in self.values:
            raise ModelError("tensor %d: %d elements, or written twice" % (number, tensor.size))
        self.values[number] = bytearray(tensor.size)
        return self.values[number]

    def value(self, number):
        if number not in self.values:
            raise ModelError("tensor %d is used before it is computed" % number)
        return self.values[number]

    def add_macs(self, count):
        self.macs += count
        if self.macs > MAX_MACS:
            raise ModelError("more than %d multiply-accumulates" % MAX_MACS)

    def _prepare(self, number, operator):
        code, inputs, outputs, options = operator
        if not inputs or len(outputs) != 1:
            raise ModelError("operator %d: %d inputs, %d outputs" % (number, len(inputs), len(outputs)))
        graph, target = self.graph, outputs[0]
        source, output = graph.tensor(inputs[0]), graph.tensor(target)
        if code == _QUANTIZE and not self._x and inputs[0] == graph.inputs[0] and source.size == output.size:
            self._x = self.hold(target, output)  # the model's input is what a float input is quantized to
        elif code == _DEQUANTIZE and target == graph.outputs[0] and output.kind == tflite.FLOAT32:
            self.values[target] = self.value(inputs[0])  # its output is what a float output is made from
        elif code == _RESHAPE:
            if source.size != output.size or source.scale != output.scale or source.zero_point != output.zero_point:
                raise ModelError("operator %d RESHAPE changes more than the shape" % number)
            self.hold(target, output)
            self.values[target] = self.value(inputs[0])
        elif code == _FULLY_CONNECTED:
            try:
                layer = _Dense(self, inputs, source, output, target, options)
            except ModelError as error:
                raise ModelError("operator %d FULLY_CONNECTED: %s" % (number, error))
            self.digits.append(layer.digit)
            self._steps.append(layer.run)
        else:
            from . import int8_ops

            self._steps.append(int8_ops.prepare(self, number, operator))


class _Dense:
    """One FULLY_CONNECTED operator: checked, its rows' bounds proved, its table made."""

    def __init__(self, interpreter, inputs, source, output, target, options):
        self._graph = graph = interpreter.graph
        self._x = interpreter.value(inputs[0])
        self._out = interpreter.hold(target, output)
        if options and graph.byte(options, 1):
            raise ModelError("shuffled weights are not supported")
        weights = graph.tensor(inputs[1]) if 2 <= len(inputs) <= 3 else output
        if len(weights.shape) != 2 or weights.kind != tflite.INT8 or weights.data_bytes != weights.size:
            raise ModelError("the weights must be a constant int8 matrix")
        self._rows, self._width = rows, width = weights.shape
        if weights.zero_point or weights.axis or weights.scales not in (1, rows):
            raise ModelError("the weights must have zero point 0 and one scale, or one per output")
        if source.size != width or output.size != rows:
            raise ModelError("%d x %d weights, %d inputs, %d outputs" % (rows, width, source.size, output.size))
        interpreter.add_macs(rows * width)
        bias_at = 0
        if len(inputs) == 3 and inputs[2] >= 0:
            bias = graph.tensor(inputs[2])
            if bias.kind != tflite.INT32 or bias.data_bytes != 4 * rows or bias.size != rows:
                raise ModelError("the bias must be %d constant int32" % rows)
            bias_at = bias.data_at
        step = 2 if weights.scales > 1 else 0
        tidy()
        self._table = table = array("i", range(_HEADER + rows + (step * rows or 2)))  # sized once, filled below
        table[_INPUTS], table[_ROWS], table[_STEP] = width, rows, step
        self._place(interpreter, weights)
        low, high = quantization.clamp(graph.byte(options, 0) if options else 0, output)
        table[_ZERO], table[_LOW], table[_HIGH] = output.zero_point + 128, low + 128, high + 128
        _multiply(table, graph, source, weights, output)
        self.digit = table[_DIGIT] = self._prove(source.zero_point, bias_at)
        self._kernel = interpreter.dense if self.digit else fully_connected

    def run(self):
        if self._views is None:
            self._kernel(self._x, self._weights, self._out, self._table, 0, self._rows)
            return
        first = 0
        while first < self._rows:
            last = min(first + self._rows_at_once, self._rows)
            self._kernel(self._x, self._fetch(first, last), self._out, self._table, first, last)
            first = last

    def _place(self, interpreter, weights):
        """Weights in memory are used where they lie; those in a file are read once if they fit, else at each run."""
        self._at, self._views = weights.data_at, None
        self._rows_at_once = self._rows
        if not interpreter.graph.in_file:
            self._weights = int8_array(interpreter.graph.bytes(self._at, weights.size))
            return
        if weights.size <= interpreter.resident_bytes:
            interpreter.resident_bytes -= weights.size
            self._weights = int8_array(bytearray(weights.size))
            self._graph.read_into(self._at, memoryview(self._weights))
            return
        self._rows_at_once = rows = min(max(1, _CHUNK_BYTES // self._width), self._rows)
        if len(interpreter.chunk) < rows * self._width:
            interpreter.chunk = int8_array(bytearray(rows * self._width))
        self._weights = interpreter.chunk
        view = memoryview(self._weights)
        self._views = view[: rows * self._width], view[: self._rows % rows * self._width]

    def _fetch(self, first, last):
        """The weights from row `first` on."""
        if self._views:
            view = self._views[last - first < self._rows_at_once]
            self._graph.read_into(self._at + first * self._width, view)
        return self._weights

    def _prove(self, zero, bias_at):
        """Folds the corrections into the biases; returns how many bits of a multiplier 32-bit arithmetic takes."""
        table, width, largest = self._table, self._width, 0
        q = _HEADER + self._rows + 1
        for row in range(self._rows):
            at = row % self._rows_at_once
            if not at:
                weights = self._fetch(row, min(row + self._rows_at_once, self._rows))
            total, size = row_sums(weights, at * width, width)
            positive, negative = (size + total) // 2, (size - total) // 2
            bias = self._graph.int32(bias_at + 4 * row) if bias_at else 0
            highest = bias + positive * (127 - zero) + negative * (128 + zero)
            lowest = bias - positive * (128 + zero) - negative * (127 - zero)
            reach = max(highest, -lowest) << max(table[q] - 32, 0)
            if reach > 0x7FFFFFFF:
                raise ModelError("row %d could reach 2^31" % row)
            largest = max(largest, reach)
            table[_HEADER + row] = bias - (128 + zero) * total
            q += table[_STEP]
        return 8 if largest <= _EXACT_8 else 4 if largest <= _EXACT_4 else 0


def _multiply(table, graph, source, weights, output):
    """Per tensor TFLite multiplies the scales as floats, per channel as doubles; both divide as doubles."""
    at = _HEADER + table[_ROWS]
    source_scale, output_scale = quantization.real(source.scale), quantization.real(output.scale)
    for i in range(weights.scales):
        weight_scale = quantization.real(graph.u32(weights.scale_at + 4 * i))
        product = quantization.times(source_scale, weight_scale)
        if weights.scales == 1:
            product = quantization.single(product)
        m, shift = quantization.quantized(quantization.divided(product, output_scale))
        table[at], table[at + 1] = m, shift + 32
        at += 2


def _choose(kernels) -> tuple:
    """The kernels by name: (dense, flip, name)."""
    if kernels != "plain":
        try:
            from . import int8_viper

            return int8_viper.fully_connected, int8_viper.flip, "viper"
        except (ImportError, ValueError, SyntaxError):  # no such room; .mpy for another machine; no viper emitter
            if kernels == "viper":
                raise ModelError("this runtime has no viper emitter")
    return fully_connected, flip, "plain"
