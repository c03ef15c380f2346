"""The tensors that are quantised: drawn, or read from a safetensors file. All come as [M, K] FP32.

    gaussian            N(0, 1)
    outlier-tokens      N(0, 1), 16 rows 200 times as large: attention sinks, separators
    outlier-channels    N(0, 1), 16 columns 200 times as large: what activations of language models look like
    lognormal           N(0, 1), rows times exp(1.5 N), columns times exp(N): activations deep in a model
    heavy-tail          1e-6 Student t(2.5), rows times exp(2 N): gradients of activations
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ext.cli.quantize import GENERATED
from megatron_ext.config.errors import ConfigError, UserError

MOST = 12
"""Tensors of one file, so that a forgotten --tensor does not take an hour."""


@dataclass(frozen=True)
class Sample:
    """A tensor to quantise.

    Attributes:
        name: kind or name in the file.
        x: [M, K] FP32, finite, not all zeros.
        shape: of the whole tensor, of which x is the beginning.
    """

    name: str
    x: Tensor
    shape: tuple[int, ...]


def open_source(source: str, patterns: Sequence[str], rows: int, columns: int, seed: int) -> list[Sample]:
    """The tensors of one SOURCE.

    Raises:
        UserError: neither a kind nor a file of safetensors; tensors that are not there, too many, or cannot be
            quantised.
    """
    if source in GENERATED:
        return [Sample(source, generate(source, rows, columns, seed), (rows, columns))]
    path = Path(source)
    if path.suffix != ".safetensors" and not path.exists():
        if path.suffix or len(path.parts) > 1:
            raise UserError(f"{source}: no such file; a SOURCE is a .safetensors file or one of {', '.join(GENERATED)}")
        near = difflib.get_close_matches(source, GENERATED, 1, 0.4)
        hint = f"did you mean {near[0]!r}?" if near else "or a .safetensors file"
        raise ConfigError("SOURCE", source, f"must be one of {', '.join(GENERATED)}", hint)
    if path.is_dir():
        raise ConfigError("SOURCE", source, "is a folder", "give one of the .safetensors files in it")
    return _read(path, patterns, rows, columns)


def generate(kind: str, rows: int, columns: int, seed: int) -> Tensor:
    """Draws [rows, columns] of a kind in GENERATED; the same for the same seed."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=g)
    if kind == "outlier-tokens":
        x[torch.randperm(rows, generator=g)[:16]] *= 200
    elif kind == "outlier-channels":
        x[:, torch.randperm(columns, generator=g)[:16]] *= 200
    elif kind == "lognormal":
        x *= (1.5 * torch.randn(rows, 1, generator=g)).exp() * torch.randn(1, columns, generator=g).exp()
    elif kind == "heavy-tail":
        # Student t with 2.5 degrees of freedom is N / sqrt(chi^2 / 2.5); torch's sampler takes no generator.
        chi2 = 2 * torch._standard_gamma(torch.full((rows, columns), 1.25), generator=g)
        x *= 1e-6 * (chi2 / 2.5).rsqrt() * (2 * torch.randn(rows, 1, generator=g)).exp()
    return x


def _read(path: Path, patterns: Sequence[str], rows: int, columns: int) -> list[Sample]:
    try:
        with safe_open(str(path), framework="pt") as file:
            wanted = _choose(path, list(file.keys()), patterns)
            samples, left_out = [], []
            for name in wanted:
                part = file.get_slice(name)
                shape = tuple(part.get_shape())
                why = _unfit(shape, part.get_dtype())
                if why:
                    left_out.append(f"{path}: tensor {name}: {why}")
                    continue
                x = part[:rows, :columns] if len(shape) == 2 else file.get_tensor(name).flatten(0, -2)[:rows, :columns]
                samples.append(Sample(name, _checked(path, name, x.float()), shape))
    except (OSError, SafetensorError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"not a safetensors file: {error}"
        raise UserError(f"{path}: {reason}") from None
    # A pattern may match what cannot be measured beside what can; a name that is given is meant.
    named = [line for line in left_out if any(f": tensor {name}: " in line for name in patterns)]
    if named or not samples:
        raise UserError((named or left_out or [f"{path}: holds no tensor"])[0])
    return samples


def _choose(path: Path, names: list[str], patterns: Sequence[str]) -> list[str]:
    """The names that a pattern matches, in the order of the file; all without patterns."""
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern, names, 1, 0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"it holds {len(names)}, the first is {names[:1]}"
            raise ConfigError("--tensor", pattern, f"matches no tensor of {path}", hint)
    wanted = [name for name in names if not patterns or any(fnmatch.fnmatchcase(name, p) for p in patterns)]
    if len(wanted) > MOST:
        raise ConfigError("--tensor", list(patterns), f"chooses {len(wanted)} tensors of {path}, more than {MOST}",
                          f"give a name, as {wanted[0]!r}, or a narrower pattern")
    return wanted


def _unfit(shape: tuple[int, ...], dtype: str) -> str | None:
    """Why a tensor cannot be quantised, or None."""
    if dtype.startswith("F8"):
        return f"has dtype {dtype}, which is quantised already; give the original"
    if dtype not in ("F64", "F32", "F16", "BF16"):
        return f"has dtype {dtype}; only floating-point tensors can be quantised"
    if len(shape) < 2:
        return f"has shape {list(shape)}; blocks need a matrix, two dimensions or more"
    return "is empty" if 0 in shape else None


def _checked(path: Path, name: str, x: Tensor) -> Tensor:
    bad = int((~x.isfinite()).sum())
    if bad:
        raise UserError(f"{path}: tensor {name}: {bad} of {x.numel()} numbers are NaN or infinite; "
                        "such a block becomes NaN as a whole, so there is nothing to measure")
    if not x.any():
        raise UserError(f"{path}: tensor {name}: all {x.numel()} numbers are zero, which every scheme keeps exactly")
    return x
