"""Dispatch and combine in one process."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.comm.dispatch import Dispatcher, inverse_permutation
from megatron_ext.comm.wire import decode, encode
from megatron_ext.parallel.expert_parallel import ExpertParallel

E, K, H = 6, 2, 256


def dispatcher(dispatch: str = "model", combine: str = "model") -> Dispatcher:
    return Dispatcher(E, ExpertParallel.single(), dispatch, combine)


def choice(tokens: int) -> torch.Tensor:
    return torch.rand(tokens, E).topk(K).indices


def rounded(x: torch.Tensor, wire: str) -> torch.Tensor:
    return decode(encode(x, wire), wire, x.shape[-1], x.dtype)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_rows_are_sorted_by_expert():
    experts, x = choice(20), torch.randn(20, H)
    way = dispatcher()
    plan = way.plan(experts, x)
    rows = way.dispatch(x, plan)
    expected = [x[(experts == e).any(-1)] for e in range(E)]
    assert rows.equal(torch.cat(expected))
    assert plan.group_sizes == [len(part) for part in expected]
    assert way.bytes_sent(plan, H, x.dtype) == 0


@pytest.mark.parametrize("tokens", [0, 1, 20])
def test_combine_is_the_weighted_sum_of_the_copies(tokens):
    experts, x, weights = choice(tokens), torch.randn(tokens, H), torch.rand(tokens, K)
    way = dispatcher()
    plan = way.plan(experts, x)
    scale = torch.arange(1.0, E + 1)
    scale_of_rows = scale.repeat_interleave(torch.tensor(plan.group_sizes))[:, None]
    y = way.combine(way.dispatch(x, plan) * scale_of_rows, weights, plan)
    torch.testing.assert_close(y, x * (weights * scale[experts]).sum(-1, keepdim=True))


def test_gradients():
    experts = choice(5)
    way = dispatcher()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(5, K, dtype=torch.float64, requires_grad=True)
    plan = way.plan(experts, x)
    assert torch.autograd.gradcheck(lambda x, w: way.combine(way.dispatch(x, plan).sin(), w, plan), (x, weights))


@pytest.mark.parametrize("dispatch, combine", [("fp8", "bf16"), ("fp8", "model"), ("bf16", "bf16")])
def test_each_way_rounds_as_the_wire_would(dispatch, combine):
    """Out in `dispatch`, back in `combine`, in backward too, without a peer to send to."""
    experts, x, weights = choice(20), torch.randn(20, H, requires_grad=True), torch.rand(20, K)
    way, exact = dispatcher(dispatch, combine), dispatcher()
    plan = way.plan(experts, x)
    rows = way.dispatch(x, plan)
    assert rows.equal(exact.dispatch(rounded(x.detach(), dispatch), plan))
    drows = torch.randn_like(rows)
    rows.backward(drows)
    copies = rounded(drows, combine)[plan.unpack_copies].view(20, K, H)
    torch.testing.assert_close(x.grad, copies.sum(1))

    y = torch.randn_like(rows).requires_grad_()
    out = way.combine(y, weights, plan)
    assert out.equal(exact.combine(rounded(y.detach(), combine), weights, plan))
    dout = torch.randn_like(out)
    out.backward(dout)
    dcopies = (weights[..., None] * dout[:, None]).flatten(0, 1)
    assert y.grad.equal(rounded(dcopies, dispatch)[plan.pack])


def test_combine_weighs_and_sums_bf16_in_fp32():
    """The weights differ by less than BF16 can tell."""
    way = Dispatcher(2, ExpertParallel.single())
    y = torch.tensor([[1.0], [-1.0]]).bfloat16()
    plan = way.plan(torch.tensor([[0, 1]]), y[:1])
    assert way.combine(y, torch.tensor([[1 + 2.0**-12, 1.0]]), plan).item() == 2.0**-12


def test_inverse_permutation():
    p = torch.randperm(50)
    assert inverse_permutation(p)[p].equal(torch.arange(50))
