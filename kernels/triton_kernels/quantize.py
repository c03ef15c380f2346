"""Fine-grained FP8 quantisation on a GPU: the reference's operators, byte for byte, each input read once.

A program holds one block in registers: 32 rows of a tile, 128 tokens of 64 columns, or 128x128 numbers where the scale
or two orientations need them. Warps are as many as keep it there without spills, with two blocks or more on a
multiprocessor but for both orientations (85 registers of 512 threads: one). The last tile of a row is masked; groups
are found on the device (tiles.py).

Shape letters: [..., N, K] a matrix or a stack of them, [T, K] tokens, E groups, S scale columns along the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ext.kernels.layout import BLOCK as TILE
from megatron_ext.kernels.layout import (
    FORMATS,
    block_rows,
    data_columns,
    empty_blocks,
    empty_data,
    empty_tiles,
    format_of,
    scale_columns,
    tile_count,
)
from megatron_ext.kernels.triton_kernels.arithmetic import BLOCK, NAN_DATA, fp8_bytes, magnitude
from megatron_ext.kernels.triton_kernels.launch import launch, on_device, raw, readable
from megatron_ext.kernels.triton_kernels.tiles import (
    at,
    load_block,
    store_by_rows,
    store_by_tokens,
    tokens_of_tile,
)

ROWS = 32
"""Rows a program of 1x128 tiles: 128 bytes of scales side by side, 8 KiB of BF16 in flight."""


@triton.jit
def tiles_kernel(
    x, data, scale, rows, columns, x_row, data_row, scale_row, scale_column,
    POWER_OF_TWO: tl.constexpr, E5M2: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """1x128 tiles of x [rows, columns]; programs along a row are neighbours."""
    tiles = tl.cdiv(columns, BLOCK)
    first, start = tl.program_id(0) // tiles * ROWS, tl.program_id(0) % tiles * BLOCK
    x = load_block(x, first, rows, x_row, start, columns, ROWS, BLOCK)
    store_by_rows(
        x, first, rows, start, columns, data, scale, data_row, scale_row, scale_column, POWER_OF_TWO, E5M2)  # fmt: skip


@triton.jit
def blocks_kernel(
    x, data, scale, data_t, scale_t, rows, columns, x_matrix, x_row, data_matrix, data_row, scale_matrix, scale_row,
    data_t_matrix, data_t_row, scale_t_matrix, scale_t_row,
    POWER_OF_TWO: tl.constexpr, E5M2: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """128x128 blocks of a stack of matrices [rows, columns], with BOTH their transposes too."""
    down, across = tl.cdiv(rows, BLOCK), tl.cdiv(columns, BLOCK)
    i, j = tl.program_id(0) // across % down, tl.program_id(0) % across
    matrix = (tl.program_id(0) // (down * across)).to(tl.int64)
    first, start = i * BLOCK, j * BLOCK
    x = load_block(x + matrix * x_matrix, first, rows, x_row, start, columns, BLOCK, BLOCK)
    one, index = tl.arange(0, 1), tl.arange(0, BLOCK)
    amax = tl.max(tl.max(magnitude(x), 1), 0) + one * 0
    bytes_, block_scale, bad = fp8_bytes(x, amax, 0, POWER_OF_TWO, E5M2)
    bytes_ = tl.where(bad[None, :], NAN_DATA, bytes_)
    down_there, across_there = index < rows - first, index < columns - start
    place = at(data + matrix * data_matrix, first, data_row, start) + (index[:, None] * data_row + index[None, :])
    tl.store(place, bytes_, mask=down_there[:, None] & across_there[None, :])
    tl.store(scale + (matrix * scale_matrix + i * scale_row + j) + one, block_scale)
    if BOTH:
        place = at(data_t + matrix * data_t_matrix, start, data_t_row, first)
        place += index[:, None] * data_t_row + index[None, :]
        tl.store(place, tl.trans(bytes_), mask=across_there[:, None] & down_there[None, :])
        tl.store(scale_t + (matrix * scale_t_matrix + j * scale_t_row + i) + one, block_scale)


@triton.jit
def tokens_kernel(
    x, x_scale, sizes, data, scale, data_t, scale_t, groups, tokens, columns, width, x_row, x_scale_row, x_scale_column,
    data_row, scale_row, scale_column, data_t_row, scale_t_row, scale_t_column,
    POWER_OF_TWO: tl.constexpr, E5M2: tl.constexpr, GROUPS: tl.constexpr, BOTH: tl.constexpr, SCALED: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Tiles of 128 tokens of x [tokens, columns], or of the FP8 numbers x with 1x128 scales if SCALED, transposed into
    data_t [columns, width]; with BOTH its 1x128 tiles too (then COLUMNS is 128)."""
    across = tl.cdiv(columns, COLUMNS)
    tile, start = tl.program_id(0) // across, tl.program_id(0) % across * COLUMNS
    _, first, last = tokens_of_tile(tile, sizes, groups, tokens, GROUPS)
    x = load_block(x, first, last, x_row, start, columns, BLOCK, COLUMNS)
    if SCALED:
        row = tl.arange(0, BLOCK)
        place = at(x_scale, first, x_scale_row, start // BLOCK * x_scale_column) + row * x_scale_row
        x = x * tl.load(place, mask=row < last - first, other=0.0)[:, None]
    if BOTH:
        store_by_rows(
            x, first, last, start, columns, data, scale, data_row, scale_row, scale_column,
            POWER_OF_TWO, E5M2)  # fmt: skip
    store_by_tokens(
        x, tile, last - first, start, columns, width, data_t, scale_t, data_t_row, scale_t_row, scale_t_column,
        POWER_OF_TWO, E5M2)  # fmt: skip


@triton.jit
def dequantize_kernel(
    data, scale, x, rows, columns, data_matrix, data_row, scale_matrix, scale_row, scale_column,
    BLOCK_ROWS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """data * scale of a stack of matrices [rows, columns] into contiguous x; BLOCK_ROWS rows share a scale."""
    down, tiles = tl.cdiv(rows, ROWS), tl.cdiv(columns, BLOCK)
    tile = tl.program_id(0) % tiles
    row = tl.program_id(0) // tiles % down * ROWS + tl.arange(0, ROWS)
    matrix = (tl.program_id(0) // (down * tiles)).to(tl.int64)
    column = tile * BLOCK + tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    row = row.to(tl.int64)[:, None]
    values = tl.load(data + matrix * data_matrix + row * data_row + column[None, :], mask=mask, other=0.0)
    place = scale + matrix * scale_matrix + row // BLOCK_ROWS * scale_row + tile * scale_column
    values = values.to(tl.float32) * tl.load(place, mask=row < rows, other=0.0)
    tl.store(x + (matrix * rows + row) * columns + column[None, :], values, mask=mask)


def quantize(
    x: Tensor, block: tuple[int, int] = (1, TILE), power_of_two: bool = False, format: str = "e4m3"
) -> tuple[Tensor, Tensor]:
    """See `reference.quantize.quantize`."""
    x = readable(x)
    *stack, n, k = x.shape
    data = empty_data(x.shape, FORMATS[format].dtype, x.device)
    options = dict(POWER_OF_TWO=power_of_two, E5M2=format == "e5m2")
    if block[0] == 1:
        flat = x.reshape(math.prod(x.shape[:-1]), k)
        scale = empty_tiles(len(flat), tile_count(k), x.device)
        launch(
            tiles_kernel, triton.cdiv(len(flat), ROWS) * tile_count(k),
            flat, raw(data), scale, len(flat), k, flat.stride(0), data.stride(-2), *scale.stride(),
            **options, ROWS=ROWS, num_warps=4)  # fmt: skip
        return data, scale.unflatten(0, (*stack, n)) if stack else scale
    scale = empty_blocks(stack, tile_count(n), tile_count(k), x.device)
    _launch_blocks(x, data, scale, data, scale, BOTH=False, **options)
    return data, scale


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.quantize.quantize_weight`."""
    weight = readable(weight)
    *stack, n, k = weight.shape
    device, dtype = weight.device, FORMATS["e4m3"].dtype
    data, data_t = empty_data(weight.shape, dtype, device), empty_data((*stack, k, n), dtype, device)
    scale = empty_blocks(stack, tile_count(n), tile_count(k), device)
    scale_t = empty_blocks(stack, tile_count(k), tile_count(n), device)
    _launch_blocks(weight, data, scale, data_t, scale_t, BOTH=True, POWER_OF_TWO=False, E5M2=False)
    return data, scale, data_t, scale_t


def _launch_blocks(x: Tensor, data: Tensor, scale: Tensor, data_t: Tensor, scale_t: Tensor, **options: bool) -> None:
    n, k = x.shape[-2:]
    x, *written = (_stacked(t) for t in (x, raw(data), scale, raw(data_t), scale_t))
    launch(
        blocks_kernel, len(x) * tile_count(n) * tile_count(k), x, *written, n, k,
        *(stride for t in (x, *written) for stride in t.stride()[:2]), **options, num_warps=16)  # fmt: skip


def _stacked(x: Tensor) -> Tensor:
    """[..., N, K] as [B, N, K]; a view of what layout.py lays out, for it pads rows and columns of blocks alone."""
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def dequantize(data: Tensor, scale: Tensor) -> Tensor:
    """See `reference.quantize.dequantize`."""
    n, k = data.shape[-2:]
    x = torch.empty(data.shape, dtype=torch.float32, device=data.device)
    rows = block_rows(data, scale)
    data = data if data.stride(-1) == 1 or k == 1 else data.contiguous()
    data, scale = _stacked(data), _stacked(scale)
    launch(
        dequantize_kernel, len(data) * triton.cdiv(n, ROWS) * tile_count(k),
        data, scale, x, n, k, *data.stride()[:2], *scale.stride(), BLOCK_ROWS=rows, ROWS=ROWS, num_warps=4)  # fmt: skip
    return x


def quantize_transposed(
    x: Tensor,
    power_of_two: bool = False,
    format: str = "e4m3",
    group_sizes: Sequence[int] | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.quantize.quantize_transposed`."""
    return _launch_tokens(readable(x), None, power_of_two, format, group_sizes, both=False)


def quantize_both(
    x: Tensor,
    power_of_two: bool = False,
    format: str = "e4m3",
    group_sizes: Sequence[int] | Tensor | None = None,
) -> tuple[Tensor, ...]:
    """See `reference.quantize.quantize_both`."""
    return _launch_tokens(readable(x), None, power_of_two, format, group_sizes, both=True)


def requantize_transposed(
    data: Tensor, scale: Tensor, group_sizes: Sequence[int] | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `reference.quantize.requantize_transposed`."""
    data = data if data.stride(-1) == 1 or data.shape[-1] == 1 else data.contiguous()
    return _launch_tokens(data, scale, True, format_of(data.dtype), group_sizes, both=False)


def empty_transposed(
    x: Tensor, format: str, group_sizes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Data and scale of the transpose of x [T, K] in tiles along the tokens; the kernels write all of both."""
    (tokens, columns), groups = x.shape, None if group_sizes is None else len(group_sizes)
    data = empty_data((columns, data_columns(tokens, groups)), FORMATS[format].dtype, x.device)
    return data, empty_tiles(columns, scale_columns(tokens, groups), x.device)


def padded(group_sizes: Tensor | None) -> int:
    """GROUPS of `tokens_of_tile`."""
    return 0 if group_sizes is None else triton.next_power_of_2(len(group_sizes))


def _launch_tokens(
    x: Tensor, x_scale: Tensor | None, power_of_two: bool, format: str, group_sizes: Sequence[int] | Tensor | None,
    *, both: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The operators on tiles of tokens; what a variant does not use is given as something it does."""
    tokens, columns = x.shape
    sizes = None if group_sizes is None else on_device(group_sizes, x.device)
    data_t, scale_t = data, scale = empty_transposed(x, format, sizes)
    if both:
        data = empty_data(x.shape, FORMATS[format].dtype, x.device)
        scale = empty_tiles(tokens, tile_count(columns), x.device)
    factors = scale_t if x_scale is None else x_scale
    block = TILE if both else TILE // 2
    launch(
        tokens_kernel, scale_t.shape[1] * triton.cdiv(columns, block),
        x, factors, scale_t if sizes is None else sizes, raw(data), scale, raw(data_t), scale_t,
        0 if sizes is None else len(sizes), tokens, columns, data_t.shape[1], x.stride(0), *factors.stride(),
        data.stride(0), *scale.stride(), data_t.stride(0), *scale_t.stride(),
        POWER_OF_TWO=power_of_two, E5M2=format == "e5m2", GROUPS=padded(sizes), BOTH=both, SCALED=x_scale is not None,
        COLUMNS=block, num_warps=16 if both else 8)  # fmt: skip
    return (data, scale, data_t, scale_t) if both else (data_t, scale_t)
