"""Messages between pipeline stages: tensors or tuples of tensors of any shape, posted early, waited for late, checked.

A channel is a one-way stream of messages of one kind (activations "F", gradients "B", labels "L") in one direction of
the pipeline from one rank to another. The receiver is told beforehand which messages will come, in the order of
sending; it may take them in another order (interleaved schedules do), and one that came too early waits for its turn.

Each message is a header (key, shapes, dtypes, which tensors want a gradient) and a payload. The receive for both is
posted early, for the shapes of the channel's previous message; both sides know those. If the shapes turn out to have
changed, the sender first fills that receive with padding and sends the payload again, so a change of shape costs one
message and needs no promise from the user. gloo itself accepts wrong shapes and dtypes silently, and aborts the process
on longer ones.

Over gloo the two travel as one frame, for a message costs it 0.3 ms of a busy core whatever its length. Elsewhere the
header travels between the hosts over gloo and the payload between the devices, so that reading it never waits for one.

What is sent must stay alive until the peer has it, and gloo does not say when that is short of waiting. So every header
also says how many messages its sender has received from the reader, channel by channel, and those are let go.

gloo moves only CPU memory point to point; payloads on another device are staged through the CPU there, which is how
tests put several ranks on one GPU.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_ext.config.errors import UserError

HEADER_LENGTH = 256  # int64 words: 2 KB, enough for tuples of 30 tensors with 5 dimensions
_HEADER_BYTES, _ALIGNMENT = 8 * HEADER_LENGTH, 64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16,
           torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)
_AS_BYTES = (torch.float8_e4m3fn, torch.float8_e5m2)  # gloo does not know them
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
class _Header:
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
        """[HEADER_LENGTH] int64."""
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
        return torch.tensor(words + [0] * (HEADER_LENGTH - len(words)), dtype=torch.int64)

    @staticmethod
    def read(header: Tensor) -> _Header:
        words = iter(header.tolist())

        def take(count: int) -> list[int]:
            return [next(words) for _ in range(count)]

        kind, direction, stage, micro_batch, padded, is_tuple, count, channels = take(8)
        received = tuple(take(channels))
        tensors = []
        for _ in range(count):
            dtype, requires_grad, dims = take(3)
            tensors.append(TensorSpec(tuple(take(dims)), _DTYPES[dtype], bool(requires_grad)))
        return _Header(Key(_KINDS[kind], direction, stage, micro_batch), Spec(tuple(tensors), bool(is_tuple)),
                       bool(padded), received)


@dataclass(frozen=True)
class _Line:
    """How the two ends of a channel are connected. Only gloo reads tags: `tag` for headers, the next for payloads."""

    peer: int
    tag: int
    payload: ProcessGroup
    control: ProcessGroup
    device: torch.device

    @cached_property
    def framed(self) -> bool:
        """Whether header and payload travel together, through the hosts' memory."""
        return dist.get_backend(self.payload) == "gloo"


