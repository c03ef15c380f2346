"""The simulator agrees with the closed formulas that are known, and with the project's earlier measurements."""

from __future__ import annotations

import pytest

from megatron_ext.config.errors import ConfigError
from megatron_ext.pipeline import Compute, Pair, Plan, ScheduleError, Times, schedule, simulate, verify

EP_BOUND = Times(2, 2, 1, pair=3.2)


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
    result = simulate(schedule("1f1b", 2, 2), Times(1, 2, 3, message=0.5))
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


def test_stages_of_different_lengths():
    times = Times(1, 2, 3, stages=(1, 3))
    result = simulate(schedule("1f1b", 2, 1), times)
    assert [(s.start, s.end) for spans in result.timeline.ranks for s in spans] == [(0, 1), (19, 24), (1, 4), (4, 19)]
    assert result.bubble == [18, 6]


def test_lengths_describe_the_model_not_the_plan():
    times = Times(stages=(1, 2, 3, 6))
    assert times.lengths(4) == [1, 2, 3, 6] and times.lengths(2) == [1.5, 4.5] and times.lengths(1) == [3]
    assert times.lengths(8) == [1, 1, 2, 2, 3, 3, 6, 6]
    assert times.lengths(3) == pytest.approx([1.25, 2.5, 5.25])
    assert Times().lengths(3) == [1, 1, 1]


def test_a_pair_of_two_stages_gains_the_mean():
    order: list[list[Compute | Pair]] = [
        [Compute("F", 0, 0, 0), Compute("F", 0, 1, 0), Pair(Compute("F", 0, 0, 1), Compute("I", 0, 1, 0))]]
    order[0] += [Compute("F", 0, 1, 1), *(Compute(kind, 0, stage, k) for kind, stage, k in (
        ("W", 1, 0), ("B", 0, 0), ("B", 1, 1), ("B", 0, 1)))]
    plan = Plan.from_compute("pair", [[0, 0]], 2, order)
    verify(plan)
    pair = simulate(plan, Times(2, 4, 6, pair=10, stages=(1, 3))).timeline.ranks[0][2]
    assert pair.end - pair.start == pytest.approx((2 * 1 + 4 * 3 - (2 * 1 + 2 * 3) / 2) / 1 / 2)  # two chunks


@pytest.mark.parametrize(
    ("bad", "message"),
    [(dict(forward=-1), "^forward = -1: .*not negative"), (dict(message=-0.1), "^message = -0.1: .*not negative"),
     (dict(weight_grad=float("nan")), "^weight_grad = nan: "),
     (dict(forward=0, input_grad=0, weight_grad=0), "^forward = 0: "),
     (dict(pair=0.5), "^pair = 0.5: .*not shorter than its W, 1$"), (dict(pair=float("nan")), "^pair = nan: "),
     (dict(stages=(1, 0)), r"^stages = \(1, 0\): .*above 0"), (dict(stages=()), r"^stages = \(\): ")],
)
def test_impossible_times_are_refused(bad, message):
    with pytest.raises(ConfigError, match=message):
        Times(**bad)
