"""The forward-only plan of eval_batch: every forward once, in an order that cannot stand still."""

from __future__ import annotations

import pytest

from megatron_ext.pipeline.evaluation import forward_only

BIDIRECTIONAL = [[0, 1, 2, 3], [3, 2, 1, 0]]
PLACEMENTS = {"one direction": ([[0, 1, 2, 3]], 4), "bidirectional": (BIDIRECTIONAL, 4), "pair": ([[0, 1], [1, 0]], 2),
              "two chunks": ([[*stages, *stages] for stages in BIDIRECTIONAL], 4)}


@pytest.mark.parametrize("micro_batches", [1, 2, 5, 8])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_every_forward_runs_once(name: str, micro_batches: int) -> None:
    placement, ranks = PLACEMENTS[name]
    plan = forward_only(placement, ranks, micro_batches)
    waiting = [plan.compute(rank) for rank in range(ranks)]
    ran: list[tuple[int, int, int]] = []
    while any(waiting):
        ready = [queue for queue in waiting if queue and (
            queue[0].stage == 0 or (queue[0].direction, queue[0].stage - 1, queue[0].micro_batch) in ran)]
        assert ready, f"stands still before {[str(queue[0]) for queue in waiting if queue]}"
        for queue in ready:
            done = queue.pop(0)
            ran.append((done.direction, done.stage, done.micro_batch))
    share = [micro_batches // len(placement) + (d < micro_batches % len(placement)) for d in range(len(placement))]
    assert share == [plan.micro_batches_of(d) for d in range(len(placement))]
    assert sorted(ran) == [(d, stage, k) for d, stages in enumerate(placement) for stage in range(len(stages))
                           for k in range(share[d])]
