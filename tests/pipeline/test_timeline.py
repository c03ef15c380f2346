"""Timelines: what is held, in activations and in bytes, and which of a rank's stages is which."""

from __future__ import annotations

import pytest

from megatron_ext.pipeline import Compute, Pair, ScheduleError, Span, Timeline, schedule, simulate
from megatron_ext.pipeline.timeline import decode, encode


def compute(kind, stage, micro_batch):
    return Compute(kind, 0, stage, micro_batch)


def two_stages():
    """One rank with both stages of a V: F F B B, and a pair in between."""
    order = [compute("F", 0, 0), compute("F", 1, 0), Pair(compute("F", 0, 1), compute("B", 1, 0)), compute("F", 1, 1),
             compute("B", 1, 1), compute("I", 0, 0), compute("B", 0, 1), compute("W", 0, 0)]
    return Timeline("v", [[Span(float(i), i + 1.0, instruction) for i, instruction in enumerate(order)]], chunks=2)


def test_activations_are_shares_of_a_rank():
    assert two_stages().activations(0) == [
        (0, 0.5), (1, 1.0), (2, 1.5), (3, 1.5), (5, 1.0), (7, 0.5), (8, 0.0)]
    assert two_stages().peak_activations(0) == 1.5


def test_activations_in_bytes_of_each_stage():
    assert two_stages().activations(0, [10, 1]) == [(0, 10), (1, 11), (2, 21), (3, 21), (5, 20), (7, 10), (8, 0)]
    assert two_stages().peak_activations(0, [10, 1]) == 21
    assert two_stages().peak_activations(0, [1, 10]) == 12


@pytest.mark.parametrize("name", ["dualpipe", "zbv", "1f1b", "gpipe"])
def test_the_peak_is_that_of_the_curve(name):
    timeline = simulate(schedule(name, 4, 8)).timeline
    sizes = [3, 1, 4, 1, 5, 9, 2, 6]
    for rank in range(4):
        assert timeline.peak_activations(rank) == max(held for _, held in timeline.activations(rank))
        assert timeline.peak_activations(rank, sizes) == max(held for _, held in timeline.activations(rank, sizes))
        assert timeline.activations(rank)[-1][1] == timeline.activations(rank, sizes)[-1][1] == 0


def test_chunks_are_counted_along_the_direction():
    assert simulate(schedule("zbv", 2, 4)).timeline.chunk_numbers() == {
        (0, 0): 0, (0, 3): 1, (0, 1): 0, (0, 2): 1}
    both = simulate(schedule("dualpipe", 2, 4)).timeline.chunk_numbers()
    assert both == {(0, 0): 0, (0, 1): 0, (1, 0): 0, (1, 1): 0}


def test_instructions_survive_json():
    for span in two_stages().ranks[0]:
        assert decode(encode(span.instruction)) == span.instruction
    for wrong in (["X", 0, 0, 0], ["F", 0, 0], ["F", 0, 0, "1"], ["FB", ["F", 0, 0, 0]], []):
        with pytest.raises((ValueError, IndexError)):
            decode(wrong)


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "t.json").write_text('{"name": "x", "unit": "s", "chunks": 1, "ranks": [[[0, 1, ["Q", 0, 0, 0]]]]}')
    with pytest.raises(ScheduleError, match=r"t\.json: not a timeline .*\['Q', 0, 0, 0\] is no computation"):
        Timeline.load(tmp_path / "t.json")
