"""The layers of DeepSeek-V2 and V3: latent attention, router and experts, norms, and the block made of them."""

from megatron_ext.layers.attention import LatentAttention
from megatron_ext.layers.balancing import update_biases
from megatron_ext.layers.block import TransformerBlock
from megatron_ext.layers.embedding import Embedding
from megatron_ext.layers.head import FinalNorm, Head, tied_logits
from megatron_ext.layers.linear import Linear, PrecisionLinear
from megatron_ext.layers.mlp import MLP
from megatron_ext.layers.moe import MoE
from megatron_ext.layers.norm import RMSNorm
from megatron_ext.layers.rope import RotaryEmbedding, YarnScaling
from megatron_ext.layers.router import Router

__all__ = [
    "Embedding", "FinalNorm", "Head", "LatentAttention", "Linear", "MLP", "MoE", "PrecisionLinear", "RMSNorm",
    "RotaryEmbedding", "Router", "TransformerBlock", "YarnScaling", "tied_logits", "update_biases",
]
