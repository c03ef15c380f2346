"""Messages between pipeline stages: tensors or tuples of tensors of any shape, posted early, waited for late, checked.

A channel is a one-way stream of messages of one kind (activations "F", gradients "B", labels "L") in one direction of the
pipeline from one rank to another. Messages of a channel arrive in the order they were sent; every schedule guarantees that
(the verifier checks it), so a message needs no number of its own, but it carries its key and the receiver compares it.

Each message is a header and a payload. The header (key, shapes, dtypes, which tensors want a gradient) travels between
hosts over gloo, so that reading it never waits for a device. A receive for the payload is posted before the header is here,
for the shapes of the channel's previous message; both sides know those. If the shapes turn out to have changed, the sender
first feeds that receive with padding and sends the payload again, so a change of shape costs one message and needs no
promise from the user. gloo itself accepts wrong shapes and dtypes silently, and aborts the process on longer ones.

gloo moves only CPU memory point to point; payloads on another device are staged through the CPU there, which is how tests
put several ranks on one GPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_ext.config.errors import UserError

HEADER_LENGTH = 256  # int64 words: 2 KB, enough for tuples of 30 tensors with 5 dimensions
_FIXED = 8  # words before the tensors' own
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
           torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)
_KINDS = ("F", "B", "L")


class MessageError(UserError):
    """A message between stages is not the one that the schedule expects, or cannot be sent."""


@dataclass(frozen=True)
class Key:
    """Which message: kind ("F", "B" or "L"), direction, the stage that made it, and the micro-batch."""

    kind: str
    direction: int
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        what = {"F": "activation", "B": "gradient", "L": "labels"}[self.kind]
        return f"{what} of direction {self.direction}, stage {self.stage}, micro-batch {self.micro_batch}"


@dataclass(frozen=True)
class TensorSpec:
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


def _write_header(key: Key, spec: Spec, changed: bool) -> Tensor:
    words = [_KINDS.index(key.kind), key.direction, key.stage, key.micro_batch, int(changed), int(spec.is_tuple),
             len(spec.tensors), 0]
    for t in spec.tensors:
        if t.dtype not in _DTYPES:
            raise MessageError(f"{key}: tensors of dtype {t.dtype} cannot travel between stages")
        words += [_DTYPES.index(t.dtype), int(t.requires_grad), len(t.shape), *t.shape]
    if len(words) > HEADER_LENGTH:
        raise MessageError(f"{key}: {len(spec.tensors)} tensors are too many for one message between stages "
                           f"({len(words)} header words, at most {HEADER_LENGTH})")
    return torch.tensor(words + [0] * (HEADER_LENGTH - len(words)), dtype=torch.int64)


def _read_header(header: Tensor) -> tuple[Key, Spec, bool]:
    words = header.tolist()
    kind, direction, stage, micro_batch, changed, is_tuple, count, _ = words[:_FIXED]
    at, tensors = _FIXED, []
    for _ in range(count):
        dtype, requires_grad, dims = words[at:at + 3]
        tensors.append(TensorSpec(tuple(words[at + 3:at + 3 + dims]), _DTYPES[dtype], bool(requires_grad)))
        at += 3 + dims
    return Key(_KINDS[kind], direction, stage, micro_batch), Spec(tuple(tensors), bool(is_tuple)), bool(changed)


class _Channel:
    """State of one one-way stream, on either end."""

    def __init__(self, peer: int, number: int, payload: ProcessGroup, control: ProcessGroup, device: torch.device):
        self.peer, self.payload, self.control, self.device = peer, payload, control, device
        self.tag = 2 * number  # header; payload is the next one. Only gloo reads tags.
        self.staged = dist.get_backend(payload) == "gloo" and device.type != "cpu"
        self.previous: Spec | None = None
        # Sending end: what is under way, kept alive until the peer has it.
        self.under_way: deque[tuple[Key, list[dist.Work], list[Tensor]]] = deque()
        # Receiving end.
        self.expected: deque[Key] = deque()
        self.header: Tensor | None = None
        self.header_work: dist.Work | None = None
        self.early: tuple[list[Tensor], list[dist.Work]] | None = None

    # -- sending

    def _put(self, tensor: Tensor) -> tuple[dist.Work, Tensor]:
        flat = tensor.detach().contiguous()
        if flat.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            flat = flat.view(torch.uint8)
        if self.staged:
            flat = flat.cpu()
        return dist.isend(flat, self.peer, group=self.payload, tag=self.tag + 1), flat

    def send(self, key: Key, tensors: Sequence[Tensor], is_tuple: bool) -> None:
        spec = Spec.of(tensors, is_tuple)
        changed = self.previous is not None and spec != self.previous
        header = _write_header(key, spec, changed)
        works, alive = [dist.isend(header, self.peer, group=self.control, tag=self.tag)], [header]
        padding = [torch.zeros(t.shape, dtype=t.dtype, device=self.device)
                   for t in self.previous.tensors] if changed and self.previous else []
        for tensor in (*padding, *tensors):
            if tensor.numel():
                work, flat = self._put(tensor)
                works.append(work)
                alive.append(flat)
        self.under_way.append((key, works, alive))
        self.previous = spec

    def release(self, key: Key | None) -> None:
        """Waits for the sends up to `key` (all if None) and lets their tensors go."""
        while self.under_way:
            sent, works, _ = self.under_way.popleft()
            for work in works:
                work.wait()
            if sent == key:
                return

    # -- receiving

    def _get(self, spec: Spec) -> tuple[list[Tensor], list[dist.Work]]:
        tensors, works = [], []
        for t in spec.tensors:
            dtype = torch.uint8 if t.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) else t.dtype
            tensor = torch.empty(t.shape, dtype=dtype, device="cpu" if self.staged else self.device)
            tensors.append(tensor)
            if tensor.numel():
                works.append(dist.irecv(tensor, self.peer, group=self.payload, tag=self.tag + 1))
        return tensors, works

    def post(self) -> None:
        """Posts the receives of the next expected message, if there is one and they are not posted yet."""
        if not self.expected or self.header is not None:
            return
        self.header = torch.empty(HEADER_LENGTH, dtype=torch.int64)
        self.header_work = dist.irecv(self.header, self.peer, group=self.control, tag=self.tag)
        self.early = None if self.previous is None else self._get(self.previous)

    def receive(self, key: Key) -> tuple[list[Tensor], Spec]:
        self.post()
        if not self.expected or self.expected[0] != key:
            raise MessageError(f"rank {self.peer} was to send {key}, but the schedule has "
                               f"{self.expected[0] if self.expected else 'no further message'} next")
        assert self.header is not None and self.header_work is not None
        self.header_work.wait()
        found, spec, changed = _read_header(self.header)
        if found != key:
            raise MessageError(f"rank {self.peer} sent the {found} where this rank waits for the {key}: "
                               "the two ranks run different schedules")
        early, self.header, self.early = self.early, None, None
        if early is not None:
            for work in early[1]:
                work.wait()
        if early is None or changed:
            early = self._get(spec)
            for work in early[1]:
                work.wait()
        self.previous = spec
        self.expected.popleft()
        self.post()
        return [self._landed(tensor, t) for tensor, t in zip(early[0], spec.tensors, strict=True)], spec

    def _landed(self, tensor: Tensor, spec: TensorSpec) -> Tensor:
        tensor = tensor.to(self.device)
        return tensor if tensor.dtype == spec.dtype else tensor.view(spec.dtype)


class Messenger:
    """All channels of this rank.

    Args:
        groups: payload group per channel name (kind and direction, "F0"); on gloo they may all be one.
        control: a gloo group over all ranks, for headers.
        device: where payloads live.
    """

    def __init__(self, groups: dict[str, ProcessGroup], control: ProcessGroup, device: torch.device):
        self.groups, self.control, self.device = groups, control, device
        self._numbers = {name: i for i, name in enumerate(groups)}
        self._channels: dict[tuple[bool, str, int], _Channel] = {}

    def _channel(self, sending: bool, key: Key, peer: int) -> _Channel:
        name = f"{key.kind}{key.direction}"
        where = (sending, name, peer)
        if where not in self._channels:
            self._channels[where] = _Channel(peer, self._numbers[name], self.groups[name], self.control, self.device)
        return self._channels[where]

    def expect(self, messages: Sequence[tuple[Key, int]]) -> None:
        """Announces the messages of a step as (key, source rank), in the order of each channel; posts the first ones."""
        for key, source in messages:
            self._channel(False, key, source).expected.append(key)
        for (sending, _, _), channel in self._channels.items():
            if not sending:
                channel.post()

    def send(self, key: Key, destination: int, value: Tensor | tuple[Tensor, ...]) -> None:
        """Starts sending; returns at once. The tensors must not be written to until `release`."""
        tensors = value if isinstance(value, tuple) else (value,)
        for i, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise MessageError(f"{key}: element {i} is a {type(tensor).__name__}; a stage passes on a tensor or a tuple "
                                   "of tensors")
        self._channel(True, key, destination).send(key, tensors, isinstance(value, tuple))

    def receive(self, key: Key, source: int) -> tuple[list[Tensor], Spec]:
        """Waits for a message; returns its tensors (leaves without gradient) and what the sender said of them.

        Raises:
            MessageError: if the peer sent something else.
        """
        return self._channel(False, key, source).receive(key)

    def release(self, key: Key, destination: int) -> None:
        """Lets go of a sent message (and those before it in its channel) that the peer is known to have."""
        self._channel(True, key, destination).release(key)

    def finish(self) -> None:
        """Waits until every message sent has arrived."""
        for (sending, _, _), channel in self._channels.items():
            if sending:
                channel.release(None)
