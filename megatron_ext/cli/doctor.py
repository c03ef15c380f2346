"""`megatron-ext doctor`: what a person needs to know, or to paste into an issue, when a start goes wrong.

Only looks: it removes nothing and starts no process group; where nvcc and a Hopper GPU are, it may compile the CUDA
kernels to know whether they run, and with `--kernels` it runs them all. DeepSpeed is not imported, only asked for its
version.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.markup import escape

import megatron_ext
from megatron_ext.cli import kernels
from megatron_ext.kernels.cpu import library
from megatron_ext.parallel import extensions


def report() -> None:
    """Prints `findings`, a line each and never cut, so that they can be pasted."""
    console = Console(soft_wrap=True, highlight=False)
    for name, finding in findings():
        console.print(f"[bold]{name:<16}[/bold] {escape(finding)}")


def findings() -> Iterator[tuple[str, str]]:
    """(name, what was found), a line each, in the order they are shown."""
    yield "megatron_ext", f"{megatron_ext.__version__} in {os.path.dirname(megatron_ext.__file__)}"
    yield "python", f"{platform.python_version()} ({sys.executable})"
    for name in ("torch", "deepspeed"):
        yield name, _version(name)
    yield "optional", ", ".join(f"{name} {_version(name)}" for name in ("triton", "apex", "transformers"))
    yield "device", _device()
    capability = torch.backends.cpu.get_cpu_capability()
    yield "processor", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads; {capability}"
    yield "CPU kernels", _cpu_kernels()
    for backend, state in kernels.backends():
        yield f"FP8 {backend}", state
    yield "FP8 operators", _chosen()
    tools = {name: shutil.which(name) for name in ("g++", "ninja", "nvcc")}
    yield "build tools", ", ".join(f"{name} {path or 'not on PATH'}" for name, path in tools.items())
    folder = extensions.extensions_folder()
    built = sorted(path.stem for path in folder.glob("*/*.so"))
    yield "run-time builds", f"{folder}: {', '.join(built) or 'nothing built yet'}"
    locks = extensions.find_unheld_locks()
    yield "stale locks", ", ".join(map(str, locks)) + " (the next start removes them)" if locks else "none"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _device() -> str:
    if not torch.cuda.is_available():
        return "cpu (torch sees no CUDA device)"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"cuda {torch.version.cuda}: {', '.join(names)}"


def _chosen() -> str:
    """Operators by the backend that runs them where the model would be."""
    by_backend: dict[str, list[str]] = {}
    for operator, available in kernels.choices(_model_device()):
        by_backend.setdefault(available[0], []).append(operator)
    return "; ".join(f"{backend}: {', '.join(operators)}" for backend, operators in by_backend.items())


def check_kernels() -> bool:
    """Prints a line for every operator and backend, and whether it does as the reference; returns whether all do."""
    console, right = Console(soft_wrap=True, highlight=False), True
    for operator, backend, wrong in kernels.check(_model_device()):
        right = right and wrong is None
        console.print(f"{operator:<26}{backend:<12}{escape(wrong or 'as the reference')}")
    return right


def _model_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _cpu_kernels() -> str:
    loaded = library.load()
    if loaded is None:
        return "not built, the reference backend is used (build: python setup.py build_ext --inplace)"
    return loaded._name
