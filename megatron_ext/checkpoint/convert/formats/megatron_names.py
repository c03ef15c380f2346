"""What Megatron-Core calls the tensors of DeepSeek's models (GPTModel with multi-latent attention and experts).

A tensor of Megatron-Core is canonical tensors one below the other: gate above up in `linear_fc1`, else a single one.
Its name has a prefix for the layer and one of `_LAYER` within it. Two layer specs differ in where three norms are:
TransformerEngine's holds a norm with the matrix after it ("te", what people train with), Megatron's own does not
("local"). Both are read, whichever comes. Nothing is permuted: Megatron-Core takes rotary pairs as DeepSeek has them.

Layers of multi-token prediction have a block each, and share the model's embedding and head.

Shape letters as in names.py. TP is tensor parallelism: matrices are cut along one dimension, in equal parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from megatron_ext.checkpoint.convert import names
from megatron_ext.checkpoint.convert.formats.layout import Layout, Options
from megatron_ext.checkpoint.convert.model import Model
from megatron_ext.checkpoint.convert.tensors import Entry, Part, Shape, whole
from megatron_ext.config.errors import CheckpointError

SPECS = ("te", "local")
EMBEDDING, HEAD, NORM = "embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight"
VOCABULARY = frozenset((EMBEDDING, HEAD))
"""Tensors whose rows are padded."""
EXPERTS = "mlp.experts."
_EXTRA = re.compile(r"(?:.*\.)?_extra_state\d*(?:/shard_[\d.]+_[\d.]+)?")


class Line(NamedTuple):
    """A tensor within a layer.

    Attributes:
        rows: lines of the canonical table that it consists of, one below the other; `*` for the expert.
        dim: dimension that TP cuts; None if every rank has the whole.
        spec: the layer spec that has it; "" for both.
    """

    rows: tuple[str, ...]
    dim: int | None = None
    spec: str = ""


_LAYER: dict[str, Line] = {
    "input_layernorm.weight": Line(("input_layernorm.weight",)),
    "self_attention.linear_q_proj.weight": Line(("self_attn.q_proj.weight",), 0),
    "self_attention.linear_q_down_proj.weight": Line(("self_attn.q_a_proj.weight",), 0),
    "self_attention.linear_q_up_proj.layer_norm_weight": Line(("self_attn.q_a_layernorm.weight",), None, "te"),
    "self_attention.q_layernorm.weight": Line(("self_attn.q_a_layernorm.weight",), None, "local"),
    "self_attention.linear_q_up_proj.weight": Line(("self_attn.q_b_proj.weight",), 0),
    "self_attention.linear_kv_down_proj.weight": Line(("self_attn.kv_a_proj_with_mqa.weight",), 0),
    "self_attention.linear_kv_up_proj.layer_norm_weight": Line(("self_attn.kv_a_layernorm.weight",), None, "te"),
    "self_attention.kv_layernorm.weight": Line(("self_attn.kv_a_layernorm.weight",), None, "local"),
    "self_attention.linear_kv_up_proj.weight": Line(("self_attn.kv_b_proj.weight",), 0),
    "self_attention.linear_proj.weight": Line(("self_attn.o_proj.weight",), 1),
    "pre_mlp_layernorm.weight": Line(("post_attention_layernorm.weight",)),
    "mlp.linear_fc1.layer_norm_weight": Line(("post_attention_layernorm.weight",), None, "te"),
    "mlp.linear_fc1.weight": Line(("mlp.gate_proj.weight", "mlp.up_proj.weight"), 0),
    "mlp.linear_fc2.weight": Line(("mlp.down_proj.weight",), 1),
    "mlp.router.weight": Line(("mlp.gate.weight",)),
    "mlp.router.expert_bias": Line(("mlp.gate.e_score_correction_bias",)),
    "mlp.experts.linear_fc1.weight": Line(("mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"), 0),
    "mlp.experts.linear_fc2.weight": Line(("mlp.experts.*.down_proj.weight",), 1),
    "mlp.shared_experts.linear_fc1.weight": Line(
        ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"), 0),
    "mlp.shared_experts.linear_fc2.weight": Line(("mlp.shared_experts.down_proj.weight",), 1),
}
_MTP: dict[str, Line] = {
    "enorm.weight": Line(("enorm.weight",)),
    "hnorm.weight": Line(("hnorm.weight",)),
    "eh_proj.weight": Line(("eh_proj.weight",), 0),
    "final_layernorm.weight": Line(("shared_head.norm.weight",)),
}
_OUTSIDE: dict[str, Line] = {
    EMBEDDING: Line((names.EMBEDDING,), 0), NORM: Line(("model.norm.weight",)), HEAD: Line((names.HEAD,), 0)}
_WHOLE_IN_TE = frozenset(("self_attention.linear_q_down_proj.weight", "self_attention.linear_kv_down_proj.weight"))
"""Cut by TP in the local spec only."""
_BLOCK = re.compile(r"decoder\.layers\.(\d{1,6})\.(.+)|"
                    r"mtp\.layers\.(\d{1,6})\.((?:transformer_layer|mtp_model_layer)\.)?(.+)")


class Tensor(NamedTuple):
    """A tensor of Megatron-Core's model, of one expert where it is of experts.

    Attributes:
        key: within its layer or the whole name; of experts without their number.
        canonical: names of the canonical tensors that it consists of, one below the other.
        shape: of each of them.
        dim: dimension that TP cuts, or None.
        layer: of the whole model, those of multi-token prediction behind the others; None outside.
        expert: its number.
    """

    key: str
    canonical: tuple[str, ...]
    shape: Shape
    dim: int | None
    layer: int | None = None
    expert: int | None = None


def is_extra(key: str) -> bool:
    """Whether a key is one of TransformerEngine's records of FP8 scaling factors, which no weights are in."""
    return _EXTRA.fullmatch(key) is not None


