"""The SwiGLU network."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from megatron_ext.fp8 import Precision
from megatron_ext.layers.mlp import MLP

CONFIG = SimpleNamespace(hidden_size=6, intermediate_size=10, initializer_range=0.5)


def test_formula() -> None:
    mlp = MLP(CONFIG)
    x = torch.randn(2, 3, 6)
    gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
    torch.testing.assert_close(mlp(x), (gate / (1 + (-gate).exp()) * up) @ mlp.down_proj.weight.T)


def test_width_of_shared_experts() -> None:
    assert MLP(CONFIG, 14).down_proj.weight.shape == (6, 14)
    assert MLP(CONFIG).down_proj.weight.shape == (6, 10)


def test_precision_reaches_all_three() -> None:
    mlp, precision = MLP(CONFIG), Precision(fp8=True)
    mlp.set_precision(precision)
    assert all(child.precision is precision for child in mlp.children())
