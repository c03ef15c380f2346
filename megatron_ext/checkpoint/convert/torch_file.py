"""What `torch.save` writes: a zip archive, uncompressed, of one pickle and the bytes of each storage.

    <root>/data.pkl         the objects; a tensor is (storage, offset, shape, strides)
    <root>/byteorder        "little"
    <root>/data/<key>       the bytes of a storage, aligned to 64 in the file
    <root>/version          "3"

Reading finds the directory at the end of the archive, checks every record in it against the file, and answers with
`TensorRef`s: where in the file the numbers lie. Writing lays out the same with places for tensors that are streamed
later; the CRC-32 of their records follow when they are known (`TargetFile.crcs`). An archive may lie within a larger
file, as it does in torch.distributed.checkpoint's.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_ext.checkpoint.convert import pickles
from megatron_ext.checkpoint.convert.folder import Folder
from megatron_ext.checkpoint.convert.pickles import SIZES, PickleError, Storage, TensorRef
from megatron_ext.checkpoint.convert.tensors import Shape, Stored, TargetFile
from megatron_ext.config.errors import CheckpointError

MAX_PICKLE = 1 << 28
MAX_NUMBERS = 1 << 20
"""Bytes of the largest tensor that `numbers` reads."""
_ALIGNMENT = 64
_HUGE = 0xFFFFFFFF
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
           "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
           "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


# -- reading

class _Window(io.RawIOBase):
    """A part of a file, as a file; no more is read at once than a directory can take."""

    def __init__(self, descriptor: int, start: int, length: int):
        self._descriptor, self._start, self._length, self._at = descriptor, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("before the start")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        size = left if size < 0 else min(size, left)
        if size > MAX_PICKLE:
            raise zipfile.BadZipFile(f"its directory takes {size} bytes")
        content = os.pread(self._descriptor, size, self._start + self._at)
        self._at += len(content)
        return content


def read(folder: Folder, file: str, at: int = 0, length: int | None = None) -> Any:
    """The objects of a file of `torch.save`, with `TensorRef`s in place of tensors.

    Args:
        folder: opened through.
        file: relative to it.
        at: where the archive begins in the file.
        length: of the archive; None for the rest of the file.

    Raises:
        CheckpointError: it is damaged, of another kind, or its pickle is refused.
    """
    path = folder / file
    with folder.open(file) as descriptor:
        size = os.fstat(descriptor).st_size
        length = size - at if length is None else length
        if not 0 <= at <= size or not 0 <= length <= size - at:
            raise CheckpointError(path, f"has {size} bytes, and an archive is due at {at} with {length}",
                                  "the file was cut off")
        records = _directory(path, descriptor, at, length)
        root = _root(path, records)
        start, count = records[f"{root}/data.pkl"]
        if count > MAX_PICKLE:
            raise CheckpointError(path, f"has a pickle of {count} bytes", f"at most {MAX_PICKLE} are read")
        order = records.get(f"{root}/byteorder")
        if order is not None and os.pread(descriptor, min(order[1], 16), order[0]) != b"little":
            raise CheckpointError(path, "is not little-endian")
        content = os.pread(descriptor, count, start)
    if len(content) != count:
        raise CheckpointError(path, "ends inside its pickle", "the file was cut off")

    def tensor(storage: Storage, offset: int, shape: Shape, stride: Shape, dtype: str) -> TensorRef:
        record = records.get(f"{root}/data/{storage.key}")
        if record is None:
            raise PickleError(f"has no storage {storage.key[:40]!a}")
        bytes_of_storage = storage.numel * (SIZES[storage.dtype] if storage.dtype else 1)
        end = 0 if 0 in shape else offset + 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if bytes_of_storage > record[1] or end * SIZES[dtype] > bytes_of_storage:
            raise PickleError(f"has a tensor {shape} that is not inside its storage of {record[1]} bytes")
        return TensorRef(file, record[0] + offset * SIZES[dtype], dtype, shape, stride)

    return pickles.load(content, path, tensor)


def _directory(path: Path, descriptor: int, at: int, length: int) -> dict[str, tuple[int, int]]:
    """Record -> offset of its bytes in the file, and their count."""
    if length < 22 or os.pread(descriptor, 4, at) != b"PK\x03\x04":
        raise CheckpointError(path, "is no archive of torch.save",
                              "files of torch before 1.6 are not read; load and save them once more")
    try:
        window: Any = _Window(descriptor, at, length)
        with zipfile.ZipFile(window) as archive:
            infos, end = archive.infolist(), archive.start_dir
    except Exception as error:  # the directory is a stranger's: zipfile raises half a dozen kinds of errors for it
        said = f"{type(error).__name__}: {error}"[:100].encode("unicode_escape").decode()
        raise CheckpointError(path, f"is no archive that can be read ({said})",
                              "it is cut off or damaged") from None
    records: dict[str, tuple[int, int]] = {}
    last = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        head = os.pread(descriptor, 30, at + info.header_offset) if 0 <= info.header_offset < end else b""
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            raise CheckpointError(path, f"has the record {info.filename[:80]!a} compressed or encrypted")
        if len(head) < 30 or head[:4] != b"PK\x03\x04" or info.header_offset < last:
            raise CheckpointError(path, f"has no record at byte {info.header_offset}, where its directory says so")
        first = info.header_offset + 30 + sum(struct.unpack("<HH", head[26:30]))
        last = first + info.file_size
        if last > end:
            raise CheckpointError(path, f"has the record {info.filename[:80]!a} beyond its end")
        if info.filename in records:
            raise CheckpointError(path, f"has the record {info.filename[:80]!a} twice")
        records[info.filename] = at + first, info.file_size
    return records


def _root(path: Path, records: dict[str, tuple[int, int]]) -> str:
    roots = [name.removesuffix("/data.pkl") for name in records if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise CheckpointError(path, f"has {len(roots)} records data.pkl", "torch.save writes one")
    return roots[0]


def numbers(folder: Folder, ref: TensorRef) -> torch.Tensor:
    """A small tensor.

    Raises:
        CheckpointError: it is not small, or the file ends before.
    """
    if ref.nbytes > MAX_NUMBERS or not ref.dense:
        raise CheckpointError(folder / ref.file, f"has a tensor {ref.shape} where a small one is due")
    with folder.open(ref.file) as descriptor:
        content = os.pread(descriptor, ref.nbytes, ref.offset)
    if len(content) != ref.nbytes:
        raise CheckpointError(folder / ref.file, f"ends inside a tensor of shape {ref.shape}", "the file was cut off")
    if not content:
        return torch.empty(ref.shape, dtype=_DTYPES[ref.dtype])
    return torch.frombuffer(bytearray(content), dtype=_DTYPES[ref.dtype]).reshape(ref.shape)


def scalar(folder: Folder, ref: TensorRef) -> int | float | bool:
    """The number of a tensor that has one."""
    if ref.numel != 1:
        raise CheckpointError(folder / ref.file, f"has a tensor {ref.shape} where one number is due")
    return numbers(folder, ref).item()


# -- writing

class Slot(str):
    """Stands in a tree for the tensor of that name, which is streamed."""


class Item(NamedTuple):
    """An archive inside a file.

    Attributes:
        size: bytes in all.
        literals: (offset in the file, bytes) of everything but streamed tensors.
        tensors: with their offsets in the file.
        crcs: name of a streamed tensor -> offsets at which the CRC-32 of its bytes goes, little-endian.
    """

    size: int
    literals: list[tuple[int, bytes]]
    tensors: list[Stored]
    crcs: dict[str, list[int]]


@dataclass(frozen=True)
class _Bytes:
    """A storage that the pickle refers to."""

    key: str
    dtype: str
    numel: int


class _Pickler(pickle.Pickler):
    """Pickles as torch.save does, with storages by key."""

    def __init__(self, file: io.BytesIO, tensors: dict[str, Stored]):
        super().__init__(file, 2)
        self._streamed = tensors
        self.contents: dict[str, Stored | bytes] = {}
        self._keys: dict[str, str] = {}

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Bytes):
            return None
        return "storage", _storage_class(obj.dtype), obj.key, "cpu", obj.numel

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Slot):
            tensor = self._streamed[obj]
            if obj not in self._keys:
                self._keys[obj] = str(len(self.contents))
                self.contents[self._keys[obj]] = tensor
            return self._tensor(self._keys[obj], tensor.dtype, tensor.shape)
        if isinstance(obj, torch.Tensor):
            dense = obj.detach().cpu().contiguous()
            key = str(len(self.contents))
            self.contents[key] = dense.reshape(-1).view(torch.uint8).numpy().tobytes()
            return self._tensor(key, next(name for name, dtype in _DTYPES.items() if dtype == obj.dtype), dense.shape)
        return NotImplemented

    def _tensor(self, key: str, dtype: str, shape: Sequence[int]) -> Any:
        stride: list[int] = []
        count = 1
        for size in reversed(shape):
            stride.insert(0, count)
            count *= max(1, size)
        count = 0 if 0 in shape else count
        typed = _storage_class(dtype) is not torch.UntypedStorage
        storage = _Bytes(key, dtype, count if typed else count * SIZES[dtype])
        args: tuple[Any, ...] = (storage, 0, tuple(shape), tuple(stride), False, OrderedDict())
        if typed:
            return torch._utils._rebuild_tensor_v2, args
        return torch._utils._rebuild_tensor_v3, (*args, _DTYPES[dtype])


@cache
def _storage_class(dtype: str) -> type:
    """Older dtypes have a class of storages; FP8 has the untyped one."""
    for name, known in pickles.STORAGES.items():
        if known == dtype:
            found: type = getattr(torch, f"{name}Storage")
            return found
    return torch.UntypedStorage


def item(tree: Any, tensors: Sequence[Stored], base: int = 0, file: str = "", root: str = "archive") -> Item:
    """Lays out an archive.

    Args:
        tree: dicts, lists, numbers, text, small tensors; `Slot(name)` for each streamed tensor.
        tensors: the streamed ones, every one of which the tree must hold.
        base: where the archive begins in its file.
        file: name of the file.
        root: folder inside the archive.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, {tensor.name: tensor for tensor in tensors})
    pickler.dump(tree)
    contents: dict[str, Stored | bytes] = {"data.pkl": buffer.getvalue(), "byteorder": b"little"}
    contents |= {f"data/{key}": content for key, content in pickler.contents.items()}
    contents["version"] = b"3\n"
    placed: dict[str, Stored] = {}
    literals: list[tuple[int, bytes]] = []
    crcs: dict[str, list[int]] = {}
    central: list[tuple[bytes, str | None]] = []
    at = 0
    for name, content in contents.items():
        size = content.nbytes if isinstance(content, Stored) else len(content)
        crc = 0 if isinstance(content, Stored) else zlib.crc32(content)
        path = f"{root}/{name}".encode()
        head = _local_header(path, size, crc, at)
        literals.append((base + at, head))
        data = at + len(head)
        central.append((_central_header(path, size, crc, at), content.name if isinstance(content, Stored) else None))
        if isinstance(content, Stored):
            placed[content.name] = content._replace(file=file, offset=base + data)
            crcs[content.name] = [base + at + 14]
        else:
            literals.append((base + data, content))
        at = data + size
    start = at
    for entry, streamed in central:
        if streamed is not None:
            crcs[streamed].append(base + at + 16)
        literals.append((base + at, entry))
        at += len(entry)
    tail = _end(len(central), start, at - start)
    literals.append((base + at, tail))
    assert len(placed) == len(tensors), f"{file} has streamed tensors that its tree does not hold"
    return Item(at + len(tail), literals, [placed[tensor.name] for tensor in tensors], crcs)


