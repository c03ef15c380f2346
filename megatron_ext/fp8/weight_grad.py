"""Where the weight gradient of a matrix product goes: to the parameter's sink, or back to autograd.

The protocol is described in megatron_ext/layers/linear.py. The gradient is the same closure either way, so both paths
give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def deliver(parameter: Tensor, accumulate: Callable[[Tensor], object]) -> Tensor | None:
    """Hands a weight gradient over.

    Args:
        parameter: the parameter; its attribute `weight_grad_sink` is looked up now.
        accumulate: adds the gradient to the tensor it is given, FP32 and shaped like the parameter.

    Returns:
        None if a sink took the closure, else the gradient in the parameter's dtype, for autograd.
    """
    sink = getattr(parameter, "weight_grad_sink", None)
    if sink is not None:
        sink(parameter, accumulate)
        return None
    grad = torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32),
                            memory_format=torch.contiguous_format)
    accumulate(grad)
    return grad.to(parameter.dtype)
