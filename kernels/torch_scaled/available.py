"""Whether torch's block-scaled products can run: on this machine (`why_not`), and on these arguments (`usable`)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from megatron_ext.kernels.torch_scaled.gemm import misfit

_CUDA = (12, 9)
"""The CUDA whose cuBLAS has products scaled by 1x128 tiles and 128x128 blocks, for compute capability 9.0 alone."""


@functools.cache
def why_not(device: int = 0) -> str | None:
    """None if `F.scaled_mm` multiplies FP8 in blocks on GPU `device`, else one line that says why not. Never raises."""
    if not hasattr(torch.nn.functional, "scaled_mm"):
        return f"torch scaled_mm: torch {torch.__version__} has no torch.nn.functional.scaled_mm"
    if torch.version.cuda is None:
        return "torch scaled_mm: this torch is built without CUDA"
    if tuple(map(int, torch.version.cuda.split(".")[:2])) < _CUDA:
        return f"torch scaled_mm: torch is built with CUDA {torch.version.cuda}, blocks of scales need 12.9"
    try:
        if not torch.cuda.is_available() or device >= torch.cuda.device_count():
            return "torch scaled_mm: no GPU"
        major, minor = torch.cuda.get_device_capability(device)
    except RuntimeError as error:
        return f"torch scaled_mm: {str(error).splitlines()[0]}"
    if (major, minor) != (9, 0):
        return f"torch scaled_mm: GPU {device} has compute capability {major}.{minor}, blocks of scales need 9.0"
    return None


def usable(operator: str, *args: Any) -> bool:
    """Whether `operator` can run on these positional arguments."""
    first = args[0]
    if operator != "gemm_nt" or not isinstance(first, Tensor) or first.device.type != "cuda":
        return False
    device = torch.cuda.current_device() if first.device.index is None else first.device.index
    return misfit(*args) is None and why_not(device) is None
