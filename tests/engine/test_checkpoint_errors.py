"""A checkpoint that cannot be loaded says why on every rank, and changes nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import nn

import megatron_ext
from megatron_ext.checkpoint import native
from megatron_ext.data import GPTDataset, TokenStream
from megatron_ext.models import DeepSeekV3Config, cross_entropy, deepseek_v3
from tests.distributed import equality
from tests.distributed.equality import Case
from tests.distributed.pool import WorkerPool
from tests.engine.test_errors import SMALL, caught


def data(seed: int = 5) -> GPTDataset:
    return GPTDataset(TokenStream(numpy.random.default_rng(seed).integers(0, 61, 200)), 8)


def build(case: Case = SMALL, seed: int = 5, model: dict[str, Any] | None = None, **options: Any) -> Any:
    config = {**equality.ds_config(case), **options}
    model_config: DeepSeekV3Config = replace(equality.model_config(case), **(model or {}))
    module = megatron_ext.PipelineModule(layers=deepseek_v3(model_config), loss_fn=cross_entropy,
                                         partition_method="uniform", config=config)
    return megatron_ext.initialize(model=module, training_data=data(seed), config=config)[0]


def snapshot(engine: Any) -> list[Any]:
    """Everything that a load may change."""
    state = list(engine.basic_optimizer.state.values())
    return [*(t.clone() for t in engine.module.state_dict().values()),
            *(p.detach().clone() for g in engine.basic_optimizer.param_groups for p in g["params"]),
            *(s[k].clone() for s in state for k in ("exp_avg", "exp_avg_sq")),
            torch.get_rng_state(), torch.tensor([engine.global_steps, engine.training_dataloader.consumed_samples])]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


SHARD = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
EXPERT = "layer_2_expert_5_mp_rank_00_model_states.pt"
MODEL = "mp_rank_00_model_states.pt"
DAMAGES: list[tuple[str, Callable[[Path], Any], tuple[str, ...]]] = [
    # what happened to the folder (its checkpoint is in `one`), what the message must say
    ("folder gone", shutil.rmtree, ("there is no such folder",)),
    ("latest gone", lambda d: (d / "latest").unlink(), ("there is no file 'latest'", "pass tag=")),
    ("latest dangling", lambda d: (d / "latest").write_text("two"), ("latest: names 'two', which is not here",)),
    ("latest empty", lambda d: (d / "latest").write_text(""), ("'': is not a plain folder name",)),
    ("latest leads out", lambda d: (d / "latest").write_text("../one"), ("'../one': is not a plain folder name",)),
    ("shard cut short", lambda d: cut(d / "one" / SHARD), (SHARD, "bytes", "when it was saved")),
    ("shard gone", lambda d: (d / "one" / SHARD).unlink(), (SHARD, "is missing", "megatron_ext.json lists it")),
    ("expert gone", lambda d: (d / "one" / EXPERT).unlink(), (EXPERT, "is missing")),
    ("a bit of an expert flipped", lambda d: flip(d / "one" / EXPERT), (EXPERT, "has other content", "CRC-32")),
    ("a bit of the model flipped", lambda d: flip(d / "one" / MODEL), (MODEL, "has other content", "CRC-32")),
    ("a bit of a shard flipped", lambda d: flip(d / "one" / SHARD), (SHARD, "has other content", "CRC-32")),
    ("no manifest", lambda d: (d / "one" / native.MANIFEST).unlink(),
     ("has no megatron_ext.json beside", "not written by megatron_ext, or its save was cut off")),
    ("manifest cut short", lambda d: cut(d / "one" / native.MANIFEST), ("megatron_ext.json: cannot be read",)),
    ("manifest of later", lambda d: edit(d / "one" / native.MANIFEST, format=2), ("has format 2", "reads format 1")),
    ("manifest without placement", lambda d: edit(d / "one" / native.MANIFEST, placement={}), ("lacks placement",)),
    ("manifest that leads out", lambda d: edit(d / "one" / native.MANIFEST, files={"../x": {"bytes": 1, "crc32": 1}}),
     ("'../x': is not a plain folder name",)),
]


def stock_checkpoint(folder: Path) -> None:
    """As DeepSpeed itself writes it."""
    import deepspeed

    config = {"train_batch_size": 2, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
              "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(model=nn.Linear(4, 4), config=config)
    engine.save_checkpoint(str(folder), tag="stock")


def failed_loads(folder: Path) -> dict[str, Any]:
    engine = build()
    engine.train_batch()
    engine.save_checkpoint(str(folder / "good"), tag="one")
    stock_checkpoint(folder / "good")
    dist.barrier()
    after_the_save = [float(engine.train_batch()) for _ in range(2)]
    before = snapshot(engine)

    def load(directory: Path, tag: str | None = None, into: Any = engine, **options: Any) -> Callable[[], None]:
        return lambda: into.load_checkpoint(str(directory), tag=tag, **options)

    def damaged(number: int) -> Callable[[], None]:
        directory = folder / f"damaged{number}"
        if dist.get_rank() == 0:
            shutil.copytree(folder / "good", directory)
            (directory / "latest").write_text("one")
            DAMAGES[number][1](directory)
        dist.barrier()
        return load(directory)

    found = caught([damaged(number) for number in range(len(DAMAGES))])
    good = folder / "good"
    others = [load(good, "stock"), load(good, "absent"), load(good, "../good/one"), load(good, ""),
              load(good, "one", build(seed=6))]
    found += caught(others)
    unchanged = [a.equal(b) for a, b in zip(before, snapshot(engine), strict=True)]
    others = [load(good, "one", other) for other in (
        build(model={"moe_intermediate_size": 24}), build(replace(SMALL, bf16=True)),
        build(optimizer={"type": "SGD", "params": {"lr": 0.1}}))]
    found += caught(others)
    engine.load_checkpoint(str(good), tag="one")  # none of this has done the engine any harm
    again = [float(engine.train_batch()) for _ in range(2)]
    return {"found": found, "unchanged": unchanged, "same": again == after_the_save}


OTHER_LOADS: list[tuple[str, ...]] = [
    ("stock", "has no megatron_ext.json beside mp_rank_00_model_states.pt", "not written by megatron_ext"),
    ("absent: there is no such folder", "must name a saved checkpoint"),
    ("'../good/one': is not a plain folder name",),
    ("'': is not a plain folder name",),
    ("data position", "dataset_fingerprint", "same data"),
    ("experts.gate_proj of shape [8, 32, 32]", "this model's has [8, 24, 32]"),
    ("was saved with bf16.enabled = False", "this job has True"),
    ("holds the state of AdamW", "this job has SGD", "use the optimizer of the save"),
]


def test_a_load_that_fails_says_why_on_all_ranks_and_changes_nothing(pool2: WorkerPool, tmp_path: Path) -> None:
    one, other = pool2.run(failed_loads, tmp_path)
    assert all(one["unchanged"]) and all(other["unchanged"])
    assert one["same"] and other["same"]
    assert one["found"] == other["found"]
    wanted = [texts for *_, texts in DAMAGES] + OTHER_LOADS
    assert len(one["found"]) == len(wanted)
    for (kind, message, _), texts in zip(one["found"], wanted, strict=True):
        assert kind == ("DataError" if "data position" in texts else "CheckpointError"), message
        for text in texts:
            assert text in message
    assert {rank for _, _, rank in one["found"]} > {0, 1}  # each rank checks its share of the files
