"""The FP8 layers as torch.library operators with autograd, for code that torch.compile traces without a break.

`torch.ops.megatron_ext.linear` and `.swiglu`, which importing this file defines, have faces in the model's dtype and
compute what `fp8.linear`, `fp8.grouped_linear` and `fp8.swiglu` compute, to the bit; those call them while they are
traced. What is kept for backward comes out as results of its own, FP8 numbers as uint8, which nobody differentiates.
Weights are quantised at each call, for a cache is state that a graph cannot hold, and their gradients come through
autograd: a sink is of the pipeline, which does not trace. Activations are always cached in FP8 here: a result must not
be an argument.

Shape letters: T rows, K and N columns, E experts; for swiglu h and I as in swiglu.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_ext.config.errors import ConfigError
from megatron_ext.fp8.linear import Cache, Groups, linear_backward, linear_forward
from megatron_ext.fp8.operators import call
from megatron_ext.fp8.precision import Precision
from megatron_ext.fp8.swiglu import swiglu_backward, swiglu_forward
from megatron_ext.fp8.tensor import TILE
from megatron_ext.kernels.layout import host_sizes
from megatron_ext.kernels.operators import NAMESPACE, define, library_fragment

_LIBRARY = library_fragment()


def _on_host_of_cpu(group_sizes: Tensor | None) -> Groups:
    return group_sizes if group_sizes is None or group_sizes.is_cuda else host_sizes(group_sizes)


def _checked(group_sizes: Tensor | None, x: Tensor) -> Groups:
    """Sizes as the backend wants them; on a CPU, where they can be read, refused if they do not sum to the rows."""
    groups = _on_host_of_cpu(group_sizes)
    if isinstance(groups, list) and (sum(groups) != len(x) or min(groups, default=0) < 0):
        raise ConfigError("group_sizes", groups, f"must be sizes, none negative, that sum to T = {len(x)}")
    return groups


def _as_bytes(kept: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.view(torch.uint8) if t.element_size() == 1 else t for t in kept]


def _as_fp8(kept: list[Tensor]) -> list[Tensor]:
    return [t.view(torch.float8_e4m3fn) if t.dtype == torch.uint8 else t for t in kept]


def _sized(gradients: list[Tensor | None], like: Tensor) -> list[Tensor]:
    """An operator returns tensors: an empty one for a gradient that nobody needs."""
    return [like.new_empty(0) if g is None else g for g in gradients]


# -- linear


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, group_sizes: Tensor | None, cache: Cache,
            backend: str) -> tuple[Tensor, list[Tensor]]:
    precision = Precision(fp8=True, backend=backend)
    x8 = call("quantize", x, TILE, True, backend=backend)
    y, kept = linear_forward(x, weight, bias, x8, _checked(group_sizes, x), precision, cache)
    return y, _as_bytes(kept)


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, group_sizes: Tensor | None, cache: Cache,
                 backend: str) -> tuple[Tensor, list[Tensor]]:
    if cache == "e5m6":
        kept = torch.ops.megatron_ext.pack_e5m6(x)
    else:
        kept = torch.ops.megatron_ext.quantize(x, TILE, True)
    return x.new_empty(x.shape[0], weight.shape[-2]), _as_bytes(kept)


def _linear_backward(dy: Tensor, weight: Tensor, bias: Tensor | None, kept: list[Tensor], group_sizes: Tensor | None,
                     needs: list[bool], cache: Cache, backend: str) -> list[Tensor]:
    precision = Precision(fp8=True, backend=backend)
    kept = kept if cache == "e5m6" else _as_fp8(kept)
    needed = needs[0], needs[1], needs[2]
    weight, bias = weight.detach(), None if bias is None else bias.detach()  # without a sink, if they have one
    return _sized(linear_backward(dy, weight, bias, kept, needed, _on_host_of_cpu(group_sizes), precision), dy)


def _linear_backward_fake(dy: Tensor, weight: Tensor, bias: Tensor | None, kept: list[Tensor],
                          group_sizes: Tensor | None, needs: list[bool], cache: Cache, backend: str) -> list[Tensor]:
    shapes = (dy.shape[0], weight.shape[-1]), weight.shape, None if bias is None else bias.shape
    dtypes = dy.dtype, weight.dtype, None if bias is None else bias.dtype
    return _sized([dy.new_empty(shape, dtype=dtype) if need else None
                   for need, shape, dtype in zip(needs, shapes, dtypes, strict=True)], dy)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    _, weight, bias, ctx.group_sizes, ctx.cache, ctx.backend = inputs
    ctx.bias = bias is not None
    ctx.save_for_backward(weight, *([bias] if ctx.bias else []), *output[1])


def _linear_autograd(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    weight, *kept = ctx.saved_tensors
    bias = kept.pop(0) if ctx.bias else None
    needs = list(ctx.needs_input_grad[:3])
    gradients = torch.ops.megatron_ext.linear_backward(dy, weight, bias, kept, ctx.group_sizes, needs, ctx.cache,
                                                       ctx.backend)
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None, None


define(_LIBRARY, "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? group_sizes, str cache, str backend) "
       "-> (Tensor, Tensor[])", _linear, _linear_fake)
define(_LIBRARY, "linear_backward(Tensor dy, Tensor weight, Tensor? bias, Tensor[] kept, Tensor? group_sizes, "
       "bool[] needs, str cache, str backend) -> Tensor[]", _linear_backward, _linear_backward_fake)
torch.library.register_autograd(f"{NAMESPACE}::linear", _linear_autograd, setup_context=_linear_setup, lib=_LIBRARY)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, groups: Groups, backend: str, cache: Cache) -> Tensor:
    """[T, K] -> [T, N]; see `fp8.linear`."""
    sizes = groups if groups is None or isinstance(groups, Tensor) else torch.tensor(groups, device=x.device)
    return torch.ops.megatron_ext.linear(x, weight, bias, sizes, cache, backend)[0]


# -- swiglu


def _swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, group_sizes: Tensor | None,
            backend: str) -> tuple[Tensor, list[Tensor]]:
    precision = Precision(fp8=True, backend=backend)
    x8 = call("quantize", x, TILE, True, backend=backend)
    y, kept = swiglu_forward(x, (gate, up, down), x8, _checked(group_sizes, x), precision)
    return y, _as_bytes(kept)


def _swiglu_fake(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, group_sizes: Tensor | None,
                 backend: str) -> tuple[Tensor, list[Tensor]]:
    inner = x.new_empty(x.shape[0], gate.shape[-2])
    kept = [t for source in (x, inner, inner) for t in torch.ops.megatron_ext.quantize(source, TILE, True)]
    return x.new_empty(x.shape), _as_bytes(tuple(kept))


def _swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor, down: Tensor, kept: list[Tensor],
                     group_sizes: Tensor | None, needs: list[bool], backend: str) -> list[Tensor]:
    precision = Precision(fp8=True, backend=backend)
    weights = gate.detach(), up.detach(), down.detach()  # without a sink, if they have one
    return _sized(swiglu_backward(dy, weights, _as_fp8(kept), needs, _on_host_of_cpu(group_sizes), precision), dy)


def _swiglu_backward_fake(dy: Tensor, gate: Tensor, up: Tensor, down: Tensor, kept: list[Tensor],
                          group_sizes: Tensor | None, needs: list[bool], backend: str) -> list[Tensor]:
    return _sized([t.new_empty(t.shape) if need else None
                   for need, t in zip(needs, (dy, gate, up, down), strict=True)], dy)


def _swiglu_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    _, *weights, ctx.group_sizes, ctx.backend = inputs
    ctx.save_for_backward(*weights, *output[1])


def _swiglu_autograd(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    gate, up, down, *kept = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:4])
    gradients = torch.ops.megatron_ext.swiglu_backward(dy, gate, up, down, kept, ctx.group_sizes, needs, ctx.backend)
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None


define(_LIBRARY, "swiglu(Tensor x, Tensor gate, Tensor up, Tensor down, Tensor? group_sizes, str backend) "
       "-> (Tensor, Tensor[])", _swiglu, _swiglu_fake)
define(_LIBRARY, "swiglu_backward(Tensor dy, Tensor gate, Tensor up, Tensor down, Tensor[] kept, Tensor? group_sizes, "
       "bool[] needs, str backend) -> Tensor[]", _swiglu_backward, _swiglu_backward_fake)
torch.library.register_autograd(f"{NAMESPACE}::swiglu", _swiglu_autograd, setup_context=_swiglu_setup, lib=_LIBRARY)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, groups: Groups, backend: str) -> Tensor:
    """[T, h] -> [T, h]; see `fp8.swiglu`."""
    sizes = groups if groups is None or isinstance(groups, Tensor) else torch.tensor(groups, device=x.device)
    return torch.ops.megatron_ext.swiglu(x, gate, up, down, sizes, backend)[0]
