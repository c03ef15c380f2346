"""Unquantised matrix products in the dtype that suits the device."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which `x` is multiplied: its own, but FP32 for half precision on a CPU.

    BF16 matrix products are 7 to 8 times slower than FP32 on a CPU without matrix units (measured on 2 cores of an AVX2
    machine); products of BF16 operands are exact in FP32, so this is also what a BF16 tensor core computes.
    """
    return torch.float32 if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) else x.dtype


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in `compute_dtype`, returned in the dtype of `a`."""
    dtype = compute_dtype(a)
    return (a.to(dtype) @ b.to(dtype)).to(a.dtype)


def accumulate_matmul(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out [M, N] += a [M, K] @ b [K, N], in one pass over `out` where the product has its dtype."""
    dtype = compute_dtype(a)
    if out.dtype == dtype:
        out.addmm_(a.to(dtype), b.to(dtype))
    else:
        out.add_(a.to(dtype) @ b.to(dtype))
