"""What a block keeps for backward in FP8, at an eighth of DeepSeek-V3's widths."""

from __future__ import annotations

from benchmarks.saved_activations import GOALS, V3, measure


def test_shares_of_bf16() -> None:
    counts = ("n_shared_experts", "num_experts_per_tok", "first_k_dense_replace", "num_hidden_layers")
    widths = {name: value if name in counts else value // 8 for name, value in V3.items()}
    found = measure(widths, 16)
    assert set(found) == set(GOALS)
    for part, (fp8, bf16) in found.items():
        assert 0.3 < fp8 / bf16 <= GOALS[part], part
