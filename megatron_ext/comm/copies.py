"""What a transport brings to the rank of an expert, and what it must be able to do (see transit.py).

Shape letters: T tokens here, k experts of a token, C copies here, C' of them in a chunk, h hidden size.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class Copies(NamedTuple):
    """The copies of tokens that have come in a chunk.

    Attributes:
        payload: [C', h] in the model's dtype; may be a view of a buffer.
        weights: [C', k].
        experts: [C', k] int64, all of a token's; those elsewhere may be any number that is not of an expert here.
        origin: [C'] int64, unique and the same however the copy came. The rows of an expert are in its order.
    """

    payload: Tensor
    weights: Tensor
    experts: Tensor
    origin: Tensor


class Transport(Protocol):
    """The way of one micro-batch's copies between ranks: collective.py, or deep_ep.py."""

    @property
    def copies(self) -> int:
        """C, known after `start_dispatch`."""

    def start_dispatch(self, tokens: Tensor, weights: Tensor) -> list[int]:
        """Sends [T, h] tokens and [T, k] weights; returns the rows of each expert here."""

    def finish_dispatch(self, chunk: int) -> Copies:
        """Waits for the copies that come first in this chunk."""

    def start_combine(self, sums: Tensor) -> None:
        """Sends a sum per copy [C, h], in the accumulator's dtype, in the order in which the copies came."""

    def finish_combine(self) -> Tensor:
        """[T, h], the sum of what came back for each token."""

    def start_combine_backward(self, dy: Tensor) -> None:
        """Sends the gradient of the output [T, h] the way of the tokens."""

    def finish_combine_backward(self, chunk: int) -> Tensor:
        """Waits for the copies that come first in this chunk, [C', h]."""

    def start_dispatch_backward(self, sums: Tensor, weights: Tensor) -> None:
        """Sends a gradient per copy [C, h], and the gradients of its weights [C, k], both in the accumulator's."""

    def finish_dispatch_backward(self) -> tuple[Tensor, Tensor]:
        """[T, h] and [T, k], the sums of what came back for each token."""

    def advance(self) -> None:
        """Starts the second hop of what is under way, if there is one."""
