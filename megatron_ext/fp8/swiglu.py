"""The SwiGLU network of a block or of experts with its activation between two FP8 products (DeepSeek-V3, 3.3.1, 3.3.2).

    gate = x Wg^T    up = x Wu^T    h = silu(gate) * up    y = h Wd^T

Kept for backward are x, gate and up, each in FP8 with power-of-two scales; the activation is quantised as it is made,
and made once more in backward, from gate and up as they were kept. So a row keeps h + 2 I bytes and their scales, where
BF16 keeps 2 h + 8 I (x, gate, silu(gate), up and the activation).

Shape letters: [..., h] input, [I, h] gate and up, [h, I] down, T the product of the leading dimensions; for experts
[T, h] rows sorted by expert, [E, I, h] and [E, h, I].
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.config.errors import ConfigError
from megatron_ext.fp8.grouped_linear import check_groups, sizes_on
from megatron_ext.fp8.linear import (
    Groups,
    Pair,
    QuantizedInput,
    accumulate_weight_gradient,
    check_floating,
    checked_input,
    forward_product,
    input_gradient,
    quantize_gradient,
    turned,
)
from megatron_ext.fp8.operators import call
from megatron_ext.fp8.precision import Precision
from megatron_ext.fp8.tensor import TILE
from megatron_ext.fp8.weight_grad import deliver


def swiglu_forward(x_Th: Tensor, weights: Sequence[Tensor], x8: Pair, groups: Groups,
                   precision: Precision) -> tuple[Tensor, tuple[Tensor, ...]]:
    """y [T, h] in the dtype of x, and what backward needs: x, gate and up, data and scale of each; without
    `precision.activation_cache` themselves."""
    dtype = x_Th.dtype
    gate_weight, up_weight, down_weight = weights
    gate, up = (forward_product(x8, weight, groups, dtype, precision) for weight in (gate_weight, up_weight))
    h8 = call("swiglu_quantize", gate, up, True, backend=precision.backend)
    if precision.activation_cache:
        kept = [x8, *(call("quantize", t, TILE, True, backend=precision.backend) for t in (gate, up))]
    else:
        kept = [(x_Th,), (gate,), (up,)]
    return forward_product(h8, down_weight, groups, dtype, precision), tuple(t for pair in kept for t in pair)


def swiglu_backward(dy_Th: Tensor, weights: Sequence[Tensor], kept: Sequence[Tensor], needs: Sequence[bool],
                    groups: Groups, precision: Precision) -> list[Tensor | None]:
    """Gradients of x and of the three weights where they are needed; None where a sink takes them.

    Args:
        kept: what `swiglu_forward` gave.
    """
    gate_weight, up_weight, down_weight = weights
    backend, dtype = precision.backend, dy_Th.dtype
    if len(kept) == 6:
        x, gate8, up8 = kept[:2], kept[2:4], kept[4:]
        # Exact in BF16 as in FP32: four significant bits times a power of two.
        gate, up = (call("dequantize", *pair, backend=backend).to(dtype) for pair in (gate8, up8))
    else:
        x, gate, up = kept[:1], kept[1], kept[2]
    dy8, dy8_hT = quantize_gradient(dy_Th, groups, True, needs[3], backend)
    dh = input_gradient(dy8, down_weight, groups, dtype, precision)
    dgate8, dgate_scale, dgate8_t, dgate_scale_t, dup8, dup_scale, dup8_t, dup_scale_t = call(
        "swiglu_backward_quantize", dh, gate, up, False, "e4m3", groups, backend=backend)
    gradients: list[Tensor | None] = [None] * 4
    if needs[0]:  # one rounding, of the sum
        dx = input_gradient((dgate8, dgate_scale), gate_weight, groups, torch.float32, precision)
        dx = dx.add_(input_gradient((dup8, dup_scale), up_weight, groups, torch.float32, precision))
        gradients[0] = dx.to(dtype)

    @cache
    def x8_hT() -> Pair:
        """For both weights, whose gradients may be taken later."""
        return turned(x, groups, backend)

    if needs[1]:
        gradients[1] = deliver(gate_weight, lambda main_grad: accumulate_weight_gradient(
            main_grad, (dgate8_t, dgate_scale_t), x8_hT(), groups, backend))
    if needs[2]:
        gradients[2] = deliver(up_weight, lambda main_grad: accumulate_weight_gradient(
            main_grad, (dup8_t, dup_scale_t), x8_hT(), groups, backend))
    if needs[3]:
        # As the forward multiplied it, but for what gate and up have lost: I bytes wait, not the 2 I of those.
        h8 = call("swiglu_quantize", gate, up, True, backend=backend)

        def accumulate_down(main_grad: Tensor) -> None:
            h8_IT = call("requantize_transposed", *h8, groups, backend=backend)
            accumulate_weight_gradient(main_grad, dy8_hT, h8_IT, groups, backend)

        gradients[3] = deliver(down_weight, accumulate_down)
    return gradients


class _SwiGLU(torch.autograd.Function):
    """`data` and `scale` are x quantised."""

    @staticmethod
    def forward(ctx: Any, x_Th: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor, data: Tensor,
                scale: Tensor, groups: Groups, precision: Precision) -> Tensor:
        ctx.weights = gate_weight, up_weight, down_weight  # the objects that carry the sinks
        ctx.groups, ctx.precision = groups, precision
        y, kept = swiglu_forward(x_Th, ctx.weights, (data, scale), groups, precision)
        if any(ctx.needs_input_grad[:4]):
            ctx.save_for_backward(*ctx.weights, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_Th: Tensor) -> tuple[Tensor | None, ...]:
        gradients = swiglu_backward(dy_Th, ctx.weights, ctx.saved_tensors[3:], ctx.needs_input_grad[:4], ctx.groups,
                                    ctx.precision)
        return *gradients, None, None, None, None


def swiglu(x: Tensor | QuantizedInput, gate: Tensor, up: Tensor, down: Tensor,
           group_sizes: Sequence[int] | Tensor | None = None, *, precision: Precision | None = None) -> Tensor:
    """down(silu(gate(x)) * up(x)) with all products in FP8 and separable weight gradients.

    Args:
        x: [..., h], BF16 or FP32; or `quantize_input` of it. With groups [T, h], rows sorted by expert.
        gate, up: weights [I, h], or [E, I, h] with groups.
        down: weight [h, I], or [E, h, I] with groups.
        group_sizes: [E] rows of each expert, summing to T; None for one network.
        precision: backend and weight cache, with `fp8` on; None is the automatic backend and no cache.

    Returns:
        [..., h] in the dtype of x.

    Raises:
        ConfigError: shapes or sizes that do not fit, `precision.fp8` off, or a backend that cannot run here.
    """
    precision = precision or Precision(fp8=True)
    if not precision.fp8:
        raise ConfigError("precision.fp8", False, "fp8.swiglu always quantises", "compose it of linear layers")
    given = x.x if isinstance(x, QuantizedInput) else x
    check_floating(x=given, gate=gate, up=up, down=down)
    stack = "" if group_sizes is None else "E, "
    if gate.dim() != (2 if group_sizes is None else 3):
        raise ConfigError("gate", list(gate.shape), f"must be [{stack}I, h]")
    if up.shape != gate.shape:
        raise ConfigError("up", list(up.shape), f"must be [{stack}I, h] = {list(gate.shape)}, as gate is")
    if down.shape != gate.mT.shape:
        raise ConfigError("down", list(down.shape), f"must be [{stack}h, I] = {list(gate.mT.shape)}")
    if given.dim() < 1 or given.shape[-1] != gate.shape[-1]:
        raise ConfigError("x", list(given.shape), f"must be [..., h] for a gate [{stack}I, h] = {list(gate.shape)}")
    groups: Groups = None
    if group_sizes is not None:
        check_groups(given, group_sizes, gate)
        groups = sizes_on(group_sizes, given.device)
    if torch.compiler.is_compiling() and not isinstance(x, QuantizedInput):
        from megatron_ext.fp8 import compiled

        return compiled.swiglu(x.reshape(-1, x.shape[-1]), gate, up, down, groups, precision.backend).view(x.shape)
    operand = checked_input(x, precision)
    x_Th = operand.x.reshape(-1, operand.x.shape[-1])
    y = _SwiGLU.apply(x_Th, gate, up, down, operand.data, operand.scale, groups, precision)
    return y.view(given.shape)
