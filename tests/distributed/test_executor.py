"""The executor with layers not written for it: what it computes, keeps, sends and reports, against one process."""

from __future__ import annotations

import functools
import gc
import itertools
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

import megatron_ext
from megatron_ext.pipeline.instructions import Plan
from tests.distributed import generic
from tests.distributed.equality import compare
from tests.distributed.generic import H, Job, batches, build
from tests.distributed.pool import WorkerPool
from tests.thinned import thinned


@functools.cache
def expected(job: Job) -> dict[str, Any]:
    return generic.reference(job)


def check(job: Job, pools: dict[int, WorkerPool]) -> None:
    """Equal to one process, whatever the layout."""
    compare(pools[job.stages].run(generic.train, job)[0], expected(replace(job, stages=2, zero=0, interval=0)))


@pytest.fixture
def pools(pool2: WorkerPool, pool4: WorkerPool) -> dict[int, WorkerPool]:
    return {2: pool2, 4: pool4}


# -- equal to one process

JOBS = {
    # Tuples with integers, masks and another shape; functions; a convolution; lengths that change with every message.
    "zoo": [Job(stages=p, zero=z) for p, z in ((2, 0), (2, 1), (4, 0), (4, 2))],
    "sizes": [Job(generic.drops, 4, micro_batches=m, steps=2) for m in (2, 4, 6, 8, 10)],
    "a stage without parameters": [Job(generic.bare_stage, 4)],
    "frozen layers before the first that learns": [Job(generic.frozen_start, p) for p in (2, 4)],
    "tied over pairs": [Job(generic.tied, 4, z) for z in (0, 1, 2)],
    "tied, never clipped": [Job(generic.tied, 4, clip=0.0)],
    "recomputed": [Job(generic.drops, p, interval=i) for p, i in ((2, 1), (2, 2), (4, 1), (4, 2))],
    "recomputed tuples": [Job(stages=4, interval=2)],
    "loss in the last layer": [Job(generic.own_loss, p, data=generic.vectors, loss_fn=None) for p in (2, 4)],
}


@pytest.mark.parametrize("job", thinned(
    pytest.param(job, id=f"{name}: P={job.stages} ZeRO={job.zero} m={job.micro_batches} interval={job.interval}")
    for name, jobs in JOBS.items() for job in jobs))
def test_equals_one_process(job: Job, pools: dict[int, WorkerPool]) -> None:
    check(job, pools)


def test_the_reference_would_notice() -> None:
    job = Job(steps=2)
    for other in (replace(job, clip=0.2), replace(job, micro_batches=2)):
        with pytest.raises(AssertionError):
            compare(expected(other), expected(job))


def losses_with(functions: list[Any]) -> list[list[float]]:
    """Losses of three steps, recomputed each with another function."""
    return [generic.train(Job(generic.drops, 2, interval=1, checkpoint=f)).get("losses", []) for f in functions]


def reentrant(function: Callable[..., Any], *tensors: Tensor) -> Any:
    from torch.utils.checkpoint import checkpoint

    # As DeepSpeed's own, it learns from its inputs whether there is anything to differentiate.
    return checkpoint(function, *tensors, use_reentrant=any(t.requires_grad for t in tensors), preserve_rng_state=False)


def test_a_checkpoint_function_of_the_users(pool2: WorkerPool) -> None:
    plain, theirs = pool2.run(losses_with, [None, reentrant])[0]
    assert plain == theirs


# -- hooks


def with_hooks(when: str) -> dict[str, Any]:
    job = Job(generic.drops, 2)
    calls = {"tensor": 0, "post": 0}

    def register(module: nn.Module) -> None:
        weights = dict(module.named_parameters())
        weights["layers.2.weight"].register_hook(lambda grad: calls.update(tensor=calls["tensor"] + 1))
        weights["layers.4.weight"].register_post_accumulate_grad_hook(lambda p: calls.update(post=calls["post"] + 1))

    original = megatron_ext.initialize

    def initialize(model: Any, config: Any) -> Any:
        if when == "before":
            register(model)
        found = original(model=model, config=config)
        if when == "after":
            register(model)
        return found

    megatron_ext.initialize = initialize
    try:
        return generic.train(job) | calls
    finally:
        megatron_ext.initialize = original


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_the_user_fire_under_zero(pool2: WorkerPool, when: str) -> None:
    for rank, found in enumerate(pool2.run(with_hooks, when)):
        assert found["tensor"] == found["post"] == 2 * 3, "micro-batches of a direction times steps"
        if rank == 0:
            compare({k: found[k] for k in ("losses", "norms", "state")}, expected(Job(generic.drops, 2, 0)))


