"""Pictures show the timeline they are given: the colours cover what was computed, the numbers are there."""

from __future__ import annotations

import re

import numpy
import pytest
from matplotlib import colors, image

from megatron_ext.config.errors import UserError
from megatron_ext.pipeline import ScheduleError, Span, Timeline, Times, draw, schedule, simulate
from megatron_ext.pipeline.drawing import _COLOURS, _IDLE, _palette


def timeline(stages=4, micro_batches=4, times=None):
    return simulate(schedule("dualpipe", stages, micro_batches), times or Times()).timeline


def executed():
    plan = timeline(4, 8, Times(0.02, 0.02, 0.01, message=0.002))
    ranks = [[Span(s.start + 1000, s.end + 1000 - 0.001, s.instruction) for s in spans] for spans in plan.ranks]
    return Timeline("as it ran", ranks)


def test_png_shows_every_kind_and_the_idle_time_in_proportion(tmp_path):
    shown = timeline(4, 8)
    path = draw(shown, tmp_path / "new" / "plan.png")
    assert path == tmp_path / "new" / "plan.png"
    pixels = (image.imread(path)[:300, 100:1390, :3] * 255).round().astype(int)  # the rows, without the memory curve

    def area(colour: str) -> int:
        return int((abs(pixels - (numpy.array(colors.to_rgb(colour)) * 255).round()).max(axis=2) <= 2).sum())

    areas = {colour: area(colour) for pair in _COLOURS.values() for colour in pair}
    assert min(areas.values()) > 1000
    idle = area(_IDLE) / (area(_IDLE) + sum(areas.values()))
    expected = sum(shown.idle(rank) for rank in range(4)) / (4 * shown.end)
    assert idle == pytest.approx(expected, abs=0.02)


def test_svg_has_the_numbers_as_text(tmp_path):
    svg = draw(timeline(4, 8), tmp_path / "plan.svg", title="a title").read_text()
    texts = re.findall(r">([^<>]+)</text>", svg)
    assert {"a title", "rank", "activations held", "forward", "weight gradient", "ranks 0, 3"} <= set(texts)
    # 4 ranks x 8 micro-batches: 32 F, 32 backwards and the W's of the I's; axes have a few more numbers
    parts = sum(len(span.instruction.parts) for spans in timeline(4, 8).ranks for span in spans)
    assert sum(text.isdigit() for text in texts) >= parts
    assert svg == draw(timeline(4, 8), tmp_path / "again.svg", title="a title").read_text()


def test_sixteen_ranks_still_show_their_numbers(tmp_path):
    large = timeline(16, 64, Times(pair=2.4))
    svg = draw(large, tmp_path / "large.svg").read_text()
    parts = sum(len(span.instruction.parts) for spans in large.ranks for span in spans)
    assert sum(text.isdigit() for text in re.findall(r">([^<>]+)</text>", svg)) >= 0.95 * parts
    assert len(svg) < 3_000_000


def test_a_narrow_box_has_its_number_lying_down(tmp_path):
    narrow = timeline(4, 40, Times(1, 1, 0.25))
    svg = draw(narrow, tmp_path / "narrow.svg").read_text()
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert svg.count("rotate(-90") > 6  # the axes have two
    assert sum(map(str.isdigit, texts)) >= sum(len(s.instruction.parts) for spans in narrow.ranks for s in spans)


@pytest.mark.parametrize(("name", "shades"), [("dualpipe", 2), ("zbv", 2), ("dualpipe_interleaved", 4), ("1f1b", 1)])
def test_direction_and_stage_of_a_rank_have_their_own_shade(name, shades):
    shown = simulate(schedule(name, 4, 8, chunks=2 if shades == 4 else 1)).timeline
    palette = _palette(shown)
    for kind in _COLOURS:
        assert len({colour for (of, _, _), colour in palette.items() if of == kind}) == shades
    light = {key: sum(colors.to_rgb(colour)) for key, colour in palette.items()}
    if shades > 1:
        first = [light[key] for key in light if key[1:] == (0, 0)]
        others = [light[key] for key in light if key[1] == len({d for _, d, _ in light}) - 1 and key[2] == 7]
        assert all(a < b for a, b in zip(first, others, strict=False))


def test_executed_steps_are_in_milliseconds_from_zero(tmp_path):
    svg = draw(executed(), tmp_path / "run.svg").read_text()
    assert "time [ms]" in svg and "as it ran" in svg
    assert re.search(r"4 ranks, 8 micro-batches, step \d+\.?\d* ms, idle \d+\.\d%", svg)


def test_what_cannot_be_drawn_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"ends in one of \.png, \.svg, \.pdf"):
        draw(timeline(), tmp_path / "plan.gif")
    with pytest.raises(UserError, match="'nothing' is empty"):
        draw(Timeline("nothing", [[], []]), tmp_path / "plan.png")


def test_timelines_survive_a_file(tmp_path):
    executed().save(tmp_path / "run.json")
    assert Timeline.load(tmp_path / "run.json") == executed()
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(ScheduleError, match=r"other\.json: not a timeline"):
        Timeline.load(tmp_path / "other.json")


def test_activations_are_held_from_forward_to_weight_gradient():
    assert timeline(2, 2).activations(0) == [(0, 1), (1, 2), (4, 1), (6, 0)]
    assert [timeline(2, 2).idle(rank) for rank in (0, 1)] == [0, 0]


def test_text_grid():
    assert timeline(2, 2).grid().splitlines() == [
        "  0|F0.0|F1.0|B1.0-----|I0.0|W0.0|",
        "  1|F1.0|F0.0|B0.0-----|I1.0|W1.0|",
    ]
