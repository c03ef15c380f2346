"""The data of a step: buffers that are used again, shards that are the same, batches that are none."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import generic
from tests.distributed.generic import Job, batches, build
from tests.distributed.pool import WorkerPool


def warnings_of(distinct: bool) -> list[str]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("megatron_ext")
    log.addHandler(handler)
    try:
        job = Job(generic.drops, 2, steps=2)
        engine = build(job)
        data = batches(engine, job) if distinct else (generic.text(i // 2, i % 2) for i in range(100))
        for _ in range(2):
            engine.train_batch(data)
    finally:
        log.removeHandler(handler)
    return [m for m in messages if "identical" in m]


def test_reading_the_same_data_twice_is_said_once(pool2: WorkerPool) -> None:
    first, second = pool2.run(warnings_of, False)
    assert len(first) == 1 and "data shards 0 and 1 of 2 read identical first batches" in first[0]
    assert second == []
    assert pool2.run(warnings_of, True) == [[], []]


def reused_buffer() -> list[float]:
    """An iterator that fills the same tensors anew for every batch."""
    job = Job(generic.drops, 2)
    engine = build(job)

    def data() -> Iterator[Any]:
        tokens, labels = torch.empty(2, 5, dtype=torch.int64), torch.empty(2, 5, dtype=torch.int64)
        for fresh in batches(engine, job):
            tokens.copy_(fresh[0][:, :1].expand(2, 5))
            labels.copy_(fresh[1][:, :1].expand(2, 5))
            yield tokens, labels

    stream = data()
    return [float(engine.train_batch(stream)) for _ in range(2)]


def wide(step: int, number: int) -> tuple[Tensor, Tensor]:
    tokens, labels = generic.text(step, number)
    return tokens[:, :1].expand(2, 5).clone(), labels[:, :1].expand(2, 5).clone()


def test_an_iterator_may_reuse_its_buffers(pool2: WorkerPool) -> None:
    found = pool2.run(reused_buffer)[0]
    assert found == pytest.approx(generic.reference(Job(generic.drops, data=wide, steps=2))["losses"], rel=1e-5)


def refused(kind: str) -> str:
    job = Job(generic.drops, 2)
    engine = build(job)
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    bad = {"ended": [], "three": [(tokens, tokens, tokens)], "single": [tokens], "dict": [({"x": tokens}, tokens)],
           "none": [(tokens, None)]}[kind]
    try:
        engine.train_batch(iter(bad))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize("kind, text", [
    ("ended", "BatchError: the data iterator ended at micro-batch 0 of 2"),
    ("three", "BatchError: a batch must be (inputs, labels), not tuple of 3"),
    ("single", "BatchError: a batch must be (inputs, labels), not Tensor"),
    ("dict", "BatchError: a batch must hold tensors or tuples of tensors, not dict"),
    ("none", "BatchError: a batch must hold tensors or tuples of tensors, not NoneType"),
])
def test_unusable_data(pool2: WorkerPool, kind: str, text: str) -> None:
    assert all(found.startswith(text) for found in pool2.run(refused, kind))
