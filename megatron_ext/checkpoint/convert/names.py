"""The one table of names: every tensor of a DeepSeek-V2 or V3 checkpoint, as Hugging Face names it on disk.

Each format has a table from these names to its own, and none knows another. A row is named by what follows
`model.layers.<i>.` (with `experts.*` for every expert) or by the whole name outside layers; formats map rows.

Shape letters: V vocabulary, h hidden, I dense and M expert intermediate, S shared experts' intermediate, E experts,
q and c ranks of the query's and the keys' and values' compression, Q = heads * (nope + rope), A = c + rope,
B = heads * (nope + v), O = heads * v, r = rope / 2; `2h` is two hidden sizes side by side.

Layers L .. L+k-1 after the model's own are those of multi-token prediction (DeepSeek-V3, section 2.2): a block, its
two norms and projection, and `embed_tokens` and `shared_head.head`, which are copies of the model's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

SCALE = "_scale_inv"
"""What follows the name of an FP8 weight in the name of its scales."""
STATES = ("fp32", "exp_avg", "exp_avg_sq", "ema")
"""Further tensors of a weight's shape, named `<weight>@<state>`: FP32 master weights, AdamW's moments, the average."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        name: within its layer, or the whole name.
        shape: shape letters.
        quantised: held in FP8 by DeepSeek's own releases.
        fp32: never anything but FP32, whatever the dtype of the checkpoint.
        when: the condition on the model; "" for always (conditions are in model.py).
        alias: the tensor that this one only repeats, if a checkpoint holds it at all.
        optional: computed from the config; old files hold it.
    """

    name: str
    shape: str
    quantised: bool = False
    fp32: bool = False
    when: str = ""
    alias: str | None = None
    optional: bool = False


FIRST = (Row(EMBEDDING, "V h"),)
LAST = (Row("model.norm.weight", "h"), Row(HEAD, "V h", when="untied"), Row(HEAD, "V h", when="tied", alias=EMBEDDING))

ATTENTION = (
    Row("input_layernorm.weight", "h"),
    Row("self_attn.q_proj.weight", "Q h", quantised=True, when="full_query"),
    Row("self_attn.q_a_proj.weight", "q h", quantised=True, when="query_lora"),
    Row("self_attn.q_a_proj.bias", "q", when="query_lora_bias"),
    Row("self_attn.q_a_layernorm.weight", "q", when="query_lora"),
    Row("self_attn.q_b_proj.weight", "Q q", quantised=True, when="query_lora"),
    Row("self_attn.kv_a_proj_with_mqa.weight", "A h", quantised=True),
    Row("self_attn.kv_a_proj_with_mqa.bias", "A", when="attention_bias"),
    Row("self_attn.kv_a_layernorm.weight", "c"),
    Row("self_attn.kv_b_proj.weight", "B c", quantised=True),
    Row("self_attn.o_proj.weight", "h O", quantised=True),
    Row("self_attn.o_proj.bias", "h", when="attention_bias"),
    Row("self_attn.rotary_emb.inv_freq", "r", optional=True),
    Row("post_attention_layernorm.weight", "h"),
)
DENSE = (
    Row("mlp.gate_proj.weight", "I h", quantised=True),
    Row("mlp.up_proj.weight", "I h", quantised=True),
    Row("mlp.down_proj.weight", "h I", quantised=True),
)
MOE = (
    Row("mlp.gate.weight", "E h"),
    Row("mlp.gate.e_score_correction_bias", "E", fp32=True, when="bias"),
    Row("mlp.shared_experts.gate_proj.weight", "S h", quantised=True, when="shared"),
    Row("mlp.shared_experts.up_proj.weight", "S h", quantised=True, when="shared"),
    Row("mlp.shared_experts.down_proj.weight", "h S", quantised=True, when="shared"),
    Row("mlp.experts.*.gate_proj.weight", "M h", quantised=True),
    Row("mlp.experts.*.up_proj.weight", "M h", quantised=True),
    Row("mlp.experts.*.down_proj.weight", "h M", quantised=True),
)
MTP_FIRST = (
    Row("embed_tokens.weight", "V h", alias=EMBEDDING),
    Row("enorm.weight", "h"),
    Row("hnorm.weight", "h"),
    Row("eh_proj.weight", "h 2h"),
)
MTP_LAST = (
    Row("shared_head.norm.weight", "h"),
    Row("shared_head.head.weight", "V h", when="untied", alias=HEAD),
    Row("shared_head.head.weight", "V h", when="tied", alias=EMBEDDING),
)


class Canonical(NamedTuple):
    """A tensor of the canonical model.

    Attributes:
        name: Hugging Face's.
        shape: of the whole tensor.
        row: its line in the table.
        layer: number of its layer, from 0; None outside layers.
        expert: number of its routed expert.
        mtp: number of its layer among those of multi-token prediction.
    """

    name: str
    shape: tuple[int, ...]
    row: Row
    layer: int | None = None
    expert: int | None = None
    mtp: int | None = None


def scale_name(weight: str) -> str:
    """`...q_b_proj.weight` -> `...q_b_proj.weight_scale_inv`."""
    return weight + SCALE


def weight_of(name: str) -> str | None:
    """The weight that a tensor holds the scales of, or None: the inverse of `scale_name`."""
    return name.removesuffix(SCALE) if name.endswith(".weight" + SCALE) else None


def split_state(name: str) -> tuple[str, str | None]:
    """`x@exp_avg` -> ("x", "exp_avg"); "x" -> ("x", None)."""
    weight, at, state = name.rpartition("@")
    return (weight, state) if at else (name, None)
