"""A micro-batch's way through a stage: the numbers of one autograd graph bit for bit, in the order that the docstrings
of stage.py and executor.py promise, keeping no more than they say. One process; layers and communication are those of
fake_layers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_ext.layers.phases import Passage, Phase, whole
from megatron_ext.pipeline import executor
from megatron_ext.pipeline.instructions import Compute, Pair, Plan
from megatron_ext.pipeline.random import RandomKey
from megatron_ext.pipeline.stage import StageLayer, StageRun
from megatron_ext.pipeline.weight_gradients import WeightGradients
from tests.pipeline.fake_layers import Block, Fake, H, Log, Plain, Scatter, T, Tuples, Twice

KEY = RandomKey(seed=3, step=1, micro_batch=0)
WAIT = "|"


def drive(steps: Generator[None, None, Any], log: list[str] | None = None) -> Any:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
        if log is not None:
            log.append(WAIT)


def stage(modules: Sequence[Any]) -> list[StageLayer]:
    return [StageLayer(module.phases(), number) for number, module in enumerate(modules)]


def tensors(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, tuple) else [value]


Found = tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]
"""Outputs, gradients of the inputs, gradients of the parameters."""


def douts(outputs: Sequence[Tensor]) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda t: torch.randn(t.shape, generator=generator, dtype=t.dtype)  # noqa: E731
    return [draw(t) if t.requires_grad else None for t in outputs]


def in_one_graph(modules: Sequence[nn.Module], x: Any) -> Found:
    value = tuple(t.detach().requires_grad_(t.requires_grad) for t in x) if isinstance(x, tuple) else x.detach()
    value = value.requires_grad_(x.requires_grad) if isinstance(value, Tensor) else value
    y = value
    for number, module in enumerate(modules):
        module.zero_grad()
        y = whole(module.phases(), y, lambda phase, number=number: KEY.seed_layer(number, phase.number))
    outputs = tensors(y)
    learning = [(t, d) for t, d in zip(outputs, douts(outputs), strict=True) if d is not None]
    torch.autograd.backward(*map(list, zip(*learning, strict=True)))
    return ([t.detach() for t in outputs], [t.grad for t in tensors(value)],
            [p.grad for module in modules for p in module.parameters()])


def in_phases(modules: Sequence[nn.Module], x: Any, recompute: Sequence[str] = ()) -> Found:
    for module in modules:
        module.zero_grad()
    run = StageRun(stage(modules), KEY, True, recompute)
    outputs = tensors(drive(run.forward(x)))
    gradients = douts(outputs)
    found = drive(run.backward(gradients, torch.autograd.backward))
    return ([t.detach() for t in outputs], found, [p.grad for module in modules for p in module.parameters()])


def same(found: Found, expected: Found) -> None:
    for kind, a, b in zip(("outputs", "inputs", "parameters"), found, expected, strict=True):
        assert len(a) == len(b), kind
        for index, (one, other) in enumerate(zip(a, b, strict=True)):
            assert (one is None) == (other is None), (kind, index)
            assert one is None or one.equal(other), (kind, index)


def rows(learn: bool = True) -> Tensor:
    return torch.randn(T, H, dtype=torch.float64).requires_grad_(learn)


STAGES: dict[str, tuple[Callable[[], list[nn.Module]], Callable[[], Any]]] = {
    "experts in two groups": (lambda: [Block()], rows),
    "experts in one group": (lambda: [Block(groups=1)], rows),
    "a plain layer": (lambda: [Plain()], rows),
    "mixed": (lambda: [Plain(), Block(), Plain(), Block(groups=1), Plain()], rows),
    "tuples": (lambda: [Tuples(), Tuples()], lambda: (rows(), torch.arange(T), rows())),
    "a tuple with a frozen part": (lambda: [Tuples()], lambda: (rows(), torch.arange(T), rows(False))),
    "read twice": (lambda: [Twice(), Plain(), Twice()], rows),
    "frozen input": (lambda: [Block(), Plain()], lambda: rows(False)),
    "frozen layers first": (lambda: [Plain().requires_grad_(False), Block().requires_grad_(False), Block()],
                            lambda: rows(False)),
    "frozen layers": (lambda: [Plain(), Block().requires_grad_(False), Twice().requires_grad_(False)], rows),
}


@pytest.mark.parametrize("recompute", [(), ("attention",), ("mlp",), ("attention", "mlp", "sum", "layers")], ids=str)
@pytest.mark.parametrize("name", STAGES)
def test_equals_one_autograd_graph_bit_for_bit(name: str, recompute: tuple[str, ...]) -> None:
    make, inputs = STAGES[name]
    modules, x = make(), inputs()
    expected = in_one_graph(modules, x)
    assert any(d is not None and d.any() for d in expected[2])
    same(in_phases(modules, x, recompute), expected)


def test_the_comparison_would_notice_other_random_numbers() -> None:
    modules, x = [Plain(), Block()], rows()
    expected = in_one_graph(modules, x)
    with pytest.raises(AssertionError):
        same(in_phases(modules[::-1], x), expected)


class Ignoring(Block):
    """Its loss does not depend on the experts."""

    def _sum(self, passage: Passage, residual: Tensor, mixed: Tensor, shared: Tensor) -> Tensor:
        return self.mark(residual * shared, passage, "sum")


def test_what_nobody_used_has_gradients_of_zero_and_travels_all_the_same() -> None:
    """For the other ranks wait for it."""
    log = Log()
    modules, x = [Plain(), Ignoring(log)], rows()
    expected = in_one_graph(modules, x)
    log.clear()
    outputs, dx, parameters = in_phases(modules, x)
    assert [e for e in log if "start" in e] == of(0, ["scatter start F", "gather start F", "gather start B",
                                                      "scatter start B"])
    zeros = [torch.zeros_like(a) if b is None and a is not None else b for a, b in zip(parameters, expected[2],
                                                                                       strict=True)]
    same((outputs, dx, parameters), (*expected[:2], zeros))


# -- order of one alone

FORWARD = {
    1: ["attention F", "scatter start F", "shared F", WAIT, "scatter F.0", "mlp.0 F", "gather start F", WAIT,
        "gather F.0", "sum F"],
    2: ["attention F", "scatter start F", "shared F", WAIT, "scatter F.0", "mlp.0 F", "scatter F.1", "mlp.1 F",
        "gather start F", WAIT, "gather F.0", "sum F"]}
BACKWARD = {
    1: ["sum I", "gather start B", "shared I", "fill", WAIT, "gather B.0", "mlp.0 I", "scatter start B", "fill", WAIT,
        "scatter B.0", "attention I"],
    2: ["sum I", "gather start B", "shared I", "fill", WAIT, "gather B.0", "mlp.0 I", "gather B.1", "mlp.1 I",
        "scatter start B", "fill", WAIT, "scatter B.0", "attention I"]}
RECOMPUTED = ["sum I", "gather start B", "shared F", "shared I", "mlp.0 F", "fill", WAIT, "gather B.0", "mlp.0 I",
              "mlp.1 F", "gather B.1", "mlp.1 I", "scatter start B", "attention F", "fill", WAIT, "scatter B.0",
              "attention I"]
"""A phase runs again before it waits for its gradient."""


def of(micro_batch: int, events: Sequence[str], *own: str) -> list[str]:
    return [e if e == WAIT or e in own else f"{micro_batch} {e}" for e in events]


def orders(blocks: list[Block], log: Log, recompute: tuple[str, ...] = ()) -> tuple[list[str], list[str]]:
    run = StageRun(stage(blocks), KEY, True, recompute)
    y = drive(run.forward(rows()), log)
    forward = list(log)
    log.clear()
    drive(run.backward([torch.ones_like(y)], torch.autograd.backward, lambda: log.append("fill")), log)
    return forward, list(log)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("count", [1, 2])
def test_exchanges_start_early_and_finish_late(groups: int, count: int) -> None:
    log = Log()
    forward, backward = orders([Block(log, groups) for _ in range(count)], log)
    assert forward == of(0, FORWARD[groups]) * count
    assert backward == of(0, BACKWARD[groups], "fill") * count


def test_a_phase_runs_again_before_it_waits_for_its_gradient() -> None:
    log = Log()
    forward, backward = orders([Block(log)], log, ("attention", "mlp"))
    assert forward == of(0, FORWARD[2])
    assert backward == of(0, RECOMPUTED, "fill")


def test_nobody_waits_for_who_takes_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fake, "parallel", False)
    log = Log()
    block = Block(log)
    assert not StageLayer(block.phases()).exchanges
    forward, backward = orders([block], log)
    assert forward == of(0, [e for e in FORWARD[2] if e != WAIT])
    assert backward == of(0, [e for e in BACKWARD[2] if e not in (WAIT, "fill")])


def compute(*names: str) -> Phase:
    """"a b > c": reads a and b, writes c."""
    reads, writes = (tuple(side.split()) for side in " ".join(names).split(">"))
    return Phase("mlp", reads, writes, lambda *_: None)


GRAPHS: dict[str, tuple[list[Any], list[int]]] = {
    "dense": ([compute("x > r"), compute("r > x")], [1, 0]),
    "one group": (Block(groups=1).phases(), [5, 4, 2, 3, 1, 0]),
    "two groups": (Block().phases(), [6, 5, 2, 3, 4, 1, 0]),
    "without shared experts": ([p for p in Block().phases() if "shared" not in getattr(p, "writes", ())],
                               [5, 4, 2, 3, 1, 0]),
    "nothing to wait for": (Twice().phases(), [3, 2, 1, 0]),
    # What needs no exchange comes before what must wait for one, but never before who reads what it wrote.
    "two behind the exchange": ([compute("x > tokens weights order"), Scatter(Log(), 1), compute("tokens > s"),
                                 compute("s > t"), compute("rows.0 row_weights.0 t > x")], [4, 3, 2, 1, 0]),
    "free before waiting": ([compute("x > free"), compute("x > tokens weights order"), Scatter(Log(), 1),
                             compute("rows.0 row_weights.0 free > x")], [3, 2, 0, 1]),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_backward_order(name: str) -> None:
    phases, order = GRAPHS[name]
    assert StageLayer(phases).backward_order == order


# -- order of pairs, by the executor


def trained(log: Log, forward: int, backward: int, kind: str = "B", groups: int = 2, overlap: bool = True,
            recompute: tuple[str, ...] = ()) -> tuple[list[str], list[Tensor]]:
    """Trains on two micro-batches, with a pair of the forward of 1 through the first of two stages, which has as many
    blocks as `forward`, and the backward of 0 through the second.

    Returns:
        What happened within the pair; losses and gradients of the step.
    """
    torch.manual_seed(0)
    stages = [[Block(log, groups, torch.float32) for _ in range(count)] for count in (forward, backward)]
    layers = [[*stage(blocks), StageLayer([Phase("plain", ("x",), ("x",), lambda _, x: x + 0)])] for blocks in stages]
    module: Any = SimpleNamespace(
        topology=SimpleNamespace(replica=lambda rank: 0, shard=lambda direction, replica: 0, data_parallel_size=1),
        groups=SimpleNamespace(rank=0), base_seed=0, stage_rank=0, loss_fn=lambda y, labels: (y * labels).sum(),
        stage_layers=lambda s: layers[s], overlaps=lambda s: any(layer.exchanges for layer in layers[s]),
        paired_step=lambda s: None)
    messenger: Any = SimpleNamespace(expect=lambda keys: None, finish=lambda: None)
    parameters = [p for blocks in stages for block in blocks for p in block.parameters()]
    weights = WeightGradients(parameters)
    weights.begin()
    pair = Pair(Compute("F", 0, 0, 1), Compute(kind, 0, 1, 0))
    rest = [Compute("W", 0, 1, 0)] if kind == "I" else []
    program = [Compute("F", 0, 0, 0), Compute("F", 0, 1, 0), pair, *rest, Compute("B", 0, 0, 0),
               Compute("F", 0, 1, 1), Compute("B", 0, 1, 1), Compute("B", 0, 0, 1)]
    plan = Plan("by hand", 1, 2, [[0, 0]], [program])
    runs = executor.Executor(module, messenger, weights, torch.device("cpu"), overlap=overlap, recompute=recompute)
    within: list[str] = []
    run_parts = executor._Run._run_parts

    def noted(self: Any, instruction: Any, ready: Any) -> None:
        log.clear()
        run_parts(self, instruction, ready)
        if instruction is pair:
            within.extend(log)

    executor._Run._run_parts = noted
    try:
        data = ((torch.randn(T, H, generator=torch.Generator().manual_seed(k)).requires_grad_(), torch.randn(T, H))
                for k in range(2))
        outcome = runs.run(plan, {0: data}, 0)
    finally:
        executor._Run._run_parts = run_parts
    return within, [*outcome.losses, *(p.main_grad for p in weights.parameters)]


def words(text: str) -> list[str]:
    return [word.strip() for part in text.strip().splitlines() for word in part.split(",") if word.strip()]


# In the order of the picture in executor.py, with the exchanges: 1 is forward, 0 backward.
PAIR = words("""
    0 sum I, 0 gather start B, 0 shared I, 0 shared W,
    1 attention F, 1 scatter start F, 1 shared F,
    0 gather B.0, 0 mlp.0 I, 0 gather B.1, 0 mlp.1 I, 0 scatter start B, 0 mlp.0 W, 0 mlp.1 W,
    1 scatter F.0, 1 mlp.0 F, 1 scatter F.1, 1 mlp.1 F, 1 gather start F,
    0 scatter B.0, 0 attention I, 0 sum I, 0 gather start B, 0 shared I, 0 attention W, 0 shared W,
    1 gather F.0, 1 sum F, 1 attention F, 1 scatter start F, 1 shared F,
    0 gather B.0, 0 mlp.0 I, 0 gather B.1, 0 mlp.1 I, 0 scatter start B, 0 mlp.0 W, 0 mlp.1 W,
    1 scatter F.0, 1 mlp.0 F, 1 scatter F.1, 1 mlp.1 F, 1 gather start F,
    0 scatter B.0, 0 attention I, 0 attention W,
    1 gather F.0, 1 sum F""")


def but_advance(events: Sequence[str]) -> list[str]:
    return [e for e in events if not e.endswith("advance")]


def test_a_pair_takes_turns_as_documented() -> None:
    assert but_advance(trained(Log(), 2, 2)[0]) == PAIR


def test_what_is_never_ready_is_never_waited_for_in_a_turn() -> None:
    """Whatever is waited for, the other micro-batch has computed something since it started, while it lasts."""
    events = but_advance(trained(Log(), 2, 2)[0])
    for micro_batch, other in (("0", "1"), ("1", "0")):
        for exchange, way in (("scatter", "F"), ("gather", "F"), ("scatter", "B"), ("gather", "B")):
            starts = [i for i, e in enumerate(events) if e == f"{micro_batch} {exchange} start {way}"]
            ends = [i for i, e in enumerate(events) if e == f"{micro_batch} {exchange} {way}.0"]
            for start, end in zip(starts, ends, strict=True):
                assert any(e[0] == other and e[-1] in "FIW" and "start" not in e for e in events[start:end])


def test_an_input_gradient_leaves_its_weights_for_later() -> None:
    assert but_advance(trained(Log(), 2, 2, kind="I")[0]) == [e for e in PAIR if not e.endswith("W")]


MORE_FORWARD = words("""
    0 sum I, 0 gather start B, 0 shared I, 0 shared W,
    1 attention F, 1 scatter start F, 1 shared F,
    0 gather B.0, 0 mlp.0 I, 0 scatter start B, 0 mlp.0 W,
    1 scatter F.0, 1 mlp.0 F, 1 gather start F,
    0 scatter B.0, 0 attention I, 0 attention W,
    1 gather F.0, 1 sum F""") + of(1, [e for e in FORWARD[1] * 2 if e != WAIT])
MORE_BACKWARD = words("""
    0 sum I, 0 gather start B, 0 shared I, 0 shared W,
    1 attention F, 1 scatter start F, 1 shared F,
    0 gather B.0, 0 mlp.0 I, 0 scatter start B, 0 mlp.0 W,
    1 scatter F.0, 1 mlp.0 F, 1 gather start F,
    0 scatter B.0, 0 attention I, 0 sum I, 0 gather start B, 0 shared I, 0 attention W, 0 shared W,
    1 gather F.0, 1 sum F,
    0 gather B.0, 0 mlp.0 I, 0 scatter start B, 0 mlp.0 W,
    0 scatter B.0, 0 attention I, 0 sum I, 0 gather start B, 0 shared I, 0 attention W, 0 shared W,
    0 gather B.0, 0 mlp.0 I, 0 scatter start B, 0 mlp.0 W,
    0 scatter B.0, 0 attention I, 0 attention W""")
ALONE = words("""
    0 sum I, 0 gather start B, 0 shared I, 0 shared W, 0 gather B.0, 0 mlp.0 I, 0 scatter start B, 0 mlp.0 W,
    0 scatter B.0, 0 attention I, 0 attention W""")


@pytest.mark.parametrize("forward, backward, expected", [
    (3, 1, MORE_FORWARD), (1, 3, MORE_BACKWARD), (0, 1, ALONE),
    (1, 0, of(1, [e for e in FORWARD[1] if e != WAIT])), (0, 0, [])],
    ids=["more forward", "more backward", "no forward", "no backward", "none"])
def test_unequal_numbers_of_blocks(forward: int, backward: int, expected: list[str]) -> None:
    """What is left of the longer one runs alone."""
    assert but_advance(trained(Log(), forward, backward, groups=1)[0]) == expected


@pytest.mark.parametrize("kind", ["B", "I"])
@pytest.mark.parametrize("forward, backward", [(2, 2), (3, 1), (1, 3), (0, 2), (2, 0)])
def test_turns_change_no_number(forward: int, backward: int, kind: str) -> None:
    plain, *others = (trained(Log(), forward, backward, kind, overlap=overlap, recompute=recompute)[1]
                      for overlap, recompute in ((False, ()), (True, ()), (True, ("attention", "mlp"))))
    assert any(p.any() for p in plain[2:])
    for numbers in others:
        assert all(a.equal(b) for a, b in zip(numbers, plain, strict=True))


def test_without_overlap_one_runs_after_the_other_and_nothing_fills_a_wait() -> None:
    events, _ = trained(Log(), 1, 1, groups=1, overlap=False)
    backward = [e for e in BACKWARD[1] if e not in (WAIT, "fill")]
    for name in ("shared", "mlp.0", "attention"):
        backward.insert(backward.index(f"{name} I") + 1, f"{name} W")  # with its input gradient, in no wait
    assert events == of(1, [e for e in FORWARD[1] if e != WAIT]) + of(0, backward)


def test_advance_reaches_what_is_under_way_where_the_other_has_computed() -> None:
    """After every turn, the other's; and in a wait of the backward, around its weight gradients, both."""
    assert trained(Log(), 1, 1, groups=1)[0] == words("""
        0 sum I, 0 gather start B, 0 shared I, 0 shared W, 0 gather advance,
        1 attention F, 1 scatter start F, 1 shared F, 0 gather advance,
        0 gather B.0, 0 mlp.0 I, 0 scatter start B, 1 scatter advance, 0 mlp.0 W, 0 scatter advance, 1 scatter advance,
        1 scatter F.0, 1 mlp.0 F, 1 gather start F, 0 scatter advance,
        0 scatter B.0, 0 attention I, 0 attention W,
        1 gather F.0, 1 sum F""")


