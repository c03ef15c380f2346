"""The process groups of one job, made once, each with the timeout of the job.

`deepspeed.comm.new_group` drops the timeout (gloo then waits 30 minutes for a stopped peer), so groups are made here.
Letters as in topology.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_ext.parallel.expert_parallel import ExpertParallel
from megatron_ext.parallel.layout import NodeLayout, check_layout
from megatron_ext.parallel.topology import Topology

Edges = dict[tuple[int, int], ProcessGroup]
"""(sender, receiver) -> the group of the two."""


def default_timeout() -> timedelta:
    """The timeout that the default process group was made with (`deepspeed.init_distributed(timeout=...)`)."""
    world = dist.group.WORLD
    assert world is not None
    return world._get_backend(torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")).options._timeout


@dataclass
class ProcessGroups:
    """The groups that this rank is in.

    Attributes:
        data_parallel: ranks with the same parameters; group rank = data shard.
        model_parallel: ranks that together hold every parameter once.
        pipeline: the P ranks of this replica.
        expert_parallel: None if experts are not split.
        expert_data_parallel: ranks with the same experts.
        layout: which ranks of the expert group share a node; None if that was not said.
        inter_node, intra_node: where the expert group spans nodes of several ranks, its ranks of equal local number
            and its ranks of this node; else None.
        control: all ranks, on the CPU over gloo, for what the host must know without waiting for a device.
        messages: for payloads between stages, per channel (kind and direction). gloo has tags, and one group serves
            all. Elsewhere, by (sender, receiver): NCCL runs what is asked of a group in the order of asking, so a rank
            that posts a receive ahead would hold up its own sends behind it. With a group for each channel and edge
            nothing waits for anything but its own counterpart.
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
    messages: dict[str, ProcessGroup | Edges] = field(default_factory=dict)
    layout: NodeLayout | None = None
    inter_node: ProcessGroup | None = None
    intra_node: ProcessGroup | None = None

    @staticmethod
    def create(topology: Topology, timeout: timedelta | None = None,
               channels: Sequence[str] | None = None, by_edge: bool | None = None,
               ranks_per_node: int | None = None) -> ProcessGroups:
        """Makes all groups; collective over the default process group.

        Args:
            topology: must fill the world.
            timeout: of every group; the default group's if None.
            channels: names of the pipeline's message channels; those of the topology if None.
            by_edge: a group of messages for every sender and receiver; by default where the backend is not gloo.
            ranks_per_node: of the launcher or the config; None if nobody cares which ranks share a node.

        Raises:
            ConfigError: expert groups would lie unevenly in nodes; on every rank, before any group is made.
        """
        rank, everyone = dist.get_rank(), list(range(topology.world_size))
        assert topology.world_size == dist.get_world_size(), (topology, dist.get_world_size())
        timeout = timeout or default_timeout()
        size, layout = topology.expert_parallel, None
        if ranks_per_node is not None:
            layout = check_layout(size, min(ranks_per_node, topology.world_size))

        made: dict[Any, ProcessGroup] = {}

        def mine(groups: list[list[int]], use: str = "") -> tuple[ProcessGroup, list[int]]:
            # Every rank makes all of them, in the same order. The same ranks need one group only: each of gloo's has
            # a thread that wakes 100 times a second, each of NCCL's its buffers on the device. Tokens have groups of
            # their own (`use`): in a group things run in the order of asking, and gradients would hold them up.
            key = use, tuple(map(tuple, groups))
            for ranks in groups if key not in made else ():
                group = dist.new_group(ranks, timeout=timeout)
                if rank in ranks:
                    made[key] = group
            return made[key], next(ranks for ranks in groups if rank in ranks)

        data, data_ranks = mine(topology.data_parallel_groups())
        model, model_ranks = mine(topology.model_parallel_groups())
        pipeline, _ = mine(topology.pipeline_groups())
        expert, expert_ranks = mine(topology.expert_parallel_groups(), "tokens")
        expert_data, expert_data_ranks = mine(topology.expert_data_parallel_groups())
        inter = intra = None
        if layout is not None and 1 < layout.ranks_per_node < size:
            blocks = topology.expert_parallel_groups()
            inter, _ = mine([ranks for block in blocks for ranks in layout.across(block)], "tokens")
            intra, _ = mine([ranks for block in blocks for ranks in layout.within(block)], "tokens")
        if dist.get_backend() == "gloo":
            control, _ = mine([everyone])
        else:
            control = dist.new_group(everyone, timeout=timeout, backend="gloo")
        channels = topology.channels() if channels is None else channels
        messages: dict[str, ProcessGroup | Edges] = dict.fromkeys(channels, control)
        if dist.get_backend() != "gloo" if by_edge is None else by_edge:
            messages = {c: _by_edge(topology.message_edges(c), rank, timeout) for c in channels}
        return ProcessGroups(topology, rank, timeout, data, data_ranks, model, model_ranks, pipeline, expert,
                             expert_ranks, expert_data, expert_data_ranks, control, messages, layout, inter, intra)

    def expert_placement(self) -> ExpertParallel:
        """What a layer with experts is told when it is built."""
        size = self.topology.expert_parallel
        rank = self.expert_parallel_ranks.index(self.rank)
        return ExpertParallel(self.expert_parallel if size > 1 else None, size, rank, f"ep_size_{size}", self.layout,
                              self.inter_node, self.intra_node)


def _by_edge(edges: Sequence[tuple[int, int]], rank: int, timeout: timedelta) -> Edges:
    """This rank's groups of one channel; `edges` are (sender, receiver), in an order that is the same on all ranks.

    All ranks make all of them: torch names a group made by its own ranks alone after the number of groups each has,
    and that differs along a pipeline. A first message opens the connection: NCCL opens it with the first operation
    and holds up the host until both ends have come, which in the middle of a schedule they may not.
    """
    groups = {}
    for sender, receiver in edges:
        group = dist.new_group(sorted((sender, receiver)), timeout=timeout)
        if rank in (sender, receiver):
            device = torch.device("cpu" if dist.get_backend(group) == "gloo" else "cuda")
            token = torch.zeros(1, device=device)
            if rank == sender:
                dist.send(token, receiver, group=group)
            else:
                dist.recv(token, sender, group=group)
            groups[sender, receiver] = group
    return groups
