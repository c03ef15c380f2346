"""The verifier passes sound plans (test_schedules.py) and names what is wrong with each damaged one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.pipeline import Compute, Pair, Plan, ScheduleError, Times, Transfer, schedule, verify
from megatron_ext.pipeline.instructions import Instruction

EQUAL = Times()
PLAN = schedule("dualpipe", stages=4, micro_batches=8)


def find(plan: Plan, rank: int, text: str) -> int:
    """Where the instruction that reads like this stands."""
    return [str(instruction) for instruction in plan.instructions[rank]].index(text)


def remove(text: str, rank: int = 0) -> Callable[[Plan], None]:
    return lambda plan: plan.instructions[rank].pop(find(plan, rank, text)) and None


def duplicate(text: str, rank: int = 0) -> Callable[[Plan], None]:
    def damage(plan: Plan) -> None:
        index = find(plan, rank, text)
        plan.instructions[rank].insert(index, plan.instructions[rank][index])

    return damage


def swap(first: str, second: str, rank: int = 0) -> Callable[[Plan], None]:
    def damage(plan: Plan) -> None:
        order, a, b = plan.instructions[rank], find(plan, rank, first), find(plan, rank, second)
        order[a], order[b] = order[b], order[a]

    return damage


def change(text: str, rank: int = 0, **fields: object) -> Callable[[Plan], None]:
    def damage(plan: Plan) -> None:
        index = find(plan, rank, text)
        instruction = plan.instructions[rank][index]
        if isinstance(instruction, Transfer) and "kind" not in fields:
            instruction = instruction._replace(message=instruction.message._replace(**fields))
        else:
            instruction = instruction._replace(**fields)
        plan.instructions[rank][index] = instruction

    return damage


def move_to_end(text: str, rank: int = 0) -> Callable[[Plan], None]:
    return lambda plan: plan.instructions[rank].append(plan.instructions[rank].pop(find(plan, rank, text)))


def exchange_ranks(plan: Plan) -> None:
    plan.instructions[1], plan.instructions[2] = plan.instructions[2], plan.instructions[1]


def drop_a_rank(plan: Plan) -> None:
    plan.instructions.pop()


def misplace(plan: Plan) -> None:
    plan.placement[1][0] = plan.placement[1][1]


def pair_two_forwards(plan: Plan) -> None:
    index = find(plan, 0, "F0.3&B1.1")
    plan.instructions[0][index] = Pair(Compute("F", 0, 0, 3), Compute("F", 1, 3, 1))


DAMAGE = {
    "missing forward": (remove("F1.1"), r"rank 0, .*\(F0.3&B1.1\): the backward .* before its forward"),
    "missing last weight gradient": (remove("W0.3"), "rank 0 never runs the weight gradient of 0.3 of stage 0"),
    "missing last backward": (remove("B1.3"), "rank 0 never runs the input gradient of 1.3 of stage 3"),
    "double backward": (duplicate("B1.2"), r"\(B1.2 of stage 3\): the backward .* after its backward"),
    "double weight gradient": (duplicate("W0.2"), "the weight gradient .* after its backward or weight gradient"),
    "double forward": (duplicate("F0.1"), "the forward .* after its forward"),
    "weight gradient before input gradient": (swap("I1.0", "W1.0"), "weight gradient .* after its forward"),
    "backward before forward": (swap("F1.0", "I1.0"), "input gradient .* before its forward"),
    "data out of order": (swap("F0.1", "F0.2"), r"rank 0, instruction \d+ \(F0.2 of stage 0\): the first stage reads "
                          r"micro-batches in order, and the forward of 0.1 has not run"),
    "wrong micro-batch": (change("F0.2", micro_batch=9), r"F0.9 .*direction 0 has the micro-batches 0 to 3"),
    "micro-batch of another": (change("F0.2", micro_batch=1), "the forward .* after its forward"),
    "wrong stage": (change("F0.2", stage=1), "stage 1 of direction 0 is on rank 1"),
    "no such stage": (change("F0.2", stage=4), "there is no stage 4"),
    "wrong direction": (change("F0.2", direction=1), "stage 0 of direction 1 is on rank 3"),
    "no such direction": (change("F0.2", direction=2), "there is no direction 2"),
    "no such kind": (change("F0.2", kind="X"), "'X' is no computation"),
    "pair of forwards": (pair_two_forwards, "a pair is a forward and a backward"),
    "exchanged ranks": (exchange_ranks, "stage 2 of direction 0 is on rank 2|stage 1 of direction 1 is on rank 2"),
    "missing rank": (drop_a_rank, "4 ranks, but instructions for 3"),
    "uneven placement": (misplace, r"direction 1 places its stages on ranks \[2, 2, 1, 0\]"),
    "swapped sends": (swap("SF0.0>1", "SF0.1>1"), "sent before it is made"),
    "sends in another order": (move_to_end("SF0.1>1"), "ranks 0 and 1 disagree on the order of messages"),
    "swapped receives": (swap("RF0.0<0", "RF0.1<0", 1), "ranks 0 and 1 disagree on the order of messages"),
    "missing send": (remove("SF0.1>1"), "rank 0 never sends the activation 0.1 of stage 0, rank 0 to 1"),
    "missing receive": (remove("RF0.1<0", 1), "no receive was posted for the activation 0.1"),
    "late receive": (move_to_end("RF0.1<0", 1), "no receive was posted for the activation 0.1"),
    "double send": (duplicate("SF0.1>1"), "sent before it is made, twice"),
    "double receive": (duplicate("RF0.1<0", 1), "received twice"),
    "send to another rank": (change("SF0.1>1", destination=2), "to a rank that does not need it"),
    "receive of another's": (change("RF0.1<0", 1, destination=2), "by a rank that does not need it"),
    "receive of nothing": (change("RF0.1<0", 1, stage=2), "no receive was posted"),
    "send as receive": (change("SF0.1>1", kind="RF"), "received twice, or by a rank that does not need it"),
    "gradient sent as activation": (change("SF0.1>1", kind="SB"), "'SB' does not move the activation"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_named(name):
    damage, message = DAMAGE[name]
    plan = copy.deepcopy(PLAN)
    damage(plan)
    with pytest.raises(ScheduleError, match=message):
        verify(plan)


SOUND = {
    "plain": schedule("1f1b", 3, 5),
    "weight gradients apart": schedule("zb_h1", 3, 5),
    "ring of chunks": schedule("interleaved", 2, 4, chunks=3),
    "ring of chunks, pairs": schedule("interleaved_paired", 4, 8, chunks=2),
    "V": schedule("zbv", 3, 7),
    "V, pairs": schedule("dualpipev", 2, 5),
    "wave": schedule("wave", 2, 4, EQUAL, chunks=3),
    "both ways": PLAN,
    "both ways, few micro-batches": schedule("dualpipe", 4, 4, EQUAL),
    "both ways, W's banked": schedule("dualpipe_zb", 4, 9, EQUAL),
    "both ways, chunks": schedule("dualpipe_interleaved", 4, 6, EQUAL, chunks=2),
}


def copied(plan: Plan) -> Plan:
    """A plan with lists of its own; instructions cannot change."""
    return replace(plan, placement=[list(p) for p in plan.placement], instructions=[list(i) for i in plan.instructions])


def places(plan: Plan, wanted: Callable[[Instruction], bool]) -> list[tuple[int, int]]:
    """(rank, index) of the instructions that are wanted."""
    return [(rank, index) for rank, order in enumerate(plan.instructions) for index, i in enumerate(order) if wanted(i)]


def some(plan: Plan, wanted: Callable[[Instruction], bool]) -> tuple[list[Instruction], int]:
    """One of them from the middle of the plan: its rank's instructions, and where it is."""
    found = places(plan, wanted)
    rank, index = found[len(found) // 2]
    return plan.instructions[rank], index


def is_part(kinds: str) -> Callable[[Instruction], bool]:
    return lambda i: isinstance(i, Compute) and i.kind in kinds


def is_transfer(way: str) -> Callable[[Instruction], bool]:
    return lambda i: isinstance(i, Transfer) and i.kind[0] == way


def lose(wanted: Callable[[Instruction], bool]) -> Callable[[Plan], None]:
    def damage(plan: Plan) -> None:
        order, index = some(plan, wanted)
        del order[index]

    return damage


def double(wanted: Callable[[Instruction], bool]) -> Callable[[Plan], None]:
    def damage(plan: Plan) -> None:
        order, index = some(plan, wanted)
        order.insert(index, order[index])

    return damage


def swap_neighbours(way: str) -> Callable[[Plan], None]:
    """Two messages between the same ranks change places."""

    def damage(plan: Plan) -> None:
        order, first = some(plan, is_transfer(way))
        peer = order[first].peer
        others = [i for i, t in enumerate(order) if is_transfer(way)(t) and t.peer == peer and i != first]
        order[first], order[others[0]] = order[others[0]], order[first]

    return damage


def other_rank(plan: Plan) -> None:
    order, index = some(plan, is_part("F"))
    next(o for o in plan.instructions if o is not order).append(order.pop(index))


def gradient_first(plan: Plan) -> None:
    """A backward runs before everything else on its rank."""
    order, index = some(plan, is_part("BI"))
    order.insert(0, order.pop(index))


def forward_last(plan: Plan) -> None:
    order, index = some(plan, is_part("F"))
    order.append(order.pop(index))


def read_out_of_order(plan: Plan) -> None:
    """The last two micro-batches of direction 0 change names, on every stage and in every message alike."""
    last = plan.micro_batches_of(0) - 1
    other = {last: last - 1, last - 1: last}

    def renamed(part: Compute) -> Compute:
        return part._replace(micro_batch=other.get(part.micro_batch, part.micro_batch)) if part.direction == 0 else part

    for order in plan.instructions:
        for index, i in enumerate(order):
            if isinstance(i, Compute):
                order[index] = renamed(i)
            elif isinstance(i, Pair):
                order[index] = Pair(renamed(i.forward), renamed(i.backward))
            elif i.message.direction == 0:
                number = other.get(i.message.micro_batch, i.message.micro_batch)
                order[index] = i._replace(message=i.message._replace(micro_batch=number))


def change_micro_batch(plan: Plan) -> None:
    order, index = some(plan, is_part("F"))
    order[index] = order[index]._replace(micro_batch=order[index].micro_batch + 1)


def change_stage(plan: Plan) -> None:
    order, index = some(plan, is_part("F"))
    order[index] = order[index]._replace(stage=(order[index].stage + 1) % len(plan.placement[0]))


def wrong_peer(plan: Plan) -> None:
    order, index = some(plan, is_transfer("S"))
    message = order[index].message
    order[index] = order[index]._replace(message=message._replace(destination=message.source))


def break_promise(plan: Plan) -> None:
    object.__setattr__(plan, "activation_limit", max(verify(plan).activations) - 0.25)


def one_more_micro_batch(plan: Plan) -> None:
    object.__setattr__(plan, "micro_batches", plan.micro_batches + 1)


def uneven_placement(plan: Plan) -> None:
    plan.placement[0][0] = plan.placement[0][1]


ANYWHERE: dict[str, Callable[[Plan], None]] = {
    "lost forward": lose(is_part("F")),
    "lost backward": lose(is_part("BI")),
    "lost W": lose(lambda i: i.kind == "W"),
    "lost pair": lose(lambda i: i.kind == "FB"),
    "lost send": lose(is_transfer("S")),
    "lost receive": lose(is_transfer("R")),
    "double forward": double(is_part("F")),
    "double backward": double(is_part("BI")),
    "double W": double(lambda i: i.kind == "W"),
    "double send": double(is_transfer("S")),
    "swapped sends": swap_neighbours("S"),
    "swapped receives": swap_neighbours("R"),
    "on another rank": other_rank,
    "backward first": gradient_first,
    "forward last": forward_last,
    "data read in another order": read_out_of_order,
    "other micro-batch": change_micro_batch,
    "other stage": change_stage,
    "sent elsewhere": wrong_peer,
    "too many activations": break_promise,
    "a micro-batch that never comes": one_more_micro_batch,
    "uneven placement": uneven_placement,
}


@pytest.mark.parametrize("name", SOUND)
def test_every_damage_is_found_in_every_kind_of_plan(name):
    verify(SOUND[name])
    kinds = {i.kind for order in SOUND[name].instructions for i in order}
    for damage, apply in ANYWHERE.items():
        if (damage in ("lost W", "double W") and "W" not in kinds) or (damage == "lost pair" and "FB" not in kinds):
            continue
        plan = copied(SOUND[name])
        apply(plan)
        try:
            verify(plan)
        except ScheduleError:
            continue
        pytest.fail(f"{damage} was not found")


def test_what_one_rank_hands_to_itself_must_be_there():
    orders: list[list[Compute | Pair]] = [
        [Compute(kind, 0, stage, 0) for kind, stage in (("F", 0), ("F", 3), ("B", 3), ("B", 0))],
        [Compute(kind, 0, stage, 0) for kind, stage in (("F", 1), ("F", 2), ("B", 2), ("B", 1))],
    ]
    place = [[0, 1, 1, 0]]
    verify(Plan.from_compute("V", place, 1, orders))
    turned = [orders[0], [orders[1][1], orders[1][0], *orders[1][2:]]]
    with pytest.raises(ScheduleError, match=r"rank 1, .*\(F0.0 of stage 2\): stage 1, on the same rank, has not made"):
        verify(Plan.from_compute("forward too early", place, 1, turned))
    turned = [orders[0], [*orders[1][:2], orders[1][3], orders[1][2]]]
    with pytest.raises(ScheduleError, match=r"rank 1, .*\(B0.0 of stage 1\): stage 2, on the same rank, has not made"):
        verify(Plan.from_compute("backward too early", place, 1, turned))


def test_a_pair_of_one_micro_batch_on_one_stage_cannot_be():
    pair: list[list[Compute | Pair]] = [[Pair(Compute("F", 0, 0, 0), Compute("B", 0, 0, 0))]]
    with pytest.raises(ScheduleError, match="a backward cannot run beside its own forward"):
        verify(Plan.from_compute("impossible", [[0]], 1, pair))


@given(st.data())
def test_no_instruction_can_be_lost_doubled_or_renumbered(data):
    plan = copied(SOUND[data.draw(st.sampled_from(sorted(SOUND)))])
    order = plan.instructions[data.draw(st.integers(0, plan.stages - 1))]
    index = data.draw(st.integers(0, len(order) - 1))
    match data.draw(st.sampled_from(["lose", "double", "renumber"])):
        case "lose":
            order.pop(index)
        case "double":
            order.insert(data.draw(st.integers(0, len(order))), order[index])
        case _:
            old = order[index]
            shift = data.draw(st.integers(1, 3))
            if isinstance(old, Transfer):
                order[index] = old._replace(message=old.message._replace(micro_batch=old.micro_batch + shift))
            elif isinstance(old, Pair):
                backward = old.backward._replace(micro_batch=old.backward.micro_batch + shift)
                order[index] = old._replace(backward=backward)
            else:
                order[index] = old._replace(micro_batch=old.micro_batch + shift)
    with pytest.raises(ScheduleError):
        verify(plan)


def test_ranks_that_wait_for_each_other_are_named():
    orders = [PLAN.compute(rank) for rank in range(4)]
    orders[0].insert(0, orders[0].pop(3))
    orders[3].insert(0, orders[3].pop(3))
    with pytest.raises(ScheduleError, match=r"deadlock: rank \d waits at .* \(F\d.0\) for the activation .*; rank \d"):
        verify(Plan.from_compute("crossed", PLAN.placement, 8, orders))


def test_receives_posted_too_late_for_rendezvous_are_found():
    orders = [PLAN.compute(rank) for rank in range(4)]
    verify(Plan.from_compute("early", PLAN.placement, 8, orders, post_ahead=1))
    with pytest.raises(ScheduleError, match=r"deadlock: rank \d waits at instruction \d+ \(S[FB]"):
        verify(Plan.from_compute("just in time", PLAN.placement, 8, orders, post_ahead=0))


def test_promises_about_memory_are_checked():
    orders = [PLAN.compute(rank) for rank in range(4)]
    late = [[i for i in order if i.kind != "W"] + [i for i in order if i.kind == "W"] for order in orders]
    plan = Plan.from_compute("late W", PLAN.placement, 8, late)
    assert (verify(plan).activations, verify(plan).weight_grads) == ([6, 5, 5, 6], [3, 2, 2, 3])
    with pytest.raises(ScheduleError, match="rank 0 holds 6 activations, more than the 5"):
        verify(replace(plan, activation_limit=5))
    with pytest.raises(ScheduleError, match="rank 0 holds 3 waiting weight gradients, more than the 2"):
        verify(replace(plan, weight_grad_limit=2))
    assert (PLAN.activation_limit, PLAN.weight_grad_limit) == (5, 2)
