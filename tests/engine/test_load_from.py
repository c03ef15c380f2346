"""`megatron_ext.load`: checkpoints of other programs in any layout; what follows is what one process computes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import megatron_ext
from megatron_ext.checkpoint.convert import FORMATS, make_plan, named, open_checkpoint, run
from megatron_ext.engine import restoring
from megatron_ext.models import DeepSeekV3, DeepSeekV3Config, cross_entropy, deepseek_v3
from tests.checkpoint import tiny
from tests.distributed import equality
from tests.distributed.equality import Case
from tests.distributed.pool import WorkerPool
from tests.engine.test_errors import caught

FLAT, SPLIT = Case(stages=2, replicas=1), Case(stages=2, replicas=2, expert_parallel=2, micro_batches=2)


def build(case: Case, model: DeepSeekV3Config, load: dict[str, Any]) -> Any:
    config = equality.ds_config(replace(case, section={**case.section, "load": load}))
    module = megatron_ext.PipelineModule(layers=deepseek_v3(model), loss_fn=cross_entropy, partition_method="uniform",
                                         config=config)
    return megatron_ext.initialize(model=module, config=config)[0]


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    stream = torch.randint(0, 48, (1, 9), generator=torch.Generator().manual_seed(number))
    return stream[:, :-1], stream[:, 1:]


def shard(engine: Any, case: Case) -> Any:
    for k in range(case.per_direction):
        yield batch(k * engine.data_parallel_world_size + engine.data_parallel_rank)


def first_step(case: Case, folder: Path, chunk: int) -> dict[str, Any]:
    with patch.object(restoring, "CHUNK", chunk):  # so that runs begin and end inside experts, rows and FP8 blocks
        engine = build(case, DeepSeekV3Config.from_hf(folder), {"from": str(folder)})
    state = equality.gather(engine)
    loss = float(engine.train_batch(shard(engine, case)))
    return {"loss": loss, "state": state}


def one_process(folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss over the same four micro-batches, and the weights."""
    model = DeepSeekV3.load_hf(folder, torch.float32)
    losses = [cross_entropy(model(tokens), labels) for tokens, labels in map(batch, range(4))]
    return sum(float(loss.detach()) for loss in losses) / 4, model.state_dict()


@pytest.mark.parametrize(("case", "dtype", "settings"), [
    (FLAT, "bf16", {"mtp": 1, "shards": 3}),
    (SPLIT, "fp8", {"wide": True}),
    (replace(FLAT, zero=0), "fp32", {"tied": True, "family": "v2"}),
    (replace(SPLIT, zero=2, offload=True, section={"optimizer": {"moment_dtype": "bf16"}}), "bf16",
     {"tied": True, "mtp": 2, "q_lora": False}),
    (replace(SPLIT, schedule="1f1b"), "fp8", {}),
    (replace(SPLIT, zero=0), "bf16", {}),
], ids=["BF16-MTP", "FP8-EP", "FP32-V2-ZeRO-0", "BF16-tied-ZeRO-2-offload", "FP8-1F1B", "BF16-ZeRO-0-EP"])
def test_a_hugging_face_folder_is_loaded_into_any_layout(case: Case, dtype: str, settings: dict[str, Any],
                                                        pool2: WorkerPool, pool4: WorkerPool, tmp_path: Path) -> None:
    folder = plain = tiny.make(tmp_path / "source", dtype, **settings)
    if dtype == "fp8":
        plain = tiny.convert(folder, tmp_path / "fp32", "hf", "fp32")
    loss, state = one_process(plain)
    chunk = 10_007 if settings.get("wide") else 251
    for found in {2: pool2, 4: pool4}[case.world_size].run(first_step, case, folder, chunk):
        assert found["loss"] == pytest.approx(loss, abs=1e-6)
        assert found["state"].keys() == state.keys()
        for name, value in state.items():
            assert found["state"][name].equal(value), name


@pytest.mark.slow
def test_every_format_is_loaded(pool2: WorkerPool, tmp_path: Path) -> None:
    folder = tiny.make(tmp_path / "source", dtype="fp32", mtp=1)
    loss, state = one_process(folder)
    for format in FORMATS:
        source = tiny.convert(folder, tmp_path / format.name, format.name)
        load = {"from": str(source), "config": str(folder / "config.json")}
        for found in pool2.run(first_step_of_format, folder, {**load, "format": format.name}):
            assert found["loss"] == pytest.approx(loss, abs=1e-6), format.name
            assert all(found["state"][name].equal(value) for name, value in state.items()), format.name


def first_step_of_format(folder: Path, load: dict[str, Any]) -> dict[str, Any]:
    engine = build(FLAT, DeepSeekV3Config.from_hf(folder), load)
    return {"state": equality.gather(engine), "loss": float(engine.train_batch(shard(engine, FLAT)))}


