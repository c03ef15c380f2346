"""The safetensors container: headers read strictly, headers written, nothing else; numbers are moved by blocks.py.

A file is 8 bytes (header length, little-endian), a JSON header {name: {"dtype", "shape", "data_offsets"}}, and the
tensors side by side. The header is checked as a whole before anything is allocated by what it says: every tensor's
bytes follow from its dtype and shape, and together they cover the file without hole or overlap.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from megatron_ext.checkpoint.convert.folder import Folder, parse_json
from megatron_ext.checkpoint.convert.tensors import SIZES, Shape, Stored, TargetFile
from megatron_ext.config.errors import CheckpointError, shown

MAX_HEADER = 100_000_000
"""The limit of the safetensors library."""
_MAX_NAME = 1024


class Record(NamedTuple):
    """A tensor by its header; `offset` counts from the start of the file."""

    dtype: str
    shape: Shape
    offset: int


def read_header(folder: Folder, name: str) -> tuple[dict[str, Record], dict[str, str]]:
    """The tensors of a file in the order of their bytes, and its metadata.

    Raises:
        CheckpointError: the file is damaged or cut off, or holds a dtype that no DeepSeek checkpoint has.
    """
    path = folder / name
    with folder.open(name) as descriptor:
        size = os.fstat(descriptor).st_size
        start = os.pread(descriptor, 8, 0)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if len(start) < 8 or length > size - 8:
            raise CheckpointError(path, f"has {size} bytes, less than its header says",
                                  "it is cut off, or no safetensors file")
        if length > MAX_HEADER:
            raise CheckpointError(path, f"has a header of {length} bytes", f"at most {MAX_HEADER} are read")
        header = parse_json(os.pread(descriptor, length, 8), path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(path, "has metadata that is no map of strings")
    records = [(tensor, _record(path, tensor, entry, 8 + length)) for tensor, entry in header.items()]
    records.sort(key=lambda item: (item[1][0].offset, item[1][1]))
    end = 8 + length
    for tensor, (record, stop) in records:
        if record.offset != end:
            raise CheckpointError(path, f"begins at byte {record.offset}, where {end} is due",
                                  "tensors lie side by side", tensor=tensor)
        end = stop
    if end != size:
        last = records[-1][0] if records else None
        found = f"has {size} bytes, but its header needs {end}"
        raise CheckpointError(path, found if last is None else f"ends at byte {end} and the file at {size}",
                              "the file is cut off" if size < end else "what follows is no tensor", tensor=last)
    return {tensor: record for tensor, (record, _) in records}, metadata


def _record(path: os.PathLike[str], name: str, entry: Any, base: int) -> tuple[Record, int]:
    """A line of a header, and where its bytes end."""
    where = os.fspath(path)
    if not name or len(name) > _MAX_NAME or not name.isprintable():
        raise CheckpointError(where, f"names a tensor {name[:100]!r}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(where, "is not described by dtype, shape and data_offsets", tensor=name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in SIZES if isinstance(dtype, str) else True:
        raise CheckpointError(where, f"is {shown(dtype)}", f"only {', '.join(SIZES)} are read", tensor=name)
    if not _sizes(shape) or len(shape) > 8:
        raise CheckpointError(where, f"has shape {shown(shape)}", "it must be a short list of sizes", tensor=name)
    if not _sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(where, f"has data_offsets {shown(offsets)}", tensor=name)
    nbytes = math.prod(shape) * SIZES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(where, f"has {offsets[1] - offsets[0]} bytes, but {shape} of {dtype} takes {nbytes}",
                              tensor=name)
    return Record(dtype, tuple(shape), base + offsets[0]), base + offsets[1]


def _sizes(values: Any) -> bool:
    """Whether it is a list of sizes that a file can have."""
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in values)


def lay_out(path: str, tensors: Iterable[Stored], metadata: Mapping[str, str]) -> TargetFile:
    """Places tensors in a file: bigger numbers first, so that every tensor is aligned, else in the order given."""
    ordered = sorted(tensors, key=lambda tensor: -SIZES[tensor.dtype])
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for tensor in ordered:
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape),
                               "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    assert len(header) == len(ordered) + bool(metadata), f"two tensors of one name in {path}"
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base, placed, at = 8 + len(text), [], 0
    for tensor in ordered:
        placed.append(Stored(tensor.name, path, base + at, tensor.dtype, tensor.shape, tensor.parts, tensor.padded))
        at += tensor.nbytes
    return TargetFile(path, base + end, placed, [(0, struct.pack("<Q", len(text)) + text)])
