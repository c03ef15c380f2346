"""Hugging Face folders: safetensors in one file or in shards with an index, experts one by one.

On disk an expert's matrix is `...mlp.experts.<e>.gate_proj.weight`; in memory the experts are stacked in one parameter,
`...mlp.experts.gate_proj`. Every other name is the same. File names in an index come from a stranger and are checked.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_ext.config.errors import CheckpointError
from megatron_ext.layers.experts import Experts

if TYPE_CHECKING:
    from megatron_ext.models.deepseek_v3 import DeepSeekV3

logger = logging.getLogger(__name__)

SINGLE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class _Entry(NamedTuple):
    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorListing:
    """What a folder holds, from the headers of its files.

    Attributes:
        source: the single file or the index.
        entries: name -> file, safetensors dtype, shape.
    """

    source: Path
    entries: dict[str, _Entry]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor.

        Raises:
            CheckpointError: if it is not here, or neither BF16 nor FP32.
        """
        if name not in self.entries:
            raise CheckpointError(self.source, "is missing", tensor=name)
        file, dtype, _ = self.entries[name]
        if dtype not in _DTYPES:
            hint = "convert FP8 checkpoints to BF16 first" if dtype.startswith("F8") else None
            raise CheckpointError(file, f"is {dtype}", "only BF16 and F32 are read", hint, tensor=name)
        return _DTYPES[dtype]


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers of a whole model under their names on disk; views, so that writing to one writes the
    model. Stacked experts [E, ...] appear one by one."""
    stacked = {f"{prefix}.{name}" for prefix, module in model.named_modules() if isinstance(module, Experts)
               for name, _ in module.named_parameters(recurse=False)}
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name in stacked:
            prefix, matrix = name.rsplit(".", 1)
            tensors |= {f"{prefix}.{expert}.{matrix}.weight": tensor[expert] for expert in range(len(tensor))}
        else:
            tensors[name] = tensor
    return tensors


def list_tensors(directory: Path) -> TensorListing:
    """Reads the headers of all files of a folder.

    Raises:
        CheckpointError: for a file that is missing or damaged, a tensor in two files, a disagreement with the index.
    """
    source, placed = _source(directory)
    files = [source] if placed is None else [directory / name for name in sorted(set(placed.values()))]
    entries: dict[str, _Entry] = {}
    for file in files:
        if not file.is_file():
            raise CheckpointError(file, "does not exist" if placed is None else f"does not exist, but {INDEX} names it")
        for name, entry in _header(file).items():
            if name in entries:
                raise CheckpointError(file, f"is also in {entries[name].file.name}", tensor=name)
            if placed is not None and name not in placed:
                raise CheckpointError(file, f"is not in {INDEX}", tensor=name)
            entries[name] = entry
    for name, file_name in (placed or {}).items():
        if name not in entries or entries[name].file != directory / file_name:
            raise CheckpointError(directory / file_name, f"is missing, although {INDEX} places it here", tensor=name)
    return TensorListing(source, entries)


def check(model: DeepSeekV3, listing: TensorListing) -> TensorListing:
    """Compares a listing with a whole model, which may be on the meta device.

    Returns:
        What is to be loaded: without layers of multi-token prediction and the rotary tables of old files.

    Raises:
        CheckpointError: for the first tensor that is missing, has no place, or has another shape or format.
    """
    listing = TensorListing(listing.source, _without_passed_over(listing.entries, model.config.num_hidden_layers))
    entries, targets = listing.entries, _targets(model, listing)
    if scales := [name for name in entries if name.endswith(".weight_scale_inv")]:
        raise CheckpointError(entries[scales[0]].file, "is of an FP8 checkpoint", hint="convert it to BF16 first",
                              tensor=scales[0])
    if missing := [name for name in targets if name not in entries]:
        raise CheckpointError(listing.source, f"is missing{_and_more(missing)}", tensor=missing[0])
    if unexpected := [name for name in entries if name not in targets]:
        raise CheckpointError(entries[unexpected[0]].file,
                              f"has no place in the model of config.json{_and_more(unexpected)}", tensor=unexpected[0])
    for name, entry in entries.items():
        expected = tuple(targets[name].shape)
        if entry.shape != expected:
            raise CheckpointError(entry.file, f"has shape {entry.shape}, but config.json makes it {expected}",
                                  tensor=name)
        listing.dtype(name)
    return listing


def load(model: DeepSeekV3, listing: TensorListing) -> None:
    """Copies a checked listing into a whole model, one tensor at a time.

    Raises:
        CheckpointError: if a head that should equal the embedding does not.
    """
    targets = _targets(model, listing)
    by_file: dict[Path, list[str]] = {}
    for name, entry in listing.entries.items():
        by_file.setdefault(entry.file, []).append(name)
    for file, names in by_file.items():
        with safe_open(file, framework="pt") as tensors:
            for name in names:
                targets[name].copy_(tensors.get_tensor(name))
    if model.config.tie_word_embeddings and _HEAD in targets and not targets[_HEAD].equal(targets[_EMBEDDING]):
        raise CheckpointError(listing.entries[_HEAD].file, "is not the embedding that config.json ties it to",
                              tensor=_HEAD)


def save(model: DeepSeekV3, config: dict[str, Any], directory: Path) -> None:
    """Writes a whole model and its `config.json`; shards of at most 5 GB, with an index where there are several.

    Raises:
        CheckpointError: if the folder already holds safetensors: what is left of an old model could be read as part of
            the new one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if old := sorted(directory.glob("*.safetensors*")):
        raise CheckpointError(old[0], "already exists", hint="save to an empty folder")
    tensors = model_tensors(model)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in shard.items()}, directory / file, {"format": "pt"})
        placed |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": placed}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _source(directory: Path) -> tuple[Path, dict[str, str] | None]:
    """The single file and None, or the index and its map from tensor to file."""
    if (directory / SINGLE_FILE).is_file():
        return directory / SINGLE_FILE, None
    index = directory / INDEX
    if not index.is_file():
        raise CheckpointError(directory, f"holds neither {SINGLE_FILE} nor {INDEX}")
    try:
        placed = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_unique)["weight_map"]
        if not all(isinstance(file, str) for file in placed.values()):
            raise TypeError("weight_map must map names to file names")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(index, f"is not an index of safetensors: {error}") from error
    for name, file in placed.items():
        # By its words alone: the files of Hugging Face's own cache are links to another folder, and that is well.
        for path in (PurePosixPath(file), PureWindowsPath(file)):
            if path.is_absolute() or path.drive or ".." in path.parts:
                raise CheckpointError(index, f"is placed in {file!r}, outside the folder", tensor=name)
    return index, placed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} appears twice")
    return values


