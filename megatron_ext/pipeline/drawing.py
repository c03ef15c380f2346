"""Pictures of a step: who computed what when, where ranks idled, and what they held; and of a run beside its plan.

One row per rank, colour by kind. Strong colours are direction 0 and pale ones direction 1; where a rank has several
stages of a direction, its colours fade from the first to the last. Micro-batch numbers stand where they fit. A pair is
drawn as its forward above its backward. Grey is idle time. Beneath: the activations each rank holds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.config.errors import UserError
from megatron_ext.pipeline.comparison import Comparison, Operation
from megatron_ext.pipeline.instructions import Compute
from megatron_ext.pipeline.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KINDS = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
_COLOURS = {  # kind -> direction 0, direction 1
    "F": ("#2f6db3", "#a9cbee"),
    "B": ("#d9682b", "#f8c49f"),
    "I": ("#b02a4c", "#eeafc0"),
    "W": ("#3c8f4f", "#b4dcb9"),
}
_FADES = ((-0.32, 0.12), (0.0, 0.55))  # two directions: from darker (below 0) to lighter, first chunk to last
_FADE = (-0.15, 0.62)  # one direction has the range of both
_IDLE, _INK, _SOFT = "#e4e4e4", "#222222", "#777777"
_FORMATS = (".png", ".svg", ".pdf")
_ROW, _MEMORY = 0.36, 1.5  # inches: a rank's row, the memory curve
_ABOVE, _BETWEEN, _BELOW = 0.65, 0.2, 0.5  # a panel's heading, from the rows to the memory curve, the time axis
_LEFT, _RIGHT = 0.7, 0.75
_WIDEST, _SMALLEST = 48.0, 3.8  # inches of a picture, points of type
_STYLE = {"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "megatron_ext"}


def draw(timeline: Timeline, path: str | Path, title: str | None = None) -> Path:
    """Draws a planned timeline (`simulate(plan).timeline`) or an executed one.

    Args:
        timeline: at least one span.
        path: its suffix picks PNG, SVG or PDF; folders are made.
        title: instead of the timeline's name.

    Returns:
        The path.

    Raises:
        UserError: nothing to draw, or a suffix that is none of the three.
    """
    return _draw(Path(path), [(title or timeline.name, timeline)])


def draw_comparison(comparison: Comparison, path: str | Path, marked: Sequence[Operation] = ()) -> Path:
    """Draws the plan above the run on one time axis.

    Args:
        comparison: of `compare`.
        path: as in `draw`.
        marked: operations to frame in both, numbered from 1.

    Raises:
        UserError: as in `draw`.
    """
    panels = [(timeline.name, timeline) for timeline in (comparison.planned, comparison.ran)]
    return _draw(Path(path), panels, marked)


def _draw(path: Path, panels: Sequence[tuple[str, Timeline]], marked: Sequence[Operation] = ()) -> Path:
    if path.suffix not in _FORMATS:
        raise UserError(f"{path}: a picture's name ends in one of {', '.join(_FORMATS)}")
    for _, timeline in panels:
        if not any(timeline.ranks):
            raise UserError(f"{path}: the timeline {timeline.name!r} is empty")
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot, which would keep every figure in a global

    longest = max((timeline for _, timeline in panels), key=lambda timeline: timeline.end - timeline.start)
    scale, unit = _scale(longest)
    span = (longest.end - longest.start) * scale or 1.0
    width, rows = _width(longest), [max(_ROW * len(timeline.ranks), 0.9) for _, timeline in panels]
    height = sum(rows) + _ABOVE * len(rows) + _BETWEEN + _MEMORY + _BELOW
    colours = _palette(longest)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), facecolor="white")
        top = height
        for index, ((title, timeline), tall) in enumerate(zip(panels, rows, strict=True)):
            top -= _ABOVE + tall
            axes = _place(figure, top, tall, span)
            _draw_boxes(axes, timeline, colours, scale, width - _LEFT - _RIGHT)
            _draw_marks(axes, marked, bool(index), scale)
            _draw_heading(axes, timeline, title, scale, unit)
            if index == 0:
                _draw_legend(axes, longest, colours)
        memory = _place(figure, _BELOW, _MEMORY, span)
        if len(panels) == 1:
            _draw_memory(memory, longest, scale)
        else:
            _draw_fullest(memory, [timeline for _, timeline in panels], scale)
        _draw_time_axis(memory, unit)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def _place(figure: Figure, bottom: float, height: float, span: float) -> Axes:
    """Axes over the whole time of the picture, `bottom` inches from below."""
    width, tall = figure.get_size_inches()
    axes = figure.add_axes((_LEFT / width, bottom / tall, (width - _LEFT - _RIGHT) / width, height / tall))
    axes.set_xlim(0, span)
    return axes


def _scale(timeline: Timeline) -> tuple[float, str]:
    """Factor and name of the time axis: milliseconds for short steps."""
    if timeline.unit == "s" and timeline.end - timeline.start < 10:
        return 1000.0, "ms"
    return 1.0, timeline.unit


def _width(timeline: Timeline) -> float:
    """Inches: wide enough for a number in the boxes, those of a short W too if that costs no more than twice the width;
    within what a screen can scroll."""
    lengths = sorted(end - start for spans in timeline.ranks for start, end, _ in spans)
    typical = max(lengths[len(lengths) // 4], sum(lengths) / len(lengths) / 2.5) or 1.0
    shortest = next((length for length in lengths if length > 0.05 * typical), typical)  # an empty W takes no time
    per_unit = max(0.19 / typical, min(0.07 / shortest, 0.38 / typical))
    return min(max(per_unit * (timeline.end - timeline.start) + 1.5, 10.0), _WIDEST)


# -- colours


def _palette(timeline: Timeline) -> dict[tuple[str, int, int], str]:
    """(kind, direction, stage) -> colour."""
    numbers = timeline.chunk_numbers()
    directions = {direction for direction, _ in numbers}
    last = max(numbers.values(), default=0)
    palette = {}
    for (direction, stage), chunk in numbers.items():
        begin, end = _FADE if len(directions) == 1 else _FADES[direction % 2]
        amount = begin + (end - begin) * chunk / last if last else 0.0
        for kind, pair in _COLOURS.items():
            palette[kind, direction, stage] = _shade(pair[direction % 2], amount)
    return palette


def _shade(colour: str, amount: float) -> str:
    """The colour mixed with black (amount below 0) or with white."""
    from matplotlib.colors import to_hex, to_rgb

    return to_hex([value * (1 + amount) if amount < 0 else value + (1 - value) * amount for value in to_rgb(colour)])


def _ink_on(colour: str) -> str:
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(colour)
    return "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.56 else _INK


# -- rows


def _draw_boxes(
    axes: Axes, timeline: Timeline, colours: Mapping[tuple[str, int, int], str], scale: float, inches: float
) -> None:
    length = (timeline.end - timeline.start) * scale
    count = len(timeline.ranks)
    per_unit = inches / axes.get_xlim()[1]
    axes.set_ylim(count, 0)
    bars: dict[str, list[tuple[float, float, float, float]]] = {_IDLE: []}  # colour -> x, y, width, height
    for rank, spans in enumerate(timeline.ranks):
        bars[_IDLE].append((0, rank + 0.05, length, 0.9))
        for start, end, instruction in spans:
            x, width = (start - timeline.start) * scale, (end - start) * scale
            part_height = 0.9 / len(instruction.parts)
            for index, part in enumerate(instruction.parts):
                y, colour = rank + 0.05 + index * part_height, colours[part.kind, part.direction, part.stage]
                bars.setdefault(colour, []).append((x, y, width, part_height))
                middle = (x + width / 2, y + part_height / 2)
                _draw_number(axes, part, middle, width * per_unit, part_height * _ROW, _ink_on(colour))
        idle = timeline.idle(rank) / (timeline.end - timeline.start or 1.0)
        _beside(axes, f"{idle:.0%}", rank + 0.5, 0)
    _add_bars(axes, bars)
    _beside(axes, "idle", 0, 4)
    axes.set_yticks([rank + 0.5 for rank in range(count)], [str(rank) for rank in range(count)])
    axes.set_ylabel("rank")
    axes.tick_params(length=0, labelbottom=False)
    for side in axes.spines.values():
        side.set_visible(False)


def _beside(axes: Axes, text: str, y: float, lift: float) -> None:
    axes.annotate(text, (1, y), (6, lift), xycoords=("axes fraction", "data"), textcoords="offset points",
                  va="baseline" if lift else "center", color=_SOFT, annotation_clip=False)


def _add_bars(axes: Axes, bars: dict[str, list[tuple[float, float, float, float]]]) -> None:
    """One collection per colour: thousands of boxes stay a small file and a second's work."""
    from matplotlib.collections import PolyCollection

    for colour, boxes in bars.items():
        corners = [[(x, y), (x + w, y), (x + w, y + h), (x, y + h)] for x, y, w, h in boxes]
        idle = colour == _IDLE
        axes.add_collection(PolyCollection(corners, facecolors=colour, edgecolors="none" if idle else "white",
                                           linewidths=0.4, zorder=1 if idle else 2), autolim=False)


