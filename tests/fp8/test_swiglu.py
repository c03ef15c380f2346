"""fp8.swiglu: its products and its recomputation against FP64 of the quantised operands; what it keeps; the sinks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ext import fp8
from megatron_ext.config.errors import ConfigError
from megatron_ext.kernels.reference.quantize import (
    dequantize,
    quantize,
    quantize_transposed,
    requantize_transposed,
)

H, INNER = 256, 192
SIZES = [130, 0, 1, 69]
T = sum(SIZES)
QUANTISED = fp8.Precision(fp8=True)


def operands(dtype: torch.dtype = torch.float32,
             experts: int | None = None) -> tuple[Tensor, list[nn.Parameter], Tensor]:
    generator = torch.Generator().manual_seed(0)
    stack = () if experts is None else (experts,)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    weights = [nn.Parameter(draw(*stack, *shape, scale=0.1)) for shape in ((INNER, H), (INNER, H), (H, INNER))]
    return draw(T, H).requires_grad_(), weights, draw(T, H)


def composed(x: Tensor, weights: list[nn.Parameter]) -> Tensor:
    gate, up, down = weights
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def exact(pair: tuple[Tensor, Tensor]) -> Tensor:
    return dequantize(*pair).double()


def test_every_product_is_that_of_the_quantised_operands() -> None:
    x, (gate_w, up_w, down_w), dy = operands()
    y = fp8.swiglu(x, gate_w, up_w, down_w, precision=QUANTISED)
    y.backward(dy)
    gate_8, up_8, down_8 = (exact(quantize(w.detach(), (128, 128))) for w in (gate_w, up_w, down_w))
    x8 = quantize(x.detach(), power_of_two=True)
    gate, up = (exact(x8) @ w.t() for w in (gate_8, up_8))
    h8 = quantize((F.silu(gate) * up).float(), power_of_two=True)
    assert relative_error(y, exact(h8) @ down_8.t()) < 1e-4  # a number at the edge may fall on its other side

    gate, up = (exact(quantize(t.float(), power_of_two=True)) for t in (gate, up))  # as they were kept
    h8 = quantize((F.silu(gate) * up).float(), power_of_two=True)
    dh = exact(quantize(dy)) @ down_8
    s = gate.sigmoid()
    dgate, dup = (t.float() for t in (dh * up * s * (1 + gate * (1 - s)), dh * gate * s))
    dx = exact(quantize(dgate)) @ gate_8 + exact(quantize(dup)) @ up_8
    assert relative_error(x.grad, dx) < 1e-4
    x8_t, h8_t = exact(requantize_transposed(*x8)), exact(requantize_transposed(*h8))
    for weight, d, kept in ((gate_w, dgate, x8_t), (up_w, dup, x8_t), (down_w, dy, h8_t)):
        assert relative_error(weight.grad, exact(quantize_transposed(d)) @ kept.t()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grouped", [False, True])
def test_close_to_the_unquantised_network(dtype: torch.dtype, grouped: bool) -> None:
    x, weights, dy = operands(dtype, len(SIZES) if grouped else None)
    y = fp8.swiglu(x, *weights, SIZES if grouped else None, precision=QUANTISED)
    found = y, *torch.autograd.grad(y, (x, *weights), dy)
    x_exact, *exact_weights = (t.detach().double().requires_grad_() for t in (x, *weights))
    if grouped:
        parts = zip(x_exact.split(SIZES), zip(*exact_weights, strict=True), strict=True)
        expected_y = torch.cat([composed(part, list(ws)) for part, ws in parts])
    else:
        expected_y = composed(x_exact, exact_weights)
    expected = expected_y, *torch.autograd.grad(expected_y, (x_exact, *exact_weights), dy.double())
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        # Each rounding to E4M3 is 2.7 % (31.5 dB). In dgate lie those of dy, Wd, two of what gate and up were made of
        # and one of what they were kept in, its own and that of Wg: 8 % together.
        assert relative_error(a, b) < 0.09
    if grouped:
        assert all((grad[1] == 0).all() for grad in found[2:])


def test_a_group_is_alone() -> None:
    """Neither tokens nor scales of other experts change anything of one."""
    x, weights, dy = operands(experts=len(SIZES))
    y = fp8.swiglu(x, *weights, SIZES, precision=QUANTISED)
    y.backward(dy)
    for e, rows in ((0, slice(0, 130)), (3, slice(131, 200))):
        x_e, ws = x.detach()[rows].clone().requires_grad_(), [nn.Parameter(w.detach()[e].clone()) for w in weights]
        y_e = fp8.swiglu(x_e, *ws, precision=QUANTISED)
        y_e.backward(dy[rows])
        pairs = [(y_e, y[rows]), (x_e.grad, x.grad[rows])]
        pairs += [(a.grad, b.grad[e]) for a, b in zip(ws, weights, strict=True)]
        for alone, among in pairs:
            assert relative_error(among, alone) < 1e-6


def saved_bytes(run: Callable[[], Tensor], weights: list[nn.Parameter]) -> int:
    saved: dict[tuple[int, torch.dtype], Tensor] = {}  # holds them: an address is not used twice
    theirs = {w.data_ptr() for w in weights}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in theirs:
            saved[t.data_ptr(), t.dtype] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(t.nbytes for t in saved.values())


def test_what_is_kept() -> None:
    x, weights, _ = operands(torch.bfloat16)
    scales = 4 * (2 + 2 + 2)
    assert saved_bytes(lambda: fp8.swiglu(x, *weights, precision=QUANTISED), weights) == T * (H + 2 * INNER + scales)
    assert saved_bytes(lambda: composed(x, weights), weights) == T * (2 * H + 8 * INNER)


def test_sinks_equal_autograd_bit_for_bit_and_hold_bytes() -> None:
    x, weights, dy = operands(torch.bfloat16)
    fp8.swiglu(x, *weights, precision=QUANTISED).backward(dy)
    expected, dx = [w.grad for w in weights], x.grad
    x.grad = None
    closures = []
    for w in weights:
        w.grad, w.weight_grad_sink = None, lambda owner, accumulate: closures.append((owner, accumulate))
    fp8.swiglu(x, *weights, precision=QUANTISED).backward(dy)
    assert torch.equal(x.grad, dx) and {id(owner) for owner, _ in closures} == {id(w) for w in weights}
    for owner, accumulate in closures:
        main_grad = torch.zeros(owner.shape)
        accumulate(main_grad)
        once = main_grad.clone()
        [grad] = [g for w, g in zip(weights, expected, strict=True) if w is owner]
        assert owner.grad is None and torch.equal(once.bfloat16(), grad)
        accumulate(main_grad)
        assert torch.allclose(main_grad, 2 * once, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("needs", [(True, False, False, False), (False, True, False, False),
                                   (False, False, True, True)], ids=str)
def test_only_what_needs_a_gradient_gets_one(needs: tuple[bool, ...]) -> None:
    x, weights, dy = operands()
    everything = [x, *weights]
    fp8.swiglu(*everything, precision=QUANTISED).backward(dy)
    expected = [t.grad for t in everything]
    for t, need in zip(everything, needs, strict=True):
        t.grad = None
        t.requires_grad_(need)
    fp8.swiglu(*everything, precision=QUANTISED).backward(dy)
    for t, grad, need in zip(everything, expected, needs, strict=True):
        assert torch.equal(t.grad, grad) if need else t.grad is None


def test_no_tokens() -> None:
    _, weights, _ = operands(experts=2)
    x = torch.zeros(0, H, requires_grad=True)
    fp8.swiglu(x, *weights, [0, 0], precision=QUANTISED).sum().backward()
    assert x.grad.shape == (0, H) and all((w.grad == 0).all() for w in weights)


@pytest.mark.parametrize(("change", "message"), [
    (dict(precision=fp8.Precision()), r"precision\.fp8 = False: fp8\.swiglu always quantises"),
    (dict(x=torch.zeros(4, 100)), r"x = \[4, 100\]: must be \[\.\.\., h\] for a gate \[I, h\] = \[192, 256\]"),
    (dict(x=torch.zeros(4, H, dtype=torch.int32)), r"x = 'torch.int32': must be a tensor in floating point"),
    (dict(gate=torch.zeros(1, INNER, H)), r"gate = \[1, 192, 256\]: must be \[I, h\]"),
    (dict(up=torch.zeros(INNER, 100)), r"up = \[192, 100\]: must be \[I, h\] = \[192, 256\], as gate is"),
    (dict(down=torch.zeros(INNER, H)), r"down = \[192, 256\]: must be \[h, I\] = \[256, 192\]"),
    (dict(group_sizes=[T]), r"gate = \[192, 256\]: must be \[E, I, h\]")])
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    x, (gate, up, down), _ = operands()
    with pytest.raises(ConfigError, match=message):
        fp8.swiglu(**dict(x=x, gate=gate, up=up, down=down, precision=QUANTISED) | change)


def test_without_the_activation_cache() -> None:
    """x, gate and up stay as they are; what is multiplied forward is the same, the gradients come closer."""
    x, weights, dy = operands(torch.bfloat16)
    plain = fp8.Precision(fp8=True, activation_cache=False)
    assert saved_bytes(lambda: fp8.swiglu(x, *weights, precision=plain), weights) == T * 2 * (H + 2 * INNER)
    y = fp8.swiglu(x, *weights, precision=plain)
    assert torch.equal(y, fp8.swiglu(x, *weights, precision=QUANTISED))
    exact = [t.detach().double().requires_grad_() for t in (x, *weights)]
    expected = torch.autograd.grad(composed(exact[0], exact[1:]), exact, dy.double())
    errors = [[relative_error(a, b) for a, b in zip(torch.autograd.grad(
        fp8.swiglu(x, *weights, precision=precision), (x, *weights), dy), expected, strict=True)]
        for precision in (plain, QUANTISED)]
    assert all(kept < cached < 0.09 for kept, cached in zip(*errors, strict=True))
