"""Where the Triton backend says that it can run, and the one line it gives where it cannot."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from megatron_ext.kernels import triton_kernels
from tests.kernels.interpreter import interpreted, needs_triton

X = torch.zeros(2, 128)


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    caches = triton_kernels._import_error, triton_kernels._device_lacks
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def without(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def import_module(name: str) -> None:
        raise error

    monkeypatch.setattr(importlib, "import_module", import_module)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ModuleNotFoundError("No module named 'triton'", name="triton"), "triton: not installed"),
        (ModuleNotFoundError("No module named 'x'", name="x"), "triton: fails to import (No module named 'x')"),
        (ImportError("libz.so: cannot open\nshared object"), "triton: fails to import (ImportError: libz.so: cannot open shared object)"),  # noqa: E501
        (RuntimeError("0 active drivers"), "triton: fails to import (RuntimeError: 0 active drivers)"),
    ],
)  # fmt: skip
def test_a_triton_that_does_not_import_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    without(monkeypatch, error)
    assert triton_kernels.why_not() == line
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not triton_kernels.usable("quantize", X)


@needs_triton
@pytest.mark.parametrize(
    ("capability", "line"),
    [
        ((9, 0), None),
        ((12, 0), None),
        ((8, 9), None),
        ((8, 0), "triton: the GPU has compute capability 8.0, FP8 needs 8.9"),
    ],
)
def test_the_gpu_must_convert_to_fp8(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], line: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
    monkeypatch.setattr(triton_kernels, "_interpreting", lambda: False)
    assert triton_kernels.why_not() == line
    monkeypatch.setattr(torch.version, "cuda", None)
    triton_kernels._device_lacks.cache_clear()
    assert triton_kernels.why_not() == "triton: torch is not built for CUDA"


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    assert triton_kernels.why_not() == "triton: no GPU"
    assert not triton_kernels.usable("quantize", X) and not triton_kernels.usable("adamw", [], [], [], [])


def interpreting() -> tuple[object, ...]:
    a = X.to(torch.float8_e4m3fn)
    return (
        triton_kernels.why_not(), triton_kernels.usable("quantize", X), triton_kernels.usable("adamw", [X]),
        triton_kernels.usable("gemm_nt", a, X, a, X), triton_kernels.usable("gemm_nt", a, X, X, None),
    )  # fmt: skip


@needs_triton
def test_cpu_tensors_run_in_the_interpreter_only() -> None:
    assert interpreted(interpreting) == (None, True, True, True, False)


def test_asking_about_cpu_tensors_imports_no_triton() -> None:
    code = ("import sys, torch; from megatron_ext.kernels import triton_kernels as t; "
            "assert not t.usable('quantize', torch.zeros(1, 128)); print('triton' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout.strip() == "False"
