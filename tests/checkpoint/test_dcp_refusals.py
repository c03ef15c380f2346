"""Damaged and hostile checkpoints of torch.distributed.checkpoint: one line with file and tensor, nothing executed."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_ext.checkpoint.convert import make_plan, named, open_checkpoint, run
from megatron_ext.checkpoint.convert.dcp_index import check_cover
from megatron_ext.checkpoint.convert.source import CARRIED, FACTS, MANIFEST
from megatron_ext.config.errors import CheckpointError, UserError
from tests.checkpoint.test_dcp import save, torchtitan
from tests.checkpoint.test_selection import trained
from tests.checkpoint.tiny import convert, load, make

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(("shape", "boxes", "good"), [
    ((4, 4), [((0, 2), (0, 4)), ((2, 4), (0, 4))], True), ((4, 4), [((0, 4), (0, 2)), ((0, 4), (2, 4))], True),
    ((4, 4), [((0, 2), (0, 4)), ((1, 3), (0, 4))], False), ((4, 4), [((0, 2), (0, 4))], False),
    ((4, 4), [((0, 2), (0, 4)), ((2, 5), (0, 4))], False), ((4, 4), [((0, 3), (0, 4)), ((2, 3), (0, 4))], False),
    ((2, 2), [((0, 1), (0, 2)), ((0, 1), (0, 1)), ((1, 2), (0, 1))], False), ((), [()], True), ((), [(), ()], False),
    ((0, 3), [], True), ((3, 3), [], False),
    ((2, 4), [((0, 1), (0, 3)), ((0, 1), (3, 4)), ((1, 2), (0, 1)), ((1, 2), (1, 4))], True)])
def test_chunks_are_the_whole_or_refused(shape: Any, boxes: Any, good: bool) -> None:
    if good:
        check_cover("x", shape, boxes, Path("index"))
    else:
        with pytest.raises(CheckpointError, match=r"index: tensor x has \d chunks that are not the whole"):
            check_cover("x", shape, boxes, Path("index"))


def refusal(folder: Path) -> str:
    """The error of a conversion; it has written nothing."""
    out = folder.parent / "out"
    with pytest.raises(UserError) as caught:
        run(make_plan(open_checkpoint(folder, "dcp"), named("hf"), optimizer="drop"), out)
    message = str(caught.value)
    assert "\n" not in message and message.isprintable() and len(message) < 1000
    assert not out.exists() and not list(folder.parent.glob("*.converting"))
    return message


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    source = make(tmp_path / "source", mtp=1)
    state = {**torchtitan(load(source)), "train_state": {"step": 4}}
    return save(tmp_path / "saved", state, source)


NAME = "layers.1.attention.wo.weight"


def _placed(metadata: Any) -> Any:
    return metadata.storage_data[MetadataIndex(NAME, [0, 0])]


def _chunk(metadata: Any) -> Any:
    return metadata.state_dict_metadata[NAME].chunks[0]


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


INDEXES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "..": (lambda m: setattr(_placed(m), "relative_path", "../saved/__0_0.distcp"), "not plainly inside"),
    "absolute": (lambda m: setattr(_placed(m), "relative_path", "/etc/passwd"), "not plainly inside"),
    "no file": (lambda m: setattr(_placed(m), "relative_path", "__9_9.distcp"), "__9_9.distcp: does not exist"),
    "no text": (lambda m: setattr(_placed(m), "relative_path", None), "places a chunk nowhere"),
    "beyond": (lambda m: setattr(_placed(m), "offset", 1 << 40), f"{NAME} ends at byte .* cut off"),
    "negative": (lambda m: setattr(_placed(m), "offset", -1), "places a chunk nowhere"),
    "length": (lambda m: setattr(_placed(m), "length", 900), "no archive"),
    "other": (lambda m: setattr(_placed(m), "offset", 0), "__0_0.distcp: .*"),
    "compressed": (lambda m: setattr(_placed(m), "transform_descriptors", ["stream.zstd"]), "transformed"),
    "unplaced": (lambda m: m.storage_data.pop(MetadataIndex(NAME, [0, 0])), f"{NAME} has no place in any file"),
    "overlap": (lambda m: m.state_dict_metadata[NAME].chunks.append(_chunk(m)), f"{NAME} has 2 chunks that are not"),
    "hole": (lambda m: setattr(_chunk(m), "sizes", torch.Size([31, 32])), f"{NAME} has 1 chunks that are not"),
    "outside": (lambda m: setattr(_chunk(m), "offsets", torch.Size([1, 0])), f"{NAME} has 1 chunks that are not"),
    "dimensions": (lambda m: setattr(_chunk(m), "sizes", torch.Size([32])), "no box of it"),
    "huge": (lambda m: setattr(_chunk(m), "sizes", torch.Size([1 << 60, 1])), "no box of it"),
    "dtype": (lambda m: setattr(m.state_dict_metadata[NAME].properties, "dtype", torch.float32),
              f"{NAME} is BF16 .*, and F32"),
    "complex": (lambda m: setattr(m.state_dict_metadata[NAME].properties, "dtype", torch.complex64), "complex64"),
    "shape": (lambda m: m.state_dict_metadata.update({NAME: m.state_dict_metadata["layers.0.attention.wq_a.weight"]}),
              f"{NAME} is BF16"),
    "missing": (lambda m: m.state_dict_metadata.pop(NAME), "o_proj.weight is missing"),
    "unknown": (lambda m: m.state_dict_metadata.update({"extra": m.state_dict_metadata["train_state.step"]}),
                "tensor extra has no place"),
    "no tensors": (lambda m: setattr(m, "state_dict_metadata", None), "has no state_dict_metadata"),
    "executes": (lambda m: setattr(m, "planner_data", _Runs()), "names 'posix.system'"),
    "step": (lambda m: m.storage_data.update({MetadataIndex("train_state.step"): _placed(m)}), "train_state.step is"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_indexes_that_lie(saved: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, words = INDEXES[case]
    monkeypatch.chdir(saved)
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    change(metadata)
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    assert re.search(words, refusal(saved))
    assert not (saved / "executed").exists()


def test_archives_are_not_executed(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even that of a number of steps, which is read as an object."""
    monkeypatch.chdir(saved)
    archive = io.BytesIO()
    torch.save(_Runs(), archive)
    good = (saved / ".metadata").read_bytes()
    for index in (MetadataIndex(NAME, [0, 0]), MetadataIndex("train_state.step")):
        metadata, path = pickle.loads(good), saved / "__0_0.distcp"
        metadata.storage_data[index].offset = path.stat().st_size
        metadata.storage_data[index].length = len(archive.getvalue())
        with path.open("ab") as file:
            file.write(archive.getvalue())
        (saved / ".metadata").write_bytes(pickle.dumps(metadata))
        assert "__0_0.distcp: names 'posix.system'" in refusal(saved)
    assert not (saved / "executed").exists()


