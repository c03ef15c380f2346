"""Proves that a plan computes every micro-batch once, in an order that cannot hang, within the memory it promises.

Messages are matched without tags: between two ranks the order of the sends must be the order of the receives, which
also orders every channel (kind, direction) of the pair. Freedom from deadlock is shown under rendezvous, the strictest
transport: a send blocks its rank until the receiver has posted the receive, at the place where the plan posts it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest

from megatron_ext.pipeline.instructions import Compute, Instruction, Message, Pair, Plan, ScheduleError, Transfer


@dataclass(frozen=True)
class Verified:
    """What a sound plan holds at most, for each rank.

    Attributes:
        activations: from the F to the W, in a rank's whole share of the model for one micro-batch.
        weight_grads: input gradients whose W has not run.
    """

    activations: list[float]
    weight_grads: list[int]


def verify(plan: Plan) -> Verified:
    """Checks a plan; cheap enough to run before every start.

    Raises:
        ScheduleError: with the rank, the instruction and the rule it breaks.
    """
    _check_placement(plan)
    peaks = [_check_computations(plan, rank) for rank in range(plan.stages)]
    verified = Verified([held for held, _ in peaks], [waiting for _, waiting in peaks])
    _check_messages(plan)
    _check_progress(plan)
    for rank in range(plan.stages):
        _check_promise(plan, rank, "activations", verified.activations[rank], plan.activation_limit)
        _check_promise(plan, rank, "waiting weight gradients", verified.weight_grads[rank], plan.weight_grad_limit)
    return verified


def _check_placement(plan: Plan) -> None:
    if len(plan.instructions) != plan.stages:
        raise ScheduleError(f"{plan.name}: {plan.stages} ranks, but instructions for {len(plan.instructions)}")
    ranks = sorted(list(range(plan.stages)) * (len(plan.placement[0]) // plan.stages if plan.placement else 0))
    for direction, place in enumerate(plan.placement):
        if sorted(place) != ranks or not ranks:
            where = f"direction {direction} places its stages on ranks {place}"
            raise ScheduleError(f"{plan.name}: {where}; every rank must hold as many")
    if not plan.placement or plan.micro_batches < 1:
        sizes = f"{plan.micro_batches} micro-batches, {len(plan.placement)} directions"
        raise ScheduleError(f"{plan.name}: nothing to run: {sizes}")


_AFTER = {"F": "", "I": "F", "B": "F", "W": "I"}  # what must have run last on the same stage and micro-batch
_NAMES = {"F": "forward", "I": "input gradient", "B": "backward", "W": "weight gradient"}


def _check_computations(plan: Plan, rank: int) -> tuple[float, int]:
    """Everything placed on a rank runs there once, in the order F, I, W; returns what it holds at most."""
    last: dict[tuple[int, int, int], str] = {}
    held = most_held = waiting = most_waiting = 0
    for index, instruction in enumerate(plan.instructions[rank]):
        if isinstance(instruction, Transfer):
            continue
        if isinstance(instruction, Pair) and (instruction.forward.kind != "F" or instruction.backward.kind not in "BI"):
            raise _error(plan, rank, index, "a pair is a forward and a backward (B or I)")
        for part in instruction.parts:
            key = (part.direction, part.stage, part.micro_batch)
            _check_part(plan, rank, index, part)
            before = last.get(key, "")
            if before != _AFTER[part.kind]:
                done = f"after its {_NAMES[before]}" if before else "before its forward"
                raise _error(plan, rank, index, f"the {_NAMES[part.kind]} of this stage and micro-batch comes {done}")
            last[key] = part.kind
            held += part.kind == "F"
            most_held, most_waiting = max(most_held, held), max(most_waiting, waiting + (part.kind == "I"))
            held -= part.kind in "WB"
            waiting += (part.kind == "I") - (part.kind == "W")
    for direction, place in enumerate(plan.placement):
        for stage in (stage for stage, holder in enumerate(place) if holder == rank):
            for micro_batch in range(plan.micro_batches_of(direction)):
                done = last.get((direction, stage, micro_batch), "")
                if done not in ("W", "B"):
                    missing = {"": "forward", "F": "input gradient", "I": "weight gradient"}[done]
                    name = f"{direction}.{micro_batch} of stage {stage}"
                    raise ScheduleError(f"{plan.name}: rank {rank} never runs the {missing} of {name}")
    return most_held / plan.chunks, most_waiting


def _check_part(plan: Plan, rank: int, index: int, part: Compute) -> None:
    if part.kind not in _AFTER:
        raise _error(plan, rank, index, f"{part.kind!r} is no computation; known: {', '.join(_AFTER)} and pairs")
    if not 0 <= part.direction < len(plan.placement):
        raise _error(plan, rank, index, f"there is no direction {part.direction}")
    place = plan.placement[part.direction]
    if not 0 <= part.stage < len(place):
        raise _error(plan, rank, index, f"there is no stage {part.stage}")
    if place[part.stage] != rank:
        where = f"stage {part.stage} of direction {part.direction}"
        raise _error(plan, rank, index, f"{where} is on rank {place[part.stage]}")
    count = plan.micro_batches_of(part.direction)
    if not 0 <= part.micro_batch < count:
        raise _error(plan, rank, index, f"direction {part.direction} has the micro-batches 0 to {count - 1}")


def _check_messages(plan: Plan) -> None:
    """Every message is sent once, after it is made, and its receive posted once, before its use; in one order."""
    sends: dict[tuple[int, int], list[Message]] = {}
    receives: dict[tuple[int, int], list[Message]] = {}
    for rank, order in enumerate(plan.instructions):
        made: set[Message] = set()
        posted: set[Message] = set()
        for index, instruction in enumerate(order):
            if not isinstance(instruction, Transfer):
                made.update(plan.gives(instruction))
                for message in plan.needs(instruction):
                    if message not in posted:
                        raise _error(plan, rank, index, f"no receive was posted for the {message}")
                    posted.discard(message)
                continue
            message = instruction.message
            pair = (message.source, message.destination)
            if instruction.kind not in ("S" + message.kind, "R" + message.kind):
                raise _error(plan, rank, index, f"{instruction.kind!r} does not move the {message}")
            if instruction.kind[0] == "S":
                if message not in made:
                    raise _error(plan, rank, index, "sent before it is made, twice, or to a rank that does not need it")
                made.discard(message)
                sends.setdefault(pair, []).append(message)
            else:
                if message in posted or message.destination != rank:
                    raise _error(plan, rank, index, "received twice, or by a rank that does not need it")
                posted.add(message)
                receives.setdefault(pair, []).append(message)
        for message in sorted(made, key=str):
            raise ScheduleError(f"{plan.name}: rank {rank} never sends the {message}")
    for pair in sorted(sends | receives):
        for sent, received in zip_longest(sends.get(pair, ()), receives.get(pair, ())):
            if sent != received:
                where = f"{plan.name}: ranks {pair[0]} and {pair[1]} disagree on the order of messages"
                raise ScheduleError(f"{where}: sent is the {sent}, where the receive is of the {received}")


def _check_progress(plan: Plan) -> None:
    """Runs the plan without clocks under rendezvous sends until all ranks are done."""
    posted: set[Message] = set()
    sent: set[Message] = set()
    position = [0] * plan.stages
    blocked: dict[Message, int] = {}  # the message a rank waits at -> that rank; two ranks never wait at one message
    runnable = list(range(plan.stages))
    while runnable:
        rank = runnable.pop()
        order = plan.instructions[rank]
        for index in range(position[rank], len(order)):
            stop = _run(plan, order[index], posted, sent, blocked, runnable)
            if stop is not None:
                position[rank] = index
                blocked[stop] = rank
                break
        else:
            position[rank] = len(order)
    if blocked:
        raise ScheduleError(f"{plan.name}: deadlock: " + "; ".join(_circle(plan, blocked, position)))


def _run(
    plan: Plan,
    instruction: Instruction,
    posted: set[Message],
    sent: set[Message],
    blocked: dict[Message, int],
    runnable: list[int],
) -> Message | None:
    """Runs one instruction, and frees the ranks that waited for it; returns the message it must wait for itself."""
    if not isinstance(instruction, Transfer):
        return next((message for message in plan.needs(instruction) if message not in sent), None)
    message = instruction.message
    if instruction.kind[0] == "S":
        if message not in posted:
            return message
        sent.add(message)
    else:
        posted.add(message)
    if message in blocked:
        runnable.append(blocked.pop(message))
    return None


def _circle(plan: Plan, blocked: dict[Message, int], position: list[int]) -> Iterable[str]:
    """The ranks that wait for each other, each with the place where it waits."""
    waits = {rank: message for message, rank in blocked.items()}
    seen: list[int] = []
    rank = min(waits)
    while rank in waits and rank not in seen:
        seen.append(rank)
        message = waits[rank]
        rank = message.source if rank == message.destination else message.destination
    for waiting in seen[seen.index(rank) :] if rank in seen else seen:
        instruction = plan.instructions[waiting][position[waiting]]
        yield f"rank {waiting} waits at instruction {position[waiting]} ({instruction}) for the {waits[waiting]}"


def _check_promise(plan: Plan, rank: int, what: str, count: float, limit: float | None) -> None:
    if limit is not None and count > limit + 1e-9:
        promise = f"more than the {limit:g} that the plan promises"
        raise ScheduleError(f"{plan.name}: rank {rank} holds {count:g} {what}, {promise}")


def _error(plan: Plan, rank: int, index: int, rule: str) -> ScheduleError:
    instruction = plan.instructions[rank][index]
    stage = "" if isinstance(instruction, Pair) else f" of stage {instruction.stage}"
    return ScheduleError(f"{plan.name}: rank {rank}, instruction {index} ({instruction}{stage}): {rule}")
