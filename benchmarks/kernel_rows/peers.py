"""What others call the same product. A function prepares the operands once and returns what to time, or why it cannot.

Peers are what is installed: torch itself, `sgl-deep-gemm` 0.2.5 (imported as deep_gemm), `torchao` 0.18.0. Shape
letters as in kernels/README.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Call = Callable[[], Any] | str


def imported(name: str) -> Any:
    """A module, or in words why there is none."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a wheel for another torch or CUDA raises anything
        return "not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported: {error!r:.100}"


def _rows_first(scale: Tensor) -> Tensor:
    """1x128 scales with rows as neighbours, as cuBLAS and DeepGEMM read them."""
    return scale.t().contiguous().t()


def scaled_mm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype,
              main_grad: Tensor | None = None) -> Call:
    """F.scaled_mm of a [M, K] in tiles and b [N, K] in tiles or blocks; added to `main_grad` if given."""
    if not hasattr(F, "scaled_mm"):
        return "this torch has no F.scaled_mm"
    tiles = b_scale.shape[0] == b.shape[0]
    recipe = F.ScalingType.BlockWise1x128 if tiles else F.ScalingType.BlockWise128x128
    a_scale = _rows_first(a_scale)
    # cuBLAS wants the blocks of K padded to a multiple of 4, K first.
    b_scale = _rows_first(b_scale) if tiles else F.pad(b_scale, (0, -b_scale.shape[1] % 4)).contiguous().t()
    a, b = a.contiguous(), b.contiguous()

    def call() -> Any:
        y = F.scaled_mm(a, b.t(), a_scale, F.ScalingType.BlockWise1x128, b_scale, recipe, output_dtype=dtype)
        return y if main_grad is None else main_grad.add_(y)

    return call


def deep_gemm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, main_grad: Tensor | None = None) -> Call:
    """DeepGEMM's NT product in BF16, or accumulated into `main_grad` [M, N] FP32 from two operands in tiles."""
    module = imported("deep_gemm")
    if isinstance(module, str):
        return module
    left = a.contiguous(), _rows_first(a_scale)
    if main_grad is not None:
        right = b.contiguous(), _rows_first(b_scale)
        return lambda: module.fp8_gemm_nt(left, right, main_grad, c=main_grad, recipe=(1, 1, 128),
                                          disable_ue8m0_cast=True)
    right = b.contiguous(), b_scale.contiguous()
    out = torch.empty(a.shape[0], b.shape[0], dtype=torch.bfloat16, device=a.device)
    return lambda: module.fp8_gemm_nt(left, right, out, disable_ue8m0_cast=True)


def deep_gemm_grouped(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, sizes: list[int]) -> Call:
    """DeepGEMM's grouped product of a [T, K] and b [E, N, K]; sizes are multiples of 128."""
    module = imported("deep_gemm")
    if isinstance(module, str):
        return module
    groups = torch.repeat_interleave(torch.tensor(sizes, device=a.device)).int()
    out = torch.empty(a.shape[0], b.shape[1], dtype=torch.bfloat16, device=a.device)
    left, right = (a.contiguous(), _rows_first(a_scale)), (b.contiguous(), b_scale.contiguous())
    return lambda: module.m_grouped_fp8_gemm_nt_contiguous(left, right, out, groups, disable_ue8m0_cast=True)


def deep_gemm_grouped_wgrad(dy: Tensor, dy_scale: Tensor, x: Tensor, x_scale: Tensor, sizes: list[int],
                            main_grad: Tensor) -> Call:
    """DeepGEMM's grouped weight gradient; dy [N, 128 S] and x [K, 128 S] as `grouped_wgrad` takes them."""
    module = imported("deep_gemm")
    if isinstance(module, str):
        return module

    def flat(data: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        from megatron_ext.kernels.layout import BLOCK, token_spans

        spans = token_spans(sizes)
        parts = [data[:, BLOCK * s.first_tile:BLOCK * s.last_tile].reshape(-1) for s in spans]
        return torch.cat(parts), _rows_first(torch.cat([scale[:, s.first_tile:s.last_tile] for s in spans], 1))

    left, right = flat(dy, dy_scale), flat(x, x_scale)
    on_device = torch.tensor(sizes, dtype=torch.int32, device=dy.device)
    return lambda: module.k_grouped_fp8_gemm_nt_contiguous(left, right, main_grad, sizes, on_device, main_grad)


def torchao_linear(weight: nn.Parameter) -> Any:
    """torchao's block-wise FP8 linear around `weight` (F.scaled_mm inside), or why there is none."""
    module = imported("torchao.prototype.blockwise_fp8_training.linear")
    if isinstance(module, str):
        return module
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    layer.weight = weight
    return module.Float8BlockwiseLinear.from_float(layer)
