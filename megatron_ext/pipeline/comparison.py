"""Plan against run: which computations ran late, and whose fault it was.

A late step is a chain of delays, most of them inherited. So a computation is charged only with its own: what it took
longer than planned, and what it started after it could have, which is when its rank was free and its inputs had come.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from megatron_ext.pipeline.instructions import Message, Plan, ScheduleError
from megatron_ext.pipeline.measured import Durations, add_durations, measured_times
from megatron_ext.pipeline.simulator import Times, simulate
from megatron_ext.pipeline.timeline import Span, Timeline


class Operation(NamedTuple):
    """One computation as planned and as it ran, in the unit of the run, from the start of either step.

    Attributes:
        rank: where.
        planned, ran: when; both name the same instruction.
        waited: from when it could have started until it did.
        longer: time it took beyond the planned; negative if it was faster.
        source: rank whose message it waited for last, None if it waited only for its own rank.
    """

    rank: int
    planned: Span
    ran: Span
    waited: float
    longer: float
    source: int | None

    @property
    def delay(self) -> float:
        """Time lost in this computation, whatever was lost before it."""
        return self.waited + max(self.longer, 0.0)


@dataclass(frozen=True)
class Comparison:
    """A run beside its plan.

    Attributes:
        plan: what should have run.
        times: by which it was simulated.
        planned, ran: the two timelines, both in the unit of the run.
        operations: every computation, by rank and in order.
    """

    plan: Plan
    times: Times
    planned: Timeline
    ran: Timeline
    operations: list[Operation]

    def latest(self, count: int) -> list[Operation]:
        """The computations that lost most time, worst first."""
        late = [operation for operation in self.operations if operation.delay > 0]
        return sorted(late, key=lambda operation: -operation.delay)[:count]


def compare(plan: Plan, ran: Timeline, times: Times | None = None) -> Comparison:
    """Lays a run beside the simulation of its plan.

    Args:
        plan: what was run.
        ran: what was recorded.
        times: what was planned with, in the unit of the run; None takes the medians of the run itself, so that what
            stands out is late compared with its like.

    Raises:
        ScheduleError: the run is not one of this plan; says where they part.
    """
    _check_same(plan, ran)
    times = times or times_of_run(plan, ran)
    simulated = simulate(plan, times).timeline
    planned = Timeline(f"{plan.name}, planned", simulated.ranks, plan.chunks, ran.unit)
    operations = [
        Operation(rank, _shift(wanted, planned.start), _shift(span, ran.start), waited,
                  (span.end - span.start) - (wanted.end - wanted.start), source)
        for (rank, span, waited, source), wanted in zip(
            _waits(plan, ran, times.message), (span for spans in planned.ranks for span in spans), strict=True)
    ]
    return Comparison(plan, times, planned, ran, operations)


def times_of_run(plan: Plan, ran: Timeline) -> Times:
    """What a run took, by medians: for a rank's whole share of the model, and how unlike its stages are.

    A message takes what passed from the end of the computation that made it to the start of the one that needed it,
    where the receiving rank had nothing else to do. I and W are halves of a B that was never split.

    Raises:
        ScheduleError: the run is not one of this plan, or is empty.
    """
    _check_same(plan, ran)
    seen: Durations = {}
    for spans in ran.ranks:
        add_durations(seen, spans)
    waits = [waited for _, _, waited, source in _waits(plan, ran, 0.0) if source is not None]
    return measured_times(seen, len(plan.placement[0]), plan.chunks, median(waits) if waits else 0.0)


def _check_same(plan: Plan, ran: Timeline) -> None:
    if len(ran.ranks) != plan.stages:
        raise ScheduleError(f"{ran.name}: {len(ran.ranks)} ranks ran, and the plan {plan.name} has {plan.stages}")
    for rank, spans in enumerate(ran.ranks):
        wanted = plan.compute(rank)
        if len(spans) != len(wanted):
            count = f"{len(spans)} computations ran, and the plan {plan.name} has {len(wanted)}"
            raise ScheduleError(f"{ran.name}: rank {rank}: {count}")
        for index, (span, instruction) in enumerate(zip(spans, wanted, strict=True)):
            if span.instruction != instruction:
                parted = f"{span.instruction} ran where the plan {plan.name} has {instruction}"
                raise ScheduleError(f"{ran.name}: rank {rank}, computation {index}: {parted}")
    if not any(ran.ranks):
        raise ScheduleError(f"{ran.name}: nothing ran")


def _waits(plan: Plan, ran: Timeline, message_time: float) -> Iterator[tuple[int, Span, float, int | None]]:
    """(rank, span, time from when it could have started until it did, rank of the input that came last or None)."""
    made: dict[Message, float] = {}
    for spans in ran.ranks:
        for span in spans:
            made |= dict.fromkeys(plan.gives(span.instruction), span.end)
    for rank, spans in enumerate(ran.ranks):
        free = ran.start
        for span in spans:
            ready, source = free, None
            for message in plan.needs(span.instruction):
                if made[message] + message_time > ready:
                    ready, source = made[message] + message_time, message.source
            yield rank, span, max(span.start - ready, 0.0), source
            free = span.end


def _shift(span: Span, by: float) -> Span:
    return span._replace(start=span.start - by, end=span.end - by)
