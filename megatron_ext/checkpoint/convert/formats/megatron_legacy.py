"""Megatron's older layout: a file of `torch.save` for each rank of tensor, pipeline and expert parallelism.

    iter_0001000/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt     numbers of three digits only where there are several
        {"model": state dict, "args": Namespace, "iteration": ..}   or "model0", "model1", .. for virtual stages

A rank has every tensor of its layers, numbered from its own first one: matrices cut in TP, experts in EP, all else
whole and again in every rank, which is compared. `linear_fc1` is a rank's rows of gate above its rows of up. The last
stage has its own copy of the embedding where it needs one: for a tied head, or for multi-token prediction.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megatron_ext.checkpoint.convert import names, torch_file
from megatron_ext.checkpoint.convert.folder import Folder
from megatron_ext.checkpoint.convert.formats import megatron_args as around
from megatron_ext.checkpoint.convert.formats import megatron_names as theirs
from megatron_ext.checkpoint.convert.formats.layout import Layout, Options, documents_of
from megatron_ext.checkpoint.convert.formats.megatron_names import Tensor
from megatron_ext.checkpoint.convert.model import Model
from megatron_ext.checkpoint.convert.pickles import TensorRef
from megatron_ext.checkpoint.convert.source import Reading
from megatron_ext.checkpoint.convert.tensors import SIZES, Entry, Part, Shape, Stored, intersect, whole
from megatron_ext.config.errors import CheckpointError, shown

FILE = "model_optim_rng.pt"
OPTIMIZER = "distrib_optim.pt"
_RANK = re.compile(r"mp_rank_(\d{2,4})(?:_(\d{3,4}))?(?:_(\d{3,4}))?")
_EXPERT = re.compile(r"mlp\.experts\.(?:local_experts\.(\d{1,5})\.(linear_fc[12]\.weight)|"
                     r"(linear_fc[12]\.weight)(\d{1,5}))")
_STAGE = re.compile(r"model(\d{0,3})")
_PASSED_OVER = frozenset(("args", "checkpoint_version", "iteration", "opt_param_scheduler", "rng_state", "tokens",
                          "num_floating_point_operations_so_far", "rerun_state_machine", "content_metadata"))


class Rank(NamedTuple):
    """Of tensor, pipeline and expert parallelism."""

    tp: int
    pp: int
    ep: int


@dataclass
class _Stage:
    """What one rank has of one (virtual) pipeline stage.

    Attributes:
        rank: whose.
        chunk: number of the virtual stage.
        file: where.
        tensors: as they are called there.
    """

    rank: Rank
    chunk: int
    file: str
    tensors: dict[str, TensorRef]
    first: dict[str, int] = field(default_factory=dict)

    def layers(self, part: str) -> int:
        """How many layers it has of the decoder, or of multi-token prediction."""
        found = {place.layer for place in map(theirs.place, self.tensors) if place.part == part}
        if found != set(range(len(found))):
            raise CheckpointError(self.file, f"has layers {sorted(found)[:8]} of {part}", "they count from 0")
        return len(found)


class MegatronLegacy:
    """See formats.Format."""

    name = "megatron-legacy"
    title = "Megatron-Core mp_rank files"
    dtypes = frozenset(SIZES) - {"F8_E4M3"}
    states: frozenset[str] = frozenset()
    options = frozenset({"tp", "pp", "ep", "spec"})

    def detect(self, folder: Folder) -> bool:
        return any(_holds(found) for found in around.candidates(folder).values())

    # -- reading

    def read(self, folder: Folder, config: Mapping[str, Any] | None) -> Reading:
        prefix, step = around.latest(folder, _holds)
        files = {match.groups(): f"{prefix}{name}/{FILE}" for name in around.candidates(folder)[prefix.rstrip("/")]
                 if (match := _RANK.fullmatch(name))}
        trees = {file: self._tree(folder, file) for file in files.values()}
        first = min(files.values())
        args = around.attributes(trees[first].get("args"))
        ranks = {_rank(folder, file, numbers, args, len(files)): file for numbers, file in files.items()}
        if len(ranks) < len(files):
            raise CheckpointError(folder / prefix, f"has {len(files)} files of {len(ranks)} ranks",
                                  "a folder does not belong here")
        sizes = Rank(*(max(rank[i] for rank in ranks) + 1 for i in range(3)))
        _check_ranks(folder, ranks, sizes, args)
        model = around.find_model(folder, prefix, config, args, folder / first)
        stages = [stage for rank, file in sorted(ranks.items()) for stage in _stages(folder, rank, file, trees[file])]
        _count_layers(folder, model, stages)
        stored = [_stored(folder, model, stage, name, ref, sizes, args)
                  for stage in stages for name, ref in stage.tensors.items()]
        said = trees[first].get("iteration")
        if step is None and not prefix.startswith(around.RELEASE) and type(said) is int and said > 0:
            step = said
        layout = f"TP {sizes.tp}, PP {sizes.pp}, EP {sizes.ep}"
        chunks = max(stage.chunk for stage in stages) + 1
        layout += f", {chunks} virtual stages" if chunks > 1 else ""
        return Reading(model, stored, theirs.implied(model), layout, documents_of(folder, (around.TRACKER,)), step,
                       _optimizer(folder, trees))

    def _tree(self, folder: Folder, file: str) -> dict[str, Any]:
        tree = torch_file.read(folder, file)
        if not isinstance(tree, dict):
            raise CheckpointError(folder / file, "holds no dict of a rank")
        return tree

    # -- writing

    def lay_out(self, model: Model, entries: Mapping[str, Entry], options: Options) -> Layout:
        theirs.check_spec(options)
        layers, experts = model.config.num_hidden_layers, model.config.n_routed_experts
        depth = -(-layers // max(1, options.pp))
        if options.pp < 1 or depth * (options.pp - 1) >= layers:
            raise CheckpointError(f"--pp {options.pp}", f"leaves a stage without any of {layers} layers")
        if options.ep < 1 or experts % options.ep:
            raise CheckpointError(f"--ep {options.ep}", f"does not divide {experts} experts")
        if options.tp < 1:
            raise CheckpointError(f"--tp {options.tp}", "must be positive")
        home, documents = around.home(options)
        layout = theirs.fill(model, entries, Layout([], documents=documents))
        args = around.namespace(model, options, entries[names.EMBEDDING].dtype, _rows(model, options.tp))
        if layers % options.pp:
            args.decoder_last_pipeline_num_layers = layers - depth * (options.pp - 1)
        for tp in range(options.tp):
            for pp in range(options.pp):
                for ep in range(options.ep):
                    rank = Rank(tp, pp, ep)
                    state, tensors = _state(model, entries, options, rank, depth)
                    tree = {"args": args, "checkpoint_version": around.VERSION, "iteration": options.step or 0,
                            "model": state}
                    layout.files.append(torch_file.lay_out(f"{home}{_folder(rank, options)}/{FILE}", tree, tensors))
        return layout


def _holds(found: list[str]) -> bool:
    return any(_RANK.fullmatch(name) for name in found)


def _folder(rank: Rank, options: Options) -> str:
    pipeline = f"_{rank.pp:03d}" if options.pp > 1 else ""
    return f"mp_rank_{rank.tp:02d}{pipeline}" + (f"_{rank.ep:03d}" if options.ep > 1 else "")


# -- ranks

def _rank(folder: Folder, file: str, numbers: tuple[str | None, ...], args: Mapping[str, Any], count: int) -> Rank:
    """The rank of a file; of two numbers the arguments say whether the second is of pipeline or expert parallelism."""
    tp, second, third = (None if number is None else int(number) for number in numbers)
    assert tp is not None
    if second is None or third is not None:
        return Rank(tp, second or 0, third or 0)
    several = [key for key in ("pipeline", "expert") if (args.get(f"{key}_model_parallel_size") or 1) != 1]
    if len(several) != 1:
        raise CheckpointError(folder / file, f"is one of {count}, and its arguments do not say whether they are of "
                              "pipeline or expert parallelism")
    return Rank(tp, second, 0) if several == ["pipeline"] else Rank(tp, 0, second)


def _check_ranks(folder: Folder, ranks: Mapping[Rank, str], sizes: Rank, args: Mapping[str, Any]) -> None:
    """Whether a file is missing. With experts cut otherwise than matrices not every combination of ranks exists."""
    said = [args.get(f"{kind}_model_parallel_size") for kind in ("tensor", "pipeline", "expert")]
    for size, given, kind in zip(sizes, said, ("tensor", "pipeline", "expert"), strict=True):
        if given is not None and given != size:
            raise CheckpointError(folder.path, f"has files of {size} ranks of {kind} parallelism",
                                  f"their arguments say {shown(given)}",
                                  "a file is missing, or does not belong here")
    if args.get("expert_tensor_parallel_size") in (None, sizes.tp):
        for tp, pp, ep in ((t, p, e) for t in range(sizes.tp) for p in range(sizes.pp) for e in range(sizes.ep)):
            if Rank(tp, pp, ep) not in ranks:
                name = _folder(Rank(tp, pp, ep), Options(tp=sizes.tp, pp=sizes.pp, ep=sizes.ep))
                there = next(iter(ranks.values())).rpartition("/")[0].rpartition("/")[0]
                raise CheckpointError(folder / f"{there}/{name}/{FILE}", "does not exist",
                                      f"there are {len(ranks)} of {sizes.tp * sizes.pp * sizes.ep} files")


def _stages(folder: Folder, rank: Rank, file: str, tree: Mapping[str, Any]) -> Iterator[_Stage]:
    found = False
    for key, state in tree.items():
        match = _STAGE.fullmatch(key) if isinstance(key, str) else None
        if match is None:
            if key not in _PASSED_OVER and key != "optimizer":
                raise CheckpointError(folder / file, f"holds {shown(key)}", "nothing is known of such an entry")
            continue
        if not isinstance(state, dict) or not all(isinstance(name, str) and name.isprintable() for name in state):
            raise CheckpointError(folder / file, f"has a {key} that is no state dict")
        tensors = {name: value for name, value in state.items() if not theirs.is_extra(name)}
        for name, value in tensors.items():
            if not isinstance(value, TensorRef):
                raise CheckpointError(folder / file, f"is a {type(value).__name__}", "a tensor is due",
                                      tensor=name[:200])
        yield _Stage(rank, int(match[1] or 0), file, tensors)
        found = True
    if not found:
        raise CheckpointError(folder / file, "holds no model")


def _count_layers(folder: Folder, model: Model, stages: list[_Stage]) -> None:
    """Gives every stage the number of its first layer: stages are in order of virtual stage, then of rank."""
    for part, total in (("decoder", model.config.num_hidden_layers), ("mtp", model.mtp_layers)):
        counts: dict[tuple[int, int], int] = {}
        for stage in stages:
            count = stage.layers(part)
            if counts.setdefault((stage.chunk, stage.rank.pp), count) != count:
                raise CheckpointError(folder / stage.file, f"has {count} layers of {part}, and another rank of its "
                                      f"stage {counts[stage.chunk, stage.rank.pp]}")
        begin, starts = 0, {}
        for key in sorted(counts):
            starts[key] = begin
            begin += counts[key]
        if begin != total and (begin or part != "mtp"):  # without any: see `source._count_mtp`
            raise CheckpointError(folder.path, f"has {begin} layers of {part} in all",
                                  f"config.json makes them {total}")
        for stage in stages:
            stage.first[part] = starts[stage.chunk, stage.rank.pp]


def _optimizer(folder: Folder, trees: Mapping[str, dict[str, Any]]) -> str:
    """What there is of optimizer state, in words; "" if there is none."""
    there = any(tree.get("optimizer") for tree in trees.values()) or any(
        folder.has(file.replace(FILE, OPTIMIZER)) for file in trees)
    return "optimizer state in Megatron's legacy layout" if there else ""


# -- tensors that are read

def _stored(folder: Folder, model: Model, stage: _Stage, name: str, ref: TensorRef, sizes: Rank,
            args: Mapping[str, Any]) -> Stored:
    """A tensor of a rank with what it holds; one that is unknown gets a canonical name that is none."""
    where = folder / stage.file
    if ref.dtype not in SIZES or not ref.dense:
        found = f"is {ref.dtype}" if ref.dtype not in SIZES else f"lies in strides of {ref.stride}"
        raise CheckpointError(where, found, f"only dense {', '.join(SIZES)} are read", tensor=name)
    tensor = _find(folder, model, stage, name, sizes)
    if tensor is None:
        return Stored(name, stage.file, ref.offset, ref.dtype, ref.shape, (theirs.unknown(name, ref.shape),))
    parts = _parts(tensor, ref.shape, stage.rank.tp, sizes.tp)
    if tensor.key in theirs.VOCABULARY and len(ref.shape) == 2:
        around.check_vocabulary(model, args, ref.shape[0] * sizes.tp, where, name)
    if parts is None:
        raise CheckpointError(where, f"has shape {ref.shape}", f"config.json makes it {tensor.shape}, "
                              f"{len(tensor.canonical)} times, over {sizes.tp} ranks", tensor=name)
    return Stored(name, stage.file, ref.offset, ref.dtype, ref.shape, parts, tensor.key in theirs.VOCABULARY)


def _find(folder: Folder, model: Model, stage: _Stage, name: str, sizes: Rank) -> Tensor | None:
    place = theirs.place(name)
    if not place.part:
        if name == theirs.HEAD and model.config.tie_word_embeddings:  # the last stage's copy of the embedding
            tied = theirs.outside(model, theirs.EMBEDDING)
            return None if tied is None else tied._replace(key=theirs.HEAD)
        return theirs.outside(model, name)
    layer = stage.first[place.part] + place.layer + (model.config.num_hidden_layers if place.part == "mtp" else 0)
    match = _EXPERT.fullmatch(place.key)
    if match is None:
        return theirs.inside(model, layer, place.key)
    number, experts = int(match[1] or match[4]), model.config.n_routed_experts
    if experts % sizes.ep or number >= experts // sizes.ep:
        raise CheckpointError(folder / stage.file, f"is expert {number} of a rank",
                              f"config.json has {experts} experts for {sizes.ep} ranks", tensor=name)
    key = theirs.EXPERTS + (match[2] or match[3])
    return theirs.inside(model, layer, key, stage.rank.ep * (experts // sizes.ep) + number)


def _parts(tensor: Tensor, shape: Shape, rank: int, ranks: int) -> tuple[Part, ...] | None:
    """What a rank's tensor of a shape holds: the whole, or its cut of it; None if it is neither."""
    count, dim, canonical = len(tensor.canonical), tensor.dim, tensor.shape
    if len(shape) != len(canonical) or (shape[0] % count):
        return None
    each = (shape[0] // count, *shape[1:])  # of one canonical tensor
    if tensor.key in theirs.VOCABULARY:
        if each[1:] != canonical[1:]:
            return None
        rows = intersect(((rank * each[0], (rank + 1) * each[0]),), ((0, canonical[0]),))
        if rows is None:
            return ()
        return (Part(tensor.canonical[0], ((0, rows[0][1] - rows[0][0]), (0, each[1])), (rows[0], (0, each[1]))),)
    of = whole(canonical)
    if each != canonical:
        if dim is None or each[dim] * ranks != canonical[dim] or \
                each[:dim] + each[dim + 1:] != canonical[:dim] + canonical[dim + 1:]:
            return None
        of = (*of[:dim], (rank * each[dim], (rank + 1) * each[dim]), *of[dim + 1:])
    return tuple(Part(name, ((i * each[0], (i + 1) * each[0]), *whole(each[1:])), of)
                 for i, name in enumerate(tensor.canonical))


# -- tensors that are written

def _rows(model: Model, ranks: int) -> int:
    """Of the padded vocabulary."""
    multiple = around.DIVISIBLE * ranks
    return -(-model.config.vocab_size // multiple) * multiple


def _state(model: Model, entries: Mapping[str, Entry], options: Options, rank: Rank,
           depth: int) -> tuple[OrderedDict[str, Any], list[Stored]]:
    """The state dict of a rank with `depth` layers for each stage, and its tensors."""
    c, last = model.config, rank.pp == options.pp - 1
    state: OrderedDict[str, Any] = OrderedDict()
    tensors: list[Stored] = []

    def put(name: str, tensor: Tensor | None) -> None:
        assert tensor is not None, name
        tensors.append(_written(model, entries, name, tensor, rank, options))
        state[name] = torch_file.Slot(name)

    if rank.pp == 0 or (last and model.mtp_layers):
        put(theirs.EMBEDDING, theirs.outside(model, theirs.EMBEDDING))
    first = rank.pp * depth
    for layer in range(first, min(first + depth, c.num_hidden_layers)):
        _put_layer(model, layer, first, options, rank, put, state)
    if last:
        put(theirs.NORM, theirs.outside(model, theirs.NORM))
        for layer in range(c.num_hidden_layers, model.layers):
            _put_layer(model, layer, 0, options, rank, put, state)
        if not c.tie_word_embeddings:
            put(theirs.HEAD, theirs.outside(model, theirs.HEAD))
        elif options.pp > 1:  # with multi-token prediction Megatron-Core has both copies
            put(theirs.HEAD, theirs.outside(model, theirs.EMBEDDING))
        state["output_layer._extra_state"] = None
    return state, tensors


def _put_layer(model: Model, layer: int, first: int, options: Options, rank: Rank, put: Any,
               state: OrderedDict[str, Any]) -> None:
    experts = model.config.n_routed_experts // options.ep
    for tensor in theirs.of_layer(model, layer, options.spec):
        if tensor.expert is None:
            put(theirs.prefix(model, layer, tensor.key, first), tensor)
        elif tensor.expert // experts == rank.ep:
            key = tensor.key.removeprefix(theirs.EXPERTS)
            local = tensor.expert % experts
            key = f"{key}{local}" if options.spec == "te" else f"local_experts.{local}.{key}"
            put(theirs.prefix(model, layer, theirs.EXPERTS + key, first), tensor)
    for key in theirs.extras(model, layer, options.spec):
        if key.endswith("norm"):  # here one that nobody asks for is an error
            continue
        several = key.startswith(theirs.EXPERTS) and options.spec == "local"
        key = key.removeprefix(theirs.EXPERTS) if several else key
        for each in [f"{theirs.EXPERTS}local_experts.{i}.{key}" for i in range(experts)] if several else [key]:
            state[theirs.extra_name(model, layer, each, first)] = None


def _written(model: Model, entries: Mapping[str, Entry], name: str, tensor: Tensor, rank: Rank,
             options: Options) -> Stored:
    """A tensor as a rank has it."""
    shape, dim, dtype = tensor.shape, tensor.dim, theirs.one_dtype(tensor, entries)
    padded = tensor.key in theirs.VOCABULARY
    if padded:
        shape = (_rows(model, options.tp), *shape[1:])
    if dim is not None:
        if shape[dim] % options.tp:
            raise CheckpointError(f"--tp {options.tp}", f"does not divide dimension {dim} of {shape}", tensor=name)
        shape = (*shape[:dim], shape[dim] // options.tp, *shape[dim + 1:])
    shape = (len(tensor.canonical) * shape[0], *shape[1:])
    parts = _parts(tensor, shape, rank.tp, options.tp)
    assert parts is not None, name
    return Stored(name, "", -1, dtype, shape, parts, padded)
