"""The way of rows over torch.distributed, in one hop or in two (DeepSeek-V3 report, section 3.2.2).

    one hop     rank -> ranks that need the token
    two hops    rank -> its counterpart on each node that needs the token -> ranks of that node that need it

Back, the same way in the other direction: a rank sends one sum per copy it got; with two hops the entry rank of a node
adds up those of its ranks before they cross to the source.

Operations of one group run in the order in which they are started, so all ranks of an expert group must start theirs,
over all micro-batches and layers, in the same order; `advance` and the finishes start second hops.

Shape letters: T tokens here, k experts of a token, h hidden size, w words of a row, C copies here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from megatron_ext.comm.copies import Copies
from megatron_ext.comm.exchange import Line, UnderWay
from megatron_ext.comm.route import Hop, Sizes, Terms, announcement, first_local
from megatron_ext.comm.traffic import Traffic
from megatron_ext.comm.wire import Row
from megatron_ext.parallel.expert_parallel import ExpertParallel


class Collective:
    """One micro-batch's way through one layer.

    Args:
        experts: [T, k] int64.
        terms: what the ranks agree on; `terms.two_hop` needs the groups in `ep`.
        ep: the expert group.
        traffic: where bytes and waits are counted.
        backend: of the kernels that quantise.
    """

    def __init__(self, experts: Tensor, terms: Terms, ep: ExpertParallel, traffic: Traffic | None, backend: str):
        self.terms, self.ep, self.traffic = terms, ep, traffic
        h, dtype, k = terms.hidden, terms.dtype, terms.experts_per_token
        self._token = Row(terms.dispatch, h, dtype, k, routed=True, backend=backend)
        self._result = Row(terms.combine, h, dtype, backend=backend)
        self._result_grad = Row(terms.dispatch, h, dtype, backend=backend)
        self._token_grad = Row(terms.combine, h, dtype, k, backend=backend)
        self._experts = experts
        self.hops: list[Hop] = []
        self._on_way: _Outward | _Homeward | None = None
        self._announced = time.perf_counter()
        told, self._first = announcement(experts, terms, ep)
        self._counts = self._line(None).gather("counts", told)

    def _line(self, group: str | None) -> Line:
        """The whole expert group, or the one called `group`."""
        ep, layout = self.ep, self.ep.layout
        members = list(range(ep.size))
        if group is not None and layout is not None:
            parts = layout.across(members) if group == "inter" else layout.within(members)
            members = next(part for part in parts if ep.rank in part)

        def link(peer: int) -> str:
            if peer == ep.rank:
                return "self"
            return "node" if layout is None or layout.node(peer) == layout.node(ep.rank) else "fabric"

        return Line(ep.group if group is None else getattr(ep, group), ep.group, tuple(map(link, members)),
                    self.traffic)

    def start_dispatch(self, tokens: Tensor, weights: Tensor) -> list[int]:
        """Waits on the host for the counts of all ranks, the only such wait of a micro-batch in a layer on CUDA.

        Args:
            tokens: [T, h].
            weights: [T, k].

        Returns:
            Rows of each expert here.

        Raises:
            DispatchError: the ranks disagree, or one is gone.
        """
        sizes = Sizes(self._counts.wait(), self.terms, self.ep)
        if self.traffic is not None:
            self.traffic.done("counts", self._announced)
        experts, first = self._experts, self._first
        del self._experts, self._first
        self._route(first // self._width, sizes)
        origin = torch.arange(len(tokens), device=tokens.device) + (self.ep.rank << 32)
        rows_of = self._token.writer(tokens, weights, experts, origin, copies=self._copies_sent)
        self._on_way = _Outward("dispatch", self, rows_of, self._token, tokens.device)
        return sizes.groups

    def _route(self, chunk_PT: Tensor, sizes: Sizes) -> None:
        """Sets up the hops, and what the first one sends in each chunk."""
        tokens = chunk_PT.shape[1]
        if self.terms.two_hop:
            hop = Hop(self._line("inter"), sizes.between_nodes(), tokens)
            self.hops = [hop, Hop(self._line("intra"), sizes.within_node(), hop.total)]
        else:
            hop = Hop(self._line(None), sizes.one_hop(), tokens)
            self.hops = [hop]
        for _ in range(self.terms.chunks):
            hop.choose(chunk_PT)

    @property
    def _width(self) -> int:
        """Experts of a rank in a chunk."""
        return self.terms.num_experts // self.ep.size // self.terms.chunks

    @property
    def _copies_sent(self) -> int:
        """Rows that the first hop sends, over all chunks."""
        return sum(map(sum, self.hops[0].sent))

    @property
    def copies(self) -> int:
        """C."""
        return self.hops[-1].total

    def finish_dispatch(self, chunk: int) -> Copies:
        rows, row = self._come_out(chunk), self._token
        return Copies(row.payload(rows), row.weights_of(rows), row.experts_of(rows), row.origin_of(rows))

    def start_combine(self, sums: Tensor) -> None:
        """[C, h] in the accumulator's dtype."""
        self._on_way = _Homeward("combine", self, sums, None, self._result)

    def finish_combine(self) -> Tensor:
        """[T, h] in the accumulator's dtype."""
        return self._come_home()[0]

    def start_combine_backward(self, dy: Tensor) -> None:
        """[T, h]."""
        rows_of = self._result_grad.writer(dy, copies=self._copies_sent)
        self._on_way = _Outward("combine_backward", self, rows_of, self._result_grad, dy.device)

    def finish_combine_backward(self, chunk: int) -> Tensor:
        """[C', h], the copies that come in this chunk."""
        return self._result_grad.payload(self._come_out(chunk))

    def start_dispatch_backward(self, sums: Tensor, weights: Tensor) -> None:
        """[C, h] and [C, k], both in the accumulator's dtype."""
        self._on_way = _Homeward("dispatch_backward", self, sums, weights, self._token_grad)

    def finish_dispatch_backward(self) -> tuple[Tensor, Tensor]:
        """[T, h] and [T, k], both in the accumulator's dtype."""
        payload, weights = self._come_home()
        assert weights is not None
        return payload, weights

    def _come_out(self, chunk: int) -> Tensor:
        way = self._on_way
        assert isinstance(way, _Outward), "finished without a start"
        if chunk == self.terms.chunks - 1:
            self._on_way = None
        return way.finish(chunk)

    def _come_home(self) -> tuple[Tensor, Tensor | None]:
        way, self._on_way = self._on_way, None
        assert isinstance(way, _Homeward), "finished without a start"
        return way.finish()

    def advance(self) -> None:
        """With two hops: waits for the first hop of what is under way and starts the second."""
        if self._on_way is not None:
            self._on_way.advance()

    def choose_within_node(self, rows: Tensor) -> None:
        """Fixes which of the rows that came to this node so far, [C', w], go on to which rank in the next chunk."""
        terms, ep = self.terms, self.ep
        own, local = terms.num_experts // ep.size, terms.ranks_per_node
        experts = self._token.experts_of(rows)
        first = first_local(experts, own, local, own, first_place=ep.rank // local * local)
        self.hops[1].choose(first // self._width)


class _Outward:
    """Rows on their way from their source to their copies, chunk by chunk. Drops its buffers after the last chunk."""

    def __init__(self, kind: str, way: Collective, rows_of: Callable[[Tensor], Tensor], row: Row, device: torch.device):
        self.kind, self.way, self.hops, self.started = kind, way, way.hops, time.perf_counter()
        # One buffer per hop for all chunks: a copy of an early chunk may be needed again in a later one.
        self.arrived = [torch.empty(hop.total, row.words, dtype=torch.int64, device=device) for hop in self.hops]
        chunks = range(way.terms.chunks)
        self.first = [self.hops[0].send(kind, chunk, rows_of, self.arrived[0]) for chunk in chunks]
        self.second: list[UnderWay] = []

    def advance(self) -> None:
        if len(self.hops) == 2:
            self._go_on(self.way.terms.chunks - 1)

    def _go_on(self, last: int) -> None:
        """Starts the second hop of all chunks up to `last`."""
        first, second = self.hops
        for chunk in range(len(self.second), last + 1):
            self.first[chunk].wait()
            if second.chosen == chunk:  # in backward it is known
                self.way.choose_within_node(self.arrived[0][: first.slice(chunk).stop])
            self.second.append(second.send(self.kind, chunk, partial(torch.index_select, self.arrived[0], 0),
                                           self.arrived[1]))

    def finish(self, chunk: int) -> Tensor:
        """[C', w], the copies that come in this chunk."""
        if len(self.hops) == 2:
            self._go_on(chunk)
        (self.second if len(self.hops) == 2 else self.first)[chunk].wait()
        if self.way.traffic is not None and chunk == self.way.terms.chunks - 1:
            self.way.traffic.done(self.kind, self.started)
        return self.arrived[-1][self.hops[-1].slice(chunk)]


class _Homeward:
    """Sums on their way from the copies to the source."""

    def __init__(self, kind: str, way: Collective, sums: Tensor, weights: Tensor | None, row: Row):
        self.kind, self.way, self.hops, self.row, self.started = kind, way, list(way.hops), row, time.perf_counter()
        self.on_way = self.hops[-1].send_back(kind, row.write(sums, weights))

    def advance(self) -> None:
        if len(self.hops) == 2:
            sums, weights = self.hops.pop().sum(self.on_way.wait(), self.row)
            self.on_way = self.hops[0].send_back(self.kind, self.row.write(sums, weights))

    def finish(self) -> tuple[Tensor, Tensor | None]:
        self.advance()
        came = self.on_way.wait()
        if self.way.traffic is not None:
            self.way.traffic.done(self.kind, self.started)
        return self.hops[0].sum(came, self.row)
