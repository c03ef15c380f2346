"""SwiGLU and RMSNorm, each with the quantisation of its result: the specification (DeepSeek-V3, section 3.3).

Every operation rounds once to FP32 and none is fused with another, and exp is spelled out, for the exp of a device or
of a library differs in the last bit and with it bytes would. Results round to the model's dtype where an unfused model
would hold them, then quantise as in quantize.py; so a block whose results hold NaN or an infinity is NaN throughout.

Shape letters: T tokens, I intermediate size, M rows, K their length; S as in kernels/layout.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ext.kernels.layout import BLOCK
from megatron_ext.kernels.reference.quantize import quantize, quantize_both

LOWEST, HIGHEST = -87.0, 87.0
"""What `exp_fp32` clamps to: 2^n stays a normal number and nothing overflows."""

LOG2_E = 1.44269504
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
"""ln 2 in two parts; n times the first is exact."""

POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
"""(e^r - r - 1) / r^2, highest power first (Cephes, expf)."""


def exp_fp32(x: Tensor) -> Tensor:
    """e^x for FP32, within 2 units in the last place of e^clamp(x, -87, 87); NaN gives NaN."""
    x = x.clamp(LOWEST, HIGHEST)
    n = torch.round(x * LOG2_E)  # half to even
    r = x - n * LN2_HIGH
    r = r - n * LN2_LOW
    p = torch.full_like(r, POLYNOMIAL[0])
    for coefficient in POLYNOMIAL[1:]:
        p = p * r
        p = p + coefficient
    e = p * (r * r)
    e = e + r
    e = e + 1.0
    shift = n.nan_to_num(nan=0.0).to(torch.int32) << 23  # e is between 0.7 and 1.42: its exponent has room for n
    return (e.view(torch.int32) + shift).view(torch.float32)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x) for FP32, never below 6e-39."""
    denominator = 1.0 + exp_fp32(-x)
    return torch.ones_like(denominator) / denominator  # 1.0 / tensor is a reciprocal, which need not be a division


def swiglu_quantize(gate: Tensor, up: Tensor, power_of_two: bool = True, format: str = "e4m3") -> tuple[Tensor, Tensor]:
    """h = (gate * sigmoid(gate)) * up in FP32, rounded to the dtype of gate and quantised.

    Args:
        gate, up: [T, I], any floating dtypes.
        power_of_two, format: as in `quantize`.

    Returns:
        data [T, I] and scale [T, ceil(I / 128)].
    """
    g = gate.float()
    h = (g * sigmoid(g)) * up.float()
    return quantize(h.to(gate.dtype), (1, BLOCK), power_of_two, format)


def swiglu_backward_quantize(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    power_of_two: bool = False,
    format: str = "e4m3",
    group_sizes: Sequence[int] | Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of gate and up, each quantised in both orientations.

        s = sigmoid(gate)    dup = dh * (gate * s)    dgate = (dh * up) * (s * (1 + gate * (1 - s)))

    in FP32, one rounding an operation, then rounded to the dtype of dh.

    Args:
        dh, gate, up: [T, I], any floating dtypes.
        power_of_two, format, group_sizes: as in `quantize_both`.

    Returns:
        data, scale, data_t, scale_t of dgate, then those of dup; shapes as from `quantize_both`.
    """
    d, g, u = dh.float(), gate.float(), up.float()
    s = sigmoid(g)
    dup = d * (g * s)
    dgate = (d * u) * (s * (1.0 + g * (1.0 - s)))
    options = power_of_two, format, group_sizes
    return *quantize_both(dgate.to(dh.dtype), *options), *quantize_both(dup.to(dh.dtype), *options)


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, power_of_two: bool = True, format: str = "e4m3"
) -> tuple[Tensor, Tensor, Tensor]:
    """y = weight * round(x * rstd), rstd = 1 / sqrt(mean(x^2) + eps), quantised.

    The squares are exact and summed in FP64, so that the order of the sum decides nothing; the mean is rounded to FP32,
    and all after it is FP32. round(x * rstd) and y are rounded to the dtype of x, as layers/norm.py does. A row with an
    infinity has rstd 0, one with NaN has rstd NaN.

    Args:
        x: [M, K], FP32, BF16 or FP16.
        weight: [K], any floating dtype.
        eps: added to the mean square, as FP32.
        power_of_two, format: as in `quantize`.

    Returns:
        data [M, K], scale [M, ceil(K / 128)] and rstd [M] FP32.
    """
    total = x.double().square().sum(-1)
    mean = (total / torch.full_like(total, x.shape[-1])).float()  # by a number it may be a product, see quantize.py
    root = (mean + eps).double().sqrt().float()  # torch's FP32 sqrt on a CPU is an ulp off for one number in five
    rstd = torch.ones_like(root) / root
    normed = (x.float() * rstd[:, None]).to(x.dtype)
    y = (weight.float() * normed.float()).to(x.dtype)
    return *quantize(y, (1, BLOCK), power_of_two, format), rstd
