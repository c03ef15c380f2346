"""Stacked experts: where they live changes neither their weights nor their results."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.config.errors import ConfigError
from megatron_ext.layers.experts import Experts
from megatron_ext.parallel.expert_parallel import ExpertParallel

SETTINGS = SimpleNamespace(n_routed_experts=6, hidden_size=16, moe_intermediate_size=24, initializer_range=0.3)
MATRICES = ("gate_proj", "up_proj", "down_proj")


def experts(ep: ExpertParallel | None = None, seed: int = 3, name: str = "model.layers.1.mlp.experts") -> Experts:
    torch.manual_seed(seed)
    layer = Experts(SETTINGS, name)
    layer.set_expert_parallel(ep or ExpertParallel.single())
    return layer


def test_initial_weights_do_not_depend_on_the_layout():
    whole = experts()
    torch.rand(100)  # nor on what else was drawn
    for size in (2, 3):
        parts = [experts(ExpertParallel(None, size, rank, f"ep_size_{size}")) for rank in range(size)]
        for matrix in MATRICES:
            assert torch.cat([getattr(part, matrix) for part in parts]).equal(getattr(whole, matrix))


def test_every_expert_matrix_layer_and_seed_is_drawn_apart():
    layers = experts(), experts(seed=4), experts(name="model.layers.2.mlp.experts")
    drawn = {w.flatten()[0].item() for layer in layers for matrix in MATRICES for w in getattr(layer, matrix)}
    assert len(drawn) == 3 * 3 * 6
    assert abs(layers[0].gate_proj.std() - 0.3) < 0.01 and abs(layers[0].gate_proj.mean()) < 0.02


def test_building_experts_draws_nothing_from_the_global_generator():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    Experts(SETTINGS, "x").set_expert_parallel(ExpertParallel.single())
    assert torch.rand(1).equal(expected)


def test_parameters_say_what_they_are():
    part = experts(ExpertParallel(None, 2, 1, "ep_size_2"))
    assert [name for name, _ in part.named_parameters()] == list(MATRICES)
    for parameter in part.parameters():
        assert parameter.expert_range == (3, 6) and parameter.num_experts == 6
        assert parameter.allreduce is False and parameter.group_name == "ep_size_2"
    assert part.gate_proj.shape == part.up_proj.shape == (3, 24, 16) and part.down_proj.shape == (3, 16, 24)
    assert all(not hasattr(p, "allreduce") and p.expert_range == (0, 6) for p in experts().parameters())


@pytest.mark.parametrize("sizes", [[3, 1, 4, 2, 5, 2], [0, 0, 9, 0, 1, 0], [0] * 6, [7, 0, 0, 0, 0, 0]], ids=str)
def test_equals_a_loop_over_experts(sizes):
    layer = experts()
    x = torch.randn(sum(sizes), 16, requires_grad=True)
    y = layer(x, sizes)
    y.sum().backward()
    got = [x.grad, *(p.grad for p in layer.parameters())]
    x.grad = None
    layer.zero_grad()
    parts = [F.linear(F.silu(F.linear(rows, g)) * F.linear(rows, u), d)
             for rows, g, u, d in zip(x.split(sizes), layer.gate_proj, layer.up_proj, layer.down_proj, strict=True)]
    expected = torch.cat(parts)
    torch.testing.assert_close(y, expected)
    expected.sum().backward()
    for a, b in zip(got, [x.grad, *(p.grad for p in layer.parameters())], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_weight_gradients_go_to_the_sink():
    layer, plain = experts(), experts()
    x, sizes = torch.randn(17, 16), [3, 1, 4, 2, 5, 2]
    plain(x, sizes).square().sum().backward()
    queue = []
    for parameter in layer.parameters():
        parameter.main_grad = torch.zeros_like(parameter)
        parameter.weight_grad_sink = lambda p, accumulate: queue.append((p, accumulate))
    layer(x, sizes).square().sum().backward()
    assert len(queue) == 3 and all(p.grad is None for p in layer.parameters())
    with torch.no_grad():
        for parameter, accumulate in queue:
            accumulate(parameter.main_grad)
    for parameter, expected in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.main_grad, expected.grad)


def test_misuse():
    with pytest.raises(ConfigError, match="must divide the 6 experts"):
        experts(ExpertParallel(None, 4, 0, "ep_size_4"))
    with pytest.raises(RuntimeError, match="set_expert_parallel"):
        Experts(SETTINGS, "x")(torch.randn(1, 16), [0] * 6)
    with pytest.raises(RuntimeError, match="a second time"):
        experts().set_expert_parallel(ExpertParallel.single())
