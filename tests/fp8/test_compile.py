"""The operators as torch.library has them, and FP8 layers in code that torch.compile traces as one graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import astuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck

from megatron_ext import fp8
from megatron_ext.fp8 import compiled
from megatron_ext.kernels import operators
from megatron_ext.kernels.layout import FORMATS
from megatron_ext.kernels.reference.adamw import AdamWScalars
from megatron_ext.kernels.registry import OPERATORS
from megatron_ext.layers.mlp import MLP
from megatron_ext.layers.norm import RMSNorm

OPS = torch.ops.megatron_ext
QUANTISED = fp8.Precision(fp8=True)
SIZES = [4, 0, 3]
T, K, N = sum(SIZES), 200, 96
SCALARS = AdamWScalars.at(3, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def arguments() -> dict[str, tuple[Any, ...]]:
    """Arguments of every operator, by its name in torch.ops.megatron_ext."""
    x, dy, sizes = torch.randn(T, K), torch.randn(T, N), torch.tensor(SIZES)
    x8, weight8 = OPS.quantize(x), OPS.quantize(torch.randn(len(SIZES), N, K), [128, 128])
    one = weight8[0][0], weight8[1][0]
    source, rows = torch.tensor([3, -1, 0, 3]), torch.zeros(4, 256, dtype=torch.uint8)
    x8_t, dy8_t = OPS.quantize_transposed(x, True, "e4m3", sizes), OPS.quantize_transposed(dy, False, "e4m3", sizes)
    return {
        "quantize": (x,), "dequantize": x8, "quantize_transposed": (x, True, "e5m2", sizes),
        "quantize_both": (x, False, "e4m3", sizes), "requantize_transposed": (*x8, sizes),
        "quantize_weight": (torch.randn(2, N, K),), "gemm_nt": (*x8, *one, torch.bfloat16),
        "gemm_nt_add": (torch.randn(T, N), *x8, *one), "grouped_gemm_nt": (*x8, *weight8, sizes),
        "grouped_wgrad": (*dy8_t, *x8_t, sizes, torch.randn(len(SIZES), N, K)), "swiglu_quantize": (dy, dy),
        "swiglu_backward_quantize": (dy, dy, dy, False, "e4m3", sizes), "rms_norm_quantize": (x, torch.rand(K), 1e-6),
        "permute_quantize": (x, source), "quantize_rows": (x, source, rows),
        "unpermute_combine": (x, torch.rand(T), torch.randint(-1, T, (5, 3))), "pack_e5m6": (x,),
        "unpack_e5m6": OPS.pack_e5m6(x),
        "adamw": ([x], [x], [x.bfloat16()], [x.square().bfloat16()], list(astuple(SCALARS)))}


NAMES = sorted(arguments())


def test_every_operator_is_in_the_library() -> None:
    assert set(NAMES) == set(OPERATORS.operators) - {"weight_operands"} | {"gemm_nt_add"}


@pytest.mark.parametrize("name", NAMES)
def test_operators_pass_torch_s_own_check(name: str) -> None:
    """Schema (nothing else is written, nothing aliases), fakes (shapes, dtypes, strides), tracing with dynamic shapes.

    torch compares arguments before and after with a function that FP8 on a CPU does not have, hence no schema test of
    operators that take FP8 numbers.
    """
    args = arguments()[name]
    takes_fp8 = any(isinstance(a, Tensor) and a.dtype in {f.dtype for f in FORMATS.values()} for a in args)
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    opcheck(getattr(OPS, name), args, test_utils=checks if takes_fp8 else ("test_schema", *checks))


@pytest.mark.parametrize("name", NAMES)
def test_operators_are_the_plain_functions(name: str) -> None:
    args = arguments()[name]
    plain = copy.deepcopy(list(args))
    found = getattr(OPS, name)(*args, backend="reference")
    operator, order = name, list(range(len(args)))
    if name == "gemm_nt":
        plain.insert(4, None)
    elif name == "gemm_nt_add":
        operator, plain, order = "gemm_nt", [*plain[1:], plain[0]], [*order[1:], 0]
    elif name == "quantize":
        plain.append((1, 128))
    elif name == "adamw":
        plain[4] = AdamWScalars(*plain[4])
    expected = OPERATORS.select(operator, *plain, backend="reference").function(*plain)
    if found is not None:
        for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (found, expected)), strict=True):
            assert same(a, b)
    else:  # what was written in place
        for index, b in zip(order, plain, strict=True):
            a = args[index]
            assert all(map(same, a, b)) if isinstance(a, list) and isinstance(a[0], Tensor) else (
                not isinstance(a, Tensor) or same(a, b))


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def results(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    y = function(*inputs)
    return [y, *torch.autograd.grad(y.float().square().sum(), inputs)]


def weights(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter((torch.randn(*shape) / 8).bfloat16()) for shape in shapes]


LAYERS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "linear": (lambda x, w: fp8.linear(x[None], w, precision=QUANTISED)[0], [(N, K)]),
    "bias": (lambda x, w, b: fp8.linear(x, w, b, precision=QUANTISED), [(N, K), (N,)]),
    "e5m6": (lambda x, w: fp8.linear(x, w, precision=QUANTISED, cache="e5m6"), [(N, K)]),
    "grouped": (lambda x, w: fp8.grouped_linear(x, SIZES, w, precision=QUANTISED), [(3, N, K)]),
    "grouped by a tensor": (lambda x, w: fp8.grouped_linear(x, torch.tensor(SIZES), w, precision=QUANTISED),
                            [(3, N, K)]),
    "swiglu": (lambda x, *w: fp8.swiglu(x, *w, precision=QUANTISED), [(N, K), (N, K), (K, N)]),
    "experts": (lambda x, *w: fp8.swiglu(x, *w, SIZES, precision=QUANTISED), [(3, N, K), (3, N, K), (3, K, N)])}


@pytest.mark.parametrize("name", LAYERS)
def test_a_traced_layer_is_one_graph_and_equals_the_eager_one_bit_for_bit(name: str) -> None:
    torch._dynamo.reset()
    function, shapes = LAYERS[name]
    inputs = [torch.randn(T, K).bfloat16().requires_grad_(), *weights(*shapes)]
    traced = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(traced, *inputs), results(function, *inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["linear", "experts"])
def test_composed_operators_pass_torch_s_own_check(name: str) -> None:
    x, (gate, up, down) = torch.randn(T, K, requires_grad=True), (w.detach() for w in weights((N, K), (N, K), (K, N)))
    args = (x, gate.float(), None, None, "e4m3", "auto")
    if name == "experts":
        args = (x, *(w.float()[None].repeat(3, 1, 1) for w in (gate, up, down)), torch.tensor(SIZES), "auto")
    opcheck(OPS.linear if name == "linear" else OPS.swiglu, args)


def test_layers_are_traced_as_one_graph() -> None:
    torch._dynamo.reset()
    config = SimpleNamespace(hidden_size=K, intermediate_size=N, initializer_range=0.1)
    norm, mlp = RMSNorm(K), MLP(config)
    mlp.set_precision(QUANTISED)

    def block(x: Tensor) -> Tensor:
        return x + mlp(norm.quantized(x, mlp.precision))

    x = torch.randn(2, T, K, requires_grad=True)
    [y, dx], [traced_y, traced_dx] = (results(f, x) for f in (block, torch.compile(block, fullgraph=True,
                                                                                  backend="aot_eager")))
    for a, b in ((traced_y, y), (traced_dx, dx)):
        assert (a - b).norm() < 1e-3 * b.norm()  # eager fuses the norm, which sums in FP64


def test_what_is_kept_while_tracing_is_fp8() -> None:
    x = torch.randn(64, 256).bfloat16().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        compiled.linear(x, *weights((N, 256)), None, None, "auto", "e4m3")
    assert sum(t.nbytes for t in kept if t.dtype != torch.bfloat16) == 64 * (256 + 2 * 4)
    assert not any(t.shape == x.shape and t.dtype == torch.bfloat16 for t in kept)
    assert operators.NAMESPACE == "megatron_ext"


@pytest.mark.parametrize("name", ["bias", "swiglu"])
def test_a_sink_takes_nothing_of_a_traced_layer(name: str) -> None:
    torch._dynamo.reset()
    function, shapes = LAYERS[name]
    inputs = [torch.randn(T, K).bfloat16().requires_grad_(), *weights(*shapes)]
    expected, taken = results(function, *inputs), []
    for parameter in inputs[1:]:
        parameter.weight_grad_sink = lambda *_: taken.append(1)
    traced = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(traced, *inputs), expected, strict=True):
        assert torch.equal(a, b)
    assert not taken


@pytest.mark.parametrize("columns", [1, 130, 200, 7168])
def test_fakes_have_the_strides_of_a_gpu(columns: int) -> None:
    """What the kernels of a GPU return, by layout.py, on a CPU under its layout; planes of E5M6 are dense."""
    high, low, scale = operators._pack(torch.empty(3, columns))
    assert high.is_contiguous() and low.is_contiguous() and scale.shape == (3, -(-columns // 128))


def test_a_transposed_input() -> None:
    x = torch.randn(K, T).t().requires_grad_()
    args = (x, *(w.float() for w in weights((N, K), (N, K), (K, N))), None, "auto")
    opcheck(OPS.swiglu, args)
