"""Resuming where the layout is another than that of the save: P, D, EP, schedule, chunks, ZeRO stage, offload.

The files are those of any checkpoint of DeepSpeed; checkpoint/convert/deepspeed_io.py lists which run of which
parameter lies where in them, and every rank reads the runs it holds. What belongs to the training as a whole goes on:
steps, learning rate, the order of the samples, router biases. What belonged to a rank (its random generators) or to the
layout (a schedule chosen for it) does not.
"""

from __future__ import annotations

import logging
import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_ext.checkpoint.convert import dtype as dtypes
from megatron_ext.checkpoint.convert.blocks import Files
from megatron_ext.checkpoint.convert.deepspeed_io import read
from megatron_ext.checkpoint.convert.deepspeed_shards import Parameter, Piece, Shards
from megatron_ext.checkpoint.convert.folder import Folder
from megatron_ext.checkpoint.convert.formats.deepspeed import DeepSpeed
from megatron_ext.checkpoint.convert.tensors import BITS, SIZES, Stored, as_bytes
from megatron_ext.config.errors import CheckpointError
from megatron_ext.data import MicroBatchLoader
from megatron_ext.engine import restoring
from megatron_ext.parallel import agreed

log = logging.getLogger("megatron_ext")

SCHEDULED = ("lr", "betas", "momentum")
"""What learning-rate schedulers set in an optimizer's parameter groups, for the step to come."""
_IN_PLACE = "load_checkpoint it in the layout of the save"
_CALLERS = "client_state is the likely place of an object that is more than data, and only load_checkpoint in the " \
           "layout of the save runs the code that makes one"
_PLAIN_DATA = f"{_IN_PLACE}, or save client_state as numbers, text, lists, dicts, tensors and arrays"


class ShardNumbers:
    """See `restoring.Numbers`. To be closed."""

    def __init__(self, folder: Folder, shards: Shards):
        self.where, self.shards = folder.path / shards.tag, shards
        self._all: dict[str, Parameter] = {**shards.buffers, **shards.parameters}
        self._files = Files(folder)

    def __enter__(self) -> ShardNumbers:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.__exit__(*error)

    def has(self, name: str, state: str | None = None) -> bool:
        pieces = self._pieces(name, state) if name in self._all else []
        there, due = sum(piece.length for piece in pieces), self._all[name].numel if pieces else 0
        if there < due:
            raise CheckpointError(self.where, f"has {there} of {due} numbers of its {state or 'weight'}", tensor=name)
        kinds = {piece.dtype for piece in pieces}
        if len(kinds) > 1 or not kinds <= DeepSpeed.dtypes:
            raise CheckpointError(self.where, f"is {' and '.join(sorted(kinds))}",
                                  f"must be one of {', '.join(sorted(DeepSpeed.dtypes))}", tensor=name)
        return bool(pieces)

    def step(self, name: str) -> int | None:
        return self._all[name].step

    def read(self, name: str, state: str | None, start: int, stop: int) -> Tensor:
        pieces = self._pieces(name, state)
        dtype = pieces[0].dtype
        out, filled, size = np.empty(stop - start, BITS[SIZES[dtype]]), 0, SIZES[dtype]
        for piece in pieces:
            low, high = max(start, piece.start), min(stop, piece.start + piece.length)
            if low < high:
                stored = Stored(name, piece.file, piece.offset, piece.dtype, (piece.length,), ())
                self._files.read_into(stored, (low - piece.start) * size, as_bytes(out[low - start:high - start]))
                filled += high - low
        if filled != stop - start:
            raise CheckpointError(self.where, f"has {filled} of the numbers {start} to {stop}", tensor=name)
        return dtypes.to_torch(out, dtype)

    def _pieces(self, name: str, state: str | None) -> list[Piece]:
        """A weight that has none of its own (universal checkpoints) is what its master says."""
        parameter = self._all[name]
        return parameter.states.get(state, []) if state else parameter.weight or parameter.fp32


