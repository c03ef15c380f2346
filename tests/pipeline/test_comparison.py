"""A run beside its plan: the delays that were put in are found where they were put, and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_ext.pipeline import Pair, Plan, ScheduleError, Span, Timeline, Times, draw, schedule, simulate
from megatron_ext.pipeline.comparison import compare, times_of_run
from megatron_ext.pipeline.drawing import draw_comparison
from megatron_ext.pipeline.timeline import describe

TIMES = Times(0.02, 0.02, 0.01, pair=0.045, message=0.002)


def run(plan: Plan, slow: dict[tuple[int, int], float], late: dict[tuple[int, int], float], times: Times = TIMES,
        start: float = 50.0) -> Timeline:
    """Runs a plan with extra time in, or before, the i-th computation of a rank; a bare executor without messages."""
    done: dict[object, float] = {}
    spans: list[list[Span]] = [[] for _ in range(plan.stages)]
    while any(len(spans[rank]) < len(plan.compute(rank)) for rank in range(plan.stages)):
        for rank in range(plan.stages):
            for index in range(len(spans[rank]), len(plan.compute(rank))):
                instruction = plan.compute(rank)[index]
                if any(message not in done for message in plan.needs(instruction)):
                    break
                ready = max([spans[rank][-1].end if spans[rank] else start,
                             *(done[message] + times.message for message in plan.needs(instruction))])
                begin = ready + late.get((rank, index), 0.0)
                end = begin + times.of(instruction) / plan.chunks + slow.get((rank, index), 0.0)
                spans[rank].append(Span(begin, end, instruction))
                done |= dict.fromkeys(plan.gives(instruction), end)
    return Timeline("a run", spans, plan.chunks)


@pytest.mark.parametrize("name", ["dualpipe", "1f1b", "zbv"])
def test_times_are_measured(name):
    plan = schedule(name, 4, 8)
    found = times_of_run(plan, run(plan, {(1, 5): 0.1}, {}))
    assert (found.forward, found.message) == pytest.approx((TIMES.forward, TIMES.message))
    assert found.input_grad + found.weight_grad == pytest.approx(TIMES.input_grad + TIMES.weight_grad)
    if name == "dualpipe":
        assert (found.input_grad, found.weight_grad, found.pair) == pytest.approx((0.02, 0.01, 0.045))


def test_unlike_stages_are_measured_and_not_called_late():
    plan = schedule("dualpipe_zb", 4, 12)
    ran = simulate(plan, replace(TIMES, stages=(0.7, 0.9, 0.9, 1.5))).timeline
    found = times_of_run(plan, ran)
    assert found.stages == pytest.approx((0.7, 0.9, 0.9, 1.5))
    assert (found.forward, found.input_grad, found.weight_grad, found.pair) == pytest.approx((0.02, 0.02, 0.01, 0.045))
    assert max(operation.delay for operation in compare(plan, ran).operations) < 1e-6


@pytest.mark.parametrize("name", ["dualpipe", "1f1b", "zbv"])
def test_what_ran_as_planned_is_not_late(name):
    plan = schedule(name, 4, 8)
    comparison = compare(plan, run(plan, {}, {}), TIMES)
    assert max(operation.delay for operation in comparison.operations) < 1e-9
    assert comparison.planned.end - comparison.planned.start == pytest.approx(comparison.ran.end - comparison.ran.start)
    assert all(o.planned.start == pytest.approx(o.ran.start) for o in comparison.operations)


@pytest.mark.parametrize("times", [TIMES, None])
def test_only_the_computations_that_lost_time_are_named(times):
    plan = schedule("dualpipe", 4, 12)
    ran = run(plan, {(1, 7): 0.5, (2, 3): 0.2}, {(3, 4): 0.3})
    comparison = compare(plan, ran, times)
    late = comparison.latest(3)
    assert [(o.rank, o.ran.instruction) for o in late] == [
        (rank, plan.compute(rank)[index]) for rank, index in ((1, 7), (3, 4), (2, 3))]
    assert [o.delay for o in late] == pytest.approx([0.5, 0.3, 0.2], abs=1e-6)
    assert [o.longer for o in late] == pytest.approx([0.5, 0, 0.2], abs=1e-6)
    assert [o.waited for o in late] == pytest.approx([0, 0.3, 0], abs=1e-6)
    assert comparison.latest(100)[3:] == [] or comparison.latest(100)[3].delay < 1e-6
    inherited = [o for o in comparison.operations if o.ran.start - o.planned.start > 0.4]
    assert len(inherited) > 10  # which is why they are not blamed


def test_a_late_message_names_its_sender():
    plan = schedule("1f1b", 2, 4)
    [late] = compare(plan, run(plan, {}, {(1, 0): 0.3}), TIMES).latest(1)
    assert (late.rank, late.source, late.waited) == (1, 0, pytest.approx(0.3))


def test_a_run_of_another_plan_is_refused():
    plan = schedule("dualpipe", 4, 8)
    ran = run(plan, {}, {})
    for other, message in ((schedule("dualpipe", 4, 10), "rank 0: .* computations ran, and the plan dualpipe has"),
                           (schedule("dualpipe", 2, 8), "4 ranks ran, and the plan dualpipe has 2")):
        with pytest.raises(ScheduleError, match=message):
            compare(other, ran)
    spans = ran.ranks[2]
    swapped = [Span(*spans[0][:2], spans[1].instruction), Span(*spans[1][:2], spans[0].instruction), *spans[2:]]
    with pytest.raises(ScheduleError, match=r"rank 2, computation 0: .* ran where the plan dualpipe has"):
        compare(plan, replace(ran, ranks=[*ran.ranks[:2], swapped, ran.ranks[3]]))


def test_the_picture_frames_what_was_late(tmp_path):
    plan = schedule("dualpipe", 4, 8)
    comparison = compare(plan, run(plan, {(1, 4): 0.1}, {}), TIMES)
    svg = draw_comparison(comparison, tmp_path / "both.svg", comparison.latest(1)).read_text()
    assert "dualpipe, planned" in svg and "a run" in svg and "dualpipe, planned: rank" in svg
    plain = draw_comparison(comparison, tmp_path / "plain.svg").read_text()
    assert svg.count("stroke: #000000; stroke-width: 1.8") == 2 + plain.count("stroke: #000000; stroke-width: 1.8")
    assert svg.count("<g id=\"axes_") == 3 and draw(comparison.ran, tmp_path / "one.svg").exists()


def test_descriptions_name_stages():
    pair = next(i for i in schedule("dualpipe", 2, 4).compute(0) if isinstance(i, Pair))
    assert describe(pair) == f"{pair.forward}@{pair.forward.stage} & {pair.backward}@{pair.backward.stage}"
