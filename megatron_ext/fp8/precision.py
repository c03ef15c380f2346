"""What precision a layer computes and communicates in, and the weights quantised once per optimizer step."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from megatron_ext.config.errors import ConfigError
from megatron_ext.kernels.registry import AUTO, OPERATORS

DispatchDtype = Literal["model", "bf16", "fp8"]
CombineDtype = Literal["model", "bf16"]


class WeightCache:
    """Quantised weights by parameter, good until `clear`.

    The engine clears it after every optimizer step and every load. Holds no parameter alive: an entry goes with its
    parameter. A parameter edited in place, or given other storage, is noticed and quantised again; an edit through
    `.data` or through a flat buffer that the parameter is a view of (what optimizers do) is not: call `clear`.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[int, str], tuple[weakref.ref[Tensor], tuple[int, int], Any]] = {}

    def get(self, weight: Tensor, backend: str, build: Callable[[], Any]) -> Any:
        """The cached form of `weight` for `backend`, made with `build` where there is none."""
        key, stamp = (id(weight), backend), (weight.data_ptr(), weight._version)
        entry = self._entries.get(key)
        if entry is not None and entry[0]() is weight and entry[1] == stamp:
            return entry[2]
        value = build()
        entries = self._entries  # not self: the callback of a parameter must not keep the cache alive

        def forget(reference: weakref.ref[Tensor]) -> None:
            if key in entries and entries[key][0] is reference:
                del entries[key]

        entries[key] = (weakref.ref(weight, forget), stamp, value)
        return value

    def clear(self) -> None:
        """Forgets every weight; call it whenever weights have changed."""
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)


@dataclass(frozen=True)
class Precision:
    """How a layer multiplies and sends.

    Attributes:
        fp8: quantise the operands of matrix products with weights.
        activation_cache: with `fp8`, keep for backward what is multiplied, in FP8, and make the rest again; else keep
            activations as an unquantised model would, and quantise them once more for the weight gradients.
        dispatch_dtype: what tokens are sent to experts in; "model" is the dtype they have.
        combine_dtype: what experts' outputs come back in.
        backend: backend of the operators, or "auto" (by device and shape).
        weights: where quantised weights live for a step; None quantises them at each call.

    Raises:
        ConfigError: a dtype that is none of these, or a backend that there is not on any device (`check_backend` tells
            about one device).
    """

    fp8: bool = False
    activation_cache: bool = True
    dispatch_dtype: DispatchDtype = "model"
    combine_dtype: CombineDtype = "model"
    backend: str = AUTO
    weights: WeightCache | None = None

    def __post_init__(self) -> None:
        for name, kind in (("dispatch_dtype", DispatchDtype), ("combine_dtype", CombineDtype)):
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(name, getattr(self, name), f"must be one of {', '.join(get_args(kind))}")
        if self.backend not in (names := (AUTO, *OPERATORS.backends)):
            hint = f"known: {', '.join(names)}"
            raise ConfigError("kernels.backend", self.backend, "there is no backend of that name", hint)