class _Outbox:
    """The sending end of a channel."""

    def __init__(self, line: _Line):
        self.line = line
        self.previous: Spec | None = None
        self.under_way: deque[tuple[list[dist.Work], list[Tensor]]] = deque()
        self.arrived = 0

    def send(self, key: Key, tensors: Sequence[Tensor], is_tuple: bool, received: tuple[int, ...]) -> None:
        spec = Spec.of(tensors, is_tuple)
        padded = self.previous is not None and not spec.fits(self.previous)
        header = _Header(key, spec, padded, received).write()
        parts = self._frames(header, tensors, spec) if self.line.framed else self._apart(header, tensors, padded)
        works = [dist.isend(part, self.line.peer, group=group, tag=tag) for part, group, tag in parts]
        self.under_way.append((works, [part for part, _, _ in parts]))
        self.previous = spec

    def _frames(self, header: Tensor, tensors: Sequence[Tensor],
                spec: Spec) -> list[tuple[Tensor, ProcessGroup, int]]:
        """A frame with room for the previous layout, and a second one with the payload if that has another."""
        line, before = self.line, self.previous
        room = before.frame_bytes if before is not None else 0
        frames = [torch.empty(_HEADER_BYTES + room, dtype=torch.uint8)]
        frames[0][:_HEADER_BYTES].view(torch.int64).copy_(header)
        start = _HEADER_BYTES
        if before is None or not spec.fits(before):
            frames.append(torch.empty(spec.frame_bytes, dtype=torch.uint8))
            start = 0
        for place, tensor in zip(spec.places(frames[-1], start), tensors, strict=True):
            place.copy_(tensor.detach())
        return [(frame, line.control, line.tag + i) for i, frame in enumerate(frames) if frame.numel()]

    def _apart(self, header: Tensor, tensors: Sequence[Tensor],
               padded: bool) -> list[tuple[Tensor, ProcessGroup, int]]:
        line, before = self.line, self.previous
        parts = [(header, line.control, line.tag)]
        padding = [torch.zeros(t.shape, dtype=t.dtype, device=line.device)
                   for t in (before.tensors if before is not None and padded else ())]
        for tensor in (*padding, *tensors):
            if tensor.numel():
                flat = tensor.detach().contiguous().to(line.device)
                parts.append((flat.view(torch.uint8) if flat.dtype in _AS_BYTES else flat, line.payload, line.tag + 1))
        return parts

    def acknowledge(self, count: int) -> None:
        """Lets go of the messages that the peer has, `count` since the beginning.

        Elsewhere than over gloo that only says that the peer's host has the header, and waiting would hold up the
        computations after it on this device: those payloads stay until their transfer is seen to be done.
        """
        while self.arrived < count and (self.line.framed or self._done()):
            self._let_go()

    def finish(self) -> None:
        while self.under_way:
            self._let_go()

    def _done(self) -> bool:
        return all(work.is_completed() for work in self.under_way[0][0][1:])

    def _let_go(self) -> None:
        works, _ = self.under_way.popleft()
        for work in works:
            work.wait()
        self.arrived += 1


class _Inbox:
    """The receiving end of a channel."""

    def __init__(self, line: _Line):
        self.line = line
        self.previous: Spec | None = None
        self.expected: deque[Key] = deque()
        self.header: tuple[Tensor, dist.Work] | None = None  # a frame, or the header alone
        self.posted: tuple[list[Tensor], list[dist.Work]] | None = None
        self.early: dict[Key, tuple[list[Tensor], Spec]] = {}
        self.received = 0

    def post(self) -> None:
        """Posts the receives of the next expected message, if there is one and they are not posted yet."""
        if self.expected and self.header is None:
            line, before = self.line, self.previous
            room = before.frame_bytes if before is not None and line.framed else 0
            header = torch.empty(_HEADER_BYTES + room, dtype=torch.uint8)
            words = header if line.framed else header.view(torch.int64)
            self.header = header, dist.irecv(words, line.peer, group=line.control, tag=line.tag)
            self.posted = None if before is None or line.framed else self._post_payload(before)

    def _post_payload(self, spec: Spec) -> tuple[list[Tensor], list[dist.Work]]:
        buffers = [torch.empty(t.shape, dtype=torch.uint8 if t.dtype in _AS_BYTES else t.dtype, device=self.line.device)
                   for t in spec.tensors]
        works = [dist.irecv(buffer, self.line.peer, group=self.line.payload, tag=self.line.tag + 1)
                 for buffer in buffers if buffer.numel()]
        return buffers, works

    def land(self) -> _Header:
        """Waits for the next expected message and puts it in `early`; posts the one after."""
        self.post()
        assert self.header is not None
        self.header[1].wait()
        header = _Header.read(self.header[0][:_HEADER_BYTES].view(torch.int64))
        if header.key != self.expected[0]:
            raise MessageError(f"rank {self.line.peer} sent the {header.key} where this rank waits for the "
                               f"{self.expected[0]}: the two ranks run different schedules")
        landed = self._framed(header, self.header[0]) if self.line.framed else self._came_apart(header)
        self.early[self.expected.popleft()] = landed, header.spec
        self.previous, self.header, self.posted = header.spec, None, None
        self.received += 1
        self.post()
        return header

    def _framed(self, header: _Header, frame: Tensor) -> list[Tensor]:
        line, spec, start = self.line, header.spec, _HEADER_BYTES
        if header.padded or self.previous is None:
            frame, start = torch.empty(spec.frame_bytes, dtype=torch.uint8), 0
            if frame.numel():
                dist.irecv(frame, line.peer, group=line.control, tag=line.tag + 1).wait()
        return [place.to(line.device) for place in spec.places(frame, start)]

    def _came_apart(self, header: _Header) -> list[Tensor]:
        buffers, works = self.posted or self._post_payload(header.spec)
        for work in works:
            work.wait()
        if header.padded:
            buffers, works = self._post_payload(header.spec)
            for work in works:
                work.wait()
        return [b if b.dtype == t.dtype else b.view(t.dtype) for b, t in zip(buffers, header.spec.tensors, strict=True)]


