"""Block-scaled matrix products on a CPU: FP32 products of operands dequantised by the C++ kernels.

On a CPU an FP32 sgemm is the fastest product there is, and exactly the ideal of a kernel that accumulates in FP32. So a
weight is kept dequantised for the step, and each micro-batch pays for its activations only. Shapes as in
kernels/reference/gemm.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ext.kernels.cpu.quantize import dequantize
from megatron_ext.kernels.reference import gemm as reference
from megatron_ext.kernels.reference.gemm import Operand


def weight_operands(data: Tensor, scale: Tensor) -> tuple[Operand, Operand]:
    """The weight in FP32, 4 bytes a number, and its transpose as a view."""
    weight = dequantize(data, scale)
    return (weight, None), (weight.mT, None)


def gemm_nt(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor | None,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See `reference.gemm.gemm_nt`."""
    return reference.gemm_nt(a, a_scale, b, b_scale, out, dtype, dequantize=dequantize)


def grouped_gemm_nt(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor | None,
    group_sizes: Sequence[int] | Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See `reference.gemm.grouped_gemm_nt`."""
    return reference.grouped_gemm_nt(a, a_scale, b, b_scale, group_sizes, dtype, dequantize=dequantize)


def grouped_wgrad(
    dy: Tensor, dy_scale: Tensor, x: Tensor, x_scale: Tensor, group_sizes: Sequence[int] | Tensor, out: Tensor
) -> None:
    """See `reference.gemm.grouped_wgrad`."""
    reference.grouped_wgrad(dy, dy_scale, x, x_scale, group_sizes, out, dequantize=dequantize)
