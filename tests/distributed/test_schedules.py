"""Every schedule there is, in the engine: it runs what the plan says, and trains what one process trains."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from megatron_ext.pipeline import Plan, Transfer, executor
from megatron_ext.pipeline.schedules import NAMES
from megatron_ext.pipeline.stage import StageRun
from tests.distributed import equality, generic
from tests.distributed.equality import Case, compare, gather
from tests.distributed.generic import Job, batches, build
from tests.distributed.pool import WorkerPool
from tests.thinned import thinned

MORE_CHUNKS = [("dualpipe_interleaved", 4, 2), ("dualpipe_interleaved", 4, 4), ("wave", 2, 2), ("wave", 4, 3),
               ("wave", 4, 4), ("interleaved", 4, 4), ("interleaved_paired", 2, 4)]
CELLS = [(name, stages, 1) for number, name in enumerate(NAMES)
         for stages in ((4, 2) if number % 2 else (2, 4))] + MORE_CHUNKS  # in turn: every second is slow


@functools.cache
def expected(job: Job) -> dict[str, Any]:
    return generic.reference(job)


@functools.cache
def expected_moe(case: Case) -> dict[str, Any]:
    return equality.reference(case)


@pytest.fixture
def pools(pool2: WorkerPool, pool4: WorkerPool) -> dict[int, WorkerPool]:
    return {2: pool2, 4: pool4}


Call = tuple[Any, ...]


@contextlib.contextmanager
def listening(engine: Any) -> Iterator[list[Call]]:
    """What is really called, in order: layers, autograd, weight gradients, messages; labels apart."""
    calls: list[Call] = []
    grid, module, weights, messenger = engine.module.topology, engine.module, engine.weights, engine.executor.messenger
    backward, take, send, receive = weights.backward, weights.take, messenger.send, messenger.receive
    running: list[Call] = []  # the backwards that have not come to autograd yet

    class Listened(StageRun):
        @property
        def where(self) -> Call:
            [stage] = [s for s in module.stages if module.stage_layers(s)[0] is self.layers[0]]
            micro_batch, shard = divmod(self.key.micro_batch, grid.data_parallel_size)
            return shard // grid.replicas, stage, micro_batch

        def forward(self, value: Any) -> Any:
            calls.append(("F", *self.where))
            return (yield from super().forward(value))

        def backward(self, *arguments: Any) -> Any:
            running.append(self.where)
            found = yield from super().backward(*arguments)
            assert not running, "no gradient was taken"
            return found

    def on_backward(roots: Any, gradients: Any, defer: Any) -> None:
        if running:  # the first phase of its stage
            where = running.pop()
            assert defer in (None, where)
            calls.append(("B" if defer is None else "I", *where))
        backward(roots, gradients, defer)

    def on_take(key: Any) -> None:
        calls.append(("W", *key))
        take(key)

    def on_send(key: Any, *rest: Any) -> None:
        if key.kind != "L":
            calls.append(("send", *key))
        send(key, *rest)

    def on_receive(key: Any, source: int) -> Any:
        if key.kind != "L":
            calls.append(("receive", *key))
        return receive(key, source)

    with (patch.object(executor, "StageRun", Listened),
          patch.object(weights, "backward", on_backward), patch.object(weights, "take", on_take),
          patch.object(messenger, "send", on_send), patch.object(messenger, "receive", on_receive)):
        yield calls


def planned_calls(plan: Plan, rank: int) -> list[Call]:
    """The same of a plan; of a pair the backward starts."""
    calls: list[Call] = []
    for instruction in plan.instructions[rank]:
        if isinstance(instruction, Transfer):
            if instruction.kind[0] == "S":
                calls.append(("send", *instruction.message[:4]))
        else:
            calls += [("receive", *message[:4]) for message in plan.needs(instruction)]
            calls += [tuple(part) for part in reversed(instruction.parts)]
    return calls


def train_and_record(job: Job) -> dict[str, Any]:
    """Rank 0 returns what happened; each rank what it ran, next to what it was to run."""
    engine = build(job)
    data = batches(engine, job)
    losses, norms = [], []
    for _ in range(job.steps):
        with listening(engine) as calls:  # of the last step
            losses.append(float(engine.train_batch(data)))
        norms.append(float(engine.get_global_grad_norm()))
        assert engine.weights.waiting == [] and engine.executor.messenger.under_way == 0
    state = gather(engine)
    return {"losses": losses, "norms": norms, "state": state if dist.get_rank() == 0 else None, "ran": calls,
            "planned": planned_calls(engine.plan(), engine.module.stage_rank)}


@pytest.mark.parametrize(("name", "stages", "chunks"), thinned(CELLS))
def test_runs_its_plan_and_equals_one_process(
    name: str, stages: int, chunks: int, pools: dict[int, WorkerPool]
) -> None:
    job = Job(generic.deep, stages, zero=NAMES.index(name) % 3, micro_batches=8, steps=2, schedule=name, chunks=chunks)
    found = pools[stages].run(train_and_record, job)
    for rank in found:
        assert rank["ran"] == rank["planned"]
        assert rank["losses"] == found[0]["losses"]
    compare(found[0], expected(Job(generic.deep, micro_batches=8, steps=2, zero=0)))


@pytest.mark.parametrize(("name", "micro_batches"), [("wave", 5), ("dualpipe_interleaved", 6), ("zb_h1", 3), ("zbv", 1),
                                                     ("1f1b", 2), ("dualpipev", 9)])
def test_sizes_that_divide_nothing(name: str, micro_batches: int, pool4: WorkerPool) -> None:
    job = Job(generic.deep, 4, micro_batches=micro_batches, steps=2, schedule=name)
    compare(pool4.run(train_and_record, job)[0],
            expected(Job(generic.deep, micro_batches=micro_batches, steps=2, zero=0)))


MOE = [
    # P = 2, D = 2: experts split over the replicas of a pipeline, with and without mirrored ranks.
    Case(2, 2, 2, 1, True, 0.1, 4, steps=4, schedule="zbv"),
    Case(2, 2, 2, 2, False, 0.0, 3, steps=4, schedule="1f1b"),
    Case(2, 2, 1, 0, False, 0.1, 4, steps=4, schedule="interleaved_paired", chunks=2),
    Case(2, 2, 2, 1, False, 0.1, 4, steps=4, schedule="wave", chunks=3),
    Case(2, 2, 2, 2, True, 0.1, 4, steps=4, schedule="dualpipe_interleaved", chunks=2),
    Case(4, 1, 1, 1, True, 0.1, 8, steps=4, schedule="dualpipe_zb"),
    Case(4, 1, 1, 0, False, 0.1, 4, steps=4, schedule="zb_h1"),
]


@pytest.mark.parametrize("case", MOE, ids=str)
def test_experts_and_tied_embeddings_under_every_placement(case: Case, pool4: WorkerPool) -> None:
    found = pool4.run(equality.train, case, timeout=240)[0]
    whole = Case(dropout=case.dropout, micro_batches=case.micro_batches * case.replicas, steps=case.steps)
    compare(found, expected_moe(whole))


def test_the_comparison_would_see_another_batch() -> None:
    job = Job(generic.deep, micro_batches=8, steps=2, zero=0)
    with pytest.raises(AssertionError):
        compare(expected(replace(job, micro_batches=6)), expected(job))
