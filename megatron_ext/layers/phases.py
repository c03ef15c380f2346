"""A layer as a list of phases, so that a pipeline can run one micro-batch's communication behind another's computation
(DeepSeek-V3 report, section 3.2.1, figure 4).

A layer that offers `phases()` says what it does as a list of `Phase` (computation) and `Exchange` (communication), in
the order of the forward, over named tensors: "x" is what comes in and, in the end, what goes out. Every phase is an
autograd graph of its own under a pipeline (pipeline/stage.py), so that its input gradient, its weight gradient and its
recomputation are separate; an exchange starts and finishes apart, and has its backward written out. `whole` runs the
same list as one autograd graph, for one process and for the layer's `forward`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, runtime_checkable

from torch import Tensor

from megatron_ext.config.errors import ConfigError

Passage = dict[str, Any]
"""What the phases of one layer keep for one micro-batch besides tensors that are differentiated. Under a pipeline "key"
is the `RandomKey` of the micro-batch."""


@dataclass(frozen=True)
class Phase:
    """A computation.

    Attributes:
        name: by which `recompute` knows it; several phases of a layer may share one ("mlp" of every chunk).
        reads: names of its arguments.
        writes: names of its results; in a layer a name is written once, but for "x", which the last phase writes too.
        call: `call(passage, *arguments)` returns a tensor, or a tuple of them if there are several names.
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    call: Callable[..., Any]

    @property
    def number(self) -> int:
        """For its random numbers: whatever other phases a layer has, and so whatever the number of chunks."""
        return zlib.crc32(self.writes[0].split(".")[0].encode())


@runtime_checkable
class Exchange(Protocol):
    """A communication. Tensors come in groups, which can be had one after the other: chunks, for example.

    Attributes:
        name: for messages.
        reads: groups of names; backward gives the gradients of a group together.
        writes: groups of names; forward gives the tensors of a group together.
        keeps: whether backward needs what was read, as `keep` leaves it.
        parallel: whether anybody else takes part, so that there is something to wait for.
    """

    name: str
    reads: Sequence[tuple[str, ...]]
    writes: Sequence[tuple[str, ...]]
    keeps: bool

    @property
    def parallel(self) -> bool: ...

    def start(self, passage: Passage, tensors: Sequence[Sequence[Tensor]]) -> None:
        """Sends, and returns at once."""

    def keep(self, passage: Passage, name: str, tensor: Tensor) -> Any:
        """What stays of a tensor that was read until `finish_backward`, which gets it so: itself, or less of it."""

    def finish(self, passage: Passage, group: int) -> Sequence[Tensor]:
        """Waits for one group of `writes`; asked for in order."""

    def start_backward(self, passage: Passage, gradients: Sequence[Sequence[Tensor]]) -> None:
        """Sends the gradients of all `writes`."""

    def finish_backward(self, passage: Passage, group: int, kept: Sequence[Any]) -> Sequence[Tensor | None]:
        """Waits for the gradients of one group of `reads`; asked for in order. `kept`: of what was read, if `keeps`."""

    def advance(self, passage: Passage) -> None:
        """Moves on what is under way, if it takes several steps; waits for the step before."""

    def graph(self, passage: Passage, tensors: Sequence[Sequence[Tensor]]) -> Sequence[Sequence[Tensor]]:
        """Start and finish at once, as a part of one autograd graph."""


def groups_of(phase: Phase | Exchange, side: str) -> Sequence[tuple[str, ...]]:
    """Groups of names that a phase "reads" or "writes"; a computation has one."""
    names = getattr(phase, side)
    return (names,) if isinstance(phase, Phase) else names


def names_of(phase: Phase | Exchange, side: str) -> set[str]:
    """All names that a phase "reads" or "writes"."""
    return {name for group in groups_of(phase, side) for name in group}


def check_phases(phases: Any, layer: str) -> None:
    """Whether what a layer's `phases()` returned can be run.

    Args:
        layer: for the error.

    Raises:
        ConfigError: it is no list of phases, or one reads what none before it has written, writes a name twice, or "x"
            before the last; an exchange brings what nobody reads, or two keep the same; or the last does not write "x".
    """
    def refuse(value: Any, rule: str) -> NoReturn:
        raise ConfigError(f"{layer}.phases()", value, rule)

    if not isinstance(phases, (list, tuple)) or not all(isinstance(p, (Phase, Exchange)) for p in phases) or not phases:
        refuse(phases, "must be a list of Phase and Exchange, at least one")
    known, kept = {"x"}, set[str]()
    for index, phase in enumerate(phases):
        reads, writes = groups_of(phase, "reads"), groups_of(phase, "writes")
        where = f"in phase {index}, {phase.name!r}, "
        for names in (*reads, *writes):
            if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
                refuse(names, f"{where}must be a tuple of names")
        written = [name for names in writes for name in names]
        if not written:
            refuse((), f"{where}a phase must write something")
        for name in (name for names in reads for name in names):
            if name not in known:
                refuse(name, f"{where}is read, and no phase before writes it ({', '.join(sorted(known))} are there)")
            if isinstance(phase, Exchange) and phase.keeps and name in kept:
                refuse(name, f"{where}is kept for backward by an exchange before it too")
        if isinstance(phase, Exchange):
            kept |= names_of(phase, "reads") if phase.keeps else set()
            later = {name for after in phases[index + 1:] for name in names_of(after, "reads")}
            for names in writes:
                if not set(names) & later:
                    refuse(names, f"{where}is a group that nobody reads, so that nobody would wait for it")
        last = index == len(phases) - 1
        for name in written:
            if name in known and not (name == "x" and last):
                refuse(name, where + ("is written a second time" if name != "x" else
                                      "is written before the last phase: it is what comes in, and what comes out"))
        known |= set(written)
        if last and "x" not in written:
            refuse(tuple(written), f"{where}must have \"x\" among them: what the layer returns")


def results(phase: Phase, output: Any) -> tuple[Any, ...]:
    """What `phase.call` returned, one value per name.

    Raises:
        ConfigError: it is not as many as there are names.
    """
    if len(phase.writes) == 1:
        return (output,)
    if not isinstance(output, tuple) or len(output) != len(phase.writes):
        found = f"{len(output)} results" if isinstance(output, tuple) else type(output).__name__
        raise ConfigError(f"phase {phase.name!r}", found, f"must return a tuple of {len(phase.writes)}: "
                          + ", ".join(phase.writes))
    return output


def whole(phases: Sequence[Phase | Exchange], x: Any, before: Callable[[Phase], None] = lambda _: None) -> Any:
    """Runs the phases of a layer one after the other in one autograd graph.

    Args:
        phases: of one layer.
        x: what the layer is given.
        before: called with every computation, to seed its random numbers for example.
    """
    faces, passage = {"x": x}, {}
    for phase in phases:
        if isinstance(phase, Phase):
            before(phase)
            output = phase.call(passage, *(faces[name] for name in phase.reads))
            faces.update(zip(phase.writes, results(phase, output), strict=True))
        else:
            groups = phase.graph(passage, [[faces[name] for name in group] for group in phase.reads])
            for names, tensors in zip(phase.writes, groups, strict=True):
                faces.update(zip(names, tensors, strict=True))
    return faces["x"]
