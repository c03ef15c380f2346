"""A stand-in for `deep_ep.Buffer`, from its documentation: its arguments, shapes, dtypes and semantics, on the CPU.

`dispatch` sends a token once to each rank that has one of its experts; it arrives by source rank and token, with the
numbers of its experts local, -1 for those elsewhere. `combine` adds up, without weights, what ranks send for a token.
What is async in DeepEP is done at once, but its event must be waited for before the result is looked at.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 1000 * hidden_bytes

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0


class Event:
    waited = False

    def current_stream_wait(self) -> None:
        self.waited = True


class Buffer:
    def __init__(self, group: Any, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0):
        self.group, self.num_nvl_bytes, self.num_rdma_bytes = group, num_nvl_bytes, num_rdma_bytes
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.events: list[Event] = []

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8), f"Unsupported number of EP ranks: {num_ranks}"
        return Config()

    get_combine_config = get_dispatch_config

    def _event(self) -> Event:
        self.events.append(Event())
        return self.events[-1]

    def _everyones(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.ranks
        dist.all_gather_object(found, value, group=self.group)
        return found

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int, previous_event: Any = None,
                            async_finish: bool = False, allocate_on_comm_stream: bool = False) -> tuple[Any, ...]:
        assert topk_idx.dtype == torch.int64
        owners = topk_idx * self.ranks // num_experts
        in_rank = torch.zeros(len(topk_idx), self.ranks, dtype=torch.bool).scatter_(1, owners, True)
        per_expert = torch.bincount(topk_idx.flatten(), minlength=num_experts).int()
        return in_rank.sum(0).int(), None, per_expert, in_rank, self._event()

    def dispatch(self, x: Any, handle: Any = None, num_tokens_per_rank: Any = None,
                 num_tokens_per_rdma_rank: Any = None, is_token_in_rank: Any = None,
                 num_tokens_per_expert: Any = None, topk_idx: Any = None, topk_weights: Any = None,
                 previous_event: Any = None, async_finish: bool = False,
                 allocate_on_comm_stream: bool = False) -> tuple[Any, ...]:
        if handle is not None:
            handle, _ = handle
        assert async_finish and (previous_event is not None or not allocate_on_comm_stream)
        parts = x if isinstance(x, tuple) else (x,)
        assert [part.dtype for part in parts] in ([torch.bfloat16], [torch.float8_e4m3fn, torch.float32])
        assert all(part.is_contiguous() for part in parts)
        as_bytes = [part.view(torch.uint8) for part in parts]  # FP8 cannot be pickled
        everyone = self._everyones((as_bytes, is_token_in_rank, topk_idx, topk_weights))
        if handle is None:
            assert topk_weights.dtype == torch.float32
            handle = [(source, token) for source, (_, there, *_) in enumerate(everyone)
                      for token in there[:, self.rank].nonzero().flatten().tolist()]
            own = len(num_tokens_per_expert) // self.ranks
            experts = self._taken([e[2] for e in everyone], handle, topk_idx) - self.rank * own
            weights = self._taken([e[3] for e in everyone], handle, topk_weights)
            elsewhere = (experts < 0) | (experts >= own)
            experts, weights = experts.masked_fill(elsewhere, -1), weights.masked_fill(elsewhere, 0)
            groups = torch.bincount(experts[~elsewhere], minlength=own).tolist()
        else:
            assert topk_idx is None and topk_weights is None
            experts = weights = groups = None
        received = [self._taken([e[0][i] for e in everyone], handle, part) for i, part in enumerate(parts)]
        return (tuple(received) if isinstance(x, tuple) else received[0], experts, weights, groups,
                (handle, len(parts[0])), self._event())

    @staticmethod
    def _taken(tensors: list[Tensor], places: list[tuple[int, int]], like: Tensor) -> Tensor:
        rows = [tensors[source][token].view(torch.uint8) for source, token in places]
        return torch.stack(rows).view(like.dtype) if rows else like.new_empty(0, *like.shape[1:])

    def combine(self, x: Tensor, handle: Any, topk_weights: Tensor | None = None, previous_event: Any = None,
                async_finish: bool = False, allocate_on_comm_stream: bool = False) -> tuple[Any, ...]:
        places, tokens = handle
        assert async_finish and x.dtype == torch.bfloat16 and len(x) == len(places)
        assert topk_weights is None or topk_weights.dtype == torch.float32
        total = torch.zeros(tokens, x.shape[1])
        weights = None if topk_weights is None else torch.zeros(tokens, topk_weights.shape[1])
        for theirs, sent, beside in self._everyones((places, x, topk_weights)):
            for row, (source, token) in enumerate(theirs):
                if source == self.rank:
                    total[token] += sent[row]
                    if weights is not None:
                        weights[token] += beside[row]
        return total.bfloat16(), weights, self._event()
