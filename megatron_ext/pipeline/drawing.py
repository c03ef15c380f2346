"""Pictures of a step: who computed what when, where ranks idled, and what they held.

One row per rank, colour by kind, strong colours for direction 0 and pale ones for direction 1, micro-batch numbers
where they fit. A pair is drawn as its forward above its backward. Grey is idle time. Beneath: the activations each rank
holds.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ext.config.errors import UserError
from megatron_ext.pipeline.instructions import Compute
from megatron_ext.pipeline.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KINDS = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
_COLOURS = {  # kind -> direction 0, direction 1
    "F": ("#2f6db3", "#a9cbee"),
    "B": ("#d9682b", "#f8c49f"),
    "I": ("#b02a4c", "#eeafc0"),
    "W": ("#3c8f4f", "#b4dcb9"),
}
_IDLE, _INK, _SOFT = "#e4e4e4", "#222222", "#777777"
_FORMATS = (".png", ".svg", ".pdf")
_ROW, _MEMORY, _MARGIN = 0.36, 1.5, 1.35 # inches: a rank's row, the memory curve, everything around them


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
    path = Path(path)
    if path.suffix not in _FORMATS:
        raise UserError(f"{path}: a picture's name ends in one of {', '.join(_FORMATS)}")
    if not any(timeline.ranks):
        raise UserError(f"{path}: the timeline {timeline.name!r} is empty")
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot, which would keep every figure in a global

    scale, unit = _scale(timeline)
    width, rows = _width(timeline), max(_ROW * len(timeline.ranks), 0.9)
    height = rows + _MEMORY + _MARGIN
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "megatron_ext"}):
        figure = Figure(figsize=(width, height), facecolor="white")
        top, bottom = 0.65, 0.5
        left, right = 0.7 / width, 1 - 0.75 / width
        box = (left, (bottom + _MEMORY + _MARGIN - top - bottom) / height, right - left, rows / height)
        boxes = figure.add_axes(box)
        memory = figure.add_axes((left, bottom / height, right - left, _MEMORY / height), sharex=boxes)
        _draw_boxes(boxes, timeline, scale, width * (right - left))
        _draw_memory(memory, timeline, scale, unit)
        _draw_heading(boxes, timeline, title, scale, unit)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def _scale(timeline: Timeline) -> tuple[float, str]:
    """Factor and name of the time axis: milliseconds for short steps."""
    if timeline.unit == "s" and timeline.end - timeline.start < 10:
        return 1000.0, "ms"
    return 1.0, timeline.unit


def _width(timeline: Timeline) -> float:
    """Inches: wide enough for a number in most boxes, within what a screen can scroll."""
    lengths = sorted(end - start for spans in timeline.ranks for start, end, _ in spans)
    typical = max(lengths[len(lengths) // 4], sum(lengths) / len(lengths) / 2.5) or 1.0  # an empty W takes no time
    return min(max(0.19 * (timeline.end - timeline.start) / typical + 1.5, 10.0), 34.0)


def _draw_boxes(axes: Axes, timeline: Timeline, scale: float, inches: float) -> None:
    span = (timeline.end - timeline.start) * scale or 1.0
    count = len(timeline.ranks)
    axes.set_xlim(0, span)
    axes.set_ylim(count, 0)
    bars: dict[str, list[tuple[float, float, float, float]]] = defaultdict(list)  # colour -> x, y, width, height
    for rank, spans in enumerate(timeline.ranks):
        bars[_IDLE].append((0, rank + 0.05, span, 0.9))
        for start, end, instruction in spans:
            x, width = (start - timeline.start) * scale, (end - start) * scale
            part_height = 0.9 / len(instruction.parts)
            for index, part in enumerate(instruction.parts):
                y = rank + 0.05 + index * part_height
                bars[_colour(part)].append((x, y, width, part_height))
                _draw_number(axes, part, x + width / 2, y + part_height / 2, width / span * inches, part_height * _ROW)
        idle = timeline.idle(rank) / (timeline.end - timeline.start or 1.0)
        axes.annotate(f"{idle:.0%}", (1, rank + 0.5), (6, 0), xycoords=("axes fraction", "data"), va="center",
                      textcoords="offset points", color=_SOFT, annotation_clip=False)
    _add_bars(axes, bars)
    axes.annotate("idle", (1, 0), (6, 4), xycoords=("axes fraction", "data"), textcoords="offset points", color=_SOFT,
                  annotation_clip=False)
    axes.set_yticks([rank + 0.5 for rank in range(count)], [str(rank) for rank in range(count)])
    axes.set_ylabel("rank")
    axes.tick_params(length=0, labelbottom=False)
    for side in axes.spines.values():
        side.set_visible(False)


def _add_bars(axes: Axes, bars: dict[str, list[tuple[float, float, float, float]]]) -> None:
    """One collection per colour: thousands of boxes stay a small file and a second's work."""
    from matplotlib.collections import PolyCollection

    for order, (colour, boxes) in enumerate(bars.items()):
        corners = [[(x, y), (x + w, y), (x + w, y + h), (x, y + h)] for x, y, w, h in boxes]
        edge = "none" if colour == _IDLE else "white"
        layer = 1 if order == 0 else 2
        axes.add_collection(PolyCollection(corners, facecolors=colour, edgecolors=edge, linewidths=0.5, zorder=layer))


