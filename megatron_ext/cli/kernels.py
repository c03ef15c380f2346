"""What `megatron-ext doctor` says of the FP8 kernels: which backends are here, and which one each operator runs on.

`--kernels` runs every operator on every backend that can, on small operands, and compares: quantised bytes with those
of the reference, products with FP64 of the dequantised operands. So a machine's kernels are checked in one command.

Shape letters: T tokens, K and N columns, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_ext.kernels.reference import quantize as reference
from megatron_ext.kernels.reference.adamw import AdamWScalars
from megatron_ext.kernels.registry import OPERATORS, why_not

SIZES = [130, 0, 1, 125]
T, K, N = sum(SIZES), 384, 256
PRODUCT_ERROR = 8e-4
"""Of a product that is promoted every 128 numbers, on positive ones, against FP64; without it 0.08 at K = 4096."""


def backends() -> Iterator[tuple[str, str]]:
    """(backend, "ready" or why not), the preferred one first."""
    for backend in OPERATORS.backends:
        yield backend, why_not(backend) or "ready"


def samples(device: torch.device) -> dict[str, tuple[Any, ...]]:
    """Arguments of every operator; positive numbers, on which lost bits add up."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).bfloat16().to(device)

    x, dy, weight, sizes = draw(T, K), draw(T, N), draw(len(SIZES), N, K), torch.tensor(SIZES, device=device)
    x8, blocks = reference.quantize(x), reference.quantize_weight(weight)[:2]
    dense = reference.quantize_weight(weight[0])[:2]
    x8_t, dy8_t = (reference.quantize_transposed(t, True, "e4m3", sizes) for t in (x, dy))
    source = torch.arange(T, device=device).flip(0)
    source[::7] = -1
    rows = torch.randint(-1, T, (40, 4), generator=generator).to(device)
    numbers = [t.float() for t in draw(4, K, N)]
    e5m6 = OPERATORS.select("pack_e5m6", x, backend="reference").function(x)
    return {
        "quantize": (x,), "dequantize": x8, "quantize_transposed": (x, True, "e4m3", sizes),
        "quantize_both": (x, False, "e4m3", sizes), "requantize_transposed": (*x8, sizes), "quantize_weight": (weight,),
        "weight_operands": dense, "gemm_nt": (*x8, *dense), "grouped_gemm_nt": (*x8, *blocks, sizes),
        "grouped_wgrad": (*dy8_t, *x8_t, sizes, torch.zeros(weight.shape, device=device)),
        "swiglu_quantize": (dy, dy), "swiglu_backward_quantize": (dy, dy, dy, False, "e4m3", sizes),
        "rms_norm_quantize": (x, x[0].contiguous(), 1e-6), "permute_quantize": (x, source),
        "quantize_rows": (x, source, torch.zeros(T, K + 8, dtype=torch.uint8, device=device)),
        "unpermute_combine": (x, numbers[0][0, :T].contiguous(), rows), "pack_e5m6": (x,), "unpack_e5m6": e5m6,
        "adamw": (*([t] for t in numbers), AdamWScalars.at(3, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1))}


def choices(device: torch.device) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(operator, backends that can run it on this device, the one that is chosen first)."""
    for operator, args in samples(device).items():
        yield operator, OPERATORS.available(operator, *args)


def check(device: torch.device) -> Iterator[tuple[str, str, str | None]]:
    """Runs every operator on every backend that can: (operator, backend, what is wrong or None)."""
    for operator, args in samples(device).items():
        if operator == "weight_operands":
            continue  # its results are its backend's own affair
        expected = _run(operator, "reference", args)
        for backend in OPERATORS.available(operator, *args):
            try:
                found = _run(operator, backend, args)
            except Exception as error:  # a kernel may fail in any way; the others are still worth knowing
                yield operator, backend, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                continue
            yield operator, backend, _difference(operator, found, expected)


def _run(operator: str, backend: str, args: tuple[Any, ...]) -> list[Tensor]:
    """What an operator returns, or what it has written in place."""
    args = tuple([t.clone() for t in a] if isinstance(a, list) else a.clone() if isinstance(a, Tensor) else a
                 for a in args)
    result = OPERATORS.select(operator, *args, backend=backend).function(*args)
    if result is not None:
        return list(result) if isinstance(result, tuple) else [result]
    return [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, Tensor)]


def _difference(operator: str, found: list[Tensor], expected: list[Tensor]) -> str | None:
    if "gemm" in operator or "wgrad" in operator:
        a, b = found[-1].double(), expected[-1].double()
        error = float((a - b).norm() / b.norm())
        return None if error <= PRODUCT_ERROR else f"relative error {error:.1e}, more than {PRODUCT_ERROR:.0e}"
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"result {number} is {a.dtype} {list(a.shape)}, not {b.dtype} {list(b.shape)}"
        wrong = (a.contiguous().view(torch.uint8) != b.contiguous().view(torch.uint8)).sum().item()
        if wrong:
            return f"{wrong} bytes of result {number} differ from the reference's"
    return None
