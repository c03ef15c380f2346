"""What the kernels can read and write: dtypes, shapes and places in memory, and one line for what does not fit.

The answer depends on how tensors lie and on no number in them, so it is kept per layout (measured on a slow core: 20 us
for the checks, 8 for a layout seen before). Shape letters as in gemm.py.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ext.kernels.cuda.tiles import up
from megatron_ext.kernels.layout import BLOCK

MODULE_OF = {"gemm_nt": "dense", "grouped_gemm_nt": "grouped", "grouped_wgrad": "wgrad"}
"""The cubin of each operator."""

OUTPUTS = {torch.float32: 0, torch.bfloat16: 1}
"""`kFloat` and `kBFloat16` of schedule.h."""

_UNIT = 16
"""Bytes at whose multiples TMA begins a tensor and its rows."""


class Laid(NamedTuple):
    """How a tensor lies in memory; `past` is its address modulo 16."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    past: int

    @property
    def unit(self) -> bool:
        """Whether the numbers of a row are neighbours."""
        return self.strides[-1] == 1 or self.shape[-1] == 1

    @property
    def empty(self) -> bool:
        return 0 in self.shape


def laid(x: Tensor) -> Laid:
    return Laid(tuple(x.shape), x.stride(), x.dtype, x.device, x.data_ptr() % _UNIT)


def misfit(operator: str, *args: object) -> str | None:
    """None if an operator of `MODULE_OF` can take these positional arguments, else what is wrong in a few words."""
    return _misfit(operator, *(laid(x) if isinstance(x, Tensor) else x if x.__hash__ else str(x) for x in args))


def in_blocks(b: Laid, b_scale: Laid) -> bool:
    """Whether b is in 128x128 blocks. A single row may be called either; its strides say which it was made as."""
    return b_scale.shape[-2] != b.shape[-2] or (b.shape[-2] == 1 and b_scale.unit)


@functools.lru_cache(maxsize=4096)
def _misfit(operator: str, a: Laid, a_scale: Laid, b: Laid, b_scale: Laid | None, *rest: object) -> str | None:
    if b_scale is None:
        return "b is not quantised"
    if any(isinstance(x, Laid) and x.device != a.device for x in (a_scale, b, b_scale, *rest)):
        return "the arguments lie on several devices"
    if a.dtype != torch.float8_e4m3fn or b.dtype != torch.float8_e4m3fn:
        return "operands must be E4M3"
    if a_scale.dtype != torch.float32 or b_scale.dtype != torch.float32:
        return "scales must be FP32"
    if len(a.shape) != 2 or len(b.shape) != (3 if operator == "grouped_gemm_nt" else 2):
        return "operands have the wrong number of dimensions"
    if a.shape[-1] != b.shape[-1] or len(b_scale.shape) != len(b.shape):
        return f"shapes do not fit: {a.shape}, {b.shape} and scale {b_scale.shape}"
    if max(*a.shape, *b.shape) >= 1 << 31:
        return "a dimension is 2^31 or more"
    blocks = operator == "grouped_gemm_nt" or (operator == "gemm_nt" and in_blocks(b, b_scale))
    wrong = _data(a) or _data(b) or _tiles(a, a_scale) or (_blocks if blocks else _tiles)(b, b_scale)
    others = {"gemm_nt": _gemm_nt, "grouped_gemm_nt": _grouped_gemm_nt, "grouped_wgrad": _grouped_wgrad}
    return wrong or others[operator](a, b, *rest)


def _gemm_nt(a: Laid, b: Laid, out: Laid | None = None, dtype: torch.dtype = torch.float32) -> str | None:
    return (out and _out(out, (a.shape[0], b.shape[0]))) or _dtype(dtype)


def _grouped_gemm_nt(a: Laid, b: Laid, sizes: object, dtype: torch.dtype = torch.float32) -> str | None:
    return _sizes(sizes, b.shape[0]) or _dtype(dtype)


def _grouped_wgrad(a: Laid, b: Laid, sizes: object, out: Laid) -> str | None:
    return _out(out, (out.shape[0], a.shape[0], b.shape[0])) or _sizes(sizes, out.shape[0])


def _data(x: Laid) -> str | None:
    strides = [stride for stride, size in zip(x.strides[:-1], x.shape[:-1], strict=True) if size > 1]
    if x.empty or (x.unit and not x.past and all(s % _UNIT == 0 and s >= x.shape[-1] for s in strides)):
        return None
    return f"rows of data must begin at multiples of {_UNIT} bytes, not with strides {x.strides}"


def _tiles(x: Laid, scale: Laid) -> str | None:
    if scale.shape != (x.shape[0], up(x.shape[1], BLOCK)):
        return f"scale {scale.shape} is not of 1x128 tiles of {x.shape}"
    rows, tiles = scale.shape
    column = scale.strides[1] if tiles > 1 else rows + -rows % 4
    good = (rows == 1 or scale.strides[0] == 1) and column * 4 % _UNIT == 0 and column >= rows and not scale.past
    if scale.empty or good:
        return None
    return f"scales of tiles must lie column by column, {_UNIT} bytes aligned, not with strides {scale.strides}"


def _blocks(x: Laid, scale: Laid) -> str | None:
    if scale.shape == (*x.shape[:-2], up(x.shape[-2], BLOCK), up(x.shape[-1], BLOCK)) and scale.unit:
        return None
    return f"scale {scale.shape}, strides {scale.strides}, is not of 128x128 blocks of {x.shape}"


def _sizes(sizes: object, groups: int) -> str | None:
    if isinstance(sizes, Laid) and sizes.dtype == torch.int64 and sizes.shape == (groups,) and sizes.unit:
        return None
    return f"group sizes must be an int64 tensor [{groups}] on the device"


def _out(out: Laid, shape: tuple[int, ...]) -> str | None:
    if out.dtype == torch.float32 and out.shape == shape and out.unit:
        return None
    return f"out must be FP32 {shape} with contiguous rows"


def _dtype(dtype: torch.dtype) -> str | None:
    return None if dtype in OUTPUTS else "results are FP32 or BF16"
