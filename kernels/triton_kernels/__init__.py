"""Triton backend: every memory-bound operator in one pass over its inputs, and matrix products as a portable fallback.

The registry calls it "triton"; the folder has another name, so that `import triton` can mean nothing else. Importing
this package imports no triton: its modules do, and the registry loads those when they are first chosen.

    arithmetic   scales, quotients, FP8 bytes, exp: device code, with the proofs that it rounds as the reference does
    tiles        tokens of groups, reading a block, writing it quantised in either orientation: device code
    launch       how a kernel is started
    quantize, activation, rows, e5m6, adamw, gemm      the operators, in the files that the reference has them in

Not yet run on a GPU: tests/kernels runs the kernels in Triton's interpreter against the reference and compiles them for
Hopper ahead of time.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_PRODUCTS = ("gemm_nt", "grouped_gemm_nt")
_CAPABILITY = (8, 9)
"""The first GPUs that convert to FP8 and multiply it (Ada); Hopper is what the kernels are written for."""


def usable(operator: str, *args: Any) -> bool:
    """Whether this backend can run `operator` on these positional arguments; never raises.

    CPU tensors run only in Triton's interpreter (TRITON_INTERPRET=1 when triton is first imported), which is for tests.
    """
    device = next((tensor.device for tensor in _tensors(args)), None)
    if device is None:
        return False
    if operator in _PRODUCTS and args[3] is None:
        return False  # a weight that another backend has dequantised
    if device.type == "cpu":
        return "TRITON_INTERPRET" in os.environ and _import_error() is None and _interpreting()
    if device.type != "cuda" or _import_error() is not None or _interpreting():
        return False
    return _device_lacks(device.index) is None


def why_not() -> str | None:
    """What keeps this backend from this machine, in one line; None if nothing does. Never raises."""
    return _import_error() or (None if _interpreting() else _device_lacks(None))


def _tensors(args: Any) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from _tensors(arg)


@functools.cache
def _import_error() -> str | None:
    try:
        importlib.import_module("triton.language")
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return "triton: not installed"
        return _one_line(f"triton: fails to import ({error})")
    except Exception as error:  # a wheel for another machine fails in whatever way it likes
        return _one_line(f"triton: fails to import ({type(error).__name__}: {error})")
    return None


def _interpreting() -> bool:
    return bool(importlib.import_module("triton").knobs.runtime.interpret)


@functools.cache
def _device_lacks(index: int | None) -> str | None:
    if not torch.cuda.is_available():
        return "triton: no GPU"
    if torch.version.cuda is None:
        return "triton: torch is not built for CUDA"
    found = torch.cuda.get_device_capability(index)
    if found < _CAPABILITY:
        needed = ".".join(map(str, _CAPABILITY))
        return f"triton: the GPU has compute capability {found[0]}.{found[1]}, FP8 needs {needed}"
    return None


def _one_line(text: str) -> str:
    return " ".join(text.split())
