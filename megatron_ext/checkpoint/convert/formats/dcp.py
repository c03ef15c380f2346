"""Checkpoints of torch.distributed.checkpoint, with torchtitan's names, or in Hugging Face's when they are read.

torchtitan's names are those of its models/deepseek_v3: routed experts are stacked along a leading dimension, layers of
multi-token prediction are `mtp_layers.<k>` and share the model's embedding and head, and a tied head is stored beside
the embedding. Names that it had earlier (`output`, `moe.experts.w1`, `moe.expert_bias`) are read too. Where it has none
of its own we take what its modules would give: `attention.wq_a.bias`; and `<name>_scale_inv` for the FP32 scales of a
weight stored in float8_e4m3fn, stacked as the weight is: E x [rows / 128, columns / 128]. All of it is loaded by
`torch.distributed.checkpoint.load` into tensors of the same names.

    <fqn>                                           weights
    optimizer.state.<fqn>.{exp_avg,exp_avg_sq}      moments of AdamW, as torchtitan flattens them
    optimizer.state.<fqn>.step, train_state.step    the same number for all

Whatever else a training loop stores (`optimizer.param_groups`, `lr_scheduler`, `dataloader`, `train_state`, extra
state of modules) is left out; any other name is refused. There is no config in it; we leave Hugging Face's
`config.json` with it, and read it there.

Shape letters: E experts, F their intermediate size, D hidden.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from megatron_ext.checkpoint.convert import dcp_io, names, torch_file
from megatron_ext.checkpoint.convert.dcp_io import DcpObject, DcpTarget, DcpTensor
from megatron_ext.checkpoint.convert.folder import Folder
from megatron_ext.checkpoint.convert.formats.layout import Layout, Options, documents_of, read_model
from megatron_ext.checkpoint.convert.model import Model
from megatron_ext.checkpoint.convert.names import Canonical
from megatron_ext.checkpoint.convert.pickles import TensorRef
from megatron_ext.checkpoint.convert.source import BLOCK, Reading
from megatron_ext.checkpoint.convert.tensors import SIZES, Entry, Part, Shape, Stored, reshaped, whole
from megatron_ext.config.errors import CheckpointError, shown

_OUTSIDE = {names.EMBEDDING: "tok_embeddings.weight", "model.norm.weight": "norm.weight", names.HEAD: "lm_head.weight"}
_EXPERTS = "moe.routed_experts.inner_experts."
_MODULES = {
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq", "self_attn.q_a_proj": "attention.wq_a",
    "self_attn.q_a_layernorm": "attention.q_norm", "self_attn.q_b_proj": "attention.wq_b",
    "self_attn.kv_a_proj_with_mqa": "attention.wkv_a", "self_attn.kv_a_layernorm": "attention.kv_norm",
    "self_attn.kv_b_proj": "attention.wkv_b", "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
    "mlp.gate": "moe.router.gate", "mlp.shared_experts.gate_proj": "moe.shared_experts.w1",
    "mlp.shared_experts.down_proj": "moe.shared_experts.w2", "mlp.shared_experts.up_proj": "moe.shared_experts.w3",
    "enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "shared_head.norm": "mtp_norm",
}
"""Module within a layer -> torchtitan's; `.weight` and `.bias` follow."""
_LEAVES = {
    "mlp.experts.*.gate_proj.weight": _EXPERTS + "w1_EFD", "mlp.experts.*.down_proj.weight": _EXPERTS + "w2_EDF",
    "mlp.experts.*.up_proj.weight": _EXPERTS + "w3_EFD", "mlp.gate.e_score_correction_bias": "moe.expert_bias_E",
}
_EARLIER = {
    "w1_EFD": ("moe.experts.w1", "moe.experts.w1_EFD"), "w2_EDF": ("moe.experts.w2", "moe.experts.w2_EDF"),
    "w3_EFD": ("moe.experts.w3", "moe.experts.w3_EFD"), "expert_bias_E": ("moe.expert_bias",),
}
"""Last part of a name -> what torchtitan called it before July 2026."""
_STATE = re.compile(r"(?:.+\.)?optim(?:izer)?\.state\.(.+)\.(exp_avg|exp_avg_sq|step)")
_LEFT_OUT = re.compile(r"(?:train_state|lr_scheduler|dataloader)(?:\..+)?"
                       r"|(?:.+\.)?optim(?:izer)?\.param_groups(?:\..+)?|(?:.+\.)?_extra_state")
