"""Matrix products on a GPU: dense, weight gradient, grouped, grouped weight gradient.

Not yet run on a GPU.

Ours is what the registry chooses, or the backend that is named. Operands are random and quantised once, outside the
time. Shape letters as in kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_rows import Item, Row, Work, at_most, contest, guarded, peers
from kernel_rows.timing import take_turns

GPU = torch.device("cuda")
TOKENS = 4096
V3 = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))
"""(N, K) of DeepSeek-V3's linears, as DeepGEMM's own benchmark has them."""

GRADIENTS = ((4096, 7168), (7168, 2048), (7168, 16384))
"""Those of them whose weight gradients are timed."""

EXPERTS = (4096, 7168)
"""(N, K) of gate and up of V3's experts as one product."""

EVEN = [4096] * 8
SKEWED = [128 * n for n in (64, 40, 28, 20, 16, 13, 11, 9, 8, 7, 6, 5, 4, 4, 3, 3, 2, 2, 2, *[1] * 8, *[0] * 4, 1)]
"""Tokens of each expert; multiples of 128 only because DeepGEMM takes no others."""


def random(*shape: int, seed: int = 0) -> Tensor:
    """N(0, 1) in BF16, from a generator of its own: the default one does not survive a failed capture."""
    generator = torch.Generator(GPU).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=GPU, dtype=torch.bfloat16)


def choose(operator: str, *args: Any, backend: str) -> tuple[str, Any]:
    """(backend, call) of an operator on these arguments."""
    from megatron_ext.kernels.registry import OPERATORS

    chosen = OPERATORS.select(operator, *args, backend=backend)
    return chosen.backend, lambda: chosen.function(*args)


def run(operator: str, *args: Any, backend: str = "auto") -> Any:
    return choose(operator, *args, backend=backend)[1]()


def weight_operands(weight: Tensor, backend: str) -> Any:
    """A weight quantised in 128x128 blocks, in both forms, as the GEMM's backend takes it."""
    return run("weight_operands", *run("quantize", weight, (128, 128)), backend=backend)


def dense(rounds: int, backend: str) -> Iterator[Item]:
    """Goal 1: y [M, N] = x W^T, BF16 out."""
    for n, k in V3:
        name = f"1 dense {TOKENS}x{n}x{k}"
        yield from guarded(name, _dense, name, n, k, rounds, backend)


def _dense(name: str, n: int, k: int, rounds: int, backend: str) -> Iterator[Item]:
    x, weight = random(TOKENS, k), random(n, k, seed=1)
    a = run("quantize", x)
    b = run("quantize", weight, (128, 128))
    used, ours = choose("gemm_nt", *a, *weight_operands(weight, backend)[0], None, torch.bfloat16, backend=backend)
    times = take_turns({"ours": ours, "torch BF16 mm": lambda: F.linear(x, weight),
                        "F.scaled_mm": peers.scaled_mm(*a, *b, torch.bfloat16), "DeepGEMM": peers.deep_gemm(*a, *b)},
                       rounds, GPU)
    work = Work(2 * TOKENS * n * k, TOKENS * k + n * k + 2 * TOKENS * n)
    yield from contest(name, work, times, {"torch BF16 mm": 1.45, "F.scaled_mm": 1.0, "DeepGEMM": 0.97},
                       1150 if k >= 4096 else None, used)


def wgrad(rounds: int, backend: str) -> Iterator[Item]:
    """Goal 2: main_grad [N, K] FP32 += dy^T x."""
    for n, k in GRADIENTS:
        name = f"2 wgrad {n}x{k} of {TOKENS} tokens"
        yield from guarded(name, _wgrad, name, n, k, rounds, backend)


def _wgrad(name: str, n: int, k: int, rounds: int, backend: str) -> Iterator[Item]:
    dy, x = random(TOKENS, n), random(TOKENS, k, seed=1)
    a, b = (run("quantize_transposed", tensor) for tensor in (dy, x))
    grads = [torch.zeros(n, k, device=GPU) for _ in range(4)]
    used, ours = choose("gemm_nt", *a, *b, grads[0], backend=backend)
    times = take_turns(
        {"ours": ours, "F.scaled_mm + add_": peers.scaled_mm(*a, *b, torch.float32, grads[1]),
         "DeepGEMM": peers.deep_gemm(*a, *b, grads[2]),
         "torch BF16 mm + add_": lambda: grads[3].add_(torch.mm(dy.t(), x))}, rounds, GPU)
    work = Work(2 * TOKENS * n * k, TOKENS * (n + k) + 8 * n * k)
    goals = {"F.scaled_mm + add_": 1.15, "DeepGEMM": None, "torch BF16 mm + add_": None}
    yield from contest(name, work, times, goals, 950, used)


def grouped(rounds: int, backend: str) -> Iterator[Item]:
    """Goal 3: the forward product and the input gradient of grouped experts, without the sizes on the host."""
    for sizes, what in ((EVEN, "E=8"), (SKEWED, "E=32 skewed")):
        for form, direction in enumerate(("forward", "dgrad")):
            name = f"3 grouped {direction} {what}"
            yield from guarded(name, _grouped, name, sizes, form, rounds, backend)


