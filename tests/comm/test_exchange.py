"""Dispatch between ranks: uneven splits, nothing to send, everything to one, and peers that disagree."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_ext.comm.dispatch import Dispatcher, DispatchError, exchange
from megatron_ext.comm.wire import row_bytes
from megatron_ext.parallel.expert_parallel import ExpertParallel
from tests.distributed.pool import WorkerPool

E, K, H = 4, 2, 256


def here() -> ExpertParallel:
    return ExpertParallel(dist.group.WORLD, dist.get_world_size(), dist.get_rank(), "ep")


def exchange_of_a_transposed_tensor() -> torch.Tensor:
    rows = torch.arange(24.0).view(6, 4).t() + 100 * dist.get_rank()  # [4, 6], not contiguous
    return exchange(rows, [1, 3], [[1, 1], [3, 3]][dist.get_rank()], dist.group.WORLD)


def test_a_tensor_that_is_not_contiguous_arrives_as_it_reads(pool2: WorkerPool):
    first, second = pool2.run(exchange_of_a_transposed_tensor)
    rows = torch.arange(24.0).view(6, 4).t()
    assert first.equal(torch.cat((rows[:1], rows[:1] + 100)))
    assert second.equal(torch.cat((rows[1:], rows[1:] + 100)))


def round_trip(experts_of_ranks: list[torch.Tensor], dispatch: str, combine: str) -> dict:
    """Sends tokens that say where they come from; the experts multiply by their number + 1."""
    rank = dist.get_rank()
    experts = experts_of_ranks[rank]
    tokens = len(experts)
    x = ((3 * torch.arange(tokens)[:, None] + torch.arange(H)) % 16 * 2.0**rank).requires_grad_()
    weights = torch.ones(tokens, K, requires_grad=True)
    way = Dispatcher(E, here(), dispatch, combine)
    plan = way.plan(experts, x)
    rows = way.dispatch(x, plan)
    local = torch.arange(rank * E // 2, (rank + 1) * E // 2)
    scale = (local + 1.0).repeat_interleave(torch.tensor(plan.group_sizes))[:, None]
    out = way.combine(rows * scale, weights, plan)
    out.sum().backward()
    return dict(x=x.detach(), out=out.detach(), dx=x.grad, dweights=weights.grad, group_sizes=plan.group_sizes,
                bytes=way.bytes_sent(plan, H, x.dtype))


CASES = {
    "mixed": [torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2], [2, 0]]), torch.tensor([[3, 2], [0, 3]])],
    "an expert without tokens": [torch.tensor([[0, 3], [3, 0]]), torch.tensor([[2, 0]])],
    "all to rank 0": [torch.tensor([[0, 1], [1, 0]]), torch.tensor([[1, 0], [0, 1], [0, 1]])],
    "all to rank 1": [torch.tensor([[2, 3], [3, 2]]), torch.tensor([[3, 2], [2, 3], [2, 3]])],
    "rank 1 has no tokens": [torch.tensor([[0, 2], [1, 3], [1, 2]]), torch.empty(0, 2, dtype=torch.int64)],
    "nobody has tokens": [torch.empty(0, 2, dtype=torch.int64)] * 2,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dispatch, combine", [("model", "model"), ("fp8", "bf16")])
def test_there_and_back(pool2: WorkerPool, case: str, dispatch: str, combine: str):
    """The values have four significant bits, exact in FP8 and BF16."""
    experts = CASES[case]
    results = pool2.run(round_trip, experts, dispatch, combine)
    counts = torch.bincount(torch.cat(experts).flatten(), minlength=E).tolist()
    assert results[0]["group_sizes"] + results[1]["group_sizes"] == counts
    for rank, result in enumerate(results):
        scale = experts[rank] + 1.0
        assert result["out"].equal(result["x"] * scale.sum(-1, keepdim=True))
        assert result["dx"].equal(scale.sum(-1, keepdim=True).expand(-1, H))
        torch.testing.assert_close(result["dweights"], result["x"].sum(-1, keepdim=True) * scale)
        away = int((experts[rank] // 2 != rank).sum())
        assert result["bytes"] == away * row_bytes(dispatch, H, torch.float32)


def disagree(what: str) -> str:
    differs = what if dist.get_rank() else None
    x = torch.randn(3, 64 if differs == "hidden" else 32, dtype=torch.bfloat16 if differs == "dtype" else None)
    way = Dispatcher(E, here(), "fp8" if differs == "format" else "model")
    try:
        way.plan(torch.tensor([[0, 1], [2, 3], [1, 2]]), x)
    except DispatchError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("what, word", [("hidden", "size 64"), ("dtype", "bfloat16"), ("format", "dispatch fp8")])
def test_every_rank_names_a_peer_that_sends_something_else(pool2: WorkerPool, what: str, word: str):
    for message in pool2.run(disagree, what):
        assert "expert dispatch: rank" in message and word in message and "hidden size 32 in torch.float32" in message
