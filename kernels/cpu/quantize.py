"""FP8 quantisation on a CPU through kernels/cpu/quantize.cpp: the reference's operators, byte for byte.

Signatures and shapes are those of kernels/reference/quantize.py. `portable=True` forces the loops without AVX2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from megatron_ext.kernels.cpu.library import function, in_chunks
from megatron_ext.kernels.layout import (
    BLOCK,
    FORMATS,
    block_rows,
    format_of,
    scale_columns,
    tile_count,
    token_spans,
)

_GRAIN = 1 << 20  # numbers worth a thread of their own


def _readable(x: Tensor) -> Tensor:
    """x dense, in one of the dtypes the library reads."""
    x = x.detach()
    return (x if x.dtype in (torch.float32, torch.bfloat16) else x.float()).contiguous()


def quantize(
    x: Tensor,
    block: tuple[int, int] = (1, BLOCK),
    power_of_two: bool = False,
    format: str = "e4m3",
    *,
    portable: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `reference.quantize.quantize`."""
    x = _readable(x)
    *stack, n, k = x.shape
    height, width = -(-n // block[0]), tile_count(k)
    data = torch.empty(x.shape, dtype=FORMATS[format].dtype)
    scale = torch.empty(*stack, height, width)
    if not x.numel():
        return data, scale
    kernel = function("mext_quantize", c_void_p, c_int, c_void_p, c_void_p, *[c_int64] * 5, *[c_int] * 3)
    is_bf16, is_e5m2 = x.dtype == torch.bfloat16, format == "e5m2"

    def body(first: int, last: int) -> None:
        kernel(x.data_ptr(), is_bf16, data.data_ptr(), scale.data_ptr(), first, last, n, k, block[0],
               is_e5m2, power_of_two, portable)  # fmt: skip

    in_chunks(scale.numel() // width, _GRAIN // (k * block[0]), body)
    return data, scale


def dequantize(data: Tensor, scale: Tensor, *, portable: bool = False) -> Tensor:
    """See `reference.quantize.dequantize`; [N, K] may be a slice of columns of a wider matrix."""
    if data.dim() > 2 or data.stride(-1) != 1 or scale.stride(-1) != 1:
        data, scale = data.contiguous(), scale.contiguous()
    n, k = data.shape[-2:]
    x = torch.empty(data.shape, dtype=torch.float32)
    if not data.numel():
        return x
    kernel = function("mext_dequantize", *[c_void_p] * 3, *[c_int64] * 7, *[c_int] * 2)
    rows, is_e5m2 = block_rows(data, scale), format_of(data.dtype) == "e5m2"
    strides = data.stride(-2), scale.stride(-2)

    def body(first: int, last: int) -> None:
        kernel(data.data_ptr(), scale.data_ptr(), x.data_ptr(), first, last, n, k, rows, *strides, is_e5m2, portable)

    in_chunks(data.numel() // k, _GRAIN // k, body)
    return x


def quantize_transposed(
    x: Tensor,
    power_of_two: bool = False,
    format: str = "e4m3",
    group_sizes: Sequence[int] | Tensor | None = None,
    *,
    portable: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `reference.quantize.quantize_transposed`."""
    x = _readable(x)
    kernel = function("mext_quantize_transposed", c_void_p, c_int, c_void_p, c_void_p, *[c_int64] * 6, *[c_int] * 3)
    return _by_columns(
        x, format, group_sizes,
        lambda start, y, scale, *sizes: kernel(
            x.data_ptr() + start * x.shape[1] * x.element_size(), x.dtype == torch.bfloat16, y, scale, *sizes,
            format == "e5m2", power_of_two, portable,
        ),
    )  # fmt: skip


def requantize_transposed(
    data: Tensor, scale: Tensor, group_sizes: Sequence[int] | Tensor | None = None, *, portable: bool = False
) -> tuple[Tensor, Tensor]:
    """See `reference.quantize.requantize_transposed`."""
    data, scale = data.contiguous(), scale.contiguous()
    format = format_of(data.dtype)
    kernel = function("mext_requantize_transposed", *[c_void_p] * 4, *[c_int64] * 6, *[c_int] * 2)
    return _by_columns(
        data, format, group_sizes,
        lambda start, y, y_scale, *sizes: kernel(
            data.data_ptr() + start * data.shape[1], scale.data_ptr() + start * scale.shape[1] * 4, y, y_scale, *sizes,
            format == "e5m2", portable,
        ),
    )  # fmt: skip


def _by_columns(
    x: Tensor, format: str, group_sizes: Sequence[int] | Tensor | None, kernel: Callable[..., None]
) -> tuple[Tensor, Tensor]:
    """Runs `kernel(first token, data, scale, first, last, tokens, columns, strides)` for each group of x [T, K]."""
    tokens, columns = x.shape
    spans = token_spans([tokens] if group_sizes is None else group_sizes)
    width = scale_columns(tokens, None if group_sizes is None else len(spans))
    data = torch.empty(columns, tokens, dtype=FORMATS[format].dtype)
    scale = torch.zeros(columns, width)

    def body(first: int, last: int) -> None:
        for start, stop, first_tile, _ in spans:
            if stop > start:
                kernel(start, data.data_ptr() + start, scale.data_ptr() + first_tile * 4, first, last,
                       stop - start, columns, tokens, width)  # fmt: skip

    in_chunks(tile_count(columns), _GRAIN // (BLOCK * max(tokens, 1)), body)
    return data, scale
