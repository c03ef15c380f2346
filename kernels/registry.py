"""One table of operators and the backends that implement them.

An operator is a plain function of tensors; kernels/README.md lists them with their shapes, and the torch reference
(kernels/reference) is the specification of each. A backend is a name for a family of implementations. To add one, write
its functions with the reference's signatures and list them below, before the backends it should be preferred to; a
module is imported when it is first chosen, so listing one imports neither triton nor CUDA.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from megatron_ext.kernels.cpu import library

AUTO = "auto"


class BackendError(ValueError):
    """A backend that was named and cannot serve; the rows above turn it into their error for users.

    Attributes:
        backend: the name given.
        rule: what is wrong with it.
        available: the names that would work instead.
    """

    def __init__(self, backend: str, rule: str, available: tuple[str, ...]):
        self.backend, self.rule, self.available = backend, rule, available
        super().__init__(f"backend {backend!r}: {rule}; available here: {', '.join(available)}")


@dataclass(frozen=True)
class Implementation:
    """How one backend computes one operator.

    Attributes:
        operator: name of the operator.
        backend: name of the backend.
        module: module that holds a function called like the operator; imported on first use.
        usable: decides from the operator's positional arguments (their device, dtypes and shapes).
    """

    operator: str
    backend: str
    module: str
    usable: Callable[..., bool]
    by_name_only: Callable[..., bool] = lambda *args: False
    """Where it is usable only if it was named: Triton's interpreter on a CPU."""

    @cached_property
    def function(self) -> Callable[..., Any]:
        return getattr(import_module(self.module), self.operator)


class Registry:
    """Chooses an implementation for every call.

    Args:
        implementations: in order of preference; the first usable one of an operator wins.
    """

    def __init__(self, implementations: Iterable[Implementation]):
        table: dict[str, list[Implementation]] = {}
        for implementation in implementations:
            table.setdefault(implementation.operator, []).append(implementation)
        self._table = {operator: tuple(found) for operator, found in table.items()}

    @property
    def operators(self) -> tuple[str, ...]:
        return tuple(self._table)

    @property
    def backends(self) -> tuple[str, ...]:
        """Every backend known, usable here or not."""
        return tuple(dict.fromkeys(i.backend for found in self._table.values() for i in found))

    def available(self, operator: str, *args: Any) -> tuple[str, ...]:
        """The backends that can run the operator on these arguments, the preferred one first."""
        return tuple(i.backend for i in self._table[operator] if i.usable(*args))

    def select(self, operator: str, *args: Any, backend: str = AUTO) -> Implementation:
        """The implementation to run; `select(...).function(...)` is a call.

        Args:
            operator: one of `operators`.
            args: the operator's positional arguments, of which device and shapes count.
            backend: a backend's name, or "auto". An operator that the named backend does not have at all is chosen
                automatically (a library of matrix products does not quantise).

        Raises:
            BackendError: the backend is unknown, or cannot run this operator on these arguments.
        """
        choices = self._table[operator]
        if backend != AUTO:
            if backend not in self.backends:
                raise self._refusal(operator, args, backend, "there is no backend of that name")
            choices = tuple(i for i in choices if i.backend == backend) or choices
        for implementation in choices:
            if implementation.usable(*args) and (backend != AUTO or not implementation.by_name_only(*args)):
                return implementation
        raise self._refusal(operator, args, backend, f"this backend cannot run {operator} on {_describe(args)}")

    def _refusal(self, operator: str, args: tuple[Any, ...], backend: str, rule: str) -> BackendError:
        return BackendError(backend, rule, (AUTO, *self.available(operator, *args)))


def _describe(args: tuple[Any, ...]) -> str:
    return ", ".join(f"{a.dtype} {list(a.shape)} on {a.device}" for a in args if isinstance(a, Tensor))


def _tensor(args: Iterable[Any]) -> Tensor | None:
    """The first tensor among arguments, in lists too."""
    for arg in args:
        if isinstance(arg, Tensor):
            return arg
        if isinstance(arg, (list, tuple)) and (found := _tensor(arg)) is not None:
            return found
    return None


def _on_compiled_cpu(*args: Any) -> bool:
    first = _tensor(args)
    return first is not None and first.device.type == "cpu" and library.load() is not None


