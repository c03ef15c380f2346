"""How tokens travel, as the engine settles it: hops by measured links, chunks by trial, both agreed and kept."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config import ConfigError
from megatron_ext.engine import dispatch_choice
from megatron_ext.engine.dispatch_choice import CANDIDATES, TRIES, node_limit_warning
from megatron_ext.parallel.layout import NodeLayout, check_even, launched_ranks_per_node
from tests.distributed import equality
from tests.distributed.equality import Case, batches, build, compare
from tests.distributed.pool import WorkerPool

TUNING = (TRIES + 1) * len(CANDIDATES)


def experts(**section: Any) -> dict[str, Any]:
    return {"expert_parallel": section}


TWO_NODES = Case(2, 4, 4, micro_batches=4, steps=3, section=experts(ranks_per_node=2, dispatch_chunks=1))


# -- hops


@pytest.mark.parametrize("two_hop", [True, "auto"])
def test_two_hops_equal_one_process(two_hop: Any, pool8: WorkerPool) -> None:
    case = replace(TWO_NODES, section=experts(ranks_per_node=2, dispatch_chunks=1, two_hop=two_hop))
    found = pool8.run(equality.train, case)[0]
    compare(found, equality.reference(Case(micro_batches=16, steps=3)))


def chosen(slower: dict[bool, float]) -> tuple[Any, ...]:
    """What `auto` takes on this rank, if one rank finds one hop or two so slow."""
    measure = dispatch_choice.DispatchMixin._time_way
    dispatch_choice.DispatchMixin._time_way = (
        lambda self, layer: {**measure(self, layer), **(slower if self.process_groups.rank == 5 else {})})
    try:
        engine = build(TWO_NODES)
        engine.train_batch(batches(engine, TWO_NODES))
        return {layer.dispatcher.two_hop for layer in engine._moe}, engine._dispatch_state(), engine.metrics
    finally:
        dispatch_choice.DispatchMixin._time_way = measure


def test_the_slowest_rank_decides_and_all_follow(pool8: WorkerPool) -> None:
    for slow, two_hop in (({False: 9.0}, True), ({True: 9.0}, False)):
        for ways, state, metrics in pool8.run(chosen, slow):
            assert ways in ({two_hop}, set()), "no layer, or all alike"
            assert state == {"two_hop": two_hop, "chunks": 1}
            if ways:
                assert metrics["expert_bytes_fabric"] > 0 and metrics["expert_bytes_node"] > 0


def test_bytes_of_the_metrics_are_those_of_the_traffic(pool4: WorkerPool) -> None:
    case = Case(2, 2, 2, steps=1, section=experts(dispatch_dtype="fp8", dispatch_chunks=1))
    for metrics, traffic in pool4.run(measured, case):
        assert metrics["expert_bytes_fabric"] == 0, "one node"
        assert metrics["expert_bytes_node"] == sum(kind["node"] for kind in traffic.values())
        assert traffic["combine_backward"]["node"] < traffic["dispatch"]["node"], "no routing goes with gradients"
        assert metrics["expert_seconds_exposed"] >= 0 and metrics["expert_seconds_hidden_at_most"] >= 0
    assert sum(metrics["expert_bytes_node"] for metrics, _ in pool4.run(measured, case)) > 0


def measured(case: Case) -> tuple[Any, Any]:
    engine = build(case)
    engine.eval_batch(batches(engine, case))  # which counts for nothing
    engine.train_batch(batches(engine, case))
    return engine.metrics, engine.expert_traffic


# -- chunks


def tune(case: Case, folder: str, steps: int) -> dict[str, Any]:
    """Trains, saves, resumes in a new engine; what either has settled, and all losses."""
    engine = build(case)
    data, losses, used = batches(engine, case), [], []
    for _ in range(steps):
        losses.append(float(engine.train_batch(data)))
        used.append(engine._tuned["chunks"])
    engine.save_checkpoint(folder)
    settled = engine._dispatch_state()
    other = build(case)
    other.load_checkpoint(folder)
    resumed, trials = other._dispatch_state(), len(other._candidates)
    losses.append(float(other.train_batch(batches(other, case, steps))))
    return {"losses": losses, "used": used, "settled": settled, "resumed": resumed, "trials": trials}


def test_chunks_are_tried_agreed_kept_and_change_nothing(pool4: WorkerPool, tmp_path: Path) -> None:
    case = Case(2, 2, 2, dropout=0.1, micro_batches=2, section=experts(dispatch_chunks="auto"))
    found = pool4.run(tune, case, str(tmp_path / "auto"), TUNING + 1)
    assert len({str(rank["settled"]) for rank in found}) == 1
    assert found[0]["used"][: TUNING - 1] == (list(CANDIDATES) * (TRIES + 1))[:-1]
    for rank in found:
        assert rank["settled"]["chunks"] in CANDIDATES
        assert rank["resumed"] == rank["settled"] and rank["trials"] == 0, "measured again"
    fixed = replace(case, section=experts(dispatch_chunks=1))
    assert found[0]["losses"] == pool4.run(tune, fixed, str(tmp_path / "fixed"), TUNING + 1)[0]["losses"]


def test_a_choice_that_is_not_made_is_not_saved(pool4: WorkerPool, tmp_path: Path) -> None:
    case = Case(2, 2, 2, micro_batches=2, section=experts(dispatch_chunks="auto"))
    for rank in pool4.run(tune, case, str(tmp_path), 2):
        assert rank["settled"] == rank["resumed"] == {"two_hop": False}, "chunks are still being tried"
        assert rank["trials"] == len(CANDIDATES)


def hops(folder: str) -> list[Any]:
    """What is saved of the hops before the first step and after it, and what a resumed job makes of the latter."""
    case = replace(TWO_NODES, section=experts(ranks_per_node=2))  # chunks are being tried all the while
    engine = build(case)
    before = engine._dispatch_state()
    measure = dispatch_choice.DispatchMixin._time_way
    dispatch_choice.DispatchMixin._time_way = lambda self, layer: {False: 2.0, True: 1.0}
    try:
        engine.train_batch(batches(engine, case))
    finally:
        dispatch_choice.DispatchMixin._time_way = measure
    engine.save_checkpoint(folder)
    other = build(case)
    other.load_checkpoint(folder)
    return [before, engine._dispatch_state(), other._dispatch_state(), {m.dispatcher.two_hop for m in other._moe}]


def test_hops_are_saved_once_they_are_settled_and_not_before(pool8: WorkerPool, tmp_path: Path) -> None:
    for before, after, resumed, used in pool8.run(hops, str(tmp_path)):
        assert before == {}
        assert after == resumed == {"two_hop": True}
        assert used in ({True}, set())


# -- layouts


def refused(case: Case) -> str:
    try:
        build(case)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("section, text", [
    ({"ranks_per_node": 3}, r"expert_parallel.ranks_per_node = 3: must divide .*expert_parallel.size = 4"),
    ({"two_hop": True}, "expert_parallel.two_hop = True: needs to know which ranks share a node"),
])
def test_layouts_that_cannot_work_are_refused_on_every_rank(
    section: dict[str, Any], text: str, pool8: WorkerPool
) -> None:
    for found in pool8.run(refused, replace(TWO_NODES, section=experts(**section))):
        assert re.search(text, found), found


def test_unlike_nodes_are_refused() -> None:
    check_even([2, 2, 2, 2])
    with pytest.raises(ConfigError, match="2 ranks on the node of rank 0 and 1 on that of rank 2"):
        check_even([2, 2, 1])


@pytest.mark.parametrize("variables, found", [
    ({"LOCAL_SIZE": "4"}, 4), ({"LOCAL_WORLD_SIZE": "8", "LOCAL_SIZE": "4"}, 8), ({}, None),
    ({"LOCAL_SIZE": "x"}, None), ({"LOCAL_SIZE": "0"}, None)])
def test_the_launcher_says_how_many_ranks_share_a_node(
    variables: dict[str, str], found: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched_ranks_per_node() == found


class Gate:
    def __init__(self, groups: int, reached: int, method: str = "noaux_tc"):
        self.groups, self.groups_per_token, self.method = groups, reached, method


@pytest.mark.parametrize("groups, reached, text", [
    (8, 4, "may visit all 4 nodes"), (8, 3, None), (4, 2, None), (4, 4, "may visit all 4 nodes"),
    (6, 2, "straddle nodes"), (1, 1, "straddle nodes")])
def test_groups_of_the_router_that_do_not_fit_the_nodes(groups: int, reached: int, text: str | None) -> None:
    found = node_limit_warning(Gate(groups, reached), 8, NodeLayout(2))  # type: ignore[arg-type]
    assert (found is None) == (text is None)
    assert text is None or text in (found or "")
    assert node_limit_warning(Gate(1, 1), 8, NodeLayout(8)) is None  # type: ignore[arg-type]
    assert node_limit_warning(Gate(1, 1), 8, None) is None  # type: ignore[arg-type]
    assert node_limit_warning(Gate(1, 1, "greedy"), 8, NodeLayout(2)) is None  # type: ignore[arg-type]
