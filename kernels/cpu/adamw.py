"""One Adam or AdamW step on a CPU through kernels/cpu/adamw.cpp: the reference's operator, bit for bit.

`lanes=1` forces the loop without AVX2, for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from dataclasses import astuple

import torch
from torch import Tensor

from megatron_ext.kernels.cpu.library import WIDEST, function, threads_for
from megatron_ext.kernels.reference.adamw import AdamWScalars

_GRAIN = 1 << 16  # numbers worth a thread of their own
_DTYPES = (torch.float32, torch.bfloat16)


def adamw(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
          scalars: AdamWScalars, *, lanes: int = WIDEST) -> None:
    """See `reference.adamw.adamw`."""
    kernel = function("mext_adamw", *[c_void_p] * 4, c_int64, *[c_int] * 3, *[c_float] * 9, *[c_int] * 2)
    numbers = astuple(scalars)
    for tensors in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        p, g, m, v = tensors
        # The kernel trusts its pointers; a mistake here would write over somebody else's memory.
        assert all(t.device.type == "cpu" and t.is_contiguous() and t.dtype in _DTYPES for t in tensors)
        assert p.shape == g.shape == m.shape == v.shape and m.dtype == v.dtype
        pointers, bf16 = [t.data_ptr() for t in tensors], [t.dtype == torch.bfloat16 for t in (p, g, m)]
        kernel(*pointers, p.numel(), *bf16, *numbers, lanes, threads_for(p.numel(), _GRAIN))
