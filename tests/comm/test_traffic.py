"""What is counted equals what must be sent, in closed form."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from megatron_ext.comm.traffic import KINDS, Traffic
from megatron_ext.comm.wire import Row
from megatron_ext.parallel.layout import NodeLayout
from tests.comm.journeys import E, Journey, K, choices, travel
from tests.distributed.pool import WorkerPool


def copies_sent(experts: Sequence[Tensor], num_experts: int, layout: NodeLayout, two_hop: bool) -> list[dict[str, int]]:
    """How many rows each rank sends in one dispatch, counted straight from the routing.

    The way back has as many, from the receiver to the sender; on each link they sum up to the same over all ranks.

    Args:
        experts: per rank [T, k], T may differ.
        num_experts: E.

    Returns:
        Per rank: rows to other ranks of its "node", rows over the "fabric".
    """
    ranks, found = len(experts), [dict.fromkeys(("node", "fabric"), 0) for _ in experts]
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


def test_copies_by_hand():
    """Two nodes of two ranks with two experts each; the tokens of rank 1."""
    experts = [torch.empty(0, 3, dtype=torch.int64)] * 4
    experts[1] = torch.tensor([[2, 3, 0],    # itself, its neighbour
                               [4, 5, 6],    # both ranks of the other node, one of them twice
                               [0, 4, 7]])   # its neighbour, both of the other node
    flat = copies_sent(experts, 8, NodeLayout(2), two_hop=False)
    nothing = dict(node=0, fabric=0)
    assert flat == [nothing, dict(node=2, fabric=4), nothing, nothing]
    two = copies_sent(experts, 8, NodeLayout(2), two_hop=True)
    # to rank 3, its counterpart there, which keeps its copies and hands two on to rank 2
    assert two == [nothing, dict(node=2, fabric=2), nothing, dict(node=2, fabric=0)]
    assert copies_sent(experts, 8, NodeLayout(4), two_hop=False)[1] == dict(node=6, fabric=0)


@pytest.mark.parametrize("two_hop, chunks", [(False, 1), (True, 1), (True, 2)])
def test_bytes_equal_the_closed_form(pool4: WorkerPool, two_hop: bool, chunks: int):
    journey = Journey(choices(9, 4, 0, 7), "fp8", "bf16", chunks, per_node=2, two_hop=two_hop, dtype=torch.float32,
                      hidden=200)
    counted = [result["traffic"] for result in pool4.run(travel, journey)]
    copies = copies_sent(journey.experts, E, NodeLayout(2), two_hop)
    row = lambda wire, **beside: Row(wire, 200, torch.float32, **beside).bytes  # noqa: E731
    sizes = dict(dispatch=row("fp8", weights=K, routed=True), combine=row("bf16"), combine_backward=row("fp8"),
                 dispatch_backward=row("bf16", weights=K))
    assert sizes == dict(dispatch=240, combine=400, combine_backward=208, dispatch_backward=416)
    for link, per_rank in (("node", 1), ("fabric", 2)):
        for kind in ("dispatch", "combine_backward"):
            assert [t[kind][link] for t in counted] == [sent[link] * sizes[kind] for sent in copies]
        for kind in ("combine", "dispatch_backward"):  # the same rows, from their receivers
            assert sum(t[kind][link] for t in counted) == sum(sent[link] for sent in copies) * sizes[kind]
        assert [t["counts"][link] for t in counted] == [per_rank * 4 * (8 + 3 * E)] * 4
    for t in counted:
        assert all(0 < t[kind]["exposed"] < t[kind]["under_way"] for kind in KINDS)


def test_taking_starts_again():
    traffic = Traffic()
    traffic.sent("dispatch", ("node", "self", "fabric"), [3, 5, 7])
    traffic.sent("dispatch", ("node",), [1])
    traffic.waited("combine", 0.5)
    taken = traffic.take()
    assert taken["dispatch"] == dict(node=4, fabric=7, exposed=0, under_way=0) and taken["combine"]["exposed"] == 0.5
    assert set(taken) == set(KINDS) and not any(any(part.values()) for part in traffic.take().values())
