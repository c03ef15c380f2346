"""`megatron-ext quantize`: what FP8 does to a tensor, scheme by scheme (DeepSeek-V3, section 3.3).

A SOURCE is a kind of generated tensor or a .safetensors file. docs/quantization.md reads a table with you.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

GENERATED = ("gaussian", "outlier-tokens", "outlier-channels", "lognormal", "heavy-tail")
GRANULARITIES = ("tensor", "row", "channel", "1x128", "128x128")
SCALES = ("fp32", "pow2")
FORMATS = ("e4m3", "e5m2", "e5m6")

EPILOG = (
    "Columns. SNR: signal to noise in dB, 10 log10(sum x^2 / sum (x - x')^2); a bit of mantissa is 6 dB. "
    "ordinary: the same over numbers of at most three times the median magnitude, where outliers do not hide the rest. "
    "MAE: mean |x - x'| over mean |x|. "
    "clamped: numbers beyond the largest that the scale allows. flushed: numbers that became zero. "
    "GEMM: relative Frobenius error of x' W'^T against x W^T in FP64, with W drawn from N(0, 0.02^2) and quantised in "
    "128x128 blocks, E4M3. clip err: the relative error that clamping alone makes. "
    "Scales: fp32, or pow2, rounded up to a power of two."
)


def quantize(
    sources: Annotated[list[str] | None, typer.Argument(
        metavar="SOURCE", show_default=False,
        help=f"Kinds of generated tensors ({', '.join(GENERATED)}; all if none is given), .safetensors files.")] = None,
    tensor: Annotated[list[str] | None, typer.Option(
        help="Which tensors of the files: a name or a pattern such as 'model.layers.3.*'; may be given again.",
        show_default=False)] = None,
    granularity: Annotated[list[str] | None, typer.Option(
        help=f"What shares a scale: {', '.join(GRANULARITIES)}. With this, --scale or --format, every combination of "
        "them is shown.", show_default=False)] = None,
    scale: Annotated[list[str] | None, typer.Option(help="fp32 or pow2.", show_default=False)] = None,
    format: Annotated[list[str] | None, typer.Option(help=f"{', '.join(FORMATS)}.", show_default=False)] = None,
    drift: Annotated[list[float] | None, typer.Option(
        help="Factors by which numbers have grown since a static range was calibrated; 1, 4 and 16 if none is given.",
        show_default=False)] = None,
    rows: Annotated[int, typer.Option(help="Of a generated tensor; of a file's tensor, the first ones.")] = 512,
    columns: Annotated[int, typer.Option(help="Likewise.")] = 4096,
    seed: Annotated[int, typer.Option(help="Of generated tensors and of W.")] = 0,
    picture: Annotated[Path | None, typer.Option(help="Draws it: .png, .svg or .pdf.")] = None,
    json: Annotated[Path | None, typer.Option(help="Writes every figure.")] = None,
) -> None:
    """Compares ways to quantise tensors: granularity of scales, static and dynamic range, kinds of scales, formats."""
    from megatron_ext.cli.quantize import report

    report.run(sources or list(GENERATED), tensor or [], granularity, scale, format, drift or [1.0, 4.0, 16.0],
               rows, columns, seed, picture, json)
