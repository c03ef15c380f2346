"""What a worker does: one portion of one file, streamed from the source; and the comparisons that go with it."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import xxhash

from megatron_ext.checkpoint.convert.blocks import Files, Producer, Recipe, blocks_of
from megatron_ext.checkpoint.convert.folder import Folder
from megatron_ext.checkpoint.convert.source import Check
from megatron_ext.checkpoint.convert.tensors import SIZES, Stored, as_bytes, box_shape, shift, whole
from megatron_ext.config.errors import CheckpointError

_PR_SET_PDEATHSIG = 1
_MOVED = 1 << 18


@dataclass
class Unit:
    """A portion of a file, with all that is needed to write it.

    Attributes:
        source: folder of the source.
        follow_links: as in `Folder`.
        file: to be written into; it exists, in its full length.
        final: the name it will have, for messages.
        tensors: to be written, with their offsets.
        recipes: of all canonical tensors concerned.
        expected: target tensor -> (tensor of the source, checksum), where both have the same bytes.
        verify: tensors of the source with the checksum that they must have.
        checks: pieces of the source that must repeat others.
        crcs: target tensor -> offsets at which the CRC-32 of its bytes goes.
    """

    source: Path
    follow_links: bool
    file: Path
    final: Path
    tensors: list[Stored]
    recipes: dict[str, Recipe]
    expected: dict[str, tuple[Stored, str]] = field(default_factory=dict)
    verify: list[tuple[Stored, str]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    crcs: dict[str, list[int]] = field(default_factory=dict)

    @cached_property
    def buffer(self) -> bytearray:
        """For bytes that are only moved: small enough to stay in the cache between reading, hashing and writing."""
        return bytearray(_MOVED)


def start_worker(parent: int, lock: int | None) -> None:
    """Called once in each worker: one thread, no life after the parent's, and no hold on what only the parent locks."""
    if lock is not None:
        os.close(lock)  # inherited by a fork; a lock lasts until the last descriptor of it is closed
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says what happens
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def do(unit: Unit) -> dict[str, str]:
    """Writes a portion.

    Returns:
        Target tensor -> checksum of its bytes.

    Raises:
        CheckpointError: naming file and tensor.
    """
    with Files(Folder(unit.source, unit.follow_links)) as files:
        for stored, digest in unit.verify:
            _verify(files, stored, digest)
        producer = Producer(files, unit.recipes)
        for check in unit.checks:
            compare(files, producer, check)
        descriptor = os.open(unit.file, os.O_WRONLY | os.O_CLOEXEC)
        try:
            return {tensor.name: _write(unit, producer, descriptor, tensor) for tensor in unit.tensors}
        finally:
            os.close(descriptor)


def _write(unit: Unit, producer: Producer, descriptor: int, tensor: Stored) -> str:
    digest, crc, offset = xxhash.xxh3_128(), 0, tensor.offset
    places = unit.crcs.get(tensor.name, ())
    for content in _contents(unit, producer, tensor):
        digest.update(content)
        if places:
            crc = zlib.crc32(content, crc)
        offset = _put(unit, descriptor, tensor, content, offset)
    for place in places:
        _put(unit, descriptor, tensor, memoryview(struct.pack("<I", crc)), place)
    assert offset == tensor.offset + tensor.nbytes, tensor.name
    if tensor.name in unit.expected:
        _compare_digest(producer.files, *unit.expected[tensor.name], digest.hexdigest())
    return digest.hexdigest()


def _put(unit: Unit, descriptor: int, tensor: Stored, content: memoryview, offset: int) -> int:
    """Writes bytes; where they end."""
    try:
        while content:
            written = os.pwrite(descriptor, content, offset)
            content, offset = content[written:], offset + written
    except OSError as error:
        what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        raise CheckpointError(unit.final, f"cannot be written: {what}", tensor=tensor.name) from None
    return offset


def _contents(unit: Unit, producer: Producer, tensor: Stored) -> Iterator[memoryview]:
    """The bytes of a target tensor in order; each portion is only good until the next."""
    runs = producer.moves(tensor)
    if runs is None:
        for block in producer.blocks(tensor):
            yield as_bytes(np.ascontiguousarray(block))
        return
    for stored, first, count in runs:
        for at in range(first, first + count, len(unit.buffer)):
            content = memoryview(unit.buffer)[:min(len(unit.buffer), first + count - at)]
            producer.files.read_into(stored, at, content)
            yield content


def sum_tensor(files: Files, stored: Stored) -> str:
    """The checksum of the bytes of a stored tensor."""
    digest = xxhash.xxh3_128()
    for box in blocks_of(stored.shape, SIZES[stored.dtype]):
        digest.update(as_bytes(files.box(stored, box)))
    return digest.hexdigest()


def _verify(files: Files, stored: Stored, digest: str) -> None:
    _compare_digest(files, stored, digest, sum_tensor(files, stored))


def _compare_digest(files: Files, stored: Stored, expected: str, found: str) -> None:
    if found != expected:
        raise CheckpointError(files.folder / stored.file, "has other content than when it was written",
                              "its checksum (XXH3-128) is not the manifest's", tensor=stored.name)


def compare(files: Files, producer: Producer, check: Check) -> None:
    """Compares a piece with the canonical numbers that it repeats, in the source's dtype.

    Raises:
        CheckpointError: they differ.
    """
    stored, part = check.piece
    origin = producer.recipes[check.canonical].origin
    if stored.dtype != origin.dtype:
        raise CheckpointError(files.folder / stored.file, f"is {stored.dtype}, and what it repeats {origin.dtype}",
                              tensor=stored.name)
    as_stored = Producer(files, {part.canonical: Recipe(part.canonical, origin.dtype, origin)})
    there = whole(box_shape(part.at))
    for box in blocks_of(box_shape(part.at), SIZES[stored.dtype]):
        found = files.box(stored, shift(box, there, part.at))
        repeated = as_stored.block(Stored("", "", 0, stored.dtype, stored.shape, (part,), True),
                                   shift(box, there, part.at))
        if not np.array_equal(found, repeated):
            other = origin.pieces[0][0]
            raise CheckpointError(files.folder / stored.file, f"differs from {other.name} in {other.file}",
                                  f"both are {check.canonical}", tensor=stored.name)

