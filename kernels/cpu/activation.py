"""SwiGLU and RMSNorm with quantisation on a CPU through kernels/cpu/activation.cpp: the reference, bit for bit.

Signatures and shapes are those of kernels/reference/activation.py. What rounds to FP16 or FP64 is left to that.
`lanes` forces narrower loops, for tests: 8 for AVX2, 1 for the portable ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from megatron_ext.kernels.cpu.library import WIDEST, function, threads_for
from megatron_ext.kernels.cpu.memory import empty
from megatron_ext.kernels.cpu.quantize import GRAIN, Columns, empty_rows, is_bf16, readable
from megatron_ext.kernels.layout import require
from megatron_ext.kernels.reference import activation as reference

_ROUNDED = (torch.float32, torch.bfloat16)


def swiglu_quantize(
    gate: Tensor, up: Tensor, power_of_two: bool = True, format: str = "e4m3", *, lanes: int = WIDEST
) -> tuple[Tensor, Tensor]:
    """See `reference.activation.swiglu_quantize`."""
    if gate.dtype not in _ROUNDED:
        return reference.swiglu_quantize(gate, up, power_of_two, format)
    require(gate.shape == up.shape, f"gate {list(gate.shape)} and up {list(up.shape)} must have one shape")
    gate, up = readable(gate), readable(up)
    (tokens, columns), (data, scale) = gate.shape, empty_rows(gate.shape, format)
    kernel = function("mext_swiglu_quantize", *[c_void_p] * 2, *[c_int] * 2, *[c_void_p] * 2, *[c_int64] * 2,
                      *[c_int] * 4)  # fmt: skip
    kernel(gate.data_ptr(), up.data_ptr(), is_bf16(gate), is_bf16(up), data.data_ptr(), scale.data_ptr(), tokens,
           columns, format == "e5m2", power_of_two, lanes, threads_for(gate.numel(), GRAIN))  # fmt: skip
    return data, scale


def swiglu_backward_quantize(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    power_of_two: bool = False,
    format: str = "e4m3",
    group_sizes: Sequence[int] | Tensor | None = None,
    *,
    lanes: int = WIDEST,
) -> tuple[Tensor, ...]:
    """See `reference.activation.swiglu_backward_quantize`."""
    if dh.dtype not in _ROUNDED:
        return reference.swiglu_backward_quantize(dh, gate, up, power_of_two, format, group_sizes)
    require(dh.shape == gate.shape == up.shape,
            f"dh {list(dh.shape)}, gate {list(gate.shape)} and up {list(up.shape)} must have one shape")
    inputs = [readable(t) for t in (dh, gate, up)]
    (dgate, dgate_t), (dup, dup_t) = (
        (empty_rows(dh.shape, format), Columns.room(dh.shape, format, group_sizes)) for _ in range(2)
    )
    outputs = *dgate, dgate_t.data, dgate_t.scale, *dup, dup_t.data, dup_t.scale
    kernel = function("mext_swiglu_backward_quantize", *[c_void_p] * 3, *[c_int] * 3, *[c_void_p] * 8, *[c_int64] * 2,
                      c_void_p, *[c_int64] * 3, *[c_int] * 4)  # fmt: skip
    kernel(*(t.data_ptr() for t in inputs), *(is_bf16(t) for t in inputs), *(t.data_ptr() for t in outputs),
           *dgate_t.sizes, format == "e5m2", power_of_two, lanes, threads_for(dh.numel(), GRAIN))  # fmt: skip
    return outputs


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, power_of_two: bool = True, format: str = "e4m3", *, lanes: int = WIDEST
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.activation.rms_norm_quantize`."""
    if x.dtype not in _ROUNDED:
        return reference.rms_norm_quantize(x, weight, eps, power_of_two, format)
    require(weight.shape == x.shape[1:], f"weight {list(weight.shape)} must be {list(x.shape[1:])}")
    x, weight = readable(x), weight.detach().float().contiguous()
    (rows, columns), (data, scale) = x.shape, empty_rows(x.shape, format)
    rstd = empty((rows,))
    kernel = function("mext_rms_norm_quantize", c_void_p, c_int, c_void_p, c_float, *[c_void_p] * 3, *[c_int64] * 2,
                      *[c_int] * 4)  # fmt: skip
    kernel(x.data_ptr(), is_bf16(x), weight.data_ptr(), eps, data.data_ptr(), scale.data_ptr(), rstd.data_ptr(), rows,
           columns, format == "e5m2", power_of_two, lanes, threads_for(x.numel(), GRAIN))  # fmt: skip
    return data, scale, rstd
