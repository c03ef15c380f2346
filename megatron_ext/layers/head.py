"""The last two layers: final norm and language-model head. Never quantised.

Letters: B batch, T positions, V vocabulary, h hidden.
"""

from __future__ import annotations

from torch import Tensor, nn

from megatron_ext.layers.embedding import Embedding
from megatron_ext.layers.linear import Linear, linear
from megatron_ext.layers.norm import RMSNorm
from megatron_ext.layers.protocol import LayerConfig


class FinalNorm(RMSNorm):
    """[B, T, h] -> [B, T, h].

    Args:
        config: reads `hidden_size`, `rms_norm_eps`.
    """

    canonical_name = "model.norm"

    def __init__(self, config: LayerConfig):
        super().__init__(config.hidden_size, config.rms_norm_eps)


class Head(Linear):
    """[B, T, h] -> logits [B, T, V] in the dtype of x.

    Args:
        config: reads `vocab_size`, `hidden_size`, `initializer_range`.
    """

    canonical_name = "lm_head"

    def __init__(self, config: LayerConfig):
        self.std = config.initializer_range  # before the parent, whose constructor calls reset_parameters
        super().__init__(config.hidden_size, config.vocab_size, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)


def tied_logits(embedding: Embedding, x: Tensor) -> Tensor:
    """The head of a model whose embedding is also its output matrix: [B, T, h] -> [B, T, V]."""
    return linear(x, embedding.weight)
