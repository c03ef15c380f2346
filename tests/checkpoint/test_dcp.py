"""torch.distributed.checkpoint: what torch saves is read bit for bit, and what we write torch loads."""

from __future__ import annotations

import io
import re
import shutil
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from megatron_ext.checkpoint.convert import dcp_io, make_plan, named, open_checkpoint, run
from megatron_ext.checkpoint.convert.blocks import Files
from megatron_ext.checkpoint.convert.dcp_io import DcpObject, DcpTarget
from megatron_ext.checkpoint.convert.folder import Folder
from megatron_ext.checkpoint.convert.tensors import Part, whole
from megatron_ext.checkpoint.convert.verify import verify
from megatron_ext.config.errors import CheckpointError
from tests.checkpoint import tiny
from tests.checkpoint.test_round_trips import MODELS
from tests.checkpoint.test_selection import trained
from tests.checkpoint.tiny import Tensors, convert, equal, load, make
from tests.distributed.pool import WorkerPool

pytestmark = pytest.mark.filterwarnings("ignore")
COPY = re.compile(r"\.layers\.\d+\.(embed_tokens|shared_head\.head)\.")


def torchtitan(tensors: Tensors, layers: int = 2) -> Tensors:
    """What torchtitan's state_dict_adapter makes of Hugging Face's tensors: word by word."""
    words = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "self_attn.q_proj": "attention.wq",
             "self_attn.q_a_proj": "attention.wq_a", "self_attn.q_a_layernorm": "attention.q_norm",
             "self_attn.q_b_proj": "attention.wq_b", "self_attn.kv_a_proj_with_mqa": "attention.wkv_a",
             "self_attn.kv_a_layernorm": "attention.kv_norm", "self_attn.kv_b_proj": "attention.wkv_b",
             "self_attn.o_proj": "attention.wo", "input_layernorm": "attention_norm",
             "post_attention_layernorm": "ffn_norm", "mlp.gate.e_score_correction_bias": "moe.expert_bias_E",
             "mlp.gate.": "moe.router.gate.", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
             "mlp.up_proj": "feed_forward.w3", "mlp.shared_experts.gate_proj": "moe.shared_experts.w1",
             "mlp.shared_experts.down_proj": "moe.shared_experts.w2", "shared_head.norm": "mtp_norm",
             "mlp.shared_experts.up_proj": "moe.shared_experts.w3"}
    of_experts = {f"{word}_proj.weight": f"moe.routed_experts.inner_experts.{leaf}"
                  for word, leaf in (("gate", "w1_EFD"), ("down", "w2_EDF"), ("up", "w3_EFD"))}
    found: Tensors = {}
    for name, tensor in tensors.items():
        if COPY.search(name):
            continue
        expert = re.search(r"mlp\.experts\.(\d+)\.", name)
        name = name.replace(expert[0], "") if expert else name
        for ours, theirs in (words if expert is None else of_experts).items():
            name = name.replace(ours, theirs)
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer is not None:
            number = int(layer[1])
            where = f"layers.{number}." if number < layers else f"mtp_layers.{number - layers}."
            name = where + name.removeprefix(layer[0])
        if expert is None:
            found[name] = tensor
        else:
            found.setdefault(name, torch.empty((4, *tensor.shape), dtype=tensor.dtype))[int(expert[1])] = tensor
    return found


def save(folder: Path, state: dict[str, Any], like: Path, **options: Any) -> Path:
    """What torch saves, with the documents of another folder."""
    dcp.save(state, checkpoint_id=None if options else folder, **options)
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(like / name, folder / name)
    return folder


def loaded(folder: Path) -> Tensors:
    """Every tensor, by torch."""
    listed = FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in listed.items()
             if isinstance(entry, TensorStorageMetadata)}
    dcp.load(state, checkpoint_id=folder)
    return state


