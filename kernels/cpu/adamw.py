"""One Adam or AdamW step on a CPU through kernels/cpu/adamw.cpp: the reference's operator, bit for bit.

`portable=True` forces the loop without AVX2.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from dataclasses import astuple

import torch
from torch import Tensor

from megatron_ext.kernels.cpu.library import function, in_chunks
from megatron_ext.kernels.reference.adamw import AdamWScalars

_GRAIN = 1 << 18  # numbers worth a thread of their own
_DTYPES = (torch.float32, torch.bfloat16)


def adamw(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
          scalars: AdamWScalars, *, portable: bool = False) -> None:
    """See `reference.adamw.adamw`."""
    kernel = function("mext_adamw", *[c_void_p] * 4, *[c_int64] * 2, *[c_int] * 3, *[c_float] * 9, c_int)
    numbers = astuple(scalars)
    for tensors in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        p, g, m, v = tensors
        # The kernel trusts its pointers; a mistake here would write over somebody else's memory.
        assert all(t.device.type == "cpu" and t.is_contiguous() and t.dtype in _DTYPES for t in tensors)
        assert p.shape == g.shape == m.shape == v.shape and m.dtype == v.dtype
        pointers, bf16 = [t.data_ptr() for t in tensors], [t.dtype == torch.bfloat16 for t in (p, g, m)]

        def body(first: int, last: int, pointers: list[int] = pointers, bf16: list[bool] = bf16) -> None:
            kernel(*pointers, first, last, *bf16, *numbers, portable)

        in_chunks(p.numel(), _GRAIN, body)
