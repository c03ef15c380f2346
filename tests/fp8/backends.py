"""The one list of backends under test: every test of an operator runs over those that have it.

    @backends("quantize")
    def test_...(backend: Backend) -> None:
        backend.quantize(x)           numbers go to the backend's device and come back

`cpu` and `portable` (the same library without vectors) run everywhere, and `avx2` where `cpu` is more than that. With a
CUDA device every other backend of the registry joins, marked `gpu`; where one says that it cannot run on the arguments
of a test, that test is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext.kernels.cpu import activation as cpu_activation
from megatron_ext.kernels.cpu import e5m6 as cpu_e5m6
from megatron_ext.kernels.cpu import gemm as cpu_gemm
from megatron_ext.kernels.cpu import quantize as cpu_quantize
from megatron_ext.kernels.cpu import rows as cpu_rows
from megatron_ext.kernels.layout import empty_blocks, empty_data, empty_tiles
from megatron_ext.kernels.reference import activation, e5m6, gemm, quantize, rows
from megatron_ext.kernels.registry import OPERATORS

REFERENCE = {"quantize": quantize, "gemm": gemm, "activation": activation, "rows": rows, "e5m6": e5m6}
"""The specification, by file."""

CPU = {"quantize": cpu_quantize, "gemm": cpu_gemm, "activation": cpu_activation, "rows": cpu_rows, "e5m6": cpu_e5m6}

FILES = {
    "quantize": ("quantize", "dequantize", "quantize_transposed", "quantize_both", "requantize_transposed",
                 "quantize_weight"),
    "gemm": ("weight_operands", "gemm_nt", "grouped_gemm_nt", "grouped_wgrad"),
    "activation": ("swiglu_quantize", "swiglu_backward_quantize", "rms_norm_quantize"),
    "rows": ("permute_quantize", "quantize_rows", "unpermute_combine"),
    "e5m6": ("pack_e5m6", "unpack_e5m6"),
}
"""The operators, by file."""


class Backend:
    """Operators of one backend as attributes, called with tensors on the CPU.

    Args:
        name: for messages.
        functions: operators by name.
    """

    def __init__(self, name: str, functions: dict[str, Callable[..., Any]]):
        self.name, self.functions = name, functions

    def __getattr__(self, operator: str) -> Callable[..., Any]:
        try:
            return self.functions[operator]
        except KeyError:
            raise AttributeError(f"{self.name} has no {operator}") from None

    def __repr__(self) -> str:
        return self.name


def _from(files: dict[str, Any], names: Iterable[str] = FILES, **options: Any) -> dict[str, Callable[..., Any]]:
    return {
        operator: partial(getattr(files[file], operator), **options) if options else getattr(files[file], operator)
        for file in names
        for operator in FILES[file]
    }


def laid_out(values: Sequence[Any], device: torch.device, gpu: bool | None = None) -> list[Any]:
    """Arguments on a device as kernels there get them: numbers and scales in its layout, group sizes as a tensor.

    A scale is the FP32 tensor behind one of FP8; a list of numbers is group sizes.
    """
    found: list[Any] = []
    for before, value in zip([None, *values], values):  # noqa: B905
        if isinstance(value, list) and all(isinstance(n, int) for n in value):
            value = torch.tensor(value, dtype=torch.int64)
        if not isinstance(value, Tensor):
            found.append(value)
        elif value.element_size() == 1 and value.dtype != torch.uint8:
            new = empty_data(value.shape, value.dtype, device, gpu=gpu)
            new.view(torch.uint8).copy_(value.view(torch.uint8))
            found.append(new)
        elif isinstance(before, Tensor) and before.element_size() == 1 and before.dtype != torch.uint8:
            tiles = value.shape[-2] == before.shape[-2]
            new = empty_tiles(*value.shape, device, gpu=gpu) if tiles and value.dim() == 2 else empty_blocks(
                value.shape[:-2], *value.shape[-2:], device, gpu=gpu)
            found.append(new.copy_(value))
        else:
            found.append(value.to(device))
    return found


def _on_gpu(operator: str, name: str) -> Callable[..., Any]:
    """Runs a backend's operator on a CUDA device; what it writes in place is written to the caller's tensors."""

    def run(*args: Any, **kwargs: Any) -> Any:
        moved = laid_out(args, torch.device("cuda"))
        there = dict(enumerate(moved))
        there |= {key: value.cuda() if isinstance(value, Tensor) else value for key, value in kwargs.items()}
        if name not in OPERATORS.available(operator, *moved):
            pytest.skip(f"{name} does not run {operator} on these arguments")
        result = OPERATORS.select(operator, *moved, backend=name).function(*moved, **{k: there[k] for k in kwargs})
        for key, value in [*enumerate(args), *kwargs.items()]:
            if isinstance(value, Tensor):
                value.copy_(there[key])
        return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.cpu().contiguous(), result)

    return run


BACKENDS: dict[str, Backend] = {"cpu": Backend("cpu", _from(CPU))}
for _name, _lanes in (("avx2", 8), ("portable", 1)):
    if _lanes == 1 or torch.backends.cpu.get_cpu_capability() == "AVX512":
        BACKENDS[_name] = Backend(_name, _from(CPU, (f for f in FILES if f != "gemm"), lanes=_lanes))
ON_GPU: tuple[str, ...] = ()
if torch.cuda.is_available():
    ON_GPU = tuple(name for name in OPERATORS.backends if name not in ("cpu", "reference"))
    for _name in ON_GPU:
        BACKENDS[_name] = Backend(_name, {operator: _on_gpu(operator, _name) for operator in OPERATORS.operators})


def backends(*operators: str, reference: bool = False) -> pytest.MarkDecorator:
    """Parametrises `backend` over those that have all of `operators`, and over the reference if asked."""
    found = [Backend("reference", _from(REFERENCE))] if reference else []
    found += [backend for backend in BACKENDS.values() if set(operators) <= set(backend.functions)]
    marked = [pytest.param(b, id=b.name, marks=[pytest.mark.gpu] if b.name in ON_GPU else []) for b in found]
    return pytest.mark.parametrize("backend", marked)


def assert_same_bytes(found: Tensor | tuple[Tensor, ...], expected: Tensor | tuple[Tensor, ...]) -> None:
    """Equal dtypes, shapes and bits, of NaN too."""
    found, expected = ((t,) if isinstance(t, Tensor) else t for t in (found, expected))
    for a, b in zip(found, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(_bits(a), _bits(b))


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def wide(*shape: int, dtype: torch.dtype = torch.float32, spread: float = 8.0) -> Tensor:
    """Normal numbers whose rows spread over orders of magnitude (20 of them by default), exact zeros among them."""
    x = torch.randn(*shape) * torch.exp(spread * torch.randn(*shape[:-1], 1))
    return x.where(torch.rand(*shape) > 0.05, torch.tensor(0.0)).to(dtype)
