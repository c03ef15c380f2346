"""FP8 formats and where numbers and scales lie: the facts that every backend shares (drawn in kernels/README.md).

Shape letters: T tokens, K and N columns of activations and outputs, E experts; S = scale_columns(T, E).
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


def require(condition: bool, rule: str) -> None:
    """Refuses operands that do not fit together, which a compiled kernel would read behind the end of.

    Raises:
        ValueError: `condition` is false.
    """
    if not condition:
        raise ValueError(rule)


def require_scales(data: Tensor, scale: Tensor) -> None:
    """Whether a scale is of tiles or blocks of FP8 numbers.

    Raises:
        ValueError: it is not, or the numbers are not FP8.
    """
    require(any(data.dtype == fmt.dtype for fmt in FORMATS.values()), f"data must be FP8, not {data.dtype}")
    *stack, n, k = data.shape
    fits = scale.dim() == data.dim() and list(scale.shape[:-2]) == stack and scale.shape[-1] == tile_count(k)
    require(fits and scale.shape[-2] in (n, tile_count(n)) and scale.dtype == torch.float32,
            f"scale {scale.dtype} {list(scale.shape)} is not of 1x128 tiles or 128x128 blocks of {list(data.shape)}")


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


def data_columns(tokens: int, groups: int | None) -> int:
    """Columns of data in tiles along tokens: T, or in groups the 128 of each of the S tiles, so that none straddles."""
    return tokens if groups is None else BLOCK * scale_columns(tokens, groups)


def empty_tiles(rows: int, tiles: int, device: torch.device, *, gpu: bool | None = None) -> Tensor:
    """An uninitialised scale of 1x128 tiles, [rows, tiles] FP32.

    On a GPU rows are neighbours and a column of tiles begins every round_up(rows, 4) numbers, 16 bytes: what TMA,
    cuBLAS and DeepGEMM read. Elsewhere it is contiguous. `gpu` forces one of the two, for tests.
    """
    if not (device.type == "cuda" if gpu is None else gpu):
        return torch.empty(rows, tiles, dtype=torch.float32, device=device)
    return torch.empty(tiles, _up(rows, 4), dtype=torch.float32, device=device)[:, :rows].t()


def empty_blocks(stack: Sequence[int], block_rows: int, blocks: int, device: torch.device, *,
                 gpu: bool | None = None) -> Tensor:
    """An uninitialised scale of 128x128 blocks, [*stack, block_rows, blocks] FP32.

    On a GPU a row of blocks begins every round_up(blocks, 4) numbers, as cuBLAS wants it (a view of the unpadded
    numbers gives wrong products where blocks % 4 != 0).
    """
    if not (device.type == "cuda" if gpu is None else gpu):
        return torch.empty(*stack, block_rows, blocks, dtype=torch.float32, device=device)
    return torch.empty(*stack, block_rows, _up(blocks, 4), dtype=torch.float32, device=device)[..., :blocks]


def empty_data(shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, gpu: bool | None = None) -> Tensor:
    """Uninitialised numbers of one byte, [..., N, K]; on a GPU rows begin at multiples of 16 bytes, as TMA wants it."""
    *rows, columns = shape
    if not (device.type == "cuda" if gpu is None else gpu):
        return torch.empty(*shape, dtype=dtype, device=device)
    return torch.empty(*rows, _up(columns, 16), dtype=dtype, device=device)[..., :columns]


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
