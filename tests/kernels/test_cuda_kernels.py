"""The CUDA kernels, run on a CPU: launcher, tensor maps, schedule, pipeline, products and stores, against FP64.

An emulated driver (emulation/emulation.cpp) runs the kernels' own source thread by thread, with random order, late
copies and poison; what it cannot show is the hardware. tests/gpu/test_gemm.py has the same cases for a GPU.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from megatron_ext.kernels.layout import empty_blocks, empty_data, empty_tiles
from megatron_ext.kernels.reference.quantize import dequantize, quantize
from tests.kernels.emulation.library import ABSENT, Emulated, build

pytestmark = pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))

TILES = ("large", "large_pair", "medium", "medium_pair", "small")
SIZES = [[5, 0, 130, 1], [0, 0], [128, 256, 0], [300], [0, 0, 290], [1, 1, 1, 0, 1]]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulated]:
    process = Emulated(tmp_path_factory.mktemp("emulation"))
    yield process
    process.close()


# ---- operands as they lie on a GPU


def laid_out(quantised: tuple[Tensor, Tensor], block: int = 1) -> tuple[Tensor, Tensor]:
    data, scale = quantised
    new = empty_data(data.shape, data.dtype, data.device, gpu=True)
    new.view(torch.uint8).copy_(data.view(torch.uint8))
    if block > 1:
        new_scale = empty_blocks(scale.shape[:-2], *scale.shape[-2:], scale.device, gpu=True)
    else:
        new_scale = empty_tiles(*scale.shape, scale.device, gpu=True)
    return new, new_scale.copy_(scale)


def operand(rows: int, columns: int, block: int = 1, positive: bool = False) -> tuple[Tensor, Tensor]:
    x = torch.rand(rows, columns) if positive else torch.randn(rows, columns)
    return laid_out(quantize(x, (block, 128)), block)


def padded(x: Tensor, sizes: Sequence[int], power_of_two: bool) -> tuple[Tensor, Tensor]:
    """x [T, N] transposed for a weight gradient, each group quantised by itself and put where its tiles begin."""
    tokens, columns = x.shape
    width = tokens // 128 + len(sizes)
    data, scale = torch.zeros(columns, 128 * width).to(torch.float8_e4m3fn), torch.zeros(columns, width)
    for e, (size, end) in enumerate(zip(sizes, accumulate(sizes), strict=True)):
        first = (end - size) // 128 + e
        if size:
            part, part_scale = quantize(x[end - size : end].t(), (1, 128), power_of_two)
            data.view(torch.uint8)[:, 128 * first : 128 * first + size] = part.view(torch.uint8)
            scale[:, first : first + part_scale.shape[1]] = part_scale
    return laid_out((data, scale))


def exact(operand: tuple[Tensor, Tensor]) -> Tensor:
    return dequantize(operand[0], operand[1]).double()


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected).norm() <= tolerance * expected.norm(), (found.double() - expected).abs().max()


# ---- what the other process does


def emulation(**settings: int) -> None:
    for name, value in settings.items():
        os.environ[f"EMULATION_{name.upper()}"] = str(value)


def dense(m: int, n: int, k: int, block: int, tile: str | None, sms: int = 4, seed: int = 0) -> None:
    """All outputs of `gemm_nt`; `added` lies in a wider matrix whose other numbers must stay."""
    from megatron_ext.kernels.cuda import driver, gemm

    emulation(sms=sms, seed=seed)
    driver.multiprocessors.cache_clear()
    torch.manual_seed(m * n + k)
    a, b = operand(m, k), operand(n, k, block)
    expected = exact(a) @ exact(b).t()
    found = gemm.gemm_nt(*a, *b, tile=tile)
    assert found.dtype == torch.float32
    assert_close(found, expected, 1e-6)
    assert torch.equal(gemm.gemm_nt(*a, *b, None, torch.bfloat16, tile=tile), found.bfloat16())
    wide = torch.randn(m + 1, n + 5)
    before = wide.clone()
    assert gemm.gemm_nt(*a, *b, wide[:m, 3 : 3 + n], tile=tile) is not None
    assert torch.equal(wide[:m, 3 : 3 + n], before[:m, 3 : 3 + n] + found)
    wide[:m, 3 : 3 + n] = before[:m, 3 : 3 + n]
    assert torch.equal(wide, before)


def grouped(sizes: list[int], n: int, k: int, tile: str | None, sms: int = 4) -> None:
    from megatron_ext.kernels.cuda import driver, gemm

    emulation(sms=sms, seed=len(sizes))
    driver.multiprocessors.cache_clear()
    torch.manual_seed(sum(sizes) + n)
    a = operand(sum(sizes), k)
    b = laid_out(quantize(torch.randn(len(sizes), n, k), (128, 128)), 128)
    weights = dequantize(b[0].contiguous(), b[1].contiguous()).double()
    expected = torch.cat([x @ w.t() for x, w in zip(exact(a).split(sizes), weights, strict=True)])
    found = gemm.grouped_gemm_nt(*a, *b, torch.tensor(sizes), tile=tile)
    assert_close(found, expected, 1e-6)
    rounded = gemm.grouped_gemm_nt(*a, *b, torch.tensor(sizes), torch.bfloat16, tile=tile)
    assert torch.equal(rounded, found.bfloat16())


def wgrad(sizes: list[int], n: int, k: int, tile: str | None, sms: int = 4) -> None:
    from megatron_ext.kernels.cuda import driver, gemm

    emulation(sms=sms, seed=len(sizes))
    driver.multiprocessors.cache_clear()
    torch.manual_seed(sum(sizes) + n)
    dy, x = torch.randn(sum(sizes), n), torch.randn(sum(sizes), k)
    dy8, x8 = padded(dy, sizes, False), padded(x, sizes, True)
    out = torch.randn(len(sizes), n, k)
    expected = out.clone().double()
    for e, (dy_e, x_e) in enumerate(zip(dy.split(sizes), x.split(sizes), strict=True)):
        if len(dy_e):
            expected[e] += exact(quantize(dy_e.t())) @ exact(quantize(x_e.t(), (1, 128), True)).t()
    before = out.clone()
    gemm.grouped_wgrad(*dy8, *x8, torch.tensor(sizes), out, tile=tile)
    assert_close(out, expected, 1e-6)
    for e, size in enumerate(sizes):
        assert size or torch.equal(out[e], before[e])


def repeated(tile: str, seeds: int) -> None:
    """Whatever the order of threads and copies, the same bits."""
    from megatron_ext.kernels.cuda import driver, gemm

    emulation(sms=2)
    driver.multiprocessors.cache_clear()
    torch.manual_seed(0)
    a, b = operand(150, 1300), operand(200, 1300, 128)
    found = []
    for seed in range(seeds):
        emulation(seed=seed)
        found.append(gemm.gemm_nt(*a, *b, tile=tile))
    assert_close(found[0], exact(a) @ exact(b).t(), 1e-6)
    assert all(torch.equal(found[0], other) for other in found)


def special() -> None:
    """NaN, infinity, zero and tiny tiles: what the reference says."""
    from megatron_ext.kernels.cuda import gemm

    torch.manual_seed(0)
    x, w = torch.randn(70, 256), torch.randn(130, 256)
    x[3, 5], x[4, 200], x[5], x[6, :128] = float("nan"), float("inf"), 0, x[6, :128] * 1e-30
    w[129, 0] = float("nan")
    a, b = laid_out(quantize(x)), laid_out(quantize(w, (128, 128)), 128)
    found, expected = gemm.gemm_nt(*a, *b), exact(a) @ exact(b).t()
    assert torch.equal(found.isnan(), expected.isnan())
    assert expected.isnan().sum() == 2 * 130 + 2 * 70 - 4
    assert not found[5, :128].any()
    assert_close(found.nan_to_num(), expected.nan_to_num(), 1e-6)


# ---- tests


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("block", [1, 128], ids=["tile", "block"])
@pytest.mark.parametrize(("m", "n", "k", "sms"), [
    (7, 130, 200, 4), (129, 200, 384, 3), (300, 257, 640, 2), (5, 128, 1430, 4),
])  # fmt: skip
def test_dense(emulated: Emulated, m: int, n: int, k: int, sms: int, block: int, tile: str) -> None:
    emulated.run(dense, m, n, k, block, tile, sms)


@pytest.mark.parametrize("block", [1, 128], ids=["tile", "block"])
@pytest.mark.parametrize(("m", "n", "k"), [(0, 64, 128), (1, 1, 1), (1, 1, 300), (3, 5, 16), (128, 1, 128)])
def test_smallest(emulated: Emulated, m: int, n: int, k: int, block: int) -> None:
    emulated.run(dense, m, n, k, block, None)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_grouped(emulated: Emulated, sizes: list[int], tile: str) -> None:
    emulated.run(grouped, sizes, 200, 400, tile, 2 + len(sizes))


@pytest.mark.parametrize("tile", [*TILES[:4], None], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_weight_gradients(emulated: Emulated, sizes: list[int], tile: str | None) -> None:
    emulated.run(wgrad, sizes, 200, 70, tile, 2 + len(sizes))


@pytest.mark.parametrize("tile", ["large_pair", "medium"])
def test_many_groups(emulated: Emulated, tile: str) -> None:
    sizes = [0, 3, 0, 0, 127, 1, 129, 0, 64, 0]
    emulated.run(grouped, sizes, 64, 128, tile, 4)
    emulated.run(wgrad, sizes, 64, 132, tile, 4)


@pytest.mark.parametrize("tile", TILES)
def test_order_and_lateness_change_no_bit(emulated: Emulated, tile: str) -> None:
    emulated.run(repeated, tile, 5)


def test_special_numbers(emulated: Emulated) -> None:
    emulated.run(special)


# ---- geometry, by calling the headers


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The functions of layout.h and schedule.h, under another name than the driver's."""
    return ctypes.CDLL(str(build(tmp_path_factory.mktemp("headers"), "headers.so")))


