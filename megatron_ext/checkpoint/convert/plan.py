"""A conversion, thought through before a number is read: what is written where, out of what, and what has no place.

A plan needs the headers of the source only. It is complete or it is refused: every canonical tensor of the source is
written, carried beside the result, or repeats one that is; every number of the result has an origin.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_ext.checkpoint.convert import names, safetensors_io
from megatron_ext.checkpoint.convert.blocks import BLOCK_BYTES, MAX_BLOCKS, Recipe
from megatron_ext.checkpoint.convert.formats import Format
from megatron_ext.checkpoint.convert.formats.layout import CONFIG, Layout, Options
from megatron_ext.checkpoint.convert.selection import choose
from megatron_ext.checkpoint.convert.source import CARRIED, FACTS, MANIFEST, Check, Source, entries, row_of
from megatron_ext.checkpoint.convert.tensors import (
    SIZES,
    Entry,
    Stored,
    TargetFile,
    many_objects,
    renamed,
    volume,
)
from megatron_ext.config.errors import CheckpointError

DTYPES = {"bf16": "BF16", "fp8": "F8_E4M3", "fp32": "F32"}
_CARRIED_SHARD = 5 * 10**9


@dataclass
class Plan:
    """What is to be done.

    Attributes:
        source: what is read.
        format: what is written.
        dtype: key of `DTYPES`, or None for dtypes as they are.
        entries: canonical name -> dtype and shape of everything the result holds in its own files.
        files: to be written, those of carried tensors included.
        recipes: canonical name -> how it is made.
        carried: name -> why it is carried beside.
        aliases: name -> what it repeats; left out of the result.
        checks: of what repeats other numbers, by the file with which they are made.
        documents: path -> content of small files.
        copies: small files taken over as they are.
        lossy: names of tensors whose numbers are rounded.
    """

    source: Source
    format: Format
    dtype: str | None
    entries: dict[str, Entry]
    files: list[TargetFile]
    recipes: dict[str, Recipe]
    carried: dict[str, str]
    aliases: dict[str, str]
    checks: list[Check]
    documents: dict[str, bytes]
    copies: list[str]
    lossy: list[str] = field(default_factory=list)

    @property
    def tensors(self) -> int:
        return sum(len(file.tensors) for file in self.files)

    @property
    def payload(self) -> int:
        """Bytes of tensors."""
        return sum(tensor.nbytes for file in self.files for tensor in file.tensors)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files) + sum(map(len, self.documents.values()))

    @property
    def memory(self) -> int:
        """The most that a worker holds at a time, beside its baseline, in bytes."""
        needed = 4 * MAX_BLOCKS * BLOCK_BYTES  # read, computed, cut, written
        for recipe in self.recipes.values():
            if any(part.view is not None and not part.view.in_order for _, part in recipe.origin.pieces):
                needed = max(needed, 2 * math.prod(recipe.origin.shape) * SIZES[recipe.origin.dtype])
        for file in self.files:
            for tensor in file.tensors:
                if any(part.view is not None and not part.view.in_order for part in tensor.parts):
                    needed = max(needed, 2 * tensor.nbytes + BLOCK_BYTES)
        return needed

    @property
    def fingerprint(self) -> str:
        """Changes with everything that changes a byte of the result, except the numbers of the source."""
        digest = hashlib.sha256(f"{self.source.format} {self.format.name} {self.dtype}".encode())
        for file in self.files:
            digest.update(f"{file.path} {file.size}".encode())
            for _, content in file.literals:
                digest.update(content)
        for stored in self.source.stored:
            digest.update(f"{stored.name} {stored.file} {stored.offset} {stored.dtype} {stored.shape}".encode())
        for path, content in self.documents.items():
            digest.update(path.encode() + content)
        return digest.hexdigest()


def make_plan(source: Source, format: Format, options: Options | None = None, dtype: str | None = None,
              optimizer: str | None = None, weights: str = "model") -> Plan:
    """Plans a conversion.

    Args:
        source: what is read.
        format: what is written.
        options: how it is cut.
        dtype: key of `DTYPES`; None for dtypes as they are.
        optimizer: what becomes of optimizer state and averages: "keep" (an error where the format has no place for
            them), "carry" (beside the result where it has none), "drop"; None to keep, and to be asked where that is
            impossible.
        weights: key of `selection.WEIGHTS`: what is converted as the weights. Other than "model" they are FP32 unless
            `dtype` says otherwise, and state is dropped unless `optimizer` says otherwise.

    Raises:
        CheckpointError: it is impossible, or something would be lost.
    """
    with many_objects():
        options = _heeded(format, options or Options())
        chosen, apart = choose(source, format, optimizer, weights)
        dtype = "fp32" if dtype is None and chosen is not source and weights != "model" else dtype
        return _make_plan(chosen, format, replace(options, step=chosen.step), dtype, apart)


def _make_plan(source: Source, format: Format, options: Options, dtype: str | None, apart: frozenset[str]) -> Plan:
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError("--dtype", f"is {dtype!r}", f"must be one of {', '.join(DTYPES)}")
    if dtype is not None and DTYPES[dtype] not in format.dtypes:
        raise CheckpointError("--dtype", f"is {dtype}, which {format.title} does not hold")
    asked = dtype is not None
    if not asked and "F8_E4M3" not in format.dtypes and any(o.dtype == "F8_E4M3" for o in source.origins.values()):
        dtype = "bf16"
    wanted, carried = _wanted(source, dtype, asked)
    for name, entry in wanted.items():
        if entry.dtype not in format.dtypes:
            raise CheckpointError(format.name, f"holds no {entry.dtype}", None, "choose another with --dtype",
                                  tensor=name)
    for name in [name for name in wanted if names.split_state(name)[1] in apart]:
        carried[name] = "optimizer state"
        del wanted[name]
    layout = format.lay_out(source.model, wanted, options)
    aliases = {name: _original(source, layout, name) for name in layout.aliases}
    recipes = {name: make_recipe(source, name, entry.dtype) for name, entry in wanted.items() if name not in aliases}
    for name in layout.materialised:
        original = source.model.table[name].row.alias
        assert original is not None
        recipes[name] = recipes[original]._replace(name=name)
    carried |= layout.carried
    beside = _carried_files(source, wanted, carried, recipes)
    files = layout.files + beside
    plan = Plan(source, format, dtype, wanted, files, recipes, carried, aliases, list(source.checks), {}, [],
                [name for name, recipe in recipes.items() if is_lossy(recipe, source.facts.get("through"))])
    _check_complete(plan)
    for name, original in aliases.items():
        plan.checks += [Check(piece, original) for piece in source.origins[name].pieces
                        if piece not in source.origins[original].pieces]
    _add_documents(plan, layout, [file.path for file in beside])
    _check_paths(plan)
    return plan


def _heeded(format: Format, options: Options) -> Options:
    for name, default in vars(Options()).items():
        if getattr(options, name) != default and name not in format.options:
            raise CheckpointError("--" + name.replace("_", "-").replace("shard-bytes", "shard-size"),
                                  f"means nothing to {format.title}")
    if options.shard_bytes < 1:
        raise CheckpointError("--shard-size", "must be positive")
    return options


def _wanted(source: Source, dtype: str | None, asked: bool) -> tuple[dict[str, Entry], dict[str, str]]:
    """Canonical tensors of the result under a choice of dtype, and which scales are carried beside it.

    Args:
        asked: whether the dtype is the user's choice, and not only that of weights whose FP8 the format does not hold.
    """
    found = entries(source)
    carried = dict.fromkeys(source.carried, "scales of weights that are not in FP8 here")
    if dtype is None:
        return found, carried
    wanted: dict[str, Entry] = {}
    already = any(entry.dtype == "F8_E4M3" for entry in found.values())
    anew = not source.carried and not already
    for name, entry in found.items():
        if names.weight_of(name) is not None:
            if dtype != "fp8":
                carried[name] = "scales of weights that are not in FP8 any more"
            else:
                wanted[name] = entry
            continue
        row, scale = row_of(source, name), names.scale_name(name)
        if row.optional or names.split_state(name)[1] is not None or (not asked and entry.dtype != "F8_E4M3"):
            wanted[name] = entry
        elif row.fp32:
            wanted[name] = Entry("F32", entry.shape)
        elif dtype != "fp8":
            wanted[name] = Entry(DTYPES[dtype], entry.shape)
        elif entry.dtype == "F8_E4M3" or (already and scale not in source.carried):
            wanted[name] = entry
        elif scale in source.carried or (anew and row.quantised):
            wanted[name] = Entry("F8_E4M3", entry.shape)
            wanted[scale] = Entry("F32", tuple(-(-size // 128) for size in entry.shape))
            carried.pop(scale, None)
        else:  # never in FP8: FP32 if it was that beside FP8 weights, else as in the releases
            wanted[name] = Entry("F32" if name in source.facts.get("fp32", ()) else "BF16", entry.shape)
    return wanted, carried


def _fp32_beside_fp8(source: Source) -> list[str]:
    """Weights of an FP8 checkpoint that are in FP32, which a way back from another dtype must know."""
    if "fp32" in source.facts:
        return list(source.facts["fp32"])
    if not any(origin.dtype == "F8_E4M3" for origin in source.origins.values()):
        return []
    return [name for name, origin in source.origins.items() if origin.dtype == "F32" and names.weight_of(name) is None
            and names.split_state(name)[1] is None and not (row := row_of(source, name)).fp32 and not row.optional]


def make_recipe(source: Source, name: str, dtype: str) -> Recipe:
    """How a canonical tensor of a source is made in a dtype."""
    weight = names.weight_of(name)
    if name in source.origins:
        origin = source.origins[name]
        scale = None
        if weight is None and (dtype == "F8_E4M3") != (origin.dtype == "F8_E4M3"):
            key = names.scale_name(name)
            scale = source.origins.get(key) or source.carried.get(key)
        return Recipe(name, dtype, origin, scale)
    if name in source.carried:
        return Recipe(name, dtype, source.carried[name])
    assert weight is not None, name
    return Recipe(name, dtype, source.origins[weight], new_scale=True)


def is_lossy(recipe: Recipe, through: object) -> bool:
    """Whether numbers are rounded so that the way back does not return them.

    Args:
        recipe: of the numbers.
        through: "BF16" if numbers whose scales were carried have been BF16 since they were FP8.
    """
    if recipe.new_scale or recipe.dtype == recipe.origin.dtype:
        return False
    if recipe.scale is not None:
        return recipe.origin.dtype == "F32" and through == "BF16"
    return recipe.dtype == "F8_E4M3" or (recipe.origin.dtype, recipe.dtype) not in (("BF16", "F32"), ("F16", "F32"))


def _original(source: Source, layout: Layout, alias: str) -> str:
    """What an alias repeats, followed to a tensor that is stored."""
    name = alias
    while name == alias or name in layout.aliases or name not in source.origins:
        up = source.model.table[name].row.alias
        assert up is not None, alias
        name = up
    return name


def _carried_files(source: Source, wanted: Mapping[str, Entry], carried: Mapping[str, str],
                   recipes: dict[str, Recipe]) -> list[TargetFile]:
    """Files of the folder of carried tensors. What is carried for want of a place keeps the dtype it was to have."""
    tensors = []
    for name in carried:
        entry = wanted.get(name)
        if entry is None:
            origin = source.origins.get(name) or source.carried[name]
            entry = Entry(origin.dtype, origin.shape)
            recipes[name] = Recipe(name, entry.dtype, origin)
        tensors.append(renamed(name, name, "", -1, entry.dtype, entry.shape))
    files: list[TargetFile] = []
    for group in _groups(tensors):
        files.append(safetensors_io.lay_out(f"{CARRIED}/carried-{len(files) + 1:05d}.safetensors", group, {}))
    return files


def _groups(tensors: Iterable[Stored]) -> Iterable[list[Stored]]:
    group: list[Stored] = []
    size = 0
    for tensor in tensors:
        if group and size + tensor.nbytes > _CARRIED_SHARD:
            yield group
            group, size = [], 0
        group.append(tensor)
        size += tensor.nbytes
    if group:
        yield group


def _check_complete(plan: Plan) -> None:
    """Nothing lost, nothing made up: of every canonical tensor all numbers are written, of every file all places."""
    covered: Counter[str] = Counter()
    shapes = {name: recipe_shape(recipe) for name, recipe in plan.recipes.items()}
    for file in plan.files:
        for tensor in file.tensors:
            filled = sum(volume(part.at) for part in tensor.parts)
            if filled != math.prod(tensor.shape) and not tensor.padded:
                raise CheckpointError(file.path, "has places that nothing is written to", tensor=tensor.name)
            for part in tensor.parts:
                if part.canonical not in plan.recipes:
                    raise CheckpointError(file.path, f"would hold {part.canonical}, which the source has not",
                                          tensor=tensor.name)
                if plan.recipes[part.canonical].dtype != tensor.dtype:
                    raise CheckpointError(file.path, f"would be {tensor.dtype}, but {part.canonical} is "
                                          f"{plan.recipes[part.canonical].dtype}", tensor=tensor.name)
                covered[part.canonical] += volume(part.of)
    for name, shape in shapes.items():
        if covered[name] < math.prod(shape):
            raise CheckpointError(plan.format.name, "would be lost" if not covered[name] else "would be lost in part",
                                  "the format has no place for it", tensor=name)


def recipe_shape(recipe: Recipe) -> tuple[int, ...]:
    shape = recipe.origin.shape
    return tuple(-(-size // 128) for size in shape) if recipe.new_scale else shape


def _add_documents(plan: Plan, layout: Layout, carried: list[str]) -> None:
    """Config, index, tokenizer; and the facts that the way back needs."""
    source = plan.source
    facts: dict[str, Any] = {}
    plan.documents.update(layout.documents)
    plan.copies = [name for name in source.reading.documents if name not in plan.documents and name != CONFIG
                   and name != MANIFEST]
    for name in plan.copies:
        source.folder.check(name)
    before = _kept_config(source)
    changes = _config_changes(source, plan.dtype, before)
    there = source.folder.has(CONFIG) and source.folder.read_json(CONFIG) == source.model.hf
    config = source.folder.read(CONFIG) if there and not changes else source.model.config_bytes(changes)
    if before is not None and _same_but_dtype(before, json.loads(config)):
        config = before
    plan.documents[CONFIG] = config
    original = before if before is not None else source.folder.read(CONFIG) if source.folder.has(CONFIG) else None
    if original is not None and original != config:
        facts["config"] = original.decode()
    if set(layout.implied) != set(layout.aliases):
        facts["aliases"] = sorted(layout.aliases)
    if plan.carried and (plan.dtype == "bf16" or source.facts.get("through") == "BF16"):
        facts["through"] = "BF16"
    if any(names.weight_of(name) is not None for name in plan.carried) and (wide := _fp32_beside_fp8(source)):
        facts["fp32"] = wide
    if source.step is not None and any(names.split_state(name)[1] is not None for name in plan.carried):
        facts["step"] = source.step
    if layout.materialised:
        facts["materialised"] = layout.materialised
    if carried or facts:
        content: dict[str, Any] = {"format": 1, "files": carried, **facts}
        plan.documents[f"{CARRIED}/{FACTS}"] = (json.dumps(content, indent=1) + "\n").encode()


def _kept_config(source: Source) -> bytes | None:
    kept = source.facts.get("config")
    return kept.encode() if isinstance(kept, str) else None


def _config_changes(source: Source, dtype: str | None, before: bytes | None) -> dict[str, Any]:
    """What a change of dtype changes in `config.json`."""
    if dtype is None:
        return {}
    key = "dtype" if "dtype" in source.model.hf else "torch_dtype"
    changes: dict[str, Any] = {key: "float32" if dtype == "fp32" else "bfloat16"}
    quantised = source.model.hf.get("quantization_config")
    if dtype == "fp8" and quantised is None:
        old = json.loads(before) if before is not None else {}
        changes["quantization_config"] = old.get("quantization_config") or {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    elif dtype != "fp8" and quantised is not None:
        changes["quantization_config"] = None
    return {key: value for key, value in changes.items() if source.model.hf.get(key) != value}


def _same_but_dtype(a: bytes, values: Mapping[str, Any]) -> bool:
    """Whether an earlier config says the same as the new one, so that its very bytes can come back."""
    old = json.loads(a)
    passed_over = {"torch_dtype", "dtype"}
    return isinstance(old, dict) and {k: v for k, v in old.items() if k not in passed_over} == {
        k: v for k, v in values.items() if k not in passed_over} and all(
        old.get(key, values.get(key)) == values.get(key) for key in passed_over)


def _check_paths(plan: Plan) -> None:
    paths = [file.path for file in plan.files] + list(plan.documents) + plan.copies + [MANIFEST]
    if twice := [path for path, count in Counter(paths).items() if count > 1]:
        raise CheckpointError(twice[0], "would be written twice")
