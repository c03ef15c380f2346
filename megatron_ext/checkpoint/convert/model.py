"""The canonical model: which tensors a checkpoint of a config must hold, and their shapes.

Everything follows from `config.json`: which layers are dense, have experts, or predict further tokens, whether queries
are compressed, whether the head is tied. Only what decides names and shapes is read, so a model that we cannot build
(another rotary scaling, say) can still be converted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from megatron_ext.checkpoint.convert import names
from megatron_ext.checkpoint.convert.names import Canonical, Row
from megatron_ext.config.errors import CheckpointError, ConfigError, shown
from megatron_ext.models import DeepSeekV3Config

MAX_TENSORS = 500_000
"""More than any model has; a config that asks for more is damaged, and its table is never built."""
_MAX_SIZE = 1 << 40
_UNREAD = {"rope_scaling", "rope_theta", "norm_topk_prob", "max_position_embeddings", "hidden_dropout"}


@dataclass(frozen=True)
class Model:
    """A DeepSeek-V2 or V3 model as a checkpoint sees it.

    Attributes:
        config: sizes and families.
        mtp_layers: layers of multi-token prediction after the model's own.
        hf: the content of `config.json`, every key of it.
    """

    config: DeepSeekV3Config
    mtp_layers: int
    hf: Mapping[str, Any]

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], path: object = "config.json") -> Model:
        """Reads the content of a `config.json`.

        Raises:
            CheckpointError: it is not of DeepSeek-V2 or V3, or a size makes no sense.
        """
        read = {field.name for field in fields(DeepSeekV3Config)} - _UNREAD | {"model_type", "num_key_value_heads"}
        try:
            for key in read:
                if isinstance(values.get(key), int) and abs(values[key]) > _MAX_SIZE:
                    raise ConfigError(key, values[key], "is no size of a model")
            config = DeepSeekV3Config.from_hf({key: values[key] for key in read if key in values})
        except ConfigError as error:
            raise CheckpointError(str(path), f"has {error}") from error
        mtp = values.get("num_nextn_predict_layers", values.get("num_mtp_layers")) or 0
        if type(mtp) is not int or not 0 <= mtp <= 64:
            raise CheckpointError(str(path), f"has num_nextn_predict_layers = {shown(mtp)}",
                                  "must be a small count of layers")
        model = cls(config, mtp, values)
        count = (config.num_hidden_layers + mtp) * (config.n_routed_experts * 3 + 16)
        if count > MAX_TENSORS:
            raise CheckpointError(str(path), f"asks for {count} tensors", f"more than {MAX_TENSORS} are not read")
        return model

    @property
    def layers(self) -> int:
        """Of the model and of multi-token prediction."""
        return self.config.num_hidden_layers + self.mtp_layers

    def is_moe(self, layer: int) -> bool:
        """Whether a layer has experts (DeepSeek's rule; with `moe_layer_freq` 1 it is Hugging Face's too)."""
        return layer >= self.config.first_k_dense_replace and layer % self.config.moe_layer_freq == 0

    def mtp_index(self, layer: int) -> int | None:
        """The number of a layer among those of multi-token prediction, or None."""
        return layer - self.config.num_hidden_layers if layer >= self.config.num_hidden_layers else None

    def rows(self, layer: int) -> Iterator[Row]:
        """The lines of the table that a layer has, in the order of its computation."""
        mtp = layer >= self.config.num_hidden_layers
        parts = (names.MTP_FIRST if mtp else (), names.ATTENTION, names.MOE if self.is_moe(layer) else names.DENSE,
                 names.MTP_LAST if mtp else ())
        return (row for part in parts for row in part if self._holds(row))

    @cached_property
    def table(self) -> dict[str, Canonical]:
        """Name -> tensor, for all that a checkpoint of this model may hold; aliases and optional ones included."""
        tensors = [Canonical(row.name, self.shape(row), row) for row in names.FIRST if self._holds(row)]
        for layer in range(self.layers):
            tensors += self._layer(layer)
        tensors += [Canonical(row.name, self.shape(row), row) for row in names.LAST if self._holds(row)]
        return {tensor.name: tensor for tensor in tensors}

    def _layer(self, layer: int) -> Iterator[Canonical]:
        prefix, mtp, pending = f"model.layers.{layer}.", self.mtp_index(layer), []
        for row in self.rows(layer):
            if "*" in row.name:
                pending.append(row)
                continue
            yield from self._experts(layer, pending)
            pending = []
            yield Canonical(prefix + row.name, self.shape(row), row, layer, mtp=mtp)
        yield from self._experts(layer, pending)

    def _experts(self, layer: int, rows: list[Row]) -> Iterator[Canonical]:
        """Expert by expert, as the releases order them."""
        prefix, mtp = f"model.layers.{layer}.", self.mtp_index(layer)
        shapes = [(row, self.shape(row)) for row in rows]
        for expert in range(self.config.n_routed_experts if rows else 0):
            for row, shape in shapes:
                yield Canonical(prefix + row.name.replace("*", str(expert)), shape, row, layer, expert, mtp)

    def shape(self, row: Row) -> tuple[int, ...]:
        """The whole shape of a line of the table."""
        return tuple(self._sizes[letter] for letter in row.shape.split())

    @cached_property
    def _sizes(self) -> dict[str, int]:
        c = self.config
        heads, rope = c.num_attention_heads, c.qk_rope_head_dim
        return {
            "V": c.vocab_size, "h": c.hidden_size, "2h": 2 * c.hidden_size, "I": c.intermediate_size,
            "M": c.moe_intermediate_size, "S": c.n_shared_experts * c.moe_intermediate_size, "E": c.n_routed_experts,
            "q": c.q_lora_rank or 0, "c": c.kv_lora_rank, "Q": heads * (c.qk_nope_head_dim + rope),
            "A": c.kv_lora_rank + rope, "B": heads * (c.qk_nope_head_dim + c.v_head_dim), "O": heads * c.v_head_dim,
            "r": rope // 2,
        }

    @cached_property
    def _conditions(self) -> dict[str, bool]:
        c = self.config
        lora = c.q_lora_rank is not None
        return {
            "": True, "tied": c.tie_word_embeddings, "untied": not c.tie_word_embeddings, "full_query": not lora,
            "query_lora": lora, "query_lora_bias": lora and c.attention_bias, "attention_bias": c.attention_bias,
            "shared": c.n_shared_experts > 0, "bias": c.topk_method == "noaux_tc",
        }

    def _holds(self, row: Row) -> bool:
        return self._conditions[row.when]

    def config_bytes(self, changes: Mapping[str, Any]) -> bytes:
        """`config.json` with some keys changed, or left out where the new value is None; the others as they were."""
        values = {**self.hf, **changes}
        values = {key: value for key, value in values.items() if value is not None or key not in changes}
        return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
