"""Every Triton kernel compiles for Hopper on a machine without a GPU, exactly as its launcher would have it compiled.

The launchers run on CPU tensors laid out as on a GPU; what they would have launched is recorded, compiled for sm_90 and
its machine code examined: nothing spills, products use the FP8 tensor cores, and byte-exact kernels round every product
and sum apart and keep subnormal numbers.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatron_ext.kernels.layout import empty_blocks, empty_data, empty_tiles, scale_columns
from megatron_ext.kernels.reference.adamw import AdamWScalars
from tests.kernels.interpreter import gpu_layout, needs_triton

pytestmark = [
    needs_triton,
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="a process that interprets cannot compile"),
]

BF16, DEVICE = torch.bfloat16, torch.device("cpu")
T, K, N, E = 384, 7168, 2048, 8
FILES = ("quantize", "activation", "rows", "e5m6", "adamw", "gemm")
PRODUCTS = ("gemm", "grouped", "wgrad")


def bf16(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=BF16)


def fp8(*shape: int) -> Tensor:
    return empty_data(shape, torch.float8_e4m3fn, DEVICE, gpu=True)


def tiled(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return fp8(rows, columns), empty_tiles(rows, -(-columns // 128), DEVICE, gpu=True)


def blocked(*shape: int) -> tuple[Tensor, Tensor]:
    *stack, rows, columns = shape
    return fp8(*shape), empty_blocks(stack, -(-rows // 128), -(-columns // 128), DEVICE, gpu=True)


def backend() -> Any:
    """The operators and, as `modules`, what they are in; imported here, for triton may be missing."""
    modules = [importlib.import_module(f"megatron_ext.kernels.triton_kernels.{file}") for file in FILES]
    return SimpleNamespace(modules=modules, **{k: v for m in modules for k, v in vars(m).items()})


def moments(t: Any) -> None:
    n, scalars = 1 << 16, AdamWScalars.at(3, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    t.adamw([torch.empty(n)], [torch.empty(n)], [bf16(n)], [bf16(n)], scalars)


def unaligned(t: Any) -> None:
    a, a_scale = tiled(T, 200)
    b, b_scale = blocked(N, 200)
    t.gemm_nt(a.contiguous(), a_scale, b.contiguous(), b_scale, None, BF16)


S = scale_columns(T, E)
SIZES, SOURCE = torch.full((E,), T // E), torch.zeros(T, dtype=torch.int64)
CASES: dict[str, Callable[[Any], Any]] = {
    "quantize": lambda t: t.quantize(bf16(T, K)),
    "quantize power of two": lambda t: t.quantize(bf16(T, K), (1, 128), True),
    "quantize fp32": lambda t: t.quantize(torch.empty(T, K), (1, 128), True, "e5m2"),
    "quantize blocks": lambda t: t.quantize(bf16(T, K), (128, 128)),
    "quantize weight": lambda t: t.quantize_weight(bf16(2, 256, K)),
    "quantize both": lambda t: t.quantize_both(bf16(T, K), False, "e4m3", SIZES),
    "quantize both power of two": lambda t: t.quantize_both(bf16(T, K), True),
    "quantize both fp32": lambda t: t.quantize_both(torch.empty(T, K), False, "e4m3", SIZES),
    "quantize transposed": lambda t: t.quantize_transposed(bf16(T, K), False, "e4m3", SIZES),
    "requantize transposed": lambda t: t.requantize_transposed(*tiled(T, K), SIZES),
    "dequantize": lambda t: t.dequantize(*tiled(T, K)),
    "swiglu": lambda t: t.swiglu_quantize(bf16(T, N), bf16(T, N)),
    "swiglu fp32": lambda t: t.swiglu_quantize(torch.empty(T, N), torch.empty(T, N), False),
    "swiglu backward": lambda t: t.swiglu_backward_quantize(*(bf16(T, N) for _ in range(3)), False, "e4m3", SIZES),
    "swiglu backward fp32": lambda t: t.swiglu_backward_quantize(*(torch.empty(T, N) for _ in range(3))),
    "rms norm": lambda t: t.rms_norm_quantize(bf16(T, K), bf16(K), 1e-6),
    "rms norm long": lambda t: t.rms_norm_quantize(torch.empty(T, 18432), torch.empty(18432), 1e-6, False),
    "permute": lambda t: t.permute_quantize(bf16(T, K), SOURCE),
    "dispatch": lambda t: t.quantize_rows(bf16(T, K), SOURCE, torch.empty(T, 7320, dtype=torch.uint8)),
    "combine": lambda t: t.unpermute_combine(bf16(T, K), torch.empty(T), SOURCE.view(-1, 8)),
    "pack": lambda t: t.pack_e5m6(bf16(T, K)),
    "unpack": lambda t: t.unpack_e5m6(*torch.empty(2, T, K, dtype=torch.uint8), empty_tiles(T, 56, DEVICE, gpu=True)),
    "adamw": moments,
    "gemm": lambda t: t.gemm_nt(*tiled(T, K), *blocked(N, K), None, BF16),
    "gemm few rows": lambda t: t.gemm_nt(*tiled(7, K), *blocked(N, K), None, BF16),
    "gemm adding": lambda t: t.gemm_nt(*tiled(N, T), *tiled(K, T), torch.empty(N, K)),
    "gemm unaligned": unaligned,
    "grouped gemm": lambda t: t.grouped_gemm_nt(*tiled(T, K), *blocked(E, N, K), SIZES, BF16),
    "wgrad": lambda t: t.grouped_wgrad(*tiled(N, 128 * S), *tiled(K, 128 * S), SIZES, torch.empty(E, N, K)),
}


@dataclass(frozen=True)
class Compiled:
    """What is asserted of a kernel: PTX, SASS by instruction, and bytes of stack."""

    ptx: str
    instructions: Counter[str]
    stack: int


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, int], Compiled]]:
    folder = tmp_path_factory.mktemp("triton")
    with pytest.MonkeyPatch.context() as patches:
        patches.setenv("TRITON_CACHE_DIR", str(folder))
        yield functools.cache(lambda name, capability: compile_for(name, capability, folder))


def compile_for(name: str, capability: int, folder: Path) -> Compiled:
    triton = importlib.import_module("triton")
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    kernel, args, options = launched(CASES[name], hopper=capability >= 90)
    settings = {key: options.pop(key) for key in ("num_warps", "num_stages", "enable_fp_fusion")}
    signature, constants, attributes = specialised(kernel, args, options)
    source = importlib.import_module("triton.compiler").ASTSource(
        fn=kernel, signature=signature, constexprs=constants, attrs=attributes)  # fmt: skip
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", capability, 32)
    result = triton.compile(source, target=target, options=settings)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(result.asm["cubin"])

    def run(tool: str, option: str) -> str:
        return subprocess.run([tools / tool, option, cubin], text=True, capture_output=True, check=True).stdout

    stack = re.search(r"STACK:(\d+)", run("cuobjdump", "-res-usage"))
    assert stack
    instructions = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+ )?([A-Z0-9]+)", run("nvdisasm", "-c"), re.M))
    return Compiled(result.asm["ptx"], instructions, int(stack[1]))


def launched(case: Callable[[Any], Any], hopper: bool) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The kernel that an operator launches, its arguments, and its constants and options."""
    operators, launches = backend(), []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append((kernel, args, options))

    jit, gemm = importlib.import_module("triton.runtime.jit").JITFunction, operators.modules[FILES.index("gemm")]
    on_hopper = patch.object(gemm, "_hopper", lambda data: hopper)
    with gpu_layout(*operators.modules), patch.object(jit, "run", record), on_hopper:
        case(operators)
    [launch] = launches
    return launch


