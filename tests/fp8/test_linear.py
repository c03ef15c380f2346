"""fp8.linear: its three GEMMs, what it keeps for backward, the sink, the weight cache."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ext import fp8
from megatron_ext.config.errors import ConfigError
from megatron_ext.fp8.operators import call
from megatron_ext.kernels.reference import e5m6 as reference_e5m6
from megatron_ext.kernels.reference import quantize as reference

SHAPES = [(1, 128, 128), (7, 200, 130), (129, 64, 96), (260, 384, 256)]


def operands(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """FP64 values of what is multiplied: x, W for fprop; dy for dgrad; dy and x in token tiles for wgrad."""
    x8 = reference.quantize(x, power_of_two=True)
    weight8, dy8 = reference.quantize(weight, (128, 128)), reference.quantize(dy)
    pairs = x8, weight8, dy8, reference.quantize_transposed(dy), reference.requantize_transposed(*x8)
    return tuple(reference.dequantize(*pair).double() for pair in pairs)


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("t", "k", "n"), SHAPES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_equals_fp64_products_of_the_dequantised_operands(t: int, k: int, n: int, backend: str) -> None:
    x, weight, bias = torch.randn(t, k).requires_grad_(), nn.Parameter(torch.randn(n, k)), nn.Parameter(torch.randn(n))
    dy = torch.randn(t, n) * torch.exp(2 * torch.randn(t, 1))
    y = fp8.linear(x, weight, bias, precision=fp8.Precision(fp8=True, backend=backend))
    y.backward(dy)
    x8, weight8, dy8, dy8_nt, x8_kt = operands(x.detach(), weight.detach(), dy)
    assert relative_error(y, x8 @ weight8.t() + bias.detach()) < 1e-6
    assert relative_error(x.grad, dy8 @ weight8) < 1e-6
    assert relative_error(weight.grad, dy8_nt @ x8_kt.t()) < 1e-6
    assert relative_error(bias.grad, dy.double().sum(0)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_close_to_the_unquantised_layer(dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(*shape).to(dtype).requires_grad_() for shape in ((2, 40, 256), (128, 256), (128,)))
    dy = torch.randn(2, 40, 128).to(dtype)
    y = fp8.linear(x, weight, bias)
    found = (y, *torch.autograd.grad(y, (x, weight, bias), dy))
    expected_y = F.linear(x.float(), weight.float(), bias.float())
    expected = (expected_y, *torch.autograd.grad(expected_y, (x, weight, bias), dy.float()))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        assert relative_error(a, b) < 0.045  # two operands, each 2.7 % (31.5 dB)


def test_backends_agree() -> None:
    """Quantised bytes are the same and so are the FP32 products of them."""
    x, weight, dy = torch.randn(130, 200), torch.randn(70, 200), torch.randn(130, 70)
    results = []
    for backend in ("cpu", "reference"):
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = fp8.linear(*inputs, precision=fp8.Precision(fp8=True, backend=backend))
        results.append((y, *torch.autograd.grad(y, inputs, dy)))
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_torch_s_default_dtype_is_of_no_concern(backend: str) -> None:
    """Scales are FP32 whatever dtype tensors get that are made without one; half the room overwrote the heap."""
    x, weight, dy = (torch.randn(*shape).bfloat16() for shape in ((260, 384), (256, 384), (260, 256)))
    precision, found = fp8.Precision(fp8=True, backend=backend), []
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
            y = fp8.linear(*inputs, precision=precision)
            found.append((y, *torch.autograd.grad(y, inputs, dy)))
            assert fp8.quantize(weight[None], (128, 128), backend=backend).scale.dtype == torch.float32
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_fp64_is_quantised_from_its_fp32_value() -> None:
    x, weight, dy = torch.randn(7, 200), torch.randn(64, 200), torch.randn(7, 64)
    found = []
    for dtype in (torch.float32, torch.float64):
        inputs = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        y = fp8.linear(*inputs)
        found.append((y, *torch.autograd.grad(y, inputs, dy.to(dtype))))
    assert all(b.dtype == torch.float64 and torch.equal(a, b.float()) for a, b in zip(*found, strict=True))


def test_no_tokens() -> None:
    x, weight = torch.zeros(0, 3, 128, requires_grad=True), nn.Parameter(torch.randn(5, 128))
    y = fp8.linear(x, weight)
    y.sum().backward()
    assert y.shape == (0, 3, 5) and x.grad.shape == x.shape and torch.equal(weight.grad, torch.zeros(5, 128))


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_only_what_needs_a_gradient_gets_one(needs: tuple[bool, bool]) -> None:
    x, weight = torch.randn(4, 128, requires_grad=needs[0]), torch.randn(8, 128, requires_grad=needs[1])
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = fp8.linear(x, weight)
    assert any(t.element_size() == 1 for t in saved) == needs[1]  # x is kept for the weight gradient alone
    if any(needs):
        y.sum().backward()
    assert (x.grad is not None, weight.grad is not None) == needs


def test_an_infinite_activation_is_seen() -> None:
    x, weight = torch.randn(2, 256), torch.randn(3, 256)
    x[0, 5] = torch.inf
    y = fp8.linear(x, weight)
    assert y[0].isnan().all() and y[1].isfinite().all()


# ---- what is kept for backward ------------------------------------------------------------------------


def test_the_activation_is_kept_in_fp8_only() -> None:
    x, weight = torch.randn(64, 256, requires_grad=True), nn.Parameter(torch.randn(32, 256))
    saved: list[Tensor] = []
    hidden = x * 2
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = fp8.linear(hidden, weight)
    activations = [t for t in saved if t.shape != weight.shape]
    assert {t.dtype for t in activations} == {torch.float8_e4m3fn, torch.float32}
    assert sum(t.numel() * t.element_size() for t in activations) == 64 * 256 + 64 * 2 * 4
    scale = next(t for t in activations if t.dtype == torch.float32)
    assert (scale.view(torch.int32) & 0x7FFFFF == 0).all()  # powers of two
    alive = weakref.ref(hidden)
    del hidden
    assert alive() is None
    y.sum().backward()
    assert x.grad is not None


def test_the_input_can_be_kept_in_e5m6() -> None:
    """12 bits a number and an eighth of the rounding; what is multiplied forward is the same."""
    x, weight, dy = torch.randn(130, 256), nn.Parameter(torch.randn(32, 256)), torch.randn(130, 32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = fp8.linear(x, weight, cache="e5m6")
    assert torch.equal(y, fp8.linear(x, weight))
    assert sum(t.nbytes for t in saved if t.shape != weight.shape) == 130 * (256 + 128 + 2 * 4)
    y.backward(dy)
    packed = reference_e5m6.unpack_e5m6(*reference_e5m6.pack_e5m6(x))
    x8, dy8 = reference.quantize_transposed(packed, True), reference.quantize_transposed(dy)
    expected = reference.dequantize(*dy8).double() @ reference.dequantize(*x8).double().t()
    assert relative_error(weight.grad, expected) < 1e-6
    for wrong, given in (("e5m2", x), ("e5m6", fp8.quantize_input(x, fp8.Precision(fp8=True)))):
        with pytest.raises(ConfigError, match=f"cache = '{wrong}': must be"):
            fp8.linear(given, weight, cache=wrong)


def collect(parameter: Tensor) -> list[Any]:
    """Puts a sink on the parameter that keeps its closures."""
    closures: list[Any] = []
    parameter.weight_grad_sink = lambda owner, accumulate: closures.append((owner, accumulate))
    return closures


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sink_equals_autograd_bit_for_bit(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(130, 200).to(dtype), torch.randn(70, 200).to(dtype), torch.randn(70).to(dtype)
    dy = torch.randn(130, 70).to(dtype)
    plain = [nn.Parameter(weight.clone()), nn.Parameter(bias.clone())]
    fp8.linear(x, *plain).backward(dy)
    sunk = [nn.Parameter(weight.clone()), nn.Parameter(bias.clone())]
    closures = [collect(p) for p in sunk]
    fp8.linear(x, *sunk).backward(dy)
    for expected, parameter, ((owner, accumulate),) in zip(plain, sunk, closures, strict=True):
        assert parameter.grad is None and owner is parameter
        main_grad = torch.zeros(parameter.shape)
        accumulate(main_grad)
        assert torch.equal(main_grad.to(dtype), expected.grad)
        once = main_grad.clone()
        accumulate(main_grad)
        assert torch.allclose(main_grad, 2 * once, rtol=1e-5, atol=1e-6)


def test_a_waiting_weight_gradient_holds_fp8_only() -> None:
    weight = nn.Parameter(torch.randn(96, 256))
    closures = collect(weight)
    fp8.linear(torch.randn(64, 256), weight).backward(torch.randn(64, 96))
    held: list[Tensor] = []
    for cell in closures[0][1].__closure__:
        value = cell.cell_contents
        held += [v for v in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(v, Tensor)]
    assert sum(t.numel() * t.element_size() for t in held) == 64 * (256 + 96) + 4 * (64 * 2 + 96)


# ---- the weight cache ---------------------------------------------------------------------------------


@pytest.fixture
def quantised_blocks(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Counts the blocks that fp8.linear quantises by."""
    counts: Counter = Counter()

    def spy(operator: str, *args: Any, **kwargs: Any) -> Any:
        if operator == "quantize":
            counts[args[1]] += 1
        return call(operator, *args, **kwargs)

    monkeypatch.setattr(sys.modules["megatron_ext.fp8.linear"], "call", spy)
    return counts


