"""A checkpoint that is read: the canonical tensors it holds, and where in its files each number of them lies.

An adapter lists stored tensors (`Reading`); what follows is the same for all formats. Together they must be exactly the
tensors that the config asks for, in one dtype and shape each, every number once. Numbers stored twice (weights that
ranks share, a tied head) are compared when they are read. Nothing is ignored and nothing is guessed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from megatron_ext.checkpoint.convert import names
from megatron_ext.checkpoint.convert.folder import Folder
from megatron_ext.checkpoint.convert.model import Model
from megatron_ext.checkpoint.convert.names import Canonical, Row
from megatron_ext.checkpoint.convert.tensors import (
    Box,
    Entry,
    Part,
    Shape,
    Stored,
    intersect,
    volume,
    whole,
)
from megatron_ext.config.errors import CheckpointError

BLOCK = 128
"""Rows and columns that share an FP8 scale."""


@dataclass
class Reading:
    """What an adapter found in a folder.

    Attributes:
        model: from the config in the folder, or the one given.
        stored: every tensor of the format, with its parts.
        aliases: canonical names of tensors that the format does not store because they repeat another one, and that
            belong to the checkpoint nevertheless.
        layout: a few words about files and parallel layout, for people.
        documents: files to be carried along as they are (config, tokenizer).
        step: of the training, if the format says.
        unread: what there is of optimizer state that the adapter cannot read, in words; "" for nothing.
    """

    model: Model
    stored: list[Stored]
    aliases: list[str] = field(default_factory=list)
    layout: str = ""
    documents: list[str] = field(default_factory=list)
    step: int | None = None
    unread: str = ""


Piece = tuple[Stored, Part]


class Origin(NamedTuple):
    """Where a canonical tensor comes from: disjoint pieces that cover it."""

    dtype: str
    shape: Shape
    pieces: tuple[Piece, ...]


class Check(NamedTuple):
    """A piece that must repeat numbers of a canonical tensor."""

    piece: Piece
    canonical: str


@dataclass
class Source:
    """A checkpoint that has been found whole.

    Attributes:
        folder: where.
        format: name of its format.
        reading: what the adapter found.
        stored: the adapter's tensors, and those of the folder of carried tensors.
        origins: canonical name -> where its numbers are; aliases point at what they repeat.
        carried: FP8 scales that belong to weights which are not in FP8 here.
        checks: what is stored more than once.
        facts: what an earlier conversion left beside the tensors, by key.
        digests: (file, tensor) -> XXH3-128 of its bytes, in hex, where a manifest of ours lists it.
        notes: what was found and needs no deed, for people.
    """

    folder: Folder
    format: str
    reading: Reading
    stored: list[Stored]
    origins: dict[str, Origin] = field(default_factory=dict)
    carried: dict[str, Origin] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    facts: Mapping[str, Any] = field(default_factory=dict)
    digests: Mapping[tuple[str, str], str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def model(self) -> Model:
        return self.reading.model

    @property
    def step(self) -> int | None:
        """Of the training, as the format says it or an earlier conversion left it beside."""
        kept = self.facts.get("step")
        return kept if type(kept) is int and self.reading.step is None else self.reading.step

    @property
    def states(self) -> frozenset[str]:
        """Kinds of state that lie beside the weights: of `names.STATES`."""
        return frozenset(state for name in self.origins if (state := names.split_state(name)[1]) is not None)

    def path(self, stored: Stored) -> Path:
        return self.folder / stored.file


def assemble(folder: Folder, format: str, reading: Reading, beside: Iterable[Stored] = (),
             facts: Mapping[str, Any] | None = None, digests: Mapping[tuple[str, str], str] | None = None) -> Source:
    """Builds a source out of an adapter's reading and the tensors carried beside it.

    Raises:
        CheckpointError: it is not exactly the checkpoint of its config; the first file and tensor at fault.
    """
    source = Source(folder, format, reading, [*reading.stored, *beside], facts=facts or {}, digests=digests or {})
    pieces: dict[str, list[Piece]] = {}
    for stored in source.stored:
        for part in stored.parts:
            pieces.setdefault(part.canonical, []).append((stored, part))
    _count_mtp(source, pieces)
    _check_names(source, pieces)
    for name, found in pieces.items():
        source.origins[name] = _origin(source, name, found)
    _resolve_aliases(source)
    _check_whole(source)
    _check_tied(source)
    _check_scales(source)
    return source


def _count_mtp(source: Source, pieces: Mapping[str, list[Piece]]) -> None:
    """Takes a checkpoint without any tensor of multi-token prediction for one without such layers.

    transformers counts a layer in the config of every DeepSeek-V3 that it saves, and saves none. A part of a layer is
    still refused: it is missing something.
    """
    table = source.model.table
    if source.model.mtp_layers and not any(
            (tensor := table.get(names.split_state(names.weight_of(name) or name)[0])) is not None
            and tensor.mtp is not None for name in pieces):
        source.notes.append(f"config.json counts {source.model.mtp_layers} layers of multi-token prediction, and there "
                            "are none: taken as a model without")
        source.reading = replace(source.reading, model=replace(source.model, mtp_layers=0))


def _expected(source: Source, name: str) -> Canonical | None:
    """The canonical tensor of a name; of scales and optimizer state, the weight they belong to."""
    base, state = names.split_state(name)
    if state is not None and state not in names.STATES:
        return None
    return source.model.table.get(names.weight_of(base) or base)


def expected_shape(source: Source, name: str) -> Shape:
    """The whole shape of a canonical tensor of any kind; of scales one number for each 128x128 block."""
    tensor = _expected(source, name)
    assert tensor is not None, name
    is_scale = names.weight_of(names.split_state(name)[0]) is not None
    return tuple(-(-size // BLOCK) for size in tensor.shape) if is_scale else tensor.shape


def row_of(source: Source, name: str) -> Row:
    tensor = _expected(source, name)
    assert tensor is not None, name
    return tensor.row


def _check_names(source: Source, pieces: Mapping[str, list[Piece]]) -> None:
    for name, found in pieces.items():
        if _expected(source, name) is None:
            stored = found[0][0]
            hint = None
            if ".layers." in name and (source.model.mtp_layers == 0):
                hint = "layers of multi-token prediction are counted by num_nextn_predict_layers"
            raise CheckpointError(source.path(stored), f"has no place in the model of config.json{_also(name, stored)}",
                                  None, hint, tensor=stored.name)


def _origin(source: Source, name: str, found: list[Piece]) -> Origin:
    """Checks that pieces are the whole tensor; what repeats a piece goes to `checks`."""
    shape = expected_shape(source, name)
    first, part = found[0]
    if len(found) == 1 and part.view is None and part.of == whole(shape):
        return Origin(first.dtype, shape, (found[0],))
    kept: list[Piece] = []
    seen: dict[tuple[Box, Any], Piece] = {}
    for stored, part in found:
        of_shape = part.view.shape if part.view is not None else shape
        inside = len(part.of) == len(of_shape) and math.prod(of_shape) == math.prod(shape) and all(
            0 <= start <= stop <= size for (start, stop), size in zip(part.of, of_shape, strict=True))
        if not inside:
            there = stored.shape if len(found) == 1 else f"a part {part.of}"
            raise CheckpointError(source.path(stored), f"has shape {there}, but config.json makes it {shape}"
                                  f"{_also(name, stored)}", tensor=stored.name)
        if stored.dtype != first.dtype:
            raise CheckpointError(source.path(stored), f"is {stored.dtype}, and {first.dtype} in {first.file}",
                                  "a tensor has one dtype", tensor=stored.name)
        key = (part.of, part.view)
        if key in seen:
            source.checks.append(Check((stored, part), name))
        else:
            seen[key] = (stored, part)
            kept.append((stored, part))
    covered = sum(volume(part.of) for _, part in kept)
    if len({part.view for _, part in kept}) > 1 or covered != math.prod(shape) or _overlap(kept):
        parts = f"is {first.shape}" if len(kept) == 1 else f"is there in {len(kept)} parts that are not the whole"
        raise CheckpointError(source.path(first), f"{parts}, but config.json makes it {shape}{_also(name, first)}",
                              tensor=first.name)
    return Origin(first.dtype, shape, tuple(kept))


def _overlap(pieces: list[Piece]) -> bool:
    """Whether two of the boxes share a place: along the first dimension in which they differ, or pair by pair."""
    boxes = sorted(part.of for _, part in pieces)
    if len(boxes) == 1 or len(boxes[0]) == 0:
        return len(boxes) > 1
    if len(boxes[0]) == 1:
        return any(a[0][1] > b[0][0] for a, b in pairwise(boxes))
    return any(intersect(a, b) is not None for i, a in enumerate(boxes) for b in boxes[i + 1:]
               if b[0][0] < a[0][1])


def _resolve_aliases(source: Source) -> None:
    """Aliases that an earlier conversion left out come back; those that it only made up go."""
    table = source.model.table
    for name in source.facts.get("materialised", ()):
        canonical = table.get(name)
        origin = source.origins.pop(name, None) if canonical is not None and canonical.row.alias else None
        if origin is not None and canonical is not None:
            assert canonical.row.alias is not None
            source.checks += [Check(piece, canonical.row.alias) for piece in origin.pieces]
    for name in source.facts.get("aliases", source.reading.aliases):
        canonical = table.get(name)
        if canonical is None or canonical.row.alias is None or name in source.origins:
            continue
        original = _stored_original(source, canonical.row.alias)
        if original in source.origins:
            source.origins[name] = source.origins[original]


def _check_tied(source: Source) -> None:
    """A head that the config ties to the embedding and that is stored nevertheless must repeat it."""
    head = source.model.table[names.HEAD]
    if head.row.alias is not None and names.HEAD in source.origins:
        source.checks += [Check(piece, head.row.alias) for piece in source.origins[names.HEAD].pieces
                          if piece not in source.origins[head.row.alias].pieces]


def _stored_original(source: Source, name: str) -> str:
    """What an alias repeats in the end: the embedding, where the head that it repeats is tied and not stored."""
    canonical = source.model.table[name]
    return canonical.row.alias if name not in source.origins and canonical.row.alias is not None else name


def _check_whole(source: Source) -> None:
    table, origins = source.model.table, source.origins
    missing = [name for name, tensor in table.items()
               if name not in origins and tensor.row.alias is None and not tensor.row.optional]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        mtp = all(table[name].mtp is not None for name in missing)
        raise CheckpointError(source.folder.path, f"is missing{more}", None,
                              "if multi-token prediction was left out, set num_nextn_predict_layers to 0 in config.json"
                              if mtp else None, tensor=missing[0])
    for name, origin in origins.items():
        canonical = table.get(name)
        if canonical is not None and canonical.row.fp32 and origin.dtype not in ("F32", "BF16"):
            stored = origin.pieces[0][0]
            raise CheckpointError(source.path(stored), f"is {origin.dtype}", "it must be F32", tensor=stored.name)


def _check_scales(source: Source) -> None:
    """FP8 weights and scales belong together; scales of weights that are not in FP8 must have been carried."""
    for name, origin in list(source.origins.items()):
        weight, stored = names.weight_of(name), origin.pieces[0][0]
        if weight is not None:
            if origin.dtype != "F32" or len(origin.shape) != 2:
                raise CheckpointError(source.path(stored), f"is {origin.dtype} {origin.shape}",
                                      "scales are F32, one for each block of a matrix", tensor=stored.name)
            if weight not in source.origins:
                raise CheckpointError(source.path(stored), "is a scale without its weight", tensor=stored.name)
            if source.origins[weight].dtype != "F8_E4M3":
                if stored.file.split("/")[0] != CARRIED:
                    raise CheckpointError(source.path(stored), f"is a scale, but its weight is "
                                          f"{source.origins[weight].dtype}", tensor=stored.name)
                source.carried[name] = source.origins.pop(name)
        elif origin.dtype == "F8_E4M3" and names.scale_name(name) not in source.origins:
            raise CheckpointError(source.path(stored), "is in FP8 and its scale is missing", tensor=stored.name)


def _also(name: str, stored: Stored) -> str:
    return "" if name == stored.name else f" (as {name[:200]})"


CARRIED = "megatron_ext_carried"
"""Folder of what the format of the folder around it cannot hold: safetensors under canonical names, and `FACTS`."""
FACTS = "carried.json"
MANIFEST = "megatron_ext_manifest.json"


def entries(source: Source) -> dict[str, Entry]:
    """Every canonical tensor of a source in the order of the table, each weight with its scales behind it."""
    found: dict[str, Entry] = {}
    for name in [*source.model.table, *sorted(source.origins)]:
        for each in (name, names.scale_name(name)):
            if each in source.origins and each not in found:
                found[each] = Entry(source.origins[each].dtype, source.origins[each].shape)
    return found


def whole_part(name: str, shape: Shape) -> Part:
    box = whole(shape)
    return Part(name, box, box)
