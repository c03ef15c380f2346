"""Balancing without an auxiliary loss (arXiv 2408.15664; DeepSeek-V3 report, section 2.1.2).

Routers count the tokens of every expert through a step: all micro-batches, both directions. Once per optimizer step the
counts are summed over all replicas, as integers, and every bias moves by one fixed step towards its expert's fair
share: b += speed * sign(mean - count). Whoever runs the step calls `update_biases` after the optimizer, and with
`speed=0` when the optimizer skipped the step, so that its counts do not leak into the next one.

Shape letters: E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_ext.layers.router import Router


@torch.no_grad()
def update_biases(routers: Sequence[Router], speed: float, group: ProcessGroup | None = None, *,
                  zero_mean: bool = False) -> list[Tensor]:
    """Ends a step for the balancer: sums the counts, moves the biases, starts counting anew.

    Args:
        routers: of this rank's layers, whatever their numbers of experts; every rank of `group` must hold the same
            layers in the same order. May be empty (then there is no communication). Without a bias: only counted.
        speed: u, how far a bias moves; 0 freezes it.
        group: replicas to sum the counts over, in one all-reduce; None if there are none.
        zero_mean: also keep the sum of the biases, by taking the mean off each update (torchtitan's variant).

    Returns:
        Per router the global counts [E] int64 of the step that ends.
    """
    if not routers:
        return []
    sizes = [router.num_experts for router in routers]
    # int64: BF16 or FP32 counts would round and flip signs.
    flat = torch.cat([router.tokens_per_expert for router in routers])
    if group is not None:
        # gloo and CUDA tensors: gloo stages through the host by itself.
        dist.all_reduce(flat, group=group)
    counts = list(flat.split(sizes))
    for router, count in zip(routers, counts, strict=True):
        bias = router.e_score_correction_bias
        if bias is not None and speed:
            # sign(mean - count), without a division.
            update = torch.sign(count.sum() - count * router.num_experts).float() * speed
            bias.add_(update - update.mean() if zero_mean else update)
        router.tokens_per_expert.zero_()
    return counts


def max_violation(counts: Tensor) -> float:
    """MaxVio = (max - mean) / mean of token counts [E]; 0 is perfect balance, E/k - 1 the worst. 0 for no tokens."""
    total = int(counts.sum())
    return float(counts.max()) * counts.numel() / total - 1 if total else 0.0