def unknown(name: str, shape: Shape) -> Part:
    """What a tensor of a name that means nothing here is said to hold: a canonical tensor that no model has."""
    return Part(f"megatron:{name.removeprefix('decoder.layers.')}", whole(shape), whole(shape))


class Place(NamedTuple):
    """Where in a model a name is.

    Attributes:
        part: "decoder" or "mtp"; "" outside layers.
        layer: as the name says it, so of its part and its pipeline stage.
        key: within the layer, or the whole name.
    """

    part: str
    layer: int
    key: str


def place(name: str) -> Place:
    """Splits a name into layer and key."""
    match = _BLOCK.fullmatch(name)
    if match is None:
        return Place("", 0, name)
    if match[1] is not None:
        return Place("decoder", int(match[1]), match[2])
    # A block's keys and those around it never coincide, so that they need no prefix to be told apart.
    known = match[5] in _MTP if match[4] is None else match[5] not in _MTP
    return Place("mtp", int(match[3]), match[5] if known else f"{match[4] or ''}{match[5]}?")


def prefix(model: Model, layer: int, key: str, first: int = 0) -> str:
    """The name of a key of a layer, whose pipeline stage begins with layer `first` of the model."""
    mtp = model.mtp_index(layer)
    if mtp is None:
        return f"decoder.layers.{layer - first}.{key}"
    return f"mtp.layers.{mtp}.{key}" if key in _MTP else f"mtp.layers.{mtp}.transformer_layer.{key}"


def outside(model: Model, key: str) -> Tensor | None:
    """The tensor of a name outside layers; None if there is no such one."""
    line = _OUTSIDE.get(key)
    return None if line is None else _tensor(model, line, key, None, None)


def inside(model: Model, layer: int, key: str, expert: int | None = None) -> Tensor | None:
    """The tensor of a key in a layer of the whole model; None if the layer has no such one."""
    line = _MTP.get(key) if model.mtp_index(layer) is not None else None
    line = _LAYER.get(key) if line is None else line
    if line is None or (expert is None) == key.startswith(EXPERTS) or layer >= model.layers:
        return None
    return _tensor(model, line, key, layer, expert)


