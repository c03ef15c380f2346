"""Builds what is compiled of the package: the CPU kernels, a plain C library that ctypes loads, and cubins for Hopper.

Everything else about the package is in pyproject.toml. The library is not a Python extension: it includes neither
Python's nor torch's headers, so building it needs a C++ compiler and nothing else, and one build serves every version
of both. It is described to setuptools as an extension because that is what makes `pip install`, `pip install -e`,
`bdist_wheel` and `build_ext --inplace` all put it in the right place. Without a compiler the package still installs:
the reference backend (torch) does the same arithmetic bit for bit.

CXX names the compiler and CXXFLAGS adds flags. Contraction of a*b+c into one rounding stays off whatever they say,
for the kernels are bit-exact with the reference.

Cubins need nvcc (kernels/cuda/cubins.py finds it, or takes what NVCC names, none if that is empty) and neither torch
nor a GPU. Without it the package installs as well, and compiles them on first use where that is possible.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

KERNELS = "megatron_ext.kernels.cpu"
FOLDER = KERNELS.replace(".", "/")  # relative, through the symlink in a checkout and a real folder in an sdist
FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-pthread"]
LAST_FLAGS = ["-ffp-contract=off", "-fno-fast-math"]
CUDA = "megatron_ext/kernels/cuda"


def load_cubins() -> ModuleType:
    """kernels/cuda/cubins.py by its path: importing the package would import torch."""
    spec = importlib.util.spec_from_file_location("cubins", Path(CUDA, "cubins.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildKernels(build_ext):
    """Compiles kernels/cpu/*.cpp into libmegatron_ext_cpu.so; says so in one line and goes on where it cannot."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"  # no Python version in the name: ctypes loads it, not import

    def build_extension(self, ext: Extension) -> None:
        compiler = shlex.split(os.environ.get("CXX") or "g++")
        library = Path(self.build_lib, self.get_ext_filename(ext.name))
        library.unlink(missing_ok=True)  # of an earlier build: a failed one must not pass it on
        if shutil.which(compiler[0]) is None:
            print(f"megatron_ext: no C++ compiler ({compiler[0]}), CPU kernels not built, reference backend used")
            return
        library.parent.mkdir(parents=True, exist_ok=True)
        flags = [*FLAGS, *shlex.split(os.environ.get("CXXFLAGS", "")), *LAST_FLAGS]
        result = subprocess.run([*compiler, *flags, *ext.sources, "-o", str(library)])
        if result.returncode != 0:
            library.unlink(missing_ok=True)
            print("megatron_ext: CPU kernels did not compile (see above), reference backend used")

    def build_extensions(self) -> None:
        super().build_extensions()
        cubins, folder = load_cubins(), Path(self.build_lib, CUDA)
        for old in folder.glob("*.cubin"):
            old.unlink()  # of an earlier build, maybe of other sources
        nvcc = cubins.compiler()
        if nvcc is None:
            if os.environ.get("NVCC") != "":  # said unless it is what was asked for
                print("megatron_ext: no nvcc, CUDA kernels not built; compiled on first use where nvcc is found")
            return
        try:
            cubins.build(nvcc, folder)
        except cubins.CubinError as error:
            print(f"megatron_ext: CUDA kernels not built ({error})")

    def copy_extensions_to_source(self) -> None:
        """In-place builds: replaces each file in one step, for processes at work may have the old one mapped."""
        built = [Path(self.build_lib, self.get_ext_filename(ext.name)) for ext in self.extensions]
        cubins = sorted(Path(self.build_lib, CUDA).glob("*.cubin"))
        for file in [*built, *cubins]:
            if file.exists():
                folder = Path(CUDA if file in cubins else FOLDER)
                unfinished = folder / f"{file.name}.unfinished"
                shutil.copyfile(file, unfinished)
                unfinished.replace(folder / file.name)
        if cubins:
            for stale in set(Path(CUDA).glob("*.cubin")) - {Path(CUDA, file.name) for file in cubins}:
                stale.unlink()


class PlatformWheel(bdist_wheel):
    """One wheel for a platform serves every Python 3: the library knows nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


sources = sorted(path.as_posix() for path in Path(FOLDER).glob("*.cpp"))
setup(
    ext_modules=[Extension(f"{KERNELS}.libmegatron_ext_cpu", sources, optional=True)] if sources else [],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
