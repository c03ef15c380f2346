"""fp8.grouped_linear, quantised and not: every expert as if it were alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from megatron_ext import fp8
from megatron_ext.config.errors import ConfigError

QUANTISED, PLAIN = fp8.Precision(fp8=True), fp8.Precision(fp8=False)
SIZES = [[5, 0, 130, 1], [0, 0, 0], [0, 40], [128, 256]]
precisions = pytest.mark.parametrize("precision", [QUANTISED, PLAIN], ids=["fp8", "plain"])


def run(x: Tensor, sizes: Any, weight: Tensor, dy: Tensor, precision: fp8.Precision) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx, dW."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = fp8.grouped_linear(x, sizes, weight, precision=precision)
    return (y.detach(), *torch.autograd.grad(y, (x, weight), dy))


def one_by_one(
    x: Tensor, sizes: list[int], weight: Tensor, dy: Tensor, quantised: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from one layer per expert."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    experts = zip(x.split(sizes), weight, strict=True)
    y = torch.cat([fp8.linear(x_e, w_e) if quantised else x_e @ w_e.t() for x_e, w_e in experts])
    return (y.detach(), *torch.autograd.grad(y, (x, weight), dy))


def inputs(sizes: list[int], n: int = 70, k: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(sum(sizes), k), torch.randn(len(sizes), n, k), torch.randn(sum(sizes), n)


@precisions
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_equals_one_layer_per_expert(precision: fp8.Precision, sizes: list[int], as_tensor: bool) -> None:
    x, weight, dy = inputs(sizes)
    found = run(x, torch.tensor(sizes) if as_tensor else sizes, weight, dy, precision)
    for a, b in zip(found, one_by_one(x, sizes, weight, dy, precision.fp8), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    assert all((found[2][e] == 0).all() for e, size in enumerate(sizes) if size == 0)


@settings(max_examples=25)
@given(st.lists(st.integers(0, 140), min_size=1, max_size=6), st.integers(1, 140), st.integers(1, 140))
def test_any_sizes(sizes: list[int], n: int, k: int) -> None:
    x, weight, dy = inputs(sizes, n, k)
    found = run(x, sizes, weight, dy, QUANTISED)
    for a, b in zip(found, one_by_one(x, sizes, weight, dy, True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_plain_forward_is_exactly_the_loop() -> None:
    sizes = [5, 0, 130, 1]
    x, weight, dy = inputs(sizes)
    found, expected = run(x, sizes, weight, dy, PLAIN), one_by_one(x, sizes, weight, dy, False)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_plain_gradients_in_fp64() -> None:
    x, weight = torch.randn(6, 4, dtype=torch.float64), torch.randn(3, 5, 4, dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda x, w: fp8.grouped_linear(x, [2, 0, 4], w, precision=PLAIN), (x.requires_grad_(), weight.requires_grad_())
    )


def test_quantised_is_close_to_plain() -> None:
    sizes = [100, 3, 60]
    x, weight, dy = inputs(sizes)
    for a, b in zip(run(x, sizes, weight, dy, QUANTISED), run(x, sizes, weight, dy, PLAIN), strict=True):
        assert 0 < (a - b).norm() / b.norm() < 0.045


def test_an_experts_outlier_stays_its_own() -> None:
    """Tiles along the tokens end with the group: a huge gradient of one expert costs its neighbour no precision."""
    sizes = [40, 40]
    x, weight, dy = inputs(sizes)
    alone = run(x, sizes, weight, dy, QUANTISED)[2][1]
    dy[:40] *= 1e6
    assert torch.equal(run(x, sizes, weight, dy, QUANTISED)[2][1], alone)


@precisions
def test_bf16_in_and_out(precision: fp8.Precision) -> None:
    sizes = [20, 0, 30]
    x, weight, dy = (t.bfloat16() for t in inputs(sizes))
    found = run(x, sizes, weight, dy, precision)
    expected = one_by_one(x.float(), sizes, weight.float(), dy.float(), False)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b).norm() / b.norm() < (0.045 if precision.fp8 else 0.004)


@precisions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sink_equals_autograd_bit_for_bit(precision: fp8.Precision, dtype: torch.dtype, sizes: list[int]) -> None:
    x, weight, dy = (t.to(dtype) for t in inputs(sizes))
    parameter = nn.Parameter(weight)
    closures: list[Any] = []
    parameter.weight_grad_sink = lambda owner, accumulate: closures.append((owner, accumulate))
    fp8.grouped_linear(x, sizes, parameter, precision=precision).backward(dy)
    assert parameter.grad is None and len(closures) == 1 and closures[0][0] is parameter
    main_grad = torch.zeros(weight.shape)
    closures[0][1](main_grad)
    assert torch.equal(main_grad.to(dtype), run(x, sizes, weight, dy, precision)[2])


@precisions
def test_no_tokens_leave_the_graph_connected(precision: fp8.Precision) -> None:
    x, weight = torch.zeros(0, 128, requires_grad=True), nn.Parameter(torch.randn(2, 16, 128))
    y = fp8.grouped_linear(x * 1, [0, 0], weight, precision=precision)
    assert y.shape == (0, 16) and y.requires_grad
    (y.sum() + 0.0).backward()
    assert x.grad.shape == (0, 128) and torch.equal(weight.grad, torch.zeros(2, 16, 128))


def test_the_activation_is_kept_in_fp8_only() -> None:
    x, weight = torch.randn(64, 256), nn.Parameter(torch.randn(2, 32, 256))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fp8.grouped_linear(x, [30, 34], weight)
    activations = [t for t in saved if t.shape != weight.shape]
    assert sum(t.numel() * t.element_size() for t in activations) == 64 * 256 + 64 * 2 * 4


def test_weights_are_cached() -> None:
    cache = fp8.WeightCache()
    x, weight, _ = inputs([10, 20])
    parameter = nn.Parameter(weight)
    precision = fp8.Precision(fp8=True, weights=cache)
    y = fp8.grouped_linear(x, [10, 20], parameter, precision=precision)
    parameter.data.zero_()
    assert len(cache) == 1 and torch.equal(fp8.grouped_linear(x, [10, 20], parameter, precision=precision), y)
    cache.clear()
    assert (fp8.grouped_linear(x, [10, 20], parameter, precision=precision) == 0).all()


@pytest.mark.parametrize("sizes", [[1, 2], [1, 2, 3, 4], [-1, 5, 6], [4, 3, 2]])
def test_sizes_that_do_not_fit_are_refused(sizes: list[int]) -> None:
    with pytest.raises(ConfigError, match="group_sizes"):
        fp8.grouped_linear(torch.randn(10, 8), sizes, torch.randn(3, 4, 8))
    with pytest.raises(ConfigError, match=r"\[T, K\] for a weight \[E, N, K\]"):
        fp8.grouped_linear(torch.randn(10, 8), [10], torch.randn(1, 4, 9))
