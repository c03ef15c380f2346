"""Every pair of formats and back: bit for bit, whatever the model; and DeepSeek's layout as DeepSeek writes it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_ext.checkpoint.convert import open_checkpoint
from megatron_ext.checkpoint.convert.verify import differences
from tests.checkpoint import tiny
from tests.checkpoint.tiny import convert, equal, load, make

MODELS: list[dict[str, Any]] = [
    dict(family=family, q_lora=q_lora, mtp=mtp, tied=tied, dense=dense)
    for (family, q_lora, tied), (mtp, dense) in zip(
        itertools.product(("v3", "v2"), (True, False), (False, True)),
        [(0, 0), (1, 1), (2, 3), (1, 0), (2, 1), (0, 3), (1, 1), (2, 0)], strict=True)]


@pytest.mark.parametrize("settings", MODELS, ids=lambda settings: "-".join(map(str, settings.values())))
@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp8"])
def test_to_deepseek_and_back(tmp_path: Path, settings: dict[str, Any], dtype: str) -> None:
    source = make(tmp_path / "source", dtype, shards=2, layers=4, **settings)
    there = convert(source, tmp_path / "there", "deepseek")
    back = convert(there, tmp_path / "back", "hf")
    assert equal(load(source), load(back))
    for name in ("config.json", "tokenizer_config.json"):
        assert (source / name).read_bytes() == (back / name).read_bytes()


def test_fp8_through_every_other_dtype_and_format(tmp_path: Path) -> None:
    """With partial blocks (576 rows, 200 columns) and scales in other shards than their weights (trap 22)."""
    source = make(tmp_path / "source", "fp8", shards=3, mtp=1, wide=True)
    original = load(source)
    assert original["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (5, 2)
    bf16 = convert(source, tmp_path / "bf16", "hf", "bf16")
    assert {t.dtype for name, t in load(bf16).items() if "bias" not in name} == {torch.bfloat16}
    ranks = convert(bf16, tmp_path / "ranks", "deepseek", mp=4)
    other = convert(ranks, tmp_path / "other", "deepseek", mp=2)
    again = convert(other, tmp_path / "again", "hf", "fp8", shard_bytes=500_000)
    assert equal(original, load(again)) and len(list(again.glob("*.safetensors"))) > 3
    assert (again / "config.json").read_bytes() == (source / "config.json").read_bytes()
    fp32 = convert(source, tmp_path / "fp32", "hf", "fp32")
    assert equal(original, load(convert(fp32, tmp_path / "direct", "hf", "fp8")))
    through = convert(bf16, tmp_path / "through", "hf", "fp32")
    long = convert(through, tmp_path / "long", "deepseek", "fp8", mp=2)
    assert equal(original, load(convert(long, tmp_path / "end", "hf")))


def test_the_bias_stays_fp32_to_the_bit(tmp_path: Path) -> None:
    """Whatever the dtype (traps 1 and 3)."""
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    source = make(tmp_path / "source", "fp8")
    for dtype in ("bf16", "fp32"):
        found = load(convert(source, tmp_path / dtype, "hf", dtype))[name]
        assert found.dtype == torch.float32 and torch.equal(found, load(source)[name]) and found.any()


def test_blocks_of_zeros_whose_scale_is_zero_come_back(tmp_path: Path) -> None:
    values = tiny.config(wide=True)
    tensors = tiny.tensors_of(values, "fp8")
    name = "model.layers.0.mlp.gate_proj.weight"
    tensors[name].view(torch.uint8)[:128, :128] = 0
    tensors[name].view(torch.uint8)[0, 0] = 0x80  # minus zero
    tensors[name + "_scale_inv"][0, 0] = 0
    source = tiny.save(tmp_path / "source", values, tensors)
    bf16 = convert(source, tmp_path / "bf16", "hf", "bf16")
    assert equal(tensors, load(convert(bf16, tmp_path / "back", "hf", "fp8")))


def test_quantising_anew_is_our_quantisation(tmp_path: Path) -> None:
    """Weights that never were FP8: 128x128 blocks of fp8.quantize, everything else in BF16; cut for ranks too."""
    settings: dict[str, Any] = dict(wide=True, mtp=1)
    source = make(tmp_path / "source", "fp32", **settings)
    fp8 = load(convert(source, tmp_path / "fp8", "hf", "fp8"))
    expected = tiny.tensors_of(tiny.config(**settings), "fp8")
    assert equal(fp8, expected)
    ranks = convert(source, tmp_path / "ranks", "deepseek", "fp8", mp=2)
    assert equal(load(convert(ranks, tmp_path / "back", "hf")), expected)
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]


def theirs(folder: Path, mp: int, experts: int, mtp_layer: str) -> list[tiny.Tensors]:
    """What inference/convert.py of deepseek-ai/DeepSeek-V3 makes of a folder, in its own way: word by word."""
    words = {"embed_tokens": ("embed", 0), "input_layernorm": ("attn_norm", None), "q_a_proj": ("wq_a", None),
             "post_attention_layernorm": ("ffn_norm", None), "q_proj": ("wq", 0), "q_a_layernorm": ("q_norm", None),
             "q_b_proj": ("wq_b", 0), "kv_a_proj_with_mqa": ("wkv_a", None), "kv_a_layernorm": ("kv_norm", None),
             "kv_b_proj": ("wkv_b", 0), "o_proj": ("wo", 1), "gate": ("gate", None), "gate_proj": ("w1", 0),
             "down_proj": ("w2", 1), "up_proj": ("w3", 0), "norm": ("norm", None), "lm_head": ("head", 0)}
    ranks: list[tiny.Tensors] = [{} for _ in range(mp)]
    for name, tensor in load(folder).items():
        if mtp_layer in name:
            continue
        name = name.removeprefix("model.").replace("self_attn", "attn").replace("mlp", "ffn")
        name = name.replace("weight_scale_inv", "scale").replace("e_score_correction_bias", "bias")
        key = name.split(".")[-2]
        word, dim = words[key]
        name = name.replace(key, word)
        for rank in range(mp):
            if "experts" in name and "shared_experts" not in name:
                if int(name.split(".")[-3]) // (experts // mp) == rank:
                    ranks[rank][name] = tensor
            else:
                ranks[rank][name] = tensor if dim is None else tensor.chunk(mp, dim)[rank].contiguous()
    return ranks


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("mp", [1, 2, 4])
def test_deepseek_layout_is_what_deepseek_writes(tmp_path: Path, dtype: str, mp: int) -> None:
    source = make(tmp_path / "source", dtype, mtp=1, wide=True)
    there = convert(source, tmp_path / "there", "deepseek", mp=mp)
    for rank, expected in enumerate(theirs(source, mp, 4, "model.layers.2")):
        assert equal(load_file(there / f"model{rank}-mp{mp}.safetensors"), expected)


def test_a_tied_model_gets_the_head_that_deepseek_has(tmp_path: Path) -> None:
    source = make(tmp_path / "source", tied=True)
    there = convert(source, tmp_path / "there", "deepseek", mp=2)
    tensors = load_file(there / "model1-mp2.safetensors")
    assert torch.equal(tensors["head.weight"], tensors["embed.weight"])


def test_the_same_in_any_number_of_files_and_workers(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "fp8", mtp=1)
    one = convert(source, tmp_path / "one", "hf", "bf16", shard_bytes=30_000)
    two = convert(source, tmp_path / "two", "hf", "bf16", workers=2, shard_bytes=30_000)
    assert tiny.files(one) == tiny.files(two) and len(list(one.glob("*.safetensors"))) == 3
    index = json.loads((one / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in load(one).values())


def test_diff_names_what_differs_across_formats(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "fp8", mtp=1)
    there = convert(source, tmp_path / "there", "deepseek")
    assert not list(differences(open_checkpoint(source), open_checkpoint(there)))
    tensors, name = load(source), "model.layers.1.mlp.experts.3.down_proj.weight_scale_inv"
    tensors[name] = tensors[name] * 1.5
    changed = tiny.save(tmp_path / "changed", json.loads((source / "config.json").read_text()), tensors)
    (found,) = differences(open_checkpoint(changed), open_checkpoint(there))
    assert found.name == name.removesuffix("_scale_inv") and found.relative == pytest.approx(1 / 3, rel=1e-3)
    without = {name: tensor for name, tensor in load(source).items() if "layers.2." not in name}
    other = tiny.save(tmp_path / "other", tiny.config(mtp=0), without)
    assert {d.name.split(".")[2] for d in differences(open_checkpoint(source), open_checkpoint(other))} == {"2"}
