"""Names of parameters in trainings under DeepSpeed -> the canonical tensors they consist of.

    model.layers.3.mlp.experts.up_proj [E, M, h]            our engine's, and transformers 5's down_proj [E, h, M]
    model.layers.3.mlp.experts.gate_up_proj [E, 2M, h]      transformers 5: in each expert the rows of gate come first
    model.layers.3.mlp.experts.0.up_proj.weight [M, h]      transformers 4: the canonical ones, as all others
    module.<any of these>                                   a model in a wrapper
    3.self_attn.o_proj.weight                               PipelineModule: the number of the layer, its own names

Every parameter is canonical tensors one after the other, so it is described by a list of them.

Shape letters: E experts, M their intermediate size, h hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from megatron_ext.checkpoint.convert import names
from megatron_ext.checkpoint.convert.model import Model
from megatron_ext.checkpoint.convert.tensors import Shape

_MATRICES = ("gate_proj", "up_proj", "down_proj")


class Whole(NamedTuple):
    """A parameter: its shape, and the canonical tensors that it is, one after the other, all of one size."""

    shape: Shape
    tensors: tuple[str, ...]


def known(model: Model) -> dict[str, Whole]:
    """Everything that a training may call its parameters and buffers, in all dialects at once."""
    found = {name: Whole(tensor.shape, (name,)) for name, tensor in model.table.items()}
    for layer in range(model.layers):
        if model.is_moe(layer):
            for fused in (False, True):
                found |= _stacked(model, layer, fused)
    return found


def dialect(model: Model, fused: bool) -> dict[str, Whole]:
    """What is to be written: every canonical tensor once, experts stacked; `fused` as transformers 5 has them."""
    found: dict[str, Whole] = {}
    for name, tensor in model.table.items():
        if tensor.expert is None:
            found[name] = Whole(tensor.shape, (name,))
        elif tensor.expert == 0 and name.endswith(f".{_MATRICES[0]}.weight"):
            assert tensor.layer is not None
            found |= _stacked(model, tensor.layer, fused)
    return found


def _stacked(model: Model, layer: int, fused: bool) -> dict[str, Whole]:
    prefix, experts = f"model.layers.{layer}.mlp.experts", range(model.config.n_routed_experts)
    found: dict[str, Whole] = {}
    for matrices in ((("gate_proj", "up_proj"), ("down_proj",)) if fused else ((m,) for m in _MATRICES)):
        rows, columns = model.table[f"{prefix}.0.{matrices[0]}.weight"].shape
        name = "gate_up_proj" if len(matrices) == 2 else matrices[0]
        found[f"{prefix}.{name}"] = Whole((len(experts), len(matrices) * rows, columns), tuple(
            f"{prefix}.{expert}.{matrix}.weight" for expert in experts for matrix in matrices))
    return found


def unwrapped(found: Iterable[str]) -> dict[str, str]:
    """Name -> name without the `module.` that a wrapper puts before all of them."""
    given = list(found)
    prefix = "module." if given and all(name.startswith("module.") for name in given) else ""
    return {name: name.removeprefix(prefix) for name in given}


def of_pipeline(model: Model, shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Name -> canonical name or dialect, for the layers of a PipelineModule.

    Layers with attention are the blocks, in order. What comes before them is the embedding; after them a vector is the
    last norm and a matrix the head. What is none of these keeps its name, and is refused by it.

    Args:
        model: whose parameters they are.
        shapes: `<number of the layer>.<name within>`, or `tied_modules.<key>.<name>`, -> shape.
    """
    layers: dict[int, dict[str, str]] = {}  # number -> name within -> name
    for full in shapes:
        number, _, name = full.partition(".")
        if number.isdecimal() and len(number) < 7:
            layers.setdefault(int(number), {})[name] = full
    blocks = sorted(n for n, local in layers.items() if any("self_attn." in name for name in local))
    matrix = model.table[names.EMBEDDING].shape
    found = {full: names.EMBEDDING if full.startswith("tied_modules.") and shape == matrix else full
             for full, shape in shapes.items()}
    for layer, local in layers.items():
        if layer in blocks:
            prefix = next(name.partition("self_attn.")[0] for name in local if "self_attn." in name)
            for name, full in local.items():
                found[full] = f"model.layers.{blocks.index(layer)}.{name.removeprefix(prefix)}"
            continue
        before = bool(blocks) and layer < blocks[0]
        for full in local.values():
            if shapes[full] == matrix:
                found[full] = names.EMBEDDING if before else names.HEAD
            elif shapes[full] == matrix[1:] and not before:
                found[full] = "model.norm.weight"
    return found


def size(whole: Whole) -> int:
    """Numbers of each of its tensors."""
    return math.prod(whole.shape) // len(whole.tensors)
