"""DualPipe has the bubble and the memory of the DeepSeek-V3 report; its small relatives are sound and short."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.config.errors import ConfigError
from megatron_ext.pipeline import Times, schedule, simulate, verify
from megatron_ext.pipeline.schedules.bidirectional import bidirectional
from tests.pipeline.known_orders import one_f_one_b, zb_h1

EQUAL, OVERLAPPED = Times(), Times(pair=2.4)


def small_sizes(*stages: int) -> list[tuple[int, int]]:
    return [(P, m) for P in stages for m in range(2, 2 * P - 2, 2)]


def test_dualpipe_order_of_the_eight_steps():
    lines = str(schedule("dualpipe", stages=4, micro_batches=8)).splitlines()[1:]
    outer = "F0.0 F0.1 F0.2 F1.0 I1.0 W1.0 F1.1 F0.3&B1.1 F1.2&B0.0 B1.2 F1.3&B0.1 B1.3 I0.2 W0.2 I0.3 W0.3"
    inner = "F0.0 F1.0 F0.1 F1.1 F0.2 B1.0 F1.2&B0.0 F0.3&B1.1 F1.3&B0.1 B1.2 B0.2 I1.3 I0.3 W1.3 W0.3"

    def mirrored(line: str) -> str:
        return line.replace("0.", "x.").replace("1.", "0.").replace("x.", "1.")

    assert [line[5:] for line in lines] == [outer, inner, mirrored(inner), mirrored(outer)]


@pytest.mark.parametrize("P", range(2, 17, 2))
def test_dualpipe_has_the_bubble_and_memory_of_the_report(P):
    for m in range(2 * P, 6 * P + 1, 2):
        plan = schedule("dualpipe", P, m)
        verified = verify(plan)
        assert verified.activations == [P + 1 if m > 2 else 2] * P
        for times in (EQUAL, OVERLAPPED, Times(1.0, 1.0, 0.7, pair=2.2)):
            result = simulate(plan, times)
            bubble = (P / 2 - 1) * (times.full_pair + times.input_grad - 2 * times.weight_grad)  # FB + B - 3W
            assert max(result.bubble) == pytest.approx(bubble, abs=1e-9)
            if times.pair is None:
                assert result.bubble == pytest.approx([bubble] * P, abs=1e-9)
            assert result.peak_activations == verified.activations


@pytest.mark.parametrize("P", range(2, 17, 2))
def test_every_even_number_of_micro_batches_is_sound(P):
    for m in range(2, 2 * P, 2):
        plan = schedule("dualpipe", P, m)
        verified = verify(plan)
        assert plan.placement == [list(range(P)), list(range(P))[::-1]]
        assert max(verified.activations) <= min(m, P + 1)


@pytest.mark.parametrize(("P", "m"), small_sizes(4, 6, 8, 12, 16))
def test_few_micro_batches_beat_1f1b_and_zb_h1(P, m):
    plan = schedule("dualpipe", P, m)
    for times in (EQUAL, OVERLAPPED):
        rival = min(simulate(one_f_one_b(P, m), times).makespan, simulate(zb_h1(P, m), times).makespan)
        assert simulate(plan, times).makespan <= rival - 1 + 1e-9


@pytest.mark.parametrize(("P", "m"), [size for size in small_sizes(4, 6, 8, 12) if size[1] >= size[0]])
def test_orders_made_for_equal_times_reach_the_lower_bound(P, m):
    plan = schedule("dualpipe", P, m, times=EQUAL)
    verify(plan)
    assert simulate(plan, EQUAL).makespan == pytest.approx(3 * m + P / 2 - 1)


def test_measured_times_shape_the_order():
    overlapped = simulate(schedule("dualpipe", 12, 20, times=OVERLAPPED), OVERLAPPED).makespan
    assert overlapped <= 61
    assert simulate(schedule("dualpipe", 12, 20, times=EQUAL), OVERLAPPED).makespan > overlapped + 1


@given(
    P=st.sampled_from([2, 4, 6, 8, 10]),
    half=st.integers(1, 24),
    times=st.tuples(st.floats(0.3, 3), st.floats(0.3, 3), st.floats(0.1, 3), st.floats(0.65, 1), st.floats(0, 0.3)),
)
def test_any_size_and_times_are_sound(P, half, times):
    forward, input_grad, weight_grad, gain, message = times
    pair = max(gain * (forward + input_grad + weight_grad), weight_grad)
    measured = Times(forward, input_grad, weight_grad, pair, message)
    plan = schedule("dualpipe", P, 2 * half, times=measured)
    verified = verify(plan)
    result = simulate(plan, measured)
    assert max(verified.activations) <= P + 1
    assert min(result.bubble) >= -1e-9
    chain = P * (forward + input_grad) + weight_grad + 2 * (P - 1) * message  # the first micro-batch there and back
    assert result.makespan >= min(chain, 2 * half * pair) - 1e-9
    without_messages = Times(forward, input_grad, weight_grad, pair)
    if 2 * half < 2 * P - 2:
        rivals = (one_f_one_b(P, 2 * half), zb_h1(P, 2 * half))
        rival = min(simulate(rival, without_messages).makespan for rival in rivals)
        assert simulate(plan, without_messages).makespan < rival


def test_the_same_arguments_give_the_same_plan():
    assert schedule("dualpipe", 8, 12) == schedule("dualpipe", 8, 12)


def test_a_memory_limit_is_kept_by_a_longer_order():
    plan = schedule("dualpipe", 8, 12, times=EQUAL, memory_limit=7)
    assert max(verify(plan).activations) == 7
    assert simulate(plan, EQUAL).makespan > simulate(schedule("dualpipe", 8, 12, times=EQUAL), EQUAL).makespan
    assert bidirectional(8, 12, EQUAL, limit=2) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="dualpip"), "pipeline.schedule = 'dualpip': no .*; known: 'dualpipe'; did you mean 'dualpipe'?"),
        (dict(name="zb_h1"), "pipeline.schedule = 'zb_h1': no such schedule; known: 'dualpipe'"),
        (dict(stages=5), "pipeline.stages = 5: .* even number of stages, at least 2; try 4 or 6"),
        (dict(stages=0), "pipeline.stages = 0: .*; try 2"),
        (dict(stages="4"), "pipeline.stages = '4': .*; try 2"),
        (dict(micro_batches=9), "micro_batches = 9: .*; try 8 or 10"),
        (dict(micro_batches=0), "micro_batches = 0: .*; try 2"),
        (dict(micro_batches=True), "micro_batches = True: .*; try 2"),
        (dict(chunks=2), "pipeline.chunks = 2: .*; set it to 1"),
        (dict(memory_limit=4), "pipeline.memory_limit = 4: dualpipe on 4 ranks holds 5 activations; allow 5"),
        (dict(micro_batches=4, memory_limit=2), "pipeline.memory_limit = 2: no order of 4 micro-batches .*; allow 4"),
    ],
)
def test_what_cannot_work_is_refused_with_what_can(arguments, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        schedule(**{"name": "dualpipe", "stages": 4, "micro_batches": 8, **arguments})
