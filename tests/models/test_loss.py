"""The cross-entropy: alignment, ignored labels, masks, precision."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_ext.models import cross_entropy


def by_hand(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> float:
    total = 0.0
    for b in range(labels.shape[0]):
        for t in range(labels.shape[1]):
            if weights[b, t]:
                row = logits[b, t].tolist()
                total += weights[b, t].item() * (math.log(sum(map(math.exp, row))) - row[labels[b, t]])
    return total / weights.sum().item()


def test_mean_over_positions_that_count() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    weights = torch.ones(2, 5)
    assert cross_entropy(logits, labels).item() == pytest.approx(by_hand(logits, labels, weights), rel=1e-5)
    labels[0, 1:4] = -100
    weights[0, 1:4] = 0
    assert cross_entropy(logits, labels).item() == pytest.approx(by_hand(logits, labels, weights), rel=1e-5)
    mask = torch.tensor([[1.0, 1, 1, 1, 0], [0.5, 1, 0, 0, 1]])
    expected = by_hand(logits, labels, weights * mask)
    assert cross_entropy(logits, (labels, mask)).item() == pytest.approx(expected, rel=1e-5)


def test_bool_mask() -> None:
    logits, labels = torch.randn(1, 4, 7), torch.randint(0, 7, (1, 4))
    mask = torch.tensor([[True, False, True, False]])
    torch.testing.assert_close(cross_entropy(logits, (labels, mask)), cross_entropy(logits[:, ::2], labels[:, ::2]))


def test_nothing_counts() -> None:
    logits = torch.randn(2, 3, 7, requires_grad=True)
    loss = cross_entropy(logits, torch.full((2, 3), -100))
    assert loss.item() == 0
    loss.backward()
    assert not logits.grad.any()


def test_fp32_whatever_the_logits_are() -> None:
    logits, labels = (8 * torch.randn(1, 64, 300)).bfloat16(), torch.randint(0, 300, (1, 64))
    loss = cross_entropy(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, cross_entropy(logits.float(), labels))
