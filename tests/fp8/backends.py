"""The quantising backends under test: every one must write the reference's bytes."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from megatron_ext.kernels.cpu import quantize as cpu
from megatron_ext.kernels.reference import quantize as reference

OPERATORS = ("quantize", "dequantize", "quantize_transposed", "requantize_transposed")
BACKENDS = {
    "cpu": cpu,
    "portable": SimpleNamespace(**{name: partial(getattr(cpu, name), portable=True) for name in OPERATORS}),
}


def assert_same_bytes(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Equal dtypes, shapes, FP8 bytes and bits of the scales (NaN included)."""
    for a, b, bits in zip(found, expected, (torch.uint8, torch.int32), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a.view(bits), b.view(bits))


__all__ = ["BACKENDS", "assert_same_bytes", "reference"]
