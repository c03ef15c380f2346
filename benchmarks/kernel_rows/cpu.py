"""The rows that a CPU can measure: quantisation, FP8-emulated linear, AdamW, accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kernel_rows import GIGA, Item, Point, Row, Work, at_most, contest, guarded
from kernel_rows.timing import Contestants, take_turns

CPU = torch.device("cpu")
SIZE = 1024
"""M = N = K of the linear."""


def quantise(rounds: int) -> Iterator[Item]:
    """Quantise 4096 x 4096: times eager torch (the reference), and bandwidth against copy_."""
    for dtype in (torch.float32, torch.bfloat16):
        for block in ((1, 128), (128, 128)):
            name = f"quantise {block[0]}x{block[1]}, {str(dtype)[6:]} 4096x4096"
            yield from guarded(name, _quantise, name, "quantize", (block,), dtype, rounds, True)
    for operator in ("quantize_transposed", "dequantize"):
        name = f"{operator}, float32 4096x4096"
        yield from guarded(name, _quantise, name, operator, (), torch.float32, rounds, False)


def _quantise(name: str, operator: str, rest: tuple, dtype: torch.dtype, rounds: int, judged: bool) -> Iterator[Item]:
    from megatron_ext.kernels.reference import quantize as reference
    from megatron_ext.kernels.registry import OPERATORS

    x = torch.randn(4096, 4096).to(dtype)
    args = (*reference.quantize(x), *rest) if operator == "dequantize" else (x, *rest)
    chosen = OPERATORS.select(operator, *args)
    eager, target = getattr(reference, operator), torch.empty_like(x)
    result = chosen.function(*args)
    written = result if isinstance(result, tuple) else (result,)
    moved = sum(t.numel() * t.element_size() for t in (*args, *written) if isinstance(t, Tensor))
    copied = 2 * x.numel() * x.element_size()

    times = take_turns({"ours": lambda: chosen.function(*args), "eager": lambda: eager(*args),
                        "copy_": lambda: target.copy_(x)}, rounds, CPU)
    ours, copy = times["ours"].seconds, times["copy_"].seconds
    yield from contest(name, Work(0, moved, "GB/s"), times, {"eager": 20.0 if judged else None},
                       backend=chosen.backend)
    if ours and copy:
        ratio = moved / ours / (copied / copy)
        yield Row(f"{name} [{chosen.backend}], bandwidth", moved / ours / GIGA, "GB/s", f"copy_ of {str(dtype)[6:]}",
                  copied / copy / GIGA, ratio, "0.8x" if judged else "none", ratio >= 0.8 if judged else None)
        yield Point(f"{name}, copy_", 0, copied, copy, False)


def linear(rounds: int) -> Iterator[Item]:
    """fp8.linear forward and backward, 1024^3, against nn.Linear in FP32 and in BF16, gradients added up on both sides.

    With the weight cache, as in training, where a weight is quantised once for all micro-batches of a step; and
    without. All six take turns, so that both contests see the same machine.
    """
    yield from guarded("FP8-emulated linear", _linear, rounds)


def _linear(rounds: int) -> Iterator[Item]:
    contestants: Contestants = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name in ("cached", "each time", "nn.Linear"):
            contestants[f"{dtype} {name}"] = _step(name, dtype)
    taken = take_turns(contestants, rounds, CPU)
    work = Work(6 * SIZE**3, 6 * 4 * SIZE**2, "ms")
    # Where the processor multiplies BF16 itself there is nothing to beat, nor to judge.
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    for dtype, goal in ((torch.float32, 1 / 1.25), (torch.bfloat16, None if native else 3.0)):
        for name, told in (("cached", goal), ("each time", None)):
            times = {"ours": taken[f"{dtype} {name}"], "nn.Linear": taken[f"{dtype} nn.Linear"]}
            label = f"FP8-emulated linear 1024^3, {str(dtype)[6:]}, weight quantised "
            peer = "nn.Linear on a CPU with BF16 units" if dtype == torch.bfloat16 and native else "nn.Linear"
            times[peer] = times["nn.Linear"]
            yield from contest(label + ("once a step" if name == "cached" else name), work, times, {peer: told})


def _step(name: str, dtype: torch.dtype) -> Callable[[], None]:
    """A forward and a backward whose weight gradient is added to that of the micro-batches before."""
    from megatron_ext import fp8

    plain = nn.Linear(SIZE, SIZE, bias=False, dtype=dtype)
    weight: Any = plain.weight
    x, gradient = (torch.randn(SIZE, SIZE).to(dtype) for _ in range(2))
    x.requires_grad_()
    precision = fp8.Precision(fp8=True, weights=fp8.WeightCache() if name == "cached" else None)
    if name != "nn.Linear":
        main_grad = torch.zeros(SIZE, SIZE)
        weight.weight_grad_sink = lambda _, accumulate: accumulate(main_grad)

    def call() -> None:
        x.grad = None
        y = plain(x) if name == "nn.Linear" else fp8.linear(x, weight, precision=precision)
        y.backward(gradient)

    return call


def adamw(rounds: int) -> Iterator[Item]:
    """One step over 16M parameters: BF16 moments against torch's fused AdamW with FP32 state."""
    yield from guarded("AdamW", _adamw, rounds)


def _adamw(rounds: int) -> Iterator[Item]:
    from megatron_ext.optimizer import AdamW

    ours, fused = _parameters(), _parameters()
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizers = {"ours": AdamW([ours], **settings), "torch fused": torch.optim.AdamW([fused], fused=True, **settings)}
    times = take_turns({name: optimizer.step for name, optimizer in optimizers.items()}, rounds, CPU)
    moved = 4 * (2 + 1) + 2 * 4  # parameter read and written, gradient, two BF16 moments read and written
    yield from contest("AdamW 16M parameters, BF16 moments", Work(0, moved * ours.numel(), "ms"), times,
                       {"torch fused": 1.0})
    bytes_ = {name: sum(t.numel() * t.element_size() for t in optimizer.state[p].values()
                        if isinstance(t, Tensor) and t.dim())
              for (name, optimizer), p in zip(optimizers.items(), (ours, fused), strict=True)}
    yield at_most("AdamW state, share of torch's", bytes_["ours"] / bytes_["torch fused"], "of the bytes", 0.5)


def _parameters() -> nn.Parameter:
    p = nn.Parameter(torch.randn(2**24))
    p.grad = 0.01 * torch.randn(2**24)
    return p


def adamw_deepspeed(rounds: int) -> Iterator[Item]:
    """The same against DeepSpeedCPUAdam, which is compiled when it is first used."""
    from megatron_ext.optimizer import AdamW

    mine, theirs = _parameters(), _parameters()
    optimizer = AdamW([mine], lr=1e-3, betas=(0.9, 0.95))
    contestants: Contestants = {"ours": optimizer.step}
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        contestants["DeepSpeedCPUAdam"] = DeepSpeedCPUAdam([theirs], lr=1e-3, betas=(0.9, 0.95)).step
    except Exception as error:
        contestants["DeepSpeedCPUAdam"] = f"cannot be built here: {type(error).__name__}"
    yield from contest("AdamW 16M parameters, BF16 moments", Work(0, 20 * mine.numel(), "ms"),
                       take_turns(contestants, rounds, CPU), {"DeepSpeedCPUAdam": None})
