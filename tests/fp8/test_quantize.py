"""The reference against an independent statement of the format, and every backend against the reference's bytes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_ext import fp8
from megatron_ext.config.errors import ConfigError
from megatron_ext.kernels.cpu import library
from megatron_ext.kernels.cpu import quantize as cpu
from megatron_ext.kernels.layout import FORMATS, scale_columns, token_spans
from megatron_ext.kernels.reference import quantize as reference
from tests.fp8.backends import BACKENDS, Backend, assert_same_bytes, backends, wide

BLOCKS = [(1, 128), (128, 128)]
ROWS, COLUMNS = [0, 1, 7, 129], [1, 64, 128, 200, 384]
V3 = [(1, 2112), (7, 7168), (129, 640), (129, 768), (7, 576)]
"""Shapes of DeepSeek-V3's layers; K = 2112 and 576 end in half a tile."""

blocks = pytest.mark.parametrize("block", BLOCKS, ids=["tile", "block"])
formats = pytest.mark.parametrize("format", FORMATS)
powers = pytest.mark.parametrize("power_of_two", [False, True], ids=["fp32", "pow2"])


def fp8_numbers(format: str) -> Tensor:
    """Every finite nonnegative number of the format from its definition, in order; [n] FP64."""
    mantissa, bias, top = (3, 7, 0x7E) if format == "e4m3" else (2, 15, 0x7B)
    numbers = []
    for byte in range(top + 1):
        exponent, fraction = byte >> mantissa, (byte % 2**mantissa) / 2**mantissa
        numbers.append((1 + fraction) * 2.0 ** (exponent - bias) if exponent else fraction * 2.0 ** (1 - bias))
    return torch.tensor(numbers, dtype=torch.float64)


def nearest_even(v: Tensor, format: str) -> Tensor:
    """Bytes of |v| rounded to nearest by search in the table of all numbers, ties to the even byte."""
    numbers = fp8_numbers(format)
    above = torch.searchsorted(numbers, v.double().abs()).clamp(1, len(numbers) - 1)
    low, high = v.double().abs() - numbers[above - 1], numbers[above] - v.double().abs()
    return torch.where((low < high) | ((low == high) & (above % 2 == 1)), above - 1, above)


def test_the_library_is_compiled() -> None:
    assert library.load() is not None, f"{library.PATH} is missing: pip install -e . builds it"


# ---- the reference -------------------------------------------------------------------------------


@formats
@powers
def test_reference_rounds_to_the_nearest_number(format: str, power_of_two: bool) -> None:
    x = wide(64, 200)
    data, scale = reference.quantize(x, (1, 128), power_of_two, format)
    largest = FORMATS[format].largest
    for columns, tile in ((slice(0, 128), 0), (slice(128, 200), 1)):
        amax = x[:, columns].abs().amax(1)
        expected = amax / torch.tensor(largest)
        if power_of_two:
            expected = torch.tensor([2.0 ** math.ceil(math.log2(s)) for s in expected.tolist()])
        assert torch.equal(scale[:, tile], expected)
        v = (x[:, columns] / scale[:, tile, None]).clamp(-largest, largest)
        found = data[:, columns].view(torch.uint8)
        assert torch.equal((found & 0x7F).long(), nearest_even(v, format))
        assert torch.equal(found >> 7 == 1, torch.signbit(x[:, columns]))


@formats
def test_reference_ties_go_to_even(format: str) -> None:
    numbers = fp8_numbers(format).float()
    ties = (numbers[1:] + numbers[:-1]) / 2
    x = torch.zeros(1, 128 * 2)
    x[0, : len(ties)] = ties
    x[0, 127] = x[0, 255] = numbers[-1]  # scale 1 in both tiles
    data, scale = reference.quantize(x, (1, 128), format=format)
    assert torch.equal(scale, torch.ones(1, 2))
    assert (data.view(torch.uint8)[0, : len(ties)] % 2 == 0)[: min(len(ties), 127)].all()


@powers
def test_weight_blocks_share_one_scale(power_of_two: bool) -> None:
    x = wide(2, 200, 300)
    _, scale = reference.quantize(x, (128, 128), power_of_two)
    assert scale.shape == (2, 2, 3)
    block = x[1, 128:, 256:]
    assert torch.equal(scale[1, 1, 2], reference.quantize(block, (128, 128), power_of_two)[1][0, 0])
    amax_alone = reference.quantize(block.abs().max().view(1, 1), (1, 128), power_of_two)
    assert torch.equal(scale[1, 1, 2], amax_alone[1][0, 0])


