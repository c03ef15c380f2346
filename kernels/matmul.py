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


def widens(x: Tensor) -> bool:
    """Whether products of tensors like `x` can be had in FP32 without copies of the operands in FP32."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return half and x.device.type == "cuda" and torch.version.hip is None  # torch implements it for NVIDIA's only


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in `compute_dtype`, returned in the dtype of `a`."""
    dtype = compute_dtype(a)
    return (a.to(dtype) @ b.to(dtype)).to(a.dtype)


def accumulate_matmul(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out [M, N] += a [M, K] @ b [K, N]; the product is never rounded to less than the dtype of `out`."""
    if out.dtype == torch.float32 and widens(a):
        out.add_(torch.mm(a, b, out_dtype=out.dtype))
        return
    dtype = torch.promote_types(compute_dtype(a), out.dtype)
    if out.dtype == dtype:
        out.addmm_(a.to(dtype), b.to(dtype))
    else:
        out.add_(a.to(dtype) @ b.to(dtype))
