"""The formats in which rows travel."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_ext import fp8
from megatron_ext.comm import wire as wire_module
from megatron_ext.comm.dispatch import combine, dispatch
from megatron_ext.comm.wire import Row, payload_bytes
from megatron_ext.fp8.operators import call
from megatron_ext.layers.moe import MoE
from megatron_ext.parallel.expert_parallel import ExpertParallel
from tests.comm.journeys import rounded

MOE = dict(n_routed_experts=2, num_experts_per_tok=2, n_group=1, topk_group=1, hidden_size=256, n_shared_experts=0,
           moe_intermediate_size=8, initializer_range=0.2, topk_method="noaux_tc", scoring_func="sigmoid",
           norm_topk_prob=True, routed_scaling_factor=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden", [128, 256, 384, 96, 130])
@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("wire", ["model", "bf16", "fp8"])
def test_round_trip(wire, rows, hidden, dtype):
    x, layout = torch.randn(rows, hidden).to(dtype), Row(wire, hidden, dtype)
    sent = layout.write(x)
    assert sent.shape == (rows, -(-payload_bytes(wire, hidden, dtype) // 8)) and sent.is_contiguous()
    got = layout.payload(sent)
    assert got.dtype == dtype and got.equal(rounded(x, wire))
    assert layout.payload(layout.write(got)).equal(got), "what was rounded once is not rounded again"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("hidden, k", [(256, 8), (130, 3), (7, 1)])
@pytest.mark.parametrize("wire", ["model", "bf16", "fp8"])
def test_a_row_brings_what_was_put_in(wire, hidden, k, dtype):
    layout = Row(wire, hidden, dtype, weights=k, routed=True)
    x, experts = torch.randn(5, hidden).to(dtype), torch.randint(0, 2**15 - 1, (5, k))
    weights, origin = torch.randn(5, k, dtype=layout.accumulator), torch.arange(5) + (65535 << 32)
    rows = layout.write(x, weights, experts, origin)
    assert rows.shape == (5, layout.words) and rows.nbytes == 5 * layout.bytes
    assert layout.payload(rows).equal(rounded(x, wire))
    assert layout.weights_of(rows).equal(weights)
    assert layout.experts_of(rows).equal(experts)
    assert layout.origin_of(rows).equal(origin)
    back = Row(wire, hidden, dtype, weights=k)
    assert back.weights_of(rows := back.write(x, weights)).equal(weights)
    assert back.payload(rows).equal(rounded(x, wire))
    source = torch.tensor([3, 0, 3, 4])
    for some in (layout.write(x, weights, experts, origin, source),
                 *(layout.writer(x, weights, experts, origin, copies=copies)(source) for copies in (4, 100))):
        assert layout.payload(some).equal(rounded(x, wire)[source])
        for part, given in ((layout.weights_of, weights), (layout.experts_of, experts), (layout.origin_of, origin)):
            assert part(some).equal(given[source])


def test_the_bytes_of_a_row():
    assert payload_bytes("fp8", 7168, torch.bfloat16) == 7168 + 56
    assert Row("fp8", 2048, torch.bfloat16, 8, routed=True).bytes == 2048 + 16 + 8 + 8 * 4 + 8 * 2 == 2120
    assert 0.53 * Row("bf16", 2048, torch.bfloat16).bytes >= 2120
    assert Row("bf16", 2048, torch.bfloat16, 8).bytes == 4096 + 32, "backward of dispatch: no routing"
    assert Row("model", 5, torch.bfloat16).bytes == 16, "whole words"
    assert Row("model", 4, torch.float64, 3, routed=True).bytes == 32 + 8 + 24 + 8


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-38, 1e-30, 1e30, 3e38])
def test_fp8_scales_of_all_sizes_fit_a_byte(magnitude):
    x = torch.randn(3, 256).clamp(-1, 1) * magnitude
    x[:, 128:] = 1.0
    row = Row("fp8", 256, torch.float32)
    got = row.payload(row.write(x))
    assert got.equal(fp8.quantize(x, block=(1, 128), power_of_two=True).dequantize())
    if magnitude > 1e-30:
        torch.testing.assert_close(got, x, rtol=0.07, atol=0.002 * magnitude)


def test_a_transposed_tensor_is_sent_as_it_reads():
    x = torch.randn(64, 3).t()
    for wire in ("model", "bf16", "fp8"):
        row = Row(wire, 64, torch.float32)
        assert row.payload(row.write(x)).equal(rounded(x, wire))


def test_the_backend_that_is_named_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    used = set()

    def spy(operator, *args, backend="auto"):
        used.add((operator, backend))
        return call(operator, *args, backend=backend)

    monkeypatch.setattr(wire_module, "call", spy)
    experts, x = torch.tensor([[0, 1], [1, 0]]), torch.randn(2, 256, requires_grad=True)
    layer = MoE(SimpleNamespace(**MOE), 0)
    layer.set_expert_parallel(ExpertParallel.single())
    layer.set_precision(fp8.Precision(dispatch_dtype="fp8", backend="reference"))
    transit = layer.dispatcher.announce(experts, x)
    rows, weights = dispatch(transit, x, torch.rand(2, 2))
    combine(transit, rows, weights).sum().backward()
    assert used == {("quantize_rows", "reference"), ("dequantize", "reference")}
