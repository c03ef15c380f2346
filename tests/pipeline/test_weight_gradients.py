"""The split of a backward into I and W: the same sums as in one piece, a queue of operands, and everybody's hooks."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

from megatron_ext.layers.linear import Linear, split_linears
from megatron_ext.pipeline.weight_gradients import WeightGradients, hooked_parameters

KEYS = [(0, 0, 0), (0, 0, 1), (1, 3, 0)]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4, bias=False))
    split_linears(layers)
    return layers


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(3, 5, 6).to(dtype).requires_grad_() for _ in KEYS]


def loss_of(output: Tensor) -> Tensor:
    return output.float().square().mean()


def run(weights: WeightGradients, module: Callable[[Tensor], Tensor], xs: Sequence[Tensor], split: bool = True) -> None:
    """One step over KEYS; split: every I before the first W."""
    weights.begin()
    for key, x in zip(KEYS, xs, strict=True):
        weights.backward([get_gradient_edge(loss_of(module(x)))], [None], key if split else None)
    assert weights.waiting == (sorted(KEYS) if split else [])
    for key in KEYS if split else ():
        weights.take(key)
    assert weights.waiting == []


def check_against_autograd(weights: WeightGradients, module: nn.Module, xs: Sequence[Tensor]) -> None:
    """`main_grad` and the gradients of the inputs are what autograd alone gives."""
    found = [(p, p.main_grad.clone()) for p in weights.parameters] + [(x, x.grad) for x in xs]
    module.zero_grad()
    for x in xs:
        x.grad = None
        loss_of(module(x)).backward()
    for leaf, grad in found:
        torch.testing.assert_close(grad, torch.zeros_like(grad) if leaf.grad is None else leaf.grad)
    module.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_split_is_the_whole_bit_for_bit(dtype: torch.dtype) -> None:
    layers = model().to(dtype)
    weights = WeightGradients(layers.parameters())
    found = []
    for split in (False, True):
        xs = inputs(dtype)
        run(weights, layers, xs, split)
        found.append([*(p.main_grad.clone() for p in weights.parameters), *(x.grad for x in xs)])
    assert all(whole.abs().max() > 0 and whole.equal(apart) for whole, apart in zip(*found, strict=True))
    assert {p.main_grad.dtype for p in weights.parameters} == {torch.float32}
    if dtype == torch.float32:
        check_against_autograd(weights, layers, xs)


def test_w_comes_in_any_order_and_only_of_what_was_deferred() -> None:
    layers = model()
    weights = WeightGradients(layers.parameters())
    weight = layers[0].weight
    weights.begin()
    for key, x in zip(KEYS, inputs(), strict=True):
        weights.backward([get_gradient_edge(loss_of(layers(x)))], [None], key)
    assert not weight.main_grad.any()
    weights.take(KEYS[2])
    one = weight.main_grad.clone()
    assert one.any()
    weights.take(KEYS[0])
    assert not weight.main_grad.equal(one)
    assert weights.waiting == [KEYS[1]]
    with pytest.raises(KeyError):
        weights.take(KEYS[0])


def storages() -> dict[int, int]:
    """Bytes of the storages that Python objects hold, by address."""
    gc.collect()
    # The tracer's fakes, which tests of torch.compile leave behind, have no storage.
    found = [o for o in gc.get_objects() if issubclass(type(o), Tensor) and not issubclass(type(o), FakeTensor)]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}


def test_the_queue_holds_operands_and_nothing_of_a_parameters_size() -> None:
    layer = Linear(512, 512)
    weights = WeightGradients(layer.parameters())
    weights.begin()
    before = storages()

    def more() -> int:
        return sum(size for address, size in storages().items() if address not in before)

    for key in KEYS:
        x = torch.randn(4, 512, requires_grad=True)
        weights.backward([get_gradient_edge(layer(x))], [torch.randn(4, 512)], key)
    del x
    operand = 4 * 512 * 4
    assert more() == len(KEYS) * 2 * operand, "x and dy of each, no copies of them"
    for key in KEYS:
        weights.take(key)
    assert more() == 0


def test_w_runs_without_a_graph() -> None:
    layer = Linear(6, 4)
    weights = WeightGradients(layer.parameters())
    x = torch.randn(2, 6, requires_grad=True)
    for defer in (KEYS[0], None):
        weights.begin()
        weights.backward([get_gradient_edge(loss_of(layer(x)))], [None], defer)
        if defer:
            weights.take(defer)
        assert layer.weight.main_grad.any()
        assert not layer.weight.main_grad.requires_grad
        assert layer.weight.grad is None


@pytest.mark.parametrize("sunk", [True, False])
def test_gradients_of_bf16_parameters_add_up_in_fp32(sunk: bool) -> None:
    """A thousand times 2^-9 after a 1: in BF16 the sum would stay at 1."""
    weight = nn.Parameter(torch.zeros(1, 1, dtype=torch.bfloat16))
    layer = (lambda x: torch.matmul(x, weight)) if not sunk else Linear(1, 1, bias=False).bfloat16()
    weights = WeightGradients([weight] if not sunk else layer.parameters())
    weights.begin()
    for i in range(1001):
        x = torch.full((1, 1), 2.0**-9 if i else 1.0, dtype=torch.bfloat16)
        weights.backward([get_gradient_edge(layer(x).sum())], [None], None)
    assert weights.parameters[0].main_grad.item() == 1 + 1000 * 2.0**-9


# -- hooks of the user


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["tensor", "post_accumulate"])
def test_hooks_fire_for_every_micro_batch_and_such_parameters_are_not_split(when: str, kind: str) -> None:
    layers = model()
    weight = layers[0].weight
    seen: list[Tensor] = []

    def hook(value: Tensor) -> None:
        seen.append((value if kind == "tensor" else value.grad).clone())

    def register() -> None:
        weight.register_hook(hook) if kind == "tensor" else weight.register_post_accumulate_grad_hook(hook)

    if when == "before":
        register()
    hooked = hooked_parameters(layers)
    layers[3].weight.register_post_accumulate_grad_hook(lambda p: None)  # one of DeepSpeed's: it has no say
    weights = WeightGradients(layers.parameters(), hooked)
    if when == "after":
        run(weights, layers, inputs())
        assert weight not in weights.whole
        register()
    xs = inputs()
    run(weights, layers, xs)
    assert len(seen) == len(KEYS)
    torch.testing.assert_close(sum(seen), weight.main_grad)
    assert weights.whole == {weight, *layers[1].parameters()}
    check_against_autograd(weights, layers, xs)


def test_a_hook_that_changes_the_gradient_is_heard() -> None:
    layers = model()
    weights = WeightGradients(layers.parameters())
    run(weights, layers, inputs())
    before = layers[3].weight.main_grad.clone()
    handle = layers[3].weight.register_hook(lambda grad: 2 * grad)
    run(weights, layers, inputs())
    torch.testing.assert_close(layers[3].weight.main_grad, 2 * before)
    handle.remove()
    run(weights, layers, inputs())
    torch.testing.assert_close(layers[3].weight.main_grad, before)


def test_hooks_on_modules_see_what_they_always_see() -> None:
    layers = model()
    seen: list[Tensor] = []
    layers[3].register_full_backward_hook(lambda module, dx, dy: seen.append(dy[0]))
    xs = inputs()
    weights = WeightGradients(layers.parameters())
    run(weights, layers, xs)
    assert len(seen) == len(KEYS)
    assert layers[3].weight not in weights.whole
    check_against_autograd(weights, layers, xs)


# -- parameters that are special


class Special(nn.Module):
    """A shared, a frozen and an unused matrix, and one that a matrix product and something else use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Linear(6, 6), Linear(6, 6)
        self.second.weight = self.first.weight
        self.frozen, self.unused = Linear(6, 6), Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.both = Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.frozen(self.second(self.first(x)).tanh())
        return self.both(y) + F.embedding(torch.arange(5), self.both.weight)


