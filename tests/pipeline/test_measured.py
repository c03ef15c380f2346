"""What a simulated job takes is measured back from its computations, as far as they show it."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import replace
from itertools import product

import pytest

from megatron_ext.config import ConfigError
from megatron_ext.config.errors import UserError
from megatron_ext.pipeline import Plan, Span, Times, schedule, simulate
from megatron_ext.pipeline.measured import IN_B, Durations, add_durations, add_weight_grads, measured_times
from megatron_ext.pipeline.schedules import NAMES

EXACT = {"rel": 1e-6, "abs": 1e-9}
EVEN = Times(20.0, 17.0, 9.0, pair=41.0, message=0.5)


def lengths(stages: int, seed: int = 0) -> tuple[float, ...]:
    """Unlike stages, 1 on the average; (0.67, 1.33) for two."""
    if stages == 2:
        return 0.67, 1.33
    draw = random.Random(seed)
    found = [draw.uniform(0.5, 2.0) for _ in range(stages)]
    return tuple(length * stages / sum(found) for length in found)


@pytest.fixture(scope="module")
def plans() -> list[Plan]:
    """Every schedule: a job measures with one of them."""
    found = []
    for P, chunks, name in product((1, 2, 4, 8), (1, 2, 3), NAMES):
        with suppress(ConfigError):
            found.append(schedule(name, P, max(8, 2 * P), EVEN, chunks))
    assert len(found) >= 40
    return found


def measure(plan: Plan, times: Times, in_b: bool = False, paired: bool = True) -> Times:
    """`times` as a run of the plan shows them; `in_b`: weight gradients within B's are timed."""
    seen: Durations = {}
    stages = len(plan.placement[0])
    for spans in simulate(plan, times).timeline.ranks:
        add_durations(seen, spans)
        full = [part.stage for span in spans for part in span.instruction.parts if part.kind == "B"]
        if in_b:
            each = [times.weight_grad * length / plan.chunks for length in times.lengths(stages)]
            add_weight_grads(seen, {stage: [each[stage]] * full.count(stage) for stage in full})
    return measured_times(seen, stages, plan.chunks, times.message, paired)


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("in_b", [False, True])
def test_every_schedule_shows_what_it_ran(plans, uneven, in_b):
    for plan in plans:
        stages = len(plan.placement[0])
        times = replace(EVEN, stages=lengths(stages)) if uneven and stages > 1 else EVEN
        found = measure(plan, times, in_b)
        kinds = {i.kind for rank in range(plan.stages) for i in plan.compute(rank)}
        where = f"{plan.name}, P = {plan.stages}, chunks = {plan.chunks}: {found}"
        if in_b or "W" in kinds:
            assert (found.input_grad, found.weight_grad) == pytest.approx((17, 9), **EXACT), where
        else:  # B is all there is
            assert found.input_grad == found.weight_grad == pytest.approx(13, **EXACT), where
        assert (found.forward, found.message) == pytest.approx((20, 0.5), **EXACT), where
        assert found.pair == (pytest.approx(41, **EXACT) if kinds & {"FB", "FI"} else None), where
        if times.stages is None:
            assert found.stages is None, where
        else:
            assert found.stages == pytest.approx(times.stages, **EXACT), where


def test_a_kind_is_compared_with_the_stages_it_ran_on():
    plan = schedule("dualpipe", 2, 8)
    where = {(i.kind, i.stage) for rank in range(2) for i in plan.compute(rank) if i.kind in "FIWB"}
    assert len([stage for kind, stage in where if kind == "F"]) == 2 > len([s for kind, s in where if kind == "B"])
    assert measure(plan, replace(EVEN, stages=(0.67, 1.33))).stages == pytest.approx((0.67, 1.33), **EXACT)
    # No stage has all kinds, and no kind all stages.
    seen: Durations = {("F", (0,)): [1.0], ("F", (1,)): [2.0], ("I", (1,)): [6.0], ("I", (2,)): [12.0],
                       ("W", (2,)): [4.0], ("W", (3,)): [1.0]}
    found = measured_times(seen, 4, 1, 0.0)
    assert found.stages == pytest.approx([x / 2 for x in (1, 2, 4, 1)], **EXACT)
    assert (found.forward, found.input_grad, found.weight_grad) == pytest.approx((2, 6, 2), **EXACT)


