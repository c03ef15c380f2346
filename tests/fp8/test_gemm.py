"""Block-scaled products against FP64 products of the dequantised operands, and that a kernel which accumulates as a
Hopper tensor core does, without promotion, could not pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_ext.kernels.reference.quantize import dequantize, quantize, quantize_transposed
from tests.fp8.backends import Backend, assert_same_bytes, backends

BOUNDS = {"randn": 3e-4, "rand": 8e-4}
"""What the Frobenius norm of the error may be of that of the product. Of positive numbers an accumulator that cuts bits
off cuts them all on one side, which numbers of both signs would hide."""

DEEPEST = 16384


def exact(data: Tensor, scale: Tensor) -> Tensor:
    return dequantize(data, scale).double()


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def assert_close(found: Tensor, expected: Tensor, tolerance: float = BOUNDS["randn"]) -> None:
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert (found - expected).norm() <= tolerance * expected.norm()


# ---- limited accumulation --------------------------------------------------------------------------------------------


def floor_power(x: Tensor) -> Tensor:
    """2^floor(log2 |x|); 2^-200 for 0."""
    _, exponent = torch.frexp(x.abs())
    return torch.ldexp(torch.ones_like(x), exponent - 1).where(x != 0, torch.tensor(2.0**-200, dtype=x.dtype))


def tensor_core(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] b [N, K]^T in FP64 as Hopper's FP8 tensor core accumulates (DeepSeek-V3, section 3.3.2).

    In every step of 32, products and accumulator are aligned to the largest of them and cut off 13 bits below its
    first; so is the sum.
    """
    total = torch.zeros(len(a), len(b), dtype=torch.float64)
    for k in range(0, a.shape[1], 32):
        products = a[:, None, k : k + 32] * b[None, :, k : k + 32]
        unit = 2.0**-13 * torch.maximum(floor_power(products).amax(-1), floor_power(total))
        total = torch.trunc(products / unit[..., None]).sum(-1) * unit + torch.trunc(total / unit) * unit
        unit = 2.0**-13 * floor_power(total)
        total = torch.trunc(total / unit) * unit
    return total


