"""A mixture of routed and shared experts (DeepSeek-V3 report, section 2.1.2), dropless.

    route -> dispatch -> experts -> combine
          \\-> shared experts  ------> +

Shape letters: B batch, T tokens of a sequence, h hidden size.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from megatron_ext.comm.dispatch import Dispatcher
from megatron_ext.fp8 import Precision
from megatron_ext.layers.expert_phases import Combine, Dispatch, transit
from megatron_ext.layers.experts import Experts
from megatron_ext.layers.mlp import MLP
from megatron_ext.layers.phases import Exchange, Passage, Phase, whole
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
        self.dispatcher = replace(
            self.dispatcher, dispatch_dtype=precision.dispatch_dtype, combine_dtype=precision.combine_dtype,
            cache_fp8=precision.fp8 and precision.activation_cache, backend=precision.backend)

    def phases(self, chunks: int | None = None) -> list[Phase | Exchange]:
        """From "tokens" [T, h], "weights" and "experts" [T, k] (`route`) to "mixed" and, with shared experts, "shared",
        both [T, h] (layers/phases.py). The shared experts, which `recompute` calls mlp too, need only the tokens: under
        a pipeline they lie behind the dispatch.

        Args:
            chunks: of experts; by default as many as the dispatcher has.
        """
        dispatcher = self.dispatcher if chunks is None else replace(self.dispatcher, chunks=chunks)
        shared = self.shared_experts
        return [
            Dispatch(dispatcher),
            *([] if shared is None else [Phase("mlp", ("tokens",), ("shared",), lambda _, tokens: shared(tokens))]),
            *(Phase("mlp", (f"rows.{c}",), (f"results.{c}",), partial(self._experts, c))
              for c in range(dispatcher.parts)),
            Combine(dispatcher)]

    @property
    def outputs(self) -> tuple[str, ...]:
        """What `phases` write, to be summed."""
        return ("mixed",) if self.shared_experts is None else ("mixed", "shared")

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, h] -> itself, weights and experts [T, k]: what `phases` read."""
        routing = self.gate(tokens)
        return tokens, routing.weights, routing.experts

    def _experts(self, chunk: int, passage: Passage, rows: Tensor) -> Tensor:
        return self.experts(rows, transit(passage).group_sizes(chunk))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, h] -> [B, T, h], in the dtype of x. All ranks of the expert group must call it together."""
        route = Phase("route", ("x",), ("tokens", "weights", "experts"), lambda _, tokens: self.route(tokens))
        total = Phase("sum", self.outputs, ("x",), lambda _, *outputs: sum(outputs[1:], outputs[0]))
        return whole([route, *self.phases(chunks=1), total], x.flatten(0, -2)).view_as(x)
