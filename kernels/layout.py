"""FP8 formats and where scales lie: the facts that every backend shares (drawn in kernels/README.md).

Shape letters: T tokens, K and N columns of activations and outputs, E experts; S = scale_columns(group_sizes).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128
"""Numbers per tile, rows and columns per weight block (DeepSeek-V3, section 3.3.2)."""

NAN_BYTE = 0x7F
"""The NaN that fills a block which held NaN or an infinity; a NaN in both formats."""


@dataclass(frozen=True)
class Format:
    """An FP8 format.

    `smallest_scale` is the smallest scale a block can get. With it, everything that rounds to a nonzero FP8 number is a
    normal FP32 number (2^-126 over half the smallest FP8 number), so hardware that flushes denormals writes the same
    bytes, and an all-zero block needs no special case: 0 / smallest_scale is 0.
    """

    dtype: torch.dtype
    largest: float
    smallest_scale: float


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "e4m3": Format(torch.float8_e4m3fn, 448.0, 2.0**-116),
        "e5m2": Format(torch.float8_e5m2, 57344.0, 2.0**-109),
    }
)


def format_of(dtype: torch.dtype) -> str:
    """The name in `FORMATS` of a float8 dtype."""
    return next(name for name, fmt in FORMATS.items() if fmt.dtype == dtype)


def tile_count(length: int) -> int:
    """Tiles of 128 that cover `length`; the last may be partial."""
    return -(-length // BLOCK)


def block_rows(data: Tensor, scale: Tensor) -> int:
    """Rows that share a scale: 1 or 128. The shapes tell (and for a single row the two are the same thing)."""
    return 1 if scale.shape[-2] == data.shape[-2] else BLOCK


class Span(NamedTuple):
    """Tokens [first, last) of one group and the scale columns [first_tile, last_tile) of its tiles along the tokens."""

    first: int
    last: int
    first_tile: int
    last_tile: int


def host_sizes(group_sizes: Sequence[int] | Tensor) -> list[int]:
    """Group sizes as a list; a tensor on a GPU costs a synchronisation."""
    return group_sizes.tolist() if isinstance(group_sizes, Tensor) else list(group_sizes)


def token_spans(group_sizes: Sequence[int] | Tensor) -> list[Span]:
    """Where each group's tokens and token tiles lie.

    Tiles never straddle groups, so every group starts a new one. Group e begins at column offset_e // 128 + e: enough
    room for all tiles before it, whatever the sizes, and computable by a kernel from the offset alone (no prefix sum
    over tile counts, no host synchronisation). A column between two groups that is left over holds zeros.
    """
    spans, first = [], 0
    for e, size in enumerate(host_sizes(group_sizes)):
        first_tile = first // BLOCK + e
        spans.append(Span(first, first + size, first_tile, first_tile + tile_count(size)))
        first += size
    return spans


def scale_columns(tokens: int, groups: int | None) -> int:
    """Columns S of the scale of tiles along tokens: T // 128 + E for groups, ceil(T / 128) for one undivided matrix."""
    return tile_count(tokens) if groups is None else tokens // BLOCK + groups
