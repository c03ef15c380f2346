"""Optimizer states in DeepSpeed's files: ZeRO-1/2 shards, and optimizers without ZeRO.

ZeRO flattens each parameter group, pads it and cuts it evenly over the data-parallel ranks; a shard says for each
parameter which run of the rank's partition is its (`param_slice_mappings`). The runs of a parameter, in the order of
the ranks, are the flattened parameter. Stacked experts are cut over those ranks only that hold the same experts: rank R
of our layout is replica R mod D, and its experts are block (R mod D) mod N.

Without ZeRO the state goes by the number of a parameter, which is its place in the model.

Letters: D replicas, N expert-parallel ranks, R data-parallel rank.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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
from megatron_ext.checkpoint.convert.folder import Folder
from megatron_ext.checkpoint.convert.pickles import Record, TensorRef
from megatron_ext.checkpoint.convert.tensors import Shape
from megatron_ext.config.errors import CheckpointError

ZERO = re.compile(r"((?:bf16_|fp16_)?zero)_pp_rank_(\d{1,6})_mp_rank_(\d{1,6})_?optim_states\.pt")
WITHOUT_ZERO = re.compile(r"expp_rank_(\d{1,6})_mp_rank_(\d{1,6})_optim_states\.pt")


class Blocks(NamedTuple):
    """How our engine spreads experts: D replicas of a pipeline, N blocks of experts."""

    replicas: int = 1
    experts: int = 1

    def of(self, rank: int) -> int:
        """The block of experts that a data-parallel rank has."""
        return rank % self.replicas % self.experts


def read_zero(folder: Folder, shards: Shards, names: Sequence[str], mp_rank: int, model: File, blocks: Blocks) -> None:
    """Adds the masters and states of one mp_rank from the shards of its data-parallel ranks.

    Args:
        folder: read through.
        shards: has all parameters already.
        names: of the files in the tagged folder.
        mp_rank: number in the file names.
        model: the model file of that rank.
        blocks: of experts.

    Raises:
        CheckpointError: a shard is missing, damaged, or of ZeRO-3; runs that are not the whole parameter.
    """
    found = {int(match[2]): name for name in names if (match := ZERO.fullmatch(name)) and int(match[3]) == mp_rank}
    kinds = sorted({match[1] for name in names if (match := ZERO.fullmatch(name))}) or ["zero"]
    if len(kinds) > 1:
        raise CheckpointError(folder / shards.tag, f"has shards {kinds[0]}_pp_rank_* and {kinds[1]}_pp_rank_*",
                              "two checkpoints were saved under one tag")
    pattern = f"{shards.tag}{kinds[0]}_pp_rank_{{}}_mp_rank_{mp_rank:02d}_optim_states.pt"
    count = model.value("dp_world_size", kind=int)
    for rank in range(min(count, len(found) + 1)):
        if rank not in found:
            raise CheckpointError(folder / pattern.format(rank), "does not exist",
                                  f"the checkpoint was saved by {count} data-parallel ranks")
    if len(found) > count:
        raise CheckpointError(folder / (shards.tag + found[max(found)]), "is of no rank",
                              f"the checkpoint was saved by {count} data-parallel ranks")
    if model.value("ds_config", "zero_optimization", "round_robin_gradients", kind=bool, default=False):
        shards.unmapped = "was saved with round_robin_gradients: DeepSpeed then does not say where a parameter lies"
        return
    local = {name_of(model, name): shape_of(model, shape, name) for group in model.value("param_shapes", kind=list)
             for name, shape in (group.items() if isinstance(group, dict) else ())}
    mine = {name: shards.parameters[name] for name in local if name in shards.parameters}
    if lost := [name for name in local if name not in mine]:
        raise CheckpointError(model.path, "has optimizer state and no weight", tensor=lost[0])
    # A tied weight has its states on every rank that uses it, all the same: those of the first count.
    fresh = {name: parameter for name, parameter in mine.items() if not parameter.states}
    filled: dict[tuple[str, str, int], int] = {}
    for rank in range(count):
        _add_shard(folder, shards, load(folder, shards.tag + found[rank]), fresh, local, blocks.of(rank), filled)
    for (name, state, _), numbers in filled.items():
        if numbers != math.prod(local[name]):
            raise CheckpointError(folder / pattern.format("*"), f"have {numbers} numbers of {state}, and the parameter "
                                  f"{math.prod(local[name])}", tensor=name)
    for parameter in fresh.values():
        for pieces in parameter.states.values():  # blocks of experts come in turns
            pieces.sort(key=lambda piece: piece.start)
    shares = Counter(name for name, state, _ in filled if state == "fp32")
    for name, parameter in fresh.items():
        if shares[name] != (blocks.experts if parameter.expert else 1):
            raise CheckpointError(model.path, "has a parameter that no shard of the optimizer mentions", tensor=name)


def _add_shard(folder: Folder, shards: Shards, file: File, parameters: Mapping[str, Parameter],
               local: Mapping[str, Shape], block: int, filled: dict[tuple[str, str, int], int]) -> None:
    """The runs that one rank has. `filled` counts numbers by (parameter, state, block of experts)."""
    state = "optimizer_state_dict"
    stage = file.value(state, "zero_stage", kind=object, default=1)
    stage = stage.args[0] if isinstance(stage, Record) and stage.args else stage
    masters = file.value(state, "single_partition_of_fp32_groups", kind=list, default=None)
    if stage in (3, "weights") or masters is None:
        raise CheckpointError(file.path, "is a shard of ZeRO-3", "only shards of ZeRO-1 and 2 are read",
                              "make a universal checkpoint of it with python -m deepspeed.checkpoint.ds_to_universal")
    if file.value(state, "param_slice_mappings", kind=list, default=None) is None:
        raise CheckpointError(file.path, "has no param_slice_mappings", "it was written by a DeepSpeed before 0.7.4",
                              "load and save it once with a newer one")
    flat = _flat_states(file, state, len(masters))
    if not shards.param_groups:
        shards.param_groups = scalars(file.value(state, "base_optimizer_state", kind=dict | list))
    for number, master in enumerate(masters):
        mapping = file.value(state, "param_slice_mappings", number, kind=dict)
        tensors: dict[str, Any] = {"fp32": master, **flat[number]}
        step, numbers = step_of(folder, tensors.pop("step", None)), getattr(master, "numel", 0)
        for name, address in mapping.items():
            if name not in local:
                raise CheckpointError(file.path, "is not among the parameters of the model file",
                                      tensor=name_of(file, name))
            start, length = (address.get(key) if isinstance(address, Record) else None for key in ("start", "numel"))
            if type(start) is not int or type(length) is not int:
                raise CheckpointError(file.path, "has no address in the partition", tensor=name)
            if name not in parameters:
                continue
            parameter = parameters[name]
            share = block if parameter.expert else 0
            parameter.step = step if parameter.step is None else parameter.step
            if step != parameter.step:
                raise CheckpointError(file.path, f"is at step {step}, and at {parameter.step} in another shard",
                                      "shards are of two saves", tensor=name)
            for key, tensor in tensors.items():
                # Not a scalar of an optimizer other than Adam; states have the padding at the end that masters lack.
                if not isinstance(tensor, TensorRef) or tensor.shape == () or tensor.numel < numbers:
                    continue
                done = filled.get((name, key, share), 0)
                base = share * math.prod(local[name]) + done
                parameter.states.setdefault(key, []).append(piece_of(file, tensor, name, base, start, length))
                filled[name, key, share] = done + length


def _flat_states(file: File, state: str, groups: int) -> list[dict[str, Any]]:
    """For each group the optimizer's state of its flat partition; elastic checkpoints have them as a list."""
    base = file.value(state, "base_optimizer_state", kind=dict | list)
    found: list[dict[str, Any]] = []
    for number in range(groups):
        keys = (number,) if isinstance(base, list) else ("state", number)
        found.append(dict(file.value(state, "base_optimizer_state", *keys, kind=dict, default={})))
        if isinstance(base, list) and "step" not in found[-1]:
            found[-1]["step"] = file.value(state, "base_optimizer_state_step", kind=object, default=None)
    return found


