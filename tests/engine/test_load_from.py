"""`megatron_ext.load`: checkpoints of other programs in any layout; what follows is what one process computes."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from safetensors.torch import load_file, save_file

import megatron_ext
from megatron_ext.checkpoint.convert import FORMATS, make_plan, named, open_checkpoint, run
from megatron_ext.checkpoint.convert.source import CARRIED, FACTS
from megatron_ext.engine import foreign, restoring
from megatron_ext.models import DeepSeekV3, DeepSeekV3Config, cross_entropy, deepseek_v3
from tests.checkpoint import tiny
from tests.checkpoint.test_selection import trained
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
    torch.rand(2 + dist.get_rank())
    engine.save_checkpoint(str(folder))
    state, draw = equality.gather(engine), torch.rand(3).tolist()
    return {"state": state, "draw": draw, "losses": [float(engine.train_batch(data)) for _ in range(3)]}


def go_on(case: Case, load: dict[str, Any] | None, universal: Path | None = None) -> dict[str, Any]:
    """From the fourth batch on, whatever was loaded."""
    config = equality.ds_config(replace(case, section={"load": load} if load else {}))
    config["checkpoint"] = {"load_universal": universal is not None}
    module = megatron_ext.PipelineModule(layers=deepseek_v3(equality.model_config(case)), loss_fn=cross_entropy,
                                         base_seed=equality.SEED, partition_method="uniform", config=config)
    engine = megatron_ext.initialize(model=module, config=config)[0]
    if universal is not None:
        engine.load_checkpoint(str(universal))
    draw, count, state = torch.rand(3).tolist(), engine.global_steps, equality.gather(engine)
    moments = bool(engine.basic_optimizer.state)
    data = equality.batches(engine, case, 3)
    return {"step": count, "state": state, "moments": moments, "draw": draw,
            "losses": [float(engine.train_batch(data)) for _ in range(3)]}


def test_what_the_engine_saved_is_converted_without_a_flag_and_goes_on(pool4: WorkerPool, tmp_path: Path) -> None:
    """Our own checkpoint as it is, and made universal; into another layout, with and without the optimizer's state."""
    saved = replace(SPLIT, zero=2)
    all_ranks = pool4.run(save, saved, tmp_path / "ours")
    wanted = all_ranks[0]
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
    for rank, found in zip(all_ranks, pool4.run(go_on, saved, {"from": str(tmp_path / "ours")}), strict=True):
        assert (found["losses"], found["draw"]) == (rank["losses"], rank["draw"]), "nothing is lost in the same layout"
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


# -- what a stranger wrote


class Runs:
    """Executed by whoever unpickles it; by way of a module of which the reader keeps records, or another."""

    def __init__(self, file: Path, numpy: bool):
        self.file, self.numpy = file, numpy

    def __reduce__(self) -> tuple[Any, ...]:
        if self.numpy:
            return np.testing._private.utils.runstring, (f"open({str(self.file)!r}, 'a')", {})
        return os.system, (f"touch {self.file}",)


