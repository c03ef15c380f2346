"""The bias balances a model that learns, and without it some experts take most of the tokens (arXiv 2408.15664).

Two blocks on the source of the standard library: d = 128, 16 experts of which 2 are chosen, 120 steps of 8 x 128 bytes.
A bias speed of 0.01, for the paper's 0.001 would need ten times as many steps.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ext.layers.balancing import max_violation, update_biases
from megatron_ext.layers.moe import MoE
from megatron_ext.parallel.expert_parallel import ExpertParallel

STEPS, BATCH, LENGTH, HIDDEN, HEADS, EXPERTS = 120, 8, 128, 128, 4, 16
SETTINGS = SimpleNamespace(
    n_routed_experts=EXPERTS, num_experts_per_tok=2, n_group=1, topk_group=1, topk_method="noaux_tc",
    scoring_func="sigmoid", norm_topk_prob=True, routed_scaling_factor=1.0, hidden_size=HIDDEN,
    moe_intermediate_size=128, n_shared_experts=1, initializer_range=0.06)


class Block(nn.Module):
    def __init__(self, index: int):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.moe = MoE(SETTINGS, index)
        self.moe.set_expert_parallel(ExpertParallel.single())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        return x + self.moe(self.norm2(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(256, HIDDEN), nn.Parameter(0.1 * torch.randn(LENGTH, HIDDEN))
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.blocks = nn.Sequential(*(Block(i) for i in range(2)))
        self.norm, self.head = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(tokens) + self.position)))


def standard_library() -> Tensor:
    text = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))
    return torch.frombuffer(bytearray(text[:4_000_000]), dtype=torch.uint8).long()


def train(speed: float) -> tuple[Tensor, list[float]]:
    """Returns the tokens of each expert in the last 100 steps, [layers, E], and the loss of every step."""
    torch.manual_seed(0)
    text, model = standard_library(), Model()
    routers = [block.moe.gate for block in model.blocks]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / STEPS)))
    counts, losses = torch.zeros(len(routers), EXPERTS, dtype=torch.int64), []
    for step in range(STEPS):
        windows = torch.stack([text[i : i + LENGTH + 1] for i in torch.randint(len(text) - LENGTH - 1, (BATCH,))])
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        global_counts = torch.stack(update_biases(routers, speed))
        losses.append(loss.item())
        if step >= STEPS - 100:
            counts += global_counts
    return counts, losses


@pytest.mark.parametrize("speed", [0.01, 0.0])
def test_bias_balances(speed: float):
    counts, losses = train(speed)
    assert int(counts.sum()) == 2 * 100 * BATCH * LENGTH * 2
    assert losses[0] > 5 and sum(losses[-10:]) / 10 < 3, "the model does not learn, so its balance means nothing"
    worst = max(max_violation(layer) for layer in counts)
    if speed:
        assert worst < 0.5
        assert (counts > 0.05 * counts.float().mean()).all(), "an expert is dead"
    else:
        assert worst > 2.0