_STEP = "train_state.step"


class Place(NamedTuple):
    """Which canonical tensors a tensor consists of.

    Attributes:
        columns: one tensor; or stacked: the experts' tensors, and behind them in each expert those of the next column.
        stacked: whether the first dimension is the expert.
    """

    columns: tuple[tuple[Canonical, ...], ...]
    stacked: bool = False

    def parts(self, suffix: str) -> tuple[Shape, tuple[Part, ...]]:
        """Its shape and parts; or with a suffix those of its scales or of its optimizer state."""
        parts: list[Part] = []
        row = 0
        for column in self.columns:
            shape = column[0].shape
            if suffix == names.SCALE:
                shape = tuple(-(-size // BLOCK) for size in shape)
            if not self.stacked:
                return shape, (Part(column[0].name + suffix, whole(shape), whole(shape)),)
            view = reshaped(shape, (1, *shape))
            for expert, tensor in enumerate(column):
                at = ((expert, expert + 1), (row, row + shape[0]), *whole(shape[1:]))
                parts.append(Part(tensor.name + suffix, at, whole(view.shape), view))
            row += shape[0]
        return (len(self.columns[0]), row, *shape[1:]), tuple(parts)


class Dcp:
    """See formats.Format."""

    name = "dcp"
    title = "torch DCP (torchtitan)"
    dtypes = frozenset(SIZES)
    states = frozenset({"exp_avg", "exp_avg_sq"})
    options = frozenset({"shard_bytes"})

    def detect(self, folder: Folder) -> bool:
        return dcp_io.detect(folder) and not folder.has("common.pt")  # which is Megatron's

    def read(self, folder: Folder, config: Mapping[str, Any] | None) -> Reading:
        dcp = dcp_io.read(folder)
        model = read_model(folder, config)
        where = folder / dcp_io.METADATA if dcp.metadata is not None else folder.path
        naming = _Naming.of(model, dcp, where)
        stored: list[Stored] = []
        steps: dict[int, str] = {}
        for name in [*dcp.tensors, *dcp.bytes]:
            if _LEFT_OUT.fullmatch(name):
                continue
            tensor, state = dcp.tensors.get(name), _STATE.fullmatch(name)
            file = folder / (tensor.chunks[0].file if tensor is not None and tensor.chunks else dcp_io.METADATA)
            if state is not None and state[2] == "step" and naming.find(state[1]) is not None:
                steps[_count(dcp, name)] = name
                continue
            found = naming.find(name) if state is None else naming.find(state[1], "@" + state[2])
            if tensor is None or found is None:
                raise CheckpointError(file, "is no tensor" if tensor is None else "has no place in the model of "
                                      "config.json", f"names are {naming.title}", tensor=name)
            stored += dcp_io.stored(name, tensor, self._parts(file, name, tensor, *found))
        if len(steps) > 1:
            raise CheckpointError(where, f"is {max(steps)}, and {min(steps)} for {steps[min(steps)]}",
                                  "all weights have taken the same number of steps", tensor=steps[max(steps)])
        step = next(iter(steps), None)
        if step is None and (_STEP in dcp.tensors or _STEP in dcp.bytes):
            step = _count(dcp, _STEP)
        layout = f"{len(dcp.files)} file{'s' * (len(dcp.files) != 1)}, names of {naming.title}"
        return Reading(model, stored, _shared(model) if naming.torchtitan else [], layout,
                       documents_of(folder, dcp.files), step)

    def _parts(self, file: Any, name: str, tensor: DcpTensor, place: Place, suffix: str) -> tuple[Part, ...]:
        shape, parts = place.parts(suffix)
        if tensor.dtype not in SIZES:
            raise CheckpointError(file, f"is {tensor.dtype}", f"only {', '.join(SIZES)} are read", tensor=name)
        if tensor.shape != shape:
            raise CheckpointError(file, f"has shape {tensor.shape}, but config.json makes it {shape}", tensor=name)
        return parts

    def lay_out(self, model: Model, entries: Mapping[str, Entry], options: Options) -> Layout:
        shared, layout = set(_shared(model)), Layout([])
        places = _torchtitan(model)
        named = {tensor.name: name for name, place in places.items() for tensor in place.columns[0]}
        dtypes: dict[tuple[str, str], str] = {}
        for name, entry in entries.items():
            base = names.split_state(name)[0]
            weight = names.weight_of(base) or base
            if weight in named:
                dtypes.setdefault((named[weight], name.removeprefix(weight)), entry.dtype)
            elif name in shared:
                layout.aliases.append(name)
            else:
                layout.carried[name] = "torchtitan computes it" if model.table[weight].row.optional else \
                    "torchtitan has one embedding and one head for all layers"
        layout.implied = _shared(model)
        if names.HEAD not in entries:
            layout.materialised.append(names.HEAD)
            dtypes[named[names.HEAD], ""] = entries[names.EMBEDDING].dtype
        targets = [_target(name, suffix, dtype, places[name]) for (name, suffix), dtype in dtypes.items()]
        moment = next((name for name, suffix in dtypes if suffix.startswith("@exp_avg")), None)
        if moment is not None and options.step is None:
            raise CheckpointError(dcp_io.METADATA, "would have moments and no step", "the source does not say its step",
                                  "leave the moments out with --optimizer drop", tensor=moment)
        layout.files, layout.documents = dcp_io.lay_out("", targets, _steps(dtypes, options.step), options.shard_bytes)
        return layout


def _target(name: str, suffix: str, dtype: str, place: Place) -> DcpTarget:
    shape, parts = place.parts(suffix)
    if suffix.startswith("@"):
        key = f"state.{name}.{suffix[1:]}"
        return DcpTarget(f"optimizer.{key}", dtype, shape, parts, path=("optimizer", key))
    return DcpTarget(name + suffix, dtype, shape, parts)


def _steps(dtypes: Mapping[tuple[str, str], str], step: int | None) -> list[DcpObject]:
    """How many steps have been taken, in the places where torchtitan has it."""
    if step is None:
        return []
    keys, same = [f"state.{name}.step" for name, suffix in dtypes if suffix == "@exp_avg"], torch.tensor(float(step))
    return [DcpObject(_STEP, step, ("train_state", "step")),
            *(DcpObject(f"optimizer.{key}", same, ("optimizer", key)) for key in keys)]


def _count(dcp: dcp_io.Dcp, name: str) -> int:
    """A number of steps, as a tensor or an object."""
    tensor = dcp.tensors.get(name)
    if tensor is not None and len(tensor.chunks) == 1:
        chunk = tensor.chunks[0]
        ref = TensorRef(chunk.file, chunk.offset, tensor.dtype, tensor.shape, (1,) * len(tensor.shape))
        value: Any = torch_file.scalar(dcp.folder, ref)
    else:
        value = dcp.object(name) if tensor is None else None
    if type(value) not in (int, float) or not 0 <= value < 1 << 53 or value != int(value):
        raise CheckpointError(dcp.folder / dcp_io.METADATA, f"is {shown(value)}", "it must be a number of steps",
                              tensor=name)
    return int(value)


def _shared(model: Model) -> list[str]:
    """Tensors of multi-token prediction that torchtitan has once for all layers."""
    return [name for name, tensor in model.table.items() if tensor.row.alias is not None and tensor.mtp is not None]


def _torchtitan(model: Model) -> dict[str, Place]:
    """torchtitan's name -> what it is, but for what it does not store."""
    stacks: dict[str, list[Canonical]] = {}
    stacked: set[str] = set()
    for tensor in model.table.values():
        row = tensor.row
        if row.optional or (row.alias is not None and tensor.mtp is not None):
            continue
        if tensor.layer is None:
            name = _OUTSIDE[row.name]
        else:
            module, _, leaf = row.name.rpartition(".")
            inside = _LEAVES.get(row.name) or f"{_MODULES[module]}.{leaf}"
            name = f"layers.{tensor.layer}.{inside}" if tensor.mtp is None else f"mtp_layers.{tensor.mtp}.{inside}"
        stacks.setdefault(name, []).append(tensor)
        if tensor.expert is not None:
            stacked.add(name)
    return {name: Place((tuple(tensors),), name in stacked) for name, tensors in stacks.items()}


def _hugging_face(model: Model) -> dict[str, Place]:
    """Hugging Face's names, those of its files and those that transformers 5 has in memory: experts stacked, with the
    rows of gate_proj before those of up_proj."""
    places = {name: Place(((tensor,),)) for name, tensor in model.table.items()}
    experts: dict[str, list[Canonical]] = {}
    for tensor in model.table.values():
        if tensor.expert is not None:
            path, module, _ = tensor.name.rsplit(".", 2)
            experts.setdefault(f"{path.rpartition('.')[0]}.{module}", []).append(tensor)
    for name, tensors in experts.items():
        if name.endswith(".down_proj"):
            places[name] = Place((tuple(tensors),), True)
        elif name.endswith(".gate_proj"):
            up = experts[name.removesuffix("gate_proj") + "up_proj"]
            places[name.removesuffix("gate_proj") + "gate_up_proj"] = Place((tuple(tensors), tuple(up)), True)
    return places


class _Naming(NamedTuple):
    """How a checkpoint names its tensors.

    Attributes:
        places: name -> what it is.
        prefix: before every name.
        within: what Hugging Face has before a name, and this checkpoint (of a model without head) has not.
        torchtitan: whether the names are torchtitan's.
    """

    places: Mapping[str, Place]
    prefix: str
    within: str
    torchtitan: bool

    @property
    def title(self) -> str:
        return "torchtitan" if self.torchtitan else "Hugging Face"

    @classmethod
    def of(cls, model: Model, dcp: dcp_io.Dcp, where: Any) -> _Naming:
        """Told by the name of the embedding.

        Raises:
            CheckpointError: there is none, or several.
        """
        outside = [name for name in dcp.tensors if not _STATE.fullmatch(name) and "layers." not in name]
        theirs = [name for name in outside if name.endswith("tok_embeddings.weight")]
        faces = [name for name in outside if re.fullmatch(r"(?:.+\.)?embed_tokens\.weight", name)]
        if len(theirs) + len(faces) != 1:
            raise CheckpointError(where, f"has {len(theirs) + len(faces)} tensors named as an embedding",
                                  "names must be torchtitan's or Hugging Face's")
        if theirs:
            places = _torchtitan(model)
            for name, place in list(places.items()):
                for earlier in _EARLIER.get(name.rpartition(".")[2], ()):
                    places[".".join([*name.split(".")[:2], earlier])] = place
            places["output.weight"] = places["lm_head.weight"]
            return cls(places, theirs[0].removesuffix("tok_embeddings.weight"), "", True)
        before = faces[0].removesuffix("embed_tokens.weight")
        if before == "model." or before.endswith(".model."):
            return cls(_hugging_face(model), before.removesuffix("model."), "", False)
        return cls(_hugging_face(model), before, "model.", False)

    def find(self, name: str, suffix: str = "") -> tuple[Place, str] | None:
        """What a tensor is, and the suffix of its canonical names."""
        weight = name.removesuffix(names.SCALE)
        for base in (weight.removeprefix(self.prefix), weight):
            place = self.places.get(base) or self.places.get(self.within + base)
            if place is not None and weight == name:
                return place, suffix
            if place is not None and not suffix and len(place.columns) == 1:
                return place, names.SCALE
        return None
