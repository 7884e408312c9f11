"""TFLite's quantization arithmetic with integers only: from scales to multipliers, and how an accumulator is rounded.

TFLite derives multipliers with doubles (QuantizeMultiplier, GetQuantizedConvolutionMultipler and
PopulateConvolutionQuantizationParams in tensorflow/lite/kernels). A board's floats have 32 bits, so the doubles'
rounding is emulated here: a real number is a pair (n, exponent) worth n * 2^exponent, n an integer.
"""

from ..compat import const
from ..errors import ModelError

_ONE = const(0x3F800000)  # float32 1.0
_SIX = const(0x40C00000)  # float32 6.0


def clamp(activation, tensor):
    """The range of a fused activation on `tensor` (CalculateActivationRangeQuantized): (lowest, highest) int8."""
    if not 0 <= activation <= 3:
        raise ModelError("fused activation %d is not supported" % activation)
    low, high = -128, 127
    if activation:
        zero, scale = tensor.zero_point, real(tensor.scale)
        if activation == 2:  # RELU_N1_TO_1
            one = _rounded_int(divided(real(_ONE), scale, 24))
            low, high = zero - one, zero + one
        else:
            low = zero
            if activation == 3:  # RELU6
                high = zero + _rounded_int(divided(real(_SIX), scale, 24))
    return max(-128, low), min(127, high)


def real(bits):
    """A float32 bit pattern as an exact pair, n in 2^23 .. 2^24 - 1. Raises ModelError unless positive and finite."""
    if not 0 < bits < 0x7F800000:
        raise ModelError("scale 0x%08x is not positive and finite" % bits)
    n, exponent = bits & 0x7FFFFF, bits >> 23
    if exponent:
        return n | 0x800000, exponent - 150
    exponent = -149
    while not n >> 23:
        n <<= 1
        exponent -= 1
    return n, exponent


def times(a, b):
    """The exact product, as of two float32 held in doubles."""
    return a[0] * b[0], a[1] + b[1]


def single(a):
    """Rounded to float32 (half to even, subnormals too), as where C multiplies two floats."""
    n, exponent = a
    n, exponent = _rounded(n, exponent, max(_bits(n) - 24, -149 - exponent))
    if _bits(n) + exponent > 128:
        raise ModelError("the product of two scales is infinite")
    return n, exponent


def divided(a, b, bits=53):
    """The quotient rounded to `bits` significant bits, half to even: 53 as doubles divide, 24 as floats do."""
    n, d = a[0], b[0]
    shift = max(0, bits + 2 + _bits(d) - _bits(n))
    n <<= shift
    quotient = n // d << 1
    if n % d:
        quotient |= 1  # a sticky bit: what was cut off is not zero
    return _rounded(quotient, a[1] - b[1] - shift - 1, _bits(quotient) - bits)


def quantized(a):
    """QuantizeMultiplier: (m, shift), a = m * 2^(shift - 31), m in 2^30 .. 2^31 - 1; (0, 0) where a is too small."""
    n, exponent = a
    bits = _bits(n)
    shift = exponent + bits
    m = n << 31 - bits if bits <= 31 else (n + (1 << bits - 32)) >> bits - 31
    if m == 1 << 31:
        m >>= 1
        shift += 1
    if not n or shift < -31:
        return 0, 0
    if shift > 30:
        raise ModelError("the scales' ratio 2^%d is beyond the arithmetic" % shift)
    return m, shift


def _rounded_int(a):
    """The nearest integer, half away from zero (C round), or 512 where it is more: no int8 is that far away."""
    n, exponent = a
    if exponent >= 0:
        return 512
    return min((n + (1 << -exponent - 1)) >> -exponent, 512)


def _rounded(n, exponent, drop):
    if drop > 0:
        rest = n & (1 << drop) - 1
        half = 1 << drop - 1
        n >>= drop
        if rest > half or rest == half and n & 1:
            n += 1
        exponent += drop
    return n, exponent


def _bits(n):
    """Length in bits (MicroPython has no int.bit_length): in steps of 8 first, as a big integer is slow on a board."""
    bits = 0
    while n >> bits + 8:
        bits += 8
    while n >> bits:
        bits += 1
    return bits
