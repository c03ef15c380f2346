"""The whole layer against Hugging Face's, and its small print."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.models.deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from megatron_ext.fp8 import Precision
from megatron_ext.layers.moe import MoE
from megatron_ext.parallel.expert_parallel import ExpertParallel

V3 = dict(n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2, hidden_size=32, moe_intermediate_size=24,
          intermediate_size=64, n_shared_experts=2, initializer_range=0.2, topk_method="noaux_tc",
          scoring_func="sigmoid", norm_topk_prob=True, routed_scaling_factor=2.5)
V2 = V3 | dict(topk_method="group_limited_greedy", scoring_func="softmax", norm_topk_prob=False)


def moe(base: dict = V3, **changes) -> MoE:
    torch.manual_seed(0)
    layer = MoE(SimpleNamespace(**base | changes), layer_index=1)
    layer.set_expert_parallel(ExpertParallel.single())
    if layer.gate.e_score_correction_bias is not None:
        layer.gate.e_score_correction_bias.uniform_(2, 5)
    return layer


def hugging_face(ours: MoE, base: dict) -> torch.nn.Module:
    settings = {key: value for key, value in base.items() if key != "scoring_func"}
    if base is V3:
        del settings["topk_method"]
        theirs = DeepseekV3MoE(DeepseekV3Config(**settings))
    else:
        theirs = DeepseekV2Moe(DeepseekV2Config(**settings))
    theirs.load_state_dict({
        "experts.gate_up_proj": torch.cat((ours.experts.gate_proj, ours.experts.up_proj), dim=1),
        "experts.down_proj": ours.experts.down_proj,
        **{f"gate.{k}": v for k, v in ours.gate.state_dict().items()},
        **{f"shared_experts.{k}": v for k, v in ours.shared_experts.state_dict().items()}})
    return theirs


@pytest.mark.parametrize("base", [V3, V2], ids=["V3", "V2"])
def test_equals_hugging_face(base):
    ours = moe(base)
    theirs = hugging_face(ours, base)
    x = torch.randn(3, 20, 32, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    probe = torch.randn(3, 20, 32)
    got, expected = ours(x), theirs(y)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    (got * probe).sum().backward()
    (expected * probe).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.gate.weight.grad, theirs.gate.weight.grad, rtol=0, atol=1e-4)
    gate, up = theirs.experts.gate_up_proj.grad.chunk(2, dim=1)
    for a, b in ((ours.experts.gate_proj, gate), (ours.experts.up_proj, up),
                 (ours.experts.down_proj, theirs.experts.down_proj.grad),
                 (ours.shared_experts.up_proj.weight, theirs.shared_experts.up_proj.weight.grad)):
        torch.testing.assert_close(a.grad, b, rtol=0, atol=1e-4)


def test_no_shared_experts():
    layer = moe(n_shared_experts=0)
    assert layer.shared_experts is None and layer(torch.randn(2, 3, 32)).shape == (2, 3, 32)


def test_no_tokens():
    layer = moe()
    x = torch.empty(2, 0, 32, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is None or not p.grad.any() for p in layer.parameters())


def test_bf16_model():
    layer, exact = moe().bfloat16(), moe()
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(2, 30, 32).bfloat16()
    got, expected = layer(x), exact(x.float())
    assert got.dtype == torch.bfloat16
    assert (got - expected).norm() / expected.norm() < 0.01


def test_fp8_dispatch_rounds_tokens_and_no_more():
    """In FP32 otherwise; FP8 dispatch of already rounded tokens changes nothing."""
    layer = moe(n_shared_experts=0)
    x = torch.randint(-8, 8, (2, 10, 32)).float()  # representable
    exact = layer(x)
    layer.set_precision(Precision(dispatch_dtype="fp8"))
    assert layer(x).equal(exact)
    x = torch.randn(2, 10, 32)
    rounded = layer(x)
    layer.set_precision(Precision())
    exact = layer(x)
    assert 0.001 < (rounded - exact).norm() / exact.norm() < 0.05