def test_advance_of_a_run_alone() -> None:
    """Each exchange once, however many of its groups are still to come; none before the start or after the end."""
    log = Log()
    run = StageRun(stage([Block(log)]), KEY, True)
    run.advance()
    steps = run.forward(rows())
    assert log == []
    for expected in (["0 scatter advance"], ["0 gather advance"]):
        next(steps)
        log.clear()
        run.advance()
        assert log == expected
    y = drive(steps)
    log.clear()
    run.advance()
    steps = run.backward([torch.ones_like(y)], torch.autograd.backward)
    assert log == []
    for expected in (["0 gather advance"], ["0 scatter advance"]):
        next(steps)
        log.clear()
        run.advance()
        assert log == expected
    drive(steps)
    log.clear()
    run.advance()
    assert log == []


# -- what is kept


@pytest.mark.parametrize("recompute, kept", [
    ((), {"tokens", "gate", "inside shared", "inside mlp", "results"}),
    (("attention",), {"tokens", "inside shared", "inside mlp", "results"}),
    (("mlp",), {"tokens", "gate"}),
    (("attention", "mlp"), {"tokens"})], ids=str)
def test_recomputed_phases_keep_their_inputs_only(recompute: tuple[str, ...], kept: set[str]) -> None:
    """tokens are an input of the shared experts; results are kept for gather only where no phase makes them again."""
    block = Block()
    run = StageRun(stage([block]), KEY, True, recompute)
    drive(run.forward(rows()))
    assert block.alive() == kept
    assert block.graphs == ["mlp" not in recompute] * 2
    drive(run.backward([torch.ones(T, H, dtype=torch.float64)], torch.autograd.backward))
    assert block.graphs[2:] == [True] * 2 * ("mlp" in recompute)
    assert block.alive() == set(), "nothing is left after the backward"


