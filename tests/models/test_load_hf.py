"""Folders that cannot be loaded, each named by file and tensor; and those that can although they look odd."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext import checkpoint
from megatron_ext.checkpoint import native
from megatron_ext.config import errors
from megatron_ext.models import CheckpointError, DeepSeekV3, DeepSeekV3Config, huggingface

CONFIG = DeepSeekV3Config(
    vocab_size=20, hidden_size=16, intermediate_size=12, moe_intermediate_size=6, num_hidden_layers=2,
    num_attention_heads=2, n_routed_experts=4, num_experts_per_tok=2, kv_lora_rank=8, qk_nope_head_dim=4,
    qk_rope_head_dim=4, v_head_dim=4, first_k_dense_replace=1)
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = DeepSeekV3(CONFIG)
    torch.nn.init.normal_(model.model.layers[1].mlp.gate.e_score_correction_bias)
    model.save_hf(tmp_path)
    return tmp_path


def edit(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def shard(folder: Path) -> tuple[Path, Path, Path]:
    """Cuts the single file into two with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [f"model-{i}-of-2.safetensors" for i in (1, 2)]
    placed = {name: files[i % 2] for i, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({name: tensors[name] for name in tensors if placed[name] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder / files[0], folder / files[1], index


def refusal(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        DeepSeekV3.load_hf(folder)
    return caught.value


def assert_loads(folder: Path, expected: Tensors) -> DeepSeekV3:
    model = DeepSeekV3.load_hf(folder)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    return model


def test_what_was_saved_is_loaded(folder: Path) -> None:
    """The bias too, and from shards (traps 3 and 22)."""
    tensors = load_file(folder / "model.safetensors")
    bias = tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.any()
    whole = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    model = assert_loads(folder, whole)
    assert torch.equal(model.model.layers[1].mlp.experts.up_proj[2], tensors[EXPERT])
    shard(folder)
    assert_loads(folder, dict(model.state_dict()))


def test_loading_draws_nothing_and_leaves_no_number_unset(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = DeepSeekV3(CONFIG)
    for name in ("normal_", "uniform_"):
        draw = getattr(torch.Tensor, name)

        def refuse(tensor: torch.Tensor, *args: object, draw: Callable = draw, **kwargs: object) -> torch.Tensor:
            assert tensor.is_meta, "numbers were drawn that the file is about to replace"
            return draw(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, refuse)
    state = torch.get_rng_state()
    model = DeepSeekV3.load_hf(folder, torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: str(b.dtype) for name, b in model.named_buffers()} == {
        name: str(b.dtype) for name, b in built.named_buffers()}
    in_file = model.state_dict()
    for name, buffer in built.named_buffers():
        assert name in in_file or torch.equal(model.get_buffer(name), buffer)
    for (name, ours), (same, theirs) in zip(model.named_parameters(), built.named_parameters(), strict=True):
        assert name == same and vars(ours) == vars(theirs) and ours.requires_grad
        assert ours.dtype == torch.bfloat16 and not ours.is_meta


def test_saving_in_shards(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = DeepSeekV3.load_hf(folder)
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 2000)
    model.save_hf(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("model-*-of-*.safetensors"))) > 2
    assert_loads(tmp_path / "sharded", dict(model.state_dict()))


def test_one_class_for_checkpoints_of_any_kind() -> None:
    assert checkpoint.CheckpointError is CheckpointError is native.CheckpointError is errors.CheckpointError
    ours = CheckpointError(Path("a/b"), "has 3 bytes", "it had 4 when it was saved", "restore it")
    assert str(ours) == "checkpoint a/b: has 3 bytes; it had 4 when it was saved; restore it" and ours.tensor is None
    theirs = CheckpointError(Path("a/b"), "is missing", tensor="model.norm.weight")
    assert str(theirs) == "checkpoint a/b: tensor model.norm.weight is missing"
    back = pickle.loads(pickle.dumps(theirs))
    assert (back.path, back.tensor, str(back)) == (Path("a/b"), "model.norm.weight", str(theirs))


def test_saving_over_an_old_model_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors: already exists"):
        DeepSeekV3(CONFIG).save_hf(folder)


@pytest.mark.parametrize("name", [EXPERT, "model.norm.weight", "lm_head.weight",
                                  "model.layers.1.mlp.gate.e_score_correction_bias"])
def test_missing(folder: Path, name: str) -> None:
    edit(folder, lambda tensors: tensors.pop(name))
    error = refusal(folder)
    assert (error.path, error.tensor) == (folder / "model.safetensors", name)
    assert "is missing" in str(error)


@pytest.mark.parametrize("name", [
    "model.layers.1.mlp.experts.4.up_proj.weight", "model.layers.2.input_layernorm.weight",
    "model.layers.0.self_attn.q_proj.bias", "model.layers.1.eh_proj.weight"])
def test_unexpected(folder: Path, name: str) -> None:
    edit(folder, lambda tensors: tensors.update({name: torch.zeros(16)}))
    error = refusal(folder)
    assert (error.path, error.tensor) == (folder / "model.safetensors", name)
    assert "has no place" in str(error)


def test_another_shape(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({EXPERT: tensors[EXPERT].T.contiguous()}))
    error = refusal(folder)
    assert error.tensor == EXPERT
    assert "(16, 6), but config.json makes it (6, 16)" in str(error)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32])
def test_another_format(folder: Path, dtype: torch.dtype) -> None:
    edit(folder, lambda tensors: tensors.update({EXPERT: tensors[EXPERT].to(dtype)}))
    error = refusal(folder)
    assert error.tensor == EXPERT
    assert "only BF16 and F32 are read" in str(error)


def test_fp8(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({EXPERT: tensors[EXPERT].to(torch.float8_e4m3fn)}))
    assert "convert FP8 checkpoints to BF16 first" in str(refusal(folder))
    edit(folder, lambda tensors: tensors.update({f"{EXPERT}_scale_inv": torch.ones(1, 1)}))
    error = refusal(folder)
    assert error.tensor == f"{EXPERT}_scale_inv"
    assert "FP8 checkpoint; convert it to BF16" in str(error)


def test_mtp_layers_are_passed_over(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    extra = {f"model.layers.2.{name}": torch.zeros(3) for name in ("eh_proj.weight", "enorm.weight", "mlp.gate.weight")}
    edit(folder, lambda tensors: tensors.update(extra))
    DeepSeekV3.load_hf(folder)
    assert [record.message for record in caplog.records] == ["passed over multi-token prediction: model.layers.2"]


def test_rotary_tables_of_old_files(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}))
    DeepSeekV3.load_hf(folder)


def test_tied_head_on_disk(tmp_path: Path) -> None:
    config = DeepSeekV3Config.from_hf(CONFIG.to_hf() | {"tie_word_embeddings": True})
    DeepSeekV3(config).save_hf(tmp_path)
    DeepSeekV3.load_hf(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    DeepSeekV3.load_hf(tmp_path)
    edit(tmp_path, lambda tensors: tensors["lm_head.weight"].add_(1))
    assert refusal(tmp_path).tensor == "lm_head.weight"


def test_no_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "holds neither" in str(refusal(folder))


@pytest.mark.parametrize("size", [0, 4, 300, -1])
def test_truncated(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    error = refusal(folder)
    assert error.path == file
    assert "is damaged" in str(error)


def test_absent_shard(folder: Path) -> None:
    _, second, _ = shard(folder)
    second.unlink()
    error = refusal(folder)
    assert error.path == second
    assert "does not exist" in str(error)


def test_tensor_in_two_shards(folder: Path) -> None:
    first, second, _ = shard(folder)
    name = min(load_file(second))
    save_file(load_file(first) | {name: load_file(second)[name]}, first)
    error = refusal(folder)
    assert (error.path, error.tensor) == (second, name)
    assert f"is also in {first.name}" in str(error)


def test_shards_that_disagree_with_the_index(folder: Path) -> None:
    first, second, index = shard(folder)
    moved = load_file(first)
    name = min(moved)
    save_file(load_file(second) | {name: moved.pop(name)}, second)
    save_file(moved, first)
    assert (refusal(folder).path, refusal(folder).tensor) == (first, name)
    content = json.loads(index.read_text())
    del content["weight_map"][name]
    index.write_text(json.dumps(content))
    assert (refusal(folder).path, refusal(folder).tensor) == (second, name)
    assert "is not in model.safetensors.index.json" in str(refusal(folder))


@pytest.mark.parametrize("target", ["../model-1-of-2.safetensors", "/etc/passwd", "a/../../b.safetensors",
                                    "..\\b.safetensors", "C:\\b.safetensors"])
def test_index_that_leaves_the_folder(folder: Path, target: str) -> None:
    _, _, index = shard(folder)
    content = json.loads(index.read_text())
    content["weight_map"][EXPERT] = target
    index.write_text(json.dumps(content))
    error = refusal(folder)
    assert (error.path, error.tensor) == (index, EXPERT)
    assert "outside the folder" in str(error)


@pytest.mark.parametrize("content", [
    "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "x", "a": "y"}}'])
def test_no_index(folder: Path, content: str) -> None:
    _, _, index = shard(folder)
    index.write_text(content)
    error = refusal(folder)
    assert error.path == index
    assert "is not an index" in str(error)


def test_a_large_model_is_checked_before_it_is_built(folder: Path) -> None:
    """No machine holds what this configuration asks for."""
    (folder / "config.json").write_text(json.dumps(CONFIG.to_hf() | {"vocab_size": 1 << 44}))
    assert "has shape (20, 16), but config.json makes it (17592186044416, 16)" in str(refusal(folder))
