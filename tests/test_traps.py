"""Traps that users of other systems have fallen into, by their numbers in shared/facts/traps.md: those of expert
parallelism in phases. One test each; above it, where else it is tested, and what by."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext import fp8
from megatron_ext.comm.dispatch import Dispatcher, Transit, dispatch
from megatron_ext.fp8 import Precision
from megatron_ext.layers.block import TransformerBlock
from megatron_ext.layers.moe import MoE
from megatron_ext.layers.phases import whole
from megatron_ext.models import DeepSeekV3, DeepSeekV3Config
from megatron_ext.parallel.expert_parallel import ExpertParallel
from megatron_ext.pipeline import executor
from megatron_ext.pipeline.random import RandomKey
from megatron_ext.pipeline.stage import StageLayer, StageRun
from megatron_ext.pipeline.weight_gradients import WeightGradients
from tests.comm.journeys import here
from tests.distributed import equality
from tests.distributed.equality import Case
from tests.distributed.pool import WorkerPool
from tests.distributed.test_overlap import BOTH, section, with_overlap
from tests.layers.test_moe_parallel import SETTINGS

OVERLAPPED = with_overlap(Case(2, 2, 2, dropout=0.1, steps=2, micro_batches=4, section=section()), True)


@contextlib.contextmanager
def counted_turns() -> Iterator[list[int]]:
    """Adds up how often half of a pair handed over to the other."""
    turns, go_on = [0], executor._Half.go_on

    def counting(half: Any) -> bool:
        waits = go_on(half)
        turns[0] += waits and half.other is not None
        return waits

    with patch.object(executor._Half, "go_on", counting):
        yield turns


# -- 6: counts doubled by recompute, evaluation counted
# test_router.py (in training only, exactly), test_stage.py (counting is on around forwards of training only),
# test_evaluation.py (evaluation leaves counts and biases alone), test_overlap.py (the same biases after recomputation).


def counts(case: Case, evaluate: bool) -> dict[str, Any]:
    """Tokens per expert of every step."""
    engine = equality.build(case)
    data, found = equality.batches(engine, case), []
    with counted_turns() as turns:
        for _ in range(case.steps):
            if evaluate:
                engine.eval_batch(equality.batches(engine, case, 9))
            engine.train_batch(data)
            found.append({name: count.clone() for name, count in engine.expert_counts.items()})
    return {"turns": turns[0], "counts": found}


def test_trap_6_recomputation_evaluation_and_pairs_count_every_token_once(pool4: WorkerPool) -> None:
    plain = pool4.run(counts, with_overlap(OVERLAPPED, False), False)
    overlapped = with_overlap(replace(OVERLAPPED, section=section(recompute=BOTH)), True)
    found = pool4.run(counts, overlapped, True)
    assert max(f["turns"] for f in found) > 0 == max(p["turns"] for p in plain)
    tokens = OVERLAPPED.micro_batches * OVERLAPPED.replicas * 8 * 2
    for f, p in zip(found, plain, strict=True):
        assert len(f["counts"]) == OVERLAPPED.steps and f["counts"][0].keys() == p["counts"][0].keys()
        for step, expected in zip(f["counts"], p["counts"], strict=True):
            assert all(count.sum() == tokens and count.equal(expected[name]) for name, count in step.items())


# -- 14: ragged token counts, padding, and scales whose layout is wrong where (K / 128) % 4 != 0
# test_linear.py, test_grouped_linear.py and test_quantize.py (many shapes, by FP64 products of what the reference
# quantises), test_wire.py (a row of any width comes back).


def magnitudes(width: int, base: float) -> Tensor:
    """Per column: `base` to the number of its tile. A scale that is read in another tile's place is off by as much."""
    return base ** (torch.arange(width) // 128).float()


def rounded_by_hand(x: Tensor) -> Tensor:
    """To E4M3 with the least power of two per 1 x 128 tile under which nothing overflows."""
    tiles = []
    for tile in x.split(128, dim=1):
        scale = torch.exp2(torch.ceil(torch.log2(tile.abs().amax(1, keepdim=True) / 448)))
        tiles.append((tile / scale).to(torch.float8_e4m3fn).float() * scale)
    return torch.cat(tiles, dim=1)


def ragged_tokens(rank: int, width: int) -> tuple[Tensor, Tensor]:
    """Tokens and the experts of each, 2 of 4: three tokens on rank 0, one on rank 1."""
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randn(3 - 2 * rank, width, generator=generator) * magnitudes(width, 16.0)
    return tokens, torch.rand(len(tokens), 4, generator=generator).topk(2).indices


def rows_in_fp8(width: int) -> list[list[Tensor]]:
    """The rows of each expert here."""
    tokens, experts = ragged_tokens(dist.get_rank(), width)
    transit = Dispatcher(4, here(), "fp8").announce(experts, tokens)
    rows, _ = dispatch(transit, tokens, torch.ones(experts.shape))
    return list(rows.split(transit.group_sizes()))


@pytest.mark.parametrize("width", [640, 300], ids=["five tiles", "two tiles and a part"])
def test_trap_14_ragged_tokens_and_odd_numbers_of_tiles(pool2: WorkerPool, width: int) -> None:
    parts = zip(*(ragged_tokens(rank, width) for rank in range(2)), strict=True)
    tokens, experts = map(torch.cat, parts)
    for expert, rows in enumerate(itertools.chain(*pool2.run(rows_in_fp8, width))):
        assert rows.equal(rounded_by_hand(tokens[(experts == expert).any(-1)])), expert

    sizes, out = [1, 0, 127, 3, 130], 384
    there, back = magnitudes(width, 16.0), magnitudes(width, 1 / 16.0)  # every tile has its part in a product
    x = (torch.randn(sum(sizes), width) * there).requires_grad_()
    weight = (torch.randn(len(sizes), out, width) * back * magnitudes(out, 16.0)[:, None]).requires_grad_()
    dy = torch.randn(sum(sizes), out) * magnitudes(out, 1 / 16.0)
    y = fp8.grouped_linear(x, sizes, weight)
    found = (y, *torch.autograd.grad(y, (x, weight), dy))
    exact = torch.cat([rows @ w.t() for rows, w in zip(x.split(sizes), weight, strict=True)])
    expected = (exact, *torch.autograd.grad(exact, (x, weight), dy))
    for name, a, b in zip(("y", "dx", "dW"), found, expected, strict=True):
        by_expert = [t if name == "dW" else t.split(sizes) for t in (a, b)]
        for expert, (mine, theirs) in enumerate(zip(*by_expert, strict=True)):
            for tile, (part, other) in enumerate(zip(mine.split(128, -1), theirs.split(128, -1), strict=True)):
                error = (part - other).norm() / other.norm() if sizes[expert] else part.norm()
                assert error < 0.06, (name, expert, tile)


# -- 15: gradients lost where an FP8 tensor crosses autograd
# test_linear.py and test_grouped_linear.py (against FP64 products, and without a sink), test_shared_input.py (through
# an input quantised once for several layers), test_dispatch.py (both ways round as the wire does).


def wide_block(precision: Precision, dtype: torch.dtype) -> TransformerBlock:
    """All tokens visit all experts: what is rounded cannot change the choice."""
    torch.manual_seed(0)
    block = TransformerBlock(DeepSeekV3Config(
        vocab_size=32, hidden_size=160, intermediate_size=64, moe_intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, n_routed_experts=4, num_experts_per_tok=4, kv_lora_rank=48, q_lora_rank=40,
        qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=32, initializer_range=0.1, first_k_dense_replace=0), 1)
    block.set_expert_parallel(ExpertParallel.single())
    block.set_precision(precision)
    return block.to(dtype)


def gradients_in_phases(block: TransformerBlock, x: Tensor, dout: Tensor, recompute: tuple[str, ...],
                        chunks: int) -> dict[str, Tensor]:
    """In the way of the executor: phase by phase, weight gradients from a queue."""
    weights = WeightGradients(block.parameters())
    weights.begin()
    run = StageRun([StageLayer(block.phases(chunks), 0)], RandomKey(0, 0, 0), True, recompute)
    x = x.clone().requires_grad_()
    list(run.forward(x))  # without a second rank there is nothing to wait for
    steps = run.backward([dout], lambda roots, gradients: weights.backward(roots, gradients, (0, 0, 0)))
    dx: list[Any] = []

    def keep() -> Iterator[None]:
        dx.extend((yield from steps))

    list(keep())
    weights.take((0, 0, 0))
    return {"x": dx[0], **{name: p.main_grad.clone() for name, p in block.named_parameters()}}


def test_trap_15_gradients_through_fp8_reach_every_parameter() -> None:
    precision = Precision(fp8=True, dispatch_dtype="fp8")
    x, dout = torch.randn(2, 40, 160), torch.randn(2, 40, 160)
    block = wide_block(precision, torch.float32)
    through = x.clone().requires_grad_()
    whole(block.phases(1), through).backward(dout)
    exact = {"x": through.grad, **{name: p.grad for name, p in block.named_parameters()}}
    for recompute, chunks in (((), 1), (BOTH, 1), ((), 2)):
        found = gradients_in_phases(wide_block(precision, torch.float32), x, dout, recompute, chunks)
        assert found.keys() == exact.keys()
        for name, gradient in found.items():
            assert gradient.equal(exact[name]), (name, recompute, chunks)

    bf16 = gradients_in_phases(wide_block(Precision(), torch.bfloat16), x.bfloat16(), dout.bfloat16(), (), 1)
    quantised = gradients_in_phases(wide_block(precision, torch.bfloat16), x.bfloat16(), dout.bfloat16(), (), 1)
    for name, gradient in bf16.items():
        assert gradient.any(), name
        error = (quantised[name].float() - gradient.float()).norm() / gradient.float().norm()
        assert 0.02 < error < 0.15, (name, error)


# -- 16: an expert or a rank without tokens
# test_exchange.py (nobody, few, or one rank has tokens or gets them), test_moe_parallel.py (a layer), test_moe.py and
# test_grouped_linear.py (no tokens at all), test_dispatch_errors.py (a peer that really is gone).

EXPERTS = frozenset(range(8))
IDLE = {
    "all to rank 0": EXPERTS - {0, 1},
    "all to rank 1, in one of its chunks": EXPERTS - {6, 7},
    "half the experts of each rank without tokens": frozenset({0, 1, 6, 7}),
}
"""Experts that no token visits; each token visits two of the others."""


def bias_against(idle: frozenset[int]) -> Tensor:
    return torch.tensor([-99.0 if expert in idle else 0.0 for expert in range(8)])


def one_sided(case: Case, bias: Tensor) -> dict[str, Any]:
    """Trains with biases that start there; also returns what the last step counted, and who has gradients of experts.
    """
    built: list[Any] = []
    build = equality.build

    def forced(case: Case) -> Any:
        engine = build(case)
        for router in engine.routers.values():
            router.e_score_correction_bias.copy_(bias)
        built.append(engine)
        return engine

    with patch.object(equality, "build", forced):
        found = equality.train(case)
    [engine] = built
    with_gradient = {p.expert_range[0] + i for p in engine.weights.parameters if hasattr(p, "expert_range")
                     for i, gradient in enumerate(p.main_grad) if gradient.any()}
    return {"trained": found, "counts": [c.tolist() for c in engine.expert_counts.values()], "learned": with_gradient}


class Forced(DeepSeekV3):
    bias: Tensor

    def __init__(self, config: DeepSeekV3Config):
        super().__init__(config)
        for block in self.model.layers:
            if isinstance(block.mlp, MoE):
                block.mlp.gate.e_score_correction_bias.copy_(self.bias)


@pytest.mark.parametrize("name", IDLE)
def test_trap_16_experts_and_ranks_without_tokens_train_as_one_process(name: str, pool4: WorkerPool) -> None:
    idle, bias = IDLE[name], bias_against(IDLE[name])
    case = replace(OVERLAPPED, section={**section(recompute=BOTH, dispatch_chunks=2), "pipeline": {"overlap": True}})
    found = pool4.run(one_sided, case, bias, timeout=60.0)
    with patch.object(equality, "DeepSeekV3", type("Biased", (Forced,), {"bias": bias})):
        expected = equality.reference(replace(case, replicas=1, micro_batches=case.micro_batches * case.replicas))
    equality.compare(found[0]["trained"], expected)
    for rank, result in enumerate(found):
        first = rank % 2 * 4  # expert-parallel ranks lie side by side
        assert result["learned"] == set(range(first, first + 4)) - idle
        assert result["counts"]
        for counted in result["counts"]:
            assert {expert for expert, tokens in enumerate(counted) if tokens == 0} == idle


# -- 17: hooks on gradients, and a queue that grows
# test_weight_gradients.py (kinds of hooks, hooks that change a gradient or come late; what one closure holds),
# test_executor.py (under ZeRO without experts; activations and messages do not grow with micro-batches).

HOOKED = ("model.layers.1.self_attn.o_proj.weight", "model.layers.2.mlp.experts.down_proj")


def tensors_in(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    """What a closure keeps alive."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, list | tuple):
        for each in thing:
            yield from tensors_in(each, seen)
    elif isinstance(thing, functools.partial):
        yield from tensors_in([thing.func, *thing.args, *thing.keywords.values()], seen)
    elif callable(thing):
        for cell in getattr(thing, "__closure__", None) or ():
            yield from tensors_in(cell.cell_contents, seen)


def hooked_training(case: Case) -> dict[str, Any]:
    engine = equality.build(case)
    seen: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
    parameters = dict(engine.module.named_parameters())
    for name in HOOKED:
        first = getattr(parameters[name], "expert_range", (0,))[0]
        parameters[name].register_hook(lambda grad, key=(name, first): seen[key].append(grad.clone()))
    weights, sizes, queued = engine.weights, [], []
    backward = weights.backward

    def watched(roots: Any, gradients: Any, defer: Any) -> None:
        backward(roots, gradients, defer)
        queued.append(sum(map(len, weights._queue.values())))
        for parameter, accumulate in itertools.chain(*weights._queue.values()):
            held = [t for t in tensors_in(accumulate, set()) if t is not parameter]
            sizes.extend(t.untyped_storage().nbytes() / parameter.main_grad.nbytes for t in held)

    with patch.object(weights, "backward", watched), counted_turns() as turns:
        engine.train_batch(equality.batches(engine, case))
    mine = {id(parameters[name]) for name in HOOKED}
    return {"seen": {key: (len(grads), sum(grads)) for key, grads in seen.items()}, "turns": turns[0],
            "largest": max(sizes), "queued": max(queued), "left": len(weights._queue),
            "autograd": mine <= {id(p) for p in weights.whole}, "state": equality.gather(engine)}


class Hooked(DeepSeekV3):
    seen: dict[str, Tensor]

    def __init__(self, config: DeepSeekV3Config):
        super().__init__(config)
        for name in HOOKED:
            self.get_parameter(name).register_hook(
                lambda grad, name=name: self.seen.update({name: self.seen.get(name, 0) + grad}))


def test_trap_17_hooks_fire_as_in_a_plain_backward_and_the_queue_stays_small(pool4: WorkerPool) -> None:
    case = replace(OVERLAPPED, steps=1, zero=1)
    found = pool4.run(hooked_training, case)
    model = type("Watched", (Hooked,), {"seen": {}})
    with patch.object(equality, "DeepSeekV3", model):
        expected = equality.reference(replace(case, replicas=1, micro_batches=case.micro_batches * case.replicas))
    sums: dict[str, dict[int, Any]] = {name: defaultdict(int) for name in HOOKED}
    for result in found:
        assert {name for name, _ in result["seen"]} == set(HOOKED) and result["autograd"]
        for (name, first), (times, total) in result["seen"].items():
            assert times == case.per_direction, "micro-batches of the one direction whose stage has the layer here"
            sums[name][first] += total / (2 * case.replicas)
    assert max(result["turns"] for result in found) > 0
    for name, parts in sums.items():
        total = torch.cat([parts[first] for first in sorted(parts)])
        torch.testing.assert_close(total, model.seen[name], rtol=1e-5, atol=1e-7)
    for name, value in expected["state"].items():
        torch.testing.assert_close(found[0]["state"][name], value, rtol=0, atol=1e-5)
    for result in found:
        assert result["queued"] > 0 == result["left"]
        assert result["largest"] < 1, "of the parameter's gradient"


# -- 19: tensors that are not contiguous
# test_exchange.py (the all-to-all itself; dispatch and combine step by step), test_wire.py (rows), test_quantize.py
# (the kernels).


def strided_and_dense(dispatch: str) -> dict[str, Any]:
    """A layer over all ranks, fed every other number of a wider tensor and a gradient of stride 0; and copies of them.
    """
    torch.manual_seed(5)
    wide = torch.randn(2, 9 + dist.get_rank(), 64)
    strides: list[bool] = []
    found = []
    starts = {name: getattr(Transit, name) for name in ("start_dispatch", "start_combine_backward")}

    def noted(name: str) -> Any:
        def start(transit: Transit, rows: Tensor, *others: Tensor) -> None:
            strides.append(rows.is_contiguous())
            starts[name](transit, rows, *others)

        return start

    for dense in (False, True):
        torch.manual_seed(5)
        layer = MoE(SETTINGS, layer_index=1)
        layer.set_expert_parallel(here())
        layer.set_precision(Precision(dispatch_dtype=dispatch))
        x = wide[..., ::2]
        x = (x.contiguous() if dense else x).detach().requires_grad_()
        with contextlib.ExitStack() as stack:
            for name in starts:
                stack.enter_context(patch.object(Transit, name, noted(name)))
            out = layer(x)
            gradient = torch.full((), 0.5).expand_as(out)
            out.backward(gradient.contiguous() if dense else gradient)
        found.append([out.detach(), x.grad, *(p.grad for p in layer.parameters())])
    return {"strides": strides, "same": [a.equal(b) for a, b in zip(*found, strict=True)]}


@pytest.mark.parametrize("dispatch", ["model", "fp8"])
def test_trap_19_strides_change_nothing(pool2: WorkerPool, dispatch: str) -> None:
    for found in pool2.run(strided_and_dense, dispatch):
        assert found["strides"] == [False, False, True, True], "of tokens and of the gradient of what comes back"
        assert len(found["same"]) == 2 + 7 and all(found["same"])
