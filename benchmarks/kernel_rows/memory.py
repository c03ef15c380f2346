"""Operators that move memory, on a GPU: quantisation, what is fused with it, the bytes of dispatch, AdamW.

Not yet run on a GPU but for the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_rows import Item, Row, Work, at_most, contest, guarded
from kernel_rows.products import GPU, choose, random, run
from kernel_rows.timing import take_turns

TOKENS, HIDDEN, INTERMEDIATE = 8192, 7168, 2048
PARAMETERS = 2**28
"""That a step of AdamW updates."""


def bytes_of(*values: Any) -> int:
    """Of all tensors among values and tuples of values."""
    return sum(bytes_of(*v) if isinstance(v, tuple) else v.numel() * v.element_size()
               for v in values if isinstance(v, Tensor | tuple))


def quantise(rounds: int, backend: str) -> Iterator[Item]:
    """Goal 5: 88 % of the bandwidth of a copy of as many bytes; both orientations 1.4 times as fast as two passes."""
    x = random(TOKENS, HIDDEN)
    cases: list[tuple[str, str, tuple, bool]] = [
        ("quantise 1x128", "quantize", (x,), True),
        ("quantise 1x128 power of two", "quantize", (x, (1, 128), True), True),
        ("quantise 128x128", "quantize", (x, (128, 128)), True),
        ("quantise transposed", "quantize_transposed", (x,), True),
        ("quantise both orientations", "quantize_both", (x,), True),
        ("weight in both orientations", "quantize_weight", (x,), True),
        ("transpose cached", "requantize_transposed", run("quantize", x, (1, 128), True), False),
        ("pack E5M6", "pack_e5m6", (x,), False), ("dequantise", "dequantize", run("quantize", x), False)]
    for label, operator, args, judged in cases:
        name = f"5 {label} {TOKENS}x{HIDDEN}"
        yield from guarded(name, _bandwidth, name, operator, args, judged, rounds, backend)
    name = f"5 both orientations in one pass {TOKENS}x{HIDDEN}"
    yield from guarded(name, _both, name, x, rounds, backend)


def _bandwidth(name: str, operator: str, args: tuple, judged: bool, rounds: int, backend: str) -> Iterator[Item]:
    used, ours = choose(operator, *args, backend=backend)
    moved = bytes_of(args, ours())
    source = torch.empty(moved // 2, dtype=torch.uint8, device=GPU).random_(generator=torch.Generator(GPU))
    target = torch.empty_like(source)
    times = take_turns({"ours": ours, "copy_ of as many bytes": lambda: target.copy_(source)}, rounds, GPU)
    yield from contest(name, Work(0, moved, "GB/s"), times, {"copy_ of as many bytes": 0.88 if judged else None},
                       backend=used)


def _both(name: str, x: Tensor, rounds: int, backend: str) -> Iterator[Item]:
    used, ours = choose("quantize_both", x, backend=backend)
    (_, rows), (_, columns) = (choose(o, x, backend=backend) for o in ("quantize", "quantize_transposed"))
    times = take_turns({"ours": ours, "two passes": lambda: (rows(), columns())}, rounds, GPU)
    yield from contest(name, Work(0, bytes_of(x, ours()), "GB/s"), times, {"two passes": 1.4}, backend=used)


def fused(rounds: int, backend: str) -> Iterator[Item]:
    """Goal 6: against torch's own operation and then our quantisation."""
    gate, up, dh = (random(TOKENS, INTERMEDIATE, seed=seed) for seed in range(3))
    x, weight = random(TOKENS, HIDDEN), random(HIDDEN, seed=1)
    source = torch.randint(TOKENS, (4 * TOKENS,), generator=torch.Generator(GPU).manual_seed(0), device=GPU)

    def then(compute: Callable[[], Tensor]) -> Callable[[], Any]:
        sample = compute()
        function = choose_function("quantize", sample, (1, 128), True)
        return lambda: function(compute(), (1, 128), True)

    def activation_backward() -> Any:
        s = torch.sigmoid(gate)
        gradients = dh * up * s * (1 + gate * (1 - s)), dh * gate * s
        return [both(gradient, False) for gradient in gradients]

    both = choose_function("quantize_both", gate, False)
    cases: list[tuple[str, str, tuple, Callable[[], Any], float | None]] = [
        ("SwiGLU + quantise", "swiglu_quantize", (gate, up), then(lambda: F.silu(gate) * up), 1.7),
        ("RMSNorm + quantise", "rms_norm_quantize", (x, weight, 1e-6),
         then(lambda: F.rms_norm(x, (HIDDEN,), weight, 1e-6)), 1.8),
        ("permute + quantise", "permute_quantize", (x, source), then(lambda: x.index_select(0, source)), 2.0),
        ("SwiGLU backward + quantise both", "swiglu_backward_quantize", (dh, gate, up), activation_backward, None)]
    for label, operator, args, unfused, goal in cases:
        name = f"6 {label}"
        yield from guarded(name, _fused, name, operator, args, unfused, goal, rounds, backend)
    name = "6 unpermute + combine"
    yield from guarded(name, _combine, name, rounds, backend)


