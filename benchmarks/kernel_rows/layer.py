"""A whole linear, the accuracy of products, and the first product of a process.

Accuracy runs on a CPU too; the rest is for a GPU and not yet run on one.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernel_rows import Item, Row, Work, at_most, contest, guarded, peers
from kernel_rows.products import GPU, random
from kernel_rows.timing import Contestants, take_turns

TOKENS, INPUTS, OUTPUTS = 4096, 7168, 18432


def linear(rounds: int, backend: str) -> Iterator[Item]:
    """Goal 8: forward and backward with all quantisation, the weight's too; dW is added to FP32 main_grad."""
    yield from guarded("8 linear forward+backward", _linear, rounds, backend)
    yield from guarded("8 saved activations", saved, GPU, backend)


def _linear(rounds: int, backend: str) -> Iterator[Item]:
    from megatron_ext import fp8

    x, dy = random(TOKENS, INPUTS).requires_grad_(), random(TOKENS, OUTPUTS, seed=1)
    weight: Any = nn.Parameter(0.02 * random(OUTPUTS, INPUTS, seed=2))
    main_grad = torch.zeros(OUTPUTS, INPUTS, device=GPU)

    def ours(cache: fp8.WeightCache | None) -> Callable[[], None]:
        precision = fp8.Precision(fp8=True, backend=backend, weights=cache)
        mine: Any = nn.Parameter(weight.detach())
        mine.weight_grad_sink = lambda _, accumulate: accumulate(main_grad)
        return lambda: torch.autograd.grad(fp8.linear(x, mine, precision=precision), (x, mine), dy, allow_unused=True)

    def theirs(forward: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def call() -> None:
            _, dweight = torch.autograd.grad(forward(x), (x, weight), dy)
            main_grad.add_(dweight)
        return call

    torchao = peers.torchao_linear(weight)
    contestants: Contestants = {
        "ours": ours(None), "cached": ours(fp8.WeightCache()), "torch BF16": theirs(lambda x: F.linear(x, weight)),
        "torchao": torchao if isinstance(torchao, str) else theirs(torchao)}
    times = take_turns(contestants, rounds, GPU)
    work = Work(6 * TOKENS * INPUTS * OUTPUTS, 2 * (3 * TOKENS * (INPUTS + OUTPUTS)) + 12 * INPUTS * OUTPUTS, "ms")
    name = f"8 linear forward+backward {TOKENS}x{OUTPUTS}x{INPUTS}"
    yield from contest(name, work, times, {"torch BF16": 1.35, "torchao": 1.15})
    yield from contest(f"{name}, weight quantised once a step", work, times | {"ours": times["cached"]},
                       {"torch BF16": None, "torchao": None})


def saved(device: torch.device, backend: str) -> Iterator[Item]:
    """Bytes that the linear keeps for its backward, the weight apart, against BF16's input."""
    from megatron_ext import fp8

    weight, x = (nn.Parameter(torch.randn(256, INPUTS).bfloat16().to(device)) for _ in range(2))
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() != weight.data_ptr():
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fp8.linear(x, weight, precision=fp8.Precision(fp8=True, backend=backend))
    yield at_most(f"8 saved activations of a linear, h={INPUTS}", sum(kept.values()) / (2 * x.numel()),
                  "of BF16's bytes", 0.52)


def accuracy(device: torch.device, backend: str) -> Iterator[Item]:
    """Goal 9: products against FP64 of the dequantised operands, repeatability, and bytes of all backends."""
    for draw, limit in ((torch.randn, 3e-4), (torch.rand, 8e-4)):
        for k in (512, 4096, 16384):
            name = f"9 error of a product, {draw.__name__}, K={k}"
            yield from guarded(name, _error, name, draw, limit, k, device, backend)
    yield from guarded("9 repeatability", _repeats, device, backend)
    yield from guarded("9 bytes of backends", _bytes, device)


def product_error(draw: Callable[..., Tensor], m: int, n: int, k: int, device: torch.device, backend: str
                  ) -> tuple[str, float]:
    """(backend used, relative Frobenius error against FP64) of gemm_nt on operands quantised by the reference."""
    from megatron_ext.kernels.reference import quantize as reference
    from megatron_ext.kernels.registry import OPERATORS

    generator = torch.Generator().manual_seed(k)
    x, weight = (draw(rows, k, generator=generator) for rows in (m, n))
    a, b = reference.quantize(x.to(device)), reference.quantize(weight.to(device), (128, 128))
    exact = reference.dequantize(*a).double() @ reference.dequantize(*b).double().t()
    forward, _ = OPERATORS.select("weight_operands", *b, backend=backend).function(*b)
    chosen = OPERATORS.select("gemm_nt", *a, *forward, backend=backend)
    found = chosen.function(*a, *forward).double()
    return chosen.backend, float((found - exact).norm() / exact.norm())


def _error(name: str, draw: Callable[..., Tensor], limit: float, k: int, device: torch.device, backend: str
           ) -> Iterator[Item]:
    used, error = product_error(draw, 256, 384, k, device, backend)
    yield at_most(f"{name} [{used}]", error, "relative Frobenius", limit)


def _repeats(device: torch.device, backend: str) -> Iterator[Item]:
    from megatron_ext.kernels.reference import quantize as reference
    from megatron_ext.kernels.registry import OPERATORS

    x, weight = torch.randn(512, 4096, device=device), torch.randn(768, 4096, device=device)
    a, b = (reference.quantize(x), reference.quantize(weight, (128, 128)))
    forward, _ = OPERATORS.select("weight_operands", *b, backend=backend).function(*b)
    chosen = OPERATORS.select("gemm_nt", *a, *forward, backend=backend)
    first = chosen.function(*a, *forward)
    different = sum(not torch.equal(first, chosen.function(*a, *forward)) for _ in range(19))
    yield at_most(f"9 of 20 products, not bit-identical [{chosen.backend}]", different, "runs", 0)


def _bytes(device: torch.device) -> Iterator[Item]:
    """Quantised bytes and scales of every backend that is here against the reference on the CPU."""
    from megatron_ext.kernels.reference import quantize as reference
    from megatron_ext.kernels.registry import OPERATORS

    x = torch.randn(640, 7168) * torch.randn(640, 1).exp()
    for block, power_of_two in (((1, 128), False), ((1, 128), True), ((128, 128), False)):
        data, scale = reference.quantize(x, block, power_of_two)
        for place in dict.fromkeys((torch.device("cpu"), device)):
            args = (x.to(place), block, power_of_two)
            for backend in OPERATORS.available("quantize", *args):
                found, scales = OPERATORS.select("quantize", *args, backend=backend).function(*args)
                wrong = int((found.cpu().view(torch.uint8) != data.view(torch.uint8)).sum())
                wrong += int((scales.cpu() != scale).sum())
                name = f"9 bytes that differ from the reference, {block[0]}x{block[1]}{' pow2' * power_of_two}"
                yield at_most(f"{name} [{backend} on {place.type}]", wrong, f"of {x.numel()}", 0)


FIRST = """
import time, torch
from megatron_ext.kernels.reference import quantize
device = torch.device("cuda")
a, b = (quantize.quantize(torch.randn(256, 512, device=device), block) for block in ((1, 128), (128, 128)))
torch.mm(*[torch.randn(256, 256, device=device)] * 2); torch.cuda.synchronize()
start = time.perf_counter()
from megatron_ext.kernels.registry import OPERATORS
forward, _ = OPERATORS.select("weight_operands", *b, backend={backend!r}).function(*b)
chosen = OPERATORS.select("gemm_nt", *a, *forward, backend={backend!r})
chosen.function(*a, *forward); torch.cuda.synchronize()
print("first", time.perf_counter() - start, chosen.backend)
"""


def first(rounds: int, backend: str) -> Iterator[Item]:
    """Goal 10: the first product of a new process, with whatever is loaded or built for it; and every shape right."""
    yield from guarded("10 first GEMM after import", _first, backend)
    yield from guarded("10 shapes", shapes, GPU, backend)


def _first(backend: str) -> Iterator[Item]:
    seconds = []
    for _ in range(3):  # what is built on first use is built in the first of them and counts there
        done = subprocess.run([sys.executable, "-c", FIRST.format(backend=backend)], capture_output=True, text=True,
                              timeout=240, cwd=Path(__file__).parents[2])
        if done.returncode:
            raise RuntimeError(next(iter(reversed(done.stderr.splitlines())), "it failed"))
        _, taken, used = done.stdout.split()[-3:]
        seconds.append(float(taken))
    yield at_most(f"10 first GEMM after import, slowest of 3 processes [{used}]", max(seconds), "s", 0.3)
    yield Row("10 first GEMM after import, fastest of 3 processes", min(seconds), "s")


def shapes(device: torch.device, backend: str) -> Iterator[Item]:
    """Every K % 128 == 0 up to 2048, so all (K / 128) % 4, with M from 1 to 7 and 129."""
    wrong, used, count = [], "", 0
    for k in range(128, 2049, 128):
        for m in (*range(1, 8), 129):
            used, error = product_error(torch.randn, m, 256, k, device, backend)
            count += 1
            if not error <= 3e-4:
                wrong.append((m, k))
    where = f", the first at M, K = {wrong[0]}" if wrong else ""
    yield at_most(f"10 products that are wrong, M=1..7 and 129, K=128..2048 [{used}]", len(wrong),
                  f"of {count}{where}", 0)
