"""E5M6 in two planes: the reference against the format's definition, the backends against its bytes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_ext.kernels.reference import e5m6 as reference
from tests.fp8.backends import BACKENDS, Backend, assert_same_bytes, backends, wide

SHAPES = [(0, 5), (1, 1), (7, 64), (129, 199), (7, 384), (3, 2112), (2, 7168)]


def numbers() -> Tensor:
    """Every finite nonnegative number of the format from its definition, in order; [n] FP64."""
    found = []
    for code in range(0x7C0):
        exponent, fraction = code >> 6, (code & 63) / 64
        found.append((1 + fraction) * 2.0 ** (exponent - 15) if exponent else fraction * 2.0**-14)
    return torch.tensor(found, dtype=torch.float64)


def codes(high: Tensor, low: Tensor) -> Tensor:
    nibbles = torch.stack((low & 15, low >> 4), -1).flatten(1)[:, : high.shape[1]]
    return high.int() << 4 | nibbles.int()


def test_the_format() -> None:
    assert numbers()[-1] == reference.LARGEST and numbers()[1] == 2.0**-20
    every = torch.arange(0x7C0)
    padded = torch.nn.functional.pad(every, (0, -len(every) % 128)).view(1, -1)
    high, low = (padded >> 4).to(torch.uint8), (padded[:, ::2] & 15 | (padded[:, 1::2] & 15) << 4).to(torch.uint8)
    found = reference.unpack_e5m6(high, low, torch.ones(1, padded.shape[1] // 128))
    assert torch.equal(found[0, : len(every)].double(), numbers())


def test_rounds_to_the_nearest_number() -> None:
    x = wide(64, 200, spread=3) * torch.exp(3 * torch.randn(64, 200))
    high, low, scale = reference.pack_e5m6(x)
    amax = torch.stack([x[:, :128].abs().amax(1), x[:, 128:].abs().amax(1)], 1)
    assert torch.equal(scale, torch.exp2(torch.ceil(torch.log2(amax.double() / 65024))).float())
    v = (x / scale.repeat_interleave(128, 1)[:, :200]).double().abs()
    table = numbers()
    above = torch.searchsorted(table, v).clamp(1, len(table) - 1)
    down, up = v - table[above - 1], table[above] - v
    nearest = torch.where((down < up) | ((down == up) & (above % 2 == 1)), above - 1, above)
    assert torch.equal(codes(high, low) & 0x7FF, nearest.int())
    assert torch.equal(codes(high, low) >> 11 == 1, torch.signbit(x))


def test_ties_go_to_even() -> None:
    table = numbers()
    ties = ((table[1:] + table[:-1]) / 2).float()
    x = torch.zeros(1, 128 * 16)
    x.view(16, 128)[:, :125].copy_(ties[: 16 * 125 : 1][: 16 * 125].repeat(2)[: 16 * 125].view(16, 125))
    x.view(16, 128)[:, 127] = reference.LARGEST  # scale 1
    high, low, scale = reference.pack_e5m6(x)
    assert (scale == 1).all() and (codes(high, low) % 2 == 0).view(16, 128)[:, :125].all()


def test_twelve_bits_a_number_and_eight_times_finer_than_e4m3() -> None:
    x = torch.randn(128, 1024)
    packed = reference.pack_e5m6(x)
    assert sum(t.nbytes for t in packed) == x.numel() * 12 / 8 + x.numel() / 32
    error = reference.unpack_e5m6(*packed).double() - x
    assert 10 * math.log10(float(x.double().square().sum() / error.square().sum())) == pytest.approx(49.6, abs=0.2)
    assert (error.abs() <= x.abs() * 2**-7 * (1 + 1e-6)).all()


@backends("pack_e5m6", "unpack_e5m6")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_writes_the_bytes_of_the_reference(backend: Backend, dtype: torch.dtype) -> None:
    for rows, columns in SHAPES:
        x = (wide(rows, columns, spread=3) * torch.exp(4 * torch.randn(rows, columns))).clamp(-6e4, 6e4).to(dtype)
        expected = reference.pack_e5m6(x)
        assert expected[1].shape == (rows, math.ceil(columns / 2))
        assert_same_bytes(backend.pack_e5m6(x), expected)
        assert_same_bytes(backend.unpack_e5m6(*expected), reference.unpack_e5m6(*expected))


@backends("pack_e5m6", "unpack_e5m6", reference=True)
def test_special_tiles(backend: Backend) -> None:
    x = torch.randn(6, 299)
    x[0, :128], x[0, 5] = 0.0, -0.0
    x[1, 3], x[2, 298] = math.nan, -math.inf
    x[3] *= 1e-30
    x[4] = 3e38
    x[5] = 1e-42
    high, low, scale = backend.pack_e5m6(x)
    assert_same_bytes((high, low, scale), reference.pack_e5m6(x))
    y = backend.unpack_e5m6(high, low, scale)
    assert (y[0, :128] == 0).all() and torch.signbit(y[0, 5]) and not torch.signbit(y[0, 4])
    assert scale[1, 0].isnan() and y[1, :128].isnan().all() and not y[1, 128:].isnan().any()
    assert y[2, 256:].isnan().all() and not y[2, :256].isnan().any()
    assert (high[2, 256:] == 0x7F).all() and (low[2, 128:149] == 0xFF).all() and low[2, 149] == 0x0F
    assert torch.allclose(y[3], x[3], rtol=0.008, atol=0) and torch.allclose(y[4], x[4], rtol=0.008, atol=0)
    assert (y[5] == 0).all()


@settings(max_examples=60)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=140))
def test_any_bits_at_all(bits: list[int]) -> None:
    x = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32).view(1, -1)
    for tensor in (x, x.where(x.isfinite(), torch.zeros(()))):
        expected = reference.pack_e5m6(tensor)
        for backend in BACKENDS.values():
            assert_same_bytes(backend.pack_e5m6(tensor), expected)
            found = backend.unpack_e5m6(*expected)
            assert torch.equal(found.nan_to_num(nan=1.0), reference.unpack_e5m6(*expected).nan_to_num(nan=1.0))
