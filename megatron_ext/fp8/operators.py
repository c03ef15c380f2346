"""The kernels' operators, with a backend that cannot serve reported under its JSON key."""

from __future__ import annotations

from typing import Any

import torch

from megatron_ext.config.errors import ConfigError
from megatron_ext.kernels.layout import BLOCK
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
        ConfigError: there is no such backend, or it cannot run one of its operators there on blocks of 128 x 128.
    """
    sample = torch.empty(BLOCK, BLOCK, device=device)
    for operator in OPERATORS.operators:
        try:
            OPERATORS.select(operator, sample, backend=backend)
        except BackendError as error:
            raise _refusal(error) from None


def _refusal(error: BackendError) -> ConfigError:
    return ConfigError("kernels.backend", error.backend, error.rule, f"available here: {', '.join(error.available)}")
