"""The memory-bound Triton kernels, interpreted on a CPU, against the reference: bytes and bits of scales are equal."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_ext.kernels.layout import FORMATS
from megatron_ext.kernels.reference import activation, adamw, e5m6, quantize, rows
from megatron_ext.kernels.reference.adamw import AdamWScalars
from tests.kernels.interpreter import gpu_layout, interpreted, needs_triton

pytestmark = needs_triton

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
GROUPS = [None, [130, 0, 60], [0, 0, 190], [1, 188, 1, 0], [190]]

dtypes = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
groups = pytest.mark.parametrize("sizes", GROUPS, ids=str)


def triton(file: str) -> Any:
    """A module of the backend; only the process that interprets may import them."""
    from importlib import import_module

    return import_module(f"megatron_ext.kernels.triton_kernels.{file}")


def same(found: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Equal dtypes, shapes and bits; results in FP32, but not scales, may have any NaN for a NaN."""
    for a, b in zip(found, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
        assert torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def one_nan(x: Tensor) -> Tensor:
    return x.where(~x.isnan(), math.nan)


def wide(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    """Normal numbers whose rows spread over 20 orders of magnitude (5 in FP16), with exact zeros among them."""
    spread = torch.exp((2 if dtype == FP16 else 8) * torch.randn(*shape[:-1], 1))
    return (torch.randn(*shape) * spread).where(torch.rand(*shape) > 0.05, 0.0).to(dtype)


def with_specials(x: Tensor) -> Tensor:
    """Where there is room: tiles of zeros, of 1e-30, with NaN and with an infinity."""
    if len(x) > 4:
        x[0], x[1], x[2, 3], x[3, -1] = 0.0, x[1].sign() * 1e-30, math.nan, -math.inf
        x[0, ::2] = -0.0
    return x


# ---- quantisation


def check_quantize(dtype: torch.dtype, block: tuple[int, int]) -> None:
    ours = triton("quantize")
    cases = [(0, 128), (1, 640), (7, 384), (129, 200)]
    for i, shape in enumerate(cases):
        for power_of_two in (False, True):
            x, format = with_specials(wide(*shape, dtype=dtype)), ("e4m3", "e5m2")[(i + power_of_two) % 2]
            with gpu_layout(*[ours] * (i % 2)):
                same(ours.quantize(x, block, power_of_two, format), quantize.quantize(x, block, power_of_two, format))


@dtypes
@pytest.mark.parametrize("block", [(1, 128), (128, 128)], ids=["tile", "block"])
def test_quantize(dtype: torch.dtype, block: tuple[int, int]) -> None:
    interpreted(check_quantize, dtype, block)


def check_stacks_and_strides() -> None:
    ours = triton("quantize")
    stack, x = wide(2, 3, 130, dtype=BF16), wide(130, 40)
    with gpu_layout(ours):
        for block in ((1, 128), (128, 128)):
            found, expected = ours.quantize(stack, block), quantize.quantize(stack, block)
            same(found, expected)
            same([ours.dequantize(*found)], [quantize.dequantize(*expected)])
            same([ours.dequantize(*(t.mT.contiguous() for t in found))],
                 [quantize.dequantize(*(t.mT.contiguous() for t in expected))])
        same(ours.quantize(x.t()), quantize.quantize(x.t()))
        same(ours.quantize(x[:, ::2]), quantize.quantize(x[:, ::2]))
        part = wide(40, 300)[:, 40:170]
        same(ours.quantize_both(part), quantize.quantize_both(part))
        double = wide(3, 130).double()
        same(ours.quantize(double), quantize.quantize(double))


def test_stacks_and_strides() -> None:
    interpreted(check_stacks_and_strides)


def check_weight(dtype: torch.dtype) -> None:
    ours = triton("quantize")
    for i, shape in enumerate([(200, 130), (3, 128, 200)]):
        weight = wide(*shape, dtype=dtype)
        weight[..., 5, 6] = math.nan
        with gpu_layout(*[ours] * (i % 2)):
            same(ours.quantize_weight(weight), quantize.quantize_weight(weight))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_weight_in_both_orientations(dtype: torch.dtype) -> None:
    interpreted(check_weight, dtype)


def check_tokens(sizes: list[int] | None) -> None:
    ours = triton("quantize")
    given = None if sizes is None else torch.tensor(sizes)
    for columns, power_of_two, format in ((200, False, "e4m3"), (64, True, "e5m2")):
        x = with_specials(wide(190, columns, dtype=BF16))
        x[-1, 5] = math.nan  # in a tile that is not full
        with gpu_layout(*[ours] * power_of_two):
            options = power_of_two, format
            same(ours.quantize_both(x, *options, given), quantize.quantize_both(x, *options, sizes))
            same(ours.quantize_transposed(x, *options, given), quantize.quantize_transposed(x, *options, sizes))
            tiles = quantize.quantize(x, (1, 128), *options)
            same(ours.requantize_transposed(*tiles, given), quantize.requantize_transposed(*tiles, sizes))


@groups
def test_tiles_of_tokens(sizes: list[int] | None) -> None:
    interpreted(check_tokens, sizes)


def check_no_tokens() -> None:
    ours, x = triton("quantize"), torch.empty(0, 130)
    for sizes in (None, [0, 0]):
        same(ours.quantize_both(x, False, "e4m3", sizes), quantize.quantize_both(x, False, "e4m3", sizes))


def test_no_tokens_at_all() -> None:
    interpreted(check_no_tokens)


def check_any_bits() -> None:
    ours = triton("quantize")
    options = dict(power_of_two=st.booleans(), format=st.sampled_from(sorted(FORMATS)))

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=130), **options)
    def any_bits(bits: list[int], power_of_two: bool, format: str) -> None:
        x = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(FP32).view(1, -1)
        same(ours.quantize(x, (1, 128), power_of_two, format), quantize.quantize(x, (1, 128), power_of_two, format))

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(tops=st.lists(st.integers(0, 0x7F7FFFFF), min_size=32, max_size=32), **options)
    def any_tops(tops: list[int], power_of_two: bool, format: str) -> None:
        """Rows of any largest magnitude, and below it numbers near the boundaries between FP8 numbers."""
        top = torch.tensor(tops, dtype=torch.int32).view(FP32).view(32, 1)
        x = top.double() / 448 * (torch.arange(128) % 33) / 2.0 ** (torch.arange(128) % 7)
        x = (x * (1 + (torch.arange(128) % 5 - 2) * 2.0**-24)).float()
        x[:, :1] = top
        same(ours.quantize(x, (1, 128), power_of_two, format), quantize.quantize(x, (1, 128), power_of_two, format))

    any_bits()
    any_tops()


