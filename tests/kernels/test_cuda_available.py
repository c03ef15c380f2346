"""When the CUDA kernels cannot run: one clear line, `usable` is False, nothing raises. The conditions are real ones.

Each case is a process of its own whose loader finds the emulated driver (or none), which reports what the case says.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_ext.kernels.cuda import available, tiles
from megatron_ext.kernels.cuda.gemm import misfit
from megatron_ext.kernels.layout import empty_blocks, empty_data, empty_tiles
from tests.kernels.emulation.library import ABSENT, build, fake_cubins

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("driver")
    build(folder)
    fake_cubins(folder)
    return folder


def why_not(folder: Path, **environment: str) -> str:
    code = "from megatron_ext.kernels.cuda.available import why_not; print(why_not())"
    env = {**os.environ, "LD_LIBRARY_PATH": str(folder), "XDG_CACHE_HOME": str(folder), "PYTHONPATH": str(ROOT),
           "NVCC": "no-such-nvcc", **environment}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_compiler
@pytest.mark.parametrize(("environment", "said"), [
    ({}, "None"),
    ({"EMULATION_DRIVER": "12040"}, "are of CUDA 13.0, the driver is of CUDA 12.4, and there is no nvcc"),
    ({"EMULATION_CAPABILITY": "80"}, "compute capability 8.0, they are for Hopper's 9.0"),
    ({"EMULATION_CAPABILITY": "100"}, "compute capability 10.0, they are for Hopper's 9.0"),
    ({"EMULATION_DEVICES": "0"}, "no GPU"),
    ({"EMULATION_INIT": "100"}, "cuInit: error 100"),
    ({"EMULATION_LOAD": "209"}, "cuModuleLoadData: error 209"),
    ({"XDG_CACHE_HOME": "/nonexistent"}, "no compiled kernels came with the package, and there is no nvcc"),
], ids=["all well", "old driver", "Ampere", "Blackwell", "no GPU", "no start", "refused", "no cubins"])  # fmt: skip
def test_one_line_says_why_not(folder: Path, environment: dict[str, str], said: str) -> None:
    line = why_not(folder, **environment)
    assert said in line and len(line.splitlines()) == 1
    assert line == "None" or line.startswith("cuda kernels: ")


def test_without_a_driver(tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").write_bytes(b"not a library")
    line = why_not(tmp_path)
    assert line.startswith("cuda kernels: no CUDA driver (") and len(line.splitlines()) == 1


def test_a_cpu_is_refused_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "why_not", None)  # calling it would raise
    a, b = torch.zeros(8, 128).to(torch.float8_e4m3fn), torch.zeros(8, 128).to(torch.float8_e4m3fn)
    assert not available.usable("gemm_nt", a, torch.ones(8, 1), b, torch.ones(1, 1))
    assert not available.usable("quantize", a)


CPU = torch.device("cpu")
E4M3 = torch.float8_e4m3fn


def dense(m: int = 129, n: int = 200, k: int = 400, tiles_of_b: bool = False) -> list[torch.Tensor]:
    kb = -(-k // 128)
    b_scale = empty_tiles(n, kb, CPU, gpu=True) if tiles_of_b else empty_blocks((), -(-n // 128), kb, CPU, gpu=True)
    return [empty_data((m, k), E4M3, CPU, gpu=True), empty_tiles(m, kb, CPU, gpu=True),
            empty_data((n, k), E4M3, CPU, gpu=True), b_scale]  # fmt: skip


def test_what_the_layout_makes_fits() -> None:
    for m in (0, 1, 7, 128, 129):
        for k in (1, 16, 384, 640, 1000):
            for tiles_of_b in (False, True):
                assert misfit("gemm_nt", *dense(m, 200, k, tiles_of_b)) is None
                assert misfit("gemm_nt", *dense(m, 1, k, tiles_of_b)) is None


@pytest.mark.parametrize(("change", "said"), [
    (lambda a, sa, b, sb: (a, sa, b, None), "not quantised"),
    (lambda a, sa, b, sb: (a, sa, b.view(torch.float8_e5m2), sb), "E4M3"),
    (lambda a, sa, b, sb: (a[:, 1:], sa, b[:, 1:], sb), "16 bytes"),
    (lambda a, sa, b, sb: (a.contiguous()[:, :399], sa, b[:, :399], sb), None),
    (lambda a, sa, b, sb: (torch.empty(129, 399).to(E4M3), sa, b[:, :399], sb), "16 bytes"),
    (lambda a, sa, b, sb: (a.t().contiguous().t(), sa, b, sb), "16 bytes"),
    (lambda a, sa, b, sb: (a, sa.contiguous(), b, sb), "column by column"),
    (lambda a, sa, b, sb: (a, sa, b, sb.t().contiguous().t()), "128x128 blocks"),
    (lambda a, sa, b, sb: (a, sa[:, :3], b, sb), "do not fit"),
    (lambda a, sa, b, sb: (a, sa, b, sb, torch.empty(129, 200).bfloat16()), "out must be FP32"),
    (lambda a, sa, b, sb: (a, sa, b, sb, torch.empty(200, 129).t()), "out must be FP32"),
    (lambda a, sa, b, sb: (a, sa, b, sb, None, torch.float16), "FP32 or BF16"),
    (lambda a, sa, b, sb: (a, sa.double(), b, sb), "FP32"),
])  # fmt: skip
def test_what_does_not_fit_is_named(change, said: str | None) -> None:
    found = misfit("gemm_nt", *change(*dense()))
    assert found == said if said is None else said in found


def test_group_sizes_stay_on_the_device() -> None:
    a, a_scale, b, b_scale = dense()
    b, b_scale = b.unsqueeze(0), b_scale.unsqueeze(0)
    assert misfit("grouped_gemm_nt", a, a_scale, b, b_scale, torch.tensor([129])) is None
    for sizes in ([129], torch.tensor([129], dtype=torch.int32), torch.tensor([64, 65])):
        assert "int64 tensor [1]" in misfit("grouped_gemm_nt", a, a_scale, b, b_scale, sizes)


def test_shared_memory_of_every_tile_fits() -> None:
    assert all(tile.shared(True) <= 227 * 1024 for tile in tiles.TILES.values())
