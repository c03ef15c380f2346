"""What adapters share: what they answer with, and the configuration and documents that lie beside the tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_ext.checkpoint.convert import safetensors_io
from megatron_ext.checkpoint.convert.folder import Folder
from megatron_ext.checkpoint.convert.model import Model
from megatron_ext.checkpoint.convert.tensors import Stored, TargetFile
from megatron_ext.config.errors import CheckpointError

CONFIG = "config.json"
_DOCUMENTS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py", ".md")


@dataclass(frozen=True)
class Options:
    """How a checkpoint is to be cut.

    Attributes:
        shard_bytes: largest file, unless one tensor is larger.
        mp: model-parallel ranks of DeepSeek's layout.
        tp, pp, ep: ranks of tensor, pipeline and expert parallelism (Megatron's legacy layout).
        spec: layer spec whose names Megatron-Core's norms get: "te" or "local".
        names: whose names the parameters of a universal checkpoint get: "megatron_ext" or "transformers".
        step: of the training, where the source says; set by the plan.
    """

    shard_bytes: int = 5 * 10**9
    mp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    spec: str = "te"
    names: str = "megatron_ext"
    step: int | None = None


@dataclass
class Layout:
    """Where canonical tensors go.

    Attributes:
        files: to be written, each number of each tensor once or more.
        carried: name -> why the format cannot hold it.
        aliases: names that repeat another tensor and are not stored; compared with it before they are left out.
        implied: aliases that a reader of this format takes to belong to every checkpoint, unless it is told otherwise.
        materialised: names that are stored although they are not among the entries, since the format always has them;
            made from the tensor that they repeat.
        documents: path -> content of small files that describe the tensors (an index).
    """

    files: list[TargetFile]
    carried: dict[str, str] = field(default_factory=dict)
    aliases: list[str] = field(default_factory=list)
    implied: list[str] = field(default_factory=list)
    materialised: list[str] = field(default_factory=list)
    documents: dict[str, bytes] = field(default_factory=dict)


def read_model(folder: Folder, config: Mapping[str, Any] | None) -> Model:
    """The model of the config given, or of the folder's `config.json`."""
    if config is not None:
        return Model.from_hf(config, "--config")
    if not folder.has(CONFIG):
        raise CheckpointError(folder / CONFIG, "does not exist", "it says of which model the tensors are",
                              "pass --config with that of the model")
    return Model.from_hf(folder.read_json(CONFIG), folder / CONFIG)


def documents_of(folder: Folder, tensors: Iterable[str]) -> list[str]:
    """Small files beside the tensors that belong to the model (tokenizer, generation, its code, licence)."""
    weights = set(tensors)
    return [name for name in folder.names() if name not in weights and not name.startswith(".")
            and (name.endswith(_DOCUMENTS) or name.startswith(("LICENSE", "NOTICE")))
            and not name.endswith(".index.json") and not (folder / name).is_dir()]


def pack(tensors: Iterable[Stored], limit: int, single: str, numbered: str) -> list[TargetFile]:
    """Fills safetensors files in order, each up to `limit` bytes; `numbered` has {number} and {count}.

    A weight and its scales may come apart, as in the releases.
    """
    groups: list[list[Stored]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    if len(groups) == 1:
        return [safetensors_io.lay_out(single, groups[0], {"format": "pt"})]
    return [safetensors_io.lay_out(numbered.format(number=number, count=len(groups)), group, {"format": "pt"})
            for number, group in enumerate(groups, start=1)]
