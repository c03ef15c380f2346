"""FP8 products on a Hopper GPU: our kernels, and the libraries that stand in for them, against FP64.

Not yet run on a device: none was at hand when this was written. `make test-gpu` runs it; the same kernels run in an
emulation on every machine (tests/kernels/test_cuda_kernels.py). Memory and races, a few minutes each:

    compute-sanitizer --tool memcheck  python -m pytest -m gpu tests/gpu/test_gemm.py -k "small_shapes or groups"
    compute-sanitizer --tool racecheck python -m pytest -m gpu tests/gpu/test_gemm.py -k "small_shapes or groups"
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from types import ModuleType

import pytest
import torch
from torch import Tensor

from megatron_ext.kernels.cuda import available, gemm
from megatron_ext.kernels.cuda.tiles import TILES
from megatron_ext.kernels.deep_gemm import available as deep_gemm_available
from megatron_ext.kernels.deep_gemm import gemm as deep_gemm
from megatron_ext.kernels.layout import empty_blocks, empty_data, empty_tiles
from megatron_ext.kernels.reference.quantize import dequantize, quantize
from megatron_ext.kernels.torch_scaled import available as torch_available
from megatron_ext.kernels.torch_scaled import gemm as torch_scaled

pytestmark = pytest.mark.gpu

TOLERANCE = {False: 3e-4, True: 8e-4}
"""Of the error against FP64 products of the dequantised operands: normal numbers, and positive ones."""

tiles = pytest.mark.parametrize("tile", [None, *TILES], ids=str)
SIZES = [[5, 0, 130, 1], [0, 0], [4096, 0, 0], [0, 0, 290], [1] * 8, [129] * 16, [1000, 0, 3000, 96]]


@pytest.fixture(autouse=True)
def _hopper() -> None:
    if (reason := available.why_not()) is not None:
        pytest.skip(reason)
    torch.backends.cuda.matmul.allow_tf32 = False


def laid_out(quantised: tuple[Tensor, Tensor], block: int = 1) -> tuple[Tensor, Tensor]:
    data, scale = (x.cuda() for x in quantised)
    new = empty_data(data.shape, data.dtype, data.device)
    new.view(torch.uint8).copy_(data.view(torch.uint8))
    stack, rows, columns = scale.shape[:-2], *scale.shape[-2:]
    if block > 1:
        return new, empty_blocks(stack, rows, columns, data.device).copy_(scale)
    return new, empty_tiles(rows, columns, data.device).copy_(scale)


def operand(*shape: int, block: int = 1, positive: bool = False) -> tuple[Tensor, Tensor]:
    return laid_out(quantize((torch.rand if positive else torch.randn)(*shape, device="cuda"), (block, 128)), block)


def exact(operand: tuple[Tensor, Tensor]) -> Tensor:
    data, scale = operand
    return dequantize(data.contiguous(), scale.contiguous()).double()


def assert_close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE[False]) -> None:
    assert found.shape == expected.shape and (found.double() - expected).norm() <= tolerance * expected.norm()


def transposed(x: Tensor, sizes: Sequence[int], power_of_two: bool) -> tuple[Tensor, Tensor]:
    """x [T, N] as the operand of a weight gradient: [N, 128 S], each group where its tiles begin."""
    tokens, columns = x.shape
    width = tokens // 128 + len(sizes)
    data = torch.zeros(columns, 128 * width, dtype=torch.uint8, device="cuda")
    scale = torch.zeros(columns, width, device="cuda")
    for e, (size, end) in enumerate(zip(sizes, accumulate(sizes), strict=True)):
        first = (end - size) // 128 + e
        if size:
            part, part_scale = quantize(x[end - size : end].t().contiguous(), (1, 128), power_of_two)
            data[:, 128 * first : 128 * first + size] = part.view(torch.uint8)
            scale[:, first : first + part_scale.shape[1]] = part_scale
    return laid_out((data.view(torch.float8_e4m3fn), scale))


@tiles
@pytest.mark.parametrize("block", [1, 128], ids=["tile", "block"])
@pytest.mark.parametrize("m", [0, 1, 7, 129])
def test_small_shapes(m: int, block: int, tile: str | None) -> None:
    for n in (64, 576, 768, 2112):
        for k in (128, 200, 384, 640, 7168):
            a, b = operand(m, k), operand(n, k, block=block)
            expected = exact(a) @ exact(b).t()
            found = gemm.gemm_nt(*a, *b, tile=tile)
            assert_close(found, expected)
            assert torch.equal(gemm.gemm_nt(*a, *b, None, torch.bfloat16, tile=tile), found.bfloat16())
            out = torch.randn(m, n + 3, device="cuda")
            before = out.clone()
            gemm.gemm_nt(*a, *b, out[:, 1 : n + 1], tile=tile)
            assert_close(out[:, 1 : n + 1] - before[:, 1 : n + 1], expected, 4e-4)
            assert torch.equal(out[:, n + 1 :], before[:, n + 1 :]) and torch.equal(out[:, 0], before[:, 0])


@tiles
@pytest.mark.parametrize("positive", [False, True], ids=["randn", "rand"])
@pytest.mark.parametrize("block", [1, 128], ids=["tile", "block"])
def test_accuracy(block: int, positive: bool, tile: str | None) -> None:
    a, b = operand(512, 16384, positive=positive), operand(768, 16384, block=block, positive=positive)
    assert_close(gemm.gemm_nt(*a, *b, tile=tile), exact(a) @ exact(b).t(), TOLERANCE[positive])


@tiles
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: str(sizes)[:20])
def test_groups(sizes: list[int], tile: str | None) -> None:
    for n, k in ((200, 400), (768, 2048)):
        a, b = operand(sum(sizes), k), operand(len(sizes), n, k, block=128)
        on_device = torch.tensor(sizes, device="cuda")
        weights = exact(b)
        expected = torch.cat([x @ w.t() for x, w in zip(exact(a).split(sizes), weights, strict=True)])
        found = gemm.grouped_gemm_nt(*a, *b, on_device, tile=tile)
        assert_close(found, expected)
        rounded = gemm.grouped_gemm_nt(*a, *b, on_device, torch.bfloat16, tile=tile)
        assert torch.equal(rounded, found.bfloat16())


@pytest.mark.parametrize("tile", [None, *(name for name in TILES if name != "small")], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: str(sizes)[:20])
def test_gradients_of_groups(sizes: list[int], tile: str | None) -> None:
    for n, k in ((200, 70), (768, 2048)):
        dy, x = (torch.randn(sum(sizes), width, device="cuda") for width in (n, k))
        out = torch.randn(len(sizes), n, k, device="cuda")
        before = out.clone()
        on_device = torch.tensor(sizes, device="cuda")
        gemm.grouped_wgrad(*transposed(dy, sizes, False), *transposed(x, sizes, True), on_device, out, tile=tile)
        for e, (dy_e, x_e) in enumerate(zip(dy.split(sizes), x.split(sizes), strict=True)):
            if len(dy_e):
                dy8, x8 = quantize(dy_e.t().contiguous()), quantize(x_e.t().contiguous(), (1, 128), True)
                assert_close(out[e], before[e] + exact(dy8) @ exact(x8).t(), 4e-4)
            else:
                assert torch.equal(out[e], before[e])


@tiles
def test_twenty_runs_give_the_same_bits(tile: str | None) -> None:
    a, b = operand(1000, 7168), operand(2112, 7168, block=128)
    first = gemm.gemm_nt(*a, *b, tile=tile)
    assert all(torch.equal(gemm.gemm_nt(*a, *b, tile=tile), first) for _ in range(20))


def test_the_host_waits_for_nothing_and_graphs_capture() -> None:
    sizes = torch.tensor([100, 0, 156], device="cuda")
    a, b = operand(256, 512), operand(3, 256, 512, block=128)
    expected = gemm.grouped_gemm_nt(*a, *b, sizes)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            found = gemm.grouped_gemm_nt(*a, *b, sizes)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    sizes.copy_(torch.tensor([0, 256, 0]))
    graph.replay()
    other = gemm.grouped_gemm_nt(*a, *b, sizes)
    assert torch.equal(found, other) and not torch.equal(found, expected)


def test_nan_stays_in_its_tile() -> None:
    x, w = torch.randn(70, 256, device="cuda"), torch.randn(130, 256, device="cuda")
    x[3, 5], x[4, 200], w[129, 0] = float("nan"), float("inf"), float("nan")
    x[5] = 0
    a, b = laid_out(quantize(x)), laid_out(quantize(w, (128, 128)), 128)
    found, expected = gemm.gemm_nt(*a, *b), exact(a) @ exact(b).t()
    assert torch.equal(found.isnan(), expected.isnan()) and not found[5, :128].any()


@pytest.mark.parametrize(("module", "why_not"), [
    (torch_scaled, torch_available.why_not), (deep_gemm, deep_gemm_available.why_not),
], ids=["torch", "deep_gemm"])  # fmt: skip
def test_libraries_agree(module: ModuleType, why_not: partial) -> None:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    ran = 0
    for m, n, k in ((128, 256, 512), (4, 768, 640), (132, 576, 7168), (7, 128, 128)):
        for block in (1, 128):
            a, b = operand(m, k), operand(n, k, block=block)
            expected = exact(a) @ exact(b).t()
            for dtype, tolerance in ((torch.float32, 3e-4), (torch.bfloat16, 4e-3)):
                if module.misfit(*a, *b, None, dtype) is None:
                    assert_close(module.gemm_nt(*a, *b, None, dtype), expected, tolerance)
                    ran += 1
            out = torch.randn(m, n, device="cuda")
            if module.misfit(*a, *b, out) is None:
                before = out.clone()
                assert_close(module.gemm_nt(*a, *b, out), before + expected)
                ran += 1
    assert ran > 4