def scalars(base: Any) -> list[dict[str, Any]]:
    groups = base.get("param_groups") if isinstance(base, dict) else None
    return [{key: value for key, value in group.items() if key != "params" and not isinstance(value, TensorRef | list)}
            for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []


# -- without ZeRO

def read_without_zero(folder: Folder, shards: Shards, file: File, dense: Sequence[str], experts: Sequence[str],
                      block: int, blocks: int) -> None:
    """Adds the state of an optimizer that is not sharded.

    Args:
        folder: read through.
        shards: has all parameters already.
        file: has it under "optimizer".
        dense, experts: the trainable parameters of the file's rank, in the order of the model.
        block, blocks: which of how many blocks of experts the rank has.
    """
    found = file.value("optimizer", kind=dict, default=None)
    if found is None:
        return
    inner = ("optimizer", "optimizer_state_dict") if "optimizer_state_dict" in found else ("optimizer",)
    groups = file.value(*inner, "param_groups", kind=list)
    named = [names for names in (dense, experts) if names]
    shards.param_groups = shards.param_groups or scalars({"param_groups": groups})
    if len(groups) != len(named):
        shards.unmapped = f"has {len(groups)} parameter groups of its optimizer in {file.path.name}, and without " \
                          "ZeRO a checkpoint does not say which state is which parameter's"
        return
    flat = "fp32_groups_flat" in found
    number = 0
    for group, names in enumerate(named):
        listed = file.value(*inner, "param_groups", group, "params", kind=list)
        if len(listed) != (1 if flat else len(names)):
            shards.unmapped = f"has {len(listed)} parameters in a group of its optimizer in {file.path.name}, and " \
                              f"{len(names)} names for them"
            return
        at = 0
        for position, name in enumerate(names):
            parameter = shards.parameters[name]
            share = parameter.numel // blocks if parameter.expert else parameter.numel
            masters = "fp32_groups_flat" if flat else "fp32_groups"
            where: tuple[Any, ...] = ("optimizer", masters, group) if flat else ("optimizer", masters, group, position)
            tensors = dict(file.value(*inner, "state", number, kind=dict, default={}))
            if masters in found:
                tensors["fp32"] = file.value(*where, kind=TensorRef)
            step = step_of(folder, tensors.pop("step", None))
            parameter.step = step if parameter.step is None else parameter.step
            if parameter.expert or not parameter.states:
                _add_whole(file, parameter, tensors, block * share if parameter.expert else 0, at if flat else None,
                           share)
            at, number = at + share, number + (not flat)
        if flat:
            number += 1
            if (total := file.value("optimizer", "fp32_groups_flat", group, kind=TensorRef).numel) != at:
                raise CheckpointError(file.path, f"has {total} numbers in a group", f"its parameters have {at}")


def _add_whole(file: File, parameter: Parameter, tensors: Mapping[str, Any], start: int, at: int | None,
               length: int) -> None:
    """The states of a parameter that one file has whole, or within the flat tensor of its group from `at` on."""
    for key, tensor in tensors.items():
        if not isinstance(tensor, TensorRef) or tensor.shape == ():
            continue
        if at is None and tensor.numel != length:
            raise CheckpointError(file.path, f"has {key} of shape {tensor.shape}, and the parameter {length} numbers",
                                  "the order of the parameters is not that of the model", tensor=parameter.name)
        parameter.states.setdefault(key, []).append(piece_of(file, tensor, parameter.name, start, at or 0, length))