def _draw_number(axes: Axes, part: Compute, x: float, y: float, width: float, height: float) -> None:
    """The micro-batch in the middle of its box, if a box of this many inches has room for it."""
    text = str(part.micro_batch)
    points = min(8.0, height * 72 * 0.78)
    if len(text) * points * 0.62 + 1.5 > width * 72:
        points = (width * 72 - 1.5) / (len(text) * 0.62)
    if points >= 4.5:
        colour = "white" if part.direction == 0 else _INK
        axes.text(x, y, text, ha="center", va="center_baseline", fontsize=points, color=colour, zorder=3)


def _draw_memory(axes: Axes, timeline: Timeline, scale: float, unit: str) -> None:
    import matplotlib
    from matplotlib.ticker import MaxNLocator

    curves: dict[tuple[tuple[float, float], ...], list[int]] = defaultdict(list)  # mirrored ranks often share one
    for rank in range(len(timeline.ranks)):
        curves[tuple(timeline.activations(rank))].append(rank)
    colours = matplotlib.colormaps["viridis"]
    named = range(0, len(curves), -(-len(curves) // 8))
    for index, (curve, ranks) in enumerate(curves.items()):
        times, held = zip(*curve, strict=True)
        label = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
        axes.step(
            [(time - timeline.start) * scale for time in (*times, timeline.end)],
            (*held, held[-1]),
            where="post",
            color=colours(0.9 * index / max(len(curves) - 1, 1)),
            linewidth=1.2,
            label=label if index in named else None,
        )
    peak = max(timeline.peak_activations(rank) for rank in range(len(timeline.ranks)))
    axes.axhline(peak, color=_SOFT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    axes.annotate(f"{peak:g}", (1, peak), (6, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                  va="center", color=_SOFT, annotation_clip=False)
    axes.set_ylim(0, peak * 1.12)
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_ylabel("activations held")
    axes.set_xlabel(f"time [{unit}]" if unit else "time")
    axes.legend(loc="lower center", ncols=len(named), fontsize=7, frameon=True, framealpha=0.8, edgecolor="none",
                handlelength=1.2, columnspacing=1.0, borderpad=0.2)
    for name in ("top", "right"):
        axes.spines[name].set_visible(False)


def _draw_heading(axes: Axes, timeline: Timeline, title: str | None, scale: float, unit: str) -> None:
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    count, length = len(timeline.ranks), timeline.end - timeline.start
    idle = sum(timeline.idle(rank) for rank in range(count)) / (count * length or 1.0)
    facts = f"{count} ranks, step {length * scale:.4g}{unit and ' ' + unit}, idle {idle:.1%}"
    axes.annotate(title or timeline.name, (0, 1), (0, 25), xycoords="axes fraction", textcoords="offset points",
                  fontsize=13, fontweight="bold", color=_INK)
    axes.annotate(facts, (1, 1), (0, 25), xycoords="axes fraction", textcoords="offset points", ha="right", color=_INK)
    instructions = (span.instruction for spans in timeline.ranks for span in spans)
    parts = {(part.kind, part.direction) for instruction in instructions for part in instruction.parts}
    handles: list[tuple[Patch, ...]] = []
    labels = []
    for kind, name in _KINDS.items():
        colours = [_COLOURS[kind][direction] for direction in (0, 1) if (kind, direction) in parts]
        if colours:
            handles.append(tuple(Patch(facecolor=colour) for colour in colours))
            labels.append(name)
    handles.append((Patch(facecolor=_IDLE),))
    two = len({direction for _, direction in parts}) == 2
    labels.append("idle" + "    (dark: direction 0, pale: direction 1)" * two)
    axes.legend(handles, labels, handler_map={tuple: HandlerTuple(ndivide=None, pad=0.15)}, loc="lower left",
                bbox_to_anchor=(0, 1), ncols=len(handles), frameon=False, fontsize=8, handlelength=2.2,
                handleheight=0.9, columnspacing=1.4, handletextpad=0.5, borderaxespad=0.2, borderpad=0.2)


def _colour(part: Compute) -> str:
    return _COLOURS[part.kind][part.direction % 2]