@pytest.mark.parametrize("training", [True, False])
def test_what_no_later_phase_reads_is_let_go_at_once(training: bool) -> None:
    """Not when the layer ends, nor after backward: rows and results of experts are the largest tensors there are."""
    alive: dict[str, StorageWeakRef] = {}

    def last(_: Passage, x: Tensor) -> Tensor:
        assert alive["a"].expired() and not alive["b"].expired()
        return x + 1

    def noted(name: str) -> Callable[..., Tensor]:
        def call(_: Passage, x: Tensor) -> Tensor:
            alive[name] = StorageWeakRef((y := x + 1).untyped_storage())
            return y
        return call

    phases = [Phase("attention", ("x",), ("a",), noted("a")), Phase("mlp", ("a",), ("b",), noted("b")),
              Phase("sum", ("b",), ("x",), last)]
    run = StageRun([StageLayer(phases, 0)], KEY, training)
    y = drive(run.forward(rows()))
    assert alive["b"].expired(), "nothing that was added up is needed again"
    if training:
        assert drive(run.backward([torch.ones_like(y)], torch.autograd.backward))[0].equal(torch.ones_like(y))


def test_evaluation_keeps_nothing() -> None:
    counted: list[bool] = []
    block = Block()
    run = StageRun(stage([block, Plain()]), KEY, False, (), counted.append)
    y = drive(run.forward(rows()))
    assert not y.requires_grad and y.grad_fn is None
    assert block.kept and block.alive() == set()
    assert run._here is None and run._passed == []
    assert counted == []
    assert drive(run.backward([None], torch.autograd.backward)) == [None], "there is nothing to go back through"


