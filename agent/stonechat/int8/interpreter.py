"""Runs an int8 graph with the arithmetic that microcontrollers use, bit for bit, in integers only.

The arithmetic is TFLite's "double rounding" (gemmlowp): TFLite Micro, CMSIS-NN and TFLite's integer reference kernels
up to 2.14 compute it; LiteRT's kernels since 2025 do not. For acc = bias + sum(w * (x - zero point of x)):

    h = ((acc << max(shift, 0)) * m + 2^30) >> 31          gemmlowp SaturatingRoundingDoublingHighMul
    y = (h + 2^(e - 1) - (h < 0)) >> e, e = -shift > 0      gemmlowp RoundingDivideByPOT: half away from zero
    y + zero point, clamped to the fused activation's range

Between the layers a value is held as value + 128, an unsigned byte: the kernels need no sign extension for it, and the
correction is folded into each row's bias at load. Bounds are proved at load: a row whose accumulator could reach 2^31
is refused, and the kernels (int8/plain.py, int8/viper.py) check nothing. The operators that few models have are in
operators.py.

This is the full reader's half: tools, Linux, and boards built --with int8. Other boards run the plan that model_file.py
made from it.
"""

from array import array

from ..compat import const, tidy
from ..errors import ModelError
from . import requantize, tflite
from .network import Layer, Network, choose

_DEQUANTIZE = const(6)
_FULLY_CONNECTED = const(9)
_RESHAPE = const(22)
_QUANTIZE = const(114)

_EXACT_8 = const(0x200000)  # 2^21: a multiplier taken 8 bits at a time keeps every product under 2^30
_EXACT_4 = const(0x4000000)  # 2^26: the same for 4 bits at a time

# as in int8/network.py, which describes the table; no runtime imports a constant with an underscore
_MAX_MACS = const(1048576)
_INPUTS = const(0)
_ROWS = const(1)
_ZERO = const(2)
_LOW = const(3)
_HIGH = const(4)
_STEP = const(5)
_DIGIT = const(6)
_HEADER = const(7)


class Interpreter(Network):
    """graph: tflite.Graph; the other arguments as for network.Network.

    `values` is the activations, value + 128, by tensor number; `layers` the dense ones, in order; `digits`, per dense
    layer, the bits of a multiplier that 32-bit arithmetic takes at a time (8, 4, or 0: the plain kernel and 64 bits).
    Raises ModelError for whatever can't be computed exactly.
    """

    def __init__(self, graph, kernels=None, resident_bytes=16384):
        Network.__init__(self, kernels, resident_bytes)
        if len(graph.inputs) != 1 or len(graph.outputs) != 1:
            raise ModelError("%d inputs, %d outputs: 1 and 1 are supported" % (len(graph.inputs), len(graph.outputs)))
        self.graph = graph
        self.steps = []
        self.values: dict = {}
        self._input = b""
        first = graph.tensor(graph.inputs[0])
        if first.kind != tflite.FLOAT32:  # a float input waits for its QUANTIZE
            self._input = self.hold(graph.inputs[0], first)
        for number in range(graph.operator_count):
            self._prepare(number, graph.operator(number))
        if not self._input or graph.outputs[0] not in self.values:
            raise ModelError("the graph does not lead from its input to its output")
        self.lead(self._input, self.values[graph.outputs[0]])

    def add_macs(self, count):
        self.macs += count
        if self.macs > _MAX_MACS:
            raise ModelError("more than %d multiply-accumulates" % _MAX_MACS)

    @property
    def digits(self):
        return [layer.table[_DIGIT] for layer in self.layers]

    @property
    def is_chain(self):
        """True where the graph is nothing but dense layers, one after the other."""
        x = self._x
        for step in self.steps:
            if step not in self.layers or step.x is not x:
                return False
            x = step.out
        return self._y is x and len(self.steps) > 0

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

    def _prepare(self, number, operator):
        code, inputs, outputs, options = operator
        if not inputs or len(outputs) != 1:
            raise ModelError("operator %d: %d inputs, %d outputs" % (number, len(inputs), len(outputs)))
        graph, target = self.graph, outputs[0]
        source, output = graph.tensor(inputs[0]), graph.tensor(target)
        if code == _QUANTIZE and not self._input and inputs[0] == graph.inputs[0] and source.size == output.size:
            self._input = self.hold(target, output)  # the model's input is what a float input is quantized to
        elif code == _DEQUANTIZE and target == graph.outputs[0] and output.kind == tflite.FLOAT32:
            self.values[target] = self.value(inputs[0])  # its output is what a float output is made from
        elif code == _RESHAPE:
            if source.size != output.size or source.scale != output.scale or source.zero_point != output.zero_point:
                raise ModelError("operator %d RESHAPE changes more than the shape" % number)
            self.hold(target, output)
            self.values[target] = self.value(inputs[0])
        elif code == _FULLY_CONNECTED:
            try:
                layer = self._dense(inputs, source, output, target, options)
            except ModelError as error:
                raise ModelError("operator %d FULLY_CONNECTED: %s" % (number, error))
            self.steps.append(layer)
        else:
            from . import operators

            self.mixed = True
            self.steps.append(_Step(operators.prepare(self, number, operator)))

    def _dense(self, inputs, source, output, target, options):
        """One FULLY_CONNECTED operator: checked, its table made, its rows' bounds proved."""
        graph = self.graph
        x = self.value(inputs[0])
        out = self.hold(target, output)
        if options and graph.byte(options, 1):
            raise ModelError("shuffled weights are not supported")
        weights = graph.tensor(inputs[1]) if 2 <= len(inputs) <= 3 else output
        if len(weights.shape) != 2 or weights.kind != tflite.INT8 or weights.data_bytes != weights.size:
            raise ModelError("the weights must be a constant int8 matrix")
        rows, width = weights.shape
        if weights.zero_point or weights.axis or weights.scales not in (1, rows):
            raise ModelError("the weights must have zero point 0 and one scale, or one per output")
        if source.size != width or output.size != rows:
            raise ModelError("%d x %d weights, %d inputs, %d outputs" % (rows, width, source.size, output.size))
        self.add_macs(rows * width)
        bias_at = 0
        if len(inputs) == 3 and inputs[2] >= 0:
            bias = graph.tensor(inputs[2])
            if bias.kind != tflite.INT32 or bias.data_bytes != 4 * rows or bias.size != rows:
                raise ModelError("the bias must be %d constant int32" % rows)
            bias_at = bias.data_at
        step = 2 if weights.scales > 1 else 0
        tidy()
        table = array("i", range(_HEADER + rows + (step * rows or 2)))  # sized once, filled below
        table[_INPUTS], table[_ROWS], table[_STEP] = width, rows, step
        low, high = requantize.clamp(graph.byte(options, 0) if options else 0, output)
        table[_ZERO], table[_LOW], table[_HIGH] = output.zero_point + 128, low + 128, high + 128
        _multiply(table, graph, source, weights, output)
        table[_DIGIT] = 8  # until it is proved
        layer = Layer(self, graph, weights.data_at, table, x, out)
        table[_DIGIT] = _prove(layer, graph, source.zero_point, bias_at)
        if not table[_DIGIT]:
            layer.kernels = choose("plain")
            self.mixed = True
        return layer