def test_shared_frozen_unused_and_doubly_used_parameters() -> None:
    module, xs = Special(), inputs()
    weights = WeightGradients(module.parameters())
    run(weights, module, xs)
    assert len(weights.parameters) == 6
    assert not module.unused.weight.main_grad.any()
    assert not hasattr(module.frozen.weight, "main_grad")
    check_against_autograd(weights, module, xs)


def test_a_stage_without_gradients() -> None:
    layer = Linear(6, 4).requires_grad_(False)
    weights = WeightGradients(layer.parameters())
    weights.begin()
    weights.backward([], [], KEYS[0])
    weights.take(KEYS[0])
    assert weights.parameters == [] and weights.waiting == []


def test_a_step_that_failed_leaves_nothing_to_the_next() -> None:
    layers, xs = model(), inputs()
    weights = WeightGradients(layers.parameters())
    weights.begin()
    weights.backward([get_gradient_edge(loss_of(layers(xs[0])))], [None], KEYS[1])

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, dy: Tensor) -> Tensor:
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        weights.backward([get_gradient_edge(loss_of(layers(Fails.apply(xs[1]))))], [None], KEYS[2])
    assert all(p.weight_grad_sink is None for p in weights.parameters)
    xs = inputs()
    run(weights, layers, xs)
    check_against_autograd(weights, layers, xs)


