"""A linear layer whose three GEMMs run in FP8 (DeepSeek-V3, section 3.3, figure 6).

    fprop   y  = x W^T      x  in 1x128 tiles along K, W in 128x128 blocks
    dgrad   dx = dy W       dy in 1x128 tiles along N, the same blocks of W transposed (exact)
    wgrad   dW = dy^T x     dy and x in tiles of 128 tokens, accumulated in FP32

The one copy of x kept for backward is in FP8 with power-of-two scales, so that turning its tiles towards the tokens for
wgrad shifts exponents and (but for numbers that fall below the normal range) rounds nothing a second time. dy is at
hand in the model's dtype in backward and is quantised from it in both directions, with FP32 scales.

Shape letters: [..., K] input, [N, K] weight, [..., N] output, T the product of the leading dimensions; in the grouped
form [T, K], [E, N, K], [T, N].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.config.errors import ConfigError
from megatron_ext.fp8.operators import call
from megatron_ext.fp8.precision import Precision
from megatron_ext.fp8.tensor import TILE, WEIGHT_BLOCK
from megatron_ext.fp8.weight_grad import deliver


def _weight_operands(weight: Tensor, precision: Precision) -> Any:
    """The weight quantised, in the backend's two forms (forward, input gradient); from the cache if there is one."""
    backend = precision.backend

    def build() -> Any:
        data, scale = call("quantize", weight.detach(), WEIGHT_BLOCK, backend=backend)
        return call("weight_operands", data, scale, backend=backend)

    return build() if precision.weights is None else precision.weights.get(weight, backend, build)


@dataclass(frozen=True)
class QuantizedInput:
    """The input of several layers: itself, for autograd, and the one FP8 copy that all of them multiply and keep.

    Attributes:
        x: [..., K] in the model's dtype; no layer keeps it.
        data: [T, K] float8_e4m3fn.
        scale: [T, ceil(K / 128)] FP32, powers of two.
    """

    x: Tensor
    data: Tensor
    scale: Tensor


def quantize_input(x: Tensor, precision: Precision | None) -> Tensor | QuantizedInput:
    """x [..., K] as `linear` and `grouped_linear` take it: quantised once, however many of them it is given to.

    Returns x itself if `precision` is None or does not quantise, so that a layer need not ask.
    """
    if precision is None or not precision.fp8:
        return x
    x_TK = x.detach().reshape(-1, x.shape[-1])
    return QuantizedInput(x, *call("quantize", x_TK, TILE, True, backend=precision.backend))


class QuantizedLinear(torch.autograd.Function):
    """y = x W^T, or for every group of tokens e: y_e = x_e W[e]^T; `data` and `scale` are x quantised."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TK: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        data: Tensor,
        scale: Tensor,
        groups: list[int] | None,
        precision: Precision,
    ) -> Tensor:
        backend, x8 = precision.backend, (data, scale)
        forward_weight, _ = _weight_operands(weight, precision)
        if groups is None:
            y = call("gemm_nt", *x8, *forward_weight, backend=backend)
        else:
            y = call("grouped_gemm_nt", *x8, *forward_weight, groups, backend=backend)
        ctx.save_for_backward(weight, *(x8 if ctx.needs_input_grad[1] else ()))
        ctx.weight, ctx.bias = weight, bias  # the objects that carry the sinks
        ctx.groups, ctx.precision, ctx.dtype = groups, precision, x_TK.dtype
        return (y if bias is None else y + bias).to(x_TK.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, ...]:
        groups, backend = ctx.groups, ctx.precision.backend
        _, *x8 = ctx.saved_tensors  # the weight is saved for autograd's check that nobody has changed it since
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            _, backward_weight = _weight_operands(ctx.weight, ctx.precision)
            dy8 = call("quantize", dy_TN, TILE, backend=backend)
            if groups is None:
                dx = call("gemm_nt", *dy8, *backward_weight, backend=backend)
            else:
                dx = call("grouped_gemm_nt", *dy8, *backward_weight, groups, backend=backend)
            dx = dx.to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            # Quantised now, not in the closure: while the gradient waits it holds one byte a number of x and dy.
            dy8 = call("quantize_transposed", dy_TN, False, "e4m3", groups, backend=backend)

            def accumulate(main_grad: Tensor) -> None:
                x8_KT = call("requantize_transposed", *x8, groups, backend=backend)
                if groups is None:
                    call("gemm_nt", *dy8, *x8_KT, main_grad, backend=backend)
                else:
                    call("grouped_wgrad", *dy8, *x8_KT, groups, main_grad, backend=backend)

            dweight = deliver(ctx.weight, accumulate)
        if ctx.needs_input_grad[2]:
            # Summed now: [N] waits for the sink, where a closure over dy would keep all of [T, N].
            total = dy_TN.sum(0, dtype=torch.promote_types(ctx.bias.dtype, torch.float32))
            dbias = deliver(ctx.bias, lambda main_grad: main_grad.add_(total))
        return dx, dweight, dbias, None, None, None, None


def linear(
    x: Tensor | QuantizedInput, weight: Tensor, bias: Tensor | None = None, *, precision: Precision | None = None
) -> Tensor:
    """y = x W^T + b with every operand in FP8 and a separable weight gradient.

    Args:
        x: [..., K], BF16 or FP32 (any floating dtype on a CPU); or `quantize_input` of it, which several layers share.
        weight: [N, K]; neither N nor K has to be a multiple of 128.
        bias: [N] or None, added in FP32.
        precision: backend and weight cache; None is the automatic backend and no cache.

    Returns:
        [..., N] in the dtype of x. Gradients come in the dtypes of their tensors.

    Raises:
        ConfigError: shapes that do not fit, `precision.fp8` off (that is `megatron_ext.layers.linear`), or a backend
            that cannot run here.
    """
    precision = precision or Precision(fp8=True)
    if not precision.fp8:
        raise ConfigError("precision.fp8", False, "fp8.linear always quantises", "use megatron_ext.layers.linear")
    given = x.x if isinstance(x, QuantizedInput) else x
    if weight.dim() != 2 or given.shape[-1] != weight.shape[-1]:
        raise ConfigError("x", list(given.shape), f"must be [..., K] for a weight [N, K] = {list(weight.shape)}")
    return multiply(x, weight, bias, None, precision).view(*given.shape[:-1], weight.shape[0])


def multiply(
    x: Tensor | QuantizedInput, weight: Tensor, bias: Tensor | None, groups: list[int] | None, precision: Precision
) -> Tensor:
    """`QuantizedLinear` of operands already checked: [..., K] -> [T, N]."""
    operand = x if isinstance(x, QuantizedInput) else quantize_input(x, precision)
    assert isinstance(operand, QuantizedInput)
    x_TK = operand.x.reshape(-1, operand.x.shape[-1])
    return QuantizedLinear.apply(x_TK, weight, bias, operand.data, operand.scale, groups, precision)
