"""How a row of activations or gradients looks as bytes in expert dispatch (DeepSeek-V3 report, section 3.3.2).

`model` sends the tensor as it is. `bf16` rounds to BF16. `fp8` rounds to E4M3 with a power-of-two scale per 1x128 tile
and sends a row as its h bytes and one exponent byte per tile, so payload and scales are one message: 0.504 of BF16.
Whoever does not communicate encodes and decodes all the same, so that every layout rounds the same.

Shape letters: R rows, h hidden size, b bytes of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext import fp8
from megatron_ext.kernels.registry import AUTO

FORMATS = ("model", "bf16", "fp8")
TILE = 128


def row_bytes(wire: str, hidden: int, dtype: torch.dtype) -> int:
    """Bytes of one row of `hidden` values of `dtype`."""
    return {"model": hidden * dtype.itemsize, "bf16": 2 * hidden, "fp8": hidden + -(-hidden // TILE)}[wire]


def encode(x: Tensor, wire: str, backend: str = AUTO) -> Tensor:
    """[R, h] in the model's dtype -> [R, b] uint8, contiguous. No copy if `wire` is `model` and x is contiguous.

    `backend` is that of the kernels which quantise; all of them write the same bytes.
    """
    if wire == "model":
        return x.contiguous().view(torch.uint8)
    if wire == "bf16":
        return x.to(torch.bfloat16).contiguous().view(torch.uint8)
    quantized = fp8.quantize(x, block=(1, TILE), power_of_two=True, backend=backend)
    # A power of two is its FP32 exponent field.
    exponents = (quantized.scale.contiguous().view(torch.int32) >> 23).to(torch.uint8)
    return torch.cat((quantized.data.view(torch.uint8), exponents), dim=-1)


def decode(rows: Tensor, wire: str, hidden: int, dtype: torch.dtype, backend: str = AUTO) -> Tensor:
    """The inverse: [R, b] uint8, contiguous -> [R, h] in `dtype`."""
    if wire == "model":
        return rows.view(dtype)
    if wire == "bf16":
        return rows.view(torch.bfloat16).to(dtype)
    data, exponents = rows.split((hidden, rows.shape[-1] - hidden), dim=-1)
    scale = (exponents.to(torch.int32) << 23).view(torch.float32)
    data = data.contiguous().view(torch.float8_e4m3fn)
    return fp8.QuantizedTensor(data, scale, block=(1, TILE)).dequantize(dtype, backend=backend)
