"""One Adam or AdamW step on a GPU, one pass over every tensor: the reference's operator, bit for bit.

A launch a tensor: ZeRO hands over few and long ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ext.kernels.reference.adamw import AdamWScalars
from megatron_ext.kernels.triton_kernels.launch import launch

NUMBERS = 1024
_DTYPES = (torch.float32, torch.bfloat16)


@triton.jit
def adamw_kernel(
    p, g, m, v, count, beta1, new1, beta2, new2, eps, decay, l2, step_size, rescale,
    L2: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    """NUMBERS of each tensor; the order of operations is that of kernels/reference/adamw.py."""
    i = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    mask = i < count
    p, g, m, v = p + i, g + i, m + i, v + i
    p32 = tl.load(p, mask=mask, other=0.0).to(tl.float32)
    g32 = tl.load(g, mask=mask, other=0.0).to(tl.float32)
    m32 = tl.load(m, mask=mask, other=0.0).to(tl.float32)
    v32 = tl.load(v, mask=mask, other=0.0).to(tl.float32)
    if L2:
        g32 = g32 + p32 * l2
    m32 = m32 * beta1 + g32 * new1
    v32 = v32 * beta2 + (g32 * g32) * new2
    update = tl.div_rn(m32, tl.sqrt_rn(v32) * rescale + eps) * step_size
    p32 = p32 * decay - update
    tl.store(p, p32.to(p.dtype.element_ty), mask=mask)
    tl.store(m, m32.to(m.dtype.element_ty), mask=mask)
    tl.store(v, v32.to(v.dtype.element_ty), mask=mask)


def adamw(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
          scalars: AdamWScalars) -> None:
    """See `reference.adamw.adamw`."""
    numbers = [float(n) for n in astuple(scalars)]
    for tensors in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        # The kernel trusts its pointers; a mistake here would write over somebody else's memory.
        assert all(t.is_contiguous() and t.dtype in _DTYPES and t.shape == tensors[0].shape for t in tensors)
        count = tensors[0].numel()
        launch(
            adamw_kernel, triton.cdiv(count, NUMBERS), *(t.detach() for t in tensors), count, *numbers,
            L2=scalars.l2 != 0, NUMBERS=NUMBERS, num_warps=4)  # fmt: skip