@blocks
@powers
def test_error_is_half_a_unit_of_the_format(block: tuple[int, int], power_of_two: bool) -> None:
    x = torch.randn(130, 200)
    q = fp8.quantize(x, block, power_of_two)
    spread = q.scale.repeat_interleave(block[0], 0)[:130].repeat_interleave(128, 1)[:, :200]
    # 3 mantissa bits: 1/16 of the number; below the normal range half of 2^-9 scales
    assert ((q.dequantize() - x).abs() <= torch.maximum(x.abs() / 16, spread * 2**-10) * (1 + 1e-6)).all()


def snr(x: Tensor, y: Tensor) -> float:
    return 10 * math.log10(float(x.double().square().sum() / (x - y).double().square().sum()))


@pytest.mark.parametrize(
    ("block", "power_of_two", "format", "decibels"),
    [
        ((1, 128), False, "e4m3", 31.8),
        ((1, 128), True, "e4m3", 31.5),
        ((128, 128), False, "e4m3", 31.6),
        ((1, 128), True, "e5m2", 25.6),
    ],
)
def test_signal_to_noise_on_normal_numbers(
    block: tuple[int, int], power_of_two: bool, format: str, decibels: float
) -> None:
    x = torch.randn(512, 1024)
    assert snr(x, fp8.quantize(x, block, power_of_two, format).dequantize()) == pytest.approx(decibels, abs=0.15)


def test_fine_tiles_survive_outlier_channels() -> None:
    x = torch.randn(512, 2048)
    x[:, torch.randperm(2048)[:8]] *= 200
    fine, coarse = (snr(x, fp8.quantize(x, block).dequantize()) for block in BLOCKS)
    assert fine > coarse + 4


def test_transposing_a_power_of_two_copy_loses_nothing_above_the_subnormals() -> None:
    x = torch.randn(256, 256) * torch.exp(torch.randn(256, 1))
    data, scale = reference.quantize(x, power_of_two=True)
    once = reference.dequantize(data, scale)
    moved, moved_scale = reference.requantize_transposed(data, scale)
    twice = reference.dequantize(moved, moved_scale).t()
    spread = moved_scale.repeat_interleave(128, 1).t()
    normal = once.abs() >= spread * 2**-6
    assert torch.equal(once[normal], twice[normal])
    assert (once == twice).float().mean() > 0.94
    assert (moved_scale.view(torch.int32) & 0x7FFFFF == 0).all()


# ---- blocks that are not ordinary ----------------------------------------------------------------


@backends("quantize", "dequantize", reference=True)
@blocks
@formats
@powers
def test_special_blocks(backend: Backend, block: tuple[int, int], format: str, power_of_two: bool) -> None:
    rows = block[0]
    x = torch.randn(5 * rows, 300)
    cases = x.view(5, rows, 300)
    cases[0] = 0.0
    cases[0, 0, 5] = -0.0
    cases[1] *= 1e-30 / cases[1].abs().max()
    cases[2, 0, 3], cases[3, 0, 200] = math.nan, -math.inf
    cases[4] = 1e-42  # denormal
    data, scale = backend.quantize(x, block, power_of_two, format)
    assert_same_bytes((data, scale), reference.quantize(x, block, power_of_two, format))
    y = backend.dequantize(data, scale)
    assert torch.equal(torch.nan_to_num(y, nan=7.0), torch.nan_to_num(reference.dequantize(data, scale), nan=7.0))
    y = y.view(5, rows, 300)
    assert (y[0] == 0).all() and (scale > 0).logical_or(scale.isnan()).all()
    assert (y[1] - cases[1]).double().norm() < cases[1].double().norm() * 0.07
    assert y[2, :, :128].isnan().all() and not y[2, :, 128:].isnan().any()
    assert y[3, :, 128:256].isnan().all() and not y[3, :, :128].isnan().any()
    assert (data.view(torch.uint8).view(5, rows, 300)[2, :, :128] == 0x7F).all()
    assert (y[4] == 0).all()


@backends("dequantize")
@formats
def test_every_byte_decodes_as_in_torch(backend: Backend, format: str) -> None:
    data = torch.arange(256, dtype=torch.uint8).view(2, 128).view(FORMATS[format].dtype)
    for scale in (2.0**-116, 0.37, 2.0**119):
        scales = torch.full((2, 1), scale)
        found, expected = backend.dequantize(data, scales), reference.dequantize(data, scales)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(nan=1.0), expected.nan_to_num(nan=1.0))
        assert torch.equal(torch.signbit(found[found == 0]), torch.signbit(expected[expected == 0]))


