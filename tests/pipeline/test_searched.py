"""Searched orders: sound at any size, times and memory limit, and as short as this project has reached before."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.pipeline import Plan, Times, schedule, simulate, verify
from megatron_ext.pipeline.bounds import any_placement_bound, lower_bound

EQUAL, OVERLAPPED, EP_BOUND = Times(), Times(pair=2.4), Times(2, 2, 1, pair=3.2)
LATE = Times(2, 2, 1, pair=3.2, message=0.1)
NAMES = ("dualpipe", "dualpipe_zb", "dualpipe_interleaved", "wave")


@cache
def made(name: str, P: int, m: int, times: Times | None = None, chunks: int = 1, limit: float | None = None) -> Plan:
    return schedule(name, P, m, times, chunks, limit)


def check(plan: Plan, times: Times, limit: float) -> float:
    """The makespan of a plan that is sound, within its limit and not shorter than what is possible."""
    verified = verify(plan)
    result = simulate(plan, times)
    assert max(verified.activations) <= limit
    assert result.peak_activations == verified.activations
    bound = lower_bound(plan.placement, plan.micro_batches, times, limit)
    copies = len(plan.placement)
    assert result.makespan >= bound - 1e-9
    assert bound >= any_placement_bound(plan.stages, plan.micro_batches, plan.chunks, copies, times, limit) - 1e-9
    return result.makespan


@pytest.mark.parametrize(
    ("name", "m", "chunks", "times", "makespan"),
    [
        ("dualpipe_zb", 32, 1, OVERLAPPED, 94.0),  # bubble 7.0, DualPipe 9.8
        ("dualpipe_zb", 32, 1, EP_BOUND, 147.8),  # DualPipe 155.4
        ("dualpipe_zb", 32, 1, LATE, 151.4),  # DualPipe 160.5
        ("dualpipe_zb", 8, 1, EQUAL, 39),
        ("dualpipe_zb", 16, 1, EQUAL, 55),
        ("dualpipe_zb", 24, 1, EQUAL, 79),
        ("dualpipe_interleaved", 32, 2, OVERLAPPED, 89.9),  # this and the next are their lower bounds
        pytest.param("dualpipe_interleaved", 32, 4, OVERLAPPED, 88.15, marks=pytest.mark.slow),
        ("dualpipe_interleaved", 32, 2, EP_BOUND, 138.4),
        ("dualpipe_interleaved", 32, 4, EP_BOUND, 134.95),
        ("dualpipe_interleaved", 32, 2, LATE, 144.3),
        ("wave", 32, 4, EP_BOUND, 139.4),
        pytest.param("wave", 32, 4, OVERLAPPED, 90.15, marks=pytest.mark.slow),
        pytest.param("wave", 32, 4, LATE, 147.3, marks=pytest.mark.slow),
        pytest.param("dualpipe_interleaved", 32, 4, LATE, 142.05, marks=pytest.mark.slow),
    ],
)
def test_sixteen_ranks(name, m, chunks, times, makespan):
    assert check(made(name, 16, m, times, chunks), times, 17) <= makespan + 1e-6


def test_weight_gradients_fill_dualpipes_drain():
    for P, m, makespan in ((4, 8, 23.2), (8, 16, 46.8), (8, 20, 56.4)):
        plan = made("dualpipe_zb", P, m, OVERLAPPED)
        assert check(plan, OVERLAPPED, P + 1) <= makespan + 1e-6
        assert max(simulate(plan, OVERLAPPED).bubble) == pytest.approx(P / 2 - 1)
        base = schedule("dualpipe", P, m)
        for rank in range(P):  # the order of everything else is DualPipe's
            orders = [[part[1:] for i in p.compute(rank) for part in i.parts if part.kind != "W"] for p in (base, plan)]
            assert orders[0] == orders[1]


@pytest.mark.parametrize("P", [4, 8])
def test_few_micro_batches_beat_1f1b_and_zb_h1(P):
    for m in range(2, 2 * P - 2, 4):
        plan = made("dualpipe", P, m)
        verify(plan)
        for times in (EQUAL, OVERLAPPED):
            rival = min(simulate(schedule(name, P, m), times).makespan for name in ("1f1b", "zb_h1"))
            assert simulate(plan, times).makespan <= rival - 1 + 1e-9


@pytest.mark.parametrize(("P", "m"), [(4, 4), (6, 8), (8, 8), (8, 12), (12, 20)])
def test_orders_made_for_equal_times_reach_the_lower_bound(P, m):
    assert check(made("dualpipe", P, m, EQUAL), EQUAL, P + 1) == pytest.approx(3 * m + P / 2 - 1)


def test_measured_times_shape_the_order():
    overlapped = simulate(made("dualpipe", 12, 20, OVERLAPPED), OVERLAPPED).makespan
    assert overlapped <= 61
    assert simulate(made("dualpipe", 12, 20, EQUAL), OVERLAPPED).makespan > overlapped + 1


def test_orders_that_know_the_latency_beat_those_that_do_not():
    times = Times(2, 2, 1, pair=3.2, message=0.3)
    knowing, unaware = made("wave", 4, 8, times, 4), made("wave", 4, 8, EP_BOUND, 4)
    assert check(knowing, times, 5) < simulate(unaware, times).makespan - 0.5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("P", "m"), [(2, 2), (4, 6), (6, 4)])
def test_orders_without_measured_times(name, P, m):
    check(made(name, P, m, None, 2 if name in NAMES[2:] else 1), EQUAL, P + 1)


@given(
    name=st.sampled_from(NAMES),
    P=st.sampled_from([2, 4, 6]),
    m=st.integers(1, 12),
    chunks=st.integers(1, 3),
    limit=st.none() | st.integers(2, 6),
    times=st.tuples(st.floats(0.3, 3), st.floats(0.3, 3), st.floats(0.1, 3), st.floats(0.65, 1), st.floats(0, 0.3)),
)
@settings(max_examples=12, deadline=None)
def test_any_size_and_times_are_sound(name, P, m, chunks, limit, times):
    forward, input_grad, weight_grad, gain, message = times
    pair = max(gain * (forward + input_grad + weight_grad), weight_grad)
    measured = Times(forward, input_grad, weight_grad, pair, message)
    if name == "dualpipe":
        m = min(2 * m, max(2, 2 * P - 4))
    plan = schedule(name, P, m, measured, chunks if name in NAMES[2:] else 1, limit)
    check(plan, measured, P + 1 if limit is None else limit)


@pytest.mark.parametrize(("name", "least"), [("dualpipe_interleaved", 2), ("wave", 1)])
def test_every_memory_limit_has_an_order(name, least):
    lengths = [check(made(name, 4, 8, OVERLAPPED, 2, limit), OVERLAPPED, limit) for limit in (least, 3, 5)]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1] + 1


def test_unequal_stages_are_reckoned_with():
    heavy_end = Times(1, 1, 1, 2.4, stages=(1, 1, 1, 1, 1, 1, 1, 2))
    aware, even = made("wave", 4, 12, heavy_end, 2), made("wave", 4, 12, OVERLAPPED, 2)
    assert check(aware, heavy_end, 5) < simulate(even, heavy_end).makespan


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", NAMES)
def test_a_sample_of_large_sizes(name):
    for P, m in ((4, 128), (10, 14), (16, 26), (24, 40), (32, 50), (32, 128)):
        if name == "dualpipe" and m >= 2 * P - 2:
            continue
        check(made(name, P, m, EP_BOUND, 2 if name in NAMES[2:] else 1), EP_BOUND, P + 1)
