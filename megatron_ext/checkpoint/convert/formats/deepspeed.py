"""Training checkpoints of DeepSpeed: our engine's, stock ZeRO-0/1/2, universal and PipelineModule's; universal written.

What is written is the least that DeepSpeed's own loader needs ("checkpoint": {"load_universal": true}):

    latest_universal                                the tag
    <tag>/zero/<parameter>/fp32.pt                  {"param": tensor}: the FP32 master, or for want of one the weight in
                                                    its own dtype, which the loader copies into its master just as well
    <tag>/zero/<parameter>/{exp_avg,exp_avg_sq,step}.pt     where there are moments
    <tag>/zero/optimizer_state.pt                   what all parameters share
    <tag>/mp_rank_00_model_states.pt                buffers (the router's bias) and counters

Weights are in no other place: the loader does not look for them in the mp_rank file, and every rank reads it whole.
Where there are masters, the weights as the model has them are carried beside. Stock DeepSpeed leaves buffers alone; our
engine takes them from the mp_rank file.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from megatron_ext.checkpoint.convert import deepspeed_io, torch_file
from megatron_ext.checkpoint.convert.deepspeed_io import COPIED, LATEST_UNIVERSAL, UNIVERSAL
from megatron_ext.checkpoint.convert.deepspeed_shards import Parameter, Piece, Shards
from megatron_ext.checkpoint.convert.folder import Folder
from megatron_ext.checkpoint.convert.formats import deepspeed_names
from megatron_ext.checkpoint.convert.formats.deepspeed_names import Whole
from megatron_ext.checkpoint.convert.formats.layout import CONFIG, Layout, Options, documents_of, read_model
from megatron_ext.checkpoint.convert.model import Model
from megatron_ext.checkpoint.convert.source import CARRIED, Reading
from megatron_ext.checkpoint.convert.tensors import (
    SIZES,
    Entry,
    Part,
    Stored,
    TargetFile,
    renamed,
    reshaped,
    whole,
)
from megatron_ext.checkpoint.convert.torch_file import Slot
from megatron_ext.config.errors import CheckpointError

_VERSION = "0.19.8"
"""Of the DeepSpeed whose files these are: its loader asks."""
_GROUPS = 1024
"""The loader goes through as many parameter groups as both the job and the checkpoint have: more than any job has."""
_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")
_TAG = "universal"
NAMES = ("megatron_ext", "transformers")


class DeepSpeed:
    """See formats.Format."""

    name = "deepspeed"
    title = "DeepSpeed"
    dtypes = frozenset({"BF16", "F16", "F32"})
    states = frozenset({"fp32", "exp_avg", "exp_avg_sq"})
    options = frozenset({"names"})

    def detect(self, folder: Folder) -> bool:
        return deepspeed_io.is_checkpoint(folder)

    # -- reading

    def read(self, folder: Folder, config: Mapping[str, Any] | None) -> Reading:
        shards = deepspeed_io.read(folder)
        model = _model(folder, shards, config)
        known = deepspeed_names.known(model)
        parameters = [*shards.parameters.values(), *shards.buffers.values()]
        if shards.kind == "pipeline":
            called = deepspeed_names.of_pipeline(model, {p.name: p.shape for p in parameters})
            parameters = _merged(parameters, called)
        else:
            called = deepspeed_names.unwrapped(p.name for p in parameters)
        masters = folder.has(CARRIED)
        stored: list[Stored] = []
        for parameter in [*parameters, *shards.copies]:
            found = known.get(called[parameter.name])
            if found is None:
                stored.append(_unknown(folder, parameter, called[parameter.name]))
                continue
            for state, pieces in _pieces(parameter, masters):
                _check(folder, parameter, found, pieces)
                suffix = "" if state is None else f"@{state}"
                stored += [_stored(model, found, parameter.name + suffix, suffix, piece) for piece in pieces]
        step, unread = _step(shards)
        documents = [name for name in documents_of(folder, _SCRIPTS) if name != "megatron_ext.json"]
        return Reading(model, stored, [], _layout(shards), documents, step, unread)

    # -- writing

    def lay_out(self, model: Model, entries: Mapping[str, Entry], options: Options) -> Layout:
        if options.names not in NAMES:
            raise CheckpointError("--names", f"is {options.names!r}", f"must be one of {', '.join(NAMES)}")
        tag = _TAG if options.step is None else f"global_step{options.step}_{_TAG}"
        layout = Layout([], documents={LATEST_UNIVERSAL: tag.encode()})
        buffers: list[Stored] = []
        shapes: dict[str, tuple[int, ...]] = OrderedDict()
        for name, found in deepspeed_names.dialect(model, options.names == "transformers").items():
            if found.tensors[0] not in entries:
                continue
            if _is_buffer(model, name):
                entry = entries[name]
                buffers.append(renamed(name, name, "", -1, entry.dtype, entry.shape))
                continue
            shapes[name] = found.shape
            experts = len(found.tensors) > 1 and options.names == "megatron_ext"
            layout.files += self._parameter(f"{tag}/{UNIVERSAL}", name, found, entries, options.step, experts, layout)
        common = {"ds_version": _VERSION, "param_groups": [{"params": []} for _ in range(_GROUPS)]}
        layout.files.append(torch_file.lay_out(f"{tag}/{UNIVERSAL}/optimizer_state.pt", common, []))
        layout.files.append(torch_file.lay_out(f"{tag}/mp_rank_00_model_states.pt",
                                               _model_file(buffers, shapes, options.step), buffers))
        return layout

    def _parameter(self, base: str, parameter: str, found: Whole, entries: Mapping[str, Entry], step: int | None,
                   experts: bool, layout: Layout) -> Iterator[TargetFile]:
        """The files of one parameter."""
        path = f"{base}/{parameter}"
        has = [state for state in ("fp32", "exp_avg", "exp_avg_sq") if f"{found.tensors[0]}@{state}" in entries]
        for name in found.tensors:
            if lost := [state for state in self.states if (f"{name}@{state}" in entries) != (state in has)]:
                raise CheckpointError(path, f"would be partly without {lost[0]}",
                                      "the experts of a layer are one parameter", tensor=name)
        if "fp32" in has:
            for name in found.tensors:
                layout.carried[name] = "a universal checkpoint holds the FP32 masters of the weights"
        else:
            has.insert(0, "")
        for state in has:
            suffix = f"@{state}" if state else ""
            target = _target(parameter, found, suffix, entries[found.tensors[0] + suffix].dtype)
            if len({entries[name + suffix].dtype for name in found.tensors}) > 1:
                raise CheckpointError(path, "would be of two dtypes", "the experts of a layer are one parameter",
                                      "choose one with --dtype", tensor=found.tensors[0])
            tree: dict[str, Any] = {"param": Slot(target.name), "cat_dim": 0}
            if experts:
                tree |= {"is_expert_param": True, "ep_num_experts": found.shape[0]}
            if not state:
                tree[COPIED] = True
            yield torch_file.lay_out(f"{path}/{state or 'fp32'}.pt", tree, [target])
        if any(state.startswith("exp_") for state in has):
            if step is None:
                raise CheckpointError(path, "would have moments and no step", "the source does not say its step",
                                      "leave the moments out with --optimizer drop", tensor=found.tensors[0])
            yield torch_file.lay_out(f"{path}/step.pt", torch.tensor(float(step)), [])



def _is_buffer(model: Model, name: str) -> bool:
    tensor = model.table.get(name)
    return tensor is not None and (tensor.row.fp32 or tensor.row.optional)


def _target(parameter: str, found: Whole, suffix: str, dtype: str) -> Stored:
    """A tensor that is canonical tensors one after the other."""
    if len(found.tensors) == 1:
        return renamed(parameter + suffix, found.tensors[0] + suffix, "", -1, dtype, found.shape)
    experts, columns = found.shape[0], found.shape[2]
    each = len(found.tensors) // experts
    rows = found.shape[1] // each
    view, box = reshaped((rows, columns), (1, rows, columns)), whole((1, rows, columns))
    parts = [Part(name + suffix, ((i // each, i // each + 1), (i % each * rows, i % each * rows + rows), (0, columns)),
                  box, view) for i, name in enumerate(found.tensors)]
    return Stored(parameter + suffix, "", -1, dtype, found.shape, tuple(parts))


def _model_file(buffers: list[Stored], shapes: Mapping[str, tuple[int, ...]], step: int | None) -> dict[str, Any]:
    """What DeepSpeed's loader asks an mp_rank file for."""
    return {
        "module": {buffer.name: Slot(buffer.name) for buffer in buffers},
        "buffer_names": [buffer.name for buffer in buffers], "optimizer": None,
        "param_shapes": [OrderedDict((name, torch.Size(shape)) for name, shape in shapes.items())],
        "frozen_param_shapes": None, "frozen_param_fragments": None, "shared_params": {},
        # After n steps DeepSpeed's schedulers have counted from 0 to n - 1.
        "lr_scheduler": {"last_batch_iteration": -1 if step is None else step - 1},
        "data_sampler": None, "random_ltd": None, "skipped_steps": 0, "global_steps": step or 0,
        "dp_world_size": 1, "mp_world_size": 1, "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": {}, "ds_version": _VERSION, "universal_checkpoint_info": {"universal_checkpoint_version": 0.4},
    }


