"""Gradients are averaged behind the drain: begun when their stage is done, in one order on all replicas, and with the
same result bit for bit as at the end."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from megatron_ext.config import ConfigError
from megatron_ext.engine import reduction
from megatron_ext.pipeline import Plan, executor, schedule
from megatron_ext.pipeline.instructions import Compute
from tests.distributed.equality import Case, batches, build, compare, gather
from tests.distributed.pool import WorkerPool

Event = tuple[str, int | None]


def by_hand() -> Plan:
    """Two ranks, two directions of one micro-batch, one after the other: rank 0 is done with stage 0 first, rank 1 with
    stage 1."""
    compute = [[Compute("F", 0, 0, 0), Compute("B", 0, 0, 0), Compute("F", 1, 1, 0), Compute("B", 1, 1, 0)],
               [Compute("F", 0, 1, 0), Compute("B", 0, 1, 0), Compute("F", 1, 0, 0), Compute("B", 1, 0, 0)]]
    return Plan.from_compute("by hand", [[0, 1], [1, 0]], 2, compute)


def test_a_stage_is_done_with_its_last_backward_of_all_directions() -> None:
    assert [reduction.finishing_order(by_hand(), rank) for rank in (0, 1)] == [[0, 1], [1, 0]]
    compute = [Compute("F", 0, 0, 0), Compute("F", 0, 1, 0), Compute("I", 0, 1, 0), Compute("B", 0, 0, 0),
               Compute("W", 0, 1, 0)]
    one = Plan.from_compute("one rank", [[0, 0]], 1, [compute])
    assert reduction.finishing_order(one, 0) == [0, 1], "the I of stage 1 leaves its weight gradients open"
    plan = schedule("1f1b", stages=2, micro_batches=4)
    assert [reduction.finishing_order(plan, rank) for rank in (0, 1)] == [[0], [1]]


@contextlib.contextmanager
def watched(engine: Any) -> Iterator[list[Event]]:
    """What happens in a step: stages done, stages whose sums begin (None: the rest), the pipeline's end."""
    events: list[Event] = []
    done, start, run = engine.reduction.stage_done, engine.reduction._start, engine.executor.run

    def on_done(stage: int) -> None:
        events.append(("done", stage))
        done(stage)

    def on_start(buckets: Any) -> None:
        events.extend(("start", bucket.stage) for bucket in buckets)
        start(buckets)

    def on_run(*arguments: Any, **options: Any) -> Any:
        outcome = run(*arguments, **options)
        events.append(("end", None))
        return outcome

    with (patch.object(engine.reduction, "stage_done", on_done), patch.object(engine.reduction, "_start", on_start),
          patch.object(engine.executor, "run", on_run)):
        yield events


def train(case: Case, plan: Plan | None = None) -> dict[str, Any]:
    """Rank 0 returns losses, norms and weights, a digest of every rank's averages, and every rank's last step."""
    sent = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal sent
        sent += 1
        return reduce(*arguments, **options)

    reduce = DeepSpeedZeroOptimizer.allreduce_bucket
    with (patch.object(reduction, "BUCKET_BYTES", 2**14),  # so that a stage has several
          patch.object(DeepSpeedZeroOptimizer, "allreduce_bucket", counted)):
        engine = build(case)
        if plan is not None:
            engine._plans["training", plan.micro_batches] = plan
        data, digest, losses, norms = batches(engine, case), hashlib.sha256(), [], []
        for _ in range(case.steps):
            with watched(engine) as events:
                losses.append(float(engine.train_batch(data)))
            norms.append(float(engine.get_global_grad_norm()))
            for p in engine.weights.parameters:
                digest.update(p.main_grad.numpy().tobytes())
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (digest.hexdigest(), events, sent))
    return {"losses": losses, "norms": norms, "state": gather(engine), "averages": [f[0] for f in found],
            "events": [f[1] for f in found], "sent": sum(f[2] for f in found)}


