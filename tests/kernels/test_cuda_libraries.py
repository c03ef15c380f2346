"""The backends `torch` (scaled_mm) and `deep_gemm` without a GPU: what they take, and what they hand over."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

from megatron_ext.kernels.deep_gemm import available as deep_gemm_available
from megatron_ext.kernels.deep_gemm import gemm as deep_gemm
from megatron_ext.kernels.layout import empty_blocks, empty_data, empty_tiles
from megatron_ext.kernels.torch_scaled import available as torch_available
from megatron_ext.kernels.torch_scaled import gemm as torch_scaled

ROOT = Path(__file__).parents[2]
E4M3, CPU = torch.float8_e4m3fn, torch.device("cpu")


def operands(m: int, n: int, k: int, blocks: bool, device: torch.device = CPU) -> tuple[Tensor, ...]:
    kb = -(-k // 128)
    b_scale = empty_blocks((), -(-n // 128), kb, device, gpu=True) if blocks else empty_tiles(n, kb, device, gpu=True)
    return (empty_data((m, k), E4M3, device, gpu=True), empty_tiles(m, kb, device, gpu=True),
            empty_data((n, k), E4M3, device, gpu=True), b_scale)  # fmt: skip


@pytest.mark.parametrize("blocks", [False, True], ids=["tile", "block"])
@pytest.mark.parametrize(("m", "n", "k"), [(128, 256, 512), (4, 128, 128), (132, 2048, 384), (64, 768, 640)])
def test_torch_takes_the_layout_without_a_copy(m: int, n: int, k: int, blocks: bool) -> None:
    """Checked by torch's own rules for its operator, on its `meta` device; what is handed over is what was given."""
    a, a_scale, b, b_scale = operands(m, n, k, blocks)
    assert torch_scaled.misfit(a, a_scale, b, b_scale) is None
    handed = torch_scaled._with_padding(b_scale).t() if blocks else b_scale
    assert handed.data_ptr() == b_scale.data_ptr()
    kind = ScalingType.BlockWise128x128 if blocks else ScalingType.BlockWise1x128
    meta = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in (a, b.t(), a_scale, handed)]
    for dtype in (torch.float32, torch.bfloat16):
        product = scaled_mm(meta[0], meta[1], meta[2], ScalingType.BlockWise1x128, meta[3], kind, output_dtype=dtype)
        assert product.shape == (m, n) and product.dtype == dtype


def test_torch_refuses_what_cublas_cannot_read() -> None:
    a, a_scale, b, b_scale = operands(128, 256, 640, True)
    assert "multiple of 4" in torch_scaled.misfit(*operands(7, 256, 512, True))
    assert "N of 128" in torch_scaled.misfit(*operands(128, 576, 512, True))
    assert "N of 16" in torch_scaled.misfit(*operands(128, 200, 512, False))
    assert torch_scaled.misfit(*operands(128, 576, 512, False)) is None
    assert "K of 128" in torch_scaled.misfit(*operands(128, 256, 576, True))
    assert "column by column" in torch_scaled.misfit(a, a_scale.contiguous(), b, b_scale)
    assert "padded to 8" in torch_scaled.misfit(a, a_scale, b, b_scale.contiguous())
    short = torch.empty(2 * 8 - 3).as_strided((2, 5), (8, 1))  # the padding of the last row is somebody else's
    assert "padded to 8" in torch_scaled.misfit(a, a_scale, b, short)
    assert "not quantised" in torch_scaled.misfit(a, a_scale, b.float(), None)
    with pytest.raises(ValueError, match="torch scaled_mm: M must be a multiple of 4"):
        torch_scaled.gemm_nt(*operands(7, 256, 512, True))


def test_deep_gemm_takes_what_it_can_compute() -> None:
    blocks, tiles = operands(129, 256, 512, True), operands(132, 256, 512, False)
    assert deep_gemm.misfit(*blocks, None, torch.bfloat16) is None
    assert "BF16 only" in deep_gemm.misfit(*blocks)
    assert "BF16 only" in deep_gemm.misfit(*blocks, torch.zeros(129, 256))
    assert "contiguous" in deep_gemm.misfit(*operands(129, 256, 640, True), None, torch.bfloat16)
    assert deep_gemm.misfit(*tiles) is None
    assert deep_gemm.misfit(*tiles, torch.zeros(132, 256)) is None
    assert "FP32 only" in deep_gemm.misfit(*tiles, None, torch.bfloat16)
    assert "of 8" in deep_gemm.misfit(*operands(129, 250, 512, True), None, torch.bfloat16)


@pytest.mark.parametrize("module", [torch_available, deep_gemm_available], ids=["torch", "deep_gemm"])
def test_without_a_gpu_one_line_says_so(module) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    line = module.why_not()
    assert line is not None and len(line.splitlines()) == 1
    assert not module.usable("gemm_nt", *operands(128, 256, 512, True))
    assert not module.usable("grouped_gemm_nt", *operands(128, 256, 512, True))


def test_the_folder_does_not_shadow_the_package(tmp_path: Path) -> None:
    """`import deep_gemm` finds the package even when ours was imported first; importing ours imports no package."""
    (tmp_path / "deep_gemm").mkdir()
    (tmp_path / "deep_gemm" / "__init__.py").write_text("fp8_gemm_nt = 'the package'\n")
    code = (
        "import sys, importlib, megatron_ext.kernels.deep_gemm.available; assert 'deep_gemm' not in sys.modules; "
        "from megatron_ext.kernels.deep_gemm.gemm import PACKAGE; print(importlib.import_module(PACKAGE).fp8_gemm_nt)"
    )
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip() == "the package"


def test_availability_imports_neither_triton_nor_a_driver() -> None:
    code = (
        "import sys; from megatron_ext.kernels.cuda import available; from megatron_ext.kernels.torch_scaled import "
        "available; maps = open('/proc/self/maps').read(); "
        "print([m for m in ('triton', 'deep_gemm') if m in sys.modules], 'libcuda.so' in maps)"
    )
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip() == "[] False"