def lay_out(path: str, tree: Any, tensors: Sequence[Stored]) -> TargetFile:
    """A file that `torch.load` reads; see `item`."""
    found = item(tree, tensors, 0, path)
    return TargetFile(path, found.size, found.tensors, found.literals, found.crcs)


def _local_header(path: bytes, size: int, crc: int, at: int) -> bytes:
    """A record's own header, padded so that its bytes are aligned."""
    extra = struct.pack("<HHQQ", 1, 16, size, size) if size >= _HUGE else b""
    padding = -(at + 30 + len(path) + len(extra) + 4) % _ALIGNMENT
    extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
    said = min(size, _HUGE)
    return struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 45 if size >= _HUGE else 20, 0x800, 0, 0, 0x21, crc, said, said,
                       len(path), len(extra)) + path + extra


def _central_header(path: bytes, size: int, crc: int, at: int) -> bytes:
    """A record's line in the directory."""
    large = ([size, size] if size >= _HUGE else []) + ([at] if at >= _HUGE else [])
    extra = struct.pack(f"<HH{len(large)}Q", 1, 8 * len(large), *large) if large else b""
    version = 45 if large else 20
    return struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", version, version, 0x800, 0, 0, 0x21, crc, min(size, _HUGE),
                       min(size, _HUGE), len(path), len(extra), 0, 0, 0, 0, min(at, _HUGE)) + path + extra


def _end(count: int, start: int, length: int) -> bytes:
    """The end of the directory, in both of its forms where the old one is too small."""
    tail = b""
    if start + length >= _HUGE or count >= 0xFFFF:
        tail = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, length, start)
        tail += struct.pack("<4sIQI", b"PK\x06\x07", 0, start + length, 1)
    return tail + struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, min(count, 0xFFFF), min(count, 0xFFFF),
                              min(length, _HUGE), min(start, _HUGE), 0)
