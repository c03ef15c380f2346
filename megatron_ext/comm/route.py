"""Which rows travel where: everything that is worked out from the router's choice, and agreed upon before rows move.

A token is sent once to each place (rank or node) that has one of its experts: a *copy*. The experts of every rank are
cut into `chunks` runs of neighbours, and a copy travels in the first chunk that needs it. So what all ranks must know
are, per source, the rows of each expert, and the copies for each place by their first local expert there; the sizes of
all messages are sums of these, whatever the chunks.

Nothing here makes the host wait but `Sizes`, for the numbers of the other ranks: from them the length of every list is
known beforehand (`nonzero_static`, sorting).

Shape letters: T tokens here, k experts of a token, E experts, e = E/N experts of a rank, N ranks = G nodes x L ranks of
a node, P places (peers of a hop), I items that a hop starts from, R rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.comm.exchange import DispatchError, Line, UnderWay
from megatron_ext.comm.wire import FORMATS, Row
from megatron_ext.parallel.expert_parallel import ExpertParallel

_MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Terms:
    """What all ranks of an expert group must agree on.

    Attributes:
        ranks_per_node: L, or 0 where tokens travel in one hop.
    """

    num_experts: int
    experts_per_token: int
    hidden: int
    dtype: torch.dtype
    dispatch: str
    combine: str
    chunks: int
    ranks_per_node: int

    def numbers(self) -> list[int]:
        return [self.num_experts, self.experts_per_token, self.hidden, _MODEL_DTYPES.index(self.dtype),
                FORMATS.index(self.dispatch), FORMATS.index(self.combine), self.chunks, self.ranks_per_node]

    @staticmethod
    def describe(numbers: list[int]) -> str:
        experts, k, hidden, dtype, dispatch, combine, chunks, local = numbers
        hops = f"two hops over nodes of {local} ranks" if local else "one hop"
        return (f"{k} of {experts} experts, hidden size {hidden} in {_MODEL_DTYPES[dtype]} (dispatch "
                f"{FORMATS[dispatch]}, combine {FORMATS[combine]}, chunks {chunks}, {hops})")

    @property
    def two_hop(self) -> bool:
        return self.ranks_per_node > 0


def first_local(experts: Tensor, own: int, places: int, per_place: int, first_place: int = 0) -> Tensor:
    """The lowest expert of a token at each place, by its number on its rank.

    Args:
        experts: [T, k] int64.
        own: e.
        places: P places of `per_place` experts, from number `first_place` on; experts elsewhere do not count.

    Returns:
        [P, T] int64; e where a token has none there.
    """
    place = experts // per_place - first_place
    place = torch.where((place < 0) | (place >= places), places, place)
    first = torch.full((places + 1, len(experts)), own, device=experts.device)
    return first.scatter_reduce_(0, place.t(), (experts % own).t(), "amin")[:places]


def _count(numbers: Tensor, size: int) -> Tensor:
    """[P, T] -> [P, size], how often each number below `size` is there."""
    counts = numbers.new_zeros(len(numbers), size + 1)
    return counts.scatter_add_(1, numbers, torch.ones_like(numbers))[:, :size]


def announcement(experts: Tensor, terms: Terms, ep: ExpertParallel) -> tuple[Tensor, Tensor]:
    """What a rank tells the others: the terms, then rows per expert, copies per rank, copies per node (0 in one hop).

    Its length depends on E only, for backends take messages of the wrong length in silence, or abort.

    Returns:
        [8 + 3E] int32, on the device of `experts`; and `first_local` at the places of the first hop.
    """
    own = terms.num_experts // ep.size
    rows = _count(experts.reshape(1, -1), terms.num_experts)[0]
    first = first_local(experts, own, ep.size, own)
    ranks, nodes = _count(first, own).flatten(), torch.zeros_like(rows)
    if local := terms.ranks_per_node:
        first = first_local(experts, own, ep.size // local, own * local)
        found = _count(first, own).flatten()
        nodes[: len(found)] = found
    # A fill per term: a list would be copied to the device from pageable memory, which waits for the device.
    header = [torch.full((1,), n, dtype=torch.int32, device=experts.device) for n in terms.numbers()]
    return torch.cat((*header, torch.cat((rows, ranks, nodes)).to(torch.int32))), first


class Sizes:
    """The sizes of all messages, on the host.

    Args:
        told: [N, 8 + 3E], the announcements of all ranks. Reading them is what the host waits for.

    Raises:
        DispatchError: another rank has other terms. As all see all terms, every rank raises.
    """

    def __init__(self, told: Tensor, terms: Terms, ep: ExpertParallel):
        self.ep, self.terms = ep, terms
        told = told.cpu()
        mine, start = terms.numbers(), len(fields(Terms))
        for rank, theirs in enumerate(told[:, :start].tolist()):
            if theirs != mine:
                raise DispatchError(f"expert dispatch: rank {rank} of the expert group sends {terms.describe(theirs)}, "
                                    f"rank {ep.rank} sends {terms.describe(mine)}; all ranks must run the same model")
        self._rows, ranks, self._nodes = told[:, start:].unflatten(1, (3, -1)).unbind(1)
        self._copies_SNc = self._by_chunk(ranks, ep.size)

    def _by_chunk(self, numbers: Tensor, places: int) -> Tensor:
        """[N, places * e] -> [N, places, chunks]."""
        return numbers.reshape(len(numbers), places, self.terms.chunks, -1).sum(-1)

    @cached_property
    def groups(self) -> list[int]:
        """[e], rows of each expert here."""
        first, last = self.ep.expert_range(self.terms.num_experts)
        return self._rows[:, first:last].sum(0).tolist()

    def one_hop(self) -> tuple[list[list[int]], list[list[int]]]:
        """Rows to and from each of N ranks, by chunk."""
        copies, rank = self._copies_SNc, self.ep.rank
        return copies[rank].t().tolist(), copies[:, rank].t().tolist()

    def between_nodes(self) -> tuple[list[list[int]], list[list[int]]]:
        """Rows to and from each of G nodes, among ranks of equal local number, by chunk."""
        per_node, rank = self.terms.ranks_per_node, self.ep.rank
        nodes = self.ep.size // per_node
        own = self.terms.num_experts // self.ep.size
        copies = self._by_chunk(self._nodes[:, : nodes * own], nodes)
        return copies[rank].t().tolist(), copies[rank % per_node :: per_node, rank // per_node].t().tolist()

    def within_node(self) -> tuple[list[list[int]], list[list[int]]]:
        """Rows to and from each of the L ranks here, by chunk, of all that came from other nodes or starts here."""
        per_node, (node, local) = self.terms.ranks_per_node, divmod(self.ep.rank, self.terms.ranks_per_node)
        first = node * per_node
        # [L entry ranks, N targets, chunks]: what the ranks of equal local number send to each rank, over all nodes
        entered = self._copies_SNc.unflatten(0, (-1, per_node)).sum(0)
        return entered[local, first : first + per_node].t().tolist(), entered[:, self.ep.rank].t().tolist()


class Segments:
    """Which of n values are summed up into which of `size` sums, in a fixed order.

    Args:
        targets: [n] int64; values of equal target are added up in their order.
        size: number of sums.
    """

    def __init__(self, targets: Tensor, size: int):
        self.order = targets.argsort(stable=True)
        ends = targets.new_zeros(size).scatter_add_(0, targets, torch.ones_like(targets)).cumsum(0)
        self.offsets = F.pad(ends, (1, 0))

    def sum(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """[n, h] -> [size, h], both in the accumulator's dtype; value i counts `weights[i]` times."""
        if not len(values):
            return values.new_zeros(len(self.offsets) - 1, values.shape[-1])
        # One loop over a sum's own values on every device: no atomics, and nobody else's values change the rounding.
        return F.embedding_bag(self.order, values.contiguous(), self.offsets, mode="sum", include_last_offset=True,
                               per_sample_weights=None if weights is None else weights[self.order])