def test_names_of_nobody_and_steps_that_differ(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    tensors: dict[str, Any] = dict(torchtitan(load(source)))
    assert "0 tensors named as an embedding" in refusal(save(
        tmp_path / "a", {name: t for name, t in tensors.items() if "tok_" not in name}, source))
    more = {"model.embed_tokens.weight": tensors["tok_embeddings.weight"]}
    assert "2 tensors named as an embedding" in refusal(save(tmp_path / "b", tensors | more, source))
    steps = {"state.norm.weight.step": torch.tensor(3.0), "state.lm_head.weight.step": torch.tensor(4.0)}
    cases: list[tuple[str, Any, str]] = [
        ("layers.1.moe.other", torch.ones(2), "layers.1.moe.other has no place"), ("epoch", 3, "epoch is no tensor"),
        ("norm.weight", torch.ones(32, dtype=torch.int64), "norm.weight is I64"),
        ("norm.weight", torch.ones(31), r"norm.weight has shape \(31,\)"),
        ("optimizer.state.norm.weight.max_exp_avg_sq", torch.ones(32), "max_exp_avg_sq has no place"),
        ("optimizer.state.other.step", torch.ones(()), "other.step has no place"),
        ("train_state", {"step": 1.5}, "train_state.step is 1.5"),
        ("optimizer", steps, "lm_head.weight.step is 4, and 3 for .*norm")]
    for key, value, words in cases:
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        assert re.search(words, refusal(save(tmp_path / "c", tensors | {key: value}, source)))


def test_files_that_are_not_whole(saved: Path) -> None:
    path, content = saved / "__0_0.distcp", (saved / "__0_0.distcp").read_bytes()
    for cut in (len(content) - 1, len(content) // 2, 0):
        path.write_bytes(content[:cut])
        assert "__0_0.distcp" in refusal(saved) and "cut off" in refusal(saved)
    path.unlink()
    assert "__0_0.distcp: does not exist" in refusal(saved)
    path.symlink_to("/etc/passwd")
    assert "symbolic link" in refusal(saved)


def test_shards_in_safetensors_that_lie(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    saved = save(tmp_path / "saved", load(source), source,
                 storage_writer=HuggingFaceStorageWriter(str(tmp_path / "saved"), save_distributed=True))
    (path,) = saved.glob("*.safetensors")
    good = path.read_bytes()
    for old, new, words in ((rb'\"saved_offsets\": [0, 0]', rb'\"saved_offsets\": [0, 1]', "has 1 chunks that are not"),
                            (rb'\"saved_offsets\": [0, 0]', rb'\"saved_offsets\": [0, x]', "cannot be read as JSON"),
                            (rb'\"saved_offsets\": [0, 0]', rb'\"saved_offsets\": [0   ]', "has no offsets"),
                            (b"DCP_SHARDING_INFO", b"DCP_SHARDING_NONE", "has no offsets")):
        assert old in good
        path.write_bytes(good.replace(old, new, 1))
        assert re.search(words, refusal(saved))
    path.write_bytes(good)
    content = {"model.norm.weight": torch.empty(0, 3)}
    offsets = json.dumps({"model.norm.weight": {"saved_offsets": [0, 0]}})
    save_file(content, saved / "shard-00002-model-00001-of-00001.safetensors", {"DCP_SHARDING_INFO": offsets})
    assert "tensor model.norm.weight is F32, and BF16 in another shard" in refusal(saved)
    content["model.norm.weight"] = content["model.norm.weight"].bfloat16()
    save_file(content, saved / "shard-00002-model-00001-of-00001.safetensors", {"DCP_SHARDING_INFO": offsets})
    assert "tensor model.norm.weight has another number of dimensions" in refusal(saved)


def test_fuzzed_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens to index and archives: a refusal in a line, or a whole result; nothing outside."""
    source = make(tmp_path / "source", "fp8", mtp=1)
    good = save(tmp_path / "good", {**torchtitan(load(source)), "train_state": {"step": 4}}, source)
    ours = convert(source, tmp_path / "ours", "dcp")
    work = tmp_path / "work"
    work.mkdir()
    draw, refused = random.Random(0), 0
    for number in range(60):
        bad = work / "bad"
        shutil.copytree((good, ours)[number % 2], bad)
        (bad / MANIFEST).unlink(missing_ok=True)
        path = bad / (".metadata" if number % 3 else "__0_0.distcp")
        content = bytearray(path.read_bytes())
        kind = draw.randrange(4)
        at = draw.randrange(len(content))
        if kind == 0:
            for _ in range(draw.randint(1, 8)):
                content[draw.randrange(len(content))] = draw.randrange(256)
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            content[at:at] = content[draw.randrange(len(content)):][:draw.randint(1, 40)]
        else:
            content[at:at + 3] = draw.choice([b"cos\nsystem\n", b"../", b"\x95\xff\xff\xff", b"j\xff\xff\xff\xff"])
        path.write_bytes(bytes(content))
        try:
            run(make_plan(open_checkpoint(bad), named("hf"), optimizer="drop"), work / "out")
        except UserError as error:
            refused += 1
            message = str(error)
            assert "\n" not in message and message.isprintable() and len(message) < 2000
            assert not (work / "out").exists()
        assert {path.name for path in work.iterdir()} <= {"bad", "out"}
        for path in list(work.iterdir()):
            shutil.rmtree(path)
    assert refused > 25


def test_a_config_is_needed(saved: Path) -> None:
    values = json.loads((saved / "config.json").read_text())
    (saved / "config.json").unlink()
    assert "config.json: does not exist" in refusal(saved)
    (saved.parent / "given.json").write_text(json.dumps(values))
    assert open_checkpoint(saved, config=saved.parent / "given.json").step == 4


def test_moments_without_a_step_are_not_written(tmp_path: Path) -> None:
    source, _ = trained(tmp_path / "source", "exp_avg", "exp_avg_sq")
    assert make_plan(open_checkpoint(source), named("dcp"), optimizer="keep").files
    facts = source / CARRIED / FACTS
    facts.write_text(json.dumps({key: value for key, value in json.loads(facts.read_text()).items() if key != "step"}))
    with pytest.raises(CheckpointError, match=r"would have moments and no step.*--optimizer drop"):
        make_plan(open_checkpoint(source), named("dcp"), optimizer="keep")
    assert make_plan(open_checkpoint(source), named("dcp"), optimizer="drop").files
