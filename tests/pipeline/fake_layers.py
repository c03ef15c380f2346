"""Layers in phases whose communication is a fake that notes when it is started, finished and moved on.

    computation of a block     attention, shared, mlp.0 (mlp.1), sum; "F" forward, "I" and "W" backward
    communication              scatter before the mlps, gather after them
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ext.layers.phases import Passage, Phase

H, T = 6, 5


class Log(list[str]):
    """What happened, "<micro-batch> <what>"; within `whole` there is no micro-batch, and nothing is noted."""

    def note(self, passage: Passage, what: str) -> None:
        if "key" in passage:
            self.append(f"{passage['key'].micro_batch} {what}")


class Fake:
    """What both communications share. Nothing may be finished twice, out of order, or before it has been started."""

    parallel = True

    def __init__(self, log: Log, groups: int):
        self.log, self.groups = log, groups

    def keep(self, passage: Passage, name: str, tensor: Tensor) -> Tensor:
        return tensor

    def advance(self, passage: Passage) -> None:
        self.log.note(passage, f"{self.name} advance")

    def begin(self, passage: Passage, way: str, arriving: Sequence[Any]) -> None:
        self.log.note(passage, f"{self.name} start {way}")
        passage[self.name, way] = list(enumerate(arriving))

    def end(self, passage: Passage, way: str, group: int) -> Any:
        self.log.note(passage, f"{self.name} {way}.{group}")
        number, arrived = passage[self.name, way].pop(0)
        assert number == group, "groups are finished in order"
        return arrived


class Scatter(Fake):
    """tokens [T, H], weights [T, G], order [T] -> per group c (c + 1) tokens[order], and 2 weights[:, c]."""

    name, keeps = "scatter", False
    reads = (("tokens", "weights", "order"),)

    def __init__(self, log: Log, groups: int):
        super().__init__(log, groups)
        self.writes = [(f"rows.{c}", f"row_weights.{c}") for c in range(groups)]
        self.scale = torch.arange(1.0, groups + 1, dtype=torch.float64)[:, None, None]

    def graph(self, passage: Passage, tensors: Sequence[Sequence[Tensor]]) -> list[tuple[Tensor, Tensor]]:
        [(tokens, weights, order)] = tensors
        passage["order"] = order
        rows = tokens[order] * self.scale.to(tokens.dtype)
        return list(zip(rows.unbind(), (2 * weights).unbind(1), strict=True))

    def start(self, passage: Passage, tensors: Sequence[Sequence[Tensor]]) -> None:
        self.begin(passage, "F", [(r.clone(), w.clone()) for r, w in self.graph(passage, tensors)])

    def finish(self, passage: Passage, group: int) -> tuple[Tensor, Tensor]:
        return self.end(passage, "F", group)

    def start_backward(self, passage: Passage, gradients: Sequence[Sequence[Tensor]]) -> None:
        rows, weights = (torch.stack(each) for each in zip(*gradients, strict=True))
        dtokens = torch.empty_like(rows[0])
        dtokens[passage["order"]] = (rows * self.scale.to(rows.dtype)).sum(0)
        self.begin(passage, "B", [(dtokens, 2 * weights.t(), None)])

    def finish_backward(self, passage: Passage, group: int, tensors: Sequence[Tensor]) -> Any:
        assert not tensors
        return self.end(passage, "B", group)


class Gather(Fake):
    """Per group results [T, H] and their weights [T] -> the weighted sum, in the order of the tokens."""

    name, keeps = "gather", True
    writes = (("mixed",),)

    def __init__(self, log: Log, groups: int):
        super().__init__(log, groups)
        self.reads = [(f"results.{c}", f"row_weights.{c}") for c in range(groups)]

    def graph(self, passage: Passage, tensors: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        [first, *others] = [results * weights[:, None] for results, weights in tensors]
        return [[sum(others, first)[passage["order"].argsort()]]]

    def start(self, passage: Passage, tensors: Sequence[Sequence[Tensor]]) -> None:
        self.begin(passage, "F", self.graph(passage, tensors))

    def finish(self, passage: Passage, group: int) -> list[Tensor]:
        return self.end(passage, "F", group)

    def start_backward(self, passage: Passage, gradients: Sequence[Sequence[Tensor]]) -> None:
        [[dmixed]] = gradients
        self.begin(passage, "B", [dmixed[passage["order"]]] * self.groups)

    def finish_backward(self, passage: Passage, group: int, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        results, weights = tensors
        d = self.end(passage, "B", group)
        return d * weights[:, None], (d * results).sum(-1)


class _Mark(torch.autograd.Function):
    """Notes when a gradient comes by, and has a weight gradient as a matrix product of ours does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Block, passage: Passage, name: str) -> Tensor:
        ctx.block, ctx.passage, ctx.name = block, passage, name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        log, passage, name = ctx.block.log, ctx.passage, ctx.name
        log.note(passage, f"{name} I")
        sink = getattr(ctx.block.marked, "weight_grad_sink", None)
        if sink is not None and name != "sum":
            sink(ctx.block.marked, lambda _: log.note(passage, f"{name} W"))
        return dy, None, None, None


