"""Runs an int8 graph with the arithmetic that microcontrollers use, bit for bit, in integers only.

The arithmetic is TFLite's "double rounding" (gemmlowp): TFLite Micro, CMSIS-NN and TFLite's integer reference kernels
up to 2.14 compute it; LiteRT's kernels since 2025 do not. For acc = bias + sum(w * (x - zero point of x)):

    h = ((acc << max(shift, 0)) * m + 2^30) >> 31          gemmlowp SaturatingRoundingDoublingHighMul
    y = (h + 2^(e - 1) - (h < 0)) >> e, e = -shift > 0      gemmlowp RoundingDivideByPOT: half away from zero
    y + zero point, clamped to the fused activation's range

Between the layers a value is held as value + 128, an unsigned byte: the kernels need no sign extension for it, and the
correction is folded into each row's bias at load. Bounds are proved at load: a row whose accumulator could reach 2^31
is refused, and the kernels check nothing.
"""

from array import array

from . import multiplier, tflite
from .compat import const, dot, flip, int8_view, row_sums
from .errors import ModelError

_FULLY_CONNECTED = const(9)
_RESHAPE = const(22)
_DEQUANTIZE = const(6)
_QUANTIZE = const(114)

MAX_MACS = const(1048576)  # what a file may ask for at each run; 270 KB of weights are a quarter of it
_EXACT_8 = const(0x200000)  # 2^21: a multiplier taken 8 bits at a time keeps every product under 2^30
_EXACT_4 = const(0x4000000)  # 2^26: the same for 4 bits at a time
_ONE = const(0x3F800000)  # float32 1.0
_SIX = const(0x40C00000)  # float32 6.0

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
        y = requantize(acc, table[q], table[q + 1] - 32) + zero
        out[row] = low if y < low else high if y > high else y
        at += inputs
        q += step


def requantize(acc, m, shift):
    """MultiplyByQuantizedMultiplier: acc * m * 2^(shift - 31), rounded twice as gemmlowp rounds."""
    if shift > 0:
        acc <<= shift
    h = (acc * m + 0x40000000) >> 31
    if shift < 0:
        h = (h + (1 << -shift - 1) - (h < 0)) >> -shift
    return h


def clamp(activation, tensor):
    """The range of a fused activation on `tensor` (CalculateActivationRangeQuantized): (lowest, highest) int8."""
    if not 0 <= activation <= 3:
        raise ModelError("fused activation %d is not supported" % activation)
    low, high = -128, 127
    if activation:
        zero, scale = tensor.zero_point, multiplier.real(tensor.scales[0])
        if activation == 2:  # RELU_N1_TO_1
            one = multiplier.rounded(multiplier.divided(multiplier.real(_ONE), scale, 24))
            low, high = zero - one, zero + one
        else:
            low = zero
            if activation == 3:  # RELU6
                high = zero + multiplier.rounded(multiplier.divided(multiplier.real(_SIX), scale, 24))
    return max(-128, low), min(127, high)


class Interpreter:
    """graph: tflite.Graph. kernels: "plain", "viper", or None for the fastest that this runtime has.

    `macs` counts multiply-accumulates. Raises ModelError for whatever can't be computed exactly.
    """

    def __init__(self, graph, kernels=None):
        if len(graph.inputs) != 1 or len(graph.outputs) != 1:
            raise ModelError("%d inputs, %d outputs: 1 and 1 are supported" % (len(graph.inputs), len(graph.outputs)))
        self.graph = graph
        self.macs = 0
        self.kernels = kernels
        self.dense, self.flip = _choose(kernels)
        self.values = {}  # tensor number: its value + 128, a bytearray
        self.steps = []
        self._x = None
        first = graph.tensor(graph.inputs[0])
        if first.kind == tflite.INT8:
            self._x = self.hold(graph.inputs[0], first)
        for number in range(graph.operator_count):
            self._prepare(number, graph.operator(number))
        if self._x is None or graph.outputs[0] not in self.values:
            raise ModelError("the graph does not lead from its input to its output")
        self._y = self.values[graph.outputs[0]]
        self._out = bytearray(len(self._y))
        self.input_size = len(self._x)
        self.output_size = len(self._out)

    def run(self, x):
        """x: `input_size` bytes, int8 in two's complement -> the output likewise, the same bytearray at each call."""
        if len(x) != self.input_size:
            raise ModelError("input: %d bytes, not %d" % (len(x), self.input_size))
        self.flip(x, self._x, self.input_size)
        for step in self.steps:
            step()
        self.flip(self._y, self._out, self.output_size)
        return self._out

    def hold(self, number, tensor):
        """Memory for the value of an int8 activation; raises ModelError if it has one already or can't have one."""
        if tensor.kind != tflite.INT8 or tensor.data_bytes or len(tensor.scales) != 1:
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
        graph = self.graph
        output = graph.tensor(outputs[0])
        if code == _FULLY_CONNECTED:
            self.steps.append(_Dense(self, number, inputs, output, outputs[0], options).run)
        elif code == _RESHAPE:
            source = graph.tensor(inputs[0])
            if source.size != output.size or source.scales != output.scales or source.zero_point != output.zero_point:
                raise ModelError("operator %d RESHAPE changes more than the shape" % number)
            self.hold(outputs[0], output)
            self.values[outputs[0]] = self.value(inputs[0])
        elif code == _QUANTIZE and inputs[0] == graph.inputs[0] and self._x is None:
            self._x = self.hold(outputs[0], output)  # a float input: the model's input is what it is quantized to
        elif code == _DEQUANTIZE and outputs[0] == graph.outputs[0]:
            self.values[outputs[0]] = self.value(inputs[0])  # a float output: what it is before
        else:
            from . import int8_ops

            self.steps.append(int8_ops.prepare(self, number, code, inputs, output, outputs[0], options))


