"""Megatron-Core's distributed checkpoints (`torch_dist`): whole tensors in torch.distributed.checkpoint's container.

    iter_0001000/common.pt              arguments, iteration, and how the names are to be read (`content_metadata`)
    iter_0001000/metadata.json          {"sharded_backend": "torch_dist", ..}
    iter_0001000/.metadata, *.distcp    see dcp_io.py

No parallel layout is left in them: `linear_fc1` is all of gate above all of up, experts are one tensor [E, 2M, h] and
[E, h, M], the vocabulary may be padded. Names are of three kinds, and Megatron-Core is told in `content_metadata` by
which to ask:

    decoder.layers.<i>.*             layers of several kinds, as DeepSeek's are; what we write
    decoder.layers.* [L, ..]         layers of one kind, stacked, unless `non_homogeneous_layers`
    ...experts.<e>.*, *_w and *_v    nothing fused or stacked: `singleton_local_shards`

Optimizer state in model space (`optimizer.state.<state>.<name>`) is read. It is not written: Megatron-Core loads it
only together with the parameter groups of the very optimizer that it then goes on with.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ext.checkpoint.convert import dcp_io, names, torch_file
from megatron_ext.checkpoint.convert.dcp_io import DcpObject, DcpTarget, DcpTensor
from megatron_ext.checkpoint.convert.folder import Folder
from megatron_ext.checkpoint.convert.formats import megatron_args as around
from megatron_ext.checkpoint.convert.formats import megatron_names as theirs
from megatron_ext.checkpoint.convert.formats.layout import Layout, Options, documents_of
from megatron_ext.checkpoint.convert.formats.megatron_names import Tensor
from megatron_ext.checkpoint.convert.model import Model
from megatron_ext.checkpoint.convert.source import Reading
from megatron_ext.checkpoint.convert.tensors import SIZES, Entry, Part, Shape, Stored, reshaped, whole
from megatron_ext.config.errors import CheckpointError, shown

COMMON, BACKEND = "common.pt", "metadata.json"
_BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
            "common_backend_version": 1}
_CONTENT = {"singleton_local_shards": False, "non_homogeneous_layers": True, "chained_optim_avoid_prefix": True,
            "distrib_optim_sharding_type": "fully_reshardable"}
_STATE = re.compile(r"(?:chained_\d{1,3}\.)?optimizer\.state\.(param|fp32_param|exp_avg|exp_avg_sq)\.(.+)")
_STATES = {"param": "fp32", "fp32_param": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
_OPTIMIZER = re.compile(r"(?:chained_\d{1,3}\.)?optimizer\..+")
_OBJECTS = re.compile(r"(?:rng_state|rerun_state_machine|opt_param_scheduler|dataloader)\b.*")
_STACKED = re.compile(r"decoder\.layers\.(?!\d+\.)(.+)")
_EXPERT = re.compile(r"mlp\.experts\.experts\.(?:(\d{1,5})\.)?(linear_fc[12]\.weight)")
_HALF = re.compile(r"(.+linear_fc1\.weight)_([wv])")


@dataclass(frozen=True)
class _Whole:
    """A tensor of a checkpoint, out of canonical ones.

    Attributes:
        shape: as it must be; of a vocabulary without its padding.
        parts: where canonical tensors are in it.
        vocabulary: whether it may have more rows.
    """

    shape: Shape
    parts: tuple[Part, ...]
    vocabulary: bool = False


class Megatron:
    """See formats.Format."""

    name = "megatron"
    title = "Megatron-Core torch_dist"
    dtypes = frozenset(SIZES) - {"F8_E4M3"}
    states: frozenset[str] = frozenset()
    options = frozenset({"shard_bytes", "spec"})

    def detect(self, folder: Folder) -> bool:
        return any(_holds(found) for found in around.candidates(folder).values())

    # -- reading

    def read(self, folder: Folder, config: Mapping[str, Any] | None) -> Reading:
        prefix, step = around.latest(folder, _holds)
        backend = folder.read_json(prefix + BACKEND)
        if backend.get("sharded_backend") != "torch_dist" or backend.get("sharded_backend_version") != 1:
            raise CheckpointError(folder / (prefix + BACKEND), f"says {shown(backend.get('sharded_backend'))} "
                                  f"version {shown(backend.get('sharded_backend_version'))}",
                                  "torch_dist version 1 is read")
        common = torch_file.read(folder, prefix + COMMON)
        if not isinstance(common, dict):
            raise CheckpointError(folder / (prefix + COMMON), "holds no dict")
        args = around.attributes(common.get("args"))
        model = around.find_model(folder, prefix, config, args, folder / (prefix + COMMON))
        dcp = dcp_io.read(folder, prefix)
        stored: list[Stored] = []
        unread = ""
        for name, tensor in dcp.tensors.items():
            state = _STATE.fullmatch(name)
            if state is None and _OPTIMIZER.fullmatch(name):
                unread = "optimizer state in the layout of Megatron's buffers"
                continue
            where = folder / (tensor.chunks[0].file if tensor.chunks else prefix + dcp_io.METADATA)
            stored += _stored(where, model, name, tensor, args, state)
        for name in dcp.bytes:
            if not theirs.is_extra(name) and not _OBJECTS.fullmatch(name) and not _OPTIMIZER.fullmatch(name):
                raise CheckpointError(folder / (prefix + dcp_io.METADATA), "is no tensor, and nothing is known of it",
                                      tensor=name)
        said = common.get("iteration")
        if step is None and not prefix.startswith(around.RELEASE) and type(said) is int and said > 0:
            step = said
        documents = documents_of(folder, (around.TRACKER, BACKEND))
        return Reading(model, stored, theirs.implied(model), f"{len(dcp.files)} files", documents, step, unread)

    # -- writing

    def lay_out(self, model: Model, entries: Mapping[str, Entry], options: Options) -> Layout:
        theirs.check_spec(options)
        home, documents = around.home(options)
        layout = theirs.fill(model, entries, Layout([], documents=documents))
        targets: list[DcpTarget] = []
        objects: list[DcpObject] = []
        nothing = [None]  # one object for all of them: it is stored once

        def put(name: str, tensors: Sequence[Tensor], lead: Shape) -> None:
            dtypes = {theirs.one_dtype(tensor, entries) for tensor in tensors}
            if len(dtypes) > 1:
                raise CheckpointError(self.name, f"would be of {' and '.join(sorted(dtypes))}", "its experts are one "
                                      "tensor", "choose a dtype with --dtype", tensor=name)
            wanted = _whole(lead, tensors)
            targets.append(DcpTarget(name, dtypes.pop(), wanted.shape, wanted.parts))

        def put_outside(key: str) -> None:
            tensor = theirs.outside(model, key)
            assert tensor is not None, key
            put(key, [tensor], ())

        put_outside(theirs.EMBEDDING)
        for layer in range(model.layers):
            for key, group in itertools.groupby(theirs.of_layer(model, layer, options.spec), lambda each: each.key):
                tensors = list(group)
                experts = key.startswith(theirs.EXPERTS)
                put(theirs.prefix(model, layer, _stored_key(key)), tensors, (len(tensors),) if experts else ())
            for module in theirs.extras(model, layer, options.spec):
                count = model.config.n_routed_experts if module.startswith(theirs.EXPERTS) else 1
                name = theirs.extra_name(model, layer, _stored_key(module))
                objects += [DcpObject(f"{name}/shard_{number}_{count}", nothing) for number in range(count)]
        put_outside(theirs.NORM)
        if options.spec == "te":
            objects.append(DcpObject("decoder.final_layernorm._extra_state/shard_0_1", nothing))
        if not model.config.tie_word_embeddings:
            put_outside(theirs.HEAD)
        files, index = dcp_io.lay_out(home, targets, objects, options.shard_bytes)
        args = around.namespace(model, Options(), entries[names.EMBEDDING].dtype, model.config.vocab_size)
        common = {"args": args, "checkpoint_version": around.VERSION, "iteration": options.step or 0,
                  "content_metadata": _CONTENT}
        layout.files = [torch_file.lay_out(home + COMMON, common, []), *files]
        layout.documents |= {home + BACKEND: json.dumps(_BACKEND).encode(), **index}
        return layout


def _holds(found: list[str]) -> bool:
    return BACKEND in found and dcp_io.METADATA in found


def _stored_key(key: str) -> str:
    """A key within a layer as it is stored: of all experts together."""
    return key.replace(theirs.EXPERTS, theirs.EXPERTS + "experts.", 1) if key.startswith(theirs.EXPERTS) else key


def _whole(lead: Shape, tensors: Sequence[Tensor]) -> _Whole:
    """A tensor [*lead, rows, ..] out of those of layers and experts, in their order."""
    count, shape = len(tensors[0].canonical), tensors[0].shape
    view_shape = (1,) * len(lead) + shape
    view, of = reshaped(shape, view_shape) if lead else None, whole(view_shape)
    parts = []
    for index, tensor in zip(itertools.product(*map(range, lead)), tensors, strict=True):
        at = tuple((i, i + 1) for i in index)
        parts += [Part(name, (*at, (i * shape[0], (i + 1) * shape[0]), *whole(shape[1:])), of, view)
                  for i, name in enumerate(tensor.canonical)]
    return _Whole((*lead, count * shape[0], *shape[1:]), tuple(parts), tensors[0].key in theirs.VOCABULARY)


# -- tensors that are read

def _stored(where: Any, model: Model, name: str, tensor: DcpTensor, args: Mapping[str, Any],
            state: re.Match[str] | None) -> list[Stored]:
    """The chunks of a tensor; one that is unknown gets a canonical name that is none."""
    if tensor.dtype not in SIZES:
        raise CheckpointError(where, f"is {tensor.dtype}", f"only {', '.join(SIZES)} are read", tensor=name)
    key = name if state is None else state[2]
    found = _find(model, key)
    if found is None:
        found = _Whole(tensor.shape, (theirs.unknown(key, tensor.shape),))
    shape, parts = tensor.shape, found.parts
    if found.vocabulary and len(shape) == 2 and shape[1:] == found.shape[1:]:
        around.check_vocabulary(model, args, shape[0], where, name)
    elif shape != found.shape:
        raise CheckpointError(where, f"has shape {shape}", f"config.json makes it {found.shape}", tensor=name)
    if state is not None:
        parts = tuple(part._replace(canonical=f"{part.canonical}@{_STATES[state[1]]}") for part in parts)
    return dcp_io.stored(name, tensor, parts, found.vocabulary)


def _find(model: Model, name: str) -> _Whole | None:
    """What a name means; None if nothing."""
    half = _HALF.fullmatch(name)
    name = name if half is None else half[1]
    stacked = _STACKED.fullmatch(name)
    place = theirs.Place("decoder", 0, stacked[1]) if stacked is not None else theirs.place(name)
    if not place.part:
        tensor = theirs.outside(model, name)
        return None if tensor is None or half is not None else _whole((), [tensor])
    first = place.layer + (model.config.num_hidden_layers if place.part == "mtp" else 0)
    if first >= model.layers or (place.part == "decoder" and first >= model.config.num_hidden_layers):
        return None
    layers = range(model.config.num_hidden_layers) if stacked is not None else range(first, first + 1)
    expert = _EXPERT.fullmatch(place.key)
    key = place.key if expert is None else theirs.EXPERTS + expert[2]
    numbers: Sequence[int | None] = (None,) if expert is None else range(model.config.n_routed_experts) \
        if expert[1] is None else (int(expert[1]),)
    tensors = [theirs.inside(model, layer, key, number) for layer in layers for number in numbers]
    there = [tensor for tensor in tensors if tensor is not None]
    if len(there) < len(tensors) or (half is not None and len(there[0].canonical) != 2):
        return None
    if half is not None:
        which = "wv".index(half[2])
        there = [tensor._replace(canonical=tensor.canonical[which:which + 1]) for tensor in there]
    lead = (*((len(layers),) if stacked is not None else ()), *((len(numbers),) if len(numbers) > 1 or (
        expert is not None and expert[1] is None) else ()))
    return _whole(lead, there)