def test_any_bits_at_all() -> None:
    interpreted(check_any_bits)


# ---- SwiGLU, RMSNorm


def activations(dtype: torch.dtype, count: int) -> list[Tensor]:
    tensors = [torch.randn(190, 200).mul(4).to(dtype) for _ in range(count)]
    for tensor in tensors:
        tensor[7, torch.randint(200, (2,))] = torch.tensor([math.nan, math.inf]).to(dtype)
    tensors[-1][:4, :6] = torch.tensor([-300.0, -88.5, -87.2, 90.0, -0.0, 1e-30]).to(dtype)
    return tensors


def check_swiglu(dtype: torch.dtype) -> None:
    ours = triton("activation")
    up, gate = activations(dtype, 2)
    for power_of_two, format in ((True, "e4m3"), (False, "e5m2")):
        with gpu_layout(*[ours] * power_of_two):
            same(ours.swiglu_quantize(gate, up, power_of_two, format),
                 activation.swiglu_quantize(gate, up, power_of_two, format))
    both = torch.cat((gate, up), 1)  # halves of one matrix, as a fused projection gives them
    same(ours.swiglu_quantize(*both.chunk(2, 1)), activation.swiglu_quantize(*both.chunk(2, 1)))


@dtypes
def test_swiglu(dtype: torch.dtype) -> None:
    interpreted(check_swiglu, dtype)


def check_swiglu_backward(dtype: torch.dtype, sizes: list[int] | None) -> None:
    ours, quantising = triton("activation"), triton("quantize")
    dh, up, gate = activations(dtype, 3)
    power_of_two = sizes is None
    with gpu_layout(*[ours, quantising] * power_of_two):
        found = ours.swiglu_backward_quantize(dh, gate, up, power_of_two, "e4m3", sizes)
    same(found, activation.swiglu_backward_quantize(dh, gate, up, power_of_two, "e4m3", sizes))


@pytest.mark.parametrize(("dtype", "sizes"), [(FP32, None), (BF16, [130, 0, 60]), (FP16, [190])], ids=str)
def test_swiglu_backward(dtype: torch.dtype, sizes: list[int] | None) -> None:
    interpreted(check_swiglu_backward, dtype, sizes)


