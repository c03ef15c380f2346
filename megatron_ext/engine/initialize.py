"""`megatron_ext.initialize`: signature and result of `deepspeed.initialize`, for a `megatron_ext.PipelineModule`.

DeepSpeed has no registry of engines; its `initialize` looks up `deepspeed.DeepSpeedEngine` by name. Ours is put there
for the time of the call, so that everything else that `initialize` does stays DeepSpeed's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.utils import configure_moe_param_groups, split_params_into_different_moe_groups_for_optimizer

from megatron_ext.config import ConfigError, MegatronExtConfig, check_deepspeed_config, load_config, parse_section
from megatron_ext.config.rules import resolve_batch
from megatron_ext.engine import private
from megatron_ext.engine.engine import PipelineEngine
from megatron_ext.engine.foreign import start_from
from megatron_ext.engine.gradients import is_expert
from megatron_ext.optimizer import AdamW
from megatron_ext.parallel import PipelineUnit, agreed
from megatron_ext.parallel.extensions import announce_build, check_stale_locks
from megatron_ext.pipeline.choice import PLACEMENTS
from megatron_ext.pipeline.module import PipelineModule


def initialize(args: Any = None, model: Any = None, optimizer: Any = None, model_parameters: Any = None,
               training_data: Any = None, lr_scheduler: Any = None, distributed_port: int = 29500, mpu: Any = None,
               dist_init_required: bool | None = None, collate_fn: Callable[..., Any] | None = None, config: Any = None,
               mesh_param: Any = None, config_params: Any = None) -> tuple[Any, Any, Any, Any]:
    """As `deepspeed.initialize`; a model that is not a `megatron_ext.PipelineModule` is DeepSpeed's as before.

    Args:
        args: may carry `deepspeed_config`, as the launcher's argument parser leaves it.
        model: a `megatron_ext.PipelineModule`.
        training_data: a map-style dataset of (inputs, labels); the engine reads its own shard of 2D.
        config: path or dict; may hold a `megatron_ext` section.

    Returns:
        engine, optimizer, training data loader (None without training data), learning-rate scheduler.

    Raises:
        ConfigError: on every rank, for the first rule that the config breaks; a DeepSpeed that is not 0.19.*.
        CheckpointError: on every rank: `megatron_ext.load` names a checkpoint that is not whole, or of another model.
    """
    if config is None:
        config = config_params if config_params is not None else getattr(args, "deepspeed_config", None)
    if not isinstance(model, PipelineModule):
        return deepspeed.initialize(args=args, model=model, optimizer=optimizer, model_parameters=model_parameters,
                                    training_data=training_data, lr_scheduler=lr_scheduler,
                                    distributed_port=distributed_port, mpu=mpu, dist_init_required=dist_init_required,
                                    collate_fn=collate_fn, config=config, mesh_param=mesh_param)
    with agreed(model.groups.control):
        private.check_version()
        if mpu is not None:
            raise ConfigError("mpu", type(mpu).__name__, "PipelineModule brings its own", "leave the argument out")
        if config is None:
            raise ConfigError("config", None, "a ds_config is needed", "pass config= or --deepspeed_config")
        ds_config = load_config(config)
        section = parse_section(ds_config)
        check_deepspeed_config(ds_config, section)
        resolve_batch(ds_config, model.topology.data_parallel_size)
        _check_placement(section, model)
        _check_optimizer(ds_config, section, optimizer)
        if section.recompute and model.activation_checkpoint_interval:
            raise ConfigError("megatron_ext.recompute", list(section.recompute),
                              "is for phases, and activation_checkpoint_interval = "
                              f"{model.activation_checkpoint_interval} runs whole layers as one", "drop one of the two")
        if optimizer is not None or ds_config.get("optimizer"):
            _check_trainable(model)
    groups = model.groups
    _compare_settings({**ds_config, "base_seed": model.base_seed, "partition_method": model.bounds,
                       "schedule": model.schedule, "placement": model.placement}, groups.control)
    private.register_expert_groups(f"ep_size_{groups.topology.expert_parallel}", groups.expert_parallel,
                                   groups.expert_parallel_ranks, groups.expert_data_parallel,
                                   groups.expert_data_parallel_ranks)
    if optimizer is None or isinstance(optimizer, AdamW):
        # Ours is among the optimizers that ZeRO has not heard of; it is tested here.
        ds_config.setdefault("zero_allow_untested_optimizer", True)
    optimizer = _with_expert_groups(optimizer, model)
    with patch.object(deepspeed, "DeepSpeedEngine", PipelineEngine):
        made = deepspeed.initialize(args=None, model=model, optimizer=optimizer, model_parameters=model_parameters,
                                    training_data=training_data, lr_scheduler=lr_scheduler,
                                    distributed_port=distributed_port, mpu=PipelineUnit(groups),
                                    dist_init_required=dist_init_required, collate_fn=collate_fn, config=ds_config,
                                    mesh_param=mesh_param)
    start_from(made[0], section.load)
    return made


def init_distributed(**kwargs: Any) -> None:
    """`deepspeed.init_distributed`, after clearing locks of killed builds and saying what is about to be compiled.

    Args:
        kwargs: as DeepSpeed's; `timeout` is taken over by every group made here.
    """
    if not dist.is_initialized():
        check_stale_locks()
        if get_accelerator().device_name() == "cpu":
            announce_build(int(os.environ.get("RANK", 0)))
    deepspeed.init_distributed(**kwargs)


def _check_optimizer(ds_config: dict[str, Any], section: MegatronExtConfig, optimizer: Any) -> None:
    if section.optimizer.moment_dtype is not None and optimizer is not None and not isinstance(optimizer, AdamW):
        raise ConfigError("megatron_ext.optimizer.moment_dtype", section.optimizer.moment_dtype,
                          f"is for the optimizer of the config, but initialize was given a {type(optimizer).__name__}",
                          "remove one of the two, or pass megatron_ext.optimizer.AdamW")
    stage = (ds_config.get("zero_optimization") or {}).get("stage", 0)
    if stage and optimizer is None and not ds_config.get("optimizer"):
        raise ConfigError("zero_optimization.stage", stage, "ZeRO shards an optimizer and there is none",
                          'add an "optimizer" section, or pass optimizer= to initialize')


def _with_expert_groups(optimizer: Any, model: PipelineModule) -> Any:
    """The caller's optimizer with experts in parameter groups of their own, as ZeRO needs them."""
    if optimizer is None or not any(is_expert(p) for p in model.parameters()):
        return optimizer
    if isinstance(optimizer, torch.optim.Optimizer):
        for number, group in enumerate(optimizer.param_groups):
            group.setdefault("name", f"group-{number}")
        optimizer.param_groups[:] = split_params_into_different_moe_groups_for_optimizer(optimizer.param_groups)
        return optimizer
    return lambda parameters: optimizer(configure_moe_param_groups(parameters))


