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

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_ext.comm.messages import (
    AS_BYTES,
    HEADER_BYTES,
    HEADER_LENGTH,
    Header,
    Key,
    MessageError,
    Spec,
    check_sendable,
)


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


def _wait(works: Sequence[dist.Work], line: _Line, what: str) -> None:
    """Waits for a message from or to the peer.

    Raises:
        MessageError: the peer has died, or has not come within the timeout of the group.
    """
    try:
        for work in works:
            work.wait()
    except RuntimeError as error:
        raise MessageError(f"rank {dist.get_rank()} waited for rank {line.peer}, {what}: it has stopped or is late "
                           f"({error})") from error


class _Outbox:
    """The sending end of a channel."""

    def __init__(self, line: _Line):
        self.line = line
        self.previous: Spec | None = None
        self.under_way: deque[tuple[list[dist.Work], list[Tensor]]] = deque()
        self.arrived = 0

    def send(self, key: Key, tensors: Sequence[Tensor], is_tuple: bool, received: tuple[int, ...]) -> None:
        spec = Spec.of(tensors, is_tuple)
        if spec == self.previous:
            spec = self.previous  # which has its offsets worked out
        padded = self.previous is not None and not spec.fits(self.previous)
        words = Header(key, spec, padded, received).write()
        parts = self._frames(words, tensors, spec) if self.line.framed else self._apart(words, tensors, padded)
        works = [dist.isend(part, self.line.peer, group=group, tag=tag) for part, group, tag in parts]
        self.under_way.append((works, [part for part, _, _ in parts]))
        self.previous = spec

    def _frames(self, words: Tensor, tensors: Sequence[Tensor],
                spec: Spec) -> list[tuple[Tensor, ProcessGroup, int]]:
        """A frame with room for the previous layout, and a second one with the payload if that has another."""
        line, before = self.line, self.previous
        room = before.frame_bytes if before is not None else 0
        frames = [torch.empty(HEADER_BYTES + room, dtype=torch.uint8)]
        frames[0][:HEADER_BYTES].view(torch.int64)[:len(words)] = words
        start = HEADER_BYTES
        if before is None or not spec.fits(before):
            frames.append(torch.empty(spec.frame_bytes, dtype=torch.uint8))
            start = 0
        for place, tensor in zip(spec.places(frames[-1], start), tensors, strict=True):
            place.copy_(tensor.detach())
        return [(frame, line.control, line.tag + i) for i, frame in enumerate(frames) if frame.numel()]

    def _apart(self, words: Tensor, tensors: Sequence[Tensor],
               padded: bool) -> list[tuple[Tensor, ProcessGroup, int]]:
        line, before = self.line, self.previous
        header = torch.zeros(HEADER_LENGTH, dtype=torch.int64)
        header[:len(words)] = words
        parts = [(header, line.control, line.tag)]
        padding = [torch.zeros(t.shape, dtype=t.dtype, device=line.device)
                   for t in (before.tensors if before is not None and padded else ())]
        for tensor in (*padding, *tensors):
            if tensor.numel():
                flat = tensor.detach().contiguous().to(line.device)
                parts.append((flat.view(torch.uint8) if flat.dtype in AS_BYTES else flat, line.payload, line.tag + 1))
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
        _wait(works, self.line, "a message")
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
            header = torch.empty(HEADER_BYTES + room, dtype=torch.uint8)
            words = header if line.framed else header.view(torch.int64)
            self.header = header, dist.irecv(words, line.peer, group=line.control, tag=line.tag)
            self.posted = None if before is None or line.framed else self._post_payload(before)

    def _post_payload(self, spec: Spec) -> tuple[list[Tensor], list[dist.Work]]:
        buffers = [torch.empty(t.shape, dtype=torch.uint8 if t.dtype in AS_BYTES else t.dtype, device=self.line.device)
                   for t in spec.tensors]
        works = [dist.irecv(buffer, self.line.peer, group=self.line.payload, tag=self.line.tag + 1)
                 for buffer in buffers if buffer.numel()]
        return buffers, works

    def land(self) -> Header:
        """Waits for the next expected message and puts it in `early`; posts the one after."""
        self.post()
        assert self.header is not None
        _wait([self.header[1]], self.line, f"the {self.expected[0]}")
        header = Header.read(self.header[0][:HEADER_BYTES].view(torch.int64))
        if header.spec == self.previous:
            header = replace(header, spec=self.previous)  # which has its offsets worked out
        if header.key != self.expected[0]:
            raise MessageError(f"rank {self.line.peer} sent the {header.key} where this rank waits for the "
                               f"{self.expected[0]}: the two ranks run different schedules")
        landed = self._framed(header, self.header[0]) if self.line.framed else self._came_apart(header)
        self.early[self.expected.popleft()] = landed, header.spec
        self.previous, self.header, self.posted = header.spec, None, None
        self.received += 1
        self.post()
        return header

    def _framed(self, header: Header, frame: Tensor) -> list[Tensor]:
        line, spec, start = self.line, header.spec, HEADER_BYTES
        if header.padded or self.previous is None:
            frame, start = torch.empty(spec.frame_bytes, dtype=torch.uint8), 0
            if frame.numel():
                _wait([dist.irecv(frame, line.peer, group=line.control, tag=line.tag + 1)], line, f"the {header.key}")
        return [place.to(line.device) for place in spec.places(frame, start)]

    def _came_apart(self, header: Header) -> list[Tensor]:
        buffers, works = self.posted or self._post_payload(header.spec)
        _wait(works, self.line, f"the {header.key}")
        if header.padded:
            buffers, works = self._post_payload(header.spec)
            _wait(works, self.line, f"the {header.key}")
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
        """Bytes of the largest activation or gradient among the last of each channel."""
        ends = [*self._outboxes.items(), *self._inboxes.items()]
        return max((e.previous.bytes for (name, _), e in ends if e.previous is not None and name[0] != "L"), default=1)

    @property
    def under_way(self) -> int:
        """Messages sent and kept, because the peer is not known to have them."""
        return sum(len(outbox.under_way) for outbox in self._outboxes.values())

    def finish(self) -> None:
        """Waits until every message sent has arrived."""
        for outbox in self._outboxes.values():
            outbox.finish()
