"""One table of operators and the backends that implement them.

An operator is a plain function of tensors; kernels/README.md lists them with their shapes, and the torch reference
(kernels/reference) is the specification of each. A backend is a name for a family of implementations. To add one, write
its functions with the reference's signatures and list them below, before the backends it should be preferred to; a
module is imported when it is first chosen, so listing one imports neither triton nor CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

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
            if implementation.usable(*args):
                return implementation
        raise self._refusal(operator, args, backend, f"this backend cannot run {operator} on {_describe(args)}")

    def _refusal(self, operator: str, args: tuple[Any, ...], backend: str, rule: str) -> BackendError:
        return BackendError(backend, rule, (AUTO, *self.available(operator, *args)))


def _describe(args: tuple[Any, ...]) -> str:
    return ", ".join(f"{a.dtype} {list(a.shape)} on {a.device}" for a in args if isinstance(a, Tensor))


def _on_compiled_cpu(*args: Any) -> bool:
    return args[0].device.type == "cpu" and library.load() is not None


def _anywhere(*args: Any) -> bool:
    return True


_QUANTIZE = ("quantize", "dequantize", "quantize_transposed", "requantize_transposed")
_GEMM = ("weight_operands", "gemm_nt", "grouped_gemm_nt", "grouped_wgrad")

OPERATORS = Registry(
    Implementation(operator, backend, f"megatron_ext.kernels.{backend}.{file}", usable)
    for backend, usable in (("cpu", _on_compiled_cpu), ("reference", _anywhere))
    for file, operators in (("quantize", _QUANTIZE), ("gemm", _GEMM))
    for operator in operators
)
"""The operators of this package; built once, never changed."""
