"""Block-scaled FP8 matrix products in Triton: the fallback wherever no faster backend is.

`tl.dot` of 128 numbers of K starts from zero, so the tensor core's own sum, which keeps some 14 bits, ends there; it is
scaled and added to FP32 registers, which is promotion every 128 of K (DeepSeek-V3, section 3.3.2). For the same reason
`max_num_imprecise_acc` needs no value: no dot is longer than what it could ask for.

Tiles come through TMA where the device has it and rows begin at multiples of 16 bytes, else through pointers. TMA reads
zeros beyond the end of a matrix; pointers stay inside by reading the last row again (what it gives is not stored) and
mask the last tile of K. 128x128 with 8 warps is the largest tile that compiles without spills (with 4 warps, or
128x256, registers spill).

Shape letters: M rows (T tokens in groups), K contracted, N outputs, E groups, S scale columns of tokens in groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_ext.kernels.layout import BLOCK as TILE
from megatron_ext.kernels.layout import block_rows, empty_blocks, empty_data, tile_count
from megatron_ext.kernels.triton_kernels.arithmetic import BLOCK
from megatron_ext.kernels.triton_kernels.launch import launch, on_device, raw
from megatron_ext.kernels.triton_kernels.quantize import padded
from megatron_ext.kernels.triton_kernels.tiles import tokens_of_tile

Operand = tuple[Tensor, Tensor]

GROUP_M = tl.constexpr(8)
"""Tiles of M that run next to each other, so that they find the same tiles of N in the L2 cache."""


@triton.jit
def load_tile(x, row, k, rows, columns, x_row, ROWS: tl.constexpr, TMA: tl.constexpr, WHOLE: tl.constexpr):
    """Rows row.. and columns k.. of x [rows, columns], [ROWS, 128]; WHOLE says that columns is a multiple of 128."""
    if TMA:
        return x.load([row, k])
    else:
        r = tl.minimum(row + tl.arange(0, ROWS), rows - 1).to(tl.int64)
        c = k + tl.arange(0, BLOCK)
        place = x + r[:, None] * x_row + c[None, :]
        if WHOLE:
            return tl.load(place)
        else:
            return tl.load(place, mask=(c < columns)[None, :], other=0.0)


@triton.jit
def gemm_kernel(
    a, a_scale, b, b_scale, out, sizes, groups, rows, n, k, b_rows, a_row, b_row, a_scale_row, a_scale_column,
    b_scale_group, b_scale_row, b_scale_column, out_row, out_column,
    BLOCK_M: tl.constexpr, BLOCKED: tl.constexpr, ADD: tl.constexpr, GROUPS: tl.constexpr,
    TMA: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """out = a b^T, a [rows, k]; in GROUPS the rows of group e times rows e * n .. of b.

    BLOCKED: b has 128x128 blocks, so that a tile has one scale of b; else 1x128 tiles. ADD: to what out holds.
    """
    across = tl.cdiv(n, BLOCK)
    down = tl.num_programs(0) // across
    band = tl.program_id(0) // (GROUP_M * across)
    height = tl.minimum(down - band * GROUP_M, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * across)
    i, j = band * GROUP_M + within % height, within // height
    if GROUPS > 0:
        group, first, last = tokens_of_tile(i, sizes, groups, rows, GROUPS)
    else:
        group, first, last = 0, i * BLOCK_M, rows
    if first >= last:
        return
    row, column = first + tl.arange(0, BLOCK_M), j * BLOCK + tl.arange(0, BLOCK)
    b_first = group * n + j * BLOCK
    a_place = a_scale + tl.minimum(row, rows - 1).to(tl.int64) * a_scale_row
    if BLOCKED:
        b_place = b_scale + group * b_scale_group + j * b_scale_row
    else:
        b_place = b_scale + tl.minimum(column, n - 1).to(tl.int64) * b_scale_row
    total = tl.zeros((BLOCK_M, BLOCK), tl.float32)
    for tile in range(tl.cdiv(k, BLOCK)):
        a_tile = load_tile(a, first, tile * BLOCK, rows, k, a_row, BLOCK_M, TMA, WHOLE)
        b_tile = load_tile(b, b_first, tile * BLOCK, b_rows, k, b_row, BLOCK, TMA, WHOLE)
        partial = tl.dot(a_tile, tl.trans(b_tile))
        a_factor = tl.load(a_place + tile * a_scale_column)
        b_factor = tl.load(b_place + tile * b_scale_column)
        if BLOCKED:
            total += partial * (a_factor * b_factor)[:, None]
        else:
            total += partial * (a_factor[:, None] * b_factor[None, :])
    place = out + row.to(tl.int64)[:, None] * out_row + column.to(tl.int64)[None, :] * out_column
    mask = (row < last)[:, None] & (column < n)[None, :]
    if ADD:
        total += tl.load(place, mask=mask, other=0.0)
    tl.store(place, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def wgrad_kernel(
    dy, dy_scale, x, x_scale, sizes, out, groups, n, k, width, dy_row, x_row, dy_scale_row, dy_scale_column,
    x_scale_row, x_scale_column, out_group, out_row, out_column, GROUPS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """out[e] += dy x^T over the tiles of tokens of group e, which no other group's tokens share."""
    down, across = tl.cdiv(n, BLOCK), tl.cdiv(k, BLOCK)
    group = tl.program_id(0) // (down * across)
    i, j = tl.program_id(0) // across % down, tl.program_id(0) % across
    e = tl.arange(0, GROUPS)
    size = tl.load(sizes + e, mask=e < groups, other=0).to(tl.int32)
    start = tl.sum(tl.where(e < group, size, 0), 0) // BLOCK + group
    count = tl.cdiv(tl.sum(tl.where(e == group, size, 0), 0), BLOCK)
    if count == 0:
        return
    row, column = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    dy_place = dy_scale + tl.minimum(row, n - 1).to(tl.int64) * dy_scale_row
    x_place = x_scale + tl.minimum(column, k - 1).to(tl.int64) * x_scale_row
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for tile in range(start, start + count):
        dy_tile = load_tile(dy, i * BLOCK, tile * BLOCK, n, width, dy_row, BLOCK, TMA, True)
        x_tile = load_tile(x, j * BLOCK, tile * BLOCK, k, width, x_row, BLOCK, TMA, True)
        partial = tl.dot(dy_tile, tl.trans(x_tile))
        dy_factor = tl.load(dy_place + tile * dy_scale_column)
        x_factor = tl.load(x_place + tile * x_scale_column)
        total += partial * (dy_factor[:, None] * x_factor[None, :])
    place = out + group.to(tl.int64) * out_group + row.to(tl.int64)[:, None] * out_row
    place += column.to(tl.int64)[None, :] * out_column
    mask = (row < n)[:, None] & (column < k)[None, :]
    tl.store(place, total + tl.load(place, mask=mask, other=0.0), mask=mask)


