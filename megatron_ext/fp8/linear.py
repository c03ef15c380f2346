"""A linear layer whose three GEMMs run in FP8 (DeepSeek-V3, section 3.3, figure 6).

    fprop   y  = x W^T      x  in 1x128 tiles along K, W in 128x128 blocks
    dgrad   dx = dy W       dy in 1x128 tiles along N, the same blocks of W transposed (exact)
    wgrad   dW = dy^T x     dy and x in tiles of 128 tokens, accumulated in FP32

The one copy of x kept for backward is in FP8 with power-of-two scales, so that turning its tiles towards the tokens for
wgrad shifts exponents and (but for numbers that fall below the normal range) rounds nothing a second time. The input of
the projection after attention is kept in E5M6 instead (`cache="e5m6"`), for its gradient feels the rounding most;
without `precision.activation_cache` x is kept as it is and quantised from that in the other direction. dy is at hand in
the model's dtype in backward and is quantised from it in both directions at once, with FP32 scales.

Shape letters: [..., K] input, [N, K] weight, [..., N] output, T the product of the leading dimensions; in the grouped
form [T, K], [E, N, K], [T, N].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.config.errors import ConfigError
from megatron_ext.fp8.operators import call
from megatron_ext.fp8.precision import Precision
from megatron_ext.fp8.tensor import TILE, WEIGHT_BLOCK
from megatron_ext.fp8.weight_grad import deliver

Pair = tuple[Tensor, Tensor]
"""Data and scale."""

Groups = list[int] | Tensor | None
"""Rows of each expert: on the host for a CPU, on the device for a GPU, whose kernels read them there; None is dense."""

Cache = Literal["e4m3", "e5m6"]
"""What the input of a layer is kept in."""


def _weight_operands(weight: Tensor, precision: Precision) -> Any:
    """The weight quantised, in the backend's two forms (forward, input gradient); from the cache if there is one."""
    backend = precision.backend

    def build() -> Any:
        if weight.is_cuda:  # every backend there multiplies by bytes, and wants both orientations contiguous
            data, scale, data_t, scale_t = call("quantize_weight", weight.detach(), backend=backend)
            return (data, scale), (data_t, scale_t)
        data, scale = call("quantize", weight.detach(), WEIGHT_BLOCK, backend=backend)
        return call("weight_operands", data, scale, backend=backend)

    return build() if precision.weights is None else precision.weights.get(weight, backend, build)


def forward_product(x8: Pair, weight: Tensor, groups: Groups, dtype: torch.dtype, precision: Precision) -> Tensor:
    """x [T, K] in 1x128 tiles times W^T -> [T, N], the FP32 sums rounded to `dtype`."""
    return _product(x8, _weight_operands(weight, precision)[0], groups, dtype, precision.backend)


def input_gradient(dy8: Pair, weight: Tensor, groups: Groups, dtype: torch.dtype, precision: Precision) -> Tensor:
    """dy [T, N] in 1x128 tiles times W -> [T, K], the FP32 sums rounded to `dtype`."""
    return _product(dy8, _weight_operands(weight, precision)[1], groups, dtype, precision.backend)


def _product(a8: Pair, operand: Any, groups: Groups, dtype: torch.dtype, backend: str) -> Tensor:
    if groups is None:
        return call("gemm_nt", *a8, *operand, None, dtype, backend=backend)
    return call("grouped_gemm_nt", *a8, *operand, groups, dtype, backend=backend)


def accumulate_weight_gradient(main_grad: Tensor, dy8_NT: Pair, x8_KT: Pair, groups: Groups, backend: str) -> None:
    """main_grad [N, K] or [E, N, K] += dy^T x, both operands in tiles along the tokens; summed in FP32."""
    if main_grad.dtype != torch.float32:  # of an FP64 parameter
        total = torch.zeros_like(main_grad, dtype=torch.float32)
        accumulate_weight_gradient(total, dy8_NT, x8_KT, groups, backend)
        main_grad.add_(total)
        return
    if groups is None:
        call("gemm_nt", *dy8_NT, *x8_KT, main_grad, backend=backend)
    else:
        call("grouped_wgrad", *dy8_NT, *x8_KT, groups, main_grad, backend=backend)


