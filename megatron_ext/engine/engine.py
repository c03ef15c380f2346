"""The engine: DeepSpeed's, with a pipeline of ours for a training step.

It subclasses `DeepSpeedEngine`, not DeepSpeed's `PipelineEngine`: ZeRO-1/2 with or without offload, the optimizers, the
schedulers, monitors and checkpoints stay DeepSpeed's own, and learn through the `mpu` which ranks are replicas.
What is ours is the order of a step: schedule, FP32 gradients, one reduction, one optimizer step, one move of the
routers' biases (DeepSeek-V3 report, sections 2.1.2, 3.2 and 3.3).

Letters: P pipeline ranks; data shards: 2D under two directions, D under one; n = gradient_accumulation_steps
micro-batches per direction.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from megatron_ext.comm.point_to_point import Messenger
from megatron_ext.config import ConfigError, MegatronExtConfig, parse_section
from megatron_ext.data import MicroBatchLoader
from megatron_ext.engine import gradients
from megatron_ext.engine.checkpoint import CheckpointMixin
from megatron_ext.engine.dispatch_choice import DispatchMixin
from megatron_ext.engine.evaluation import EvaluationMixin
from megatron_ext.engine.optimizers import OptimizerMixin, PipelineZeroOptimizer
from megatron_ext.engine.reduction import Reduction
from megatron_ext.engine.report import ReportMixin
from megatron_ext.engine.schedule_choice import ScheduleMixin
from megatron_ext.engine.shards import compare_first_batches
from megatron_ext.fp8 import Precision, WeightCache, check_backend
from megatron_ext.layers.balancing import update_biases
from megatron_ext.layers.router import Router
from megatron_ext.parallel import agreed
from megatron_ext.pipeline.executor import BatchError, Batches, Executor
from megatron_ext.pipeline.module import PipelineModule
from megatron_ext.pipeline.timeline import Timeline
from megatron_ext.pipeline.weight_gradients import WeightGradients, hooked_parameters

log = logging.getLogger("megatron_ext")


class PipelineEngine(OptimizerMixin, CheckpointMixin, ScheduleMixin, DispatchMixin, EvaluationMixin, ReportMixin,
                     DeepSpeedEngine):
    """What `megatron_ext.initialize` returns for a `PipelineModule`.

    Attributes:
        section: the `megatron_ext` section of the config, with defaults.
        metrics: of the last step: `loss`, `grad_norm`, `lr`, `max_violation` (worst layer of the model, or None), and
            of this rank's tokens to experts and back `expert_bytes_node` and `expert_bytes_fabric` (sent inside the
            node and between nodes), and over gloo `expert_seconds_exposed` (waited for) and
            `expert_seconds_hidden_at_most` (from a start until it was waited for: the transfer may have been shorter).
        expert_traffic: the same by kind: counts, dispatch, combine and their backwards (comm/traffic.py).
        expert_counts: of the last step, per router of this rank by name: tokens per expert [E] over the global batch.
        timeline: of the last recorded step (see `record_next_batch`), on every rank of the recorded pipeline.
    """

    module: PipelineModule

    def __init__(self, args: Any, model: PipelineModule, **kwargs: Any):
        self._prepare(model, kwargs["config_class"])
        hooked = hooked_parameters(model)
        super().__init__(args, model, **kwargs)
        self.enable_backward_allreduce = False
        self._finish(hooked)

    # -- set-up

    def _prepare(self, model: PipelineModule, config: Any) -> None:
        """What DeepSpeed's constructor needs of us through the methods overridden below."""
        self.__dict__["section"] = parse_section(config._param_dict)
        self.__dict__["process_groups"] = model.groups
        for p in model.parameters():
            # DeepSpeed leaves parameters without this mark out of the norm on all pairs but the first.
            p.model_parallel = not getattr(p, "ds_pipe_replicated", False)

    def _finish(self, hooked: set[int]) -> None:
        """What needs DeepSpeed's constructor to be done."""
        section: MegatronExtConfig = self.section
        model = self.module
        groups = self.process_groups
        self.weights = WeightGradients(model.parameters(), hooked)
        self.routers: dict[str, Router] = {n: m for n, m in model.named_modules() if isinstance(m, Router)}
        check_backend(section.kernels.backend, self.device)
        self.weight_cache = WeightCache()
        precision = Precision(fp8=section.fp8.enabled, activation_cache=section.fp8.activation_cache,
                              dispatch_dtype=section.expert_parallel.dispatch_dtype or "model",
                              combine_dtype=section.expert_parallel.combine_dtype, backend=section.kernels.backend,
                              weights=self.weight_cache)
        for layer in model.children_with("set_precision"):
            layer.set_precision(precision)
        model.forget_phases()
        if section.fp8.enabled and groups.rank == 0:
            cached = "activations kept in FP8" if section.fp8.activation_cache else "activations kept as they are"
            print(f"megatron_ext: FP8 products on {self.device.type} (kernels: {section.kernels.backend}), {cached}, "
                  f"tokens to experts in {precision.dispatch_dtype}", flush=True)
        zero = isinstance(self.optimizer, PipelineZeroOptimizer)
        ranks: list[Any] = [None] * dist.get_world_size()
        mine = len(self.optimizer.bit16_groups) if zero else 0, bool(self.routers)
        dist.all_gather_object(ranks, mine, group=groups.control)
        self._balances = any(routers for _, routers in ranks)
        ours = not self.zero_optimization()  # who averages the gradients
        if zero:
            self.optimizer.most_groups = max(count for count, _ in ranks)
            ours = self.optimizer.averaged = self.optimizer.takes_averages
        self.reduction = Reduction(model, self.weights.parameters if ours else [], groups, self._reduction_dtype(),
                                   early=section.pipeline.overlap)
        self.executor = Executor(
            model, Messenger(groups.messages, groups.control, self.device), self.weights, self.device,
            cast=torch.bfloat16 if self.bfloat16_enabled() else None, set_counting=self._set_counting,
            synchronize=get_accelerator().synchronize, overlap=section.pipeline.overlap, recompute=section.recompute)
        self._start_schedule()
        self._start_dispatch()
        self._data_iterator: Iterator[Any] | None = None
        self._batches_compared = False
        self._failure: str | None = None
        self._seconds = 0.0  # of training since the last printed line
        self._record = False
        self.timeline: Timeline | None = None
        self.metrics: dict[str, Any] = {}
        self.expert_counts: dict[str, Tensor] = {}
        self.expert_traffic: dict[str, dict[str, float]] = {}
        self._split_told = False
        if self.bfloat16_enabled() and self.zero_optimization() and not self.optimizer.use_grad_accum_attribute:
            deepspeed.utils.log_dist(
                "gradients are summed over micro-batches in FP32 and over replicas in BF16; for FP32 there too, set "
                '"data_types": {"grad_accum_dtype": "fp32"} under ZeRO-1', ranks=[0])

    def _tell_split(self) -> None:
        """Says once, when a step has shown it, whose weight gradient the schedule cannot take apart."""
        self._split_told = True
        names = {p: name for name, p in self.module.named_parameters()}
        whole = sorted(names[p] for p in self.weights.whole if p.dim() > 1)
        deepspeed.utils.log_dist(
            f"pipeline rank {self.module.stage_rank} runs stages {self.module.stages} of "
            f"{len(self.module.bounds) - 1}; "
            + ("every weight matrix takes its gradient apart (W)" if not whole else
               f"the gradient of {len(whole)} of {sum(p.dim() > 1 for p in names)} weight matrices comes with the "
               f"input's (I): {', '.join(whole[:4])}" + (" ..." if len(whole) > 4 else "")), ranks=[0])

    def _configure_distributed_model(self, model: nn.Module) -> None:
        super()._configure_distributed_model(model)
        self._synchronize_tied()  # now, for the optimizer is about to copy the weights
        experts = [p for p in model.parameters() if gradients.is_expert(p)]
        if experts:  # DeepSpeed sets this only for its own MoE classes
            self.has_moe_layers = True
            self.num_experts = sorted({p.num_experts for p in experts})

    def _synchronize_tied(self) -> None:
        """Makes the groups of tied parameters that several ranks hold, and gives all holders the owner's values."""
        self._tied_groups: list[tuple[list[nn.Parameter], Any]] = []
        groups = self.process_groups
        for key, ranks_of in self.module.tied_groups_ranks.items():
            for ranks in ranks_of:
                group = dist.new_group(ranks, timeout=groups.timeout)
                if groups.rank in ranks:
                    parameters = self.module.tied_parameters(key)
                    for p in parameters:
                        dist.broadcast(p.data, src=ranks[0], group=group)  # the owner
                    self._tied_groups.append((parameters, group))

    def deepspeed_io(self, dataset: Any, batch_size: int | None = None, route: str = "train", pin_memory: bool = True,
                     data_sampler: Any = None, collate_fn: Any = None, num_local_io_workers: int | None = None) -> Any:
        """Training data in an order that no layout changes (data/loader.py); everything else is DeepSpeed's loader."""
        if route != "train" or data_sampler is not None or not hasattr(dataset, "__getitem__"):
            return super().deepspeed_io(dataset, batch_size, route, pin_memory, data_sampler, collate_fn,
                                        num_local_io_workers)
        return MicroBatchLoader(dataset, batch_size or self.train_micro_batch_size_per_gpu(), self.data_parallel_rank,
                                self.data_parallel_world_size, self.gradient_accumulation_steps(),
                                seed=self.module.base_seed, collate_fn=collate_fn or self.collate_fn)

    # -- what a user asks

    @property
    def data_parallel_rank(self) -> int:
        """Which shard of the data this rank reads, if the first stage of a direction is here."""
        return self.mpu.get_data_parallel_rank()

    @property
    def data_parallel_world_size(self) -> int:
        """2D, or D under a schedule of one direction."""
        return self.mpu.get_data_parallel_world_size()

    def is_first_stage(self) -> bool:
        """Whether a direction starts here, so that this rank reads data."""
        return any(place[0] == self.module.stage_rank for place in self.module.placement)

    def is_last_stage(self) -> bool:
        """Whether a direction ends here; under a bidirectional schedule that is where the other starts."""
        return any(place[-1] == self.module.stage_rank for place in self.module.placement)

    def set_dataiterator(self, iterator: Iterator[Any]) -> None:
        """The data of following batches, as in DeepSpeed's pipeline engine."""
        self._data_iterator = iterator

    def set_dataloader(self, loader: Any) -> None:
        """Replaces the training data loader, as in DeepSpeed's pipeline engine."""
        self.training_dataloader = loader
        self._data_iterator = iter(loader)

    def record_next_batch(self) -> None:
        """Times every computation of the next `train_batch`, waiting for the device around each; see `timeline`."""
        self._record = True

    def forward(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("a pipeline runs whole batches: use train_batch() or eval_batch()")

    def backward(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("a pipeline runs whole batches: use train_batch()")

    def step(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("a pipeline runs whole batches: use train_batch()")

    # -- a training step

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        """One optimizer step over the global batch.

        Args:
            data_iter: on ranks where a direction starts: n batches (inputs, labels) of this rank's shard are taken from
                it. None: the training data given to `initialize`.

        Returns:
            The mean loss over all micro-batches of all shards, the same on every rank.

        Raises:
            RuntimeError: gradients are disabled.
            BatchError: unusable data.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError("train_batch() needs gradients enabled; use eval_batch() to evaluate")
        if self.optimizer is None:
            raise ConfigError("optimizer", None, "a training step needs one", "give the ds_config an optimizer section")
        if data_iter is not None:
            self.set_dataiterator(data_iter)
        self.module.train()
        start = time.perf_counter()
        with self._usable():
            loss = self._train_batch()
        self._seconds += time.perf_counter() - start
        self._report(loss)
        return loss

    def _train_batch(self) -> Tensor:
        self.tput_timer.start()
        plan = self.plan()
        self._choose_hops()
        trial = self._next_chunks()
        batches = self._training_batches()
        zero = bool(self.zero_optimization())
        with (self.coalesce_grad_reduction() if zero else contextlib.nullcontext(),
              gradients.none_left_by_an_error(self.weights.parameters), self.reduction.step(plan) as stage_done):
            self.weights.begin()
            with self._timed("pipeline"):
                recorded = self._record or self._measuring() or self._wants_trace()  # from the first: it warms that up
                began = time.perf_counter()
                outcome = self.executor.run(plan, batches, self.global_steps, record=recorded, stage_done=stage_done)
                if trial:
                    self.executor.synchronize()
                    self._after_trial(time.perf_counter() - began)
            with self._timed("reduce_gradients"):
                self._sum_tied()
                self.reduction.finish()
            if zero:
                gradients.hand_to_zero(self.weights.parameters, self.optimizer.use_grad_accum_attribute)
        applied = self._step_optimizer() if zero else self._step_without_zero()
        self._balance(applied)
        self.expert_traffic = self.traffic.take()
        loss = self._mean_loss(outcome.losses)
        self.tput_timer.stop(global_step=True)
        if self._record:
            self._gather_timeline(plan, outcome.spans)
        self._after_step(plan, outcome)
        if not self._split_told:
            self._tell_split()
        return loss

    @contextlib.contextmanager
    def _usable(self) -> Iterator[None]:
        """A step that fails leaves messages, gradients and counts behind: from then on the engine says so."""
        if self._failure is not None:
            raise RuntimeError(f"an earlier step failed ({self._failure}): make a new engine and load a checkpoint")
        try:
            yield
        except BaseException as error:
            self._failure = f"{type(error).__name__}: {error}"
            raise

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """One of DeepSpeed's timers, where `wall_clock_breakdown` asks for them."""
        timer = self.timers(name) if self.wall_clock_breakdown() else None
        if timer is not None:
            timer.start()
        yield
        if timer is not None:
            timer.stop()

    def _step_without_zero(self) -> bool:
        """Clips and steps on the FP32 gradients; a step with a norm that is not finite is skipped."""
        parameters = self.weights.parameters
        norm = gradients.global_norm(parameters, self.process_groups, self.device)
        self._global_grad_norm = norm
        if not math.isfinite(norm.item()):
            self.skipped_steps += 1
            self.global_steps += 1
            self.global_samples += self.train_batch_size()
            self.micro_steps += self.gradient_accumulation_steps()
            return False
        if self.gradient_clipping() > 0:
            gradients.clip(parameters, norm, self.gradient_clipping())
        gradients.hand_to_zero(parameters, into_grad_accum=False)
        applied = self._step_optimizer()
        self._global_grad_norm = norm
        return applied

    def _step_optimizer(self) -> bool:
        """The optimizer and the learning rate; returns whether the step was applied."""
        self.set_gradient_accumulation_boundary(True)
        with self._timed("optimizer"):
            self._take_model_step(None)
        self._is_gradient_accumulation_boundary = None
        self.micro_steps += self.gradient_accumulation_steps()
        self.weight_cache.clear()
        return not getattr(self.optimizer, "overflow", False)

    def _reduction_dtype(self) -> torch.dtype:
        """What gradients travel in: FP32, or under ZeRO what it would have sent, unless FP32 is asked for."""
        if not self.zero_optimization() or self.optimizer.use_grad_accum_attribute:
            return torch.float32
        return self.communication_data_type

    def _sum_tied(self) -> None:
        for parameters, group in self._tied_groups:
            gradients.all_reduce_flat([p.main_grad for p in parameters if p.requires_grad], group)

    def _balance(self, applied: bool) -> None:
        """One move of every bias per applied step; a skipped step moves nothing and its counts are dropped."""
        section = self.section.router
        speed = section.bias_update_speed if applied and section.balancing == "aux_loss_free" else 0.0
        counts = update_biases(list(self.routers.values()), speed, self.process_groups.data_parallel)
        self.expert_counts = dict(zip(self.routers, counts, strict=True))

    def _mean_loss(self, losses: list[Tensor]) -> Tensor:
        total = torch.zeros(2, dtype=torch.float64 if self.device.type == "cpu" else torch.float32, device=self.device)
        for loss in losses:
            total[0] += loss
            total[1] += 1
        dist.all_reduce(total)
        return (total[0] / total[1]).float()

    def _set_counting(self, counting: bool) -> None:
        for router in self.routers.values():
            router.count_tokens = counting

    # -- data

    def _training_batches(self) -> Batches:
        """The training data of the direction that starts here, if one does."""
        iterator = self._data_iterator
        if iterator is None and self.training_dataloader is not None:
            iterator = self._data_iterator = iter(self.training_dataloader)
        if self._batches_compared:
            return self._by_direction(iterator, "train_batch")
        with agreed(self.process_groups.control):  # the comparison is collective: all ranks come to it, or none
            batches = self._by_direction(iterator, "train_batch")
        self._batches_compared = True
        first = compare_first_batches(iterator if batches else None, self.data_parallel_rank,
                                      self.data_parallel_world_size, self.process_groups.control)
        return {direction: first for direction in batches if first is not None}

    def _by_direction(self, iterator: Iterator[Any] | None, asked_by: str) -> Batches:
        if not self.is_first_stage():
            return {}
        if iterator is None:
            raise BatchError(f"{asked_by}: there is no data; give it an iterator"
                             + (", or initialize(training_data=...)" if asked_by == "train_batch" else ""))
        return {d: iterator for d, place in enumerate(self.module.placement) if place[0] == self.module.stage_rank}
