"""Which optimizer DeepSpeed makes for a pipeline, and ZeRO-1/2 on stages that differ: one with experts, one without.

ZeRO computes a norm per parameter group and sums each over the model-parallel group. Experts make a group of their own,
so a pair of stages without experts has fewer groups than one with, takes part in fewer sums, and the step hangs. Here
every rank takes part in as many sums as the rank with the most groups.

What ZeRO reduces at the end of a step can be averaged before (reduction.py) and handed over: with its defaults it sums
a bucket with one all-reduce and keeps its slice, so no more bytes travel. Taking turns on a busy machine (P = 2, D = 2,
gloo, ZeRO-1, 64 MB of FP32 gradients on a rank; 12 steps each up to the optimizer's, median and quickest in ms):
DualPipe early 941, 760; late 1081, 804; by ZeRO 1039, 894. 1F1B has one stage on a rank and gains nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import BFLOAT16, DDP_BFLOAT16, ZERO_OPTIMIZATION
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from megatron_ext.optimizer import AdamW


class PipelineZeroOptimizer(DeepSpeedZeroOptimizer):
    """Takes over an optimizer that DeepSpeed has made, by class assignment; adds no state but these two."""

    most_groups: int = 0
    """Parameter groups on the rank of the job that has the most."""
    averaged: bool = False
    """Whether gradients come averaged over the replicas, so that nothing is left to send."""

    @property
    def takes_averages(self) -> bool:
        """Whether averaging gradients for ZeRO sends no more than ZeRO itself, and it can go on from there.

        Its own way is an all-reduce of whole buckets too. Not so with `use_multi_rank_bucket_allreduce` false: a reduce
        to each owner, half the bytes. With `overlap_comm` buckets are filled and read on different streams, which only
        the reduction between orders. These are left to ZeRO, at the end. Without contiguous gradients its own way is
        wrong: it sums experts over the ranks that hold others (0.19.8).
        """
        by_bucket = self.reduce_scatter and self.use_multi_rank_bucket_allreduce and not self.overlap_comm
        return self.gradient_average and (by_bucket or not self.contiguous_gradients)

    def average_tensor(self, tensor: Tensor, communication_data_type: torch.dtype) -> None:
        """A bucket of gradients: sums it over the replicas and divides, or with `averaged` only takes its shard."""
        if self.averaged:
            self._add_full_reduction_to_compact_grad_partition(tensor, communication_data_type)
        else:
            super().average_tensor(tensor, communication_data_type)

    def allreduce_bucket(self, bucket: list[Tensor], *arguments: Any, **options: Any) -> Tensor:
        """Gradients summed over the replicas, flat; not contiguous ones come here past `average_tensor`."""
        return self.flatten(bucket) if self.averaged else super().allreduce_bucket(bucket, *arguments, **options)

    def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
        """L2 norm over all groups of all stages; -1 if it is not finite, as in DeepSpeed."""
        norms = [super().scaled_global_norm(norm_type)]
        for _ in range(self.most_groups - len(self.bit16_groups)):
            # No parameters of ours: what comes back are the other stages' groups.
            norms.append(self.complete_grad_norm_calculation_for_cpu_offload([]) if self.cpu_offload
                         else self.get_grad_norm_direct([], []))
        stacked = torch.stack([n.to(norms[0].device).reshape(()) for n in norms])
        return torch.where((stacked < 0).any(), torch.full_like(stacked[0], -1.0), stacked.pow(2).sum().sqrt())


class OptimizerMixin:
    """The engine's choice of optimizers, by overriding DeepSpeed's own set-up methods."""

    def _configure_basic_optimizer(self, model_parameters: Any) -> Any:
        """Adam and AdamW are ours where `moment_dtype` is given, and on a CPU, where DeepSpeed's compile for minutes.

        DeepSpeed's own recipes stay its own: `torch_adam`, and BF16 master weights.
        """
        name = (self.optimizer_name() or "").lower()
        params = dict(self.optimizer_params() or {})
        on_host = get_accelerator().device_name() == "cpu"
        moment_dtype = self.section.optimizer.moment_dtype
        theirs = params.get("torch_adam") or self.bf16_master_weights_and_gradients()
        if name not in ("adam", "adamw") or theirs or not (moment_dtype or on_host):
            return super()._configure_basic_optimizer(model_parameters)
        for key in ("torch_adam", "fp32_optimizer_states"):  # DeepSpeed's own switches between implementations
            params.pop(key, None)
        params["adam_w_mode"] = name == "adamw" or params.get("adam_w_mode", True)
        return AdamW(model_parameters, moment_dtype=moment_dtype or "fp32", **params)

    def _do_optimizer_sanity_check(self, basic_optimizer: Any) -> Any:
        """Never BF16_Optimizer: it drops the options of ZeRO, and gradients cannot be handed to it once per step.

        FP32 accumulation without ZeRO, which DeepSpeed refuses, is what the pipeline does in any case.
        """
        if not self.zero_optimization() and self.get_data_types() == (torch.bfloat16, torch.float32):
            return DDP_BFLOAT16
        wrapper = super()._do_optimizer_sanity_check(basic_optimizer)
        return ZERO_OPTIMIZATION if wrapper == BFLOAT16 and self.zero_optimization() else wrapper

    def _configure_zero_optimizer(self, optimizer: Any) -> Any:
        made = super()._configure_zero_optimizer(optimizer)
        if type(made) is DeepSpeedZeroOptimizer:
            made.__class__ = PipelineZeroOptimizer
        return made

    def _configure_fp16_optimizer(self, optimizer: Any, low_precision_dtype: torch.dtype) -> Any:
        """Undoes the step with zero gradients that DeepSpeed's wrapper takes when it is made.

        That step decays the weights once and leaves the bias correction one step ahead: the first update was 20 %
        short.
        """
        made = super()._configure_fp16_optimizer(optimizer, low_precision_dtype)
        for masters, weights in zip(made.fp32_groups, made.fp16_groups, strict=True):
            for master, weight in zip(masters, weights, strict=True):
                master.data.copy_(weight.data)
        optimizer.state.clear()
        for group in optimizer.param_groups:
            group.pop("step", None)
        return made

    def clip_fp32_gradients(self) -> None:
        """Nothing: without ZeRO, gradients are clipped before they are handed over (gradients.py)."""
