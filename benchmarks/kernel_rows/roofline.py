"""The picture: matrix products under the device's roofline, and beside it what moves memory against its copy.

Points of ours are numbered and named beneath; peers are small and blue.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kernel_rows import GIGA, TERA, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PEAKS = (("H200", 1979.0, 989.0, 4800.0), ("H100 PCIe", 1513.0, 756.0, 2000.0), ("H100", 1979.0, 989.0, 3350.0))
"""(name holds this, dense FP8 and BF16 TFLOPS, GB/s) from the data sheets; the first that fits."""

_OURS, _PEER, _INK, _SOFT = "#d9682b", "#6fa5dc", "#222222", "#777777"
COPY = "copy_"
"""Peers with this in their name are the copies that bandwidth is held against."""


def peaks(device: str) -> tuple[float, float, float] | None:
    """FP8 and BF16 TFLOPS and GB/s of a device's data sheet, if it is one we know."""
    return next((tuple(rest) for name, *rest in PEAKS if name in device), None)  # type: ignore[return-value]


def draw(points: Sequence[Point], device: str, path: Path) -> None:
    """Draws the points; the suffix picks the format, folders are made."""
    import matplotlib
    from matplotlib.figure import Figure

    products = [point for point in points if point.flops]
    movers = [point for point in points if not point.flops]
    ours = [point for point in products if point.ours]
    with matplotlib.rc_context({"font.size": 9}):
        beside = 2 if max((len(point.name) for point in ours), default=0) < 40 else 1
        lines = -(-len(ours) // beside)
        bars = sum(point.ours for point in movers)
        height = max(5.5 + 0.16 * lines, 1.5 + 0.3 * bars)
        figure = Figure((13.5 if products and movers else 9, height), layout="constrained", facecolor="white")
        columns = [["products", "movers"], ["names", "movers"]]
        keep = slice(0 if products else 1, 2 if movers else 1)
        axes = figure.subplot_mosaic([row[keep] for row in columns] if products else [["movers"]],
                                     height_ratios=(5, 0.16 * lines + 0.1) if products else None)
        if products:
            _draw_products(axes["products"], products, device)
            names = [f"{number}  {point.name}" for number, point in enumerate(ours, 1)]
            axes["names"].axis("off")
            for column in range(beside):
                text = "\n".join(names[column * lines:(column + 1) * lines])
                axes["names"].text(0.5 * column, 1, text, va="top", fontsize=6.5, color=_INK)
        if movers:
            _draw_movers(axes["movers"], movers)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=140)


def _draw_products(axes: Axes, points: Sequence[Point], device: str) -> None:
    intensities, speeds = ([f(p) for p in points] for f in (_intensity, _tflops))
    low, high = min(intensities) / 4, max(intensities) * 4
    known, top = peaks(device), max(speeds)
    for label, tflops, style in (("FP8", known[0], "-"), ("BF16", known[1], "--")) if known else ():
        knee = tflops * TERA / (known[2] * GIGA)  # type: ignore[index]
        axes.plot([low, knee, max(high, knee)], [low * known[2] / 1000, tflops, tflops], style,  # type: ignore[index]
                  color=_INK, lw=1.2, label=f"{label}: {tflops:g} TFLOPS, {known[2]:g} GB/s")  # type: ignore[index]
        top = max(top, tflops)
    for ours, colour, marker, size in ((False, _PEER, "s", 4), (True, _OURS, "o", 6)):
        chosen = [point for point in points if point.ours == ours]
        axes.plot([_intensity(p) for p in chosen], [_tflops(p) for p in chosen], marker, color=colour, markersize=size,
                  label="ours" if ours else "peers", alpha=0.9)
        for number, p in enumerate(chosen if ours else (), 1):
            axes.annotate(str(number), (_intensity(p), _tflops(p)), (4, 3), textcoords="offset points", fontsize=7.5,
                          color=_INK)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(min(speeds) / 2, 1.5 * top), ylabel="TFLOPS",
             xlabel="FLOP for each byte that must move", title=f"Matrix products, {device}")
    axes.grid(alpha=0.3, which="both", lw=0.4)
    axes.legend(frameon=False, fontsize=8.5, loc="upper left")


def _draw_movers(axes: Axes, points: Sequence[Point]) -> None:
    """A bar for each of ours, its peers as marks on it: a copy dark, others blue."""
    place = 0
    labels = []
    for point in points:
        if point.ours:
            place -= 1
            labels.append(point.name)
            axes.barh(place, _gigabytes(point), 0.7, color=_OURS, lw=0)
        else:
            copy = COPY in point.name
            axes.plot(_gigabytes(point), place, "|", color=_INK if copy else _PEER, markersize=13, markeredgewidth=2.5)
    for label, colour in (("copy_", _INK), ("other peers, by the same bytes", _PEER)):
        axes.plot([], [], "|", color=colour, markersize=10, markeredgewidth=2.5, label=label)
    axes.set_yticks(range(-1, place - 1, -1), labels, fontsize=7)
    axes.set(xlabel="GB/s, read and written", title="What moves memory", ylim=(place - 0.6, -0.4))
    axes.set_xlim(0, None)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, axis="x", lw=0.4)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)


def _intensity(point: Point) -> float:
    return point.flops / point.bytes


def _tflops(point: Point) -> float:
    return point.flops / point.seconds / TERA


def _gigabytes(point: Point) -> float:
    return point.bytes / point.seconds / GIGA
