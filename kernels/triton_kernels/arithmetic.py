"""Device code of the numbers: scales, quotients, FP8 bytes and exp, bit for bit what kernels/reference computes.

Everything is compiled without FP fusion (see launch.py), so a product and a sum round apart unless `tl.fma` says
otherwise. Largest magnitudes are compared as integers: the bits of |x| order as the numbers do, infinity above all
finite ones and NaN above infinity, where a floating maximum would drop a NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_ext.kernels.layout import BLOCK as TILE
from megatron_ext.kernels.layout import FORMATS, NAN_BYTE
from megatron_ext.kernels.reference import activation, e5m6

BLOCK = tl.constexpr(TILE)
INFINITY_BITS = tl.constexpr(0x7F800000)
NAN_BITS = tl.constexpr(0x7FC00000)
NAN_DATA = tl.constexpr(NAN_BYTE)

LARGEST_E4M3 = tl.constexpr(FORMATS["e4m3"].largest)
SMALLEST_E4M3 = tl.constexpr(FORMATS["e4m3"].smallest_scale)
LARGEST_E5M2 = tl.constexpr(FORMATS["e5m2"].largest)
SMALLEST_E5M2 = tl.constexpr(FORMATS["e5m2"].smallest_scale)
LEAST_RECIPROCAL = tl.constexpr(0.5 + 2.0**-24)

LOWEST, HIGHEST = tl.constexpr(activation.LOWEST), tl.constexpr(activation.HIGHEST)
LOG2_E = tl.constexpr(activation.LOG2_E)
LN2_HIGH, LN2_LOW = tl.constexpr(activation.LN2_HIGH), tl.constexpr(activation.LN2_LOW)
P5, P4, P3, P2, P1, P0 = (tl.constexpr(c) for c in activation.POLYNOMIAL)
ROUNDING = tl.constexpr(1.5 * 2.0**23)

LARGEST_E5M6, SMALLEST_E5M6 = tl.constexpr(e5m6.LARGEST), tl.constexpr(e5m6.SMALLEST_SCALE)


@triton.jit
def magnitude(x):
    """The bits of |x| for FP32 x, as an integer that orders as |x| does."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(amax, LARGEST: tl.constexpr, SMALLEST: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """The scale of blocks whose largest magnitudes have the bits `amax`: a finite number even of NaN and infinities.

    max(amax / LARGEST, SMALLEST), the division by one Newton step on the significand (which rounds all 2^23 of them as
    IEEE division does) and a subtraction of exponents: where it goes below 0, the maximum takes SMALLEST.
    """
    largest = tl.full((1,), LARGEST, tl.float32).to(tl.int32, bitcast=True)
    divisor = ((largest & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    smallest = tl.full((1,), SMALLEST, tl.float32).to(tl.int32, bitcast=True)
    reciprocal = tl.div_rn(1.0, divisor)
    x = ((amax & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    q = x * reciprocal
    q = tl.fma(tl.fma(-divisor, q, x), reciprocal, q)
    bits = tl.maximum(q.to(tl.int32, bitcast=True) + (amax & 0x7F800000) - (largest & 0x7F800000), smallest)
    if POWER_OF_TWO:
        bits = (bits + 0x7FFFFF) & 0x7F800000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def nan_if(bad, scale):
    """The scale to store: NaN for a block that holds NaN or an infinity."""
    return tl.where(bad, NAN_BITS, scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def divisor_of(scale, POWER_OF_TWO: tl.constexpr):
    """What `quotient` needs of scales: (shift, significand, reciprocal); of powers of two only the first counts.

    The reciprocal is rounded correctly whatever the division instruction gives within 3 units in the last place: two
    Newton steps do that for every significand but the largest, which the bound mends.
    """
    bits = scale.to(tl.int32, bitcast=True)
    exponent = bits & 0x7F800000
    if POWER_OF_TWO:
        shift = (0x7F000000 - exponent).to(tl.float32, bitcast=True)
        return shift, shift, shift
    else:
        significand = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
        shift = (-0x1000000 - exponent).to(tl.float32, bitcast=True)
        y = -1.0 / significand
        y = tl.fma(tl.fma(significand, y, 1.0), y, y)
        y = tl.fma(tl.fma(significand, y, 1.0), y, y)
        return shift, significand, tl.minimum(y, -LEAST_RECIPROCAL)


@triton.jit
def quotient(x, shift, significand, reciprocal, POWER_OF_TWO: tl.constexpr):
    """x / scale as IEEE division rounds it, wherever that is a normal number; the others are `divisor_of(scale)`.

    A division an element is some 10 instructions and a branch. By a power of two it is a product with the exact
    reciprocal. For other scales what depends on the scale alone is done once a block, and 4 instructions are left: x is
    shifted by the exponent of the scale (exact), multiplied by the correctly rounded reciprocal y of its significand b,
    and corrected once by the remainder, which an FMA gives exactly. The error before the last rounding is below
    1.5 b 2^-49, so only quotients within 2 units of 2^-48 / b of a tie could round wrongly; they are few enough to try
    them all (tests/kernels/test_triton_arithmetic.py), and none does. x, y and the remainder are all taken negative: so
    a quotient of -0 keeps its sign, at no instruction.
    """
    x = x * shift
    if POWER_OF_TWO:
        return x
    else:
        q = x * reciprocal
        return tl.fma(tl.fma(q, significand, x), reciprocal, q)


@triton.jit
def fp8_bytes(x, amax, axis: tl.constexpr, POWER_OF_TWO: tl.constexpr, E5M2: tl.constexpr):
    """x [R, C] quantised by rows or columns: `amax` holds the bits of their largest magnitudes along `axis`.

    No clamp is needed: a scale is at least amax / largest but for one rounding, so a quotient exceeds the largest
    number by less than a rounding to FP8 notices.

    Returns:
        bytes shaped as x, and shaped as `amax` the scales and which blocks are bad: those hold NaN or an infinity, and
        the caller makes all their bytes NAN_DATA. (Zeros are zero bytes in them too, so what lies beyond a tile is.)
    """
    if E5M2:
        scale = scale_of(amax, LARGEST_E5M2, SMALLEST_E5M2, POWER_OF_TWO)
    else:
        scale = scale_of(amax, LARGEST_E4M3, SMALLEST_E4M3, POWER_OF_TWO)
    shift, significand, reciprocal = divisor_of(scale, POWER_OF_TWO)
    shift, significand = tl.expand_dims(shift, axis), tl.expand_dims(significand, axis)
    value = quotient(x, shift, significand, tl.expand_dims(reciprocal, axis), POWER_OF_TWO)
    if E5M2:
        data = value.to(tl.float8e5).to(tl.uint8, bitcast=True)
    else:
        data = value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bad = amax >= INFINITY_BITS
    return data, nan_if(bad, scale), bad


@triton.jit
def exp_fp32(x):
    """See `reference.activation.exp_fp32`; but what NaN gives is undefined.

    n is rounded to an integer, half to even, by adding a number whose unit in the last place is 1; shifted by 23, the
    bits of that sum are n in the place of an exponent.
    """
    x = tl.minimum(tl.maximum(x, LOWEST), HIGHEST)
    shifted = x * LOG2_E + ROUNDING
    n = shifted - ROUNDING
    r = x - n * LN2_HIGH
    r = r - n * LN2_LOW
    p = P5 * r + P4
    p = p * r + P3
    p = p * r + P2
    p = p * r + P1
    p = p * r + P0
    e = (p * (r * r) + r) + 1.0
    return (e.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def sigmoid(x):
    """See `reference.activation.sigmoid`; of NaN a number, for whoever multiplies it by x has NaN from that."""
    return tl.div_rn(1.0, 1.0 + exp_fp32(-x))
