"""From FP32 main gradients to the optimizer: tied layers, ZeRO-1/2, and the path without ZeRO.

ZeRO-1/2 take gradients through DeepSpeed's public `coalesce_grad_reduction`: its hooks are mute during the schedule,
and at the exit it takes whatever lies in `param.grad` or, with `grad_accum_dtype` fp32 under ZeRO-1,
`param.grad_accum`. Our FP32 gradients are put there just before, averaged over the replicas already (reduction.py) but
for a few options of ZeRO (optimizers.py), with which it averages them itself. Without ZeRO, DeepSpeed's own reduction
and clipping count a parameter of a pipeline wrongly (the norm misses every pair but the first, and experts), so both
are done by us.

Letters: 2D data-parallel shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_ext.parallel import ProcessGroups

BUCKET_BYTES = 256 * 2**20


def is_expert(p: nn.Parameter) -> bool:
    """DeepSpeed's mark of a parameter that differs between expert-parallel ranks."""
    return getattr(p, "allreduce", True) is False


def all_reduce_flat(tensors: Iterable[Tensor], group: ProcessGroup) -> None:
    """Sums FP32 tensors over a group in place, some buckets of 256 MB at a time."""
    bucket: list[Tensor] = []
    size = 0

    def flush() -> None:
        flat = torch.cat([t.reshape(-1) for t in bucket])
        dist.all_reduce(flat, group=group)
        for t, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            t.copy_(part.view_as(t))

    for t in tensors:
        if bucket and (size + t.numel()) * 4 > BUCKET_BYTES:
            flush()
            bucket, size = [], 0
        bucket.append(t)
        size += t.numel()
    if bucket:
        flush()


def hand_to_zero(parameters: Sequence[nn.Parameter], into_grad_accum: bool) -> None:
    """Puts every main gradient where ZeRO will look for it; parameters without use get zeros, on all replicas alike.

    ZeRO replaces the storage of what it is handed, so it gets an alias or a cast, never `main_grad` itself.
    """
    for p in parameters:
        if into_grad_accum:
            p.grad_accum = p.main_grad.detach()
        else:
            p.grad = p.main_grad.detach() if p.dtype == torch.float32 else p.main_grad.to(p.dtype)


@contextmanager
def none_left_by_an_error(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Drops gradients when the block raises: DeepSpeed reduces what it finds even then, and peers would not join in."""
    try:
        yield
    except BaseException:
        for p in parameters:
            p.grad = p.grad_accum = None
        raise


def global_norm(parameters: Sequence[nn.Parameter], groups: ProcessGroups, device: torch.device) -> Tensor:
    """L2 norm of all gradients of the model, each parameter once, on every rank."""
    squares = torch.zeros(2, dtype=torch.float32, device=device)
    for p in parameters:
        if not getattr(p, "ds_pipe_replicated", False):
            squares[int(is_expert(p))] += p.main_grad.float().pow(2).sum()
    if groups.topology.expert_parallel > 1:
        experts = squares[1:].clone()
        dist.all_reduce(experts, group=groups.expert_parallel)
        squares[1:] = experts
    total = squares.sum()
    dist.all_reduce(total, group=groups.model_parallel)
    # The halves of a pipeline add in mirrored order: the last bit differs, and replicas that clip by it drift apart
    # (P = 8: after 14 steps). One rank's sum holds for all.
    dist.broadcast(total, src=0)
    return total.sqrt()


def clip(parameters: Sequence[nn.Parameter], norm: Tensor, limit: float) -> None:
    """Scales main gradients so that their norm is at most `limit` (DeepSpeed's formula, epsilon included)."""
    factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
    for p in parameters:
        p.main_grad.mul_(factor)
