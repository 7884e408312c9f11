"""The operators beside FULLY_CONNECTED, imported only when a file has one: ADD, SUB, MUL, CONCATENATION, and, as tables
of 256 outputs made at load, RELU, LOGISTIC, TANH and QUANTIZE from int8 to int8.

Sources: add.cc, sub.cc, mul.cc, activations.cc, quantize.cc and reference/integer_ops/{logistic,tanh}.h in
tensorflow/lite/kernels and its micro twin; the fixed-point logistic and tanh are gemmlowp's (fixedpoint/fixedpoint.h).
Values are held as value + 128, as in int8/interpreter.py.
"""

from ..compat import const
from ..errors import ModelError
from . import operator_names, tflite
from .plain import flip, requantize
from .requantize import clamp, divided, quantized, real, times

_ADD = const(0)
_CONCATENATION = const(2)
_LOGISTIC = const(14)
_MUL = const(18)
_RELU = const(19)
_TANH = const(28)
_SUB = const(41)
_QUANTIZE = const(114)

_TWENTY_BITS = const(20)  # how far ADD and SUB lift their inputs before they are rescaled
_MAX_RAW = const(0x7FFFFFFF)  # the largest gemmlowp fixed-point number: 1.0 where there is no integer bit


def prepare(interpreter, number, operator):
    """A function without arguments that computes the operator on interpreter.values. Raises ModelError."""
    code, inputs, outputs, options = operator
    label = "operator %d %s" % (number, operator_names.name(code))
    if code in (_ADD, _SUB, _MUL):
        make = _arithmetic
    elif code == _CONCATENATION:
        make = _concatenation
    elif code in (_RELU, _LOGISTIC, _TANH, _QUANTIZE):
        make = _table
    else:
        raise ModelError(label + " is not supported")
    try:
        return make(interpreter, code, inputs, outputs[0], options)
    except ModelError as error:
        raise ModelError("%s: %s" % (label, error))


def _operand(interpreter, number):
    """(tensor, its value + 128): an activation, or a constant that is copied."""
    tensor = interpreter.graph.tensor(number)
    if not tensor.data_bytes:
        return tensor, interpreter.value(number)
    if tensor.kind != tflite.INT8 or tensor.data_bytes != tensor.size or tensor.scales != 1:
        raise ModelError("constant tensor %d is not int8 with one scale" % number)
    if tensor.size > tflite.MAX_ELEMENTS:
        raise ModelError("constant tensor %d has %d elements" % (number, tensor.size))
    value = bytearray(tensor.size)
    flip(interpreter.graph.bytes(tensor.data_at, tensor.size), value, tensor.size, 0)
    return tensor, value


def _target(interpreter, number, size):
    tensor = interpreter.graph.tensor(number)
    if tensor.size != size:
        raise ModelError("%d outputs from %d inputs" % (tensor.size, size))
    interpreter.add_macs(size)
    return tensor, interpreter.hold(number, tensor)


def _two(inputs):
    if len(inputs) != 2:
        raise ModelError("%d inputs" % len(inputs))
    return inputs


# --- ADD, SUB, MUL ---


def _arithmetic(interpreter, code, inputs, target, options):
    first, second = _two(inputs)
    a, x = _operand(interpreter, first)
    b, y = _operand(interpreter, second)
    size = max(a.size, b.size)
    if size != a.size and a.size != 1 or size != b.size and b.size != 1:
        raise ModelError("shapes %s and %s can't be broadcast" % (a.shape, b.shape))
    output, out = _target(interpreter, target, size)
    low, high = clamp(interpreter.graph.byte(options, 0) if options else 0, output)
    zero_a, zero_b, zero = a.zero_point + 128, b.zero_point + 128, output.zero_point
    combine = _product(a, b, output) if code == _MUL else _sum(a, b, output, code == _SUB)

    def run():
        for i in range(size):
            value = combine(x[i if a.size > 1 else 0] - zero_a, y[i if b.size > 1 else 0] - zero_b) + zero
            out[i] = 128 + (low if value < low else high if value > high else value)

    return run


def _product(a, b, output):
    scale = divided(times(real(a.scale), real(b.scale)), real(output.scale))
    m, shift = quantized(scale)
    if shift > 14:  # 2^16 << 14: as far as the reference's 32 bits go
        raise ModelError("the scales' ratio 2^%d is beyond the arithmetic" % shift)

    def product(x, y):
        return requantize(x * y, m, shift)

    return product


def _sum(a, b, output, subtract):
    """Both inputs are brought to twice the larger scale, 20 bits up, and summed there."""
    scale_a, scale_b = real(a.scale), real(b.scale)
    larger = scale_a if a.scale >= b.scale else scale_b  # positive floats sort as their bit patterns do
    twice = larger[0], larger[1] + 1
    ma, shift_a = quantized(divided(scale_a, twice))
    mb, shift_b = quantized(divided(scale_b, twice))
    wide = real(output.scale)
    m, shift = quantized(divided(twice, (wide[0], wide[1] + _TWENTY_BITS)))
    if shift > 0:
        raise ModelError("the output's scale is too small for its inputs'")

    def total(x, y):
        x = requantize(x << _TWENTY_BITS, ma, shift_a)
        y = requantize(y << _TWENTY_BITS, mb, shift_b)
        return requantize(x - y if subtract else x + y, m, shift)

    return total


