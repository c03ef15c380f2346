"""The pair on one GPU, for its function on a CPU: copies bring what they are given, both orders learn the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.overlap_gpu import Block, Pair, measure
from megatron_ext.layers.phases import check_phases, whole

CPU = torch.device("cpu")


def test_both_orders_have_the_gradients_of_one_graph() -> None:
    torch.manual_seed(0)
    blocks, x = [Block(8, 6, None, 1) for _ in range(2)], torch.randn(5, 8)
    for block in blocks:
        check_phases(block.phases(), "Block")
    pair, found = Pair(blocks, x), []
    y = x
    for block in blocks:
        y = whole(block.phases(), y)
    expected = torch.autograd.grad(y.sum(), [p for b in blocks for p in b.parameters()])
    for overlap in (True, False):
        for block in blocks:
            block.zero_grad = lambda **_: None  # keeps what the pair leaves
        pair.seconds(overlap)
        found.append([p.grad.clone() for b in blocks for p in b.parameters()])
        for p in (p for b in blocks for p in b.parameters()):
            p.grad = None
    for a, b, c in zip(*found, expected, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)


def test_rows_and_trace(tmp_path: Path) -> None:
    rows = measure(CPU, 16, 8, 8, 2, 2, tmp_path / "trace.json")
    assert [set(row) for row in rows] == [
        {"name", "value", "unit", "peer", "peer_value", "ratio", "goal", "holds"}] * 2
    assert all(row["holds"] is None for row in rows), "nothing is judged on a CPU"
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


@pytest.mark.gpu
def test_most_of_the_copies_are_hidden(tmp_path: Path) -> None:
    """No bound on speed: only that taking turns hides something."""
    rows = measure(torch.device("cuda"), 4096, 4096, 4096, 2, 5, tmp_path / "trace.json")
    assert rows[1]["value"] > 0
