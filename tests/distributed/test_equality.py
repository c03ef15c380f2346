"""Every layout trains the model that one process trains: losses within 1e-5 relative, parameters within 1e-5.

The table: P in {2, 4} x D in {1, 2} x EP (1, and 2 where it divides D) x ZeRO {0, 1, 2} x offload (where ZeRO is on) x
dropout on and off x m in {2, 4, 6, 2P, 2P+2}; 10 steps, clipping 0.1, experts and tied embeddings, FP32. The cells
below in CHOSEN run in `make test` and have every value at least twice; all 240 with

    .venv/bin/python -m pytest tests/distributed/test_equality.py -m slow
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import pytest

from tests.distributed import equality
from tests.distributed.equality import Case
from tests.distributed.pool import WorkerPool


def table() -> list[Case]:
    cells = []
    for stages, replicas in itertools.product((2, 4), (1, 2)):
        for experts in [1, 2][:replicas]:
            for zero, offload in ((0, False), (1, False), (1, True), (2, False), (2, True)):
                for dropout in (0.0, 0.1):
                    for m in sorted({2, 4, 6, 2 * stages, 2 * stages + 2}):
                        cells.append(Case(stages, replicas, experts, zero, offload, dropout, m))
    return cells


CHOSEN = [
    #    P  D  EP ZeRO offload dropout m
    Case(2, 1, 1, 0, False, 0.1, 4),
    Case(2, 1, 1, 2, True, 0.0, 6),
    Case(2, 1, 1, 1, False, 0.0, 2),
    Case(4, 1, 1, 1, True, 0.1, 10),
    Case(4, 1, 1, 0, False, 0.0, 6),
    Case(4, 1, 1, 2, False, 0.1, 2),
    Case(4, 1, 1, 1, False, 0.0, 8),
    Case(2, 2, 2, 1, True, 0.1, 4),
    Case(2, 2, 2, 0, False, 0.0, 6),
    Case(2, 2, 1, 2, False, 0.1, 2),
    Case(4, 2, 2, 2, True, 0.0, 4),
    Case(4, 2, 2, 1, False, 0.1, 8),
    Case(4, 2, 1, 0, False, 0.1, 6),
]


@functools.cache
def expected(case: Case) -> dict[str, Any]:
    """One process; it depends on the global batch alone, not on the layout."""
    return equality.reference(case)


def check(case: Case, pools: dict[int, WorkerPool]) -> None:
    found = pools[case.world_size].run(equality.train, case, timeout=240)[0]
    whole = Case(stages=2, replicas=1, dropout=case.dropout, micro_batches=case.micro_batches * case.replicas,
                 clip=case.clip, tied=case.tied, steps=case.steps)
    equality.compare(found, expected(whole))


@pytest.fixture
def pools(pool2: WorkerPool, pool4: WorkerPool, pool8: WorkerPool) -> dict[int, WorkerPool]:
    return {2: pool2, 4: pool4, 8: pool8}


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_equals_one_process(case: Case, pools: dict[int, WorkerPool]) -> None:
    check(case, pools)


def test_equals_one_process_with_an_untied_head_and_clipping_that_never_acts(pools: dict[int, WorkerPool]) -> None:
    check(Case(2, 2, 2, 1, True, 0.0, 4, tied=False, clip=1e6), pools)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", table(), ids=str)
def test_whole_table(case: Case, pools: dict[int, WorkerPool]) -> None:
    check(case, pools)


def test_the_comparison_can_fail() -> None:
    """Another clipping, or one micro-batch more, is another training."""
    case = Case(steps=3)
    for other in (replace(case, clip=0.2), replace(case, micro_batches=6)):
        with pytest.raises(AssertionError):
            equality.compare(expected(other), expected(case))


def bias(case: Case) -> dict[str, Any]:
    state = equality.train(case).get("state", {})
    return {name: value for name, value in state.items() if name.endswith("e_score_correction_bias")}


def test_bias_is_identical_whatever_the_accumulation_and_the_replicas(pool2: WorkerPool, pool4: WorkerPool) -> None:
    """The same global batch of 8 micro-batches: n = 4 per direction on one replica, n = 2 on two."""
    one = pool2.run(bias, Case(micro_batches=8, steps=4))[0]
    two = pool4.run(bias, Case(replicas=2, expert_parallel=2, micro_batches=4, steps=4))[0]
    assert one.keys() == two.keys() and len(one) == 3
    for name, value in one.items():
        assert value.abs().max() > 0
        assert value.equal(two[name]), name
