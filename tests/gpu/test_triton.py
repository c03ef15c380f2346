"""The Triton backend on a GPU: bytes against the reference on the CPU, products against FP64.

Not yet run on a device: none was at hand when this was written. The same kernels run in Triton's interpreter on every
machine (tests/kernels/test_triton_operators.py); what only a device can show is its conversions to FP8, its division,
and that compiling changed nothing. `make test-gpu` runs it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from megatron_ext.kernels import triton_kernels
from megatron_ext.kernels.layout import FORMATS
from megatron_ext.kernels.reference import activation, adamw, e5m6, quantize, rows
from megatron_ext.kernels.reference.adamw import AdamWScalars

pytestmark = pytest.mark.gpu

FP32, BF16 = torch.float32, torch.bfloat16
SIZES = [[130, 0, 60, 0, 1, 833], [0, 0, 1024], [128] * 8, [1] * 64 + [960]]

dtypes = pytest.mark.parametrize("dtype", [FP32, BF16, torch.float16], ids=str)
groups = pytest.mark.parametrize("sizes", [None, *SIZES], ids=str)


@pytest.fixture(autouse=True)
def _usable() -> None:
    reason = triton_kernels.why_not()
    if reason is not None:
        pytest.skip(reason)


def same(found: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Equal bits, a NaN of an FP32 result being equal to any other."""
    for a, b in zip(found, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        a = a.cpu()
        if a.dtype.itemsize == 4:
            a, b = (t.where(~t.isnan(), math.nan) for t in (a, b))
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
        assert torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def wide(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    spread = torch.exp((2 if dtype == torch.float16 else 8) * torch.randn(*shape[:-1], 1))
    x = (torch.randn(*shape) * spread).where(torch.rand(*shape) > 0.05, 0.0).to(dtype)
    if len(x) > 4:
        x[0], x[1], x[2, ..., 3], x[3, ..., -1] = -0.0, x[1].sign() * 1e-30, math.nan, -math.inf
    return x


@dtypes
@pytest.mark.parametrize("block", [(1, 128), (128, 128)], ids=["tile", "block"])
def test_quantize(dtype: torch.dtype, block: tuple[int, int]) -> None:
    from megatron_ext.kernels.triton_kernels import quantize as ours

    for shape in [(0, 128), (1, 7168), (7, 384), (129, 200), (300, 640), (2, 130, 1000)]:
        for power_of_two in (False, True):
            for format in FORMATS:
                x = wide(*shape, dtype=dtype)
                found, expected = (f(x_, block, power_of_two, format)
                                   for f, x_ in ((ours.quantize, x.cuda()), (quantize.quantize, x)))
                same(found, expected)
                same([ours.dequantize(*found)], [quantize.dequantize(*expected)])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_any_bits_at_all(power_of_two: bool, format: str) -> None:
    """Random bits, and rows of any largest magnitude with numbers near the boundaries between FP8 numbers."""
    from megatron_ext.kernels.triton_kernels import quantize as ours

    bits = torch.randint(-2**31, 2**31, (4096, 1280)).to(torch.int32).view(FP32)
    top = torch.randint(0, 0x7F800000, (1 << 16, 1)).to(torch.int32).view(FP32)
    near = top.double() / 448 * (torch.arange(128) % 33) / 2.0 ** (torch.arange(128) % 7)
    near = (near * (1 + (torch.arange(128) % 5 - 2) * 2.0**-24)).float()
    near[:, :1] = top
    for x in (bits, near):
        same(ours.quantize(x.cuda(), (1, 128), power_of_two, format),
             quantize.quantize(x, (1, 128), power_of_two, format))


@groups
def test_tiles_of_tokens(sizes: list[int] | None) -> None:
    from megatron_ext.kernels.triton_kernels import activation as fused
    from megatron_ext.kernels.triton_kernels import quantize as ours

    given = None if sizes is None else torch.tensor(sizes).cuda()
    for columns, power_of_two in ((200, False), (2048, True)):
        dh, gate, up = (wide(1024, columns, dtype=BF16).clamp(-300, 300) for _ in range(3))
        options = power_of_two, "e4m3"
        same(ours.quantize_both(dh.cuda(), *options, given), quantize.quantize_both(dh, *options, sizes))
        same(ours.quantize_transposed(dh.cuda(), *options, given), quantize.quantize_transposed(dh, *options, sizes))
        tiles = quantize.quantize(dh, (1, 128), *options)
        same(ours.requantize_transposed(*(t.cuda() for t in tiles), given),
             quantize.requantize_transposed(*tiles, sizes))
        same(fused.swiglu_backward_quantize(dh.cuda(), gate.cuda(), up.cuda(), *options, given),
             activation.swiglu_backward_quantize(dh, gate, up, *options, sizes))


@dtypes
def test_fusions(dtype: torch.dtype) -> None:
    from megatron_ext.kernels.triton_kernels import activation as fused
    from megatron_ext.kernels.triton_kernels import e5m6 as packing
    from megatron_ext.kernels.triton_kernels import quantize as ours
    from megatron_ext.kernels.triton_kernels import rows as gather

    for columns in (200, 1408, 7168):
        x, weight = wide(300, columns, dtype=dtype), torch.randn(columns).to(dtype)
        other = torch.randn(300, columns).to(dtype)
        same(fused.swiglu_quantize(other.mul(20).cuda(), x.cuda()), activation.swiglu_quantize(other.mul(20), x))
        same(fused.rms_norm_quantize(x.cuda(), weight.cuda(), 1e-6), activation.rms_norm_quantize(x, weight, 1e-6))
        source, chosen = torch.randint(-1, 300, (517,)), torch.randint(-1, 300, (65, 8))
        same(gather.permute_quantize(x.cuda(), source.cuda()), rows.permute_quantize(x, source))
        for width in (-(-columns // 128) + columns + extra for extra in (0, 8, 100)):
            found, expected = torch.full((517, width), 9, dtype=torch.uint8).cuda(), torch.full((517, width), 9).byte()
            gather.quantize_rows(x.cuda(), source.cuda(), found)
            rows.quantize_rows(x, source, expected)
            same([found], [expected])
        weights = torch.randn(300)
        same([gather.unpermute_combine(other.cuda(), weights.cuda(), chosen.cuda())],
             [rows.unpermute_combine(other, weights, chosen)])
        packed = e5m6.pack_e5m6(x)
        same(packing.pack_e5m6(x.cuda()), packed)
        same([packing.unpack_e5m6(*(t.cuda() for t in packed))], [e5m6.unpack_e5m6(*packed)])
        same(ours.quantize_weight(x.cuda()), quantize.quantize_weight(x))


@pytest.mark.parametrize("moment", [FP32, BF16], ids=str)
@pytest.mark.parametrize("adam_w_mode", [True, False])
def test_adamw(moment: torch.dtype, adam_w_mode: bool) -> None:
    from megatron_ext.kernels.triton_kernels import adamw as ours

    numbers = [torch.randn(1 << 20) * 10.0 ** torch.randint(-18, 6, (1 << 20,)) for _ in range(4)]
    expected = [[x.to(dtype)] for x, dtype in zip(numbers, (FP32, FP32, moment, moment), strict=True)]
    expected[3][0].abs_()
    found = [[x.cuda() for x in tensors] for tensors in expected]
    for step in (1, 2):
        scalars = AdamWScalars.at(
            step, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, adam_w_mode=adam_w_mode)  # fmt: skip
        ours.adamw(*found, scalars)
        adamw.adamw(*expected, scalars)
    for a, b in zip(found, expected, strict=True):
        same(a, b)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("positive", "bound"), [(False, 3e-4), (True, 8e-4)], ids=["randn", "rand"])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 64, 128), (7, 2112, 7168), (129, 768, 640), (300, 576, 16384), (129, 64, 200)])
