"""The Triton products, interpreted on a CPU, against FP64 products of the dequantised operands.

The interpreter adds in FP32 within a dot, so this shows shapes, scales, groups and masks; that partial sums are
promoted every 128 of K is in how the kernels are written (kernels/triton_kernels/gemm.py).
"""

from __future__ import annotations

from importlib import import_module
from itertools import accumulate
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatron_ext.kernels.layout import empty_blocks, empty_data, empty_tiles
from megatron_ext.kernels.reference.quantize import (
    dequantize,
    quantize,
    quantize_transposed,
    quantize_weight,
)
from tests.kernels.interpreter import gpu_layout, interpreted, needs_triton

pytestmark = needs_triton

TOLERANCE = 1e-6
"""Relative, of sums in FP32."""

pointers = pytest.mark.parametrize("tma", [True, False], ids=["tma", "pointers"])


def triton() -> Any:
    return import_module("megatron_ext.kernels.triton_kernels.gemm")


def on_gpu(data: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The pair as a GPU holds it: padded rows, scales column by column."""
    placed = empty_data(data.shape, data.dtype, data.device, gpu=True)
    placed.view(torch.uint8).copy_(data.view(torch.uint8))
    tiles = scale.shape[-2] == data.shape[-2]
    empty = empty_tiles(*scale.shape, scale.device, gpu=True) if tiles else empty_blocks(
        scale.shape[:-2], *scale.shape[-2:], scale.device, gpu=True)  # fmt: skip
    return placed, empty.copy_(scale)


def uneven(*shape: int) -> Tensor:
    """Positive numbers whose magnitude changes from tile to tile: a scale read in another's place shows."""
    return torch.rand(*shape) * 4.0 ** (torch.arange(shape[-1]) // 128 % 5)


def near(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


def check_gemm(m: int, n: int, k: int, tma: bool) -> None:
    ours = triton()
    with patch.object(ours, "_tma", lambda *matrices: False) if not tma else gpu_layout(ours):
        for i, block in enumerate(((128, 128), (1, 128))):
            a, b = quantize(uneven(m, k), format=("e4m3", "e5m2")[i]), quantize(uneven(n, k), block)
            if tma:
                a, b = on_gpu(*a), on_gpu(*b)
            product = dequantize(*a).double() @ dequantize(*b).double().t()
            near(ours.gemm_nt(*a, *b), product)
            near(ours.gemm_nt(*a, *b, None, torch.bfloat16), product, 2**-8)
            out = product.float().flip(0).t().contiguous().t()  # any strides
            near(ours.gemm_nt(*a, *b, out), product + product.flip(0))


@pointers
@pytest.mark.parametrize(("m", "n", "k"), [(0, 64, 128), (1, 64, 200), (7, 200, 384), (129, 64, 640), (65, 1, 128)])
def test_gemm(m: int, n: int, k: int, tma: bool) -> None:
    interpreted(check_gemm, m, n, k, tma)


def check_groups(sizes: list[int], tma: bool) -> None:
    ours, tokens, groups = triton(), sum(sizes), len(sizes)
    n, k = 200, 384
    x, dy, weight = uneven(tokens, k), uneven(tokens, n), uneven(groups, n, k)
    a, b = quantize(x), quantize(weight, (128, 128))
    dy8, x8 = quantize_transposed(dy, False, "e4m3", sizes), quantize_transposed(x, True, "e5m2", sizes)
    if tma:
        a, b, dy8, x8 = on_gpu(*a), on_gpu(*b), on_gpu(*dy8), on_gpu(*x8)
    with patch.object(ours, "_tma", lambda *matrices: False) if not tma else gpu_layout(ours):
        y = ours.grouped_gemm_nt(*a, *b, torch.tensor(sizes))
        rounded = ours.grouped_gemm_nt(*a, *b, sizes, torch.bfloat16)
        out = torch.ones(groups, n, k)
        ours.grouped_wgrad(*dy8, *x8, torch.tensor(sizes), out)
    exact = dequantize(*a).double(), dequantize(*b).double(), dequantize(*dy8).double(), dequantize(*x8).double()
    assert torch.equal(rounded, y.bfloat16())
    for e, (size, end) in enumerate(zip(sizes, accumulate(sizes), strict=True)):
        rows, start = slice(end - size, end), 128 * ((end - size) // 128 + e)
        near(y[rows], exact[0][rows] @ exact[1][e].t())
        columns = slice(start, start + size)
        near(out[e], 1 + exact[2][:, columns] @ exact[3][:, columns].t())
        assert size or torch.equal(out[e], torch.ones(n, k))


@pointers
@pytest.mark.parametrize("sizes", [[130, 0, 61], [1, 0, 0, 1], [0, 191], [0, 0]], ids=str)
def test_groups(sizes: list[int], tma: bool) -> None:
    interpreted(check_groups, sizes, tma)


def check_weight_operands() -> None:
    weight = torch.randn(2, 200, 130)
    data, scale, data_t, scale_t = quantize_weight(weight)
    ours = triton()
    with gpu_layout(ours):
        for (found, found_scale), (expected, expected_scale) in zip(
                ours.weight_operands(data, scale), ((data, scale), (data_t, scale_t)), strict=True):
            assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)) and found.stride(-1) == 1
            assert torch.equal(found_scale, expected_scale) and found_scale.stride(-1) == 1


def test_weight_operands() -> None:
    interpreted(check_weight_operands)
