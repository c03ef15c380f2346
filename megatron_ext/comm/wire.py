"""How a row looks as bytes in expert dispatch and combine (DeepSeek-V3 report, section 3.3.2).

`model` sends numbers as they are. `bf16` rounds to BF16. `fp8` rounds to E4M3 with a power-of-two scale per 1x128 tile
and sends a row as its h bytes and one exponent byte per tile. What goes with a token travels in the same row, so there
is one message per destination:

    payload | scales | origin 8 | weights k x 4 | experts k x 2 | padding to words of 8 bytes

With h = 2048 and k = 8 that is 2120 bytes in FP8, 0.518 of the 4096 bytes of a BF16 payload. Whole words make every
part readable in place, and let rows be gathered and sent as int64. Whoever does not communicate writes and reads rows
all the same, so that every layout rounds the same.

Shape letters: R rows, h hidden size, k experts of a token, b bytes of a payload, w words of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from megatron_ext.fp8.operators import call
from megatron_ext.kernels.registry import AUTO

FORMATS = ("model", "bf16", "fp8")
TILE, WORD = 128, 8
MAX_EXPERTS = 2**15 - 1
"""Numbers of experts travel in 16 bits."""


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What numbers of `dtype` are summed in, and what their weights are: FP32, or FP64 for FP64."""
    return torch.promote_types(dtype, torch.float32)


def payload_bytes(wire: str, hidden: int, dtype: torch.dtype) -> int:
    """b, the bytes of `hidden` values of `dtype` with their scales."""
    return {"model": hidden * dtype.itemsize, "bf16": 2 * hidden, "fp8": hidden + -(-hidden // TILE)}[wire]


def decode(payload: Tensor, wire: str, hidden: int, dtype: torch.dtype, backend: str = AUTO) -> Tensor:
    """[R, b] uint8 -> [R, h] in `dtype`. A view if `wire` is `model`; the bytes of a row are neighbours
    and begin at a multiple of the numbers' size."""
    if wire == "model":
        return payload.view(dtype)
    if wire == "bf16":
        return payload.view(torch.bfloat16).to(dtype)
    data, exponents = payload.split((hidden, payload.shape[-1] - hidden), dim=-1)
    scale = (exponents.to(torch.int32) << 23).view(torch.float32)
    data = data.contiguous().view(torch.float8_e4m3fn)
    return call("dequantize", data, scale, backend=backend).to(dtype)


@dataclass(frozen=True)
class Row:
    """The layout of the rows of one kind of message.

    Attributes:
        wire: format of the payload.
        hidden: h.
        dtype: of the model, which the payload is read into.
        weights: numbers beside the payload, in `accumulator(dtype)`.
        routed: whether origin and numbers of experts (as many as weights) go with it.
        backend: of the kernels that quantise.
    """

    wire: str
    hidden: int
    dtype: torch.dtype
    weights: int = 0
    routed: bool = False
    backend: str = AUTO

    @cached_property
    def _ends(self) -> tuple[int, int, int, int]:
        """Where in a row payload, origin, weights and experts end."""
        payload = payload_bytes(self.wire, self.hidden, self.dtype)
        origin = _whole(payload) + WORD * self.routed
        weights = origin + self.weights * self.accumulator.itemsize
        return payload, origin, weights, weights + 2 * self.weights * self.routed

    @property
    def accumulator(self) -> torch.dtype:
        """What payloads are summed in, and the dtype of the weights."""
        return accumulator(self.dtype)

    @property
    def bytes(self) -> int:
        return _whole(self._ends[-1])

    @property
    def words(self) -> int:
        """w."""
        return self.bytes // WORD

    def write(self, x: Tensor, weights: Tensor | None = None, experts: Tensor | None = None,
              origin: Tensor | None = None, source: Tensor | None = None) -> Tensor:
        """[T, h], [T, k], [T, k] and [T] of any strides -> [R, w] int64.

        Args:
            source: [R], the token of each row; None for all in order. In FP8 tokens are gathered and quantised in one
                pass, straight into their rows.
        """
        if source is not None:
            weights, experts, origin = (None if t is None else t[source] for t in (weights, experts, origin))
        rows = torch.empty(len(x if source is None else source), self.words, dtype=torch.int64, device=x.device)
        payload, origins, end, last = self._ends
        places = rows.view(torch.uint8)
        if self.wire == "fp8":
            every = torch.arange(len(x), device=x.device) if source is None else source
            call("quantize_rows", x, every, places, backend=self.backend)
        else:
            x = x if source is None else x.index_select(0, source)
            places[:, :payload].view(self.dtype if self.wire == "model" else torch.bfloat16).copy_(x)
        if weights is not None:
            places[:, origins:end].view(self.accumulator).copy_(weights)
        if experts is not None and origin is not None:
            rows[:, origins // WORD - 1] = origin
            places[:, end:last].view(torch.int16).copy_(experts)
        return rows

    def writer(self, x: Tensor, weights: Tensor | None = None, experts: Tensor | None = None,
               origin: Tensor | None = None, *, copies: int) -> Callable[[Tensor], Tensor]:
        """What turns chosen tokens [R] into rows [R, w], for several choices among the same tokens.

        In FP8 rows are quantised as they are gathered, from the tokens in BF16: 3 h bytes read and written for each of
        `copies` rows in all. Where there are more than three for a token, quantising once, 3 h a token, and gathering
        bytes, 2 h a row, moves less; on CPUs, where quantising costs more than moving (0.78 against 0.34 ms for 256
        tokens of h = 2048 five times), where there is more than one. What needs no quantising is written once always.
        """
        if self.wire == "fp8" and copies <= len(x) * (1 if x.device.type == "cpu" else 3):
            return lambda source: self.write(x, weights, experts, origin, source)
        return partial(torch.index_select, self.write(x, weights, experts, origin), 0)

    def payload(self, rows: Tensor) -> Tensor:
        """[R, w] -> [R, h] in the model's dtype; may be a view."""
        return decode(self._bytes(rows, 0, self._ends[0]), self.wire, self.hidden, self.dtype, self.backend)

    def weights_of(self, rows: Tensor) -> Tensor:
        """[R, w] -> [R, k], a view."""
        return self._bytes(rows, *self._ends[1:3]).view(self.accumulator)

    def experts_of(self, rows: Tensor) -> Tensor:
        """[R, w] -> [R, k] int64."""
        return self._bytes(rows, *self._ends[2:4]).view(torch.int16).to(torch.int64)

    def origin_of(self, rows: Tensor) -> Tensor:
        """[R, w] -> [R] int64, a view."""
        return rows[:, self._ends[1] // WORD - 1]

    @staticmethod
    def _bytes(rows: Tensor, start: int, end: int) -> Tensor:
        return rows.view(torch.uint8)[:, start:end]


def _whole(size: int) -> int:
    """`size` bytes in whole words."""
    return -(-size // WORD) * WORD
