"""Dispatch between ranks: equal to one process, whatever the routing, the formats, the chunks and the hops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ext.comm.exchange import Line
from tests.comm.journeys import STEPS, E, Journey, Steps, choices, expected, travel, travel_all, travel_in_steps
from tests.distributed.pool import WorkerPool


def close(case: str, found: list[dict[str, Any]], wanted: list[dict[str, Any]], tolerance: float) -> None:
    for rank, (a, b) in enumerate(zip(found, wanted, strict=True)):
        for name, value in b.items():
            torch.testing.assert_close(a[name], value.to(a[name].dtype), rtol=tolerance, atol=tolerance,
                                       msg=lambda text, n=name, r=rank: f"{case}, {n} of rank {r}: {text}")


CASES = {
    "mixed": choices(9, 4, 0, 7),
    "experts without tokens": choices(5, 6, 7, 8, among=[0, 2, 5]),
    "all to rank 0": choices(3, 5, 2, 4, among=[0, 1, 2])[:2],
    "all to one node": choices(3, 5, 2, 4, among=[4, 5, 6, 7]),
    "most ranks have no tokens": choices(0, 0, 8, 0),
    "nobody has tokens": choices(0, 0, 0, 0),
}


@pytest.mark.parametrize("ranks, per_node", [(2, None), (4, None), (4, 2)], ids=["two", "four", "two hops"])
def test_ranks_equal_one_process(pool2: WorkerPool, pool4: WorkerPool, ranks: int, per_node: int | None):
    journeys = {case: Journey((experts * 2)[:ranks], per_node=per_node) for case, experts in CASES.items()}
    found = (pool2 if ranks == 2 else pool4).run(travel_all, list(journeys.values()))
    for (case, journey), *results in zip(journeys.items(), *found, strict=True):
        close(case, results, expected(journey), 1e-12)
        counts = torch.bincount(torch.cat(journey.experts).flatten(), minlength=E).tolist()
        assert [rows for result in results for rows in result["groups"]] == counts


@pytest.mark.parametrize("per_node", [None, 2])
def test_numbers_are_rounded_where_they_travel_and_nowhere_else(pool4: WorkerPool, per_node: int | None):
    """In FP64, where nothing else rounds: a number rounded once too often or too seldom is off by 1 in 100."""
    journeys = [Journey(CASES["mixed"], *formats, per_node=per_node, hidden=130)
                for formats in (("fp8", "model"), ("bf16", "bf16"), ("fp8", "bf16"))]
    found = pool4.run(travel_all, journeys)
    for journey, *results in zip(journeys, *found, strict=True):
        close(f"{journey.dispatch}, {journey.combine}", results, expected(journey), 1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)], ids=str)
def test_models_in_other_dtypes(pool4: WorkerPool, dtype: torch.dtype, tolerance: float):
    journey = Journey(CASES["mixed"], dtype=dtype, per_node=2)
    exact = Journey(CASES["mixed"], per_node=2)
    exact.matrices = journey.matrices.double()
    for name in ("tokens", "weights", "douts"):
        setattr(exact, name, [part.double() for part in getattr(journey, name)])
    found = pool4.run(travel, journey)
    assert all(r["out"].dtype == r["dx"].dtype == dtype and r["dweights"].dtype == torch.float32 for r in found)
    close(str(dtype), found, expected(exact), tolerance)


def differing(found: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [name for name in ("out", "dx", "dweights", "dmatrices") if not found[name].equal(other[name])]


def differing_in_parts(journey: Journey, chunks: list[int]) -> dict[tuple, list[str]]:
    """What is not the same bit for bit as in one chunk, through the graph operations."""
    whole, found = travel(journey), {}
    for parts in (replace(journey, chunks=n) for n in chunks):
        found[parts.chunks, "graph"] = differing(travel(parts), whole)
        for advance in (True, False):
            found[parts.chunks, advance] = differing(travel_in_steps(parts, advance), whole)
    return found


@pytest.mark.parametrize("dtype, dispatch, combine, per_node", [
    (torch.float32, "model", "model", None), (torch.float32, "fp8", "bf16", 2), (torch.bfloat16, "fp8", "model", 2),
    (torch.bfloat16, "bf16", "bf16", None)], ids=str)
def test_chunks_change_no_bit(pool2: WorkerPool, pool4: WorkerPool, dtype: torch.dtype, dispatch: str, combine: str,
                              per_node: int | None):
    """Nor do starts and finishes apart, with or without `advance`."""
    pool, chunks = (pool4, [1, 2]) if per_node else (pool2, [1, 2, 3, 4])
    journey = Journey(CASES["mixed"][: pool.world_size], dispatch, combine, per_node=per_node, dtype=dtype, hidden=40)
    for differences in pool.run(differing_in_parts, journey, chunks):
        assert not any(differences.values()), differences


def rows_in_both_ways(journey: Journey) -> list[bool]:
    found = []
    for two_hop in (False, True):
        steps = Steps(replace(journey, two_hop=two_hop))
        for step in STEPS:
            getattr(steps, step)()
        steps.finish()
        found.append((*steps.rows, *steps.row_weights))
    return [a.equal(b) for a, b in zip(*found, strict=True)]


@pytest.mark.parametrize("chunks", [1, 2])
def test_rows_do_not_depend_on_hops(pool4: WorkerPool, chunks: int):
    journey = Journey(CASES["mixed"], "fp8", chunks=chunks, per_node=2, dtype=torch.bfloat16)
    assert pool4.run(rows_in_both_ways, journey) == [[True] * 2 * chunks] * 4


def two_at_once(journeys: list[Journey], order: list[tuple[int, str]]) -> list[dict[str, Any]]:
    steps = [Steps(journey) for journey in journeys]
    for which, step in order:
        if step == "advance":
            steps[which].transit.advance()
        else:
            getattr(steps[which], step)()
    return [each.finish() for each in steps]


@pytest.mark.parametrize("per_node, chunks", [(None, 2), (2, 1), (2, 2)])
def test_two_micro_batches_in_flight_at_once(pool4: WorkerPool, per_node: int | None, chunks: int):
    """The order of a pair: B's backward is under way whenever A's forward computes, and the other way round."""
    journeys = [Journey(choices(9, 4, 0, 7, seed=seed), per_node=per_node, chunks=chunks) for seed in (1, 2)]
    first = [(1, step) for step in STEPS[:3]]
    pair = [(0, "start_dispatch"), (1, "start_backward"), (0, "advance"), (1, "advance"), (1, "backward"),
            (0, "experts"), (1, "advance"), (0, "advance"), (0, "combine"), (0, "start_backward"), (0, "backward")]
    found = pool4.run(two_at_once, journeys, first + pair)
    for which, journey in enumerate(journeys):
        close(f"micro-batch {which}", [r[which] for r in found], expected(journey), 1e-12)


def exchange_of_a_transposed_tensor() -> torch.Tensor:
    rows = torch.arange(24.0).view(6, 4).t() + 100 * dist.get_rank()  # [4, 6], not contiguous
    line = Line(dist.group.WORLD, links=("node", "node"))
    return line.start("dispatch", rows, [1, 3], [[1, 1], [3, 3]][dist.get_rank()]).wait()


def test_a_tensor_that_is_not_contiguous_arrives_as_it_reads(pool2: WorkerPool):
    first, second = pool2.run(exchange_of_a_transposed_tensor)
    rows = torch.arange(24.0).view(6, 4).t()
    assert first.equal(torch.cat((rows[:1], rows[:1] + 100)))
    assert second.equal(torch.cat((rows[1:], rows[1:] + 100)))


def differing_if_turned(journey: Journey) -> list[str]:
    whole = travel_in_steps(journey)
    for name in ("experts", "tokens", "weights", "douts"):  # the same values with the strides of the transpose
        setattr(journey, name, [part.t().contiguous().t() for part in getattr(journey, name)])
    assert not journey.tokens[0].is_contiguous()
    return differing(travel_in_steps(journey), whole)


@pytest.mark.parametrize("dispatch", ["model", "fp8"])
def test_tokens_weights_and_gradients_need_not_be_contiguous(pool2: WorkerPool, dispatch: str):
    assert pool2.run(differing_if_turned, Journey(CASES["mixed"][:2], dispatch, hidden=256)) == [[], []]
