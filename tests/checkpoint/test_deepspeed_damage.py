"""Checkpoints of DeepSpeed that are damaged, hostile, or of a kind that is refused: one line each."""

from __future__ import annotations

import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint.convert import make_plan, named, open_checkpoint
from megatron_ext.config.errors import CheckpointError
from tests.checkpoint import tiny
from tests.checkpoint.trained import STOCK, VALUES, configured, rewrite, save_stock, stock_engine, transformers_model
from tests.distributed.pool import WorkerPool


def drop_a_shard(folder: Path) -> None:
    (folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()


def cut_a_shard(folder: Path) -> None:
    path = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    os.truncate(path, path.stat().st_size // 2)


def add_a_weight(folder: Path) -> None:
    rewrite(folder / "mp_rank_00_model_states.pt",
            lambda tree: tree["module"].update({"model.layers.1.mlp.strange.weight": torch.ones(2)}))


def lose_a_weight(folder: Path) -> None:
    rewrite(folder / "mp_rank_00_model_states.pt", lambda tree: tree["module"].pop("model.norm.weight"))


def change_a_shape(folder: Path) -> None:
    rewrite(folder / "mp_rank_00_model_states.pt",
            lambda tree: tree["module"].update({"model.norm.weight": torch.ones(31)}))


def shorten_a_run(folder: Path) -> None:
    def change(tree: Any) -> None:
        mapping = tree["optimizer_state_dict"]["param_slice_mappings"][0]
        next(iter(mapping.values())).numel -= 1
    rewrite(folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt", change)


def move_a_run_out(folder: Path) -> None:
    def change(tree: Any) -> None:
        next(iter(tree["optimizer_state_dict"]["param_slice_mappings"][0].values())).start = 10**9
    rewrite(folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt", change)


def mix_two_steps(folder: Path) -> None:
    def change(tree: Any) -> None:
        tree["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["step"] = torch.tensor(7.0)
    rewrite(folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt", change)


def leave_another_save(folder: Path) -> None:
    (folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"")


def lead_elsewhere(folder: Path) -> None:
    (folder.parent / "latest").write_text("../elsewhere")


def claim_tensor_parallelism(folder: Path) -> None:
    rewrite(folder / "mp_rank_00_model_states.pt",
            lambda tree: tree["checkpoint_parallel_dimensions"].update(tp_degree=2))


def claim_a_second_rank(folder: Path) -> None:
    rewrite(folder / "mp_rank_00_model_states.pt",
            lambda tree: tree["checkpoint_parallel_dimensions"].update(pp_degree=2))


def claim_experts(folder: Path) -> None:
    rewrite(folder / "mp_rank_00_model_states.pt", lambda tree: tree.update(num_experts=[4]))


class Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def put_a_bomb(folder: Path) -> None:
    path = folder / "mp_rank_00_model_states.pt"
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(name, pickle.dumps(Bomb()) if name.endswith("data.pkl") else content)


DAMAGE = [
    (drop_a_shard, r"zero_pp_rank_1_mp_rank_00_optim_states\.pt: does not exist; .* by 2 data-parallel ranks"),
    (cut_a_shard, r"zero_pp_rank_1_mp_rank_00_optim_states\.pt: is no archive"),
    (add_a_weight, r"tensor model\.layers\.1\.mlp\.strange\.weight has no place"),
    (lose_a_weight, r"tensor model\.norm\.weight has optimizer state and no weight"),
    (change_a_shape, r"mp_rank_00_model_states\.pt: tensor model\.norm\.weight has shape \(31,\)"),
    (shorten_a_run, r"rank_\*_mp_rank_00_optim_states\.pt: tensor \S+ have \d+ numbers of fp32"),
    (move_a_run_out, r"rank_1_mp_rank_00_optim_states\.pt: tensor \S+ says that numbers 1000000000 to"),
    (mix_two_steps, r"rank_1_mp_rank_00_optim_states\.pt: tensor \S+ is at step 7, and at 2 in another shard"),
    (leave_another_save, r"two checkpoints were saved under one tag"),
    (lead_elsewhere, r"latest: names the file '\.\./elsewhere'"),
    (claim_tensor_parallelism, r"mp_rank_00_model_states\.pt: is of 2 tensor-parallel ranks"),
    (claim_a_second_rank, r"mp_rank_01_model_states\.pt: does not exist; .* by 2 model-parallel ranks"),
    (claim_experts, r"mp_rank_00_model_states\.pt: has DeepSpeed's own experts"),
    (put_a_bomb, r"mp_rank_00_model_states\.pt: names '(posix|os)\.system'"),
]


@pytest.fixture(scope="module")
def stock_checkpoint(tmp_path_factory: pytest.TempPathFactory, pool2: WorkerPool) -> dict[str, bytes]:
    """The files of a ZeRO-1 checkpoint."""
    saved = configured(tmp_path_factory.mktemp("stock"))
    pool2.run(save_stock, str(saved), STOCK["ZeRO-1"])
    return tiny.files(saved)


def unpack(files: dict[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[damage.__name__ for damage, _ in DAMAGE])
def test_damage_is_named_in_one_line(damage: Any, message: str, stock_checkpoint: dict[str, bytes],
                                     tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpack(stock_checkpoint, tmp_path)
    monkeypatch.chdir(tmp_path)
    open_checkpoint(tmp_path)
    damage(tmp_path / "global_step2")
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "executed").exists()


def test_flipped_bytes_end_in_one_line_or_not_at_all(stock_checkpoint: dict[str, bytes], tmp_path: Path) -> None:
    chance = random.Random(3)
    unpack(stock_checkpoint, tmp_path)
    names = sorted(name for name in stock_checkpoint if name.endswith(".pt"))
    refused = 0
    for _ in range(80):
        name = chance.choice(names)
        content = bytearray(stock_checkpoint[name])
        pickled = content.index(b"\x80\x02")  # where the pickle begins; a third of the flips fall behind it
        for _ in range(chance.choice((1, 3))):
            content[pickled + chance.randrange(min(len(content) - pickled, 6000))] ^= 1 << chance.randrange(8)
        (tmp_path / name).write_bytes(content)
        try:
            open_checkpoint(tmp_path)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
        (tmp_path / name).write_bytes(stock_checkpoint[name])
    assert refused > 20
    open_checkpoint(tmp_path)


@pytest.mark.parametrize(("settings", "message"), [
    ({"zero_optimization": {"stage": 3}}, r"is of ZeRO-3, where every rank has a part of every tensor; .*universal"),
    ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, r"round_robin_gradients.*--optimizer drop"),
], ids=["ZeRO-3", "round robin"])
def test_what_cannot_be_told_apart_is_refused(settings: dict[str, Any], message: str, tmp_path: Path,
                                              pool2: WorkerPool) -> None:
    saved = configured(tmp_path / "saved")
    pool2.run(save_stock, str(saved), settings)
    with pytest.raises(CheckpointError, match=message):
        make_plan(open_checkpoint(saved), named("hf"))
    if settings["zero_optimization"]["stage"] < 3:
        make_plan(open_checkpoint(saved), named("hf"), optimizer="drop")


def test_two_groups_without_zero_are_not_guessed(tmp_path: Path, pool2: WorkerPool) -> None:
    saved = configured(tmp_path / "saved")
    pool2.run(save_grouped, str(saved))
    with pytest.raises(CheckpointError, match=r"has 2 parameter groups.*--optimizer drop"):
        make_plan(open_checkpoint(saved), named("hf"))


def save_grouped(folder: str) -> None:
    stock_engine(transformers_model(1), {}, groups=True).save_checkpoint(folder)


def test_a_config_is_needed_and_found_beside_the_tag(stock_checkpoint: dict[str, bytes], tmp_path: Path) -> None:
    unpack(stock_checkpoint, tmp_path)
    assert open_checkpoint(tmp_path / "global_step2").model.hf == VALUES
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="pass --config"):
        open_checkpoint(tmp_path)
