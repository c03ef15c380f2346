"""Messages between stages: whatever is sent arrives as it was, is checked, comes early and is let go of early."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import numpy
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.comm.messages import HEADER_LENGTH, Key, MessageError, Spec
from megatron_ext.comm.point_to_point import Messenger
from tests.distributed.pool import WorkerPool

CHANNELS = ("F0", "F1", "B0", "B1", "L0", "L1")
KINDS = [(name[0], int(name[1])) for name in CHANNELS]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
          torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)


def messenger() -> Messenger:
    """With a group of its own, so that nothing a failed exchange leaves under way meets a later one."""
    group = dist.new_group(timeout=timedelta(seconds=10))
    return Messenger(dict.fromkeys(CHANNELS, group), group, torch.device("cpu"))


def other() -> int:
    return 1 - dist.get_rank()


def key(micro_batch: int, kind: str = "F", direction: int = 0) -> Key:
    return Key(kind, direction, 0, micro_batch)


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def check(sent: Any, tensors: list[Tensor], spec: Spec) -> None:
    """What `receive` returned is `sent`."""
    wanted = sent if isinstance(sent, tuple) else (sent,)
    assert spec.is_tuple == isinstance(sent, tuple)
    assert [t.requires_grad for t in spec.tensors] == [t.requires_grad for t in wanted]
    assert len(tensors) == len(wanted)
    for got, want in zip(tensors, wanted, strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert as_bytes(got).equal(as_bytes(want))
        assert got.is_leaf and not got.requires_grad and got.is_contiguous()


def exchange(make: Callable[[], list[list[Any]]]) -> None:
    """Both ranks send each other steps of messages in every channel, and check what they get."""
    link = messenger()
    for step in make():
        messages = [(key(i, kind, direction), value) for kind, direction in KINDS for i, value in enumerate(step)]
        link.expect([(k, other()) for k, _ in messages])
        for k, value in messages:
            link.send(k, other(), value)
        for k, value in messages:
            check(value, *link.receive(k, other()))
        link.finish()
        assert link.under_way == 0


def some(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8).mul_(60).view(dtype)[..., 0] \
        if dtype != torch.bool else torch.rand(shape) < 0.5


def every_kind() -> list[list[Any]]:
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    step = [
        x, x.t(), x[:, ::2], x.reshape(2, 2, 6), torch.randn(()), torch.empty(0, 3), torch.empty(0), (), (x,),
        (x, torch.arange(5), torch.rand(2, 3) < 0.5, torch.empty(3, 0, dtype=torch.bfloat16), x.view(1, 1, 2, 2, 3, 2)),
        (x.clone().requires_grad_(), x, (2 * x.clone().requires_grad_()).relu()), x.clone().requires_grad_(),
        *(some(dtype, 3, 5) for dtype in DTYPES), tuple(some(dtype, 2) for dtype in DTYPES),
        torch.zeros(4, 6).expand(4, 6), torch.full((2,), float("nan")),
    ]
    return [step, step[::-1], step[:3]]


def random_kinds() -> list[list[Any]]:
    """Every message has another layout than the one before, or the same, at random."""
    g = numpy.random.default_rng(7)

    def tensor() -> Tensor:
        shape = tuple(int(n) for n in g.integers(0, 4, g.integers(0, 4)))
        t = some(DTYPES[g.integers(len(DTYPES))], *shape)
        return t.requires_grad_(bool(g.integers(2))) if t.dtype in (torch.float32, torch.bfloat16) else t

    def message() -> Any:
        return tensor() if g.random() < 0.5 else tuple(tensor() for _ in range(g.integers(0, 5)))

    steps = []
    for _ in range(5):
        step = [message() for _ in range(3)]
        steps.append([step[i] for i in g.integers(0, 3, 8)])
    return steps


@pytest.mark.parametrize("make", [every_kind, random_kinds])
def test_everything_arrives_as_it_was(pool2: WorkerPool, make: Callable[[], list[list[Any]]]) -> None:
    pool2.run(exchange, make)


# -- order


def out_of_order() -> None:
    link = messenger()
    values = {key(i): torch.full((i + 1,), float(i)) for i in range(6)}
    link.expect([(k, other()) for k in values])
    for k, value in values.items():
        link.send(k, other(), value)
    for i in (1, 0, 5, 3, 2, 4):
        check(values[key(i)], *link.receive(key(i), other()))
    link.finish()


def test_messages_may_be_taken_in_another_order_than_they_were_sent(pool2: WorkerPool) -> None:
    pool2.run(out_of_order)


def early() -> None:
    """Rank 1 takes the first message and does not ask for the second before rank 0 knows that it has arrived."""
    link = messenger()
    token = torch.zeros(1)
    if dist.get_rank() == 0:
        link.send(key(0), 1, torch.zeros(1000))
        link.send(key(1), 1, torch.ones(1000))
        link.finish()
        dist.send(token, 1)
    else:
        link.expect([(key(0), 0), (key(1), 0)])
        link.receive(key(0), 0)
        dist.recv(token, 0)
        check(torch.ones(1000), *link.receive(key(1), 0))


def test_the_next_receive_is_posted_before_anybody_asks_for_it(pool2: WorkerPool) -> None:
    pool2.run(early)


def sends() -> list[int]:
    """How many tensors go out for each message of a channel."""
    link, counts = messenger(), []
    plain, wanting = torch.zeros(3, 4), torch.zeros(3, 4, requires_grad=True)
    values = [plain, wanting, plain, torch.zeros(5), torch.zeros(5), (torch.zeros(5),)]
    link.expect([(key(i), other()) for i in range(len(values))])
    for i, value in enumerate(values):
        with patch.object(dist, "isend", wraps=dist.isend) as isend:
            link.send(key(i), other(), value)
        counts.append(isend.call_count)
        check(value, *link.receive(key(i), other()))
    link.finish()
    return counts


def test_only_another_layout_costs_another_message(pool2: WorkerPool) -> None:
    """One frame; two where the shape changes, and not where only gradients come and go (evaluation)."""
    assert pool2.run(sends) == [[2, 1, 1, 2, 1, 1]] * 2


# -- errors


def error_of(function: Callable[[], Any]) -> str:
    try:
        function()
    except MessageError as error:
        return str(error)
    return "no error"


def another_key() -> str:
    link = messenger()
    link.expect([(key(3, "B", 1), other())])
    link.send(key(2, "B", 1), other(), torch.zeros(3))
    return error_of(lambda: link.receive(key(3, "B", 1), other()))


def test_another_message_than_expected_is_named_with_the_expected_one(pool2: WorkerPool) -> None:
    assert pool2.run(another_key) == [
        f"rank {1 - rank} sent the gradient of direction 1, stage 0, micro-batch 2 where this rank waits for the "
        "gradient of direction 1, stage 0, micro-batch 3: the two ranks run different schedules" for rank in range(2)]


def not_announced() -> list[str]:
    link = messenger()
    link.expect([(key(0), other())])
    missing = error_of(lambda: link.receive(key(1), other()))
    link.send(key(0), other(), torch.zeros(1))
    link.receive(key(0), other())
    link.finish()
    return [missing, error_of(lambda: link.receive(key(0), other()))]


def test_a_message_that_was_not_announced(pool2: WorkerPool) -> None:
    first, second = pool2.run(not_announced)[0]
    assert "the activation of direction 0, stage 0, micro-batch 1, but" in first
    assert "has the activation of direction 0, stage 0, micro-batch 0 next" in first
    assert "has no further message next" in second


@pytest.mark.parametrize("value, text", [
    ((torch.zeros(1), None), "activation of direction 0, stage 0, micro-batch 4: element 1 is a NoneType; a stage"),
    ([torch.zeros(1)], "element 0 is a list"),
    ({"x": torch.zeros(1)}, "element 0 is a dict"),
    (1.0, "element 0 is a float"),
    (torch.zeros(1, dtype=torch.complex64), "tensors of dtype torch.complex64 cannot travel"),
    (tuple(torch.zeros(1, 1, 1, 1, 1) for _ in range(31)), f"31 tensors are too many .* at most {HEADER_LENGTH}"),
])
def test_what_cannot_be_sent_is_refused_before_anything_is_sent(value: Any, text: str) -> None:
    link = Messenger(dict.fromkeys(CHANNELS), None, torch.device("cpu"))  # type: ignore[arg-type]
    with pytest.raises(MessageError, match=text):
        link.send(key(4), 1, value)


def many() -> None:
    link = messenger()
    value = tuple(torch.full((1, 1, 1, 1, 1), float(i)) for i in range(30))
    link.expect([(key(0), other())])
    link.send(key(0), other(), value)
    check(value, *link.receive(key(0), other()))
    link.finish()


def test_thirty_tensors_of_five_dimensions_fit(pool2: WorkerPool) -> None:
    pool2.run(many)


# -- memory


class Array(numpy.ndarray):
    """An array that can be watched: it lives as long as the storage of the tensor over it."""


def watched(number: int) -> tuple[Tensor, weakref.ref]:
    array = numpy.full(64, float(number), dtype=numpy.float32).view(Array)
    return torch.from_numpy(array), weakref.ref(array)


def ping_pong(replies: bool) -> tuple[int, int, int]:
    """The most messages that rank 0 kept, what was alive before `finish` and after."""
    link, alive, most = messenger(), [], 0
    rounds = 20
    if dist.get_rank() == 0:
        link.expect([(key(i, "B"), 1) for i in range(rounds)] if replies else [])
        for i in range(rounds):
            tensor, ref = watched(i)
            alive.append(ref)
            link.send(key(i), 1, tensor)
            del tensor
            if replies:
                link.receive(key(i, "B"), 1)
            most = max(most, link.under_way)
    else:
        link.expect([(key(i), 0) for i in range(rounds)])
        for i in range(rounds):
            link.receive(key(i), 0)
            if replies:
                link.send(key(i, "B"), 0, torch.zeros(3))
    before = sum(ref() is not None for ref in alive)
    link.finish()
    return most, before, sum(ref() is not None for ref in alive)


def test_what_the_peer_has_is_let_go(pool2: WorkerPool) -> None:
    most, before, after = pool2.run(ping_pong, True)[0]
    assert (most, before, after) == (0, 0, 0)


def test_what_nobody_answered_is_kept_until_the_end(pool2: WorkerPool) -> None:
    """As frames: what was sent is copied into them and need not live."""
    assert pool2.run(ping_pong, False)[0] == (20, 0, 0)
