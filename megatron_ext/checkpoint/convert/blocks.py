"""Any box of any canonical tensor, in any dtype, out of the files of a source; in bounded memory.

A target tensor is produced in blocks of whole rows, some `BLOCK_BYTES` each and in the order of its bytes. A block
asks for the boxes of canonical tensors that it consists of; those are read from the pieces of the source that hold
them, and cast, quantised or dequantised on the way. Only a permuting view needs its canonical tensor whole.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from megatron_ext.checkpoint.convert import dtype as numbers
from megatron_ext.checkpoint.convert.folder import Folder
from megatron_ext.checkpoint.convert.source import BLOCK, Origin, Piece
from megatron_ext.checkpoint.convert.tensors import (
    BITS,
    SIZES,
    Bits,
    Box,
    Part,
    Shape,
    Stored,
    as_bytes,
    box_shape,
    flat_range,
    intersect,
    shift,
    slices,
    volume,
    whole,
)
from megatron_ext.config.errors import CheckpointError

BLOCK_BYTES = 1 << 20
"""Small enough to stay in the cache between being computed, summed and written."""
MAX_BLOCKS = 16
"""How many times larger a block may be, so that 128 rows are in one."""
_SLAB = 1 << 18
"""Numbers that are quantised at a time: few enough for the caches."""
_SMALL_RUN = 1 << 14


class Recipe(NamedTuple):
    """How a canonical tensor of the target is made.

    Attributes:
        name: canonical name.
        dtype: in the target.
        origin: what it is made from: itself in another dtype, or for new scales the weight.
        scale: scales of an origin in FP8; or for a weight to be quantised the scales carried for it, if any.
        new_scale: it is the scales that quantising `origin` gives.
    """

    name: str
    dtype: str
    origin: Origin
    scale: Origin | None = None
    new_scale: bool = False


class Files:
    """Open files of a source; closed together."""

    def __init__(self, folder: Folder):
        self.folder = folder
        self._open: dict[str, int] = {}

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def read_into(self, stored: Stored, at: int, out: memoryview) -> None:
        """Reads `len(out)` bytes from byte `at` of a tensor on.

        Raises:
            CheckpointError: the file ends before, or cannot be read.
        """
        if stored.file not in self._open:
            if len(self._open) >= 64:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[stored.file] = self.folder.descriptor(stored.file)
        done = 0
        while done < len(out):
            try:
                count = os.preadv(self._open[stored.file], [out[done:]], stored.offset + at + done)
            except OSError as error:
                raise CheckpointError(self.folder / stored.file, f"cannot be read: {error.strerror}",
                                      tensor=stored.name) from None
            if count == 0:
                raise CheckpointError(self.folder / stored.file, "ends inside it", "the file was cut off",
                                      tensor=stored.name)
            done += count

    def box(self, stored: Stored, box: Box) -> Bits:
        """A box of a stored tensor, dense."""
        size = SIZES[stored.dtype]
        out = np.empty(box_shape(box), BITS[size])
        flat = flat_range(box, stored.shape)
        if flat is not None:
            self.read_into(stored, flat[0] * size, as_bytes(out))
            return out
        last = max(d for d in range(len(box)) if box[d] != (0, stored.shape[d]))
        inner = math.prod(stored.shape[last + 1:]) * size  # bytes of one step along `last`
        run, row = (box[last][1] - box[last][0]) * inner, stored.shape[last] * inner
        lead, lead_box = stored.shape[:last], box[:last]
        runs = out.reshape(-1, run // size)
        starts = _positions(lead_box, lead)
        if run >= _SMALL_RUN or row > 8 * run:
            for number, start in enumerate(starts):
                self.read_into(stored, start * row + box[last][0] * inner, as_bytes(runs[number]))
            return out
        first, step = 0, max(1, BLOCK_BYTES // row)  # short runs: whole rows are read, and cut
        while first < len(starts):
            stop = first + 1
            while stop < len(starts) and stop - first < step and starts[stop] == starts[stop - 1] + 1:
                stop += 1
            rows = np.empty((stop - first, row // size), BITS[size])
            self.read_into(stored, starts[first] * row, as_bytes(rows))
            column = box[last][0] * inner // size
            runs[first:stop] = rows[:, column:column + run // size]
            first = stop
        return out


def _positions(box: Box, shape: Shape) -> list[int]:
    """Row-major positions of the places of a box, in order."""
    positions = [0]
    for (start, stop), size in zip(box, shape, strict=True):
        positions = [position * size + i for position in positions for i in range(start, stop)]
    return positions


class Producer:
    """Computes boxes of canonical tensors by their recipes.

    Args:
        files: of the source.
        recipes: by canonical name.
    """

    def __init__(self, files: Files, recipes: Mapping[str, Recipe]):
        self.files, self.recipes = files, recipes
        self._whole: tuple[Origin, Bits] | None = None  # the last tensor that was needed whole, as it is stored
        self._viewed: tuple[Part, Bits] | None = None
        self._scales: dict[str, tuple[Bits, Bits]] = {}  # by weight: scales, and which rows of them are there

    # -- numbers as the source has them

    def stored(self, origin: Origin, box: Box) -> Bits:
        """A box of a canonical tensor in the dtype of the source."""
        pieces = origin.pieces
        if all(part.view is None for _, part in pieces):
            return self._from_boxes(pieces, box)
        flat = flat_range(box, origin.shape)
        if flat is not None and all(_flat_piece(piece, origin.shape) is not None for piece in pieces):
            return self._from_runs(origin, flat).reshape(box_shape(box))
        return np.ascontiguousarray(self._all_of(origin)[slices(box)])

    def _from_boxes(self, pieces: tuple[Piece, ...], box: Box) -> Bits:
        out: Bits | None = None
        for stored, part in pieces:
            shared = intersect(box, part.of)
            if shared is None:
                continue
            found = self.files.box(stored, shift(shared, part.of, part.at))
            if shared == box:
                return found
            if out is None:
                out = np.empty(box_shape(box), found.dtype)
            out[slices(shift(shared, box, whole(box_shape(box))))] = found
        return np.empty(box_shape(box), BITS[SIZES[pieces[0][0].dtype]]) if out is None else out

    def _from_runs(self, origin: Origin, wanted: tuple[int, int]) -> Bits:
        size = SIZES[origin.dtype]
        out = np.empty(wanted[1] - wanted[0], BITS[size])
        for piece in origin.pieces:
            run = _flat_piece(piece, origin.shape)
            assert run is not None
            start, stop, at = run
            low, high = max(start, wanted[0]), min(stop, wanted[1])
            if low < high:
                self.files.read_into(piece[0], (at + low - start) * size,
                                     as_bytes(out[low - wanted[0]:high - wanted[0]]))
        return out

    def _all_of(self, origin: Origin) -> Bits:
        if self._whole is None or self._whole[0] is not origin:
            view = origin.pieces[0][1].view  # the same in all pieces
            shape = origin.shape if view is None else view.shape
            viewed = np.empty(shape, BITS[SIZES[origin.dtype]])
            for stored, part in origin.pieces:
                viewed[slices(part.of)] = self.files.box(stored, part.at).reshape(box_shape(part.of))
            self._whole = (origin, viewed if view is None else view.invert(viewed, origin.shape))
        return self._whole[1]

    # -- numbers as the target wants them

    def canonical(self, name: str, box: Box) -> Bits:
        """A box of a canonical tensor in the dtype of its recipe."""
        recipe = self.recipes[name]
        origin = recipe.origin
        if recipe.new_scale:
            return self._new_scales(recipe, box)
        if recipe.dtype == origin.dtype:
            return self.stored(origin, box)
        if len(box) == 2 and "F8_E4M3" in (recipe.dtype, origin.dtype):
            return self._blockwise(recipe, box)
        try:
            return numbers.cast(self.stored(origin, box), origin.dtype, recipe.dtype)
        except numbers.NumberError as error:
            stored = origin.pieces[0][0]
            raise CheckpointError(self.files.folder / stored.file, str(error), None, error.hint,
                                  tensor=stored.name) from None

    def _blockwise(self, recipe: Recipe, box: Box) -> Bits:
        """Quantises or dequantises the blocks that a box touches, slab by slab, and cuts."""
        origin, out = recipe.origin, np.empty(box_shape(box), BITS[SIZES[recipe.dtype]])
        (top, bottom), (left, right) = box
        columns = left // BLOCK * BLOCK, min(-(-right // BLOCK) * BLOCK, origin.shape[1])
        step = max(BLOCK, _SLAB // max(1, columns[1] - columns[0]) // BLOCK * BLOCK)
        first = top // BLOCK * BLOCK
        while first < bottom:
            last = min(first + step, -(-bottom // BLOCK) * BLOCK, origin.shape[0])
            slab = self._slab(recipe, ((first, last), columns))
            low, high = max(first, top), min(last, bottom)
            out[low - top:high - top] = slab[low - first:high - first, left - columns[0]:right - columns[0]]
            first = last
        return out

    def _slab(self, recipe: Recipe, box: Box) -> Bits:
        origin = recipe.origin
        scale_box = tuple((start // BLOCK, -(-stop // BLOCK)) for start, stop in box)
        scale = None if recipe.scale is None else self.stored(recipe.scale, scale_box)
        found = self.stored(origin, box)
        stored = origin.pieces[0][0]
        try:
            if recipe.dtype != "F8_E4M3":
                assert scale is not None, recipe.name
                return numbers.dequantise(found, scale, recipe.dtype)
            codes, scales = numbers.quantise(found, origin.dtype, scale)
        except numbers.NumberError as error:
            raise CheckpointError(self.files.folder / stored.file, f"{error} in rows {box[0]}", None, error.hint,
                                  tensor=stored.name) from None
        if scale is None and box[1] == (0, origin.shape[1]):
            self._remember(recipe.name, origin, scale_box, scales)
        return codes

    def _new_scales(self, recipe: Recipe, box: Box) -> Bits:
        """The scales of a box of blocks; those that quantising the weight has left are taken from there."""
        weight, shape = recipe.name.removesuffix("_scale_inv"), recipe.origin.shape
        known = self._scales.get(weight)
        if known is not None and known[1][box[0][0]:box[0][1]].all():
            return known[0][slices(box)].copy()
        out = np.empty(box_shape(box), np.uint32)
        columns = box[1][0] * BLOCK, min(box[1][1] * BLOCK, shape[1])
        for row in range(*box[0]):
            rows = row * BLOCK, min((row + 1) * BLOCK, shape[0])
            found = self.stored(recipe.origin, (rows, columns))
            out[row - box[0][0]] = numbers.quantise(found, recipe.origin.dtype, None)[1]
        return out

    def _remember(self, weight: str, origin: Origin, box: Box, scales: Bits) -> None:
        if weight not in self._scales:
            shape = tuple(-(-size // BLOCK) for size in origin.shape)
            self._scales = {weight: (np.empty(shape, np.uint32), np.zeros(shape[0], np.uint8))}
        known, there = self._scales[weight]
        known[slices(box)] = scales
        there[box[0][0]:box[0][1]] = 1

    # -- target tensors

    def moves(self, target: Stored) -> list[tuple[Stored, int, int]] | None:
        """A target tensor as runs of bytes (tensor of the source, first byte, count) that are only to be moved.

        None if some of its numbers change, or do not lie side by side.
        """
        size, end = SIZES[target.dtype], 0
        runs: list[tuple[Stored, int, int]] = []
        for part in target.parts:
            recipe = self.recipes[part.canonical]
            origin = recipe.origin
            at = flat_range(part.at, target.shape)
            of = _flat_piece((target, part), origin.shape)
            if recipe.new_scale or recipe.dtype != origin.dtype or at is None or of is None or at[0] != end:
                return None
            end, position = at[1], of[0]
            for piece in origin.pieces:
                flat = _flat_piece(piece, origin.shape)
                if flat is None:
                    return None
                if flat[0] <= position < min(flat[1], of[1]):
                    stop = min(flat[1], of[1])
                    runs.append((piece[0], (flat[2] + position - flat[0]) * size, (stop - position) * size))
                    position = stop
            if position != of[1]:  # pieces out of order
                return None
        return runs if end * size == target.nbytes else None

    def blocks(self, target: Stored) -> Iterator[Bits]:
        """A target tensor in blocks of consecutive numbers, in order."""
        for box in blocks_of(target.shape, SIZES[target.dtype]):
            yield self.block(target, box)

    def block(self, target: Stored, box: Box) -> Bits:
        """A box of a target tensor."""
        out: Bits | None = None
        filled = 0
        for part in target.parts:
            shared = intersect(box, part.at)
            if shared is None:
                continue
            found = self._part(part, shift(shared, part.at, part.of)).reshape(box_shape(shared))
            if shared == box:
                return found
            if out is None:
                out = np.zeros(box_shape(box), found.dtype)
            out[slices(shift(shared, box, whole(box_shape(box))))] = found
            filled += volume(shared)
        assert target.padded or filled == volume(box), f"{target.name} has free places in {box}"
        return np.zeros(box_shape(box), BITS[SIZES[target.dtype]]) if out is None else out

    def _part(self, part: Part, of: Box) -> Bits:
        """A box of the view of a part's canonical tensor."""
        if part.view is None:
            return self.canonical(part.canonical, of)
        recipe = self.recipes[part.canonical]
        shape = tuple(-(-n // BLOCK) for n in recipe.origin.shape) if recipe.new_scale else recipe.origin.shape
        flat = flat_range(of, part.view.shape) if part.view.in_order else None
        if flat is not None and len(shape) > 0:
            width = math.prod(shape[1:])
            rows = flat[0] // width, -(-flat[1] // width)
            found = self.canonical(part.canonical, (rows, *whole(shape[1:]))).reshape(-1)
            return found[flat[0] - rows[0] * width:flat[1] - rows[0] * width]
        if self._viewed is None or self._viewed[0] is not part:
            self._viewed = (part, part.view.apply(self.canonical(part.canonical, whole(shape))))
        return np.ascontiguousarray(self._viewed[1][slices(of)])


def _flat_piece(piece: Piece, canonical: Shape) -> tuple[int, int, int] | None:
    """A piece that is one run on both sides: its range in the canonical tensor, and where it begins in the stored."""
    stored, part = piece
    if part.view is not None and not part.view.in_order:
        return None
    of = flat_range(part.of, canonical if part.view is None else part.view.shape)
    at = flat_range(part.at, stored.shape)
    return None if of is None or at is None else (of[0], of[1], at[0])


def blocks_of(shape: Shape, size: int) -> Iterator[Box]:
    """Boxes that cover a tensor in row-major order, each one run of about `BLOCK_BYTES` bytes at most.

    Cuts are at multiples of 128 unless that is too much, so that no block of FP8 numbers is seen twice.
    """
    cut = 0  # the first dimension of which one step is small enough
    while cut < len(shape) - 1 and math.prod(shape[cut + 1:]) * size > BLOCK_BYTES:
        cut += 1
    if 0 in shape:
        return
    if not shape:
        yield ()
        return
    row = math.prod(shape[cut + 1:]) * size
    step = max(1, BLOCK_BYTES // row)
    if step >= BLOCK or BLOCK * row <= MAX_BLOCKS * BLOCK_BYTES:
        step = max(BLOCK, step // BLOCK * BLOCK)
    for lead in np.ndindex(shape[:cut]):
        for start in range(0, shape[cut], step):
            yield (*((i, i + 1) for i in lead), (start, min(start + step, shape[cut])), *whole(shape[cut + 1:]))
