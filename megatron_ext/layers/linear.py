"""Matrix products whose weight gradient can be taken later: the split that DualPipe and zero-bubble schedules need.

The backward of y = x W^T has two halves: the input gradient dx = dy W, which the previous stage waits for, and the
weight gradient dW = dy^T x, which nobody waits for. An operator here computes the first at once and hands the second to
the parameter's *sink*. The executor of the pipeline puts a sink on every parameter it manages

    weight.weight_grad_sink: Callable[[Parameter, Callable[[Tensor], None]], None]

and calls the closure, now or later, with the parameter's FP32 `main_grad` to accumulate into. A closure keeps
references to x and dy, never a gradient of the parameter's size. Without a sink the operator is ordinary autograd.

Shape letters: [..., K] input, [N, K] weight, [..., N] output, T the product of the leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ext import fp8
from megatron_ext.fp8 import Precision, QuantizedInput
from megatron_ext.fp8.weight_grad import deliver
from megatron_ext.kernels.matmul import accumulate_matmul, matmul

WeightGrad = Callable[[Tensor], None]
"""Accumulates a weight gradient into the FP32 tensor it is given, shaped like the parameter."""


class WeightGradSink(Protocol):
    """What the executor hangs on a parameter: runs `accumulate(main_grad)` now or later, under `no_grad`."""

    def __call__(self, parameter: nn.Parameter, accumulate: WeightGrad) -> None: ...


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.bias = weight, bias
        y = matmul(x, weight.t())
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dx = matmul(dy, weight) if needs_x else None
        dweight = dbias = None
        if needs_weight:
            dy_TN, x_TK = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])

            def accumulate_weight(main_grad: Tensor) -> None:
                accumulate_matmul(main_grad, dy_TN.t(), x_TK)

            dweight = deliver(ctx.weight, accumulate_weight)
        if needs_bias:
            dy_TN = dy.reshape(-1, dy.shape[-1])
            dbias = deliver(ctx.bias, lambda main_grad: main_grad.add_(dy_TN.sum(0, dtype=main_grad.dtype)))
        return dx, dweight, dbias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b with a separable weight gradient.

    Args:
        x: [..., K] in the model's dtype.
        weight: [N, K], same dtype as x.
        bias: [N] or None.

    Returns:
        [..., N] in the dtype of x.

    Under `torch.autocast`, which chooses dtypes itself, in code that torch.compile traces, and for dtypes that differ
    (which torch refuses) this is `torch.nn.functional.linear`, whose weight gradient comes with the input's.
    """
    if x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


class Linear(nn.Linear):
    """`torch.nn.Linear` over `linear`: same parameters, same initialisation, separable weight gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def split_linears(module: nn.Module) -> None:
    """Makes every plain `nn.Linear` in `module` a `Linear`, in place.

    Only the exact class is touched: a subclass, or a module with parametrizations, may do anything with its weight.
    """
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Linear


class PrecisionLinear(Linear):
    """The linear layer of attention and MLP: FP8 or the model's dtype, as its block is told by `set_precision`.

    Weights are drawn from N(0, std), biases are zero, as in Hugging Face's models.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is a bias [N].
        std: standard deviation of the initial weights (`initializer_range`).
        cache: what the input is kept in for the weight gradient of an FP8 product, see `fp8.linear`.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, *, std: float,
                 cache: Literal["e4m3", "e5m6"] = "e4m3"):
        self.std = std  # before the parent, whose constructor calls reset_parameters
        super().__init__(in_features, out_features, bias)
        self.precision: Precision | None = None
        self.cache = cache

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def set_precision(self, precision: Precision) -> None:
        """Takes effect from the next forward."""
        self.precision = precision

    def forward(self, x: Tensor | QuantizedInput) -> Tensor:
        """[..., K] -> [..., N], in the dtype of x; quantised already only where the precision is FP8."""
        if self.precision is not None and self.precision.fp8:
            return fp8.linear(x, self.weight, self.bias, precision=self.precision, cache=self.cache)
        return linear(x, self.weight, self.bias)
