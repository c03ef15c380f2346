"""Weight gradients on a GPU: BF16 operands, FP32 sum, no BF16 in between.

Not yet run on a device: none was at hand when this was written. `make test-gpu` runs it.
"""

from __future__ import annotations

import pytest
import torch

from megatron_ext.kernels.matmul import accumulate_matmul, widens

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 512, 128), (65, 333, 7), (128, 0, 128)], ids=str)
def test_accumulates_in_fp32_as_a_cpu_does(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    dy, x = torch.randn(k, m).to(dtype), torch.randn(k, n).to(dtype)
    assert widens(dy.cuda()) == (torch.version.hip is None)
    start = torch.randn(m, n)
    found, expected = start.cuda(), start.clone()
    accumulate_matmul(found, dy.cuda().t(), x.cuda())
    accumulate_matmul(expected, dy.t(), x)
    # BF16 in between would be off by 2^-9 of the product.
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5 * max(1, k) ** 0.5)
