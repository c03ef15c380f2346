"""A layer whose experts are spread over ranks equals the layer in one process; so does its bias."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_ext.comm.dispatch import combine, dispatch
from megatron_ext.fp8 import Precision
from megatron_ext.layers.balancing import update_biases
from megatron_ext.layers.moe import MoE
from megatron_ext.parallel.expert_parallel import ExpertParallel
from tests.distributed.pool import WorkerPool

SETTINGS = SimpleNamespace(
    n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2, hidden_size=32, moe_intermediate_size=24,
    n_shared_experts=1, initializer_range=0.2, topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True,
    routed_scaling_factor=2.5)
STEPS, SPEED = 3, 0.02


def train(batches: list[torch.Tensor], ep: ExpertParallel, precision: Precision, bias: torch.Tensor | None,
          kind: type[MoE] = MoE) -> dict:
    """A step per batch [B, T, h]; gradients accumulate over the steps, the bias moves after each."""
    torch.manual_seed(5)
    layer = kind(SETTINGS, layer_index=1)
    layer.set_expert_parallel(ep)
    layer.set_precision(precision)
    if bias is not None:
        layer.gate.e_score_correction_bias.copy_(bias)
    outs, dxs = [], []
    for x in batches:
        x = x.clone().requires_grad_()
        out = layer(x)
        (out * torch.linspace(-1, 1, 32)).sum().backward()
        update_biases([layer.gate], SPEED, ep.group)
        outs.append(out.detach())
        dxs.append(x.grad)
    return dict(out=torch.stack(outs), dx=torch.stack(dxs), gate=layer.gate.weight.grad,
                shared=layer.shared_experts.up_proj.weight.grad,
                experts=[p.grad if p.grad is not None else torch.zeros_like(p) for p in layer.experts.parameters()],
                bias=layer.gate.e_score_correction_bias)


def train_in_ranks(batches: torch.Tensor, precision: Precision, bias: torch.Tensor | None, tokens: list[int]) -> dict:
    """`tokens`: how many of the T each rank takes."""
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = list(batches.split(tokens, dim=2)[rank])
    return train(mine, ExpertParallel(dist.group.WORLD, size, rank, f"ep_size_{size}"), precision, bias)


def compare(results: list[dict], whole: dict, **tolerance: float) -> None:
    close = lambda a, b: torch.testing.assert_close(a, b, **tolerance)  # noqa: E731
    close(torch.cat([r["out"] for r in results], dim=2), whole["out"])
    close(torch.cat([r["dx"] for r in results], dim=2), whole["dx"])
    close(sum(r["gate"] for r in results), whole["gate"])
    close(sum(r["shared"] for r in results), whole["shared"])
    for parts, expected in zip(zip(*(r["experts"] for r in results), strict=True), whole["experts"], strict=True):
        close(torch.cat(parts), expected)
    for r in results:
        assert r["bias"].equal(whole["bias"])


TO_FIRST_RANK = torch.tensor([9.0] * 4 + [0.0] * 4)  # groups 0 and 1, that is rank 0 of two
TO_LAST_RANK = TO_FIRST_RANK.flip(0)


@pytest.mark.parametrize("bias, tokens", [
    pytest.param(None, [10, 10], id="even"),
    pytest.param(None, [20, 0], id="rank 1 has no tokens"),
    pytest.param(TO_FIRST_RANK, [7, 13], id="all to rank 0"),
    pytest.param(TO_LAST_RANK, [0, 20], id="all to rank 1, rank 0 has no tokens"),
])
def test_two_ranks_equal_one(pool2: WorkerPool, bias: torch.Tensor | None, tokens: list[int]):
    batches = torch.randn(STEPS, 2, 20, 32)
    whole = train(list(batches), ExpertParallel.single(), Precision(), bias)
    results = pool2.run(train_in_ranks, batches, Precision(), bias, tokens)
    compare(results, whole, rtol=1e-6, atol=1e-6 * float(whole["gate"].abs().max()))
    assert not whole["bias"].equal(torch.zeros(8) if bias is None else bias)


def test_four_ranks_equal_one(pool4: WorkerPool):
    batches = torch.randn(STEPS, 2, 20, 32)
    whole = train(list(batches), ExpertParallel.single(), Precision(), None)
    compare(pool4.run(train_in_ranks, batches, Precision(), None, [5, 0, 8, 7]), whole, rtol=1e-6,
            atol=1e-6 * float(whole["gate"].abs().max()))


class InTwoParts(MoE):
    """One process that rounds where two ranks do: what goes back is rounded per rank, then summed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, -2)
        routing = self.gate(tokens)
        out = self.shared_experts(tokens)
        for rank in range(2):
            transit = self.dispatcher.announce(routing.experts, tokens)
            rows, weights = dispatch(transit, tokens, routing.weights * (routing.experts // 4 == rank))
            out = out + combine(transit, self.experts(rows, transit.group_sizes()), weights)
        return out.view_as(x)


@pytest.mark.parametrize("fp8, there, back", [
    (False, "fp8", "model"), (True, "fp8", "model"), (False, "bf16", "bf16"), (True, "fp8", "bf16")])
def test_rounding_does_not_depend_on_the_layout(pool2: WorkerPool, fp8: bool, there: str, back: str):
    """Of what goes out; of what comes back, only through the number of ranks that a token's experts are on."""
    precision = Precision(fp8=fp8, dispatch_dtype=there, combine_dtype=back)
    batches = torch.randn(STEPS, 2, 20, 32)
    kind = MoE if back == "model" else InTwoParts
    whole = train(list(batches), ExpertParallel.single(), precision, None, kind)
    results = pool2.run(train_in_ranks, batches, precision, None, [12, 8])
    # FP32 sums of another blocking may cross a rounding boundary, once in thousands; a forgotten one shows everywhere.
    exact = train(list(batches), ExpertParallel.single(), Precision(), None)
    for name, parts in (("out", [r["out"] for r in results]), ("dx", [r["dx"] for r in results])):
        error = (torch.cat(parts, dim=2) - whole[name]).norm()
        rounding = (exact[name] - whole[name]).norm()
        assert error < 0.02 * rounding, (name, error, rounding)
    assert all(r["bias"].equal(whole["bias"]) for r in results)
