"""Fine-grained FP8 quantisation in torch: the specification (DeepSeek-V3, section 3.3).

A block is 1x128 (a tile of a row) or 128x128; at the end of a row or matrix it may be partial, and then only what is
there counts. For one block, all in FP32:

    amax  = max |x|
    scale = max(amax / largest, smallest_scale), rounded up to a power of two if asked
    data  = round_to_nearest_even(clamp(x / scale, -largest, largest))        -- a division, never a reciprocal
    x'    = data * scale

A block of zeros gives zeros (signs kept). A block that holds NaN or an infinity has scale NaN and every byte 0x7F: it
dequantises to NaN as a whole, so a run that diverges is seen and not clamped into one that looks well. Denormal inputs
may be flushed or not, the bytes are the same.

Shape letters: [..., N, K] a matrix or a stack of them, [T, K] tokens; scale layout in kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from megatron_ext.kernels.layout import (
    BLOCK,
    FORMATS,
    NAN_BYTE,
    block_rows,
    data_columns,
    empty_blocks,
    empty_data,
    empty_tiles,
    format_of,
    scale_columns,
    token_spans,
)

Both = tuple[Tensor, Tensor, Tensor, Tensor]
"""data, scale, data_t, scale_t: a matrix quantised along its columns, and along its rows as its transpose."""


def quantize(
    x: Tensor, block: tuple[int, int] = (1, BLOCK), power_of_two: bool = False, format: str = "e4m3"
) -> tuple[Tensor, Tensor]:
    """Quantises along the last dimension.

    Args:
        x: [..., N, K], any floating dtype.
        block: (1, 128) or (128, 128).
        power_of_two: round scales up to powers of two, so that later requantisation is an exponent shift.
        format: "e4m3" or "e5m2".

    Returns:
        data [..., N, K] in the format's dtype and scale [..., ceil(N / block[0]), ceil(K / 128)] FP32.
    """
    fmt, (rows, columns) = FORMATS[format], block
    n, k = x.shape[-2:]
    padded = F.pad(x.float(), (0, -k % columns, 0, -n % rows))  # zeros never change an amax
    tiles = rearrange(padded, "... (n r) (k c) -> ... n k r c", r=rows, c=columns)
    amax = reduce(tiles.abs(), "... r c -> ...", "max")
    # A tensor divided by a Python number is multiplied by its reciprocal on CUDA, which is another number.
    scale = (amax / torch.full_like(amax, fmt.largest)).clamp(min=fmt.smallest_scale)
    scale = (up_to_power_of_two(scale) if power_of_two else scale).masked_fill(~amax.isfinite(), torch.nan)
    quotient = (tiles / scale[..., None, None]).clamp(-fmt.largest, fmt.largest)
    bytes_ = quotient.to(fmt.dtype).view(torch.uint8).masked_fill(scale.isnan()[..., None, None], NAN_BYTE)
    bytes_ = rearrange(bytes_, "... n k r c -> ... (n r) (k c)")[..., :n, :k]
    return _placed(bytes_, fmt.dtype, scale, rows)


def up_to_power_of_two(x: Tensor) -> Tensor:
    """Positive normal FP32 numbers, each the next power of two that is not below it."""
    bits = x.view(torch.int32)
    return (((bits >> 23) + ((bits & 0x7FFFFF) != 0)) << 23).view(torch.float32)


def _placed(bytes_: Tensor, dtype: torch.dtype, scale: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Data and scale with the strides of the device's layout; on a CPU that is no copy of what is dense already."""
    if bytes_.device.type != "cuda":
        return bytes_.contiguous().view(dtype), scale
    *stack, height, width = scale.shape
    place = (
        empty_tiles(scale[..., 0].numel(), width, scale.device).unflatten(0, (*stack, height))
        if rows == 1
        else empty_blocks(stack, height, width, scale.device)
    )
    data = empty_data(bytes_.shape, dtype, bytes_.device)
    data.view(torch.uint8).copy_(bytes_)
    return data, place.copy_(scale)


