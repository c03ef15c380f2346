"""Block-scaled matrix products by our own sm_90a kernels. Signatures and shapes are those of kernels/reference/gemm.py.

Operands are E4M3. Every partial sum over 128 columns is scaled and added in FP32; sizes of groups are read on the
device. Rows of data must begin at multiples of 16 bytes and tile scales lie column by column, as `layout.empty_data`
and `layout.empty_tiles` make them: TMA reads them in place.

Shape letters: M rows (T tokens), N, K columns, E groups, S = scale_columns(T, E).
"""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from megatron_ext.kernels.cuda import driver
from megatron_ext.kernels.cuda.driver import TensorMap
from megatron_ext.kernels.cuda.operands import OUTPUTS, in_blocks, laid, misfit
from megatron_ext.kernels.cuda.tiles import COLUMNS, TILES, choose, grid, up
from megatron_ext.kernels.layout import BLOCK, empty_blocks, empty_data

_ADD = 2  # `kAdd` of schedule.h


class Problem(ctypes.Structure):
    """`mext::Problem` of schedule.h, field by field."""

    _fields_ = [
        ("out", c_void_p), ("b_scale", c_void_p), ("group_sizes", c_void_p),
        ("out_row", c_int64), ("out_group", c_int64), ("b_scale_group", c_int64), ("b_scale_row", c_int),
        ("m", c_int), ("n", c_int), ("k", c_int), ("groups", c_int), ("output", c_int), ("aligned", c_int),
    ]  # fmt: skip


