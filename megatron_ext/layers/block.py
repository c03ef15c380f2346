"""One transformer block of DeepSeek-V2 or V3: latent attention, then a dense feed-forward network or experts.

Letters: B batch, T positions, h hidden.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ext.comm.dispatch import Dispatcher
from megatron_ext.fp8 import Precision
from megatron_ext.layers.attention import LatentAttention
from megatron_ext.layers.mlp import MLP
from megatron_ext.layers.moe import MoE
from megatron_ext.layers.norm import RMSNorm
from megatron_ext.layers.phases import Exchange, Passage, Phase, whole
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
        self.hidden_size, self.dropout = config.hidden_size, config.hidden_dropout
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

    @property
    def dispatcher(self) -> Dispatcher | None:
        """How tokens travel to the experts; None in a dense block."""
        return self.mlp.dispatcher if isinstance(self.mlp, MoE) else None

    @property
    def expert_width(self) -> int:
        """I of the routed experts."""
        assert isinstance(self.mlp, MoE)
        return self.mlp.experts.intermediate_size

    def choose(self, scores: Tensor) -> Tensor:
        """[N, E] scores -> [N, k] experts, as the router chooses."""
        assert isinstance(self.mlp, MoE)
        return self.mlp.gate.choose(scores)

    def set_dispatch(self, **changes: Any) -> None:
        """Changes settings of the dispatcher: `chunks`, `two_hop`, `traffic`. Nothing to do in a dense block."""
        if isinstance(self.mlp, MoE):
            self.mlp.dispatcher = replace(self.mlp.dispatcher, **changes)

    def phases(self, chunks: int | None = None) -> list[Phase | Exchange]:
        """The block as layers/phases.py has it; over [B, T, h] in the dtype of x, tokens flat [B T, h].

        attention (with the router), dispatch, mlp per chunk of experts, combine, sum; a dense block: attention, mlp.

        Args:
            chunks: of experts; by default as many as the dispatcher has.
        """
        if isinstance(self.mlp, MLP):
            return [Phase("attention", ("x",), ("residual",), self._attention),
                    Phase("mlp", ("residual",), ("x",), self._dense)]
        return [Phase("attention", ("x",), ("residual", "tokens", "weights", "experts"), self._route),
                *self.mlp.phases(chunks),
                Phase("sum", ("residual", *self.mlp.outputs), ("x",), self._sum)]

    def _attention(self, _: Passage, x: Tensor) -> Tensor:
        return x + self._dropped(self.self_attn(self.input_layernorm.quantized(x, self.self_attn.precision)))

    def _dense(self, _: Passage, residual: Tensor) -> Tensor:
        normed = self.post_attention_layernorm.quantized(residual, self.mlp.precision)
        return residual + self._dropped(self.mlp(normed))

    def _route(self, passage: Passage, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        residual = self._attention(passage, x)
        return residual, *self.mlp.route(self.post_attention_layernorm(residual).flatten(0, -2))

    def _sum(self, _: Passage, residual: Tensor, mixed: Tensor, shared: Tensor | None = None) -> Tensor:
        out = mixed if shared is None else mixed + shared
        return residual + self._dropped(out.view_as(residual))

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, h] -> [B, T, h], in the dtype of x."""
        return whole(self.phases(chunks=1), x)