class _Step:
    """An operator of operators: run is the function that it made."""

    def __init__(self, run):
        self.run = run


def _prove(layer, graph, zero, bias_at):
    """Folds the corrections into the biases; returns how many bits of a multiplier 32-bit arithmetic takes."""
    table, largest = layer.table, 0
    rows, width = table[_ROWS], table[_INPUTS]
    q = _HEADER + rows + 1
    for row in range(rows):
        at = row % layer.rows_at_once
        if not at:
            layer.fetch(row)
            weights = layer.weights
        positive = negative = 0
        for i in range(at * width, at * width + width):
            weight = weights[i] - 128
            if weight > 0:
                positive += weight
            else:
                negative -= weight
        bias = graph.int32(bias_at + 4 * row) if bias_at else 0
        highest = bias + positive * (127 - zero) + negative * (128 + zero)
        lowest = bias - positive * (128 + zero) - negative * (127 - zero)
        reach = max(highest, -lowest) << max(table[q] - 32, 0)
        if reach > 0x7FFFFFFF:
            raise ModelError("row %d could reach 2^31" % row)
        largest = max(largest, reach)
        table[_HEADER + row] = bias - (128 + zero) * (positive - negative)
        q += table[_STEP]
    return 8 if largest <= _EXACT_8 else 4 if largest <= _EXACT_4 else 0


def _multiply(table, graph, source, weights, output):
    """Per tensor TFLite multiplies the scales as floats, per channel as doubles; both divide as doubles."""
    at = _HEADER + table[_ROWS]
    source_scale, output_scale = requantize.real(source.scale), requantize.real(output.scale)
    for i in range(weights.scales):
        weight_scale = requantize.real(graph.u32(weights.scale_at + 4 * i))
        product = requantize.times(source_scale, weight_scale)
        if weights.scales == 1:
            product = requantize.single(product)
        m, shift = requantize.quantized(requantize.divided(product, output_scale))
        table[at], table[at + 1] = m, shift + 32
        at += 2


def read(data, kernels=None, resident_bytes=16384):
    """data: a .tflite, as tflite.read takes it -> Interpreter. Raises ModelError."""
    return Interpreter(tflite.read(data), kernels, resident_bytes)
