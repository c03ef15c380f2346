"""From a checkpoint's numbers, by name, to what this rank holds: weights, FP32 masters and moments, in any layout.

Every parameter of a rank is one run of a tensor of the model in row-major order: all of it or, under expert
parallelism, experts first .. last-1 of the stack. What ZeRO gives a rank of it to step is a run of that run. So any
layout is filled by asking for runs, and a rank reads what it needs and no more, `CHUNK` numbers at a time.

Weights that have a master are made from it, as after every step; the others (frozen ones, buffers) are read.
"""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ext.config.errors import CheckpointError, UserError
from megatron_ext.engine.private import relink_optimizer_state
from megatron_ext.optimizer import AdamW
from megatron_ext.optimizer.adamw import MOMENTS

CHUNK = 1 << 23
"""Numbers that are read at a time."""
MASTER = "fp32"
ADAMS = ("AdamW", "Adam", "FusedAdam", "DeepSpeedCPUAdam")
"""Optimizers with the same state under the same names, of which DeepSpeed chooses by device and offload."""
_DAMAGE = (OSError, EOFError, LookupError, RuntimeError, ValueError, TypeError, AttributeError, pickle.UnpicklingError)
"""What files raise that are damaged, cannot be opened, or were made up."""
_WITHOUT = "leave the moments out: megatron_ext.load.optimizer = false, or load_optimizer_states=False"


class Numbers(Protocol):
    """A checkpoint as a rank sees it. Tensors have the names of the module's state, experts stacked, all of them.

    Attributes:
        where: the folder, for messages.
    """

    where: Path

    def has(self, name: str, state: str | None = None) -> bool:
        """Whether there is a tensor, or its state ("fp32", "exp_avg", "exp_avg_sq").

        Raises:
            CheckpointError: there is a part of it.
        """

    def read(self, name: str, state: str | None, start: int, stop: int) -> Tensor:
        """Numbers start .. stop-1 of a tensor in row-major order, in the dtype they have there.

        Raises:
            CheckpointError: the files end before, or cannot be read.
        """

    def step(self, name: str) -> int | None:
        """Steps that the optimizer has taken with a parameter; None if nothing says."""


