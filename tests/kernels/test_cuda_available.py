"""When the CUDA kernels cannot run: one clear line, `usable` is False, nothing raises. The conditions are real ones.

Each case is a process of its own whose loader finds the emulated driver (or none), which reports what the case says.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_ext.kernels.cuda import available, tiles
from megatron_ext.kernels.cuda.cubins import FOLDER
from megatron_ext.kernels.cuda.gemm import weight_operands
from megatron_ext.kernels.cuda.operands import misfit
from megatron_ext.kernels.layout import empty_blocks, empty_data, empty_tiles
from megatron_ext.kernels.reference.quantize import dequantize, quantize
from tests.kernels.emulation.library import ABSENT, build, fake_cubins

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))


CASES = {
    "all well": ({}, "None"),
    "old driver": ({"EMULATION_DRIVER": "11080"}, "the driver is of CUDA 11.8, and there is no nvcc to compile them"),
    "Ampere": ({"EMULATION_CAPABILITY": "80"}, "compute capability 8.0, they are for Hopper's 9.0"),
    "Blackwell": ({"EMULATION_CAPABILITY": "100"}, "compute capability 10.0, they are for Hopper's 9.0"),
    "no GPU": ({"EMULATION_DEVICES": "0"}, "no GPU"),
    "no start": ({"EMULATION_INIT": "100"}, "cuInit: error 100"),
    "refused": ({"EMULATION_LOAD": "209"}, "cuModuleLoadData: error 209"),
    "no cubins": ({"XDG_CACHE_HOME": "/nonexistent"}, "no compiled kernels came with the package"),
}

ASK = """
import json, os, sys
from megatron_ext.kernels.cuda.available import why_not
for environment in json.loads(sys.argv[1]):
    sys.stdout.flush()
    if os.fork() == 0:
        os.environ.update(environment)
        print(why_not(), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def ask(folder: Path, *environments: dict[str, str]) -> list[str]:
    """What `why_not` prints in a fresh process for each environment."""
    env = {**os.environ, "LD_LIBRARY_PATH": str(folder), "XDG_CACHE_HOME": str(folder), "PYTHONPATH": str(ROOT),
           "NVCC": "no-such-nvcc"}  # fmt: skip
    command = [sys.executable, "-c", ASK, json.dumps(environments)]
    done = subprocess.run(command, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@needs_compiler
def test_one_line_says_why_not(tmp_path: Path) -> None:
    build(tmp_path)
    fake_cubins(tmp_path)
    cases = {name: case for name, case in CASES.items() if name != "no cubins" or not list(FOLDER.glob("*.cubin"))}
    lines = ask(tmp_path, *(environment for environment, _ in cases.values()))
    for (name, (_, said)), line in zip(cases.items(), lines, strict=True):
        assert said in line, name
        assert line == "None" or line.startswith("cuda kernels: "), name


def test_without_a_driver(tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").write_bytes(b"not a library")
    (line,) = ask(tmp_path, {})
    assert line.startswith("cuda kernels: no CUDA driver (")


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


def test_both_operands_of_a_weight_fit() -> None:
    """And the second is the transpose, number by number."""
    for stack in ((), (3,)):
        data, scale = quantize(torch.randn(*stack, 200, 400), (128, 128))
        (b, b_scale), (b_t, b_t_scale) = weight_operands(data, scale)
        assert torch.equal(dequantize(b_t.contiguous(), b_t_scale.contiguous()), dequantize(b, b_scale).mT)
        a, a_scale, *_ = dense(5, 1, 200)
        args = (torch.tensor([5, 0, 0]),) if stack else ()
        # a CPU's empty_data is not padded: 200 is a multiple of 8 only
        wide = empty_data(b_t.shape, E4M3, CPU, gpu=True)
        assert misfit("grouped_gemm_nt" if stack else "gemm_nt", a, a_scale, wide, b_t_scale, *args) is None


@pytest.mark.parametrize(("change", "said"), [
    (lambda a, sa, b, sb: (a, sa, b, None), "not quantised"),
    (lambda a, sa, b, sb: (a, sa, b.view(torch.float8_e5m2), sb), "E4M3"),
    (lambda a, sa, b, sb: (a[:, 1:], sa, b[:, 1:], sb), "16 bytes"),
    (lambda a, sa, b, sb: (a.contiguous()[:, :399], sa, b[:, :399], sb), None),
    (lambda a, sa, b, sb: (torch.empty(129, 399).to(E4M3), sa, b[:, :399], sb), "16 bytes"),
    (lambda a, sa, b, sb: (a.t().contiguous().t(), sa, b, sb), "16 bytes"),
    (lambda a, sa, b, sb: (a, sa.contiguous(), b, sb), "column by column"),
    (lambda a, sa, b, sb: (a, sa, b, sb.t().contiguous().t()), "128x128 blocks"),
    (lambda a, sa, b, sb: (a, sa[:, :3], b, sb), "1x128 tiles"),
    (lambda a, sa, b, sb: (a, sa, b, sb, torch.empty(129, 200).bfloat16()), "out must be FP32"),
    (lambda a, sa, b, sb: (a, sa, b, sb, torch.empty(200, 129).t()), "out must be FP32"),
    (lambda a, sa, b, sb: (a, sa, b, sb, None, torch.float16), "FP32 or BF16"),
    (lambda a, sa, b, sb: (a, sa.double(), b, sb), "FP32"),
    (lambda a, sa, b, sb: (a, sa, b.to("meta"), sb), "several devices"),
    (lambda a, sa, b, sb: (a, sa, b[:, :384], sb), "do not fit"),
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
