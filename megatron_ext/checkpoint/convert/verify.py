"""Proof of a conversion: read back what was written as a stranger would, and convert it back.

1. The result is opened by its own adapter, which finds its key set closed, and every shape as the config makes it.
2. Every tensor of the result has the checksum of the manifest.
3. The canonical tensors are those of the plan, in its dtypes.
4. The inverse conversion gives the source's tensors, byte for byte; where numbers were rounded, converting the source
   again gives the result, and the largest difference is reported.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ext.checkpoint.convert import dtype as numbers
from megatron_ext.checkpoint.convert import names
from megatron_ext.checkpoint.convert.blocks import Files, Producer, Recipe, blocks_of
from megatron_ext.checkpoint.convert.opening import open_checkpoint
from megatron_ext.checkpoint.convert.plan import Plan, make_recipe
from megatron_ext.checkpoint.convert.source import MANIFEST, Source
from megatron_ext.checkpoint.convert.stream import Progress
from megatron_ext.checkpoint.convert.tensors import SIZES, Bits, Box, Stored, box_shape, shift, whole
from megatron_ext.checkpoint.convert.work import sum_tensor
from megatron_ext.config.errors import CheckpointError


def verify(plan: Plan, destination: Path, progress: Progress | None = None) -> str:
    """Proves that a destination is the result of a plan.

    Returns:
        What was proved, in a line.

    Raises:
        CheckpointError: it is not; the first file and tensor at fault.
    """
    told = progress or (lambda count: None)
    result = open_checkpoint(destination, plan.format.name)
    _check_keys(plan, result)
    _check_sums(result, told)
    exact, rounded, largest = _check_inverse(plan, result, told)
    line = f"{len(result.stored)} tensors with their checksums; converted back, {exact} of the source's are the same"
    return line if not rounded else f"{line} and {rounded} rounded, by at most {largest:.3g} of their largest number"


def _check_keys(plan: Plan, result: Source) -> None:
    due = set(plan.entries) | set(plan.carried)
    there = set(result.origins) | set(result.carried)
    for name in sorted(due ^ there):
        found = "is missing" if name in due else "is there, and the plan has no such tensor"
        raise CheckpointError(result.folder.path, found, tensor=name)
    for name, entry in plan.entries.items():
        origin = result.origins.get(name)
        if origin is not None and (origin.dtype, origin.shape) != (entry.dtype, entry.shape):
            raise CheckpointError(result.folder.path, f"is {origin.dtype} {origin.shape}",
                                  f"the plan has {entry.dtype} {entry.shape}", tensor=name)


def _check_sums(result: Source, told: Progress) -> None:
    with Files(result.folder) as files:
        for stored in result.stored:
            digest = result.digests.get((stored.file, stored.name))
            if digest is None:
                raise CheckpointError(result.folder / stored.file, f"has no checksum in {MANIFEST}", tensor=stored.name)
            if sum_tensor(files, stored) != digest:
                raise CheckpointError(result.folder / stored.file, "has other content than when it was written",
                                      "its checksum (XXH3-128) is not the manifest's", tensor=stored.name)
            told(stored.nbytes)


def _check_inverse(plan: Plan, result: Source, told: Progress) -> tuple[int, int, float]:
    """(tensors of the source that come back the same, those that were rounded, their largest difference)."""
    source, exact, largest = plan.source, 0, 0.0
    lossy = set(plan.lossy)
    with Files(source.folder) as theirs, Files(result.folder) as ours:
        for stored in source.stored:
            recipes = {part.canonical: _inverse(source, result, part.canonical, stored.dtype) for part in stored.parts}
            rounded = not lossy.isdisjoint(recipes)
            producer = Producer(ours, recipes)
            for box in _places(stored):
                found, expected = producer.block(stored, box), theirs.box(stored, box)
                if rounded:
                    largest = max(largest, _difference(source, stored, found, expected))
                elif not np.array_equal(found, expected):
                    raise CheckpointError(source.folder / stored.file, "does not come back from the result",
                                          "the conversion is not exact", tensor=stored.name)
                told(expected.nbytes)
            exact += not rounded
    return exact, len(source.stored) - exact, largest


def _places(stored: Stored) -> Iterator[Box]:
    """Boxes of all places that hold numbers of the model: what a vocabulary is padded with comes back as zeros."""
    for box in [part.at for part in stored.parts] if stored.padded else [whole(stored.shape)]:
        for inside in blocks_of(box_shape(box), SIZES[stored.dtype]):
            yield shift(inside, whole(box_shape(box)), box)


def _inverse(source: Source, result: Source, name: str, dtype: str) -> Recipe:
    """How a tensor of the source is made from the result; one that only repeats another, from that."""
    while name not in result.origins and name not in result.carried and name in source.model.table:
        alias = source.model.table[name].row.alias
        assert alias is not None, name
        name = alias
    return make_recipe(result, name, dtype)


def _difference(source: Source, stored: Stored, found: Bits, expected: Bits) -> float:
    """The largest difference over the largest number; no more than rounding to 4 bits can make."""
    a, b = (numbers.to_torch(bits, stored.dtype).double() for bits in (found, expected))
    amax = float(b.abs().max()) if b.numel() else 0.0
    difference = (a - b).abs()
    if bool((difference > b.abs() / 16 + amax / 2**17).any()):
        raise CheckpointError(source.folder / stored.file, "comes back from the result with a larger difference than "
                              "rounding makes", tensor=stored.name)
    return float(difference.max()) / amax if amax else 0.0


@dataclass(frozen=True)
class Difference:
    """How a canonical tensor of two checkpoints differs.

    Attributes:
        name: of the tensor.
        what: in words.
        largest: largest difference of two numbers; 0 if they could not be compared.
        relative: the same over the largest number of the first.
    """

    name: str
    what: str
    largest: float = 0.0
    relative: float = 0.0


def differences(a: Source, b: Source, told: Progress | None = None) -> Iterator[Difference]:
    """Compares two checkpoints of any formats, tensor by tensor, by the values of their numbers.

    FP8 weights count as what they mean, so scales are not compared by themselves.
    """
    with Files(a.folder) as files_a, Files(b.folder) as files_b:
        for name in _in_order(a, b):
            if name not in a.origins or name not in b.origins:
                yield Difference(name, f"only in {(a if name in a.origins else b).folder.path}")
                continue
            left, right = a.origins[name], b.origins[name]
            if left.shape != right.shape:
                yield Difference(name, f"{list(left.shape)} and {list(right.shape)}")
                continue
            producers = [Producer(files, {name: make_recipe(source, name, "F32")})
                         for files, source in ((files_a, a), (files_b, b))]
            largest = amax = 0.0
            same = True
            for box in blocks_of(left.shape, 4):
                x, y = (producer.canonical(name, box) for producer in producers)
                if not np.array_equal(x, y):
                    x32, y32 = x.view(np.float32), y.view(np.float32)
                    with np.errstate(invalid="ignore"):
                        largest = max(largest, float(np.nan_to_num(np.abs(x32 - y32), nan=math.inf).max()))
                    amax, same = max(amax, float(np.nanmax(np.abs(x32)))), False
                if told is not None:
                    told(x.nbytes)
            if not same:
                yield Difference(name, f"{left.dtype} and {right.dtype}", largest, largest / amax if amax else math.inf)
            elif left.dtype != right.dtype:
                yield Difference(name, f"{left.dtype} and {right.dtype}, the same numbers")


def _in_order(a: Source, b: Source) -> Iterable[str]:
    """Names of both, in the order of the table, without scales."""
    found = dict.fromkeys([*a.model.table, *b.model.table, *sorted(a.origins), *sorted(b.origins)])
    return [name for name in found if (name in a.origins or name in b.origins) and names.weight_of(name) is None]


def compared_bytes(a: Source) -> int:
    """How much `differences` will tell of."""
    return sum(4 * math.prod(origin.shape) for name, origin in a.origins.items() if names.weight_of(name) is None)

