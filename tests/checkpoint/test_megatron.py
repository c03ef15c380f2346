"""Megatron-Core's checkpoints, distributed and legacy: there and back, and what Megatron-Core itself makes of them."""

from __future__ import annotations

import argparse
import importlib.util
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.checkpoint.convert import Options, make_plan, named, open_checkpoint, run
from megatron_ext.checkpoint.convert.source import MANIFEST
from megatron_ext.checkpoint.convert.verify import verify
from megatron_ext.config.errors import CheckpointError, UserError
from tests.checkpoint import tiny
from tests.checkpoint.test_round_trips import MODELS
from tests.checkpoint.tiny import convert, equal, load, make

ROOT = Path(__file__).parents[2]
WITH_MEGATRON = pytest.mark.skipif(importlib.util.find_spec("megatron") is None,
                                   reason="megatron-core is not installed: pip install -e '.[megatron]'")
RANKS: list[dict[str, Any]] = [dict(tp=tp, pp=pp, ep=ep, spec=spec) for tp, pp, ep, spec in (
    (1, 1, 1, "local"), (2, 1, 1, "te"), (1, 2, 1, "te"), (1, 1, 2, "local"), (2, 2, 2, "te"), (2, 3, 1, "local"),
    (1, 2, 4, "te"), (4, 1, 2, "local"))]
LEGACY = "release/mp_rank_00/model_optim_rng.pt"


def opened(file: Path) -> dict[str, Any]:
    """What torch.save wrote; arguments are a class of Python's, and not on torch's own list."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        tree: dict[str, Any] = torch.load(file)
        return tree


# -- there and back

@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp8"])
@pytest.mark.parametrize("number", range(len(MODELS)), ids=lambda number: "-".join(map(str, MODELS[number].values())))
def test_there_and_back(tmp_path: Path, number: int, dtype: str) -> None:
    """Through both formats, from one into the other, FP8 with its scales carried."""
    source = make(tmp_path / "source", dtype, shards=2, layers=3, **MODELS[number])
    there = convert(source, tmp_path / "there", "megatron", spec=("te", "local")[number % 2])
    ranks = convert(there, tmp_path / "ranks", "megatron-legacy", **RANKS[number])
    back = convert(ranks, tmp_path / "back", "hf", "fp8" if dtype == "fp8" else None)
    assert equal(load(source), load(back))
    for name in ("config.json", "tokenizer_config.json"):
        assert (source / name).read_bytes() == (back / name).read_bytes()


def test_partial_blocks_of_fp8_come_back(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "fp8", shards=3, mtp=1, wide=True)
    there = convert(source, tmp_path / "there", "megatron", shard_bytes=2_000_000)
    assert len(list((there / "release").glob("*.distcp"))) > 2
    ranks = convert(there, tmp_path / "ranks", "megatron-legacy", tp=2, ep=2)
    assert equal(load(source), load(convert(ranks, tmp_path / "back", "hf", "fp8")))


@pytest.mark.parametrize("settings", MODELS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_the_config_follows_from_the_arguments(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Without config.json, where DeepSeek's own config does not say more than the model needs."""
    yarn = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1,
            "mscale": 1.0, "mscale_all_dim": 1.0}
    source = make(tmp_path / "source", layers=3, rope_scaling=yarn if settings["mtp"] else None, **settings)
    for to in ("megatron", "megatron-legacy"):
        there = convert(source, tmp_path / to, to)
        (there / "config.json").unlink()
        (there / MANIFEST).unlink()
        back = convert(there, tmp_path / f"back-{to}", "hf")
        assert equal(load(source), load(back))
        said, due = (json.loads((folder / "config.json").read_text()) for folder in (back, source))
        assert {key: said.get(key) for key in due if key != "aux_loss_alpha"} == {
            key: value for key, value in due.items() if key != "aux_loss_alpha"}


