"""Triton's interpreter in a process of its own, with its conversions mended: FP8 and BF16 as a GPU does them.

    found = interpreted(function, *args)      function: at the top of a test module

triton asks for TRITON_INTERPRET once, when it is imported, and a process that interprets cannot compile. As of Triton
3.9 the interpreter rounds FP32 to BF16 by cutting it off, and to FP8 half up without carrying into the exponent (7.77
becomes 4.0 in E4M3).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import multiprocessing
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest.mock import patch

import numpy
import pytest
import torch

from megatron_ext.kernels import layout

SEED = 1234
TIMEOUT = 240.0

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def interpreted(function: Callable[..., Any], *args: Any) -> Any:
    """What `function(*args)` returns in the process that interprets; its exceptions come here."""
    return _worker().submit(_seeded, function, *args).result(TIMEOUT)


@functools.cache
def _worker() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), mend)


def _seeded(function: Callable[..., Any], *args: Any) -> Any:
    random.seed(SEED)
    torch.manual_seed(SEED)
    with numpy.errstate(all="ignore"):  # blocks of NaN and infinities are among the cases
        return function(*args)


def mend() -> None:
    """Turns this process into one that interprets; to be called before anything imports triton."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    interpreter = importlib.import_module("triton.runtime.interpreter")
    tl = importlib.import_module("triton.language")
    fp8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
    dtypes = {tl.float32: torch.float32, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16, **fp8}
    original = interpreter._convert_float

    def convert(x: numpy.ndarray, source: Any, target: Any, rounding: Any) -> numpy.ndarray:
        """The bits of x, rounded to nearest even; beyond the largest FP8 number saturated, as `cvt.rn.satfinite`."""
        if source not in dtypes or target not in dtypes:
            return original(x, source, target, rounding)
        numbers = torch.from_numpy(numpy.array(x, order="C")).view(dtypes[source]).float()
        if target in fp8:
            largest = torch.finfo(fp8[target]).max
            numbers = numbers.clamp(-largest, largest)
        bits, unsigned = {1: (torch.uint8, "uint8"), 2: (torch.int16, "uint16"), 4: (torch.int32, "uint32")}[
            dtypes[target].itemsize]  # fmt: skip
        return numbers.to(dtypes[target]).view(bits).numpy().view(unsigned).reshape(numpy.shape(x))

    interpreter._convert_float = convert
    if not hasattr(interpreter._interpreter, "fma_fp32"):
        _mend_older(interpreter)


def _mend_older(interpreter: Any) -> None:
    """What Triton 3.9 does itself: an FMA of one rounding, and bounds of loops with NumPy 2.4."""
    interpreter.InterpreterBuilder.create_fma = lambda self, x, y, z: interpreter.TensorHandle(
        fma(x.data, y.data, z.data), z.dtype.scalar)  # fmt: skip
    original = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, *scope: Any) -> None:
        original(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    interpreter._patch_lang_tensor = patch_tensor


def fma(x: numpy.ndarray, y: numpy.ndarray, z: numpy.ndarray) -> numpy.ndarray:
    """x y + z rounded once to FP32, of FP32 arrays: the sum in FP64 rounded to odd, and that to FP32."""
    product = x.astype(numpy.float64) * y.astype(numpy.float64)  # exact
    addend = z.astype(numpy.float64)
    total = numpy.asarray(product + addend)
    part = total - product
    lost = (product - (total - part)) + (addend - part)  # what the sum lost, exactly (Knuth)
    bits = total.view(numpy.int64)
    inexact = (lost != 0) & (bits & 1 == 0) & numpy.isfinite(total)
    toward = numpy.where((lost > 0) == (total > 0), 1, -1)
    return numpy.where(inexact, bits + toward, bits).view(numpy.float64).astype(numpy.float32)


@contextlib.contextmanager
def gpu_layout(*modules: Any) -> Iterator[None]:
    """Lets these modules of the backend allocate on a CPU what they do on a GPU."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            for name in ("empty_tiles", "empty_blocks", "empty_data"):
                if hasattr(module, name):
                    stack.enter_context(patch.object(module, name, functools.partial(getattr(layout, name), gpu=True)))
        yield
