"""The average of gradients over data-parallel replicas, behind the drain of the pipeline.

When a stage has had its last backward of the step, nothing changes its gradients any more, and their sum over the
replicas may set off while the rest of the pipeline runs (DeepSeek-V3 report, section 3.2.1: what a rank has left to do
then is the backward of its other stages, and waiting). Gradients lie in flat FP32 buckets, stage by stage, dense ones
and experts apart, for they have different replicas; a bucket is reduced where it lies.

All ranks of a group must ask for its collectives in the same order, but pipeline ranks i and P-1-i, which are replicas,
may finish their stages in different orders. Every rank knows the whole plan, so the order in which the lower of the two
finishes holds for both: a stage sets off once it and all before it in that order are done here. Nothing waits before
the pipeline's end, so no order of computations can make a deadlock of it.

At the end go the parameters of several stages, and of stages on several ranks, whose uses are summed first; and all of
them with `"overlap": false`. When a bucket sets off changes no bit of a result, for the buckets are the same.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_ext.config import ConfigError
from megatron_ext.config.errors import UserError
from megatron_ext.engine.gradients import BUCKET_BYTES, is_expert
from megatron_ext.parallel import ProcessGroups
from megatron_ext.pipeline.instructions import Plan
from megatron_ext.pipeline.module import PipelineModule

ALIGNMENT = 128
"""Elements at which a gradient in a bucket may start: 512 bytes, as torch allocates; kernels read whole lines."""


def finishing_order(plan: Plan, rank: int) -> list[int]:
    """The stages of a pipeline rank by their last backward ("B" or "W"), of whichever direction."""
    last = {part.stage: index for index, instruction in enumerate(plan.compute(rank))
            for part in instruction.parts if part.kind in ("B", "W")}
    return sorted(last, key=last.__getitem__)


@dataclass
class _Bucket:
    """Gradients that are reduced together.

    Attributes:
        stage: where they are from; None for those that wait for the end.
        flat: FP32, every `main_grad` a view of it; None until the first step.
        sent: what is under way: `flat`, or a copy in the dtype of the messages.
        version: of `flat` when it set off.
    """

    parameters: list[Any]
    group: ProcessGroup
    stage: int | None
    flat: Tensor | None = None
    sent: Tensor | None = None
    work: Any = None
    version: int = 0

    def allocate(self) -> None:
        """Makes every parameter's `main_grad` a view of one tensor."""
        starts, size = [], 0
        for p in self.parameters:
            starts.append(size)
            size += -(-p.numel() // ALIGNMENT) * ALIGNMENT
        self.flat = torch.zeros(size, dtype=torch.float32, device=self.parameters[0].device)
        for p, start in zip(self.parameters, starts, strict=True):
            p.main_grad = self.flat.narrow(0, start, p.numel()).view(p.shape)

    def start(self, scale: float, dtype: torch.dtype) -> None:
        assert self.flat is not None
        self.flat.mul_(scale)  # before the cast and the sum, as ZeRO does
        self.sent = self.flat.to(dtype)
        self.work = dist.all_reduce(self.sent, group=self.group, async_op=True)
        self.version = self.flat._version

    def finish(self) -> None:
        """
        Raises:
            UserError: a replica has died, or has not come within the timeout of the group.
            ConfigError: a gradient has come since `start`.
        """
        assert self.flat is not None
        try:
            self.work.wait()
        except RuntimeError as error:
            ranks = dist.get_process_group_ranks(self.group)
            raise UserError(f"gradients: rank {dist.get_rank()} waited for their sum over ranks {ranks}; one of them "
                            f"has stopped or is late ({error})") from error
        if self.flat._version != self.version:
            raise ConfigError("layers", f"stage {self.stage}", "a parameter of this stage is used by a layer of "
                              "another stage too, whose gradient came when the sum over the replicas was under way",
                              "make both layers TiedLayerSpecs of one key")
        if self.sent is not self.flat:
            self.flat.copy_(self.sent)
        self.sent = self.work = None


class Reduction:
    """Averages `main_grad` over the global batch, bucket by bucket.

    Args:
        module: the rank's stages.
        parameters: those to be averaged, in an order that is the same on all replicas; none where ZeRO does it.
        groups: whose ranks hold the same parameters.
        dtype: of the messages.
        early: whether buckets set off when their stage is done; else all at the end.
    """

    def __init__(self, module: PipelineModule, parameters: Sequence[nn.Parameter], groups: ProcessGroups,
                 dtype: torch.dtype = torch.float32, early: bool = True):
        self.groups, self.dtype, self.early = groups, dtype, early
        self._stages: dict[int, list[_Bucket]] = {}
        left = dict.fromkeys(parameters)
        for stage, mine in _of_one_stage(module).items():
            own = [p for p in mine if p in left]
            self._stages[stage] = self._buckets(own, stage)
            for p in own:
                del left[p]
        self._rest = self._buckets(list(left), None)
        self._used = False
        self._waiting: deque[int] = deque()  # stages that have not set off, in order
        self._done: set[int] = set()
        self._under_way: list[_Bucket] = []

    def _buckets(self, parameters: Sequence[nn.Parameter], stage: int | None) -> list[_Bucket]:
        """At most BUCKET_BYTES in each, or one larger parameter."""
        found: list[_Bucket] = []
        for group, expert in ((self.groups.data_parallel, False), (self.groups.expert_data_parallel, True)):
            size = BUCKET_BYTES
            for p in parameters:
                if is_expert(p) is not expert:
                    continue
                if size + 4 * p.numel() > BUCKET_BYTES:
                    found.append(_Bucket([], group, stage))
                    size = 0
                found[-1].parameters.append(p)
                size += 4 * p.numel()
        return found

    @property
    def _all(self) -> list[_Bucket]:
        return [bucket for buckets in self._stages.values() for bucket in buckets] + self._rest

    @contextmanager
    def step(self, plan: Plan) -> Iterator[Callable[[int], None]]:
        """One step, begun before gradients are zeroed; `finish` is called within. Yields what is to be told which stage
        is done.

        If the step fails, what is under way is left to itself: peers may never join in, and waiting for them would hold
        back the error. Nobody will read what it still writes, for the gradients go with it. (gloo cannot cancel: a
        process that exits in between stays until its peers have gone, or for the timeout of the groups.)
        """
        for bucket in self._all:
            if bucket.flat is None:
                bucket.allocate()
        grid = self.groups.topology
        order = finishing_order(plan, grid.holder(self.groups.rank))  # the holder's number is its lower rank
        self._waiting = deque(dict.fromkeys([*order, *self._stages]))
        self._done = set()
        try:
            yield self.stage_done
        except BaseException:
            for bucket in self._all:
                bucket.flat = bucket.sent = bucket.work = None
                for p in bucket.parameters:
                    p.main_grad = None
            self._under_way.clear()
            raise

    def stage_done(self, stage: int) -> None:
        """The last backward of the step has run for a stage of this rank; starts what may start.

        Not in the first step: NCCL opens connections with the first use of a group for a size, and holds up the host
        until all ranks have come, which in the middle of a schedule they may not.
        """
        self._done.add(stage)
        while self.early and self._used and self._waiting and self._waiting[0] in self._done:
            self._start(self._stages[self._waiting.popleft()])

    def finish(self) -> None:
        """Waits for all averages; to be called after the pipeline, when tied parameters have been summed.

        Raises:
            ConfigError: a layer uses parameters of another stage behind our back.
        """
        while self._waiting:
            self._start(self._stages[self._waiting.popleft()])
        self._start(self._rest)
        for bucket in self._under_way:
            bucket.finish()
        self._under_way.clear()
        self._used = True

    def _start(self, buckets: Sequence[_Bucket]) -> None:
        for bucket in buckets:
            bucket.start(1.0 / self.groups.topology.data_parallel_size, self.dtype)
            self._under_way.append(bucket)


def _of_one_stage(module: PipelineModule) -> dict[int, list[nn.Parameter]]:
    """Per local stage the parameters that no other stage uses, here or elsewhere."""
    uses: dict[nn.Parameter, set[int]] = defaultdict(set)
    for stage in module.stages:
        for p in module.stage_parameters(stage):
            uses[p].add(stage)
    elsewhere = {p for key in module.tied_groups_ranks for p in module.tied_parameters(key)}
    return {stage: [p for p, stages in uses.items() if stages == {stage} and p not in elsewhere]
            for stage in module.stages}
