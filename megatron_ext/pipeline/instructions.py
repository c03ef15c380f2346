"""The instruction set of pipeline schedules, and the plan that a schedule makes of it.

A schedule decides the order of computations on every rank; the messages between ranks follow from that order and from
the placement of stages, so they are derived here once, for every schedule. The verifier, the simulator, the picture and
the executor all read the same `Plan`.

Instructions and messages are named tuples: a large plan has a hundred thousand of them, and they are the keys by which
computations and messages are looked up.

Words: a plan has P ranks and m micro-batches in all. A direction is one way through the model (DualPipe of the
DeepSeek-V3 report, section 3.2.1, has two); `placement[direction][stage]` is the rank that holds a stage. Stages are
numbered along their direction, the stage that reads the data is 0; micro-batches are numbered per direction.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, ParamSpec, TypeVar

from megatron_ext.config.errors import UserError

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

ComputeKind = Literal["F", "I", "W", "B"]
TransferKind = Literal["SF", "RF", "SB", "RB"]

# A receive is posted this many computations before the one that waits for it: its message then travels behind whole
# computations and no rank holds more than a few buffers. To be free of deadlock even where a send blocks its rank until
# the receive is posted, DualPipe needs 1 and some bidirectional orders need 4 (all even P <= 32).
POST_AHEAD = 4


def without_cycles(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Runs a function that makes no reference cycles with the garbage collector off.

    A plan is a hundred thousand tuples, and looking for cycles in them took 40 % of the time to make and verify it.
    """

    @functools.wraps(function)
    def paused(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        was_on = gc.isenabled()
        gc.disable()
        try:
            return function(*args, **kwargs)
        finally:
            if was_on:
                gc.enable()

    return paused


class ScheduleError(UserError):
    """A plan that cannot run, or a schedule that breaks a promise: says what is wrong and where."""


class Compute(NamedTuple):
    """One computation of one stage on one micro-batch.

    Kinds: "F" forward; "I" gradient of the input; "W" gradient of the weights, which completes the "I" of the same
    direction, stage and micro-batch; "B" is I and W together.
    """

    kind: ComputeKind
    direction: int
    stage: int
    micro_batch: int

    @property
    def parts(self) -> tuple[Compute, ...]:
        return (self,)

    def __str__(self) -> str:
        return f"{self.kind}{self.direction}.{self.micro_batch}"


class Pair(NamedTuple):
    """A forward and a backward ("B" or "I") that run as one, so that each hides the other's all-to-all.

    `direction`, `stage` and `micro_batch` are those of the forward.
    """

    forward: Compute
    backward: Compute

    @property
    def kind(self) -> Literal["FB"]:
        return "FB"

    @property
    def parts(self) -> tuple[Compute, ...]:
        return (self.forward, self.backward)

    @property
    def direction(self) -> int:
        return self.forward.direction

    @property
    def stage(self) -> int:
        return self.forward.stage

    @property
    def micro_batch(self) -> int:
        return self.forward.micro_batch

    def __str__(self) -> str:
        return f"{self.forward}&{self.backward}"


class Message(NamedTuple):
    """What travels between two ranks, named by the computation that makes it.

    Kind "F" is the activation that the forward of `stage` makes for `stage` + 1; kind "B" is the gradient that the
    backward of `stage` makes for `stage` - 1. The ranks follow from the other fields, so a message is its own key (and
    a tuple, which is cheap to look up).
    """

    kind: Literal["F", "B"]
    direction: int
    stage: int
    micro_batch: int
    source: int
    destination: int

    def __str__(self) -> str:
        what = "activation" if self.kind == "F" else "gradient"
        ranks = f"rank {self.source} to {self.destination}"
        return f"{what} {self.direction}.{self.micro_batch} of stage {self.stage}, {ranks}"


class Transfer(NamedTuple):
    """Starts sending ("SF", "SB") or posts the receive ("RF", "RB") of one message; neither waits.

    `stage` is the stage that made the message.
    """

    kind: TransferKind
    message: Message

    @property
    def direction(self) -> int:
        return self.message.direction

    @property
    def stage(self) -> int:
        return self.message.stage

    @property
    def micro_batch(self) -> int:
        return self.message.micro_batch

    @property
    def peer(self) -> int:
        return self.message.destination if self.kind[0] == "S" else self.message.source

    def __str__(self) -> str:
        return f"{self.kind}{self.direction}.{self.micro_batch}{'>' if self.kind[0] == 'S' else '<'}{self.peer}"


Instruction = Compute | Pair | Transfer


@dataclass(frozen=True)
class Plan:
    """What every rank does in one step, in order.

    Attributes:
        name: of the schedule.
        stages: P, the number of pipeline ranks.
        micro_batches: m, of all directions together.
        placement: for each direction the list stage -> rank.
        instructions: for each rank its list; computations, and the transfers derived from them.
        activation_limit: promise that no rank holds more activations at once, in a rank's whole share of the model for
            one micro-batch; None promises nothing.
        weight_grad_limit: promise that no rank has more weight gradients waiting for their W; None promises nothing.
    """

    name: str
    stages: int
    micro_batches: int
    placement: list[list[int]]
    instructions: list[list[Instruction]]
    activation_limit: float | None = None
    weight_grad_limit: int | None = None

    @classmethod
    def from_compute(
        cls,
        name: str,
        placement: list[list[int]],
        micro_batches: int,
        compute: Sequence[Sequence[Compute | Pair]],
        activation_limit: float | None = None,
        weight_grad_limit: int | None = None,
        post_ahead: int = POST_AHEAD,
    ) -> Plan:
        """The plan of this order of computations per rank, with its sends and receives (see `with_transfers`)."""
        instructions = with_transfers(placement, compute, post_ahead)
        return cls(name, len(compute), micro_batches, placement, instructions, activation_limit, weight_grad_limit)

    @property
    def chunks(self) -> int:
        """Stages of one direction on each rank."""
        return len(self.placement[0]) // self.stages

    def micro_batches_of(self, direction: int) -> int:
        """How many micro-batches run in this direction; the first direction takes the odd one."""
        count, rest = divmod(self.micro_batches, len(self.placement))
        return count + (direction < rest)

    def compute(self, rank: int) -> list[Compute | Pair]:
        """The instructions of a rank without sends and receives."""
        return [i for i in self.instructions[rank] if not isinstance(i, Transfer)]

    def needs(self, instruction: Compute | Pair) -> list[Message]:
        """The messages from other ranks that this computation waits for."""
        return needs(self.placement, instruction)

    def gives(self, instruction: Compute | Pair) -> list[Message]:
        """The messages that this computation makes for other ranks."""
        return gives(self.placement, instruction)

    def __str__(self) -> str:
        head = f"{self.name}: {self.stages} ranks, {self.micro_batches} micro-batches"
        rows = (f"{rank:3d}| " + " ".join(map(str, self.compute(rank))) for rank in range(self.stages))
        return "\n".join((head, *rows))


class Neighbours(NamedTuple):
    """For each direction and stage the rank that messages come from or go to; -1: none, or it is the same rank."""

    before: list[list[int]]  # holds the stage before: activations come from there, gradients go there
    after: list[list[int]]  # holds the stage after


def neighbours(placement: list[list[int]]) -> Neighbours:
    """Where the messages of every stage come from and go to."""
    after = [[-1 if here == next_ else next_ for here, next_ in pairwise(ranks)] + [-1] for ranks in placement]
    before = [[-1] + [-1 if here == last else last for last, here in pairwise(ranks)] for ranks in placement]
    return Neighbours(before, after)


def needs(placement: list[list[int]], instruction: Compute | Pair) -> list[Message]:
    """The messages from other ranks that this computation waits for: an activation, a gradient, or in a pair both."""
    found = []
    for kind, direction, stage, micro_batch in _flows(instruction):
        ranks, source = placement[direction], stage - 1 if kind == "F" else stage + 1
        if 0 <= source < len(ranks) and ranks[source] != ranks[stage]:
            found.append(Message(kind, direction, source, micro_batch, ranks[source], ranks[stage]))
    return found


def gives(placement: list[list[int]], instruction: Compute | Pair) -> list[Message]:
    """The messages that this computation makes for other ranks."""
    found = []
    for kind, direction, stage, micro_batch in _flows(instruction):
        ranks, target = placement[direction], stage + 1 if kind == "F" else stage - 1
        if 0 <= target < len(ranks) and ranks[target] != ranks[stage]:
            found.append(Message(kind, direction, stage, micro_batch, ranks[stage], ranks[target]))
    return found


def _flows(instruction: Compute | Pair) -> list[tuple[Literal["F", "B"], int, int, int]]:
    """What moves between stages: ("F" along the direction or "B" against it, direction, stage, micro-batch)."""
    return [
        ("F" if part.kind == "F" else "B", part.direction, part.stage, part.micro_batch)
        for part in instruction.parts
        if part.kind != "W"
    ]


def with_transfers(
    placement: list[list[int]], compute: Sequence[Sequence[Compute | Pair]], post_ahead: int = POST_AHEAD
) -> list[list[Instruction]]:
    """Adds the sends and receives that an order of computations implies.

    A send follows the computation that made the message. Between two ranks receives are posted in the order of the
    sends, so that no tags are needed, each `post_ahead` computations before its use, or earlier where a message sent
    later is used sooner. Receives come before the sends of the same gap: a rank offers before it asks.

    Raises:
        ScheduleError: a message that is made is never used, or one that is used is never made.
    """
    use, sends, sent = _messages(placement, compute)
    posts: list[dict[int, list[Transfer]]] = [{} for _ in compute]
    for (_, destination), messages in sent.items():
        slots, latest = [], len(compute[destination])
        for message in reversed(messages):
            used = use.pop(message, None)
            if used is None:
                raise ScheduleError(f"{message}: nobody uses it")
            latest = max(0, min(latest, used - post_ahead))
            slots.append(latest)
        post = posts[destination]
        for message, slot in zip(messages, reversed(slots), strict=True):
            post.setdefault(slot, []).append(Transfer(_RECEIVE[message.kind], message))
    for never in use:
        raise ScheduleError(f"{Message(*never)}: nobody makes it")

    instructions: list[list[Instruction]] = []
    for order, post, send in zip(compute, posts, sends, strict=True):
        out: list[Instruction] = []
        for index, instruction in enumerate(order):
            if index in post:
                out += post[index]
            if index - 1 in send:
                out += send[index - 1]
            out.append(instruction)
        out += send.get(len(order) - 1, ())
        instructions.append(out)
    return instructions


_SEND: dict[str, TransferKind] = {"F": "SF", "B": "SB"}
_RECEIVE: dict[str, TransferKind] = {"F": "RF", "B": "RB"}
_Key = tuple[Literal["F", "B"], int, int, int, int, int]  # the fields of a Message


def _messages(
    placement: list[list[int]], compute: Sequence[Sequence[Compute | Pair]]
) -> tuple[dict[_Key, int], list[dict[int, list[Transfer]]], dict[tuple[int, int], list[Message]]]:
    """Message -> where its receiver uses it; for each rank where it sends; (source, destination) -> order of sends."""
    before, after = neighbours(placement)
    use: dict[_Key, int] = {}
    sends: list[dict[int, list[Transfer]]] = [{} for _ in compute]
    sent: dict[tuple[int, int], list[Message]] = {}
    for rank, order in enumerate(compute):
        send = sends[rank]
        flow: Literal["F", "B"]
        for index, instruction in enumerate(order):
            for kind, direction, stage, micro_batch in (
                instruction if isinstance(instruction, Pair) else (instruction,)
            ):
                if kind == "F":
                    flow, source, target, maker = "F", before[direction][stage], after[direction][stage], stage - 1
                elif kind == "W":
                    continue
                else:
                    flow, source, target, maker = "B", after[direction][stage], before[direction][stage], stage + 1
                if source >= 0:
                    use[flow, direction, maker, micro_batch, source, rank] = index
                if target >= 0:
                    message = Message(flow, direction, stage, micro_batch, rank, target)
                    transfer = Transfer(_SEND[flow], message)
                    if index in send:
                        send[index].append(transfer)
                    else:
                        send[index] = [transfer]
                    if (rank, target) in sent:
                        sent[rank, target].append(message)
                    else:
                        sent[rank, target] = [message]
    return use, sends, sent
