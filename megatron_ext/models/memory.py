"""What a layer of a DeepSeek-V2 or V3 holds: parameters, and the bytes that its forward keeps for the backward.

Activations are counted tensor by tensor as the layers of this package save them (layers/*.py, fp8/*.py), with attention
that keeps queries, keys, values, its output and one number per query and head (flash attention). Per token of a block,
with s bytes a number, q bytes a number that a matrix product keeps (s, or 33/32 in FP8: one byte and an FP32 scale for
128), and a bytes for each inner number of a feed-forward network (4 s: gate, silu(gate), up and their product; in FP8
2 q: gate and up):

    norm          s h + 4                             each: its input and 1 / rms
    latents       q h + (s + q)(r_q + r_kv) + 8       one copy of h for both; r_q = 0 without a query latent
    attention     s H (2 D + D_nope + 2 V) + 4 H      queries, keys, the up-projected latent, the output
    output        q H V                               a copy of what attention keeps by heads; 49/32 for q in FP8: E5M6
    dense         q h + a I
    experts       s h + 4E + 2 k q h + a k I_m        router, scores, rows going out and coming back
    shared        a I_s + q h in FP8

Letters: B batch, T positions, h hidden, H heads, D dimensions of a query or key, V of a value, r ranks of the latents,
I inner widths, E experts, k of them for a token.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ext.config.errors import ConfigError
from megatron_ext.layers.block import is_moe_layer
from megatron_ext.models.config import DeepSeekV3Config


@dataclass(frozen=True)
class LayerMemory:
    """Of one layer of `deepseek_v3(config)`.

    Attributes:
        parameters: numbers, those of all routed experts among them.
        routed: how many of these belong to routed experts, which expert parallelism spreads.
        activation: bytes kept from a forward to its backward, of one micro-batch.
    """

    parameters: int
    routed: int
    activation: int

    def parameters_of_rank(self, expert_parallel: int = 1) -> int:
        """Numbers on each rank where `expert_parallel` ranks share the experts."""
        return self.parameters - self.routed + self.routed // expert_parallel


def layer_memory(
    config: DeepSeekV3Config, micro_batch_size: int, sequence_length: int, *, dtype_bytes: int = 2, fp8: bool = False
) -> list[LayerMemory]:
    """Of every layer: embedding, blocks, final norm, head with the loss. Experts are assumed to be in balance.

    Args:
        config: the model.
        micro_batch_size: B.
        sequence_length: T.
        dtype_bytes: s, of the model's dtype: 2 or 4.
        fp8: whether the products of the blocks keep their inputs in FP8.

    Raises:
        ConfigError: a size below 1.
    """
    for name, value in (("micro_batch_size", micro_batch_size), ("sequence_length", sequence_length)):
        if value < 1:
            raise ConfigError(name, value, "must be at least 1")
    tokens, h, s = micro_batch_size * sequence_length, config.hidden_size, dtype_bytes
    kept = 33 / 32 if fp8 else s
    norm = s * h + 4
    layers = [LayerMemory(config.vocab_size * h, 0, 8 * tokens)]
    for index in range(config.num_hidden_layers):
        moe = is_moe_layer(config, index)
        per_token = 2 * norm + _attention(config, s, kept, 49 / 32 if fp8 else s)
        inner = 2 * kept if fp8 else 4 * s
        per_token += _experts(config, s, kept, inner, fp8) if moe else kept * h + inner * config.intermediate_size
        if config.hidden_dropout:
            per_token += 2 * h  # masks
        routed = 3 * h * config.moe_intermediate_size * config.n_routed_experts if moe else 0
        parameters = 2 * h + _attention_parameters(config) + routed
        if moe:
            shared = config.n_shared_experts * config.moe_intermediate_size
            parameters += config.n_routed_experts * h + 3 * h * shared
        else:
            parameters += 3 * h * config.intermediate_size
        layers.append(LayerMemory(parameters, routed, round(tokens * per_token)))
    layers.append(LayerMemory(h, 0, tokens * norm))
    # The head keeps its input, the loss the logarithms of the probabilities in FP32, labels and weights.
    layers.append(LayerMemory(config.vocab_size * h, 0, tokens * (s * h + 4 * config.vocab_size + 16)))
    return layers


def _attention(config: DeepSeekV3Config, s: int, kept: float, output: float) -> float:
    heads, value = config.num_attention_heads, config.v_head_dim
    width = config.qk_nope_head_dim + config.qk_rope_head_dim
    latents = config.kv_lora_rank + (config.q_lora_rank or 0)
    norms = 4 * (2 if config.q_lora_rank else 1)
    attention = s * heads * (2 * width + config.qk_nope_head_dim + 2 * value) + 4 * heads
    return kept * config.hidden_size + (s + kept) * latents + norms + attention + output * heads * value


def _experts(config: DeepSeekV3Config, s: int, kept: float, inner: float, fp8: bool) -> float:
    h, k = config.hidden_size, config.num_experts_per_tok
    shared = config.n_shared_experts * config.moe_intermediate_size
    routing = 4 * config.n_routed_experts + 32 * k + 4  # scores; indices, permutations and weights of the chosen
    rows = k * (2 * kept * h + inner * config.moe_intermediate_size)
    return s * h + routing + rows + inner * shared + (kept * h if fp8 and shared else 0)


def _attention_parameters(config: DeepSeekV3Config) -> int:
    h, heads, value = config.hidden_size, config.num_attention_heads, config.v_head_dim
    nope, rope, latent, bias = (
        config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank, int(config.attention_bias))
    if config.q_lora_rank is None:
        queries = h * heads * (nope + rope)
    else:
        queries = config.q_lora_rank * (h + bias + 1 + heads * (nope + rope))
    latents = (h + bias) * (latent + rope) + latent
    return queries + latents + latent * heads * (nope + value) + (heads * value + bias) * h
