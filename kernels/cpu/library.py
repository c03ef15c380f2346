"""The shared library of C++ CPU kernels, and how its work is spread over threads.

The library is compiled from kernels/cpu/*.cpp when the package is installed. It has a plain C ABI and no OpenMP: two
OpenMP runtimes in one process (torch brings one) can turn 1 % of overhead into 60 %. Kernels take a range of units
instead, and ctypes releases the GIL while one runs.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

_HUGE_PAGE = 1 << 21
_MADV_HUGEPAGE = 14  # of Linux, <bits/mman-linux.h>

PATH = Path(__file__).with_name("libmegatron_ext_cpu.so")


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library, or None (said once in the log) where it was not built or does not fit this machine."""
    try:
        return ctypes.CDLL(str(PATH))
    except OSError as error:
        logging.getLogger(__name__).warning(
            "compiled CPU kernels are not available (%s): the slower torch reference is used; pip install builds them",
            error,
        )
        return None


@functools.cache
def function(name: str, *argument_types: type) -> Callable[..., None]:
    """A function of the library that returns nothing; pointers are `ctypes.c_void_p`."""
    library = load()
    assert library is not None, "the registry offers the cpu backend only when its library is there"
    found = getattr(library, name)
    found.argtypes, found.restype = argument_types, None
    return found


def empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised tensor; a big one on huge pages where Linux gives them to who asks.

    Memory fresh from the system is mapped page by page as it is first touched, at 2 GB/s with pages of 4 KiB and at 11
    with huge ones (measured on a virtual machine): more than quantising costs.
    """
    x = torch.empty(shape, dtype=dtype)
    if x.nbytes >= 2 * _HUGE_PAGE and sys.platform == "linux":
        first = -(-x.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        size = (x.data_ptr() + x.nbytes) // _HUGE_PAGE * _HUGE_PAGE - first
        _madvise()(first, size, _MADV_HUGEPAGE)  # advice: where it is refused nothing is lost
    return x


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    found = ctypes.CDLL(None).madvise
    found.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return found


def in_chunks(count: int, grain: int, body: Callable[[int, int], None]) -> None:
    """Runs `body(first, last)` over [0, count) on as many threads as torch uses.

    Threads start and end here (some 50 us), so nothing outlives a fork.

    Args:
        count: units of work.
        grain: the fewest units worth a thread of their own; about a millisecond of work.
        body: called once a chunk; releases the GIL while it works, as a ctypes call does.
    """
    if not count:
        return
    threads = max(1, min(torch.get_num_threads(), count // max(grain, 1)))
    if threads == 1:
        body(0, count)
        return
    bounds = [count * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(body, first, last) for first, last in pairwise(bounds[1:])]
        body(bounds[0], bounds[1])
        for other in others:
            other.result()
