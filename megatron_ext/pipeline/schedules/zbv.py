"""ZB-V (arXiv 2405.15362): one direction through 2P half-size stages laid out as a V, no bubble if F = I = W.

Rank r holds stage r on the way there (chunk 0) and stage 2P-1-r on the way back (chunk 1), so the first gradients come
back to the rank where they are needed first. It holds P activations at most, as 1F1B. Any m: the order for fewer than
2P-1 micro-batches is the one for 2P-1 without the surplus.
"""

from __future__ import annotations

from collections import deque

from megatron_ext.parallel.placement import wave
from megatron_ext.pipeline.instructions import Compute, ComputeKind, Pair, Plan


def zbv(stages: int, micro_batches: int) -> Plan:
    """The plan for P = `stages` and m = `micro_batches`."""
    orders = [_order(rank, stages, micro_batches) for rank in range(stages)]
    limit = min(stages, micro_batches)
    return Plan.from_compute("zbv", wave(stages), micro_batches, orders, limit, 2 * limit - 1)


class _Recorder:
    """Writes down one rank's order, without micro-batches that do not exist."""

    def __init__(self, rank: int, stages: int, micro_batches: int):
        self.stage = (rank, 2 * stages - 1 - rank)  # by chunk
        self.micro_batches = micro_batches
        self.forwards, self.backwards = [0, 0], [0, 0]  # done, by chunk
        self.waiting: tuple[deque[int], deque[int]] = (deque(), deque())
        self.order: list[Compute | Pair] = []

    def _add(self, kind: ComputeKind, chunk: int, micro_batch: int) -> None:
        if micro_batch < self.micro_batches:
            self.order.append(Compute(kind, 0, self.stage[chunk], micro_batch))

    def forward(self, chunk: int) -> None:
        self._add("F", chunk, self.forwards[chunk])
        self.forwards[chunk] += 1

    def input_grad(self, chunk: int) -> None:
        self._add("I", chunk, self.backwards[chunk])
        self.waiting[chunk].append(self.backwards[chunk])
        self.backwards[chunk] += 1

    def weight_grad(self, chunk: int) -> None:
        self._add("W", chunk, self.waiting[chunk].popleft())

    def backward(self, chunk: int) -> None:
        self.input_grad(chunk)
        self.weight_grad(chunk)


def _order(rank: int, stages: int, micro_batches: int) -> list[Compute | Pair]:
    count = max(2 * stages - 1, micro_batches)
    record = _Recorder(rank, stages, micro_batches)
    for _ in range(2 * (stages - rank) - 1):  # fill: there ...
        record.forward(0)
    for _ in range(rank):  # ... and back
        record.forward(1)
        record.forward(0)
    for _ in range(stages - rank):
        record.forward(1)
        record.backward(1)
    while record.forwards[0] < count or record.forwards[1] < count:  # steady
        if record.forwards[0] < count:
            record.forward(0)
        record.backward(0)
        record.forward(1)
        record.backward(1)
    for _ in range(rank):  # drain: first what others wait for
        record.input_grad(0)
        record.input_grad(1)
    for _ in range(stages - rank):
        record.input_grad(0)
        record.weight_grad(0)
    for chunk in (1, 0):
        while record.waiting[chunk]:
            record.weight_grad(chunk)
    return record.order
