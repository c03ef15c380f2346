"""Counted parameters and activations against a model that is built and run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_ext.config.errors import ConfigError
from megatron_ext.fp8 import Precision
from megatron_ext.models import DeepSeekV3, DeepSeekV3Config, cross_entropy
from megatron_ext.models.memory import layer_memory

CONFIG = DeepSeekV3Config(
    vocab_size=96, hidden_size=64, intermediate_size=160, moe_intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, n_routed_experts=8, num_experts_per_tok=3, kv_lora_rank=32, q_lora_rank=40,
    qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=32, n_shared_experts=2, n_group=1, topk_group=1,
    first_k_dense_replace=1)


def layers_of(model: DeepSeekV3) -> list[torch.nn.Module]:
    return [model.model.embed_tokens, *model.model.layers, model.model.norm, model.lm_head]


def saved_bytes(model: DeepSeekV3, batch: int, length: int) -> int:
    """Of all tensors that autograd keeps for one forward, each storage once, parameters and buffers apart."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    own |= {t.untyped_storage().data_ptr() for block in model.model.layers
            for t in block.self_attn.rotary.tables(length, torch.device("cpu"))}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    tokens = torch.randint(0, 96, (batch, length))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = cross_entropy(model(tokens), tokens)
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("config", [
    CONFIG,
    replace(CONFIG, q_lora_rank=None, n_shared_experts=0, attention_bias=True),
    replace(CONFIG, first_k_dense_replace=3, num_attention_heads=2),
])
def test_parameters_are_those_of_the_model(config):
    with torch.device("meta"):
        model = DeepSeekV3(config)
    memory = layer_memory(config, 1, 16)
    assert [layer.parameters for layer in memory] == [
        sum(p.numel() for p in layer.parameters()) for layer in layers_of(model)]
    routed = [sum(p.numel() for name, p in layer.named_parameters() if "mlp.experts" in name)
              for layer in layers_of(model)]
    assert [layer.routed for layer in memory] == routed
    assert [layer.parameters_of_rank(4) for layer in memory] == [
        layer.parameters - held * 3 // 4 for layer, held in zip(memory, routed, strict=True)]


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("config", [
    CONFIG,
    replace(CONFIG, q_lora_rank=None, n_shared_experts=0),
    replace(CONFIG, first_k_dense_replace=3),
    replace(CONFIG, hidden_size=128, moe_intermediate_size=128, num_experts_per_tok=5),
])
def test_activations_are_what_autograd_keeps(config, fp8):
    torch.manual_seed(0)
    model = DeepSeekV3(config).train()
    model.set_precision(Precision(fp8=fp8))
    expected = sum(layer.activation for layer in layer_memory(config, 2, 48, dtype_bytes=4, fp8=fp8))
    # The rotary part of the latent is kept along with it; indices are not seen; scales are for 128 numbers or fewer.
    assert saved_bytes(model, 2, 48) == pytest.approx(expected, rel=0.03)


def test_activations_grow_with_the_micro_batch():
    small, large = layer_memory(CONFIG, 1, 64), layer_memory(CONFIG, 4, 64)
    assert [layer.activation for layer in large] == pytest.approx([4 * layer.activation for layer in small], abs=4)
    with pytest.raises(ConfigError, match="micro_batch_size = 0: must be at least 1"):
        layer_memory(CONFIG, 0, 64)
