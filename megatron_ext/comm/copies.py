"""What a transport brings to the rank of an expert, and what it must be able to do (see transit.py).

Shape letters: T tokens here, k experts of a token, C copies here, C' of them in a chunk, h hidden size.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class Copies(NamedTuple):
    """Some copies that have come, and with a dispatch what came with them.

    Attributes:
        payload: [C', h] in the model's dtype.
        weights: [C', k], or None.
        experts: [C', k] int64, all of a token's, also those elsewhere; or None.
        origin: [C'] int64, unique and the same however the copy came; or None. Rows of an expert are in its order.
    """

    payload: Tensor
    weights: Tensor | None = None
    experts: Tensor | None = None
    origin: Tensor | None = None


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

    def finish_combine_backward(self, chunk: int) -> Copies:
        """Waits for the copies that come first in this chunk."""

    def start_dispatch_backward(self, sums: Tensor, weights: Tensor) -> None:
        """Sends a gradient per copy [C, h], and the gradients of its weights [C, k], both in the accumulator's."""

    def finish_dispatch_backward(self) -> tuple[Tensor, Tensor]:
        """[T, h] and [T, k], the sums of what came back for each token."""

    def advance(self) -> None:
        """Starts the second hop of what is under way, if there is one."""
