"""Saving and resuming, in DeepSpeed's layout with everything in it: all experts, router biases, moments, random state, data.

What is on disk and when a checkpoint counts as whole is said in checkpoint/native.py. A checkpoint is verified by all ranks
together before the first weight is replaced; an error on one rank is raised on all.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.checkpoint.utils import clone_tensors_for_torch_save
from deepspeed.runtime.engine import DeepSpeedEngine

import megatron_ext
from megatron_ext.checkpoint import native
from megatron_ext.checkpoint.native import CheckpointError
from megatron_ext.config.errors import UserError
from megatron_ext.engine.agreement import agree
from megatron_ext.engine.gradients import is_expert
from megatron_ext.optimizer import AdamW

_PLACEMENT = {"stages": "megatron_ext.pipeline.stages", "replicas": "the number of ranks",
              "expert_parallel": "megatron_ext.expert_parallel.size"}


class CheckpointMixin:
    """`save_checkpoint` and `load_checkpoint` of the engine, with DeepSpeed's signatures."""

    # -- saving

    def save_checkpoint(self, save_dir: str, tag: str | None = None, client_state: dict[str, Any] | None = None,
                        save_latest: bool = True, exclude_frozen_parameters: bool = False) -> bool:
        """Saves everything a bit-exact resume needs; collective.

        Args:
            save_dir: folder of checkpoints, shared by all ranks.
            tag: folder name; `global_step<N>` if None.
            client_state: the caller's own state, given back by `load_checkpoint`.
            save_latest: make this the checkpoint that `load_checkpoint` takes by default.

        Raises:
            CheckpointError: a tag that is no plain folder name.
        """
        groups = self.process_groups
        tag = native.check_tag(f"global_step{self.global_steps}" if tag is None else str(tag))
        folder = Path(save_dir) / tag
        if groups.rank == 0:  # an overwritten checkpoint is not whole until it is written again
            (folder / native.MANIFEST).unlink(missing_ok=True)
        dist.barrier()
        super().save_checkpoint(save_dir, tag, client_state or {}, save_latest=False,
                                exclude_frozen_parameters=exclude_frozen_parameters)
        torch.save(self._rank_state(), folder / f"megatron_ext_rank_{groups.rank:05d}_states.pt")
        dist.barrier()
        names = sorted(p.name for p in folder.iterdir() if p.suffix == ".pt")
        world = dist.get_world_size()
        sums: list[Any] = [None] * world
        dist.all_gather_object(sums, {n: native.sum_file(folder / n) for n in names[groups.rank::world]},
                               group=groups.control)
        if groups.rank == 0:
            native.write_manifest(folder, self._manifest(), {n: s for part in sums for n, s in part.items()})
            if save_latest:
                native.replace_file(Path(save_dir) / "latest", tag)
        dist.barrier()
        return True

    def _manifest(self) -> dict[str, Any]:
        grid = self.process_groups.topology
        return {"megatron_ext": megatron_ext.__version__, "step": self.global_steps, "schedule": self.module.schedule,
                "placement": {"stages": grid.stages, "replicas": grid.replicas, "expert_parallel": grid.expert_parallel,
                              "bounds": self.module.bounds},
                "zero_stage": int(self.zero_optimization_stage()), "section": self.section.resolved()}

    def _rank_state(self) -> dict[str, Any]:
        loader = self.training_dataloader
        name, internal, *rest = np.random.get_state()
        return {"torch": torch.get_rng_state(),
                "device": None if self.device.type == "cpu" else get_accelerator().get_rng_state(),
                "numpy": (name, internal.tolist(), *rest), "python": random.getstate(),
                "data": loader.state_dict() if self.is_first_stage() and hasattr(loader, "state_dict") else None}

    def _save_moe_checkpoint(self, save_dir: str, tag: str, client_state: dict[str, Any] | None = None,
                             exclude_frozen_parameters: bool = False) -> None:
        """DeepSpeed's files for a model with experts; its own writer knows only its own MoE classes."""
        groups = self.process_groups
        place = groups.expert_placement()
        experts: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
        dense = dict(DeepSpeedEngine.module_state_dict(self, exclude_frozen_parameters=exclude_frozen_parameters))
        for name, p in self.module.named_parameters():
            if is_expert(p):
                dense.pop(name)
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

        Returns:
            The path loaded and the caller's `client_state`.

        Raises:
            CheckpointError: on all ranks, before anything is changed: missing, incomplete or damaged, not ours, or saved
                in another layout.
        """
        universal = self.load_universal_checkpoint()
        error: UserError | None = None
        try:
            directory = Path(load_dir)
            if not universal:
                tag = native.read_latest(directory) if tag is None else native.check_tag(str(tag))
                manifest = native.read_manifest(directory / tag)
                self._check_placement(directory / tag, manifest)
                native.check_files(directory / tag, manifest, self.process_groups.rank, dist.get_world_size())
            elif tag is None and not (directory / "latest_universal").is_file():
                raise CheckpointError(directory, "there is no file 'latest_universal'",
                                      "no universal checkpoint was made here", "run ds_to_universal first")
            elif self.has_moe_layers:
                raise CheckpointError(directory, "this model has experts",
                                      "universal checkpoints of models with experts are not available yet",
                                      "resume in the layout of the save")
        except UserError as found:
            error = found
        agree(error, self.process_groups.control)
        self._loading = None if universal else directory / str(tag)
        path, client_state = super().load_checkpoint(load_dir, tag, load_module_strict, load_optimizer_states,
                                                     load_lr_scheduler_states, load_module_only, custom_load_fn)
        self._after_load(path, load_module_only)
        return path, client_state

    def _check_placement(self, folder: Path, manifest: dict[str, Any]) -> None:
        saved, ours = manifest["placement"], self._manifest()["placement"]
        for key, setting in _PLACEMENT.items():
            if saved[key] != ours[key]:
                raise CheckpointError(folder, f"was saved with {key} = {saved[key]}", f"this job has {ours[key]}",
                                      f"change {setting} to resume")
        if saved["bounds"] != ours["bounds"]:
            raise CheckpointError(folder, f"its stages begin at layers {saved['bounds']}", f"this model's at {ours['bounds']}",
                                  "the model or its partition_method is another")
        stage = int(self.zero_optimization_stage())
        if manifest["zero_stage"] != stage:
            raise CheckpointError(folder, f"was saved with zero_optimization.stage = {manifest['zero_stage']}",
                                  f"this job has {stage}", "use the stage of the save")

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

    def _after_load(self, path: str, module_only: bool) -> None:
        """What DeepSpeed leaves out: 16-bit weights from the restored master, BF16 moments, buffers, random state, data."""
        if self.zero_optimization() and not module_only:
            self.optimizer.update_lp_params()
        if isinstance(self.basic_optimizer, AdamW):
            self.basic_optimizer.recast_moments()
        self.weight_cache.clear()
        if self._loading is None:
            self._load_buffers(Path(path).parent)
            return
        if module_only:
            return
        state = self._load_rank_state(self.process_groups.rank)
        torch.set_rng_state(state["torch"])
        if state["device"] is not None and self.device.type != "cpu":
            get_accelerator().set_rng_state(state["device"])
        name, internal, *rest = state["numpy"]
        np.random.set_state((name, np.array(internal, dtype=np.uint32), *rest))
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        data = self._load_rank_state(0)["data"]
        if data is not None and hasattr(self.training_dataloader, "load_state_dict"):
            self.training_dataloader.load_state_dict(data)
            self._data_iterator = None

    def _load_rank_state(self, rank: int) -> dict[str, Any]:
        assert self._loading is not None
        return torch.load(self._loading / f"megatron_ext_rank_{rank:05d}_states.pt", map_location="cpu", weights_only=True)

    def _load_buffers(self, folder: Path) -> None:
        """Buffers (router biases) live only in the model states, which a universal load skips."""
        ours = {name: buffer for name, buffer in self.module.named_buffers() if name in self.module.state_dict()}
        for file in sorted(folder.glob("mp_rank_*_model_states.pt")):
            saved = torch.load(file, map_location="cpu", weights_only=False)["module"]
            for name in ours.keys() & saved.keys():
                ours[name].copy_(saved[name])
