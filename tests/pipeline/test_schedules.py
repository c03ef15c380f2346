"""Published schedules have their published bubble and memory, at every size; what torch has too is as torch has it."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.config.errors import ConfigError
from megatron_ext.pipeline import Times, schedule, simulate, verify
from megatron_ext.pipeline.schedules import NAMES, chunks_of, placement_of
from tests.pipeline.known_orders import torch_order

EQUAL, OVERLAPPED = Times(), Times(pair=2.4)
SEARCHED = ("dualpipe_zb", "dualpipe_interleaved", "wave")  # making them takes seconds
FIXED = [name for name in NAMES if name not in SEARCHED]
PLAIN = ("gpipe", "1f1b", "zb_h1", "zbv", "dualpipev", "wave")  # any P


def check_formulas(P: int, sizes: list[int]) -> None:
    """The table of the DeepSeek-V3 report, exact where F = I; flat in m."""
    bubbles = {
        "1f1b": lambda t: (P - 1) * (t.forward + t.input_grad + t.weight_grad),  # (P-1)(F+B)
        "zb_h1": lambda t: (P - 1) * (t.forward + t.input_grad - t.weight_grad),  # (P-1)(F+B-2W)
        "dualpipe": lambda t: (P / 2 - 1) * (t.full_pair + t.input_grad - 2 * t.weight_grad),  # (P/2-1)(FB+B-3W)
    }
    peaks = {"1f1b": [P - rank for rank in range(P)], "zb_h1": [P] * P, "dualpipe": [P + 1] * P}
    for m in sizes:
        for name, bubble in bubbles.items():
            plan = schedule(name, P, m)
            for times in (EQUAL, Times(1.0, 1.0, 0.7, pair=2.2)):
                result = simulate(plan, times)
                assert max(result.bubble) == pytest.approx(bubble(times), abs=1e-9), (name, m)
                assert result.peak_activations == peaks[name]
                if name != "dualpipe" or times.pair is None:
                    assert result.bubble == pytest.approx([bubble(times)] * P, abs=1e-9)


@pytest.mark.parametrize("P", range(2, 17, 2))
def test_bubbles_and_memory_of_the_report(P):
    check_formulas(P, [m for m in (2 * P, 2 * P + 2, 4 * P - 2, 5 * P + 1) if m % 2 == 0])


@pytest.mark.slow
@pytest.mark.parametrize("P", range(2, 17, 2))
def test_bubbles_and_memory_of_the_report_at_every_size(P):
    check_formulas(P, list(range(2 * P, 6 * P + 1, 2)))


@pytest.mark.parametrize(("P", "m"), [(1, 3), (3, 7), (7, 15), (5, 25)])
def test_formulas_hold_for_odd_sizes(P, m):
    for times in (EQUAL, Times(1.0, 1.0, 0.6)):
        F, W = times.forward, times.weight_grad
        for name, bubble in (("1f1b", (P - 1) * (2 * F + W)), ("zb_h1", (P - 1) * (2 * F - W)),
                             ("gpipe", (P - 1) * (2 * F + W))):
            assert simulate(schedule(name, P, m), times).bubble == pytest.approx([bubble] * P, abs=1e-9)


@pytest.mark.parametrize(("P", "v"), [(2, 2), (4, 2), (4, 4), (8, 3)])
def test_interleaving_divides_the_bubble(P, v):
    for m in (2 * P, 3 * P, 5 * P):
        plan = schedule("interleaved", P, m, chunks=v)
        assert simulate(plan).bubble == pytest.approx([(P - 1) * 3 / v] * P, abs=1e-9)
        paired = schedule("interleaved_paired", P, m, chunks=v)
        assert max(verify(paired).activations) == pytest.approx(max(verify(plan).activations) + 1 / v)
        assert simulate(paired, OVERLAPPED).makespan < simulate(plan, OVERLAPPED).makespan


def test_every_steady_forward_of_interleaved_paired_is_in_a_pair():
    plan = schedule("interleaved_paired", 4, 16, chunks=2)
    for rank in range(4):
        kinds = [i.kind for i in plan.compute(rank)]
        ahead = 2 * (4 - rank - 1) + 4 + 1
        assert kinds == ["F"] * ahead + ["FB"] * (32 - ahead) + ["B"] * ahead
        for pair in plan.compute(rank)[ahead : 32]:
            assert pair.parts[0].micro_batch != pair.parts[1].micro_batch


@pytest.mark.parametrize(("P", "m"), [(2, 4), (4, 8), (4, 13), (8, 20)])
def test_makespans_of_torchs_own_orders(P, m):
    pairs = [("ZBVZeroBubble", "zbv"), ("DualPipeV", "dualpipev")]
    if m % P == 0:
        pairs.append(("Interleaved1F1B", "interleaved"))
    for theirs, ours in pairs:
        imported, plan = torch_order(theirs, P, m, 2), schedule(ours, P, m)
        verify(imported)
        assert imported.placement == plan.placement
        for times in (EQUAL, OVERLAPPED, Times(1.0, 1.5, 0.75, pair=2.5), Times(2, 2, 1, 3.2, message=0.1)):
            assert simulate(plan, times).makespan == pytest.approx(simulate(imported, times).makespan, abs=1e-9)


def test_dualpipe_order_of_the_eight_steps():
    lines = str(schedule("dualpipe", stages=4, micro_batches=8)).splitlines()[1:]
    outer = "F0.0 F0.1 F0.2 F1.0 I1.0 W1.0 F1.1 F0.3&B1.1 F1.2&B0.0 B1.2 F1.3&B0.1 B1.3 I0.2 W0.2 I0.3 W0.3"
    inner = "F0.0 F1.0 F0.1 F1.1 F0.2 B1.0 F1.2&B0.0 F0.3&B1.1 F1.3&B0.1 B1.2 B0.2 I1.3 I0.3 W1.3 W0.3"

    def mirrored(line: str) -> str:
        return line.replace("0.", "x.").replace("1.", "0.").replace("x.", "1.")

    assert [line[5:] for line in lines] == [outer, inner, mirrored(inner), mirrored(outer)]


def test_chimera_feeds_both_ends_in_units_of_p():
    assert str(schedule("chimera", 4, 4)).splitlines()[1:] == [
        "  0| F0.0 F0.1 F1.0 B1.0 F1.1 B1.1 B0.0 B0.1",
        "  1| F0.0 F1.0 F0.1 F1.1 B1.0 B0.0 B1.1 B0.1",
        "  2| F1.0 F0.0 F1.1 F0.1 B0.0 B1.0 B0.1 B1.1",
        "  3| F1.0 F1.1 F0.0 B0.0 F0.1 B0.1 B1.0 B1.1",
    ]


def check_every_size(stages: Iterable[int], micro_batches: Iterable[int]) -> int:
    checked = 0
    for name in FIXED:
        for P in stages:
            for m in micro_batches:
                if name == "dualpipe" and m < 2 * P - 2:
                    continue  # searched: test_searched.py
                try:
                    plan = schedule(name, P, m)
                except ConfigError as error:
                    assert m % P and error.key == "micro_batches"
                    continue
                assert plan.placement == placement_of(name, P)
                assert (plan.name, plan.stages, plan.micro_batches) == (name, P, m)
                verify(plan)
                checked += 1
    return checked


def test_sizes_are_sound():
    assert check_every_size((2, 12, 32), (2, 46, 96)) > 50


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_size_is_sound():
    """All even P <= 32 and even m <= 128."""
    assert check_every_size(range(2, 33, 2), range(2, 129, 2)) > 6000


@given(name=st.sampled_from(PLAIN[:5]), P=st.integers(1, 9), m=st.integers(1, 30))
@settings(max_examples=60)
def test_schedules_of_one_direction_take_any_size(name, P, m):
    plan = schedule(name, P, m)
    verified = verify(plan)
    result = simulate(plan, OVERLAPPED)
    assert result.peak_activations == verified.activations
    assert min(result.bubble) >= -1e-9
    if name == "1f1b":
        assert result.makespan == pytest.approx(3 * (m + P - 1))


def test_placements_and_chunks():
    assert placement_of("wave", 2, 3) == [[0, 1, 1, 0, 0, 1]]
    assert placement_of("zbv", 2) == placement_of("zbv", 2, 2) == placement_of("dualpipev", 2) == [[0, 1, 1, 0]]
    assert placement_of("interleaved", 2, 2) == [[0, 1, 0, 1]]
    assert placement_of("dualpipe_interleaved", 2, 2) == [[0, 1, 0, 1], [1, 0, 1, 0]]
    assert placement_of("chimera", 2) == placement_of("dualpipe_zb", 2) == [[0, 1], [1, 0]]
    assert [chunks_of(name) for name in ("1f1b", "zbv", "interleaved", "wave")] == [1, 2, 2, 1]
    assert chunks_of("interleaved", 3) == chunks_of("wave", 3) == 3


def test_the_same_arguments_give_the_same_plan():
    for name in ("dualpipe", "dualpipe_zb", "dualpipe_interleaved", "wave"):
        assert schedule(name, 4, 6) == schedule(name, 4, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="dualpip"), "pipeline.schedule = 'dualpip': no .*'1f1b'.*; did you mean 'dualpipe'?"),
        (dict(stages=5), "pipeline.stages = 5: dualpipe .* even number of stages, at least 2; try 4 or 6"),
        (dict(stages=0), "pipeline.stages = 0: .*; try 2"),
        (dict(stages=1), "pipeline.stages = 1: .*; try 2"),
        (dict(stages="4"), "pipeline.stages = '4': .*; try 2"),
        (dict(name="1f1b", stages=0), "pipeline.stages = 0: 1f1b needs at least 1; try 1"),
        (dict(micro_batches=9), "micro_batches = 9: dualpipe on 4 ranks needs a multiple of 2; try 8 or 10"),
        (dict(micro_batches=0), "micro_batches = 0: .*; try 2"),
        (dict(micro_batches=True), "micro_batches = True: .*; try 2"),
        (dict(name="interleaved", micro_batches=10), "micro_batches = 10: .* multiple of 4; try 8 or 12"),
        (dict(name="chimera", micro_batches=2), "micro_batches = 2: .* multiple of 4; try 4"),
        (dict(name="zbv", micro_batches=0), "micro_batches = 0: zbv needs at least 1; try 1"),
        (dict(chunks=2), "pipeline.chunks = 2: dualpipe has 1 stage of each direction on a rank; set it to 1"),
        (dict(name="zbv", chunks=4), "pipeline.chunks = 4: zbv has 2 stages of each .*; set it to 2"),
        (dict(name="wave", chunks=0), "pipeline.chunks = 0: .*; set it to 1"),
        (dict(memory_limit=4), "pipeline.memory_limit = 4: dualpipe with 8 .* on 4 ranks holds 5 activations; allow 5"),
        (dict(name="gpipe", memory_limit=4), "pipeline.memory_limit = 4: gpipe .* holds 8 activations; allow 8"),
        (dict(name="wave", memory_limit=0.5), "pipeline.memory_limit = 0.5: wave holds at least 1 .*; allow 1"),
        (dict(name="dualpipe_zb", memory_limit=1), "pipeline.memory_limit = 1: .* at least 2 .*; allow 2"),
        (dict(memory_limit=0), "pipeline.memory_limit = 0: it counts activations and is more than 0"),
    ],
)
def test_what_cannot_work_is_refused_with_what_can(arguments, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        schedule(**{"name": "dualpipe", "stages": 4, "micro_batches": 8, **arguments})