def test_weight_is_quantised_once_until_the_cache_is_cleared(quantised_blocks: Counter) -> None:
    cache, weight, x = fp8.WeightCache(), nn.Parameter(torch.randn(8, 128)), torch.randn(4, 128, requires_grad=True)
    precision = fp8.Precision(fp8=True, weights=cache)
    for _ in range(3):
        y = fp8.linear(x, weight, precision=precision)
        y.sum().backward()
    assert quantised_blocks[128, 128] == 1 and quantised_blocks[1, 128] == 3
    weight.data.neg_()  # as an optimizer writes through a flat buffer: not noticed
    assert torch.equal(fp8.linear(x, weight, precision=precision), y)
    cache.clear()
    assert torch.equal(fp8.linear(x, weight, precision=precision), -y)
    assert quantised_blocks[128, 128] == 2
    fp8.linear(x, weight).sum().backward()  # without a cache: forward and backward
    assert quantised_blocks[128, 128] == 4


def test_cache_notices_edits_that_torch_counts() -> None:
    cache, weight, x = fp8.WeightCache(), nn.Parameter(torch.randn(8, 128)), torch.randn(4, 128)
    precision = fp8.Precision(fp8=True, weights=cache)
    y = fp8.linear(x, weight, precision=precision)
    with torch.no_grad():
        weight.neg_()
    assert torch.equal(fp8.linear(x, weight, precision=precision), -y)
    weight.data = weight.data.clone().neg_()
    assert torch.equal(fp8.linear(x, weight, precision=precision), y)
    assert len(cache) == 1