def _draw_number(
    axes: Axes, part: Compute, middle: tuple[float, float], width: float, height: float, colour: str
) -> None:
    """The micro-batch in the middle of its box, if a box of so many inches has room for it, upright or lying."""
    text = str(part.micro_batch)
    turned = False
    points = _points(text, width, height)
    if points < 4.5:  # lying only where that is larger
        turned, points = max((False, points), (True, _points(text, height, width)), key=lambda way: way[1])
    if points >= _SMALLEST:
        axes.text(*middle, text, ha="center", va="center" if turned else "center_baseline", fontsize=points,
                  color=colour, zorder=3, rotation=90 if turned else 0)


def _points(text: str, along: float, across: float) -> float:
    """The size of type, 8 at most, at which a text fits into so many inches."""
    return min(8.0, across * 72 * 0.78, (along * 72 - 1.5) / (len(text) * 0.62))


def _draw_marks(axes: Axes, marked: Sequence[Operation], ran: bool, scale: float) -> None:
    from matplotlib.patches import Rectangle

    for number, operation in enumerate(marked, 1):
        start, end, _ = operation.ran if ran else operation.planned
        x, width = start * scale, (end - start) * scale
        axes.add_patch(Rectangle((x, operation.rank + 0.05), width, 0.9, fill=False, edgecolor="black", linewidth=1.8,
                                 zorder=4, clip_on=False))
        axes.annotate(str(number), (x, operation.rank + 0.05), fontsize=6.5, color="white", zorder=5, ha="center",
                      va="center", bbox={"boxstyle": "circle,pad=0.15", "facecolor": "black", "edgecolor": "none"})


