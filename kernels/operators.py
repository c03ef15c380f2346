"""The operators as torch.library operators, `torch.ops.megatron_ext.*`: for torch.compile, export and CUDA graphs.

Each has the name, the arguments and the backends of its plain function (kernels/README.md, registry.py), a fake that
knows shapes, dtypes and strides, and nothing else: autograd lies above, in megatron_ext/fp8, whose faces are not
quantised, for an FP8 tensor that crosses an autograd boundary loses its gradient without an error. Eager code calls the
plain functions, which saves 15 us of host time a call; code that torch.compile traces calls these.

Differences from the plain functions: group sizes are always a tensor, adding to an output is an operator of its own
(`gemm_nt_add`), the scalars of `adamw` are a list, in the order of `AdamWScalars`, and `weight_operands`, whose results
are the backend's own affair, is not here.

Shape letters as in kernels/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_ext.kernels.layout import (
    BLOCK,
    FORMATS,
    data_columns,
    empty_blocks,
    empty_data,
    empty_tiles,
    scale_columns,
    tile_count,
)
from megatron_ext.kernels.reference.adamw import AdamWScalars
from megatron_ext.kernels.registry import AUTO, OPERATORS

NAMESPACE = "megatron_ext"


def library_fragment() -> torch.library.Library:
    """A handle on the namespace; operators live as long as it does."""
    return torch.library.Library(NAMESPACE, "FRAGMENT")


def define(library: torch.library.Library, schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers one operator with one implementation for all devices, and its fake."""
    name = schema.split("(", 1)[0]
    library.define(schema)
    library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)


def _chosen(operator: str) -> Callable[..., Any]:
    def run(*args: Any, backend: str = AUTO) -> Any:
        return OPERATORS.select(operator, *args, backend=backend).function(*args)

    return run


def _gemm_nt_add(out: Tensor, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor | None, *,
                 backend: str = AUTO) -> None:
    _chosen("gemm_nt")(a, a_scale, b, b_scale, out, backend=backend)


# -- fakes: what an operator returns, without its numbers


def _tiles(x: Tensor, format: str = "e4m3") -> tuple[Tensor, Tensor]:
    (rows, columns), dtype = x.shape, FORMATS[format].dtype
    return empty_data((rows, columns), dtype, x.device), empty_tiles(rows, tile_count(columns), x.device)


def _quantize(x: Tensor, block: list[int] = [1, BLOCK], power_of_two: bool = False, format: str = "e4m3",  # noqa: B006
              *, backend: str = AUTO) -> tuple[Tensor, Tensor]:
    *stack, n, k = x.shape
    data = empty_data(x.shape, FORMATS[format].dtype, x.device)
    if block[0] == BLOCK:
        return data, empty_blocks(stack, tile_count(n), tile_count(k), x.device)
    return data, empty_tiles(math.prod((*stack, n)), tile_count(k), x.device).unflatten(0, (*stack, n))


def _transposed(x: Tensor, format: str, group_sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    (tokens, columns), groups = x.shape, None if group_sizes is None else len(group_sizes)
    return (empty_data((columns, data_columns(tokens, groups)), FORMATS[format].dtype, x.device),
            empty_tiles(columns, scale_columns(tokens, groups), x.device))


def _quantize_transposed(x: Tensor, power_of_two: bool = False, format: str = "e4m3", group_sizes: Tensor | None = None,
                         *, backend: str = AUTO) -> tuple[Tensor, Tensor]:
    return _transposed(x, format, group_sizes)


def _quantize_both(x: Tensor, power_of_two: bool = False, format: str = "e4m3", group_sizes: Tensor | None = None,
                   *, backend: str = AUTO) -> tuple[Tensor, ...]:
    return *_tiles(x, format), *_transposed(x, format, group_sizes)


def _requantize_transposed(data: Tensor, scale: Tensor, group_sizes: Tensor | None = None,
                           *, backend: str = AUTO) -> tuple[Tensor, Tensor]:
    format = next(name for name, fmt in FORMATS.items() if fmt.dtype == data.dtype)
    return _transposed(data, format, group_sizes)


def _quantize_weight(weight: Tensor, *, backend: str = AUTO) -> tuple[Tensor, ...]:
    *stack, n, k = weight.shape
    dtype, device = FORMATS["e4m3"].dtype, weight.device
    return (empty_data(weight.shape, dtype, device), empty_blocks(stack, tile_count(n), tile_count(k), device),
            empty_data((*stack, k, n), dtype, device), empty_blocks(stack, tile_count(k), tile_count(n), device))


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[-2], dtype=dtype)


def _swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor, power_of_two: bool = False, format: str = "e4m3",
                     group_sizes: Tensor | None = None, *, backend: str = AUTO) -> tuple[Tensor, ...]:
    options = power_of_two, format, group_sizes
    return *_quantize_both(dh, *options), *_quantize_both(dh, *options)


