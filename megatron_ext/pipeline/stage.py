"""One micro-batch's way through one stage: phase by phase forward, and back.

Every phase (layers/phases.py) is an autograd graph of its own: its inputs are cut off from what made them, what is kept
of its outputs is the edge into its graph, and backward runs the graphs one by one and hands gradients on by name.
Exchanges start as early and finish as late as the order allows. `forward` and `backward` are generators that yield
where they would first have to wait for an exchange: whoever drives them may run another micro-batch meanwhile, which is
how a forward-backward pair overlaps (executor.py). In what order the two take turns changes no result, for they share
nothing but the weights.

Backward goes through the phases against their order, but one that need not wait comes before one that must, and weight
gradients fill the time after an exchange has started. A MoE block then runs

    forward     attention, start dispatch, shared experts | experts, start combine | sum, next attention
    backward    sum, start combine, shared experts | experts, start dispatch, weights | attention, sum, ...

(| a wait). With `recompute` a phase keeps only its inputs and runs again in backward, before it waits for its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron_ext.layers.phases import Exchange, Passage, Phase, names_of, results
from megatron_ext.pipeline.random import RandomKey

Value = Tensor | tuple[Tensor, ...]
Gradients = list[Tensor | None]

RunBackward = Callable[[list[GradientEdge], Gradients], None]
"""Autograd from edges, with the weight gradients going where the caller wants them."""


@dataclass(frozen=True)
class StageLayer:
    """A layer of a stage as a list of phases, or a run of layers that have none as one phase.

    Attributes:
        phases: in the order of the forward.
        number: of the layer, for random numbers; None where what a phase calls seeds its own.
    """

    phases: Sequence[Phase | Exchange]
    number: int | None = None

    @cached_property
    def kept(self) -> dict[str, Exchange]:
        """Names of what exchanges need again in backward, and which."""
        return {name: phase for phase in self.phases if not isinstance(phase, Phase) and phase.keeps
                for name in names_of(phase, "reads")}

    @cached_property
    def backward_order(self) -> list[int]:
        """Indices of the phases: last first, each after all that read what it writes, those that must wait later."""
        reads = [names_of(phase, "reads") for phase in self.phases]
        writes = [names_of(phase, "writes") for phase in self.phases]
        order: list[int] = []
        left = list(range(len(self.phases)))
        while left:
            ready = [i for i in left if not any(writes[i] & reads[j] for j in left if j > i)]
            free = [i for i in ready if not isinstance(self.phases[i], Phase) or not self._waits(i)]
            order.append(free[-1] if free else ready[0])
            left.remove(order[-1])
        return order

    def _waits(self, index: int) -> bool:
        """Whether the gradient of what a phase writes comes out of an exchange."""
        written = names_of(self.phases[index], "writes")
        return any(written & names_of(phase, "reads") for phase in self.phases[index + 1:]
                   if not isinstance(phase, Phase))

    @cached_property
    def spent(self) -> list[set[str]]:
        """Per phase, what it reads or writes and no later one reads, but for what goes out."""
        spent, later = [], {"x"}
        for phase in reversed(self.phases):
            reads, writes = names_of(phase, "reads"), names_of(phase, "writes")
            spent.append((reads | writes) - later)
            later |= reads
        return spent[::-1]

    @property
    def exchanges(self) -> bool:
        """Whether there is anything to wait for, and so to do something else meanwhile."""
        return any(not isinstance(phase, Phase) and phase.parallel for phase in self.phases)


class _Like(NamedTuple):
    """What a gradient of zeros is to look like."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@dataclass
class _Graph:
    """What is kept of one phase until its backward."""

    inputs: list[Any]  # one per name read: leaves if the phase is to run again, else slots; both get the gradient
    roots: list[list[GradientEdge | None]] = field(default_factory=list)  # per name written, per tensor of it


@dataclass
class _Passed:
    """One layer: what is kept of it until backward, and the exchanges that are under way in either."""

    layer: StageLayer
    passage: Passage
    graphs: dict[int, _Graph] = field(default_factory=dict)
    read: dict[str, Any] = field(default_factory=dict)  # by exchanges that keep it
    sent: dict[str, _Like] = field(default_factory=dict)  # by exchanges
    coming: dict[str, tuple[Exchange, int]] = field(default_factory=dict)  # what will arrive, with which group

    def keep(self, name: str, tensor: Tensor) -> None:
        """Holds what an exchange needs of a tensor in backward."""
        self.read[name] = self.layer.kept[name].keep(self.passage, name, tensor.detach())