def weight_operands(data: Tensor, scale: Tensor) -> tuple[Operand, Operand]:
    """See `reference.gemm.weight_operands`; both operands row-major, as `quantize_weight` gives them at once."""
    *stack, n, k = data.shape
    data_t = empty_data((*stack, k, n), data.dtype, data.device)
    raw(data_t).copy_(raw(data).mT)
    scale_t = empty_blocks(stack, tile_count(k), tile_count(n), data.device).copy_(scale.mT)
    return (data, scale), (data_t, scale_t)


def gemm_nt(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See `reference.gemm.gemm_nt`."""
    add = out is not None
    if out is None:
        out = torch.empty(a.shape[0], b.shape[0], dtype=dtype, device=a.device)
    _launch_gemm(a, a_scale, b[None], b_scale[None], out, None, add)
    return out


def grouped_gemm_nt(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    group_sizes: Sequence[int] | Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See `reference.gemm.grouped_gemm_nt`."""
    out = torch.empty(a.shape[0], b.shape[1], dtype=dtype, device=a.device)
    _launch_gemm(a, a_scale, b, b_scale, out, on_device(group_sizes, a.device), False)
    return out


def grouped_wgrad(
    dy: Tensor,
    dy_scale: Tensor,
    x: Tensor,
    x_scale: Tensor,
    group_sizes: Sequence[int] | Tensor,
    out: Tensor,
) -> None:
    """See `reference.gemm.grouped_wgrad`."""
    sizes = on_device(group_sizes, dy.device)
    (n, width), k = dy.shape, x.shape[0]
    dy, x = _rows(dy), _rows(x)
    tma = _tma(dy, x)
    launch(
        wgrad_kernel, len(sizes) * tile_count(n) * tile_count(k),
        _operand(dy, TILE, tma), dy_scale, _operand(x, TILE, tma), x_scale, sizes, out, len(sizes), n, k, width,
        dy.stride(0), x.stride(0), *dy_scale.stride(), *x_scale.stride(), *out.stride(),
        GROUPS=padded(sizes), TMA=tma, num_warps=8, num_stages=_stages(dy), fusion=True)  # fmt: skip


def _launch_gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor, sizes: Tensor | None, add: bool
) -> None:
    """b is a stack [E, N, K]; E is 1 without groups."""
    (rows, k), (_, n, _) = a.shape, b.shape
    if not a.numel() or not b.numel():  # nothing to add, or nothing to write; TMA has no empty matrices
        if not add:
            out.zero_()
        return
    blocked = block_rows(b, b_scale) == TILE or n == 1
    a, b = _rows(a), _rows(b.flatten(0, 1))
    block_m = TILE if sizes is not None or rows > 64 else 64
    tiles = triton.cdiv(rows, block_m) if sizes is None else rows // TILE + len(sizes)
    tma = _tma(a, b)
    launch(
        gemm_kernel, tiles * tile_count(n),
        _operand(a, block_m, tma), a_scale, _operand(b, TILE, tma), b_scale, out, a_scale if sizes is None else sizes,
        0 if sizes is None else len(sizes), rows, n, k, b.shape[0], a.stride(0), b.stride(0),
        *a_scale.stride(), *b_scale.stride(), *out.stride(), BLOCK_M=block_m, BLOCKED=blocked, ADD=add,
        GROUPS=padded(sizes), TMA=tma, WHOLE=k % TILE == 0, num_warps=block_m // 16, num_stages=_stages(a),
        fusion=True)  # fmt: skip


def _rows(data: Tensor) -> Tensor:
    """A matrix whose rows lie whole."""
    return data if data.stride(1) == 1 or data.shape[1] == 1 else data.contiguous()


def _tma(*matrices: Tensor) -> bool:
    """Whether TMA can read them: Hopper or newer, everything at multiples of 16 bytes."""
    aligned = all(m.data_ptr() % 16 == 0 and m.stride(0) % 16 == 0 and m.stride(1) == 1 for m in matrices)
    return aligned and _hopper(matrices[0])


def _hopper(data: Tensor) -> bool:
    return data.device.type != "cuda" or torch.cuda.get_device_capability(data.device) >= (9, 0)


def _operand(data: Tensor, rows: int, tma: bool) -> Tensor | TensorDescriptor:
    return TensorDescriptor(data, list(data.shape), list(data.stride()), [rows, TILE]) if tma else data


def _stages(data: Tensor) -> int:
    """Tiles in flight: 32 KiB of shared memory each, of 227 KiB on Hopper and 99 KiB on Ada."""
    return 4 if _hopper(data) else 2
