"""The CUDA driver API through ctypes: loads cubins, encodes tensor maps, launches. No torch ABI is involved.

Work goes to torch's current stream in the device's primary context, the one that torch uses.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import byref, c_char_p, c_int, c_uint, c_uint32, c_uint64, c_void_p
from typing import Any

import torch

from megatron_ext.kernels.cuda import cubins

LIBRARY = "libcuda.so.1"
THREADS = 384
"""Threads of every block: two warpgroups that multiply, one that moves data."""

# Names of cuda.h
_MAJOR, _MINOR, _MULTIPROCESSORS = 75, 76, 16  # CU_DEVICE_ATTRIBUTE_*
_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_TYPES = {1: 0, 4: 7}  # CU_TENSOR_MAP_DATA_TYPE_UINT8, _FLOAT32, by bytes
_SWIZZLE_128B = 3
_PROMOTE_L2_256B = 3  # lines are fetched into L2 by 256 bytes: two rows' worth of a K-major operand


class DriverError(RuntimeError):
    """A call of the driver failed; the message is one line."""


class Driver:
    """The driver's library; calls raise `DriverError`.

    Raises:
        DriverError: there is no such library, or it does not start (no GPU, no permission).
    """

    def __init__(self, library: str = LIBRARY):
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise DriverError(f"no CUDA driver ({error})") from error
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            text = c_char_p()
            self._library.cuGetErrorString(code, byref(text))
            raise DriverError(f"{name}: error {code}, {(text.value or b'unknown').decode()}")

    def version(self) -> tuple[int, int]:
        """The newest CUDA that the driver supports."""
        found = c_int()
        self.call("cuDriverGetVersion", byref(found))
        return found.value // 1000, found.value % 1000 // 10

    def devices(self) -> int:
        found = c_int()
        self.call("cuDeviceGetCount", byref(found))
        return found.value

    def attribute(self, number: int, device: int) -> int:
        handle, found = c_int(), c_int()
        self.call("cuDeviceGet", byref(handle), device)
        self.call("cuDeviceGetAttribute", byref(found), number, handle)
        return found.value

    def capability(self, device: int) -> tuple[int, int]:
        return self.attribute(_MAJOR, device), self.attribute(_MINOR, device)


@functools.cache
def driver() -> Driver:
    return Driver()


@functools.cache
def multiprocessors(device: int) -> int:
    return driver().attribute(_MULTIPROCESSORS, device)


@functools.cache
def _context(device: int) -> c_void_p:
    handle, context = c_int(), c_void_p()
    driver().call("cuDeviceGet", byref(handle), device)
    driver().call("cuDevicePrimaryCtxRetain", byref(context), handle)
    return context


class _Current:
    """Makes a device's primary context current: a thread of torch's that never used the device has none."""

    def __init__(self, device: int):
        self._device = device

    def __enter__(self) -> None:
        driver().call("cuCtxPushCurrent_v2", _context(self._device))

    def __exit__(self, *_: object) -> None:
        driver().call("cuCtxPopCurrent_v2", byref(c_void_p()))


@functools.cache
def load(device: int, module: str) -> c_void_p:
    """A module on a device.

    Raises:
        DriverError, CubinError: it cannot be had.
    """
    loaded = c_void_p()
    image = cubins.find(module, driver().version()).read_bytes()
    with _Current(device):
        driver().call("cuModuleLoadData", byref(loaded), c_char_p(image))
    return loaded


@functools.cache
def kernel(device: int, module: str, name: str, shared: int) -> c_void_p:
    """A kernel of a module, allowed `shared` bytes of dynamic shared memory."""
    found = c_void_p()
    with _Current(device):
        driver().call("cuModuleGetFunction", byref(found), load(device, module), name.encode())
        driver().call("cuFuncSetAttribute", found, _DYNAMIC_SHARED, shared)
    return found


class TensorMap:
    """A CUtensorMap: 128 bytes at a multiple of 64, which TMA copies boxes by."""

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(128 + 64)
        self.address = -(-ctypes.addressof(self._memory) // 64) * 64


@functools.lru_cache(maxsize=4096)
def tensor_map(pointer: int, element: int, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int],
               swizzled: bool) -> TensorMap:
    """The map of a tensor. It follows from the arguments alone and is kept: weights and the allocator's blocks return.

    Args:
        pointer: a multiple of 16.
        element: 1 (bytes) or 4 (FP32).
        sizes: of each dimension, the contiguous one first.
        strides: bytes from one to the next along the other dimensions, multiples of 16.
        box: what one copy brings.
        swizzled: with the 128-byte swizzle that wgmma reads.
    """
    rank, made = len(sizes), TensorMap()
    driver().call(
        "cuTensorMapEncodeTiled", c_void_p(made.address), c_int(_TYPES[element]), c_uint(rank), c_void_p(pointer),
        (c_uint64 * rank)(*sizes), (c_uint64 * rank)(*strides), (c_uint32 * rank)(*box), (c_uint32 * rank)(*[1] * rank),
        c_int(0), c_int(_SWIZZLE_128B if swizzled else 0), c_int(_PROMOTE_L2_256B), c_int(0),
    )  # fmt: skip
    return made


def launch(device: torch.device, function: c_void_p, blocks: int, shared: int, maps: Sequence[TensorMap],
           problem: ctypes.Structure) -> None:
    """Launches a kernel of ours on torch's current stream of the device."""
    arguments = [*(c_void_p(m.address) for m in maps), c_void_p(ctypes.addressof(problem))]
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    with _Current(ordinal(device)):
        driver().call("cuLaunchKernel", function, blocks, 1, 1, THREADS, 1, 1, shared, c_void_p(stream),
                      (c_void_p * len(arguments))(*arguments), None)  # fmt: skip


def ordinal(device: torch.device) -> int:
    """Which GPU; 0 for a CPU, whose memory only the tests' emulation of the driver can use."""
    if device.type != "cuda":
        return 0
    return torch.cuda.current_device() if device.index is None else device.index
