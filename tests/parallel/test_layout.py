"""Which ranks of an expert group share a node, and the groups of two hops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.config.errors import ConfigError
from megatron_ext.parallel import ProcessGroups, Topology
from megatron_ext.parallel.layout import NodeLayout, check_layout
from tests.distributed.pool import WorkerPool


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 20))
def test_every_rank_is_on_one_node_and_has_one_counterpart_on_each(nodes: int, local: int, first: int) -> None:
    layout, ranks = NodeLayout(local), list(range(first, first + nodes * local))
    within, across = layout.within(ranks), layout.across(ranks)
    assert (len(within), len(across)) == (nodes, local)
    for place, rank in enumerate(ranks):
        at_node, at_local = layout.node(place), layout.local(place)
        assert place == at_node * local + at_local
        assert within[at_node][at_local] == across[at_local][at_node] == rank


@pytest.mark.parametrize("experts, per_node, local", [(4, 2, 2), (4, 4, 4), (4, 8, 4), (8, 1, 1), (1, 3, 1), (6, 3, 3)])
def test_layouts(experts: int, per_node: int, local: int) -> None:
    assert check_layout(experts, per_node) == NodeLayout(local)


@pytest.mark.parametrize("experts, per_node, rule", [
    (4, 3, r"must divide megatron_ext.expert_parallel.size = 4, .*different size: 4 = 1 x 3 \+ 1"),
    (8, 6, r"must divide megatron_ext.expert_parallel.size = 8, .*different size: 8 = 1 x 6 \+ 2"),
    (4, 6, r"must be a multiple of megatron_ext.expert_parallel.size = 4, .*on the next node: 6 = 1 x 4 \+ 2"),
    (4, 0, "must be an integer of at least 1"), (4, -2, "must be an"), (4, 2.0, "must be an"), (4, True, "must be an")])
def test_uneven_nodes(experts: int, per_node: Any, rule: str) -> None:
    with pytest.raises(ConfigError, match=rf"^megatron_ext.expert_parallel.ranks_per_node = {per_node}: {rule}"):
        check_layout(experts, per_node)


def groups_of(experts: int, per_node: int | None) -> tuple[Any, ...] | str:
    try:
        groups = ProcessGroups.create(Topology.of_world(8, 2, experts), ranks_per_node=per_node)
    except ConfigError as error:
        return str(error)
    place = groups.expert_placement()
    assert (place.layout, place.inter, place.intra) == (groups.layout, groups.inter_node, groups.intra_node)
    ranks = [None if group is None else dist.get_process_group_ranks(group) for group in (place.inter, place.intra)]
    timeouts = [g._get_backend(torch.device("cpu")).options._timeout
                for g in (place.inter, place.intra) if g is not None]
    assert all(timeout == groups.timeout for timeout in timeouts)
    return place.layout, *ranks


def test_groups_of_two_hops(pool8: WorkerPool) -> None:
    """Two stages of four ranks; all four are an expert group, over two nodes."""
    for rank, (layout, inter, intra) in enumerate(pool8.run(groups_of, 4, 2)):
        block = rank // 4 * 4
        assert layout == NodeLayout(2)
        assert inter == [block + rank % 2, block + rank % 2 + 2]
        assert intra == [rank // 2 * 2, rank // 2 * 2 + 1]


@pytest.mark.parametrize("per_node, layout", [(None, None), (1, NodeLayout(1)), (4, NodeLayout(4)), (8, NodeLayout(4)),
                                              (64, NodeLayout(4))])
def test_no_groups_where_there_is_no_second_hop(pool8: WorkerPool, per_node: int | None,
                                                layout: NodeLayout | None) -> None:
    assert pool8.run(groups_of, 4, per_node) == [(layout, None, None)] * 8


def test_every_rank_refuses_uneven_nodes(pool8: WorkerPool) -> None:
    for message in pool8.run(groups_of, 4, 3):
        assert message.startswith("megatron_ext.expert_parallel.ranks_per_node = 3: must divide")
