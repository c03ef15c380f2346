"""The shared library of C++ CPU kernels, and how many threads its work is spread over.

The library is compiled from kernels/cpu/*.cpp when the package is installed. It has a plain C ABI and no OpenMP of its
own: two OpenMP runtimes in one process can turn 1 % of overhead into 60 %. It is given the one that torch has, and uses
its threads (kernels/cpu/parallel.cpp). ctypes releases the GIL while a kernel runs.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from pathlib import Path

import torch

PATH = Path(__file__).with_name("libmegatron_ext_cpu.so")

WIDEST = 16
"""FP32 numbers in the widest vectors with loops (AVX-512); a processor without them uses narrower ones."""


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library, or None (said once in the log) where it was not built or does not fit this machine."""
    try:
        library = ctypes.CDLL(str(PATH))
    except OSError as error:
        logging.getLogger(__name__).warning(
            "compiled CPU kernels are not available (%s): the slower torch reference is used; pip install builds them",
            error,
        )
        return None
    use_threads_of_torch(library)
    return library


def use_threads_of_torch(library: ctypes.CDLL) -> bool:
    """Gives the library what torch starts its threads with, as found in the libraries that torch is linked with.

    Returns:
        Whether torch has it: it lacks OpenMP on some systems, and there the library starts threads itself.
    """
    try:
        start = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return False
    library.mext_use_threads_of(ctypes.cast(start, ctypes.c_void_p))
    return True


@functools.cache
def function(name: str, *argument_types: type) -> Callable[..., None]:
    """A function of the library that returns nothing; pointers are `ctypes.c_void_p`."""
    library = load()
    assert library is not None, "the registry offers the cpu backend only when its library is there"
    found = getattr(library, name)
    found.argtypes, found.restype = argument_types, None
    return found


def threads_for(count: int, grain: int) -> int:
    """Threads for `count` numbers of which `grain` are worth a thread: at most as many as torch uses."""
    return max(1, min(torch.get_num_threads(), count // grain))
