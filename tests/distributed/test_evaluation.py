"""eval_batch: forward only, over both directions, the same value on every rank and no trace in the training."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed import equality, generic
from tests.distributed.generic import Job, Plain, batches, build
from tests.distributed.pool import WorkerPool


def evaluate() -> dict[str, Any]:
    job = Job(stages=4, micro_batches=4)
    engine = build(job)
    data = batches(engine, job)
    found: dict[str, Any] = {"before": float(engine.train_batch(data))}
    state = torch.get_rng_state()

    def fresh() -> Iterator[Any]:
        return batches(engine, job, step=50)

    found["loss"] = engine.eval_batch(fresh())
    found["again"], found["logits"] = engine.eval_batch(fresh(), return_logits=True)
    found["each"] = engine.eval_batch(fresh(), reduce_output=None)
    found["three"] = engine.eval_batch(itertools.chain(*([b] for b in itertools.islice(fresh(), 2)), [
        job.data(51, engine.data_parallel_rank)]), num_micro_batches=3, reduce_output=None)
    found["only logits"] = engine.eval_batch(fresh(), compute_loss=False)
    found["rng"] = torch.get_rng_state().equal(state)
    found["training"] = engine.module.training
    found["after"] = float(engine.train_batch(data))
    return found


def test_evaluation(pool4: WorkerPool) -> None:
    """The same on every rank and as in one process; it leaves no trace in the training."""
    found = pool4.run(evaluate)
    job = Job(micro_batches=4, zero=0, steps=1)
    plain = Plain(job)
    plain.root.load_state_dict({n.removeprefix("layers."): v for n, v in generic.reference(job)["state"].items()})
    plain.root.eval()
    for layer in plain.layers:  # modules without parameters, too
        layer.eval() if isinstance(layer, nn.Module) else None
    with torch.no_grad():
        each = torch.stack([plain.loss(50, number) for number in range(4)])
        last = torch.stack([plain.loss(51, number) for number in range(2)])
        logits = [plain.run(50, number, job.data(50, number)[0]) for number in range(4)]
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    for rank, f in enumerate(found):
        assert f["loss"].equal(found[0]["loss"]) and f["again"].equal(f["loss"])
        close(f["loss"], each.mean())
        close(f["each"], each)
        close(f["three"], torch.cat([each, last]))
        assert f["rng"] and f["training"]
        if rank in (1, 2):
            assert f["logits"] is None and f["only logits"] is None
        else:  # direction 0 ends on rank 3
            wanted = logits[0::2] if rank == 3 else logits[1::2]
            for got, only, want in zip(f["logits"], f["only logits"], wanted, strict=True):
                close(got, want)
                assert only.equal(got)
    assert [found[0]["before"], found[0]["after"]] == pytest.approx(
        generic.reference(replace(job, steps=2))["losses"], rel=1e-5)


def counts_of_evaluation() -> list[Any]:
    case = equality.Case(steps=2)
    engine = equality.build(case)
    data = equality.batches(engine, case)
    engine.train_batch(data)
    before = {name: counts.clone() for name, counts in engine.expert_counts.items()}
    biases = [router.e_score_correction_bias.clone() for router in engine.routers.values()]
    engine.eval_batch(equality.batches(engine, case, 9))
    return [all(before[n].equal(c) for n, c in engine.expert_counts.items()),
            all(b.equal(r.e_score_correction_bias) for b, r in zip(biases, engine.routers.values(), strict=True)),
            [int(r.tokens_per_expert.sum()) for r in engine.routers.values()],
            [int(c.sum()) for c in engine.expert_counts.values()]]


def test_evaluation_counts_no_tokens(pool2: WorkerPool) -> None:
    for same_counts, same_bias, waiting, counted in pool2.run(counts_of_evaluation):
        assert same_counts and same_bias
        assert waiting == [0] * 3
        assert counted == [4 * 8 * 2] * 3, "4 micro-batches of 8 tokens to 2 experts each"
