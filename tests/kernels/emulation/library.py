"""The emulated driver (emulation.cpp) and a process that uses it: `libcuda.so.1` is found by the loader's search path.

In a process of its own, for a library of that name would be found by everything else that looks for a driver. Functions
given to `Emulated.run` are of importable modules.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from megatron_ext.kernels.cuda import cubins

HERE = Path(__file__).parent
ABSENT = None if shutil.which("g++") else "needs g++ (with C++20) to compile the emulated driver"


@functools.cache
def compiled() -> bytes:
    """The emulated driver with our kernels; about 3 s."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "libcuda.so.1")
        command = ["g++", "-std=c++20", "-O2", "-Wall", "-Wno-unknown-pragmas", "-shared", "-fPIC", "-I", str(HERE),
                   "-I", str(cubins.FOLDER), str(HERE / "emulation.cpp"), "-o", str(library), "-ldl"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return library.read_bytes()


def build(folder: Path, name: str = "libcuda.so.1") -> Path:
    """Puts the emulated driver into `folder`."""
    library = folder / name
    library.write_bytes(compiled())
    return library


def fake_cubins(folder: Path, cuda: str = "13.0") -> None:
    """Cubins that are only found and never run, in a cache folder."""
    cache = folder / "megatron_ext" / "cubins"
    cache.mkdir(parents=True, exist_ok=True)
    for module in cubins.MODULES:
        (cache / f"{module}-{cubins.digest()}-cuda{cuda}.cubin").write_bytes(b"\x7fELF of nothing")


class Emulated:
    """A process whose CUDA driver is the emulation, with one GPU of compute capability 9.0.

    Args:
        folder: where to put the library and the cache of cubins.
    """

    def __init__(self, folder: Path):
        build(folder)
        fake_cubins(folder)
        changes = {"LD_LIBRARY_PATH": str(folder), "XDG_CACHE_HOME": str(folder), "CUDA_VISIBLE_DEVICES": ""}
        before = {name: os.environ.get(name) for name in changes}
        os.environ.update(changes)
        try:  # the loader reads its path when a process starts
            self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            self._pool.submit(os.getpid).result()
        finally:
            for name, value in before.items():
                os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        return self._pool.submit(_with_settings, function, args).result(timeout=200)

    def close(self) -> None:
        self._pool.shutdown()


def _with_settings(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    import torch

    torch.set_num_threads(1)
    return function(*args)