def test_numbers_lie_where_megatron_looks_for_them(tmp_path: Path) -> None:
    """Against torch, so that an error made on both ways is seen: fusion, cuts, padding, copies, who has what."""
    source = make(tmp_path / "source", layers=3, mtp=1, tied=False)
    there = convert(source, tmp_path / "there", "megatron-legacy", tp=2, pp=2, ep=2)
    original = load(source)
    ranks = {folder.name[8:]: opened(folder / "model_optim_rng.pt") for folder in (there / "release").iterdir()}
    assert sorted(ranks) == [f"{t:02d}_{p:03d}_{e:03d}" for t in (0, 1) for p in (0, 1) for e in (0, 1)]
    last = ranks["01_001_001"]
    assert last["args"].tensor_model_parallel_size == 2 and last["args"].decoder_last_pipeline_num_layers == 1
    model, experts = last["model"], "model.layers.2.mlp.experts.3."
    gate, up, down = (original[f"{experts}{name}_proj.weight"] for name in ("gate", "up", "down"))
    assert model["decoder.layers.0.mlp.experts.linear_fc1.weight1"].equal(torch.cat([gate[6:], up[6:]]))
    assert model["decoder.layers.0.mlp.experts.linear_fc2.weight1"].equal(down[:, 6:])
    assert model["decoder.layers.0.self_attention.linear_proj.weight"].equal(
        original["model.layers.2.self_attn.o_proj.weight"][:, 16:])
    assert model["mtp.layers.0.transformer_layer.self_attention.linear_q_down_proj.weight"].equal(
        original["model.layers.3.self_attn.q_a_proj.weight"])
    assert model["output_layer.weight"].shape == (128, 32) and not model["output_layer.weight"].any()
    rows = ranks["00_001_000"]["model"]["output_layer.weight"]
    assert rows[:48].equal(original["lm_head.weight"]) and not rows[48:].any()
    assert ranks["00_001_000"]["model"]["embedding.word_embeddings.weight"].equal(
        ranks["00_000_001"]["model"]["embedding.word_embeddings.weight"])  # multi-token prediction needs it too
    assert "output_layer.weight" not in ranks["00_000_000"]["model"]
    bias = ranks["00_000_000"]["model"]["decoder.layers.1.mlp.router.expert_bias"]
    assert bias.dtype == torch.float32 and bias.any()


def test_virtual_stages_count_on(tmp_path: Path) -> None:
    """model0 of all ranks comes before model1 of the first."""
    source = make(tmp_path / "source", layers=4, mtp=1)
    there = convert(source, tmp_path / "there", "megatron-legacy", pp=4)
    files = [there / f"release/mp_rank_00_{p:03d}/model_optim_rng.pt" for p in range(4)]
    trees = [opened(file) for file in files]
    for p in (0, 1):
        tree = {"model0": trees[p]["model"], "model1": trees[p + 2]["model"], **trees[p]}
        tree["args"].pipeline_model_parallel_size = 2
        del tree["model"]
        torch.save(tree, files[p])
        shutil.rmtree(files[p + 2].parent)
    (there / MANIFEST).unlink()
    assert open_checkpoint(there).reading.layout == "TP 1, PP 2, EP 1, 2 virtual stages"
    assert equal(load(source), load(convert(there, tmp_path / "back", "hf")))


def test_padding_is_what_it_was_trained_to_be(tmp_path: Path) -> None:
    """Rows beyond the vocabulary may hold anything; they are no tokens and go."""
    source = make(tmp_path / "source")
    there = convert(source, tmp_path / "there", "megatron-legacy")
    (there / MANIFEST).unlink()
    edit_tree(there / LEGACY, lambda tree: tree["model"]["output_layer.weight"][48:].fill_(7))
    assert equal(load(source), load(convert(there, tmp_path / "back", "hf")))