def _model(folder: Folder, shards: Shards, config: Mapping[str, Any] | None) -> Model:
    """Of the config given, or of the `config.json` in the folder, the tagged folder, or the one that it lies in."""
    places = [folder, *([Folder(folder / shards.tag, folder.follow_links)] if shards.tag else
                        [Folder(folder.path.absolute().parent, folder.follow_links)])]
    place = next((place for place in places if place.has(CONFIG)), None)
    if config is None and place is None:
        raise CheckpointError(folder / CONFIG, "does not exist", "a checkpoint of DeepSpeed does not say of what model "
                              "it is", "pass --config with the config.json of the model")
    return read_model(folder if place is None else place, config)


def _merged(parameters: list[Parameter], called: Mapping[str, str]) -> list[Parameter]:
    """Weights with the states of what a PipelineModule ties, which have another name."""
    states = {called[p.name]: p for p in parameters if not p.weight}
    merged: list[Parameter] = []
    for p in parameters:
        other = states.pop(called[p.name], None) if p.weight and not p.states else None
        merged.append(p if other is None else replace(p, states=other.states, step=other.step))
    left = {id(p) for p in states.values()}
    return [p for p in merged if p.weight or id(p) in left]


def _pieces(parameter: Parameter, masters: bool) -> Iterator[tuple[str | None, list[Piece]]]:
    """The weight (None) and the states. A weight that is nowhere else is what the master says.

    Args:
        parameter: of the checkpoint.
        masters: weights may lie beside, carried there by an earlier conversion.
    """
    weight, fp32 = parameter.weight, parameter.fp32
    if not weight and fp32 and (parameter.copied or not masters):
        yield None, fp32
    else:
        yield None, weight
        if not parameter.copied:
            yield "fp32", fp32
    for state, pieces in parameter.states.items():
        if state in ("exp_avg", "exp_avg_sq"):
            yield state, pieces


