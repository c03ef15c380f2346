"""Block-scaled products against FP64 products of the dequantised operands."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_ext.kernels.cpu import gemm as cpu
from megatron_ext.kernels.reference import gemm as reference
from megatron_ext.kernels.reference.quantize import dequantize, quantize, quantize_transposed

backends = pytest.mark.parametrize("gemm", [reference, cpu], ids=["reference", "cpu"])


def exact(data: Tensor, scale: Tensor) -> Tensor:
    return dequantize(data, scale).double()


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert (found - expected).norm() <= tolerance * expected.norm()


@backends
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (7, 130, 200), (129, 64, 384), (3, 256, 640), (0, 5, 128)])
@pytest.mark.parametrize("block", [(1, 128), (128, 128)], ids=["tile", "block"])
def test_gemm_nt(gemm, m: int, n: int, k: int, block: tuple[int, int]) -> None:
    a, b = quantize(torch.randn(m, k)), quantize(torch.randn(n, k), block)
    assert_close(gemm.gemm_nt(*a, *b), exact(*a) @ exact(*b).t())
    out = torch.randn(m, n)
    expected = out.double() + exact(*a) @ exact(*b).t()
    assert gemm.gemm_nt(*a, *b, out) is out
    assert_close(out, expected)


@backends
def test_accumulation_has_no_bias(gemm) -> None:
    """Positive numbers: an accumulator that loses bits loses them all on one side (normal numbers would hide it)."""
    a, b = quantize(torch.rand(8, 8192)), quantize(torch.rand(8, 8192), (128, 128))
    found, expected = gemm.gemm_nt(*a, *b).double(), exact(*a) @ exact(*b).t()
    assert ((found - expected) / expected).abs().max() < 5e-6


@backends
@pytest.mark.parametrize("shape", [(130, 200), (3, 130, 200)])
def test_weight_operands_are_the_weight_and_its_transpose(gemm, shape: tuple[int, ...]) -> None:
    weight = quantize(torch.randn(*shape), (128, 128))
    for (data, scale), expected in zip(gemm.weight_operands(*weight), (exact(*weight), exact(*weight).mT), strict=True):
        assert torch.equal((data if scale is None else dequantize(data, scale)).double(), expected)


SIZES = [[5, 0, 130, 1], [0, 0], [128, 256, 0], [300]]


@backends
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_grouped_gemm_nt(gemm, sizes: list[int], as_tensor: bool) -> None:
    a = quantize(torch.randn(sum(sizes), 200))
    b = quantize(torch.randn(len(sizes), 130, 200), (128, 128))
    found = gemm.grouped_gemm_nt(*a, *b, torch.tensor(sizes) if as_tensor else sizes)
    groups = zip(exact(*a).split(sizes), exact(*b), strict=True)
    assert_close(found, torch.cat([a_e @ b_e.t() for a_e, b_e in groups]))


@backends
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_grouped_wgrad(gemm, sizes: list[int]) -> None:
    dy, x = torch.randn(sum(sizes), 130), torch.randn(sum(sizes), 70)
    dy8, x8 = quantize_transposed(dy, group_sizes=sizes), quantize_transposed(x, True, group_sizes=sizes)
    out = torch.randn(len(sizes), 130, 70)
    expected = out.double()
    for e, (dy_e, x_e) in enumerate(zip(dy.split(sizes), x.split(sizes), strict=True)):
        if len(dy_e):  # each group as if it were alone
            expected[e] += exact(*quantize_transposed(dy_e)) @ exact(*quantize_transposed(x_e, True)).t()
    gemm.grouped_wgrad(*dy8, *x8, sizes, out)
    assert_close(out, expected)