# -- a checkpoint that has more than weights


def save(case: Case, folder: Path) -> dict[str, Any]:
    engine = equality.build(case)
    data = equality.batches(engine, case)
    for _ in range(3):
        engine.train_batch(data)
    engine.save_checkpoint(str(folder))
    state = equality.gather(engine)
    return {"state": state, "losses": [float(engine.train_batch(data)) for _ in range(3)]}


def go_on(case: Case, load: dict[str, Any] | None, universal: Path | None = None) -> dict[str, Any]:
    """From the fourth batch on, whatever was loaded."""
    config = equality.ds_config(replace(case, section={"load": load} if load else {}))
    config["checkpoint"] = {"load_universal": universal is not None}
    module = megatron_ext.PipelineModule(layers=deepseek_v3(equality.model_config(case)), loss_fn=cross_entropy,
                                         base_seed=equality.SEED, partition_method="uniform", config=config)
    engine = megatron_ext.initialize(model=module, config=config)[0]
    if universal is not None:
        engine.load_checkpoint(str(universal))
    count, state = engine.global_steps, equality.gather(engine)
    moments = bool(engine.basic_optimizer.state)
    data = equality.batches(engine, case, 3)
    return {"step": count, "state": state, "moments": moments, "losses": [float(engine.train_batch(data))
                                                                          for _ in range(3)]}


def test_what_the_engine_saved_is_converted_without_a_flag_and_goes_on(pool4: WorkerPool, tmp_path: Path) -> None:
    """Our own checkpoint as it is, and made universal; into another layout, with and without the optimizer's state."""
    saved = replace(SPLIT, zero=2)
    wanted = pool4.run(save, saved, tmp_path / "ours")[0]
    convert = tiny.convert(tmp_path / "ours", tmp_path / "universal", "deepspeed")
    plain = tmp_path / "hf"
    run(make_plan(open_checkpoint(tmp_path / "ours"), named("hf"), optimizer="drop"), plain)
    other = Case(stages=4, schedule="1f1b")
    for case, load, universal in ((other, {"from": str(tmp_path / "ours")}, None),
                                  (other, {"from": str(convert)}, None), (replace(SPLIT, zero=0), None, convert)):
        for found in pool4.run(go_on, case, load, universal):
            assert found["step"] == 3 and found["moments"]
            assert all(found["state"][name].equal(value) for name, value in wanted["state"].items())
            assert found["losses"] == pytest.approx(wanted["losses"], abs=1e-6)
    for source in (tmp_path / "ours" / "global_step3", convert, plain):
        for found in pool4.run(go_on, other, {"from": str(source), "optimizer": False}):
            assert found["step"] == 0 and not found["moments"]
            assert all(found["state"][name].equal(value) for name, value in wanted["state"].items())
    model = DeepSeekV3.load_hf(plain)
    assert all(value.equal(wanted["state"][name]) for name, value in model.state_dict().items())


# -- what is wrong


def wrong_loads(folder: Path) -> list[tuple[str, str, int | None]]:
    model = DeepSeekV3Config.from_hf(tiny.config())

    def load(source: Path, **changes: Any) -> Callable[[], None]:
        return lambda: build(FLAT, replace(model, **changes), {"from": str(source)})

    good = build(FLAT, model, {"from": str(folder / "good")})
    good.load_checkpoint(str(folder / "good"))
    return caught([load(folder / "good", hidden_size=64), load(folder / "good", num_hidden_layers=3),
                   load(folder / "good", n_routed_experts=8), load(folder / "good", tie_word_embeddings=True),
                   load(folder / "absent"), load(folder / "cut"), load(folder / "short"),
                   lambda: good.load_checkpoint(str(folder / "cut"))])


def test_a_checkpoint_of_another_model_is_refused_on_every_rank_at_once(pool2: WorkerPool, tmp_path: Path) -> None:
    tiny.make(tmp_path / "good")
    cut = tiny.make(tmp_path / "cut") / "model.safetensors"
    os.truncate(cut, cut.stat().st_size - 8)
    values = tiny.config()
    tensors = tiny.tensors_of(values)
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    tiny.save(tmp_path / "short", values, tensors)
    found = pool2.run(wrong_loads, tmp_path, timeout=60)
    wanted = ("hidden_size = 32; this job's has 64", "num_hidden_layers = 2; this job's has 3",
              "n_routed_experts = 4; this job's has 8", "tie_word_embeddings = False; this job's has True",
              "absent: there is no such folder", "model.safetensors", "layers.1.self_attn.o_proj.weight is missing",
              "model.safetensors")
    for rank in found:
        assert [kind for kind, _, _ in rank] == ["CheckpointError"] * len(wanted)
        assert [message for _, message, _ in rank] == [message for _, message, _ in found[0]]
        for (_, message, _), text in zip(rank, wanted, strict=True):
            assert text in message
