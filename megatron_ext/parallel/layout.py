"""Which ranks of an expert group share a node (DeepSeek-V3 report, section 3.2.2): arithmetic only.

An expert group is a block of neighbouring ranks, so it fills whole nodes or lies in one. Tokens then travel in two
hops: between nodes among ranks of equal local number, and inside a node among its ranks.

Letters: N ranks of the group = G nodes x L ranks of a node; rank = node * L + local.
"""

from __future__ import annotations

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
