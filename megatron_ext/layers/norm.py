"""Root-mean-square normalisation (arXiv 1910.07467), with NVIDIA apex's fused kernel where it is installed.

Letters: h normalised dimension.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_ext import fp8
from megatron_ext.fp8 import Precision, QuantizedInput


@functools.cache
def fused_rms_norm() -> Callable[..., Tensor] | None:
    """NVIDIA apex's `fused_rms_norm_affine(x, weight, shape, eps)`, or None.

    The project called `apex` on PyPI is another one; NVIDIA's is known by its module and its compiled extension.
    """
    try:
        importlib.import_module("fused_layer_norm_cuda")
        return importlib.import_module("apex.normalization.fused_layer_norm").fused_rms_norm_affine
    except (ImportError, AttributeError):
        return None


class _RMSNorm(torch.autograd.Function):
    """Keeps x and 1 / rms, and computes what lies between once more in backward (DeepSeek-V3 report, section 3.2.3)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x_fp32 = x.float()
        rstd = torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, rstd)
        return weight * (x_fp32 * rstd).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        dx, dweight = fp8.rms_norm_backward(*rows, weight, rstd.flatten())
        return dx.view(x.shape), dweight, None


class RMSNorm(nn.Module):
    """y = weight * round(x / sqrt(mean(x^2) + eps)), in FP32 up to the rounding, which is to the dtype of x.

    Args:
        dim: h.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h], in the dtype of x."""
        if x.is_cuda and x.dtype == self.weight.dtype and (fused := fused_rms_norm()) is not None:
            return fused(x, self.weight, self.weight.shape, self.eps)
        return _RMSNorm.apply(x, self.weight, self.eps)

    def quantized(self, x: Tensor, precision: Precision | None) -> Tensor | QuantizedInput:
        """What `forward` gives, for layers that multiply in `precision`: in FP8 quantised in the same pass."""
        if precision is None or not precision.fp8 or torch.compiler.is_compiling() or not precision.activation_cache:
            return self(x)
        return fp8.rms_norm_input(x, self.weight, self.eps, precision)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"
