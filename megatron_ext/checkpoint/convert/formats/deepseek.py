"""DeepSeek's inference layout: `model{rank}-mp{ranks}.safetensors`, as written by its own inference/convert.py.

Each rank's file is a whole state dict for that rank: what is split is cut along one dimension, routed experts go by
contiguous ranges of their numbers, everything else is in every file. Layers of multi-token prediction have no place in
it and are carried beside. The layout has no config; we leave Hugging Face's `config.json` with it, and read it there.

Shape letters: `(n)` in the table is the dimension that is cut.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from megatron_ext.checkpoint.convert import names, safetensors_io
from megatron_ext.checkpoint.convert.folder import Folder
from megatron_ext.checkpoint.convert.formats.layout import Layout, Options, documents_of, read_model
from megatron_ext.checkpoint.convert.model import Model
from megatron_ext.checkpoint.convert.names import Canonical
from megatron_ext.checkpoint.convert.source import BLOCK, Reading
from megatron_ext.checkpoint.convert.tensors import SIZES, Box, Entry, Part, Stored, box_shape, whole
from megatron_ext.config.errors import CheckpointError

_FILE = re.compile(r"model(\d{1,5})-mp(\d{1,5})\.safetensors")
_MODULES: dict[str, tuple[str, int | None]] = {
    "embed_tokens": ("embed", 0),
    "input_layernorm": ("attn_norm", None), "post_attention_layernorm": ("ffn_norm", None),
    "q_proj": ("wq", 0), "q_a_proj": ("wq_a", None), "q_a_layernorm": ("q_norm", None), "q_b_proj": ("wq_b", 0),
    "kv_a_proj_with_mqa": ("wkv_a", None), "kv_a_layernorm": ("kv_norm", None), "kv_b_proj": ("wkv_b", 0),
    "o_proj": ("wo", 1), "gate": ("gate", None), "gate_proj": ("w1", 0), "down_proj": ("w2", 1), "up_proj": ("w3", 0),
    "norm": ("norm", None), "lm_head": ("head", 0),
}
"""Module -> its name here, and the dimension of its weight that is cut."""
_LEAVES = {"weight": "weight", "weight" + names.SCALE: "scale", "e_score_correction_bias": "bias", "bias": "bias"}
_PATHS = {"self_attn": "attn", "mlp": "ffn"}


class DeepSeek:
    """See formats.Format."""

    name = "deepseek"
    title = "DeepSeek inference"
    dtypes = frozenset(SIZES)
    states: frozenset[str] = frozenset()
    options = frozenset({"mp"})

    def detect(self, folder: Folder) -> bool:
        return any(_FILE.fullmatch(name) for name in folder.names())

    def read(self, folder: Folder, config: Mapping[str, Any] | None) -> Reading:
        files = {name: match for name in folder.names() if (match := _FILE.fullmatch(name))}
        if not files:
            raise CheckpointError(folder.path, "has no file like model0-mp8.safetensors", "is it of another format?")
        ranks = int(next(iter(files.values()))[2])
        for name, match in files.items():
            if int(match[2]) != ranks or int(match[1]) >= ranks:
                raise CheckpointError(folder / name, "does not belong to the others", f"they are of {ranks} ranks")
        if len(files) != ranks:
            missing = next(n for n in range(ranks) if f"model{n}-mp{ranks}.safetensors" not in files)
            raise CheckpointError(folder / f"model{missing}-mp{ranks}.safetensors", "does not exist",
                                  f"there are {len(files)} of {ranks} files")
        model = read_model(folder, config)
        canonical = self._canonical_names(model)
        stored: list[Stored] = []
        for rank in range(ranks):
            file = f"model{rank}-mp{ranks}.safetensors"
            for name, (dtype, shape, offset) in safetensors_io.read_header(folder, file)[0].items():
                tensor = canonical.get(name)
                box = None if tensor is None else self._cut(model, tensor[0], tensor[1], rank, ranks)
                if tensor is None or box is None or box_shape(box) != shape:
                    found = "has no place in the model of config.json" if tensor is None else "is of another rank" \
                        if box is None else f"has shape {shape}, but config.json makes it {box_shape(box)}"
                    raise CheckpointError(folder / file, found, tensor=name)
                stored.append(Stored(name, file, offset, dtype, shape, (Part(tensor[0], whole(shape), box),)))
        return Reading(model, stored, [], f"{ranks} model-parallel rank{'s' * (ranks > 1)}",
                       documents_of(folder, files))

    def _canonical_names(self, model: Model) -> dict[str, tuple[str, Canonical]]:
        """Name here -> canonical name, and the tensor or the weight that it holds scales of."""
        found: dict[str, tuple[str, Canonical]] = {}
        for name, tensor in model.table.items():
            if tensor.mtp is None and not tensor.row.optional:
                found[_rename(name)] = name, tensor
                if name.endswith(".weight"):
                    found[_rename(names.scale_name(name))] = names.scale_name(name), tensor
        return found

    def lay_out(self, model: Model, entries: Mapping[str, Entry], options: Options) -> Layout:
        ranks, experts = options.mp, model.config.n_routed_experts
        if ranks < 1 or experts % ranks:
            raise CheckpointError(f"--mp {ranks}", f"does not divide {experts} experts")
        layout = Layout([])
        shards: list[list[Stored]] = [[] for _ in range(ranks)]
        for name, entry in self._with_head(model, entries, layout).items():
            weight = names.weight_of(name) or name
            tensor = model.table[weight]
            if tensor.mtp is not None or tensor.row.optional:
                layout.carried[name] = "multi-token prediction is not in DeepSeek's layout" if tensor.mtp is not None \
                    else "computed from the config in DeepSeek's layout"
                continue
            for rank in range(ranks) if tensor.expert is None else (tensor.expert // (experts // ranks),):
                box = self._cut(model, name, tensor, rank, ranks)
                if box is not None:
                    part = Part(name, whole(box_shape(box)), box)
                    shards[rank].append(Stored(_rename(name), "", -1, entry.dtype, box_shape(box), (part,)))
        layout.files = [safetensors_io.lay_out(f"model{rank}-mp{ranks}.safetensors", shard, {})
                        for rank, shard in enumerate(shards)]
        return layout

    def _with_head(self, model: Model, entries: Mapping[str, Entry], layout: Layout) -> Mapping[str, Entry]:
        """DeepSeek's model always has a head of its own."""
        if names.HEAD in entries:
            return entries
        layout.materialised.append(names.HEAD)
        return {**entries, names.HEAD: entries[names.EMBEDDING]}

    def _cut(self, model: Model, name: str, tensor: Canonical, rank: int, ranks: int) -> Box | None:
        """The box of a tensor, or of the scales of a weight, that a rank has; None if it has none of it."""
        is_scale = names.weight_of(name) is not None
        box = whole(tuple(-(-size // BLOCK) for size in tensor.shape) if is_scale else tensor.shape)
        if tensor.expert is not None:
            return box if tensor.expert // (model.config.n_routed_experts // ranks) == rank else None
        dim = _MODULES[name.split(".")[-2]][1]
        if dim is None or dim >= len(box) or ranks == 1:
            return box
        size = tensor.shape[dim]
        if size % ranks or (is_scale and size // ranks % BLOCK):
            where = "inside a block of 128" if size % ranks == 0 else "into unequal parts"
            raise CheckpointError(f"--mp {ranks}", f"would be cut along dimension {dim} of {tensor.shape}, {where}",
                                  tensor=name)
        step = box[dim][1] // ranks
        return (*box[:dim], (rank * step, (rank + 1) * step), *box[dim + 1:])


def _rename(name: str) -> str:
    """A canonical name in DeepSeek's words: part by part, never by replacing inside a word."""
    *path, module, leaf = name.removeprefix("model.").split(".")
    return ".".join([*(_PATHS.get(part, part) for part in path), _MODULES[module][0], _LEAVES[leaf]])
