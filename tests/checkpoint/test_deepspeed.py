"""DeepSpeed's formats: what our engine saves is read as the ranks held it, and what is written is universal.

Stock DeepSpeed's side of it is in test_deepspeed_stock.py, damage in test_deepspeed_damage.py.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_ext
from megatron_ext.checkpoint.convert.deepspeed_io import read
from megatron_ext.checkpoint.convert.folder import Folder
from megatron_ext.models import DeepSeekV3, cross_entropy, deepseek_v3
from tests.checkpoint.tiny import Tensors, convert, equal, load, make
from tests.checkpoint.trained import OURS, canonical, carry, keep, same, save_ours, whole_model
from tests.distributed import equality
from tests.distributed.equality import Case
from tests.distributed.pool import WorkerPool


@pytest.mark.parametrize("case", OURS.values(), ids=OURS.keys())
def test_what_our_engine_saves_is_what_it_held(case: Case, tmp_path: Path, pool2: WorkerPool,
                                               pool4: WorkerPool) -> None:
    pool = {2: pool2, 4: pool4}[case.world_size]
    held = pool.run(save_ours, case, str(tmp_path / "saved"))[0]
    values = equality.model_config(case).to_hf() | {"torch_dtype": "bfloat16" if case.bf16 else "float32"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    found = carry(tmp_path / "saved", tmp_path / "hf", tmp_path / "config.json")
    expected = canonical(held)
    if not case.zero:
        weights = [name for name in expected if "bias" not in name]
        assert all(torch.equal(found[name], found[f"{name}@fp32"].bfloat16()) for name in weights)
        assert all(f"{name}@{key}" in found for name in weights for key in ("exp_avg", "exp_avg_sq"))
        found = {name: tensor for name, tensor in found.items() if "@" not in name}
    same({n: t for n, t in found.items() if n != "lm_head.weight" or not case.tied}, expected)
    assert {t.dtype for n, t in found.items() if "bias" not in n and "@" not in n} == {
        torch.bfloat16 if case.bf16 else torch.float32}
    model = DeepSeekV3(equality.model_config(case)).to(torch.bfloat16 if case.bf16 else torch.float32)
    model.load_state_dict({name: t for name, t in held.items() if "@" not in name})
    for gate in (block.mlp.gate for block in model.model.layers if hasattr(block.mlp, "gate")):
        gate.e_score_correction_bias = gate.e_score_correction_bias.float()
    for name, buffer in model.named_buffers():
        if name in held:
            buffer.copy_(held[name])
    tokens = torch.arange(16).reshape(2, 8)
    assert torch.equal(DeepSeekV3.load_hf(tmp_path / "hf")(tokens), model(tokens))


def test_our_optimizer_without_zero_has_the_state_of_the_right_parameter(tmp_path: Path, pool4: WorkerPool) -> None:
    """Told apart by their values: the same training under ZeRO-1 has the same moments."""
    zero_0 = Case(stages=2, replicas=2, expert_parallel=2, zero=0)
    zero_1 = Case(stages=2, replicas=2, expert_parallel=2, zero=1)
    (tmp_path / "config.json").write_text(json.dumps(equality.model_config(zero_0).to_hf()))
    found = []
    for case in (zero_0, zero_1):
        pool4.run(save_ours, case, str(tmp_path / str(case.zero)))
        found.append(carry(tmp_path / str(case.zero), tmp_path / f"hf{case.zero}", tmp_path / "config.json"))
    for name, tensor in found[1].items():
        if "@exp" in name:
            torch.testing.assert_close(found[0][name], tensor, rtol=1e-3, atol=1e-9, msg=name)


def resume_ours(case: Case, folder: str) -> Tensors:
    """What an engine of ours holds after loading a universal checkpoint; trains one step more."""
    config = equality.ds_config(case) | {"checkpoint": {"load_universal": True}}
    model = megatron_ext.PipelineModule(layers=deepseek_v3(equality.model_config(case)), loss_fn=cross_entropy,
                                        base_seed=1, partition_method="uniform", config=config)
    engine = megatron_ext.initialize(model=model, config=config)[0]
    engine.load_checkpoint(folder)
    held = whole_model(engine)
    assert engine.global_steps == 2
    engine.train_batch(equality.batches(engine, case))
    return held


def test_our_engine_goes_on_from_our_universal_checkpoint(tmp_path: Path, pool2: WorkerPool,
                                                          pool4: WorkerPool) -> None:
    """With experts, in another layout and under another stage."""
    saved = Case(stages=2, replicas=2, expert_parallel=2, zero=2, bf16=True, tied=False)
    held = pool4.run(save_ours, saved, str(tmp_path / "saved"))[0]
    (tmp_path / "config.json").write_text(json.dumps(equality.model_config(saved).to_hf()))
    universal = keep(tmp_path / "saved", tmp_path / "universal", tmp_path / "config.json")
    same(pool2.run(resume_ours, Case(stages=2, zero=1, bf16=True, tied=False), str(universal))[0], held)


# -- round trips

MODELS: list[dict[str, Any]] = [
    dict(family=family, q_lora=q_lora, mtp=mtp, tied=tied, dense=dense, layers=4)
    for (family, q_lora, tied), (mtp, dense) in zip(
        itertools.product(("v3", "v2"), (True, False), (False, True)),
        [(0, 0), (1, 1), (2, 3), (1, 0), (2, 1), (0, 3), (1, 1), (2, 0)], strict=True)]


@pytest.mark.parametrize(("settings", "dtype"), [
    (settings, dtype) for number, settings in enumerate(MODELS)
    for dtype in (("bf16", "fp32", "fp8") if number in (1, 2) else ("bf16", "fp32", "fp8")[number % 3:number % 3 + 1])])
def test_to_deepspeed_and_back(settings: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", dtype, shards=2, **settings)
    for names in ("megatron_ext", "transformers"):
        there = convert(source, tmp_path / names, "deepspeed", names=names)
        back = convert(there, tmp_path / f"{names}-back", "hf", "fp8" if dtype == "fp8" else None)
        assert equal(load(source), load(back))
        for name in ("config.json", "tokenizer_config.json"):
            assert (source / name).read_bytes() == (back / name).read_bytes()


def test_what_is_written_says_what_it_is(tmp_path: Path) -> None:
    """Experts stacked as our engine has them, weights in their own dtype and once, the bias among the buffers."""
    source = make(tmp_path / "source", "bf16")
    there = convert(source, tmp_path / "there", "deepspeed")
    assert (there / "latest_universal").read_text() == "universal"
    file = torch.load(there / "universal/zero/model.layers.1.mlp.experts.up_proj/fp32.pt", weights_only=True)
    assert file["param"].shape == (4, 12, 32) and file["param"].dtype == torch.bfloat16
    assert file["is_expert_param"] and file["ep_num_experts"] == 4 and file["cat_dim"] == 0
    model = torch.load(there / "universal/mp_rank_00_model_states.pt", weights_only=True)
    assert list(model["module"]) == model["buffer_names"] == ["model.layers.1.mlp.gate.e_score_correction_bias"]
    shards = read(Folder(there))
    assert shards.kind == "universal" and shards.parameters["model.layers.1.mlp.experts.up_proj"].copied