def mended(folder: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a file, and the manifest too, as a stranger would."""
    content = torch.load(folder / name, weights_only=False)
    manifest = json.loads((folder / "megatron_ext.json").read_text())
    change(content)
    torch.save(content, folder / name)
    data = (folder / name).read_bytes()
    manifest["files"][name] = {"bytes": len(data), "crc32": zlib.crc32(data)}
    (folder / "megatron_ext.json").write_text(json.dumps(manifest))


def strange_loads(folder: Path) -> list[tuple[str, str, int | None]]:
    other, model = replace(FLAT, schedule="1f1b"), equality.model_config(FLAT)
    load: dict[str, Any] = {"from": str(folder)}
    return caught([lambda: build(FLAT, model, load), lambda: build(other, model, load),
                   lambda: build(FLAT, model, {**load, "optimizer": False}),
                   lambda: build(other, model, {}).load_checkpoint(str(folder))])


@pytest.mark.parametrize(("start", "numpy", "said"), [
    ("mp_rank_00", False, ["names 'posix.system'"] * 4),
    ("mp_rank_00", True, ["", "", "", "names 'numpy.testing._private.utils.runstring'"]),
    ("zero_pp_rank_1", True, [""] * 4),
    ("megatron_ext_rank_00001", True, ["00001_states.pt: names 'numpy.", "", "00001_states.pt: names 'numpy.", ""])])
def test_nothing_in_a_checkpoint_is_executed(start: str, numpy: bool, said: list[str], pool2: WorkerPool,
                                             tmp_path: Path) -> None:
    """By `load.from` in the layout of the save and in another, nor by `load_checkpoint` in another."""
    pool2.run(save, FLAT, tmp_path / "ours")
    folder, mark = tmp_path / "ours" / "global_step3", tmp_path / "executed"
    name = next(file.name for file in folder.iterdir() if file.name.startswith(start))
    mended(folder, name, lambda content: content.update(note=Runs(mark, numpy)))
    torch.load(folder / name, weights_only=False)
    assert mark.exists(), "the attack works"
    mark.unlink()
    found = pool2.run(strange_loads, tmp_path / "ours")
    assert not mark.exists()
    for rank in found:
        for (kind, message, _), text in zip(rank, said, strict=True):
            assert kind == ("CheckpointError" if text else "nothing") and text in message, (kind, message)
            assert ("client_state is the likely place" in message) == text.startswith("names")


# -- what one rank finds


def lonely_failures(folder: Path) -> list[tuple[str, str, int | None]]:
    rank, model = dist.get_rank(), equality.model_config(FLAT)
    look_at, load = foreign.look_at, DeepSpeedEngine.load_module_state_dict

    def look(culprit: int) -> Callable[[], None]:
        def failing(path: Path) -> Any:
            if rank == culprit:
                raise PermissionError(13, "Permission denied")
            return look_at(path)

        def attempt() -> None:
            with patch.object(foreign, "look_at", failing):
                build(FLAT, model, {"from": str(folder / "good")})
        return attempt

    def unreadable(self: Any, *args: Any, **kwargs: Any) -> None:
        if rank == 1:
            raise RuntimeError("cannot map the file")
        load(self, *args, **kwargs)

    def from_deepspeed() -> None:
        with patch.object(DeepSpeedEngine, "load_module_state_dict", unreadable):
            build(FLAT, model, {}).load_checkpoint(str(folder / "good"))

    def resume(name: str) -> Callable[[], None]:
        return lambda: build(FLAT, model, {}).load_checkpoint(str(folder / name))

    return caught([look(0), look(1), resume("binary"), resume("rank"), resume("key"), resume("expert"), from_deepspeed])


def test_what_one_rank_cannot_read_is_an_error_on_all(pool2: WorkerPool, tmp_path: Path) -> None:
    pool2.run(save, FLAT, tmp_path / "good")
    for name in ("binary", "rank", "key", "expert"):
        shutil.copytree(tmp_path / "good", tmp_path / name)
    (tmp_path / "binary" / "latest").write_bytes(b"\xff\xfe\0")
    tag = "global_step3"
    mended(tmp_path / "key" / tag, "megatron_ext_rank_00001_states.pt", lambda content: content.pop("numpy"))
    experts = [path.name for path in (tmp_path / "good" / tag).glob("layer_*_expert_1_*")]
    for name, lost in (("rank", "megatron_ext_rank_00001_states.pt"), ("expert", experts[0])):
        path = tmp_path / name / tag / "megatron_ext.json"
        manifest = json.loads(path.read_text())
        del manifest["files"][lost]
        path.write_text(json.dumps(manifest))
        (tmp_path / name / tag / lost).unlink()
    found = pool2.run(lonely_failures, tmp_path, timeout=60)
    state = f"{tag}/megatron_ext_rank_00001_states.pt"
    wanted = ("good: cannot be read (PermissionError: [Errno 13] Permission denied)", "", "binary: cannot be read (Uni",
              f"{state}: cannot be read (FileNotFoundError", f"{state}: has no 'numpy'", "(FileNotFoundError",
              f"{tag}: cannot be read (RuntimeError: cannot map the file)")
    assert [message for _, message, _ in found[0]] == [message for _, message, _ in found[1]]
    for (kind, message, _), text in zip(found[0], wanted, strict=True):
        assert kind == ("CheckpointError" if text else "nothing") and text in message, message


# -- an optimizer's state in part


def change_carried(folder: Path, lost: str = "", step: int | None = 12) -> None:
    path = folder / CARRIED / "carried-00001.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if name != lost}, path)
    facts = json.loads((folder / CARRIED / FACTS).read_text())
    facts.pop("step")
    (folder / CARRIED / FACTS).write_text(json.dumps(facts if step is None else {**facts, "step": step}))


def loads_in_part(folder: Path, optimizer: bool) -> tuple[list[tuple[str, str, int | None]], int]:
    """What is found wrong, and how often a load came to changing something."""
    def load(name: str) -> Callable[[], None]:
        source = folder / name
        return lambda: build(FLAT, DeepSeekV3Config.from_hf(source), {"from": str(source), "optimizer": optimizer})

    with patch.object(restoring, "restore", side_effect=restoring.restore) as restore:
        return caught([load(name) for name in ("stepless", "one", "expert", "master")]), restore.call_count


def test_state_in_part_is_refused_before_anything_is_changed(pool2: WorkerPool, tmp_path: Path) -> None:
    expert, both = "model.layers.1.mlp.experts.2.up_proj.weight", ("exp_avg", "exp_avg_sq")
    for name, states in (("stepless", both), ("one", ("exp_avg",)), ("expert", both), ("master", ("fp32",))):
        trained(tmp_path / name, *states)
    change_carried(tmp_path / "stepless", step=None)
    change_carried(tmp_path / "expert", f"{expert}@exp_avg_sq")
    change_carried(tmp_path / "master", f"{expert}@fp32")
    wanted = ("would have moments and no step", "is there without exp_avg_sq; the checkpoint has exp_avg, and Adam",
              f"tensor {expert}@exp_avg_sq is missing", f"tensor {expert}@fp32 is missing")
    for optimizer in (True, False):
        for rank, restored in pool2.run(loads_in_part, tmp_path, optimizer):
            assert restored == (0 if optimizer else 3)
            for (kind, message, _), text in zip(rank, wanted, strict=True):
                bad = optimizer or "fp32" in text
                assert kind == ("CheckpointError" if bad else "nothing") and (text in message or not bad), message