def test_full_backwards_tell_lengths_beside_split_ones():
    seen: Durations = {("F", (0,)): [1.0], ("I", (0,)): [1.5], ("W", (0,)): [0.5], ("B", (1,)): [6.0]}
    found = measured_times(seen, 2, 1, 0.0)
    assert found.stages == pytest.approx((0.5, 1.5), **EXACT)
    assert (found.forward, found.input_grad, found.weight_grad) == pytest.approx((2, 3, 1), **EXACT)


@pytest.mark.parametrize("name", ["dualpipe", "dualpipev", "wave", "interleaved_paired"])
def test_empty_weight_gradients_disturb_nothing(name):
    plan = schedule(name, 4, 8)
    stages = len(plan.placement[0])
    times = replace(EVEN, weight_grad=0.0, pair=31.0, stages=lengths(stages))
    found = measure(plan, times, in_b=True)
    assert found.stages == pytest.approx(times.stages, **EXACT)
    assert (found.forward, found.input_grad, found.weight_grad, found.pair) == pytest.approx((20, 17, 0, 31), **EXACT)


def test_a_stage_that_took_no_time_or_was_not_seen_is_like_the_others():
    seen: Durations = {("F", (0,)): [1.0], ("F", (1,)): [0.0], ("B", (0,)): [2.0], ("B", (1,)): [0.0]}
    assert measured_times(seen, 2, 1, 0.0).stages is None
    found = measured_times({("F", (0,)): [1.0], ("F", (1,)): [3.0], ("F", (2,)): []}, 3, 1, 0.0)
    assert (found.forward, found.stages) == (2, (0.5, 1.5, 1))
    with pytest.raises(UserError, match="time"):
        measured_times({("F", (0,)): [0.0], ("FB", (0, 0)): [0.0]}, 1, 1, 0.0)


def test_tiny_weight_gradients_have_no_say_in_lengths():
    seen: Durations = {("F", (0,)): [1.0], ("F", (1,)): [1.0], ("I", (0,)): [1.0], ("I", (1,)): [1.0],
                       ("W", (0,)): [1e-6], ("W", (1,)): [9e-6]}
    assert measured_times(seen, 2, 1, 0.0).stages is None


def test_weight_gradients_within_backwards_stand_in_for_those_that_never_ran_alone():
    seen: Durations = {("F", (0,)): [2.0], ("B", (0,)): [4.0, 3.0, 5.0]}
    halves = measured_times(seen, 1, 1, 0.0)
    assert (halves.input_grad, halves.weight_grad) == (2, 2)
    add_weight_grads(seen, {0: [1.0, 9.0]})
    add_weight_grads(seen, {0: [0.5]})
    assert seen[IN_B, (0,)] == [1, 9, 0.5]
    split = measured_times(seen, 1, 1, 0.0)
    assert (split.input_grad, split.weight_grad) == (3, 1)
    seen["W", (0,)] = [1.5]
    assert measured_times(seen, 1, 1, 0.0).weight_grad == 1.5, "what ran alone is what a W takes"
    # Within pairs it is known also where no B ran alone.
    pairs: Durations = {("F", (0,)): [2.0], ("F", (1,)): [2.0], ("B", (1,)): [4.0], ("FB", (0, 0)): [5.0],
                        (IN_B, (0,)): [1.0]}
    found = measured_times(pairs, 2, 1, 0.0)
    assert (found.input_grad, found.weight_grad, found.pair) == (3, 1, 5)


def test_pairs_that_nothing_runs_together_gain_nothing():
    plan = schedule("dualpipe", 4, 8)
    assert measure(plan, EVEN).pair == pytest.approx(41)
    assert measure(plan, EVEN, paired=False).pair is None


def test_unknown_kinds_are_ignored():
    seen: Durations = {}
    plan = schedule("dualpipe", 2, 6)
    for spans in simulate(plan, EVEN).timeline.ranks:
        add_durations(seen, spans)
    wanted = measured_times(seen, 2, 1, 0.5)
    seen["allreduce", ()] = [100.0]
    seen["X", (0, 1)] = [3.0]
    assert measured_times(seen, 2, 1, 0.5) == wanted


def test_medians_stand_against_the_odd_slow_one():
    plan = schedule("dualpipe", 2, 12)
    seen: Durations = {}
    for spans in simulate(plan, EVEN).timeline.ranks:
        add_durations(seen, [spans[0], *spans])
        add_durations(seen, [Span(span.start, span.start + 1000, span.instruction) for span in spans[:1]])
    found = measured_times(seen, 2, 1, 0.5)
    assert (found.forward, found.pair, found.stages) == (pytest.approx(20), pytest.approx(41), None)
