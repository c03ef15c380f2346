"""A mixture of routed and shared experts (DeepSeek-V3 report, section 2.1.2), dropless.

    route -> dispatch -> experts -> combine
          \\-> shared experts  ------> +

Shape letters: B batch, T tokens of a sequence, h hidden size.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from megatron_ext.comm.dispatch import Dispatcher, combine, dispatch
from megatron_ext.fp8 import Precision
from megatron_ext.layers.experts import Experts
from megatron_ext.layers.mlp import MLP
from megatron_ext.layers.protocol import LayerConfig
from megatron_ext.layers.router import Router
from megatron_ext.parallel.expert_parallel import ExpertParallel


class MoE(nn.Module):
    """The MLP of a sparse block. `set_expert_parallel` must follow the constructor: it allocates the routed experts.

    Attributes:
        gate: the router.
        experts: this rank's routed experts.
        shared_experts: one MLP as wide as all shared experts, or None.
    """

    def __init__(self, config: LayerConfig, layer_index: int):
        super().__init__()
        name = f"model.layers.{layer_index}.mlp"
        self.gate = Router(config)
        self.experts = Experts(config, f"{name}.experts")
        shared = config.n_shared_experts
        self.shared_experts = MLP(config, config.moe_intermediate_size * shared) if shared else None
        self.dispatcher = Dispatcher(config.n_routed_experts, ExpertParallel.single())

    def set_expert_parallel(self, ep: ExpertParallel) -> None:
        """Places the experts; see `Experts.set_expert_parallel`."""
        self.experts.set_expert_parallel(ep)
        self.dispatcher = replace(self.dispatcher, ep=ep)

    def set_precision(self, precision: Precision) -> None:
        """Chooses FP8 for the matrix products and the formats of dispatch and combine."""
        self.experts.set_precision(precision)
        if self.shared_experts is not None:
            self.shared_experts.set_precision(precision)
        self.dispatcher = replace(self.dispatcher, dispatch_dtype=precision.dispatch_dtype,
                                  combine_dtype=precision.combine_dtype, backend=precision.backend)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, h] -> [B, T, h], in the dtype of x. All ranks of the expert group must call it together."""
        tokens = x.flatten(0, -2)
        routing = self.gate(tokens)
        transit = self.dispatcher.announce(routing.experts, tokens)
        transit.start_dispatch(tokens, routing.weights)
        shared = None if self.shared_experts is None else self.shared_experts(tokens)  # while tokens travel
        rows, weights = dispatch(transit, tokens, routing.weights)
        out = combine(transit, self.experts(rows, transit.group_sizes()), weights)
        return (out if shared is None else out + shared).view_as(x)
