"""The unquantised products: what is summed into an FP32 gradient is never rounded to BF16 on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext.kernels import matmul
from megatron_ext.kernels.matmul import accumulate_matmul

CASES = [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64),
         (torch.float32, torch.float64), (torch.float64, torch.float32), (torch.bfloat16, torch.bfloat16)]


@pytest.fixture(params=["cpu", "as without FP32 output", "as on a GPU"])
def dispatch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same function on a CPU, where half precision has no products of its own, and told that it has."""
    if request.param != "cpu":
        monkeypatch.setattr(matmul, "compute_dtype", lambda x: x.dtype)
    if request.param == "as on a GPU":
        product = torch.mm

        def mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype, **nothing: Any) -> Tensor:
            assert a.dtype in (torch.bfloat16, torch.float16) and out_dtype == torch.float32 and not nothing
            return product(a.float(), b.float())

        monkeypatch.setattr(matmul, "widens", lambda x: x.dtype in (torch.bfloat16, torch.float16))
        monkeypatch.setattr(torch, "mm", mm)
    return request.param


@pytest.mark.parametrize(("operand", "sum_"), CASES, ids=str)
def test_a_sum_over_micro_batches_is_rounded_once(dispatch: str, operand: torch.dtype, sum_: torch.dtype) -> None:
    a, b = torch.randn(4, 5, 300).to(operand), torch.randn(4, 300, 7).to(operand)
    out = torch.zeros(5, 7, dtype=sum_)
    for a_MK, b_KN in zip(a, b, strict=True):
        accumulate_matmul(out, a_MK, b_KN)
    exact = (a.double() @ b.double()).sum(0)
    tolerance = 0.02 if sum_ == torch.bfloat16 else 1e-12 if sum_ == operand == torch.float64 else 1e-5
    assert (out.double() - exact).norm() / exact.norm() < tolerance


def test_fp32_output_is_asked_for_where_it_exists() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert not matmul.widens(torch.empty(1, dtype=dtype))
        assert not matmul.widens(torch.empty(1, dtype=dtype, device="meta"))