@backends("quantize", "dequantize", reference=True)
def test_huge_numbers_do_not_overflow(backend: Backend) -> None:
    x = torch.full((1, 128), 3e38)
    for power_of_two in (False, True):
        y = backend.dequantize(*backend.quantize(x, (1, 128), power_of_two))
        assert torch.allclose(y, x, rtol=0.07, atol=0)


@backends("quantize", "dequantize")
def test_flushing_denormals_changes_no_byte(backend: Backend) -> None:
    x = wide(64, 128) * 1e-32
    x[:8] *= 1e-6
    expected = reference.quantize(x)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        found = backend.quantize(x)
        dequantized = backend.dequantize(*found)
    finally:
        torch.set_flush_denormal(False)
    assert_same_bytes(found, expected)
    assert torch.equal(dequantized, reference.dequantize(*expected))


# ---- bytes equal the reference's -----------------------------------------------------------------


@backends("quantize", "dequantize")
@blocks
@formats
@powers
def test_quantize_writes_the_bytes_of_the_reference(
    backend: Backend, block: tuple[int, int], format: str, power_of_two: bool
) -> None:
    for rows, columns in [*itertools.product(ROWS, COLUMNS), *V3]:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = wide(rows, columns).clamp(-6e4, 6e4).to(dtype)
            expected = reference.quantize(x, block, power_of_two, format)
            assert_same_bytes(backend.quantize(x, block, power_of_two, format), expected)
            assert torch.equal(backend.dequantize(*expected), reference.dequantize(*expected))


def neighbours(amax: Tensor) -> Tensor:
    """[R] largest magnitudes -> tiles [R, 128] of those and of numbers whose quotient by the tile's scale is next to a
    boundary between two FP8 numbers, or on it: where a division is off by a bit, these tell."""
    scale = amax / torch.tensor(448.0)
    boundaries = (torch.arange(16, 32) / 16 * torch.exp2(torch.randint(-25, 9, (len(amax), 16)))).clamp(max=448)
    near = (boundaries * scale[:, None]).view(torch.int32)
    x = torch.stack([near + step for step in (-3, -2, -1, 0, 1, 2, 3)], -1).flatten(1).view(torch.float32)
    return torch.cat([x.minimum(amax[:, None]), amax[:, None].expand(-1, 16)], 1)


@backends("quantize", "quantize_transposed")
def test_quotients_are_those_of_a_division(backend: Backend) -> None:
    amax = 448 * torch.exp2(torch.randint(-60, 118, (4096,)) + torch.rand(4096))
    ones = 448 * torch.full((256,), 2 - 2.0**-23)  # a scale whose mantissa is all ones is a case of its own,
    huge = 448 * 2.0**118 * (1 + torch.rand(2048))  # and so are those with a reciprocal that is all but denormal
    x = neighbours(torch.cat([amax, ones, huge]))
    for format in FORMATS:
        assert_same_bytes(backend.quantize(x, (1, 128), False, format), reference.quantize(x, (1, 128), False, format))
        found = backend.quantize_transposed(x.t().contiguous(), False, format)
        assert_same_bytes(found, reference.quantize(x, (1, 128), False, format))


