"""E5M6 on a CPU through kernels/cpu/e5m6.cpp: the reference's operators, bit for bit.

Signatures and shapes are those of kernels/reference/e5m6.py. `lanes` forces narrower loops, for tests: 8 for AVX2, 1
for the portable ones.
"""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from megatron_ext.kernels.cpu.library import WIDEST, function, threads_for
from megatron_ext.kernels.cpu.memory import empty
from megatron_ext.kernels.cpu.quantize import GRAIN, is_bf16, readable
from megatron_ext.kernels.layout import require, tile_count


def pack_e5m6(x: Tensor, *, lanes: int = WIDEST) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.e5m6.pack_e5m6`."""
    x, (rows, columns) = readable(x), x.shape
    high, low = (empty((rows, width), torch.uint8) for width in (columns, (columns + 1) // 2))
    scale = empty((rows, tile_count(columns)))
    kernel = function("mext_pack_e5m6", c_void_p, c_int, *[c_void_p] * 3, *[c_int64] * 2, *[c_int] * 2)
    kernel(x.data_ptr(), is_bf16(x), high.data_ptr(), low.data_ptr(), scale.data_ptr(), rows, columns, lanes,
           threads_for(x.numel(), GRAIN))  # fmt: skip
    return high, low, scale


def unpack_e5m6(high: Tensor, low: Tensor, scale: Tensor, *, lanes: int = WIDEST) -> Tensor:
    """See `reference.e5m6.unpack_e5m6`."""
    high, low, scale = (t.contiguous() for t in (high, low, scale))
    rows, columns = high.shape
    shapes = [list(t.shape) for t in (low, scale)]
    require(shapes == [[rows, (columns + 1) // 2], [rows, tile_count(columns)]] and scale.dtype == torch.float32
            and high.dtype == low.dtype == torch.uint8, f"low and scale {shapes} are not of {[rows, columns]} numbers")
    x = empty((rows, columns))
    kernel = function("mext_unpack_e5m6", *[c_void_p] * 4, *[c_int64] * 2, *[c_int] * 2)
    kernel(*(t.data_ptr() for t in (high, low, scale, x)), rows, columns, lanes, threads_for(x.numel(), GRAIN))
    return x
