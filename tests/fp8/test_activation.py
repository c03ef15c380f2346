"""SwiGLU and RMSNorm with quantisation: the reference against the mathematics, the backends against its bytes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_ext.kernels.reference import activation as reference
from megatron_ext.kernels.reference.quantize import dequantize, quantize, quantize_both
from megatron_ext.layers.norm import RMSNorm
from tests.fp8.backends import BACKENDS, Backend, assert_same_bytes, backends, wide

ROWS, COLUMNS = [0, 1, 7, 129], [1, 64, 199, 384]
SHAPES = [*itertools.product(ROWS, COLUMNS), (7, 2112), (129, 768)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def ulps(found: Tensor, expected: Tensor) -> float:
    return float(((found.double() - expected) / expected).abs().max() * 2**24)


# ---- the reference -------------------------------------------------------------------------------


def test_exp_is_good_to_the_last_bits() -> None:
    x = torch.cat([torch.linspace(-87, 87, 100_001), torch.randn(10_000), torch.randn(1000) * 1e-6])
    assert ulps(reference.exp_fp32(x), x.double().exp()) < 2
    special = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, 1e30, -1e30])
    ends = [float(reference.exp_fp32(torch.tensor(end))) for end in (87.0, -87.0)]
    expected = torch.tensor([1.0, 1.0, math.nan, *ends, *ends])
    assert torch.equal(reference.exp_fp32(special).nan_to_num(nan=-1), expected.nan_to_num(nan=-1))
    assert ends[1] >= torch.finfo(torch.float32).tiny


def test_every_step_of_exp_rounds_once() -> None:
    """The polynomial in exact arithmetic, rounded step by step: a fused or reordered operation would show."""
    x = torch.randn(2000) * 20

    def fp32(value: Tensor) -> Tensor:  # of a product of two FP32 numbers, exact in FP64, or a sum, all but exact
        return value.float().double()

    n = torch.round(fp32(x.double() * fp32(torch.tensor(1.44269504))))
    constants = [torch.tensor(c, dtype=torch.float64) for c in (0.693359375, -2.12194440e-4)]
    r = fp32(x.double() - fp32(n * constants[0]))
    r = fp32(r - fp32(n * fp32(constants[1])))
    p = torch.full_like(r, float(torch.tensor(reference.POLYNOMIAL[0])))
    for c in reference.POLYNOMIAL[1:]:
        p = fp32(fp32(p * r) + float(torch.tensor(c)))
    e = fp32(fp32(fp32(p * fp32(r * r)) + r) + 1)
    assert torch.equal(reference.exp_fp32(x).double(), torch.ldexp(e, n.int()))


def test_swiglu_is_swiglu() -> None:
    gate, up = torch.randn(64, 256) * 4, torch.randn(64, 256)
    data, scale = reference.swiglu_quantize(gate, up)
    exact = F.silu(gate.double()) * up.double()
    assert (dequantize(data, scale) - exact).norm() < 0.04 * exact.norm()
    expected, expected_scale = quantize(exact.float(), power_of_two=True)
    assert torch.equal(scale, expected_scale)
    assert (data.view(torch.uint8) == expected.view(torch.uint8)).float().mean() > 0.9999


def test_swiglu_rounds_to_the_model_s_dtype_first() -> None:
    gate, up = torch.randn(8, 128).bfloat16(), torch.randn(8, 128).bfloat16()
    h = (F.silu(gate.double()) * up.double()).bfloat16()
    assert_same_bytes(reference.swiglu_quantize(gate, up), quantize(h, power_of_two=True))


def test_swiglu_backward_is_the_gradient() -> None:
    dh, gate, up = (torch.randn(130, 200, dtype=torch.float64) * 3 for _ in range(3))
    gate.requires_grad_()
    up.requires_grad_()
    (F.silu(gate) * up).backward(dh)
    found = reference.swiglu_backward_quantize(dh.float(), gate.detach().float(), up.detach().float())
    assert len(found) == 8
    for (data, scale, data_t, scale_t), expected in ((found[:4], gate.grad), (found[4:], up.grad)):
        assert (dequantize(data, scale) - expected).norm() < 0.04 * expected.norm()
        assert (dequantize(data_t, scale_t) - expected.t()).norm() < 0.04 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_is_that_of_the_layers(dtype: torch.dtype) -> None:
    x, norm = wide(129, 384, spread=2).to(dtype), RMSNorm(384)
    torch.nn.init.normal_(norm.weight)
    norm.to(dtype)
    data, scale, rstd = reference.rms_norm_quantize(x, norm.weight.detach(), norm.eps)
    expected = norm(x).detach()
    assert (dequantize(data, scale) - expected.double()).norm() < 0.04 * expected.double().norm()
    assert ulps(rstd, (x.double().square().mean(-1) + 1e-6).rsqrt()) < 4


# ---- bytes equal the reference's -----------------------------------------------------------------


@backends("swiglu_quantize")
@pytest.mark.parametrize("power_of_two", [False, True])
def test_swiglu_writes_the_bytes_of_the_reference(backend: Backend, power_of_two: bool) -> None:
    for (rows, columns), dtype in itertools.product(SHAPES, DTYPES):
        gate, up = (wide(rows, columns, spread=2).clamp(-200, 200).to(dtype) for _ in range(2))
        for format in ("e4m3", "e5m2"):
            expected = reference.swiglu_quantize(gate, up, power_of_two, format)
            assert_same_bytes(backend.swiglu_quantize(gate, up, power_of_two, format), expected)


@backends("swiglu_backward_quantize")
@pytest.mark.parametrize("groups", [None, "one", "some"])
def test_swiglu_backward_writes_the_bytes_of_the_reference(backend: Backend, groups: str | None) -> None:
    for (rows, columns), dtype in itertools.product(SHAPES, DTYPES):
        sizes = {None: None, "one": [rows], "some": [0, rows // 3, rows - rows // 3]}[groups]
        dh, gate, up = (wide(rows, columns, spread=2).clamp(-200, 200).to(dtype) for _ in range(3))
        for inputs in ((dh, gate, up), (dh, gate.float(), up.float())):  # from the cache they come in FP32
            expected = reference.swiglu_backward_quantize(*inputs, False, "e4m3", sizes)
            tensor = None if sizes is None else torch.tensor(sizes)
            assert_same_bytes(backend.swiglu_backward_quantize(*inputs, False, "e4m3", tensor), expected)


def test_the_parts_of_swiglu_backward_are_those_of_quantize_both() -> None:
    dh, gate, up = (torch.randn(140, 130) for _ in range(3))
    s = reference.sigmoid(gate)
    dup, sizes = dh * (gate * s), [100, 0, 40]
    assert_same_bytes(reference.swiglu_backward_quantize(dh, gate, up, True, "e4m3", sizes)[4:],
                      quantize_both(dup, True, "e4m3", sizes))  # fmt: skip


@backends("rms_norm_quantize")
@pytest.mark.parametrize("power_of_two", [False, True])
def test_rms_norm_writes_the_bytes_of_the_reference(backend: Backend, power_of_two: bool) -> None:
    for (rows, columns), dtype in itertools.product([*SHAPES, (7, 7168)], DTYPES):
        x, weight = wide(rows, columns, spread=2).clamp(-6e4, 6e4).to(dtype), torch.randn(columns)
        for w in (weight, weight.to(dtype)):
            expected = reference.rms_norm_quantize(x, w, 1e-6, power_of_two)
            assert_same_bytes(backend.rms_norm_quantize(x, w, 1e-6, power_of_two), expected)


SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-30, -1e-30, 3e38, -3e38, 88.5, -88.5, 100.0, -100.0, 1e-42]


@backends("swiglu_quantize", "swiglu_backward_quantize", "rms_norm_quantize")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_special_numbers(backend: Backend, dtype: torch.dtype) -> None:
    """Each alone in a row, whose other tile is ordinary; NaN and infinities make their own block NaN."""
    gate, up, dh = (torch.randn(3 * len(SPECIAL), 200).to(dtype) for _ in range(3))
    for i, value in enumerate(SPECIAL):
        for which, tensor in enumerate((gate, up, dh)):
            tensor[3 * i + which, 7] = value
    found = backend.swiglu_quantize(gate, up)
    assert_same_bytes(found, reference.swiglu_quantize(gate, up))
    assert found[1][0, 0].isnan() and not found[1][:, 1].isnan().any()
    found = backend.swiglu_backward_quantize(dh, gate, up)
    assert_same_bytes(found, reference.swiglu_backward_quantize(dh, gate, up))
    found = backend.rms_norm_quantize(gate, torch.randn(200), 1e-6)
    expected = reference.rms_norm_quantize(gate, up[0].float(), 1e-6)
    assert_same_bytes(backend.rms_norm_quantize(gate, up[0].float(), 1e-6), expected)
    data, scale, rstd = found
    assert rstd[0].isnan() and scale[0].isnan().all()  # a row with NaN is NaN
    assert rstd[3] == 0 and scale[3, 0].isnan() and not data[3, 128:].float().any()  # infinity: its block, and zeros


@settings(max_examples=40)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=140), st.sampled_from(["float32", "bfloat16"]))
def test_any_bits_at_all(bits: list[int], dtype: str) -> None:
    numbers = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32).view(1, -1)
    gate, up = numbers.to(getattr(torch, dtype)), numbers.flip(1).to(getattr(torch, dtype))
    if not math.isfinite(float(gate.float().abs().max())):
        gate = gate.where(gate.isfinite(), torch.zeros_like(gate))
    expected = reference.swiglu_quantize(gate, up), reference.rms_norm_quantize(gate, up[0], 1e-6)
    for backend in BACKENDS.values():
        assert_same_bytes(backend.swiglu_quantize(gate, up), expected[0])
        data, scale, _ = backend.rms_norm_quantize(gate, up[0], 1e-6)
        assert_same_bytes((data, scale), expected[1][:2])
