"""NCCL without NCCL: what a device would do with the messages of a step, in the order the executor asks for them.

NCCL puts everything that is asked of one group on one stream, in that order, and a stream stands still at a receive
whose counterpart has not come to its turn. The model here is a graph of such waits; a cycle is a deadlock on the
device, whatever gloo says. It is how one group per channel was found to hang, and one per channel and peer not to.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest

from megatron_ext.parallel import ProcessGroups
from megatron_ext.pipeline import Plan, Transfer, schedule
from tests.distributed import equality
from tests.distributed.equality import Case
from tests.distributed.pool import WorkerPool

Stream = Callable[[str, int], Any]


class _Rank:
    """Walks one rank's list as the executor and the messenger do, and notes who waits for whom."""

    def __init__(self, plan: Plan, rank: int, stream: Stream, first_step: bool, after: dict[Any, set[Any]]):
        self.plan, self.rank, self.stream, self.after = plan, rank, stream, after
        self.tail: dict[Any, Any] = {}  # last operation of each communication stream
        self.compute: Any = None  # last operation of the compute stream
        self.expected: dict[tuple[str, int], deque[Any]] = defaultdict(deque)
        self.posted: set[tuple[str, int]] = set()
        for i in plan.instructions[rank]:
            if isinstance(i, Transfer) and i.kind[0] == "R":
                self.expected[f"{i.message.kind}{i.message.direction}", i.message.source].append(i.message)
        for d, ranks in enumerate(plan.placement):
            if ranks[-1] == rank:
                self.expected[f"L{d}", ranks[0]].extend((f"L{d}", k) for k in range(plan.micro_batches_of(d)))
        self.shapes_known = dict.fromkeys(self.expected, not first_step)  # a receive is posted ahead for known shapes
        for channel in self.expected:
            self.post(channel)

    def communicate(self, channel: str, peer: int, message: Any) -> None:
        """A send or a receive: both ends are one node, for they end together."""
        stream, node = self.stream(channel, peer), ("message", message)
        for before in (self.tail.get(stream), self.compute):
            if before is not None and before != node:
                self.after[before].add(node)
        self.after.setdefault(node, set())
        self.tail[stream] = node

    def post(self, channel: tuple[str, int]) -> None:
        if self.expected[channel] and channel not in self.posted and self.shapes_known[channel]:
            self.communicate(*channel, self.expected[channel][0])
            self.posted.add(channel)

    def computes(self, node: Any) -> None:
        if self.compute is not None:
            self.after[self.compute].add(node)
        self.after.setdefault(node, set())
        self.compute = node

    def receive(self, channel: tuple[str, int]) -> None:
        message = self.expected[channel].popleft()
        if channel not in self.posted:
            self.communicate(*channel, message)
        self.posted.discard(channel)
        self.shapes_known[channel] = True
        self.after["message", message].add(("wait", self.rank, message))
        self.computes(("wait", self.rank, message))
        self.post(channel)

    def walk(self) -> None:
        for i in self.plan.instructions[self.rank]:
            if isinstance(i, Transfer):
                if i.kind[0] == "S":
                    self.communicate(f"{i.message.kind}{i.message.direction}", i.message.destination, i.message)
                continue
            for part in i.parts:
                for m in self.plan.needs(part):
                    self.receive((f"{m.kind}{m.direction}", m.source))
                labels, ranks = f"L{part.direction}", self.plan.placement[part.direction]
                if part.kind == "F" and part.stage == 0:
                    self.communicate(labels, ranks[-1], (labels, part.micro_batch))
                if part.kind == "F" and part.stage == len(ranks) - 1:
                    self.receive((labels, ranks[0]))
                self.computes(("compute", self.rank, str(part)))


def stuck(plan: Plan, stream: Stream, first_step: bool) -> int:
    """How many operations can never run."""
    after: dict[Any, set[Any]] = defaultdict(set)
    for rank in range(plan.stages):
        _Rank(plan, rank, stream, first_step, after).walk()
    waits = dict.fromkeys(after, 0)
    for followers in after.values():
        for node in followers:
            waits[node] += 1
    ready = [node for node, count in waits.items() if count == 0]
    left = len(waits)
    while ready:
        left -= 1
        for node in after[ready.pop()]:
            waits[node] -= 1
            if waits[node] == 0:
                ready.append(node)
    return left


@pytest.mark.parametrize("stages", [2, 4, 6, 8, 16])
def test_a_group_for_each_channel_and_peer_never_stands_still(stages: int) -> None:
    for micro_batches in sorted({2, 4, 6, 2 * stages - 2, 2 * stages, 2 * stages + 2, 4 * stages}):
        plan = schedule("dualpipe", stages=stages, micro_batches=micro_batches)
        for first_step in (True, False):
            assert stuck(plan, lambda channel, peer: (channel, peer), first_step) == 0, micro_batches


def test_a_group_for_each_channel_alone_would() -> None:
    """The model can see a deadlock."""
    assert stuck(schedule("dualpipe", stages=4, micro_batches=8), lambda channel, peer: channel, False) > 0


def train_by_edge(case: Case) -> dict[str, Any]:
    with patch.object(ProcessGroups, "create", staticmethod(partial(ProcessGroups.create, by_edge=True))):
        return equality.train(case)


def test_training_with_a_group_for_each_channel_and_peer(pool4: WorkerPool) -> None:
    """The groups that NCCL needs, over gloo: same numbers."""
    case = Case(stages=4, micro_batches=8, steps=2)
    equality.compare(pool4.run(train_by_edge, case)[0], equality.reference(case))
