"""List scheduling: an order of computations for any placement, times and memory limit.

Time runs forward. A rank that becomes free takes the best computation that is ready: a forward and an input gradient
that are ready together make a pair; one that is alone starts, unless its partner is known to come soon; the gradients
of the weights wait in a bank and fill the gaps. An arrival is known from the moment when the computation that makes it
starts. No rank ever holds more activations than its limit. A `Rule` says how to decide where several things make
sense; no rule is the best for all sizes and times, so `searched` tries many.

The clock counts integer ticks, so that ties do not hang on rounding and the same arguments give the same order.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf
from typing import NamedTuple

from megatron_ext.parallel.placement import Placement
from megatron_ext.pipeline.instructions import Compute, Pair
from megatron_ext.pipeline.simulator import Durations, Times

Order = list[list[Compute | Pair]]
Candidate = tuple[float, Order]  # its makespan, and for each rank its computations

TICKS = 1000  # per computation of average length


@dataclass(frozen=True)
class Rule:
    """How to decide; in sizes that depend neither on P nor on the number of chunks nor on the unit of time.

    Attributes:
        forward_depth, forward_age: of several ready forwards the one with the highest forward_depth x (stage / P) minus
            forward_age x (micro-batch x directions / P) runs, in quarters: depth > 0 prefers the deepest stage, age > 0
            the oldest micro-batch.
        backward_depth, backward_age: the same for input gradients, whose depth counts from the last stage.
        reserve: a forward of a chunk leaves this many times P activations free for every chunk after it.
        wait_forward: a lone forward waits up to this many chunk forwards for an input gradient that is known to come.
        wait_backward: a lone input gradient waits up to this many chunk forwards for a forward.
        overrun: a W may delay a known arrival by this share of its length.
        first_split, last_split: the pairs of a rank from this number x P on, in micro-batches, and before that one
            leave their W for later; the others run a full backward.
        pair_bank: they do so while less than this x P micro-batches of W are banked.
        bank: with more micro-batches of W than this banked, a W runs before a lone input gradient.
        lead: with more than lead x P micro-batches of forwards ahead of the backwards, a W runs before a lone forward.
        window: at most this x its share of the memory limit micro-batches of a direction are under way; 1 never gets
            stuck.
        pairs: whether there are pairs at all; else the input gradient runs first.
    """

    forward_depth: int = 0
    forward_age: int = 4
    backward_depth: int = 0
    backward_age: int = 4
    reserve: float = 0.0
    wait_forward: float = 0.0
    wait_backward: float = 0.0
    overrun: float = 0.5
    first_split: float = 0.0
    last_split: float = inf
    pair_bank: float = inf
    bank: float = inf
    lead: float = inf
    window: float = inf
    pairs: bool = True


class _Ready(NamedTuple):
    """A computation whose input has arrived, or is known to arrive."""

    arrival: int
    priority: int
    direction: int
    stage: int
    micro_batch: int


class _Rank:
    """What a rank has done and holds."""

    __slots__ = ("ahead", "backwards", "bank", "began", "forwards", "free", "held", "index", "order", "pairs",
                 "to_come", "wake")

    def __init__(self, index: int, to_come: int):
        self.index = index
        self.forwards: list[_Ready] = []
        self.backwards: list[_Ready] = []
        self.bank: deque[Compute] = deque()
        self.order: list[Compute | Pair] = []
        self.to_come = to_come  # forwards
        self.ahead = 0  # forwards minus backwards
        self.began = False  # its backwards
        self.held = self.pairs = self.free = 0
        self.wake = inf  # when to look again


class Problem:
    """Sizes and times, prepared for many runs with different rules.

    Args:
        placement: for each direction the list stage -> rank.
        counts: micro-batches of each direction.
        times: what to be short at, with the latency of messages that the order is to reckon with.
        limit: activations a rank may hold, in its whole share of the model for one micro-batch.
    """

    def __init__(self, placement: Placement, counts: list[int], times: Times, limit: float):
        self.placement, self.counts, self.limit = placement, counts, limit
        self.ranks = max(placement[0]) + 1
        self.stages = len(placement[0])
        self.chunks = self.stages // self.ranks
        self.slots = int(limit * self.chunks + 1e-9)
        mean = (times.forward + times.input_grad + times.weight_grad) / 3
        self.unit = TICKS * self.chunks / mean
        durations = Durations(times, self.stages, self.chunks)
        self.alone = {kind: [round(x * self.unit) for x in durations.alone[kind]] for kind in "FIW"}
        self.forward_in_pair = [x * self.unit for x in durations.forward_in_pair]
        self.backward_in_pair = {k: [x * self.unit for x in durations.backward_in_pair[k]] for k in "IB"}
        self.latency = round(times.message * self.unit)
        self.mean_forward = times.forward * TICKS / mean


def list_schedule(problem: Problem, rule: Rule) -> Candidate | None:
    """(makespan in the unit of the times, order per rank), or None if the rule gets stuck."""
    run = _Run(problem, rule)
    if not run.finish():
        return None
    return max(rank.free for rank in run.ranks) / problem.unit, [rank.order for rank in run.ranks]


class _Run:
    def __init__(self, problem: Problem, rule: Rule):
        self.problem, self.rule = problem, rule
        P, v, directions = problem.ranks, problem.chunks, len(problem.placement)
        self.wait_forward = rule.wait_forward * problem.mean_forward
        self.wait_backward = rule.wait_backward * problem.mean_forward
        self.reserve = max(1, round(rule.reserve * P)) if rule.reserve else 0
        self.first_split, self.last_split = rule.first_split * P * v, rule.last_split * P * v
        self.pair_bank = rule.pair_bank * P * v
        self.bank = max(1, round(rule.bank * v)) if rule.bank < inf else inf
        self.lead = max(1, round(rule.lead * P * v)) if rule.lead < inf else inf
        self.window = max(1, int(problem.limit * rule.window / directions)) if rule.window < inf else inf
        self.forward_age, self.backward_age = rule.forward_age * directions, rule.backward_age * directions
        self.ranks = [_Rank(rank, v * sum(problem.counts)) for rank in range(P)]
        self.calls: list[tuple[float, int]] = []  # a heap of (time, rank)
        self.entered = [0] * directions
        self.under_way = [0] * directions
        self.may_enter = [0] * directions  # when the next micro-batch of a direction may enter at the earliest
        for direction in range(directions):
            self._enter(direction, 0, 0)

    def finish(self) -> bool:
        """Runs until nothing moves; whether everything is done."""
        while self.calls:
            time, index = heappop(self.calls)
            rank = self.ranks[index]
            if time == rank.wake:
                rank.wake = inf
                self._look(rank, max(int(time), rank.free))
        return not any(rank.to_come or rank.ahead or rank.bank for rank in self.ranks)

    def _call(self, rank: _Rank, time: float) -> None:
        """Has a rank look again at this time."""
        rank.wake = time
        heappush(self.calls, (time, rank.index))

    def _look(self, rank: _Rank, now: int) -> None:
        """A free rank starts something or waits."""
        forward = backward = None
        next_forward = next_backward = later = inf
        full = False
        room = self.problem.slots - rank.held - 1
        for ready in rank.forwards:
            over = self.reserve * (self.problem.chunks - 1 - ready.stage // self.problem.ranks) - room
            if ready.arrival > now:
                later = min(later, ready.arrival)
                if over <= 0:
                    next_forward = min(next_forward, ready.arrival)
            elif over > 0:
                full = full or over <= len(rank.bank)
            elif forward is None or ready.priority > forward.priority:
                forward = ready
        for ready in rank.backwards:
            if ready.arrival > now:
                next_backward = min(next_backward, ready.arrival)
            elif backward is None or ready.priority > backward.priority:
                backward = ready

        banked = len(rank.bank)
        if backward:
            if forward:
                if self.rule.pairs:
                    return self._pair(rank, forward, backward, now)
            elif full and banked:
                return self._weight_grad(rank, now)
            elif next_forward - now <= self.wait_backward:
                return self._fill(rank, now, next_forward, min(later, next_backward))
            elif rank.to_come and banked > self.bank:
                return self._weight_grad(rank, now)
            return self._backward(rank, backward, now)
        if forward:
            if next_backward - now <= self.wait_forward:
                return self._fill(rank, now, next_backward, min(later, next_backward))
            if rank.began and banked and rank.ahead > self.lead:
                return self._weight_grad(rank, now)
            return self._forward(rank, forward, now)
        return self._fill(rank, now, min(next_forward, next_backward), min(later, next_backward))

    def _fill(self, rank: _Rank, now: int, arrival: float, later: float) -> None:
        """A W if it fits before the next arrival, else waits until then or for news."""
        if rank.bank:
            length = self.problem.alone["W"][rank.bank[0].stage]
            if now + length <= arrival + self.rule.overrun * length:
                return self._weight_grad(rank, now)
        if later < inf:
            self._call(rank, later)

    def _weight_grad(self, rank: _Rank, now: int) -> None:
        done = rank.bank.popleft()
        rank.held -= 1
        rank.order.append(Compute("W", done.direction, done.stage, done.micro_batch))
        self._busy(rank, now, self.problem.alone["W"][done.stage])

    def _forward(self, rank: _Rank, ready: _Ready, now: int) -> None:
        end = self._busy(rank, now, self.problem.alone["F"][ready.stage])
        rank.order.append(self._run_forward(rank, ready, now, end))

    def _backward(self, rank: _Rank, ready: _Ready, now: int) -> None:
        end = self._busy(rank, now, self.problem.alone["I"][ready.stage])
        done = self._run_backward(rank, ready, now, end)
        rank.bank.append(done)
        rank.order.append(done)

    def _pair(self, rank: _Rank, forward: _Ready, backward: _Ready, now: int) -> None:
        split = self.first_split <= rank.pairs < self.last_split and len(rank.bank) < self.pair_bank
        length = self.problem.forward_in_pair[forward.stage]
        length += self.problem.backward_in_pair["I" if split else "B"][backward.stage]
        end = self._busy(rank, now, round(length))
        first = self._run_forward(rank, forward, now, end)
        second = self._run_backward(rank, backward, now, end)
        rank.pairs += 1
        if split:
            rank.bank.append(second)
        else:
            second = second._replace(kind="B")
            rank.held -= 1
        rank.order.append(Pair(first, second))

    def _busy(self, rank: _Rank, now: int, length: int) -> int:
        rank.free = end = now + max(1, length)
        self._call(rank, end)
        return end

    def _run_forward(self, rank: _Rank, ready: _Ready, now: int, end: int) -> Compute:
        rank.forwards.remove(ready)
        rank.held += 1
        rank.ahead += 1
        rank.to_come -= 1
        _, _, direction, stage, micro_batch = ready
        if stage + 1 < self.problem.stages:
            self._deliver(False, direction, stage + 1, micro_batch, rank, now, end)
        else:
            self._deliver(True, direction, stage, micro_batch, rank, now, end)
        if stage == 0:
            self._enter(direction, now, end)
        return Compute("F", direction, stage, micro_batch)

    def _run_backward(self, rank: _Rank, ready: _Ready, now: int, end: int) -> Compute:
        rank.backwards.remove(ready)
        rank.ahead -= 1
        rank.began = True
        _, _, direction, stage, micro_batch = ready
        if stage:
            self._deliver(True, direction, stage - 1, micro_batch, rank, now, end)
        else:
            self.under_way[direction] -= 1
            if self.under_way[direction] == self.window - 1:
                self._enter(direction, now, end)
        return Compute("I", direction, stage, micro_batch)

    def _enter(self, direction: int, now: int, time: int) -> None:
        """The next micro-batch of a direction is ready from this time on, if the window has room."""
        self.may_enter[direction] = max(self.may_enter[direction], time)
        micro_batch = self.entered[direction]
        if micro_batch < self.problem.counts[direction] and self.under_way[direction] < self.window:
            self.entered[direction] += 1
            self.under_way[direction] += 1
            self._deliver(False, direction, 0, micro_batch, None, now, self.may_enter[direction])

    def _deliver(
        self, gradient: bool, direction: int, stage: int, micro_batch: int, source: _Rank | None, now: int, end: int
    ) -> None:
        """Makes an arrival known, and lets its rank reconsider if it is waiting."""
        rank = self.ranks[self.problem.placement[direction][stage]]
        arrival = end if source is None or source is rank else end + self.problem.latency
        if gradient:
            depth = self.problem.stages - 1 - stage
            priority = self.rule.backward_depth * depth - self.backward_age * micro_batch
            rank.backwards.append(_Ready(arrival, priority, direction, stage, micro_batch))
        else:
            priority = self.rule.forward_depth * stage - self.forward_age * micro_batch
            rank.forwards.append(_Ready(arrival, priority, direction, stage, micro_batch))
        if rank is not source and rank.free <= now < rank.wake:
            self._call(rank, now)