def weight_operands(data: Tensor, scale: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The weight [..., N, K] and a copy of its transpose: TMA and wgmma want the contracted dimension contiguous."""
    transposed = empty_data(data.mT.shape, data.dtype, data.device)
    transposed.view(torch.uint8).copy_(data.view(torch.uint8).mT)
    transposed_scale = empty_blocks(scale.shape[:-2], scale.shape[-1], scale.shape[-2], scale.device)
    return (data, scale), (transposed, transposed_scale.copy_(scale.mT))


def gemm_nt(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor | None = None,
            dtype: torch.dtype = torch.float32, *, tile: str | None = None) -> Tensor:
    """See `reference.gemm.gemm_nt`; `tile` names one of `tiles.TILES`, for tests.

    Raises:
        ValueError: the arguments are not laid out for the kernels (`operands.misfit` says how).
    """
    _require(misfit("gemm_nt", a, a_scale, b, b_scale, out, dtype))
    (m, k), n = a.shape, b.shape[0]
    adds = out is not None
    if out is None:
        out = torch.empty(m, n, dtype=dtype, device=a.device)
    if not m or not n or not k:
        return out if adds else out.zero_()
    blocks = in_blocks(laid(b), laid(b_scale))
    count = driver.multiprocessors(driver.ordinal(a.device))
    tile = tile or choose((m,), n, count)
    problem = Problem(m=m, n=n, k=k, groups=1)
    _set_output(problem, out, _ADD if adds else OUTPUTS[dtype])
    if blocks:
        _set_blocks(problem, b_scale)
    maps = _maps(tile, (a, a_scale), (b, b_scale), blocks)
    launched = grid(tile, up(m, TILES[tile].rows), n, count)
    _launch("dense_1d2d" if blocks else "dense_1d1d", tile, a.device, launched, maps, problem)
    return out


def grouped_gemm_nt(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, group_sizes: Tensor,
                    dtype: torch.dtype = torch.float32, *, tile: str | None = None) -> Tensor:
    """See `reference.gemm.grouped_gemm_nt`; the host neither reads nor waits for the group sizes.

    Raises:
        ValueError: the arguments are not laid out for the kernels.
    """
    _require(misfit("grouped_gemm_nt", a, a_scale, b, b_scale, group_sizes, dtype))
    (tokens, k), (experts, n, _) = a.shape, b.shape
    out = torch.empty(tokens, n, dtype=dtype, device=a.device)
    if not tokens or not n or not k:
        return out.zero_()
    count = driver.multiprocessors(driver.ordinal(a.device))
    tile = tile or choose((up(tokens, experts),) * experts, n, count)
    problem = Problem(m=tokens, n=n, k=k, groups=experts, group_sizes=group_sizes.data_ptr())
    _set_output(problem, out, OUTPUTS[dtype])
    _set_blocks(problem, b_scale)
    at_most = tokens // TILES[tile].rows + experts  # rows of tiles: each group ends with a partial one
    maps = _maps(tile, (a, a_scale), (b, b_scale), True)
    _launch("grouped", tile, a.device, grid(tile, at_most, n, count), maps, problem)
    return out


def grouped_wgrad(dy: Tensor, dy_scale: Tensor, x: Tensor, x_scale: Tensor, group_sizes: Tensor, out: Tensor, *,
                  tile: str | None = None) -> None:
    """See `reference.gemm.grouped_wgrad`; the host neither reads nor waits for the group sizes.

    Raises:
        ValueError: the arguments are not laid out for the kernels.
    """
    _require(misfit("grouped_wgrad", dy, dy_scale, x, x_scale, group_sizes, out))
    experts, n, k = out.shape
    if not out.numel():
        return
    count = driver.multiprocessors(driver.ordinal(dy.device))
    tile = tile or choose((n,) * experts, k, count, ("large", "large_pair", "medium", "medium_pair"))
    problem = Problem(m=n, n=k, groups=experts, group_sizes=group_sizes.data_ptr(), out_group=out.stride(0))
    _set_output(problem, out, _ADD)
    maps = _maps(tile, (dy, dy_scale), (x, x_scale), False)
    _launch("wgrad", tile, dy.device, grid(tile, up(n, TILES[tile].rows) * experts, k, count), maps, problem)


def _require(wrong: str | None) -> None:
    if wrong is not None:
        raise ValueError(f"cuda kernels: {wrong}")


def _set_output(problem: Problem, out: Tensor, output: int) -> None:
    problem.out, problem.out_row, problem.output = out.data_ptr(), out.stride(-2), output
    unit = 4 * out.element_size()
    problem.aligned = out.data_ptr() % unit == 0 and all(s * out.element_size() % unit == 0 for s in out.stride()[:-1])


def _set_blocks(problem: Problem, scale: Tensor) -> None:
    problem.b_scale, problem.b_scale_row = scale.data_ptr(), scale.stride(-2)
    problem.b_scale_group = scale.stride(0) if scale.dim() == 3 else 0


def _maps(tile: str, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], blocks: bool) -> list[TensorMap]:
    """Maps of A, B and their scales of tiles. B is read as a stack of matrices: no box leaves its own."""
    rows, pair = TILES[tile].rows, TILES[tile].pair
    data, stack = a[0], b[0].unsqueeze(0) if b[0].dim() == 2 else b[0]
    experts, n, k = stack.shape
    row = _stride(stack, 1)
    matrix = stack.stride(0) if experts > 1 else row * n
    a_map = driver.tensor_map(data.data_ptr(), 1, (data.shape[1], data.shape[0]), (_stride(data, 0),),
                              (BLOCK, rows // pair), True)
    b_map = driver.tensor_map(stack.data_ptr(), 1, (k, n, experts), (row, matrix), (BLOCK, COLUMNS, 1), True)
    a_scale = _scale_map(a[1], rows)
    return [a_map, b_map, a_scale, a_scale if blocks else _scale_map(b[1], COLUMNS)]


def _scale_map(scale: Tensor, box: int) -> TensorMap:
    rows, tiles = scale.shape
    column = scale.stride(1) if tiles > 1 else _padded(rows, 4)
    return driver.tensor_map(scale.data_ptr(), 4, (rows, tiles), (column * 4,), (box, 1), False)


def _stride(x: Tensor, dimension: int) -> int:
    """Bytes along a dimension; of a dimension of one, which may have any stride, what TMA accepts."""
    return x.stride(dimension) if x.shape[dimension] > 1 else _padded(x.shape[-1], 16)


def _padded(n: int, unit: int) -> int:
    return up(n, unit) * unit


def _launch(kind: str, tile: str, device: torch.device, blocks: int, maps: list[TensorMap], problem: Problem) -> None:
    shared = TILES[tile].shared(column_scales=not problem.b_scale)
    module = kind.split("_")[0]
    function = driver.kernel(driver.ordinal(device), module, f"{kind}_{tile}", shared)
    driver.launch(device, function, blocks, shared, maps, problem)
