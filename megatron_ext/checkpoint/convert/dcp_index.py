"""Reading the container of torch.distributed.checkpoint: boxes of named tensors in a few files, and one index of them.

    .metadata         a pickle: name -> dtype, shape and chunks; (name, where the chunk begins) -> file, offset, length
    __<r>_<i>.distcp  what rank r wrote in its i-th file: archives of torch.save back to back, one for each chunk or
                      other object

or, written by `HuggingFaceStorageWriter(save_distributed=True)` and not merged yet, without an index:

    shard-<r>-model-<i>-of-<n>.safetensors   each with `DCP_SHARDING_INFO`: name -> where its chunk begins

Names mean nothing here; formats give them meaning. An index may list 100,000 chunks, and each is an archive with a
directory of its own; those of one dtype, shape and length differ in nothing but their numbers, so only the first of
each kind is read in full, and the others have to begin with the same bytes.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple, TypeGuard

from torch.distributed.checkpoint import metadata as theirs

from megatron_ext.checkpoint.convert import pickles, safetensors_io, torch_file
from megatron_ext.checkpoint.convert.folder import Folder, check_name, parse_json
from megatron_ext.checkpoint.convert.pickles import Record, TensorRef
from megatron_ext.checkpoint.convert.tensors import Box, Shape, box_shape, intersect, volume, whole
from megatron_ext.config.errors import CheckpointError, shown

METADATA = ".metadata"
MAX_METADATA = 1 << 30
_SHARD = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")
_SHARDING = "DCP_SHARDING_INFO"
_MAX_NAME = 1024
_MAX_HEAD = 1 << 14


class Chunk(NamedTuple):
    """A box of a tensor, dense in a file.

    Attributes:
        box: in the whole tensor.
        file: relative to the folder.
        offset: of its first number, in bytes from the start of the file.
        order: its dimensions as they lie, the slowest first; (0, 1, ..) is row-major.
    """

    box: Box
    file: str
    offset: int
    order: tuple[int, ...]


class DcpTensor(NamedTuple):
    """A tensor: `dtype` is a key of pickles.SIZES; the chunks cover it, and no number is in two."""

    dtype: str
    shape: Shape
    chunks: tuple[Chunk, ...]


class Item(NamedTuple):
    """An archive inside a file."""

    file: str
    offset: int
    length: int


@dataclass
class Dcp:
    """What an index lists.

    Attributes:
        folder: where.
        tensors: name -> dtype, shape, chunks.
        bytes: name -> where an object lies that is no tensor.
        metadata: the index itself, for what else is in it (`planner_data`, or an attribute that a framework adds).
        files: that hold chunks or objects.
    """

    folder: Folder
    tensors: dict[str, DcpTensor] = field(default_factory=dict)
    bytes: dict[str, Item] = field(default_factory=dict)
    metadata: Record | None = None
    files: list[str] = field(default_factory=list)

    def object(self, name: str) -> Any:
        """An object that is no tensor, read as data: see pickles.load.

        Raises:
            CheckpointError: it is damaged, or its pickle is refused.
        """
        return torch_file.read(self.folder, *self.bytes[name])


def detect(folder: Folder, prefix: str = "") -> bool:
    """Whether there is an index, or shards that have none."""
    if folder.has(prefix + METADATA):
        return True
    return not prefix and any(_SHARD.fullmatch(name) for name in folder.names())


def read(folder: Folder, prefix: str = "") -> Dcp:
    """Lists a checkpoint.

    Args:
        folder: all files are opened through it.
        prefix: "" or a folder in it, with "/" at its end.

    Raises:
        CheckpointError: it is damaged or hostile; the file and tensor at fault.
    """
    if not prefix and not folder.has(METADATA):
        return _read_shards(folder)
    where = folder / (prefix + METADATA)
    metadata = pickles.load(folder.read(prefix + METADATA, MAX_METADATA), where)
    if not isinstance(metadata, Record) or metadata.name != f"{theirs.__name__}.Metadata":
        raise CheckpointError(where, "is no index of torch.distributed.checkpoint")
    listed, placed = metadata.get("state_dict_metadata"), metadata.get("storage_data")
    if not isinstance(listed, dict) or not isinstance(placed, dict):
        raise CheckpointError(where, "has no state_dict_metadata or no storage_data")
    items = {_index(key, where): _item(value, where, prefix) for key, value in placed.items()}
    if len(items) != len(placed):
        raise CheckpointError(where, "places a chunk twice")
    dcp = Dcp(folder, metadata=metadata, files=sorted({item.file for item in items.values()}))
    pending: list[_Pending] = []
    for name, described in listed.items():
        name = _name(name, where)
        if isinstance(described, Record) and described.name == f"{theirs.__name__}.BytesStorageMetadata":
            dcp.bytes[name] = _placed(items, name, None, where)
            continue
        tensor, boxes = _tensor(described, name, where)
        dcp.tensors[name] = tensor
        pending += [_Pending(_placed(items, name, tuple(start for start, _ in box), where), name, tensor.dtype, box)
                    for box in boxes]
    for name, chunks in _locate(folder, pending).items():
        dcp.tensors[name] = dcp.tensors[name]._replace(chunks=tuple(sorted(chunks)))
    return dcp


_Index = tuple[str, Shape | None]


class _Pending(NamedTuple):
    """A chunk of which the archive is known, and not yet where in it the numbers begin."""

    item: Item
    name: str
    dtype: str
    box: Box


def _name(name: Any, where: os.PathLike[str]) -> str:
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME or not name.isprintable():
        raise CheckpointError(os.fspath(where), f"names a tensor {shown(name)}")
    return name


def _sizes(values: Any) -> TypeGuard[Shape]:
    return isinstance(values, tuple) and len(values) <= 8 and all(type(n) is int and 0 <= n < 1 << 48 for n in values)


def _index(key: Any, where: os.PathLike[str]) -> _Index:
    """A key of `storage_data`."""
    if not isinstance(key, Record) or not ((offset := key.get("offset")) is None or _sizes(offset)):
        raise CheckpointError(os.fspath(where), "places a chunk that it does not name")
    return _name(key.get("fqn"), where), offset


def _item(value: Any, where: os.PathLike[str], prefix: str) -> Item:
    """A value of `storage_data`."""
    if not isinstance(value, Record) or not isinstance(path := value.get("relative_path"), str) or not all(
            type(value.get(key)) is int and 0 <= value.get(key) < 1 << 60 for key in ("offset", "length")):
        raise CheckpointError(os.fspath(where), "places a chunk nowhere")
    if value.get("transform_descriptors"):
        raise CheckpointError(os.fspath(where), f"has {path[:100]!a} transformed", "only plain files are read",
                              "save it without extensions")
    return Item(prefix + check_name(path, os.fspath(where)), value.get("offset"), value.get("length"))


def _placed(items: Mapping[_Index, Item], name: str, offsets: Shape | None, where: os.PathLike[str]) -> Item:
    if (name, offsets) not in items:
        raise CheckpointError(os.fspath(where), "has no place in any file" if offsets is None else
                              f"has no place in any file for the chunk at {offsets}", tensor=name)
    return items[name, offsets]


def _tensor(described: Any, name: str, where: os.PathLike[str]) -> tuple[DcpTensor, list[Box]]:
    """A tensor without its chunks, and their boxes; empty ones (of ranks that have no share) are left out."""
    record = described if isinstance(described, Record) else Record("", ())
    properties, shape, chunks = record.get("properties"), record.get("size"), record.get("chunks")
    dtype = properties.state[0] if isinstance(properties, Record) and isinstance(properties.state, tuple) \
        and properties.state else None
    if not isinstance(dtype, str) or dtype not in pickles.SIZES or not _sizes(shape) or not isinstance(chunks, list):
        raise CheckpointError(os.fspath(where), "is not described by dtype, size and chunks", tensor=name)
    boxes = []
    for chunk in chunks:
        offsets, sizes = (chunk.get("offsets"), chunk.get("sizes")) if isinstance(chunk, Record) else (None, None)
        if not _sizes(offsets) or not _sizes(sizes) or not len(offsets) == len(sizes) == len(shape):
            raise CheckpointError(os.fspath(where), "has a chunk that is no box of it", tensor=name)
        box = tuple((start, start + size) for start, size in zip(offsets, sizes, strict=True))
        if 0 not in sizes:
            boxes.append(box)
    check_cover(name, shape, boxes, where)
    return DcpTensor(dtype, shape, ()), boxes


def check_cover(name: str, shape: Shape, boxes: Sequence[Box], where: os.PathLike[str]) -> None:
    """Whether boxes are the whole of a tensor, every number once.

    Raises:
        CheckpointError: they are not.
    """
    if len(boxes) == 1 and boxes[0] == whole(shape):
        return
    inside = all(stop <= size for box in boxes for (_, stop), size in zip(box, shape, strict=True))
    if not inside or sum(map(volume, boxes)) != math.prod(shape) or _overlap(boxes):
        raise CheckpointError(os.fspath(where), f"has {len(boxes)} chunks that are not the whole of {shape}",
                              "every number is in one of them", tensor=name)


def _overlap(boxes: Sequence[Box]) -> bool:
    """Whether two boxes share a place: swept along the dimension that is cut most often."""
    if len(boxes) < 2 or not boxes[0]:
        return len(boxes) > 1
    dim = max(range(len(boxes[0])), key=lambda d: len({box[d][0] for box in boxes}))
    active: list[Box] = []
    for box in sorted(boxes, key=lambda box: box[dim][0]):
        active = [other for other in active if other[dim][1] > box[dim][0]]
        if any(intersect(other, box) is not None for other in active):
            return True
        active.append(box)
    return False


def _locate(folder: Folder, pending: list[_Pending]) -> dict[str, list[Chunk]]:
    """Where in their archives the numbers of chunks begin."""
    found: dict[str, list[Chunk]] = {}
    kinds: dict[tuple[str, Shape, int], tuple[bytes, int, tuple[int, ...]]] = {}
    pending.sort()
    for file, group in groupby(pending, key=lambda chunk: chunk.item.file):
        with folder.open(file) as descriptor:
            size = os.fstat(descriptor).st_size
            for item, name, dtype, box in group:
                if item.offset + item.length > size:
                    raise CheckpointError(folder / file, f"ends at byte {size}, and it at {item.offset + item.length}",
                                          "the file was cut off", tensor=name)
                kind = dtype, box_shape(box), item.length
                known = kinds.get(kind)
                if known is None or known[0] != _head(os.pread(descriptor, known[1], item.offset)):
                    begin, order = _look(folder, item, name, kind)
                    known = _head(os.pread(descriptor, min(begin, _MAX_HEAD), item.offset)), begin, order
                    if begin <= _MAX_HEAD and b"/data.pkl" in known[0]:
                        kinds[kind] = known
                found.setdefault(name, []).append(Chunk(box, file, item.offset + known[1], known[2]))
    return found


def _head(content: bytes) -> bytes:
    """What archives of one kind begin with; the CRC-32 of the numbers, which some writers put before them, left out."""
    last = content.rfind(b"PK\x03\x04")
    return content[:last + 14] + content[last + 18:] if last >= 0 else b""


def _look(folder: Folder, item: Item, name: str, kind: tuple[str, Shape, int]) -> tuple[int, tuple[int, ...]]:
    """Reads an archive: where its numbers begin, and in what order of dimensions they lie."""
    ref = torch_file.read(folder, *item)
    dtype, shape, _ = kind
    if not isinstance(ref, TensorRef) or (ref.dtype, ref.shape) != (dtype, shape):
        there = f"{ref.dtype} {ref.shape}" if isinstance(ref, TensorRef) else "no tensor"
        raise CheckpointError(folder / item.file, f"is {there}, and {dtype} {shape} in {METADATA}", tensor=name)
    order = tuple(sorted(range(len(shape)), key=lambda d: (-ref.stride[d], shape[d] != 1, d)))
    if ref.dense:
        order = tuple(range(len(shape)))
    elif not ref._replace(shape=tuple(shape[d] for d in order), stride=tuple(ref.stride[d] for d in order)).dense:
        raise CheckpointError(folder / item.file, f"lies in strides of {ref.stride}", "only dense tensors are read",
                              tensor=name)
    return ref.offset - item.offset, order


def _read_shards(folder: Folder) -> Dcp:
    """Shards in safetensors; the shape of a tensor is what its chunks reach."""
    dcp, chunks = Dcp(folder), {}  # type: tuple[Dcp, dict[str, list[Chunk]]]
    dcp.files = [name for name in folder.names() if _SHARD.fullmatch(name)]
    for file in dcp.files:
        records, metadata = safetensors_io.read_header(folder, file)
        begins = parse_json(metadata.get(_SHARDING, "{}").encode(errors="replace"), folder / file)
        for name, (dtype, sizes, offset) in records.items():
            begin = begins.get(name)
            offsets = begin.get("saved_offsets") if isinstance(begin, dict) else None
            if not isinstance(offsets, list) or not _sizes(tuple(offsets)) or len(offsets) != len(sizes):
                raise CheckpointError(folder / file, f"has no offsets in {_SHARDING}", tensor=name)
            if dcp.tensors.setdefault(name, DcpTensor(dtype, (), ())).dtype != dtype:
                raise CheckpointError(folder / file, f"is {dtype}, and {dcp.tensors[name].dtype} in another shard",
                                      tensor=name)
            box = tuple((start, start + size) for start, size in zip(offsets, sizes, strict=True))
            chunks.setdefault(name, []).append(Chunk(box, file, offset, tuple(range(len(sizes)))))
    for name, found in chunks.items():
        ranks = {len(chunk.box) for chunk in found}
        shape = tuple(max(chunk.box[d][1] for chunk in found) for d in range(min(ranks)))
        if len(ranks) > 1:
            raise CheckpointError(folder / found[-1].file, "has another number of dimensions in another shard",
                                  tensor=name)
        found = sorted(chunk for chunk in found if volume(chunk.box))
        check_cover(name, shape, [chunk.box for chunk in found], folder.path)
        dcp.tensors[name] = DcpTensor(dcp.tensors[name].dtype, shape, tuple(found))
    return dcp