def _on_cpu(*args: Any) -> bool:
    first = _tensor(args)
    return first is None or first.device.type == "cpu"


def _anywhere(*args: Any) -> bool:
    return True


def _optional(module: str, operator: str) -> Callable[..., bool]:
    """Asks the backend's own `usable`. Its `why_not` is logged when it could have served and this machine lacks it."""

    def usable(*args: Any) -> bool:
        first = _tensor(args)
        if first is None or first.device.type not in ("cuda", "cpu"):
            return False
        if first.device.type == "cpu" and "TRITON_INTERPRET" not in os.environ:
            return False  # all these are for GPUs; only Triton has an interpreter
        found = import_module(module).usable(operator, *args)
        if not found and first.device.type == "cuda":
            _say_why_not(module)
        return found

    return usable


@functools.cache
def _say_why_not(module: str) -> None:
    reason = import_module(module).why_not()
    if reason is not None:
        logging.getLogger("megatron_ext").warning("FP8 kernels: %s; the next backend is used", reason)


_FILES = {
    "gemm": ("gemm_nt", "grouped_gemm_nt", "grouped_wgrad", "weight_operands"),
    "quantize": ("quantize", "dequantize", "quantize_transposed", "quantize_both", "requantize_transposed",
                 "quantize_weight"),
    "activation": ("swiglu_quantize", "swiglu_backward_quantize", "rms_norm_quantize"),
    "rows": ("permute_quantize", "quantize_rows", "unpermute_combine"),
    "e5m6": ("pack_e5m6", "unpack_e5m6"),
    "adamw": ("adamw",),
}
"""Operators by the file that holds them, in every backend."""

_PACKAGE = "megatron_ext.kernels."
_FOR_GPUS: dict[str, tuple[str, str, tuple[str, ...] | None]] = {
    "cuda": ("cuda", "cuda.available", _FILES["gemm"]),
    "deep_gemm": ("deep_gemm", "deep_gemm.available", ("gemm_nt",)),
    "torch": ("torch_scaled", "torch_scaled.available", ("gemm_nt",)),
    "triton": ("triton_kernels", "triton_kernels", None),
}
"""Backends that may be missing, the preferred one first: folder, module that says why not, operators (None: all)."""


def _implementations() -> Iterator[Implementation]:
    for file, operators in _FILES.items():
        for operator in operators:
            for backend, (folder, available, own) in _FOR_GPUS.items():
                if own is None or operator in own:
                    usable = _optional(_PACKAGE + available, operator)
                    yield Implementation(operator, backend, f"{_PACKAGE}{folder}.{file}", usable, _on_cpu)
            yield Implementation(operator, "cpu", f"{_PACKAGE}cpu.{file}", _on_compiled_cpu)
            yield Implementation(operator, "reference", f"{_PACKAGE}reference.{file}", _anywhere)


OPERATORS = Registry(_implementations())
"""The operators of this package; built once, never changed."""


def why_not(backend: str) -> str | None:
    """What keeps a backend from this machine, in one line; None if nothing does. Never raises.

    Args:
        backend: one of `OPERATORS.backends`.
    """
    if backend == "cpu":
        return None if library.load() is not None else "the CPU kernels are not built: pip install builds them"
    return None if backend == "reference" else import_module(_PACKAGE + _FOR_GPUS[backend][1]).why_not()


def check_backend(backend: str, device: torch.device) -> None:
    """Finds out before training whether a backend that was named can run on a device.

    Raises:
        BackendError: there is no such backend, it is for other devices, or this machine lacks it.
    """
    if backend == AUTO and device.type == "cuda":
        for name in _FOR_GPUS:  # loads kernels now, not in the first step or within a CUDA graph
            why_not(name)
    if backend in (AUTO, "reference"):
        return
    if backend not in OPERATORS.backends:
        rule: str | None = "there is no backend of that name"
    else:
        kind = "cpu" if backend == "cpu" or (backend == "triton" and "TRITON_INTERPRET" in os.environ) else "cuda"
        rule = why_not(backend) if device.type == kind else f"it is for {kind} devices, not for {device.type}"
    if rule is not None:
        sample = torch.empty(1, 1, device=device)
        raise BackendError(backend, rule, (AUTO, *OPERATORS.available("quantize", sample)))
