"""Every private name of DeepSpeed that megatron_ext leans on, in one place. Checked against DeepSpeed 0.19.8.

Public and used elsewhere: `deepspeed.initialize`, `init_distributed`, `DeepSpeedEngine` as a base class,
`coalesce_grad_reduction`, `set_gradient_accumulation_boundary`, the `mpu` protocol, `deepspeed.pipe` specs.

`missing()` says what a new version of DeepSpeed took away; tests/engine/test_private.py calls it, and `check_version`
does on versions that nobody has tried.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import deepspeed
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups

from megatron_ext.config.errors import ConfigError

CHECKED = "0.19.8"
SUPPORTED = "0.19"

ENGINE_METHODS = {
    "_configure_distributed_model": "overridden: tells DeepSpeed that the module has experts",
    "_configure_basic_optimizer": "overridden: AdamW with BF16 moments",
    "_configure_fp16_optimizer": "overridden: BF16 without ZeRO starts from unchanged master weights",
    "_configure_zero_optimizer": "overridden: stages with different numbers of parameter groups (optimizers.py)",
    "_do_optimizer_sanity_check": "overridden: BF16_Optimizer is never chosen",
    "_take_model_step": "the optimizer step of a batch",
    "_common_checkpoint_state": "contents of mp_rank_*_model_states.pt",
    "_save_moe_checkpoint": "overridden: expert files of our layers",
    "_get_ckpt_name": "name of the model states file",
    "_get_expert_ckpt_name": "name of an expert's file",
    "_get_optimizer_ckpt_name": "name of the expert-parallel optimizer file without ZeRO",
    "load_module_state_dict": "overridden: merges the expert files",
    "deepspeed_io": "overridden: micro-batches in a layout-free order",
    "clip_fp32_gradients": "overridden: clipping without ZeRO is done on the FP32 gradients",
}
ENGINE_SOURCES = {
    "_is_gradient_accumulation_boundary": "reset after a step",
    "has_moe_layers": "set, so that expert gradients are reduced over their own group",
    "num_experts": "set beside it",
    "checkpoint_mp_rank": "number of the mirrored pair in file names",
    "_global_grad_norm": "set where we compute the norm",
    "_config": "reads _param_dict, sets zero_allow_untested_optimizer",
}
ZERO_SOURCES = {
    "use_grad_accum_attribute": "whether gradients are taken from param.grad_accum (FP32) or param.grad",
    "scaled_global_norm": "overridden in optimizers.py",
    "complete_grad_norm_calculation_for_cpu_offload": "one group's norm with offload",
    "get_grad_norm_direct": "one group's norm without offload",
    "bit16_groups": "the parameter groups",
    "average_tensor": "overridden: gradients that come averaged (reduction.py)",
    "_add_full_reduction_to_compact_grad_partition": "this rank's shard of them, where gradients are summed in FP32",
    "contiguous_gradients": "one of the options that lead through average_tensor, as are",
    "reduce_scatter": "this",
    "use_multi_rank_bucket_allreduce": "this",
    "gradient_average": "this",
    "overlap_comm": "and this, if off",
    "allreduce_bucket": "overridden: the same without contiguous gradients",
    "flatten": "what it returns",
    "update_lp_params": "copies the FP32 master weights to the model after a load",
    "single_partition_of_fp32_groups": "this rank's shard of the master weights",
    "round_robin_bit16_groups": "the parameters of a group in the order in which they lie in the partitions",
    "round_robin_bit16_offsets": "and where",
    "real_dp_process_group": "over which a group is partitioned",
    "_hp_optimizer_states_linked": "reset after a load",
    "_lazy_init_hp_params_optimizer_state": "links the parameters to the loaded optimizer state",
}
CONFIG_SOURCES = {"_param_dict": "the whole ds_config, to read our section from"}
WRAPPER_SOURCES = {
    "fp32_groups": "master weights of BF16 without ZeRO",
    "fp16_groups": "and the weights that they belong to",
}
GROUP_TABLES = ("_EXPERT_PARALLEL_GROUP", "_EXPERT_PARALLEL_GROUP_RANKS", "_EXPERT_DATA_PARALLEL_GROUP",
                "_EXPERT_DATA_PARALLEL_GROUP_RANKS")
_SOURCES: tuple[tuple[type, dict[str, str]], ...] = (
    (DeepSpeedEngine, ENGINE_SOURCES), (DeepSpeedZeroOptimizer, ZERO_SOURCES), (DeepSpeedConfig, CONFIG_SOURCES),
    (FP16_UnfusedOptimizer, WRAPPER_SOURCES))


def check_version(version: str = deepspeed.__version__) -> None:
    """Refuses a DeepSpeed whose inside nobody has compared with ours: it might train on wrong gradients in silence.

    Raises:
        ConfigError: not 0.19.*, or one of these without a name that is needed.
    """
    if not version.startswith(SUPPORTED + "."):
        raise ConfigError("deepspeed", version, f"this version of megatron_ext works with DeepSpeed {SUPPORTED}.*",
                          f'pip install "deepspeed=={SUPPORTED}.*"')
    lost = [] if version == CHECKED else missing()
    if lost:
        raise ConfigError("deepspeed", version, f"lacks {lost[0]}", f'pip install "deepspeed=={CHECKED}"')


def missing() -> list[str]:
    """Private names that this DeepSpeed does not have, each with what it is for; empty if all is well."""
    lost = [f"DeepSpeedEngine.{name}: {why}" for name, why in ENGINE_METHODS.items()
            if not hasattr(DeepSpeedEngine, name)]
    for owner, names in _SOURCES:
        source = inspect.getsource(owner)
        lost += [f"{owner.__name__}.{name}: {why}" for name, why in names.items()
                 if not re.search(rf"(self\.|def ){name}\b", source)]
    lost += [f"deepspeed.utils.groups.{name}: pre-registered expert groups" for name in GROUP_TABLES
             if not isinstance(getattr(groups, name, None), dict)]
    if not hasattr(deepspeed, "DeepSpeedEngine"):
        lost.append("deepspeed.DeepSpeedEngine: swapped while deepspeed.initialize runs")
    return lost


def register_expert_groups(name: str, parallel: Any, parallel_ranks: list[int], data: Any,
                           data_ranks: list[int]) -> None:
    """Makes DeepSpeed use our expert groups: it creates its own, for another layout, only where the name is unknown."""
    for table, value in zip(GROUP_TABLES, (parallel, parallel_ranks, data, data_ranks), strict=True):
        getattr(groups, table)[name] = value


def relink_optimizer_state(optimizer: Any) -> None:
    """Points DeepSpeed's per-parameter views of the optimizer state at the tensors that a load has put in place."""
    optimizer._hp_optimizer_states_linked = False
    if optimizer.optimizer.state:  # otherwise the next step does it
        optimizer._lazy_init_hp_params_optimizer_state()
