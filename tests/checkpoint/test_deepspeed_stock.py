"""Stock DeepSpeed: what it saves is read as it held it, and its own loader goes on from what we write."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor, nn

from megatron_ext.checkpoint.convert import make_plan, named, open_checkpoint, run
from megatron_ext.checkpoint.convert.verify import differences
from megatron_ext.config.errors import CheckpointError
from megatron_ext.models import cross_entropy, deepseek_v3
from megatron_ext.parallel.expert_parallel import ExpertParallel
from tests.checkpoint import tiny
from tests.checkpoint.tiny import Tensors, convert, load
from tests.checkpoint.trained import (
    STATES,
    STOCK,
    VALUES,
    canonical,
    carry,
    configured,
    keep,
    optimizer_state,
    rewrite,
    same,
    save_stock,
    stock_engine,
    stock_steps,
    transformers_model,
)
from tests.distributed import equality
from tests.distributed.equality import Case
from tests.distributed.pool import WorkerPool


@pytest.mark.parametrize("settings", [STOCK[name] for name in STOCK if "warming" not in name])
def test_what_stock_deepspeed_saves_is_what_it_held(settings: dict[str, Any], tmp_path: Path,
                                                    pool2: WorkerPool) -> None:
    saved = configured(tmp_path / "saved")
    held = pool2.run(save_stock, str(saved), settings)[0]["held"]
    found = carry(saved, tmp_path / "hf")
    same(found, canonical(held))
    assert all(found[name].dtype == tensor.dtype for name, tensor in canonical(held).items() if "@" not in name)
    if settings not in (STOCK["ZeRO-0"], STOCK["ZeRO-0 BF16"], STOCK["BF16_Optimizer"]):  # zero_to_fp32 takes no others
        masters = get_fp32_state_dict_from_zero_checkpoint(str(saved))
        for name, tensor in canonical({n: t for n, t in masters.items() if "e_score" not in n}).items():
            assert torch.equal(found[f"{name}@fp32"], tensor), name


@pytest.mark.parametrize("tied", [False, True])
def test_a_universal_checkpoint_of_deepspeeds_own_is_the_same(tied: bool, tmp_path: Path, pool2: WorkerPool) -> None:
    saved = configured(tmp_path / "saved")
    pool2.run(save_stock, str(saved), STOCK["ZeRO-2 BF16"], True, tied)
    if tied:
        (saved / "config.json").write_text(json.dumps(VALUES | {"tie_word_embeddings": True}))
    ds_to_universal.main(Namespace(input_folder=str(saved / "global_step2"), output_folder=str(tmp_path / "universal"),
                                   num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False, strict=True,
                                   inject_missing_state=True))
    ours = open_checkpoint(saved)
    theirs = open_checkpoint(tmp_path / "universal", config=saved)
    assert not list(differences(ours, theirs))
    assert ours.step == theirs.step == 2 and ours.states == theirs.states == set(STATES)


def resume_stock(folder: str, settings: dict[str, Any], groups: bool) -> dict[str, Any]:
    engine = stock_engine(transformers_model(9), {**settings, "checkpoint": {"load_universal": True}}, groups)
    bias = torch.load(next(Path(folder).glob("*/mp_rank_00_model_states.pt")), weights_only=True)["module"]
    engine.load_checkpoint(folder)
    for name, buffer in engine.module.named_buffers():  # which DeepSpeed's universal loader leaves alone
        if name in bias:
            buffer.copy_(bias[name])
    held = {name: t.detach().clone() for name, t in engine.module.state_dict().items()} | optimizer_state(engine)
    inner = engine.optimizer.optimizer
    steps = {float(state["step"]) for state in inner.state.values()}
    return {"held": held, "global": engine.global_steps, "steps": steps, "losses": stock_steps(engine, 2, 3),
            "lr": engine.get_lr()}


@pytest.mark.parametrize(("before", "after"), [("ZeRO-1", "ZeRO-1"), ("ZeRO-2 BF16", "ZeRO-2 BF16"),
                                               ("ZeRO-1", "BF16_Optimizer, warming up")])
def test_deepspeeds_own_loader_goes_on_from_our_universal_checkpoint(before: str, after: str, tmp_path: Path,
                                                                     pool2: WorkerPool) -> None:
    saved = configured(tmp_path / "saved")
    expected = pool2.run(save_stock, str(saved), STOCK[before], True)[0]
    universal = keep(saved, tmp_path / "universal", names="transformers")
    found = pool2.run(resume_stock, str(universal), STOCK[after], True)[0]
    assert found["global"] == 2 and found["steps"] == {2.0}
    if "warming up" in after:  # the scheduler has counted on: after 5 steps, on a logarithmic scale to the 50th
        assert found["lr"] == pytest.approx([1e-2 * math.log(5) / math.log(50)] * 2)
    exact = {name: tensor for name, tensor in expected["held"].items() if before == after or "@" in name}
    same({name: tensor for name, tensor in found["held"].items() if name in exact}, exact)
    if before == after:
        assert found["losses"] == expected["losses"]
    same(carry(universal, tmp_path / "again"), carry(saved, tmp_path / "hf"))


def load_weights(folder: str) -> Tensors:
    engine = stock_engine(transformers_model(9), {**STOCK["ZeRO-1"], "checkpoint": {"load_universal": True}})
    engine.load_checkpoint(folder)
    held = {name: safe_get_full_fp32_param(p).clone() for name, p in engine.module.named_parameters()}
    stock_steps(engine, 0, 1)
    return held


def test_deepspeeds_own_loader_takes_bf16_weights_without_state(tmp_path: Path, pool2: WorkerPool) -> None:
    source = tiny.save(tmp_path / "source", VALUES, tiny.tensors_of(VALUES))
    universal = convert(source, tmp_path / "universal", "deepspeed", names="transformers")
    found = canonical(pool2.run(load_weights, str(universal))[0])
    same(found, {name: tensor for name, tensor in load(source).items() if "e_score" not in name})


# -- PipelineModule

class Block(nn.Module):
    """A block of ours with all of its experts, for a pipeline that knows nothing of them."""

    def __init__(self, kind: Any, *arguments: Any):
        super().__init__()
        self.inner = kind(*arguments)
        self.inner.set_expert_parallel(ExpertParallel.single())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def save_pipeline(folder: str, case: Case, stage: int) -> Tensors:
    from deepspeed.pipe import LayerSpec, PipelineModule

    specs = deepseek_v3(equality.model_config(case))
    specs[1:-2] = [LayerSpec(Block, spec.typename, *spec.module_args) for spec in specs[1:-2]]
    model = PipelineModule(layers=specs, num_stages=2, loss_fn=cross_entropy, partition_method="uniform")
    engine = deepspeed.initialize(model=model, config={
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2, "steps_per_print": 10**6,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}})[0]
    engine.train_batch(iter([equality.micro_batch(0, n) for n in range(2)]))
    engine.save_checkpoint(folder)
    held = {name: tensor.detach().clone() for name, tensor in engine.module.state_dict().items()}
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, held | (optimizer_state(engine) if stage else {}))
    return {name: tensor for part in parts for name, tensor in part.items()}


@pytest.mark.parametrize(("tied", "stage"), [(False, 1), (True, 1), (False, 0)])
def test_layer_files_of_a_pipeline_module(tied: bool, stage: int, tmp_path: Path, pool2: WorkerPool) -> None:
    case = Case(tied=tied)
    held = pool2.run(save_pipeline, str(tmp_path / "saved"), case, stage)[0]
    (tmp_path / "config.json").write_text(json.dumps(equality.model_config(case).to_hf()))
    called = {"0.": "model.embed_tokens.", "5.": "model.norm.", "6.": "lm_head.",
              "tied_modules.embed_tokens.": "model.embed_tokens."}
    called |= {f"{n + 1}.inner.": f"model.layers.{n}." for n in range(4)}
    renamed = {next(new + name.removeprefix(old) for old, new in called.items() if name.startswith(old)): tensor
               for name, tensor in held.items()}
    if stage == 0:
        with pytest.raises(CheckpointError, match=r"--optimizer drop"):
            carry(tmp_path / "saved", tmp_path / "hf", tmp_path / "config.json")
        plan = make_plan(open_checkpoint(tmp_path / "saved", config=tmp_path / "config.json"), named("hf"), None, None,
                         "drop")
        run(plan, tmp_path / "hf")
        found = load(tmp_path / "hf")
    else:
        found = carry(tmp_path / "saved", tmp_path / "hf", tmp_path / "config.json")
    same(found, canonical(renamed))


def test_moments_without_a_step_are_refused(tmp_path: Path, pool2: WorkerPool) -> None:
    saved = configured(tmp_path / "saved")
    pool2.run(save_stock, str(saved), STOCK["ZeRO-1"])
    universal = keep(saved, tmp_path / "universal")
    for path in universal.glob("*/zero/*/step.pt"):
        path.unlink()
    rewrite(next(universal.glob("*/mp_rank_00_model_states.pt")), lambda tree: tree.update(global_steps=None))
    (universal / "megatron_ext_manifest.json").unlink()
    with pytest.raises(CheckpointError, match="would have moments and no step"):
        keep(universal, tmp_path / "again")