# -- memory


def _draw_memory(axes: Axes, timeline: Timeline, scale: float) -> None:
    import matplotlib

    curves: dict[tuple[tuple[float, float], ...], list[int]] = defaultdict(list)  # mirrored ranks often share one
    for rank in range(len(timeline.ranks)):
        curves[tuple(timeline.activations(rank))].append(rank)
    colours = matplotlib.colormaps["viridis"]
    named = range(0, len(curves), -(-len(curves) // 8))
    for index, (curve, ranks) in enumerate(curves.items()):
        label = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
        _step(axes, timeline, curve, scale, color=colours(0.9 * index / max(len(curves) - 1, 1)),
              label=label if index in named else None)
    _draw_peak(axes, max(timeline.peak_activations(rank) for rank in range(len(timeline.ranks))))
    _name_curves(axes, len(named))


def _draw_fullest(axes: Axes, timelines: Sequence[Timeline], scale: float) -> None:
    """For each timeline the rank that holds most."""
    peaks = []
    for timeline, style in zip(timelines, ((0, (3, 2)), "-"), strict=True):
        rank = max(range(len(timeline.ranks)), key=timeline.peak_activations)
        peaks.append(timeline.peak_activations(rank))
        _step(axes, timeline, timeline.activations(rank), scale, color=_INK, linestyle=style,
              label=f"{timeline.name}: rank {rank}")
    _draw_peak(axes, max(peaks))
    _name_curves(axes, len(timelines))


def _step(axes: Axes, timeline: Timeline, curve: Sequence[tuple[float, float]], scale: float, **style: Any) -> None:
    times, held = zip(*curve, strict=True)
    axes.step([(time - timeline.start) * scale for time in (*times, timeline.end)], (*held, held[-1]), where="post",
              linewidth=1.2, **style)


def _draw_peak(axes: Axes, peak: float) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.axhline(peak, color=_SOFT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    _beside(axes, f"{peak:g}", peak, 0)
    axes.set_ylim(0, peak * 1.12)
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_ylabel("activations held")


def _name_curves(axes: Axes, columns: int) -> None:
    axes.legend(loc="lower center", ncols=columns, fontsize=7, frameon=True, framealpha=0.8, edgecolor="none",
                handlelength=1.6, columnspacing=1.0, borderpad=0.2)


def _draw_time_axis(axes: Axes, unit: str) -> None:
    axes.set_xlabel(f"time [{unit}]" if unit else "time")
    for name in ("top", "right"):
        axes.spines[name].set_visible(False)


# -- heading


def _draw_heading(axes: Axes, timeline: Timeline, title: str, scale: float, unit: str) -> None:
    count, length = len(timeline.ranks), timeline.end - timeline.start
    idle = sum(timeline.idle(rank) for rank in range(count)) / (count * length or 1.0)
    parts = (part for spans in timeline.ranks for span in spans for part in span.instruction.parts)
    micro_batches = len({(part.direction, part.micro_batch) for part in parts})
    facts = f"{count} ranks, {micro_batches} micro-batches, step {length * scale:.4g}{unit and ' ' + unit}, "
    facts += f"idle {idle:.1%}"
    axes.annotate(title, (0, 1), (0, 25), xycoords="axes fraction", textcoords="offset points", fontsize=13,
                  fontweight="bold", color=_INK)
    axes.annotate(facts, (1, 1), (0, 25), xycoords="axes fraction", textcoords="offset points", ha="right", color=_INK)


def _draw_legend(axes: Axes, timeline: Timeline, colours: Mapping[tuple[str, int, int], str]) -> None:
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    chunks = timeline.chunk_numbers()
    instructions = (span.instruction for spans in timeline.ranks for span in spans)
    shown = {(part.kind, part.direction, chunks[part.direction, part.stage]): colours[part[:3]]
             for instruction in instructions for part in instruction.parts}
    handles: list[tuple[Patch, ...]] = []
    labels = []
    for kind, name in _KINDS.items():
        patches = tuple(Patch(facecolor=shown[key]) for key in sorted(shown) if key[0] == kind)
        if patches:
            handles.append(patches)
            labels.append(name)
    handles.append((Patch(facecolor=_IDLE),))
    hints = []
    if len({direction for _, direction, _ in shown}) == 2:
        hints.append("dark: direction 0, pale: direction 1")
    if any(chunk for _, _, chunk in shown):
        hints.append("lighter from a rank's first stage to its last")
    labels.append("idle" + (f"    ({'; '.join(hints)})" if hints else ""))
    length = 1.1 * max(2, *map(len, handles))
    axes.legend(handles, labels, handler_map={tuple: HandlerTuple(ndivide=None, pad=0.1)}, loc="lower left",
                bbox_to_anchor=(0, 1), ncols=len(handles), frameon=False, fontsize=8, handlelength=length,
                handleheight=0.9, columnspacing=1.4, handletextpad=0.5, borderaxespad=0.2, borderpad=0.2)
