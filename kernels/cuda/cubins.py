"""Machine code of the kernels: put into the wheel when it is built, else compiled on first use into the user's cache.

A cubin's name holds a digest of sources and flags, so one that does not belong to these sources is never found, and the
version of the CUDA toolkit that made it, for a driver older than the toolkit's major version cannot load it. The
compiler is `$NVCC` (if it is set and empty, none), or nvcc of `$CUDA_HOME`, of PATH or of /usr/local/cuda.

setup.py runs this file by itself: the standard library only.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MODULES = ("dense", "grouped", "wgrad")
"""One cubin for each source `<module>.cu`."""

FLAGS = ("-gencode=arch=compute_90a,code=sm_90a", "-cubin", "-O3", "-std=c++17")

FOLDER = Path(__file__).parent

_log = logging.getLogger("megatron_ext")


class CubinError(RuntimeError):
    """There is no machine code; the message is one line that says why."""


def digest() -> str:
    """Of everything that decides what the machine code computes."""
    sources = sorted([*FOLDER.glob("*.cu"), *FOLDER.glob("*.cuh"), *FOLDER.glob("*.h")])
    found = hashlib.sha256(" ".join(FLAGS).encode())
    for source in sources:
        found.update(source.name.encode() + b"\0" + source.read_bytes())
    return found.hexdigest()[:12]


def compiler() -> str | None:
    """Path of nvcc, None if there is none or none is wanted."""
    if (named := os.environ.get("NVCC")) is not None:
        return shutil.which(named) if named else None
    for home in filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))):
        if found := shutil.which("nvcc", path=f"{home}/bin"):
            return found
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def toolkit(nvcc: str) -> str:
    """Version of the CUDA toolkit, "13.0".

    Raises:
        CubinError: the compiler does not say.
    """
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise CubinError(f"{nvcc} does not run: {error}") from error
    version = re.search(r"release (\d+\.\d+)", said)
    if version is None:
        raise CubinError(f"{nvcc} does not say its version")
    return version[1]


def cache_folder() -> Path:
    """Where cubins compiled on first use are kept."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no HOME and no entry for the user
        cache = Path(tempfile.gettempdir(), f"cache-{os.getuid()}")
    return cache / "megatron_ext" / "cubins"


def build(nvcc: str, folder: Path, modules: tuple[str, ...] = MODULES) -> list[Path]:
    """Compiles modules into `folder`; several processes may do so at once, each file appears whole.

    Raises:
        CubinError: nvcc failed or the folder cannot be written.
    """
    stem = f"{digest()}-cuda{toolkit(nvcc)}"

    def compile(module: str) -> Path:
        target = folder / f"{module}-{stem}.cubin"
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as private:
            unfinished = Path(private, target.name)
            command = [nvcc, *FLAGS, str(FOLDER / f"{module}.cu"), "-o", str(unfinished)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                words = (done.stderr or done.stdout).strip().splitlines()
                raise CubinError(f"{nvcc} failed on {module}.cu: {words[0] if words else done.returncode}")
            unfinished.replace(target)
        return target

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(compile, modules))
    except OSError as error:
        raise CubinError(f"cannot compile into {folder}: {error}") from error


def made_by(cubin: Path) -> tuple[int, int]:
    """CUDA version of the toolkit that made a cubin, from its name."""
    major, minor = re.search(r"-cuda(\d+)\.(\d+)\.cubin$", cubin.name).groups()  # type: ignore[union-attr]
    return int(major), int(minor)


def find(module: str, driver: tuple[int, int]) -> Path:
    """The cubin of a module, compiled now if there is none that the driver can load.

    Args:
        module: one of `MODULES`.
        driver: the CUDA version that the driver supports; it loads cubins of its own major version and older ones.

    Raises:
        CubinError: there is none and none can be compiled.
    """
    pattern = f"{module}-{digest()}-cuda*.cubin"
    found = sorted([*FOLDER.glob(pattern), *cache_folder().glob(pattern)], key=made_by, reverse=True)
    for cubin in found:
        if made_by(cubin)[0] <= driver[0]:
            return cubin
    too_new = f"the kernels in {found[0].parent} are of CUDA {_dots(made_by(found[0]))}, the driver is of CUDA " \
        f"{_dots(driver)}" if found else "no compiled kernels came with the package"
    nvcc = compiler()
    if nvcc is None:
        raise CubinError(f"{too_new}, and there is no nvcc to compile them")
    version = toolkit(nvcc)
    if int(version.split(".")[0]) > driver[0]:
        raise CubinError(f"{too_new}, and {nvcc} is of CUDA {version}: a driver of CUDA {_dots(driver)} is too old")
    _log.info("compiling %s.cu with %s, once, into %s", module, nvcc, cache_folder())
    return build(nvcc, cache_folder(), (module,))[0]


def _dots(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