class _Dense:
    """One FULLY_CONNECTED operator: checked, its rows' bounds proved, its table made."""

    def __init__(self, interpreter, number, inputs, output, output_number, options):
        graph = interpreter.graph
        where = "operator %d FULLY_CONNECTED: " % number
        if len(inputs) < 2 or len(inputs) > 3:
            raise ModelError(where + "%d inputs" % len(inputs))
        source, weights = graph.tensor(inputs[0]), graph.tensor(inputs[1])
        self._x = interpreter.value(inputs[0])
        activation = graph.byte(options, 0) if options else 0
        if options and graph.byte(options, 1):
            raise ModelError(where + "shuffled weights are not supported")
        if len(weights.shape) != 2 or weights.kind != tflite.INT8 or weights.data_bytes != weights.size:
            raise ModelError(where + "weights must be a constant int8 matrix")
        if weights.zero_point or weights.axis or len(weights.scales) not in (1, weights.shape[0]):
            raise ModelError(where + "weights must have zero point 0 and one scale, or one per output")
        rows, width = weights.shape
        self._out = interpreter.hold(output_number, output)
        if source.size != width or output.size != rows:
            raise ModelError(
                where + "%d x %d weights on %d inputs, %d outputs" % (rows, width, source.size, output.size)
            )
        interpreter.add_macs(rows * width)
        self._weights = int8_view(graph.bytes(weights.data_at, weights.size))
        bias_at = 0
        if len(inputs) == 3 and inputs[2] >= 0:
            bias = graph.tensor(inputs[2])
            if bias.kind != tflite.INT32 or bias.data_bytes != 4 * rows or bias.size != rows:
                raise ModelError(where + "the bias must be %d constant int32" % rows)
            bias_at = bias.data_at
        steps = 2 if len(weights.scales) > 1 else 0
        low, high = clamp(activation, output)
        table = array("i", [0] * (_HEADER + rows + (2 * rows if steps else 2)))
        table[_INPUTS], table[_ROWS], table[_ZERO] = width, rows, output.zero_point + 128
        table[_LOW], table[_HIGH], table[_STEP] = low + 128, high + 128, steps
        self._table = table
        try:
            _multipliers(table, source.scales[0], weights.scales, output.scales[0])
            table[_DIGIT] = self._prove(graph, weights, source.zero_point, bias_at)
        except ModelError as error:
            raise ModelError(where + str(error))
        self._kernel = interpreter.dense if table[_DIGIT] else fully_connected
        self._rows = rows

    def run(self):
        self._kernel(self._x, self._weights, self._out, self._table, 0, self._rows)

    def _prove(self, graph, weights, zero, bias_at):
        """Folds the corrections into the biases; returns how many bits of a multiplier fit 32-bit arithmetic."""
        table, largest = self._table, 0
        width, rows = table[_INPUTS], table[_ROWS]
        for row in range(rows):
            total, size = row_sums(self._weights, row * width, width)
            positive, negative = (size + total) // 2, (total - size) // 2
            bias = graph.int32(bias_at + 4 * row) if bias_at else 0
            highest = bias + positive * (127 - zero) - negative * (128 + zero)
            lowest = bias - positive * (128 + zero) + negative * (127 - zero)
            shift = table[_HEADER + rows + row * table[_STEP] + 1] - 32
            reach = max(highest, -lowest) << max(shift, 0)
            if reach > 0x7FFFFFFF:
                raise ModelError("row %d could reach 2^31" % row)
            largest = max(largest, reach)
            table[_HEADER + row] = bias - (128 + zero) * total
        return 8 if largest <= _EXACT_8 else 4 if largest <= _EXACT_4 else 0


def _multipliers(table, source, weights, output):
    """Per tensor TFLite multiplies the scales as floats, per channel as doubles; both divide as doubles."""
    at = _HEADER + table[_ROWS]
    source, output = multiplier.real(source), multiplier.real(output)
    for scale in weights:
        product = multiplier.times(source, multiplier.real(scale))
        if len(weights) == 1:
            product = multiplier.single(product)
        m, shift = multiplier.quantized(multiplier.divided(product, output))
        table[at], table[at + 1] = m, shift + 32
        at += 2


def _choose(kernels):
    """The kernels by name: (dense, flip)."""
    if kernels != "plain":
        try:
            from . import int8_viper

            return int8_viper.fully_connected, int8_viper.flip
        except (ImportError, ValueError, SyntaxError):  # no such module; .mpy for another machine; no viper emitter
            if kernels == "viper":
                raise ModelError("this runtime has no viper emitter")
    return fully_connected, flip
