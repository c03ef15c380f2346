"""Checkpoints of other programs, read straight into the layout of this job: `megatron_ext.load`, `load_checkpoint`.

What is read is a `Source` of checkpoint/convert, of any format known there: found whole by its headers alone, on every
rank alike. A rank then reads the numbers it holds; FP8 is dequantised to FP32 on the way, and whatever comes is cast to
the dtype of the master weights, from which the model's own are made.
"""

from __future__ import annotations

import logging
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.checkpoint import native
from megatron_ext.checkpoint.convert import dtype as dtypes
from megatron_ext.checkpoint.convert.blocks import Files, Producer, Recipe
from megatron_ext.checkpoint.convert.folder import Folder
from megatron_ext.checkpoint.convert.formats import detect
from megatron_ext.checkpoint.convert.formats.layout import CONFIG
from megatron_ext.checkpoint.convert.opening import open_checkpoint
from megatron_ext.checkpoint.convert.plan import make_recipe
from megatron_ext.checkpoint.convert.source import Source
from megatron_ext.config import LoadSection
from megatron_ext.config.errors import CheckpointError, ConfigError
from megatron_ext.engine import elsewhere, restoring
from megatron_ext.models import DeepSeekV3Config
from megatron_ext.parallel import agreed

log = logging.getLogger("megatron_ext")

OURS, FOREIGN = "ours", "foreign"
_STACKED = re.compile(r"(?P<experts>.*\.experts)\.(?P<matrix>\w+)")
_ONE = re.compile(r"(?P<experts>.*\.experts)\.(?P<expert>\d+)\.(?P<matrix>\w+)\.weight")
_SIZES = ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "n_routed_experts",
          "moe_intermediate_size", "n_shared_experts", "intermediate_size", "q_lora_rank", "kv_lora_rank",
          "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "first_k_dense_replace", "moe_layer_freq",
          "attention_bias", "tie_word_embeddings", "topk_method")
"""Fields of a config that decide what tensors there are, those first that a message had best name."""
_TRAINING = {"initializer_range", "attention_dropout", "hidden_dropout", "max_position_embeddings"}
"""Fields that may change from one run to the next without a word."""


