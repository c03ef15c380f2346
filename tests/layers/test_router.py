"""The routers against Hugging Face's, and the traps of a correction bias."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.models.deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from megatron_ext.config.errors import ConfigError
from megatron_ext.layers.router import Router, top_k

V3 = dict(n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2, topk_method="noaux_tc", hidden_size=32,
          scoring_func="sigmoid", norm_topk_prob=True, routed_scaling_factor=2.5, initializer_range=0.5)
V2 = V3 | dict(topk_method="group_limited_greedy", scoring_func="softmax", norm_topk_prob=False)


def router(base: dict = V3, **changes) -> Router:
    torch.manual_seed(0)
    built = Router(SimpleNamespace(**base | changes))
    if built.e_score_correction_bias is not None:
        built.e_score_correction_bias.uniform_(2, 5)
    return built


def hugging_face(ours: Router, base: dict, **changes) -> torch.nn.Module:
    settings = {k: v for k, v in (base | changes).items() if k != "scoring_func"}
    if base is V3:
        del settings["topk_method"]
        theirs = DeepseekV3TopkRouter(DeepseekV3Config(**settings))
        theirs.e_score_correction_bias.copy_(ours.e_score_correction_bias)
    else:
        theirs = DeepseekV2TopkRouter(DeepseekV2Config(**settings))
    theirs.weight.data.copy_(ours.weight.data)
    return theirs


def by_expert(weights: torch.Tensor, experts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    experts, order = experts.sort(dim=-1)
    return weights.gather(-1, order), experts


@pytest.mark.parametrize("base, changes", [
    (V3, {}),
    (V3, dict(n_group=1, topk_group=1)),
    (V3, dict(n_group=8, topk_group=4)),
    (V3, dict(norm_topk_prob=False)),
    (V2, {}),
    (V2, dict(topk_method="greedy")),
    (V2, dict(n_group=8, topk_group=3, num_experts_per_tok=6)),
], ids=str)
@pytest.mark.parametrize("bias", [(2, 5), (-5, -2), (-0.2, 0.2)], ids=str)
def test_equals_hugging_face(base, changes, bias):
    ours = router(base, **changes)
    if base is V3:
        ours.e_score_correction_bias.uniform_(*bias)
    theirs = hugging_face(ours, base, **changes)
    x = torch.randn(300, 32, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    routing = ours(x)
    weights, experts = by_expert(*routing)
    _, *reference = theirs(y)
    expected_weights, expected_experts = by_expert(*reference)
    torch.testing.assert_close(experts, expected_experts, rtol=0, atol=0)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-6, atol=1e-6)
    probe = torch.randn_like(weights)
    (weights * probe).sum().backward()
    (expected_weights * probe).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-5, atol=1e-4)


def test_v2_normalises_where_its_config_says_so():
    """As DeepSeek's own V2 code does (normalised weights are not scaled); Hugging Face ignores the setting."""
    weights = router(V2, norm_topk_prob=True)(torch.randn(20, 32)).weights
    torch.testing.assert_close(weights.sum(-1), torch.ones(20))


@pytest.mark.parametrize("base", [V3, V2], ids=["V3", "V2"])
def test_experts_come_from_the_kept_groups_only(base):
    """With a bias below every score, a mask of 0 instead of -inf would prefer the masked experts."""
    gate = router(base, hidden_size=16)
    gate.weight.data.copy_(8 * torch.eye(16))
    if base is V3:
        gate.e_score_correction_bias.fill_(-5)
    x = torch.full((1, 16), -9.0)  # sigmoid and softmax underflow outside two groups
    x[0, [4, 5, 12, 13]] = 9.0
    experts = gate(x).experts[0].sort().values
    assert experts.tolist() == [4, 5, 12, 13] if base is V3 else set((experts // 4).tolist()) == {1, 3}


def test_ties_go_to_the_lower_expert_in_any_batch():
    scores = torch.tensor([[0.5, -1, 0.5, 0.5], [0.0, -0.0, 0.0, -0.0], [float("-inf"), -2, -1, float("-inf")]])
    assert top_k(scores, 2).tolist() == [[0, 2], [0, 1], [2, 1]]
    coarse = torch.randint(-3, 3, (500, 64)).float()
    expected = coarse.sort(dim=-1, descending=True, stable=True).indices[:, :8]
    assert top_k(coarse, 8).equal(expected)
    assert top_k(coarse[7:8], 8).equal(expected[7:8])


def test_top_k_orders_floats_of_all_signs_and_sizes():
    scores = torch.randn(200, 256) * torch.logspace(-38, 38, 256)
    assert top_k(scores, 8).equal(scores.topk(8).indices)


@pytest.mark.parametrize("cast", [
    lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16().float(),
    lambda m: m.to(device="cpu", dtype=torch.float16), lambda m: m.double()])
def test_bias_stays_fp32_bit_for_bit(cast):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), router())
    before = model[1].e_score_correction_bias.clone()
    model = cast(model)
    bias = model[1].e_score_correction_bias
    assert bias.dtype == torch.float32 and bias.equal(before)
    assert model[1].tokens_per_expert.dtype == torch.int64
    assert bias is model.state_dict(keep_vars=True)["1.e_score_correction_bias"]