def test_the_launcher_knows_the_tiles(headers: ctypes.CDLL) -> None:
    from megatron_ext.kernels.cuda import gemm, tiles

    assert tuple(tiles.TILES) == TILES
    assert headers.mext_problem_bytes() == ctypes.sizeof(gemm.Problem)
    for i, tile in enumerate(tiles.TILES.values()):
        facts = (ctypes.c_int * 5)()
        headers.mext_tile(i, facts)
        assert list(facts) == [tile.rows, tiles.COLUMNS, tile.pair, tile.shared(False), tile.shared(True)]


def test_swizzle_is_the_one_of_tma(headers: ctypes.CDLL) -> None:
    """CUDA's documentation: the 16-byte unit's number in a row is exclusive-ored with the row's, modulo 8."""
    found = [[headers.mext_swizzled(r, c) for c in range(128)] for r in range(16)]
    assert sorted(byte for row in found for byte in row) == list(range(16 * 128))
    assert all(found[r][c] == r * 128 + (c // 16 ^ r % 8) * 16 + c % 16 for r in range(16) for c in range(128))


@pytest.mark.parametrize("width", [64, 128])
def test_accumulators_cover_a_product_once(headers: ctypes.CDLL, width: int) -> None:
    found = {headers.mext_accumulator(t, i) for t in range(128) for i in range(width // 2)}
    assert found == {1000 * row + column for row in range(64) for column in range(width)}
    # PTX ISA, fragment of m64nNk32: thread 0 has (0, 0), (0, 1), (8, 0), (8, 1), (0, 8); thread 37 begins at (17, 2)
    assert [headers.mext_accumulator(0, i) for i in range(5)] == [0, 1, 8000, 8001, 8]
    assert headers.mext_accumulator(37, 0) == 17002


def test_stores_cover_every_column_once(headers: ctypes.CDLL) -> None:
    quads = [headers.mext_quad_column(lane, pair) for lane in range(4) for pair in range(0, 16, 2)]
    assert sorted(q + i for q in quads for i in range(4)) == list(range(128))
