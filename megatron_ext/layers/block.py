"""One transformer block of DeepSeek-V2 or V3: latent attention, then a dense feed-forward network or experts.

Letters: B batch, T positions, h hidden.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ext.fp8 import Precision
from megatron_ext.layers.attention import LatentAttention
from megatron_ext.layers.mlp import MLP
from megatron_ext.layers.moe import MoE
from megatron_ext.layers.norm import RMSNorm
from megatron_ext.layers.protocol import LayerConfig
from megatron_ext.parallel.expert_parallel import ExpertParallel


def is_moe_layer(config: LayerConfig, layer_index: int) -> bool:
    """Whether block `layer_index`, counted from 0, has experts."""
    return layer_index >= config.first_k_dense_replace and layer_index % config.moe_layer_freq == 0


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); `mlp` is an `MLP` or a `MoE`.

    `set_expert_parallel` must be called once after construction: it allocates the experts.

    Args:
        config: the model's settings.
        layer_index: number of the block in the model, from 0.
    """

    def __init__(self, config: LayerConfig, layer_index: int):
        super().__init__()
        self.canonical_name = f"model.layers.{layer_index}"
        self.dropout = config.hidden_dropout
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LatentAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: MLP | MoE = MoE(config, layer_index) if is_moe_layer(config, layer_index) else MLP(config)

    def set_expert_parallel(self, expert_parallel: ExpertParallel) -> None:
        """Says which experts live here, and allocates them. Nothing to do in a dense block."""
        if isinstance(self.mlp, MoE):
            self.mlp.set_expert_parallel(expert_parallel)

    def set_precision(self, precision: Precision) -> None:
        """FP8 or the model's dtype for the linears of attention and feed-forward; norms and router stay as they are."""
        self.self_attn.set_precision(precision)
        self.mlp.set_precision(precision)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, h] -> [B, T, h], in the dtype of x."""
        x = x + F.dropout(self.self_attn(self.input_layernorm(x)), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), self.dropout, self.training)
