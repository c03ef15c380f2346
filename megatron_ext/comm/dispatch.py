"""Tokens to the ranks of their experts and back (DeepSeek-V3 report, sections 3.2.2 and 3.3.2).

Dropless and uneven: a row per (token, expert) travels, as many as the router chose, zero included. Four steps on plain
tensors of bytes are all there is, so that a schedule can later start and finish them apart:

    plan       who sends how many rows to whom; the one exchange whose result the host must wait for
    pack       permute rows so that those for one rank, and within it one expert, are neighbours
    exchange   all-to-all of bytes, one message per destination
    unpack     permute what came so that the rows of an expert are neighbours

Going out, rows are in `dispatch_dtype` (FP8 halves the traffic); coming back in `combine_dtype`. Backward likewise: the
gradient of `combine` goes out like a token, the gradient of `dispatch` comes back like a result; rounding has the
identity as its gradient.

Shape letters: T tokens here, k experts of a token, E experts, N ranks of the group, R rows received, h hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_ext.comm.wire import FORMATS, decode, encode, row_bytes
from megatron_ext.config.errors import UserError
from megatron_ext.kernels.registry import AUTO
from megatron_ext.parallel.expert_parallel import ExpertParallel

_MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class DispatchError(UserError):
    """Ranks of an expert group do not agree on what they send each other."""


@dataclass(frozen=True)
class DispatchPlan:
    """The way of the rows of one micro-batch through one layer.

    Attributes:
        experts_per_token: k.
        pack: [T*k] int64; row i that leaves is copy pack[i], and copy c belongs to token c // k.
        unpack_copies: [T*k] int64, its inverse.
        rows_sent: per rank of the group.
        rows_received: per rank of the group; sums to R.
        unpack: [R] int64; row i of the experts is received row unpack[i]. None where they are in order already.
        pack_results: [R] int64, its inverse, or None.
        group_sizes: rows of each of the E/N experts of this rank; sums to R.
    """

    experts_per_token: int
    pack: Tensor
    unpack_copies: Tensor
    rows_sent: list[int]
    rows_received: list[int]
    unpack: Tensor | None
    pack_results: Tensor | None
    group_sizes: list[int]


def inverse_permutation(permutation: Tensor) -> Tensor:
    """[n] int64 -> [n] int64 with inverse[permutation[i]] = i."""
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(permutation), device=permutation.device)
    return inverse


def exchange(rows: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
    """All-to-all of rows; `sent[r]` rows go to rank r of the group, `received[r]` come from it, in rank order.

    Works for every backend and device: gloo has no all-to-all for CUDA tensors, so those are staged through the host.
    """
    # A non-contiguous input is read as if it were contiguous, without an error.
    rows = rows.contiguous()
    staged = rows.is_cuda and dist.get_backend(group) == "gloo"
    source = rows.cpu() if staged else rows
    target = source.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(target, source, received, sent, group=group)
    return target.to(rows.device) if staged else target


@dataclass(frozen=True)
class Dispatcher:
    """Moves the tokens of one layer.

    Attributes:
        num_experts: E.
        ep: where they live; without a group nothing is sent, but rows are rounded as if.
        dispatch_dtype: `model`, `bf16` or `fp8`.
        combine_dtype: `model` or `bf16`.
        backend: of the kernels that quantise for `fp8`.
    """

    num_experts: int
    ep: ExpertParallel
    dispatch_dtype: str = "model"
    combine_dtype: str = "model"
    backend: str = AUTO

    def plan(self, experts: Tensor, x: Tensor) -> DispatchPlan:
        """Agrees with the group on who sends what.

        Costs one small all-to-all, and on CUDA the host waits for it, for the sizes of messages and of matrix products.

        Args:
            experts: [T, k] int64, the router's choice.
            x: [T, h], the tokens to be sent; only its shape and dtype matter.

        Raises:
            DispatchError: on every rank that meets a peer with another hidden size, dtype or format.
        """
        flat = experts.flatten()
        pack = flat.argsort(stable=True)
        counts = torch.zeros(self.num_experts, dtype=torch.int64, device=x.device)
        counts.scatter_add_(0, flat, torch.ones_like(flat))
        k, unpack_copies = experts.shape[-1], inverse_permutation(pack)
        if self.ep.size == 1:
            return DispatchPlan(k, pack, unpack_copies, rows_sent=[len(flat)], rows_received=[len(flat)], unpack=None,
                                pack_results=None, group_sizes=counts.tolist())

        sent_NE = counts.unflatten(0, (self.ep.size, -1))
        received_NE, rows_sent, received = self._exchange_counts(sent_NE, x)
        # Received rows lie by rank, then expert; the experts want them by expert, then rank.
        rows_received = [sum(row) for row in received]
        local = torch.arange(received_NE.shape[1], device=x.device).repeat(self.ep.size)
        expert_of_row = local.repeat_interleave(received_NE.flatten(), output_size=sum(rows_received))
        unpack = expert_of_row.argsort(stable=True)
        return DispatchPlan(k, pack, unpack_copies, rows_sent, rows_received, unpack, inverse_permutation(unpack),
                            group_sizes=[sum(column) for column in zip(*received, strict=True)])

    def _exchange_counts(self, sent_NE: Tensor, x: Tensor) -> tuple[Tensor, list[int], list[list[int]]]:
        """Tells every rank how many rows each of its experts gets from here.

        Args:
            sent_NE: [N, E/N] int64.

        Returns:
            The same from each rank, for the experts here; rows sent to each rank; the first again, on the host.
        """
        # Backends accept a message of the wrong size or dtype silently, so each says what it is about to send.
        mine = [x.shape[-1], _MODEL_DTYPES.index(x.dtype), FORMATS.index(self.dispatch_dtype),
                FORMATS.index(self.combine_dtype)]
        header = torch.tensor(mine, device=x.device).expand(self.ep.size, -1)
        ones = [1] * self.ep.size
        received = self._exchange(torch.cat((header, sent_NE), dim=1), ones, ones)
        on_host = torch.cat((received, sent_NE.sum(1, keepdim=True)), dim=1).tolist()
        for rank, row in enumerate(on_host):
            theirs = row[: len(mine)]
            if theirs != mine:
                raise DispatchError(f"expert dispatch: rank {rank} of the expert group sends {_describe(theirs)}, "
                                    f"rank {self.ep.rank} sends {_describe(mine)}; all ranks must run the same model")
        return received[:, len(mine) :], [row[-1] for row in on_host], [row[len(mine) : -1] for row in on_host]

    def dispatch(self, x: Tensor, plan: DispatchPlan) -> Tensor:
        """Tokens to experts.

        Args:
            x: [T, h] in the model's dtype.

        Returns:
            [R, h] in the same dtype, sorted by expert as `plan.group_sizes` says.
        """
        return _Dispatch.apply(x, plan, self)

    def combine(self, y: Tensor, weights: Tensor, plan: DispatchPlan) -> Tensor:
        """Results back to their tokens, summed with the router's weights in FP32.

        Args:
            y: [R, h], results of the experts in the order that `dispatch` gave.
            weights: [T, k] FP32.

        Returns:
            [T, h] in the dtype of y.
        """
        return _weighted_sum(_Combine.apply(y, plan, self), weights)

    def rows_to_experts(self, rows: Tensor, plan: DispatchPlan, tokens: bool) -> Tensor:
        """[T, b] rows of tokens, or [T*k, b] rows of copies -> [R, b], all uint8."""
        rows = rows[plan.pack // plan.experts_per_token if tokens else plan.pack]
        if self.ep.size > 1:
            rows = self._exchange(rows, plan.rows_sent, plan.rows_received)
        return rows if plan.unpack is None else rows[plan.unpack]

    def rows_to_tokens(self, rows: Tensor, plan: DispatchPlan) -> Tensor:
        """[R, b] rows by expert -> [T*k, b] rows of copies, all uint8."""
        if plan.pack_results is not None:
            rows = rows[plan.pack_results]
        if self.ep.size > 1:
            rows = self._exchange(rows, plan.rows_received, plan.rows_sent)
        return rows[plan.unpack_copies]

    def _exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        assert self.ep.group is not None, "experts on several ranks without a group"
        return exchange(rows, sent, received, self.ep.group)

    def bytes_sent(self, plan: DispatchPlan, hidden: int, dtype: torch.dtype) -> int:
        """Bytes that one forward dispatch sends to other ranks."""
        rows = sum(n for rank, n in enumerate(plan.rows_sent) if rank != self.ep.rank)
        return rows * row_bytes(self.dispatch_dtype, hidden, dtype)


def _describe(header: list[int]) -> str:
    hidden, dtype, dispatch, combine = header
    return f"hidden size {hidden} in {_MODEL_DTYPES[dtype]} (dispatch {FORMATS[dispatch]}, combine {FORMATS[combine]})"


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: DispatchPlan, way: Dispatcher) -> Tensor:
        ctx.plan, ctx.way = plan, way
        rows = way.rows_to_experts(encode(x, way.dispatch_dtype, way.backend), plan, tokens=True)
        return decode(rows, way.dispatch_dtype, x.shape[-1], x.dtype, way.backend)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        plan, way = ctx.plan, ctx.way
        rows = way.rows_to_tokens(encode(dy, way.combine_dtype, way.backend), plan)
        copies = decode(rows, way.combine_dtype, dy.shape[-1], dy.dtype, way.backend)
        copies = copies.unflatten(0, (-1, plan.experts_per_token))
        return copies.sum(1, dtype=_accumulator(dy.dtype)).to(dy.dtype), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, plan: DispatchPlan, way: Dispatcher) -> Tensor:
        ctx.plan, ctx.way = plan, way
        rows = way.rows_to_tokens(encode(y, way.combine_dtype, way.backend), plan)
        copies = decode(rows, way.combine_dtype, y.shape[-1], y.dtype, way.backend)
        return copies.unflatten(0, (-1, plan.experts_per_token))

    @staticmethod
    def backward(ctx: Any, dcopies: Tensor) -> tuple[Tensor, None, None]:
        plan, way = ctx.plan, ctx.way
        rows = way.rows_to_experts(encode(dcopies.flatten(0, 1), way.dispatch_dtype, way.backend), plan, tokens=False)
        return decode(rows, way.dispatch_dtype, dcopies.shape[-1], dcopies.dtype, way.backend), None, None


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _WeightedSum(torch.autograd.Function):
    """Plain autograd would keep an FP32 copy of [T, k, h]; this keeps it in the model's dtype."""

    @staticmethod
    def forward(ctx: Any, copies: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(copies, weights)
        dtype = _accumulator(copies.dtype)
        return (weights.to(dtype).unsqueeze(1) @ copies.to(dtype)).squeeze(1).to(copies.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        copies, weights = ctx.saved_tensors
        dtype = _accumulator(copies.dtype)
        dcopies = (weights.to(dtype).unsqueeze(-1) * dy.to(dtype).unsqueeze(1)).to(copies.dtype)
        dweights = (copies.to(dtype) @ dy.to(dtype).unsqueeze(-1)).squeeze(-1).to(weights.dtype)
        return dcopies, dweights


def _weighted_sum(copies: Tensor, weights: Tensor) -> Tensor:
    """[T, k, h] and [T, k] -> [T, h], accumulated in FP32."""
    return _WeightedSum.apply(copies, weights)