def _check(folder: Folder, parameter: Parameter, found: Whole, pieces: list[Piece]) -> None:
    """Raises if a parameter is not what the config makes of it. (ZeRO-3 leaves flat ones in universal checkpoints.)"""
    if not pieces:
        return
    if parameter.shape not in (found.shape, (math.prod(found.shape),)):
        raise CheckpointError(folder / pieces[0].file, f"has shape {parameter.shape}, but config.json makes it "
                              f"{found.shape}", tensor=parameter.name)
    for piece in pieces:
        if piece.dtype not in SIZES:
            raise CheckpointError(folder / piece.file, f"is {piece.dtype}", f"only {', '.join(SIZES)} are read",
                                  tensor=parameter.name)


def _stored(model: Model, found: Whole, name: str, suffix: str, piece: Piece) -> Stored:
    """A piece of a parameter as a tensor in a file."""
    size = deepspeed_names.size(found)
    first = piece.start // size if size else 0
    if piece.length == size and piece.start == first * size:
        tensor = found.tensors[first]
        return renamed(name, tensor + suffix, piece.file, piece.offset, piece.dtype, model.table[tensor].shape)
    parts: list[Part] = []
    at = piece.start
    while at < piece.start + piece.length:
        tensor, low = found.tensors[at // size], at % size
        high = min(size, low + piece.start + piece.length - at)
        parts.append(Part(tensor + suffix, ((at - piece.start, at - piece.start + high - low),), ((low, high),),
                          reshaped(model.table[tensor].shape, (size,))))
        at += high - low
    return Stored(name, piece.file, piece.offset, piece.dtype, (piece.length,), tuple(parts))


def _unknown(folder: Folder, parameter: Parameter, called: str) -> Stored:
    """A parameter that no model has, under its own name: it is refused by it."""
    pieces = parameter.weight or next(iter(parameter.states.values()), [])
    if not pieces:
        raise CheckpointError(folder.path, "has no place in the model of config.json", tensor=parameter.name)
    return renamed(parameter.name, called, pieces[0].file, pieces[0].offset, "F32", parameter.shape)


def _step(shards: Shards) -> tuple[int | None, str]:
    """The step of the optimizer, or else of the training; and what of its state cannot be read."""
    states = {state for parameter in shards.parameters.values() for state in parameter.states}
    steps = sorted({-1 if p.step is None else p.step for p in shards.parameters.values() if p.exp_avg})
    unread = "" if shards.unmapped is None else f"optimizer state that nobody can tell apart (it {shards.unmapped})"
    if further := sorted(states - {"fp32", "exp_avg", "exp_avg_sq"}):
        unread = unread or f"{further[0]} of an optimizer that is no AdamW"
    if len(steps) > 1:
        unread = unread or f"optimizer state of several steps ({', '.join(map(str, steps))})"
    return (steps[0] if len(steps) == 1 and steps[0] >= 0 else shards.step), unread


def _layout(shards: Shards) -> str:
    kind = {"native": "of megatron_ext", "zero": "stock", "universal": "universal", "pipeline": "of a PipelineModule"}
    placement = (shards.manifest or {}).get("placement", {})
    more = "".join(f", {placement[key]} {word}" for key, word in (
        ("stages", "pipeline ranks"), ("replicas", "replicas"), ("expert_parallel", "expert-parallel")
    ) if key in placement)
    zero = f", ZeRO-{shards.manifest['zero_stage']}" if shards.manifest else ""
    tag = f" ({shards.tag.rstrip('/')})" if shards.tag else ""
    return f"{kind[shards.kind]}{tag}{more}{zero}"
