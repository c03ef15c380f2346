"""How long a plan takes, where it idles and what it holds: a discrete-event simulation of one step.

Every rank runs its instructions in order. Sends and receives do not occupy it; a message arrives `Times.message` after
it is sent and its receive is posted, for gloo and NCCL move large messages only then.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from megatron_ext.config.errors import ConfigError
from megatron_ext.pipeline.instructions import (
    Compute,
    Message,
    Pair,
    Plan,
    ScheduleError,
    Transfer,
    neighbours,
    without_cycles,
)
from megatron_ext.pipeline.timeline import Span, Timeline


@dataclass(frozen=True)
class Times:
    """Durations for a rank's whole share of the model (1/P) and one micro-batch; divided evenly over the rank's chunks.

    Attributes:
        forward, input_grad, weight_grad: of F, I and W; a full backward takes I + W.
        pair: of an overlapped forward and full backward; None: their sum. A pair whose backward is "I" takes pair - W.
        message: from one rank to another; not divided over chunks.
        stages: how the work lies along the model where it is not even: the model is cut into as many equal parts as the
            tuple has entries, and a stage takes the mean of its parts times the durations above. One entry per stage
            describes a plan of that many stages, and still fits plans with more or fewer. The durations above are those
            of a part of length 1, usually the average one. A pair of two different stages gains the mean of what either
            gains with itself.
    """

    forward: float = 1.0
    input_grad: float = 1.0
    weight_grad: float = 1.0
    pair: float | None = None
    message: float = 0.0
    stages: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("forward", "input_grad", "weight_grad", "message"):
            if not 0 <= getattr(self, name) < inf:
                raise ConfigError(name, getattr(self, name), "a duration is finite and not negative")
        if not self.forward + self.input_grad + self.weight_grad > 0:
            raise ConfigError("forward", self.forward, "F, I and W do not all take no time")
        if not self.weight_grad <= self.full_pair < inf:
            raise ConfigError("pair", self.pair, f"a pair is finite and not shorter than its W, {self.weight_grad:g}")
        if self.stages is not None and not (self.stages and all(0 < length < inf for length in self.stages)):
            raise ConfigError("stages", self.stages, "the parts of the model have finite lengths above 0")

    @property
    def full_pair(self) -> float:
        return self.forward + self.input_grad + self.weight_grad if self.pair is None else self.pair

    @property
    def gain(self) -> float:
        """What a forward and a full backward save by running as a pair."""
        return self.forward + self.input_grad + self.weight_grad - self.full_pair

    def of(self, instruction: Compute | Pair) -> float:
        """The duration of one computation where a rank has one chunk per direction and all stages are alike."""
        if isinstance(instruction, Pair):
            return self.full_pair - (self.weight_grad if instruction.backward.kind == "I" else 0.0)
        if instruction.kind == "B":
            return self.input_grad + self.weight_grad
        return {"F": self.forward, "I": self.input_grad, "W": self.weight_grad}[instruction.kind]

    def lengths(self, stages: int) -> list[float]:
        """How much longer or shorter than `forward` etc. say each of this many stages takes; [1, 1, ...] if even."""
        if self.stages is None or len(set(self.stages)) == 1:
            return [1.0 if self.stages is None else self.stages[0]] * stages
        parts = len(self.stages)
        found = []
        for stage in range(stages):
            # In units of 1 / (parts x stages) of the model, stage and parts begin and end at integers.
            begin, end = stage * parts, (stage + 1) * parts
            covered = range(begin // stages, (end - 1) // stages + 1)
            shares = (min(end, (k + 1) * stages) - max(begin, k * stages) for k in covered)
            found.append(sum(self.stages[k] * share for k, share in zip(covered, shares, strict=True)) / parts)
        return found


class Durations:
    """How long the computations of a placement take under some times.

    Args:
        times: for a rank's whole share.
        stages: of one direction, S.
        chunks: of one direction per rank.
    """

    def __init__(self, times: Times, stages: int, chunks: int):
        lengths = [length / chunks for length in times.lengths(stages)]
        self.even = len(set(lengths)) == 1
        backward = times.input_grad + times.weight_grad
        whole = {"F": times.forward, "I": times.input_grad, "W": times.weight_grad, "B": backward}
        pair_forward, half = times.forward - times.gain / 2, times.gain / 2
        self.alone = {kind: [time * length for length in lengths] for kind, time in whole.items()}
        self.forward_in_pair = [pair_forward * length for length in lengths]
        self.backward_in_pair = {k: [(whole[k] - half) * length for length in lengths] for k in ("I", "B")}
        self.pair = {kind: (times.full_pair - (times.weight_grad if kind == "I" else 0)) * lengths[0] for kind in "IB"}

    def of(self, instruction: Compute | Pair) -> float:
        if isinstance(instruction, Compute):
            return self.alone[instruction.kind][instruction.stage]
        forward, backward = instruction
        if self.even:
            return self.pair[backward.kind]
        return self.forward_in_pair[forward.stage] + self.backward_in_pair[backward.kind][backward.stage]


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


@without_cycles
def simulate(plan: Plan, times: Times | None = None) -> Result:
    """Runs one step of a plan that `verify` accepts.

    Raises:
        ScheduleError: the ranks wait for each other for ever.
    """
    times = times or Times()
    step = _Step(plan, times)
    step.run()
    makespan = max(step.clock)
    bubble = [makespan - busy for busy in step.busy]
    peaks = [_peak(spans) / plan.chunks for spans in step.spans]
    return Result(makespan, bubble, peaks, Timeline(plan.name, step.spans, plan.chunks, unit=""))


class _Step:
    """The state of the simulation.

    Attributes:
        sent, posted: message -> when its sender sent it, when its receiver was ready for it.
        waiting: message -> the rank that cannot go on without it.
    """

    def __init__(self, plan: Plan, times: Times):
        self.plan, self.latency = plan, times.message
        self.durations = Durations(times, len(plan.placement[0]), plan.chunks)
        self.neighbours = neighbours(plan.placement)
        self.sent: dict[tuple, float] = {}
        self.posted: dict[tuple, float] = {}
        self.waiting: dict[tuple, int] = {}
        self.position, self.clock, self.busy = [0] * plan.stages, [0.0] * plan.stages, [0.0] * plan.stages
        self.spans: list[list[Span]] = [[] for _ in range(plan.stages)]
        self.runnable = list(range(plan.stages))[::-1]

    def run(self) -> None:
        while self.runnable:
            self._advance(self.runnable.pop())
        for message, rank in self.waiting.items():
            where = f"rank {rank} waits for ever at instruction {self.position[rank]}"
            raise ScheduleError(f"{where}: the {Message(*message)} never comes")

    def _advance(self, rank: int) -> None:
        """Runs a rank until it has to wait for a message that has not been sent."""
        before, after = self.neighbours
        order, now, busy, spans = self.plan.instructions[rank], self.clock[rank], self.busy[rank], self.spans[rank]
        sent, posted, waiting, duration = self.sent, self.posted, self.waiting, self.durations.of
        for index in range(self.position[rank], len(order)):
            instruction = order[index]
            if isinstance(instruction, Transfer):
                way, message = instruction
                (sent if way[0] == "S" else posted)[message] = now
                if message in waiting:
                    self.runnable.append(waiting.pop(message))
                continue
            start = now
            missing: tuple | None = None
            for kind, direction, stage, micro_batch in instruction.parts:
                needed: tuple
                if kind == "F":
                    needed = ("F", direction, stage - 1, micro_batch, before[direction][stage], rank)
                elif kind == "W":
                    continue
                else:
                    needed = ("B", direction, stage + 1, micro_batch, after[direction][stage], rank)
                if needed[4] < 0:
                    continue
                if needed in sent and needed in posted:
                    start = max(start, sent[needed] + self.latency, posted[needed] + self.latency)
                else:
                    missing = needed
            if missing is not None:
                waiting[missing] = rank
                self.position[rank] = index
                break
            length = duration(instruction)
            now = start + length
            busy += length
            spans.append(Span(start, now, instruction))
        else:
            self.position[rank] = len(order)
        self.clock[rank], self.busy[rank] = now, busy


def _peak(spans: list[Span]) -> int:
    """The most activations of one stage that a rank holds, from the start of their F to the end of their W or B."""
    held = most = 0
    for span in spans:
        for part in span.instruction.parts:
            if part.kind == "F":
                held += 1
                most = max(most, held)
            elif part.kind != "I":
                held -= 1
    return most