def _pack(x: Tensor, *, backend: str = AUTO) -> tuple[Tensor, ...]:
    rows, columns = x.shape
    high, low = (x.new_empty(rows, width, dtype=torch.uint8) for width in (columns, -(-columns // 2)))
    return high, low, empty_tiles(rows, tile_count(columns), x.device)


def _nothing(*args: Any, backend: str = AUTO) -> None:
    return None


_OPTIONS = 'bool power_of_two=False, str format="e4m3"'
_POWERS = 'bool power_of_two=True, str format="e4m3"'
_BACKEND = '*, str backend="auto"'
_TWO, _FOUR = "(Tensor, Tensor)", "(Tensor, Tensor, Tensor, Tensor)"
_EIGHT = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"

_LIBRARY = library_fragment()

for _schema, _fake in {
    f"quantize(Tensor x, int[2] block=[1, 128], {_OPTIONS}, {_BACKEND}) -> {_TWO}": _quantize,
    f"dequantize(Tensor data, Tensor scale, {_BACKEND}) -> Tensor":
        lambda data, scale, *, backend=AUTO: data.new_empty(data.shape, dtype=torch.float32),
    f"quantize_transposed(Tensor x, {_OPTIONS}, Tensor? group_sizes=None, {_BACKEND}) -> {_TWO}": _quantize_transposed,
    f"quantize_both(Tensor x, {_OPTIONS}, Tensor? group_sizes=None, {_BACKEND}) -> {_FOUR}": _quantize_both,
    f"requantize_transposed(Tensor data, Tensor scale, Tensor? group_sizes=None, {_BACKEND}) -> {_TWO}":
        _requantize_transposed,
    f"quantize_weight(Tensor weight, {_BACKEND}) -> {_FOUR}": _quantize_weight,
    "grouped_gemm_nt(Tensor a, Tensor a_scale, Tensor b, Tensor? b_scale, Tensor group_sizes, "
    f"ScalarType dtype=float32, {_BACKEND}) -> Tensor":
        lambda a, a_scale, b, b_scale, group_sizes, dtype=torch.float32, *, backend=AUTO: _product(a, b, dtype),
    "grouped_wgrad(Tensor dy, Tensor dy_scale, Tensor x, Tensor x_scale, Tensor group_sizes, Tensor(a!) out, "
    f"{_BACKEND}) -> ()": _nothing,
    f"swiglu_quantize(Tensor gate, Tensor up, {_POWERS}, {_BACKEND}) -> {_TWO}":
        lambda gate, up, power_of_two=True, format="e4m3", *, backend=AUTO: _tiles(gate, format),
    f"swiglu_backward_quantize(Tensor dh, Tensor gate, Tensor up, {_OPTIONS}, Tensor? group_sizes=None, {_BACKEND}) "
    f"-> {_EIGHT}": _swiglu_backward,
    f"rms_norm_quantize(Tensor x, Tensor weight, float eps, {_POWERS}, {_BACKEND}) -> (Tensor, Tensor, Tensor)":
        lambda x, weight, eps, power_of_two=True, format="e4m3", *, backend=AUTO: (
            *_tiles(x, format), x.new_empty(x.shape[0], dtype=torch.float32)),
    f"permute_quantize(Tensor x, Tensor source, {_POWERS}, {_BACKEND}) -> {_TWO}":
        lambda x, source, power_of_two=True, format="e4m3", *, backend=AUTO: _tiles(
            x.new_empty(source.shape[0], x.shape[1]), format),
    f"quantize_rows(Tensor x, Tensor source, Tensor(a!) rows, {_BACKEND}) -> ()": _nothing,
    f"unpermute_combine(Tensor y, Tensor weights, Tensor rows, {_BACKEND}) -> Tensor":
        lambda y, weights, rows, *, backend=AUTO: y.new_empty(rows.shape[0], y.shape[1]),
    f"pack_e5m6(Tensor x, {_BACKEND}) -> (Tensor, Tensor, Tensor)": _pack,
    f"unpack_e5m6(Tensor high, Tensor low, Tensor scale, {_BACKEND}) -> Tensor":
        lambda high, low, scale, *, backend=AUTO: high.new_empty(high.shape, dtype=torch.float32),
}.items():
    define(_LIBRARY, _schema, _chosen(_schema.split("(", 1)[0]), _fake)

define(_LIBRARY, "adamw(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
       f"float[] scalars, {_BACKEND}) -> ()",
       lambda params, grads, exp_avgs, exp_avg_sqs, scalars, *, backend=AUTO: _chosen("adamw")(
           params, grads, exp_avgs, exp_avg_sqs, AdamWScalars(*scalars), backend=backend), _nothing)
define(_LIBRARY, "gemm_nt(Tensor a, Tensor a_scale, Tensor b, Tensor? b_scale, ScalarType dtype=float32, "
       f"{_BACKEND}) -> Tensor",
       lambda a, a_scale, b, b_scale, dtype=torch.float32, *, backend=AUTO: _chosen("gemm_nt")(
           a, a_scale, b, b_scale, None, dtype, backend=backend),
       lambda a, a_scale, b, b_scale, dtype=torch.float32, *, backend=AUTO: _product(a, b, dtype))
define(_LIBRARY, "gemm_nt_add(Tensor(a!) out, Tensor a, Tensor a_scale, Tensor b, Tensor? b_scale, "
       f"{_BACKEND}) -> ()", _gemm_nt_add, _nothing)
