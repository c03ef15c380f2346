"""Trainings under real DeepSpeed, ours and stock, that save a checkpoint and say what they held.

What they held is never asked of our own readers: it is the engines' tensors and DeepSpeed's `safe_get_full_*`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import nn

from megatron_ext.checkpoint.convert import Options, make_plan, named, open_checkpoint, run
from megatron_ext.checkpoint.convert.verify import verify
from megatron_ext.engine.private import relink_optimizer_state
from tests.checkpoint import tiny
from tests.checkpoint.tiny import Tensors, load
from tests.distributed import equality
from tests.distributed.equality import Case

STATES = ("fp32", "exp_avg", "exp_avg_sq")


def canonical(state: Tensors) -> Tensors:
    """Stacked and fused experts one by one, under Hugging Face's names on disk."""
    found: Tensors = {}
    for full, tensor in state.items():
        name, at, kind = full.partition("@")
        match = re.fullmatch(r"(.*\.experts)\.(gate_up|gate|up|down)_proj", name)
        if match is None:
            found[full] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            halves = matrix.chunk(2) if match[2] == "gate_up" else (matrix,)
            for half, which in zip(halves, ("gate", "up") if match[2] == "gate_up" else (match[2],), strict=True):
                found[f"{match[1]}.{expert}.{which}_proj.weight{at}{kind}"] = half.contiguous().clone()
    return found


def optimizer_state(engine: Any) -> Tensors:
    """Masters and moments of this rank's parameters, whole, as DeepSpeed gathers them; collective."""
    found: Tensors = {}
    relink_optimizer_state(engine.optimizer)  # DeepSpeed links those of the first parameter group only
    for name, p in engine.module.named_parameters():
        found[f"{name}@fp32"] = safe_get_full_fp32_param(p).clone()
        for key in ("exp_avg", "exp_avg_sq"):
            found[f"{name}@{key}"] = safe_get_full_optimizer_state(p, key).clone()
    return found


def carry(source: Path, destination: Path, config: Path | None = None) -> Tensors:
    """Converts to Hugging Face with the optimizer's state beside, verifies, and reads all of it."""
    plan = make_plan(open_checkpoint(source, "deepspeed", config), named("hf"), optimizer="carry")
    run(plan, destination)
    verify(plan, destination)
    return load(destination) | load(destination / "megatron_ext_carried")


def keep(source: Path, destination: Path, config: Path | None = None, **options: Any) -> Path:
    """Converts to a universal checkpoint with the optimizer's state, and verifies."""
    plan = make_plan(open_checkpoint(source, "deepspeed", config), named("deepspeed"), Options(**options), None, "keep")
    run(plan, destination)
    verify(plan, destination)
    return destination


def same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].float(), tensor.float()), name


# -- our engine

OURS = {
    "ZeRO-1 FP32": Case(stages=2, zero=1),
    "ZeRO-2 BF16 EP": Case(stages=2, replicas=2, expert_parallel=2, zero=2, bf16=True, tied=False,
                           section={"optimizer": {"moment_dtype": "bf16"}}),
    "ZeRO-0 BF16 EP": Case(stages=2, replicas=2, expert_parallel=2, zero=0, bf16=True, tied=False),
    "ZeRO-1 1F1B tied": Case(stages=2, zero=1, schedule="1f1b", tied=True),
    "ZeRO-1 elastic": Case(stages=4, zero=1, bf16=True, zero_options={"elastic_checkpoint": True}),
}


def save_ours(case: Case, folder: str) -> Tensors:
    """Trains two steps and saves. Every rank returns weights and state of the whole model."""
    engine = equality.build(case)
    data = equality.batches(engine, case)
    for _ in range(2):
        engine.train_batch(data)
    engine.save_checkpoint(folder)
    return whole_model(engine)


def whole_model(engine: Any) -> Tensors:
    """Weights and buffers of all ranks, experts joined; under ZeRO masters and moments too. Collective."""
    mine = {}
    if engine.zero_optimization():
        ranges = {n: getattr(p, "expert_range", (0,))[0] for n, p in engine.module.named_parameters()}
        mine = {(name, ranges[name.partition("@")[0]]): t for name, t in optimizer_state(engine).items()}
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    merged = {key: tensor for part in parts for key, tensor in part.items()}
    state: Tensors = {}
    for name, first in sorted(merged):
        state[name] = torch.cat([state[name], merged[name, first]]) if name in state else merged[name, first]
    return equality.gather(engine) | state


# -- stock DeepSpeed

STOCK: dict[str, dict[str, Any]] = {
    "ZeRO-1": {"zero_optimization": {"stage": 1}},
    "ZeRO-2 BF16": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
    "BF16_Optimizer": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True},
                       "data_types": {"grad_accum_dtype": "fp32"}},
    "BF16_Optimizer, warming up": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}, "scheduler": {
        "type": "WarmupLR", "params": {"warmup_num_steps": 50, "warmup_max_lr": 1e-2}},
        "data_types": {"grad_accum_dtype": "fp32"}},
    "ZeRO-0": {},
    "ZeRO-0 BF16": {"bf16": {"enabled": True}},
}
VALUES = tiny.config(moe_intermediate_size=16, torch_dtype="float32", q_lora_rank=19)
"""Odd sizes, so that ZeRO pads its partitions."""


def transformers_model(seed: int, tied: bool = False) -> nn.Module:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(seed)
    left_out = ("architectures", "model_type", "num_nextn_predict_layers", "torch_dtype")
    values = {key: value for key, value in VALUES.items() if key not in left_out}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**values | {"tie_word_embeddings": tied}))
    for name, buffer in model.named_buffers():
        if "e_score" in name:
            buffer.uniform_()
    return model


def stock_engine(model: nn.Module, settings: dict[str, Any], groups: bool = False) -> Any:
    config = {"train_micro_batch_size_per_gpu": 1, "steps_per_print": 10**6, "optimizer": {
        "type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}, **settings}
    parameters: Any = list(model.parameters())
    if groups:  # without weight decay for vectors, as most do
        parameters = [{"params": [p for p in parameters if p.dim() > 1]},
                      {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}]
    return deepspeed.initialize(model=model, config=config, model_parameters=parameters)[0]


def stock_steps(engine: Any, first: int, count: int) -> list[float]:
    losses = []
    for step in range(first, first + count):
        tokens = torch.randint(0, 48, (1, 8), generator=torch.Generator().manual_seed(step * 2 + dist.get_rank()))
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return losses


def save_stock(folder: str, settings: dict[str, Any], groups: bool = False, tied: bool = False) -> dict[str, Any]:
    engine = stock_engine(transformers_model(1, tied), settings, groups)
    stock_steps(engine, 0, 2)
    engine.save_checkpoint(folder)
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    held = {name: t.detach().clone() for name, t in engine.module.state_dict().items()}
    if 0 < stage < 3:
        held |= optimizer_state(engine)
    elif stage == 0:
        inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
        masters = [p for group in inner.param_groups for p in group["params"]]
        for (name, _), p in zip(engine.module.named_parameters(), masters, strict=True):
            held |= {f"{name}@{key}": inner.state[p][key].clone() for key in ("exp_avg", "exp_avg_sq")}
            if "bf16" in settings:
                held[f"{name}@fp32"] = p.detach().clone()
    return {"held": held, "losses": stock_steps(engine, 2, 3)}


def configured(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(VALUES))
    return folder


def rewrite(path: Path, change: Any) -> None:
    """Changes the objects of a file of torch.save."""
    tree = torch.load(path, weights_only=False)
    change(tree)
    torch.save(tree, path)