def _header(file: Path) -> dict[str, _Entry]:
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - not a mapping
            return {name: _Entry(file, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(file, f"is damaged or no safetensors file: {error}") from error


def _targets(model: DeepSeekV3, listing: TensorListing) -> dict[str, Tensor]:
    """Where each tensor goes. A head on disk that is tied to the embedding goes nowhere and is only compared."""
    targets = model_tensors(model)
    if model.config.tie_word_embeddings and _HEAD in listing.entries:
        targets[_HEAD] = torch.empty_like(targets[_EMBEDDING])
    return targets


def _without_passed_over(entries: dict[str, _Entry], num_layers: int) -> dict[str, _Entry]:
    """Leaves out layers of multi-token prediction, said in one line, and the rotary tables of old files."""
    # Known by their projection, not by their number alone: a config.json with too few layers must not pass for them.
    projections = (re.fullmatch(r"model\.layers\.(\d+)\.eh_proj\.weight", name) for name in entries)
    extra = {int(match[1]) for match in projections if match} - set(range(num_layers))
    if extra:
        logger.warning("passed over multi-token prediction: %s", ", ".join(f"model.layers.{i}" for i in sorted(extra)))

    def wanted(name: str) -> bool:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        return not (layer and int(layer[1]) in extra) and not name.endswith(".rotary_emb.inv_freq")

    return {name: entry for name, entry in entries.items() if wanted(name)}


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
