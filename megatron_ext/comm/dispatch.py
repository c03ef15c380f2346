"""Tokens to the ranks of their experts and back (DeepSeek-V3 report, sections 3.2.2 and 3.3.2).

Dropless and uneven: as many rows travel as the router chose, zero included. What layers and the pipeline use:

    Dispatcher   the settings of one layer; `announce` begins the way of a micro-batch
    Transit      that way, with a start and a finish for each of its parts (transit.py)
    dispatch, combine   the same as operations of an autograd graph, for who has nothing to do in between

Going out, rows are in `dispatch_dtype` (FP8 halves the traffic); coming back in `combine_dtype`. Backward likewise: the
gradient of `combine` goes out like a token, the gradient of `dispatch` comes back like a result; rounding has the
identity as its gradient.

Where the host waits on CUDA: once per forward, in `Transit.start_dispatch`, for the numbers of rows of the other ranks,
on which the sizes of messages and of matrix products depend. Backward does not wait (with Triton, that is: the torch
reference quantises rows by masks, whose sizes it reads). Over gloo it waits in each finish too, and for the device at
each start. (DeepEP waits likewise, inside its dispatch.)

Shape letters: T tokens here, k experts of a token, E experts, N ranks of the group, R rows here, h hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.comm.collective import Collective
from megatron_ext.comm.copies import Transport
from megatron_ext.comm.deep_ep import DeepEP
from megatron_ext.comm.exchange import DispatchError
from megatron_ext.comm.route import Terms
from megatron_ext.comm.traffic import Traffic
from megatron_ext.comm.transit import Transit, joined
from megatron_ext.comm.wire import MAX_EXPERTS
from megatron_ext.config.errors import ConfigError
from megatron_ext.fp8 import QuantizedTensor
from megatron_ext.kernels.registry import AUTO
from megatron_ext.parallel.expert_parallel import ExpertParallel

__all__ = ["DispatchError", "Dispatcher", "Transit", "combine", "dispatch"]


@dataclass(frozen=True)
class Dispatcher:
    """Moves the tokens of one layer.

    Attributes:
        num_experts: E.
        ep: where they live; without a group nothing is sent, but rows are rounded as if.
        dispatch_dtype: `model`, `bf16` or `fp8`.
        combine_dtype: `model` or `bf16`.
        cache_fp8: whether results of experts stay for backward in FP8.
        backend: of the kernels that quantise.
        chunks: how many parts the experts of a rank are cut into, so that the first can compute while the others'
            tokens travel; the next smaller divisor of E/N is taken. Changes no result (on CPUs the experts' width must
            be a multiple of 32 for that: torch's SiLU rounds the end of a tensor otherwise than full vectors).
        two_hop: whether tokens travel over `ep.inter` and `ep.intra`; makes no difference in one node, or with one
            rank on each.
        traffic: where bytes and waits are counted.
        buffer: of DeepEP (`deep_ep.connect`), through which everything then goes, uncounted and in one chunk.

    Raises:
        ConfigError: more experts than travel in 16 bits, no chunks, or two hops without a node layout.
    """

    num_experts: int
    ep: ExpertParallel
    dispatch_dtype: str = "model"
    combine_dtype: str = "model"
    cache_fp8: bool = False
    backend: str = AUTO
    chunks: int = 1
    two_hop: bool = False
    traffic: Traffic | None = None
    buffer: Any = None

    def __post_init__(self) -> None:
        if self.num_experts > MAX_EXPERTS:
            raise ConfigError("n_routed_experts", self.num_experts, f"must be at most {MAX_EXPERTS}")
        if self.chunks < 1:
            raise ConfigError("megatron_ext.expert_parallel.dispatch_chunks", self.chunks, "must be at least 1")
        if self.two_hop and self.ep.size > 1 and self.ep.layout is None:
            raise ConfigError("megatron_ext.expert_parallel.two_hop", True, "needs to know which ranks share a node",
                              "set megatron_ext.expert_parallel.ranks_per_node")

    @property
    def parts(self) -> int:
        """How many chunks there really are."""
        if self.buffer is not None:
            return 1
        first, last = self.ep.expert_range(self.num_experts)
        return next(n for n in range(min(self.chunks, last - first), 0, -1) if (last - first) % n == 0)

    def announce(self, experts: Tensor, tokens: Tensor) -> Transit:
        """Tells the other ranks how many rows they will get; returns at once.

        Args:
            experts: [T, k] int64, the router's choice, distinct within a token.
            tokens: [T, h], what will be sent; only dtype and h matter.

        Raises:
            DispatchError: a peer is known to be gone.
        """
        first, last = self.ep.expert_range(self.num_experts)
        layout = self.ep.layout if self.two_hop and self.ep.inter is not None else None
        per_node = 0 if layout is None else layout.ranks_per_node
        terms = Terms(self.num_experts, experts.shape[-1], tokens.shape[-1], tokens.dtype, self.dispatch_dtype,
                      self.combine_dtype, self.parts, per_node)
        with torch.no_grad():
            if self.buffer is not None:
                transport: Transport = DeepEP(experts, terms, self.ep, self.buffer, self.backend)
            else:
                transport = Collective(experts, terms, self.ep, self.traffic, self.backend)
        return Transit(transport, terms, (first, last), cache_fp8=self.cache_fp8, backend=self.backend)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, transit: Transit, tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        ctx.transit, ctx.dtype = transit, weights.dtype
        transit.start_dispatch(tokens, weights)
        rows, row_weights = zip(*(transit.finish_dispatch(chunk) for chunk in range(transit.chunks)), strict=True)
        return joined(rows), joined(row_weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows: Tensor, dweights: Tensor) -> tuple[None, Tensor, Tensor]:
        sizes = [ctx.transit.rows(chunk) for chunk in range(ctx.transit.chunks)]
        ctx.transit.start_dispatch_backward(drows.split(sizes), dweights.split(sizes))
        dtokens, dweights = ctx.transit.finish_dispatch_backward()
        return None, dtokens, dweights.to(ctx.dtype)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, transit: Transit, results: Tensor, row_weights: Tensor) -> Tensor:
        ctx.transit = transit
        kept = transit.keep(results)
        ctx.save_for_backward(row_weights, *((kept,) if isinstance(kept, Tensor) else (kept.data, kept.scale)))
        sizes = [transit.rows(chunk) for chunk in range(transit.chunks)]
        transit.start_combine(results.split(sizes), row_weights.split(sizes))
        return transit.finish_combine()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor, Tensor]:
        transit = ctx.transit
        row_weights, *kept = ctx.saved_tensors
        sizes = [transit.rows(chunk) for chunk in range(transit.chunks)]
        transit.start_combine_backward(dy)
        split = zip(*(part.split(sizes) for part in kept), strict=True)
        results = [part[0] if len(part) == 1 else QuantizedTensor(*part) for part in split]
        parts = zip(range(transit.chunks), results, row_weights.split(sizes), strict=True)
        dresults, dweights = zip(*(transit.finish_combine_backward(*part) for part in parts), strict=True)
        return None, joined(dresults), joined(dweights)


def dispatch(transit: Transit, tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens to experts, differentiable; starts the dispatch and waits for it.

    Args:
        tokens: [T, h] in the model's dtype.
        weights: [T, k] FP32, the router's; FP64 may be given for FP64 tokens.

    Returns:
        Rows [R, h], sorted by expert as `transit.group_sizes()` says, and their weights [R].
    """
    return _Dispatch.apply(transit, tokens, weights)


def combine(transit: Transit, results: Tensor, row_weights: Tensor) -> Tensor:
    """Results back to their tokens, summed with the router's weights in FP32; differentiable.

    Args:
        results: [R, h], of the experts, in the order that `dispatch` gave.
        row_weights: [R], as `dispatch` gave them.

    Returns:
        [T, h] in the dtype of the tokens.
    """
    return _Combine.apply(transit, results, row_weights)
