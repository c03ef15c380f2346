"""Numbers from one dtype to another: BF16, F16, F32, and FP8 in blocks of 128x128 with FP32 scales.

FP8 to BF16 or FP32 is data * scale, in FP32. The way back with the original scales gives the original FP8 bytes: E4M3
has 4 significant bits, so rounding the product to BF16's 8 cannot move the quotient to another code. It is checked for
every block all the same: numbers that the given scales do not give back bit for bit are not the ones they belong to.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megatron_ext.checkpoint.convert.tensors import BITS, SIZES, Bits
from megatron_ext.fp8 import QuantizedTensor, quantize

_TORCH: dict[str, torch.dtype] = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32,
                                  "F8_E4M3": torch.float8_e4m3fn}
_SIGNED: dict[int, Any] = {1: np.uint8, 2: np.int16, 4: np.int32}
_LARGEST = 448.0
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-116, 2.0**100


class NumberError(ValueError):
    """Numbers that cannot be taken over exactly; `hint` says what to do, if that is known."""

    def __init__(self, found: str, hint: str | None = None):
        self.hint = hint
        super().__init__(found)


def to_torch(bits: Bits, dtype: str) -> torch.Tensor:
    """The numbers that bits mean; shares their memory."""
    return torch.from_numpy(bits.view(_SIGNED[SIZES[dtype]])).view(_TORCH[dtype])


def to_bits(numbers: torch.Tensor, dtype: str) -> Bits:
    """Numbers in `dtype`, as bits."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[SIZES[dtype]]
    bits: Bits = numbers.to(_TORCH[dtype]).contiguous().view(kind).numpy()
    return bits.view(BITS[SIZES[dtype]])


def cast(bits: Bits, dtype: str, to: str) -> Bits:
    """Numbers of any shape in another dtype, rounded to nearest.

    Raises:
        NumberError: a finite number is too large for `to`.
    """
    numbers = to_torch(bits, dtype)
    cast = numbers.to(_TORCH[to])
    if SIZES[to] < SIZES[dtype] or to == "F16":
        lost = torch.isinf(cast) & torch.isfinite(numbers)
        if bool(lost.any()):
            raise NumberError(f"holds {float(numbers[lost][0]):.6g}, which {to} does not")
    return to_bits(cast, to)


def dequantise(codes: Bits, scale: Bits, to: str) -> Bits:
    """E4M3 codes [n, k] and FP32 scales [ceil(n / 128), ceil(k / 128)] -> [n, k].

    Raises:
        NumberError: a code is NaN, or a scale such that the way back would not be exact.
    """
    factors = to_torch(scale, "F32")
    if codes.size and (codes.max() == 0xFF or codes.view(np.int8).max() == 0x7F):
        raise NumberError("holds NaN")
    ordinary = _ordinary(factors)
    if not bool(ordinary.all()):
        for row, column in (~ordinary).nonzero().tolist():
            block = codes[row * 128:(row + 1) * 128, column * 128:(column + 1) * 128]
            if not (factors[row, column] >= 0 and torch.isfinite(factors[row, column])) or (block & 0x7F).any():
                raise NumberError(f"has scale {float(factors[row, column])} for the block at {row}, {column}")
    return to_bits(QuantizedTensor(to_torch(codes, "F8_E4M3"), factors, (128, 128)).dequantize(), to)


def _ordinary(factors: torch.Tensor) -> torch.Tensor:
    """Scales that keep every code apart: neither products that overflow nor such as are no normal numbers.

    Others are exact only for blocks of zeros, which some quantisers give the scale 0.
    """
    return (factors >= _SMALLEST_SCALE) & (factors <= _LARGEST_SCALE)


def quantise(bits: Bits, dtype: str, scale: Bits | None) -> tuple[Bits, Bits]:
    """Numbers [n, k] -> E4M3 codes [n, k] and FP32 scales [ceil(n / 128), ceil(k / 128)].

    Args:
        bits: BF16, F16 or F32.
        dtype: which.
        scale: the original scales, of numbers that were FP8 before; None to choose them anew.

    Raises:
        NumberError: a number is NaN or infinite, or the given scales are not those of these numbers.
    """
    numbers = to_torch(bits, dtype)
    if not bool(torch.isfinite(numbers).all()):
        raise NumberError("holds NaN or infinity")
    if scale is None:
        quantised = quantize(numbers, (128, 128))
        return to_bits(quantised.data, "F8_E4M3"), to_bits(quantised.scale, "F32")
    factors = to_torch(scale, "F32")
    rows, columns = numbers.shape
    divisors = torch.where(_ordinary(factors), factors, 1.0)
    spread = divisors.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    codes = (numbers.float() / spread).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    back = QuantizedTensor(codes, factors, (128, 128)).dequantize()
    # FP32 numbers may have been BF16 on their way here.
    ways = (back, back.to(torch.bfloat16)) if dtype == "F32" else (back,)
    if not any(np.array_equal(to_bits(way, dtype), bits) for way in ways):
        raise NumberError("is not what its carried scales give",
                          "the weights were changed since they were FP8: remove megatron_ext_carried to quantise anew")
    return to_bits(codes, "F8_E4M3"), scale
