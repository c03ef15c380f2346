"""Proves that a plan computes every micro-batch once, in an order that cannot hang, within the memory it promises.

Messages are matched without tags: between two ranks the order of the sends must be the order of the receives, which
also orders every channel (kind, direction) of the pair. Freedom from deadlock is shown under rendezvous, the strictest
transport: a send blocks its rank until the receiver has posted the receive, at the place where the plan posts it.
On the first stage of a direction forwards come in the order of micro-batches, in which data is read.

One pass over the instructions of a rank checks what a rank can know, and writes down for the second check, of all ranks
together, where it sends, posts and waits, as integers: a plan of 32 ranks and 128 micro-batches takes about 0.1 s.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest

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


@dataclass(frozen=True)
class Verified:
    """What a sound plan holds at most, for each rank.

    Attributes:
        activations: from the F to the W, in a rank's whole share of the model for one micro-batch.
        weight_grads: input gradients of a stage whose W has not run.
    """

    activations: list[float]
    weight_grads: list[int]


@without_cycles
def verify(plan: Plan) -> Verified:
    """Checks a plan; cheap enough to run before every start.

    Raises:
        ScheduleError: with the rank, the instruction and the rule it breaks.
    """
    _check_placement(plan)
    check = _Check(plan)
    peaks = [check.rank(rank) for rank in range(plan.stages)]
    verified = Verified([held / plan.chunks for held, _ in peaks], [waiting for _, waiting in peaks])
    check.all_done()
    check.message_order()
    check.progress()
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


# How far a micro-batch has come on a stage, what must have run last before each kind, and what has run after it.
_NOTHING, _FORWARD, _INPUT_GRAD, _DONE = range(4)
_STATES = {"F": (_NOTHING, _FORWARD), "I": (_FORWARD, _INPUT_GRAD), "B": (_FORWARD, _DONE), "W": (_INPUT_GRAD, _DONE)}
_NAMES = {"F": "forward", "I": "input gradient", "B": "backward", "W": "weight gradient"}
_SENDS, _POSTS, _WAITS = range(3)  # what a rank does with a message


class _Check:
    """A plan under verification, and what is known of it so far.

    Attributes:
        state: of every (direction, stage, micro-batch), one after the other.
        holds: for each rank (direction, stage) -> (where its micro-batches begin in `state`, how many they are,
            the ranks of the stages before and after; -1 where no message passes).
        numbers: message -> a small integer.
        steps: for each rank what it does with messages, in order: 3 x number + `_SENDS`, `_POSTS` or `_WAITS`.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        before, after = neighbours(plan.placement)
        self.holds: list[dict[tuple[int, int], tuple[int, int, int, int]]] = [{} for _ in range(plan.stages)]
        size = 0
        for direction, place in enumerate(plan.placement):
            count = plan.micro_batches_of(direction)
            for stage, rank in enumerate(place):
                here = (size, count, before[direction][stage], after[direction][stage])
                self.holds[rank][direction, stage] = here
                size += count
        self.state = bytearray(size)
        self.numbers: dict[tuple, int] = {}
        self.steps: list[list[int]] = [[] for _ in range(plan.stages)]
        self.sent: dict[tuple[int, int], list[Message]] = {}
        self.received: dict[tuple[int, int], list[Message]] = {}
        self.wrong: ScheduleError | None = None

    def rank(self, rank: int) -> tuple[int, int]:
        """What runs on a rank belongs there and runs once, in the order F, I, W, between its messages.

        Returns:
            The most activations and the most input gradients without their W that the rank holds.
        """
        plan, holds, state, steps, numbers = self.plan, self.holds[rank], self.state, self.steps[rank], self.numbers
        made: set[tuple] = set()
        posted: set[tuple] = set()
        held = most_held = waiting = most_waiting = 0
        for index, instruction in enumerate(plan.instructions[rank]):
            if isinstance(instruction, Transfer):
                self._transfer(rank, index, instruction, made, posted)
                continue
            if isinstance(instruction, Pair):
                self._check_pair(rank, index, instruction)
            for part in instruction if isinstance(instruction, Pair) else (instruction,):
                kind, direction, stage, micro_batch = part
                here = holds.get((direction, stage))
                if here is None or kind not in _STATES or not 0 <= micro_batch < here[1]:
                    raise self._misplaced(rank, index, part)
                base, count, before, after = here
                wanted, reached = _STATES[kind]
                if state[base + micro_batch] != wanted:
                    raise self._out_of_order(rank, index, part, state[base + micro_batch])
                if kind == "F" and stage == 0 and micro_batch and state[base + micro_batch - 1] == _NOTHING:
                    missing = f"the forward of {direction}.{micro_batch - 1} has not run"
                    raise self._error(rank, index, f"the first stage reads micro-batches in order, and {missing}")
                state[base + micro_batch] = reached
                if kind == "W":
                    held -= 1
                    waiting -= 1
                    continue
                if kind == "F":
                    held += 1
                    most_held = max(most_held, held)
                    source, target, maker, flow = before, after, stage - 1, "F"
                    local, given = base - count, _FORWARD
                else:
                    if kind == "I":
                        waiting += 1
                        most_waiting = max(most_waiting, waiting)
                    else:
                        held -= 1
                    source, target, maker, flow = after, before, stage + 1, "B"
                    local, given = base + count, _INPUT_GRAD
                if source >= 0:
                    message: tuple = (flow, direction, maker, micro_batch, source, rank)
                    if message in posted:
                        posted.remove(message)
                        steps.append(3 * numbers[message] + _WAITS)
                    else:
                        self._note(rank, index, f"no receive was posted for the {Message(*message)}")
                elif (direction, maker) in holds and state[local + micro_batch] < given:
                    rule = f"stage {maker}, on the same rank, has not made what it needs"
                    raise self._error(rank, index, rule)
                if target >= 0:
                    made.add((flow, direction, stage, micro_batch, rank, target))
        if made and self.wrong is None:
            self.wrong = ScheduleError(f"{plan.name}: rank {rank} never sends the {Message(*min(made))}")
        return most_held, most_waiting

    def _transfer(self, rank: int, index: int, transfer: Transfer, made: set[tuple], posted: set[tuple]) -> None:
        kind, message = transfer
        if kind == "SF" or kind == "SB":
            if message not in made:
                return self._note(rank, index, "sent before it is made, twice, or to a rank that does not need it")
            made.remove(message)
            self.sent.setdefault((rank, message.destination), []).append(message)
            action = _SENDS
        else:
            if message in posted or message.destination != rank:
                return self._note(rank, index, "received twice, or by a rank that does not need it")
            posted.add(message)
            self.received.setdefault((message.source, rank), []).append(message)
            action = _POSTS
        if kind[1] != message.kind or kind[0] not in "SR":
            return self._note(rank, index, f"{kind!r} does not move the {message}")
        self.steps[rank].append(3 * self.numbers.setdefault(message, len(self.numbers)) + action)

    def _note(self, rank: int, index: int, rule: str) -> None:
        """Keeps the first message that is wrong; what is wrong with computations explains more and is told first."""
        self.wrong = self.wrong or self._error(rank, index, rule)

    def _check_pair(self, rank: int, index: int, pair: Pair) -> None:
        if pair.forward.kind != "F" or pair.backward.kind not in ("B", "I"):
            raise self._error(rank, index, "a pair is a forward and a backward (B or I)")
        if pair.forward[1:] == pair.backward[1:]:
            raise self._error(rank, index, "a backward cannot run beside its own forward")

    def all_done(self) -> None:
        """Nothing is left out."""
        if self.state.count(_DONE) == len(self.state):
            return
        for rank, holds in enumerate(self.holds):
            for (direction, stage), (base, count, _, _) in holds.items():
                for micro_batch in range(count):
                    if (state := self.state[base + micro_batch]) != _DONE:
                        missing = {_NOTHING: "forward", _FORWARD: "input gradient", _INPUT_GRAD: "weight gradient"}
                        name = f"{direction}.{micro_batch} of stage {stage}"
                        raise ScheduleError(f"{self.plan.name}: rank {rank} never runs the {missing[state]} of {name}")

    def message_order(self) -> None:
        """Between two ranks everything is received in the order in which it was sent."""
        if self.wrong is not None:
            raise self.wrong
        if self.sent == self.received:
            return
        for pair in sorted(self.sent | self.received):
            for sent, received in zip_longest(self.sent.get(pair, ()), self.received.get(pair, ())):
                if sent != received:
                    where = f"{self.plan.name}: ranks {pair[0]} and {pair[1]} disagree on the order of messages"
                    raise ScheduleError(f"{where}: sent is the {sent}, where the receive is of the {received}")

    def progress(self) -> None:
        """Runs the plan without clocks under rendezvous sends until all ranks are done."""
        done = [bytearray(len(self.numbers)) for _ in (_SENDS, _POSTS)]
        sent, posted = done[_SENDS], done[_POSTS]
        blocked = [-1] * len(self.numbers)  # the rank that waits at a message; two never wait at one
        position = [0] * self.plan.stages
        runnable = list(range(self.plan.stages))
        while runnable:
            rank = runnable.pop()
            steps = self.steps[rank]
            for index in range(position[rank], len(steps)):
                step = steps[index]
                number, action = step // 3, step % 3
                if action == _POSTS:
                    posted[number] = 1
                elif not (posted if action == _SENDS else sent)[number]:
                    blocked[number] = rank
                    position[rank] = index
                    break
                elif action == _SENDS:
                    sent[number] = 1
                else:
                    continue
                if blocked[number] >= 0:
                    runnable.append(blocked[number])
                    blocked[number] = -1
            else:
                position[rank] = len(steps)
        waits = {rank: message for message, rank in zip(self.numbers, blocked, strict=True) if rank >= 0}
        if waits:
            stuck = {rank: Message(*message) for rank, message in waits.items()}
            raise ScheduleError(f"{self.plan.name}: deadlock: " + "; ".join(self._circle(stuck, position)))

    def _circle(self, waits: dict[int, Message], position: list[int]) -> Iterable[str]:
        """The ranks that wait for each other, each with the place where it waits."""
        seen: list[int] = []
        rank = min(waits)
        while rank in waits and rank not in seen:
            seen.append(rank)
            message = waits[rank]
            rank = message.source if rank == message.destination else message.destination
        for waiting in seen[seen.index(rank) :] if rank in seen else seen:
            steps = 0
            for index, instruction in enumerate(self.plan.instructions[waiting]):
                steps += 1 if isinstance(instruction, Transfer) else len(self.plan.needs(instruction))
                if steps > position[waiting]:
                    yield f"rank {waiting} waits at instruction {index} ({instruction}) for the {waits[waiting]}"
                    break

    def _misplaced(self, rank: int, index: int, part: Compute) -> ScheduleError:
        """Why a computation is not one of this rank's."""
        if part.kind not in _STATES:
            return self._error(rank, index, f"{part.kind!r} is no computation; known: {', '.join(_STATES)} and pairs")
        if not 0 <= part.direction < len(self.plan.placement):
            return self._error(rank, index, f"there is no direction {part.direction}")
        place = self.plan.placement[part.direction]
        if not 0 <= part.stage < len(place):
            return self._error(rank, index, f"there is no stage {part.stage}")
        if place[part.stage] != rank:
            where = f"stage {part.stage} of direction {part.direction}"
            return self._error(rank, index, f"{where} is on rank {place[part.stage]}")
        count = self.plan.micro_batches_of(part.direction)
        return self._error(rank, index, f"direction {part.direction} has the micro-batches 0 to {count - 1}")

    def _out_of_order(self, rank: int, index: int, part: Compute, state: int) -> ScheduleError:
        done = {_NOTHING: "before its forward", _FORWARD: "after its forward", _INPUT_GRAD: "after its input gradient",
                _DONE: "after its backward or weight gradient"}[state]
        return self._error(rank, index, f"the {_NAMES[part.kind]} of this stage and micro-batch comes {done}")

    def _error(self, rank: int, index: int, rule: str) -> ScheduleError:
        instruction = self.plan.instructions[rank][index]
        stage = "" if isinstance(instruction, Pair) else f" of stage {instruction.stage}"
        return ScheduleError(f"{self.plan.name}: rank {rank}, instruction {index} ({instruction}{stage}): {rule}")


def _check_promise(plan: Plan, rank: int, what: str, count: float, limit: float | None) -> None:
    if limit is not None and count > limit + 1e-9:
        promise = f"more than the {limit:g} that the plan promises"
        raise ScheduleError(f"{plan.name}: rank {rank} holds {count:g} {what}, {promise}")
