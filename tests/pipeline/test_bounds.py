"""Lower bounds: the values this project has proved before, and no schedule beats them (test_searched.py too)."""

from __future__ import annotations

import pytest

from megatron_ext.parallel.placement import bidirectional, ring, wave
from megatron_ext.pipeline import Times, schedule, simulate
from megatron_ext.pipeline.bounds import any_placement_bound, lower_bound

EP_BOUND = Times(2, 2, 1, pair=3.2)


@pytest.mark.parametrize(
    ("placement", "bound"),
    [(bidirectional(16), 145.2), (bidirectional(16, 2), 138.2), (bidirectional(16, 4), 134.7), (wave(16, 4), 138.7)],
)
def test_bounds_of_placements(placement, bound):
    assert lower_bound(placement, 32, EP_BOUND, 17) == pytest.approx(bound)


def test_bounds_of_any_placement_fall_with_the_number_of_chunks():
    bounds = [any_placement_bound(16, 32, chunks, 2, EP_BOUND, 17) for chunks in (1, 2, 4, 100)]
    assert bounds == pytest.approx([145.0, 138.0, 134.5, 131.326], abs=1e-3)
    assert any_placement_bound(16, 32, 4, 1, EP_BOUND, 17) == pytest.approx(138.5)


def test_one_rank_without_waiting_reaches_it():
    assert lower_bound(ring(1), 5, Times()) == 15 == simulate(schedule("1f1b", 1, 5)).makespan


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb_h1", "interleaved", "interleaved_paired", "zbv", "dualpipe",
                                  "dualpipev", "chimera"])
def test_no_schedule_beats_them(name):
    for P, m in ((2, 4), (4, 8), (8, 16)):
        plan = schedule(name, P, m)
        for times in (Times(), EP_BOUND, Times(1, 2, 0.5, 2.7, message=0.2), Times(pair=3.5),
                      Times(pair=2.4, stages=tuple(1 + k % 3 for k in range(8)))):
            bound = lower_bound(plan.placement, m, times, plan.activation_limit)
            assert simulate(plan, times).makespan >= bound - 1e-9
            copies = len(plan.placement)
            assert bound >= any_placement_bound(P, m, plan.chunks, copies, times, plan.activation_limit) - 1e-9
