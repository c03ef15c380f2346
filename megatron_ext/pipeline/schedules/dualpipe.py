"""DualPipe (DeepSeek-V3 report, section 3.2.1): micro-batches enter from both ends, and pairs hide the communication.

Rank r holds stage r of direction 0 and stage P-1-r of direction 1, so ranks r and P-1-r hold the same two stages. With
F = I the middle ranks idle (P/2-1)(FB+B-3W), the outer ones less if pairs gain something, and every rank holds P+1
activations at its peak, whatever m. The order is valid for even m >= 2P-2; `bidirectional` serves the smaller ones.
"""

from __future__ import annotations

from collections import deque

from megatron_ext.pipeline.instructions import Compute, ComputeKind, Pair, Plan


def placement(stages: int) -> list[list[int]]:
    """For each direction the list stage -> rank."""
    return [list(range(stages)), list(range(stages))[::-1]]


def dualpipe(stages: int, micro_batches: int) -> Plan:
    """The plan for P = `stages` (even) and m = `micro_batches` (even, >= 2P-2) of both directions together."""
    assert stages % 2 == 0 and micro_batches % 2 == 0 and micro_batches >= 2 * stages - 2
    ranks = [_eight_steps(rank, stages, micro_batches // 2) for rank in range(stages)]
    return Plan.from_compute(
        "dualpipe",
        placement(stages),
        micro_batches,
        ranks,
        activation_limit=stages + 1,
        weight_grad_limit=stages // 2,
    )


class _Recorder:
    """Writes down one rank's order; its phase 0 is the direction whose data enters on the rank's own side."""

    def __init__(self, rank: int, stages: int):
        own = 0 if rank < stages // 2 else 1
        self.directions = (own, 1 - own)
        self.stage = (rank, stages - 1 - rank)  # by direction
        self.forwards = [0, 0]  # micro-batches done, by direction
        self.backwards = [0, 0]
        self.waiting: deque[Compute] = deque()
        self.order: list[Compute | Pair] = []

    def _next(self, kind: ComputeKind, phase: int) -> Compute:
        direction = self.directions[phase]
        done = self.forwards if kind == "F" else self.backwards
        compute = Compute(kind, direction, self.stage[direction], done[direction])
        done[direction] += 1
        return compute

    def forward(self, phase: int) -> None:
        self.order.append(self._next("F", phase))

    def backward(self, phase: int) -> None:
        self.order.append(self._next("B", phase))

    def input_grad(self, phase: int) -> None:
        self.order.append(self._next("I", phase))
        self.waiting.append(self.order[-1].parts[0])

    def weight_grad(self) -> None:
        done = self.waiting.popleft()
        self.order.append(Compute("W", done.direction, done.stage, done.micro_batch))

    def pair(self, forward: int, backward: int) -> None:
        self.order.append(Pair(self._next("F", forward), self._next("B", backward)))


def _eight_steps(rank: int, stages: int, count: int) -> list[Compute | Pair]:
    """The order of one rank for `count` micro-batches per direction, step by step as the report's figure 5 shows it."""
    half, depth = stages // 2, min(rank, stages - 1 - rank)
    outer = half - 1 - depth  # how many ranks lie between this one and the middle
    record = _Recorder(rank, stages)
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