@dataclass(frozen=True)
class QuantizedInput:
    """The input of several layers: itself, for autograd, and the one FP8 copy that all of them multiply and keep.

    Attributes:
        x: [..., K] in the model's dtype; no layer keeps it.
        data: [T, K] float8_e4m3fn.
        scale: [T, ceil(K / 128)] FP32, powers of two.
        placeholder: whether x, from `rms_norm_input`, has a shape and a gradient and no numbers.
    """

    x: Tensor
    data: Tensor
    scale: Tensor
    placeholder: bool = False


def quantize_input(x: Tensor | QuantizedInput, precision: Precision | None) -> Tensor | QuantizedInput:
    """x [..., K] as `linear` and `grouped_linear` take it: quantised once, however many of them it is given to.

    Returns x itself if `precision` is None or does not quantise, if it is quantised already, or in code that
    torch.compile traces (there every layer quantises for itself, to the same bytes), so that a layer need not ask.
    """
    if precision is None or not precision.fp8 or isinstance(x, QuantizedInput) or torch.compiler.is_compiling():
        return x
    x_TK = x.detach().reshape(-1, x.shape[-1])
    return QuantizedInput(x, *call("quantize", x_TK, TILE, True, backend=precision.backend))


def checked_input(x: Tensor | QuantizedInput, precision: Precision) -> QuantizedInput:
    """x quantised, if it is not yet.

    Raises:
        ConfigError: what will be kept for backward is x itself, and it has no numbers.
    """
    operand = quantize_input(x, precision)
    assert isinstance(operand, QuantizedInput)
    if operand.placeholder and not precision.activation_cache:
        raise ConfigError("precision.activation_cache", False, "the input of rms_norm_input exists in FP8 only",
                          "normalise it with RMSNorm.forward")
    return operand


def linear_forward(x_TK: Tensor, weight: Tensor, bias: Tensor | None, x8: Pair, groups: Groups, precision: Precision,
                   cache: Cache) -> tuple[Tensor, tuple[Tensor, ...]]:
    """y [T, N] in the dtype of x, and what the weight gradient needs of x."""
    dtype = x_TK.dtype
    y = forward_product(x8, weight, groups, dtype if bias is None else torch.float32, precision)
    if not precision.activation_cache:
        kept: tuple[Tensor, ...] = (x_TK,)
    else:
        kept = call("pack_e5m6", x_TK, backend=precision.backend) if cache == "e5m6" else x8
    return (y if bias is None else (y + bias).to(dtype)), kept


def linear_backward(dy_TN: Tensor, weight: Tensor, bias: Tensor | None, kept: Sequence[Tensor],
                    needs: tuple[bool, bool, bool], groups: Groups, precision: Precision) -> list[Tensor | None]:
    """Gradients of x, weight and bias where they are needed; None where a sink takes them."""
    backend = precision.backend
    dx = dweight = dbias = None
    dy8, dy8_NT = quantize_gradient(dy_TN, groups, needs[0], needs[1], backend)
    if needs[0]:
        dx = input_gradient(dy8, weight, groups, dy_TN.dtype, precision)
    if needs[1]:

        def accumulate(main_grad: Tensor) -> None:
            accumulate_weight_gradient(main_grad, dy8_NT, turned(kept, groups, backend), groups, backend)

        dweight = deliver(weight, accumulate)
    if needs[2]:
        # Summed now: [N] waits for the sink, where a closure over dy would keep all of [T, N].
        total = dy_TN.sum(0, dtype=torch.promote_types(bias.dtype, torch.float32))
        dbias = deliver(bias, lambda main_grad: main_grad.add_(total))
    return [dx, dweight, dbias]


