"""Device code of blocks: which tokens a tile of groups has, reading one, writing it quantised in either orientation.

Shape letters as in kernels/README.md: T tokens, K columns, E groups, S scale columns along the tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_ext.kernels.triton_kernels.arithmetic import BLOCK, NAN_DATA, fp8_bytes, magnitude


@triton.jit
def tokens_of_tile(tile, sizes, groups, tokens, GROUPS: tl.constexpr):
    """The group, first token and last token (exclusive) of a tile of at most 128; none if first >= last.

    In groups (GROUPS, their number rounded up to a power of two, is not 0) tile numbers are scale columns, and group e
    begins at column offset_e // 128 + e (`layout.token_spans`). Every program adds up the sizes for itself: a few loads
    that hit a cache, against a kernel more and a wait for it.
    """
    group = 0
    first = tile * BLOCK
    last = tokens
    if GROUPS > 0:
        e = tl.arange(0, GROUPS)
        size = tl.load(sizes + e, mask=e < groups, other=0).to(tl.int32)
        end = tl.cumsum(size, 0)
        first_tile = (end - size) // BLOCK + e
        group = tl.sum(((first_tile <= tile) & (e < groups)).to(tl.int32), 0) - 1
        mine = e == group
        first = tl.sum(tl.where(mine, end - size + (tile - first_tile) * BLOCK, 0), 0)
        last = tl.sum(tl.where(mine, end, 0), 0)
    return group, first, tl.minimum(last, first + BLOCK)


@triton.jit
def at(x, row, x_row, column):
    """Where number (row, column) of x lies. Added up as one 64-bit number a program: what differs between its threads
    then fits 32 bits, and an address costs a register or two instead of four."""
    return x + (row.to(tl.int64) * x_row + column)


@triton.jit
def load_block(x, first, last, x_row, start, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows first.. below last and columns start.. of x [.., columns] as FP32 [ROWS, COLUMNS], 0 beyond them."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    place = at(x, first, x_row, start) + (row[:, None] * x_row + column[None, :])
    mask = (row < last - first)[:, None] & (column < columns - start)[None, :]
    return tl.load(place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_by_rows(
    x, first, last, start, columns, data, scale, data_row, scale_row, scale_column,
    POWER_OF_TWO: tl.constexpr, E5M2: tl.constexpr,
):  # fmt: skip
    """Quantises x [R, 128], a block from `load_block` or of its shape, in 1x128 tiles."""
    row, column = tl.arange(0, x.shape[0]), tl.arange(0, BLOCK)
    bytes_, tile_scale, bad = fp8_bytes(x, tl.max(magnitude(x), 1), 1, POWER_OF_TWO, E5M2)
    bytes_ = tl.where(bad[:, None], NAN_DATA, bytes_)
    there = row < last - first
    place = at(data, first, data_row, start) + (row[:, None] * data_row + column[None, :])
    tl.store(place, bytes_, mask=there[:, None] & (column < columns - start)[None, :])
    tl.store(at(scale, first, scale_row, start // BLOCK * scale_column) + row * scale_row, tile_scale, mask=there)


@triton.jit
def store_by_tokens(
    x, tile, tokens, start, columns, width, data, scale, data_row, scale_row, scale_column,
    POWER_OF_TWO: tl.constexpr, E5M2: tl.constexpr,
):  # fmt: skip
    """Quantises x [128, C], the tokens of tile `tile`, along them and writes its transpose, rows start.. of data.

    Only `tokens` tokens are there. The numbers of others are 0 and become zero bytes, and a tile without any gets scale
    0. The bytes are transposed, not the numbers: a quarter of the shared memory and of the traffic through it.
    """
    token, row = tl.arange(0, BLOCK), tl.arange(0, x.shape[1])
    bytes_, tile_scale, bad = fp8_bytes(x, tl.max(magnitude(x), 0), 0, POWER_OF_TWO, E5M2)
    bytes_ = tl.where(bad[None, :] & (token < tokens)[:, None], NAN_DATA, bytes_)
    there = row < columns - start
    place = at(data, start, data_row, tile * BLOCK) + (row[:, None] * data_row + token[None, :])
    tl.store(place, tl.trans(bytes_), mask=there[:, None] & (token < width - tile * BLOCK)[None, :])
    tile_scale = tl.where(tokens > 0, tile_scale, 0.0)
    tl.store(at(scale, start, scale_row, tile * scale_column) + row * scale_row, tile_scale, mask=there)