class Hop:
    """One exchange of the way: items to peers chunk by chunk, and sums of what they send back, all at once.

    Args:
        line: the peers.
        sent: rows to each peer, by chunk.
        received: rows from each peer, by chunk.
        items: I.
    """

    def __init__(self, line: Line, sizes: tuple[list[list[int]], list[list[int]]], items: int):
        self.line, self.items = line, items
        self.sent, self.received = sizes
        self._chosen: list[Tensor] = []

    @property
    def total(self) -> int:
        """Rows that come, over all chunks."""
        return sum(map(sum, self.received))

    def slice(self, chunk: int) -> slice:
        """Where the rows of a chunk are among all that come."""
        first = sum(map(sum, self.received[:chunk]))
        return slice(first, first + sum(self.received[chunk]))

    def choose(self, chunk_PI: Tensor) -> None:
        """Fixes what the next chunk sends.

        Args:
            chunk_PI: [P, I'] in which chunk an item goes to a peer; I' items so far.
        """
        chunk = len(self._chosen)
        self._chosen.append((chunk_PI == chunk).nonzero_static(size=sum(self.sent[chunk]))[:, 1])

    @property
    def chosen(self) -> int:
        """Chunks whose items are known."""
        return len(self._chosen)

    def send(self, kind: str, chunk: int, rows_of: Callable[[Tensor], Tensor], arrived: Tensor) -> UnderWay:
        """Starts a chunk of items; what comes goes into its part of `arrived` [total, w].

        Args:
            rows_of: the rows [R, w] of items [R].
        """
        rows = rows_of(self._chosen[chunk])
        return self.line.start(kind, rows, self.sent[chunk], self.received[chunk], arrived[self.slice(chunk)])

    def send_back(self, kind: str, rows: Tensor) -> UnderWay:
        """Starts the way back of [total, w] rows in the order in which their items came."""
        return self.line.start(kind, _by_peer(rows, self.received), _sums(self.received), _sums(self.sent))

    @cached_property
    def _segments(self) -> Segments:
        chosen = [_by_peer(torch.cat(self._chosen), self.sent)] if len(self.sent) > 1 else self._chosen
        return Segments(chosen[0], self.items)

    def sum(self, rows: Tensor, row: Row) -> tuple[Tensor, Tensor | None]:
        """What came back, per item.

        Returns:
            [I, h] and, if weights go with the payload, [I, k], both in the accumulator's dtype. The sums run over the
            peers in their order.
        """
        payload = self._segments.sum(row.payload(rows).to(row.accumulator))
        return payload, self._segments.sum(row.weights_of(rows)) if row.weights else None


def _sums(by_chunk: list[list[int]]) -> list[int]:
    return [sum(sizes) for sizes in zip(*by_chunk, strict=True)]


def _by_peer(rows: Tensor, by_chunk: list[list[int]]) -> Tensor:
    """Rows that lie by (chunk, peer) -> by (peer, chunk)."""
    if len(by_chunk) == 1:
        return rows
    parts = rows.split([size for sizes in by_chunk for size in sizes])
    peers = len(by_chunk[0])
    return torch.cat([part for peer in range(peers) for part in parts[peer::peers]])