def with_overlap(case: Case, overlap: bool) -> Case:
    return replace(case, section={"pipeline": {"overlap": overlap}})


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for key in ("losses", "norms", "averages"):
        assert found[key] == expected[key]
    for name, value in expected["state"].items():
        assert torch.equal(found["state"][name], value), name


def starts(events: list[Event]) -> tuple[list[int | None], list[int | None]]:
    """The stages whose sums began before the pipeline's end, and after it; a stage once for each bucket."""
    end = events.index(("end", None))
    return ([s for what, s in events[:end] if what == "start"], [s for what, s in events[end:] if what == "start"])


FOUR = Case(2, 2, 2, dropout=0.1, steps=2)  # the first step sums all at the end
CASES = [
    replace(FOUR, zero=0),
    replace(FOUR, zero=1, zero_options={"reduce_bucket_size": 700}),  # smaller than some parameters
    replace(FOUR, zero=2, offload=True),
    replace(FOUR, zero=1, zero_options={"contiguous_gradients": False, "round_robin_gradients": True}),
    replace(FOUR, zero=1, bf16=True, grad_accum_dtype="fp32"),
    replace(FOUR, zero=2, bf16=True),
    replace(FOUR, zero=0, schedule="1f1b"),
    replace(FOUR, zero=0, schedule="wave", chunks=2),
    replace(FOUR, zero=1, schedule="dualpipe_interleaved", chunks=2),
    replace(FOUR, zero=0, schedule="dualpipe_zb", micro_batches=6),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_early_equals_late(case: Case, pool4: WorkerPool) -> None:
    early = pool4.run(train, with_overlap(case, True))[0]
    late = pool4.run(train, with_overlap(case, False))[0]
    same(early, late)
    assert early["sent"] == late["sent"] == 0, "ZeRO has sent gradients again"
    for rank, (events, after) in enumerate(zip(early["events"], late["events"], strict=True)):
        behind, rest = starts(events)
        assert behind and set(rest) <= {None}, f"rank {rank}"
        assert starts(after) == ([], [*behind, *rest]), f"rank {rank}"
        mirrored = early["events"][(rank + case.replicas) % case.world_size]
        if case.schedule.startswith("dualpipe"):
            assert starts(mirrored) == (behind, rest)


def test_replicas_that_finish_in_different_orders_sum_in_one(pool4: WorkerPool) -> None:
    case = replace(FOUR, zero=0, micro_batches=2)
    early = pool4.run(train, with_overlap(case, True), by_hand(), timeout=60)[0]
    order = [[s for what, s in events if what == "done"] for events in early["events"]]
    assert order == [[0, 1], [0, 1], [1, 0], [1, 0]]
    begun = [starts(events)[0] for events in early["events"]]
    assert all(list(dict.fromkeys(b)) == [0, 1] and b == begun[0] for b in begun)
    first = early["events"][0]
    assert first.index(("start", 0)) < first.index(("done", 1)), "rank 0 need not wait"
    same(early, pool4.run(train, with_overlap(case, False), by_hand())[0])


@pytest.mark.parametrize("options", [{"use_multi_rank_bucket_allreduce": False}, {"overlap_comm": True}], ids=str)
def test_zero_reduces_itself_where_that_is_cheaper_or_on_a_stream(options: dict[str, Any], pool4: WorkerPool) -> None:
    found = pool4.run(train, replace(FOUR, zero_options=options))[0]
    assert found["sent"] > 0
    assert all(starts(events) == ([], []) for events in found["events"])
    compare(found, pool4.run(train, FOUR)[0])


@pytest.mark.parametrize("dtype", [None, "fp32"])
def test_without_contiguous_gradients_experts_are_averaged_over_their_own_replicas(dtype: str | None,
                                                                                   pool4: WorkerPool) -> None:
    """DeepSpeed's own way sums the experts of different ranks: norms 6 % off, in silence."""
    case = replace(FOUR, bf16=dtype is not None, grad_accum_dtype=dtype)
    found = pool4.run(train, replace(case, zero_options={"contiguous_gradients": False}))[0]
    same(found, pool4.run(train, case)[0])


def done_where(case: Case) -> list[tuple[int, int, bool]]:
    """Per call of stage_done: the stage, after which computation, and whether its gradients were those of the end."""
    engine = build(case)
    engine.reduction.early = False  # they stay sums until the end
    calls: list[tuple[int, int, list[torch.Tensor]]] = []
    count = 0
    compute, run = executor._Run.compute, engine.executor.run
    found: list[tuple[int, int, bool]] = []

    def counted(self: Any, instruction: Any) -> None:
        nonlocal count
        compute(self, instruction)
        count += 1

    def gradients_of(stage: int) -> list[torch.Tensor]:
        return [p.main_grad for p in engine.module.stage_parameters(stage)]

    def on_done(stage: int) -> None:
        calls.append((stage, count, [g.clone() for g in gradients_of(stage)]))

    def on_run(*arguments: Any, **options: Any) -> Any:
        outcome = run(*arguments, **{**options, "stage_done": on_done})
        for stage, index, then in calls:
            found.append((stage, index, all(map(torch.equal, then, gradients_of(stage)))))
        return outcome

    with patch.object(executor._Run, "compute", counted), patch.object(engine.executor, "run", on_run):
        engine.train_batch(batches(engine, case))
    return found


@pytest.mark.parametrize(("name", "chunks"), [("dualpipe", 1), ("zb_h1", 1), ("wave", 2), ("dualpipe_interleaved", 2)])
def test_every_stage_is_told_of_once_when_its_gradients_are_complete(name: str, chunks: int, pool2: WorkerPool) -> None:
    case = Case(2, 1, 1, micro_batches=4, schedule=name, chunks=chunks, tied=False)
    plan = schedule(name, stages=2, micro_batches=4, chunks=chunks)
    for rank, calls in enumerate(pool2.run(done_where, case)):
        computes = plan.compute(rank)
        last = {part.stage: n for n, i in enumerate(computes, 1) for part in i.parts if part.kind in "BW"}
        assert calls == [(stage, index, True) for stage, index in sorted(last.items(), key=lambda item: item[1])]


def fail_and_touch(case: Case) -> dict[str, Any]:
    engine = build(case)
    data = batches(engine, case)
    engine.train_batch(data)
    found: dict[str, Any] = {}
    with engine.reduction.step(engine.plan()) as stage_done:
        engine.weights.begin()
        for stage in reduction.finishing_order(engine.plan(), 0):
            stage_done(stage)
        engine.module.stage_parameters(1)[0].main_grad.add_(1.0)  # as a layer of another stage might
        with pytest.raises(ConfigError) as raised:
            engine.reduction.finish()
        found["message"] = str(raised.value)
    for bucket in engine.reduction._under_way:
        bucket.work.wait()
    engine.reduction._under_way.clear()

    def broken() -> None:
        found["under way"] = len(engine.reduction._under_way)
        raise OSError("the wire is cut")

    with patch.object(engine.executor.messenger, "finish", broken), pytest.raises(OSError, match="the wire is cut"):
        engine.train_batch(data)
    found["left"] = (len(engine.reduction._under_way),
                     [p for p in engine.weights.parameters if p.main_grad is not None or p.grad is not None])
    return found


def test_a_step_that_fails_leaves_nothing_and_a_late_gradient_is_refused(pool2: WorkerPool) -> None:
    for zero in (0, 1):
        for found in pool2.run(fail_and_touch, Case(2, 1, 1, zero=zero)):
            assert found["under way"] > 0
            assert found["left"] == (0, [])
            assert "layers = 'stage 1'" in found["message"] and "TiedLayerSpecs" in found["message"]
