"""Dispatch and combine as communications of a block's list of phases (layers/phases.py) over comm/dispatch.py.

Shape letters: T tokens, k experts of a token, R rows of a chunk, h hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from megatron_ext.comm.dispatch import Dispatcher, Transit, combine, dispatch
from megatron_ext.fp8 import QuantizedTensor
from megatron_ext.layers.phases import Passage


def transit(passage: Passage) -> Transit:
    """The way of this micro-batch's tokens through this layer."""
    return passage["transit"]


class _Exchange:
    def __init__(self, dispatcher: Dispatcher):
        self.dispatcher = dispatcher

    @property
    def parallel(self) -> bool:
        return self.dispatcher.ep.size > 1

    def advance(self, passage: Passage) -> None:
        transit(passage).advance()


class Dispatch(_Exchange):
    """tokens [T, h], weights [T, k], experts [T, k] -> per chunk rows [R, h] sorted by expert, and weights [R]."""

    name = "dispatch"
    keeps = False
    reads = (("tokens", "weights", "experts"),)

    def __init__(self, dispatcher: Dispatcher):
        super().__init__(dispatcher)
        self.writes = [(f"rows.{c}", f"row_weights.{c}") for c in range(dispatcher.parts)]

    def keep(self, passage: Passage, name: str, tensor: Tensor) -> Tensor:
        return tensor

    def _announce(self, passage: Passage, tensors: Sequence[Sequence[Tensor]]) -> tuple[Transit, Tensor, Tensor]:
        [(tokens, weights, experts)] = tensors
        passage["transit"] = self.dispatcher.announce(experts, tokens)
        return transit(passage), tokens, weights

    def start(self, passage: Passage, tensors: Sequence[Sequence[Tensor]]) -> None:
        way, tokens, weights = self._announce(passage, tensors)
        way.start_dispatch(tokens, weights)

    def finish(self, passage: Passage, group: int) -> Sequence[Tensor]:
        return transit(passage).finish_dispatch(group)

    def start_backward(self, passage: Passage, gradients: Sequence[Sequence[Tensor]]) -> None:
        transit(passage).start_dispatch_backward([rows for rows, _ in gradients], [w for _, w in gradients])

    def finish_backward(self, passage: Passage, group: int, kept: Sequence[Any]) -> Sequence[Tensor | None]:
        return *transit(passage).finish_dispatch_backward(), None

    def graph(self, passage: Passage, tensors: Sequence[Sequence[Tensor]]) -> Sequence[Sequence[Tensor]]:
        return [dispatch(*self._announce(passage, tensors))]


class Combine(_Exchange):
    """Per chunk results [R, h] of the experts and their weights [R] -> "mixed" [T, h], the weighted sums."""

    name = "combine"
    keeps = True
    writes = (("mixed",),)

    def __init__(self, dispatcher: Dispatcher):
        super().__init__(dispatcher)
        self.reads = [(f"results.{c}", f"row_weights.{c}") for c in range(dispatcher.parts)]

    def start(self, passage: Passage, tensors: Sequence[Sequence[Tensor]]) -> None:
        transit(passage).start_combine([rows for rows, _ in tensors], [w for _, w in tensors])

    def keep(self, passage: Passage, name: str, tensor: Tensor) -> Tensor | QuantizedTensor:
        return transit(passage).keep(tensor) if name.startswith("results") else tensor

    def finish(self, passage: Passage, group: int) -> Sequence[Tensor]:
        return [transit(passage).finish_combine()]

    def start_backward(self, passage: Passage, gradients: Sequence[Sequence[Tensor]]) -> None:
        [[dmixed]] = gradients
        transit(passage).start_combine_backward(dmixed)

    def finish_backward(self, passage: Passage, group: int, kept: Sequence[Any]) -> Sequence[Tensor | None]:
        rows, weights = kept
        return transit(passage).finish_combine_backward(group, rows, weights)

    def graph(self, passage: Passage, tensors: Sequence[Sequence[Tensor]]) -> Sequence[Sequence[Tensor]]:
        [(rows, weights)] = tensors
        return [[combine(transit(passage), rows, weights)]]
