"""RMSNorm into FP8 products: the bytes of norm and quantisation apart, gradients of torch's own, and what it keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ext import fp8
from megatron_ext.config.errors import ConfigError
from megatron_ext.layers.norm import RMSNorm

QUANTISED = fp8.Precision(fp8=True)
EPS = 1e-5


def norm(h: int, dtype: torch.dtype) -> RMSNorm:
    layer = RMSNorm(h, EPS).to(dtype)
    with torch.no_grad():
        layer.weight.add_(torch.randn(h) / 4)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("h", [128, 200, 1536])
def test_it_is_the_norm_quantised(h: int, dtype: torch.dtype) -> None:
    layer, x = norm(h, dtype), (3 * torch.randn(2, 7, h)).to(dtype)
    found = layer.quantized(x, QUANTISED)
    assert found.x.shape == x.shape and found.x.dtype == dtype
    apart = fp8.quantize_input(layer(x), QUANTISED)
    same = (found.data.view(torch.uint8) == apart.data.view(torch.uint8)).float().mean()
    assert same > 0.999  # the mean of squares is summed in FP64 here: 1 / rms may differ in its last bit
    assert torch.equal(layer.quantized(x, fp8.Precision()), layer(x)), "without FP8 it is the norm"


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradients_are_those_of_torch(dtype: torch.dtype, quantised: bool) -> None:
    if quantised and dtype == torch.float64:
        pytest.skip("rms_norm_input takes FP32 and below")
    layer, x = norm(200, dtype), (3 * torch.randn(2, 7, 200)).to(dtype).requires_grad_()
    dy = torch.randn(2, 7, 200).to(dtype)
    y = layer.quantized(x, QUANTISED).x if quantised else layer(x)
    found = torch.autograd.grad(y, (x, layer.weight), dy)
    x_exact, weight = (t.detach().double().requires_grad_() for t in (x, layer.weight))
    expected = torch.autograd.grad(F.rms_norm(x_exact, (200,), weight, EPS), (x_exact, weight), dy.double())
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-6
        assert (a.double() - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("precision", [None, QUANTISED], ids=["plain", "fp8"])
def test_it_keeps_its_input_and_one_number_a_row(precision: fp8.Precision | None) -> None:
    layer, x, saved = norm(256, torch.bfloat16), torch.randn(64, 256).bfloat16().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer.quantized(x, precision)
    kept = [t for t in saved if not isinstance(t, nn.Parameter)]
    assert sorted(t.nbytes for t in kept) == [64 * 4, 64 * 256 * 2]
    assert any(t.data_ptr() == x.data_ptr() for t in kept)


def test_the_layers_behind_send_their_gradient_through() -> None:
    layer, weight = norm(256, torch.float32), nn.Parameter(torch.randn(64, 256))
    x = torch.randn(33, 256, requires_grad=True)
    dy = torch.randn(33, 64)

    def grads(operand: Tensor | fp8.QuantizedInput) -> tuple[Tensor, ...]:
        return torch.autograd.grad(fp8.linear(operand, weight), (x, layer.weight, weight), dy)

    for a, b in zip(grads(layer.quantized(x, QUANTISED)), grads(layer(x)), strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm()


def test_what_has_no_numbers_is_not_kept() -> None:
    layer, x, weight = norm(256, torch.float32), torch.randn(33, 256), nn.Parameter(torch.randn(64, 256))
    plain, operand = fp8.Precision(fp8=True, activation_cache=False), layer.quantized(x, QUANTISED)
    for refused in (lambda: fp8.linear(operand, weight, precision=plain),
                    lambda: fp8.swiglu(operand, weight, weight, weight.t(), precision=plain),
                    lambda: fp8.rms_norm_input(x, layer.weight, EPS, plain)):
        with pytest.raises(ConfigError, match=r"precision\.activation_cache = False"):
            refused()
    assert not isinstance(layer.quantized(x, plain), fp8.QuantizedInput)


def test_a_weight_of_another_width_is_refused() -> None:
    """The compiled kernel would read behind its end."""
    with pytest.raises(ConfigError, match=r"weight = \[64\]: must be \[h\] = \[128\]"):
        fp8.rms_norm_input(torch.randn(4, 128), torch.ones(64), EPS, QUANTISED)
