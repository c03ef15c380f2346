"""What a format says about its tensors: where their numbers lie, and which numbers of the canonical model they are.

A stored tensor is a list of parts, each an equation between a box of it and a box of one canonical tensor:

    stored[at] == view(canonical)[of]

Renaming is one part with both boxes whole; a tensor-parallel shard, a fusion (gate beside up), a stack of experts, a
transpose, a flat ZeRO partition, a padded vocabulary are the same equation with other boxes and views. Because it is
data, one description serves for planning from headers alone, for writing, for reading (it is its own inverse), and for
streaming: any box of the result can be computed from the boxes it needs.

A box is ((start, stop), ...), one pair for each dimension.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, ...]
Box = tuple[tuple[int, int], ...]
Bits = NDArray[Any]
"""Numbers as unsigned integers of their size: moved and compared bit for bit, whatever they mean."""

SIZES = {"F8_E4M3": 1, "BF16": 2, "F16": 2, "F32": 4}
"""Bytes of a number, by the names that safetensors has for dtypes. What is not here is refused."""
BITS: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def whole(shape: Shape) -> Box:
    """The box of a whole tensor."""
    return tuple((0, size) for size in shape)


def box_shape(box: Box) -> Shape:
    return tuple(stop - start for start, stop in box)


def volume(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)


def intersect(a: Box, b: Box) -> Box | None:
    """What two boxes share, or None."""
    box = tuple((max(s, t), min(e, f)) for (s, e), (t, f) in zip(a, b, strict=True))
    return None if any(stop <= start for start, stop in box) else box


def shift(box: Box, old: Box, new: Box) -> Box:
    """A box inside `old`, seen from where `old` has moved to `new`."""
    return tuple((s - o + n, e - o + n) for (s, e), (o, _), (n, _) in zip(box, old, new, strict=True))


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)


def flat_range(box: Box, shape: Shape) -> tuple[int, int] | None:
    """The range of row-major positions that a box is, or None if its numbers do not lie side by side."""
    if not shape:
        return 0, 1
    first = 0  # the first dimension in which the box is longer than one
    while first < len(shape) - 1 and box[first][1] - box[first][0] == 1:
        first += 1
    if any(box[d] != (0, shape[d]) for d in range(first + 1, len(shape))):
        return None
    start = 0
    for (low, _), size in zip(box, shape, strict=True):
        start = start * size + low
    return start, start + volume(box)


@dataclass(frozen=True, slots=True)
class View:
    """A canonical tensor in another order: reshaped to `split`, permuted by `order`, reshaped to `shape`.

    As in einops: "(g d two) h -> (g two d) h" is split (g, d, two, h), order (0, 2, 1, 3), shape (g*two*d, h).
    """

    split: Shape
    order: tuple[int, ...]
    shape: Shape

    @property
    def in_order(self) -> bool:
        """Whether the numbers keep their row-major positions, so that it is a mere reshape."""
        return self.order == tuple(range(len(self.order)))

    def apply(self, array: Bits) -> Bits:
        return array.reshape(self.split).transpose(self.order).reshape(self.shape)

    def invert(self, array: Bits, canonical: Shape) -> Bits:
        permuted = tuple(self.split[d] for d in self.order)
        return array.reshape(permuted).transpose(np.argsort(self.order).tolist()).reshape(canonical)


def reshaped(canonical: Shape, shape: Shape) -> View:
    """A view that only reshapes: flattening, or a leading dimension for a stack."""
    return View(canonical, tuple(range(len(canonical))), shape)


def transposed(canonical: Shape) -> View:
    """A view with the dimensions in reverse."""
    order = tuple(reversed(range(len(canonical))))
    return View(canonical, order, tuple(reversed(canonical)))


class Part(NamedTuple):
    """stored[at] == view(canonical)[of]; no view is the canonical tensor itself.

    Attributes:
        canonical: name of the canonical tensor.
        at: box in the stored tensor.
        of: box in the view, of the same shape.
    """

    canonical: str
    at: Box
    of: Box
    view: View | None = None


class Stored(NamedTuple):
    """A tensor in a file: dense, row-major, little-endian.

    Attributes:
        name: the format's own name of it.
        file: path relative to the folder, with `/`.
        offset: of its first byte in the file; -1 before the container has been laid out.
        dtype: a key of `SIZES`.
        shape: as stored.
        parts: disjoint; what they leave free is zeros (a padded vocabulary), allowed only where `padded`.
        padded: whether it may have free places.
    """

    name: str
    file: str
    offset: int
    dtype: str
    shape: Shape
    parts: tuple[Part, ...]
    padded: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * SIZES[self.dtype]


def as_bytes(bits: Bits) -> memoryview:
    """The bytes of a dense array; shares its memory."""
    return memoryview(bits.reshape(-1).view(np.uint8).data)


@contextmanager
def many_objects() -> Iterator[None]:
    """Holds back the cyclic garbage collector: it takes half the time where 100,000 tensors are listed."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def renamed(name: str, canonical: str, file: str, offset: int, dtype: str, shape: Shape) -> Stored:
    """A canonical tensor, whole, under another name."""
    box = whole(shape)
    return Stored(name, file, offset, dtype, shape, (Part(canonical, box, box),))


class Entry(NamedTuple):
    """What is known of a canonical tensor in a checkpoint."""

    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * SIZES[self.dtype]


@dataclass
class TargetFile:
    """A file to be written.

    Attributes:
        path: relative to the folder.
        size: bytes in all.
        tensors: with their offsets.
        literals: (offset, bytes) of everything that is no tensor: headers and trailers.
        crcs: tensor -> offsets at which the CRC-32 of its bytes goes, little-endian, once they are written (zip).
    """

    path: str
    size: int
    tensors: list[Stored]
    literals: list[tuple[int, bytes]] = field(default_factory=list)
    crcs: dict[str, list[int]] = field(default_factory=dict)
