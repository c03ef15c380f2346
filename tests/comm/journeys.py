"""Tokens of several ranks through experts that are small matrices: what ranks do, and what one process should find.

The expectation is autograd over all tokens in one process, written from the definition: it knows which ranks and nodes
sum what, and where a number is rounded, but nothing of how rows travel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext import fp8
from megatron_ext.comm.dispatch import Dispatcher, combine, dispatch
from megatron_ext.comm.traffic import Traffic
from megatron_ext.comm.transit import Transit
from megatron_ext.comm.wire import accumulator
from megatron_ext.parallel.expert_parallel import ExpertParallel
from megatron_ext.parallel.layout import NodeLayout

E, K, H = 8, 3, 16


def choices(*tokens: int, among: list[int] | None = None, seed: int = 0) -> list[torch.Tensor]:
    """Per rank [T, K] distinct experts, of those in `among`."""
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.tensor(among or range(E))
    return [allowed[torch.rand(n, len(allowed), generator=generator).topk(K).indices] for n in tokens]


@dataclass
class Journey:
    """A case: per rank experts [T, K], tokens [T, H], weights [T, K] and gradients of the output [T, H]."""

    experts: list[Tensor]
    dispatch: str = "model"
    combine: str = "model"
    chunks: int = 1
    per_node: int | None = None
    two_hop: bool = True  # where `per_node` is given
    dtype: torch.dtype = torch.float64
    hidden: int = H
    matrices: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.matrices = (draw(E, self.hidden, self.hidden) / self.hidden**0.5).to(self.dtype)
        self.tokens = [draw(len(chosen), self.hidden).to(self.dtype) for chosen in self.experts]
        self.weights = [draw(*chosen.shape).to(accumulator(self.dtype)) for chosen in self.experts]
        self.douts = [draw(len(chosen), self.hidden).to(self.dtype) for chosen in self.experts]

    @property
    def hops(self) -> int:
        return 2 if self.per_node and self.two_hop else 1


def here(per_node: int | None = None, timeout: timedelta | None = None) -> ExpertParallel:
    """This rank of a pool, all of which are one expert group; with groups for two hops over nodes of that size."""
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD if timeout is None else dist.new_group(range(size), timeout=timeout)
    if per_node is None:
        return ExpertParallel(group, size, rank, "ep")
    layout, found = NodeLayout(per_node), {}
    for kind, parts in (("inter", layout.across(range(size))), ("intra", layout.within(range(size)))):
        for ranks in parts:
            part = dist.new_group(ranks, timeout=timeout)
            if rank in ranks:
                found[kind] = part
    return ExpertParallel(group, size, rank, "ep", layout, **found)


def dispatcher(journey: Journey, traffic: Traffic | None = None) -> Dispatcher:
    return Dispatcher(E, here(journey.per_node), journey.dispatch, journey.combine, chunks=journey.chunks,
                      two_hop=journey.hops == 2, traffic=traffic)


def compute(rows: Tensor, sizes: list[int], matrices: Tensor) -> Tensor:
    return torch.tanh(torch.cat([part @ m.t() for part, m in zip(rows.split(sizes), matrices, strict=True)]))


def travel_all(journeys: list[Journey]) -> list[dict[str, Any]]:
    return [travel(journey) for journey in journeys]


def travel(journey: Journey) -> dict[str, Any]:
    """This rank's part through the graph operations."""
    rank = dist.get_rank()
    way = dispatcher(journey, traffic := Traffic())
    x = journey.tokens[rank].clone().requires_grad_()
    weights = journey.weights[rank].clone().requires_grad_()
    matrices = journey.matrices[slice(*way.ep.expert_range(E))].clone().requires_grad_()
    transit = way.announce(journey.experts[rank], x)
    rows, row_weights = dispatch(transit, x, weights)
    out = combine(transit, compute(rows, transit.group_sizes(), matrices), row_weights)
    out.backward(journey.douts[rank])
    return dict(out=out.detach(), dx=x.grad, dweights=weights.grad, dmatrices=matrices.grad, traffic=traffic.take(),
                groups=transit.group_sizes())