def choose_function(operator: str, *args: Any) -> Callable[..., Any]:
    """An operator's function for arguments like these."""
    from megatron_ext.kernels.registry import OPERATORS

    return OPERATORS.select(operator, *args).function


def _fused(name: str, operator: str, args: tuple, unfused: Callable[[], Any], goal: float | None, rounds: int,
           backend: str) -> Iterator[Item]:
    used, ours = choose(operator, *args, backend=backend)
    times = take_turns({"ours": ours, "unfused": unfused}, rounds, GPU)
    # A permutation reads the rows that it takes, and some of them several times.
    read = 2 * HIDDEN * args[1].numel() + bytes_of(args[1]) if operator == "permute_quantize" else bytes_of(args)
    yield from contest(name, Work(0, read + bytes_of(ours()), "GB/s"), times, {"unfused": goal}, backend=used)


def _combine(name: str, rounds: int, backend: str) -> Iterator[Item]:
    picks = 8
    y = random(TOKENS * picks, HIDDEN)
    generator = torch.Generator(GPU).manual_seed(0)
    rows = torch.randperm(TOKENS * picks, generator=generator, device=GPU).view(TOKENS, picks)
    weights = torch.rand(TOKENS * picks, generator=generator, device=GPU)
    used, ours = choose("unpermute_combine", y, weights, rows, backend=backend)
    unfused = lambda: (y[rows] * weights[rows][..., None]).sum(1).to(y.dtype)  # noqa: E731
    times = take_turns({"ours": ours, "unfused": unfused}, rounds, GPU)
    moved = bytes_of(y, weights, rows, ours())
    yield from contest(name, Work(0, moved, "GB/s"), times, {"unfused": None}, backend=used)


def payload() -> Iterator[Item]:
    """Goal 7: bytes of a token on its way to experts, numbers and scales, against BF16; the routing comes on top."""
    from megatron_ext.comm.wire import Row as WireRow
    from megatron_ext.comm.wire import payload_bytes

    ours, theirs = (payload_bytes(wire, HIDDEN, torch.bfloat16) for wire in ("fp8", "bf16"))
    yield at_most(f"7 dispatch payload, h={HIDDEN}, share of BF16's", ours / theirs, "of the bytes", 0.516)
    ours, theirs = (WireRow(wire, HIDDEN, torch.bfloat16, 8, True).bytes for wire in ("fp8", "bf16"))
    yield Row(f"7 dispatch row with routing of 8 experts, h={HIDDEN}", ours, "bytes", "BF16", theirs, ours / theirs)


def adamw(rounds: int, backend: str) -> Iterator[Item]:
    """No goal on a GPU: a step over 256M parameters with BF16 moments against torch's fused one with FP32 state."""
    yield from guarded("AdamW 256M parameters, BF16 moments", _adamw, rounds)


def _adamw(rounds: int) -> Iterator[Item]:
    from megatron_ext.optimizer import AdamW

    ours, theirs = (torch.nn.Parameter(torch.zeros(PARAMETERS, device=GPU)) for _ in range(2))
    for p in (ours, theirs):
        p.grad = torch.randn(PARAMETERS, generator=torch.Generator(GPU).manual_seed(0), device=GPU)
    times = take_turns({"ours": AdamW([ours], lr=1e-3, betas=(0.9, 0.95)).step,
                        "torch fused": torch.optim.AdamW([theirs], lr=1e-3, betas=(0.9, 0.95), fused=True).step},
                       rounds, GPU)
    yield from contest("AdamW 256M parameters, BF16 moments", Work(0, 20 * PARAMETERS, "ms"), times,
                       {"torch fused": None})