def turned(kept: Sequence[Tensor], groups: Groups, backend: str) -> Pair:
    """The operand of the weight gradient, tiles along the tokens, from x as it was kept: [T, K] in the model's dtype,
    in FP8 with its scales, or packed in E5M6 (one, two or three tensors)."""
    if len(kept) == 2:
        return call("requantize_transposed", *kept, groups, backend=backend)
    x_TK = call("unpack_e5m6", *kept, backend=backend) if len(kept) == 3 else kept[0]
    return call("quantize_transposed", x_TK, True, "e4m3", groups, backend=backend)


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
        groups: Groups,
        precision: Precision,
        cache: Cache,
    ) -> Tensor:
        needed = ctx.needs_input_grad[1]
        y, kept = linear_forward(x_TK, weight, bias, (data, scale), groups, precision, cache if needed else "e4m3")
        ctx.save_for_backward(weight, *(kept if needed else ()))
        ctx.weight, ctx.bias = weight, bias  # the objects that carry the sinks
        ctx.groups, ctx.precision = groups, precision
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, ...]:
        _, *kept = ctx.saved_tensors  # the weight is saved for autograd's check that nobody has changed it since
        gradients = linear_backward(dy_TN, ctx.weight, ctx.bias, kept, ctx.needs_input_grad[:3], ctx.groups,
                                    ctx.precision)
        return *gradients, None, None, None, None, None


def quantize_gradient(dy_TN: Tensor, groups: Groups, rows: bool, columns: bool, backend: str) -> tuple[Any, Any]:
    """dy for dgrad, in 1x128 tiles, and for wgrad, in tiles along the tokens; None for what is not asked for.

    Both are made at once, also where the weight gradient comes later: while it waits it holds one byte a number of dy.
    """
    if rows and columns:
        data, scale, data_t, scale_t = call("quantize_both", dy_TN, False, "e4m3", groups, backend=backend)
        return (data, scale), (data_t, scale_t)
    return (call("quantize", dy_TN, TILE, backend=backend) if rows else None,
            call("quantize_transposed", dy_TN, False, "e4m3", groups, backend=backend) if columns else None)


def linear(
    x: Tensor | QuantizedInput, weight: Tensor, bias: Tensor | None = None, *, precision: Precision | None = None,
    cache: Cache = "e4m3",
) -> Tensor:
    """y = x W^T + b with every operand in FP8 and a separable weight gradient.

    Args:
        x: [..., K], BF16 or FP32 (any floating dtype on a CPU); or `quantize_input` of it, which several layers share.
        weight: [N, K]; neither N nor K has to be a multiple of 128.
        bias: [N] or None, added in FP32.
        precision: backend and weight cache; None is the automatic backend and no cache.
        cache: what x is kept in for the weight gradient: "e4m3", what it is multiplied in, 1.03 bytes a number, or
            "e5m6", rounded eight times finer, 1.53 bytes; that takes a plain x.

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
    check_floating(x=given, weight=weight, **({} if bias is None else {"bias": bias}))
    if weight.dim() != 2:
        raise ConfigError("weight", list(weight.shape), "must be [N, K]")
    if given.dim() < 1 or given.shape[-1] != weight.shape[-1]:
        raise ConfigError("x", list(given.shape), f"must be [..., K] for a weight [N, K] = {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ConfigError("bias", list(bias.shape), f"must be [N] = {list(weight.shape[:1])}")
    if cache not in get_args(Cache) or (cache == "e5m6" and isinstance(x, QuantizedInput)):
        raise ConfigError("cache", cache, 'must be "e4m3", or "e5m6" for an x that is not quantised yet')
    return multiply(x, weight, bias, None, precision, cache).view(*given.shape[:-1], weight.shape[0])


def check_floating(**tensors: Tensor) -> None:
    """Whether tensors hold floating-point numbers of at least 16 bits.

    Raises:
        ConfigError: one does not.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.element_size() == 1:
            found = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ConfigError(name, found, "must be a tensor in floating point of at least 16 bits")


def multiply(
    x: Tensor | QuantizedInput, weight: Tensor, bias: Tensor | None, groups: Groups, precision: Precision,
    cache: Cache = "e4m3",
) -> Tensor:
    """`QuantizedLinear` of operands already checked: [..., K] -> [T, N]."""
    if torch.compiler.is_compiling() and not isinstance(x, QuantizedInput):
        from megatron_ext.fp8 import compiled

        return compiled.linear(x.reshape(-1, x.shape[-1]), weight, bias, groups, precision.backend, cache)
    operand = checked_input(x, precision)
    x_TK = operand.x.reshape(-1, operand.x.shape[-1])
    return QuantizedLinear.apply(x_TK, weight, bias, operand.data, operand.scale, groups, precision, cache)