def check_rms_norm(dtype: torch.dtype) -> None:
    ours = triton("activation")
    for i, columns in enumerate((100, 384, 640)):
        x, weight = with_specials(wide(9, columns, dtype=dtype)), torch.randn(columns).to(dtype)
        with gpu_layout(*[ours] * (i % 2)):
            found = ours.rms_norm_quantize(x, weight, 1e-6, i > 0)
        expected = activation.rms_norm_quantize(x, weight, 1e-6, i > 0)
        same([*found[:2], one_nan(found[2])], [*expected[:2], one_nan(expected[2])])
    assert len(ours.rms_norm_quantize(x[:0], weight, 1e-6)[0]) == 0


@dtypes
def test_rms_norm(dtype: torch.dtype) -> None:
    interpreted(check_rms_norm, dtype)


# ---- rows of tokens, E5M6, AdamW


def check_rows(dtype: torch.dtype) -> None:
    ours = triton("rows")
    x = with_specials(wide(50, 200, dtype=dtype))
    source = torch.cat((torch.tensor([3, -1, 49, 0, 0, -1]), torch.randperm(50)))
    for power_of_two, format in ((True, "e4m3"), (False, "e5m2")):
        with gpu_layout(*[ours] * power_of_two):
            same(ours.permute_quantize(x, source, power_of_two, format),
                 rows.permute_quantize(x, source, power_of_two, format))
    for width in (208, 216, 205):  # of rows: 16, 8 and 1 bytes at once
        found, expected = (torch.full((len(source), width), 9, dtype=torch.uint8) for _ in range(2))
        ours.quantize_rows(x, source, found)
        rows.quantize_rows(x, source, expected)
        same([found], [expected])
    chosen, weights = torch.randint(-1, 50, (33, 3)), torch.randn(50)
    x[2:4] = 1.0
    same([ours.unpermute_combine(x, weights, chosen)], [rows.unpermute_combine(x, weights, chosen)])
    assert ours.unpermute_combine(x, weights, chosen[:0]).shape == (0, 200)


@dtypes
def test_rows(dtype: torch.dtype) -> None:
    interpreted(check_rows, dtype)


def check_e5m6(dtype: torch.dtype) -> None:
    ours = triton("e5m6")
    for shape in ((7, 201), (33, 128), (0, 128)):
        x = with_specials(wide(*shape, dtype=dtype))
        with gpu_layout(ours):
            found = ours.pack_e5m6(x)
        packed = e5m6.pack_e5m6(x)
        same(found, packed)
        same([one_nan(ours.unpack_e5m6(*found))], [one_nan(e5m6.unpack_e5m6(*packed))])
    every = torch.arange(4096)  # every code but those of infinities and NaN comes back
    every = every[(every & 0x7FF) < 0x7C0].view(1, -1)
    low = (every & 0xF)[:, ::2] | (every & 0xF)[:, 1::2] << 4
    codes = (every >> 4).to(torch.uint8), low.to(torch.uint8), torch.ones(1, every.shape[1] // 128)
    same([ours.unpack_e5m6(*codes)], [e5m6.unpack_e5m6(*codes)])


@dtypes
def test_e5m6(dtype: torch.dtype) -> None:
    interpreted(check_e5m6, dtype)


def check_adamw(param: torch.dtype, grad: torch.dtype, moment: torch.dtype) -> None:
    ours = triton("adamw")
    for adam_w_mode in (True, False):
        lists: list[list[Tensor]] = [[], [], [], []]
        for n in (0, 7, 1500):
            numbers = [torch.randn(n) * 10.0 ** torch.randint(-6, 6, (n,)) for _ in range(4)]
            numbers[3].abs_()
            for i, special in enumerate((0.0, -0.0, 1e-40, -1e-44, 3e38, math.inf, math.nan)):
                for k in range(3):
                    numbers[k][11 * i + 3 * k :][:1] = special
            for into, x, dtype in zip(lists, numbers, (param, grad, moment, moment), strict=True):
                into.append(x.to(dtype))
        expected = [[x.clone() for x in tensors] for tensors in lists]
        for step in (1, 2):
            scalars = AdamWScalars.at(step, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
                                      adam_w_mode=adam_w_mode)
            ours.adamw(*lists, scalars)
            adamw.adamw(*expected, scalars)
        for a, b in zip(lists, expected, strict=True):
            same(map(one_nan, a), map(one_nan, b))


@pytest.mark.parametrize("types", [(FP32, FP32, BF16), (BF16, FP32, FP32), (FP32, BF16, FP32), (BF16, BF16, BF16)],
                         ids=str)
def test_adamw(types: tuple[torch.dtype, ...]) -> None:
    interpreted(check_adamw, *types)