def test_the_step_is_kept(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    there = convert(source, tmp_path / "there", "megatron")
    (there / MANIFEST).unlink()
    (there / "release").rename(there / "iter_0001000")
    (there / "latest_checkpointed_iteration.txt").write_text("1000\n")
    assert open_checkpoint(there).step == 1000
    ranks = convert(there, tmp_path / "ranks", "megatron-legacy")
    assert (ranks / "latest_checkpointed_iteration.txt").read_text() == "1000"
    assert opened(ranks / "iter_0001000/mp_rank_00/model_optim_rng.pt")["iteration"] == 1000
    assert open_checkpoint(ranks / "iter_0001000", config=source).step == 1000


def test_what_the_options_cannot_do(tmp_path: Path) -> None:
    source = open_checkpoint(make(tmp_path / "source", layers=3))
    for to, options, words in (
            ("megatron", Options(tp=2), "--tp"), ("megatron", Options(spec="x"), "must be one of te, local"),
            ("megatron-legacy", Options(tp=3), "does not divide dimension"),
            ("megatron-legacy", Options(tp=0), "--tp 0"),
            ("megatron-legacy", Options(pp=4), "without any of 3 layers"), ("megatron-legacy", Options(pp=0), "--pp 0"),
            ("megatron-legacy", Options(ep=3), "does not divide 4 experts")):
        with pytest.raises(CheckpointError, match=words):
            make_plan(source, named(to), options)
    settings: dict[str, Any] = dict(layers=3, family="v3")
    mixed = tiny.tensors_of(tiny.config(**settings))
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    tiny.save(tmp_path / "mixed", tiny.config(**settings), mixed | {name: mixed[name].float()})
    for to in ("megatron", "megatron-legacy"):
        with pytest.raises(CheckpointError, match=rf"tensor {name} is F32, and .* is BF16; .*holds both; .*--dtype"):
            make_plan(open_checkpoint(tmp_path / "mixed"), named(to))
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    tiny.save(tmp_path / "experts", tiny.config(**settings), mixed | {name: mixed[name].float()})
    with pytest.raises(CheckpointError, match=r"experts.linear_fc2.weight would be of BF16 and F32"):
        make_plan(open_checkpoint(tmp_path / "experts"), named("megatron"))
    convert(tmp_path / "experts", tmp_path / "there", "megatron-legacy")
    biased = open_checkpoint(make(tmp_path / "biased", attention_bias=True))
    for to in ("megatron", "megatron-legacy"):
        with pytest.raises(CheckpointError, match="has no such biases"):
            make_plan(biased, named(to))


# -- Megatron-Core itself

def megatron(jobs: list[dict[str, Any]]) -> None:
    """Has Megatron-Core do jobs of megatron_core.py."""
    done = subprocess.run([sys.executable, "-m", "tests.checkpoint.megatron_core", json.dumps(jobs)], cwd=ROOT,
                          capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]


def ours_and_theirs(source: Path, tokens: torch.Tensor) -> tiny.Tensors:
    """What transformers computes with a folder: "logits" [B, T, V], and "mtp.0" by a block of its own and hand."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    values, weights = json.loads((source / "config.json").read_text()), load(source)
    kind = getattr(transformers, values["architectures"][0])
    layers, mtp = values["num_hidden_layers"], values["num_nextn_predict_layers"]

    def built(count: int) -> Any:
        config = transformers.AutoConfig.from_pretrained(source)
        config.num_hidden_layers = count
        return kind.from_pretrained(source, config=config, dtype=torch.float32, attn_implementation="eager").eval()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + values["rms_norm_eps"]) * weights[prefix + name]

    with torch.no_grad():
        model, prefix = built(layers), f"model.layers.{layers}."
        found = {"logits": model(tokens).logits}
        if not mtp:
            return found
        hidden = model.model(tokens).last_hidden_state
        following = weights["model.embed_tokens.weight"][tokens.roll(-1, 1).index_fill(1, torch.tensor([-1]), 0)]
        x = torch.cat([norm(following, "enorm.weight"), norm(hidden, "hnorm.weight")], -1)
        x = x @ weights[prefix + "eh_proj.weight"].T
        longer, positions = built(layers + 1), torch.arange(tokens.shape[1])[None]
        later = torch.full((tokens.shape[1],) * 2, -torch.inf).triu(1)[None, None]
        x = longer.model.layers[layers](x, attention_mask=later, position_ids=positions,
                                        position_embeddings=longer.model.rotary_emb(x, positions))
        head = weights[prefix + "shared_head.head.weight"]
        found["mtp.0"] = norm(x[0] if isinstance(x, tuple) else x, "shared_head.norm.weight") @ head.T
        return found


YARN = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0}
COMPUTED: dict[str, dict[str, Any]] = {
    "v3": dict(layers=3, mtp=1, routed_scaling_factor=2.5),
    "v3-full-query-tied-yarn": dict(layers=2, q_lora=False, tied=True, dense=0, rope_scaling=YARN),
    "v2": dict(family="v2", layers=2, routed_scaling_factor=1.5),
}


@WITH_MEGATRON
def test_megatron_computes_the_same(tmp_path: Path) -> None:
    """GPTModel loads what we write, in either spec's names and as a legacy file, and its logits are transformers'."""
    torch.manual_seed(0)
    tokens, jobs, due = torch.randint(0, 48, (2, 12)), [], {}
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    for name, settings in COMPUTED.items():
        source = make(tmp_path / name, "fp32", **settings)
        due[name] = ours_and_theirs(source, tokens)
        for to, spec in (("megatron", "te"), ("megatron", "local"), ("megatron-legacy", "local")):
            there = convert(source, tmp_path / f"{name}-{to}-{spec}", to, spec=spec)
            jobs.append({"checkpoint": str(there / "release"), "names": spec, "logits": str(there / "logits"),
                         "tokens": str(tmp_path / "tokens.safetensors"), "of": name})
    megatron(jobs)
    for job in jobs:
        found = load_file(job["logits"])
        assert found.keys() == due[job["of"]].keys()
        for kind, expected in due[job["of"]].items():
            difference = (found[kind][..., :48] - expected).abs().max() / expected.abs().max()
            assert difference < 5e-6, (job["checkpoint"], kind, float(difference))


SAVED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (dict(layers=3, mtp=1), {}),
    (dict(layers=2, dense=0, mtp=1, tied=True, q_lora=False), {}),  # layers of one kind, stacked
    (dict(layers=3, mtp=1), {"singleton_local_shards": True}),
]


@WITH_MEGATRON
def test_what_megatron_saves_is_read(tmp_path: Path) -> None:
    """Layer by layer, stacked, and in single tensors; with moments, each a multiple of its weight."""
    jobs, sources = [], []
    for number, (settings, metadata) in enumerate(SAVED):
        sources.append(make(tmp_path / f"source{number}", "fp32", **settings))
        there = convert(sources[-1], tmp_path / f"there{number}", "megatron")
        jobs.append({"checkpoint": str(there / "release"), "names": "te", "save": str(tmp_path / f"saved{number}"),
                     "metadata": metadata, "stack": settings.get("dense") == 0, "moments": True})
    megatron(jobs)
    for number, source in enumerate(sources):
        saved = tmp_path / f"saved{number}"
        found = open_checkpoint(saved)
        assert found.step == 7 and found.states == {"exp_avg", "exp_avg_sq"}
        with pytest.raises(CheckpointError, match="--optimizer drop"):
            make_plan(found, named("hf"))
        plan = make_plan(found, named("hf"), optimizer="drop")
        run(plan, tmp_path / f"back{number}")
        assert equal(load(source), load(tmp_path / f"back{number}"))
        carried = make_plan(found, named("hf"), optimizer="carry")
        run(carried, tmp_path / f"carried{number}")
        verify(carried, tmp_path / f"carried{number}")
        weights, count = load(source), 0
        for file in (tmp_path / f"carried{number}" / "megatron_ext_carried").glob("*.safetensors"):
            for name, tensor in load_file(file).items():
                weight, _, state = name.partition("@")
                assert tensor.equal(weights[weight] * {"exp_avg": 2, "exp_avg_sq": 4}[state]), name
                count += 1
        assert count > 2 * len(SAVED)
        index = saved / "iter_0000007" / ".metadata"  # and state in a layout that only the same ranks can read
        index.write_bytes(index.read_bytes().replace(b"optimizer.state.", b"optimizer.gbuf_."))
        found = open_checkpoint(saved)
        for optimizer in (None, "keep", "carry"):
            with pytest.raises(CheckpointError, match=r"layout of Megatron's buffers; it cannot be read; .* drop"):
                make_plan(found, named("hf"), optimizer=optimizer)
        assert make_plan(found, named("hf"), optimizer="drop").tensors == plan.tensors


# -- damage

def edit_tree(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes what torch.save wrote."""
    tree = opened(file)
    change(tree)
    torch.save(tree, file)


def refusal(folder: Path) -> str:
    """The error of a conversion; it has written nothing."""
    out = folder.parent / "out"
    with pytest.raises(UserError) as caught:
        run(make_plan(open_checkpoint(folder), named("hf")), out)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1000
    assert not out.exists() and not list(folder.parent.glob("*.converting"))
    return message


class Hostile:
    """Runs a command where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        import os
        return os.system, (f"touch {self.mark}",)


FC1 = "decoder.layers.0.mlp.linear_fc1.weight"
TREES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unknown key": (lambda t: t["model"].update({"decoder.layers.0.mlp.extra.weight": torch.ones(2)}), "mlp.extra"),
    "key of another layer": (lambda t: t["model"].update({"decoder.layers.7.pre_mlp_layernorm.weight": torch.ones(2)}),
                             "count from 0"),
    "key missing": (lambda t: t["model"].pop(FC1), "gate_proj.weight is missing"),
    "shape": (lambda t: t["model"].update({FC1: t["model"][FC1].T.contiguous()}), FC1),
    "strides": (lambda t: t["model"].update({FC1: t["model"][FC1].T.contiguous().T}), "lies in strides"),
    "dtype": (lambda t: t["model"].update({FC1: t["model"][FC1].double()}), "is F64"),
    "no tensor": (lambda t: t["model"].update({FC1: 3}), "a tensor is due"),
    "no model": (lambda t: t.pop("model"), "holds no model"),
    "strange entry": (lambda t: t.update(weights=1), "holds 'weights'"),
    "arguments of other ranks": (lambda t: setattr(t["args"], "tensor_model_parallel_size", 2), "arguments say 2"),
    "expert too many": (lambda t: t["model"].update({"decoder.layers.1.mlp.experts.linear_fc2.weight4":
                                                     torch.ones(2)}), "is expert 4"),
    "vocabulary": (lambda t: t["model"].update({"output_layer.weight": torch.ones(4096, 32)}), "has 4096 rows"),
    "optimizer": (lambda t: t.update(optimizer={"state": 1}), "--optimizer drop"),
}


@pytest.mark.parametrize("case", TREES)
def test_ranks_that_are_damaged(tmp_path: Path, case: str) -> None:
    there = convert(make(tmp_path / "source"), tmp_path / "there", "megatron-legacy")
    (there / MANIFEST).unlink()
    change, words = TREES[case]
    edit_tree(there / LEGACY, change)
    assert words in refusal(there)


def test_ranks_that_do_not_agree(tmp_path: Path) -> None:
    source = make(tmp_path / "source", layers=2)
    there = convert(source, tmp_path / "there", "megatron-legacy", tp=2, ep=2)
    (there / MANIFEST).unlink()
    folder = there / "release"
    edit_tree(folder / "mp_rank_01_001/model_optim_rng.pt",
              lambda tree: tree["model"]["decoder.layers.1.mlp.router.weight"][0].fill_(1))
    assert "mlp.router.weight differs from" in refusal(there)
    shutil.copytree(folder / "mp_rank_00_001", folder / "mp_rank_00_002")
    assert "arguments say 2" in refusal(there)
    shutil.rmtree(folder / "mp_rank_00_002")
    shutil.rmtree(folder / "mp_rank_01_001")
    assert "mp_rank_01_001/model_optim_rng.pt: does not exist" in refusal(there)
    shutil.rmtree(folder / "mp_rank_01_000")
    assert "arguments say 2" in refusal(there)
    tied = convert(make(tmp_path / "tied", layers=2, tied=True), tmp_path / "pipe", "megatron-legacy", pp=2)
    (tied / MANIFEST).unlink()
    edit_tree(tied / "release/mp_rank_00_001/model_optim_rng.pt",
              lambda tree: tree["model"]["output_layer.weight"][0].fill_(1))
    assert "output_layer.weight differs from embedding.word_embeddings.weight" in refusal(tied)


def test_pickles_are_not_run(tmp_path: Path) -> None:
    source, mark = make(tmp_path / "source"), tmp_path / "mark"
    for to, files in (("megatron", ["common.pt", ".metadata"]), ("megatron-legacy", ["mp_rank_00/model_optim_rng.pt"])):
        there = convert(source, tmp_path / to, to)
        (there / MANIFEST).unlink()
        for name in files:
            file = there / "release" / name
            good = file.read_bytes()
            if name == ".metadata":
                file.write_bytes(pickle.dumps(Hostile(mark)))
            else:
                torch.save({"args": argparse.Namespace(x=Hostile(mark)), "model": {}}, file)
            assert "no checkpoint needs" in refusal(there) and not mark.exists()
            file.write_bytes(good)
    subprocess.run([sys.executable, "-c", f"import pickle; pickle.loads({pickle.dumps(Hostile(mark))!r})"])
    assert mark.exists()  # it would have been


def test_distributed_checkpoints_that_are_damaged(tmp_path: Path) -> None:
    there = convert(make(tmp_path / "source"), tmp_path / "there", "megatron")
    (there / MANIFEST).unlink()
    folder = there / "release"
    index = (folder / ".metadata").read_bytes()

    def changed(old: bytes, new: bytes) -> str:
        assert old in index and len(old) == len(new)
        (folder / ".metadata").write_bytes(index.replace(old, new))
        message = refusal(there)
        (folder / ".metadata").write_bytes(index)
        return message

    assert "not plainly inside the folder" in changed(b"__0_0.distcp", b"../../x.disx")
    assert "linear_fc1.weighs has no place in the model" in changed(b"mlp.linear_fc1.weight", b"mlp.linear_fc1.weighs")
    assert "nothing is known" in changed(b"linear_proj._extra_state", b"linear_proj._extra_stato")
    assert "decoder.layers.9" in changed(b"decoder.layers.0.", b"decoder.layers.9.")
    for name in ("__0_0.distcp", "common.pt"):
        (folder / name).rename(tmp_path / "moved")
        assert f"{name}: does not exist" in refusal(there)
        (tmp_path / "moved").rename(folder / name)
    config = json.loads((there / "config.json").read_text())
    (there / "config.json").write_text(json.dumps(config | {"kv_lora_rank": 12}))
    assert "linear_kv_down_proj.weight has shape (20, 32); config.json makes it (16, 32)" in refusal(there)
    (there / "config.json").write_text(json.dumps(config))
    tracker, backend = there / "latest_checkpointed_iteration.txt", folder / "metadata.json"
    for said in ("../there", "-1", "12", "9" * 40, "\0"):
        tracker.write_text(said)
        assert "there" in refusal(there)
    tracker.write_text("release")
    backend.write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')
    assert "torch_dist version 1 is read" in refusal(there)


def test_a_config_that_does_not_follow_is_asked_for(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    there = convert(source, tmp_path / "there", "megatron-legacy")
    (there / MANIFEST).unlink()
    (there / "config.json").unlink()
    good = (there / LEGACY).read_bytes()
    changes: list[Callable[[Any], Any]] = [
        lambda args: delattr(args, "vocab_size"), lambda args: setattr(args, "multi_latent_attention", False),
        lambda args: setattr(args, "moe_layer_freq", "[0, 1]"), lambda args: setattr(args, "num_layers", "2"),
        lambda args: setattr(args, "moe_router_enable_expert_bias", False),
        lambda args: setattr(args, "moe_shared_expert_intermediate_size", 13),
        lambda args: delattr(args, "untie_embeddings_and_output_weights")]
    for change in changes:
        edit_tree(there / LEGACY, lambda tree, change=change: change(tree["args"]))  # type: ignore[misc]
        assert "--config" in refusal(there)
        (there / LEGACY).write_bytes(good)
    edit_tree(there / LEGACY, lambda tree: tree.pop("args"))
    assert "--config" in refusal(there)
    plan = make_plan(open_checkpoint(there, config=source), named("hf"))
    run(plan, tmp_path / "given")
    assert equal(load(source), load(tmp_path / "given"))
