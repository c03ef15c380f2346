"""E5M6, 12 bits a number in a plane of bytes and a plane of half bytes, bit for bit kernels/reference/e5m6.py.

Shape letters: M rows, K their length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ext.kernels.layout import empty_tiles, tile_count
from megatron_ext.kernels.reference import e5m6 as reference
from megatron_ext.kernels.triton_kernels.arithmetic import (
    BLOCK,
    INFINITY_BITS,
    LARGEST_E5M6,
    SMALLEST_E5M6,
    divisor_of,
    magnitude,
    nan_if,
    quotient,
    scale_of,
)
from megatron_ext.kernels.triton_kernels.launch import launch, readable
from megatron_ext.kernels.triton_kernels.quantize import ROWS

SHIFT, HALF = tl.constexpr(reference.SHIFT), tl.constexpr((1 << reference.SHIFT - 1) - 1)
REBIAS, SMALLEST_NORMAL = tl.constexpr(reference.REBIAS << 23), tl.constexpr(reference.REBIAS + 1 << 23)
MAGIC, NAN_CODE = tl.constexpr(reference.MAGIC), tl.constexpr(reference.NAN_CODE)
STEP = tl.constexpr(2.0**-20)


@triton.jit
def pack_kernel(
    x, high, low, scale, rows, columns, half, x_row, high_row, low_row, scale_row, scale_column, ROWS: tl.constexpr
):
    """A tile of ROWS rows: 128 bytes and 64 pairs of half bytes a row; a row of `low` is `half` bytes."""
    tiles = tl.cdiv(columns, BLOCK)
    tile = tl.program_id(0) % tiles
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    column = tile * BLOCK + tl.arange(0, BLOCK)
    pair = tile * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    wide = row.to(tl.int64)[:, None]
    x = tl.load(x + wide * x_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
    amax = tl.max(magnitude(x), 1)
    bad = amax >= INFINITY_BITS
    tile_scale = scale_of(amax, LARGEST_E5M6, SMALLEST_E5M6, True)
    shift = divisor_of(tile_scale, True)[0][:, None]
    value = quotient(x, shift, shift, shift, True)
    bits, a = value.to(tl.int32, bitcast=True), magnitude(value)
    normal = (a + ((a >> SHIFT) & 1) + HALF - REBIAS) >> SHIFT
    # The unit in the last place of 8 is 2^-20, so adding 8 rounds to a multiple of it.
    small = a.to(tl.float32, bitcast=True) + MAGIC
    small = small.to(tl.int32, bitcast=True) - tl.full((1, 1), MAGIC, tl.float32).to(tl.int32, bitcast=True)
    code = tl.where(a < SMALLEST_NORMAL, small, normal) | (((bits >> 31) & 1) << 11)
    code = tl.where(bad[:, None], NAN_CODE, code)
    code = tl.where((column < columns)[None, :], code, 0)
    tl.store(high + wide * high_row + column[None, :], (code >> 4).to(tl.uint8), mask=mask)
    even, odd = tl.split(tl.reshape(code & 0xF, (ROWS, BLOCK // 2, 2)))
    both = (even | (odd << 4)).to(tl.uint8)
    tl.store(low + wide * low_row + pair[None, :], both, mask=(row < rows)[:, None] & (pair < half)[None, :])
    tl.store(scale + row.to(tl.int64) * scale_row + tile * scale_column, nan_if(bad, tile_scale), mask=row < rows)


@triton.jit
def unpack_kernel(
    high, low, scale, x, rows, columns, half, high_row, low_row, scale_row, scale_column, ROWS: tl.constexpr
):
    """The inverse of `pack_kernel`, into contiguous x."""
    tiles = tl.cdiv(columns, BLOCK)
    tile = tl.program_id(0) % tiles
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    column = tile * BLOCK + tl.arange(0, BLOCK)
    pair = tile * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    inside = (row < rows)[:, None]
    mask = inside & (column < columns)[None, :]
    row = row.to(tl.int64)[:, None]
    top = tl.load(high + row * high_row + column[None, :], mask=mask, other=0).to(tl.int32)
    nibbles = tl.load(low + row * low_row + pair[None, :], mask=inside & (pair < half)[None, :], other=0).to(tl.int32)
    factor = tl.load(scale + row * scale_row + tile * scale_column, mask=inside, other=0.0)
    code = (top << 4) | tl.reshape(tl.join(nibbles & 0xF, nibbles >> 4), (ROWS, BLOCK))
    a = code & 0x7FF
    # Below 64 the exponent is 0: a subnormal, a multiple of 2^-20.
    normal = ((a << SHIFT) + REBIAS).to(tl.float32, bitcast=True)
    value = tl.where(a < 64, a.to(tl.float32) * STEP, normal)
    value = (value.to(tl.int32, bitcast=True) | ((code >> 11) << 31)).to(tl.float32, bitcast=True)
    tl.store(x + row * columns + column[None, :], value * factor, mask=mask)


def pack_e5m6(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.e5m6.pack_e5m6`."""
    x = readable(x)
    rows, columns = x.shape
    high, low = (torch.empty(rows, n, dtype=torch.uint8, device=x.device) for n in (columns, triton.cdiv(columns, 2)))
    scale = empty_tiles(rows, tile_count(columns), x.device)
    launch(
        pack_kernel, triton.cdiv(rows, ROWS) * tile_count(columns), x, high, low, scale, rows, columns, low.shape[1],
        x.stride(0), high.stride(0), low.stride(0), *scale.stride(), ROWS=ROWS, num_warps=4)  # fmt: skip
    return high, low, scale


def unpack_e5m6(high: Tensor, low: Tensor, scale: Tensor) -> Tensor:
    """See `reference.e5m6.unpack_e5m6`."""
    rows, columns = high.shape
    x = torch.empty(high.shape, dtype=torch.float32, device=high.device)
    launch(
        unpack_kernel, triton.cdiv(rows, ROWS) * tile_count(columns), high, low, scale, x, rows, columns, low.shape[1],
        high.stride(0), low.stride(0), *scale.stride(), ROWS=ROWS, num_warps=4)  # fmt: skip
    return x