def test_cache_keeps_no_parameter_and_tells_them_apart() -> None:
    cache = fp8.WeightCache()
    precision, x = fp8.Precision(fp8=True, weights=cache), torch.randn(4, 128)
    for _ in range(20):  # ids are reused: an entry must not outlive its parameter
        weight = nn.Parameter(torch.randn(8, 128))
        assert torch.equal(fp8.linear(x, weight, precision=precision), fp8.linear(x, weight))
        del weight
    assert len(cache) == 0
    weight = nn.Parameter(torch.randn(8, 128))
    for backend in ("cpu", "reference"):
        fp8.linear(x, weight, precision=fp8.Precision(fp8=True, weights=cache, backend=backend))
    assert len(cache) == 2


def test_a_weight_changed_between_forward_and_backward_is_refused() -> None:
    weight, x = nn.Parameter(torch.randn(8, 128)), torch.randn(4, 128, requires_grad=True)
    y = fp8.linear(x, weight)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---- errors -------------------------------------------------------------------------------------------


def test_refusals() -> None:
    x, weight = torch.randn(4, 128), torch.randn(8, 128)
    with pytest.raises(ConfigError, match=r"x = \[4, 128\]: must be \[\.\.\., K\] for a weight \[N, K\] = \[8, 64\]"):
        fp8.linear(x, weight[:, :64])
    with pytest.raises(ConfigError, match=r"precision\.fp8"):
        fp8.linear(x, weight, precision=fp8.Precision(fp8=False))
    with pytest.raises(ConfigError, match=r"kernels\.backend"):
        fp8.linear(x, weight, precision=fp8.Precision(fp8=True, backend="triton4"))
    with pytest.raises(ConfigError, match="dispatch_dtype"):
        fp8.Precision(dispatch_dtype="fp16")  # type: ignore[arg-type]


@pytest.mark.gpu
def test_reference_on_a_gpu_writes_the_same_bytes() -> None:
    x = torch.randn(130, 300) * torch.exp(8 * torch.randn(130, 1))
    for block in ((1, 128), (128, 128)):
        for power_of_two in (False, True):
            found = reference.quantize(x.cuda(), block, power_of_two)
            expected = reference.quantize(x, block, power_of_two)
            assert torch.equal(found[0].view(torch.uint8).cpu(), expected[0].view(torch.uint8))
            assert torch.equal(found[1].cpu(), expected[1])


@pytest.mark.parametrize("cache", ["e4m3", "e5m6"])
def test_without_the_activation_cache_the_input_stays_as_it_is(cache: str) -> None:
    x, weight, dy = torch.randn(130, 256), nn.Parameter(torch.randn(32, 256)), torch.randn(130, 32)
    fp8.linear(x, weight, precision=fp8.Precision(fp8=True, activation_cache=False), cache=cache).backward(dy)
    x8, dy8 = reference.quantize_transposed(x, True), reference.quantize_transposed(dy)
    dy_NT, x_KT = (reference.dequantize(*pair).double() for pair in (dy8, x8))
    assert relative_error(weight.grad, dy_NT @ x_KT.t()) < 1e-6


@pytest.mark.parametrize(("change", "message"), [
    (dict(bias=torch.zeros(31)), r"bias = \[31\]: must be \[N\] = \[32\]"),
    (dict(bias=torch.zeros(1)), r"bias = \[1\]: must be \[N\]"),
    (dict(weight=torch.zeros(2, 32, 256)), r"weight = \[2, 32, 256\]: must be \[N, K\]"),
    (dict(x=torch.ones(3, 256, dtype=torch.int64)), "x = 'torch.int64': must be a tensor in floating point"),
    (dict(x=fp8.quantize(torch.ones(3, 256))), "x = 'QuantizedTensor': must be a tensor"),
    (dict(weight=torch.zeros(32, 256, dtype=torch.float8_e4m3fn)), "weight = 'torch.float8_e4m3fn': must be")])
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fp8.linear(**dict(x=torch.zeros(3, 256), weight=torch.zeros(32, 256)) | change)
