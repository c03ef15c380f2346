"""`gemm_nt` by torch.nn.functional.scaled_mm. Signature and shapes are those of kernels/reference/gemm.py.

Scales go as they lie on a GPU (kernels/README.md), without a copy: tiles [M, K/128] with rows as neighbours are what
torch asks for where M % 4 == 0 (it knows no padding there), blocks are handed over with their padding and transposed,
[round_up(K/128, 4), N/128]. Blocks must be whole: torch 2.13's checks on a device allow a partial last one, those on
its `meta` device do not. A sum is rounded to FP32 once, and added to `out` by a kernel of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext.kernels.layout import block_rows, tile_count

_DTYPES = (torch.float32, torch.bfloat16)


def gemm_nt(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor | None = None,
            dtype: torch.dtype = torch.float32) -> Tensor:
    """See `reference.gemm.gemm_nt`.

    Raises:
        ValueError: the arguments are not as cuBLAS reads them (`misfit` says how).
    """
    if (wrong := misfit(a, a_scale, b, b_scale, out, dtype)) is not None:
        raise ValueError(f"torch scaled_mm: {wrong}")
    tiles, blocks = torch.nn.functional.ScalingType.BlockWise1x128, torch.nn.functional.ScalingType.BlockWise128x128
    in_tiles = block_rows(b, b_scale) == 1
    product = torch.nn.functional.scaled_mm(
        a, b.t(), a_scale, tiles, b_scale if in_tiles else _with_padding(b_scale).t(), tiles if in_tiles else blocks,
        output_dtype=torch.float32 if out is not None else dtype,
    )  # fmt: skip
    return product if out is None else out.add_(product)


def misfit(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor | None, out: Tensor | None = None,
           dtype: torch.dtype = torch.float32) -> str | None:
    """None if `gemm_nt` can take these arguments, else what is wrong with them in a few words."""
    if b_scale is None:
        return "b is not quantised"
    if a.dtype != torch.float8_e4m3fn or b.dtype != torch.float8_e4m3fn:
        return "operands must be E4M3"
    if dtype not in _DTYPES or (out is not None and out.dtype != torch.float32):
        return "results are FP32 or BF16, and added to FP32"
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or not a.numel() or not b.numel():
        return f"shapes do not fit: {list(a.shape)} and {list(b.shape)}"
    n_unit = 16 if block_rows(b, b_scale) == 1 else 128
    if a.shape[0] % 4 or b.shape[0] % n_unit or a.shape[1] % 128:
        return f"M must be a multiple of 4, N of {n_unit} and K of 128, not {[a.shape[0], *b.shape]}"
    if any(x.stride(1) != 1 or x.stride(0) % 16 or x.data_ptr() % 16 for x in (a, b)):
        return "rows of data must begin at multiples of 16 bytes"
    if not _column_by_column(a, a_scale):
        return f"scales of tiles must lie column by column, not with strides {a_scale.stride()}"
    if block_rows(b, b_scale) == 1:
        return None if _column_by_column(b, b_scale) else "scales of tiles must lie column by column"
    nb, kb = tile_count(b.shape[0]), tile_count(b.shape[1])
    if b_scale.shape != (nb, kb) or b_scale.stride() != (kb + -kb % 4, 1) or _beyond(b_scale) < nb * b_scale.stride(0):
        return f"scales of blocks must have rows padded to {kb + -kb % 4}, not strides {b_scale.stride()}"
    return None


def _column_by_column(data: Tensor, scale: Tensor) -> bool:
    return scale.shape == (data.shape[0], tile_count(data.shape[1])) and scale.stride() == (1, data.shape[0])


def _beyond(scale: Tensor) -> int:
    """Numbers of the storage from the first of `scale` on."""
    return scale.untyped_storage().nbytes() // scale.element_size() - scale.storage_offset()


def _with_padding(scale: Tensor) -> Tensor:
    """Blocks [nb, kb] with the padding of their rows, [nb, round_up(kb, 4)], in place."""
    return scale.as_strided((scale.shape[0], scale.stride(0)), scale.stride())