def test_evaluation_computes_what_training_does() -> None:
    modules, x = [Block(), Plain()], rows()
    assert drive(StageRun(stage(modules), KEY, False).forward(x)).equal(in_one_graph(modules, x)[0][0])


# -- counting


@pytest.mark.parametrize("recompute, again", [
    ((), 0), (("attention",), 1), (("mlp",), 3), (("attention", "mlp", "sum"), 5)], ids=str)
def test_counting_is_on_exactly_around_forwards_of_training(recompute: tuple[str, ...], again: int) -> None:
    log = Log()
    block = Block(log)
    run = StageRun(stage([block]), KEY, True, recompute, lambda on: log.append("on" if on else "off"))
    y = drive(run.forward(rows()))
    phases = [f"0 {name} F" for name in ("attention", "shared", "mlp.0", "mlp.1", "sum")]
    seen = [e for e in log if e in ("on", "off", *phases)]
    assert seen == [e for phase in phases for e in ("on", phase, "off")]
    log.clear()
    drive(run.backward([torch.ones_like(y)], torch.autograd.backward))
    assert "on" not in log
    assert len([e for e in log if e in phases]) == again


def test_counting_is_off_again_after_a_phase_that_fails() -> None:
    states: list[bool] = []

    def fail(_: Passage, x: Tensor) -> Tensor:
        raise RuntimeError("no")

    run = StageRun([StageLayer([Phase("mlp", ("x",), ("x",), fail)])], KEY, True, (), states.append)
    with pytest.raises(RuntimeError, match="no"):
        drive(run.forward(rows()))
    assert states == [True, False]
