"""The model in its two forms: one module, and the layers of a pipeline."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_ext.fp8 import Precision
from megatron_ext.layers.linear import PrecisionLinear
from megatron_ext.models import DeepSeekV3, DeepSeekV3Config, cross_entropy, deepseek_v3
from megatron_ext.parallel.expert_parallel import ExpertParallel

CONFIG = DeepSeekV3Config(
    vocab_size=40, hidden_size=24, intermediate_size=40, moe_intermediate_size=16, num_hidden_layers=3,
    num_attention_heads=2, n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2, kv_lora_rank=10,
    q_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8, first_k_dense_replace=1)
TOKENS = torch.arange(34).view(2, 17)


def model(seed: int = 0, **changes: object) -> DeepSeekV3:
    torch.manual_seed(seed)
    return DeepSeekV3(replace(CONFIG, **changes))


@pytest.mark.parametrize("tied", [False, True])
def test_specs_build_the_same_model(tied: bool) -> None:
    whole = model(seed=5, tie_word_embeddings=tied)
    state, x, tied_modules = whole.state_dict(), TOKENS, {}
    specs = deepseek_v3(whole.config)
    assert len(specs) == 3 + 3
    for index, spec in enumerate(specs):
        torch.manual_seed(5 + index)
        key = getattr(spec, "key", None)
        layer = tied_modules[key] if key in tied_modules else spec.build()
        if hasattr(layer, "set_expert_parallel"):
            layer.set_expert_parallel(ExpertParallel.single())
        if key is not None:
            tied_modules[key] = layer
            assert spec.tied_weight_attr == ["weight"]
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, state.pop(f"{layer.canonical_name}.{name}", tensor))
        forward = getattr(spec, "forward_fn", None)
        x = layer(x) if forward is None else forward(layer, x)
    assert not state
    assert len(tied_modules) == tied
    assert torch.equal(x, whole(TOKENS))


def test_same_seed_same_weights_and_nothing_else_moves() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = DeepSeekV3(CONFIG)
    assert torch.equal(torch.rand(2), expected)
    assert torch.initial_seed() == 3
    second, other = model(3), model(4)
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert "norm" in name or not torch.equal(a, c), name


def test_initialisation() -> None:
    """Hugging Face's: N(0, initializer_range) everywhere, norms one; and no two matrices alike."""
    parameters = dict(model(hidden_size=96, initializer_range=0.05).named_parameters())
    for name, parameter in parameters.items():
        if "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.12), name
    matrices = [p.flatten()[:50] for name, p in parameters.items() if "norm" not in name]
    assert len({tuple(matrix.tolist()) for matrix in matrices}) == len(matrices)


def test_logits() -> None:
    logits = model()(TOKENS)
    assert logits.shape == (2, 17, 40)
    assert logits.dtype == torch.float32
    changed = TOKENS.clone()
    changed[:, 9:] = 0
    torch.testing.assert_close(model()(changed)[:, :9], logits[:, :9], atol=1e-6, rtol=0)


def test_bias_survives_every_cast() -> None:
    """Trap 1: FP32, bit for bit, at values of published models where BF16 has steps of 0.03; trap 4: no gradient."""
    whole = model()
    router = whole.model.layers[1].mlp.gate
    bias = torch.linspace(2, 5, 8) + 1e-4
    router.e_score_correction_bias.copy_(bias)
    for cast in (torch.bfloat16, torch.float16, torch.float64):
        whole.to(cast)
        assert torch.equal(router.e_score_correction_bias, bias)
        assert router.e_score_correction_bias.dtype == torch.float32
    whole.bfloat16()
    cross_entropy(whole(TOKENS), TOKENS).backward()
    assert not router.e_score_correction_bias.requires_grad
    assert "bias" not in " ".join(name for name, _ in whole.named_parameters())


def test_scores_near_zero() -> None:
    """Trap 9: sigmoid scores that underflow leave finite logits and gradients."""
    whole = model()
    for block in whole.model.layers[1:]:
        block.post_attention_layernorm.weight.data.fill_(1.0)
        block.mlp.gate.weight.data.fill_(-60.0)
        block.post_attention_layernorm.register_forward_hook(lambda module, args, output: output.abs())
    loss = cross_entropy(whole(TOKENS), TOKENS)
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in whole.parameters())


def test_weight_gradients_can_wait() -> None:
    """With a sink on every parameter, every matrix gives its gradient to the sink, and the sums are autograd's."""
    reference = model(attention_bias=True)
    cross_entropy(reference(TOKENS), TOKENS).backward()
    whole, waiting = model(attention_bias=True), []
    for parameter in whole.parameters():
        parameter.main_grad = torch.zeros_like(parameter)
        parameter.weight_grad_sink = lambda p, accumulate: waiting.append((p, accumulate))
    cross_entropy(whole(TOKENS), TOKENS).backward()
    immediate = {name for name, parameter in whole.named_parameters() if parameter.grad is not None}
    assert all("norm" in name or name.endswith(("embed_tokens.weight", "mlp.gate.weight")) for name in immediate)
    with torch.no_grad():
        for parameter, accumulate in waiting:
            accumulate(parameter.main_grad)
    for (name, parameter), expected in zip(whole.named_parameters(), reference.parameters(), strict=True):
        gradient = parameter.main_grad if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradient, expected.grad, atol=1e-6, rtol=1e-5,
                                   msg=lambda problem, name=name: f"{name}: {problem}")


def test_fp8_is_for_blocks_only() -> None:
    whole, precision = model(), Precision(fp8=True)
    plain = whole(TOKENS)
    whole.set_precision(precision)
    quantised = whole(TOKENS)
    assert not torch.equal(quantised, plain)
    torch.testing.assert_close(quantised, plain, atol=0.1 * plain.std().item(), rtol=0.2)
    assert not isinstance(whole.lm_head, PrecisionLinear)
    assert all(m.precision is precision for m in whole.modules() if isinstance(m, PrecisionLinear))
    cross_entropy(quantised, TOKENS).backward()
    assert all(parameter.grad.isfinite().all() for parameter in whole.parameters())


def test_learns() -> None:
    whole = model()
    optimizer = torch.optim.Adam(whole.parameters(), lr=0.01)
    losses = []
    for _ in range(15):
        loss = cross_entropy(whole(TOKENS), TOKENS.roll(-1, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
