"""Tables of `megatron-ext quantize`, and its files."""

from __future__ import annotations

import json as json_
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from megatron_ext.cli.quantize import EPILOG
from megatron_ext.cli.quantize.measure import compare, schemes
from megatron_ext.cli.quantize.sources import open_source
from megatron_ext.config.errors import ConfigError, UserError

PICTURES = (".png", ".svg", ".pdf")
_QUESTIONS = {"granularity": "what shares a scale (E4M3)", "format": "which format (1x128, powers of two)",
              "range": "static range of the first half of the rows, or dynamic; the second half",
              "chosen": "every combination of what was chosen"}


def run(sources: Sequence[str], patterns: Sequence[str], granularity: Sequence[str] | None, scale: Sequence[str] | None,
        format: Sequence[str] | None, drifts: Sequence[float], rows: int, columns: int, seed: int,
        picture: Path | None, json: Path | None) -> None:
    """Measures, prints, and writes what is asked for.

    Raises:
        UserError: arguments or tensors that cannot be.
    """
    for key, value in (("--rows", rows), ("--columns", columns)):
        if value < 2:
            raise ConfigError(key, value, "must be 2 or more: ranges are calibrated on one half of the rows")
    if seed < 0:
        raise ConfigError("--seed", seed, "must be 0 or more")
    if picture is not None and picture.suffix not in PICTURES:
        raise UserError(f"{picture}: a picture's name ends in one of {', '.join(PICTURES)}")
    wanted = schemes(granularity, scale, format, drifts)
    samples = [sample for source in sources for sample in open_source(source, patterns, rows, columns, seed)]
    if patterns and not any(Path(source).suffix == ".safetensors" for source in sources):
        raise ConfigError("--tensor", list(patterns), "chooses tensors of a file, and no SOURCE is a .safetensors file")
    console, found = Console(highlight=False), []
    with Progress(console=Console(stderr=True), transient=True, disable=not Console(stderr=True).is_terminal) as bar:
        task = bar.add_task("quantising", total=len(samples) * len(wanted))
        for sample in samples:
            for row in compare(sample, wanted, seed):
                found.append(row)
                bar.advance(task)
    for _, of_tensor in groupby(found, lambda row: (row["tensor"], row["shape"])):
        _show(console, list(of_tensor))
    console.print(EPILOG, style="dim", soft_wrap=True)
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(json_.dumps(found, indent=1) + "\n")
        console.print(str(json), soft_wrap=True)
    if picture is not None:
        from megatron_ext.cli.quantize.picture import draw

        draw(samples, found, picture)
        console.print(str(picture), soft_wrap=True)


def _show(console: Console, rows: list[dict[str, Any]]) -> None:
    """One tensor: a table for each question."""
    first = rows[0]
    size = "x".join(map(str, first["shape"]))
    part = "" if first["part"] is None else f", of which the first {'x'.join(map(str, first['part']))}"
    console.print(f"[bold]{escape(first['tensor'])}[/bold] {size}{part}", soft_wrap=True)
    for section, members in groupby(rows, lambda row: row["section"]):
        lines = list(members)
        ranged = section == "range"
        table = Table(title=_QUESTIONS[section], box=box.SIMPLE_HEAD, title_justify="left", title_style="italic",
                      padding=(0, 1, 0, 0), show_edge=False)
        for name in ("range",) if ranged else ("block", "scale", "format"):
            table.add_column(name, no_wrap=True)
        for name in ("SNR", "ordinary", "MAE", "clamped", "flushed", "GEMM", *(("clip err",) if ranged else ())):
            table.add_column(name, justify="right", no_wrap=True)
        for row in lines:
            names = ((f"x{row['drift']:g} {'static' if row['static'] else 'dynamic'} {row['granularity']}",) if ranged
                     else (row["granularity"], row["scale"], row["format"].upper()))
            cells = [*names, _decibels(row["snr_db"]), _decibels(row["ordinary_snr_db"]), f"{row['mae']:.2%}",
                     _share(row["clamped"]), _share(row["flushed"]), f"{row['gemm_error']:.2%}"]
            table.add_row(*cells, *([_share(row["clamping_error"])] if ranged else []))
        console.print(table, "")


def _decibels(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f}"


def _share(value: float) -> str:
    """Percent with as many digits as are worth reading; 0 only for none."""
    return "0" if value == 0 else "<0.01%" if value < 1e-4 else f"{value:.2%}"