def resume(engine: Any, directory: Path, tag: str, *, strict: bool, optimizer: bool, schedule: bool,
           module_only: bool, why: Sequence[str], rank_state: dict[str, Any] | None, client: bool = True,
           follow_links: bool = False) -> dict[str, Any]:
    """Loads a checkpoint of ours, or a universal one, into whatever this job's layout is; collective.

    Args:
        engine: ours.
        directory, tag: where.
        strict: refuse a checkpoint that lacks a tensor of this model.
        optimizer: take the optimizer's state.
        schedule: take the state of the learning-rate scheduler.
        module_only: take weights and nothing else.
        why: how the layouts differ, for the log; empty if they do not.
        rank_state: what rank 0 saved of itself; None of a universal checkpoint.
        client: the caller wants its `client_state`.
        follow_links: read through symbolic links.

    Returns:
        The caller's `client_state`; as inert records, if `client` is not set.

    Raises:
        CheckpointError: on all ranks, before anything is changed.
    """
    control = engine.process_groups.control
    with agreed(control), restoring.refusing(directory / tag):
        folder = Folder(directory, follow_links)
        with _naming_the_caller():
            shards = read(folder, tag)
            client_state = _client_state(folder, shards) if client else shards.client_state
        _check(engine, folder, shards, optimizer)
        numbers = ShardNumbers(folder, shards)
        restoring.check_states(engine, numbers, optimizer, strict)
        lr_scheduler = _fitted(engine, shards) if schedule and not module_only else None
    with agreed(control), restoring.refusing(directory / tag), numbers:
        restoring.restore(engine, numbers, optimizer)
    restoring.finish(engine)
    if engine.process_groups.rank == 0:
        moved = f" into another layout ({', '.join(why)}). Random generators belong to ranks and start as this job " \
                "seeds them; dropout, keyed by (seed, step, micro-batch, layer), goes on" if why else ""
        print(f"megatron_ext: {directory / tag} is loaded{moved}", flush=True)
    if not module_only:
        _count_on(engine, shards)
        if lr_scheduler is not None:
            engine.lr_scheduler.load_state_dict(lr_scheduler)
            _set_scheduled(engine, shards)
        _go_on_with_data(engine, rank_state)
    return client_state


@contextmanager
def _naming_the_caller() -> Iterator[None]:
    """Where a model file names what would have to be executed: ours and DeepSpeed's part of it never do."""
    try:
        yield
    except CheckpointError as error:
        if Path(error.path).name.startswith("mp_rank_") and re.match(r"names '[^']*', which", error.found):
            raise CheckpointError(error.path, error.found, _CALLERS, _PLAIN_DATA) from None
        raise


def _client_state(folder: Folder, shards: Shards) -> dict[str, Any]:
    """As it was given, not as inert records; numbers stay in the file until somebody asks for them.

    Raises:
        CheckpointError: it holds more than data.
    """
    if shards.kind != "native" or not shards.client_state:
        return shards.client_state
    path = folder / f"{shards.tag}mp_rank_00_model_states.pt"
    with restoring.refusing(path), torch.serialization.safe_globals(_data_classes()):
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return {key: value for key, value in saved.items() if str(key) in shards.client_state}


def _data_classes() -> list[Any]:
    """What is likely in a `client_state` and no more than data: NumPy's arrays and scalars, arguments of a script."""
    makers = [np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]]
    return [Namespace, np.ndarray, np.dtype, *makers, *{type(np.dtype(code)) for code in "?bhilqBHILQefdFD"}]


