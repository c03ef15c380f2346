"""Plans: from headers alone, of the real model's size, complete or refused."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.checkpoint.convert import Options, Plan, make_plan, named, open_checkpoint
from megatron_ext.checkpoint.convert.formats import FORMATS
from megatron_ext.checkpoint.convert.formats.layout import Layout
from megatron_ext.checkpoint.convert.model import Model
from megatron_ext.checkpoint.convert.tensors import Stored, TargetFile
from megatron_ext.config.errors import CheckpointError
from tests.checkpoint import official, tiny
from tests.checkpoint.tiny import make


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("official") / "v3"
    assert official.write(folder) == (91_991, 688_574_839_360)
    return folder


def plan_in_child(queue: Any, folder: Path, to: str, options: Options, dtype: str | None) -> None:
    def rss(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(name + ":"))) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, begin = rss("VmRSS"), time.process_time()
    plan = make_plan(open_checkpoint(folder), named(to), options, dtype)
    queue.put((len(plan.source.stored), sum(stored.nbytes for stored in plan.source.stored), plan.tensors, plan.payload,
               len(plan.carried), time.process_time() - begin, rss("VmHWM") - before))


@pytest.mark.parametrize(("to", "options", "dtype", "tensors", "payload", "carried"), [
    ("hf", Options(), None, 91_991, 688_574_839_360, 0),
    pytest.param("hf", Options(), "bf16", 91_991, 1_369_145_883_200, 45_808, marks=pytest.mark.slow),
    pytest.param("deepseek", Options(mp=16), None, 112_076, None, 1_564, marks=pytest.mark.slow)])
def test_the_release_of_v3_is_planned_in_seconds(folder: Path, to: str, options: Options, dtype: str | None,
                                                 tensors: int, payload: int | None, carried: int) -> None:
    """671B: counted, in under 20 s and 1 GB (of which Python and torch take 300 MB), without reading a number."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=plan_in_child, args=(queue, folder, to, options, dtype))
    process.start()
    found = queue.get()
    process.join()
    assert found[:3] == (91_991, 688_574_839_360, tensors) and found[4] == carried
    assert payload is None or found[3] == payload
    assert found[5] < 20 and found[6] < 700e6


def test_the_table_is_the_release(folder: Path) -> None:
    """Names and shapes, against a listing made without it."""
    table, listing = Model.from_hf(official.CONFIG).table, official.listing()
    weights = {name: tuple(shape) for name, (_, shape) in listing.items() if not name.endswith("_scale_inv")}
    assert {name: tensor.shape for name, tensor in table.items() if not tensor.row.optional} == weights
    fp8 = {name for name, (dtype, _) in listing.items() if dtype == "F8_E4M3"}
    assert {name for name, tensor in table.items() if tensor.row.quantised} == fp8


def test_layers_follow_the_config() -> None:
    for values, kinds in ((tiny.config(layers=4, dense=2, mtp=1), "ddmmm"), (tiny.config(layers=3, dense=0), "mmm"),
                          (tiny.config(layers=2, dense=3, mtp=2), "dddm"),
                          (tiny.config(layers=4, dense=1, moe_layer_freq=2), "ddmd")):
        model = Model.from_hf(values)
        assert "".join("m" if model.is_moe(layer) else "d" for layer in range(model.layers)) == kinds[:model.layers]


class Wrong:
    """Hugging Face's layout with a fault."""

    name, title, dtypes, states = "wrong", "a format of these tests", FORMATS[0].dtypes, FORMATS[0].states
    options = FORMATS[0].options

    def __init__(self, fault: str):
        self.fault = fault

    def lay_out(self, *args: Any) -> Layout:
        layout = FORMATS[0].lay_out(*args)
        file = layout.files[0]
        tensor = file.tensors[3]
        if self.fault == "unwritten":
            tensors = file.tensors[:3] + file.tensors[4:]
        elif self.fault == "free":
            tensors = [*file.tensors[:3], tensor._replace(parts=()), *file.tensors[4:]]
        else:
            tensors = [*file.tensors, Stored("more", file.path, 0, "BF16", tensor.shape, tensor.parts)]
        layout.files[0] = TargetFile(file.path, file.size, tensors, file.literals)
        return layout


@pytest.mark.parametrize(("fault", "words"), [
    ("unwritten", "would be lost"), ("free", "places that nothing is written to"), ("dtype", "would be BF16")])
def test_a_layout_that_loses_something_is_refused(tmp_path: Path, fault: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        make_plan(open_checkpoint(make(tmp_path / "source", "fp32")), Wrong(fault))  # type: ignore[arg-type]


def test_a_plan_says_what_has_no_counterpart(tmp_path: Path) -> None:
    plan: Plan = make_plan(open_checkpoint(make(tmp_path / "source", mtp=1)), named("deepseek"))
    assert all(name.startswith("model.layers.2.") for name in plan.carried) and len(plan.carried) > 20
    assert set(plan.carried.values()) == {"multi-token prediction is not in DeepSeek's layout"}
    assert not plan.lossy
    assert make_plan(open_checkpoint(tmp_path / "source"), named("hf"), None, "fp8").lossy
