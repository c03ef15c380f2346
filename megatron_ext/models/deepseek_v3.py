"""DeepSeek-V2 and V3 out of our layers: as a list for the pipeline, and as one module for one process.

Both are made from the same list: embedding, blocks, final norm, head. Layer i is built after seeding with s + i, where
s is the base seed of the pipeline module, or `torch.initial_seed()` here: a model has the same weights in either form.

Letters: B batch, T positions, h hidden, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megatron_ext.fp8 import Precision
from megatron_ext.layers.block import TransformerBlock
from megatron_ext.layers.embedding import Embedding
from megatron_ext.layers.head import FinalNorm, Head, tied_logits
from megatron_ext.layers.router import Router
from megatron_ext.models import huggingface
from megatron_ext.models.config import DeepSeekV3Config
from megatron_ext.parallel.expert_parallel import ExpertParallel

if TYPE_CHECKING:
    from deepspeed.pipe import LayerSpec


def _recipes(config: DeepSeekV3Config) -> list[tuple[type[nn.Module], tuple[Any, ...]]]:
    """Class and arguments of every layer, first to last."""
    blocks = [(TransformerBlock, (config, index)) for index in range(config.num_hidden_layers)]
    return [(Embedding, (config,)), *blocks, (FinalNorm, (config,)), (Head, (config,))]


def deepseek_v3(config: DeepSeekV3Config) -> list[LayerSpec]:
    """The model as the layers of a `PipelineModule`: tokens [B, T] int64 in, logits [B, T, V] out.

    With `tie_word_embeddings` the first and the last are one `TiedLayerSpec` named `embed_tokens`.
    """
    from deepspeed.pipe import LayerSpec, TiedLayerSpec

    specs = [LayerSpec(layer, *arguments) for layer, arguments in _recipes(config)]
    if config.tie_word_embeddings:
        specs[0] = TiedLayerSpec("embed_tokens", Embedding, config, tied_weight_attr="weight")
        specs[-1] = TiedLayerSpec("embed_tokens", Embedding, config, tied_weight_attr="weight", forward_fn=tied_logits)
    return specs


class DeepSeekV3(nn.Module):
    """The model in one process, all experts included. Parameters have Hugging Face's names, experts stacked.

    The weights depend on `torch.initial_seed()` alone and leave the random state as it was: two models built after one
    `torch.manual_seed` are equal.

    Args:
        config: the model's settings; V2's too.
    """

    def __init__(self, config: DeepSeekV3Config):
        super().__init__()
        self.config = config
        *trunk, head = enumerate(_recipes(config))
        self.model = _Trunk([_build(index, *recipe) for index, recipe in trunk])
        if not config.tie_word_embeddings:
            self.lm_head = _build(head[0], *head[1])

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] int64 -> logits [B, T, V] in the dtype of the weights."""
        x = self.model(tokens)
        return tied_logits(self.model.embed_tokens, x) if self.config.tie_word_embeddings else self.lm_head(x)

    def set_precision(self, precision: Precision) -> None:
        """FP8 or the model's dtype for all linears of the blocks; embedding, norms, router, head stay as they are."""
        for block in self.model.layers:
            block.set_precision(precision)  # type: ignore[operator]

    @classmethod
    def load_hf(cls, directory: str | Path, dtype: torch.dtype | None = None) -> DeepSeekV3:
        """Builds the model from a Hugging Face folder: `config.json` and safetensors in BF16 or FP32, whole or sharded.

        All names, shapes and formats are checked before anything is read; tensors are then copied one at a time. The
        router's bias stays FP32. Layers of multi-token prediction are passed over.

        Args:
            directory: the folder.
            dtype: of the parameters; by default that of the embedding on disk.

        Raises:
            ConfigError: see `DeepSeekV3Config.from_hf`.
            CheckpointError: for a file or a tensor that is missing, damaged, unexpected, or of another shape or format.
        """
        config = DeepSeekV3Config.from_hf(Path(directory))
        listing = huggingface.list_tensors(Path(directory))
        with torch.device("meta"):
            model = cls(config)
        listing = huggingface.check(model, listing)
        _allocate(model.to(dtype or listing.dtype("model.embed_tokens.weight")))
        huggingface.load(model, listing)
        return model

    def save_hf(self, directory: str | Path) -> None:
        """Writes the folder that `load_hf` and Hugging Face read, experts one by one.

        Raises:
            CheckpointError: if the folder already holds safetensors.
        """
        dtype = str(self.model.embed_tokens.weight.dtype).removeprefix("torch.")
        huggingface.save(self, self.config.to_hf() | {"torch_dtype": dtype}, Path(directory))


class _Trunk(nn.Module):
    """All layers but the head, which Hugging Face calls `model`: tokens [B, T] -> normed hidden [B, T, h]."""

    def __init__(self, layers: list[Any]):
        super().__init__()
        embed_tokens, *blocks, norm = layers
        self.embed_tokens: Embedding = embed_tokens
        self.layers = nn.ModuleList(blocks)
        self.norm: FinalNorm = norm

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for block in self.layers:
            x = block(x)
        return self.norm(x)


def _build(index: int, layer: type[nn.Module], arguments: tuple[Any, ...]) -> nn.Module:
    """Layer `index` of the model, drawn from its own seed. The CPU's random state is left as it was."""
    generator = torch.default_generator
    state, seed = generator.get_state(), generator.initial_seed()
    try:
        generator.manual_seed(seed + index)
        built = layer(*arguments)
        if isinstance(built, TransformerBlock):
            built.set_expert_parallel(ExpertParallel.single())
        return built
    finally:
        generator.set_state(state)


def _allocate(model: DeepSeekV3) -> None:
    """Gives a model on the meta device memory on the default device: unset numbers, all of which a file is to fill."""
    marks = {name: vars(p) for name, p in model.named_parameters()}
    model.to_empty(device=torch.get_default_device())
    for name, p in model.named_parameters():
        vars(p).update(marks[name])  # what experts say of themselves; torch has made new parameters
    for module in model.modules():
        if isinstance(module, Router):
            module.tokens_per_expert.zero_()  # the one buffer that no file holds