@pytest.mark.parametrize("settings", MODELS, ids=lambda settings: "-".join(map(str, settings.values())))
@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp8"])
def test_torch_loads_it_and_it_comes_back(tmp_path: Path, settings: dict[str, Any], dtype: str) -> None:
    source = make(tmp_path / "source", dtype, shards=2, layers=3, **settings)
    there = convert(source, tmp_path / "there", "dcp")
    expected = torchtitan(load(source), 3)
    expected.setdefault("lm_head.weight", expected["tok_embeddings.weight"])
    assert equal(loaded(there), expected)
    back = convert(there, tmp_path / "back", "hf")
    assert equal(load(source), load(back))
    for name in ("config.json", "tokenizer_config.json"):
        assert (source / name).read_bytes() == (back / name).read_bytes()
    saved = save(tmp_path / "saved", expected, source)
    found = load(convert(saved, tmp_path / "again", "hf"))
    if settings["tied"]:
        assert found.pop("lm_head.weight").equal(expected["lm_head.weight"])
    assert equal(found, load(source))


def test_large_tensors_are_cut_into_rows_over_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FP8 with partial blocks, in files of 100 KB and chunks of 50 KB; a row is larger. Rows are cut between blocks."""
    source = make(tmp_path / "source", "fp8", mtp=1, wide=True)
    monkeypatch.setattr(dcp_io, "CHUNK_BYTES", 50_000)
    there = convert(source, tmp_path / "there", "dcp", workers=2, shard_bytes=100_000)
    assert equal(loaded(there), torchtitan(load(source)))
    assert equal(load(source), load(convert(there, tmp_path / "back", "hf")))
    read = dcp_io.read(Folder(there))
    rows = [chunk.box[0] for chunk in read.tensors["layers.1.attention.wkv_a.weight"].chunks]
    assert rows == [(0, 128), (128, 256), (256, 384), (384, 512), (512, 576)]
    stacks = read.tensors["layers.1.moe.routed_experts.inner_experts.w1_EFD"].chunks
    assert [chunk.box for chunk in stacks] == [((e, e + 1), (0, 256), (0, 256)) for e in range(4)]
    assert all(chunk.offset % 64 == 0 for tensor in read.tensors.values() for chunk in tensor.chunks)
    for item in FileSystemReader(there).read_metadata().storage_data.values():
        content = (there / item.relative_path).read_bytes()[item.offset:item.offset + item.length]
        assert zipfile.ZipFile(io.BytesIO(content)).testzip() is None  # CRC-32s, which torch does not look at
    assert max((there / name).stat().st_size for name in read.files) < 140_000 and len(read.files) > 20
    bf16 = convert(there, tmp_path / "bf16", "dcp", "bf16", shard_bytes=77_777)
    assert equal(load(source), load(convert(bf16, tmp_path / "end", "hf", "fp8")))


def test_stacks_are_quantised_as_each_expert_is(tmp_path: Path) -> None:
    source = make(tmp_path / "source", wide=True, mtp=1)
    fp8 = convert(source, tmp_path / "fp8", "dcp", "fp8")
    expected = torchtitan(load(convert(source, tmp_path / "expected", "hf", "fp8")))
    assert equal(loaded(fp8), expected)
    assert expected["layers.1.moe.routed_experts.inner_experts.w2_EDF_scale_inv"].shape == (4, 2, 2)
    ranks = convert(fp8, tmp_path / "ranks", "deepseek", mp=2)
    assert equal(loaded(convert(ranks, tmp_path / "again", "dcp")), expected)


def test_the_index_is_the_same_whenever_it_is_written(tmp_path: Path) -> None:
    source = make(tmp_path / "source", mtp=1)
    assert tiny.files(convert(source, tmp_path / "a", "dcp")) == tiny.files(convert(source, tmp_path / "b", "dcp"))


class Names(nn.Module):
    """A module with parameters and buffers of given names."""

    def __init__(self, tensors: Tensors):
        super().__init__()
        for name, tensor in tensors.items():
            *path, leaf = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            if leaf == "expert_bias_E":
                module.register_buffer(leaf, tensor)
            else:
                module.register_parameter(leaf, nn.Parameter(tensor))


def _train_and_save(source: str, folder: str) -> None:
    """On each rank: FSDP over both, experts cut along another dimension; a step of AdamW; torchtitan's state dict."""
    warnings.simplefilter("ignore")
    model = Names(torchtitan(load(Path(source))))
    mesh = init_device_mesh("cpu", (2,))

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(1 if parameter.dim() == 3 else 0)

    for layer in [*model.layers.children(), *model.mtp_layers.children()]:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh, shard_placement_fn=placement)
    fully_shard(model, mesh=mesh)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(3):
        for parameter in model.parameters():
            assert isinstance(parameter, DTensor)
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    flat: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        flat |= {f"state.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
        flat |= {f"param_groups.{name}.lr": 0.01, f"param_groups.{name}.betas": (0.9, 0.95)}
    state = {"optimizer": flat, "lr_scheduler": {"last_epoch": 3}, "train_state": {"step": 3, "ntokens_seen": 99},
             "dataloader": {"dp_rank_0": b"abc", "world_size": 2}, **model.state_dict()}
    dcp.save(state, checkpoint_id=folder)
    whole = {name: value.full_tensor() if isinstance(value, DTensor) else value
             for name, value in {**model.state_dict(), **flat}.items() if isinstance(value, torch.Tensor)}
    if torch.distributed.get_rank() == 0:
        torch.save(whole, folder + "/whole.pt")


def test_shards_of_two_ranks_with_their_optimizer(tmp_path: Path, pool2: WorkerPool) -> None:
    source = make(tmp_path / "source", "fp32", mtp=1)
    folder = tmp_path / "saved"
    pool2.run(_train_and_save, str(source), str(folder))
    shutil.copy(source / "config.json", folder / "config.json")
    expected = torch.load(folder / "whole.pt")
    (folder / "whole.pt").unlink()
    opened = open_checkpoint(folder)
    assert opened.step == 3 and opened.states == {"exp_avg", "exp_avg_sq"}
    assert len(dcp_io.read(opened.folder).files) == 2

    plan = make_plan(opened, named("hf"), optimizer="drop")
    run(plan, tmp_path / "weights")
    verify(plan, tmp_path / "weights")
    weights = {name: tensor for name, tensor in expected.items() if not name.startswith("state.")}
    assert equal(torchtitan(load(tmp_path / "weights")), weights)

    again = convert(folder, tmp_path / "again", "dcp", shard_bytes=50_000)
    theirs = loaded(again)
    for name, tensor in expected.items():
        assert theirs["optimizer." + name if name.startswith("state.") else name].equal(tensor), name
    assert len(theirs) == len(expected) and open_checkpoint(again).step == 3
    dcp_to_torch_save(again, tmp_path / "one.pt")
    one = torch.load(tmp_path / "one.pt")
    assert one["train_state"] == {"step": 3} and one["optimizer"]["state.norm.weight.step"] == 3
    assert one["optimizer"]["state.layers.1.moe.routed_experts.inner_experts.w2_EDF.exp_avg"].shape == (4, 32, 12)


def test_optimizer_state_of_another_format(tmp_path: Path) -> None:
    """FP32 masters have no place; moments have; what is there comes back, with the step."""
    source, state = trained(tmp_path / "source", "exp_avg", "exp_avg_sq", "fp32")
    with pytest.raises(CheckpointError, match=r"\(fp32\).*no place"):
        make_plan(open_checkpoint(source), named("dcp"))
    there = tmp_path / "there"
    plan = make_plan(open_checkpoint(source), named("dcp"), optimizer="carry")
    run(plan, there)
    verify(plan, there)
    titan = loaded(there)
    name = "layers.1.moe.routed_experts.inner_experts.w1_EFD"
    assert titan[f"optimizer.state.{name}.exp_avg_sq"][2].equal(
        state["model.layers.1.mlp.experts.2.gate_proj.weight@exp_avg_sq"])
    assert titan[f"optimizer.state.{name}.step"] == 12 and titan[name].dtype == torch.bfloat16
    back = make_plan(open_checkpoint(there), named("hf"), optimizer="carry")
    run(back, tmp_path / "back")
    found = open_checkpoint(tmp_path / "back")
    carried = load(tmp_path / "back" / "megatron_ext_carried")
    assert found.step == 12 and all(carried[name].equal(tensor) for name, tensor in state.items())
    assert carried.keys() == state.keys()


@pytest.mark.parametrize("prefix", ["", "module.", "state_dict.model.", "model."])
def test_names_of_hugging_face(tmp_path: Path, prefix: str) -> None:
    source = make(tmp_path / "source", "fp8", mtp=1)
    saved = save(tmp_path / "saved", {prefix + name: tensor for name, tensor in load(source).items()}, source)
    assert equal(load(convert(saved, tmp_path / "back", "hf")), load(source))


def test_experts_as_transformers_stacks_them(tmp_path: Path) -> None:
    """In an application's state dict, beside moments; without the FP32 buffer being a parameter."""
    source = make(tmp_path / "source")
    tensors = load(source)
    stack = "model.layers.1.mlp.experts."
    up = [torch.cat([tensors.pop(f"{stack}{e}.gate_proj.weight"), tensors.pop(f"{stack}{e}.up_proj.weight")])
          for e in range(4)]
    tensors[stack + "gate_up_proj"] = torch.stack(up)
    tensors[stack + "down_proj"] = torch.stack([tensors.pop(f"{stack}{e}.down_proj.weight") for e in range(4)])
    moments = {name: {"exp_avg": torch.rand(tensor.shape), "exp_avg_sq": torch.rand(tensor.shape),
                      "step": torch.tensor(5.0)} for name, tensor in tensors.items() if "bias" not in name}
    state = {"app": {"model": tensors, "optim": {"state": moments, "param_groups": [{"lr": 0.1}]}}}
    opened = open_checkpoint(save(tmp_path / "saved", state, source))
    assert opened.step == 5 and opened.states == {"exp_avg", "exp_avg_sq"}
    run(make_plan(opened, named("hf"), optimizer="carry"), tmp_path / "back")
    assert equal(load(tmp_path / "back"), load(source))
    carried = load(tmp_path / "back" / "megatron_ext_carried")
    assert carried[f"{stack}3.up_proj.weight@exp_avg"].equal(moments[stack + "gate_up_proj"]["exp_avg"][3, 12:])


def test_names_that_torchtitan_had_earlier(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    earlier = {}
    for name, tensor in torchtitan(load(source)).items():
        for new, old in (("lm_head", "output"), ("routed_experts.inner_experts.", "experts."), ("_EFD", ""),
                         ("_EDF", ""), ("bias_E", "bias")):
            name = name.replace(new, old)
        earlier[name] = tensor
    assert "layers.1.moe.experts.w1" in earlier
    assert equal(load(convert(save(tmp_path / "saved", earlier, source), tmp_path / "back", "hf")), load(source))


def test_biases_get_the_names_that_modules_would_give_them(tmp_path: Path) -> None:
    source = make(tmp_path / "source", attention_bias=True)
    there = convert(source, tmp_path / "there", "dcp")
    assert {name for name in loaded(there) if name.endswith(".bias") and "layers.0" in name} == {
        f"layers.0.attention.{name}.bias" for name in ("wq_a", "wkv_a", "wo")}
    assert equal(load(convert(there, tmp_path / "back", "hf")), load(source))


def test_tensors_whose_columns_lie_first(tmp_path: Path) -> None:
    """torch.save keeps strides: of two chunks of the same shape one may be transposed, and experts permuted."""
    source = make(tmp_path / "source", "fp8", wide=True)
    tensors = torchtitan(load(source))
    for name in ("layers.0.attention.wkv_a.weight", "layers.1.attention.wkv_b.weight_scale_inv"):
        tensors[name] = tensors[name].T.contiguous().T
    for name in ("layers.1.moe.routed_experts.inner_experts.w1_EFD",
                 "layers.1.moe.routed_experts.inner_experts.w1_EFD_scale_inv"):
        tensors[name] = tensors[name].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    saved = save(tmp_path / "saved", tensors, source)
    assert {chunk.order for tensor in dcp_io.read(Folder(saved)).tensors.values() for chunk in tensor.chunks} == {
        (0,), (0, 1), (1, 0), (0, 1, 2), (2, 0, 1)}
    assert equal(load(convert(saved, tmp_path / "back", "hf")), load(source))
    bf16 = load(convert(source, tmp_path / "expected", "hf", "bf16"))
    assert equal(load(convert(saved, tmp_path / "bf16", "hf", "bf16")), bf16)


def test_shards_in_safetensors(tmp_path: Path) -> None:
    source = make(tmp_path / "source", mtp=1)
    (tmp_path / "saved").mkdir()
    saved = save(tmp_path / "saved", load(source), source,
                 storage_writer=HuggingFaceStorageWriter(str(tmp_path / "saved"), save_distributed=True))
    assert not (saved / ".metadata").exists() and open_checkpoint(saved).format == "dcp"
    assert equal(load(convert(saved, tmp_path / "back", "hf")), load(source))


# -- the container by itself

def test_objects_and_small_tensors(tmp_path: Path) -> None:
    whole_part = (Part("x", whole((3, 5)), whole((3, 5))),)
    objects = [DcpObject("a.n", {"lr": [0.1, None, "text"]}, ("a", "n")), DcpObject("s", torch.tensor([1, 2]))]
    files, documents = dcp_io.lay_out("iter_1/", [DcpTarget("a.x", "F32", (3, 5), whole_part, path=("a", "x"))],
                                      objects, 10, {"more": 7})
    (tmp_path / "iter_1").mkdir()
    (tmp_path / "iter_1/.metadata").write_bytes(documents["iter_1/.metadata"])
    numbers = torch.randn(3, 5)
    for file in files:
        content = bytearray(file.size)
        for offset, literal in file.literals:
            content[offset:offset + len(literal)] = literal
        for tensor in file.tensors:
            rows = numbers[tensor.parts[0].of[0][0]:tensor.parts[0].of[0][1]].numpy().tobytes()
            content[tensor.offset:tensor.offset + tensor.nbytes] = rows
            for at in file.crcs[tensor.name]:
                content[at:at + 4] = struct.pack("<I", zlib.crc32(rows))
        (tmp_path / file.path).write_bytes(content)
    dcp_to_torch_save(tmp_path / "iter_1", tmp_path / "one.pt")
    one = torch.load(tmp_path / "one.pt")
    assert one["a"]["n"] == {"lr": [0.1, None, "text"]} and one["s"].tolist() == [1, 2] and one["a"]["x"].equal(numbers)
    read = dcp_io.read(Folder(tmp_path), "iter_1/")
    assert read.object("a.n") == {"lr": [0.1, None, "text"]} and read.metadata is not None
    assert read.metadata.get("more") == 7 and [chunk.box for chunk in read.tensors["a.x"].chunks] == [
        ((row, row + 1), (0, 5)) for row in range(3)]
    with Files(Folder(tmp_path)) as opened:
        for row, stored in enumerate(dcp_io.stored("a.x", read.tensors["a.x"], whole_part)):
            assert opened.box(stored, whole(stored.shape)).tobytes() == numbers[row].numpy().tobytes()
