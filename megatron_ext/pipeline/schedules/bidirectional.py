"""Bidirectional orders for few micro-batches: DualPipe's placement where its eight steps do not fit (m < 2P-2).

The order comes from greedy list scheduling: time runs forward, and a rank that becomes free takes the best computation
that is ready, oldest micro-batch first. A forward and a backward that are ready together make a pair. The gradients of
the weights wait in a bank and fill the gaps. No rank ever holds more activations than its limit, and every direction
keeps its micro-batches in order. Of the orders that a few rules give, the shortest is kept; the rules were found by
random search over P in 4..16. With F = I = W and pairs that gain nothing, orders made for these times reach the lower
bound 3 m F + (P/2-1) F from m = P on; orders made for any times stay below 1F1B and ZB-H1.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from math import inf

from megatron_ext.pipeline.instructions import Compute, Pair, Plan
from megatron_ext.pipeline.schedules.dualpipe import placement
from megatron_ext.pipeline.simulator import Times, simulate

Order = list[list[Compute | Pair]]

TICKS = 1000  # of the greedy's integer clock per forward of average length, so that ties do not hang on rounding
EXPECTED_PAIR = 0.8  # of F + I + W: how long a pair takes if nobody has measured it


@dataclass(frozen=True)
class _Rule:
    """How the greedy decides where more than one thing makes sense.

    Attributes:
        pairs: a ready F and a ready I run as a pair of F and I; else the I runs first.
        wait_forward: a lone F waits up to this many forwards for an I that is known to come.
        wait_backward: a lone I waits up to this many forwards for an F that is known to come.
        overrun: a W may delay a known arrival by this share of its length.
        bank: with more W's than this banked, a W runs before a lone I.
        lead: with more than lead x P forwards ahead of its backwards, a rank runs a W before a lone F.
    """

    pairs: bool
    wait_forward: float
    wait_backward: float
    overrun: float
    bank: float = inf
    lead: float = inf


_RULES = (
    _Rule(True, 0.5, 0.0, 0.5, bank=2),
    _Rule(False, 0.0, 0.2, 0.3, bank=2),
    _Rule(True, 0.4, 0.0, 0.5),
    _Rule(False, 0.8, 0.0, 0.3, lead=0.7),
    _Rule(False, 0.8, 0.4, 0.9, bank=1, lead=0.9),
    _Rule(True, 0.5, 0.0, 0.7, lead=0.9),
    _Rule(True, 0.4, 0.2, 0.7, bank=1),
)


def bidirectional(stages: int, micro_batches: int, times: Times | None = None, limit: int | None = None) -> Plan | None:
    """The shortest order found for P = `stages` (even) and m = `micro_batches` (even, of both directions together).

    Args:
        times: what to be short at; None: F = I = W, where pairs gain nothing and where they take 0.8 of the sum.
        limit: activations a rank may hold, at least 2; by default P+1 as DualPipe.

    Returns:
        None if no rule finds an order within the limit.
    """
    limit = stages + 1 if limit is None else limit
    goals = (times,) if times else (Times(), Times(pair=EXPECTED_PAIR * Times().full_pair))
    found = []
    for goal in goals:
        orders = [_Greedy(stages, micro_batches, goal, limit, rule).run() for rule in _RULES]
        finished = [order for order in orders if order is not None]
        if finished:
            found.append(min(finished, key=lambda order: order[0])[1])
    plans = [
        Plan.from_compute("dualpipe", placement(stages), micro_batches, order, limit, limit) for order in found
    ]
    return min(plans, key=lambda plan: sum(simulate(plan, goal).makespan for goal in goals), default=None)


@dataclass
class _Rank:
    """What one rank has done and holds; lists are by direction."""

    stage: tuple[int, int]
    forwards: list[int] = field(default_factory=lambda: [0, 0])
    backwards: list[int] = field(default_factory=lambda: [0, 0])
    bank: deque[Compute] = field(default_factory=deque)
    held: int = 0
    free: int = 0
    wake: float = 0  # when to look again
    order: list[Compute | Pair] = field(default_factory=list)


@dataclass
class _Ready:
    """The best forward and input gradient that could start now, and when the next known ones arrive."""

    forward: Compute | None = None
    backward: Compute | None = None
    next_forward: float = inf
    next_backward: float = inf
    full: bool = False  # a forward is there and the rank has no room for its activation


class _Greedy:
    def __init__(self, stages: int, micro_batches: int, times: Times, limit: int, rule: _Rule):
        unit = 3 * TICKS / (times.forward + times.input_grad + times.weight_grad)
        self.times = times
        self.unit = unit
        self.forward, self.weight_grad = round(times.forward * unit), round(times.weight_grad * unit)
        self.stages, self.count, self.limit, self.rule = stages, micro_batches // 2, limit, rule
        self.ranks = [_Rank((rank, stages - 1 - rank)) for rank in range(stages)]
        self.calls = [(0, rank) for rank in range(stages)]  # a heap of (time, rank)
        # (is it a gradient, direction, stage, micro-batch) -> when it is there
        self.arrival: dict[tuple[bool, int, int, int], float] = {
            (False, direction, 0, micro_batch): 0 for direction in (0, 1) for micro_batch in range(self.count)
        }

    def run(self) -> tuple[int, Order] | None:
        """(finish in ticks, order per rank), or None if the rule gets stuck."""
        while self.calls:
            wake, index = heappop(self.calls)
            rank = self.ranks[index]
            if wake != rank.wake:
                continue  # it was called again, for another time
            now = max(wake, rank.free)
            ready = self._ready(rank, now)
            choice = self._choose(rank, ready, now)
            if choice is not None:
                self._start(rank, choice, now)
            else:
                self._call(rank, min(ready.next_forward, ready.next_backward))
        if any(rank.bank or sum(rank.backwards) < 2 * self.count for rank in self.ranks):
            return None
        return max(rank.free for rank in self.ranks), [rank.order for rank in self.ranks]

    def _call(self, rank: _Rank, time: float) -> None:
        """Has a rank look again at this time, and no other."""
        rank.wake = time
        if time < inf:
            heappush(self.calls, (int(time), rank.stage[0]))

    def _ready(self, rank: _Rank, now: int) -> _Ready:
        ready = _Ready()
        for direction, stage in enumerate(rank.stage):
            micro_batch = rank.forwards[direction]
            time = self.arrival.get((False, direction, stage, micro_batch), inf)
            if rank.held >= self.limit:
                ready.full |= time <= now
            elif time > now:
                ready.next_forward = min(ready.next_forward, time)
            elif ready.forward is None or (micro_batch, stage) < (ready.forward.micro_batch, ready.forward.stage):
                ready.forward = Compute("F", direction, stage, micro_batch)
            micro_batch = rank.backwards[direction]
            time = self.arrival.get((True, direction, stage, micro_batch), inf)
            if time > now:
                ready.next_backward = min(ready.next_backward, time)
            elif ready.backward is None or (micro_batch, stage) < (ready.backward.micro_batch, ready.backward.stage):
                ready.backward = Compute("I", direction, stage, micro_batch)
        return ready

    def _choose(self, rank: _Rank, ready: _Ready, now: int) -> Compute | Pair | None:
        """What to start now; None to wait."""
        rule, banked = self.rule, len(rank.bank)
        ahead = sum(rank.forwards) - sum(rank.backwards)
        if ready.forward and ready.backward:
            return Pair(ready.forward, ready.backward) if rule.pairs else ready.backward
        if ready.backward:
            if ready.full and banked:
                return self._weight_grad(rank, now, inf)
            if ready.next_forward - now <= rule.wait_backward * self.forward:
                return self._weight_grad(rank, now, ready.next_forward)
            if banked > rule.bank and sum(rank.forwards) < 2 * self.count:
                return self._weight_grad(rank, now, inf)
            return ready.backward
        if ready.forward:
            if ready.next_backward - now <= rule.wait_forward * self.forward:
                return self._weight_grad(rank, now, ready.next_backward)
            if banked and any(rank.backwards) and ahead > rule.lead * self.stages:
                return self._weight_grad(rank, now, inf)
            return ready.forward
        return self._weight_grad(rank, now, min(ready.next_forward, ready.next_backward))

    def _weight_grad(self, rank: _Rank, now: int, arrival: float) -> Compute | None:
        """The oldest banked W, if it fits before the next arrival."""
        if not rank.bank or now + self.weight_grad > arrival + self.rule.overrun * self.weight_grad:
            return None
        return replace(rank.bank[0], kind="W")

    def _start(self, rank: _Rank, choice: Compute | Pair, now: int) -> None:
        end = now + max(1, round(self.times.of(choice) * self.unit))
        rank.order.append(choice)
        rank.free = end
        self._call(rank, end)
        for part in choice.parts:
            if part.kind == "W":
                rank.bank.popleft()
                rank.held -= 1
            elif part.kind == "F":
                rank.forwards[part.direction] += 1
                rank.held += 1
                last = part.stage == self.stages - 1
                self._deliver(last, part, part.stage if last else part.stage + 1, now, end)
            else:
                rank.backwards[part.direction] += 1
                rank.bank.append(part)
                if part.stage:
                    self._deliver(True, part, part.stage - 1, now, end)

    def _deliver(self, gradient: bool, part: Compute, stage: int, now: int, end: int) -> None:
        """Makes an arrival known, and lets its rank reconsider if it is waiting."""
        self.arrival[gradient, part.direction, stage, part.micro_batch] = end
        receiver = self.ranks[stage if part.direction == 0 else self.stages - 1 - stage]
        if receiver.free <= now:
            self._call(receiver, now)
