"""FP8 quantisation on a CPU through kernels/cpu/quantize.cpp: the reference's operators, byte for byte.

Signatures and shapes are those of kernels/reference/quantize.py. `lanes` forces narrower loops, for tests: 8 for AVX2,
1 for the portable ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ext.kernels.cpu.library import WIDEST, function, threads_for
from megatron_ext.kernels.cpu.memory import empty
from megatron_ext.kernels.layout import (
    BLOCK,
    FORMATS,
    block_rows,
    data_columns,
    format_of,
    require,
    require_scales,
    scale_columns,
    tile_count,
)
from megatron_ext.kernels.reference.quantize import Both

GRAIN = 1 << 17  # numbers worth a thread of their own: 15 to 60 us of work


def readable(x: Tensor) -> Tensor:
    """x dense, in one of the dtypes the library reads."""
    if x.dtype in (torch.float32, torch.bfloat16) and x.is_contiguous():
        return x
    x = x.detach()
    return (x if x.dtype in (torch.float32, torch.bfloat16) else x.float()).contiguous()


def is_bf16(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


def quantize(
    x: Tensor,
    block: tuple[int, int] = (1, BLOCK),
    power_of_two: bool = False,
    format: str = "e4m3",
    *,
    lanes: int = WIDEST,
) -> tuple[Tensor, Tensor]:
    """See `reference.quantize.quantize`."""
    x = readable(x)
    if block[0] == BLOCK:
        return _quantize_blocks(x, power_of_two, format, lanes, transposed=False)[:2]
    data, scale = empty_rows(x.shape, format)
    if x.numel():
        columns = x.shape[-1]
        rows = x.numel() // columns
        kernel = function("mext_quantize", c_void_p, c_int, c_void_p, c_void_p, *[c_int64] * 2, *[c_int] * 4)
        kernel(x.data_ptr(), is_bf16(x), data.data_ptr(), scale.data_ptr(), rows, columns, format == "e5m2",
               power_of_two, lanes, threads_for(x.numel(), GRAIN))  # fmt: skip
    return data, scale


def empty_rows(shape: Sequence[int], format: str = "e4m3") -> tuple[Tensor, Tensor]:
    """Room for data of a shape [..., K] and the scales of its 1x128 tiles."""
    return empty(shape, FORMATS[format].dtype), empty((*shape[:-1], tile_count(shape[-1])))


def quantize_weight(weight: Tensor, *, lanes: int = WIDEST) -> Both:
    """See `reference.quantize.quantize_weight`."""
    data, scale, data_t, scale_t = _quantize_blocks(readable(weight), False, "e4m3", lanes, transposed=True)
    assert data_t is not None and scale_t is not None
    return data, scale, data_t, scale_t


def _quantize_blocks(
    x: Tensor, power_of_two: bool, format: str, lanes: int, transposed: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    *stack, n, k = x.shape
    height, width, dtype = tile_count(n), tile_count(k), FORMATS[format].dtype
    data, scale = empty((*stack, n, k), dtype), empty((*stack, height, width))
    data_t = empty((*stack, k, n), dtype) if transposed else None
    scale_t = empty((*stack, width, height)) if transposed else None
    if x.numel():
        kernel = function("mext_quantize_blocks", c_void_p, c_int, *[c_void_p] * 4, *[c_int64] * 3, *[c_int] * 4)
        pointers = [t if t is None else t.data_ptr() for t in (data, scale, data_t, scale_t)]
        kernel(x.data_ptr(), is_bf16(x), *pointers, scale.numel() // width, n, k, format == "e5m2", power_of_two, lanes,
               threads_for(x.numel(), GRAIN))  # fmt: skip
    return data, scale, data_t, scale_t


def dequantize(data: Tensor, scale: Tensor, *, lanes: int = WIDEST) -> Tensor:
    """See `reference.quantize.dequantize`; [N, K] may be a slice of columns of a wider matrix."""
    require_scales(data, scale)
    if data.dim() > 2 or data.stride(-1) != 1 or scale.stride(-1) != 1:
        data, scale = data.contiguous(), scale.contiguous()
    n, k = data.shape[-2:]
    x = empty(data.shape)
    if not data.numel():
        return x
    kernel = function("mext_dequantize", *[c_void_p] * 3, *[c_int64] * 6, *[c_int] * 3)
    rows, is_e5m2 = block_rows(data, scale), format_of(data.dtype) == "e5m2"
    strides = data.stride(-2), scale.stride(-2)
    kernel(data.data_ptr(), scale.data_ptr(), x.data_ptr(), data.numel() // k, n, k, rows, *strides, is_e5m2, lanes,
           threads_for(data.numel(), GRAIN))  # fmt: skip
    return x


def quantize_transposed(
    x: Tensor,
    power_of_two: bool = False,
    format: str = "e4m3",
    group_sizes: Sequence[int] | Tensor | None = None,
    *,
    lanes: int = WIDEST,
) -> tuple[Tensor, Tensor]:
    """See `reference.quantize.quantize_transposed`."""
    return _quantize_columns(readable(x), (None, None), power_of_two, format, group_sizes, lanes)


def quantize_both(
    x: Tensor,
    power_of_two: bool = False,
    format: str = "e4m3",
    group_sizes: Sequence[int] | Tensor | None = None,
    *,
    lanes: int = WIDEST,
) -> Both:
    """See `reference.quantize.quantize_both`."""
    x = readable(x)
    rows = empty_rows(x.shape, format)
    return *rows, *_quantize_columns(x, rows, power_of_two, format, group_sizes, lanes)


def _quantize_columns(
    x: Tensor,
    rows: tuple[Tensor | None, Tensor | None],
    power_of_two: bool,
    format: str,
    group_sizes: Sequence[int] | Tensor | None,
    lanes: int,
) -> tuple[Tensor, Tensor]:
    kernel = function("mext_quantize_columns", c_void_p, c_int, *[c_void_p] * 4, *[c_int64] * 2, c_void_p,
                      *[c_int64] * 3, *[c_int] * 4)  # fmt: skip
    columns = Columns.room(x.shape, format, group_sizes)
    pointers = [t if t is None else t.data_ptr() for t in (*rows, columns.data, columns.scale)]
    kernel(x.data_ptr(), is_bf16(x), *pointers, *columns.sizes, format == "e5m2", power_of_two, lanes,
           threads_for(x.numel(), GRAIN))  # fmt: skip
    return columns.data, columns.scale


def requantize_transposed(
    data: Tensor, scale: Tensor, group_sizes: Sequence[int] | Tensor | None = None, *, lanes: int = WIDEST
) -> tuple[Tensor, Tensor]:
    """See `reference.quantize.requantize_transposed`."""
    require_scales(data, scale)
    require(len(scale) == len(data), f"scale {list(scale.shape)} is not of 1x128 tiles of {list(data.shape)}")
    data, scale, format = data.contiguous(), scale.contiguous(), format_of(data.dtype)
    kernel = function("mext_requantize_columns", *[c_void_p] * 4, *[c_int64] * 2, c_void_p, *[c_int64] * 3,
                      *[c_int] * 3)  # fmt: skip
    columns = Columns.room(data.shape, format, group_sizes)
    pointers = [t.data_ptr() for t in (data, scale, columns.data, columns.scale)]
    kernel(*pointers, *columns.sizes, format == "e5m2", lanes, threads_for(data.numel(), GRAIN))
    return columns.data, columns.scale


class Columns(NamedTuple):
    """Room for a transpose in tiles along the tokens, and how the library is told where it lies.

    Attributes:
        data: [K, T], or [K, 128 S] for groups.
        scale: [K, S].
        tokens, columns: T and K.
        group_sizes: [E] int64, or None.
    """

    data: Tensor
    scale: Tensor
    tokens: int
    columns: int
    group_sizes: Tensor | None

    @staticmethod
    def room(shape: Sequence[int], format: str, group_sizes: Sequence[int] | Tensor | None) -> Columns:
        """For x [T, K]."""
        (tokens, columns), sizes = shape, None
        if group_sizes is not None:
            sizes = torch.as_tensor(group_sizes, dtype=torch.int64).contiguous()
            # The kernel trusts these: tokens of a group too many would be read behind the end.
            require(int(sizes.sum()) == tokens and bool((sizes >= 0).all()),
                    f"group sizes {sizes.tolist()} must sum to the {tokens} tokens")
        groups = None if sizes is None else len(sizes)
        data = empty((columns, data_columns(tokens, groups)), FORMATS[format].dtype)
        return Columns(data, empty((columns, scale_columns(tokens, groups))), tokens, columns, sizes)

    @property
    def sizes(self) -> tuple[int | None, ...]:
        """tokens, columns, group sizes, groups and the two strides, as arguments of a kernel."""
        there = self.group_sizes is not None
        groups = (self.group_sizes.data_ptr(), len(self.group_sizes)) if there else (None, 1)
        return self.tokens, self.columns, *groups, self.data.shape[1], self.scale.shape[1]
