"""PipelineModule: a model as a list of layers, of which each rank builds the stages it will run.

The constructor is that of `deepspeed.pipe.PipelineModule` (which cannot be used: it builds one stage per rank and
`DeepSpeedEngine` treats it apart). The schedule decides the placement (parallel/placement.py): under a bidirectional
one pipeline ranks i and P-1-i build the same stages, and register the same parameters under the same names in the same
order, as ZeRO requires of replicas; interleaved ones give a rank several stages of a direction.

Specs are known by their face alone: a `LayerSpec` has `build()`, a `TiedLayerSpec` also `key`. Layers of ours have
`canonical_name` (the prefix of their parameters' Hugging Face names) and `set_expert_parallel`; other layers are
registered as `layers.<index>`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_ext.config import ConfigError, check_deepspeed_config, load_config, parse_section
from megatron_ext.layers.linear import split_linears
from megatron_ext.layers.phases import Phase, check_phases
from megatron_ext.parallel import ExpertParallel, ProcessGroups, Topology, agreed
from megatron_ext.parallel.layout import check_even, launched_ranks_per_node
from megatron_ext.parallel.placement import Placement
from megatron_ext.pipeline.choice import PLACEMENTS, in_the_config
from megatron_ext.pipeline.partition import partition
from megatron_ext.pipeline.random import RandomKey, current_device, preserved_generators
from megatron_ext.pipeline.schedules import chunks_of, placement_of
from megatron_ext.pipeline.stage import StageLayer, Value


class _Layer(NamedTuple):
    """One layer of the model as this rank holds it: a module, a function, or a tied module behind its `forward_fn`."""

    number: int
    call: Callable[[Any], Any]


class PipelineModule(nn.Module):
    """The stages of this rank, and the placement of all of them.

    Args:
        layers: specs, modules or functions of one argument, in order; an `nn.Sequential` will do.
        num_stages: P, pipeline ranks; taken from `config` if None. The model is cut into P x `chunks` stages.
        topology: DeepSpeed's; its pipe axis gives P. Refused with other axes than pipe and data.
        loss_fn: `loss_fn(output of the last layer, labels) -> scalar`; if None the last layer returns the loss.
        seed_layers, seed_fn: as in DeepSpeed; layers are seeded by index in any case, so that a layout never changes
            what a layer starts from, and `seed_fn` replaces the way that is done.
        base_seed: layer i is built under seed `base_seed + i`; also the seed of the run's dropout.
        partition_method: `uniform`, `parameters` or `type:<regex>`.
        activation_checkpoint_interval: recompute this many layers at a time in backward; 0 keeps activations.
        activation_checkpoint_func: called with a function and its tensors; None for torch's non-reentrant checkpoint.
        checkpointable_layers: class names that may be recomputed; None for all with parameters.
        dynamic_shape: accepted and not needed: messages carry their shapes.
        schedule: the pipeline schedule, which decides the placement; taken from `config` if None.
        chunks: stages of one direction on each rank, for schedules that interleave; taken from `config` if None.
        config: path or dict of the DeepSpeed config, to read P, schedule, chunks and the expert-parallel size from.

    Attributes:
        model_config: what the specs of a model of ours were made with (its `to_hf` gives a `config.json`), or None.

    Raises:
        ConfigError: sizes that cannot work, an argument that disagrees with `config`, layers that share parameters
            across ranks without a `TiedLayerSpec`; on every rank.
    """

    def __init__(self, layers: Iterable[Any], num_stages: int | None = None, topology: Any = None,
                 loss_fn: Callable[..., Tensor] | None = None, seed_layers: bool = False,
                 seed_fn: Callable[[int], None] | None = None, base_seed: int = 1234,
                 partition_method: str = "parameters", activation_checkpoint_interval: int = 0,
                 activation_checkpoint_func: Callable[..., Any] | None = None,
                 checkpointable_layers: Sequence[str] | None = None, dynamic_shape: bool = False, *,
                 schedule: str | None = None, chunks: int | None = None,
                 config: str | Path | dict[str, Any] | None = None):
        super().__init__()
        if not dist.is_initialized():
            raise ConfigError("torch.distributed", "not initialised",
                              "the placement of a pipeline needs the ranks", "call deepspeed.init_distributed() first")
        ds_config = load_config(config) if config is not None else {}
        section = parse_section(ds_config)
        check_deepspeed_config(ds_config, section)  # now, for building a large model takes minutes
        asked = section.pipeline.given("schedule")
        # "auto" chooses among the schedules of whatever placement is built.
        self.schedule = schedule if schedule and asked == "auto" else _agree("schedule", schedule, asked, "dualpipe")
        self.chunks = _agree("chunks", chunks, section.pipeline.given("chunks"), 1)
        if self.schedule != "auto":
            with in_the_config():
                self.chunks = chunks_of(self.schedule, self.chunks)
        self.num_stages = _agree("stages", _stages_of(topology, num_stages), section.pipeline.stages, None)
        self.loss_fn = loss_fn
        self.base_seed = base_seed
        self.activation_checkpoint_interval = activation_checkpoint_interval
        self._checkpoint = activation_checkpoint_func or partial(checkpoint, use_reentrant=False,
                                                                 preserve_rng_state=False)
        self._checkpointable = checkpointable_layers
        self._seed_fn = seed_fn

        specs = list(layers)
        self.model_config = next((argument for spec in specs for argument in getattr(spec, "module_args", ())
                                  if hasattr(argument, "to_hf")), None)
        grid = Topology.of_world(dist.get_world_size(), self.num_stages, section.expert_parallel.size,
                                 self._placement(section.pipeline.placement))
        self.bounds = partition(partition_method, [_type_name(s) for s in specs],
                                self._count_parameters(specs) if partition_method.lower() == "parameters"
                                else [0] * len(specs), grid.total_stages, self.chunks)
        self.placement = [list(place) for place in grid.placement]
        _refuse_untied(specs, [grid.holder_of_stage(stage) for stage in self._stage_of_each_layer()])
        self.groups = ProcessGroups.create(grid, ranks_per_node=_ranks_per_node(section.expert_parallel))
        self.topology = grid
        self.stage_rank = grid.stage_rank(self.groups.rank)
        self.stages = grid.stages_of(self.stage_rank)
        self.tied_groups_ranks: dict[str, list[list[int]]] = {}
        self._tied: dict[str, nn.Module] = {}
        self._layers: dict[int, list[_Layer]] = {}
        self._stage_layers: dict[int, list[StageLayer]] = {}
        with agreed(self.groups.control):  # a layer that cannot be built is on some ranks only
            self._build(specs, self.groups.expert_placement())
        self._mark_tied(specs)
        split_linears(self)

    # -- building

    def _placement(self, kind: str | None) -> Placement:
        """Where the stages lie: as the schedule has them, or for "auto" as the config says."""
        if kind == "wave" and self.chunks < 2:
            raise ConfigError("megatron_ext.pipeline.chunks", self.chunks, "a wave turns, and has at least 2 chunks on "
                              "a rank", "set it to 2")
        if self.schedule == "auto":
            return PLACEMENTS[kind or "bidirectional"](self.num_stages, self.chunks)
        with in_the_config():
            return placement_of(self.schedule, self.num_stages, self.chunks)

    def _count_parameters(self, specs: Sequence[Any]) -> list[int]:
        """Trainable parameters per layer, without allocating them where the layer can be built on `meta`."""
        counts = []
        for index, spec in enumerate(specs):
            layer = spec
            if _is_spec(spec):
                with preserved_generators(current_device()):
                    try:
                        with torch.device("meta"):
                            layer = self._build_layer(spec, index, ExpertParallel.single())
                    except Exception:  # a constructor that computes with its weights; or it fails again here
                        layer = self._build_layer(spec, index, ExpertParallel.single())
            counts.append(sum(p.numel() for p in layer.parameters() if p.requires_grad)
                          if isinstance(layer, nn.Module) else 0)
        return counts

    def _stage_of_each_layer(self) -> list[int]:
        return [s for s in range(len(self.bounds) - 1) for _ in range(self.bounds[s], self.bounds[s + 1])]

    def _build_layer(self, spec: Any, index: int, experts: ExpertParallel) -> Any:
        if not _is_spec(spec):
            return spec
        (self._seed_fn or torch.manual_seed)(self.base_seed + index)
        layer = spec.build()
        if hasattr(layer, "set_expert_parallel"):
            layer.set_expert_parallel(experts)
        return layer

    def _build(self, specs: Sequence[Any], experts: ExpertParallel) -> None:
        first_use: dict[str, int] = {}
        for index, spec in enumerate(specs):
            if _is_tied(spec):
                first_use.setdefault(spec.key, index)
        with preserved_generators(current_device()):
            for stage in self.stages:
                self._layers[stage] = []
                for index in range(self.bounds[stage], self.bounds[stage + 1]):
                    spec = specs[index]
                    if _is_tied(spec):  # every holder starts from the seed of the first use
                        if spec.key not in self._tied:
                            owner = first_use[spec.key]
                            self._tied[spec.key] = self._build_layer(specs[owner], owner, experts)
                            self._register(self._tied[spec.key], owner)
                        module = self._tied[spec.key]
                        call = module if spec.forward_fn is None else partial(spec.forward_fn, module)
                    else:
                        call = self._build_layer(spec, index, experts)
                        if isinstance(call, nn.Module):
                            self._register(call, index)
                    self._layers[stage].append(_Layer(index, call))

    def _register(self, layer: nn.Module, index: int) -> None:
        """Registers a layer under its dotted name, making the containers in between."""
        *path, leaf = getattr(layer, "canonical_name", f"layers.{index}").split(".")
        parent: nn.Module = self
        for name in path:
            if name not in parent._modules:
                parent.add_module(name, nn.Module())
            parent = parent._modules[name]  # type: ignore[assignment]
        if leaf in parent._modules:
            raise ConfigError("layers", ".".join((*path, leaf)), "is the name of two layers")
        parent.add_module(leaf, layer)

    def _mark_tied(self, specs: Sequence[Any]) -> None:
        uses: dict[str, list[int]] = {}
        for stage, spec in zip(self._stage_of_each_layer(), specs, strict=True):
            if _is_tied(spec):
                uses.setdefault(spec.key, []).append(stage)
        for key, stages in uses.items():
            groups = self.topology.tied_groups(stages)
            if not groups:
                continue
            self.tied_groups_ranks[key] = groups
            if key in self._tied and self.topology.holder(self.groups.rank) != self.topology.holder_of_stage(stages[0]):
                # DeepSpeed's mark: gradient norms leave it out.
                for p in self._tied[key].parameters():
                    p.ds_pipe_replicated = True  # type: ignore[attr-defined]

    def tied_parameters(self, key: str) -> list[nn.Parameter]:
        """This rank's parameters of a tied key, in order; empty if it has none."""
        return list(self._tied[key].parameters()) if key in self._tied else []

    def stage_parameters(self, stage: int) -> list[nn.Parameter]:
        """The parameters of one local stage's layers, each once, in order; of those tied to other stages too."""
        modules = [m for layer in self._layers[stage]  # of a tied layer, the module that its forward_fn is bound to
                   for m in (layer.call, *getattr(layer.call, "args", ())) if isinstance(m, nn.Module)]
        return list(dict.fromkeys(p for m in modules for p in m.parameters()))

    # -- running

    def stage_layers(self, stage: int) -> list[StageLayer]:
        """One local stage as phases: those of layers that have some; the layers between them are one phase together.

        With `activation_checkpoint_interval` the whole stage is one, for what is recomputed is then runs of layers.
        """
        if stage not in self._stage_layers:
            found: list[StageLayer] = []
            for has_phases, group in groupby(self._layers[stage], self._has_phases):
                layers = list(group)
                found += [_phased(layer) for layer in layers] if has_phases else [self._plain(layers)]
            self._stage_layers[stage] = found or [self._plain([])]
        return self._stage_layers[stage]

    def forget_phases(self) -> None:
        """To be called when what `phases()` of a layer returns has changed: its precision, or its chunks."""
        self._stage_layers.clear()

    def overlaps(self, stage: int) -> bool:
        """Whether a stage has communication that another micro-batch's computation can hide."""
        return any(layer.exchanges for layer in self.stage_layers(stage))

    def _has_phases(self, layer: _Layer) -> bool:
        return not self.activation_checkpoint_interval and hasattr(layer.call, "phases")

    def _plain(self, layers: Sequence[_Layer]) -> StageLayer:
        return StageLayer([Phase("layers", ("x",), ("x",), lambda passage, x: self._run(layers, passage["key"], x))])

    def _run(self, layers: Sequence[_Layer], key: RandomKey, value: Value) -> Value:
        """Forward through some layers of a stage, in one graph."""
        interval = self.activation_checkpoint_interval
        if not interval or not torch.is_grad_enabled():
            return _run_layers(layers, key, value)
        for start in range(0, len(layers), interval):
            block = layers[start:start + interval]
            run = self._run_recomputed if self._may_recompute(block) else _run_layers
            value = run(block, key, value)
        return value

    def _run_recomputed(self, block: Sequence[_Layer], key: RandomKey, value: Value) -> Value:
        single = not isinstance(value, tuple)

        def run(*tensors: Tensor) -> Value:
            return _run_layers(block, key, tensors[0] if single else tensors)

        return self._checkpoint(run, *((value,) if single else value))

    def _may_recompute(self, block: Sequence[_Layer]) -> bool:
        """DeepSpeed's rule: all layers are of the classes named; without names, some layer has parameters."""
        if self._checkpointable is not None:
            return all(type(layer.call).__name__ in self._checkpointable for layer in block)
        return any(True for layer in block if isinstance(layer.call, nn.Module) for _ in layer.call.parameters())

    def paired_step(self, stage: int) -> Callable[[Callable[[], None], Callable[[], None], bool], None] | None:
        """How a stage runs its forward together with another micro-batch's backward, if a layer of it offers that.

        A layer that has a method `paired_step(forward, backward, full)` is called in the place of a pair's two halves
        and calls both, each once. `full` says whether the backward takes its weight gradients.
        """
        return next((layer.call.paired_step for layer in self._layers[stage] if hasattr(layer.call, "paired_step")),
                    None)

    def children_with(self, method: str) -> list[Any]:
        """The local layers that have a method of this name, each once."""
        found: dict[int, Any] = {}
        for layers in self._layers.values():
            for layer in layers:
                if hasattr(layer.call, method):
                    found[id(layer.call)] = layer.call
        for module in self._tied.values():
            if hasattr(module, method):
                found[id(module)] = module
        return list(found.values())

    def forward(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("a pipeline's layers lie on several ranks: use engine.train_batch() or engine.eval_batch()")


def _phased(layer: _Layer) -> StageLayer:
    phases = layer.call.phases()  # type: ignore[attr-defined]
    check_phases(phases, f"layers[{layer.number}] ({_type_name(layer.call)})")
    return StageLayer(phases, layer.number)


def _run_layers(layers: Sequence[_Layer], key: RandomKey, value: Value) -> Value:
    for layer in layers:
        key.seed_layer(layer.number)
        value = layer.call(value)
    return value


def _ranks_per_node(section: Any) -> int | None:
    """What the config says, or the launcher; collective where experts are split and the config leaves it open."""
    if section.size == 1 or section.ranks_per_node is not None:
        return section.ranks_per_node if section.size > 1 else None
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, launched_ranks_per_node())
    check_even(found)
    return found[0]


