"""Whether the CUDA kernels can run: on this machine (`why_not`), and on these arguments (`usable`)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_ext.kernels.cuda import driver
from megatron_ext.kernels.cuda.cubins import MODULES, CubinError
from megatron_ext.kernels.cuda.operands import MODULE_OF, misfit


@functools.cache
def why_not(device: int = 0, modules: Sequence[str] = MODULES) -> str | None:
    """None if the kernels run on GPU `device`, else one line that says what is missing. Never raises.

    The first question may compile kernels (`cubins.find`); the answer is kept.
    """
    try:
        cuda = driver.driver()
        if device >= cuda.devices():
            return "cuda kernels: no GPU"
        major, minor = cuda.capability(device)
        if (major, minor) != (9, 0):
            return f"cuda kernels: GPU {device} has compute capability {major}.{minor}, they are for Hopper's 9.0"
        for module in modules:
            driver.load(device, module)
    except (driver.DriverError, CubinError, OSError) as error:
        return f"cuda kernels: {error}"
    return None


def usable(operator: str, *args: Any) -> bool:
    """Whether `operator` can run on these positional arguments."""
    first = args[0]
    if not isinstance(first, Tensor) or first.device.type != "cuda" or torch.version.hip is not None:
        return False
    if operator == "weight_operands":
        fits = first.dtype == torch.float8_e4m3fn  # what it returns then suits the products of weights
    else:
        fits = operator in MODULE_OF and misfit(operator, *args) is None
    return fits and why_not(driver.ordinal(first.device), (MODULE_OF.get(operator, "dense"),)) is None