class Steps:
    """This rank's part step by step, as a pipeline does: starts and finishes apart, chunk by chunk."""

    def __init__(self, journey: Journey, way: Dispatcher | None = None):
        rank, way = dist.get_rank(), way or dispatcher(journey)
        self.x, self.weights, self.dout = journey.tokens[rank], journey.weights[rank], journey.douts[rank]
        self.matrices = journey.matrices[slice(*way.ep.expert_range(E))].clone().requires_grad_()
        self.transit: Transit = way.announce(journey.experts[rank], self.x)

    def start_dispatch(self) -> None:
        self.transit.start_dispatch(self.x, self.weights)

    def experts(self) -> None:
        self.rows, self.row_weights, self.results = [], [], []
        for chunk in range(self.transit.chunks):
            rows, weights = self.transit.finish_dispatch(chunk)
            self.rows.append(rows.requires_grad_())
            self.row_weights.append(weights)
            self.results.append(compute(rows, self.transit.group_sizes(chunk), self.matrices))
        self.transit.start_combine([r.detach() for r in self.results], self.row_weights)

    def combine(self) -> None:
        self.out = self.transit.finish_combine()

    def start_backward(self) -> None:
        self.transit.start_combine_backward(self.dout)

    def backward(self) -> None:
        drows, dweights = [], []
        for chunk in range(self.transit.chunks):
            parts = self.results[chunk].detach(), self.row_weights[chunk]
            dresults, dweight = self.transit.finish_combine_backward(chunk, *parts)
            self.results[chunk].backward(dresults)
            drows.append(self.rows[chunk].grad)
            dweights.append(dweight)
        self.transit.start_dispatch_backward(drows, dweights)

    def finish(self) -> dict[str, Any]:
        dx, dweights = self.transit.finish_dispatch_backward()
        return dict(out=self.out, dx=dx, dweights=dweights, dmatrices=self.matrices.grad)


STEPS = ("start_dispatch", "experts", "combine", "start_backward", "backward")


def travel_in_steps(journey: Journey, advance: bool = False) -> dict[str, Any]:
    steps = Steps(journey)
    for step in STEPS:
        getattr(steps, step)()
        if advance:
            steps.transit.advance()
    return steps.finish()


def rounded(x: Tensor, wire: str) -> Tensor:
    """What a row makes of x, from the definition of the formats."""
    if wire == "fp8":
        return fp8.quantize(x, (1, 128), power_of_two=True).dequantize(x.dtype)
    return x.bfloat16().to(x.dtype) if wire == "bf16" else x


class _Rounded(torch.autograd.Function):
    """Rounds to one format forward, and the gradient to another backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: str, backward: str) -> Tensor:
        ctx.format = backward
        return rounded(x, forward)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return rounded(dy, ctx.format), None, None


def expected(journey: Journey) -> list[dict[str, Tensor]]:
    """What each rank should find."""
    ranks, exact = len(journey.experts), "model"
    experts = torch.cat(journey.experts)
    x = torch.cat(journey.tokens).requires_grad_()
    weights = torch.cat(journey.weights).requires_grad_()
    matrices = journey.matrices.clone().requires_grad_()
    there, back = journey.dispatch, journey.combine
    x_there = _Rounded.apply(x, there, exact)
    per_node = journey.per_node if journey.hops == 2 else 1
    out = torch.zeros_like(x)
    for node in range(ranks // per_node):
        copy_of_node = _Rounded.apply(x_there, exact, back) if journey.hops == 2 else x_there
        total = torch.zeros_like(x)
        for rank in range(node * per_node, (node + 1) * per_node):
            copy = _Rounded.apply(copy_of_node, exact, back)
            sum_here = torch.zeros_like(x)
            for e in range(rank * E // ranks, (rank + 1) * E // ranks):
                weight = (weights * (experts == e)).sum(-1, keepdim=True).to(x.dtype)
                sum_here = sum_here + weight * torch.tanh(copy @ matrices[e].t())
            total = total + _Rounded.apply(sum_here, back, exact)
        out = out + (_Rounded.apply(total, back, exact) if journey.hops == 2 else total)
    out = _Rounded.apply(out, exact, there)
    out.backward(torch.cat(journey.douts))
    tokens = [len(part) for part in journey.experts]
    parts = zip(out.detach().split(tokens), x.grad.split(tokens), weights.grad.split(tokens),
                matrices.grad.chunk(ranks), strict=True)
    return [dict(zip(("out", "dx", "dweights", "dmatrices"), part, strict=True)) for part in parts]
