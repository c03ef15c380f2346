"""Puts the weight gradients of an order where its ranks would wait anyway.

The order of forwards, backwards and pairs on every rank stays as it is. The W's of its input gradients (a backward "I",
alone or in a pair) run, oldest first, in the gaps before a computation whose input is late, as soon as the memory limit
wants an activation back, and at the end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import inf

from megatron_ext.pipeline.instructions import Compute, Pair
from megatron_ext.pipeline.schedules.greedy import Candidate, Order, Problem
from megatron_ext.pipeline.simulator import Durations, Times


def fill(
    problem: Problem, order: Sequence[Sequence[Compute | Pair]], times: Times, overrun: float | None
) -> Candidate | None:
    """(makespan, order with W's), or None if the order cannot run within the memory limit.

    Args:
        problem: placement, counts and limit; its own times do not matter.
        order: W's in it are moved.
        times: with the latency of messages.
        overrun: a W may delay the next computation by this share of its length. None leaves all W's where they are, and
            only tells how long the order then takes.
    """
    run = _Run(problem, order, times, overrun)
    waiting = set(range(problem.ranks))
    while waiting:
        moved = {rank for rank in waiting if run.advance(rank)}
        if not moved:
            return None
        waiting = {rank for rank in waiting if run.position[rank] < len(run.order[rank])}
    for rank in range(problem.ranks):
        run.weight_grads(rank, len(run.bank[rank]))
    return max(run.clock), run.out


class _Run:
    """How far every rank is.

    Attributes:
        arrival: (is it a gradient, direction, stage, micro-batch) -> when this input is there.
    """

    def __init__(
        self, problem: Problem, order: Sequence[Sequence[Compute | Pair]], times: Times, overrun: float | None
    ):
        self.problem = problem
        self.overrun = -inf if overrun is None else overrun
        self.order = order if overrun is None else [[i for i in rank if i.kind != "W"] for rank in order]
        self.durations = Durations(times, problem.stages, problem.chunks)
        self.latency = times.message
        self.arrival: dict[tuple[bool, int, int, int], float] = {
            (False, direction, 0, k): 0.0 for direction, count in enumerate(problem.counts) for k in range(count)
        }
        ranks = range(problem.ranks)
        self.position = [0 for _ in ranks]
        self.clock = [0.0 for _ in ranks]
        self.held = [0 for _ in ranks]
        self.bank: list[deque[Compute]] = [deque() for _ in ranks]
        self.out: Order = [[] for _ in ranks]

    def advance(self, rank: int) -> bool:
        """Runs a rank until an input is missing or memory is; whether it ran anything."""
        order, out, arrival, bank, slots = (
            self.order[rank], self.out[rank], self.arrival, self.bank[rank], self.problem.slots)
        weight_grad, first = self.durations.alone["W"], self.position[rank]
        for index in range(first, len(order)):
            instruction = order[index]
            if instruction.kind == "W":
                self.weight_grads(rank, 1)
                continue
            start = now = self.clock[rank]
            for kind, direction, stage, micro_batch in instruction.parts:
                there = arrival.get((kind != "F", direction, stage, micro_batch))
                if there is None:
                    self.position[rank] = index
                    return index > first
                start = max(start, there)
            while bank and now + (length := weight_grad[bank[0].stage]) <= start + self.overrun * length + 1e-9:
                self.weight_grads(rank, 1)
                now = self.clock[rank]
            if instruction.parts[0].kind == "F":
                over = self.held[rank] + 1 - slots
                if over > len(bank):
                    self.position[rank] = index
                    return False
                self.weight_grads(rank, max(0, over))
            now = self.clock[rank] = max(start, self.clock[rank]) + self.durations.of(instruction)
            out.append(instruction)
            for part in instruction.parts:
                self._done(rank, part, now)
        self.position[rank] = len(order)
        return True

    def weight_grads(self, rank: int, count: int) -> None:
        for _ in range(count):
            done = self.bank[rank].popleft()
            self.out[rank].append(done._replace(kind="W"))
            self.clock[rank] += self.durations.alone["W"][done.stage]
            self.held[rank] -= 1

    def _done(self, rank: int, part: Compute, now: float) -> None:
        kind, direction, stage, micro_batch = part
        forward = kind == "F"
        if forward:
            self.held[rank] += 1
        elif kind == "I":
            self.bank[rank].append(part)
        else:
            self.held[rank] -= 1
        target = stage + 1 if forward else stage - 1
        if 0 <= target < self.problem.stages:
            if self.problem.placement[direction][target] != rank:
                now += self.latency
            self.arrival[not forward, direction, target, micro_batch] = now
        elif forward:
            self.arrival[True, direction, stage, micro_batch] = now
