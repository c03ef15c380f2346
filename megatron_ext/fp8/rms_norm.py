"""RMSNorm whose result goes into FP8 products only: normalised and quantised in one pass (DeepSeek-V3, section 3.2.3,
recomputation of RMSNorm, and 3.3).

    y = weight * round(x * rstd),   rstd = 1 / sqrt(mean(x^2) + eps)

Kept for backward are x, which the residual stream holds anyway, and rstd, 4 bytes a token; y exists in FP8 only, as the
operand that the layers behind multiply and keep.

Shape letters: [..., h] with M the product of the leading dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.config.errors import ConfigError
from megatron_ext.fp8.linear import QuantizedInput
from megatron_ext.fp8.operators import call
from megatron_ext.fp8.precision import Precision


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight, computed in FP32 from x and rstd alone.

        n = x rstd    g = dy weight    dx = rstd (g - n mean(g n))    dweight = sum over rows of dy round(n)

    Args:
        dy, x: [M, h].
        weight: [h].
        rstd: [M] FP32.

    Returns:
        [M, h] in the dtype of x, [h] in that of the weight.
    """
    n, dy = x.float() * rstd[:, None], dy.float()
    dweight = (dy * n.to(x.dtype).float()).sum(0).to(weight.dtype)
    g = dy * weight.float()
    dx = (g - n * (g * n).mean(-1, keepdim=True)).mul_(rstd[:, None])
    return dx.to(x.dtype), dweight


class _QuantizedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_Mh: Tensor, weight: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
        data, scale, rstd = call("rms_norm_quantize", x_Mh, weight, eps, True, backend=backend)
        ctx.save_for_backward(x_Mh, weight, rstd)
        ctx.mark_non_differentiable(data, scale)
        # Nobody reads y: it carries a shape, a dtype and the gradient.
        return x_Mh.new_zeros(()).expand(x_Mh.shape), data, scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor, Tensor, None, None]:
        return *rms_norm_backward(dy, *ctx.saved_tensors), None, None


def rms_norm_input(x: Tensor, weight: Tensor, eps: float, precision: Precision) -> QuantizedInput:
    """The normalised x as input of FP8 layers.

    Args:
        x: [..., h], FP32, BF16 or FP16.
        weight: [h].
        eps: added to the mean square.
        precision: `fp8` and `activation_cache` are on; backend.

    Returns:
        What `quantize_input` of the normalised x is, without its numbers in the model's dtype. (The mean of squares is
        summed in FP64, so 1 / rms may differ from `RMSNorm.forward`'s in its last bit.)

    Raises:
        ConfigError: `fp8` or `activation_cache` is off, or the weight is of another width.
    """
    if not precision.fp8 or not precision.activation_cache:
        raise ConfigError("precision.activation_cache", precision.activation_cache, "rms_norm_input needs it, and FP8",
                          "normalise with RMSNorm.forward")
    if weight.shape != x.shape[-1:]:
        raise ConfigError("weight", list(weight.shape), f"must be [h] = {list(x.shape[-1:])}")
    y, data, scale = _QuantizedNorm.apply(x.reshape(-1, x.shape[-1]), weight, eps, precision.backend)
    return QuantizedInput(y.view(x.shape), data, scale, placeholder=True)