def test_bias_is_saved_and_the_count_is_not():
    gate = router()
    assert set(gate.state_dict()) == {"weight", "e_score_correction_bias"}
    fresh = router().bfloat16()
    fresh.e_score_correction_bias.zero_()
    fresh.load_state_dict(gate.state_dict())
    assert fresh.e_score_correction_bias.equal(gate.e_score_correction_bias)
    assert "e_score_correction_bias" not in router(V2).state_dict()


def test_bias_has_no_part_in_weights_or_gradients():
    gate = router(n_group=1, topk_group=1, num_experts_per_tok=16)  # all experts: the choice is the same for any bias
    assert {name for name, _ in gate.named_parameters()} == {"weight"}
    x = torch.randn(10, 32)
    weights, _ = by_expert(*gate(x))
    weights.square().sum().backward()
    assert gate.e_score_correction_bias.grad is None
    gate.e_score_correction_bias.uniform_(-3, 3)
    torch.testing.assert_close(by_expert(*gate(x))[0], weights)  # summed in another order


def test_fp32_inside_a_bf16_model_and_under_autocast():
    gate = router().bfloat16()
    x = torch.randn(50, 32).bfloat16()
    exact = router().float()
    exact.weight.data.copy_(gate.weight.data)
    expected = exact(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = gate(x)
    for got in (gate(x), under_autocast):
        assert got.weights.dtype == torch.float32
        assert got.weights.equal(expected.weights) and got.experts.equal(expected.experts)


def test_scores_that_underflow_give_finite_weights_and_gradients():
    gate = router()
    x = -1e4 * gate.weight.data.sum(0, keepdim=True)
    gate.weight.data.copy_(gate.weight.data.sum(0, keepdim=True).expand(16, -1))
    weights = gate(x).weights
    weights.sum().backward()
    assert weights.isfinite().all() and gate.weight.grad.isfinite().all()


def test_counts_training_tokens_only_and_exactly():
    gate = router()
    x = torch.randn(400, 32)
    for _ in range(3):
        experts = gate(x).experts
    with torch.no_grad():
        gate(x)
    gate.count_tokens = False  # once more, in backward
    gate(x)
    counts = 3 * torch.bincount(experts.flatten(), minlength=16)
    assert gate.tokens_per_expert.equal(counts)
    gate.count_tokens = True  # a forward that will be recomputed keeps no graph
    with torch.no_grad():
        gate(x)
    gate.eval()
    gate(x)
    assert gate.tokens_per_expert.equal(4 * counts // 3)
    assert gate.tokens_per_expert.max() > 256


def test_no_tokens():
    routing = router()(torch.empty(0, 32))
    assert routing.weights.shape == routing.experts.shape == (0, 4)


@pytest.mark.parametrize("changes, key", [
    (dict(n_group=3), "n_group"),
    (dict(topk_group=5), "topk_group"),
    (dict(topk_group=1, num_experts_per_tok=5), "num_experts_per_tok"),
    (dict(num_experts_per_tok=0), "num_experts_per_tok"),
    (dict(topk_method="noaux"), "topk_method"),
    (dict(scoring_func="relu"), "scoring_func"),
])
def test_settings_that_cannot_work_are_named(changes, key):
    with pytest.raises(ConfigError) as error:
        router(V3, **changes)
    assert error.value.key == key


@pytest.mark.parametrize("base", [V3, V2], ids=["V3", "V2"])
def test_keeps_the_tokens_in_their_own_dtype(base):
    gate = router(base).bfloat16()
    x = torch.randn(50, 32).bfloat16().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        routing = gate(x)
    assert {t.dtype for t in saved if t.shape == x.shape} == {torch.bfloat16}
    dweights = torch.randn_like(routing.weights)
    found = torch.autograd.grad(routing.weights, (x, gate.weight), dweights)
    logits = torch.nn.functional.linear(x.float(), gate.weight.float())  # as plain autograd would
    scores = logits.sigmoid() if base is V3 else logits.softmax(-1)
    weights = gate._weigh(scores.gather(-1, routing.experts))
    assert torch.equal(weights, routing.weights)
    for a, b in zip(found, torch.autograd.grad(weights, (x, gate.weight), dweights), strict=True):
        assert a.dtype == torch.bfloat16 and torch.equal(a, b)


def test_gradients_of_what_is_frozen_are_not_computed():
    gate, x = router(), torch.randn(5, 32, requires_grad=True)
    gate.weight.requires_grad_(False)
    gate(x).weights.sum().backward()
    assert x.grad is not None and gate.weight.grad is None
    gate.weight.requires_grad_(True)
    gate(x.detach()).weights.sum().backward()
    assert gate.weight.grad is not None
