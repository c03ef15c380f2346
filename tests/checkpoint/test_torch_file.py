"""Files of torch.save: read as data, written so that torch reads them, whatever a stranger puts in."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import random
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint.convert import pickles, torch_file
from megatron_ext.checkpoint.convert.folder import Folder
from megatron_ext.checkpoint.convert.pickles import Record, TensorRef
from megatron_ext.checkpoint.convert.tensors import Stored, TargetFile
from megatron_ext.checkpoint.convert.torch_file import Slot
from megatron_ext.config.errors import CheckpointError, ConfigError, shown

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8,
          torch.bool]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else tensor.numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_lie_where_we_say(tmp_path: Path, dtype: torch.dtype) -> None:
    base = (torch.randn(6, 8) * 3).to(dtype)
    tensors = {"whole": base, "row": base[2], "column": base[:, 3], "turned": base.T, "empty": base[:0],
               "parameter": torch.nn.Parameter(base.clone(), requires_grad=dtype.is_floating_point)}
    torch.save({"module": OrderedDict(tensors), "step": 7, "nested": [{"a": (1, 2.5, None, True, "x")}]},
               tmp_path / "a.pt")
    tree = torch_file.read(Folder(tmp_path), "a.pt")
    assert tree["step"] == 7 and tree["nested"] == [{"a": (1, 2.5, None, True, "x")}]
    content = (tmp_path / "a.pt").read_bytes()
    for name, tensor in tensors.items():
        ref = tree["module"][name]
        assert ref.shape == tuple(tensor.shape) and ref.stride == tensor.stride()
        assert ref.dense == (name not in ("column", "turned"))
        if ref.dense:
            assert content[ref.offset:ref.offset + ref.nbytes] == bits(tensor.detach())
            assert bits(torch_file.numbers(Folder(tmp_path), ref)) == bits(tensor.detach())


def test_objects_of_frameworks_are_records(tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    torch.save({"args": argparse.Namespace(tensor_model_parallel_size=2, params_dtype=torch.bfloat16),
                "scaler": LossScaler(4.0), "shape": torch.Size([2, 3]), "device": torch.device("cpu")},
               tmp_path / "a.pt")
    tree = torch_file.read(Folder(tmp_path), "a.pt")
    assert tree["args"].name == "argparse.Namespace" and tree["args"].get("params_dtype") == "BF16"
    assert isinstance(tree["scaler"], Record) and tree["scaler"].get("cur_scale") == 4.0
    assert tree["shape"] == (2, 3) and tree["device"] == "cpu"


def written(path: Path, tree: Any, tensors: dict[str, torch.Tensor]) -> TargetFile:
    """Lays out a file and fills it as workers do."""
    names = {dtype: name for name, dtype in torch_file._DTYPES.items()}
    stored = [Stored(name, "", -1, names[tensor.dtype], tuple(tensor.shape), ()) for name, tensor in tensors.items()]
    file = torch_file.lay_out(path.name, tree, stored)
    content = bytearray(file.size)
    for offset, literal in file.literals:
        content[offset:offset + len(literal)] = literal
    for placed in file.tensors:
        number = bits(tensors[placed.name])
        content[placed.offset:placed.offset + len(number)] = number
        for place in file.crcs[placed.name]:
            content[place:place + 4] = zlib.crc32(number).to_bytes(4, "little")
    path.write_bytes(content)
    return file


def test_torch_loads_what_we_write(tmp_path: Path) -> None:
    tensors = {f"t{number}": (torch.randn(5, 3 + number) * 3).to(dtype) for number, dtype in enumerate(DTYPES[1:5])}
    tensors |= {"none": torch.empty(0, 4), "scalar": torch.tensor(2.5)}
    tree = {"model": OrderedDict((name, Slot(name)) for name in tensors), "again": Slot("t0"), "iteration": 5,
            "small": torch.arange(4), "args": argparse.Namespace(a=1, dtype=torch.bfloat16)}
    file = written(tmp_path / "a.pt", tree, tensors)
    found = torch.load(tmp_path / "a.pt", weights_only=False)
    assert found["iteration"] == 5 and torch.equal(found["small"], torch.arange(4)) and found["args"].a == 1
    assert found["again"].data_ptr() == found["model"]["t0"].data_ptr()
    for name, tensor in tensors.items():
        assert found["model"][name].dtype == tensor.dtype and bits(found["model"][name]) == bits(tensor)
    assert zipfile.ZipFile(tmp_path / "a.pt").testzip() is None  # every CRC-32
    assert all(tensor.offset % 64 == 0 for tensor in file.tensors)
    assert torch.load(tmp_path / "a.pt", mmap=True, weights_only=False)["iteration"] == 5
    ours = torch_file.read(Folder(tmp_path), "a.pt")
    assert {name: ref.offset for name, ref in ours["model"].items()} == {t.name: t.offset for t in file.tensors}


def test_files_and_tensors_beyond_4_gib(tmp_path: Path) -> None:
    """Sparse: the sizes are there, the bytes are zeros."""
    stored = [Stored("small", "", -1, "F32", (4,), ()), Stored("huge", "", -1, "BF16", (3, 1 << 30), ()),
              Stored("last", "", -1, "F32", (2, 2), ())]
    file = torch_file.lay_out("a.pt", {name: Slot(name) for name in ("small", "huge", "last")}, stored)
    assert file.size > 6 << 30
    with open(tmp_path / "a.pt", "wb") as out:
        out.truncate(file.size)
        for offset, literal in file.literals:
            os.pwrite(out.fileno(), literal, offset)
        os.pwrite(out.fileno(), torch.arange(4.0).numpy().tobytes(), file.tensors[2].offset)
    found = torch.load(tmp_path / "a.pt", mmap=True)
    assert found["huge"].shape == (3, 1 << 30) and found["last"].tolist() == [[0, 1], [2, 3]]
    ours = torch_file.read(Folder(tmp_path), "a.pt")
    assert ours["last"].offset == file.tensors[2].offset > 6 << 30
    assert torch_file.numbers(Folder(tmp_path), ours["last"]).tolist() == [[0, 1], [2, 3]]


def test_an_archive_within_a_file(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(torch.arange(5), buffer)
    (tmp_path / "b").write_bytes(b"before" + buffer.getvalue() + b"behind")
    ref = torch_file.read(Folder(tmp_path), "b", 6, len(buffer.getvalue()))
    assert torch_file.numbers(Folder(tmp_path), ref).tolist() == [0, 1, 2, 3, 4]
    assert torch_file.scalar(Folder(tmp_path), ref._replace(shape=(), stride=(), offset=ref.offset + 16)) == 2


# -- hostile

class Call:
    def __init__(self, function: Any, *args: Any):
        self.reduced = function, args

    def __reduce__(self) -> Any:
        return self.reduced


HOSTILE = {
    "os.system": pickle.dumps(Call(os.system, "touch pwned")),
    "eval": pickle.dumps(Call(eval, "open('pwned', 'w')")),
    "getattr": pickle.dumps(Call(getattr, OrderedDict, "eval")),
    "import": b"c__builtin__\n__import__\n(S'os'\ntR.",
    "subprocess": b"csubprocess\nPopen\n((lp0\nS'touch'\naS'pwned'\natR.",
    "inst": b"(S'touch pwned'\nios\nsystem\n.",
    "torch function": b"ctorch.hub\nload\n(S'x'\ntR.",
    "a storage that is executed": b"ctorch.storage\n_load_from_bytes\n(C\x05helloctorch\nSize\ntR.",
    "calls a string": b"S'os'\n(S'x'\ntR.",
    "memo of 64 GiB": b"\x80\x02Nr\xff\xff\xff\xff.",
    "bytes of 2**62": b"\x80\x04\x8e" + (1 << 62).to_bytes(8, "little") + b"x.",
    "bytearray of 2**40": b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b"x.",
    "nested tuple as a key": b"\x80\x02})" + b"\x85" * 2_000_000 + b"Ns.",
    "nested lists": b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",
    "endless mark": b"(" * 100_000,
    "huge int": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "persistent id": b"\x80\x02(X\x07\x00\x00\x00storageK\x01K\x02K\x03K\x04tQ.",
    "changes a name": b"\x80\x02ctorch\nSize\n}X\x01\x00\x00\x00aK\x01sb.",
    "device that doubles": b"\x80\x02X\x64\0\0\0" + b"a" * 100 + b"q\x00" +
                           b"0ctorch\ndevice\nh\x00h\x00\x86Rq\x00" * 40 + b".",
    "empty": b"", "cut": pickle.dumps({"a": 1})[:-3], "no pickle": b"\x00\x01\x02",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_pickles_do_nothing(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if content in (HOSTILE["nested lists"], HOSTILE["memo of 64 GiB"]):
        pickles.load(content, Path("a"))  # only memory, and no more than the file has
    else:
        with pytest.raises(CheckpointError) as error:
            pickles.load(content, Path("a"))
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert not (tmp_path / "pwned").exists()


def test_values_are_shown_in_a_short_line_however_deep_they_are() -> None:
    nested: Any = []
    for _ in range(60):
        nested = [nested, nested]  # 2**60 lists, for whoever walks through them
    for value in (nested, {"a": nested}, 10**6000, [10**6000], "x" * 10**6, "a\n\x1b[31m\udc80", {1: "\n"}):
        text = str(CheckpointError("a", f"has {shown(value)}"))
        assert text.isprintable() and len(text) < 300
        text = str(ConfigError("a.b", value, "is wrong"))
        assert text.isprintable() and len(text) < 300


def test_tensors_outside_their_storage_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(8)}, tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    longer = content.replace(b"K\x08\x85", b"K\x09\x85")  # the shape; nothing checks the pickle's CRC
    assert longer != content
    (tmp_path / "a.pt").write_bytes(longer)
    with pytest.raises(CheckpointError, match="not inside its storage"):
        torch_file.read(Folder(tmp_path), "a.pt")


def test_old_and_compressed_files_are_told(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(8)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before 1\.6"):
        torch_file.read(Folder(tmp_path), "old.pt")
    with zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}))
    with pytest.raises(CheckpointError, match="compressed"):
        torch_file.read(Folder(tmp_path), "small.pt")


def test_flipped_bytes_end_in_one_line_or_in_the_same_objects(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(6.0), "b": OrderedDict(c=torch.ones(2, 3)), "n": argparse.Namespace(x=1)},
               tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    random.seed(0)
    for _ in range(400):
        broken = bytearray(content)
        for _ in range(random.randint(1, 8)):
            broken[random.randrange(len(broken))] = random.randrange(256)
        if random.random() < 0.2:
            del broken[random.randrange(len(broken)):]
        (tmp_path / "b.pt").write_bytes(broken)
        try:
            tree = torch_file.read(Folder(tmp_path), "b.pt")
        except CheckpointError as error:
            assert "\n" not in str(error) and len(str(error)) < 400
            continue
        for ref in [tree] if isinstance(tree, TensorRef) else list(tree.values()) if isinstance(tree, dict) else []:
            if isinstance(ref, TensorRef):
                assert ref.offset >= 0 and ref.offset + ref.nbytes <= len(broken)