def _check(engine: Any, folder: Folder, shards: Shards, optimizer: bool) -> None:
    where = folder.path / shards.tag
    zero = (shards.state.get("ds_config") or {}).get("zero_optimization") or {}
    if isinstance(zero, dict) and zero.get("round_robin_gradients"):
        raise CheckpointError(where, "was saved with zero_optimization.round_robin_gradients = True",
                              "DeepSpeed then does not say where a parameter lies", _IN_PLACE)
    if not optimizer:
        return
    if shards.unmapped:
        raise CheckpointError(where, shards.unmapped, "its optimizer cannot go on in another layout",
                              f"{_IN_PLACE}, or pass load_optimizer_states=False")
    kept = {state for p in shards.parameters.values() for state in p.states} - {restoring.MASTER}
    if further := sorted(kept - set(restoring.MOMENTS)):
        raise CheckpointError(where, f"holds {further[0]} of the optimizer", "only Adam's moments move to another "
                              "layout", f"{_IN_PLACE}, or pass load_optimizer_states=False")
    if kept and type(engine.basic_optimizer).__name__ not in restoring.ADAMS:
        raise CheckpointError(where, "holds Adam's moments", f"this job has {type(engine.basic_optimizer).__name__}",
                              "use the optimizer of the save, or pass load_optimizer_states=False")


def _count_on(engine: Any, shards: Shards) -> None:
    state = shards.state
    engine.global_steps = shards.step or 0
    engine.global_samples = state.get("global_samples", engine.global_steps * engine.train_batch_size())
    engine.skipped_steps = state.get("skipped_steps", 0)


def _fitted(engine: Any, shards: Shards) -> dict[str, Any] | None:
    """The scheduler's state with as many entries as this rank has parameter groups: with experts one more.

    Raises:
        CheckpointError: groups had rates of their own, and there are more or fewer here.
    """
    state = shards.state.get("lr_scheduler")
    if engine.lr_scheduler is None or not isinstance(state, dict):
        return None
    then, now = len(shards.param_groups), len(engine.basic_optimizer.param_groups)
    fitted = dict(state)
    for key, value in state.items():
        if isinstance(value, list) and len(value) == then != now:
            if any(each != value[0] for each in value):
                raise CheckpointError(shards.tag, f"has {key} of {then} parameter groups in its scheduler",
                                      f"this rank has {now}", "pass load_lr_scheduler_states=False")
            fitted[key] = value[:1] * now
    return fitted


def scheduled(engine: Any) -> list[dict[str, Any]]:
    """For the manifest: what schedulers have set in each of this rank's parameter groups, and the group's members."""
    names = {p: name for name, p in engine.module.named_parameters()}
    return [{"values": {key: _plain(group[key]) for key in SCHEDULED if key in group},
             "parameters": [names[p] for p in parameters]}
            for group, parameters in zip(_param_groups(engine), restoring.groups_of(engine), strict=True)]


def _set_scheduled(engine: Any, shards: Shards) -> None:
    """The rates for the step to come, which DeepSpeed leaves to the optimizer's own state."""
    if shards.manifest is None and getattr(engine.lr_scheduler, "last_batch_iteration", -1) >= 0:
        engine.lr_scheduler.step(engine.lr_scheduler.last_batch_iteration)  # what it did after the last step
    kept = [{key: group[key] for key in SCHEDULED if key in group} for group in shards.param_groups]
    common = kept[0] if kept and all(values == kept[0] for values in kept) else {}
    of = {name: entry["values"] for entry in (shards.manifest or {}).get("scheduled", [])
          for name in entry["parameters"]}
    names = {p: name for name, p in engine.module.named_parameters()}
    for group, parameters in zip(_param_groups(engine), restoring.groups_of(engine), strict=True):
        values = next((of[names[p]] for p in parameters if names[p] in of), common)
        group.update({key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _param_groups(engine: Any) -> list[dict[str, Any]]:
    return getattr(engine.basic_optimizer, "param_groups", [])


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _go_on_with_data(engine: Any, rank_state: dict[str, Any] | None) -> None:
    """The next global batch is the one that would have come: the position counts samples of all shards."""
    loader, position = engine.training_dataloader, (rank_state or {}).get("data")
    if isinstance(loader, MicroBatchLoader) and position is not None:
        loader.load_state_dict(position)
        engine.set_dataiterator(None)
    elif loader is not None and engine.process_groups.rank == 0:
        log.warning("the checkpoint holds no position in the training data that another layout can take over: they "
                    "start from the beginning")
