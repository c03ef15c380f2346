"""Block-scaled matrix products in torch: the specification of the FP8 GEMMs.

Operands are dequantised and multiplied in FP32. That is what a kernel computes which scales each partial sum over 128
and adds it in FP32 (DeepSeek-V3, section 3.3.2), up to the order of FP32 additions: backends agree within a tolerance,
not in bits. A B operand may be given already dequantised (FP32, scale None), see `weight_operands`.

Shape letters: M rows of the activations (T when they are tokens in groups), K the contracted dimension, N outputs, E
groups, S scale columns of tokens in groups. Torch must not be told to use TF32 for matrix products (by default it is
not) where this serves as a reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_ext.kernels.layout import BLOCK, host_sizes, require, token_spans
from megatron_ext.kernels.reference.quantize import dequantize

Dequantize = Callable[[Tensor, Tensor], Tensor]
Operand = tuple[Tensor, Tensor | None]


def weight_operands(data: Tensor, scale: Tensor) -> tuple[Operand, Operand]:
    """A weight in the two forms in which a backend multiplies by it; made once a step and cached.

    Args:
        data, scale: [..., N, K] in 128x128 blocks.

    Returns:
        The B operand of the forward product, [..., N, K], and that of the input gradient, [..., K, N]. A 128x128
        block is its own transpose's block, so the second is exact.
    """
    return (data, scale), (data.mT, scale.mT)


def gemm_nt(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor | None,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    dequantize: Dequantize = dequantize,
) -> Tensor:
    """a b^T with FP32 accumulation.

    Args:
        a, a_scale: [M, K] in 1x128 tiles.
        b, b_scale: [N, K] in 1x128 tiles or 128x128 blocks, or FP32 and None.
        out: [M, N] FP32 to add to.
        dtype: of the result where `out` is not given: the FP32 sum is rounded to it once.

    Returns:
        [M, N] in `dtype`; `out` if it was given.
    """
    a = dequantize(a, a_scale)
    b = b if b_scale is None else dequantize(b, b_scale)
    return (a @ b.t()).to(dtype) if out is None else out.addmm_(a, b.t())


def grouped_gemm_nt(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor | None,
    group_sizes: Sequence[int] | Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    dequantize: Dequantize = dequantize,
) -> Tensor:
    """Rows of group e times b[e]^T: the forward product and the input gradient of grouped experts.

    Args:
        a, a_scale: [T, K] in 1x128 tiles, rows sorted by group.
        b, b_scale: [E, N, K] in 128x128 blocks, or FP32 and None.
        group_sizes: [E], summing to T; groups may be empty.
        dtype: of the result: the FP32 sums are rounded to it once.

    Returns:
        [T, N] in `dtype`.
    """
    sizes = host_sizes(group_sizes)
    require(sum(sizes) == len(a) and min(sizes, default=0) >= 0, f"group sizes {sizes} must sum to the {len(a)} rows")
    a = dequantize(a, a_scale)
    b = b if b_scale is None else dequantize(b, b_scale)
    y = torch.empty(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device)
    first = 0
    for e, size in enumerate(sizes):
        if size:
            torch.mm(a[first : first + size], b[e].t(), out=y[first : first + size])
        first += size
    return y.to(dtype)


def grouped_wgrad(
    dy: Tensor,
    dy_scale: Tensor,
    x: Tensor,
    x_scale: Tensor,
    group_sizes: Sequence[int] | Tensor,
    out: Tensor,
    *,
    dequantize: Dequantize = dequantize,
) -> None:
    """out[e] += dy[:, group e] x[:, group e]^T: the weight gradients of grouped experts.

    Args:
        dy, dy_scale: [N, 128 S] and [N, S], in tiles along the tokens of each group (`quantize_transposed`).
        x, x_scale: [K, 128 S] and [K, S], likewise.
        group_sizes: [E], summing to T; an empty group adds nothing.
        out: [E, N, K] FP32.
    """
    for e, (first, last, first_tile, last_tile) in enumerate(token_spans(group_sizes)):
        if last > first:
            columns = slice(first_tile * BLOCK, first_tile * BLOCK + last - first)
            dy_e = dequantize(dy[:, columns], dy_scale[:, first_tile:last_tile])
            x_e = dequantize(x[:, columns], x_scale[:, first_tile:last_tile])
            out[e].addmm_(dy_e, x_e.t())
