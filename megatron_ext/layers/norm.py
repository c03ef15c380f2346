"""Root-mean-square normalisation (arXiv 1910.07467), with NVIDIA apex's fused kernel where it is installed.

Letters: h normalised dimension.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor, nn


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
        x_fp32 = x.float()
        normed = x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"
