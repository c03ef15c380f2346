"""Optimizer state, master weights and averages: kept, carried or dropped as the user says, and never silently."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_ext.checkpoint.convert import FORMATS, make_plan, named, names, open_checkpoint, run
from megatron_ext.checkpoint.convert.source import CARRIED, FACTS
from megatron_ext.checkpoint.convert.verify import verify
from megatron_ext.config.errors import CheckpointError
from tests.checkpoint.tiny import Tensors, load, make


def trained(folder: Path, *states: str) -> tuple[Path, Tensors]:
    """A BF16 folder with state beside it, and that state under canonical names."""
    make(folder, mtp=1)
    torch.manual_seed(1)
    found = {f"{name}@{state}": tensor.float() + torch.rand(tensor.shape) / 512 for state in states
             for name, tensor in load(folder).items()
             if "bias" not in name and "shared_head.head" not in name and "layers.2.embed" not in name}
    (folder / CARRIED).mkdir()
    save_file(found, folder / CARRIED / "carried-00001.safetensors")
    content = {"format": 1, "files": [f"{CARRIED}/carried-00001.safetensors"], "step": 12}
    (folder / CARRIED / FACTS).write_text(json.dumps(content))
    return folder, found


def test_state_without_a_place_is_asked_about(tmp_path: Path) -> None:
    source, _ = trained(tmp_path / "source", "exp_avg", "exp_avg_sq")
    for format in ("hf", "deepseek"):
        with pytest.raises(CheckpointError, match=r"exp_avg, exp_avg_sq.*no place.*--optimizer drop"):
            make_plan(open_checkpoint(source), named(format))
    with pytest.raises(CheckpointError, match="no place"):
        make_plan(open_checkpoint(source), named("hf"), optimizer="keep")
    with pytest.raises(CheckpointError, match="must be one of keep, carry, drop"):
        make_plan(open_checkpoint(source), named("hf"), optimizer="no")


def test_carried_state_comes_back_with_the_step(tmp_path: Path) -> None:
    source, state = trained(tmp_path / "source", "fp32", "exp_avg")
    for to, come in (("deepseek", source), ("hf", tmp_path / "deepseek")):
        plan = make_plan(open_checkpoint(come), named(to), optimizer="carry")
        run(plan, tmp_path / to)
        verify(plan, tmp_path / to)
    back = open_checkpoint(tmp_path / "hf")
    assert back.step == 12 and back.states == {"fp32", "exp_avg"}
    found = {name: tensor for path in (tmp_path / "hf" / CARRIED).glob("*.safetensors")
             for name, tensor in load(path.parent).items()}
    assert found.keys() >= state.keys() and all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert load(tmp_path / "hf").keys() == load(source).keys()


def test_dropped_state_is_gone(tmp_path: Path) -> None:
    source, _ = trained(tmp_path / "source", "fp32", "exp_avg")
    plan = make_plan(open_checkpoint(source), named("hf"), optimizer="drop")
    run(plan, tmp_path / "out")
    verify(plan, tmp_path / "out")
    assert load(tmp_path / "out").keys() == load(source).keys() and not (tmp_path / "out" / CARRIED).exists()


@pytest.mark.parametrize(("weights", "state"), [("master", "fp32"), ("ema", "ema")])
def test_master_weights_and_averages_take_the_place_of_the_weights(tmp_path: Path, weights: str, state: str) -> None:
    source, states = trained(tmp_path / "source", state, "exp_avg")
    plan = make_plan(open_checkpoint(source), named("hf"), weights=weights)
    run(plan, tmp_path / "out")
    verify(plan, tmp_path / "out")
    found = load(tmp_path / "out")
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    assert found[name].dtype == torch.float32 and torch.equal(found[name], states[f"{name}@{state}"])
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(found[bias], load(source)[bias])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"
    rounded = make_plan(open_checkpoint(source), named("hf"), dtype="bf16", weights=weights)
    run(rounded, tmp_path / "bf16")
    assert torch.equal(load(tmp_path / "bf16")[name], states[f"{name}@{state}"].bfloat16())


def test_what_is_not_there_cannot_be_chosen(tmp_path: Path) -> None:
    source, _ = trained(tmp_path / "source", "exp_avg")
    with pytest.raises(CheckpointError, match="holds no ema"):
        make_plan(open_checkpoint(source), named("hf"), weights="ema")
    with pytest.raises(CheckpointError, match="must be one of model, master, ema"):
        make_plan(open_checkpoint(source), named("hf"), weights="best")
    with pytest.raises(CheckpointError, match="belong to the weights"):
        make_plan(open_checkpoint(trained(tmp_path / "averaged", "ema")[0]), named("hf"), weights="ema",
                  optimizer="carry")


def test_master_weights_with_their_moments(tmp_path: Path) -> None:
    """As torchtitan trains: FP32 weights, and nothing beside."""
    source, state = trained(tmp_path / "source", "fp32", "exp_avg", "exp_avg_sq")
    plan = make_plan(open_checkpoint(source), named("dcp"), weights="master", optimizer="keep")
    assert not any("@" in name for name in plan.carried)
    run(plan, tmp_path / "dcp")
    verify(plan, tmp_path / "dcp")
    back = make_plan(open_checkpoint(tmp_path / "dcp"), named("hf"), optimizer="carry")
    run(back, tmp_path / "back")
    found = load(tmp_path / "back") | load(tmp_path / "back" / CARRIED)
    for name, tensor in state.items():
        assert torch.equal(found[name.removesuffix("@fp32")], tensor)


def test_state_through_every_format_and_back(tmp_path: Path) -> None:
    """In its own place where there is one, carried where there is none; bit for bit, with the step."""
    source, state = trained(tmp_path / "source", "fp32", "exp_avg", "exp_avg_sq")
    for format in FORMATS:
        there = tmp_path / format.name
        plan = make_plan(open_checkpoint(source), format, optimizer="carry")
        run(plan, there)
        verify(plan, there)
        assert {name.split("@")[1] for name in plan.carried if "@" in name} == set(names.STATES[:3]) - format.states
        back = tmp_path / f"{format.name}-back"
        run(make_plan(open_checkpoint(there), named("hf"), optimizer="carry"), back)
        found = load(back / CARRIED)
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items()), format.name
        assert open_checkpoint(back).step == 12, format.name
