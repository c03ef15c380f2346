"""The container of torch.distributed.checkpoint for formats: what is read as stored tensors, and what is to be written.

See dcp_index.py for the files. Written are `__<i>_0.distcp`, each filled in order, and `.metadata` with torch's own
classes; nothing in it depends on when or where it is written.
"""

from __future__ import annotations

import math
import pickle
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint import metadata as theirs
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_ext.checkpoint.convert import torch_file
from megatron_ext.checkpoint.convert.dcp_index import METADATA, Chunk, Dcp, DcpTensor, Item, detect, read
from megatron_ext.checkpoint.convert.source import BLOCK
from megatron_ext.checkpoint.convert.tensors import (
    SIZES,
    Box,
    Part,
    Shape,
    Stored,
    TargetFile,
    View,
    box_shape,
    intersect,
    shift,
    whole,
)

__all__ = ["METADATA", "Chunk", "Dcp", "DcpObject", "DcpTarget", "DcpTensor", "Item", "detect", "lay_out", "read",
           "stored"]

VERSION = "1.0.0"
_ALIGNMENT = 64
CHUNK_BYTES = 1 << 28
"""torch reads a chunk as a whole, however little of it a rank needs, so that larger ones are cut."""
_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def stored(name: str, tensor: DcpTensor, parts: Sequence[Part], padded: bool = False) -> list[Stored]:
    """The chunks of a tensor as stored tensors.

    Args:
        name: of the tensor.
        tensor: of a dtype that can be converted.
        parts: what the whole tensor consists of, as if it lay row-major in one piece; a part is a canonical tensor as
            a whole, reshaped at most.
        padded: whether parts leave places free.
    """
    found = []
    for chunk in tensor.chunks:
        shape = tuple(box_shape(chunk.box)[d] for d in chunk.order)
        inside = tuple(_cut(parts, chunk.box, chunk.order))
        found.append(Stored(_chunk_name(name, tensor.shape, chunk.box), chunk.file, chunk.offset, tensor.dtype, shape,
                            inside, padded))
    return found


def _chunk_name(name: str, shape: Shape, box: Box) -> str:
    return name if box == whole(shape) else f"{name}[{','.join(str(start) for start, _ in box)}]"


def _cut(parts: Sequence[Part], box: Box, order: tuple[int, ...]) -> Iterator[Part]:
    """What of the parts of a tensor is in a chunk of it, seen from the chunk as it lies."""
    first, last = 0, len(parts)
    if box and len(parts) > 1 and all(x <= y for a, b in pairwise(parts)
                                          for x, y in zip(a.at[0], b.at[0], strict=True)):
        first = bisect_right(parts, box[0][0], key=lambda part: part.at[0][1])
        last = bisect_left(parts, box[0][1], key=lambda part: part.at[0][0])
    for part in parts[first:last]:
        shared = intersect(part.at, box)
        if shared is None:
            continue
        at, of = shift(shared, box, whole(box_shape(box))), shift(shared, part.at, part.of)
        view = part.view
        if order != tuple(range(len(order))):
            assert view is None or view.in_order, part.canonical
            shape = box_shape(part.of) if view is None else view.shape
            view = View(shape, order, tuple(shape[d] for d in order))
            at, of = (tuple(each[d] for d in order) for each in (at, of))
        yield Part(part.canonical, at, of, view)


# -- writing

class DcpTarget(NamedTuple):
    """A tensor to be written.

    Attributes:
        name: in the state dict, flattened.
        dtype, shape: of the whole tensor.
        parts: of the whole tensor.
        padded: whether parts leave places free.
        path: of the keys that lead to it in the nested state dict; () for its name alone.
    """

    name: str
    dtype: str
    shape: Shape
    parts: tuple[Part, ...]
    padded: bool = False
    path: tuple[str | int, ...] = ()


class DcpObject(NamedTuple):
    """A small tensor, or any other object of a state dict that torch.save can write."""

    name: str
    value: Any
    path: tuple[str | int, ...] = ()


