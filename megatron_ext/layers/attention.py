"""Multi-head latent attention (DeepSeek-V2 report, section 2.1).

Keys and values of all heads grow out of one latent vector per token, and one rotary key serves every head. Parameters
are named as in Hugging Face's models.

Letters: B batch, T positions, h hidden, H heads, D = nope + rope dimensions of a query or key, V of a value, R rotary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from megatron_ext import fp8
from megatron_ext.fp8 import Precision, QuantizedInput
from megatron_ext.kernels.matmul import compute_dtype
from megatron_ext.layers.linear import PrecisionLinear
from megatron_ext.layers.norm import RMSNorm
from megatron_ext.layers.protocol import LayerConfig
from megatron_ext.layers.rope import RotaryEmbedding

LATENT_NORM_EPS = 1e-6
"""Of the two inner norms, whatever `rms_norm_eps` says: so in DeepSeek's code and in Hugging Face's."""


class LatentAttention(nn.Module):
    """Causal self-attention over positions 0..T-1.

    Args:
        config: reads the attention's settings of `LayerConfig`.
    """

    def __init__(self, config: LayerConfig):
        super().__init__()
        hidden, heads, std = config.hidden_size, config.num_attention_heads, config.initializer_range
        self.heads, self.nope, self.rope, self.value = (
            heads, config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim)
        self.latent, self.q_lora_rank = config.kv_lora_rank, config.q_lora_rank
        self.dropout = config.attention_dropout
        query_width = heads * (self.nope + self.rope)
        if config.q_lora_rank is None:
            self.q_proj = PrecisionLinear(hidden, query_width, std=std)
        else:
            self.q_a_proj = PrecisionLinear(hidden, config.q_lora_rank, config.attention_bias, std=std)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = PrecisionLinear(config.q_lora_rank, query_width, std=std)
        self.kv_a_proj_with_mqa = PrecisionLinear(hidden, self.latent + self.rope, config.attention_bias, std=std)
        self.kv_a_layernorm = RMSNorm(self.latent, LATENT_NORM_EPS)
        self.kv_b_proj = PrecisionLinear(self.latent, heads * (self.nope + self.value), std=std)
        self.o_proj = PrecisionLinear(heads * self.value, hidden, config.attention_bias, std=std, cache="e5m6")
        self.rotary = RotaryEmbedding(self.rope, config.rope_theta, config.rope_scaling, config.rope_interleave)
        yarn_factor = 1.0 if config.rope_scaling is None else config.rope_scaling.softmax_factor()
        self.softmax_scale = (self.nope + self.rope) ** -0.5 * yarn_factor

    def set_precision(self, precision: Precision) -> None:
        for module in self.children():
            if isinstance(module, PrecisionLinear):
                module.set_precision(precision)

    @property
    def precision(self) -> Precision | None:
        return self.kv_a_proj_with_mqa.precision

    def forward(self, x: Tensor | QuantizedInput) -> Tensor:
        """[B, T, h] -> [B, T, h], in the dtype of x; quantised already only where the precision is FP8."""
        shared = fp8.quantize_input(x, self.precision)
        if self.q_lora_rank is None:
            q = self.q_proj(shared)
        else:
            q = self.q_b_proj(self.q_a_layernorm.quantized(self.q_a_proj(shared), self.precision))
        q_BHTD = rearrange(q, "b t (h d) -> b h t d", h=self.heads)
        q_nope, q_rope = q_BHTD.split((self.nope, self.rope), dim=-1)

        latent, k_rope = self.kv_a_proj_with_mqa(shared).split((self.latent, self.rope), dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm.quantized(latent, self.precision))
        k_nope, v_BHTV = rearrange(kv, "b t (h d) -> b h t d", h=self.heads).split((self.nope, self.value), dim=-1)

        k_rope_BHTR = self.rotary(rearrange(k_rope, "b t d -> b 1 t d")).expand(-1, self.heads, -1, -1)
        q_BHTD = torch.cat((q_nope, self.rotary(q_rope)), dim=-1)
        k_BHTD = torch.cat((k_nope, k_rope_BHTR), dim=-1)

        dtype = compute_dtype(q)
        y_BHTV = F.scaled_dot_product_attention(
            q_BHTD.to(dtype), k_BHTD.to(dtype), v_BHTV.to(dtype), is_causal=True, scale=self.softmax_scale,
            dropout_p=self.dropout if self.training else 0.0).to(q.dtype)
        return self.o_proj(rearrange(y_BHTV, "b h t d -> b t (h d)"))
