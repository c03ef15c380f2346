"""Dispatch and combine in one process."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from megatron_ext.comm.dispatch import Dispatcher, Transit, combine, dispatch
from megatron_ext.config.errors import ConfigError
from megatron_ext.parallel.expert_parallel import ExpertParallel
from tests.comm.journeys import rounded

E, K, H = 6, 2, 256


def dispatcher(dispatch: str = "model", combine: str = "model", chunks: int = 1) -> Dispatcher:
    return Dispatcher(E, ExpertParallel.single(), dispatch, combine, chunks=chunks)


def choice(tokens: int) -> torch.Tensor:
    return torch.rand(tokens, E).topk(K).indices


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("chunks", [1, 3])
def test_rows_are_sorted_by_expert_and_bring_their_weights(chunks):
    experts, x, weights = choice(20), torch.randn(20, H), torch.rand(20, K)
    transit = dispatcher(chunks=chunks).announce(experts, x)
    rows, row_weights = dispatch(transit, x, weights)
    expected = [x[(experts == e).any(-1)] for e in range(E)]
    assert rows.equal(torch.cat(expected))
    assert row_weights.equal(torch.cat([weights[experts == e] for e in range(E)]))
    sizes = [len(part) for part in expected]
    assert transit.group_sizes() == sizes
    assert [sum(column) for column in zip(*map(transit.group_sizes, range(chunks)), strict=True)] == sizes
    assert all(transit.group_sizes(c)[e] == 0 for c in range(chunks) for e in range(E) if e // (E // chunks) != c)


@pytest.mark.parametrize("tokens", [0, 1, 20])
def test_combine_is_the_weighted_sum_of_the_copies(tokens):
    experts, x, weights = choice(tokens), torch.randn(tokens, H), torch.rand(tokens, K)
    transit = dispatcher().announce(experts, x)
    rows, row_weights = dispatch(transit, x, weights)
    scale = torch.arange(1.0, E + 1)
    scale_of_rows = scale.repeat_interleave(torch.tensor(transit.group_sizes()))[:, None]
    y = combine(transit, rows * scale_of_rows, row_weights)
    torch.testing.assert_close(y, x * (weights * scale[experts]).sum(-1, keepdim=True))


@pytest.mark.parametrize("chunks", [1, 2, 6])
def test_gradients(chunks):
    experts = choice(5)
    way = dispatcher(chunks=chunks)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(5, K, dtype=torch.float64, requires_grad=True)

    def layer(x, weights):
        transit = way.announce(experts, x)
        rows, row_weights = dispatch(transit, x, weights)
        return combine(transit, rows.sin(), row_weights)

    assert torch.autograd.gradcheck(layer, (x, weights))


@pytest.mark.parametrize("there, back", [("fp8", "bf16"), ("fp8", "model"), ("bf16", "bf16")])
def test_each_way_rounds_as_the_wire_would(there, back):
    """Out in `there`, back in `back`, in backward too, without a peer to send to. What goes back is a sum per token."""
    experts, x, weights = choice(20), torch.randn(20, H, requires_grad=True), torch.rand(20, K, requires_grad=True)
    way, exact = dispatcher(there, back), dispatcher()
    transit, unrounded = way.announce(experts, x), exact.announce(experts, x)
    rows, row_weights = dispatch(transit, x, weights)
    expected, _ = dispatch(unrounded, rounded(x.detach(), there), weights)
    assert rows.equal(expected)

    y, row_weights = torch.randn_like(rows).requires_grad_(), row_weights.detach().requires_grad_()
    out = combine(transit, y, row_weights)
    assert out.equal(rounded(combine(unrounded, y, row_weights), back))
    dout = torch.randn_like(out)
    dy, dw = torch.autograd.grad(out, (y, row_weights), dout)
    z = y.detach().requires_grad_()
    out = combine(unrounded, z, row_weights)
    expected_dy, expected_dw = torch.autograd.grad(out, (z, row_weights), rounded(dout, there))
    assert dy.equal(expected_dy) and dw.equal(expected_dw)

    drows, dw = torch.randn_like(rows), torch.randn_like(row_weights)
    rows.backward(drows)
    row_of = [(experts == e).any(-1).nonzero().squeeze(1) for e in range(E)]
    sums = torch.zeros_like(x).index_add_(0, torch.cat(row_of), drows)
    torch.testing.assert_close(x.grad, rounded(sums, back), rtol=0 if back == "model" else 2**-7, atol=1e-6)
    assert rounded(x.grad, back).equal(x.grad)


def test_combine_weighs_and_sums_bf16_in_fp32():
    """The weights differ by less than BF16 can tell."""
    way = Dispatcher(2, ExpertParallel.single())
    y = torch.tensor([[1.0], [-1.0]]).bfloat16()
    weights = torch.tensor([[1 + 2.0**-12, 1.0]])
    transit = way.announce(torch.tensor([[0, 1]]), y[:1])
    _, row_weights = dispatch(transit, y[:1], weights)
    assert combine(transit, y, row_weights).item() == 2.0**-12


@pytest.mark.parametrize("asked, got", [(1, 1), (2, 2), (4, 3), (5, 3), (6, 6), (100, 6)])
def test_chunks_divide_the_experts_of_a_rank(asked, got):
    assert dispatcher(chunks=asked).announce(choice(3), torch.randn(3, H)).chunks == got


@pytest.mark.parametrize("settings, message", [
    (dict(num_experts=2**15), "n_routed_experts = 32768: must be at most 32767"),
    (dict(chunks=0), "chunks = 0: must be at least 1"),
    (dict(ep=ExpertParallel(None, 2, 0), two_hop=True), "two_hop = True: needs to know which ranks share a node")])
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        Dispatcher(**dict(num_experts=E, ep=ExpertParallel.single()) | settings)


def tensors_of(transit: Transit) -> list[torch.Tensor]:
    """Every tensor that a transit keeps alive."""
    found, seen, left = [], set(), [transit]
    while left:
        thing = left.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            found.append(thing)
        elif isinstance(thing, dict | list | tuple):
            left += thing.values() if isinstance(thing, dict) else thing
        elif type(thing).__module__.startswith("megatron_ext"):
            left.append(getattr(thing, "__dict__", None))
    return found


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("there", ["model", "fp8"])
def test_a_transit_holds_no_activations_between_its_parts(chunks, there):
    """Nor the tokens, nor the results of experts, nor a gradient."""
    x, weights, k = torch.randn(50, H), torch.rand(50, K), 50 * K
    transit = dispatcher(there, chunks=chunks).announce(choice(50), x)

    def kept() -> int:
        gc.collect()
        return max(tensor.untyped_storage().nbytes() for tensor in tensors_of(transit))

    transit.start_dispatch(x, weights)
    assert kept() > 50 * H, "the measure sees what is under way"
    parts = [transit.finish_dispatch(chunk) for chunk in range(chunks)]
    assert kept() <= 16 * k
    results = [rows.clone() for rows, _ in parts]
    gone = weakref.ref(results[0])
    transit.start_combine(results, [w for _, w in parts])
    transit.finish_combine()
    assert kept() <= 16 * k
    transit.start_combine_backward(x.clone())
    for chunk, result in enumerate(results):
        transit.finish_combine_backward(chunk, result, parts[chunk][1])
    assert kept() <= 16 * k
    transit.start_dispatch_backward(results, [w for _, w in parts])
    transit.finish_dispatch_backward()
    assert kept() <= 16 * k
    del results, result
    assert gone() is None
