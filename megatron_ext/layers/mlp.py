"""The SwiGLU feed-forward network of dense layers and shared experts (DeepSeek-V2 report, section 2.2).

Letters: h hidden, I intermediate.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ext import fp8
from megatron_ext.fp8 import Precision, QuantizedInput
from megatron_ext.layers.linear import PrecisionLinear
from megatron_ext.layers.protocol import LayerConfig


class MLP(nn.Module):
    """y = down(silu(gate(x)) * up(x)).

    Args:
        config: reads `hidden_size`, `intermediate_size`, `initializer_range`.
        intermediate_size: I where it is not the config's (shared experts: `n_shared_experts * moe_intermediate_size`).
    """

    def __init__(self, config: LayerConfig, intermediate_size: int | None = None):
        super().__init__()
        hidden, inner = config.hidden_size, intermediate_size or config.intermediate_size
        std = config.initializer_range
        self.gate_proj = PrecisionLinear(hidden, inner, std=std)
        self.up_proj = PrecisionLinear(hidden, inner, std=std)
        self.down_proj = PrecisionLinear(inner, hidden, std=std)

    def set_precision(self, precision: Precision) -> None:
        for projection in (self.gate_proj, self.up_proj, self.down_proj):
            projection.set_precision(precision)

    @property
    def precision(self) -> Precision | None:
        return self.gate_proj.precision

    def forward(self, x: Tensor | QuantizedInput) -> Tensor:
        """[..., h] -> [..., h], in the dtype of x; quantised already only where the precision is FP8."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if self.precision is not None and self.precision.fp8:
            return fp8.swiglu(x, gate.weight, up.weight, down.weight, precision=self.precision)
        return down(F.silu(gate(x)) * up(x))
