"""The simulator agrees with the closed formulas that are known, and with the project's earlier measurements."""

from __future__ import annotations

import pytest

from megatron_ext.config.errors import UserError
from megatron_ext.pipeline import Compute, Pair, Plan, ScheduleError, Times, schedule, simulate, verify
from tests.pipeline.known_orders import one_f_one_b, zb_h1

EP_BOUND = Times(2, 2, 1, pair=3.2)


@pytest.mark.parametrize("P", [2, 3, 4, 7, 8, 16])
def test_1f1b_and_zb_h1_have_their_published_bubbles(P):
    for m in (2 * P, 2 * P + 1, 5 * P):
        for times in (Times(), Times(1.0, 1.0, 0.6)):
            F, W = times.forward, times.weight_grad
            B = times.input_grad + W
            for plan, bubble in ((one_f_one_b(P, m), (P - 1) * (F + B)), (zb_h1(P, m), (P - 1) * (F + B - 2 * W))):
                assert max(verify(plan).activations) == P
                assert simulate(plan, times).bubble == pytest.approx([bubble] * P, abs=1e-9)


@pytest.mark.parametrize(
    ("P", "m", "times", "makespan"),
    [
        (4, 8, Times(pair=2.4), 23.6),
        (8, 16, Times(pair=2.4), 48.0),
        (16, 32, Times(pair=2.4), 96.8),
        (16, 32, EP_BOUND, 155.4),
        (16, 32, Times(2, 2, 1, pair=3.2, message=0.1), 160.5),
    ],
)
def test_dualpipe_makespans(P, m, times, makespan):
    assert simulate(schedule("dualpipe", P, m), times).makespan == pytest.approx(makespan, abs=1e-9)


def test_two_ranks_by_hand():
    result = simulate(one_f_one_b(2, 2), Times(1, 2, 3, message=0.5))
    assert [[(s.start, s.end, str(s.instruction)) for s in spans] for spans in result.timeline.ranks] == [
        [(0, 1, "F0.0"), (1, 2, "F0.1"), (8, 13, "B0.0"), (14, 19, "B0.1")],
        [(1.5, 2.5, "F0.0"), (2.5, 7.5, "B0.0"), (7.5, 8.5, "F0.1"), (8.5, 13.5, "B0.1")],
    ]
    assert result.makespan == 19 and result.bubble == [7, 7] and result.peak_activations == [2, 1]


def test_a_late_receive_delays_its_message():
    # rank 1 is busy until 2; the message it then needs was sent at 1 and takes 0.5
    order: list[list[Compute | Pair]] = [[Compute("F", 0, 0, 0)], [Compute("F", 1, 0, k) for k in (0, 1)]]
    order[0] += [Compute("F", 1, 1, k) for k in (0, 1)]
    order[1].append(Compute("F", 0, 1, 0))
    starts = []
    for post_ahead in (0, 1):
        plan = Plan.from_compute("forwards", [[0, 1], [1, 0]], 3, order, post_ahead=post_ahead)
        starts.append(simulate(plan, Times(message=0.5)).timeline.ranks[1][-1].start)
    assert starts == [2.5, 2.0]


def test_chunks_share_a_ranks_time():
    order: list[list[Compute | Pair]] = [
        [Compute(kind, 0, stage, 0) for kind, stage in (("F", 0), ("F", 3), ("I", 3), ("I", 0), ("W", 3), ("W", 0))],
        [Compute(kind, 0, stage, 0) for kind, stage in (("F", 1), ("F", 2), ("B", 2), ("B", 1))],
    ]
    plan = Plan.from_compute("v", [[0, 1, 1, 0]], 1, order)
    verify(plan)
    result = simulate(plan, Times())
    assert result.makespan == 4 * 0.5 + 0.5 + 2 * 1.0 + 3 * 0.5  # F F F F, I, B B on the other rank, I W W
    assert result.peak_activations == [1.0, 1.0]


def test_a_pair_with_an_input_gradient_leaves_its_weight_gradient():
    times = Times(1, 1, 0.75, pair=2.25)
    forward = Compute("F", 0, 0, 1)
    assert times.of(Pair(forward, Compute("B", 1, 1, 0))) == 2.25
    assert times.of(Pair(forward, Compute("I", 1, 1, 0))) == 1.5
    assert Times(1, 1, 0.75).of(Pair(forward, Compute("B", 1, 1, 0))) == 2.75


def test_a_deadlock_is_named():
    plan = schedule("dualpipe", 4, 8)
    orders = [plan.compute(rank) for rank in range(4)]
    orders[0].insert(0, orders[0].pop(3))  # rank 0 wants F1.0 before its own F0.0
    orders[3].insert(0, orders[3].pop(3))  # and rank 3 the other way round
    with pytest.raises(ScheduleError, match=r"rank \d waits for ever at instruction \d+: the activation"):
        simulate(Plan.from_compute("crossed", plan.placement, 8, orders))


@pytest.mark.parametrize("bad", [dict(forward=-1), dict(pair=0.5), dict(message=-0.1), dict(forward=float("nan"))])
def test_impossible_times_are_refused(bad):
    with pytest.raises(UserError, match="durations"):
        Times(**bad)
