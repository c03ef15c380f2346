"""The formats in which rows travel."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_ext import fp8
from megatron_ext.comm.wire import decode, encode, row_bytes
from megatron_ext.fp8 import tensor
from megatron_ext.fp8.operators import call
from megatron_ext.layers.moe import MoE
from megatron_ext.parallel.expert_parallel import ExpertParallel

MOE = dict(n_routed_experts=2, num_experts_per_tok=2, n_group=1, topk_group=1, hidden_size=256, n_shared_experts=0,
           moe_intermediate_size=8, initializer_range=0.2, topk_method="noaux_tc", scoring_func="sigmoid",
           norm_topk_prob=True, routed_scaling_factor=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden", [128, 256, 384, 96, 130])
@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("wire", ["model", "bf16", "fp8"])
def test_round_trip(wire, rows, hidden, dtype):
    x = torch.randn(rows, hidden).to(dtype)
    sent = encode(x, wire)
    assert sent.shape == (rows, row_bytes(wire, hidden, dtype)) and sent.dtype == torch.uint8 and sent.is_contiguous()
    got = decode(sent, wire, hidden, dtype)
    assert got.dtype == dtype
    expected = {"model": lambda: x, "bf16": lambda: x.bfloat16().to(dtype),
                "fp8": lambda: fp8.quantize(x, block=(1, 128), power_of_two=True).dequantize().to(dtype)}[wire]()
    assert got.equal(expected)
    # What was rounded once is not rounded again.
    assert decode(encode(got, wire), wire, hidden, dtype).equal(got)


def test_fp8_is_half_of_bf16_with_its_scales():
    assert row_bytes("fp8", 7168, torch.bfloat16) == 7168 + 56
    assert row_bytes("fp8", 2048, torch.bfloat16) / row_bytes("bf16", 2048, torch.bfloat16) < 0.505


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-38, 1e-30, 1e30, 3e38])
def test_fp8_scales_of_all_sizes_fit_a_byte(magnitude):
    x = torch.randn(3, 256).clamp(-1, 1) * magnitude
    x[:, 128:] = 1.0
    got = decode(encode(x, "fp8"), "fp8", 256, torch.float32)
    assert got.equal(fp8.quantize(x, block=(1, 128), power_of_two=True).dequantize())
    if magnitude > 1e-30:
        torch.testing.assert_close(got, x, rtol=0.07, atol=0.002 * magnitude)


def test_a_transposed_tensor_is_sent_as_it_reads():
    x = torch.randn(64, 3).t()
    for wire in ("model", "bf16"):
        got = decode(encode(x, wire), wire, 64, torch.float32)
        assert got.equal(x if wire == "model" else x.bfloat16().float())


def test_the_backend_that_is_named_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    used = set()

    def spy(operator, *args, backend="auto"):
        used.add((operator, backend))
        return call(operator, *args, backend=backend)

    monkeypatch.setattr(tensor, "call", spy)
    experts, x = torch.tensor([[0, 1], [1, 0]]), torch.randn(2, 256, requires_grad=True)
    layer = MoE(SimpleNamespace(**MOE), 0)
    layer.set_expert_parallel(ExpertParallel.single())
    layer.set_precision(fp8.Precision(dispatch_dtype="fp8", backend="reference"))
    way = layer.dispatcher
    plan = way.plan(experts, x)
    way.combine(way.dispatch(x, plan), torch.rand(2, 2), plan).sum().backward()
    assert used == {("quantize", "reference"), ("dequantize", "reference")}