class SourceNumbers:
    """See `restoring.Numbers`. To be closed; files are opened as they are needed."""

    def __init__(self, source: Source):
        self.where, self.source = source.folder.path, source
        self._files = Files(source.folder)
        self._recipes: dict[str, Recipe] = {}
        self._producer = Producer(self._files, self._recipes)
        self.shapes: dict[str, list[int]] = {}
        """Name as the module has it -> whole shape, of everything but copies of other tensors."""
        for name, tensor in source.model.table.items():
            if name in source.origins and tensor.row.alias is None and not tensor.row.optional:
                one = _ONE.fullmatch(name)
                if one is None:
                    self.shapes[name] = list(tensor.shape)
                elif one["expert"] == "0":
                    stack = [source.model.config.n_routed_experts, *tensor.shape]
                    self.shapes[f"{one['experts']}.{one['matrix']}"] = stack

    def __enter__(self) -> SourceNumbers:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.__exit__(*error)

    def has(self, name: str, state: str | None = None) -> bool:
        if name not in self.shapes:
            return False
        experts = self.shapes[name][0] if _STACKED.fullmatch(name) else 1
        canonical = [_with(self.canonical(name, expert), state) for expert in range(experts)]
        lost = [tensor for tensor in canonical if tensor not in self.source.origins]
        if 0 < len(lost) < experts:
            raise CheckpointError(self.where, "is missing", "other experts of the layer have it", tensor=lost[0])
        return not lost

    def step(self, name: str) -> int | None:
        return self.source.step

    def read(self, name: str, state: str | None, start: int, stop: int) -> Tensor:
        stacked = _STACKED.fullmatch(name)
        if stacked is None:
            return self._read(_with(name, state), start, stop)
        size = math.prod(self.shapes[name][1:])
        parts = []
        for expert in range(start // size, -(-stop // size)):
            low, high = max(start, expert * size), min(stop, (expert + 1) * size)
            canonical = _with(self.canonical(name, expert), state)
            parts.append(self._read(canonical, low - expert * size, high - expert * size))
        return torch.cat(parts)

    def canonical(self, name: str, expert: int) -> str:
        """The canonical name of a tensor of the module, or of one expert in a stack."""
        stacked = _STACKED.fullmatch(name)
        return name if stacked is None else f"{stacked['experts']}.{expert}.{stacked['matrix']}.weight"

    def _read(self, canonical: str, start: int, stop: int) -> Tensor:
        origin = self.source.origins[canonical]
        if canonical not in self._recipes:
            dtype = "F32" if origin.dtype == "F8_E4M3" else origin.dtype
            self._recipes[canonical] = make_recipe(self.source, canonical, dtype)
        width = math.prod(origin.shape[1:])
        rows = start // width, -(-stop // width)
        box = (rows, *((0, size) for size in origin.shape[1:]))
        found = self._producer.canonical(canonical, box).reshape(-1)[start - rows[0] * width:stop - rows[0] * width]
        return dtypes.to_torch(np.ascontiguousarray(found), self._recipes[canonical].dtype)


def _with(canonical: str, state: str | None) -> str:
    return canonical if state is None else f"{canonical}@{state}"


def start_from(engine: Any, section: LoadSection) -> None:
    """What `megatron_ext.load` asks for; collective. A checkpoint of ours is resumed, or gives its weights.

    Whoever made it, nothing in it is executed: one of ours is read without DeepSpeed's loader, which unpickles.

    Raises:
        CheckpointError: see `load_foreign` and `load_checkpoint`. No optimizer's state but Adam's can be read so.
    """
    if section.path is None:
        return
    path = Path(section.path)
    directory, tag, kind = look(path, engine.process_groups.control)
    if kind == OURS and section.format in (None, "deepspeed"):
        _load_ours(engine, directory, tag, section)
    else:
        load_foreign(engine, path, format=section.format, config=section.config, follow_links=section.follow_links,
                     optimizer=section.optimizer)


def _load_ours(engine: Any, directory: Path, tag: str | None, section: LoadSection) -> None:
    """`load_checkpoint` by way of the reader that executes nothing, in the layout of the save too."""
    alone = not section.optimizer
    tag, moved, manifest, state = engine.inspect(directory, tag, universal=False, strict=True,
                                                 optimizer=section.optimizer, module_only=alone)
    elsewhere.resume(engine, directory, tag, strict=True, optimizer=section.optimizer, schedule=True,
                     module_only=alone, why=moved, rank_state=state, client=False, follow_links=section.follow_links)
    if not alone:
        if not moved:
            engine.restore_rank_state(state, directory / tag)
        engine.restore_choices(state, manifest["placement"])


def look(path: Path, control: dist.ProcessGroup) -> tuple[Path, str | None, str | None]:
    """`look_at` by rank 0 for all, so that they go by the same view of a file system; collective.

    Raises:
        CheckpointError: on all ranks: it cannot be looked at.
    """
    held: list[Any] = [None]
    with agreed(control), restoring.refusing(path):
        if dist.get_rank() == 0:
            held = [look_at(path)]
    dist.broadcast_object_list(held, src=0, group=control)
    return held[0]


def look_at(path: Path) -> tuple[Path, str | None, str | None]:
    """What a path without a tag leads to.

    Returns:
        The folder of checkpoints; the tag if the path is that of one; `OURS`, `FOREIGN`, or None for what is no whole
        checkpoint of either. One of DeepSpeed's own is foreign if a `config.json` with it says of what model it is.
    """
    if _is_ours(path):
        return path.parent, path.name, OURS
    latest = path / "latest"
    inside = path / latest.read_text().strip() if latest.is_file() else path
    if _is_ours(inside):
        return path, None, OURS
    try:
        named = inside.is_dir() and detect(Folder(path)).name != "deepspeed"
    except CheckpointError:
        return path, None, None
    described = inside.is_dir() and any((place / CONFIG).is_file() for place in (path, inside))
    return path, None, FOREIGN if named or described else None


def _is_ours(folder: Path) -> bool:
    """Whether our engine has written a folder; one that has lost its manifest is refused as such."""
    return (folder / native.MANIFEST).is_file() or any(folder.glob("megatron_ext_rank_*_states.pt"))


def load_foreign(engine: Any, path: Path, *, format: str | None = None, config: str | None = None,
                 follow_links: bool = False, optimizer: bool = True, schedule: bool = True) -> None:
    """Reads a checkpoint of another program; collective.

    Args:
        engine: ours.
        path, format, config, follow_links: see `open_checkpoint`.
        optimizer: take moments and the count of steps, if the checkpoint has them. Master weights are taken in any
            case; where there are none they start from the weights.
        schedule: with these, bring the learning rate to where that count puts it.

    Raises:
        CheckpointError: on all ranks, before anything is changed: it is not whole, or of another model.
    """
    control, rank = engine.process_groups.control, engine.process_groups.rank
    ours = engine.tensors()
    with agreed(control), restoring.refusing(path):
        source = open_checkpoint(path, format, config, follow_links)
        if optimizer and source.reading.unread:
            raise CheckpointError(path, f"holds {source.reading.unread}", "it cannot be read",
                                  "leave it out: megatron_ext.load.optimizer = false, or load_optimizer_states=False")
        numbers = SourceNumbers(source)
        further = _check_model(numbers, ours, engine.module.model_config)
        moments = optimizer and any(moment in source.states for moment in restoring.MOMENTS)
        restoring.check_states(engine, numbers, moments)
    with agreed(control), restoring.refusing(path), numbers:
        restoring.restore(engine, numbers, moments)
    restoring.finish(engine)
    step = source.step if moments else None
    if step is not None:
        _count_steps(engine, step, schedule)
    if rank == 0:
        masters = restoring.MASTER in source.states
        taken = "weights" + ", master weights" * masters + ", moments" * moments
        said = [f"{taken} of {path} ({source.format}) loaded"]
        said += [f"after {step} steps"] if step is not None else []
        said += [f"multi-token prediction ({len(further)} tensors) is passed over"] if further else []
        print(f"megatron_ext: {'; '.join(said)}", flush=True)
        _warn_of_settings(source, engine.module.model_config)


def _check_model(numbers: SourceNumbers, ours: dict[str, str], config: Any) -> list[str]:
    """Compares names and shapes; returns what belongs to layers of multi-token prediction that this model has not.

    Raises:
        CheckpointError: the models differ; by the setting that makes the difference, if that is known.
    """
    theirs = {name: str(shape) for name, shape in numbers.shapes.items()}
    table = numbers.source.model.table
    further = [name for name in theirs.keys() - ours.keys()
               if (tensor := table.get(numbers.canonical(name, 0))) is not None and tensor.mtp is not None]
    try:
        native.check_tensors(numbers.where, {name: theirs[name] for name in theirs.keys() - set(further)}, ours)
    except CheckpointError:
        for key in _SIZES if config is not None else ():
            then, now = getattr(numbers.source.model.config, key), getattr(config, key, None)
            if then != now:
                raise CheckpointError(numbers.where, f"is of a model with {key} = {then!r}",
                                      f"this job's has {now!r}") from None
        raise
    return further


def _warn_of_settings(source: Source, config: Any) -> None:
    """Tells of settings that change what the same weights compute: YaRN may have been added on purpose."""
    if config is None:
        return
    try:
        theirs = DeepSeekV3Config.from_hf(source.model.hf)
    except ConfigError as error:
        log.warning("%s: its config.json has %s, and this job's model is built otherwise", source.folder.path, error)
        return
    changed = [f"{field.name} = {getattr(theirs, field.name)!r} (here {getattr(config, field.name)!r})"
               for field in fields(theirs) if field.name not in _TRAINING
               and getattr(theirs, field.name) != getattr(config, field.name)]
    if changed:
        log.warning("%s was trained with %s", source.folder.path, ", ".join(changed))


def _count_steps(engine: Any, step: int, schedule: bool) -> None:
    """Goes on counting where the checkpoint stopped; its data are others, and start from the beginning."""
    engine.global_steps, engine.global_samples = step, step * engine.train_batch_size()
    scheduler = engine.lr_scheduler
    if scheduler is None or not schedule or step == 0:
        return
    if hasattr(scheduler, "last_batch_iteration"):  # DeepSpeed's, which count from 0
        scheduler.step(step - 1)
    else:
        log.warning("a %s cannot be told that %d steps were taken: it starts anew", type(scheduler).__name__, step)
