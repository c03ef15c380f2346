"""The first layer: token ids to vectors. Never quantised.

Letters: B batch, T positions, V vocabulary, h hidden.
"""

from __future__ import annotations

from torch import Tensor, nn

from megatron_ext.layers.protocol import LayerConfig


class Embedding(nn.Embedding):
    """tokens [B, T] int64 -> [B, T, h] in the dtype of the weight [V, h].

    Args:
        config: reads `vocab_size`, `hidden_size`, `initializer_range`.
    """

    canonical_name = "model.embed_tokens"

    def __init__(self, config: LayerConfig):
        self.std = config.initializer_range  # before the parent, whose constructor calls reset_parameters
        super().__init__(config.vocab_size, config.hidden_size)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens)
