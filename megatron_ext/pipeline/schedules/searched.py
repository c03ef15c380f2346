"""Orders that are searched for: the best that list scheduling finds with many rules.

They exist for any placement, any m and any memory limit that holds one micro-batch of each direction, and are made for
given times. Where messages take time, half of the candidates are made without that knowledge, and their W's moved to
where the waiting really is: those are often better. Without times they are made for F = I = W, and are the shortest in
sum where pairs gain nothing and where they save a fifth.

The rules were found by random search over P in 4..16, and several at P=16, m=32. From the three best a short random
walk (with fixed numbers, so that the same arguments give the same plan) looks for better ones at the given sizes and
times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from math import inf
from random import Random

from megatron_ext.parallel.placement import Placement
from megatron_ext.pipeline.bounds import lower_bound
from megatron_ext.pipeline.instructions import POST_AHEAD, Plan, ScheduleError
from megatron_ext.pipeline.schedules.fill import fill
from megatron_ext.pipeline.schedules.greedy import Candidate, Order, Problem, Rule, list_schedule
from megatron_ext.pipeline.simulator import Times, simulate
from megatron_ext.pipeline.verifier import verify

GOALS = (Times(), Times(pair=2.4))  # without measured times


def _age(pairs: bool, wait_forward: float, wait_backward: float, overrun: float, bank: float = inf,
         lead: float = inf) -> Rule:
    """Oldest micro-batch first; all pairs split."""
    return Rule(-1, 64, 1, 64, 0, wait_forward, wait_backward, overrun, 0, inf, inf, bank, lead, inf, pairs)


# For one stage of each direction per rank and few micro-batches.
FEW = (
    _age(True, 0.5, 0.0, 0.5, bank=2),
    _age(False, 0.0, 0.2, 0.3, bank=2),
    _age(True, 0.4, 0.0, 0.5),
    _age(False, 0.8, 0.0, 0.3, lead=0.7),
    _age(False, 0.8, 0.4, 0.9, bank=1, lead=0.9),
    _age(True, 0.5, 0.0, 0.7, lead=0.9),
    _age(True, 0.4, 0.2, 0.7, bank=1),
)
# For everything else.
MANY = (
    Rule(-2, 6, -4, 8, 0, 0.4, 0.4, 0.7),
    Rule(10, 4, -6, 8, 0, 0.8, 0, 0.7, bank=0.75, lead=0.55),
    Rule(0, 4, 0, 2, 0, 0.9, 0.8, 0.5, 0.5, pair_bank=0.9, lead=0.9),
    Rule(-1, 8, -4, 0, 0, 0.8, 1.2, 0.7),
    Rule(4, 6, -6, 6, 0.1875, 0, 0.4, 0.4),
    Rule(4, 4, 8, 2, 0, 0.8, 0, 0.3, pair_bank=0.45, bank=1),
    Rule(0, 6, 0, 8, 0, 2.6, 3.8, 0.7),
    Rule(6, 6, 6, 0, 0, 0.2, 0.3, 0.4, pair_bank=0.15, bank=1, lead=1),
    Rule(1, 4, 0, 6, 0, 0.8, 1.4, 0.6, lead=0.45),
    Rule(7, 8, 8, 0, 0, 0.5, 0, 0.7, pair_bank=0.8, bank=0.5, lead=0.1),
    Rule(8, 0, -2, 4, 0.125, 0, 0, 0.5, 0, 1.5, bank=1),
    Rule(-2, 2, -5, 6, 0.125, 0, 1.3, 0.7, bank=0.5),
    Rule(8, 0, 0, 2, 0, 0.6, 1.8, 0.7, pair_bank=0.8, bank=1, lead=0.9),
    Rule(7, 8, 0, 0, 0, 0.5, 0.5, 1, 0, 1.375),
    Rule(4, 6, -4, 4, 0.1875, 0.2, 0.3, 0.6, 0, 2, 0.75, 1.5, 0.90625),
    Rule(8, 2, -1, 0, 0.0625, 0.8, 0, 0.9, pair_bank=1, bank=1.75, lead=0.546875),
    Rule(4, 4, 0, 8, 0.0625, 0.8, 0, 0.8, pair_bank=0.39, bank=0.5),
    Rule(4, 6, 4, 0, 0.0625, 0.2, 0.05, 0.6, 0.125, pair_bank=0.03125, bank=0.125),
    Rule(0, 4, 4, 2, 0, 0.7, 0.35, 1, pair_bank=0.53125, bank=1.25, lead=0.4375),
    Rule(4, 8, -4, 8, 0, 0.8, 0.85, 0.5, 0.4375, 1, 0.28125),
    Rule(4, 6, -4, 2, 0.9375, 0.5, 0.2, 0.7, 0, 1.6875, bank=1, lead=0.75),
    Rule(8, 4, -6, 6, 0.1875, 0.6, 0, 1, 0.0625, bank=1.5),
    Rule(6, 0, 0, 8, 0.0625, 0, 1.6, 0.6, 0.5, pair_bank=0.93, bank=0.75, lead=0.914),
    Rule(4, 6, 0, 0, 0, 0.8, 1.2, 0.4, pair_bank=0.5, lead=0.9),
)
# For little memory. Those with a window of 1 and no reserve never get stuck.
SPARING = (
    *(replace(rule, window=window, reserve=0.0)
      for window in (1, 1.25, 1.5) for rule in (FEW[0], FEW[4], FEW[5], MANY[0], MANY[2])),
    Rule(0, 8, 0, 2, 0.1875, 0, 0.9, 0.5, pair_bank=0.3, bank=1, lead=0.7, window=1.75),
    Rule(4, 8, -4, 0, 0.0625, 0.6, 0.05, 1, pair_bank=0.15, lead=0.55, window=1.5, pairs=False),
    Rule(4, 4, 0, 0, 0.125, 0.2, 0.9, 0.3, 0, 2, bank=2, lead=0.9, window=1.5),
    Rule(4, 2, 8, 6, 0.1875, 0.2, 0.05, 0.5, 0, 2, 0.75, 2, 0.9, 1.5),
)


OVERRUNS = (0.3, 0.7)  # for W's that are moved
PROMISING = 1.03  # times the shortest yet
STEPS = 48  # of the search around the best rules


def shortest(
    name: str,
    placement: Placement,
    micro_batches: int,
    times: Times | None,
    limit: float,
    candidates: Callable[[Problem, Times], Iterable[Candidate]],
) -> Plan | None:
    """The plan of the shortest candidate for m = `micro_batches` of all directions together.

    Args:
        times: what to be short at, with the latency of messages; None: see above.
        limit: activations a rank may hold, in its whole share of the model for one micro-batch.
        candidates: made for a problem and its times; of equal ones the first wins.

    Returns:
        None if there is no candidate.
    """
    count, rest = divmod(micro_batches, len(placement))
    counts = [count + (direction < rest) for direction in range(len(placement))]
    goals = (times,) if times else GOALS
    plans = []
    for goal in goals:
        problem = Problem(placement, counts, goal, limit)
        best: Candidate | None = None
        for found in candidates(problem, goal):
            if best is None or found[0] < best[0] - 1e-9:
                best = found
        if best is not None:
            plans.append(_sound(name, placement, micro_batches, best[1], problem))
    if len(plans) < 2:
        return plans[0] if plans else None
    return min(plans, key=lambda plan: sum(simulate(plan, goal).makespan for goal in goals))


def _sound(name: str, placement: Placement, micro_batches: int, order: Order, problem: Problem) -> Plan:
    """The plan of an order, with its receives posted as early as freedom from deadlock asks for."""
    post_ahead = POST_AHEAD
    while True:
        plan = Plan.from_compute(name, placement, micro_batches, order, problem.limit, problem.slots, post_ahead)
        try:
            verify(plan)
            return plan
        except ScheduleError:
            if post_ahead > max(map(len, order)):
                raise
            post_ahead *= 2


def list_scheduled(problem: Problem, times: Times, rules: Sequence[Rule]) -> Iterator[Candidate]:
    """What list scheduling finds with these rules, sparing ones if memory is tight, and some more like the best."""
    least = len(problem.placement)
    if problem.limit < least:
        return
    # The greedy is not monotone in its limit: with less it is often better.
    limits = [problem.limit]
    if problem.chunks > 1:
        limits += [problem.limit - less for less in (0.5, 1.0) if problem.limit - less >= least]
    tight = problem.limit < min(sum(problem.counts), problem.ranks)
    rules = (*rules, *SPARING) if tight else (*rules, SPARING[0])
    # An attempt is a rule, a limit and whether it knows how long messages take.
    attempts = [(rule, limit, True) for limit in limits for rule in rules]
    if times.message:
        attempts += [(rule, problem.limit, False) for rule in rules]
    made = []
    shortest_yet = inf
    for number, attempt in enumerate(attempts):
        found = _attempt(problem, times, *attempt, shortest_yet)
        if found is not None:
            made.append((found[0], number))
            shortest_yet = min(shortest_yet, found[0])
            yield found
    made.sort()
    leaders = [(length, attempts[number]) for length, number in made[:3]]
    bound = lower_bound(problem.placement, sum(problem.counts), times, problem.limit)
    draw = Random(0)
    for step in range(STEPS):
        length, (rule, limit, knows) = leaders[step % len(leaders)]
        if shortest_yet <= bound + 1e-9:
            break
        attempt = (_changed(rule, draw), limit, knows)
        found = _attempt(problem, times, *attempt, shortest_yet)
        if found is not None:
            shortest_yet = min(shortest_yet, found[0])
            yield found
            if found[0] < length:
                leaders[step % len(leaders)] = (found[0], attempt)


def _attempt(
    problem: Problem, times: Times, rule: Rule, limit: float, knows: bool, shortest_yet: float
) -> Candidate | None:
    """The order by one rule; if it does not know the latency, timed with it, and with W's moved if it is promising."""
    goal = times if knows else replace(times, message=0.0)
    order = list_schedule(Problem(problem.placement, problem.counts, goal, limit), rule)
    if order is None or knows:
        return order
    found = fill(problem, order[1], times, None)
    if found is not None and found[0] < PROMISING * shortest_yet:
        for overrun in OVERRUNS:
            moved = fill(problem, order[1], times, overrun)
            if moved is not None and moved[0] < found[0] - 1e-9:
                found = moved
    return found


