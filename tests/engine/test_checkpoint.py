"""Save, die, resume: what follows is what followed in the run that went on, bit for bit; everything is in the files.

The processes that save are killed (SIGKILL) in the middle of a later step or of a later save; new ones resume.
"""

from __future__ import annotations

import os
import random
import re
import signal
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import megatron_ext
from megatron_ext.checkpoint import CheckpointError, native
from megatron_ext.config import UserError
from megatron_ext.data import GPTDataset, TokenStream
from megatron_ext.models import cross_entropy, deepseek_v3
from tests.distributed import equality
from tests.distributed.equality import Case
from tests.distributed.pool import WorkerError, WorkerPool

EVERYTHING = Case(stages=2, replicas=2, expert_parallel=2, zero=1, offload=True, bf16=True, dropout=0.1, tied=False,
                  section={"fp8": {"enabled": True}, "optimizer": {"moment_dtype": "bf16"}})
SMALL = Case(stages=2, replicas=1, zero=1, micro_batches=2)


def dataset(seed: int = 5) -> GPTDataset:
    return GPTDataset(TokenStream(numpy.random.default_rng(seed).integers(0, 61, 400)), 8)


def build(case: Case, **options: Any) -> Any:
    """An engine that reads its training data itself, under a learning rate that changes each step."""
    config = equality.ds_config(case)
    config["scheduler"] = {"type": "WarmupLR", "params": {"warmup_num_steps": 50, "warmup_max_lr": 1e-2}}
    config.update(options)
    model = megatron_ext.PipelineModule(layers=deepseek_v3(equality.model_config(case)), loss_fn=cross_entropy,
                                        partition_method="uniform", config=config)
    return megatron_ext.initialize(model=model, training_data=dataset(), config=config)[0]


def steps(engine: Any, count: int) -> list[tuple[float, float, float]]:
    """Loss, gradient norm and learning rate of each."""
    found = []
    for _ in range(count):
        loss = float(engine.train_batch())
        found.append((loss, float(engine.get_global_grad_norm()), engine.get_lr()[0]))
    return found


def draws() -> list[float]:
    return [torch.rand(()).item(), float(numpy.random.rand()), random.random()]


