"""The instruction set: how instructions read, and which messages follow from an order of computations."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest

from megatron_ext.pipeline import Compute, Message, Pair, Plan, ScheduleError, Transfer, schedule


def test_instructions_read_tersely():
    forward, backward = Compute("F", 0, 2, 3), Compute("I", 1, 1, 0)
    message = Message("F", 0, 2, 3, source=2, destination=3)
    assert [str(i) for i in (forward, Pair(forward, backward), Transfer("SF", message), Transfer("RF", message))] == [
        "F0.3",
        "F0.3&I1.0",
        "SF0.3>3",
        "RF0.3<2",
    ]
    assert str(message) == "activation 0.3 of stage 2, rank 2 to 3"
    assert Pair(forward, backward).kind == "FB" and Pair(forward, backward).parts == (forward, backward)


def test_instructions_cannot_be_changed():
    with pytest.raises(AttributeError):
        Compute("F", 0, 0, 0).stage = 1  # type: ignore[misc]


def test_plan_lists_an_order_per_rank():
    plan = schedule("dualpipe", stages=2, micro_batches=2)
    assert str(plan).splitlines() == [
        "dualpipe: 2 ranks, 2 micro-batches",
        "  0| F0.0 F1.0 B1.0 I0.0 W0.0",
        "  1| F1.0 F0.0 B0.0 I1.0 W1.0",
    ]
    kinds = [i.kind for i in plan.instructions[0]]
    assert kinds.count("SF") == kinds.count("RF") == kinds.count("SB") == kinds.count("RB") == 1


def test_needs_and_gives_are_the_two_ends_of_every_message():
    plan = schedule("dualpipe", stages=6, micro_batches=12)
    needed: list[Message] = []
    given: list[Message] = []
    for rank in range(plan.stages):
        for instruction in plan.compute(rank):
            needed += plan.needs(instruction)
            given += plan.gives(instruction)
            assert all(m.destination == rank for m in plan.needs(instruction))
            assert all(m.source == rank for m in plan.gives(instruction))
    assert len(given) == len(set(given)) == 2 * (plan.stages - 1) * plan.micro_batches
    assert sorted(needed) == sorted(given)


def test_needs_and_gives_name_the_stage_that_made_the_data():
    plan = schedule("dualpipe", stages=4, micro_batches=8)
    assert plan.needs(Compute("F", 1, 1, 5)) == [Message("F", 1, 0, 5, source=3, destination=2)]
    assert plan.needs(Compute("B", 0, 1, 5)) == [Message("B", 0, 2, 5, source=2, destination=1)]
    assert plan.gives(Compute("I", 0, 1, 5)) == [Message("B", 0, 1, 5, source=1, destination=0)]
    pair = Pair(Compute("F", 0, 1, 7), Compute("B", 1, 2, 5))
    assert plan.gives(pair) == [
        Message("F", 0, 1, 7, source=1, destination=2),
        Message("B", 1, 2, 5, source=1, destination=2),
    ]
    for nothing in (Compute("F", 0, 0, 0), Compute("B", 1, 3, 0), Compute("W", 0, 1, 0)):
        assert plan.needs(nothing) == []
    for nothing in (Compute("F", 0, 3, 0), Compute("B", 1, 0, 0), Compute("W", 0, 1, 0)):
        assert plan.gives(nothing) == []


def test_neighbouring_stages_on_one_rank_exchange_no_messages():
    order: list[list[Compute | Pair]] = [[Compute("F", 0, stage, 0) for stage in stages] for stages in ((0, 3), (1, 2))]
    plan = Plan.from_compute("v", [[0, 1, 1, 0]], 1, order)
    assert plan.chunks == 2
    assert [str(i) for i in plan.instructions[1]] == ["RF0.0<0", "F0.0", "F0.0", "SF0.0>0"]


@pytest.mark.parametrize("post_ahead", [0, 1, 4])
def test_receives_come_early_in_the_order_of_the_sends(post_ahead):
    computed = schedule("dualpipe", stages=8, micro_batches=20)
    orders = [computed.compute(rank) for rank in range(8)]
    plan = Plan.from_compute("again", computed.placement, 20, orders, post_ahead=post_ahead)
    for rank, instructions in enumerate(plan.instructions):
        computations, posted = 0, {}
        for instruction in instructions:
            if isinstance(instruction, Transfer):
                if instruction.kind[0] == "R":
                    posted[instruction.message] = computations
                continue
            for message in plan.needs(instruction):
                assert computations - posted.pop(message) >= min(post_ahead, computations)
            computations += 1
        assert not posted
        for other in range(8):
            sent = [i.message for i in plan.instructions[other] if i.kind in ("SF", "SB") and i.peer == rank]
            received = [i.message for i in instructions if i.kind in ("RF", "RB") and i.peer == other]
            assert sent == received


def test_a_send_follows_its_computation():
    plan = schedule("dualpipe", stages=4, micro_batches=8)
    for instructions in plan.instructions:
        last = None
        for instruction in instructions:
            if instruction.kind in ("SF", "SB"):
                assert last is not None and instruction.message in plan.gives(last)
            elif not isinstance(instruction, Transfer):
                last = instruction


def test_an_order_with_a_message_that_nobody_makes_is_refused():
    plan = schedule("dualpipe", stages=4, micro_batches=8)
    orders = [plan.compute(rank) for rank in range(4)]
    without = [orders[0][1:], *orders[1:]]
    with pytest.raises(ScheduleError, match=r"activation 0\.0 of stage 0, rank 0 to 1: nobody makes it"):
        Plan.from_compute("damaged", plan.placement, 8, without)


def test_plans_are_copied_and_compared_by_value():
    plan = schedule("dualpipe", stages=4, micro_batches=8)
    other = copy.deepcopy(plan)
    assert other == plan
    other.instructions[0].pop()
    assert other != plan
    assert replace(plan, name="x").instructions is plan.instructions


@pytest.mark.parametrize(("micro_batches", "counts"), [(8, [4, 4]), (7, [4, 3])])
def test_micro_batches_are_counted_per_direction(micro_batches, counts):
    plan = replace(schedule("dualpipe", stages=4, micro_batches=8), micro_batches=micro_batches)
    assert [plan.micro_batches_of(direction) for direction in (0, 1)] == counts
