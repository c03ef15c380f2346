"""A micro-batch's tokens through the experts of one layer: there and back, and once more in backward.

Transport (collective.py, or deep_ep.py) brings *copies*: one of each token that this rank has an expert for. Here they
become rows of experts, one per (copy, expert), sorted by (expert, source rank, token); and results of experts become
one sum per copy, which the transport takes back:

    sum of a copy = sum over its experts e here of weight_e * result_e             FP32, experts in order
    token         = sum over ranks (two hops: over nodes, of sums over ranks) of what they send in combine_dtype

Backward, the gradient of the output goes out as a token does. On the rank of an expert,

    d result_e = weight_e * d copy,   d weight_e = <result_e, d copy>,   d copy = sum over e of d row_e

No order and no rounding depends on chunks, nor do rows depend on hops, so neither changes a row, and chunks no result.

Shape letters: T tokens here, k experts of a token, C copies here, R_c rows of chunk c, h hidden size, e experts here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from megatron_ext import fp8
from megatron_ext.comm.copies import Copies, Transport
from megatron_ext.comm.route import Segments, Terms
from megatron_ext.fp8 import QuantizedTensor
from megatron_ext.kernels.registry import AUTO

_EXPERT_SHIFT = 48  # an origin is (rank << 32) + token, below 1 << 48


class Transit:
    """The way of one micro-batch through one layer; made by `Dispatcher.announce`.

    Starts return at once, finishes wait; between a start and its finish anything may be computed. All ranks of the
    expert group must start everything, over all transits, in the same order. Finishes are called for chunk 0, 1, ... in
    order. On CUDA all is called on one stream, or on streams that wait for each other; NCCL has its own. Nothing here
    is part of an autograd graph. After its last use a transit holds indices only, no activations.

    Attributes:
        chunks: how many parts the experts of this rank are cut into.
    """

    def __init__(self, transport: Transport, terms: Terms, experts_here: tuple[int, int], *, cache_fp8: bool = False,
                 backend: str = AUTO):
        self.chunks = terms.chunks
        self._cache_fp8, self._backend = cache_fp8, backend
        self._transport, self._terms = transport, terms
        self._first_expert, last = experts_here
        self._width = (last - self._first_expert) // terms.chunks
        self._groups: list[int] | None = None
        self._parts: list[Copies] = []
        self._payload: Tensor | None = None
        self._pairs: list[Tensor] = []  # per chunk [R_c], copy * k + slot of each row

    def group_sizes(self, chunk: int | None = None) -> list[int]:
        """Rows of each of the e experts here; 0 for experts of other chunks, if one is asked for."""
        assert self._groups is not None, "the counts of the other ranks are waited for in start_dispatch"
        if chunk is None:
            return list(self._groups)
        first, last = chunk * self._width, (chunk + 1) * self._width
        return [size if first <= e < last else 0 for e, size in enumerate(self._groups)]

    def rows(self, chunk: int) -> int:
        """R_c."""
        return sum(self.group_sizes(chunk))

    @torch.no_grad()
    def start_dispatch(self, tokens: Tensor, weights: Tensor) -> None:
        """Waits for the counts (on CUDA the one wait of the host) and sends the tokens.

        Args:
            tokens: [T, h], as announced.
            weights: [T, k] FP32; FP64 for FP64 tokens.

        Raises:
            DispatchError: the ranks disagree, or one is gone.
        """
        self._groups = self._transport.start_dispatch(tokens, weights)

    @torch.no_grad()
    def finish_dispatch(self, chunk: int) -> tuple[Tensor, Tensor]:
        """The rows of a chunk's experts [R_c, h] in the model's dtype, and their weights [R_c] in FP32 (or FP64)."""
        assert chunk == len(self._pairs), "chunks are finished in order"
        here = self._transport.finish_dispatch(chunk)
        self._parts.append(here)
        payload = self._gather_payload(here.payload, chunk)
        so_far = [(part.weights, part.experts, part.origin) for part in self._parts]
        weights, experts, origin = (joined(list(each)) for each in zip(*so_far, strict=True))
        experts = experts - self._first_expert

        first = chunk * self._width
        wanted = (experts >= first) & (experts < first + self._width)
        pairs = wanted.flatten().nonzero_static(size=self.rows(chunk)).squeeze(1)
        key = (experts.flatten()[pairs] << _EXPERT_SHIFT) + origin[pairs // self._k]
        pairs = pairs[key.argsort(stable=True)]
        self._pairs.append(pairs)
        if chunk == self.chunks - 1:
            self._parts.clear()
        return payload.index_select(0, pairs // self._k), weights.flatten()[pairs]

    def _gather_payload(self, part: Tensor, chunk: int) -> Tensor:
        """All copies so far, [C', h]; rows of a chunk may be of copies that came before. Forgets them at the end."""
        if self.chunks == 1:
            return part
        if self._payload is None:
            self._payload = part.new_empty(self._transport.copies, part.shape[-1])
            self._came = 0
        self._payload[self._came : self._came + len(part)] = part
        self._came += len(part)
        payload = self._payload[: self._came]
        if chunk == self.chunks - 1:
            self._payload = None
        return payload

    @torch.no_grad()
    def start_combine(self, results: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        """Sends the results of experts back.

        Args:
            results: per chunk [R_c, h].
            weights: per chunk [R_c], as `finish_dispatch` gave them.
        """
        accumulate = torch.promote_types(self._terms.dtype, torch.float32)
        weight = joined(weights).to(accumulate)
        self._transport.start_combine(self._segments.sum(joined(results).to(accumulate), weight))

    @torch.no_grad()
    def finish_combine(self) -> Tensor:
        """[T, h] in the model's dtype."""
        return self._transport.finish_combine().to(self._terms.dtype)

    @torch.no_grad()
    def start_combine_backward(self, dy: Tensor) -> None:
        """Sends the gradient of the output, [T, h]."""
        self._transport.start_combine_backward(dy)
        self._finished = 0

    @torch.no_grad()
    def keep(self, results: Tensor) -> Tensor | QuantizedTensor:
        """What stays of results [R_c, h] until backward, where only the gradients of the router's weights need them: in
        FP8 if the model caches its activations so, which a sum over h numbers averages out."""
        if not self._cache_fp8:
            return results
        return fp8.quantize(results, power_of_two=True, backend=self._backend)

    @torch.no_grad()
    def finish_combine_backward(self, chunk: int, results: Tensor | QuantizedTensor,
                                weights: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of a chunk's results and weights.

        Args:
            results: [R_c, h], those given to `start_combine`, as `keep` left them.
            weights: [R_c], likewise.

        Returns:
            [R_c, h] in the dtype of the model, and [R_c] in that of the weights.
        """
        assert chunk == self._finished, "chunks are finished in order"
        self._finished += 1
        payload = self._gather_payload(self._transport.finish_combine_backward(chunk), chunk)
        dcopies = payload.index_select(0, self._pairs[chunk] // self._k).to(weights.dtype)
        if isinstance(results, QuantizedTensor):
            results = results.dequantize(weights.dtype, backend=self._backend)
        dweights = (results.to(weights.dtype) * dcopies).sum(-1)
        return dcopies.mul_(weights.unsqueeze(-1)).to(self._terms.dtype), dweights

    @torch.no_grad()
    def start_dispatch_backward(self, drows: Sequence[Tensor], dweights: Sequence[Tensor]) -> None:
        """Sends the gradients of rows, per chunk [R_c, h], and of their weights, per chunk [R_c], back."""
        rows, weights = joined(drows), joined(dweights)
        accumulate = torch.promote_types(self._terms.dtype, torch.float32)
        by_copy = weights.new_zeros(self._transport.copies * self._k, dtype=accumulate)
        by_copy.index_copy_(0, joined(self._pairs), weights.to(accumulate))
        self._transport.start_dispatch_backward(self._segments.sum(rows.to(accumulate)), by_copy.view(-1, self._k))

    @torch.no_grad()
    def finish_dispatch_backward(self) -> tuple[Tensor, Tensor]:
        """Gradients of the tokens [T, h] in the model's dtype, and of the weights [T, k] in FP32 (or FP64)."""
        dtokens, dweights = self._transport.finish_dispatch_backward()
        return dtokens.to(self._terms.dtype), dweights

    @torch.no_grad()
    def advance(self) -> None:
        """With two hops: waits for the first hop of what is under way and starts the second; else nothing.

        To be called where a phase of computation ends, so that both hops lie behind computation. All ranks of the
        expert group must call it at the same place. A finish does what has not been done.
        """
        self._transport.advance()

    @property
    def _k(self) -> int:
        return self._terms.experts_per_token

    @cached_property
    def _segments(self) -> Segments:
        """The rows of each copy. They lie by expert whatever the chunks, so the sums have one order."""
        return Segments(joined(self._pairs) // self._k, self._transport.copies)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """`torch.cat` that does not copy a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