def _grouped(name: str, sizes: list[int], form: int, rounds: int, backend: str) -> Iterator[Item]:
    weight = random(len(sizes), *EXPERTS, seed=1)
    operand = weight_operands(weight, backend)[form]
    weight = weight if form == 0 else weight.mT.contiguous()  # now [E, N, K] of this product
    blocks = run("quantize", weight, (128, 128))
    tokens, n, k = sum(sizes), *weight.shape[1:]
    x, on_device = random(tokens, k), torch.tensor(sizes, device=GPU)
    a = run("quantize", x)
    ends, columns_first = on_device.cumsum(0).int(), weight.mT
    used, ours = choose("grouped_gemm_nt", *a, *operand, on_device, torch.bfloat16, backend=backend)

    def loop() -> None:
        for rows, matrix in zip(x.split(on_device.tolist()), weight, strict=True):
            F.linear(rows, matrix)

    times = take_turns(
        {"ours": ours, "torch BF16 grouped_mm": lambda: F.grouped_mm(x, columns_first, offs=ends),
         "a loop of torch BF16 mm": loop, "DeepGEMM": peers.deep_gemm_grouped(*a, *blocks, sizes)}, rounds, GPU)
    work = Work(2 * tokens * n * k, tokens * k + weight.numel() + 2 * tokens * n)
    goals = {"torch BF16 grouped_mm": 1.4, "a loop of torch BF16 mm": 2.0, "DeepGEMM": None}
    yield from contest(name, work, times, goals, 1150, used)
    yield no_sync(name, used, ours)


def no_sync(name: str, backend: str, call: Any) -> Row:
    """Whether a call neither synchronises nor copies to the host, so that a CUDA graph can hold it."""
    why = ""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            call()
    except Exception as error:
        why = f": {type(error).__name__}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return at_most(f"{name} [{backend}], waits for the host{why}", float(bool(why)), "of 1 call", 0)


def grouped_wgrad(rounds: int, backend: str) -> Iterator[Item]:
    """Goal 4: main_grad [E, N, K] FP32 += dy_e^T x_e; N = 768 and empty groups right."""
    for sizes, what in ((EVEN, "E=8"), (SKEWED, "E=32 skewed")):
        name = f"4 grouped wgrad {what}"
        yield from guarded(name, _grouped_wgrad, name, sizes, rounds, backend)
    name = "4 grouped wgrad N=768, groups of 0, 1, 129, 0 and 300 tokens, error against the reference"
    yield from guarded(name, _odd_groups, name, backend)


def _transposed(tokens: int, columns: int, sizes: Tensor, seed: int) -> Any:
    return run("quantize_transposed", random(tokens, columns, seed=seed), False, "e4m3", sizes)


def _grouped_wgrad(name: str, sizes: list[int], rounds: int, backend: str) -> Iterator[Item]:
    tokens, (n, k), on_device = sum(sizes), EXPERTS, torch.tensor(sizes, device=GPU)
    a, b = _transposed(tokens, n, on_device, 0), _transposed(tokens, k, on_device, 1)
    grads = [torch.zeros(len(sizes), n, k, device=GPU) for _ in range(3)]
    used, ours = choose("grouped_wgrad", *a, *b, on_device, grads[0], backend=backend)
    dy, x, ends = random(tokens, n), random(tokens, k, seed=1), on_device.cumsum(0).int()
    times = take_turns(
        {"ours": ours, "DeepGEMM": peers.deep_gemm_grouped_wgrad(*a, *b, sizes, grads[1]),
         "torch BF16 grouped_mm + add_": lambda: grads[2].add_(F.grouped_mm(dy.t(), x, offs=ends))}, rounds, GPU)
    work = Work(2 * tokens * n * k, tokens * (n + k) + 8 * len(sizes) * n * k)
    yield from contest(name, work, times, {"DeepGEMM": None, "torch BF16 grouped_mm + add_": None}, 800, used)
    yield no_sync(name, used, ours)


def _odd_groups(name: str, backend: str) -> Iterator[Item]:
    sizes = torch.tensor([0, 1, 129, 0, 300], device=GPU)
    a, b = _transposed(430, 768, sizes, 0), _transposed(430, 640, sizes, 1)
    start = torch.randn(5, 768, 640, generator=torch.Generator(GPU).manual_seed(2), device=GPU)
    found, expected = start.clone(), start.clone()
    used, ours = choose("grouped_wgrad", *a, *b, sizes, found, backend=backend)
    ours()
    run("grouped_wgrad", *a, *b, sizes, expected, backend="reference")
    error = float((found - expected).norm() / expected.norm())
    if not torch.equal(found[[0, 3]], start[[0, 3]]):
        error = float("nan")  # an empty group adds nothing
    yield at_most(f"{name} [{used}]", error, "relative Frobenius", 3e-4)
