"""The arithmetic that the Triton kernels put in place of divisions, proved over all significands.

Written out in NumPy with FMAs of one rounding, operation by operation as kernels/triton_kernels/arithmetic.py; that the
kernels compute the same is shown by test_triton_operators.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy
import pytest
from numpy.typing import NDArray

from megatron_ext.kernels.layout import FORMATS
from megatron_ext.kernels.reference.e5m6 import LARGEST
from tests.kernels.interpreter import fma as fused

F = numpy.float32
Floats = NDArray[numpy.float32]
LEAST_RECIPROCAL = F(0.5 + 2.0**-24)


def fma(x: Floats | F, y: Floats | F, z: Floats | F) -> Floats:
    return fused(numpy.asarray(x), numpy.asarray(y), numpy.asarray(z))


def significands(first: int = 0, count: int = 1 << 23) -> Floats:
    """FP32 numbers in [1, 2), all of them or some."""
    return (numpy.arange(first, first + count, dtype=numpy.uint32) | numpy.uint32(0x3F800000)).view(F)


def parts() -> Iterator[Floats]:
    for first in range(0, 1 << 23, 1 << 20):
        yield significands(first, 1 << 20)


def reciprocal(b: Floats, seed: Floats) -> Floats:
    y = fma(fma(-b, seed, F(1)), seed, seed)
    return numpy.maximum(fma(fma(-b, y, F(1)), y, y), LEAST_RECIPROCAL)


def divide(a: Floats, b: Floats, y: Floats) -> Floats:
    q = a * y
    return fma(fma(-b, q, a), y, q)


def test_fma_rounds_once() -> None:
    a = significands(1 << 22, 1 << 18)
    assert (fma(a, a, -(a * a)) == (a.astype(float) ** 2 - (a * a).astype(float)).astype(F)).all()
    one, tiny = F(1), F(2.0**-24)  # a tie, broken by what FP64 alone would lose
    assert fma(tiny, F(1 + 2.0**-23), one) == F(1 + 2.0**-23) and fma(tiny, one, one) == one
    assert fma(F(2.0**-40), F(2.0**-40), F(1 + 2.0**-23) * F(1)) == F(1 + 2.0**-23)


@pytest.mark.parametrize("largest", [*(f.largest for f in FORMATS.values()), LARGEST])
def test_scales_are_divisions(largest: float) -> None:
    divisor = F(numpy.frexp(largest)[0] * 2)
    for x in parts():
        assert (divide(x, divisor, F(1) / divisor) == x / divisor).all()


@pytest.mark.parametrize("off", [-3, 0, 3])
def test_reciprocals_are_rounded_correctly_from_any_seed(off: int) -> None:
    """The GPU's division without IEEE rounding is within 2 units in the last place."""
    for b in parts():
        exact = F(1) / b
        seed = (exact.view(numpy.int32) + numpy.int32(off)).view(F)
        assert (reciprocal(b, seed) == exact).all()


def hard_cases() -> Iterator[tuple[Floats, Floats]]:
    """Every pair of significands whose quotient is so near a tie that one Newton step could round it wrongly.

    With a = A 2^-23, b = B 2^-23 and a tie k 2^-s, k odd of 25 bits, the distance is |A 2^s - B k| over b 2^(s + 23).
    The step's error bounds the integer c = A 2^s - B k: |c| = 1 where a >= b (s = 24), |c| <= 2 where a < b (s = 25).
    """
    for s, distances in ((24, (1, -1)), (25, (1, -1, 2, -2))):
        for c in distances:
            even = abs(c) == 2  # B is twice an odd number
            odd = numpy.arange((1 << 23 - even) + 1, 1 << 24 - even, 2, dtype=numpy.uint64)
            modulus = 1 << s - even
            inverse = odd.copy()  # modulo 2^64, by Newton
            for _ in range(5):
                inverse = inverse * (numpy.uint64(2) - odd * inverse)
            k0 = inverse * numpy.uint64((-c >> even) % 2**64) & numpy.uint64(modulus - 1)
            for shift in range(0, 1 << 25, modulus):
                k = k0 + numpy.uint64(shift)
                inside = (k >= 1 << 24) & (k < 1 << 25) & (k & numpy.uint64(1) == 1)
                b = (odd << numpy.uint64(even))[inside]
                shifted = b * k[inside] + numpy.uint64(c % 2**64)
                a = shifted >> numpy.uint64(s)
                assert ((a << numpy.uint64(s)) == shifted).all()
                inside = (a >= 1 << 23) & (a < 1 << 24) & ((a >= b) if s == 24 else (a < b))
                yield a[inside].astype(F) * F(2.0**-23), b[inside].astype(F) * F(2.0**-23)


def test_quotients_are_rounded_correctly() -> None:
    count = without_the_step = 0
    for a, b in hard_cases():
        y = F(1) / b
        count += len(a)
        without_the_step += (a * y != a / b).sum()
        assert (divide(a, b, y) == a / b).all()
    assert count > 8_000_000 and without_the_step > 4_000_000
    rng = numpy.random.default_rng(0)
    for b in (significands()[rng.integers(0, 1 << 23, 3)]):
        a = significands(0, 1 << 21)
        assert (divide(a, b, F(1) / b) == a / b).all()