def _compare_settings(settings: dict[str, Any], control: Any) -> None:
    """All ranks must have read the same config: a stale file on one node would train silently wrong.

    Raises:
        ConfigError: on every rank, for the first key in which a rank differs from rank 0.
    """
    mine: dict[str, str] = {}

    def flatten(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                flatten(f"{prefix}.{key}" if prefix else str(key), item)
        else:
            mine[prefix] = repr(value)

    flatten("", settings)
    found: list[Any] = [None] * dist.get_world_size(control)
    dist.all_gather_object(found, mine, group=control)
    for rank, other in enumerate(found):
        for key in sorted(found[0].keys() | other.keys()):
            here, there = found[0].get(key, "nothing"), other.get(key, "nothing")
            if here != there:
                raise ConfigError(key, there, f"rank {rank} has this and rank 0 has {here}",
                                  "all ranks must read the same config")


def _check_placement(section: MegatronExtConfig, model: PipelineModule) -> None:
    asked_schedule, kind = section.pipeline.given("schedule"), section.pipeline.placement
    if kind is not None and PLACEMENTS[kind](model.num_stages, model.chunks) != model.placement:
        raise ConfigError("megatron_ext.pipeline.placement", kind,
                          f"the PipelineModule was built for the schedule {model.schedule!r} and is placed otherwise",
                          "change one of the two, or give PipelineModule the same config=")
    for key, built, asked in (
            ("pipeline.stages", model.num_stages, section.pipeline.stages),
            ("pipeline.schedule", model.schedule, None if asked_schedule == "auto" else asked_schedule),
            ("pipeline.chunks", model.chunks, section.pipeline.chunks if section.pipeline.chunks > 1 else None),
            ("expert_parallel.size", model.topology.expert_parallel, section.expert_parallel.size)):
        if asked is not None and asked != built:
            raise ConfigError(f"megatron_ext.{key}", asked,
                              f"the PipelineModule was built with {built!r}; the placement is fixed when it is built",
                              "change one of the two, or give PipelineModule the same config=")


def _check_trainable(model: PipelineModule) -> None:
    """torch's optimizers refuse to be made for nothing, and those of the other ranks would wait."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("layers", model.bounds,
                          f"stages {model.stages} have no trainable parameters, and an optimizer needs some",
                          "choose another partition_method or fewer stages")
