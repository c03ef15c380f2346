"""The kernels' operators, with a backend that cannot serve reported under its JSON key."""

from __future__ import annotations

from typing import Any

import torch

from megatron_ext.config.errors import ConfigError
from megatron_ext.kernels import registry
from megatron_ext.kernels.registry import AUTO, OPERATORS, BackendError


def call(operator: str, *args: Any, backend: str = AUTO) -> Any:
    """Runs an operator of `megatron_ext.kernels` (kernels/README.md lists them) on the named or the best backend.

    Raises:
        ConfigError: `kernels.backend` is unknown, or cannot run the operator on these arguments.
    """
    try:
        chosen = OPERATORS.select(operator, *args, backend=backend)
    except BackendError as error:
        raise _refusal(error) from None
    return chosen.function(*args)


def check_backend(backend: str, device: torch.device) -> None:
    """Finds out before training whether a backend can run on a device.

    Args:
        backend: a name, or "auto", which always can.
        device: where the model will be.

    Raises:
        ConfigError: there is no such backend, it is for other devices, or this machine lacks what it needs.
    """
    try:
        registry.check_backend(backend, device)
    except BackendError as error:
        raise _refusal(error) from None


def _refusal(error: BackendError) -> ConfigError:
    return ConfigError("kernels.backend", error.backend, error.rule, f"available here: {', '.join(error.available)}")
