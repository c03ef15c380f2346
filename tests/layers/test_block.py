"""The transformer block: where the experts are, the residual stream, dropout, and what its settings reach."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_ext.fp8 import Precision
from megatron_ext.layers.block import TransformerBlock, is_moe_layer
from megatron_ext.layers.linear import PrecisionLinear
from megatron_ext.layers.mlp import MLP
from megatron_ext.layers.moe import MoE
from megatron_ext.models import DeepSeekV3Config
from megatron_ext.parallel.expert_parallel import ExpertParallel

CONFIG = DeepSeekV3Config(
    vocab_size=32, hidden_size=24, intermediate_size=40, moe_intermediate_size=16, num_hidden_layers=4,
    num_attention_heads=2, n_routed_experts=4, num_experts_per_tok=2, kv_lora_rank=10, q_lora_rank=12,
    qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8, initializer_range=0.3, first_k_dense_replace=1)


def block(index: int, **changes: object) -> TransformerBlock:
    torch.manual_seed(0)
    built = TransformerBlock(replace(CONFIG, **changes), index)
    built.set_expert_parallel(ExpertParallel.single())
    return built


@pytest.mark.parametrize(("first", "every", "expected"), [
    (0, 1, [0, 1, 2, 3, 4]), (3, 1, [3, 4]), (1, 2, [2, 4]), (0, 2, [0, 2, 4]), (9, 1, [])])
def test_where_the_experts_are(first: int, every: int, expected: list[int]) -> None:
    config = replace(CONFIG, first_k_dense_replace=first, moe_layer_freq=every)
    assert [index for index in range(5) if is_moe_layer(config, index)] == expected


@pytest.mark.parametrize(("index", "kind"), [(0, MLP), (1, MoE)])
def test_two_branches_join_the_residual_stream(index: int, kind: type) -> None:
    layer = block(index)
    assert isinstance(layer.mlp, kind)
    assert layer.canonical_name == f"model.layers.{index}"
    x = torch.randn(2, 5, 24)
    middle = x + layer.self_attn(layer.input_layernorm(x))
    assert torch.equal(layer(x), middle + layer.mlp(layer.post_attention_layernorm(middle)))


def test_dropout_of_both_branches_in_training_only() -> None:
    layer, x = block(0, hidden_dropout=0.9), torch.randn(2, 5, 24)
    torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    dropped = (layer(x) == x).float().mean()  # what is left is attention's branch
    assert 0.7 < dropped < 1
    torch.nn.init.normal_(layer.mlp.down_proj.weight)
    torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    assert 0.7 < (layer(x) == x).float().mean() < 1
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    layer.eval()
    assert not (layer(x) == x).any()


@pytest.mark.parametrize("index", [0, 1])
def test_precision_reaches_linears_and_experts(index: int) -> None:
    layer, precision = block(index), Precision(fp8=True, dispatch_dtype="bf16")
    layer.set_precision(precision)
    linears = [module for module in layer.modules() if isinstance(module, PrecisionLinear)]
    assert len(linears) == 5 + 3
    assert all(module.precision is precision for module in linears)
    if index == 1:
        assert layer.mlp.experts.precision is precision
    assert layer(torch.randn(1, 5, 24)).isfinite().all()


def test_bf16_in_bf16_out() -> None:
    layer = block(1).bfloat16()
    assert layer(torch.randn(1, 5, 24).bfloat16()).dtype == torch.bfloat16
