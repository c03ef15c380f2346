"""Rows gathered, quantised and combined: the reference against plain statements, the backends against its bytes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from megatron_ext.kernels.reference import rows as reference
from megatron_ext.kernels.reference.quantize import quantize
from tests.fp8.backends import Backend, assert_same_bytes, backends, wide

SHAPES = [*itertools.product([1, 7, 129], [1, 64, 199, 384]), (7, 2112), (3, 7168)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@backends("permute_quantize", reference=True)
def test_a_permuted_row_is_the_row_quantised(backend: Backend) -> None:
    for (tokens, columns), dtype, power_of_two in itertools.product(SHAPES, DTYPES, (False, True)):
        x = wide(tokens, columns, spread=3).to(dtype).clamp(-6e4, 6e4)
        source = torch.randint(-1, tokens, (tokens + 3,))
        data, scale = backend.permute_quantize(x, source, power_of_two)
        whole = quantize(x, (1, 128), power_of_two)
        there = source >= 0
        assert_same_bytes((data[there], scale[there]), tuple(t[source[there]] for t in whole))
        assert not data[~there].view(torch.uint8).any() and not scale[~there].any()
    x = wide(5, 300)
    source = torch.tensor([4, 4, 0])
    expected = tuple(t[source] for t in quantize(x, format="e5m2"))
    assert_same_bytes(backend.permute_quantize(x, source, False, "e5m2"), expected)


@backends("permute_quantize", "quantize_rows", "unpermute_combine", reference=True)
def test_nothing_at_all(backend: Backend) -> None:
    for tokens, count in ((0, 0), (0, 3), (5, 0)):
        x, source = torch.randn(tokens, 200), torch.full((count,), -1)
        data, scale = backend.permute_quantize(x, source)
        assert data.shape == (count, 200) and scale.shape == (count, 2) and not scale.any()
        backend.quantize_rows(x, source, torch.zeros(count, 208, dtype=torch.uint8))
        combined = backend.unpermute_combine(x, torch.ones(tokens), torch.full((count, 2), -1))
        assert combined.shape == (count, 200) and not combined.any()


@backends("quantize_rows", reference=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_hold_numbers_and_exponents(backend: Backend, dtype: torch.dtype) -> None:
    for tokens, columns in SHAPES:
        x = wide(tokens, columns, spread=3).to(dtype).clamp(-6e4, 6e4)
        if columns == 384:
            x[0, 200] = math.nan
        source = torch.randint(0, tokens, (tokens + 2,))
        tiles = -(-columns // 128)
        everything = torch.full((tokens + 2, columns + tiles + 9), 77, dtype=torch.uint8)
        rows = everything[:, : columns + tiles + 2]  # rows of a wider buffer
        backend.quantize_rows(x, source, rows)
        data, scale = (t[source] for t in quantize(x, power_of_two=True))
        assert torch.equal(rows[:, :columns], data.view(torch.uint8))
        exponents = rows[:, columns : columns + tiles].int()
        assert torch.equal(exponents == 255, scale.isnan())
        assert torch.equal((exponents << 23).view(torch.float32)[~scale.isnan()], scale[~scale.isnan()])
        assert (everything[:, columns + tiles :] == 77).all()


@backends("quantize_rows", reference=True)
def test_padding_is_written_as_zeros(backend: Backend) -> None:
    rows = torch.full((2, 132), 77, dtype=torch.uint8)
    backend.quantize_rows(torch.randn(3, 128), torch.tensor([-1, 2]), rows)
    assert not rows[0, :129].any() and rows[1, :129].any() and (rows[:, 129:] == 77).all()


@backends("unpermute_combine")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combining_gives_the_bits_of_the_reference(backend: Backend, dtype: torch.dtype) -> None:
    for (count, columns), k in itertools.product(SHAPES, (1, 3, 8)):
        y, weights = wide(count, columns, spread=1).to(dtype), torch.rand(count)
        rows = torch.randint(-1, count, (11, k))
        expected = reference.unpermute_combine(y, weights, rows)
        assert_same_bytes(backend.unpermute_combine(y, weights, rows), expected)
    y[0, 0], y[1 % count, 1] = math.nan, math.inf
    found, expected = (f(y, weights, rows).float() for f in (backend.unpermute_combine, reference.unpermute_combine))
    assert torch.equal(found.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0)) and not expected.isfinite().all()


def test_combining_adds_in_the_order_of_the_list() -> None:
    y = torch.tensor([[1e8], [1.0], [-1e8]])
    rows = torch.tensor([[0, 1, 2], [0, 2, 1], [-1, 1, -1], [-1, -1, -1]])
    found = reference.unpermute_combine(y, torch.ones(3), rows)
    assert found.flatten().tolist() == [0.0, 1.0, 1.0, 0.0]


@backends("permute_quantize", "unpermute_combine", reference=True)
def test_there_and_back(backend: Backend) -> None:
    tokens, k = 40, 2
    x = torch.randn(tokens, 256)
    slots = torch.randperm(tokens * k).view(tokens, k)
    source = torch.empty(tokens * k, dtype=torch.int64)
    source[slots.flatten()] = torch.arange(tokens).repeat_interleave(k)
    data, scale = backend.permute_quantize(x, source)
    y = data.float() * scale.repeat_interleave(128, 1)
    found = backend.unpermute_combine(y, torch.full((tokens * k,), 0.5), slots)
    data, scale = quantize(x, power_of_two=True)
    assert torch.equal(found, data.float() * scale.repeat_interleave(128, 1))