def test_gemm(m: int, n: int, k: int, positive: bool, bound: float) -> None:
    from megatron_ext.kernels.triton_kernels import gemm, quantize

    draw = torch.rand if positive else torch.randn
    a = quantize.quantize(draw(m, k, device="cuda"))
    for block in ((128, 128), (1, 128)):
        b = quantize.quantize(draw(n, k, device="cuda"), block)
        product = quantize.dequantize(*a).double() @ quantize.dequantize(*b).double().t()
        assert error(gemm.gemm_nt(*a, *b), product) <= bound
        out = torch.ones(m, n, device="cuda")
        assert error(gemm.gemm_nt(*a, *b, out) - 1, product) <= 2 * bound


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_groups(sizes: list[int]) -> None:
    from megatron_ext.kernels.triton_kernels import gemm, quantize

    tokens, n, k = sum(sizes), 768, 640
    x, dy = (torch.rand(tokens, columns, device="cuda") for columns in (k, n))
    given = torch.tensor(sizes, device="cuda")
    a, b = quantize.quantize(x), quantize.quantize(torch.rand(len(sizes), n, k, device="cuda"), (128, 128))
    dy8, x8 = (quantize.quantize_transposed(t, False, "e4m3", given) for t in (dy, x))
    y, out = gemm.grouped_gemm_nt(*a, *b, given), torch.zeros(len(sizes), n, k, device="cuda")
    gemm.grouped_wgrad(*dy8, *x8, given, out)
    exact = [quantize.dequantize(*pair).double() for pair in (a, b, dy8, x8)]
    for e, (size, end) in enumerate(zip(sizes, accumulate(sizes), strict=True)):
        rows_, start = slice(end - size, end), 128 * ((end - size) // 128 + e)
        columns = slice(start, start + size)
        if size:
            assert error(y[rows_], exact[0][rows_] @ exact[1][e].t()) <= 8e-4
            assert error(out[e], exact[2][:, columns] @ exact[3][:, columns].t()) <= 8e-4
        else:
            assert not out[e].any()
