"""How long a plan takes, where it idles and what it holds: a discrete-event simulation of one step.

Every rank runs its instructions in order. Sends and receives do not occupy it; a message arrives `Times.message` after
it is sent and its receive is posted, for gloo and NCCL move large messages only then.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from megatron_ext.config.errors import UserError
from megatron_ext.pipeline.instructions import Compute, Message, Pair, Plan, ScheduleError, Transfer
from megatron_ext.pipeline.timeline import Span, Timeline


@dataclass(frozen=True)
class Times:
    """Durations for a rank's whole share of the model (1/P) and one micro-batch; divided evenly over the rank's chunks.

    Attributes:
        forward, input_grad, weight_grad: of F, I and W; a full backward takes I + W.
        pair: of an overlapped forward and full backward; None: their sum. A pair whose backward is "I" takes pair - W.
        message: from one rank to another; not divided over chunks.
    """

    forward: float = 1.0
    input_grad: float = 1.0
    weight_grad: float = 1.0
    pair: float | None = None
    message: float = 0.0

    def __post_init__(self) -> None:
        parts = (self.forward, self.input_grad, self.weight_grad)
        if min(*parts, self.full_pair - self.weight_grad, self.message) < 0 or not 0 < sum(parts) < inf:
            raise UserError(f"{self}: durations are not negative, not all zero, and a pair is not shorter than its W")

    @property
    def full_pair(self) -> float:
        return self.forward + self.input_grad + self.weight_grad if self.pair is None else self.pair

    def of(self, instruction: Compute | Pair) -> float:
        """The duration of one computation where a rank has one chunk per direction."""
        if isinstance(instruction, Pair):
            return self.full_pair - (self.weight_grad if instruction.backward.kind == "I" else 0.0)
        if instruction.kind == "B":
            return self.input_grad + self.weight_grad
        return {"F": self.forward, "I": self.input_grad, "W": self.weight_grad}[instruction.kind]


@dataclass(frozen=True)
class Result:
    """What a simulated step looks like; times in the unit of `Times`.

    Attributes:
        makespan: from the first computation to the end of the last.
        bubble: for each rank the time in which it computes nothing.
        peak_activations: for each rank, in its whole share of the model for one micro-batch.
        timeline: when every computation ran.
    """

    makespan: float
    bubble: list[float]
    peak_activations: list[float]
    timeline: Timeline


def simulate(plan: Plan, times: Times | None = None) -> Result:
    """Runs one step of a plan that `verify` accepts.

    Raises:
        ScheduleError: the ranks wait for each other for ever.
    """
    times = times or Times()
    sent: dict[Message, float] = {}  # a message's send, then its receive; it arrives when it has both
    posted: dict[Message, float] = {}
    waiting: dict[Message, int] = {}
    position, clock = [0] * plan.stages, [0.0] * plan.stages
    spans: list[list[Span]] = [[] for _ in range(plan.stages)]
    runnable = list(range(plan.stages))[::-1]
    while runnable:
        rank = runnable.pop()
        order, now = plan.instructions[rank], clock[rank]
        for index in range(position[rank], len(order)):
            instruction = order[index]
            if isinstance(instruction, Transfer):
                message = instruction.message
                (sent if instruction.kind[0] == "S" else posted)[message] = now
                if message in waiting:
                    runnable.append(waiting.pop(message))
                continue
            start = now
            missing = None
            for message in plan.needs(instruction):
                if message in sent and message in posted:
                    start = max(start, max(sent[message], posted[message]) + times.message)
                else:
                    missing = message
            if missing is not None:
                waiting[missing] = rank
                position[rank] = index
                break
            now = start + times.of(instruction) / plan.chunks
            spans[rank].append(Span(start, now, instruction))
        else:
            position[rank] = len(order)
        clock[rank] = now
    for message, rank in waiting.items():
        raise ScheduleError(f"rank {rank} waits for ever at instruction {position[rank]}: the {message} never comes")
    timeline = Timeline(plan.name, spans, plan.chunks, unit="")
    makespan = max(clock)
    bubble = [timeline.idle(rank) for rank in range(plan.stages)]
    return Result(makespan, bubble, [timeline.peak_activations(rank) for rank in range(plan.stages)], timeline)
