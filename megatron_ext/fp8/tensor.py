"""Quantised tensors: FP8 numbers and the scales of their blocks.

They are data, not part of an autograd graph: an FP8 tensor that crosses an autograd boundary loses its gradient without
an error, so every differentiable face of this package is in the model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_ext.config.errors import ConfigError
from megatron_ext.fp8.operators import call
from megatron_ext.kernels.layout import BLOCK, FORMATS, require_scales
from megatron_ext.kernels.registry import AUTO

TILE = (1, BLOCK)
WEIGHT_BLOCK = (BLOCK, BLOCK)


@dataclass(frozen=True)
class QuantizedTensor:
    """Numbers in FP8 with one FP32 scale per block.

    Attributes:
        data: [..., N, K], float8_e4m3fn or float8_e5m2.
        scale: [..., ceil(N / block[0]), ceil(K / block[1])] FP32; the value of a number is data * scale.
        block: rows and columns that share a scale, (1, 128) or (128, 128).
    """

    data: Tensor
    scale: Tensor
    block: tuple[int, int] = TILE

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    def dequantize(self, dtype: torch.dtype = torch.float32, *, backend: str = AUTO) -> Tensor:
        """data * scale, [..., N, K], computed in FP32 and rounded to `dtype`.

        Raises:
            ConfigError: the scale does not fit the data.
        """
        try:
            require_scales(self.data, self.scale)
        except ValueError as error:
            raise ConfigError("scale", list(self.scale.shape), str(error)) from None
        return call("dequantize", self.data, self.scale, backend=backend).to(dtype)


@torch.no_grad()
def quantize(
    x: Tensor,
    block: tuple[int, int] = TILE,
    power_of_two: bool = False,
    format: Literal["e4m3", "e5m2"] = "e4m3",
    *,
    backend: str = AUTO,
) -> QuantizedTensor:
    """Quantises x block by block along its last dimension, or its last two; outside autograd.

    The last block of a row or column may be partial. Every number is rounded to nearest after a division by its block's
    scale and never overflows; a block that holds NaN or an infinity becomes NaN throughout.

    Args:
        x: [..., N, K], FP32, BF16, FP16 or FP64 (quantised from its FP32 value).
        block: (1, 128), for activations and gradients, or (128, 128), for weights.
        power_of_two: scales rounded up to powers of two: for what is later transposed, cached or sent.
        format: "e4m3" or "e5m2".
        backend: a backend of `megatron_ext.kernels`, or "auto".

    Raises:
        ConfigError: an argument that is none of these, or a backend that cannot run here.
    """
    if block not in (TILE, WEIGHT_BLOCK):
        raise ConfigError("block", block, "must be (1, 128) or (128, 128)")
    if format not in FORMATS:
        raise ConfigError("format", format, f"must be one of {', '.join(FORMATS)}")
    if x.dim() < 2 or not x.is_floating_point() or x.element_size() == 1:
        raise ConfigError("x", f"{x.dtype} {list(x.shape)}", "must be floating point of at least 16 bits, [..., N, K]")
    data, scale = call("quantize", x, block, power_of_two, format, backend=backend)
    return QuantizedTensor(data, scale, block)
