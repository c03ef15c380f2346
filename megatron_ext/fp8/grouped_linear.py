"""Linear layers of many experts at once: rows sorted by expert, one weight per expert, in FP8 or not.

The quantised form is that of fp8/linear.py with groups (tiles along the tokens never straddle experts). The other is a
plain matrix product per expert in the model's dtype, what a loop over `x[e] @ weight[e].T` gives, on which comparisons
with an unquantised model rest. Experts without tokens, and no tokens at all, are ordinary.

Shape letters: T tokens, E experts, [T, K] input, [E, N, K] weight, [T, N] output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.config.errors import ConfigError
from megatron_ext.fp8.linear import QuantizedInput, multiply
from megatron_ext.fp8.precision import Precision
from megatron_ext.fp8.weight_grad import deliver
from megatron_ext.kernels.layout import host_sizes
from megatron_ext.kernels.matmul import accumulate_matmul, compute_dtype


def _occupied(groups: list[int]) -> Iterator[tuple[int, slice]]:
    """(expert, rows) of every expert that has tokens."""
    first = 0
    for e, size in enumerate(groups):
        if size:
            yield e, slice(first, first + size)
        first += size


def _grouped_matmul(a_TK: Tensor, b_EKN: Tensor, groups: list[int]) -> Tensor:
    """Rows of group e times b[e], in `compute_dtype`, returned in the dtype of `a`."""
    dtype = compute_dtype(a_TK)
    a, y = a_TK.to(dtype), a_TK.new_empty(a_TK.shape[0], b_EKN.shape[-1], dtype=dtype)
    for e, rows in _occupied(groups):
        torch.mm(a[rows], b_EKN[e].to(dtype), out=y[rows])
    return y.to(a_TK.dtype)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight: Tensor, groups: list[int]) -> Tensor:
        ctx.save_for_backward(x_TK, weight)
        ctx.weight, ctx.groups = weight, groups
        return _grouped_matmul(x_TK, weight.mT, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_TK, weight = ctx.saved_tensors
        groups = ctx.groups
        dx = _grouped_matmul(dy_TN, weight, groups) if ctx.needs_input_grad[0] else None

        def accumulate(main_grad: Tensor) -> None:
            for e, rows in _occupied(groups):
                accumulate_matmul(main_grad[e], dy_TN[rows].t(), x_TK[rows])

        return dx, deliver(ctx.weight, accumulate) if ctx.needs_input_grad[1] else None, None


def grouped_linear(
    x: Tensor | QuantizedInput,
    group_sizes: Sequence[int] | Tensor,
    weight: Tensor,
    *,
    precision: Precision | None = None,
) -> Tensor:
    """y_e = x_e W[e]^T for every expert e, with a separable weight gradient.

    Args:
        x: [T, K], BF16 or FP32, rows sorted by expert; or `quantize_input` of it, which several products share.
        group_sizes: [E] rows of each expert, summing to T; a list, or an int64 tensor (one on a GPU stays there, but is
            read without `precision.fp8`).
        weight: [E, N, K]. A sink on it gets one closure, which adds to main_grad[e] of every expert with tokens.
        precision: `fp8` chooses quantised or plain products; backend and weight cache. None quantises, as in `linear`.

    Returns:
        [T, N] in the dtype of x, part of the autograd graph even if T is 0.

    Raises:
        ConfigError: shapes or sizes that do not fit, a quantised x with `precision.fp8` off, or a backend that cannot
            run here.
    """
    precision = precision or Precision(fp8=True)
    given = x.x if isinstance(x, QuantizedInput) else x
    check_groups(given, group_sizes, weight)
    if precision.fp8:
        return multiply(x, weight, None, sizes_on(group_sizes, given.device), precision)
    if isinstance(x, QuantizedInput):
        raise ConfigError("precision.fp8", False, "x is quantised already", "give the precision that quantised it")
    return _GroupedLinear.apply(x, weight, host_sizes(group_sizes))


def check_groups(x: Tensor, group_sizes: Sequence[int] | Tensor, weight: Tensor) -> None:
    """Whether rows x [T, K] in groups fit experts [E, N, K]. Sizes on a GPU are not read, for that would wait for it.

    Raises:
        ConfigError: they do not.
    """
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[2]:
        raise ConfigError("x", list(x.shape), f"must be [T, K] for a weight [E, N, K] = {list(weight.shape)}")
    rule = f"must be E = {weight.shape[0]} sizes, none negative, that sum to T = {x.shape[0]}"
    if isinstance(group_sizes, Tensor):
        if group_sizes.shape != weight.shape[:1] or group_sizes.is_floating_point():
            raise ConfigError("group_sizes", f"{group_sizes.dtype} {list(group_sizes.shape)}", rule)
    elif not isinstance(group_sizes, Sequence) or len(group_sizes) != weight.shape[0]:
        raise ConfigError("group_sizes", group_sizes, rule)
    elif not all(isinstance(size, int) for size in group_sizes):
        raise ConfigError("group_sizes", list(group_sizes), rule)
    if isinstance(group_sizes, Tensor) and (group_sizes.is_cuda or torch.compiler.is_compiling()):
        return
    groups = host_sizes(group_sizes)
    if sum(groups) != x.shape[0] or min(groups, default=0) < 0:
        raise ConfigError("group_sizes", groups, rule)


def sizes_on(group_sizes: Sequence[int] | Tensor, device: torch.device) -> Any:
    """Group sizes where kernels read them: a list for a CPU, an int64 tensor on a GPU, without waiting for it."""
    if device.type != "cuda":
        return group_sizes if torch.compiler.is_compiling() else host_sizes(group_sizes)
    if isinstance(group_sizes, Tensor):
        return group_sizes.to(device, torch.int64)
    # From pageable memory the copy would wait for the device.
    return torch.tensor(group_sizes, dtype=torch.int64).pin_memory().to(device, non_blocking=True)
