"""Saving and resuming everything, in DeepSpeed's layout: experts, router biases, moments, random state, data position.

What is on disk and when a checkpoint counts as whole is said in checkpoint/native.py. A checkpoint is checked by all
ranks together before the first weight is replaced; an error on one rank is raised on all.
"""

from __future__ import annotations

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
from megatron_ext.checkpoint.native import CheckpointError
from megatron_ext.data import MicroBatchLoader
from megatron_ext.engine.gradients import is_expert
from megatron_ext.engine.private import relink_optimizer_state
from megatron_ext.optimizer import AdamW
from megatron_ext.parallel import agreed
from megatron_ext.parallel.placement import bidirectional

log = logging.getLogger("megatron_ext")

_PLACEMENT = {"stages": "megatron_ext.pipeline.stages", "replicas": "the number of ranks",
              "expert_parallel": "megatron_ext.expert_parallel.size"}
_SCHEDULED = ("lr", "betas", "momentum")
"""What learning-rate schedulers set in an optimizer's parameter groups, for the step to come."""


class CheckpointMixin:
    """`save_checkpoint` and `load_checkpoint` of the engine, with DeepSpeed's signatures."""

    _data_iterator: Any
    _loading: Path | None = None
    """The folder of the checkpoint of ours that is being loaded."""

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
        torch.save(self._rank_state(), folder / f"megatron_ext_rank_{groups.rank:05d}_states.pt")
        manifest = self._manifest(exclude_frozen_parameters)
        dist.barrier(group=groups.control)
        # One listing for all: what a rank sees of a network file system may be behind.
        names = _gather(sorted(p.name for p in folder.iterdir() if p.suffix == ".pt"), groups.control)[0]
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
                "bf16": bool(self.bfloat16_enabled()), "tensors": self._tensors(exclude_frozen),
                "section": self.section.resolved()}

    def _placement(self) -> dict[str, Any]:
        grid = self.process_groups.topology
        return {"stages": grid.stages, "replicas": grid.replicas, "expert_parallel": grid.expert_parallel,
                "bounds": self.module.bounds, "ranks": self.module.placement}

    def _tensors(self, exclude_frozen: bool = False) -> dict[str, str]:
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
                "scheduled": [{k: group[k] for k in _SCHEDULED if k in group} for group in self._parameter_groups()]}

    def _parameter_groups(self) -> list[dict[str, Any]]:
        return getattr(self.basic_optimizer, "param_groups", [])

    def _optimizer_layout(self) -> dict[str, Any]:
        """The optimizer's class, and the elements of each of its parameter groups on this rank."""
        return {"type": type(self.basic_optimizer).__name__,
                "groups": [sum(p.numel() for p in group["params"]) for group in self._parameter_groups()]}

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
        """Resumes; collective. With `"checkpoint": {"load_universal": true}` reads a universal checkpoint instead.

        A universal checkpoint holds no random state and no data position: training data start from the beginning.

        Returns:
            The path loaded and the caller's `client_state`.

        Raises:
            CheckpointError: on all ranks, before anything is changed: missing, incomplete or damaged, not ours, of
                another model or optimizer, or saved in another layout.
            DataError: likewise, if it holds a position in other training data.
        """
        control = self.process_groups.control
        directory = Path(load_dir)
        with_optimizer = load_optimizer_states and not load_module_only
        state: dict[str, Any] = {}
        if self.load_universal_checkpoint():
            with agreed(control):
                tag = self._check_universal(directory, tag)
        else:
            with agreed(control):
                tag = native.read_latest(directory) if tag is None else native.check_tag(str(tag))
                manifest = native.read_manifest(directory / tag)
                self._check_placement(directory / tag, manifest, with_optimizer)
                native.check_files(directory / tag, manifest, self.process_groups.rank, dist.get_world_size())
            tensors = self._tensors()
            with agreed(control):
                if load_module_strict and custom_load_fn is None:
                    native.check_tensors(directory / tag, manifest["tensors"], tensors)
                state = self._load_rank_state(directory / tag, with_optimizer, load_module_only)
            self._loading = directory / tag
        try:
            path, client_state = super().load_checkpoint(load_dir, tag, load_module_strict, load_optimizer_states,
                                                         load_lr_scheduler_states, load_module_only, custom_load_fn)
        finally:
            self._loading = None
        self._restore_weights(load_module_only)
        if self.load_universal_checkpoint():
            self._load_unoptimized(Path(path).parent)
        elif not load_module_only:
            self._restore_rank_state(state)
            self._restore_choice(state.get("schedule"))
            self._restore_dispatch(state.get("dispatch"))
            if load_lr_scheduler_states and self.lr_scheduler is not None:
                # DeepSpeed leaves these to the optimizer's own state, which it does not always load.
                for group, saved in zip(self._parameter_groups(), state["scheduled"], strict=False):
                    group.update(saved)
        return path, client_state

    def _check_universal(self, directory: Path, tag: str | None) -> str:
        latest = directory / "latest_universal"
        if self.has_moe_layers:
            raise CheckpointError(directory, "this model has experts",
                                  "universal checkpoints of models with experts are not available yet",
                                  "resume in the layout of the save")
        if not self.zero_optimization():
            raise CheckpointError(directory, "this job has zero_optimization.stage = 0",
                                  "a universal checkpoint is loaded under ZeRO-1 or 2")
        if tag is None and not latest.is_file():
            raise CheckpointError(directory, "there is no file 'latest_universal'",
                                  "no universal checkpoint was made here", "run ds_to_universal first")
        tag = native.check_tag(latest.read_text().strip() if tag is None else str(tag))
        for name, p in self.module.named_parameters():
            path = directory / tag / "zero" / name / "fp32.pt"
            if p.requires_grad and not path.is_file():
                raise CheckpointError(path, "is missing", "this model has such a parameter")
        return tag

    def _check_placement(self, folder: Path, manifest: dict[str, Any], with_optimizer: bool) -> None:
        saved, ours, grid = manifest["placement"], self._placement(), self.process_groups.topology
        saved.setdefault("ranks", bidirectional(saved["stages"]))  # all there was before it was written down
        for key, setting in _PLACEMENT.items():
            if saved[key] != ours[key]:
                raise CheckpointError(folder, f"was saved with {key} = {saved[key]}", f"this job has {ours[key]}",
                                      f"change {setting} to resume")
        if saved["ranks"] != ours["ranks"]:
            then, now = (f"{len(ranks[0])} stages in {len(ranks)} direction{'s' * (len(ranks) > 1)}, the first ones on "
                         f"ranks {ranks[0][:grid.stages + 1]}" for ranks in (saved["ranks"], ours["ranks"]))
            raise CheckpointError(folder, f"was saved with {then} (schedule {manifest['schedule']!r})",
                                  f"this job has {now} (schedule {self.module.schedule!r})",
                                  "resume under a schedule of the same placement, with the same chunks")
        if saved["bounds"] != ours["bounds"]:
            raise CheckpointError(folder, f"its stages begin at layers {saved['bounds']}",
                                  f"this model's at {ours['bounds']}", "the model or its partition_method is another")
        settings = {"zero_optimization.stage": (manifest["zero_stage"], int(self.zero_optimization_stage())),
                    "bf16.enabled": (manifest["bf16"], bool(self.bfloat16_enabled()))}
        for key, (then, now) in settings.items():
            if with_optimizer and then != now:
                raise CheckpointError(folder, f"was saved with {key} = {then!r}", f"this job has {now!r}",
                                      "use the setting of the save, or pass load_optimizer_states=False")

    def _load_rank_state(self, folder: Path, with_optimizer: bool, module_only: bool) -> dict[str, Any]:
        """This rank's own file, compared with the optimizer and the training data at hand."""
        state = torch.load(folder / f"megatron_ext_rank_{self.process_groups.rank:05d}_states.pt", map_location="cpu",
                           weights_only=True)
        then, now = state["optimizer"], self._optimizer_layout()
        if with_optimizer and then != now:
            raise CheckpointError(folder, f"holds the state of {then['type']} on groups of {then['groups']} elements",
                                  f"this job has {now['type']} on {now['groups']}",
                                  "use the optimizer of the save, or pass load_optimizer_states=False")
        loader = self.training_dataloader
        if isinstance(loader, MicroBatchLoader) and state["data"] is not None and not module_only:
            before = loader.state_dict()
            loader.load_state_dict(state["data"])  # to see whether it will do
            loader.load_state_dict(before)
        return state

    def load_module_state_dict(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Adds this rank's experts, from their own files, to the dense weights."""
        folder = self._loading
        if folder is not None and self.has_moe_layers:
            files: dict[int, dict[str, torch.Tensor]] = {}
            for name, p in self.module.named_parameters():
                if is_expert(p):
                    layer, (first, last) = native.expert_layer(name), p.expert_range
                    if layer not in files:
                        files[layer] = {}
                        for expert in range(first, last):
                            path = self._get_expert_ckpt_name(str(folder.parent), layer, expert, folder.name,
                                                              checkpoint_mp_rank=self.checkpoint_mp_rank)
                            files[layer].update(torch.load(path, map_location="cpu", weights_only=True))
                    checkpoint["module"][name] = native.join_experts(name, files[layer], first, last, folder)
        super().load_module_state_dict(checkpoint, *args, **kwargs)

    def _restore_weights(self, module_only: bool) -> None:
        """What DeepSpeed leaves out: 16-bit weights from the restored master, and moments in their dtype."""
        if isinstance(self.basic_optimizer, AdamW):
            self.basic_optimizer.recast_moments()
        if self.zero_optimization():
            if not module_only:
                self.optimizer.update_lp_params()
            if self.basic_optimizer.state:
                relink_optimizer_state(self.optimizer)
        self.weight_cache.clear()

    def _restore_rank_state(self, state: dict[str, Any]) -> None:
        """Random generators and the position in the training data."""
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

    def _load_unoptimized(self, folder: Path) -> None:
        """Buffers (router biases) and frozen weights live only in the model states, which a universal load skips."""
        state = self.module.state_dict(keep_vars=True)
        ours = {name: value for name, value in state.items() if not value.requires_grad}
        for file in sorted(folder.glob("mp_rank_*_model_states.pt")):
            saved = torch.load(file, map_location="cpu", weights_only=False)["module"]
            for name in ours.keys() & saved.keys():
                ours[name].data.copy_(saved[name])


def _gather(value: Any, group: dist.ProcessGroup) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found