class Messenger:
    """All channels of this rank.

    Args:
        groups: payload group per channel name (kind and direction, "F0"), in the same order on all ranks, or one per
            (sender, receiver); over gloo they may all be one.
        control: a gloo group over all ranks, for headers.
        device: where payloads live.
    """

    def __init__(self, groups: Mapping[str, ProcessGroup | Mapping[tuple[int, int], ProcessGroup]],
                 control: ProcessGroup, device: torch.device):
        self.groups, self.control, self.device = groups, control, device
        self._outboxes: dict[tuple[str, int], _Outbox] = {}
        self._inboxes: dict[tuple[str, int], _Inbox] = {}

    def _line(self, name: str, peer: int, sending: bool) -> _Line:
        payload = self.groups[name]
        if isinstance(payload, Mapping):
            rank = dist.get_rank()
            payload = payload[(rank, peer) if sending else (peer, rank)]
        return _Line(peer, 2 * list(self.groups).index(name), payload, self.control, self.device)

    def _outbox(self, key: Key, peer: int) -> _Outbox:
        where = (f"{key.kind}{key.direction}", peer)
        if where not in self._outboxes:
            self._outboxes[where] = _Outbox(self._line(*where, sending=True))
        return self._outboxes[where]

    def _inbox(self, key: Key, peer: int) -> _Inbox:
        where = (f"{key.kind}{key.direction}", peer)
        if where not in self._inboxes:
            self._inboxes[where] = _Inbox(self._line(*where, sending=False))
        return self._inboxes[where]

    def expect(self, messages: Sequence[tuple[Key, int]]) -> None:
        """Announces the messages of a step as (key, source rank), in the order of sending; posts the first ones."""
        for key, source in messages:
            self._inbox(key, source).expected.append(key)
        for inbox in self._inboxes.values():
            inbox.post()

    def send(self, key: Key, destination: int, value: Tensor | tuple[Tensor, ...]) -> None:
        """Starts sending; returns at once. The tensors must not be written to before `finish`.

        Raises:
            MessageError: the value is not a tensor or a tuple of some tensors, or of a dtype that cannot be sent.
        """
        tensors = check_sendable(key, value)
        received = tuple(inbox.received if (inbox := self._inboxes.get((name, destination))) else 0
                         for name in self.groups)
        self._outbox(key, destination).send(key, tensors, isinstance(value, tuple), received)

    def receive(self, key: Key, source: int) -> tuple[list[Tensor], Spec]:
        """Waits for a message; returns its tensors (leaves without gradient) and what the sender said of them.

        Raises:
            MessageError: the message was not announced, or the peer sent something else.
        """
        inbox = self._inbox(key, source)
        while key not in inbox.early:
            if key not in inbox.expected:
                raise MessageError(f"rank {source} was to send the {key}, but the schedule has "
                                   + (f"the {inbox.expected[0]}" if inbox.expected else "no further message") + " next")
            header = inbox.land()
            for name, count in zip(self.groups, header.received, strict=True):
                if (name, source) in self._outboxes:
                    self._outboxes[name, source].acknowledge(count)
        return inbox.early.pop(key)

    @property
    def largest(self) -> int:
        """Bytes of the largest message that this rank has sent or received."""
        ends = [*self._outboxes.values(), *self._inboxes.values()]
        return max((e.previous.bytes for e in ends if e.previous is not None), default=1)

    @property
    def under_way(self) -> int:
        """Messages sent and kept, because the peer is not known to have them."""
        return sum(len(outbox.under_way) for outbox in self._outboxes.values())

    def finish(self) -> None:
        """Waits until every message sent has arrived."""
        for outbox in self._outboxes.values():
            outbox.finish()
