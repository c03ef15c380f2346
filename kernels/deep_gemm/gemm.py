"""`gemm_nt` by DeepGEMM. Signature and shapes are those of kernels/reference/gemm.py.

On Hopper it writes BF16 where B is in 128x128 blocks, and adds to FP32 where B is in 1x128 tiles; nothing else. It
reads scales of tiles as they lie on a GPU (kernels/README.md); scales of blocks it wants without padding, so K / 128
must be a multiple of 4 for them to be read in place.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from megatron_ext.kernels.layout import block_rows, tile_count

PACKAGE = "deep_gemm"


def gemm_nt(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor | None = None,
            dtype: torch.dtype = torch.float32) -> Tensor:
    """See `reference.gemm.gemm_nt`.

    Raises:
        ValueError: the arguments are not as DeepGEMM takes them (`misfit` says how).
    """
    if (wrong := misfit(a, a_scale, b, b_scale, out, dtype)) is not None:
        raise ValueError(f"deep_gemm: {wrong}")
    package = importlib.import_module(PACKAGE)
    if block_rows(b, b_scale) > 1:
        product = torch.empty(a.shape[0], b.shape[0], dtype=dtype, device=a.device)
        package.fp8_gemm_nt((a, a_scale), (b, b_scale), product)
        return product
    total = torch.zeros(a.shape[0], b.shape[0], device=a.device) if out is None else out
    package.fp8_gemm_nt((a, a_scale), (b, b_scale), total, c=total, recipe=(1, 1, 128))
    return total


def misfit(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor | None, out: Tensor | None = None,
           dtype: torch.dtype = torch.float32) -> str | None:
    """None if `gemm_nt` can take these arguments, else what is wrong with them in a few words."""
    if b_scale is None:
        return "b is not quantised"
    if a.dtype != torch.float8_e4m3fn or b.dtype != torch.float8_e4m3fn:
        return "operands must be E4M3"
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or not a.numel() or not b.numel():
        return f"shapes do not fit: {list(a.shape)} and {list(b.shape)}"
    if 768 in (a.shape[0], b.shape[0]):
        return "M or N of 768 crashes DeepGEMM (its issues 237 and 405)"
    if a.shape[1] % 16 or b.shape[0] % 8:
        return f"K must be a multiple of 16 and N of 8, not {a.shape[1]} and {b.shape[0]}"
    if any(x.stride(1) != 1 or x.stride(0) % 16 or x.data_ptr() % 16 for x in (a, b)):
        return "rows of data must begin at multiples of 16 bytes"
    if not _column_by_column(a, a_scale):
        return f"scales of tiles must lie column by column, not with strides {a_scale.stride()}"
    if block_rows(b, b_scale) > 1:
        if out is not None or dtype != torch.bfloat16:
            return "with B in blocks it writes BF16 only"
        return None if b_scale.is_contiguous() else f"scales of blocks must be contiguous, not {b_scale.stride()}"
    if dtype != torch.float32 or (out is not None and (out.dtype != torch.float32 or not out.is_contiguous())):
        return "with B in tiles it adds to contiguous FP32 only"
    if not (a.is_contiguous() and b.is_contiguous()):
        return "with B in tiles, data must be contiguous"
    return None if _column_by_column(b, b_scale) else "scales of tiles must lie column by column"


def _column_by_column(data: Tensor, scale: Tensor) -> bool:
    rows, tiles = data.shape[0], tile_count(data.shape[1])
    return scale.shape == (rows, tiles) and scale.stride() == (1, rows + -rows % 4)
