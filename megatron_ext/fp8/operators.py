"""The kernels' operators, with a backend that cannot serve reported under its JSON key."""

from __future__ import annotations

from typing import Any

from megatron_ext.config.errors import ConfigError
from megatron_ext.kernels.registry import AUTO, OPERATORS, BackendError


def call(operator: str, *args: Any, backend: str = AUTO) -> Any:
    """Runs an operator of `megatron_ext.kernels` (kernels/README.md lists them) on the named or the best backend.

    Raises:
        ConfigError: `kernels.backend` is unknown, or cannot run the operator on these arguments.
    """
    try:
        chosen = OPERATORS.select(operator, *args, backend=backend)
    except BackendError as error:
        hint = f"available here: {', '.join(error.available)}"
        raise ConfigError("kernels.backend", error.backend, error.rule, hint) from None
    return chosen.function(*args)