class Slot(NamedTuple):
    """A run of a parameter that this rank steps.

    Attributes:
        name: of the parameter.
        start: of the run in the whole tensor of the model.
        count: numbers in it.
        group: number of the optimizer's parameter group.
        stepped: the tensor that the optimizer steps.
        at: where the run begins in it.
    """

    name: str
    start: int
    count: int
    group: int
    stepped: Tensor
    at: int


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Around the reading of files: whatever they make Python raise is their fault, and so `agreed` tells all ranks.

    Args:
        path: the file, or the folder of the files, for the message.

    Raises:
        CheckpointError: instead.
    """
    try:
        yield
    except UserError:
        raise
    except _DAMAGE as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if named is not None:  # what torch.load(weights_only=True) would not execute
            raise CheckpointError(path, f"names '{named[1]}', which is more than data") from None
        said = next(iter(str(error).splitlines()), "")[:300]
        raise CheckpointError(path, f"cannot be read ({type(error).__name__}: {said})") from error


def start_of(p: Tensor) -> int:
    """Where the part of a tensor that this rank holds begins in the whole of it."""
    first = getattr(p, "expert_range", (0, 0))[0]
    return first * (p.numel() // len(p)) if first else 0


def groups_of(engine: Any) -> list[list[nn.Parameter]]:
    """The parameters of the model in each parameter group of the optimizer, in its order."""
    optimizer = engine.optimizer
    if engine.zero_optimization():
        return optimizer.round_robin_bit16_groups  # in the order in which they lie in the partitions
    if hasattr(optimizer, "fp32_groups"):
        return optimizer.fp16_groups
    return [] if optimizer is None else [group["params"] for group in optimizer.param_groups]


def slots_of(engine: Any) -> list[Slot]:
    """Everything that this rank steps, under ZeRO-1/2 with or without offload, or without ZeRO."""
    names = {p: name for name, p in engine.module.named_parameters()}
    optimizer, slots = engine.optimizer, []
    for number, parameters in enumerate(groups_of(engine)):
        if engine.zero_optimization():
            flat = optimizer.single_partition_of_fp32_groups[number]
            first = dist.get_rank(optimizer.real_dp_process_group[number]) * flat.numel()
            for p, offset in zip(parameters, optimizer.round_robin_bit16_offsets[number], strict=True):
                # the run of the group that this rank has, and this parameter's place in it
                low, high = max(offset, first), min(offset + p.numel(), first + flat.numel())
                if low < high:
                    slots.append(Slot(names[p], start_of(p) + low - offset, high - low, number, flat, low - first))
        else:
            masters = optimizer.fp32_groups[number] if hasattr(optimizer, "fp32_groups") else parameters
            slots += [Slot(names[p], start_of(p), p.numel(), number, master, 0)
                      for p, master in zip(parameters, masters, strict=True) if p.requires_grad]
    return slots


def fingerprint(slots: Iterable[Slot]) -> str:
    """Says whether two jobs keep the same runs in the same places on a rank."""
    return hashlib.sha256(repr([(*slot[:4], slot.at) for slot in slots]).encode()).hexdigest()


def check_states(engine: Any, numbers: Numbers, moments: bool, strict: bool = True) -> None:
    """Whether everything is there that `restore` will ask for, on this rank.

    Args:
        engine, numbers, moments: as of `restore`.
        strict: every tensor of the module must be there.

    Raises:
        CheckpointError: a tensor of the module is not, or not all of it; or a moment that other parameters have, one
            of the two, or the count of steps.
    """
    for name in engine.module.state_dict() if strict else ():
        if not numbers.has(name):
            raise CheckpointError(numbers.where, "is missing", "this model has it", tensor=name)
    slots = slots_of(engine)
    for slot in slots:
        numbers.has(slot.name, MASTER)  # raises if it is there in part
    held = [state for state in MOMENTS if moments and any(numbers.has(slot.name, state) for slot in slots)]
    for slot in slots if held else ():
        for state in MOMENTS:
            if not numbers.has(slot.name, state):
                rule = "others have one" if state in held else f"the checkpoint has {held[0]}, and Adam needs both"
                raise CheckpointError(numbers.where, f"is there without {state}", rule, _WITHOUT, tensor=slot.name)
        if numbers.step(slot.name) is None:
            raise CheckpointError(numbers.where, "would have moments and no step",
                                  "the checkpoint does not say its step", _WITHOUT, tensor=slot.name)


def restore(engine: Any, numbers: Numbers, moments: bool) -> None:
    """Fills what this rank holds; nothing collective.

    Args:
        engine: with its optimizer, which may have stepped before.
        numbers: tensors that it has not stay as they are.
        moments: replace the optimizer's moments and steps too, by those that there are.

    Raises:
        CheckpointError: see `Numbers.read`.
    """
    slots = slots_of(engine)
    mastered = {slot.name for slot in slots}
    if engine.zero_optimization():  # whose masters may all lie on other ranks
        names = {p: name for name, p in engine.module.named_parameters()}
        mastered |= {names[p] for group in groups_of(engine) for p in group}
    with torch.no_grad():
        for name, value in engine.module.state_dict(keep_vars=True).items():
            if name not in mastered and numbers.has(name):
                _fill(value.data, numbers, name, None, start_of(value))
        for slot in slots:
            if numbers.has(slot.name):
                state = MASTER if numbers.has(slot.name, MASTER) else None
                _fill(_run(slot.stepped.data, slot), numbers, slot.name, state, slot.start)
        if moments and engine.optimizer is not None:
            _restore_state(engine, slots, numbers)


def _restore_state(engine: Any, slots: list[Slot], numbers: Numbers) -> None:
    """The optimizer's own state, a whole new one."""
    basic = engine.basic_optimizer
    basic.state.clear()
    for group in basic.param_groups:
        group.pop("step", None)
    dtype = basic.moment_dtype if isinstance(basic, AdamW) else None
    for slot in slots:
        for key in MOMENTS:
            if numbers.has(slot.name, key):
                state = basic.state[slot.stepped]
                if key not in state:
                    state[key] = torch.zeros_like(slot.stepped, dtype=dtype, requires_grad=False)
                _fill(_run(state[key], slot), numbers, slot.name, key, slot.start)
                _set_step(basic, slot, numbers.step(slot.name) or 0)


def _set_step(basic: Any, slot: Slot, step: int) -> None:
    group, state = basic.param_groups[slot.group], basic.state[slot.stepped]
    step = max(step, int(state.get("step", 0)))
    state["step"] = torch.tensor(float(step)) if type(basic).__module__.startswith("torch.") else step
    group["step"] = max(step, group.get("step", 0))  # where DeepSpeed's FusedAdam has it


def finish(engine: Any) -> None:
    """What follows `restore`: 16-bit weights out of the masters, which lie on other ranks too; collective."""
    optimizer = engine.optimizer
    if engine.zero_optimization():
        optimizer.update_lp_params()
        relink_optimizer_state(optimizer)
    elif hasattr(optimizer, "fp32_groups"):
        for masters, weights in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for master, weight in zip(masters, weights, strict=True):
                weight.data.copy_(master.data)
    engine.weight_cache.clear()


def _run(tensor: Tensor, slot: Slot) -> Tensor:
    """The place of a slot in a tensor shaped like what is stepped; the whole of it where it is no flat partition."""
    return tensor if slot.count == tensor.numel() else tensor.narrow(0, slot.at, slot.count)


def _fill(target: Tensor, numbers: Numbers, name: str, state: str | None, start: int) -> None:
    """Reads a run into a tensor, chunk by chunk; one that is no dense array is filled through a copy."""
    flat = (target if target.is_contiguous() else torch.empty(target.shape, dtype=target.dtype)).view(-1)
    for low in range(0, flat.numel(), CHUNK):
        high = min(low + CHUNK, flat.numel())
        flat[low:high].copy_(numbers.read(name, state, start + low, start + high))
    if not target.is_contiguous():
        target.copy_(flat.view(target.shape))


def compatible(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether an optimizer can go on with the state of another, by their entries in the manifest."""
    return then["type"] == now["type"] or (then["type"] in ADAMS and now["type"] in ADAMS)