def promoted(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """The same with the sum over every 128 scaled and added in FP32, as the kernels do; b in 1x128 tiles."""
    total = torch.zeros(len(a), len(b))
    for tile, k in enumerate(range(0, a.shape[1], 128)):
        part = tensor_core(a[:, k : k + 128].double(), b[:, k : k + 128].double()).float()
        total += part * (a_scale[:, tile, None] * b_scale[None, :, tile])
    return total


@pytest.mark.parametrize("numbers", BOUNDS)
@pytest.mark.parametrize("k", [512, 4096, DEEPEST])
def test_promotion_is_what_the_bounds_ask_for(numbers: str, k: int) -> None:
    a, b = (quantize(getattr(torch, numbers)(8, k)) for _ in range(2))
    expected = exact(*a) @ exact(*b).t()
    assert error(promoted(*a, *b), expected) <= BOUNDS[numbers]
    if numbers == "rand":
        assert error(tensor_core(exact(*a), exact(*b)), expected) > BOUNDS[numbers]


@backends("gemm_nt", reference=True)
@pytest.mark.parametrize("numbers", BOUNDS)
@pytest.mark.parametrize("k", [128, 384, 640, 7168, DEEPEST])
@pytest.mark.parametrize("block", [(1, 128), (128, 128)], ids=["tile", "block"])
def test_error_at_any_depth(backend: Backend, numbers: str, k: int, block: tuple[int, int]) -> None:
    make = getattr(torch, numbers)
    a, b = quantize(make(7, k)), quantize(make(16, k), block)
    assert error(backend.gemm_nt(*a, *b), exact(*a) @ exact(*b).t()) <= BOUNDS[numbers]


@backends("gemm_nt", reference=True)
def test_fp32_products_are_as_good_as_fp32(backend: Backend) -> None:
    if backend.name not in ("reference", "cpu"):
        pytest.skip("FP32 operands")
    a, b = quantize(torch.rand(8, 8192)), quantize(torch.rand(8, 8192), (128, 128))
    found, expected = backend.gemm_nt(*a, *b).double(), exact(*a) @ exact(*b).t()
    assert ((found - expected) / expected).abs().max() < 5e-6


# ---- shapes ----------------------------------------------------------------------------------------------------------

SHAPES = [(1, 1, 1), (7, 130, 200), (129, 64, 384), (7, 768, 640), (0, 64, 128), (129, 576, 128), (1, 2112, 640),
          (7, 64, 7168)]  # fmt: skip


@backends("gemm_nt", reference=True)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("block", [(1, 128), (128, 128)], ids=["tile", "block"])
def test_gemm_nt(backend: Backend, m: int, n: int, k: int, block: tuple[int, int]) -> None:
    a, b = quantize(torch.randn(m, k)), quantize(torch.randn(n, k), block)
    expected = exact(*a) @ exact(*b).t()
    found = backend.gemm_nt(*a, *b)
    assert_close(found, expected)
    assert_same_bytes(backend.gemm_nt(*a, *b, None, torch.bfloat16), found.bfloat16())
    out = torch.randn(m, n)
    expected += out.double()
    result = backend.gemm_nt(*a, *b, out)
    assert_close(out, expected)
    assert result.shape == out.shape and torch.equal(result, out)


@backends("gemm_nt")
def test_a_block_of_nan_shows_in_its_rows_only(backend: Backend) -> None:
    x = torch.randn(5, 300)
    x[2, 140] = torch.inf
    found = backend.gemm_nt(*quantize(x), *quantize(torch.randn(130, 300), (128, 128)))
    assert found[2].isnan().all() and not found[[0, 1, 3, 4]].isnan().any()


@backends("weight_operands", "gemm_nt", reference=True)
@pytest.mark.parametrize("shape", [(130, 200), (3, 130, 200)])
def test_weight_operands_are_the_weight_and_its_transpose(backend: Backend, shape: tuple[int, ...]) -> None:
    weight = quantize(torch.randn(*shape), (128, 128))
    for (data, scale), expected in zip(
        backend.weight_operands(*weight), (exact(*weight), exact(*weight).mT), strict=True
    ):
        assert torch.equal((data if scale is None else dequantize(data, scale)).double(), expected)


# ---- groups ----------------------------------------------------------------------------------------------------------

SIZES = [[5, 0, 130, 1], [0, 0], [128, 256, 0], [300], [1, 1, 1], [0, 129, 0]]
sizes_ = pytest.mark.parametrize("sizes", SIZES, ids=str)


@backends("grouped_gemm_nt", reference=True)
@sizes_
@pytest.mark.parametrize(("n", "k"), [(130, 200), (64, 384)])
def test_grouped_gemm_nt(backend: Backend, sizes: list[int], n: int, k: int) -> None:
    a = quantize(torch.randn(sum(sizes), k))
    b = quantize(torch.randn(len(sizes), n, k), (128, 128))
    found = backend.grouped_gemm_nt(*a, *b, torch.tensor(sizes))
    groups = zip(exact(*a).split(sizes), exact(*b), strict=True)
    assert_close(found, torch.cat([a_e @ b_e.t() for a_e, b_e in groups]))
    rounded = backend.grouped_gemm_nt(*a, *b, torch.tensor(sizes), torch.bfloat16)
    assert_same_bytes(rounded, found.bfloat16())


@backends("grouped_gemm_nt", reference=True)
def test_sizes_may_be_a_list(backend: Backend) -> None:
    a, b = quantize(torch.randn(6, 128)), quantize(torch.randn(2, 64, 128), (128, 128))
    expected = backend.grouped_gemm_nt(*a, *b, torch.tensor([5, 1]))
    assert torch.equal(backend.grouped_gemm_nt(*a, *b, [5, 1]), expected)


@backends("grouped_wgrad", reference=True)
@sizes_
@pytest.mark.parametrize(("n", "k"), [(130, 70), (128, 256)])
def test_grouped_wgrad(backend: Backend, sizes: list[int], n: int, k: int) -> None:
    dy, x = torch.randn(sum(sizes), n), torch.randn(sum(sizes), k)
    dy8, x8 = quantize_transposed(dy, group_sizes=sizes), quantize_transposed(x, True, group_sizes=sizes)
    out = torch.randn(len(sizes), n, k)
    expected, before = out.double(), out.clone()
    for e, (dy_e, x_e) in enumerate(zip(dy.split(sizes), x.split(sizes), strict=True)):
        if len(dy_e):  # each group as if it were alone
            expected[e] += exact(*quantize_transposed(dy_e)) @ exact(*quantize_transposed(x_e, True)).t()
    backend.grouped_wgrad(*dy8, *x8, torch.tensor(sizes), out)
    assert_close(out, expected)
    for e, size in enumerate(sizes):
        assert size or torch.equal(out[e], before[e])


@backends("grouped_wgrad", reference=True)
def test_grouped_wgrad_of_many_tokens(backend: Backend) -> None:
    """A group as deep as a long sequence, between an empty one and one of a single token."""
    sizes = torch.tensor([0, 4096, 1])
    dy, x = (quantize_transposed(torch.rand(4097, 16), True, group_sizes=sizes) for _ in range(2))
    out = torch.zeros(3, 16, 16)
    backend.grouped_wgrad(*dy, *x, sizes, out)
    scale_columns = slice(1, 33)
    parts = [exact(data[:, 128:4224], scale[:, scale_columns]) for data, scale in (dy, x)]
    assert error(out[1], parts[0] @ parts[1].t()) <= BOUNDS["rand"]
    assert not out[0].any() and out[2].any()
