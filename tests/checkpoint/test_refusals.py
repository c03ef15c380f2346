"""Checkpoints that are damaged, incomplete or hostile: one line with file and tensor, and nothing is written."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint.convert import FORMATS, Options, make_plan, named, open_checkpoint, run
from megatron_ext.checkpoint.convert.model import Model
from megatron_ext.checkpoint.convert.source import MANIFEST
from megatron_ext.config.errors import CheckpointError, UserError
from tests.checkpoint import tiny
from tests.checkpoint.tiny import convert, make

INDEX = "model.safetensors.index.json"
Header = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path / "source", "fp8", shards=2, mtp=1)


def refusal(folder: Path, to: str = "hf") -> str:
    """The error of a conversion; it has written nothing."""
    out = folder.parent / "out"
    with pytest.raises(UserError) as caught:
        run(make_plan(open_checkpoint(folder), named(to)), out)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    assert not out.exists() and not list(folder.parent.glob("*.converting"))
    return message


def edit_header(path: Path, change: Callable[[Header], Any]) -> None:
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:8 + length])
    text = change(header)
    if not isinstance(text, bytes):
        text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length:])


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_tensors(folder: Path, change: Callable[[tiny.Tensors], Any]) -> Path:
    """The same model with other tensors, in one file."""
    tensors = tiny.load(folder)
    change(tensors)
    config = json.loads((folder / "config.json").read_text())
    return tiny.save(folder.parent / "edited", config, tensors)


def first(folder: Path) -> Path:
    return folder / "model-00001-of-00002.safetensors"


WEIGHT = "model.layers.1.mlp.experts.2.down_proj.weight"
BY_TENSOR: dict[str, tuple[Callable[[tiny.Tensors], Any], str, str]] = {
    "weight missing": (lambda t: t.pop("model.norm.weight"), "model.norm.weight", "is missing"),
    "expert missing": (lambda t: (t.pop(WEIGHT), t.pop(WEIGHT + "_scale_inv")), WEIGHT, "is missing"),
    "weight without scale": (lambda t: t.pop(WEIGHT + "_scale_inv"), WEIGHT, "its scale is missing"),
    "scale without weight": (lambda t: t.pop(WEIGHT), WEIGHT, ""),
    "scale of a weight that has none": (
        lambda t: t.update({WEIGHT: t[WEIGHT].float()}), WEIGHT + "_scale_inv", "its weight is F32"),
    "shape": (lambda t: t.update({WEIGHT: t[WEIGHT].T.contiguous()}), WEIGHT, "has shape|is .*but config.json"),
    "shape of a scale": (
        lambda t: t.update({WEIGHT + "_scale_inv": torch.ones(2, 1)}), WEIGHT + "_scale_inv", "config.json makes it"),
    "dtype of a scale": (
        lambda t: t.update({WEIGHT + "_scale_inv": torch.ones(1, 1, dtype=torch.bfloat16)}), WEIGHT + "_scale_inv",
        "scales are F32"),
    "unknown key": (lambda t: t.update({"model.layers.1.mlp.extra.weight": torch.ones(2)}), "mlp.extra", "no place"),
    "unknown scale": (lambda t: t.update({"model.norm.weight_scale_inv": torch.ones(1)}), "model.norm", "scale"),
    "unknown state": (lambda t: t.update({"model.norm.weight@momentum": torch.ones(32)}), "@momentum", "no place"),
    "bias missing": (lambda t: t.pop("model.layers.1.mlp.gate.e_score_correction_bias"), "correction_bias", "missing"),
    "norm of multi-token prediction missing": (
        lambda t: t.pop("model.layers.2.enorm.weight"), "layers.2.enorm", "missing.*num_nextn_predict_layers"),
    "dtype that no model has": (
        lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int64)}), "model.norm.weight", "is 'I64'"),
}


@pytest.mark.parametrize("case", BY_TENSOR)
@pytest.mark.parametrize("to", ["hf", "deepseek"])
def test_tensors_that_do_not_make_the_model(folder: Path, case: str, to: str) -> None:
    change, tensor, words = BY_TENSOR[case]
    message = refusal(edit_tensors(folder, change), to)
    assert tensor in message and "edited" in message
    assert re.search(words, message)


def test_files_that_are_not_whole(folder: Path) -> None:
    path, content = first(folder), first(folder).read_bytes()
    for cut in (len(content) - 1, len(content) // 2, 100, 9, 7, 0):
        path.write_bytes(content[:cut])
        assert path.name in refusal(folder)
    path.write_bytes(content + b"x")
    assert path.name in refusal(folder)
    path.unlink()
    assert path.name in refusal(folder) and "does not exist" in refusal(folder)
    path.mkdir()
    assert path.name in refusal(folder)


HEADERS: dict[str, Callable[[Header], Any]] = {
    "dtype": lambda h: h[WEIGHT].update(dtype="F8_E9"), "shape": lambda h: h[WEIGHT].update(shape=[1 << 40, 1 << 40]),
    "negative": lambda h: h[WEIGHT].update(shape=[-32, -12]), "text": lambda h: h[WEIGHT].update(shape="32"),
    "bool": lambda h: h[WEIGHT].update(shape=[True, 384]), "float": lambda h: h[WEIGHT].update(shape=[384.0]),
    "offsets": lambda h: h[WEIGHT].update(data_offsets=[0, 384]),
    "back": lambda h: h[WEIGHT].update(data_offsets=[9, 1]),
    "huge": lambda h: h[WEIGHT].update(data_offsets=[1 << 62, (1 << 62) + 384]),
    "none": lambda h: h.update({WEIGHT: None}), "extra": lambda h: h[WEIGHT].update(more=1),
    "hole": lambda h: h.pop(WEIGHT), "metadata": lambda h: h.update(__metadata__={"a": 1}),
    "list": lambda h: b"[]", "deep": lambda h: b"[" * 200_000, "nothing": lambda h: b"",
    "twice": lambda h: json.dumps(h)[:-1].encode() + b', "x": 1, "x": 2}',
    "digits": lambda h: b'{"a": ' + b"9" * 10_000 + b"}", "bytes": lambda h: b"\xff\xfe{}",
    "name": lambda h: h.update({"a\nb": h.pop(WEIGHT)}),
    "overlap": lambda h: h[WEIGHT].update(next(h[n] for n in h if n.endswith("up_proj.weight"))),
    "infinite": lambda h: b'{"x": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, NaN]}}',
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_lie(folder: Path, case: str) -> None:
    path = next(path for path in folder.glob("*.safetensors") if WEIGHT in tiny.load_file(path))
    edit_header(path, HEADERS[case])
    assert path.name in refusal(folder)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/../../secret.safetensors", "", ".", "..",
                                  "C:\\secret", "a\\b", "a\0b", "x" * 5000, "./model.safetensors", "a//b", "a\nb"])
def test_names_in_an_index_do_not_lead_outside(folder: Path, name: str) -> None:
    shutil.copy(first(folder), folder.parent / "secret.safetensors")
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": name}))
    assert "not plainly inside the folder" in refusal(folder)


def test_links_are_refused_unless_wanted(folder: Path) -> None:
    """A file, the index, a folder on the way; the cache of Hugging Face is made of links."""
    for name in (first(folder).name, INDEX, "config.json"):
        moved = folder.parent / "elsewhere"
        os.rename(folder / name, moved)
        os.symlink(moved, folder / name)
        assert name in refusal(folder) and "symbolic link" in refusal(folder) and "--follow-links" in refusal(folder)
        plan = make_plan(open_checkpoint(folder, follow_links=True), named("hf"))
        run(plan, folder.parent / "followed")
        shutil.rmtree(folder.parent / "followed")
        (folder / name).unlink()
        os.rename(moved, folder / name)
    os.mkfifo(folder / "model.safetensors")
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": "model.safetensors"}))
    assert "not a plain file" in refusal(folder)


def test_a_document_that_is_a_link_is_not_copied(folder: Path) -> None:
    (folder / "tokenizer.json").symlink_to("/etc/passwd")
    assert "tokenizer.json: is a symbolic link" in refusal(folder)


INDEXES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no map": lambda i: i.pop("weight_map"), "list": lambda i: i.update(weight_map=[]),
    "empty": lambda i: i.update(weight_map={}), "number": lambda i: i["weight_map"].update({"model.norm.weight": 3}),
    "left out": lambda i: i["weight_map"].pop("model.norm.weight"),
    "elsewhere": lambda i: i["weight_map"].update(
        {"model.norm.weight": "model-0000{}-of-00002.safetensors".format(
            3 - int(i["weight_map"]["model.norm.weight"][10]))}),
    "more": lambda i: i["weight_map"].update({"no.such": "model-00001-of-00002.safetensors"}),
}


@pytest.mark.parametrize("case", INDEXES)
def test_indexes_that_lie(folder: Path, case: str) -> None:
    edit_json(folder / INDEX, INDEXES[case])
    assert str(folder) in refusal(folder)


def test_a_tensor_in_two_files_and_files_of_two_models(folder: Path) -> None:
    shutil.copy(first(folder), folder / "model-00003-of-00003.safetensors")
    assert "is not named by" in refusal(folder)
    edit_json(folder / INDEX, lambda index: index["weight_map"].update(
        {sorted(index["weight_map"])[0]: "model-00003-of-00003.safetensors"}))
    assert "is also in" in refusal(folder)


@pytest.mark.parametrize(("key", "value"), [
    ("hidden_size", 64), ("num_hidden_layers", 3), ("num_hidden_layers", 10**9), ("n_routed_experts", 8),
    ("vocab_size", 1 << 62), ("model_type", "llama"), ("q_lora_rank", None), ("hidden_size", "32"),
    ("num_nextn_predict_layers", 10**6), ("num_nextn_predict_layers", -1), ("num_nextn_predict_layers", "x"),
    ("n_routed_experts", 10**9), ("first_k_dense_replace", 2), ("topk_method", "greedy"), ("kv_lora_rank", 1e300)])
def test_configs_of_other_models(folder: Path, key: str, value: Any) -> None:
    edit_json(folder / "config.json", lambda config: config.update({key: value}))
    refusal(folder)


def test_configs_that_are_none(folder: Path) -> None:
    for content in (b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"a": 1, "a": 2}'):
        (folder / "config.json").write_bytes(content)
        assert "config.json" in refusal(folder)
    (folder / "config.json").unlink()
    assert "config.json" in refusal(folder)


def test_a_tied_head_that_is_not_the_embedding(tmp_path: Path) -> None:
    values = tiny.config(tied=True)
    tensors = tiny.tensors_of(values)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    same = tiny.save(tmp_path / "same", values, tensors)
    assert tiny.equal(tiny.load(convert(same, tmp_path / "kept", "hf")), tensors)
    tensors["lm_head.weight"][0, 0] += 1
    other = tiny.save(tmp_path / "other", values, tensors)
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        run(make_plan(open_checkpoint(other), named("hf")), tmp_path / "out")


def test_ranks_of_deepseek_that_do_not_agree(folder: Path, tmp_path: Path) -> None:
    there = convert(make(tmp_path / "plain", mtp=1), tmp_path / "there", "deepseek", mp=2)
    (there / MANIFEST).unlink()
    path = there / "model1-mp2.safetensors"
    tensors, good = tiny.load_file(path), path.read_bytes()
    tensors["layers.1.ffn.gate.weight"][1, 1] += 1
    tiny.save_file(tensors, path)
    assert "layers.1.ffn.gate.weight differs from" in refusal(there)
    path.write_bytes(good)
    shutil.copy(there / "model0-mp2.safetensors", path)
    assert "of another rank" in refusal(there)
    path.unlink()
    assert "model1-mp2.safetensors" in refusal(there)
    shutil.copy(there / "model0-mp2.safetensors", there / "model0-mp4.safetensors")
    assert "does not belong to the others" in refusal(there)


def test_what_the_options_cannot_do(folder: Path) -> None:
    source = open_checkpoint(folder)
    for to, options, dtype, words in (
            ("hf", Options(mp=2), None, "--mp"), ("deepseek", Options(shard_bytes=9), None, "--shard-size"),
            ("deepseek", Options(mp=3), None, "does not divide"), ("deepseek", Options(mp=0), None, "does not divide"),
            ("deepseek", Options(mp=2), None, "inside a block of 128"),
            ("hf", Options(shard_bytes=0), None, "positive"),
            ("hf", Options(), "int4", "must be one of")):
        with pytest.raises(CheckpointError, match=words):
            make_plan(source, named(to), options, dtype)
    with pytest.raises(CheckpointError, match="formats are hf, deepseek"):
        named("tensorflow")


def test_a_folder_of_no_format_and_of_two(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint of a format known here"):
        open_checkpoint(tmp_path / "empty")
    shutil.copy(first(folder), folder / "model0-mp1.safetensors")
    with pytest.raises(CheckpointError, match="could be hf, deepseek; say which"):
        open_checkpoint(folder)
    assert open_checkpoint(folder, "hf").format == "hf"


def test_carried_tensors_that_lie(tmp_path: Path) -> None:
    there = convert(make(tmp_path / "source", mtp=1), tmp_path / "there", "deepseek")
    (there / MANIFEST).unlink()
    facts = there / "megatron_ext_carried" / "carried.json"
    good = facts.read_text()
    for change in (lambda f: f.update(files=["../config.json"]), lambda f: f.update(files=["model0-mp1.safetensors"]),
                   lambda f: f.update(files=3), lambda f: f.update(format=2), lambda f: f.update(files=[]),
                   lambda f: f.update(aliases=[{}]), lambda f: f.update(config=3),
                   lambda f: f.update(files=f["files"] * 2)):
        edit_json(facts, change)
        assert "there" in refusal(there)
        facts.write_text(good)


def test_a_manifest_that_lies(tmp_path: Path) -> None:
    ours = convert(make(tmp_path / "source"), tmp_path / "ours", "hf")
    good = (ours / MANIFEST).read_text()
    for change in (lambda m: m.update(format=9), lambda m: m.update(files=[]), lambda m: m["files"].clear(),
                   lambda m: m["files"].update(x=1), lambda m: m["files"].update({"../x": {"bytes": 1, "tensors": {}}}),
                   lambda m: m["files"]["model.safetensors"].update(bytes=1),
                   lambda m: m["files"]["model.safetensors"].update(tensors={"a": "b"}),
                   lambda m: m["files"].update(gone={"bytes": 1, "tensors": {}})):
        edit_json(ours / MANIFEST, change)
        refusal(ours)
        (ours / MANIFEST).write_text(good)


@pytest.mark.parametrize("key", [*tiny.config(mtp=1), "rope_scaling", "moe_layer_freq", "attention_bias",
                                 "num_mtp_layers", "quantization_config", "rope_interleave"])
def test_any_value_in_a_config_is_read_or_refused(key: str) -> None:
    """Structured damage, which flipped bytes hardly ever are."""
    for value in (None, -1, 0, "x", "\n", [], {}, [[]], 1.5, True, 10**30, 10**5000, float("nan"), -5, 3, 7):
        try:
            assert Model.from_hf(tiny.config(mtp=1) | {key: value}).table
        except UserError as error:
            assert str(error).isprintable() and len(str(error)) < 1000


def test_formats_that_a_folder_is_not_of(folder: Path) -> None:
    for format in FORMATS:
        if format.name != "hf":
            with pytest.raises(CheckpointError) as error:
                open_checkpoint(folder, format.name)
            assert str(error.value).isprintable()


def test_a_missing_config_names_the_option(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "--config" in refusal(folder)


def test_a_weight_file_beside_the_one_file_of_a_model(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    shutil.copy(source / "model.safetensors", source / "adapter.safetensors")
    assert "adapter.safetensors" in refusal(source)


def test_numbers_too_large_for_bf16(tmp_path: Path) -> None:
    values = tiny.config()
    tensors = tiny.tensors_of(values, "fp32")
    tensors["lm_head.weight"][0, 0] = 3.4e38
    source = tiny.save(tmp_path / "source", values, tensors)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight holds 3\.4e\+38, which BF16 does not"):
        run(make_plan(open_checkpoint(source), named("deepseek"), dtype="bf16"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