def moments(engine: Any) -> list[Tensor]:
    return [state[key] for state in engine.basic_optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# -- the step


def save_go_on_and_die(case: Case, folder: Path, before: int, after: int) -> None:
    engine = build(case)
    steps(engine, before)
    for seed in (torch.manual_seed, numpy.random.seed, random.seed):
        seed(dist.get_rank() + 7)
    engine.save_checkpoint(str(folder / "checkpoints"), client_state={"note": [1, "two"]})
    torch.save({"draws": draws(), "steps": steps(engine, after), "state": equality.gather(engine)},
               folder / f"rank{dist.get_rank()}")
    dist.barrier()
    if dist.get_rank() == dist.get_world_size() - 1:  # where a direction ends
        engine.module.loss_fn = lambda *_: die()
    engine.train_batch()


def resume(case: Case, folder: Path, after: int) -> dict[str, Any]:
    for seed in (torch.manual_seed, numpy.random.seed, random.seed):
        seed(99)
    engine = build(case)
    path, client_state = engine.load_checkpoint(str(folder / "checkpoints"))
    found = {"path": path, "note": client_state["note"], "step": engine.global_steps, "draws": draws(),
             "moments": {m.dtype for m in moments(engine)}, "read": engine.training_dataloader.consumed_samples}
    return {**found, "steps": steps(engine, after), "state": equality.gather(engine)}


@pytest.mark.parametrize(("case", "before", "after"), [
    (EVERYTHING, 3, 10),
    (Case(stages=4, zero=2, dropout=0.1), 2, 3),
    (Case(stages=2, replicas=2, expert_parallel=2, zero=0, bf16=True), 2, 3),
    (Case(stages=2, replicas=1, offload=True, zero_options={"elastic_checkpoint": True}), 2, 3),
], ids=["everything", "ZeRO-2", "ZeRO-0", "elastic"])
def test_the_steps_after_a_kill_and_a_resume_are_those_of_the_uninterrupted_run(
        case: Case, before: int, after: int, pool2: WorkerPool, pool4: WorkerPool, tmp_path: Path) -> None:
    pool = {2: pool2, 4: pool4}[case.world_size]
    with pytest.raises(WorkerError, match="exit code -9"):
        pool.run(save_go_on_and_die, case, tmp_path, before, after)
    resumed = pool.run(resume, case, tmp_path, after)
    for rank, found in enumerate(resumed):
        wanted = torch.load(tmp_path / f"rank{rank}", weights_only=True)
        assert found["steps"] == wanted["steps"], rank
        assert found["draws"] == wanted["draws"], rank
        assert found["step"] == before and f"global_step{before}" in found["path"]
        assert found["note"] == [1, "two"]
        for name, value in wanted["state"].items():
            assert found["state"][name].equal(value), name
    assert len({loss for loss, _, _ in resumed[0]["steps"]}) == after  # a different batch each
    batch = case.micro_batches * case.replicas
    assert resumed[0]["read"] == before * batch  # where a direction starts, the data go on
    bf16 = case.section.get("optimizer", {}).get("moment_dtype") == "bf16"
    assert resumed[0]["moments"] == {torch.bfloat16 if bf16 else torch.float32}
    if case is EVERYTHING:
        check_files(tmp_path / "checkpoints" / f"global_step{before}")


def check_files(folder: Path) -> None:
    """All experts of all MoE layers, biases in FP32, moments in BF16, beside a manifest that lists every file."""
    names = {p.name for p in folder.iterdir()}
    listed = native.read_manifest(folder)["files"].keys()
    assert names == listed | {native.MANIFEST}
    experts = {f"layer_{layer}_expert_{e}_mp_rank_00_model_states.pt" for layer in (1, 2, 3) for e in range(8)}
    assert {n for n in names if "expert" in n} == experts
    assert sum(bool(re.match(r"megatron_ext_rank_\d{5}_states", n)) for n in names) == 4
    shapes = {"gate_proj": (32, 32), "up_proj": (32, 32), "down_proj": (32, 32)}
    for file in experts:
        _, layer, _, expert, *_ = file.split("_")
        state = torch.load(folder / file, weights_only=True)
        prefix = f"model.layers.{layer}.mlp.experts.{expert}"
        assert {k: tuple(v.shape) for k, v in state.items()} == {f"{prefix}.{m}.weight": s for m, s in shapes.items()}
        assert all(v.untyped_storage().nbytes() == v.numel() * v.element_size() for v in state.values())
    dense = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    biases = {n: v for n, v in dense.items() if n.endswith("e_score_correction_bias")}
    assert len(biases) == 3 and not any(".experts." in n for n in dense)
    assert all(v.dtype == torch.float32 and v.abs().max() > 0 for v in biases.values())
    assert dense["lm_head.weight"].dtype == torch.bfloat16
    shards = [n for n in names if "optim_states" in n]
    assert len(shards) == 4
    for shard in shards:
        optimizer = torch.load(folder / shard, weights_only=False)["optimizer_state_dict"]
        assert {p.dtype for p in optimizer["single_partition_of_fp32_groups"]} == {torch.float32}
        state = optimizer["base_optimizer_state"]["state"].values()
        assert {s[k].dtype for s in state for k in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}


# -- the save


def save_twice_and_die(folder: Path, tag: str, where: str) -> None:
    engine = build(SMALL)
    steps(engine, 1)
    engine.save_checkpoint(str(folder), tag="best")
    steps(engine, 1)
    save, write_manifest = torch.save, native.write_manifest

    def half(state: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        save(state, path, *args, **kwargs)
        os.truncate(path, os.path.getsize(path) // 2)
        die()

    def late(*args: Any) -> None:
        write_manifest(*args)
        die()

    if dist.get_rank() == (1 if where == "shard" else 0):
        torch.save, native.write_manifest = (half, write_manifest) if where == "shard" else (save, late)
    engine.save_checkpoint(str(folder), tag=tag)


def resumed_step(folder: Path) -> int:
    engine = build(SMALL)
    engine.load_checkpoint(str(folder))
    steps(engine, 1)
    return engine.global_steps


@pytest.mark.parametrize(("tag", "where"), [("next", "shard"), ("best", "shard"), ("best", "manifest")])
def test_a_save_that_is_killed_leaves_the_checkpoint_before_it(tag: str, where: str, pool2: WorkerPool,
                                                              tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="exit code -9"):
        pool2.run(save_twice_and_die, tmp_path, tag, where)
    assert (tmp_path / "latest").read_text() == "best"
    assert (tmp_path / f"{tag}.unfinished").is_dir()
    assert pool2.run(resumed_step, tmp_path) == [2, 2]


def save_over(folder: Path) -> dict[str, Any]:
    engine = build(SMALL)
    steps(engine, 1)
    engine.save_checkpoint(str(folder), tag="best")
    if dist.get_rank() == 0:
        (folder / "best" / "notes.txt").write_text("mine")
        (folder / "best" / "mp_rank_07_model_states.pt").write_text("of a larger job")
    before = {name: value.clone() for name, value in engine.module.state_dict().items()}
    first = steps(engine, 1)
    engine.save_checkpoint(str(folder), tag="best")
    engine.save_checkpoint(str(folder), tag="aside", save_latest=False)
    refused = []
    for tag in ("../up", "", "a/b", ".", "x.unfinished", f"rank{dist.get_rank()}"):
        try:
            engine.save_checkpoint(str(folder), tag=tag)
        except CheckpointError as error:
            refused.append(str(error))
    engine.load_checkpoint(str(folder))  # into an engine that has stepped
    second = engine.global_steps
    engine.load_checkpoint(str(folder), tag="aside", load_module_only=True)
    moved = any(not before[name].equal(value) for name, value in engine.module.state_dict().items())
    return {"first": first, "step": second, "refused": refused, "moved": moved}


def test_a_tag_can_be_saved_again(pool2: WorkerPool, tmp_path: Path) -> None:
    found = pool2.run(save_over, tmp_path)
    assert [f["step"] for f in found] == [2, 2] and all(f["moved"] for f in found)
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"best", "aside"}
    assert (tmp_path / "latest").read_text() == "best"
    assert (tmp_path / "best" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "best" / "mp_rank_07_model_states.pt").exists()
    assert found[0]["refused"] == found[1]["refused"]
    assert len(found[0]["refused"]) == 6 and "['rank0', 'rank1']" in found[0]["refused"][-1]


# -- universal checkpoints


@dataclass(frozen=True)
class Layout:
    stages: int
    replicas: int
    offload: bool = False


class Frozen(nn.Module):
    """A layer with a weight that is not trained, and a buffer."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width), requires_grad=False)
        self.register_buffer("shift", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.scale + self.shift)


def dense(layout: Layout, universal: bool = False) -> Any:
    from deepspeed.pipe import LayerSpec

    zero: dict[str, Any] = {"stage": 1}
    if layout.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 1, "steps_per_print": 10**6,
              "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "betas": [0.9, 0.95]}},
              "zero_optimization": zero, "checkpoint": {"load_universal": universal},
              "megatron_ext": {"pipeline": {"stages": layout.stages}, "optimizer": {"moment_dtype": "bf16"}}}
    specs = [LayerSpec(nn.Linear, 6, 6), LayerSpec(Frozen, 6), LayerSpec(nn.Linear, 6, 6), LayerSpec(nn.Linear, 6, 6)]
    model = megatron_ext.PipelineModule(layers=specs, loss_fn=nn.functional.mse_loss, config=config)
    return megatron_ext.initialize(model=model, config=config)[0]


def rows(engine: Any, step: int) -> Any:
    for k in range(engine.gradient_accumulation_steps()):
        number = k * engine.data_parallel_world_size + engine.data_parallel_rank
        x = torch.randn(1, 6, generator=torch.Generator().manual_seed(100 * step + number))
        yield x, x.flip(-1)


def train_dense(engine: Any, first: int, count: int) -> list[float]:
    return [float(engine.train_batch(rows(engine, step))) for step in range(first, first + count)]


def save_dense(folder: Path, layout: Layout) -> list[float]:
    engine = dense(layout)
    for module in engine.module.modules():
        if isinstance(module, Frozen):
            module.scale.data.fill_(0.5)
            module.shift.fill_(0.25)
    train_dense(engine, 0, 3)
    engine.save_checkpoint(str(folder), tag="three")
    return train_dense(engine, 3, 3)


def load_dense(folder: Path, layout: Layout, already: int) -> dict[str, Any]:
    from deepspeed.utils import safe_get_full_optimizer_state

    engine = dense(layout, universal=True)
    train_dense(engine, 50, already)
    engine.load_checkpoint(str(folder))
    dtypes = {moment.dtype for moment in moments(engine)}
    addresses = {moment.untyped_storage().data_ptr() for moment in moments(engine)}
    linked = {p._hp_mapping.optim_fragment["exp_avg"].untyped_storage().data_ptr()
              for p in engine.module.parameters() if p.requires_grad and p._hp_mapping is not None}
    averages = [safe_get_full_optimizer_state(p, "exp_avg") for p in engine.module.parameters() if p.requires_grad]
    losses = train_dense(engine, 3, 3)
    return {"losses": losses, "before": dtypes, "after": {m.dtype for m in moments(engine)},
            "linked": linked <= addresses, "steps": {s["step"] for s in engine.basic_optimizer.state.values()},
            "average": sum(float(a.abs().sum()) for a in averages)}


def test_a_universal_checkpoint_keeps_bf16_moments_and_goes_on(pool4: WorkerPool, tmp_path: Path) -> None:
    from deepspeed.checkpoint.ds_to_universal import main as ds_to_universal

    straight = pool4.run(save_dense, tmp_path, Layout(4, 1, offload=True))[0]
    ds_to_universal(Namespace(input_folder=str(tmp_path / "three"), output_folder=str(tmp_path / "three_universal"),
                              num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False, strict=True,
                              inject_missing_state=True))
    for layout, already in ((Layout(4, 1, offload=True), 2), (Layout(2, 2), 0)):
        for found in pool4.run(load_dense, tmp_path, layout, already):
            assert found["before"] == found["after"] == {torch.bfloat16}
            assert found["linked"] and found["average"] > 0
            assert found["steps"] == {6}
            if layout.stages == 4:
                assert found["losses"] == straight
            else:  # sums in another order, and then a moment that rounds the other way
                assert found["losses"] == pytest.approx(straight, rel=1e-4)


def refused_universal(folder: Path) -> list[str]:
    found = []
    engines = [(dense(Layout(2, 1), universal=True), None), (dense(Layout(2, 1), universal=True), "../elsewhere")]
    for engine, tag in engines:
        try:
            engine.load_checkpoint(str(folder), tag=tag)
        except UserError as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_a_universal_checkpoint_that_cannot_be_loaded_is_refused(pool2: WorkerPool, tmp_path: Path) -> None:
    found = pool2.run(refused_universal, tmp_path)
    assert found[0] == found[1]
    missing, escape = found[0]
    assert "latest_universal" in missing and "ds_to_universal" in missing
    assert "'../elsewhere': is not a plain folder name" in escape


