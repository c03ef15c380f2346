"""Which ranks of an expert group share a node (DeepSeek-V3 report, section 3.2.2): arithmetic only.

An expert group is a block of neighbouring ranks, so it fills whole nodes or lies in one. Tokens then travel in two
hops: between nodes among ranks of equal local number, and inside a node among its ranks.

Letters: N ranks of the group = G nodes x L ranks of a node; rank = node * L + local.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.config.errors import ConfigError


@dataclass(frozen=True)
class NodeLayout:
    """How the ranks of one expert group lie in nodes.

    Attributes:
        ranks_per_node: L.
    """

    ranks_per_node: int

    def node(self, rank: int) -> int:
        return rank // self.ranks_per_node

    def local(self, rank: int) -> int:
        return rank % self.ranks_per_node

    def across(self, ranks: Sequence[int]) -> list[list[int]]:
        """The L groups of equal local number, among the N `ranks` of an expert group."""
        return [list(ranks[local :: self.ranks_per_node]) for local in range(self.ranks_per_node)]

    def within(self, ranks: Sequence[int]) -> list[list[int]]:
        """The G groups of one node."""
        return [list(ranks[first : first + self.ranks_per_node]) for first in range(0, len(ranks), self.ranks_per_node)]


_LAUNCHERS = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")  # torchrun's, deepspeed's, Open MPI's


def launched_ranks_per_node() -> int | None:
    """What the launcher says; None if it says nothing, or no number."""
    said = next((os.environ[name] for name in _LAUNCHERS if name in os.environ), "")
    return int(said) if said.isdigit() and int(said) else None


def check_even(ranks_per_node: Sequence[int | None]) -> None:
    """Whether the launchers of all ranks say the same.

    Args:
        ranks_per_node: by rank.

    Raises:
        ConfigError: nodes have unlike numbers of ranks.
    """
    for rank, found in enumerate(ranks_per_node):
        if found != ranks_per_node[0]:
            raise ConfigError("megatron_ext.expert_parallel.ranks_per_node", None,
                              f"the launcher started {ranks_per_node[0]} ranks on the node of rank 0 and {found} on "
                              f"that of rank {rank}, and expert groups want nodes of one size",
                              "start as many on every node, or set the key to a number that describes them")


def check_layout(expert_parallel: int, ranks_per_node: int) -> NodeLayout:
    """How an expert group lies in nodes of `ranks_per_node` ranks; ranks fill nodes in order.

    Args:
        expert_parallel: N.
        ranks_per_node: ranks that the launcher starts on each node; of all ranks, where they do not fill one node.

    Returns:
        One node if N ranks fit into one, else nodes of `ranks_per_node`.

    Raises:
        ConfigError: some groups would have nodes of different size.
    """
    key = "megatron_ext.expert_parallel.ranks_per_node"
    if type(ranks_per_node) is not int or ranks_per_node < 1:
        raise ConfigError(key, ranks_per_node, "must be an integer of at least 1")
    larger, smaller = max(expert_parallel, ranks_per_node), min(expert_parallel, ranks_per_node)
    if larger % smaller:
        group = f"megatron_ext.expert_parallel.size = {expert_parallel}"
        rule = (f"must divide {group}, or the group would have nodes of different size"
                if expert_parallel > ranks_per_node else
                f"must be a multiple of {group}, or some groups would have a part on the next node")
        equation = f"{larger} = {larger // smaller} x {smaller} + {larger % smaller}"
        raise ConfigError(key, ranks_per_node, f"{rule}: {equation}")
    return NodeLayout(smaller)
