"""What lies where in a DeepSpeed checkpoint, parameter by parameter, whatever the model: words for deepspeed_io.py.

A parameter has its global shape (all experts, all ranks). Its weight, its FP32 master and each tensor of the
optimizer's state are lists of pieces: a run of the flattened parameter that lies as one run of bytes in a file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megatron_ext.checkpoint.convert import torch_file
from megatron_ext.checkpoint.convert.folder import Folder
from megatron_ext.checkpoint.convert.pickles import TensorRef
from megatron_ext.checkpoint.convert.tensors import Shape
from megatron_ext.config.errors import CheckpointError, shown

_MAX_NAME = 1024


class Piece(NamedTuple):
    """Numbers start .. start + length - 1 of a flattened parameter.

    Attributes:
        file: relative to the folder that was read.
        offset: of the first number, in bytes from the start of the file.
        dtype: as in pickles.SIZES.
        start, length: in the flattened parameter.
    """

    file: str
    offset: int
    dtype: str
    start: int
    length: int


@dataclass
class Parameter:
    """One parameter, or one buffer.

    Attributes:
        name: global, as the training names it.
        shape: of the whole of it; of experts that are stacked the first dimension counts all of them.
        weight: what the module holds; empty if only the master is in the checkpoint.
        states: "fp32" (the master), "exp_avg", "exp_avg_sq" or whatever the optimizer keeps -> pieces, in order.
        step: of its optimizer.
        expert: stacked experts, each rank with some of them.
        copied: its "fp32" is the weight, written out for want of a master.
    """

    name: str
    shape: Shape
    weight: list[Piece] = field(default_factory=list)
    states: dict[str, list[Piece]] = field(default_factory=dict)
    step: int | None = None
    expert: bool = False
    copied: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def fp32(self) -> list[Piece]:
        return self.states.get("fp32", [])

    @property
    def exp_avg(self) -> list[Piece]:
        return self.states.get("exp_avg", [])

    @property
    def exp_avg_sq(self) -> list[Piece]:
        return self.states.get("exp_avg_sq", [])


@dataclass
class Shards:
    """A DeepSpeed checkpoint.

    Attributes:
        tag: folder inside the one that was read, with its slash; "" if that is the tagged folder itself.
        kind: "native" (ours), "zero" (DeepSpeed's own, with or without ZeRO), "universal" or "pipeline".
        parameters, buffers: by global name, in the order of the files.
        copies: weights that are stored once more (a tied weight on a second pipeline rank).
        step: global steps of the training.
        unmapped: why the optimizer's state cannot be told apart ("has ..."), if so; some parameters have none then.
        param_groups: scalars of the optimizer's parameter groups, of the first rank.
        state: what else the first model file says: lr_scheduler, global_samples, skipped_steps, ds_config, ...
        client_state: what the caller of save_checkpoint has added.
        manifest: of a checkpoint of ours.
    """

    tag: str
    kind: str
    parameters: dict[str, Parameter] = field(default_factory=dict)
    buffers: dict[str, Parameter] = field(default_factory=dict)
    copies: list[Parameter] = field(default_factory=list)
    step: int | None = None
    unmapped: str | None = None
    param_groups: list[dict[str, Any]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    client_state: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] | None = None


class File(NamedTuple):
    """A file of `torch.save` that was read: its name, relative to the folder, and its objects."""

    path: Path
    name: str
    tree: Any

    def value(self, *keys: Any, kind: Any, default: Any = ...) -> Any:
        """What lies under some keys, if it is of a kind.

        Raises:
            CheckpointError: it is missing, or something else.
        """
        found = self.tree
        for key in keys:
            inside = (isinstance(found, dict) and key in found) or (
                isinstance(found, list | tuple) and isinstance(key, int) and 0 <= key < len(found))
            if not inside:
                if default is not ...:
                    return default
                raise CheckpointError(self.path, f"has no {_path(keys)}", "every DeepSpeed checkpoint has one")
            found = found[key]
        if found is None and default is not ...:
            return default
        if not isinstance(found, kind):
            raise CheckpointError(self.path, f"has a {type(found).__name__} as {_path(keys)}")
        return found


def _path(keys: tuple[Any, ...]) -> str:
    return ".".join(key[:100] if isinstance(key, str) else shown(key) for key in keys) or "content"


def load(folder: Folder, name: str) -> File:
    """Reads the objects of a file, and no numbers."""
    return File(folder / name, name, torch_file.read(folder, name))


def name_of(file: File, key: Any) -> str:
    """A key of a dict as the name of a tensor.

    Raises:
        CheckpointError: it is no text, or none that a name can be.
    """
    if not isinstance(key, str) or not key.isprintable() or not 0 < len(key) <= _MAX_NAME:
        raise CheckpointError(file.path, f"names a tensor {shown(key)}")
    return key


def shape_of(file: File, value: Any, name: str) -> Shape:
    """A shape as pickles have it: torch.Size, tuple or list."""
    if not isinstance(value, list | tuple) or not all(type(n) is int and n >= 0 for n in value):
        raise CheckpointError(file.path, f"has the shape {shown(value)}", tensor=name)
    return tuple(value)


def piece_of(file: File, ref: Any, name: str, start: int = 0, at: int = 0, length: int | None = None) -> Piece:
    """A run of a tensor in a file as a piece.

    Args:
        file: that has it.
        ref: the tensor.
        name: of the parameter, for messages.
        start: where the run belongs in the flattened parameter.
        at, length: where it begins in the flattened tensor, and how many numbers it has; by default all.

    Raises:
        CheckpointError: it is no tensor, is not dense, or ends before.
    """
    if not isinstance(ref, TensorRef):
        raise CheckpointError(file.path, f"has a {type(ref).__name__} where a tensor is due", tensor=name)
    if not ref.dense:
        raise CheckpointError(file.path, f"has strides {ref.stride} for its shape {ref.shape}",
                              "tensors must be contiguous", tensor=name)
    length = ref.numel if length is None else length
    if at < 0 or length < 0 or at + length > ref.numel:
        raise CheckpointError(file.path, f"says that numbers {at} to {at + length} are its, of a tensor of {ref.numel}",
                              tensor=name)
    size = ref.nbytes // ref.numel if ref.numel else 0
    return Piece(ref.file, ref.offset + at * size, ref.dtype, start, length)


def step_of(folder: Folder, value: Any) -> int | None:
    """An optimizer's step: a number, or a tensor of one."""
    if isinstance(value, TensorRef):
        value = torch_file.scalar(folder, value)
    return int(value) if isinstance(value, int | float) and 0 <= value < 1 << 53 else None
