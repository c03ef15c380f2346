"""Operands that do not fit together are refused by the compiled kernels, which would read behind their end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_ext import fp8
from megatron_ext.config.errors import ConfigError
from megatron_ext.fp8.operators import call
from megatron_ext.kernels.cpu import quantize as cpu

X8 = cpu.quantize(torch.ones(4, 300))
PACKED = [torch.zeros(4, 300, dtype=torch.uint8), torch.zeros(4, 150, dtype=torch.uint8), torch.ones(4, 3)]
ONES = torch.ones(4, 128)


@pytest.mark.parametrize(("operator", "args", "rule"), [
    ("dequantize", (X8[0], torch.ones(4, 2)), r"scale .*\[4, 2\] is not of 1x128 tiles .* of \[4, 300\]"),
    ("dequantize", (X8[0], torch.ones(0)), "is not of 1x128 tiles"),
    ("dequantize", (torch.ones(4, 300), torch.ones(4, 3)), "data must be FP8, not torch.float32"),
    ("dequantize", (X8[0], torch.ones(4, 3).double()), "scale torch.float64"),
    ("requantize_transposed", (X8[0], torch.ones(2, 3)), "is not of"),
    ("requantize_transposed", (*X8, [1, 2]), r"group sizes \[1, 2\] must sum to the 4 tokens"),
    ("quantize_both", (ONES, False, "e4m3", [5, -1]), "must sum to the 4 tokens"),
    ("grouped_gemm_nt", (*X8, torch.ones(2, 8, 300), None, [3, 4]), r"group sizes \[3, 4\] must sum to the 4 rows"),
    ("gemm_nt", (X8[0], torch.ones(4, 1), torch.ones(8, 300), None), "is not of 1x128 tiles"),
    ("swiglu_quantize", (ONES, torch.ones(4, 64)), "must have one shape"),
    ("swiglu_quantize", (ONES, torch.ones(2, 128)), "must have one shape"),
    ("swiglu_backward_quantize", (torch.ones(4, 64), ONES, ONES), "must have one shape"),
    ("rms_norm_quantize", (ONES, torch.ones(64), 1e-6), r"weight \[64\] must be \[128\]"),
    ("unpack_e5m6", (PACKED[0], PACKED[1][:2], PACKED[2]), "are not of"),
    ("unpack_e5m6", (PACKED[0], PACKED[1], PACKED[2][:, :1]), "are not of"),
    ("quantize_rows", (ONES, torch.arange(4), torch.zeros(4, 128, dtype=torch.uint8)), "uint8 with 4 rows of 129"),
    ("unpermute_combine", (ONES, torch.ones(3), torch.zeros(2, 1, dtype=torch.int64)), r"weights \[3\] must be \[4\]"),
])
def test_the_compiled_kernels_refuse(operator: str, args: tuple[Any, ...], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        call(operator, *args, backend="cpu")


def test_a_quantised_tensor_with_another_scale() -> None:
    with pytest.raises(ConfigError, match=r"scale = \[4, 2\]: scale .* is not of 1x128 tiles"):
        fp8.QuantizedTensor(X8[0], torch.ones(4, 2)).dequantize()


@pytest.mark.parametrize("sizes", [[1, 2], [3, 3], [-1, 5], [1000000, -999996]], ids=str)
def test_bad_sizes_in_traced_code_are_found_when_it_runs(sizes: list[int]) -> None:
    torch._dynamo.reset()
    traced = torch.compile(lambda x, w, s: fp8.grouped_linear(x, s, w), backend="aot_eager")
    with pytest.raises(ConfigError, match=r"group_sizes = .* that sum to T = 4"):
        traced(torch.randn(4, 128), torch.randn(2, 8, 128), torch.tensor(sizes))


@pytest.mark.parametrize("sizes", [[1.5, 2.5], torch.ones(2), torch.ones(1, 2, dtype=torch.int64), 4, torch.tensor(4)])
def test_what_are_no_sizes(sizes: Any) -> None:
    with pytest.raises(ConfigError, match=r"group_sizes = .*must be E = 2 sizes"):
        fp8.grouped_linear(torch.randn(4, 128), sizes, torch.randn(2, 8, 128))