@backends("quantize_transposed", "requantize_transposed", "quantize_both")
@powers
@pytest.mark.parametrize("groups", [None, "one", "some"])
def test_transposes_write_the_bytes_of_the_reference(backend: Backend, power_of_two: bool, groups: str | None) -> None:
    for rows, columns in [*itertools.product([*ROWS, 300], COLUMNS), (129, 2112)]:
        sizes = {None: None, "one": [rows], "some": [rows // 3, 0, rows - rows // 3, 0]}[groups]
        tensor = None if sizes is None else torch.tensor(sizes)
        for dtype, format in ((torch.float32, "e4m3"), (torch.bfloat16, "e4m3"), (torch.float32, "e5m2")):
            x = wide(rows, columns, dtype=dtype)
            tiles = reference.quantize(x, (1, 128), power_of_two, format)
            expected = reference.quantize_transposed(x, power_of_two, format, sizes)
            assert_same_bytes(backend.quantize_transposed(x, power_of_two, format, tensor), expected)
            assert_same_bytes(backend.quantize_both(x, power_of_two, format, tensor), (*tiles, *expected))
            expected = reference.requantize_transposed(*tiles, sizes)
            assert_same_bytes(backend.requantize_transposed(*tiles, tensor), expected)


@backends("quantize_weight", reference=True)
@pytest.mark.parametrize("shape", [(1, 1), (130, 200), (3, 128, 64), (2, 300, 129), (0, 5), (576, 384)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_in_both_orientations(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = wide(*shape, dtype=dtype)
    data, scale, data_t, scale_t = backend.quantize_weight(weight)
    expected = reference.quantize(weight, (128, 128))
    assert_same_bytes((data, scale), expected)
    assert_same_bytes((data_t, scale_t), tuple(t.mT.contiguous() for t in expected))
    assert data_t.is_contiguous() and scale_t.is_contiguous()
    assert not data.numel() or data.data_ptr() != data_t.data_ptr()


@backends("quantize_transposed", "quantize_both", "requantize_transposed", "quantize_weight")
def test_special_numbers_in_transposes(backend: Backend) -> None:
    x = torch.randn(140, 130)
    x[3, 5], x[130, 129], x[:128, 7], x[9, 8], x[:, 9] = math.nan, math.inf, 0.0, 3e38, 1e-30
    for sizes in (None, torch.tensor([3, 1, 136])):
        found = backend.quantize_both(x, False, "e4m3", sizes)
        assert_same_bytes(found, reference.quantize_both(x, False, "e4m3", sizes))
        assert found[3][5].isnan().any() and not found[3][6].isnan().any()
        tiles = reference.quantize(x, power_of_two=True)
        expected = reference.requantize_transposed(*tiles, sizes)
        assert_same_bytes(backend.requantize_transposed(*tiles, sizes), expected)
    assert_same_bytes(backend.quantize_weight(x), reference.quantize_weight(x))


@backends("quantize_transposed", "requantize_transposed", reference=True)
@settings(max_examples=25)
@given(sizes=st.lists(st.integers(0, 300), min_size=1, max_size=5), columns=st.sampled_from([1, 128, 140]))
def test_groups_are_quantised_as_if_each_were_alone(backend: Backend, sizes: list[int], columns: int) -> None:
    tiles = reference.quantize(torch.randn(sum(sizes), columns), power_of_two=True)
    x = reference.dequantize(*tiles)
    width = sum(sizes) // 128 + len(sizes)
    data, scale = torch.zeros(columns, 128 * width, dtype=torch.uint8), torch.zeros(columns, width)
    first = 0
    for e, size in enumerate(sizes):
        if size:
            alone, alone_scale = reference.quantize(x[first : first + size].t(), power_of_two=True)
            tile = first // 128 + e
            data[:, 128 * tile : 128 * tile + size] = alone.view(torch.uint8)
            scale[:, tile : tile + alone_scale.shape[1]] = alone_scale
        first += size
    expected = data.view(torch.float8_e4m3fn), scale
    assert_same_bytes(backend.quantize_transposed(x, True, "e4m3", torch.tensor(sizes)), expected)
    assert_same_bytes(backend.requantize_transposed(*tiles, torch.tensor(sizes)), expected)


@settings(max_examples=60)
@given(
    bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=150),
    power_of_two=st.booleans(),
    format=st.sampled_from(sorted(FORMATS)),
    block=st.sampled_from(BLOCKS),
)
def test_any_bits_at_all(bits: list[int], power_of_two: bool, format: str, block: tuple[int, int]) -> None:
    x = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32).view(1, -1)
    expected = reference.quantize(x, block, power_of_two, format)
    for backend in BACKENDS.values():
        assert_same_bytes(backend.quantize(x, block, power_of_two, format), expected)
        if block[0] == 1:
            found = backend.quantize_transposed(x.t().contiguous(), power_of_two, format)
            assert_same_bytes(found, expected)


@settings(max_examples=40)
@given(
    magnitudes=st.lists(st.integers(0, 0x7F7FFFFF), min_size=128, max_size=128),
    top=st.floats(2.0**-100, 2.0**100, width=32),
)
def test_any_magnitudes_below_the_top(magnitudes: list[int], top: float) -> None:
    """Numbers that land all over the FP8 range, its subnormals and ties among them."""
    fractions = torch.tensor(magnitudes, dtype=torch.float64) / 0x7F7FFFFF
    x = (top * torch.exp2(-20 * fractions)).float().view(1, 128)
    x[0, ::2] = (x[0, ::2] / top * 64).round() / 64 * top
    expected = reference.quantize(x)
    for backend in BACKENDS.values():
        assert_same_bytes(backend.quantize(x), expected)


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = wide(260, 300), wide(3, 130, 200)
    tiles = cpu.quantize(x, power_of_two=True)
    monkeypatch.setattr(cpu, "GRAIN", 1)
    torch.set_num_threads(3)
    try:
        found = [cpu.quantize(x), cpu.quantize_weight(weight), cpu.quantize_both(x, group_sizes=[100, 160]),
                 cpu.requantize_transposed(*tiles, [100, 160])]  # fmt: skip
        dequantized = cpu.dequantize(*tiles)
    finally:
        torch.set_num_threads(1)
    expected = [reference.quantize(x), reference.quantize_weight(weight),
                reference.quantize_both(x, group_sizes=[100, 160]),
                reference.requantize_transposed(*tiles, [100, 160])]  # fmt: skip
    for a, b in zip(found, expected, strict=True):
        assert_same_bytes(a, b)
    assert torch.equal(dequantized, reference.dequantize(*tiles))


@backends("quantize", "dequantize", "quantize_both")
def test_big_arrays(backend: Backend) -> None:
    """Big enough for huge pages, for a second thread and for what is written past the caches."""
    x = wide(1100, 4096, dtype=torch.bfloat16)
    torch.set_num_threads(2)
    try:
        found = backend.quantize_both(x)
        assert_same_bytes(backend.quantize(x), found[:2])
        found_blocks = [backend.quantize(numbers, (128, 128)) for numbers in (x, x.float())]
        dequantized = backend.dequantize(*found[:2])
    finally:
        torch.set_num_threads(1)
    assert_same_bytes(found, reference.quantize_both(x))
    for same in found_blocks:
        assert_same_bytes(same, reference.quantize(x, (128, 128)))
    assert torch.equal(dequantized, reference.dequantize(*found[:2]))


@backends("quantize", "quantize_transposed", "dequantize")
def test_strided_inputs(backend: Backend) -> None:
    x = wide(200, 130)
    assert_same_bytes(backend.quantize(x.t()), reference.quantize(x.t()))
    assert_same_bytes(backend.quantize_transposed(x.t()), reference.quantize_transposed(x.t()))
    data, scale = reference.quantize_transposed(x, group_sizes=[70, 130])
    for span in token_spans([70, 130]):
        columns = slice(128 * span.first_tile, 128 * span.first_tile + span.last - span.first)
        part = data[:, columns], scale[:, span.first_tile : span.last_tile]
        assert torch.equal(backend.dequantize(*part), reference.dequantize(*part))
    stack = reference.quantize(wide(2, 130, 200), (128, 128))
    assert torch.equal(backend.dequantize(*(t.mT for t in stack)), reference.dequantize(*(t.mT for t in stack)))


# ---- layout and the public face ------------------------------------------------------------------


@given(st.lists(st.integers(0, 400), min_size=1, max_size=12))
def test_token_tiles_of_groups_never_overlap(sizes: list[int]) -> None:
    spans = token_spans(sizes)
    for e, span in enumerate(spans):
        assert (span.first, span.last) == (sum(sizes[:e]), sum(sizes[: e + 1]))
        assert span.last_tile - span.first_tile == math.ceil(sizes[e] / 128)
    ends = [0, *(s.last_tile for s in spans if s.last > s.first)]
    starts = [s.first_tile for s in spans if s.last > s.first]
    assert all(end <= start for end, start in zip(ends, starts, strict=False))
    assert max(ends) <= scale_columns(sum(sizes), len(sizes))


def test_quantize_face() -> None:
    x = torch.randn(2, 3, 200, dtype=torch.bfloat16, requires_grad=True)
    q = fp8.quantize(x, power_of_two=True)
    assert q.data.dtype == torch.float8_e4m3fn and q.scale.dtype == torch.float32 and not q.data.requires_grad
    assert q.shape == (2, 3, 200) and q.scale.shape == (2, 3, 2) and q.block == (1, 128)
    assert q.dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(q.dequantize(), q.dequantize(torch.bfloat16).float())  # exact with power-of-two scales
    assert torch.equal(q.dequantize(), q.dequantize(backend="reference"))
    weight = torch.randn(3, 130, 200)
    assert fp8.quantize(weight, (128, 128)).scale.shape == (3, 2, 2)
    assert fp8.quantize(weight, (128, 128), format="e5m2").data.dtype == torch.float8_e5m2


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"block": (1, 64)}, "block"),
        ({"block": (1, 1, 128)}, "block"),
        ({"format": "e3m4"}, "format"),
        ({"x": torch.zeros(128)}, "x"),
        ({"x": torch.zeros(2, 128, dtype=torch.int32)}, "x"),
        ({"x": torch.zeros(2, 128).to(torch.float8_e4m3fn)}, "x"),
        ({"backend": "cudnn"}, "kernels.backend"),
    ],
)
def test_quantize_refuses(arguments: dict, key: str) -> None:
    with pytest.raises(ConfigError) as error:
        fp8.quantize(**{"x": torch.zeros(2, 128), **arguments})
    assert error.value.key == key