def _is_spec(layer: Any) -> bool:
    return hasattr(layer, "build") and not isinstance(layer, nn.Module)


def _is_tied(layer: Any) -> bool:
    return _is_spec(layer) and hasattr(layer, "key")


def _type_name(layer: Any) -> str:
    """What `type:<regex>` is matched against: the name of the class, or of the function."""
    kind = layer.typename if _is_spec(layer) else type(layer) if isinstance(layer, nn.Module) else layer
    return getattr(kind, "__name__", "")


def _refuse_untied(layers: Sequence[Any], holders: Sequence[int]) -> None:
    """Modules given ready-made may share parameters only where one rank holds them: elsewhere the copies would part."""
    first_use: dict[int, int] = {}
    for index, layer in enumerate(layers):
        for p in layer.parameters() if isinstance(layer, nn.Module) else ():
            first = first_use.setdefault(id(p), index)
            if holders[first] != holders[index]:
                raise ConfigError("layers", [first, index], "share a parameter and lie on different pipeline ranks",
                                  "make both TiedLayerSpecs of one key")


def _stages_of(topology: Any, num_stages: int | None) -> int | None:
    if topology is None:
        return num_stages
    for axis in topology.get_axis_names():
        if axis not in ("pipe", "data") and topology.get_dim(axis) > 1:
            raise ConfigError("topology", axis, f"has size {topology.get_dim(axis)}; only pipe and data axes are "
                              "supported", "leave tensor and sequence parallelism out")
    if topology.world_size() != dist.get_world_size():
        raise ConfigError("topology", str(topology),
                          f"has {topology.world_size()} ranks, this job {dist.get_world_size()}")
    stages = topology.get_dim("pipe")
    if num_stages not in (None, stages):
        raise ConfigError("num_stages", num_stages, f"disagrees with the {stages} of `topology`", "give one of the two")
    return stages


def _agree(what: str, argument: Any, configured: Any, default: Any) -> Any:
    """The one value that the argument and the config agree on."""
    if argument is not None and configured is not None and argument != configured:
        raise ConfigError(f"megatron_ext.pipeline.{what}", configured,
                          f"PipelineModule was given {argument!r}; the placement is fixed when the module is built",
                          "change one of the two")
    value = argument if argument is not None else configured
    value = default if value is None else value
    if value is None:
        raise ConfigError("megatron_ext.pipeline.stages", None, "the number of pipeline ranks is not given",
                          "pass num_stages= or config= to PipelineModule")
    return value
