"""The linear layers: plain autograd, the weight-gradient sink, and the switch to FP8."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_ext import fp8
from megatron_ext.fp8 import Precision
from megatron_ext.layers.linear import Linear, PrecisionLinear, linear


def test_equals_torch() -> None:
    torch.manual_seed(0)
    layer = Linear(5, 7).double()
    x = torch.randn(2, 3, 5, dtype=torch.double, requires_grad=True)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
    assert torch.autograd.gradcheck(linear, (x, layer.weight, layer.bias))


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    operands = {"x": torch.randn(3, 5), "weight": torch.randn(7, 5), "bias": torch.randn(7)}
    for name, tensor in operands.items():
        tensor.requires_grad_(name != frozen)
    linear(**operands).square().sum().backward()
    assert {name for name, tensor in operands.items() if tensor.grad is None} == {frozen}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sink_gets_what_autograd_would(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = Linear(5, 7).to(dtype)
    x = torch.randn(2, 3, 5).to(dtype).requires_grad_()
    layer(x).float().square().sum().backward()
    expected = {name: p.grad.float() for name, p in layer.named_parameters()}
    dx, x.grad = x.grad, None

    waiting: list[tuple[torch.nn.Parameter, Callable]] = []
    for parameter in layer.parameters():
        parameter.grad = None
        parameter.weight_grad_sink = lambda p, accumulate: waiting.append((p, accumulate))
    layer(x).float().square().sum().backward()
    assert torch.equal(x.grad, dx)
    assert len(waiting) == 2
    for name, parameter in layer.named_parameters():
        assert parameter.grad is None
        main_grad = torch.ones(parameter.shape)
        with torch.no_grad():
            next(accumulate for p, accumulate in waiting if p is parameter)(main_grad)
        tolerance = {"atol": 1e-5, "rtol": 1e-2 if dtype == torch.bfloat16 else 1e-6}
        torch.testing.assert_close(main_grad - 1, expected[name], **tolerance)


def test_bf16_is_multiplied_in_fp32_and_rounded_once() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 500).bfloat16(), torch.randn(4, 500).bfloat16()
    assert torch.equal(linear(x, weight), (x.float() @ weight.float().T).bfloat16())


def test_a_bias_is_added_without_promotion() -> None:
    x, weight, bias = torch.randn(3, 5).bfloat16(), torch.randn(7, 5).bfloat16(), torch.randn(7)
    assert linear(x, weight, bias).dtype == torch.bfloat16


def test_autocast_chooses_the_dtype() -> None:
    torch.manual_seed(0)
    layer, theirs = Linear(5, 7), torch.nn.Linear(5, 7)
    theirs.load_state_dict(layer.state_dict())
    x = torch.randn(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x), theirs(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    assert y.equal(expected)
    (y.float() + expected.float()).sum().backward()
    assert layer.weight.grad.equal(theirs.weight.grad)
    assert layer.weight.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert layer(x).dtype == torch.float32


def test_a_compiled_layer_is_plain_autograd() -> None:
    """Tracing would fix the sink that the parameter has while the trace is made."""
    torch.manual_seed(0)
    layer, x = Linear(5, 7), torch.randn(3, 5)
    layer.weight.weight_grad_sink = lambda p, accumulate: pytest.fail("a compiled layer called the sink")
    torch.compile(layer, backend="eager", fullgraph=True)(x).sum().backward()
    assert layer.weight.grad.equal(x.sum(0).expand(7, 5))


def test_dtypes_that_differ_are_torchs_error() -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        linear(torch.randn(3, 5), torch.randn(7, 5).bfloat16())


def test_precision_linear_starts_as_hugging_face_does() -> None:
    torch.manual_seed(0)
    layer = PrecisionLinear(200, 300, bias=True, std=0.05)
    assert layer.weight.std().item() == pytest.approx(0.05, rel=0.02)
    assert not layer.bias.any()
    assert PrecisionLinear(2, 3, std=0.05).bias is None


def test_precision_linear_quantises_when_told() -> None:
    torch.manual_seed(0)
    layer = PrecisionLinear(160, 40, bias=True, std=0.1)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 3, 160)
    plain = layer(x)
    precision = Precision(fp8=True)
    layer.set_precision(precision)
    quantised = layer(x)
    assert torch.equal(quantised, fp8.linear(x, layer.weight, layer.bias, precision=precision))
    assert not torch.equal(quantised, plain)
    layer.set_precision(Precision(fp8=False))
    assert torch.equal(layer(x), plain)
