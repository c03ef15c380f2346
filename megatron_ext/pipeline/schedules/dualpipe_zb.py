"""DualPipe-ZB: DualPipe's order and memory, with weight gradients kept for the drain.

Backwards that are not in a pair, and the backwards of the last k pairs of each rank, do the input gradient only. Their
W's fill the gaps and the drain (`fill`). With F = I = W the bubble falls from DualPipe's to its start-up, (P/2-1)F.
k and how far a W may overrun a gap are chosen by timing all of them with the given times.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ext.pipeline.instructions import Compute, Pair
from megatron_ext.pipeline.schedules.dualpipe import dualpipe
from megatron_ext.pipeline.schedules.fill import fill
from megatron_ext.pipeline.schedules.greedy import Candidate, Problem
from megatron_ext.pipeline.simulator import Times

OVERRUNS = (0.0, 0.3, 0.6, 1.0)


def dualpipe_zb(problem: Problem, times: Times) -> Iterator[Candidate]:
    """The candidates on DualPipe's placement, for m even and at least 2P-2; none if DualPipe's P+1 activations are too
    many.
    """
    plan = dualpipe(problem.ranks, sum(problem.counts))
    base = [plan.compute(rank) for rank in range(problem.ranks)]
    for kept in range(problem.ranks + 2):
        order = [_bank(rank, kept) for rank in base]
        for overrun in OVERRUNS:
            found = fill(problem, order, times, overrun)
            if found is not None:
                yield found


def _bank(order: list[Compute | Pair], kept: int) -> list[Compute | Pair]:
    """The order with input gradients only where a backward is alone or in one of the last `kept` pairs."""
    pairs = sum(isinstance(instruction, Pair) for instruction in order)
    out: list[Compute | Pair] = []
    for instruction in order:
        if isinstance(instruction, Pair):
            pairs -= 1
            if pairs < kept:
                instruction = Pair(instruction.forward, instruction.backward._replace(kind="I"))
        elif instruction.kind == "B":
            instruction = instruction._replace(kind="I")
        out.append(instruction)
    return out
