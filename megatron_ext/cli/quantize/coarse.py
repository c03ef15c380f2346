"""Quantisation of a matrix with any block that shares a scale, in plain torch, and straight back to FP32.

    amax  = max |x| over the block, or of a calibration tensor (static range)
    scale = max(amax / largest, smallest), rounded up to a power of two if asked
    x'    = round_to_nearest_even(clamp(x / scale, -largest, largest)) * scale

The fine blocks, 1x128 and 128x128, are the library's own (`megatron_ext.fp8.quantize`, and the kernels' E5M6); tests
hold the formula here against them. Shape letters: M rows (tokens), K columns (channels).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext import fp8
from megatron_ext.kernels.layout import BLOCK
from megatron_ext.kernels.layout import FORMATS as FP8
from megatron_ext.kernels.reference import e5m6


@dataclass(frozen=True)
class Rounded:
    """What became of x [M, K].

    Attributes:
        values: [M, K] FP32.
        limit: the largest magnitude that its scale allows each number, broadcastable to [M, K].
    """

    values: Tensor
    limit: Tensor


def largest(format: str) -> float:
    """The largest number of a format."""
    return e5m6.LARGEST if format == "e5m6" else FP8[format].largest


def quantize(x: Tensor, granularity: str, scale: str, format: str) -> Rounded:
    """Quantises x [M, K] FP32 with a dynamic range and back.

    Args:
        granularity: "tensor", "row", "channel", "1x128" or "128x128".
        scale: "fp32" or "pow2".
        format: "e4m3", "e5m2" or "e5m6".
    """
    blocks = {"1x128": (1, BLOCK), "128x128": (BLOCK, BLOCK)}
    if granularity in blocks and format in FP8:
        q = fp8.quantize(x, blocks[granularity], scale == "pow2", format)  # type: ignore[arg-type]
        return Rounded(q.dequantize(), _spread(q.scale, blocks[granularity], x) * largest(format))
    if (granularity, scale, format) == ("1x128", "pow2", "e5m6"):
        *planes, scales = e5m6.pack_e5m6(x)
        return Rounded(e5m6.unpack_e5m6(*planes, scales), _spread(scales, (1, BLOCK), x) * e5m6.LARGEST)
    return by_formula(x, blocks.get(granularity, granularity), scale, format)


def by_formula(x: Tensor, block: str | tuple[int, int], scale: str, format: str,
               calibration: Tensor | None = None) -> Rounded:
    """The formula above.

    Args:
        block: "tensor", "row", "channel", or (rows, columns).
        calibration: the range is taken from this tensor instead (only per tensor, row or channel).
    """
    if isinstance(block, tuple):
        scales = _spread(_scale(_block_amax(x, block), scale, format), block, x)
    else:
        magnitude = (x if calibration is None else calibration).abs()
        amax = {"tensor": lambda: magnitude.amax().view(1, 1), "row": lambda: magnitude.amax(1, keepdim=True),
                "channel": lambda: magnitude.amax(0, keepdim=True)}[block]()
        scales = _scale(amax, scale, format)
    top = largest(format)
    return Rounded(_nearest((x / scales).clamp(-top, top), format) * scales, scales * top)


def _scale(amax: Tensor, kind: str, format: str) -> Tensor:
    """One scale for each amax."""
    smallest = e5m6.SMALLEST_SCALE if format == "e5m6" else FP8[format].smallest_scale
    scale = (amax / torch.full_like(amax, largest(format))).clamp(min=smallest)
    if kind == "pow2":
        mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2^exponent, mantissa in [1/2, 1)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    return scale


def _nearest(x: Tensor, format: str) -> Tensor:
    """x, which is within range, rounded to nearest even."""
    if format in FP8:
        return x.to(FP8[format].dtype).float()
    _, exponent = torch.frexp(x)
    step = torch.ldexp(torch.ones_like(x), (exponent - 1).clamp(min=-14) - 6)  # 6 mantissa bits; below 2^-14 subnormal
    return (x / step).round() * step


def _block_amax(x: Tensor, block: tuple[int, int]) -> Tensor:
    rows, columns = block
    padded = torch.nn.functional.pad(x.abs(), (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))
    return padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).amax((1, 3))


def _spread(scale: Tensor, block: tuple[int, int], x: Tensor) -> Tensor:
    """A scale per block -> a scale per number, [M, K]."""
    rows, columns = block
    return scale.repeat_interleave(rows, 0)[: x.shape[0]].repeat_interleave(columns, 1)[:, : x.shape[1]]
