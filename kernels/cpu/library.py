"""The shared library of C++ CPU kernels, and how its work is spread over threads.

The library is compiled from kernels/cpu/*.cpp when the package is installed. It has a plain C ABI and no OpenMP: two
OpenMP runtimes in one process (torch brings one) can turn 1 % of overhead into 60 %. Kernels take a range of units
instead, and ctypes releases the GIL while one runs.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import torch

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


def in_chunks(count: int, grain: int, body: Callable[[int, int], None]) -> None:
    """Runs `body(first, last)` over [0, count) on as many threads as torch uses.

    Threads start and end here (some 50 us), so nothing outlives a fork.

    Args:
        count: units of work.
        grain: the fewest units worth a thread of their own; about a millisecond of work.
        body: called once a chunk; releases the GIL while it works, as a ctypes call does.
    """
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
