"""What a quantisation does to a tensor, in figures; and which quantisations are compared.

Shape letters: M rows, K columns, N outputs of the matrix product.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from megatron_ext.cli.quantize import FORMATS, GRANULARITIES, SCALES, coarse
from megatron_ext.cli.quantize.coarse import Rounded
from megatron_ext.cli.quantize.sources import Sample
from megatron_ext.config.errors import ConfigError

OUTPUTS = 256
ORDINARY = 3.0
"""Numbers of at most so many times the median magnitude are the ordinary ones."""

BEYOND = 1 + 2.0**-20
"""A quotient this much above the largest number is clamped, below it is FP32 rounding of the scale."""


@dataclass(frozen=True)
class Scheme:
    """One way to quantise.

    Attributes:
        section: the table it belongs to: "granularity", "format", "range" or "chosen".
        granularity, scale, format: as on the command line.
        static: whether the range was calibrated beforehand.
        drift: numbers are so many times as large as when the range was calibrated.
    """

    section: str
    granularity: str
    scale: str
    format: str
    static: bool = False
    drift: float = 1.0


@dataclass(frozen=True)
class Figures:
    """Shares are of all numbers; decibels are None where not one number changed."""

    snr_db: float | None
    ordinary_snr_db: float | None
    mae: float
    clamped: float
    flushed: float
    gemm_error: float
    clamping_error: float


def schemes(granularity: Sequence[str] | None, scale: Sequence[str] | None, format: Sequence[str] | None,
            drifts: Sequence[float]) -> list[Scheme]:
    """What is compared: the three questions of the paper, or every combination of what was chosen.

    Raises:
        ConfigError: a name or a drift that cannot be.
    """
    given = (("--granularity", granularity, GRANULARITIES), ("--scale", scale, SCALES), ("--format", format, FORMATS))
    for key, values, allowed in given:
        for value in values or ():
            if value not in allowed:
                near = difflib.get_close_matches(value, allowed, 1, 0.4)
                raise ConfigError(key, value, f"must be one of {', '.join(allowed)}",
                                  f"did you mean {near[0]!r}?" if near else None)
    for drift in drifts:
        if not (math.isfinite(drift) and drift > 0):
            raise ConfigError("--drift", drift, "a factor is finite and above 0")
    if granularity or scale or format:
        return [Scheme("chosen", g, s, f) for f in format or FORMATS for g in granularity or GRANULARITIES
                for s in scale or SCALES]
    found = [Scheme("granularity", g, s, "e4m3") for g in GRANULARITIES for s in SCALES]
    found += [Scheme("format", "1x128", "pow2", f) for f in ("e5m2", "e4m3", "e5m6")]
    for drift in drifts:
        found += [Scheme("range", "tensor", "fp32", "e4m3", True, drift),
                  Scheme("range", "tensor", "fp32", "e4m3", False, drift),
                  Scheme("range", "1x128", "fp32", "e4m3", False, drift)]
    return found


class Product:
    """The matrix product that errors are measured in: W [N, K], quantised once."""

    def __init__(self, columns: int, seed: int):
        generator = torch.Generator().manual_seed(seed + 1)  # not the numbers of x again
        self.weight = 0.02 * torch.randn(OUTPUTS, columns, generator=generator)

    @cached_property
    def quantised(self) -> Tensor:
        return coarse.quantize(self.weight, "128x128", "fp32", "e4m3").values

    def exact(self, x: Tensor) -> Tensor:
        """x W^T in FP64, [M, N]."""
        return x.double() @ self.weight.double().t()

    def error(self, values: Tensor, exact: Tensor) -> float:
        """Of x' W'^T, relative, in the Frobenius norm; the FP32 product errs by some 1e-7 itself."""
        return float((values @ self.quantised.t() - exact).norm() / exact.norm())


def compare(sample: Sample, wanted: Sequence[Scheme], seed: int) -> Iterator[dict[str, Any]]:
    """A row of names and figures for each scheme; "part" is what was measured of a larger tensor.

    Those about the range see the second half of the rows, `drift` times as large, and a range of the first half.
    """
    product = Product(sample.x.shape[1], seed)
    half = sample.x.shape[0] // 2
    part = list(sample.x.shape) if sample.x.numel() < math.prod(sample.shape) else None
    exact: dict[Any, Tensor] = {}
    for scheme in wanted:
        x, calibration = sample.x, None
        if scheme.section == "range":
            calibration, x = sample.x[:half], sample.x[half:] * scheme.drift
            if scheme.static and not calibration.any():
                continue
        key = scheme.drift if scheme.section == "range" else None
        if key not in exact:
            exact[key] = product.exact(x)
        rounded = (coarse.by_formula(x, scheme.granularity, scheme.scale, scheme.format, calibration)
                   if scheme.static else coarse.quantize(x, scheme.granularity, scheme.scale, scheme.format))
        figures = figures_of(x, rounded, product.error(rounded.values, exact[key]))
        yield {"tensor": sample.name, "shape": list(sample.shape), "part": part, **asdict(scheme),
               **asdict(figures)}


def figures_of(x: Tensor, rounded: Rounded, gemm_error: float) -> Figures:
    """The figures of x [M, K] and what became of it."""
    magnitude, values = x.abs(), rounded.values
    ordinary = magnitude <= ORDINARY * magnitude.median()
    beyond = magnitude > rounded.limit * BEYOND
    excess = (magnitude - rounded.limit).clamp(min=0) * beyond
    return Figures(
        snr_db=_decibels(x, values), ordinary_snr_db=_decibels(x[ordinary], values[ordinary]),
        mae=float((x - values).abs().double().mean() / magnitude.double().mean()),
        clamped=float(beyond.double().mean()), flushed=float(((values == 0) & (x != 0)).double().mean()),
        gemm_error=gemm_error, clamping_error=float(excess.double().norm() / x.double().norm()))


def _decibels(x: Tensor, values: Tensor) -> float | None:
    """Signal to noise; None where there is no noise, or no signal."""
    signal, noise = float(x.double().square().sum()), float((x.double() - values.double()).square().sum())
    return 10 * math.log10(signal / noise) if signal and noise else None
