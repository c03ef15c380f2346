"""Rows of tokens gathered and quantised, and combined again, bit for bit kernels/reference/rows.py.

Shape letters: T tokens, R rows after a permutation, K their length, k experts a token, B bytes of a row that travels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ext.kernels.layout import FORMATS, empty_data, empty_tiles, tile_count
from megatron_ext.kernels.triton_kernels.arithmetic import BLOCK, NAN_DATA, fp8_bytes, magnitude
from megatron_ext.kernels.triton_kernels.launch import launch, raw, readable
from megatron_ext.kernels.triton_kernels.quantize import ROWS

WORD = 8
"""Bytes that rows of dispatch begin at a multiple of (comm/wire.py)."""

COMBINED = 1024
"""Columns a program of `unpermute_combine`: 16 bytes a thread and row, all k rows in flight."""


@triton.jit
def gather_kernel(
    x, source, data, scale, rows, columns, x_row, data_words, scale_row, scale_column,
    POWER_OF_TWO: tl.constexpr, E5M2: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, WIRE: tl.constexpr,
):  # fmt: skip
    """1x128 tiles of rows source[r] of x; with WIRE the scales' exponents behind the numbers of each row.

    A row of data is data_words * UNIT bytes: a stride of whole words lets 8 bytes be stored at once where it is no
    multiple of 16, all that a plain stride would tell the compiler.
    """
    tiles = tl.cdiv(columns, BLOCK)
    tile = tl.program_id(0) % tiles
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    column = tile * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    taken = tl.load(source + row, mask=inside, other=-1)
    there = taken >= 0
    mask = (column < columns)[None, :]
    x = tl.load(x + taken[:, None] * x_row + column[None, :], mask=there[:, None] & mask, other=0.0).to(tl.float32)
    bytes_, tile_scale, bad = fp8_bytes(x, tl.max(magnitude(x), 1), 1, POWER_OF_TWO, E5M2)
    bytes_ = tl.where(bad[:, None], NAN_DATA, bytes_)
    tile_scale = tl.where(there, tile_scale, 0.0)
    row = row.to(tl.int64)
    place = data + row * (data_words * UNIT)
    tl.store(place[:, None] + column[None, :], bytes_, mask=inside[:, None] & mask)
    if WIRE:
        exponent = (tile_scale.to(tl.int32, bitcast=True) >> 23).to(tl.uint8)
        tl.store(place + (columns + tile), exponent, mask=inside)
    else:
        tl.store(scale + row * scale_row + tile * scale_column, tile_scale, mask=inside)


@triton.jit
def combine_kernel(
    y, weights, rows, out, columns, y_row, rows_row, rows_column, CHOSEN: tl.constexpr, COLUMNS: tl.constexpr
):
    """One token and COLUMNS of its columns: the sum of its rows in their order."""
    across = tl.cdiv(columns, COLUMNS)
    token = (tl.program_id(0) // across).to(tl.int64)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for j in tl.static_range(CHOSEN):
        row = tl.load(rows + token * rows_row + j * rows_column)
        weight = tl.load(weights + row, mask=row >= 0, other=0.0)
        width = tl.where(row >= 0, columns, 0)
        values = tl.load(y + row * y_row + column, mask=column < width, other=0.0).to(tl.float32)
        total = tl.where(row >= 0, total + weight * values, total)
    tl.store(out + token * columns + column, total.to(out.dtype.element_ty), mask=column < columns)


def permute_quantize(
    x: Tensor, source: Tensor, power_of_two: bool = True, format: str = "e4m3"
) -> tuple[Tensor, Tensor]:
    """See `reference.rows.permute_quantize`."""
    shape = len(source), x.shape[1]
    data = empty_data(shape, FORMATS[format].dtype, x.device)
    scale = empty_tiles(shape[0], tile_count(shape[1]), x.device)
    _launch_gather(x, source, raw(data), scale, WIRE=False, POWER_OF_TWO=power_of_two, E5M2=format == "e5m2")
    return data, scale


def quantize_rows(x: Tensor, source: Tensor, rows: Tensor) -> None:
    """See `reference.rows.quantize_rows`."""
    assert rows.stride(1) == 1 and rows.shape[1] >= x.shape[1] + tile_count(x.shape[1])
    _launch_gather(x, source, rows, rows, WIRE=True, POWER_OF_TWO=True, E5M2=False)


def _launch_gather(x: Tensor, source: Tensor, data: Tensor, scale: Tensor, **options: bool) -> None:
    x, columns = readable(x), x.shape[1]
    unit = WORD if data.stride(0) % WORD == 0 else 1
    launch(
        gather_kernel, triton.cdiv(len(source), ROWS) * tile_count(columns),
        x, source.contiguous(), data, scale, len(source), columns, x.stride(0), data.stride(0) // unit,
        *scale.stride(), **options, ROWS=ROWS, UNIT=unit, num_warps=4)  # fmt: skip


def unpermute_combine(y: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """See `reference.rows.unpermute_combine`."""
    y, (tokens, chosen), columns = readable(y), rows.shape, y.shape[1]
    out = torch.empty(tokens, columns, dtype=y.dtype, device=y.device)
    block = min(COMBINED, triton.next_power_of_2(columns))
    launch(
        combine_kernel, tokens * triton.cdiv(columns, block), y, weights.contiguous(), rows, out, columns,
        y.stride(0), *rows.stride(), CHOSEN=chosen, COLUMNS=block, num_warps=max(1, block // 256))  # fmt: skip
    return out
