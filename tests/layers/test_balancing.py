"""The balancer's rule, and that nothing but the global batch decides the bias."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_ext.layers.balancing import max_violation, update_biases
from megatron_ext.layers.router import Router


def router(experts: int = 4, method: str = "noaux_tc") -> Router:
    torch.manual_seed(experts)
    return Router(SimpleNamespace(
        n_routed_experts=experts, num_experts_per_tok=2, n_group=1, topk_group=1, topk_method=method, hidden_size=8,
        scoring_func="sigmoid", norm_topk_prob=True, routed_scaling_factor=1.0, initializer_range=1.0))


def counted(counts: list[int], **kwargs) -> Router:
    gate = router(len(counts), **kwargs)
    gate.tokens_per_expert.copy_(torch.tensor(counts))
    return gate


def test_bias_moves_one_step_towards_the_mean():
    gate = counted([5, 9, 7, 7])
    gate.e_score_correction_bias.copy_(torch.tensor([3.0, 3, 3, 3]))
    [counts] = update_biases([gate], 0.001)
    torch.testing.assert_close(gate.e_score_correction_bias, torch.tensor([3.001, 2.999, 3, 3]), rtol=0, atol=3e-7)
    assert counts.tolist() == [5, 9, 7, 7] and counts.dtype == torch.int64
    assert gate.tokens_per_expert.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("off", [1, -1])
def test_one_token_in_a_billion_decides_the_sign(off):
    """Counts in BF16 (above 256) or FP32 (above 2^24) would see no difference here."""
    gate = counted([2**30 + off, 2**30 - off])
    update_biases([gate], 1.0)
    assert gate.e_score_correction_bias.tolist() == [-off, off]


def test_speed_zero_freezes_and_still_counts_anew():
    gate = counted([5, 9])
    [counts] = update_biases([gate], 0)
    assert gate.e_score_correction_bias.tolist() == [0, 0]
    assert counts.tolist() == [5, 9] and gate.tokens_per_expert.tolist() == [0, 0]


def test_layers_of_different_width_and_without_bias():
    gates = [counted([1, 2]), counted([3, 1, 2, 2]), counted([4, 0], method="greedy")]
    counts = update_biases(gates, 0.5)
    assert [c.tolist() for c in counts] == [[1, 2], [3, 1, 2, 2], [4, 0]]
    assert gates[0].e_score_correction_bias.tolist() == [0.5, -0.5]
    assert gates[1].e_score_correction_bias.tolist() == [-0.5, 0.5, 0, 0]
    assert gates[2].e_score_correction_bias is None
    assert update_biases([], 0.5) == []


def test_zero_mean_keeps_the_sum():
    gate = counted([9, 1, 1, 1])
    update_biases([gate], 0.5, zero_mean=True)
    assert gate.e_score_correction_bias.tolist() == [-0.75, 0.25, 0.25, 0.25]


def test_accumulation_does_not_change_the_bias():
    batch = torch.randn(64, 8)
    biases = []
    for micro_batches in (1, 4):
        gate = router(16)
        for _ in range(5):
            for part in batch.chunk(micro_batches):
                gate(part)
            update_biases([gate], 0.01)
        biases.append(gate.e_score_correction_bias)
    assert biases[0].equal(biases[1]) and biases[0].abs().max() > 0


def test_max_violation():
    assert max_violation(torch.tensor([4, 4, 4, 4])) == 0
    assert max_violation(torch.tensor([16, 0, 0, 0])) == 3
    assert max_violation(torch.zeros(4, dtype=torch.int64)) == 0
