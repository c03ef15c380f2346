"""The routed experts of one layer that live on this rank: SwiGLU networks stacked in one parameter per matrix.

Gate and up are apart, for blocks of 128 x 128 that share a scale must not straddle them.

Shape letters: E experts of the layer, L = E/N of them here, I intermediate size, h hidden size, R rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ext import fp8
from megatron_ext.fp8 import Precision
from megatron_ext.layers.protocol import LayerConfig
from megatron_ext.parallel.expert_parallel import ExpertParallel


def draw_normal(shape: tuple[int, ...], std: float, seed: int, name: str, index: int) -> Tensor:
    """N(0, std^2) in FP32 on the CPU, keyed by (seed, name, index): the same wherever an expert lives."""
    key = hashlib.blake2b(f"{seed}/{name}/{index}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
    return torch.empty(shape, dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator)


class Experts(nn.Module):
    """L experts of width I.

    The parameters exist only after `set_expert_parallel`. Each carries `expert_range` (first, one past the last) and
    `num_experts`; where the placement has a name, also `allreduce = False` and `group_name`, by which DeepSpeed reduces
    its gradient over the replicas of these experts only.

    Attributes:
        gate_proj, up_proj: [L, I, h].
        down_proj: [L, h, I].
    """

    gate_proj: nn.Parameter | None
    up_proj: nn.Parameter | None
    down_proj: nn.Parameter | None

    def __init__(self, config: LayerConfig, canonical_name: str):
        super().__init__()
        self.num_experts: int = config.n_routed_experts
        self.hidden_size: int = config.hidden_size
        self.intermediate_size: int = config.moe_intermediate_size
        self.initializer_range: float = config.initializer_range
        self.canonical_name = canonical_name
        self.precision = Precision()
        self._seed = torch.initial_seed()
        for name in ("gate_proj", "up_proj", "down_proj"):
            self.register_parameter(name, None)

    def set_expert_parallel(self, ep: ExpertParallel) -> None:
        """Allocates and draws the experts of this rank, in torch's default dtype and device.

        Raises:
            ConfigError: if the experts do not divide over the group.
        """
        if self.gate_proj is not None:
            raise RuntimeError(f"{self.canonical_name}: set_expert_parallel a second time would discard the parameters")
        wide, tall = (self.intermediate_size, self.hidden_size), (self.hidden_size, self.intermediate_size)
        self.gate_proj = self._allocate("gate_proj", wide, ep)
        self.up_proj = self._allocate("up_proj", wide, ep)
        self.down_proj = self._allocate("down_proj", tall, ep)

    def _allocate(self, matrix: str, shape: tuple[int, int], ep: ExpertParallel) -> nn.Parameter:
        first, last = ep.expert_range(self.num_experts)
        name = f"{self.canonical_name}.{matrix}"
        parameter = nn.Parameter(torch.empty(last - first, *shape))
        if not parameter.is_meta:
            with torch.no_grad():
                for expert in range(first, last):
                    drawn = draw_normal(shape, self.initializer_range, self._seed, name, expert)
                    parameter[expert - first].copy_(drawn)
        parameter.expert_range = (first, last)
        parameter.num_experts = self.num_experts
        if ep.name is not None:
            parameter.allreduce = False
            parameter.group_name = ep.name
        return parameter

    def set_precision(self, precision: Precision) -> None:
        """Chooses FP8 or the model's dtype for the matrix products."""
        self.precision = precision

    def forward(self, x: Tensor, group_sizes: Sequence[int]) -> Tensor:
        """down(silu(gate(x)) * up(x)), each row by its expert.

        Args:
            x: [R, h] sorted by expert; R may be 0.
            group_sizes: L numbers, rows of each expert; sums to R.

        Returns:
            [R, h] in the dtype of x.
        """
        if self.gate_proj is None or self.up_proj is None or self.down_proj is None:
            raise RuntimeError(f"{self.canonical_name} has no parameters yet: call set_expert_parallel after building")
        if self.precision.fp8:
            return fp8.swiglu(x, self.gate_proj, self.up_proj, self.down_proj, group_sizes, precision=self.precision)
        gate = fp8.grouped_linear(x, group_sizes, self.gate_proj, precision=self.precision)
        up = fp8.grouped_linear(x, group_sizes, self.up_proj, precision=self.precision)
        return fp8.grouped_linear(F.silu(gate) * up, group_sizes, self.down_proj, precision=self.precision)
