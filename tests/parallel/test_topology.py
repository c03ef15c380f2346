"""The grid of ranks: groups, shards, the `mpu`, and the sums that tied layers need."""

from __future__ import annotations

import itertools
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.config import ConfigError
from megatron_ext.parallel import ExpertParallel, PipelineUnit, ProcessGroups, Topology
from megatron_ext.pipeline import Transfer, schedule
from tests.distributed.pool import WorkerPool

GROUPS = ("pipeline_groups", "data_parallel_groups", "model_parallel_groups", "expert_parallel_groups",
          "expert_data_parallel_groups")


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    replicas = draw(st.integers(1, 8))
    experts = draw(st.sampled_from([n for n in range(1, replicas + 1) if replicas % n == 0]))
    return Topology(2 * draw(st.integers(1, 8)), replicas, experts)


@pytest.mark.parametrize("world, stages, experts, text", [
    (6, 3, 1, "megatron_ext.pipeline.stages = 3: a bidirectional pipeline needs an even number of ranks"),
    (1, 1, 1, "megatron_ext.pipeline.stages = 1: a bidirectional pipeline needs an even number of ranks"),
    (2, 0, 1, "megatron_ext.pipeline.stages = 0: a bidirectional pipeline needs an even number of ranks"),
    (6, 4, 1, "megatron_ext.pipeline.stages = 4: must divide the 6 ranks of this job: 6 = 4 x 1 + 2"),
    (2, 4, 1, "megatron_ext.pipeline.stages = 4: must divide the 2 ranks of this job"),
    (4, 2, 3, "megatron_ext.expert_parallel.size = 3: must divide the number of replicas of the pipeline, "
              "4 ranks / 2 stages = 2; mirrored ranks run different stages"),
    (4, 2, 4, "megatron_ext.expert_parallel.size = 4: must divide the number of replicas"),
    (4, 2, 0, "megatron_ext.expert_parallel.size = 0: must divide the number of replicas"),
])
def test_sizes_that_cannot_work(world: int, stages: int, experts: int, text: str) -> None:
    with pytest.raises(ConfigError) as found:
        Topology.of_world(world, stages, experts)
    assert str(found.value).startswith(text)


def test_a_topology_made_by_hand_is_checked_too() -> None:
    for sizes in ((3, 1, 1), (2, 2, 3)):
        with pytest.raises(ConfigError):
            Topology(*sizes)


@given(topologies())
def test_every_list_of_groups_has_each_rank_once_in_order(grid: Topology) -> None:
    assert Topology.of_world(grid.world_size, grid.stages, grid.expert_parallel) == grid
    for name in GROUPS:
        groups = getattr(grid, name)()
        assert sorted(rank for group in groups for rank in group) == list(range(grid.world_size)), name
        assert all(group == sorted(group) for group in groups), f"{name}: torch numbers a group's ranks in rank order"


@given(topologies())
def test_a_rank_is_its_place_and_its_replica(grid: Topology) -> None:
    for rank in range(grid.world_size):
        assert grid.rank_of(grid.stage_rank(rank), grid.replica(rank)) == rank
        assert grid.holder(rank) == grid.holder_of_stage(grid.stages - 1 - grid.stage_rank(rank)) < grid.holders


@given(topologies())
def test_expert_blocks_are_contiguous_and_on_one_stage(grid: Topology) -> None:
    for group in grid.expert_parallel_groups():
        assert len(group) == grid.expert_parallel
        assert all(b - a == 1 for a, b in pairwise(group))
        assert len({grid.stage_rank(rank) for rank in group}) == 1


@given(topologies())
def test_data_parallel_ranks_hold_the_same_parameters(grid: Topology) -> None:
    """A mirrored pair with all its replicas: 2D ranks, one pair's parameters; shards in rank order."""
    groups = grid.data_parallel_groups()
    assert [{grid.holder(rank) for rank in group} for group in groups] == [{p} for p in range(grid.holders)]
    assert {len(group) for group in groups} == {grid.data_parallel_size}
    # Who reads data is in the group of pair 0, and its number there is its shard.
    readers = {(0, d): grid.rank_of(0, d) for d in range(grid.replicas)}
    readers |= {(1, d): grid.rank_of(grid.stages - 1, d) for d in range(grid.replicas)}
    for (direction, replica), rank in readers.items():
        assert groups[0].index(rank) == grid.shard(direction, replica)


@given(topologies())
def test_model_parallel_ranks_hold_every_parameter_once(grid: Topology) -> None:
    for group in grid.model_parallel_groups():
        assert sorted(grid.holder(rank) for rank in group) == list(range(grid.holders))
        assert len({grid.replica(rank) for rank in group}) == 1


@given(topologies())
def test_expert_data_parallel_ranks_hold_the_same_experts(grid: Topology) -> None:
    place = {rank: k for group in grid.expert_parallel_groups() for k, rank in enumerate(group)}
    for group in grid.expert_data_parallel_groups():
        assert len({(grid.holder(rank), place[rank]) for rank in group}) == 1
        assert len(group) * grid.expert_parallel == grid.data_parallel_size


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_messages_go_where_the_schedule_sends_them(stages: int) -> None:
    grid, plan = Topology(stages, 3), schedule("dualpipe", stages=stages, micro_batches=2 * stages)
    used: dict[str, set[tuple[int, int]]] = {"L0": {(0, stages - 1)}, "L1": {(stages - 1, 0)}}
    for instruction in itertools.chain(*plan.instructions):
        if isinstance(instruction, Transfer):
            m = instruction.message
            used.setdefault(f"{m.kind}{m.direction}", set()).add((m.source, m.destination))
    for channel, edges in used.items():
        found = grid.message_edges(channel)
        assert sorted(found) == sorted((grid.rank_of(a, d), grid.rank_of(b, d)) for a, b in edges for d in range(3))