class StageRun:
    """Forward of one micro-batch through one stage, kept for its backward.

    Args:
        layers: of the stage.
        key: names the random numbers of this micro-batch.
        training: whether there will be a backward.
        recompute: names of phases that keep their inputs only.
        set_counting: told True around forwards of training and False after, so that routers count every token once.
    """

    def __init__(self, layers: Sequence[StageLayer], key: RandomKey, training: bool, recompute: Collection[str] = (),
                 set_counting: Callable[[bool], None] = lambda _: None):
        self.layers, self.key, self.training, self.recompute = layers, key, training, recompute
        self.set_counting = set_counting
        self._passed: list[_Passed] = []
        self._here: _Passed | None = None

    def advance(self) -> None:
        """Moves on the exchanges that are under way; called where the other micro-batch has computed something."""
        if self._here is not None:
            for exchange in {id(exchange): exchange for exchange, _ in self._here.coming.values()}.values():
                exchange.advance(self._here.passage)

    # -- forward

    def forward(self, value: Any) -> Generator[None, None, Any]:
        """What the stage makes of `value`; yields before the first wait for every exchange."""
        for layer in self.layers:
            here = self._here = _Passed(layer, {"key": self.key})
            value = yield from self._forward_layer(here, value)
            if self.training:
                self._passed.append(here)
        self._here = None
        return value

    def _forward_layer(self, here: _Passed, value: Any) -> Generator[None, None, Any]:
        faces: dict[str, Any] = {"x": value}
        for index, phase in enumerate(here.layer.phases):
            for name in sorted(names_of(phase, "reads") & here.coming.keys()):
                if name in here.coming:
                    yield from self._arrive(here, name, faces)
            if isinstance(phase, Phase):
                output = self._compute(here, index, phase, [faces[name] for name in phase.reads])
                faces.update(zip(phase.writes, output, strict=True))
            else:
                phase.start(here.passage, [[faces[name].detach() for name in group] for group in phase.reads])
                here.coming |= {name: (phase, g) for g, names in enumerate(phase.writes) for name in names}
                if self.training and phase.keeps:
                    again = {n for p in here.layer.phases if p.name in self.recompute for n in names_of(p, "writes")}
                    for name in sorted(names_of(phase, "reads") - again):
                        here.keep(name, faces[name])
            for name in here.layer.spent[index]:
                faces.pop(name, None)
        return faces["x"]

    def _arrive(self, here: _Passed, name: str, faces: dict[str, Any]) -> Generator[None, None, None]:
        """Waits for what an exchange brings with `name`."""
        exchange, group = here.coming[name]
        if group == 0 and exchange.parallel:
            yield
        tensors = exchange.finish(here.passage, group)
        for written, tensor in zip(exchange.writes[group], tensors, strict=True):
            faces[written] = tensor.requires_grad_(self.training and tensor.is_floating_point())
            here.sent[written] = _Like(tensor.shape, tensor.dtype, tensor.device)
            del here.coming[written]

    def _compute(self, here: _Passed, index: int, phase: Phase, values: list[Any]) -> tuple[Any, ...]:
        if not self.training:
            with torch.no_grad():
                return self._call(here, phase, values)
        again = phase.name in self.recompute
        if again:
            inputs = kept = [_leaves(value) for value in values]
        else:
            inputs, kept = map(list, zip(*map(_enter, values), strict=True)) if values else ([], [])
        graph = here.graphs[index] = _Graph(kept)
        self.set_counting(True)
        try:
            with torch.set_grad_enabled(not again):
                output = self._call(here, phase, inputs)
        finally:
            self.set_counting(False)
        if again:  # whether a gradient can flow is known when it runs once more
            return tuple(_wanting(value) for value in output)
        graph.roots = [_edges(value) for value in output]
        return output

    def _call(self, here: _Passed, phase: Phase, values: list[Any]) -> tuple[Any, ...]:
        if here.layer.number is not None:
            self.key.seed_layer(here.layer.number, phase.number)
        return results(phase, phase.call(here.passage, *values))

    # -- backward

    def backward(self, gradients: Gradients, run: RunBackward,
                 fill: Callable[[], None] = lambda: None) -> Generator[None, None, Gradients]:
        """The gradients of the stage's input, one per tensor of it; yields before the first wait for every exchange.

        Args:
            gradients: of the stage's output, one per tensor of it.
            run: autograd.
            fill: called once an exchange has started, before waiting for it: weight gradients, for example.
        """
        while self._passed:
            here = self._here = self._passed.pop()
            gradients = yield from self._backward_layer(here, gradients, run, fill)
        self._here = None
        return gradients

    def _backward_layer(self, here: _Passed, gradients: Gradients, run: RunBackward,
                        fill: Callable[[], None]) -> Generator[None, None, Gradients]:
        found: dict[str, Gradients] = {"x": gradients}
        for index in here.layer.backward_order:
            phase = here.layer.phases[index]
            if not isinstance(phase, Phase):
                phase.start_backward(here.passage, [[_dense(found.pop(name, [None]), here.sent.pop(name))
                                                     for name in names] for names in phase.writes])
                here.coming |= {name: (phase, g) for g, names in enumerate(phase.reads) for name in names}
                continue
            graph = here.graphs.pop(index)
            if phase.name in self.recompute:
                self._again(here, phase, graph)
            for name in phase.writes:
                if name in here.coming:
                    yield from self._arrive_backward(here, name, found, fill)
            _differentiate(phase, graph, found, run)
        return found.pop("x", [])

    def _again(self, here: _Passed, phase: Phase, graph: _Graph) -> None:
        """Runs a phase once more, with its graph. Before the wait for its gradient, behind which it then hides."""
        with torch.enable_grad():
            output = self._call(here, phase, graph.inputs)
        graph.roots = [_edges(value) for value in output]
        for name, value in zip(phase.writes, output, strict=True):
            if name in here.layer.kept:
                here.keep(name, value)

    def _arrive_backward(self, here: _Passed, name: str, found: dict[str, Gradients],
                         fill: Callable[[], None]) -> Generator[None, None, None]:
        """Waits for the gradients that an exchange brings with that of `name`."""
        exchange, group = here.coming[name]
        if group == 0 and exchange.parallel:
            fill()
            yield
        names = exchange.reads[group]
        read = [here.read.pop(n) for n in names] if exchange.keeps else []
        arrived = exchange.finish_backward(here.passage, group, read)
        for one, gradient in zip(names, arrived, strict=True):
            _add(found, one, [gradient])
            del here.coming[one]


