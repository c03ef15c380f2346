"""Random numbers named by what is computed: the same dropout in every layout, and the user's own streams left alone."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_ext.pipeline.random import RandomKey, mix, preserved_generators
from tests.distributed import generic
from tests.distributed.generic import Job, batches, build
from tests.distributed.pool import WorkerPool


def test_seeds_are_those_of_earlier_versions() -> None:
    """A run that resumes must go on with the numbers it began with."""
    assert mix(0) == 8147104208329303767
    assert mix(1234, 5, 6, 7) == 2957206559485387574


@given(st.lists(st.integers(-2**40, 2**40), min_size=1, max_size=5), st.integers(0, 4), st.integers(1, 2**30))
def test_every_number_and_its_place_matter(numbers: list[int], place: int, more: int) -> None:
    place %= len(numbers)
    other = [n + more * (i == place) for i, n in enumerate(numbers)]
    assert mix(*numbers) != mix(*other)
    assert mix(*numbers) != mix(*numbers, 0)
    assert 0 <= mix(*numbers) < 2**63
    if numbers != numbers[::-1]:
        assert mix(*numbers) != mix(*numbers[::-1])


def drawn(key: RandomKey, layer: int) -> tuple[float, ...]:
    key.seed_layer(layer)
    return tuple(torch.rand(3).tolist())


def test_a_key_names_its_numbers() -> None:
    key = RandomKey(seed=1, step=2, micro_batch=3)
    torch.rand(7)
    first = drawn(key, 4)
    assert drawn(RandomKey(1, 2, 3), 4) == first
    others = [drawn(replace(key, **change), 4) for change in ({"seed": 2}, {"step": 3}, {"micro_batch": 4})]
    assert len({first, drawn(key, 5), *others}) == 5


def test_generators_are_preserved_whatever_happens() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with pytest.raises(KeyError), preserved_generators(torch.device("cpu")):
        drawn(RandomKey(1, 2, 3), 4)
        raise KeyError
    assert torch.get_rng_state().equal(state)


# -- in the engine

def same_tokens(step: int, number: int) -> tuple[Tensor, Tensor]:
    return torch.full((2, 6), 3), torch.full((2, 6), 4)


JOB = Job(generic.drops, data=same_tokens)
LAYOUTS = {
    "two stages": (2, JOB), "two stages, twice": (4, replace(JOB, micro_batches=2)),
    "four stages": (4, replace(JOB, stages=4)), "recomputed": (2, replace(JOB, interval=4)),
}


def masks(job: Job) -> list[list[Any]]:
    """Per step the (layer, mask) of every dropout on this rank, recomputed ones too."""
    engine = build(job)
    seen: list[Any] = []
    for name, module in engine.module.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(
                lambda module, x, y, name=name: seen.append((name, tuple((y == 0).flatten().tolist()))))
    data = batches(engine, job)
    steps = []
    for _ in range(2):
        engine.train_batch(data)
        steps.append(seen.copy())
        seen.clear()
    return steps


def test_dropout_is_the_same_in_every_layout(pool2: WorkerPool, pool4: WorkerPool) -> None:
    pools = {2: pool2, 4: pool4}
    found = {}
    for name, (world, job) in LAYOUTS.items():
        ranks = pools[world].run(masks, job)
        found[name] = [[mask for rank in ranks for mask in rank[step]] for step in range(2)]
    plain = found["two stages"]
    assert [len(step) for step in plain] == [2 * 4] * 2, "two layers, four micro-batches"
    assert len(set(plain[0] + plain[1])) == 16, "no two alike"
    for name, steps in found.items():
        for step, wanted in zip(steps, plain, strict=True):
            assert set(step) == set(wanted), name
            assert len(step) == len(wanted) * (2 if name == "recomputed" else 1)


def untouched() -> list[bool]:
    mine = torch.Generator().manual_seed(3)

    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), mine.get_state().tolist(), random.getstate(),
                numpy.random.get_state()[1].tolist()]

    torch.manual_seed(99)
    before = states()
    job = Job(generic.drops, 2, interval=1)
    engine = build(job)
    found = [states() == before]
    torch.manual_seed(98)
    before = states()
    engine.train_batch(batches(engine, job))
    found.append(states() == before)
    engine.eval_batch(batches(engine, job))
    found.append(states() == before)
    return found


def test_the_users_generators_are_untouched(pool2: WorkerPool) -> None:
    """By building a model, by a step and by an evaluation."""
    assert pool2.run(untouched) == [[True] * 3] * 2
