"""Where numbers and scales lie: one layout that our kernels, cuBLAS and DeepGEMM read without a copy."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.kernels.cuda.operands import misfit
from megatron_ext.kernels.deep_gemm import gemm as deep_gemm
from megatron_ext.kernels.layout import (
    BLOCK,
    data_columns,
    empty_blocks,
    empty_data,
    empty_tiles,
    scale_columns,
    tile_count,
    token_spans,
)
from megatron_ext.kernels.reference.quantize import quantize, quantize_transposed
from megatron_ext.kernels.torch_scaled import gemm as scaled_mm
from tests.fp8.backends import laid_out

CPU = torch.device("cpu")
ROWS = st.integers(0, 20) | st.sampled_from([127, 128, 129, 4096])
COLUMNS = st.integers(1, 9).map(lambda tiles: 128 * tiles) | st.sampled_from([64, 200, 576, 7168])
"""Every (K / 128) % 4, whole and partial tiles."""


@given(rows=ROWS, columns=COLUMNS)
def test_tiles_are_as_tma_cublas_and_deepgemm_read_them(rows: int, columns: int) -> None:
    """cuBLAS: scales of 1x128 tiles M-major; DeepGEMM: M-major, the column stride aligned to 16 bytes (its
    get_mn_major_tma_aligned_tensor then copies nothing); TMA: strides that are multiples of 16 bytes."""
    tiles = tile_count(columns)
    scale = empty_tiles(rows, tiles, CPU, gpu=True)
    assert scale.shape == (rows, tiles) and scale.dtype == torch.float32
    aligned = -(-rows // 4) * 4
    assert scale.stride() == (1, max(aligned, 1)) or rows == 0
    assert (scale.stride(1) * scale.element_size()) % 16 == 0 or rows == 0
    assert scale.untyped_storage().nbytes() == aligned * tiles * 4, "the last column is padded too: boxes stay inside"
    plain = empty_tiles(rows, tiles, CPU)
    assert plain.is_contiguous() and plain.shape == scale.shape


@given(stack=st.sampled_from([(), (1,), (3,)]), rows=st.integers(1, 9), columns=st.integers(1, 9))
def test_blocks_are_as_cublas_reads_them(stack: tuple[int, ...], rows: int, columns: int) -> None:
    """cuBLAS: K-blocks contiguous, a row of them padded to a multiple of 4."""
    scale = empty_blocks(stack, rows, columns, CPU, gpu=True)
    assert scale.shape == (*stack, rows, columns) and scale.stride(-1) == 1
    assert scale.stride(-2) == -(-columns // 4) * 4
    assert all(expert.storage_offset() % 4 == 0 for expert in (scale if stack else scale[None]))
    assert empty_blocks(stack, rows, columns, CPU).is_contiguous()


@given(rows=ROWS, columns=st.integers(1, 300))
def test_rows_of_numbers_begin_where_tma_can_read(rows: int, columns: int) -> None:
    data = empty_data((rows, columns), torch.float8_e4m3fn, CPU, gpu=True)
    assert data.shape == (rows, columns) and data.stride(1) == 1 and (data.stride(0) % 16 == 0 or rows == 0)
    assert empty_data((rows, columns), torch.float8_e4m3fn, CPU).is_contiguous()


@given(st.lists(st.integers(0, 300) | st.sampled_from([0, 1, 127, 128, 129, 256]), min_size=1, max_size=12))
def test_groups_never_share_a_tile_and_find_theirs_from_their_offset_alone(sizes: list[int]) -> None:
    tokens, spans = sum(sizes), token_spans(sizes)
    columns = scale_columns(tokens, len(sizes))
    assert data_columns(tokens, len(sizes)) == BLOCK * columns
    end = 0
    for e, (span, size) in enumerate(zip(spans, sizes, strict=True)):
        assert (span.first, span.last) == (sum(sizes[:e]), sum(sizes[: e + 1]))
        assert span.first_tile == span.first // BLOCK + e, "no sum over tile counts"
        assert span.last_tile - span.first_tile == tile_count(size)
        assert span.first_tile >= end
        end = max(end, span.last_tile)
    assert end <= columns


def test_a_list_and_a_tensor_of_sizes_are_the_same() -> None:
    assert token_spans(torch.tensor([130, 0, 60])) == token_spans([130, 0, 60])
    assert [span.first_tile for span in token_spans([130, 0, 60])] == [0, 2, 3] and scale_columns(190, 3) == 4


def test_operands_of_the_suite_are_laid_out_as_kernels_on_a_gpu_take_them() -> None:
    """Where there is a GPU one suite runs over its backends too; what they refused, it would skip."""
    x8, w8 = quantize(torch.randn(130, 384)), quantize(torch.randn(256, 384), (128, 128))
    experts, sizes = quantize(torch.randn(3, 256, 384), (128, 128)), [5, 0, 125]
    dy8, x8_t = (quantize_transposed(torch.randn(130, n), True, "e4m3", sizes) for n in (256, 384))
    out = torch.zeros(3, 256, 384)
    for operator, args in {"gemm_nt": (*x8, *w8), "grouped_gemm_nt": (*x8, *experts, sizes),
                           "grouped_wgrad": (*dy8, *x8_t, sizes, out)}.items():
        moved = laid_out(args, CPU, gpu=True)
        assert misfit(operator, *moved) is None
        for a, b in zip(args, moved, strict=True):
            assert torch.tensor(a).equal(b) if isinstance(a, list) else torch.equal(a.float(), b.float())
    assert scaled_mm.misfit(*laid_out((*quantize(torch.randn(128, 384)), *w8), CPU, gpu=True)) is None
    x8, w8 = quantize(torch.randn(130, 512)), quantize(torch.randn(256, 512), (128, 128))  # 4 blocks: no padding
    assert deep_gemm.misfit(*laid_out((*x8, *w8), CPU, gpu=True), None, torch.bfloat16) is None