class Block(nn.Module):
    """Attention that routes, experts in `groups` groups with dropout, shared ones, and their sum."""

    def __init__(self, log: Log | None = None, groups: int = 2, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.log, self.groups = Log() if log is None else log, groups
        self.attention, self.shared, self.expert = (nn.Linear(H, H, dtype=dtype) for _ in range(3))
        self.gate = nn.Linear(H, groups, dtype=dtype)
        self.marked = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.kept: dict[str, list[weakref.ref]] = {}
        self.graphs: list[bool] = []  # whether the experts ran with a graph

    def phases(self) -> list[Any]:
        groups = range(self.groups)
        return [
            Phase("attention", ("x",), ("residual", "tokens", "weights", "order"), self._attention),
            Scatter(self.log, self.groups),
            Phase("mlp", ("tokens",), ("shared",), self._shared),
            *(Phase("mlp", (f"rows.{c}",), (f"results.{c}",), self._expert(c)) for c in groups),
            Gather(self.log, self.groups),
            Phase("sum", ("residual", "mixed", "shared"), ("x",), self._sum)]

    def mark(self, x: Tensor, passage: Passage, name: str) -> Tensor:
        return _Mark.apply(x, self, passage, name)

    def watched(self, x: Tensor, name: str) -> Tensor:
        """x in memory of which Python knows when nobody has it any more, autograd included."""
        memory = numpy.empty(x.shape, numpy.float32 if x.dtype == torch.float32 else numpy.float64)
        self.kept.setdefault(name, []).append(weakref.ref(memory))
        return torch.from_numpy(memory).copy_(x)

    def alive(self) -> set[str]:
        return {name for name, memories in self.kept.items() if any(memory() is not None for memory in memories)}

    def _attention(self, passage: Passage, x: Tensor) -> tuple[Tensor, ...]:
        self.log.note(passage, "attention F")
        residual = self.mark(x + F.dropout(self.attention(x).tanh(), 0.3), passage, "attention")
        tokens = self.watched(residual.sin(), "tokens")
        weights = self.watched(self.gate(tokens), "gate").square()  # squares so that autograd keeps it
        return residual, tokens, weights, tokens.detach()[:, 0].argsort()

    def _shared(self, passage: Passage, tokens: Tensor) -> Tensor:
        self.log.note(passage, "shared F")
        return self.mark(F.dropout(self.watched(self.shared(tokens), "inside shared").sin(), 0.3), passage, "shared")

    def _expert(self, group: int) -> Callable[..., Tensor]:
        def run(passage: Passage, rows: Tensor) -> Tensor:
            self.log.note(passage, f"mlp.{group} F")
            self.graphs.append(torch.is_grad_enabled())
            inside = self.watched(self.expert(rows), "inside mlp")
            return self.watched(self.mark(F.dropout(inside.sin(), 0.3), passage, f"mlp.{group}"), "results")

        return run

    def _sum(self, passage: Passage, residual: Tensor, mixed: Tensor, shared: Tensor) -> Tensor:
        self.log.note(passage, "sum F")
        return self.mark(self.watched(residual * shared + mixed, "out"), passage, "sum")


class Plain(nn.Module):
    """A layer of one phase."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(H, H, dtype=torch.float64)

    def phases(self) -> list[Phase]:
        return [Phase("layers", ("x",), ("x",), lambda _, x: F.dropout(self.linear(x).tanh(), 0.3))]


class Tuples(nn.Module):
    """(tensor, integers, tensor) in and out, a tuple and integers between phases, one element that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(H, H, dtype=torch.float64) for _ in range(2))

    def phases(self) -> list[Phase]:
        return [Phase("attention", ("x",), ("both", "integers"), self._split),
                Phase("mlp", ("both", "integers"), ("x",), self._join)]

    def _split(self, _: Passage, x: tuple[Tensor, ...]) -> tuple[Any, Tensor]:
        a, integers, b = x
        return (self.first(a), b.cos(), a.exp()), integers + 1

    def _join(self, _: Passage, both: tuple[Tensor, ...], integers: Tensor) -> tuple[Tensor, ...]:
        a, b, _ = both
        return self.second(a)[integers % T] * b, integers, a + b


class Twice(nn.Module):
    """Two phases read what one wrote, one reads what the layer was given as well.

    No tensor has three gradients: their sum depends on the order, which autograd chooses.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(H, H, dtype=torch.float64) for _ in range(3))

    def phases(self) -> list[Phase]:
        a, b, c = self.layers
        return [Phase("attention", ("x",), ("u", "v"), lambda _, x: (a(x), a.weight[:T].sin())),
                Phase("mlp", ("u",), ("p",), lambda _, u: b(u).tanh()),
                Phase("mlp", ("u", "v"), ("q",), lambda _, u, v: c(u) * v),
                Phase("sum", ("p", "q", "x"), ("x",), lambda _, p, q, x: p * q + x)]
