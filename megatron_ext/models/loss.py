"""The training loss.

Letters: B batch, T positions, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED_LABEL = -100
"""The label of a position that no loss counts; torch's cross entropy ignores the same one by default."""


def cross_entropy(logits: Tensor, labels: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Mean negative log-likelihood in nats over the positions that count, in FP32.

    Labels are aligned with the logits: `labels[b, t]` is the token that follows `tokens[b, t]`.

    Args:
        logits: [B, T, V].
        labels: [B, T] int64, -100 where there is no target; or (labels, loss_mask) with a mask [B, T] of weights, by
            which each position counts.

    Returns:
        A scalar; 0, with a graph that gives zero gradients, if no position counts.
    """
    labels, mask = labels if isinstance(labels, tuple | list) else (labels, None)
    labels = labels.flatten()
    losses = F.cross_entropy(logits.float().flatten(0, -2), labels, ignore_index=IGNORED_LABEL, reduction="none")
    weights = (labels != IGNORED_LABEL).float()
    if mask is not None:
        weights = weights * mask.flatten().float()
    total = weights.sum()
    return (losses * weights).sum() / torch.where(total > 0, total, torch.ones_like(total))
