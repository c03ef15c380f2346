"""What a message between stages says of itself: its key, the layout of its tensors, and how both are written down.

See point_to_point.py for how messages travel.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ext.config.errors import UserError

HEADER_LENGTH = 256  # int64 words: 2 KB, enough for tuples of 30 tensors with 5 dimensions
HEADER_BYTES, _ALIGNMENT = 8 * HEADER_LENGTH, 64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16,
           torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)
AS_BYTES = (torch.float8_e4m3fn, torch.float8_e5m2)  # gloo does not know them
_KINDS = ("F", "B", "L")


class MessageError(UserError):
    """A message between stages is not the one that the schedule expects, or cannot be sent."""


class Key(NamedTuple):
    """Which message: kind ("F", "B" or "L"), direction, the stage that made it, and the micro-batch."""

    kind: str
    direction: int
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        what = {"F": "activation", "B": "gradient", "L": "labels"}[self.kind]
        return f"{what} of direction {self.direction}, stage {self.stage}, micro-batch {self.micro_batch}"


class TensorSpec(NamedTuple):
    """Shape, dtype and whether the receiver should send a gradient back."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


@dataclass(frozen=True)
class Spec:
    """What a payload is made of: a single tensor, or a tuple."""

    tensors: tuple[TensorSpec, ...]
    is_tuple: bool

    @staticmethod
    def of(tensors: Sequence[Tensor], is_tuple: bool) -> Spec:
        return Spec(tuple(TensorSpec(tuple(t.shape), t.dtype, t.requires_grad) for t in tensors), is_tuple)

    @property
    def bytes(self) -> int:
        return sum(math.prod(t.shape) * t.dtype.itemsize for t in self.tensors)

    @cached_property
    def _offsets(self) -> list[int]:
        """Where each tensor begins in a frame, and where the last one ends."""
        sizes = (-(-math.prod(t.shape) * t.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT for t in self.tensors)
        return list(accumulate(sizes, initial=0))

    @property
    def frame_bytes(self) -> int:
        """Room that the payload takes in a frame."""
        return self._offsets[-1]

    def places(self, frame: Tensor, start: int) -> list[Tensor]:
        """The tensors of a payload inside a frame of bytes, from `start` on.

        Not views of it: those would count each other's in-place changes.
        """
        storage = frame.untyped_storage()
        return [torch.empty(0, dtype=t.dtype).set_(storage, (start + offset) // t.dtype.itemsize, t.shape)
                for t, offset in zip(self.tensors, self._offsets, strict=False)]

    def fits(self, other: Spec) -> bool:
        """Whether buffers for `other` can take this payload."""
        return [t[:2] for t in self.tensors] == [t[:2] for t in other.tensors]


def check_sendable(key: Key, value: object) -> tuple[Tensor, ...]:
    """What a stage passes on, as a tuple of tensors.

    Raises:
        MessageError: it is not a tensor or a tuple of tensors.
    """
    tensors = value if isinstance(value, tuple) else (value,)
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise MessageError(f"{key}: element {i} is a {type(tensor).__name__}; a stage passes on a tensor or a "
                               "tuple of tensors")
    return tensors


@dataclass(frozen=True)
class Header:
    """What goes before a payload.

    Attributes:
        padded: the layout is not that of the message before, and padding of that layout comes first.
        received: how many messages the sender has had from the reader, per channel name.
    """

    key: Key
    spec: Spec
    padded: bool
    received: tuple[int, ...]

    def write(self) -> Tensor:
        """int64, at most HEADER_LENGTH; where it is given more room, what is behind it is not read."""
        kind, *numbers = self.key
        words = [_KINDS.index(kind), *numbers, int(self.padded), int(self.spec.is_tuple), len(self.spec.tensors),
                 len(self.received), *self.received]
        for t in self.spec.tensors:
            if t.dtype not in _DTYPES:
                raise MessageError(f"{self.key}: tensors of dtype {t.dtype} cannot travel between stages")
            words += [_DTYPES.index(t.dtype), int(t.requires_grad), len(t.shape), *t.shape]
        if len(words) > HEADER_LENGTH:
            raise MessageError(f"{self.key}: {len(self.spec.tensors)} tensors are too many for one message between "
                               f"stages ({len(words)} header words, at most {HEADER_LENGTH})")
        return torch.frombuffer(array("q", words), dtype=torch.int64)  # a list takes five times as long

    @staticmethod
    def read(header: Tensor) -> Header:
        words = iter(header.tolist())

        def take(count: int) -> list[int]:
            return [next(words) for _ in range(count)]

        kind, direction, stage, micro_batch, padded, is_tuple, count, channels = take(8)
        received = tuple(take(channels))
        tensors = []
        for _ in range(count):
            dtype, requires_grad, dims = take(3)
            tensors.append(TensorSpec(tuple(take(dims)), _DTYPES[dtype], bool(requires_grad)))
        return Header(Key(_KINDS[kind], direction, stage, micro_batch), Spec(tuple(tensors), bool(is_tuple)),
                       bool(padded), received)
