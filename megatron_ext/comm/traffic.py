"""What expert dispatch and combine send, and how long they are waited for; and what they should send, in closed form.

Bytes are payload as handed to a collective. What a rank keeps for itself is not counted; the rest goes inside a node
("node") or between nodes ("fabric"). Without a node layout all ranks count as one node.

Shape letters: T tokens of a rank, k experts of a token, E experts, N ranks, G nodes of L ranks.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ext.parallel.layout import NodeLayout

KINDS = ("counts", "dispatch", "combine", "combine_backward", "dispatch_backward")
LINKS = ("self", "node", "fabric")


class Traffic:
    """Sums over the dispatchers that share it, until taken."""

    def __init__(self) -> None:
        self._sums: Counter[tuple[str, str]] = Counter()

    def sent(self, kind: str, links: Sequence[str], sizes: Sequence[int]) -> None:
        """Counts `sizes[i]` bytes to a peer over `links[i]`."""
        for link, size in zip(links, sizes, strict=True):
            if link != "self":
                self._sums[kind, link] += size

    def waited(self, kind: str, seconds: float) -> None:
        """The host stood still: exposed time. (NCCL's waits are the device's, and return at once.)"""
        self._sums[kind, "exposed"] += seconds  # type: ignore[assignment]

    def done(self, kind: str, started: float) -> None:
        """An operation that was started at `started`, a `time.perf_counter`, has been finished."""
        self._sums[kind, "under_way"] += time.perf_counter() - started  # type: ignore[assignment]

    def take(self) -> dict[str, dict[str, float]]:
        """Per kind: bytes sent inside the "node" and over the "fabric", seconds "exposed" (waited for) and "under_way"
        (from start to the return of the last finish). Starts again from nothing."""
        sums, self._sums = self._sums, Counter()
        return {kind: {what: sums[kind, what] for what in ("node", "fabric", "exposed", "under_way")} for kind in KINDS}


def copies_sent(experts: Sequence[Tensor], num_experts: int, layout: NodeLayout, two_hop: bool) -> list[dict[str, int]]:
    """How many rows each rank sends in one dispatch, counted straight from the routing.

    The way back has as many, from the receiver to the sender; on each link they sum up to the same over all ranks.

    Args:
        experts: per rank [T, k], T may differ.
        num_experts: E.

    Returns:
        Per rank: rows to other ranks of its "node", rows over the "fabric".
    """
    ranks, found = len(experts), [dict.fromkeys(LINKS[1:], 0) for _ in experts]
    for source, chosen in enumerate(experts):
        owners = chosen * ranks // num_experts
        visited = torch.zeros(len(chosen), ranks, dtype=torch.bool).scatter_(1, owners.cpu(), True)
        for node, there in enumerate(visited.split(layout.ranks_per_node, dim=1)):
            entry = node * layout.ranks_per_node + layout.local(source) if two_hop else source
            if entry != source:
                found[source]["fabric"] += int(there.any(1).sum())
            for local, rows in enumerate(there.sum(0).tolist()):
                target = node * layout.ranks_per_node + local
                if target != entry:
                    found[entry]["node" if layout.node(entry) == node else "fabric"] += rows
    return found
