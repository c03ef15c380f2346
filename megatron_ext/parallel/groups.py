"""The process groups of one job, made once, each with the timeout of the job.

`deepspeed.comm.new_group` drops the timeout (gloo then waits 30 minutes for a stopped peer), so groups are made here.
Letters as in topology.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_ext.parallel.expert_parallel import ExpertParallel
from megatron_ext.parallel.topology import Topology


def default_timeout() -> timedelta:
    """The timeout that the default process group was made with (`deepspeed.init_distributed(timeout=...)`)."""
    world = dist.group.WORLD
    assert world is not None
    return world._get_backend(torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")).options._timeout


@dataclass
class ProcessGroups:
    """The groups that this rank is in.

    Attributes:
        data_parallel: 2D ranks with the same parameters; group rank = data shard.
        model_parallel: P/2 ranks that together hold every parameter once.
        pipeline: the P ranks of this replica.
        expert_parallel: None if experts are not split.
        expert_data_parallel: ranks with the same experts.
        control: all ranks, on the CPU over gloo, for what the host must know without waiting for a device.
        messages: one group per channel of the pipeline (kind and direction) for payloads. NCCL orders the operations of
            a pair of ranks within a group, so a channel is a group there; gloo has tags, and one group serves all.
    """

    topology: Topology
    rank: int
    timeout: timedelta
    data_parallel: ProcessGroup
    data_parallel_ranks: list[int]
    model_parallel: ProcessGroup
    model_parallel_ranks: list[int]
    pipeline: ProcessGroup
    expert_parallel: ProcessGroup
    expert_parallel_ranks: list[int]
    expert_data_parallel: ProcessGroup
    expert_data_parallel_ranks: list[int]
    control: ProcessGroup
    messages: dict[str, ProcessGroup] = field(default_factory=dict)

    @staticmethod
    def create(topology: Topology, timeout: timedelta | None = None,
               channels: Sequence[str] = ("F0", "F1", "B0", "B1", "L0", "L1")) -> ProcessGroups:
        """Makes all groups; collective over the default process group.

        Args:
            topology: must fill the world.
            timeout: of every group; the default group's if None.
            channels: names of the pipeline's message channels.
        """
        rank, everyone = dist.get_rank(), list(range(topology.world_size))
        assert topology.world_size == dist.get_world_size(), (topology, dist.get_world_size())
        timeout = timeout or default_timeout()

        def mine(groups: list[list[int]]) -> tuple[ProcessGroup, list[int]]:
            # Every rank makes all of them, in the same order.
            made = [(dist.new_group(ranks, timeout=timeout), ranks) for ranks in groups]
            [found] = [(group, ranks) for group, ranks in made if rank in ranks]
            return found

        data, data_ranks = mine(topology.data_parallel_groups())
        model, model_ranks = mine(topology.model_parallel_groups())
        pipeline, _ = mine(topology.pipeline_groups())
        expert, expert_ranks = mine(topology.expert_parallel_groups())
        expert_data, expert_data_ranks = mine(topology.expert_data_parallel_groups())
        control = dist.new_group(everyone, timeout=timeout, backend="gloo")
        if dist.get_backend() == "gloo":
            messages = dict.fromkeys(channels, control)
        else:
            messages = {c: dist.new_group(everyone, timeout=timeout) for c in channels}
        return ProcessGroups(topology, rank, timeout, data, data_ranks, model, model_ranks, pipeline, expert,
                             expert_ranks, expert_data, expert_data_ranks, control, messages)

    def expert_placement(self) -> ExpertParallel:
        """What a layer with experts is told when it is built."""
        size = self.topology.expert_parallel
        rank = self.expert_parallel_ranks.index(self.rank)
        return ExpertParallel(self.expert_parallel if size > 1 else None, size, rank, name=f"ep_size_{size}")
