"""Saving and resuming everything, in DeepSpeed's layout: experts, router biases, moments, random state, data position.

What is on disk and when a checkpoint counts as whole is said in checkpoint/native.py. A checkpoint is checked by all
ranks together before the first weight is replaced; an error on one rank is raised on all.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.checkpoint.utils import clone_tensors_for_torch_save
from deepspeed.runtime.engine import DeepSpeedEngine

from megatron_ext import __version__
from megatron_ext.checkpoint import native
from megatron_ext.checkpoint.convert.formats.layout import CONFIG
from megatron_ext.checkpoint.native import CheckpointError
from megatron_ext.data import MicroBatchLoader
from megatron_ext.engine import elsewhere, restoring
from megatron_ext.engine.elsewhere import SCHEDULED
from megatron_ext.engine.foreign import FOREIGN, load_foreign, look
from megatron_ext.engine.gradients import is_expert
from megatron_ext.engine.private import relink_optimizer_state
from megatron_ext.engine.restoring import refusing
from megatron_ext.optimizer import AdamW
from megatron_ext.parallel import agreed
from megatron_ext.parallel.placement import bidirectional

log = logging.getLogger("megatron_ext")

_NAMES = {"stages": "P", "replicas": "D", "expert_parallel": "expert parallelism"}
_RANK_FILE = "megatron_ext_rank_{:05d}_states.pt"
_RANK_STATE = ("torch", "device", "numpy", "python", "data", "optimizer", "scheduled")


class CheckpointMixin:
    """`save_checkpoint` and `load_checkpoint` of the engine, with DeepSpeed's signatures."""

    _data_iterator: Any
    _experts: dict[str, torch.Tensor] | None = None
    """This rank's experts in the checkpoint of ours that is being loaded."""

    # -- saving

    def save_checkpoint(self, save_dir: str, tag: str | None = None, client_state: dict[str, Any] | None = None,
                        save_latest: bool = True, exclude_frozen_parameters: bool = False) -> bool:
        """Saves everything a bit-exact resume needs; collective.

        Args:
            save_dir: folder of checkpoints, shared by all ranks.
            tag: folder name; `global_step<N>` if None. A checkpoint of that name is replaced once this one is whole.
            client_state: the caller's own state, given back by `load_checkpoint`.
            save_latest: make this the checkpoint that `load_checkpoint` takes by default.

        Raises:
            CheckpointError: a tag that is no plain folder name, or not the same on all ranks.
        """
        groups = self.process_groups
        tag = f"global_step{self.global_steps}" if tag is None else str(tag)
        tags = set(_gather(tag, groups.control))
        if len(tags) > 1:
            raise CheckpointError(save_dir, f"tags {sorted(tags)}", "all ranks must save under the same tag")
        unfinished = native.check_tag(tag) + native.UNFINISHED
        folder = Path(save_dir) / unfinished
        if groups.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        dist.barrier(group=groups.control)
        super().save_checkpoint(save_dir, unfinished, client_state or {}, save_latest=False,
                                exclude_frozen_parameters=exclude_frozen_parameters)
        torch.save(self._rank_state(), folder / _RANK_FILE.format(groups.rank))
        manifest = self._manifest(exclude_frozen_parameters)
        if groups.rank == 0 and self.module.model_config is not None:  # what a conversion must know of the model
            dtype = "bfloat16" if self.bfloat16_enabled() else "float32"
            native.replace_file(folder / CONFIG, json.dumps(
                {**self.module.model_config.to_hf(), "torch_dtype": dtype}, indent=2) + "\n")
        dist.barrier(group=groups.control)
        # One listing for all: what a rank sees of a network file system may be behind.
        names = _gather(sorted(p.name for p in folder.iterdir() if p.suffix == ".pt" or p.name == CONFIG),
                        groups.control)[0]
        world = dist.get_world_size()
        sums = _gather({n: native.sum_file(folder / n) for n in names[groups.rank::world]}, groups.control)
        if groups.rank == 0:
            native.write_manifest(folder, manifest, {n: s for part in sums for n, s in part.items()})
            native.publish(folder, tag)
            for left in Path(save_dir).glob("*" + native.UNFINISHED):  # of saves that were cut off
                shutil.rmtree(left, ignore_errors=True)
            if save_latest:
                native.replace_file(Path(save_dir) / "latest", tag)
        dist.barrier(group=groups.control)
        return True

    def _manifest(self, exclude_frozen: bool) -> dict[str, Any]:
        """What a later load must find the same, and what a person may want to know; collective."""
        return {"megatron_ext": __version__, "step": self.global_steps, "schedule": self.module.schedule,
                "placement": self._placement(), "zero_stage": int(self.zero_optimization_stage()),
                "bf16": bool(self.bfloat16_enabled()), "tensors": self.tensors(exclude_frozen),
                "optimizer": type(self.basic_optimizer).__name__, "scheduled": self._scheduled(),
                "section": self.section.resolved()}

    def _scheduled(self) -> list[dict[str, Any]]:
        """What learning-rate schedulers have set, and of which parameters; collective."""
        merged: dict[str, dict[str, Any]] = {}
        for part in _gather(elsewhere.scheduled(self), self.process_groups.control):
            for entry in part:
                found = merged.setdefault(repr(entry["values"]), {"values": entry["values"], "parameters": []})
                found["parameters"] += [name for name in entry["parameters"] if name not in found["parameters"]]
        return list(merged.values())

    def _placement(self) -> dict[str, Any]:
        grid = self.process_groups.topology
        return {"stages": grid.stages, "replicas": grid.replicas, "expert_parallel": grid.expert_parallel,
                "bounds": self.module.bounds, "ranks": self.module.placement}

    def tensors(self, exclude_frozen: bool = False) -> dict[str, str]:
        """Names and shapes of the whole model, stacked experts with all of theirs; collective."""
        mine = {}
        for name, value in self.module.state_dict(keep_vars=True).items():
            if not (exclude_frozen and isinstance(value, torch.nn.Parameter) and not value.requires_grad):
                mine[name] = str([value.num_experts, *value.shape[1:]] if is_expert(value) else list(value.shape))
        parts = _gather(mine, self.process_groups.control)
        return {name: shape for part in parts for name, shape in part.items()}

    def _rank_state(self) -> dict[str, Any]:
        loader = self.training_dataloader
        name, internal, *rest = np.random.get_state()
        return {"torch": torch.get_rng_state(),
                "device": None if self.device.type == "cpu" else get_accelerator().get_rng_state(),
                "numpy": (name, internal.tolist(), *rest), "python": random.getstate(),
                "data": loader.state_dict() if self.is_first_stage() and hasattr(loader, "state_dict") else None,
                "optimizer": self._optimizer_layout(), "schedule": self._choice_state(),
                "dispatch": self._dispatch_state(),
                "scheduled": [{k: group[k] for k in SCHEDULED if k in group} for group in self._parameter_groups()]}

    def _parameter_groups(self) -> list[dict[str, Any]]:
        return getattr(self.basic_optimizer, "param_groups", [])

    def _optimizer_layout(self) -> dict[str, Any]:
        """The optimizer's class, and what each of its parameter groups holds on this rank, in elements and by name."""
        return {"type": type(self.basic_optimizer).__name__,
                "groups": [sum(p.numel() for p in group["params"]) for group in self._parameter_groups()],
                "runs": restoring.fingerprint(restoring.slots_of(self))}

    def _save_moe_checkpoint(self, save_dir: str, tag: str, client_state: dict[str, Any] | None = None,
                             exclude_frozen_parameters: bool = False) -> None:
        """DeepSpeed's files for a model with experts; its own writer knows only its own MoE classes."""
        groups = self.process_groups
        place = groups.expert_placement()
        experts: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
        dense = dict(DeepSpeedEngine.module_state_dict(self, exclude_frozen_parameters=exclude_frozen_parameters))
        for name, p in self.module.named_parameters():
            if is_expert(p) and dense.pop(name, None) is not None:
                for expert, (key, matrix) in native.split_experts(name, p, p.expert_range[0]).items():
                    experts.setdefault((native.expert_layer(name), expert), {})[key] = matrix
        if groups.expert_data_parallel_ranks[0] == groups.rank:
            for (layer, expert), state in experts.items():
                torch.save(state, self._get_expert_ckpt_name(save_dir, layer, expert, tag,
                                                             checkpoint_mp_rank=self.checkpoint_mp_rank))
            if not self.zero_optimization() and self.optimizer is not None:
                torch.save(clone_tensors_for_torch_save({"optimizer": self.optimizer.state_dict()}),
                           self._get_optimizer_ckpt_name(save_dir, tag, place.rank))
        if self.mpu.get_data_parallel_rank() == 0:
            zero = self.zero_optimization()
            frozen = self.zero_optimization_partition_gradients() and not exclude_frozen_parameters
            state = self._common_checkpoint_state(dense, zero, frozen)
            if not zero:
                state["optimizer"] = None  # in the expp_rank files
            state.update(num_experts=self.num_experts, ds_autoep_layers=None, **(client_state or {}))
            torch.save(clone_tensors_for_torch_save(state), self._get_ckpt_name(save_dir, tag))

    # -- resuming

    def load_checkpoint(self, load_dir: str, tag: str | None = None, load_module_strict: bool = True,
                        load_optimizer_states: bool = True, load_lr_scheduler_states: bool = True,
                        load_module_only: bool = False, custom_load_fn: Any = None) -> tuple[str, dict[str, Any]]:
        """Resumes; collective. Where the layout is that of the save, bit for bit.

        In another layout (P, D, EP, schedule, chunks, ZeRO stage, offload) training goes on with the same optimizer
        state and the same global batches; with another `train_batch_size` from the same sample on. Random generators of
        the ranks are not restored there. With `"checkpoint": {"load_universal": true}` a universal checkpoint is read,
        which holds no position in the training data: they start from the beginning. A folder of another program
        (Hugging Face and the others of `megatron-ext convert`) is read as `megatron_ext.load` does.

        A checkpoint of ours in the layout of its save is read by DeepSpeed's loader, which runs what its pickles say:
        load what others gave you with `megatron_ext.load`, which does not.

        Returns:
            The path loaded and the caller's `client_state`.

        Raises:
            CheckpointError: on all ranks, before anything is changed: missing, incomplete or damaged, or of another
                model or optimizer.
            DataError: likewise, if it holds a position in other training data.
        """
        directory, universal = Path(load_dir), self.load_universal_checkpoint()
        with_optimizer = load_optimizer_states and not load_module_only
        if not universal and tag is None:
            directory, tag, kind = look(directory, self.process_groups.control)
            if kind == FOREIGN:
                load_foreign(self, directory, optimizer=with_optimizer, schedule=load_lr_scheduler_states)
                return str(directory), {}
        tag, moved, manifest, state = self.inspect(
            directory, tag, universal=universal, strict=load_module_strict and custom_load_fn is None,
            optimizer=with_optimizer, module_only=load_module_only)
        if moved:
            with agreed(self.process_groups.control):
                if custom_load_fn is not None:
                    raise CheckpointError(directory / tag, f"was saved in another layout ({', '.join(moved)})",
                                          "custom_load_fn is for the layout of the save")
            client_state = elsewhere.resume(
                self, directory, tag, strict=load_module_strict, optimizer=with_optimizer,
                schedule=load_lr_scheduler_states, module_only=load_module_only, why=moved, rank_state=state)
            if state is not None and not load_module_only:
                self.restore_choices(state, manifest["placement"])
            return str(directory / tag / f"mp_rank_{self.checkpoint_mp_rank:02d}_model_states.pt"), client_state
        with agreed(self.process_groups.control), refusing(directory / tag):
            self._experts = self._read_experts(directory / tag)
        try:
            with agreed(self.process_groups.control), refusing(directory / tag):
                path, client_state = super().load_checkpoint(
                    str(directory), tag, load_module_strict, load_optimizer_states, load_lr_scheduler_states,
                    load_module_only, custom_load_fn)
        finally:
            self._experts = None
        self._restore_weights(load_module_only)
        if not load_module_only:
            self.restore_rank_state(state, directory / tag)
            self.restore_choices(state, self._placement())
            if load_lr_scheduler_states and self.lr_scheduler is not None:
                # DeepSpeed leaves these to the optimizer's own state, which it does not always load.
                for group, saved in zip(self._parameter_groups(), state["scheduled"], strict=False):
                    group.update(saved)
        return path, client_state

    def inspect(self, directory: Path, tag: str | None, *, universal: bool, strict: bool, optimizer: bool,
                module_only: bool) -> tuple[str, list[str], dict[str, Any], Any]:
        """Compares a checkpoint with this job, before anything is changed; collective.

        Args:
            directory, tag: as given to `load_checkpoint`.
            universal: it is a universal one.
            strict: the model must be the same.
            optimizer: its state is wanted.
            module_only: nothing but weights is.

        Returns:
            The tag; in what the layout is another, the same on all ranks; the manifest; what a rank saved of itself,
            this one or rank 0.

        Raises:
            CheckpointError, DataError: see `load_checkpoint`.
        """
        control = self.process_groups.control
        tensors, manifest = self.tensors(), {}
        with agreed(control), refusing(directory):
            if universal:
                return self._check_universal(directory, tag), ["universal"], {}, None
            tag = native.read_latest(directory) if tag is None else native.check_tag(str(tag))
            manifest = native.read_manifest(directory / tag)
            moved = self._moved(directory / tag, manifest, optimizer)
            native.check_files(directory / tag, manifest, self.process_groups.rank, dist.get_world_size())
            if strict:
                native.check_tensors(directory / tag, manifest["tensors"], tensors)
        with agreed(control), refusing(directory / tag):
            state = self._load_rank_state(directory / tag, 0 if moved else self.process_groups.rank, module_only)
            moved += self._other_runs(directory / tag, state, optimizer) if not moved else []
        moved = next((found for found in _gather(moved, control) if found), [])
        return tag, moved, manifest, state

    def _check_universal(self, directory: Path, tag: str | None) -> str:
        latest = directory / "latest_universal"
        if tag is None and not latest.is_file():
            raise CheckpointError(directory, "there is no file 'latest_universal'",
                                  "no universal checkpoint was made here", "run ds_to_universal first")
        return native.check_tag(latest.read_text().strip() if tag is None else str(tag))

    def _moved(self, folder: Path, manifest: dict[str, Any], with_optimizer: bool) -> list[str]:
        """In what the layout of a save is another than ours, a few words each.

        Raises:
            CheckpointError: it cannot be taken over.
        """
        then, now = bool(manifest["bf16"]), bool(self.bfloat16_enabled())
        if with_optimizer and then != now:
            raise CheckpointError(folder, f"was saved with bf16.enabled = {then!r}", f"this job has {now!r}",
                                  "use the setting of the save, or pass load_optimizer_states=False")
        saved, ours = manifest["placement"], self._placement()
        saved.setdefault("ranks", bidirectional(saved["stages"]))  # all there was before it was written down
        moved = [f"{name} {saved[key]} -> {ours[key]}" for key, name in _NAMES.items() if saved[key] != ours[key]]
        if saved["ranks"] != ours["ranks"] and manifest["schedule"] != self.module.schedule:
            moved.append(f"{manifest['schedule']} -> {self.module.schedule}")
        if not moved and (saved["ranks"], saved["bounds"]) != (ours["ranks"], ours["bounds"]):
            moved.append("stages on other ranks, or of other layers")
        stages = manifest["zero_stage"], int(self.zero_optimization_stage())
        if stages[0] != stages[1]:
            moved.append(f"ZeRO {stages[0]} -> {stages[1]}")
        return moved

    def _load_rank_state(self, folder: Path, rank: int, module_only: bool) -> dict[str, Any]:
        """What a rank saved of itself, compared with the training data at hand."""
        path = folder / _RANK_FILE.format(rank)
        with refusing(path):
            state = torch.load(path, map_location="cpu", weights_only=True)
            if lost := [key for key in _RANK_STATE if key not in state]:
                raise CheckpointError(path, f"has no {lost[0]!r}", "every rank saves it")
            loader = self.training_dataloader
            if isinstance(loader, MicroBatchLoader) and state["data"] is not None and not module_only:
                before = loader.state_dict()
                loader.load_state_dict(state["data"])  # to see whether it will do
                loader.load_state_dict(before)
        return state

    def _other_runs(self, folder: Path, state: dict[str, Any], with_optimizer: bool) -> list[str]:
        """Whether this rank steps other runs of parameters than in the save, where nothing else has changed.

        Raises:
            CheckpointError: the optimizer is another.
        """
        then, now = state["optimizer"], self._optimizer_layout()
        if not with_optimizer or all(now[key] == value for key, value in then.items()):
            return []
        if not restoring.compatible(then, now):
            raise CheckpointError(folder, f"holds the state of {then['type']} on groups of {then['groups']} elements",
                                  f"this job has {now['type']} on {now['groups']}",
                                  "use the optimizer of the save, or pass load_optimizer_states=False")
        return [f"runs of parameters that {then['type']} steps on rank {self.process_groups.rank}"]

    def load_module_state_dict(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Adds this rank's experts, from their own files, to the dense weights."""
        if self._experts:
            checkpoint["module"].update(self._experts)
        super().load_module_state_dict(checkpoint, *args, **kwargs)

    def _read_experts(self, folder: Path) -> dict[str, torch.Tensor]:
        """This rank's, stacked, by name.

        Raises:
            CheckpointError, OSError: one is missing.
        """
        files: dict[int, dict[str, torch.Tensor]] = {}
        stacks = {}
        for name, p in self.module.named_parameters():
            if self.has_moe_layers and is_expert(p):
                layer, (first, last) = native.expert_layer(name), p.expert_range
                if layer not in files:
                    files[layer] = {}
                    for expert in range(first, last):
                        path = self._get_expert_ckpt_name(str(folder.parent), layer, expert, folder.name,
                                                          checkpoint_mp_rank=self.checkpoint_mp_rank)
                        files[layer].update(torch.load(path, map_location="cpu", weights_only=True))
                stacks[name] = native.join_experts(name, files[layer], first, last, folder)
        return stacks

    def _restore_weights(self, module_only: bool) -> None:
        """What DeepSpeed leaves out: 16-bit weights from the restored master, and moments in their dtype."""
        if isinstance(self.basic_optimizer, AdamW):
            self.basic_optimizer.recast_moments()
        if self.zero_optimization():
            if not module_only:
                self.optimizer.update_lp_params()
            relink_optimizer_state(self.optimizer)
        self.weight_cache.clear()

    def restore_rank_state(self, state: dict[str, Any], folder: Path) -> None:
        """Random generators and the position in the training data; collective."""
        with agreed(self.process_groups.control), refusing(folder / _RANK_FILE.format(self.process_groups.rank)):
            torch.set_rng_state(state["torch"])
            if state["device"] is not None and self.device.type != "cpu":
                get_accelerator().set_rng_state(state["device"])
            name, internal, *rest = state["numpy"]
            np.random.set_state((name, np.array(internal, dtype=np.uint32), *rest))
            version, internal, gauss = state["python"]
            random.setstate((version, tuple(internal), gauss))
        loader = self.training_dataloader
        if state["data"] is not None and hasattr(loader, "load_state_dict"):
            loader.load_state_dict(state["data"])
            self._data_iterator = None
        elif isinstance(loader, MicroBatchLoader) and self.process_groups.rank == 0:
            log.warning("the checkpoint holds no position in the training data: they start from the beginning")

    def restore_choices(self, state: dict[str, Any], placement: dict[str, Any]) -> None:
        """What was chosen by measuring, where it was measured on the same placement."""
        ours = self._placement()
        if placement["ranks"] == ours["ranks"]:
            self._restore_choice(state.get("schedule"))
        if placement["expert_parallel"] == ours["expert_parallel"]:
            self._restore_dispatch(state.get("dispatch"))


def _gather(value: Any, group: dist.ProcessGroup) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found