# -- what layers may do


class Penalty(nn.Module):
    """A layer that differentiates itself in its forward, as gradient penalties and force fields do."""

    def __init__(self, create_graph: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.create_graph = Linear(6, 6), create_graph

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).tanh()
        force, = torch.autograd.grad(y.sum(), x, create_graph=self.create_graph, retain_graph=True)
        return y + force


@pytest.mark.parametrize("create_graph", [True, False])
def test_a_gradient_taken_in_the_forward_stays_there(create_graph: bool) -> None:
    module, xs = Penalty(create_graph), inputs()
    weights = WeightGradients(module.parameters())
    run(weights, module, xs)
    check_against_autograd(weights, module, xs)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation(reentrant: bool) -> None:
    layers, xs = model(), inputs()
    weights = WeightGradients(layers.parameters())
    run(weights, lambda x: checkpoint(layers, x, use_reentrant=reentrant), xs)
    assert weights.whole == set(layers[1].parameters())
    check_against_autograd(weights, layers, xs)


def test_linears_that_are_not_plain_are_left_alone() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    torch.manual_seed(0)
    layers = nn.Sequential(Own(6, 6), nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 6))
    classes = [type(layer) for layer in layers]
    split_linears(layers)
    assert [type(layer) for layer in layers] == [*classes[:2], Linear]
    weights, xs = WeightGradients(layers.parameters()), inputs()
    run(weights, layers, xs)
    assert set(weights.parameters) - weights.whole == set(layers[2].parameters())
    check_against_autograd(weights, layers, xs)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_is_computed_by_a_forward_hook() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 6))
    split_linears(layers)
    weights, xs = WeightGradients(layers.parameters()), inputs()
    run(weights, layers, xs)
    assert {layers[0].weight_g, layers[0].weight_v} <= weights.whole
    check_against_autograd(weights, layers, xs)


def test_autocast() -> None:
    """torch chooses the dtypes; what it computes is what it computes without us."""
    layers, xs = model(), inputs()
    weights = WeightGradients(layers.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert layers[0](xs[0]).dtype == torch.bfloat16
        run(weights, layers, xs)
    assert layers[0].weight in weights.whole
    found = [p.main_grad.clone() for p in weights.parameters]
    theirs = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4, bias=False))
    theirs.load_state_dict(layers.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        for x in xs:
            loss_of(theirs(x)).backward()
    for grad, p in zip(found, theirs.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-6, atol=1e-7)
