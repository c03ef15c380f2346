"""E5M6 with a power-of-two scale a tile, 12 bits a number: the specification (DeepSeek-V3, section 3.3.1, which keeps
the inputs of the projection after attention in it).

A number is an FP16 number rounded to 6 mantissa bits, cut into a plane of bytes and a plane of half bytes:

    bit        11     10 ... 6    5 ... 0
               sign   exponent    mantissa      high = bits 11 ... 4 (an E5M2 number cut off), low = bits 3 ... 0

    low byte j of a row = low of column 2j | low of column 2j + 1 << 4        (0 where there is no such column)

    scale = max(amax / 65024, 2^-105) rounded up to a power of two
    value = round_to_nearest_even(clamp(x / scale, -65024, 65024)) * scale    subnormals are multiples of 2^-20

A tile of zeros gives zeros (signs kept). A tile that holds NaN or an infinity has scale NaN, high 0x7F and low 0xF
throughout. The smallest scale is chosen as those of layout.FORMATS are: what rounds to a nonzero number is a normal
FP32 number.

Shape letters: M rows, K their length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from megatron_ext.kernels.layout import BLOCK, empty_tiles
from megatron_ext.kernels.reference.quantize import up_to_power_of_two

LARGEST = 65024.0
"""(2 - 2^-6) 2^15."""

SMALLEST_SCALE = 2.0**-105

SHIFT, REBIAS = 17, 112
"""Mantissa bits that FP32 has more, and the difference of the exponent biases."""

MAGIC = 8.0
"""Added to less than 2^-14, it rounds to a multiple of 2^-20."""

NAN_CODE = 0x7FF


def pack_e5m6(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packs tiles of 128 numbers.

    Args:
        x: [M, K], any floating dtype.

    Returns:
        high [M, K] uint8, low [M, ceil(K / 2)] uint8, scale [M, ceil(K / 128)] FP32.
    """
    rows, columns = x.shape
    tiles = rearrange(F.pad(x.float(), (0, -columns % BLOCK)), "m (t c) -> m t c", c=BLOCK)
    amax = tiles.abs().amax(-1)
    scale = up_to_power_of_two((amax / torch.full_like(amax, LARGEST)).clamp(min=SMALLEST_SCALE))
    scale = scale.masked_fill(~amax.isfinite(), torch.nan)
    bits = (tiles / scale[..., None]).clamp(-LARGEST, LARGEST).view(torch.int32)
    sign, a = bits >> 31 & 1, bits & 0x7FFFFFFF
    normal = (a + (a >> SHIFT & 1) + ((1 << SHIFT - 1) - 1) - (REBIAS << 23)) >> SHIFT
    magic = torch.full_like(scale, MAGIC)[..., None]
    subnormal = (a.view(torch.float32) + magic).view(torch.int32) - magic.view(torch.int32)
    codes = torch.where(a < (REBIAS + 1) << 23, subnormal, normal) | sign << 11
    codes = codes.masked_fill(scale.isnan()[..., None], NAN_CODE).flatten(1)[:, :columns]
    low = rearrange(F.pad(codes & 0xF, (0, columns % 2)), "m (j two) -> m j two", two=2)
    place = empty_tiles(rows, scale.shape[1], x.device).copy_(scale)
    return (codes >> 4).to(torch.uint8), (low[..., 0] | low[..., 1] << 4).to(torch.uint8), place


def unpack_e5m6(high: Tensor, low: Tensor, scale: Tensor) -> Tensor:
    """The numbers of `pack_e5m6`, [M, K] FP32."""
    columns = high.shape[1]
    nibbles = torch.stack((low & 0xF, low >> 4), -1).flatten(1)[:, :columns]
    halves = (high.to(torch.int32) << 8 | nibbles.to(torch.int32) << 4).to(torch.int16).view(torch.float16)
    return halves.float() * scale.repeat_interleave(BLOCK, -1)[:, :columns]
