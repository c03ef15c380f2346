"""Hugging Face folders: safetensors in one file or in shards with an index, `config.json` beside them.

The names are the canonical ones, so this adapter is the shortest: a file's header is the listing. FP8 weights keep
their scales beside them (`weight_scale_inv`), possibly in another shard.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from megatron_ext.checkpoint.convert import safetensors_io
from megatron_ext.checkpoint.convert.folder import Folder, check_name
from megatron_ext.checkpoint.convert.formats.layout import Layout, Options, documents_of, pack, read_model
from megatron_ext.checkpoint.convert.model import Model
from megatron_ext.checkpoint.convert.source import Reading
from megatron_ext.checkpoint.convert.tensors import SIZES, Entry, Stored, renamed
from megatron_ext.config.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


class HuggingFace:
    """See formats.Format."""

    name = "hf"
    title = "Hugging Face safetensors"
    dtypes = frozenset(SIZES)
    states: frozenset[str] = frozenset()
    options = frozenset({"shard_bytes"})

    def detect(self, folder: Folder) -> bool:
        return any(name in (SINGLE, INDEX) or _SHARD.fullmatch(name) for name in folder.names())

    def read(self, folder: Folder, config: Mapping[str, Any] | None) -> Reading:
        placed = self._placed(folder)
        model = read_model(folder, config)
        files = sorted(set(placed.values())) if placed is not None else [SINGLE]
        stored: dict[str, Stored] = {}
        for file in files:
            for name, (dtype, shape, offset) in safetensors_io.read_header(folder, file)[0].items():
                if name in stored:
                    raise CheckpointError(folder / file, f"is also in {stored[name].file}", tensor=name)
                if placed is not None and name not in placed:
                    raise CheckpointError(folder / file, f"is not in {INDEX}", tensor=name)
                stored[name] = renamed(name, name, file, offset, dtype, shape)
        for name, file in (placed or {}).items():
            if name not in stored or stored[name].file != file:
                raise CheckpointError(folder / file, f"is missing, although {INDEX} places it here", tensor=name)
        return Reading(model, list(stored.values()), [], f"{len(files)} file{'s' * (len(files) > 1)}",
                       documents_of(folder, files))

    def _placed(self, folder: Folder) -> dict[str, str] | None:
        """The index: tensor -> file; None for a single file. Shards that nothing names are refused."""
        shards = [name for name in folder.names() if _SHARD.fullmatch(name)]
        if not folder.has(INDEX):
            if shards:
                raise CheckpointError(folder / shards[0], f"is a shard, and there is no {INDEX}")
            for name in folder.names():
                if name.endswith(".safetensors") and name != SINGLE:
                    raise CheckpointError(folder / name, f"lies beside {SINGLE}", "a model without index is one file",
                                          "move it out of the folder if it does not belong to the model")
            return None
        placed = folder.read_json(INDEX).get("weight_map")
        if not isinstance(placed, dict) or not placed or not all(isinstance(file, str) for file in placed.values()):
            raise CheckpointError(folder / INDEX, "has no weight_map from tensors to files")
        named = {file: name for name, file in placed.items()}
        for file, name in named.items():
            check_name(file, folder / INDEX, name)
        for file in [*shards, SINGLE]:
            if file not in named and folder.has(file):
                raise CheckpointError(folder / file, f"is not named by {INDEX}", "it is of another model or save")
        return placed

    def lay_out(self, model: Model, entries: Mapping[str, Entry], options: Options) -> Layout:
        tensors = (renamed(name, name, "", -1, entry.dtype, entry.shape) for name, entry in entries.items()
                   if "@" not in name)
        files = pack(tensors, options.shard_bytes, SINGLE, "model-{number:05d}-of-{count:05d}.safetensors")
        layout = Layout(files)
        if len(files) > 1:
            total = sum(tensor.nbytes for file in files for tensor in file.tensors)
            placed = {tensor.name: file.path for file in files for tensor in file.tensors}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
            layout.documents[INDEX] = (json.dumps(index, indent=2) + "\n").encode()
        return layout
