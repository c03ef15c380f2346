"""Rotary embedding and YaRN against formulas written out here."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_ext.layers.rope import RotaryEmbedding, YarnScaling, inverse_frequencies

DEEPSEEK = YarnScaling(factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0)


def rotated(x: torch.Tensor, theta: float, first: list[int], second: list[int]) -> torch.Tensor:
    """x [T, D] with the pairs (first[i], second[i]) turned, one number at a time."""
    out = x.clone()
    for t in range(x.shape[0]):
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            angle = t * theta ** (-2 * i / x.shape[1])
            out[t, a] = x[t, a] * math.cos(angle) - x[t, b] * math.sin(angle)
            out[t, b] = x[t, b] * math.cos(angle) + x[t, a] * math.sin(angle)
    return out


@pytest.mark.parametrize(("interleave", "first", "second"), [
    (True, [0, 2, 4], [1, 3, 5]), (False, [0, 1, 2], [3, 4, 5])])
def test_pairs(interleave: bool, first: list[int], second: list[int]) -> None:
    x = torch.randn(5, 6)
    expected = rotated(x, 100.0, first, second)
    torch.testing.assert_close(RotaryEmbedding(6, 100.0, interleave=interleave)(x), expected, atol=1e-6, rtol=0)


def test_depends_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 8)
    rope = RotaryEmbedding(8, 10000.0, DEEPSEEK)
    scores = rope(q.expand(30, 8)) @ rope(k.expand(30, 8)).T
    torch.testing.assert_close(scores.diagonal(-3), scores[3, 0].expand(27), atol=1e-5, rtol=0)


def test_half_precision_turns_in_fp32() -> None:
    """Positions and angles above 256 have no BF16 of their own."""
    x = torch.randn(1, 400, 8).bfloat16()
    rope = RotaryEmbedding(8, 10000.0)
    assert torch.equal(rope(x), rope(x.float()).bfloat16())


def test_tables_made_in_inference_serve_training() -> None:
    rope = RotaryEmbedding(4, 100.0)
    with torch.inference_mode():
        rope(torch.ones(3, 4))
    x = torch.ones(3, 4, requires_grad=True)
    rope(x).sum().backward()
    assert x.grad is not None
    assert rope(torch.ones(5, 4)).shape == (5, 4)  # another length, other tables


def test_yarn_keeps_fast_and_slows_slow_dimensions() -> None:
    plain, yarn = inverse_frequencies(64, 10000.0, None), inverse_frequencies(64, 10000.0, DEEPSEEK)
    # DeepSeek-V3: 32 turns within 4096 positions at dimension 10.4, one turn at 22.5; the ramp runs from 10 to 23.
    assert torch.equal(yarn[:11], plain[:11])
    torch.testing.assert_close(yarn[23:], plain[23:] / 40)
    ramp = (torch.arange(11, 23) - 10) / 13
    torch.testing.assert_close(yarn[11:23], plain[11:23] * (1 - ramp) + plain[11:23] / 40 * ramp)


def test_yarn_without_truncation() -> None:
    exact = inverse_frequencies(64, 10000.0, YarnScaling(40.0, 4096, truncate=False))
    assert not torch.equal(exact[11:23], inverse_frequencies(64, 10000.0, DEEPSEEK)[11:23])


def test_yarn_temperatures() -> None:
    """The softmax scale has the square of mscale_all_dim's temperature, cos and sin the quotient of the two."""
    both = YarnScaling(40.0, 4096, mscale=0.5, mscale_all_dim=0.7)
    assert both.softmax_factor() == pytest.approx((0.07 * math.log(40) + 1) ** 2)
    assert both.rotation_factor() == pytest.approx((0.05 * math.log(40) + 1) / (0.07 * math.log(40) + 1))
    assert DEEPSEEK.rotation_factor() == 1.0
    assert YarnScaling(40.0, 4096).softmax_factor() == 1.0
    assert YarnScaling(40.0, 4096).rotation_factor() == pytest.approx(0.1 * math.log(40) + 1)
    assert YarnScaling(1.0, 4096, mscale_all_dim=1.0).softmax_factor() == 1.0
    assert YarnScaling(40.0, 4096, attention_factor=1.25).rotation_factor() == 1.25
    x = torch.randn(3, 8)
    rope, plain = RotaryEmbedding(8, 1e4, YarnScaling(1.0, 4096, attention_factor=1.25)), RotaryEmbedding(8, 1e4)
    torch.testing.assert_close(rope(x), 1.25 * plain(x))
