"""benchmarks/kernels.py: how rows are judged, that nothing that fails ends the run, and that the GPU's cases are whole.

The cases meant for a GPU run here on small tensors of the CPU, where their peers that need a GPU say why they are
missing; times mean nothing. Not yet run on a GPU.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

kernel_rows = importlib.import_module("kernel_rows")
cpu, isolation, layer, memory, peers, products, roofline, timing = (
    importlib.import_module(f"kernel_rows.{name}")
    for name in ("cpu", "isolation", "layer", "memory", "peers", "products", "roofline", "timing"))
Row, Point, Taken, Work = kernel_rows.Row, kernel_rows.Point, timing.Taken, kernel_rows.Work

CPU = torch.device("cpu")
WORK = Work(4e12, 2e9)


def rows(items) -> list:
    return [item for item in items if isinstance(item, Row)]


@pytest.mark.parametrize(("peer", "goal", "holds"), [(2.9, 1.45, True), (2.8, 1.45, False), (1.0, None, None)])
def test_a_contest_is_judged_by_the_ratio_of_times(peer, goal, holds):
    [row] = rows(kernel_rows.contest("a", WORK, {"ours": Taken(2.0), "peer": Taken(peer)}, {"peer": goal}))
    assert (row.value, row.peer_value, row.ratio, row.holds) == (2.0, pytest.approx(4 / peer), peer / 2, holds)
    assert set(asdict(row)) == {"name", "value", "unit", "peer", "peer_value", "ratio", "goal", "holds"}


def test_a_contest_with_an_absolute_goal_and_a_missing_peer():
    times = {"ours": Taken(2.0, "events"), "peer": Taken(None, why="not installed")}
    absolute, missing = rows(kernel_rows.contest("a", WORK, times, {"peer": 1.0}, 2.5, "cuda"))
    assert (absolute.holds, absolute.ratio) == (False, 0.8) and absolute.name == "a [cuda], by events"
    assert (missing.holds, missing.peer, missing.peer_value) == (None, "peer: not installed", None)


def test_what_is_not_measured_falls_short():
    [row] = rows(kernel_rows.contest("a", WORK, {"ours": Taken(None, why="out of memory")}, {"peer": 1.0}, 5))
    assert row.holds is False and row.value is None and "out of memory" in row.peer
    assert not kernel_rows.at_most("a", float("nan"), "s", 1).holds and kernel_rows.at_most("a", 1, "s", 1).holds

    def case():
        yield row
        raise RuntimeError("first line\nsecond")
    first, second = kernel_rows.guarded("b", case)
    assert first is row and second.holds is False and second.peer == "not measured: RuntimeError: first line"


def test_contestants_take_turns_and_keep_their_reasons():
    order = []

    def fails():
        raise ValueError("no")
    taken = timing.take_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b"), "c": fails,
                               "d": "not installed"}, 3, CPU)
    assert order == ["a", "b"] + ["a", "b"] * 3  # once to warm up, then in turn
    assert taken["a"].seconds is not None and taken["c"].why == "ValueError: no" and taken["d"].why == "not installed"


def _dies():
    yield Row("before", 1.0, "s")
    os._exit(3)


def _hangs():
    yield Row("before", 1.0, "s")
    time.sleep(60)


def _leaves():
    yield Row("before", 1.0, "s")
    yield Point("p", 1.0, 1.0, 1.0, True)


@pytest.mark.parametrize(("group", "limit", "last"), [(_dies, 60, "ended with 3"), (_hangs, 2, "nothing for 2 s"),
                                                      (_leaves, 60, None)])
def test_a_group_that_dies_or_hangs_costs_only_itself(group, limit, last):
    items = list(isolation.run_group("g", group, limit=limit))
    assert items[0].name == "before" and len(items) == 2
    assert items[1] == Point("p", 1.0, 1.0, 1.0, True) if last is None else last in items[1].peer


@pytest.fixture
def small(monkeypatch):
    """Every module's GPU is the CPU, and its matrices are small."""
    settings = {products: {"TOKENS": 256, "V3": ((256, 384),), "GRADIENTS": ((256, 384),), "EXPERTS": (256, 384),
                           "EVEN": [128, 128], "SKEWED": [256, 0, 128]},
                memory: {"TOKENS": 256, "HIDDEN": 256, "INTERMEDIATE": 128, "PARAMETERS": 4096},
                layer: {"TOKENS": 128, "INPUTS": 256, "OUTPUTS": 384}}
    for module, values in settings.items():
        for name, value in {**values, "GPU": CPU}.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(products, "no_sync", lambda name, backend, call: Row(name, 0, "of 1 call"))


@pytest.mark.parametrize(("module", "group"), [
    ("products", "dense"), ("products", "wgrad"), ("products", "grouped"), ("products", "grouped_wgrad"),
    ("memory", "quantise"),
    ("memory", "fused"), ("memory", "adamw"), ("layer", "linear")])
def test_cases_for_a_gpu_are_whole(small, module, group):
    found = rows(getattr(importlib.import_module(f"kernel_rows.{module}"), group)(1, "auto"))
    assert found and [row for row in found if row.value is None] == []


def test_every_cuda_group_is_one(small):
    main = importlib.import_module("kernels")
    for kind in ("cpu", "cuda"):
        assert all(callable(function) for function, _ in main.groups(torch.device(kind), 1, "auto").values())
    assert "FALLS SHORT" in main.told(kernel_rows.failed("a", "no")) and "1.500x" in main.told(
        Row("a", 1.0, "s", "b", 1.5, 1.5, "1x", True))


def test_accuracy_and_shapes_on_this_device():
    found = rows(layer.accuracy(CPU, "auto")) + rows(layer.saved(CPU, "auto"))
    assert len(found) > 10 and all(row.holds for row in found), found
    [row] = layer.shapes(CPU, "auto")
    assert row.holds and "of 128" in row.unit


def test_rows_of_products_see_a_wrong_one(monkeypatch):
    from megatron_ext.kernels.registry import OPERATORS, Implementation

    monkeypatch.setattr(Implementation, "function", property(lambda self: {
        "gemm_nt": lambda a, *rest: torch.ones(a.shape[0], 256)}.get(self.operator) or getattr(
            importlib.import_module(self.module), self.operator)))
    assert OPERATORS.select("gemm_nt", torch.empty(1, 1)).function(torch.empty(2, 1)).shape == (2, 256)
    [row] = layer.shapes(CPU, "reference")
    assert row.holds is False and row.value == 128


def test_picture(tmp_path):
    points = [Point("ours", 1e12, 1e9, 1.0, True), Point("ours, mm", 1e12, 1e9, 2.0, False),
              Point("quantise", 0, 1e9, 1.0, True), Point("quantise, copy_", 0, 1e9, 0.9, False)]
    for name, chosen in (("both", points), ("products", points[:2]), ("movers", points[2:])):
        roofline.draw(chosen, "NVIDIA H100 80GB HBM3", tmp_path / "made" / f"{name}.png")
        assert (tmp_path / "made" / f"{name}.png").stat().st_size > 5000
    assert roofline.peaks("NVIDIA H100 PCIe")[0] == 1513 and roofline.peaks("NVIDIA A100") is None