def _tensor(model: Model, line: Line, key: str, layer: int | None, expert: int | None) -> Tensor | None:
    start = "" if layer is None else f"model.layers.{layer}."
    canonical = tuple(start + row.replace("*", str(expert)) for row in line.rows)
    known = model.table.get(canonical[0])
    return None if known is None else Tensor(key, canonical, known.shape, line.dim, layer, expert)


def _lines(model: Model, layer: int, spec: str) -> Iterator[tuple[str, Line]]:
    """The lines of a layer in a spec, in the order of computation."""
    table: Mapping[str, Line] = {**(_MTP if model.mtp_index(layer) is not None else {}), **_LAYER}
    fused = spec == "te" and not model.is_moe(layer)
    for key, line in table.items():
        other_norm = key == ("pre_mlp_layernorm.weight" if fused else "mlp.linear_fc1.layer_norm_weight")
        expert = 0 if key.startswith(EXPERTS) else None
        if not other_norm and line.spec in ("", spec) and _tensor(model, line, key, layer, expert) is not None:
            yield key, line._replace(dim=None) if spec == "te" and key in _WHOLE_IN_TE else line


def of_layer(model: Model, layer: int, spec: str) -> Iterator[Tensor]:
    """The tensors of a layer in a spec, in the order of computation; of experts expert by expert."""
    for key, line in _lines(model, layer, spec):
        for expert in range(model.config.n_routed_experts) if key.startswith(EXPERTS) else (None,):
            tensor = _tensor(model, line, key, layer, expert)
            assert tensor is not None, key
            yield tensor


def extras(model: Model, layer: int, spec: str) -> list[str]:
    """What of a layer has an `_extra_state`; experts without their number.

    All linear layers have one, and TransformerEngine's attention and norms, the latter in its newer versions only. We
    write None for it, which says that it is unused.
    """
    keys = [key.removesuffix(".weight") for key, _ in _lines(model, layer, spec) if key.endswith(".weight")]
    linear = [key for key in keys if ".linear_" in key or key == "eh_proj"]
    if spec == "local":
        return linear
    return [*linear, "self_attention.core_attention", *(key for key in keys if key.endswith("norm"))]


def extra_name(model: Model, layer: int, module: str, first: int = 0) -> str:
    """The name of the `_extra_state` of a module of a layer; see `prefix`."""
    return prefix(model, layer, f"{module}.weight", first).removesuffix("weight") + "_extra_state"


def fill(model: Model, entries: Mapping[str, Entry], layout: Layout) -> Layout:
    """Says of what is not stored why: copies are aliases, what follows from the config is carried.

    Raises:
        CheckpointError: there are biases that Megatron-Core's attention cannot compute with.
    """
    for name in entries:
        row = model.table[names.weight_of(name) or name].row
        if row.optional:
            layout.carried[name] = "computed from the config in Megatron-Core"
        elif row.alias:
            layout.aliases.append(name)
        elif name.endswith(".bias"):
            raise CheckpointError("config.json", f"has attention_bias, so {name}",
                                  "Megatron-Core's multi-latent attention has no such biases")
    layout.implied = implied(model)
    return layout


def implied(model: Model) -> list[str]:
    """Copies that belong to every checkpoint and are not stored: the embedding and head of multi-token prediction."""
    return [name for name, tensor in model.table.items() if tensor.row.alias and tensor.mtp is not None]


def check_spec(options: Options) -> None:
    """Raises CheckpointError for a layer spec that there is not."""
    if options.spec not in SPECS:
        raise CheckpointError("--spec", f"is {options.spec!r}", f"must be one of {', '.join(SPECS)}")


def one_dtype(tensor: Tensor, entries: Mapping[str, Entry]) -> str:
    """The dtype of a tensor that is written.

    Raises:
        CheckpointError: its parts have several.
    """
    dtypes = [entries[name].dtype for name in tensor.canonical]
    if len(set(dtypes)) > 1:
        raise CheckpointError("megatron", f"is {dtypes[1]}, and {tensor.canonical[0]} is {dtypes[0]}",
                              f"{tensor.key} holds both", "choose one with --dtype", tensor=tensor.canonical[1])
    return dtypes[0]
