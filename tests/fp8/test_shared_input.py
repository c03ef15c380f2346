"""One input of several layers: quantised once, kept once, and not a bit of difference."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_ext import fp8
from megatron_ext.config.errors import ConfigError
from megatron_ext.fp8.operators import call
from megatron_ext.layers.attention import LatentAttention
from megatron_ext.layers.experts import Experts
from megatron_ext.layers.mlp import MLP
from megatron_ext.parallel.expert_parallel import ExpertParallel

QUANTISED = fp8.Precision(fp8=True)
CONFIG = SimpleNamespace(
    hidden_size=256, intermediate_size=96, initializer_range=0.05, num_attention_heads=2, q_lora_rank=40,
    kv_lora_rank=48, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, attention_bias=True, attention_dropout=0.0,
    rope_theta=1e4, rope_scaling=None, rope_interleave=True, n_routed_experts=3, moe_intermediate_size=96)
SIZES = [20, 0, 44]


Built = tuple[nn.Module, Callable[[Tensor], Tensor], dict[str, int]]
"""The layer, how it is run, and how often each operator quantises activations in its forward."""

SWIGLU = {"quantize": 3, "swiglu_quantize": 1}  # the input; gate and up, to be kept


def mlp() -> Built:
    layer = MLP(CONFIG)
    return layer, layer, SWIGLU


def attention() -> Built:
    layer = LatentAttention(CONFIG)
    return layer, lambda x: layer(x[None])[0], {"quantize": 2, "rms_norm_quantize": 2, "pack_e5m6": 1}


def plain_query_attention() -> Built:
    layer = LatentAttention(SimpleNamespace(**vars(CONFIG) | {"q_lora_rank": None}))
    return layer, lambda x: layer(x[None])[0], {"quantize": 2, "rms_norm_quantize": 1, "pack_e5m6": 1}


def experts() -> Built:
    layer = Experts(CONFIG, "experts")
    layer.set_expert_parallel(ExpertParallel.single())
    return layer, lambda x: layer(x, SIZES), SWIGLU


layers = pytest.mark.parametrize("build", [mlp, attention, plain_query_attention, experts])


def bytes_of_input(run: Callable[[Tensor], Tensor], dtype: torch.dtype) -> float:
    """Bytes per token that stay for backward of an input [64, 256]: its copies, each counted once, and their scales."""
    x = torch.randn(sum(SIZES), 256).to(dtype).requires_grad_()
    saved: dict[tuple[int, torch.dtype], Tensor] = {}  # holds them: an address is not used twice

    def pack(t: Tensor) -> Tensor:
        if t.dim() >= 2 and t.shape[-2:] in ((64, 256), (64, 2)):
            saved[t.data_ptr(), t.dtype] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(x)
    return sum(t.nbytes for t in saved.values()) / len(x)


@layers
def test_one_fp8_copy_is_kept(build: Callable[[], Any]) -> None:
    layer, run, _ = build()
    layer.bfloat16()
    whole = bytes_of_input(run, torch.bfloat16)
    assert whole == 2 * 256
    layer.set_precision(QUANTISED)
    assert bytes_of_input(run, torch.bfloat16) < 0.6 * whole


@layers
def test_every_input_is_quantised_once(build: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, run, expected = build()
    layer.set_precision(QUANTISED)
    found: Counter[str] = Counter()

    def spy(operator: str, *args: Any, **kwargs: Any) -> Any:
        if not (operator == "quantize" and args[1] == (128, 128)):
            found[operator] += 1
        return call(operator, *args, **kwargs)

    for module in ("linear", "swiglu", "rms_norm"):
        monkeypatch.setattr(sys.modules[f"megatron_ext.fp8.{module}"], "call", spy)
    run(torch.randn(64, 256))
    assert {name: n for name, n in found.items() if "quantize" in name or "pack" in name} == expected


def results(build: Callable[[], Any]) -> list[Tensor]:
    torch.manual_seed(0)
    layer, run, _ = build()
    layer.bfloat16()
    layer.set_precision(QUANTISED)
    x = torch.randn(64, 256).bfloat16().requires_grad_()
    y = run(x)
    y.backward(torch.randn_like(y))
    return [y, x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("build", [attention, plain_query_attention])
def test_sharing_changes_no_bit(build: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    shared = results(build)
    monkeypatch.setattr(fp8, "quantize_input", lambda x, precision: x)  # every layer for itself
    for a, b in zip(shared, results(build), strict=True):
        assert torch.equal(a, b)


def test_what_a_layer_does_with_it() -> None:
    x, weight = torch.randn(2, 5, 128, requires_grad=True), nn.Parameter(torch.randn(3, 128))
    assert fp8.quantize_input(x, None) is x and fp8.quantize_input(x, fp8.Precision(fp8=False)) is x
    operand = fp8.quantize_input(x, QUANTISED)
    assert operand.x is x and operand.data.shape == (10, 128) and not operand.data.requires_grad
    y = fp8.linear(operand, weight, precision=QUANTISED)
    assert torch.equal(y, fp8.linear(x, weight)) and y.shape == (2, 5, 3)
    with pytest.raises(ConfigError, match=r"x = \[2, 5, 128\]: must be \[\.\.\., K\]"):
        fp8.linear(operand, weight[:, :64], precision=QUANTISED)
    with pytest.raises(ConfigError, match=r"precision\.fp8"):
        fp8.grouped_linear(fp8.quantize_input(x[0], QUANTISED), [5], weight[None], precision=fp8.Precision())
