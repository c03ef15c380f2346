"""A picture of `megatron-ext quantize`: a row per tensor; why, how well, what is lost, and drift.

Left, the magnitudes in powers of two, with what E4M3 can hold under one scale for the whole tensor: numbers left of the
dark line become zero. Then signal to noise and numbers flushed to zero for every scheme, and what becomes of a static
range when numbers grow.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_ext.cli.quantize import coarse
from megatron_ext.cli.quantize.sources import Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _PALE, _ORANGE, _INK, _GREY = "#2f6db3", "#a9cbee", "#d9682b", "#222222", "#e4e4e4"
_COLOURS = {"fp32": _BLUE, "pow2": _PALE}
_LINES = {(True, "tensor"): ("static, tensor", _ORANGE, "o"), (False, "tensor"): ("dynamic, tensor", _PALE, "s"),
          (False, "1x128"): ("dynamic, 1x128", _BLUE, "D")}
_WIDTH, _ROW, _BAR, _HEAD = 14.0, 2.0, 0.19, 1.0  # inches; _ROW at least, _BAR for each bar


def draw(samples: Sequence[Sample], rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the tensors and their figures (`measure.compare`); the suffix picks PNG, SVG or PDF, folders are made."""
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot, which would keep every figure in a global

    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "megatron_ext"}):
        schemes = [[row for row in rows if row["tensor"] == s.name and row["shape"] == list(s.shape)] for s in samples]
        drifts = any(row["section"] == "range" for row in rows)
        bars = max(len(_bars(found)) for found in schemes)
        tall = max(_ROW, _BAR * bars + 0.5)
        figure = Figure((_WIDTH, tall * len(samples) + _HEAD), layout="constrained", facecolor="white")
        ratios = (1.25, 1.25, 0.9, 1.1)[: 3 + drifts]
        grid = figure.subplots(len(samples), 3 + drifts, squeeze=False, width_ratios=ratios)
        for line, sample, found in zip(grid, samples, schemes, strict=True):
            _draw_magnitudes(line[0], sample)
            _draw_bars(line[1], _bars(found), "snr_db", 1.0)
            _draw_bars(line[2], _bars(found), "flushed", 100.0)
            line[2].set_yticklabels([])
            if drifts:
                _draw_drift(line[3], [row for row in found if row["section"] == "range"])
        titles = ("magnitudes, and one scale for the tensor", "signal to noise [dB]", "flushed to zero [%]",
                  "signal to noise, numbers grow [dB]")
        for axes, title in zip(grid[0], titles, strict=False):
            axes.set_title(title, fontsize=10, fontweight="bold", color=_INK)
        _draw_legends(figure, drifts)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)


def _bars(found: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """(label, row) of the schemes that are drawn as bars; the format's name where it is not E4M3."""
    shown = [row for row in found if row["section"] != "range"]
    kept = [row for row in shown if row["section"] != "format" or row["format"] != "e4m3"]
    return [(row["granularity"] + ("" if row["format"] == "e4m3" else f" {row['format'].upper()}"), row)
            for row in kept]


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=2, colors=_INK)


def _draw_magnitudes(axes: Axes, sample: Sample) -> None:
    """Histogram of log2 |x|, and where E4M3 begins and ends if the largest number sets the scale."""
    magnitude = sample.x.abs()
    logs = magnitude[magnitude > 0].log2()
    top = float(logs.max())
    bottom = top - torch.log2(torch.tensor(coarse.largest("e4m3") * 2.0**10)).item()  # half of 2^-9 rounds to zero
    low = min(float(logs.quantile(1e-4) if logs.numel() < 2**24 else logs[: 2**24].quantile(1e-4)), bottom - 1)
    counts = torch.histc(logs, 80, low, top + 0.25)
    edges = torch.linspace(low, top + 0.25, 81)
    share = 100 * counts / magnitude.numel()
    axes.axvspan(bottom, top, color=_GREY, lw=0)
    axes.bar(edges[:-1].numpy(), share.numpy(), (edges[1] - edges[0]).item(), align="edge", color=_BLUE, lw=0)
    axes.axvline(bottom, color=_INK, lw=1.2)
    axes.set_yscale("log")
    axes.set_ylim(1e-4, None)
    axes.set_xlim(low, top + 0.25)
    axes.set_ylabel(sample.name if len(sample.name) < 30 else "…" + sample.name[-28:], fontweight="bold", color=_INK)
    axes.set_xlabel("log2 |x|, share of the numbers [%]; grey: what E4M3 holds", labelpad=1)
    _plain(axes)


def _draw_bars(axes: Axes, bars: Sequence[tuple[str, dict[str, Any]]], figure: str, factor: float) -> None:
    """A bar for each scheme, its figure beside it, neighbours of one label next to each other."""
    ends = [factor * row[figure] if row[figure] is not None else 0.0 for _, row in bars]
    longest = max([*ends, 1.0])  # less than a percent flushed is to look like little
    for place, ((_, row), end) in enumerate(zip(bars, ends, strict=True)):
        axes.barh(-place, end, 0.8, color=_COLOURS[row["scale"]], lw=0)
        text = "exact" if row[figure] is None else "0" if not end else f"{end:.1f}" if end >= 0.1 else f"{end:.1g}"
        ordinary = row["ordinary_snr_db"] if figure == "snr_db" else None
        if ordinary is not None:
            axes.plot(ordinary, -place, "|", color=_INK, markersize=7, markeredgewidth=1.4)
        axes.text(max(end, ordinary or 0.0) + 0.02 * longest, -place, text, va="center", fontsize=7.5, color=_INK)
    labels = [label if not i or bars[i - 1][0] != label else "" for i, (label, _) in enumerate(bars)]
    axes.set_yticks([-place for place in range(len(bars))], labels, fontsize=8)
    axes.set_ylim(-len(bars) + 0.4, 0.6)
    axes.set_xlim(0, 1.2 * longest)
    _plain(axes)


def _draw_drift(axes: Axes, found: Sequence[dict[str, Any]]) -> None:
    drifts = list(dict.fromkeys(row["drift"] for row in found))
    for (static, granularity), (_, colour, marker) in _LINES.items():
        line = [row for row in found if (row["static"], row["granularity"]) == (static, granularity)]
        line = [row for row in line if row["snr_db"] is not None]
        axes.plot([drifts.index(row["drift"]) for row in line], [row["snr_db"] for row in line], color=colour,
                  marker=marker, markersize=5, lw=1.8)
    axes.set_xticks(range(len(drifts)), [f"x{drift:g}" for drift in drifts])
    axes.set_xlim(-0.3, len(drifts) - 0.7)
    axes.set_ylim(0, None)
    axes.grid(axis="y", color=_GREY)
    axes.set_axisbelow(True)
    _plain(axes)


def _draw_legends(figure: Any, drifts: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [Patch(color=_BLUE, label="FP32 scales"), Patch(color=_PALE, label="scales of powers of two"),
               Line2D([], [], color=_INK, marker="|", ls="", markersize=8, markeredgewidth=1.4,
                      label="the same, ordinary numbers only"),
               Line2D([], [], color=_INK, lw=1.2, label="smaller ones become zero")]
    if drifts:
        handles += [Line2D([], [], color=colour, marker=marker, lw=1.8, label=label)
                    for label, colour, marker in _LINES.values()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=8.5)