@given(topologies(), st.data())
def test_tied_gradients_count_every_use_once(grid: Topology, data: st.DataObject) -> None:
    """By brute force: a one for every (direction, replica, use) where its gradient arises, summed as the ranks do."""
    stages = data.draw(st.lists(st.integers(0, grid.stages - 1), min_size=1, max_size=4))
    groups = grid.tied_groups(stages)
    holders = {grid.holder_of_stage(stage) for stage in stages}
    assert bool(groups) == (len(holders) > 1)

    grads = torch.zeros(grid.world_size, 2, grid.replicas, len(stages), dtype=torch.int64)
    for use, stage in enumerate(stages):
        for replica in range(grid.replicas):
            for direction, stage_rank in enumerate((stage, grid.stages - 1 - stage)):
                grads[grid.rank_of(stage_rank, replica), direction, replica, use] += 1
    for sums in (groups, grid.data_parallel_groups()):
        for group in sums:
            grads[group] = grads[group].sum(0, keepdim=True)
    for rank in range(grid.world_size):
        if grid.holder(rank) in holders:
            assert (grads[rank] == 1).all()
    for group in groups:
        assert grid.holder(group[0]) == grid.holder_of_stage(stages[0]), "the owner comes first"
        assert {grid.holder(rank) for rank in group} == holders


@pytest.mark.parametrize("num_experts, size, rank, expected", [(8, 1, 0, (0, 8)), (8, 4, 1, (2, 4)), (6, 2, 1, (3, 6))])
def test_expert_range(num_experts: int, size: int, rank: int, expected: tuple[int, int]) -> None:
    assert ExpertParallel(None, size, rank).expert_range(num_experts) == expected


def test_experts_that_do_not_divide() -> None:
    with pytest.raises(ConfigError, match=r"expert_parallel.size = 4: must divide the 6 experts"):
        ExpertParallel(None, 4, 0).expert_range(6)


def describe(stages: int, experts: int, timeout: timedelta | None) -> dict[str, Any]:
    grid = Topology.of_world(dist.get_world_size(), stages, experts)
    groups = ProcessGroups.create(grid, timeout)
    mpu = PipelineUnit(groups)
    ranks = dist.get_process_group_ranks
    made = [groups.data_parallel, groups.model_parallel, groups.pipeline, groups.expert_parallel,
            groups.expert_data_parallel, groups.control, *groups.messages.values()]
    placement = groups.expert_placement()
    return {
        "data": ranks(mpu.get_data_parallel_group()), "data_ranks": mpu.get_data_parallel_group_ranks(),
        "data_rank": (mpu.get_data_parallel_rank(), dist.get_rank(groups.data_parallel)),
        "data_size": mpu.get_data_parallel_world_size(),
        "model": ranks(mpu.get_model_parallel_group()), "model_rank": mpu.get_model_parallel_rank(),
        "model_size": (mpu.get_model_parallel_world_size(), mpu.get_pipeline_model_parallel_world_size(),
                       mpu.get_pipe_parallel_world_size()),
        "pipe_rank": mpu.get_pipe_parallel_rank(),
        "tensor": (mpu.get_tensor_model_parallel_world_size(), mpu.get_tensor_model_parallel_rank(),
                   mpu.get_slice_parallel_world_size(), mpu.get_slice_parallel_rank()),
        "pipeline": ranks(groups.pipeline), "expert": ranks(groups.expert_parallel),
        "expert_data": ranks(groups.expert_data_parallel),
        "placement": (placement.group is not None, placement.size, placement.rank, placement.name),
        "timeouts": {g._get_backend(torch.device("cpu")).options._timeout for g in made},
    }


def test_the_mpu_of_four_ranks_in_two_replicas(pool4: WorkerPool) -> None:
    found = pool4.run(describe, 2, 2, timedelta(seconds=77))
    for rank, f in enumerate(found):
        assert f["data"] == f["data_ranks"] == [0, 1, 2, 3]
        assert f["data_rank"] == (rank, rank)
        assert f["data_size"] == 4
        assert f["model"] == [rank]
        assert (f["model_rank"], f["pipe_rank"], f["model_size"]) == (0, 0, (1, 1, 1))
        assert f["pipeline"] == [[0, 2], [1, 3]][rank % 2]
        assert f["expert"] == [[0, 1], [2, 3]][rank // 2]
        assert f["expert_data"] == [[0, 2], [1, 3]][rank % 2]
        assert f["placement"] == (True, 2, rank % 2, "ep_size_2")
        assert f["tensor"] == (1, 0, 1, 0)
        assert f["timeouts"] == {timedelta(seconds=77)}


def test_the_mpu_of_four_stages(pool4: WorkerPool) -> None:
    found = pool4.run(describe, 4, 1, None)
    for rank, f in enumerate(found):
        pair = min(rank, 3 - rank)
        assert f["data"] == [[0, 3], [1, 2]][pair]
        assert f["data_rank"] == (rank // 2, rank // 2)
        assert f["model"] == [[0, 1], [2, 3]][rank // 2]
        assert (f["model_rank"], f["pipe_rank"], f["model_size"]) == (pair, pair, (2, 2, 2))
        assert f["pipeline"] == [0, 1, 2, 3]
        assert f["placement"] == (False, 1, 0, "ep_size_1")
        assert f["timeouts"] == {timedelta(seconds=300)}, "that of the default group, for want of another"
