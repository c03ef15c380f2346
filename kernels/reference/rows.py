"""Rows of tokens gathered, quantised and combined: the specification (DeepSeek-V3, section 3.3.2, low-precision
communication).

Shape letters: T tokens, R rows after a permutation (a token has as many as experts), K their length, k experts a token,
B bytes of a row that travels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext.kernels.layout import BLOCK, FORMATS, empty_data, empty_tiles, tile_count
from megatron_ext.kernels.reference.quantize import quantize


def permute_quantize(
    x: Tensor, source: Tensor, power_of_two: bool = True, format: str = "e4m3"
) -> tuple[Tensor, Tensor]:
    """Rows of x in another order, quantised.

    Args:
        x: [T, K], any floating dtype.
        source: [R] int64, the row of x that row r is; negative for padding: zero bytes and scales 0.
        power_of_two, format: as in `quantize`.

    Returns:
        data [R, K] and scale [R, ceil(K / 128)].
    """
    rows, columns = len(source), x.shape[1]
    data = empty_data((rows, columns), torch.uint8, x.device).zero_()
    scale = empty_tiles(rows, tile_count(columns), x.device).zero_()
    there = source >= 0
    part, part_scale = quantize(x[source[there]], (1, BLOCK), power_of_two, format)
    data[there], scale[there] = part.view(torch.uint8), part_scale
    return data.view(FORMATS[format].dtype), scale


def quantize_rows(x: Tensor, source: Tensor, rows: Tensor) -> None:
    """Writes rows of expert dispatch: E4M3 numbers, then one exponent a tile (comm/wire.py).

    Args:
        x: [T, K], any floating dtype.
        source: [R] int64, as in `permute_quantize`; padding is written as zero bytes.
        rows: [R, B] uint8 with any stride between rows, B >= K + ceil(K / 128). Byte K + i becomes the exponent field
            of the scale of tile i (255 for NaN); bytes behind those stay as they are.
    """
    data, scale = permute_quantize(x, source)
    columns = x.shape[1]
    rows[:, :columns] = data.view(torch.uint8)
    rows[:, columns : columns + scale.shape[1]] = (scale.contiguous().view(torch.int32) >> 23).to(torch.uint8)


def unpermute_combine(y: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """Every token's weighted sum of its rows, in the order in which they are listed.

    Args:
        y: [R, K], FP32, BF16 or FP16.
        weights: [R] FP32.
        rows: [T, k] int64, rows of y; negative ones are skipped.

    Returns:
        [T, K] in the dtype of y. In FP32 from +0: each product is rounded, then added; the sum is rounded at the end.
    """
    total = torch.zeros(len(rows), y.shape[1], dtype=torch.float32, device=y.device)
    for row in rows.unbind(1):
        there = row >= 0
        total[there] = total[there] + weights[row[there], None] * y[row[there]].float()
    return total.to(y.dtype)
