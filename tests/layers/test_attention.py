"""Multi-head latent attention: what Hugging Face's models cannot show (those are compared in tests/models)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.fp8 import Precision
from megatron_ext.layers.attention import LatentAttention
from megatron_ext.layers.linear import PrecisionLinear
from megatron_ext.layers.rope import YarnScaling
from megatron_ext.models import DeepSeekV3Config

CONFIG = DeepSeekV3Config(
    vocab_size=32, hidden_size=24, intermediate_size=40, moe_intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, n_routed_experts=4, num_experts_per_tok=2, kv_lora_rank=10, q_lora_rank=12,
    qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8, initializer_range=0.3)


def attention(seed: int = 0, **changes: object) -> LatentAttention:
    torch.manual_seed(seed)
    return LatentAttention(replace(CONFIG, **changes))


@pytest.mark.parametrize("q_lora_rank", [None, 12])
def test_token_by_token(q_lora_rank: int | None) -> None:
    """Against the equations of the paper, one head and one query at a time."""
    module = attention(q_lora_rank=q_lora_rank)
    x = torch.randn(1, 7, 24)
    c = module.kv_a_proj_with_mqa(x)[0]
    latent, k_rope = module.kv_a_layernorm(c[:, :10]), module.rotary(c[:, 10:])
    kv = module.kv_b_proj(latent).view(7, 2, 6 + 8)
    q = (module.q_proj(x) if q_lora_rank is None else module.q_b_proj(module.q_a_layernorm(module.q_a_proj(x))))
    q = q.view(7, 2, 6 + 4)
    heads = torch.zeros(7, 2, 8)
    for h in range(2):
        q_rope = module.rotary(q[:, h, 6:])
        for t in range(7):
            scores = (kv[:t + 1, h, :6] @ q[t, h, :6] + k_rope[:t + 1] @ q_rope[t]) / math.sqrt(10)
            heads[t, h] = scores.softmax(0) @ kv[:t + 1, h, 6:]
    torch.testing.assert_close(module(x)[0], module.o_proj(heads.flatten(1)), atol=1e-5, rtol=0)


def scale_of_softmax(monkeypatch: pytest.MonkeyPatch, module: LatentAttention) -> float:
    seen: list[float] = []
    true_attention = F.scaled_dot_product_attention

    def spy(*operands: Tensor, scale: float, **options: object) -> Tensor:
        seen.append(scale)
        return true_attention(*operands, scale=scale, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    module(torch.randn(1, 3, 24))
    return seen[0]


def test_softmax_scale_is_of_mscale_all_dim(monkeypatch: pytest.MonkeyPatch) -> None:
    yarn = YarnScaling(40.0, 4096, mscale=0.3, mscale_all_dim=0.8)
    expected = 10 ** -0.5 * (0.08 * math.log(40) + 1) ** 2
    assert scale_of_softmax(monkeypatch, attention(rope_scaling=yarn)) == pytest.approx(expected)
    assert scale_of_softmax(monkeypatch, attention()) == pytest.approx(10 ** -0.5)


def test_yarn_knows_only_the_original_length() -> None:
    """Neither the extended context length nor the length at hand changes what the first positions see."""
    yarn = YarnScaling(4.0, 16, mscale=1.0, mscale_all_dim=1.0)
    x = torch.randn(1, 40, 24)
    y = attention(rope_scaling=yarn, max_position_embeddings=64)(x)
    assert torch.equal(y, attention(rope_scaling=yarn, max_position_embeddings=1 << 17)(x))
    torch.testing.assert_close(attention(rope_scaling=yarn)(x[:, :9]), y[:, :9], atol=1e-6, rtol=0)


def test_dropout_in_training_only() -> None:
    module = attention(attention_dropout=0.5)
    x = torch.randn(1, 9, 24)
    torch.manual_seed(1)
    first, other = module(x), module(x)
    torch.manual_seed(1)
    assert torch.equal(module(x), first)
    assert not torch.equal(other, first)
    module.eval()
    assert torch.equal(module(x), attention()(x))


def test_bf16_on_a_cpu_attends_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    module, dtypes = attention().bfloat16(), []
    true_attention = F.scaled_dot_product_attention

    def spy(*operands: Tensor, **options: object) -> Tensor:
        dtypes.extend(operand.dtype for operand in operands)
        return true_attention(*operands, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    y = module(torch.randn(1, 5, 24).bfloat16())
    assert y.dtype == torch.bfloat16
    assert dtypes == [torch.float32] * 3


def test_biases_are_where_hugging_face_has_them() -> None:
    assert not any(name.endswith("bias") for name, _ in attention().named_parameters())
    biased = {name for name, _ in attention(attention_bias=True).named_parameters() if name.endswith("bias")}
    assert biased == {"q_a_proj.bias", "kv_a_proj_with_mqa.bias", "o_proj.bias"}


@pytest.mark.parametrize("q_lora_rank", [None, 12])
def test_precision_reaches_every_linear(q_lora_rank: int | None) -> None:
    module, precision = attention(q_lora_rank=q_lora_rank), Precision(fp8=True)
    x = torch.randn(1, 5, 24)
    before = module(x)
    module.set_precision(precision)
    assert all(child.precision is precision for child in module.children() if isinstance(child, PrecisionLinear))
    torch.testing.assert_close(module(x), before, atol=0.3, rtol=0.3)
    assert not torch.equal(module(x), before)
