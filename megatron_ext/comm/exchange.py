"""One all-to-all of rows, started and finished apart, over gloo or NCCL.

Where the host waits: in `UnderWay.wait` over gloo, until the rows have come; over NCCL only the current stream waits.
CUDA tensors over gloo, which has no all-to-all for them, are staged through the host, which waits for the device at the
start too.

A peer that is gone: over gloo whoever waits for it gets an error, at once if its connection broke, else when the
timeout of the group has passed; over NCCL the watchdog of torch ends the process after that time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_ext.comm.traffic import Traffic
from megatron_ext.config.errors import UserError

_TAG = 1 << 20  # apart from the messages between stages, which might share a group


class DispatchError(UserError):
    """Ranks of an expert group do not agree on what they send each other, or one of them is gone."""


@dataclass(frozen=True)
class Line:
    """A group that rows are exchanged in, seen from one of its ranks.

    Attributes:
        group: None where this rank is alone.
        expert_group: the whole expert group, which an error names.
        links: for each peer, over what it is reached: "self", "node" or "fabric".
        traffic: where it is counted.
    """

    group: ProcessGroup | None
    expert_group: ProcessGroup | None = None
    links: tuple[str, ...] = ("self",)
    traffic: Traffic | None = None

    def start(self, kind: str, rows: Tensor, sent: list[int], received: list[int],
              target: Tensor | None = None) -> UnderWay:
        """All-to-all of rows [n, ...] of one dtype: `sent[p]` of them go to peer p, `received[p]` come from it.

        Args:
            kind: for counting and for errors.
            target: contiguous; made if None.

        Raises:
            DispatchError: a peer is known to be gone.
        """
        # A non-contiguous input is read as if it were contiguous, without an error.
        rows = rows.contiguous()
        if self.traffic is not None:
            width = rows[0].nbytes if len(rows) else 0
            self.traffic.sent(kind, self.links, [n * width for n in sent])
        if self.group is None:
            return UnderWay(self, kind, [], rows, None, target)
        staged = rows.is_cuda and dist.get_backend(self.group) == "gloo"
        if target is None:
            target = rows.new_empty((sum(received), *rows.shape[1:]))
        source = rows.cpu() if staged else rows
        landing = torch.empty(target.shape, dtype=target.dtype) if staged else target
        try:
            if dist.get_backend(self.group) == "gloo":
                works = _by_messages(landing, source, received, sent, self.group)
            else:
                works = [dist.all_to_all_single(landing, source, received, sent, group=self.group, async_op=True)]
        except RuntimeError as error:
            raise self.failed(kind, error) from error
        return UnderWay(self, kind, works, landing, source, target)

    def gather(self, kind: str, row: Tensor) -> UnderWay:
        """All-gather of one row [n] -> [N, n], on the host if the group is gloo's."""
        if self.traffic is not None:
            self.traffic.sent(kind, self.links, [row.nbytes] * len(self.links))
        if self.group is None:
            return UnderWay(self, kind, [], row[None], None, None)
        source = row.cpu() if dist.get_backend(self.group) == "gloo" else row
        landing = source.new_empty(len(self.links), len(row))
        try:
            work = dist.all_gather(list(landing), source, group=self.group, async_op=True)
        except RuntimeError as error:
            raise self.failed(kind, error) from error
        return UnderWay(self, kind, [work], landing, source, landing)

    def failed(self, kind: str, error: Exception) -> DispatchError:
        ranks = dist.get_process_group_ranks(self.expert_group or self.group)
        return DispatchError(f"expert dispatch: {kind.replace('_', ' ')} among ranks {ranks} failed on rank "
                             f"{dist.get_rank()}, a peer has stopped or is late: {error}")


def _by_messages(landing: Tensor, source: Tensor, received: list[int], sent: list[int],
                 group: ProcessGroup) -> list[dist.Work]:
    """An all-to-all over gloo: what comes is received before anything is sent; empty messages are left out."""
    me, peers = dist.get_rank(group), dist.get_process_group_ranks(group)
    arriving, leaving = landing.split(received), source.split(sent)
    arriving[me].copy_(leaving[me])
    others = [peer for peer in range(len(peers)) if peer != me]
    works = [dist.irecv(arriving[p], peers[p], group=group, tag=_TAG) for p in others if received[p]]
    return works + [dist.isend(leaving[p], peers[p], group=group, tag=_TAG) for p in others if sent[p]]


class UnderWay:
    """Rows that are being exchanged. Keeps what is sent alive until it has been waited for."""

    def __init__(self, line: Line, kind: str, works: list[dist.Work], landing: Tensor, source: Tensor | None,
                 target: Tensor | None):
        self._line, self._kind, self._works = line, kind, works
        self._landing, self._source, self._target = landing, source, target

    def wait(self) -> Tensor:
        """The rows that came; to be called once.

        Raises:
            DispatchError: a peer has died, or has not sent within the timeout of the group.
        """
        if self._works:
            before = time.perf_counter()
            try:
                for work in self._works:
                    work.wait()
            except RuntimeError as error:
                raise self._line.failed(self._kind, error) from error
            if self._line.traffic is not None:
                self._line.traffic.waited(self._kind, time.perf_counter() - before)
        target, self._source = self._target, None
        if target is None:
            return self._landing
        return target if target is self._landing else target.copy_(self._landing)
