"""DualPipe (DeepSeek-V3 report, section 3.2.1): micro-batches enter from both ends, and pairs hide the communication.

DualPipeV cuts it in the middle: the ranks of one half run both, as two halves of the model on the way there and back.

Rank r holds stage r of direction 0 and stage P-1-r of direction 1, so ranks r and P-1-r hold the same two stages. With
F = I the middle ranks idle (P/2-1)(FB+B-3W), the outer ones less if pairs gain something, and every rank holds P+1
activations at its peak, whatever m. The order is valid for even m >= 2P-2; `bidirectional` serves the smaller ones.
"""

from __future__ import annotations

from collections import deque

from megatron_ext.parallel.placement import bidirectional, wave
from megatron_ext.pipeline.instructions import Compute, ComputeKind, Pair, Plan


def dualpipe(stages: int, micro_batches: int) -> Plan:
    """The plan for P = `stages` (even) and m = `micro_batches` (even, >= 2P-2) of both directions together."""
    assert stages % 2 == 0 and micro_batches % 2 == 0 and micro_batches >= 2 * stages - 2
    orders = []
    for rank in range(stages):
        # Phase 0 is the direction whose data enters on the rank's own side.
        places = [(0, rank), (1, stages - 1 - rank)]
        depth = min(rank, stages - 1 - rank)
        orders.append(_eight_steps(_Recorder(places[:: 1 if rank == depth else -1]), depth, stages, micro_batches // 2))
    limit = min(stages + 1, micro_batches)
    return Plan.from_compute("dualpipe", bidirectional(stages), micro_batches, orders, limit, stages // 2)


def dualpipev(stages: int, micro_batches: int) -> Plan:
    """The plan for P = `stages` and any m = `micro_batches`: half of DualPipe on 2P ranks, bent into a V."""
    orders = []
    for rank in range(stages):
        record = _Recorder([(0, rank), (0, 2 * stages - 1 - rank)], micro_batches)
        # Below 2P-1 micro-batches: the order for 2P-1, without the surplus.
        orders.append(_eight_steps(record, rank, 2 * stages, max(micro_batches, 2 * stages - 1)))
    limit = min(stages + 0.5, micro_batches)
    return Plan.from_compute("dualpipev", wave(stages), micro_batches, orders, limit, stages)


class _Recorder:
    """Writes down one rank's order.

    Args:
        places: (direction, stage) of the rank's phases 0 and 1.
        micro_batches: of a direction, if the order is made for more.
    """

    def __init__(self, places: list[tuple[int, int]], micro_batches: int | None = None):
        self.places = places
        self.micro_batches = micro_batches
        self.forwards = [0, 0]  # done, by phase
        self.backwards = [0, 0]
        self.waiting: deque[Compute] = deque()
        self.order: list[Compute | Pair] = []

    def _next(self, kind: ComputeKind, phase: int) -> Compute:
        done = self.forwards if kind == "F" else self.backwards
        compute = Compute(kind, *self.places[phase], done[phase])
        done[phase] += 1
        return compute

    def _add(self, *parts: Compute) -> None:
        real = [part for part in parts if self.micro_batches is None or part.micro_batch < self.micro_batches]
        self.order += [Pair(*real)] if len(real) == 2 else real

    def forward(self, phase: int) -> None:
        self._add(self._next("F", phase))

    def backward(self, phase: int) -> None:
        self._add(self._next("B", phase))

    def input_grad(self, phase: int) -> None:
        done = self._next("I", phase)
        self._add(done)
        self.waiting.append(done)

    def weight_grad(self) -> None:
        self._add(self.waiting.popleft()._replace(kind="W"))

    def pair(self, forward: int, backward: int) -> None:
        self._add(self._next("F", forward), self._next("B", backward))


def _eight_steps(record: _Recorder, depth: int, stages: int, count: int) -> list[Compute | Pair]:
    """The order of the rank `depth` ranks from the end, for `count` micro-batches per direction (figure 5)."""
    outer = stages // 2 - 1 - depth  # how many ranks lie between this one and the middle
    for _ in range(2 * outer):  # 1: fill
        record.forward(0)
    for _ in range(depth + 1):  # 2
        record.forward(0)
        record.forward(1)
    for _ in range(outer):  # 3: the first backwards arrive; W at once, its memory is needed
        record.input_grad(1)
        record.weight_grad()
        record.forward(1)
    for index in range(count - stages + depth + 1):  # 4: the steady state
        if index == 0 and outer == 0:
            record.forward(0)  # the middle ranks have no gradient yet that a pair would not delay
            record.backward(1)
        else:
            record.pair(0, 1)
        record.pair(1, 0)
    for _ in range(outer):  # 5
        record.backward(1)
        record.pair(1, 0)
    for index in range(2 * (depth + 1)):  # 6: drain; from the second half on only the gradients that others wait for
        phase = 1 - index % 2
        if index > depth:
            record.input_grad(phase)
        else:
            record.backward(phase)
    for _ in range(outer):  # 7
        record.weight_grad()
        record.input_grad(0)
    for _ in range(depth + 1):  # 8
        record.weight_grad()
    return record.order
