"""SwiGLU and RMSNorm fused with the quantisation of their results, bit for bit kernels/reference/activation.py.

Shape letters: T tokens, I intermediate size, M rows, K their length; S as in kernels/layout.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ext.kernels.layout import BLOCK as TILE
from megatron_ext.kernels.layout import FORMATS, empty_data, empty_tiles, tile_count
from megatron_ext.kernels.triton_kernels.arithmetic import BLOCK, NAN_DATA, fp8_bytes, magnitude, sigmoid
from megatron_ext.kernels.triton_kernels.launch import launch, on_device, raw, readable
from megatron_ext.kernels.triton_kernels.quantize import ROWS, empty_transposed, padded
from megatron_ext.kernels.triton_kernels.tiles import (
    load_block,
    store_by_rows,
    store_by_tokens,
    tokens_of_tile,
)


@triton.jit
def swiglu_kernel(
    gate, up, data, scale, rows, columns, gate_row, up_row, data_row, scale_row, scale_column,
    POWER_OF_TWO: tl.constexpr, E5M2: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """1x128 tiles of (gate * sigmoid(gate)) * up."""
    tiles = tl.cdiv(columns, BLOCK)
    first, start = tl.program_id(0) // tiles * ROWS, tl.program_id(0) % tiles * BLOCK
    g = load_block(gate, first, rows, gate_row, start, columns, ROWS, BLOCK)
    u = load_block(up, first, rows, up_row, start, columns, ROWS, BLOCK)
    h = ((g * sigmoid(g)) * u).to(gate.dtype.element_ty).to(tl.float32)
    store_by_rows(
        h, first, rows, start, columns, data, scale, data_row, scale_row, scale_column, POWER_OF_TWO, E5M2)  # fmt: skip


@triton.jit
def swiglu_backward_kernel(
    dh, gate, up, sizes, dgate, dgate_scale, dgate_t, dgate_t_scale, dup, dup_scale, dup_t, dup_t_scale,
    groups, tokens, columns, width, dh_row, gate_row, up_row,
    data_row, scale_row, scale_column, data_t_row, scale_t_row, scale_t_column,
    POWER_OF_TWO: tl.constexpr, E5M2: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """128x128 numbers of one gradient in both orientations; dgate and dup have the same strides.

    The two programs of a block are neighbours, so what the second reads is in the L2 cache: numbers that lead to both
    gradients, and both orientations of one, do not fit the registers of a program at once.
    """
    across = tl.cdiv(columns, BLOCK)
    block, of_gate = tl.program_id(0) // 2, tl.program_id(0) % 2 == 0
    tile, start = block // across, block % across * BLOCK
    _, first, last = tokens_of_tile(tile, sizes, groups, tokens, GROUPS)
    d = load_block(dh, first, last, dh_row, start, columns, BLOCK, BLOCK)
    g = load_block(gate, first, last, gate_row, start, columns, BLOCK, BLOCK)
    s = sigmoid(g)
    if of_gate:
        u = load_block(up, first, last, up_row, start, columns, BLOCK, BLOCK)
        y = (d * u) * (s * (1.0 + g * (1.0 - s)))
        data, scale, data_t, scale_t = dgate, dgate_scale, dgate_t, dgate_t_scale
    else:
        y = d * (g * s)
        data, scale, data_t, scale_t = dup, dup_scale, dup_t, dup_t_scale
    y = y.to(dh.dtype.element_ty).to(tl.float32)
    store_by_rows(
        y, first, last, start, columns, data, scale, data_row, scale_row, scale_column, POWER_OF_TWO, E5M2)  # fmt: skip
    store_by_tokens(
        y, tile, last - first, start, columns, width, data_t, scale_t, data_t_row, scale_t_row, scale_t_column,
        POWER_OF_TWO, E5M2)  # fmt: skip


@triton.jit
def rms_norm_kernel(
    x, weight, data, scale, rstd, columns, eps, x_row, data_row, scale_row, scale_column,
    POWER_OF_TWO: tl.constexpr, E5M2: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One row a program, in registers from the mean to the bytes: TILES x 128 numbers, TILES a power of two."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    column = tile[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = column < columns
    dtype = x.dtype.element_ty
    x = tl.load(x + row * x_row + column, mask=mask, other=0.0)
    wide = x.to(tl.float64)
    mean = (tl.sum(tl.sum(wide * wide, 1), 0) / columns.to(tl.float64)).to(tl.float32)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    tl.store(rstd + row, inverse)
    normed = (x.to(tl.float32) * inverse).to(dtype).to(tl.float32)
    y = (tl.load(weight + column, mask=mask, other=0.0).to(tl.float32) * normed).to(dtype).to(tl.float32)
    y = tl.where(mask, y, 0.0)  # a row whose rstd is NaN must not spoil what is beyond it
    bytes_, tile_scale, bad = fp8_bytes(y, tl.max(magnitude(y), 1), 1, POWER_OF_TWO, E5M2)
    bytes_ = tl.where(bad[:, None], NAN_DATA, bytes_)
    tl.store(data + row * data_row + column, bytes_, mask=mask)
    tl.store(scale + row * scale_row + tile * scale_column, tile_scale, mask=tile * BLOCK < columns)


def swiglu_quantize(gate: Tensor, up: Tensor, power_of_two: bool = True, format: str = "e4m3") -> tuple[Tensor, Tensor]:
    """See `reference.activation.swiglu_quantize`."""
    gate, up = readable(gate), readable(up)
    rows, columns = gate.shape
    data = empty_data(gate.shape, FORMATS[format].dtype, gate.device)
    scale = empty_tiles(rows, tile_count(columns), gate.device)
    launch(
        swiglu_kernel, triton.cdiv(rows, ROWS) * tile_count(columns),
        gate, up, raw(data), scale, rows, columns, gate.stride(0), up.stride(0), data.stride(0), *scale.stride(),
        POWER_OF_TWO=power_of_two, E5M2=format == "e5m2", ROWS=ROWS, num_warps=8)  # fmt: skip
    return data, scale


def swiglu_backward_quantize(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    power_of_two: bool = False,
    format: str = "e4m3",
    group_sizes: Sequence[int] | Tensor | None = None,
) -> tuple[Tensor, ...]:
    """See `reference.activation.swiglu_backward_quantize`."""
    dh, gate, up = readable(dh), readable(gate), readable(up)
    tokens, columns = dh.shape
    sizes = None if group_sizes is None else on_device(group_sizes, dh.device)
    gradients = [
        (empty_data(dh.shape, FORMATS[format].dtype, dh.device), empty_tiles(tokens, tile_count(columns), dh.device),
         *empty_transposed(dh, format, sizes))
        for _ in ("gate", "up")
    ]  # fmt: skip
    data, scale, data_t, scale_t = gradients[0]
    launch(
        swiglu_backward_kernel, 2 * scale_t.shape[1] * tile_count(columns),
        dh, gate, up, scale_t if sizes is None else sizes,
        *(raw(t) if t.dtype == data.dtype else t for gradient in gradients for t in gradient),
        0 if sizes is None else len(sizes), tokens, columns, data_t.shape[1],
        dh.stride(0), gate.stride(0), up.stride(0),
        data.stride(0), *scale.stride(), data_t.stride(0), *scale_t.stride(),
        POWER_OF_TWO=power_of_two, E5M2=format == "e5m2", GROUPS=padded(sizes), num_warps=16)  # fmt: skip
    return (*gradients[0], *gradients[1])


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, power_of_two: bool = True, format: str = "e4m3"
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.activation.rms_norm_quantize`."""
    x, weight = readable(x), readable(weight)
    rows, columns = x.shape
    data = empty_data(x.shape, FORMATS[format].dtype, x.device)
    scale = empty_tiles(rows, tile_count(columns), x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    tiles = triton.next_power_of_2(tile_count(columns))
    launch(
        rms_norm_kernel, rows, x, weight, raw(data), scale, rstd, columns, float(eps),
        x.stride(0), data.stride(0), *scale.stride(), POWER_OF_TWO=power_of_two, E5M2=format == "e5m2",
        TILES=tiles, num_warps=min(32, max(1, tiles * TILE // 1024)))  # fmt: skip
    return data, scale, rstd
