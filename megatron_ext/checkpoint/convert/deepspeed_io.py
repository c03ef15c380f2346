"""DeepSpeed's checkpoint folders, listed: which numbers of which parameter lie where. Only pickles are read.

    <dir>/latest, latest_universal                  name of the tagged folder, which may also be given itself
    <tag>/mp_rank_MM_model_states.pt                weights and buffers of a model-parallel rank, counters
    <tag>/[bf16_]zero_pp_rank_R_mp_rank_MM_optim_states.pt   shard of data-parallel rank R (deepspeed_optim.py)
    <tag>/layer_NN[-model_TT]-model_states.pt       one layer of a PipelineModule; mp_rank files have no weights then
    <tag>/layer_L_expert_E_mp_rank_MM_model_states.pt, expp_rank_N_mp_rank_MM_optim_states.pt, megatron_ext.json
                                                    our engine's: one expert each, an optimizer without ZeRO, manifest
    <tag>/zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt, zero/optimizer_state.pt     universal

Refused with the reason: ZeRO-3, tensor parallelism, DeepSpeed's own mixture-of-experts layers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from megatron_ext.checkpoint import native
from megatron_ext.checkpoint.convert import deepspeed_optim
from megatron_ext.checkpoint.convert.deepspeed_optim import WITHOUT_ZERO, ZERO, Blocks
from megatron_ext.checkpoint.convert.deepspeed_shards import (
    File,
    Parameter,
    Shards,
    load,
    name_of,
    piece_of,
    shape_of,
    step_of,
)
from megatron_ext.checkpoint.convert.folder import Folder, check_name
from megatron_ext.checkpoint.convert.pickles import TensorRef
from megatron_ext.config.errors import CheckpointError, shown

LATEST, LATEST_UNIVERSAL, UNIVERSAL = "latest", "latest_universal", "zero"
COPIED = "megatron_ext_copied"
"""Key in an fp32.pt of ours that holds the weight itself, in its own dtype, for want of a master."""
_MODEL = re.compile(r"mp_rank_(\d{1,6})_model_states\.pt")
_EXPERT = re.compile(r"layer_(\d{1,6})_expert_(\d{1,6})_mp_rank_(\d{1,6})_model_states\.pt")
_LAYER = re.compile(r"layer_(\d{1,6})(?:-model_(\d{1,6}))?-model_states\.pt")
_ZERO_3 = re.compile(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt")
_STACKED = re.compile(r"(?P<prefix>.*\.experts)\.(?P<matrix>\w+)")
_PATTERNS = (_MODEL, _EXPERT, _LAYER, _ZERO_3, ZERO, WITHOUT_ZERO)
_OWN_KEYS = frozenset((
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
    "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "skipped_steps", "global_steps",
    "global_samples", "dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions", "ds_config", "ds_version",
    "num_experts", "ds_autoep_layers", "autoep_layers", "folding", "universal_checkpoint_info"))
_MAX_EXPERTS = 1 << 16


def is_checkpoint(folder: Folder) -> bool:
    """Whether a folder is a DeepSpeed checkpoint, or has one by its `latest`; by names alone."""
    names = folder.names()
    return LATEST in names or LATEST_UNIVERSAL in names or _is_tagged(names)


def _is_tagged(names: list[str]) -> bool:
    return any(pattern.fullmatch(name) for name in names for pattern in _PATTERNS)


def read(folder: Folder, tag: str | None = None) -> Shards:
    """Lists a checkpoint.

    Args:
        folder: the folder of checkpoints, or the tagged one itself.
        tag: which of them; what `latest` says (or else `latest_universal`) if None.

    Raises:
        CheckpointError: something is missing, damaged, or of a kind that is refused; with file and tensor.
    """
    prefix = _prefix(folder, tag)
    inner = Folder(folder / prefix, folder.follow_links) if prefix else folder
    names = inner.names()
    if zero_3 := [name for name in names if _ZERO_3.fullmatch(name)]:
        if UNIVERSAL not in names:
            raise CheckpointError(folder / (prefix + zero_3[0]), "is of ZeRO-3, where every rank has a part of every "
                                  "tensor", "ZeRO-0, 1, 2 and universal checkpoints are read",
                                  "run python -m deepspeed.checkpoint.ds_to_universal on it first")
    if UNIVERSAL in names:
        return _read_universal(folder, Shards(prefix, "universal"), names)
    if not _is_tagged(names):
        raise CheckpointError(folder / prefix, "has no file of a DeepSpeed checkpoint")
    if native.MANIFEST in names:
        return _read_native(folder, Shards(prefix, "native"), names)
    if any(_LAYER.fullmatch(name) for name in names):
        return _read_pipeline(folder, Shards(prefix, "pipeline"), names)
    return _read_zero(folder, Shards(prefix, "zero"), names)


def _prefix(folder: Folder, tag: str | None) -> str:
    """The tagged folder inside, with its slash; "" for the folder itself."""
    names = folder.names()
    if tag is None:
        if _is_tagged(names) or (UNIVERSAL in names and LATEST not in names and LATEST_UNIVERSAL not in names):
            return ""
        latest = next((name for name in (LATEST, LATEST_UNIVERSAL) if name in names), None)
        if latest is None:
            raise CheckpointError(folder.path, "has neither 'latest' nor a file of a DeepSpeed checkpoint")
        tag = folder.read(latest, 4096).decode(errors="replace").strip()
        if "/" in check_name(tag, folder / latest) or tag not in names:
            raise CheckpointError(folder / latest, f"names {tag[:100]!r}, which is not here",
                                  "the folder was moved or deleted")
    if (folder / native.check_tag(tag)).is_symlink() and not folder.follow_links:
        raise CheckpointError(folder / tag, "is a symbolic link", "links are not followed",
                              "if you trust where it leads, pass --follow-links")
    return tag + "/"


# -- model files

def _models(folder: Folder, shards: Shards, names: list[str]) -> list[File]:
    """The mp_rank files in the order of their numbers, none missing."""
    found = {int(match[1]): name for name in names if (match := _MODEL.fullmatch(name))}
    files = []
    for rank in range(len(found)):
        if rank not in found:
            raise CheckpointError(folder / f"{shards.tag}mp_rank_{rank:02d}_model_states.pt", "does not exist",
                                  f"there is one of rank {max(found)}")
        files.append(load(folder, shards.tag + found[rank]))
    if not files:
        raise CheckpointError(folder / f"{shards.tag}mp_rank_00_model_states.pt", "does not exist")
    first = files[0]
    shards.step = first.value("global_steps", kind=int, default=None)
    shards.state = {key: value for key, value in first.value(kind=dict).items() if key in _OWN_KEYS
                    and key not in ("module", "optimizer", "param_shapes")}
    shards.client_state = {str(key): value for key, value in first.tree.items() if key not in _OWN_KEYS}
    grid = first.value("checkpoint_parallel_dimensions", kind=dict, default={})
    if grid.get("tp_degree") not in (None, 1):
        raise CheckpointError(first.path, f"is of {grid['tp_degree']} tensor-parallel ranks",
                              "how tensors are cut over them is not told by their names",
                              "make a universal checkpoint of it with the training code that knows")
    world = grid.get("pp_degree") if isinstance(grid.get("pp_degree"), int) else first.tree.get("mp_world_size")
    if shards.kind != "universal" and isinstance(world, int) and world != len(files):
        missing = f"{shards.tag}mp_rank_{len(files):02d}_model_states.pt" if world > len(files) else files[-1].name
        raise CheckpointError(folder / missing, "does not exist" if world > len(files) else "is of no rank",
                              f"the checkpoint was saved by {world} model-parallel ranks")
    if shards.kind != "native" and any(file.value(key, kind=object, default=None) for file in files
                                       for key in ("num_experts", "ds_autoep_layers", "autoep_layers")):
        raise CheckpointError(first.path, "has DeepSpeed's own experts", "they have no counterpart in DeepSeek's model")
    return files


def _add_module(shards: Shards, file: File) -> dict[str, Any]:
    """Lists the weights and buffers of a model file. Returns its module."""
    module: dict[str, Any] = file.value("module", kind=dict, default={})
    buffers = {name for name in file.value("buffer_names", kind=list, default=[]) if isinstance(name, str)}
    for key, ref in module.items():
        name = name_of(file, key)
        if isinstance(ref, TensorRef):
            known = shards.buffers if name in buffers else shards.parameters
            found = Parameter(name, ref.shape, [piece_of(file, ref, name)])
            if name not in known:
                known[name] = found
            elif known[name].shape != ref.shape:
                raise CheckpointError(file.path, f"has shape {ref.shape}, and {known[name].shape} in another file",
                                      tensor=name)
            else:
                shards.copies.append(found)
        elif not name.endswith("_extra_state"):
            raise CheckpointError(file.path, f"is a {type(ref).__name__}, no tensor", tensor=name)
    return module


def _trainable(shards: Shards, module: Mapping[str, Any]) -> list[str]:
    return [name for name in module if name in shards.parameters]


# -- our engine's

def _read_native(folder: Folder, shards: Shards, names: list[str]) -> Shards:
    folder.read_json(shards.tag + native.MANIFEST)  # no link, not too long, no key twice
    manifest = native.read_manifest(folder / shards.tag)
    shards.manifest, placement = manifest, manifest["placement"]
    for name, entry in manifest["files"].items():
        if name not in names:
            raise CheckpointError(folder / (shards.tag + name), "is missing", f"{native.MANIFEST} lists it")
        if (size := folder.size(shards.tag + name)) != entry["bytes"]:
            raise CheckpointError(folder / (shards.tag + name), f"has {size} bytes",
                                  f"{native.MANIFEST} says {entry['bytes']}", "it was cut off or is of another save")
    shapes = {name: _manifest_shape(folder, shards, name, text) for name, text in manifest["tensors"].items()}
    models = _models(folder, shards, names)
    modules = [_add_module(shards, model) for model in models]
    experts = _add_experts(folder, shards, names, shapes)
    for name, shape in shapes.items():
        found = shards.parameters.get(name) or shards.buffers.get(name)
        if found is None:
            raise CheckpointError(folder / shards.tag, "is in no file", f"{native.MANIFEST} lists it", tensor=name)
        if found.shape != shape:
            raise CheckpointError(folder / found.weight[0].file, f"has shape {found.shape}",
                                  f"{native.MANIFEST} says {shape}", tensor=name)
    sizes = placement["replicas"], placement["expert_parallel"]
    if not all(type(size) is int and 0 < size < 1 << 20 for size in sizes) or sizes[0] % sizes[1]:
        raise CheckpointError(folder / f"{shards.tag}{native.MANIFEST}", f"has a placement of {sizes}")
    for rank, (model, module) in enumerate(zip(models, modules, strict=True)):
        if manifest["zero_stage"] > 0:
            deepspeed_optim.read_zero(folder, shards, names, rank, model, Blocks(*sizes))
            continue
        for block in range(sizes[1]):
            name = f"expp_rank_{block}_mp_rank_{rank:02d}_optim_states.pt"
            if name in names:
                deepspeed_optim.read_without_zero(folder, shards, load(folder, shards.tag + name), _trainable(
                    shards, module), [n for n in shapes if n in experts.get(rank, ())], block, sizes[1])
            elif block == 0:  # a model without experts
                deepspeed_optim.read_without_zero(folder, shards, model, _trainable(shards, module), [], 0, 1)
    shards.parameters = {name: shards.parameters[name] for name in shapes if name in shards.parameters} | \
        shards.parameters
    return shards


def _manifest_shape(folder: Folder, shards: Shards, name: str, text: Any) -> tuple[int, ...]:
    where = File(folder / f"{shards.tag}{native.MANIFEST}", "", None)
    try:
        return shape_of(where, json.loads(text), name_of(where, name))
    except (ValueError, TypeError, RecursionError):
        raise CheckpointError(where.path, f"has the shape {shown(text)}", tensor=name) from None


def _add_experts(folder: Folder, shards: Shards, names: list[str],
                 shapes: Mapping[str, tuple[int, ...]]) -> dict[int, set[str]]:
    """Lists the experts' own files. Returns mp_rank -> names of the parameters that they make up."""
    stacked = {f"{found['prefix']}.{{}}.{found['matrix']}.weight": (name, shape) for name, shape in shapes.items()
               if name not in shards.parameters and name not in shards.buffers
               and (found := _STACKED.fullmatch(name)) is not None and len(shape) > 1}
    mine: dict[int, set[str]] = {}
    for file_name in names:
        match = _EXPERT.fullmatch(file_name)
        if match is None:
            continue
        file, expert = load(folder, shards.tag + file_name), int(match[2])
        for key, ref in file.value(kind=dict).items():
            generic = re.sub(rf"\.{expert}\.(\w+)\.weight$", r".{}.\1.weight", name_of(file, key))
            if generic not in stacked:
                raise CheckpointError(file.path, f"is not in {native.MANIFEST}", tensor=key)
            name, shape = stacked[generic]
            if expert >= min(shape[0], _MAX_EXPERTS) or not isinstance(ref, TensorRef) or ref.shape != shape[1:]:
                raise CheckpointError(file.path, f"does not fit {name} of shape {shape}", tensor=key)
            parameter = shards.parameters.setdefault(name, Parameter(name, shape, expert=True))
            parameter.weight.append(piece_of(file, ref, key, expert * math.prod(shape[1:])))
            mine.setdefault(int(match[3]), set()).add(name)
    for generic, (name, shape) in stacked.items():
        there = {piece.start // math.prod(shape[1:]) for piece in shards.parameters[name].weight} \
            if name in shards.parameters and 0 not in shape else set()
        if lost := next((expert for expert in range(min(shape[0], _MAX_EXPERTS)) if expert not in there), None):
            raise CheckpointError(folder / shards.tag, "is in none of the files of experts",
                                  tensor=generic.format(lost))
        if 0 not in there:
            raise CheckpointError(folder / shards.tag, "is in none of the files of experts", tensor=generic.format(0))
        shards.parameters[name].weight.sort(key=lambda piece: piece.start)
    return mine


# -- DeepSpeed's own

def _read_zero(folder: Folder, shards: Shards, names: list[str]) -> Shards:
    models = _models(folder, shards, names)
    if len(models) > 1:
        raise CheckpointError(models[1].path, "is of a second model-parallel rank",
                              "how tensors are cut over such ranks is not told by their names")
    module = _add_module(shards, models[0])
    if any(ZERO.fullmatch(name) for name in names):
        deepspeed_optim.read_zero(folder, shards, names, 0, models[0], Blocks())
    elif models[0].value("param_shapes", kind=list, default=None) is not None:
        raise CheckpointError(folder / f"{shards.tag}zero_pp_rank_0_mp_rank_00_optim_states.pt", "does not exist",
                              "the model was saved under ZeRO")
    else:
        deepspeed_optim.read_without_zero(folder, shards, models[0], _without_twins(shards, module), [], 0, 1)
    return shards


def _without_twins(shards: Shards, module: Mapping[str, Any]) -> list[str]:
    """Trainable parameters, each once: a tied one has two names for one place in its file, and one in the optimizer."""
    first: dict[tuple[str, int], str] = {}
    for name in _trainable(shards, module):
        first.setdefault((module[name].file, module[name].offset), name)
    return list(first.values())


def _read_pipeline(folder: Folder, shards: Shards, names: list[str]) -> Shards:
    """Names are `<layer>.<name in the layer>`; of what `tied_modules` share, as the layer files have it."""
    for name in names:
        match = _LAYER.fullmatch(name)
        if match is None:
            continue
        if int(match[2] or 0):
            raise CheckpointError(folder / (shards.tag + name), "is of a second tensor-parallel rank",
                                  "how tensors are cut over such ranks is not told by their names")
        file = load(folder, shards.tag + name)
        for key, ref in file.value(kind=dict).items():
            if isinstance(ref, TensorRef):
                full = f"{int(match[1])}.{name_of(file, key)}"
                shards.parameters[full] = Parameter(full, ref.shape, [piece_of(file, ref, full)])
            elif not str(key).endswith("_extra_state"):
                raise CheckpointError(file.path, f"is a {type(ref).__name__}, no tensor", tensor=name_of(file, key))
    models = _models(folder, shards, names)
    for rank, model in enumerate(models):
        if any(ZERO.fullmatch(name) for name in names):
            for group in model.value("param_shapes", kind=list):
                for name, shape in group.items() if isinstance(group, dict) else ():
                    shards.parameters.setdefault(name_of(model, name), Parameter(name, shape_of(model, shape, name)))
            deepspeed_optim.read_zero(folder, shards, names, rank, model, Blocks())
        elif model.value("optimizer", kind=dict, default=None) is not None:
            shards.unmapped = f"has the optimizer of a PipelineModule without ZeRO in {model.path.name}, and does " \
                              "not say which state is which parameter's"
    return shards


# -- universal

def _read_universal(folder: Folder, shards: Shards, names: list[str]) -> Shards:
    if any(_MODEL.fullmatch(name) for name in names):
        for model in _models(folder, shards, names):
            _add_module(shards, model)
    base = f"{shards.tag}{UNIVERSAL}/"
    inner = Folder(folder / base, folder.follow_links)
    for name in inner.names():
        if (inner / name).is_dir() and name not in shards.buffers:
            _add_parameter(folder, shards, base, check_name(name, inner.path))
    if inner.has("optimizer_state.pt"):
        shards.param_groups = deepspeed_optim.scalars(load(folder, f"{base}optimizer_state.pt").value(kind=dict))
    return shards


def _add_parameter(folder: Folder, shards: Shards, base: str, name: str) -> None:
    inner = Folder(folder / f"{base}{name}", folder.follow_links)
    files = [file for file in inner.names() if file.endswith(".pt")]
    if "fp32.pt" not in files:
        raise CheckpointError(inner / "fp32.pt", "does not exist", tensor=name)
    for file_name in files:
        file, key = load(folder, f"{base}{name}/{file_name}"), file_name.removesuffix(".pt")
        if key == "step":
            shards.parameters[name].step = step_of(folder, file.tree)
            continue
        ref = file.value("param", kind=TensorRef) if isinstance(file.tree, dict) else file.value(kind=TensorRef)
        parameter = shards.parameters.setdefault(name, Parameter(name, ref.shape))
        if parameter.numel != ref.numel:
            raise CheckpointError(file.path, f"has shape {ref.shape}, and the parameter {parameter.shape}", tensor=name)
        parameter.states[key] = [piece_of(file, ref, name)]
        if key == "fp32":
            parameter.copied = isinstance(file.tree, dict) and (COPIED in file.tree or set(file.tree) == {"param"})
