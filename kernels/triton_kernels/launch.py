"""How kernels are started: with FP fusion pinned, on the tensors' device, and with nothing read back from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

READ_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What kernels load; other dtypes are converted to FP32 before, as the reference does."""


def launch(kernel: Any, programs: int, *args: Any, num_warps: int, num_stages: int = 3, fusion: bool = False,
           **constants: Any) -> None:
    """Runs `programs` programs of a kernel; none if that is 0.

    Args:
        kernel: a `triton.jit` function.
        args: its runtime arguments; the first that is a tensor says the device.
        fusion: whether a product and a sum may become one FMA. Byte-exact kernels forbid it; never left to Triton's
            default, which changes with the version (and with an environment variable).
        constants: its constexpr arguments.
    """
    if programs == 0:
        return
    with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, Tensor))):
        kernel[(programs,)](
            *args, **constants, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=fusion)  # fmt: skip


def readable(x: Tensor) -> Tensor:
    """x in a dtype that kernels load, each row's numbers side by side (any stride between rows)."""
    x = x.detach()
    x = x if x.dtype in READ_DTYPES else x.float()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def on_device(group_sizes: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """Group sizes as kernels read them; only a list costs a copy."""
    sizes = torch.as_tensor(group_sizes, dtype=torch.int64, device=device)
    assert sizes.is_contiguous(), "kernels read the sizes side by side"
    return sizes


def raw(data: Tensor) -> Tensor:
    """FP8 data as the bytes that kernels write; a view."""
    return data.view(torch.uint8)
