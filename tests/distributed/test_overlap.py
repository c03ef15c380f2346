"""Pairs that take turns change nothing: losses, gradients, weights and biases equal those of one after the other, bit
for bit; and other ways of running a block (recomputed, in chunks) change nothing either."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ext.pipeline import executor
from tests.distributed import equality
from tests.distributed.equality import Case, batches, build, compare, gather
from tests.distributed.pool import WorkerPool


def train(case: Case) -> dict[str, Any]:
    """Rank 0 returns losses, norms, weights and biases, and a digest of every rank's gradients; all count turns."""
    engine = build(case)
    data = batches(engine, case)
    turns = 0
    going_on = executor._Half.go_on

    def go_on(half: Any) -> bool:
        nonlocal turns
        waits = going_on(half)
        turns += waits and half.other is not None
        return waits

    executor._Half.go_on = go_on
    losses, norms, digest = [], [], hashlib.sha256()
    try:
        for _ in range(case.steps):
            losses.append(float(engine.train_batch(data)))
            norms.append(float(engine.get_global_grad_norm()))
            for p in engine.weights.parameters:
                digest.update(p.main_grad.cpu().numpy().tobytes())
    finally:
        executor._Half.go_on = going_on
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (turns, digest.hexdigest()))
    state = gather(engine)
    return {"losses": losses, "norms": norms, "turns": [t for t, _ in found], "gradients": [d for _, d in found],
            "state": state}


def with_overlap(case: Case, overlap: bool) -> Case:
    return replace(case, section={**case.section, "pipeline": {"overlap": overlap}})


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["losses"] == expected["losses"]
    assert found["norms"] == expected["norms"]
    assert found["gradients"] == expected["gradients"], "of some rank"
    for name, value in expected["state"].items():
        assert torch.equal(found["state"][name], value), name


def section(dispatch: str = "model", recompute: tuple[str, ...] = (), **experts: Any) -> dict[str, Any]:
    return {"expert_parallel": {"dispatch_dtype": dispatch, "dispatch_chunks": 1, **experts},
            "recompute": list(recompute)}


BOTH = ("attention", "mlp")
#          P  D  EP
FP8 = {"fp8": {"enabled": True}}

CASES = [
    Case(2, 1, 1, dropout=0.1, steps=3, section=section()),
    Case(2, 2, 2, dropout=0.1, steps=3, section=section("bf16")),
    Case(2, 2, 2, dropout=0.1, steps=3, section=section("fp8", BOTH), micro_batches=6),
    Case(2, 2, 2, steps=2, section=section("fp8", combine_dtype="bf16"), bf16=True),
    Case(2, 4, 4, dropout=0.1, steps=3, section=section("fp8"), micro_batches=6),
    Case(2, 4, 4, dropout=0.1, steps=3, section=section("model", ("mlp",), ranks_per_node=2, two_hop=True)),
    Case(4, 1, 1, dropout=0.1, steps=2, section=section("fp8", BOTH), micro_batches=8),
    Case(4, 1, 1, dropout=0.1, steps=2, section=section("bf16"), micro_batches=10),
    Case(4, 2, 2, steps=2, section=section("bf16"), micro_batches=10),
    Case(4, 2, 2, dropout=0.1, steps=3, section=section("model", BOTH), micro_batches=10),
    Case(4, 2, 2, dropout=0.1, steps=3, section=section("fp8", ("attention",)), micro_batches=8,
         schedule="dualpipe_zb"),
    Case(2, 2, 2, dropout=0.1, steps=3, section=section("model"), schedule="wave", chunks=2, micro_batches=4),
    Case(2, 2, 2, dropout=0.1, steps=2, section=section("fp8", BOTH) | FP8),
    Case(2, 4, 4, dropout=0.1, steps=2, micro_batches=6,
         section=section("fp8", ("mlp",), ranks_per_node=2, two_hop=True, dispatch_chunks=2) | FP8),
]
SLOW = [Case(4, 4, 4, dropout=0.1, steps=2, section=section(dispatch, recompute), micro_batches=10)
        for dispatch in ("model", "bf16", "fp8") for recompute in ((), BOTH)]


@pytest.fixture
def pools(pool2: WorkerPool, pool4: WorkerPool, pool8: WorkerPool) -> dict[int, WorkerPool]:
    return {2: pool2, 4: pool4, 8: pool8}


@functools.cache
def expected(case: Case) -> dict[str, Any]:
    return equality.reference(case)


def check(case: Case, pool: WorkerPool) -> None:
    """Bit for bit as one after the other; and in the model's FP32, one process."""
    together = pool.run(train, with_overlap(case, True))[0]
    apart = pool.run(train, with_overlap(case, False))[0]
    same(together, apart)
    assert set(apart["turns"]) == {0}
    if case.expert_parallel > 1:
        assert max(together["turns"]) > 0, "no rank ever waited within a pair"
    if case.section["expert_parallel"]["dispatch_dtype"] == "model" and not case.bf16:
        whole = Case(stages=2, micro_batches=case.micro_batches * case.replicas, steps=case.steps,
                     dropout=case.dropout)
        compare(together, expected(whole))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_taking_turns_changes_nothing(case: Case, pools: dict[int, WorkerPool]) -> None:
    check(case, pools[case.world_size])


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=str)
def test_taking_turns_changes_nothing_on_sixteen_ranks(case: Case) -> None:
    pool = WorkerPool(16)
    try:
        check(case, pool)
    finally:
        pool.close()


@pytest.mark.parametrize("dispatch", ["model", "fp8"])
def test_recomputation_changes_nothing(dispatch: str, pool4: WorkerPool) -> None:
    fp8 = FP8 if dispatch == "fp8" else {}
    case = Case(2, 2, 2, dropout=0.1, steps=3, section=section(dispatch) | fp8)
    plain = pool4.run(train, case)[0]
    for recompute in (("attention",), ("mlp",), BOTH):
        same(pool4.run(train, replace(case, section=section(dispatch, recompute) | fp8))[0], plain)


@pytest.mark.parametrize("dispatch", ["model", "fp8"])
def test_chunks_of_experts_change_nothing(dispatch: str, pool4: WorkerPool) -> None:
    fp8 = FP8 if dispatch == "fp8" else {}
    case = Case(2, 2, 2, dropout=0.1, steps=3, section=section(dispatch) | fp8)
    plain = pool4.run(train, case)[0]
    for chunks, recompute in ((2, ()), (4, BOTH)):
        changed = section(dispatch, recompute, dispatch_chunks=chunks) | fp8
        same(pool4.run(train, replace(case, section=changed))[0], plain)