def specialised(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> tuple[dict, dict, dict]:
    """Signature, constants and attributes as Triton's launcher specialises them: ones, and multiples of 16."""
    mangle = importlib.import_module("triton.runtime.jit").mangle_type
    signature, constants, attributes = {}, dict(constants), {}
    for i, (name, arg) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if isinstance(arg, int) and arg == 1:
            constants[name] = 1
            continue
        signature[name] = mangle(arg)
        whole = arg.data_ptr() if isinstance(arg, Tensor) else arg if isinstance(arg, int) else 1
        if whole % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return {**signature, **dict.fromkeys(constants, "constexpr")}, constants, attributes


@pytest.mark.parametrize("name", CASES)
def test_kernels_compile_for_hopper(name: str, compiled: Callable[[str, int], Compiled]) -> None:
    found = compiled(name, 90)
    assert found.instructions.total() > 100, "the disassembly is read as it is printed"
    assert found.stack == 0 and not {"LDL", "STL"} & set(found.instructions), "it spills"
    if any(product in name for product in PRODUCTS):
        assert found.instructions["QGMMA"] >= 4
        assert (found.instructions["UTMALDG"] > 0) == ("unaligned" not in name)
        return
    assert not re.search(r"\b(add|sub|mul|mad)\.f(32|64)", found.ptx), "an instruction that ptxas may fuse with another"
    assert ".ftz" not in found.ptx
    assert ".rn.f32" in found.ptx
    if name in ("adamw", "combine", "dequantize", "unpack"):  # none of tl.fma's
        assert "fma." not in found.ptx
    if "unpack" not in name and "fp32" not in name:
        assert re.search(r"ld\.global\S*\.v4\.b32", found.ptx), "16 bytes at once"


def test_products_compile_for_ada(compiled: Callable[[str, int], Compiled]) -> None:
    found = compiled("gemm", 89)
    assert found.stack == 0 and not found.instructions["UTMALDG"]
    assert found.instructions["QMMA"] or found.instructions["HMMA"]
