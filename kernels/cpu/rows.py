"""Rows gathered, quantised and combined on a CPU through kernels/cpu/rows.cpp: the reference's operators, bit for bit.

Signatures and shapes are those of kernels/reference/rows.py. `lanes` forces narrower loops, for tests: 8 for AVX2,
1 for the portable ones.
"""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from megatron_ext.kernels.cpu.library import WIDEST, function, threads_for
from megatron_ext.kernels.cpu.memory import empty
from megatron_ext.kernels.cpu.quantize import GRAIN, empty_rows, is_bf16, readable
from megatron_ext.kernels.layout import require, tile_count
from megatron_ext.kernels.reference import rows as reference


def permute_quantize(
    x: Tensor, source: Tensor, power_of_two: bool = True, format: str = "e4m3", *, lanes: int = WIDEST
) -> tuple[Tensor, Tensor]:
    """See `reference.rows.permute_quantize`."""
    x, source, columns = readable(x), _rows_of(source, len(x)), x.shape[1]
    data, scale = empty_rows((len(source), columns), format)
    kernel = function("mext_permute_quantize", c_void_p, c_int, *[c_void_p] * 3, *[c_int64] * 2, *[c_int] * 4)
    kernel(x.data_ptr(), is_bf16(x), source.data_ptr(), data.data_ptr(), scale.data_ptr(), len(source), columns,
           format == "e5m2", power_of_two, lanes, threads_for(data.numel(), GRAIN))  # fmt: skip
    return data, scale


def quantize_rows(x: Tensor, source: Tensor, rows: Tensor, *, lanes: int = WIDEST) -> None:
    """See `reference.rows.quantize_rows`."""
    x, source, columns = readable(x), _rows_of(source, len(x)), x.shape[1]
    tiles = tile_count(columns)
    require(rows.dtype == torch.uint8 and rows.stride(1) == 1 and rows.shape[0] == len(source)
            and rows.shape[1] >= columns + tiles,
            f"rows {rows.dtype} {list(rows.shape)} must be uint8 with {len(source)} rows of {columns + tiles} or more")
    kernel = function("mext_quantize_rows", c_void_p, c_int, *[c_void_p] * 2, *[c_int64] * 3, *[c_int] * 2)
    kernel(x.data_ptr(), is_bf16(x), source.data_ptr(), rows.data_ptr(), len(source), columns, rows.stride(0), lanes,
           threads_for(len(source) * columns, GRAIN))  # fmt: skip


def unpermute_combine(y: Tensor, weights: Tensor, rows: Tensor, *, lanes: int = WIDEST) -> Tensor:
    """See `reference.rows.unpermute_combine`; FP16 and FP64 are left to it."""
    if y.dtype not in (torch.float32, torch.bfloat16):
        return reference.unpermute_combine(y, weights, rows)
    y, weights, rows = readable(y), weights.detach().float().contiguous(), _rows_of(rows, len(y))
    (tokens, k), columns = rows.shape, y.shape[1]
    require(weights.shape == y.shape[:1], f"weights {list(weights.shape)} must be {list(y.shape[:1])}")
    out = empty((tokens, columns), y.dtype)
    kernel = function("mext_unpermute_combine", c_void_p, c_int, *[c_void_p] * 3, *[c_int64] * 3, *[c_int] * 2)
    kernel(y.data_ptr(), is_bf16(y), weights.data_ptr(), rows.data_ptr(), out.data_ptr(), tokens, columns, k, lanes,
           threads_for(out.numel() * k, GRAIN))  # fmt: skip
    return out


def _rows_of(index: Tensor, count: int) -> Tensor:
    """Dense int64 numbers of rows; the library trusts them, and would read behind the end."""
    index = index.to(torch.int64).contiguous()
    assert not index.numel() or int(index.max()) < count, "a row that is not there"
    return index
