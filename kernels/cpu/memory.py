"""Room for results that is used again, through kernels/cpu/memory.cpp."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_ext.kernels.cpu.library import load

_LEAST = 1 << 18
"""Bytes from which an allocator gives memory back to the system, to be mapped anew for the next who asks."""

_KINDS = {torch.uint8: 1, torch.float32: 2, torch.bfloat16: 4, torch.float8_e4m3fn: 10, torch.float8_e5m2: 12}
"""The numbers that DLPack gives to kinds of numbers."""

_CAPSULE = b"dltensor"  # named by DLPack; a capsule keeps the address of its name


def empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised tensor; a big one lies where an earlier one of about its size did that nobody holds any more."""
    if math.prod(shape) * dtype.itemsize >= _LEAST:
        take, capsule = _functions()
        sizes = (ctypes.c_int64 * len(shape))(*shape)
        managed = take(sizes, len(shape), _KINDS[dtype], 8 * dtype.itemsize)
        if managed:
            return torch.from_dlpack(capsule(managed, _CAPSULE, None))
    return torch.empty(shape, dtype=dtype, device="cpu")


@functools.cache
def _functions() -> tuple[Callable[..., int | None], Callable[..., object]]:
    """mext_take, and what makes a capsule of its result."""
    library = load()
    assert library is not None, "the registry offers the cpu backend only when its library is there"
    take, capsule = library.mext_take, ctypes.pythonapi.PyCapsule_New
    take.argtypes, take.restype = [ctypes.c_void_p, *[ctypes.c_int] * 3], ctypes.c_void_p
    capsule.argtypes, capsule.restype = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p], ctypes.py_object
    return take, capsule