# --- CONCATENATION ---


def _concatenation(interpreter, code, inputs, target, options):
    graph = interpreter.graph
    output = graph.tensor(target)
    at = graph.field(options, 0) if options else 0
    axis = graph.int32(at) if at else 0
    axis += len(output.shape) if axis < 0 else 0
    if not 0 <= axis < len(output.shape) or output.shape[:axis] != (1,) * axis or options and graph.byte(options, 1):
        raise ModelError("only rows are joined, without an activation (axis %d of %s)" % (axis, output.shape))
    parts = []
    for number in inputs:
        tensor, value = _operand(interpreter, number)
        if tensor.scale != output.scale or tensor.zero_point != output.zero_point:
            raise ModelError("inputs of another scale")
        parts.append((len(value), value))
    output, out = _target(interpreter, target, sum([count for count, _ in parts]))

    def run():
        at = 0
        for count, value in parts:
            out[at : at + count] = value
            at += count

    return run


# --- tables ---


def _table(interpreter, code, inputs, target, options):
    if len(inputs) != 1:
        raise ModelError("%d inputs" % len(inputs))
    source, x = _operand(interpreter, inputs[0])
    output, out = _target(interpreter, target, source.size)
    if code in (_LOGISTIC, _TANH):
        function = _curve(code, source, output)
    else:
        function = _rescaling(code, source, output)
    table = bytearray([128 + max(-128, min(127, function(i - 128 - source.zero_point))) for i in range(256)])

    def run():
        for i in range(source.size):
            out[i] = table[x[i]]

    return run


def _rescaling(code, source, output):
    """QUANTIZE divides the scales as doubles; RELU as floats, then clamps at zero."""
    bits = 24 if code == _RELU else 53
    m, shift = quantized(divided(real(source.scale), real(output.scale), bits))
    if shift > 22:  # 2^8 << 22: as far as the reference's 32 bits go
        raise ModelError("the scales' ratio 2^%d is beyond the arithmetic" % shift)
    zero = output.zero_point
    floor = zero if code == _RELU else -128

    def rescale(x):
        return max(floor, requantize(x, m, shift) + zero)

    return rescale


def _curve(code, source, output):
    """The input in fixed point with 4 integer bits, saturated beyond the radius; the output's scale is given."""
    scale, zero, drop = (0x3B800000, -128, 23) if code == _LOGISTIC else (0x3C000000, 0, 24)  # 1/256, 1/128
    if output.scale != scale or output.zero_point != zero:
        raise ModelError("the output's scale and zero point must be the ones that TFLite prescribes")
    n, exponent = real(source.scale)
    m, shift = quantized((n, exponent + 27))
    if shift < 0:
        raise ModelError("the input's scale is too small")
    radius = (15 << 27) >> shift
    function = _logistic if code == _LOGISTIC else _tanh

    def curve(x):
        if x <= -radius:
            return -128
        if x >= radius:
            return 127
        return _rounded(function(requantize(x, m, shift)), drop) + zero

    return curve


def _logistic(x):
    """gemmlowp logistic, 4 integer bits -> none."""
    if x == 0:
        return 1 << 30
    y = _reciprocal(_exp(-abs(x), 27), 0)
    return y if x > 0 else _MAX_RAW - y


def _tanh(x):
    if x == 0:
        return 0
    y = _reciprocal(_exp(-abs(x), 26), 1 << 29)  # 26 fraction bits: the same number doubled
    return y if x > 0 else -y


def _exp(x, fraction):
    """e^x for x <= 0 with `fraction` bits of fraction -> no integer bit. A Taylor series, then a factor per bit."""
    if x == 0:
        return _MAX_RAW
    quarter = 1 << fraction - 2
    near = (x & quarter - 1) - quarter  # in -1/4 .. 0
    t = (near << 31 - fraction) + (1 << 28)  # around -1/8
    t2 = _times(t, t)
    t3 = _times(t2, t)
    t4 = _rounded(_times(t2, t2), 2)
    series = _rounded(_times(t4 + t3, 715827883) + t2, 1)
    y = 1895147668 + _times(1895147668, t + series)
    rest = near - x
    bit = fraction - 2
    for factor in (1672461947, 1302514674, 790015084, 290630308, 39332535, 720401, 242):  # e^-1/4, e^-1/2 .. e^-16
        if bit < 31 and rest >> bit & 1:
            y = _times(y, factor)
        bit += 1
    return y


def _reciprocal(x, minus):
    """1 / (1 + x) for x in 0 .. 1 by Newton's method; with `minus` 2^29 (one, in 2 integer bits), 2 / (1 + x) - 1."""
    half = (x + _MAX_RAW + 1) >> 1
    y = 1515870810 + _times(half, -1010580540)
    for _ in range(3):
        y += _saturated(_times(y, (1 << 29) - _times(half, y)) << 2)
    return _saturated((y - minus) << (2 if minus else 1))


def _times(a, b):
    return (a * b + 0x40000000) >> 31


def _rounded(x, bits):
    return (x + (1 << bits - 1) - (x < 0)) >> bits


def _saturated(x):
    return max(-_MAX_RAW - 1, min(_MAX_RAW, x))