def _differentiate(phase: Phase, graph: _Graph, found: dict[str, Gradients], run: RunBackward) -> None:
    """Backward of one phase: takes the gradients of what it wrote, adds those of what it read."""
    roots: list[GradientEdge] = []
    gradients: Gradients = []
    for name, edges in zip(phase.writes, graph.roots, strict=True):
        for edge, gradient in zip(edges, found.pop(name, [None] * len(edges)), strict=True):
            if edge is not None and gradient is not None:
                roots.append(edge)
                gradients.append(gradient)
    if roots:
        run(roots, gradients)
    for name, value in zip(phase.reads, graph.inputs, strict=True):
        _add(found, name, [t.grad if isinstance(t, (Tensor, _Slot)) else None for t in _elements(value)])


def _add(found: dict[str, Gradients], name: str, gradients: Gradients) -> None:
    """Sums the gradients that several readers of a tensor have for it; of two the order changes nothing."""
    before = found.get(name)
    if before is not None:
        gradients = [b if a is None else a if b is None else a + b for a, b in zip(before, gradients, strict=True)]
    found[name] = gradients


def _dense(gradients: Gradients, like: _Like) -> Tensor:
    [gradient] = gradients
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device) if gradient is None else gradient


def _elements(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _leaves(value: Any) -> Any:
    """The same tensors, cut off from what made them."""
    if isinstance(value, tuple):
        return tuple(_leaves(v) for v in value)
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


class _Slot:
    """Gets the gradient of a tensor that entered a phase, whose numbers it does not keep alive."""

    __slots__ = ("grad",)

    def __init__(self) -> None:
        self.grad: Tensor | None = None


class _Enter(torch.autograd.Function):
    """Where a phase's graph begins. A leaf would do, but its graph holds a leaf whether anybody needs its numbers in
    backward or not: the rows of experts in BF16, say, beside the FP8 copy that is multiplied."""

    @staticmethod
    def forward(ctx: Any, slot: _Slot, anchor: Tensor, x: Tensor) -> Tensor:
        ctx.slot = slot
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, None]:
        ctx.slot.grad = dy
        return None, None, None


def _enter(value: Any) -> tuple[Any, Any]:
    """A value as the beginning of a graph, and what gets its gradient."""
    if isinstance(value, tuple):
        entered, slots = zip(*map(_enter, value), strict=True) if value else ((), ())
        return entered, slots
    if not isinstance(value, Tensor) or not value.requires_grad:
        return value.detach() if isinstance(value, Tensor) else value, None
    slot = _Slot()
    anchor = torch.empty(0, requires_grad=True)  # makes a graph of it; gets no gradient
    return _Enter.apply(slot, anchor, value.detach()), slot


def _wanting(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_wanting(v) for v in value)
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().requires_grad_() if floating else value


def _edges(value: Any) -> list[GradientEdge | None]:
    return [get_gradient_edge(t) if isinstance(t, Tensor) and t.requires_grad else None for t in _elements(value)]