def not_split() -> list[str]:
    job = Job(stages=2)
    engine = build(job)
    engine.train_batch(batches(engine, job))
    return sorted(name for name, p in engine.module.named_parameters() if p in engine.weights.whole)


def test_every_plain_linear_is_split_and_nothing_else(pool2: WorkerPool) -> None:
    whole = ["layers.0.embedding.weight", *(f"layers.{n}.{p}" for n in ("1.norm", "2.norm", "7", "9")
                                            for p in ("bias", "weight"))]
    assert pool2.run(not_split) == [whole] * 2


# -- memory


class Watched(nn.Module):
    """A layer that counts, when it has run, what is alive of all that its kind has seen and made."""

    graphs: list[weakref.ref] = []  # forwards of which autograd has saved something
    tensors: list[weakref.ref] = []  # inputs and outputs
    seen: list[tuple[int, int, int]] = []  # graphs, tensors, messages under way
    under_way: Callable[[], int] = staticmethod(lambda: 0)

    class Graph:
        pass

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        graph = Watched.Graph()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (graph, t.detach()), lambda kept: kept[1]):
            y = self.linear(x).tanh()
        Watched.graphs.append(weakref.ref(graph))
        Watched.tensors.extend((weakref.ref(x), weakref.ref(y)))
        Watched.seen.append(Watched.alive())
        return y

    @staticmethod
    def alive() -> tuple[int, int, int]:
        return (sum(ref() is not None for ref in Watched.graphs), sum(ref() is not None for ref in Watched.tensors),
                Watched.under_way())


def floats(step: int, number: int) -> tuple[Tensor, Tensor]:
    return torch.full((2, H), float(number)), torch.zeros(2, H)


def watch(micro_batches: int) -> dict[str, Any]:
    job = Job(lambda: [LayerSpec(Watched) for _ in range(4)], 4, 1, micro_batches, data=floats, loss_fn=nn.MSELoss())
    engine = build(job)
    Watched.graphs, Watched.tensors, Watched.seen = [], [], []
    Watched.under_way = staticmethod(lambda: engine.executor.messenger.under_way)
    gc.disable()  # reference counts alone must free everything
    try:
        engine.train_batch(batches(engine, job))
        left = Watched.alive()
    finally:
        gc.enable()
    graphs, tensors, messages = (max(column) for column in zip(*Watched.seen, strict=True))
    return {"graphs": graphs, "tensors": tensors, "messages": messages, "left": left, "queue": engine.weights.waiting,
            "planned": planned_peak(engine.plan(), engine.module.stage_rank)}


def planned_peak(plan: Plan, rank: int) -> int:
    """Forwards without their input-grad yet, at most; of a pair without communication the backward runs first."""
    parts = [part for instruction in plan.compute(rank) for part in reversed(instruction.parts)]
    return max(itertools.accumulate({"F": 1, "I": -1, "B": -1, "W": 0}[part.kind] for part in parts))


def test_activations_live_from_their_forward_to_their_input_gradient(pool4: WorkerPool) -> None:
    short, long = pool4.run(watch, 8), pool4.run(watch, 32)
    for few, many in zip(short, long, strict=True):
        for found in (few, many):
            assert found["graphs"] == found["planned"] <= 5, "P + 1"
            assert found["tensors"] <= found["planned"] + 1, "what was received, and the output until it is sent"
            assert (found["left"], found["queue"]) == ((0, 0, 0), [])
        assert many["messages"] <= few["messages"] + 2 <= 10, "four times the micro-batches, no more messages"


# -- order


def recorded(job: Job) -> list[dict[str, Any]]:
    engine = build(job)
    data = batches(engine, job)
    found = []
    for record in (False, True, False):
        if record:
            engine.record_next_batch()
        loss = float(engine.train_batch(data))
        found.append({"loss": loss, "timeline": engine.timeline, "plan": engine.plan()})
    return found


@pytest.mark.parametrize("stages, micro_batches", [(2, 6), (4, 2), (4, 10)])
def test_what_ran_is_what_was_planned(pools: dict[int, WorkerPool], stages: int, micro_batches: int) -> None:
    job = Job(generic.drops, stages, micro_batches=micro_batches)
    for first, second, third in pools[stages].run(recorded, job):
        assert first["timeline"] is None
        timeline, plan = second["timeline"], second["plan"]
        assert third["timeline"] is timeline
        for rank, spans in enumerate(timeline.ranks):
            assert [span.instruction for span in spans] == plan.compute(rank)
            assert all(a.start <= a.end <= b.start for a, b in itertools.pairwise(spans))
        assert timeline.start == 0
        losses = [first["loss"], second["loss"], third["loss"]]
        assert losses == pytest.approx(expected(replace(job, stages=2, zero=0))["losses"], rel=1e-5)
