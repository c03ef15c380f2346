"""One Adam or AdamW step in torch: the specification of every backend, and the path of devices without one of ours.

    g <- g + l2 p                                   Adam's L2 form; AdamW has l2 = 0
    m <- beta1 m + new1 g,   v <- beta2 v + new2 g^2
    p <- decay p - step_size m / (rescale sqrt(v) + eps)

All of it in FP32, one rounding an operation and in this order, whatever the dtypes in which p, g, m, v are stored; what
is stored in BF16 is rounded to nearest even at the end, so p moves by the unrounded moments. No operation divides by a
scalar or fuses a product into a sum, which devices and compilers do differently: all backends agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BATCH = 1 << 24  # numbers worked on at once: bounds the temporaries to some 64 MiB each


@dataclass(frozen=True)
class AdamWScalars:
    """The scalars of one step; computed in double precision, rounded to FP32 where they are used."""

    beta1: float
    new1: float
    beta2: float
    new2: float
    eps: float
    decay: float
    l2: float
    step_size: float
    rescale: float

    @staticmethod
    def at(step: int, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
           bias_correction: bool = True, adam_w_mode: bool = True) -> AdamWScalars:
        """The scalars of the `step`-th step, counted from 1."""
        beta1, beta2 = betas
        correction1, correction2 = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
        return AdamWScalars(
            beta1=beta1, new1=1 - beta1, beta2=beta2, new2=1 - beta2, eps=eps,
            decay=1 - lr * weight_decay if adam_w_mode else 1.0, l2=0.0 if adam_w_mode else weight_decay,
            step_size=lr / correction1, rescale=correction2**-0.5)  # fmt: skip


def adamw(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
          scalars: AdamWScalars) -> None:
    """Updates parameters and moments in place.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: lists of the same length; the i-th tensors have one shape, are dense, on
            one device, and each FP32 or BF16.
    """
    for p, g, m, v in _batches(params, grads, exp_avgs, exp_avg_sqs):
        p32, g32, m32, v32 = ([x.float() for x in xs] for xs in (p, g, m, v))  # themselves where they are FP32
        if scalars.l2:
            g32 = torch._foreach_add(g32, torch._foreach_mul(p32, scalars.l2))
        torch._foreach_mul_(m32, scalars.beta1)
        torch._foreach_add_(m32, torch._foreach_mul(g32, scalars.new1))
        squares = torch._foreach_mul(g32, g32)
        torch._foreach_mul_(squares, scalars.new2)
        torch._foreach_mul_(v32, scalars.beta2)
        torch._foreach_add_(v32, squares)
        # torch's FP32 sqrt on a CPU is an ulp off for one number in five; by way of FP64 it is rounded correctly.
        denominators = [x.double().sqrt_().float() for x in v32]
        torch._foreach_mul_(denominators, scalars.rescale)
        torch._foreach_add_(denominators, scalars.eps)
        updates = torch._foreach_div(m32, denominators)
        torch._foreach_mul_(updates, scalars.step_size)
        torch._foreach_mul_(p32, scalars.decay)
        torch._foreach_sub_(p32, updates)
        for stored, computed in zip([*p, *m, *v], [*p32, *m32, *v32], strict=True):
            if stored is not computed:
                stored.copy_(computed)


def _batches(*lists: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """Flat pieces of the tensors of `lists`, side by side, about `_BATCH` numbers at a time."""
    batch: list[tuple[Tensor, ...]] = []
    size = 0
    for tensors in zip(*lists, strict=True):
        for pieces in zip(*(tensor.view(-1).split(_BATCH) for tensor in tensors), strict=True):
            batch.append(pieces)
            size += pieces[0].numel()
            if size >= _BATCH:
                yield tuple(list(column) for column in zip(*batch, strict=True))
                batch, size = [], 0
    if batch:
        yield tuple(list(column) for column in zip(*batch, strict=True))