def lay_out(prefix: str, tensors: Iterable[DcpTarget], objects: Sequence[DcpObject], shard_bytes: int,
            further: Mapping[str, Any] | None = None) -> tuple[list[TargetFile], dict[str, bytes]]:
    """Places tensors and objects in files of about `shard_bytes`; a tensor of more than `CHUNK_BYTES` is cut into rows.

    Args:
        prefix: "" or a folder, with "/" at its end.
        tensors: in the order of their places.
        objects: go into the first file; one that several names have is there once.
        shard_bytes: of the largest file, unless one row is larger.
        further: attributes for the index that torch does not have.

    Returns:
        Files, and the index as a document.
    """
    index = theirs.Metadata({}, {}, {}, theirs.StorageMeta(), VERSION)
    files = _Files(prefix, shard_bytes, index.storage_data)
    there: dict[int, Any] = {}
    for name, value, path in objects:
        index.planner_data[name] = path or (name,)
        dtype = value.dtype if isinstance(value, torch.Tensor) else None
        index.state_dict_metadata[name] = theirs.BytesStorageMetadata() if dtype is None else \
            _described(dtype, tuple(value.shape), [whole(tuple(value.shape))])
        key = theirs.MetadataIndex(name, None if dtype is None else [0] * value.dim())
        if id(value) not in there:
            files.add(key, value, None)
        index.storage_data[key] = there.setdefault(id(value), index.storage_data.get(key))
    for target in tensors:
        index.planner_data[target.name] = target.path or (target.name,)
        boxes = list(_rows(target, min(shard_bytes, CHUNK_BYTES)))
        index.state_dict_metadata[target.name] = _described(_DTYPES[target.dtype], target.shape, boxes)
        for number, box in enumerate(boxes):
            name, shape = _chunk_name(target.name, target.shape, box), box_shape(box)
            parts = tuple(_cut(target.parts, box, tuple(range(len(box)))))
            files.add(theirs.MetadataIndex(target.name, [start for start, _ in box], number), torch_file.Slot(name),
                      Stored(name, "", -1, target.dtype, shape, parts, target.padded))
    for attribute, value in (further or {}).items():
        setattr(index, attribute, value)
    return files.done, {prefix + METADATA: pickle.dumps(index, protocol=4)}


def _described(dtype: torch.dtype, shape: Shape, boxes: Iterable[Box]) -> theirs.TensorStorageMetadata:
    chunks = [theirs.ChunkStorageMetadata(torch.Size(start for start, _ in box), torch.Size(box_shape(box)))
              for box in boxes]
    return theirs.TensorStorageMetadata(theirs.TensorProperties(dtype), torch.Size(shape), chunks)


def _rows(target: DcpTarget, limit: int) -> Iterator[Box]:
    """Boxes of as many rows as the limit allows; of a matrix whole blocks of FP8 scales, if that is not too much."""
    shape = target.shape
    nbytes = math.prod(shape) * SIZES[target.dtype]
    if nbytes <= limit or not shape:
        yield whole(shape)
        return
    step = max(1, limit * shape[0] // nbytes)
    if len(shape) == 2 and step > BLOCK:
        step = step // BLOCK * BLOCK
    for start in range(0, shape[0], step):
        yield ((start, min(start + step, shape[0])), *whole(shape[1:]))


@dataclass
class _Files:
    """Files that are being filled, one after the other; archives begin where their numbers are aligned."""

    prefix: str
    limit: int
    placed: dict[Any, Any]
    done: list[TargetFile] = field(default_factory=list)

    def add(self, index: theirs.MetadataIndex, tree: Any, tensor: Stored | None) -> None:
        if not self.done or (self.done[-1].tensors and tensor is not None
                             and self.done[-1].size + tensor.nbytes > self.limit):
            self.done.append(TargetFile(f"{self.prefix}__{len(self.done)}_0.distcp", 0, []))
        file = self.done[-1]
        base = -(-file.size // _ALIGNMENT) * _ALIGNMENT
        item = torch_file.item(tree, [tensor] if tensor is not None else [], base, file.path)
        file.size = base + item.size
        file.tensors += item.tensors
        file.literals += item.literals
        file.crcs |= item.crcs
        self.placed[index] = _StorageInfo(file.path.removeprefix(self.prefix), base, item.size)