_CHOICES: dict[str, tuple[float, ...]] = {
    "forward_depth": tuple(range(-2, 11, 2)),
    "forward_age": tuple(range(0, 9, 2)),
    "backward_depth": tuple(range(-6, 9, 2)),
    "backward_age": tuple(range(0, 9, 2)),
    "reserve": (0.0, 0.0625, 0.125, 0.1875),
    "wait_forward": (0.0, 0.2, 0.4, 0.6, 0.8, 1.2),
    "wait_backward": (0.0, 0.05, 0.3, 0.6, 0.9, 1.3),
    "overrun": (0.3, 0.5, 0.7, 0.9, 1.0),
    "first_split": (0.0, 0.125, 0.5),
    "last_split": (1.0, 1.5, 1.75, 2.0, inf),
    "pair_bank": (0.05, 0.15, 0.3, 0.5, 0.75, inf),
    "bank": (0.25, 0.5, 1.0, 1.5, 2.0, inf),
    "lead": (0.45, 0.55, 0.7, 0.9, inf),
    "window": (1.0, 1.25, 1.5, 1.75),
}


def _changed(rule: Rule, draw: Random) -> Rule:
    """The rule with one or two other values. (`random` alone draws the same numbers in every version of Python.)"""
    names = [name for name in sorted(_CHOICES) if name != "window" or rule.window < inf]
    for _ in range(1 + int(2 * draw.random())):
        name = names[int(len(names) * draw.random())]
        rule = replace(rule, **{name: _CHOICES[name][int(len(_CHOICES[name]) * draw.random())]})  # type: ignore[arg-type]
    return rule