def dequantize(data: Tensor, scale: Tensor) -> Tensor:
    """data * scale in FP32.

    Args:
        data: [..., N, K] float8.
        scale: [..., N or ceil(N / 128), ceil(K / 128)] FP32: 1x128 tiles or 128x128 blocks.

    Returns:
        [..., N, K] FP32.
    """
    n, k = data.shape[-2:]
    rows = scale.repeat_interleave(block_rows(data, scale), -2)[..., :n, :]
    return data.float() * rows.repeat_interleave(BLOCK, -1)[..., :k]


def quantize_transposed(
    x: Tensor,
    power_of_two: bool = False,
    format: str = "e4m3",
    group_sizes: Sequence[int] | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The transpose of x in tiles of 128 tokens: an operand of the weight gradient.

    Args:
        x: [T, K], any floating dtype.
        power_of_two, format: as in `quantize`.
        group_sizes: [E], summing to T: no tile straddles two groups. None for one undivided matrix.

    Returns:
        data [K, T] and scale [K, ceil(T / 128)]. With groups data [K, 128 S] and scale [K, S], S = T // 128 + E: a
        group's tokens begin at the first column of its first tile (`layout.token_spans`), columns that hold no token
        are zero bytes, tiles without tokens have scale 0.
    """
    if group_sizes is None:
        return quantize(x.t(), (1, BLOCK), power_of_two, format)
    (tokens, columns), spans = x.shape, token_spans(group_sizes)
    data = empty_data((columns, data_columns(tokens, len(spans))), torch.uint8, x.device).zero_()
    scale = empty_tiles(columns, scale_columns(tokens, len(spans)), x.device).zero_()
    for first, last, first_tile, last_tile in spans:
        part, part_scale = quantize(x[first:last].t(), (1, BLOCK), power_of_two, format)
        column = first_tile * BLOCK
        data[:, column : column + last - first] = part.view(torch.uint8)
        scale[:, first_tile:last_tile] = part_scale
    return data.view(FORMATS[format].dtype), scale


def quantize_both(
    x: Tensor,
    power_of_two: bool = False,
    format: str = "e4m3",
    group_sizes: Sequence[int] | Tensor | None = None,
) -> Both:
    """x in tiles along its columns and its transpose in tiles along the tokens; backends read x once.

    Args:
        x, power_of_two, format, group_sizes: as in `quantize_transposed`.

    Returns:
        data [T, K] and scale [T, ceil(K / 128)] of `quantize`, data and scale of `quantize_transposed`.
    """
    return *quantize(x, (1, BLOCK), power_of_two, format), *quantize_transposed(x, power_of_two, format, group_sizes)


def requantize_transposed(
    data: Tensor, scale: Tensor, group_sizes: Sequence[int] | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """From 1x128 tiles along K to the transpose in tiles along the tokens, with power-of-two scales.

    If `scale` holds powers of two, every number keeps its mantissa but those that become subnormal in the new tile.

    Args:
        data, scale: [T, K] in 1x128 tiles.
        group_sizes: as in `quantize_transposed`.

    Returns:
        data in the same format and scale, shaped as those of `quantize_transposed`.
    """
    return quantize_transposed(dequantize(data, scale), True, format_of(data.dtype), group_sizes)


def quantize_weight(weight: Tensor) -> Both:
    """A weight in 128x128 blocks of E4M3 with FP32 scales, and its transpose, whose blocks are those transposed.

    Args:
        weight: [..., N, K], any floating dtype.

    Returns:
        data [..., N, K], scale [..., ceil(N / 128), ceil(K / 128)], data_t [..., K, N] and scale_t
        [..., ceil(K / 128), ceil(N / 128)]; each row-major, none a view of another.
    """
    data, scale = quantize(weight, (BLOCK, BLOCK))
    # A single row is its own transpose, which contiguous() would not copy.
    data_t, scale_t = (t.mT.clone(memory_format=torch.contiguous_format) for t in (data.view(torch.uint8), scale))
    return data, scale, *_placed(data_t, data.dtype, scale_t, BLOCK)
