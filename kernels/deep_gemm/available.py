"""Whether DeepGEMM can run: on this machine (`why_not`), and on these arguments (`usable`)."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from megatron_ext.kernels.deep_gemm.gemm import PACKAGE, misfit


@functools.cache
def why_not(device: int = 0) -> str | None:
    """None if DeepGEMM multiplies FP8 on GPU `device`, else one line that says why not. Never raises."""
    try:
        if not torch.cuda.is_available() or device >= torch.cuda.device_count():
            return "deep_gemm: no GPU"
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) != (9, 0):
            return f"deep_gemm: GPU {device} has compute capability {major}.{minor}, the scales here are Hopper's (9.0)"
        package = importlib.import_module(PACKAGE)
    except ImportError as error:
        return f"deep_gemm: not installed ({error})"
    except Exception as error:  # a package that compiles and probes at import may raise anything
        return f"deep_gemm: does not import ({type(error).__name__}: {(str(error) or '-').splitlines()[0]})"
    return None if hasattr(package, "fp8_gemm_nt") else "deep_gemm: this version has no fp8_gemm_nt"


def usable(operator: str, *args: Any) -> bool:
    """Whether `operator` can run on these positional arguments."""
    first = args[0]
    if operator != "gemm_nt" or not isinstance(first, Tensor) or first.device.type != "cuda":
        return False
    device = torch.cuda.current_device() if first.device.index is None else first.device.index
    return misfit(*args) is None and why_not(device) is None
