"""The executor with layers not written for it: what it computes, keeps, sends and reports, against one process."""

from __future__ import annotations

import functools
import gc
import itertools
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import Tensor, nn

import megatron_ext
from megatron_ext.config import ConfigError
from megatron_ext.pipeline.instructions import Plan
from tests.distributed import equality, generic
from tests.distributed.equality import compare
from tests.distributed.generic import SEED, H, Job, Plain, V, batches, build
from tests.distributed.pool import WorkerPool


@functools.cache
def expected(job: Job) -> dict[str, Any]:
    return generic.reference(job)


def check(job: Job, pools: dict[int, WorkerPool]) -> None:
    """Equal to one process, whatever the layout."""
    compare(pools[job.stages].run(generic.train, job)[0], expected(replace(job, stages=2, zero=0, interval=0)))


@pytest.fixture
def pools(pool2: WorkerPool, pool4: WorkerPool) -> dict[int, WorkerPool]:
    return {2: pool2, 4: pool4}


# -- equal to one process

JOBS = {
    # Tuples with integers, masks and another shape; functions; a convolution; lengths that change with every message.
    "zoo": [Job(stages=p, zero=z) for p, z in ((2, 0), (2, 1), (4, 0), (4, 2))],
    "sizes": [Job(generic.drops, 4, micro_batches=m, steps=2) for m in (2, 4, 6, 8, 10)],
    "a stage without parameters": [Job(generic.bare_stage, 4)],
    "frozen layers before the first that learns": [Job(generic.frozen_start, p) for p in (2, 4)],
    "tied over pairs": [Job(generic.tied, 4, z) for z in (0, 1, 2)],
    "tied, never clipped": [Job(generic.tied, 4, clip=0.0)],
    "recomputed": [Job(generic.drops, p, interval=i) for p, i in ((2, 1), (2, 2), (4, 1), (4, 2))],
    "recomputed tuples": [Job(stages=4, interval=2)],
    "loss in the last layer": [Job(generic.own_loss, p, data=generic.vectors, loss_fn=None) for p in (2, 4)],
}


@pytest.mark.parametrize("job", [
    pytest.param(job, id=f"{name}: P={job.stages} ZeRO={job.zero} m={job.micro_batches} interval={job.interval}")
    for name, jobs in JOBS.items() for job in jobs])
def test_equals_one_process(job: Job, pools: dict[int, WorkerPool]) -> None:
    check(job, pools)


def test_the_reference_would_notice() -> None:
    job = Job(steps=2)
    for other in (replace(job, clip=0.2), replace(job, micro_batches=2)):
        with pytest.raises(AssertionError):
            compare(expected(other), expected(job))


def losses_with(functions: list[Any]) -> list[list[float]]:
    """Losses of three steps, recomputed each with another function."""
    return [generic.train(Job(generic.drops, 2, interval=1, checkpoint=f)).get("losses", []) for f in functions]


def reentrant(function: Callable[..., Any], *tensors: Tensor) -> Any:
    from torch.utils.checkpoint import checkpoint

    # As DeepSpeed's own, it learns from its inputs whether there is anything to differentiate.
    return checkpoint(function, *tensors, use_reentrant=any(t.requires_grad for t in tensors), preserve_rng_state=False)


def test_a_checkpoint_function_of_the_users(pool2: WorkerPool) -> None:
    plain, theirs = pool2.run(losses_with, [None, reentrant])[0]
    assert plain == theirs


# -- tied layers


def tied_names(folder: str) -> dict[str, Any]:
    engine = build(Job(generic.tied, 4, 0))
    engine.train_batch(batches(engine, Job(generic.tied, 4)))
    engine.save_checkpoint(folder, tag="tied")
    counted = sorted(n for n, p in engine.module.named_parameters() if not getattr(p, "ds_pipe_replicated", False))
    return {"all": sorted(engine.module.state_dict()), "counted": counted}


def test_a_tied_layer_has_one_name_and_one_owner(pool4: WorkerPool, tmp_path: Any) -> None:
    found = pool4.run(tied_names, str(tmp_path))
    assert found[0] == found[3] and found[1] == found[2]
    assert "layers.0.weight" in found[0]["all"] and "layers.0.weight" in found[1]["all"]
    names = found[0]["counted"] + found[1]["counted"]
    assert len(names) == len(set(names)), "a parameter counts once in the gradient norm"
    assert set(names) == set(expected(Job(generic.tied, 2, 0))["state"])
    saved = [torch.load(tmp_path / "tied" / f"mp_rank_0{pair}_model_states.pt", weights_only=False)["module"]
             for pair in range(2)]
    assert saved[0]["layers.0.weight"].equal(saved[1]["layers.0.weight"])


def other_start() -> Tensor:
    """A constructor that does not heed the seed, so that the holders of a tied layer start apart."""

    class Unseeded(nn.Embedding):
        def reset_parameters(self) -> None:
            nn.init.constant_(self.weight, 1.0 + dist.get_rank())

    table = ("t", Unseeded, V, H)
    job = Job(lambda: [TiedLayerSpec(*table), nn.Tanh(), TiedLayerSpec(*table, forward_fn=_one),
                       LayerSpec(nn.Linear, H, V)], stages=4)
    engine = build(job)
    engine.train_batch(batches(engine, job))
    return engine.module.state_dict()["layers.0.weight"]


def _one(embedding: nn.Module, x: Tensor) -> Tensor:
    return x * embedding.weight[0]


def test_holders_of_a_tied_layer_start_from_the_owners_values_and_stay_equal(pool4: WorkerPool) -> None:
    found = pool4.run(other_start)
    assert all(value.equal(found[0]) for value in found)
    assert (found[0] - 1).abs().max() < 0.1, "of rank 0, and the optimizer starts from them too"


# -- hooks


def with_hooks(when: str) -> dict[str, Any]:
    job = Job(generic.drops, 2)
    calls = {"tensor": 0, "post": 0}

    def register(module: nn.Module) -> None:
        weights = dict(module.named_parameters())
        weights["layers.2.weight"].register_hook(lambda grad: calls.update(tensor=calls["tensor"] + 1))
        weights["layers.4.weight"].register_post_accumulate_grad_hook(lambda p: calls.update(post=calls["post"] + 1))

    original = megatron_ext.initialize

    def initialize(model: Any, config: Any) -> Any:
        if when == "before":
            register(model)
        found = original(model=model, config=config)
        if when == "after":
            register(model)
        return found

    megatron_ext.initialize = initialize
    try:
        return generic.train(job) | calls
    finally:
        megatron_ext.initialize = original


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_the_user_fire_under_zero(pool2: WorkerPool, when: str) -> None:
    for rank, found in enumerate(pool2.run(with_hooks, when)):
        assert found["tensor"] == found["post"] == 2 * 3, "micro-batches of a direction times steps"
        if rank == 0:
            compare({k: found[k] for k in ("losses", "norms", "state")}, expected(Job(generic.drops, 2, 0)))


def not_split() -> list[str]:
    job = Job(stages=2)
    engine = build(job)
    engine.train_batch(batches(engine, job))
    return sorted(name for name, p in engine.module.named_parameters() if p in engine.weights.whole)


def test_every_plain_linear_is_split_and_nothing_else(pool2: WorkerPool) -> None:
    whole = ["layers.0.embedding.weight", *(f"layers.{n}.{p}" for n in ("1.norm", "2.norm", "7", "9")
                                            for p in ("bias", "weight"))]
    assert pool2.run(not_split) == [whole] * 2


# -- memory


class Watched(nn.Module):
    """A layer that knows for how many forwards tensors are kept, and how many messages, at most."""

    live: weakref.WeakSet[Any] = weakref.WeakSet()
    peak = messages = 0
    under_way: Callable[[], int] = staticmethod(lambda: 0)

    class Activation:
        pass

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        activation = Watched.Activation()
        Watched.live.add(activation)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (activation, t), lambda kept: kept[1]):
            y = self.linear(x).tanh()
        Watched.peak = max(Watched.peak, len(Watched.live))
        Watched.messages = max(Watched.messages, Watched.under_way())
        return y


def floats(step: int, number: int) -> tuple[Tensor, Tensor]:
    return torch.full((2, H), float(number)), torch.zeros(2, H)


def watch(micro_batches: int) -> dict[str, Any]:
    job = Job(lambda: [LayerSpec(Watched) for _ in range(4)], 4, 1, micro_batches, data=floats, loss_fn=nn.MSELoss())
    engine = build(job)
    Watched.peak = Watched.messages = 0
    Watched.under_way = staticmethod(lambda: engine.executor.messenger.under_way)
    gc.disable()  # reference counts alone must free everything
    try:
        engine.train_batch(batches(engine, job))
        left = len(Watched.live)
    finally:
        gc.enable()
    return {"peak": Watched.peak, "left": left, "queue": engine.weights.waiting, "messages": Watched.messages,
            "planned": planned_peak(engine.plan(), engine.module.stage_rank)}


def planned_peak(plan: Plan, rank: int) -> int:
    """Forwards without their input-grad yet, at most."""
    parts = [part for instruction in plan.compute(rank) for part in instruction.parts]
    return max(itertools.accumulate({"F": 1, "I": -1, "B": -1, "W": 0}[part.kind] for part in parts))


def test_activations_live_from_their_forward_to_their_input_gradient(pool4: WorkerPool) -> None:
    short, long = pool4.run(watch, 8), pool4.run(watch, 32)
    for found in (*short, *long):
        assert found["peak"] == found["planned"] <= 5, "P + 1"
        assert (found["left"], found["queue"]) == (0, [])
    for rank in range(4):
        assert long[rank]["messages"] <= short[rank]["messages"] + 2 <= 12, "messages are let go of as the step goes on"


# -- order


def recorded(job: Job) -> list[dict[str, Any]]:
    engine = build(job)
    data = batches(engine, job)
    found = []
    for record in (False, True, False):
        if record:
            engine.record_next_batch()
        loss = float(engine.train_batch(data))
        found.append({"loss": loss, "timeline": engine.timeline, "plan": engine.plan()})
    return found


@pytest.mark.parametrize("stages, micro_batches", [(2, 6), (4, 2), (4, 10)])
def test_what_ran_is_what_was_planned(pools: dict[int, WorkerPool], stages: int, micro_batches: int) -> None:
    job = Job(generic.drops, stages, micro_batches=micro_batches)
    for first, second, third in pools[stages].run(recorded, job):
        assert first["timeline"] is None
        timeline, plan = second["timeline"], second["plan"]
        assert third["timeline"] is timeline
        for rank, spans in enumerate(timeline.ranks):
            assert [span.instruction for span in spans] == plan.compute(rank)
            assert all(a.start <= a.end <= b.start for a, b in itertools.pairwise(spans))
        assert timeline.start == 0
        losses = [first["loss"], second["loss"], third["loss"]]
        assert losses == pytest.approx(expected(replace(job, stages=2, zero=0))["losses"], rel=1e-5)


# -- evaluation


def evaluate() -> dict[str, Any]:
    job = Job(stages=4, micro_batches=4)
    engine = build(job)
    data = batches(engine, job)
    found: dict[str, Any] = {"before": float(engine.train_batch(data))}
    state = torch.get_rng_state()

    def fresh() -> Iterator[Any]:
        return batches(engine, job, step=50)

    found["loss"] = engine.eval_batch(fresh())
    found["again"], found["logits"] = engine.eval_batch(fresh(), return_logits=True)
    found["each"] = engine.eval_batch(fresh(), reduce_output=None)
    found["three"] = engine.eval_batch(itertools.chain(*([b] for b in itertools.islice(fresh(), 2)), [
        job.data(51, engine.data_parallel_rank)]), num_micro_batches=3, reduce_output=None)
    found["only logits"] = engine.eval_batch(fresh(), compute_loss=False)
    found["rng"] = torch.get_rng_state().equal(state)
    found["training"] = engine.module.training
    found["after"] = float(engine.train_batch(data))
    return found


def test_evaluation(pool4: WorkerPool) -> None:
    """The same on every rank and as in one process; it leaves no trace in the training."""
    found = pool4.run(evaluate)
    job = Job(micro_batches=4, zero=0, steps=1)
    plain = Plain(job)
    plain.root.load_state_dict({n.removeprefix("layers."): v for n, v in expected(job)["state"].items()})
    plain.root.eval()
    for layer in plain.layers:  # modules without parameters, too
        layer.eval() if isinstance(layer, nn.Module) else None
    with torch.no_grad():
        each = torch.stack([plain.loss(50, number) for number in range(4)])
        last = torch.stack([plain.loss(51, number) for number in range(2)])
        logits = [plain.run(50, number, job.data(50, number)[0]) for number in range(4)]
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    for rank, f in enumerate(found):
        assert f["loss"].equal(found[0]["loss"]) and f["again"].equal(f["loss"])
        close(f["loss"], each.mean())
        close(f["each"], each)
        close(f["three"], torch.cat([each, last]))
        assert f["rng"] and f["training"]
        if rank in (1, 2):
            assert f["logits"] is None and f["only logits"] is None
        else:  # direction 0 ends on rank 3
            wanted = logits[0::2] if rank == 3 else logits[1::2]
            for got, only, want in zip(f["logits"], f["only logits"], wanted, strict=True):
                close(got, want)
                assert only.equal(got)
    assert [found[0]["before"], found[0]["after"]] == pytest.approx(
        expected(replace(job, steps=2))["losses"], rel=1e-5)


def counts_of_evaluation() -> list[Any]:
    case = equality.Case(steps=2)
    engine = equality.build(case)
    data = equality.batches(engine, case)
    engine.train_batch(data)
    before = {name: counts.clone() for name, counts in engine.expert_counts.items()}
    biases = [router.e_score_correction_bias.clone() for router in engine.routers.values()]
    engine.eval_batch(equality.batches(engine, case, 9))
    return [all(before[n].equal(c) for n, c in engine.expert_counts.items()),
            all(b.equal(r.e_score_correction_bias) for b, r in zip(biases, engine.routers.values(), strict=True)),
            [int(r.tokens_per_expert.sum()) for r in engine.routers.values()],
            [int(c.sum()) for c in engine.expert_counts.values()]]


def test_evaluation_counts_no_tokens(pool2: WorkerPool) -> None:
    for same_counts, same_bias, waiting, counted in pool2.run(counts_of_evaluation):
        assert same_counts and same_bias
        assert waiting == [0] * 3
        assert counted == [4 * 8 * 2] * 3, "4 micro-batches of 8 tokens to 2 experts each"


# -- data


def warnings_of(distinct: bool) -> list[str]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("megatron_ext")
    log.addHandler(handler)
    try:
        job = Job(generic.drops, 2, steps=2)
        engine = build(job)
        data = batches(engine, job) if distinct else (generic.text(i // 2, i % 2) for i in range(100))
        for _ in range(2):
            engine.train_batch(data)
    finally:
        log.removeHandler(handler)
    return [m for m in messages if "identical" in m]


def test_reading_the_same_data_twice_is_said_once(pool2: WorkerPool) -> None:
    first, second = pool2.run(warnings_of, False)
    assert len(first) == 1 and "data shards 0 and 1 of 2 read identical first batches" in first[0]
    assert second == []
    assert pool2.run(warnings_of, True) == [[], []]


def reused_buffer() -> list[float]:
    """An iterator that fills the same tensors anew for every batch."""
    job = Job(generic.drops, 2)
    engine = build(job)

    def data() -> Iterator[Any]:
        tokens, labels = torch.empty(2, 5, dtype=torch.int64), torch.empty(2, 5, dtype=torch.int64)
        for fresh in batches(engine, job):
            tokens.copy_(fresh[0][:, :1].expand(2, 5))
            labels.copy_(fresh[1][:, :1].expand(2, 5))
            yield tokens, labels

    stream = data()
    return [float(engine.train_batch(stream)) for _ in range(2)]


def wide(step: int, number: int) -> tuple[Tensor, Tensor]:
    tokens, labels = generic.text(step, number)
    return tokens[:, :1].expand(2, 5).clone(), labels[:, :1].expand(2, 5).clone()


def test_an_iterator_may_reuse_its_buffers(pool2: WorkerPool) -> None:
    found = pool2.run(reused_buffer)[0]
    assert found == pytest.approx(expected(Job(generic.drops, zero=0, data=wide, steps=2))["losses"], rel=1e-5)


def refused(kind: str) -> str:
    job = Job(generic.drops, 2)
    engine = build(job)
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    bad = {"ended": [], "three": [(tokens, tokens, tokens)], "single": [tokens], "dict": [({"x": tokens}, tokens)],
           "none": [(tokens, None)]}[kind]
    try:
        engine.train_batch(iter(bad))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize("kind, text", [
    ("ended", "BatchError: the data iterator ended at micro-batch 0 of 2"),
    ("three", "BatchError: a batch must be (inputs, labels), not tuple of 3"),
    ("single", "BatchError: a batch must be (inputs, labels), not Tensor"),
    ("dict", "BatchError: a batch must hold tensors or tuples of tensors, not dict"),
    ("none", "BatchError: a batch must hold tensors or tuples of tensors, not NoneType"),
])
def test_unusable_data(pool2: WorkerPool, kind: str, text: str) -> None:
    assert all(found.startswith(text) for found in pool2.run(refused, kind))


# -- building


def build_error(kind: str) -> str:
    linear = nn.Linear(H, H)
    layers: dict[str, list[Any]] = {
        "shared": [LayerSpec(nn.Embedding, V, H), linear, linear, LayerSpec(nn.Linear, H, V)],
        "nothing to train": [LayerSpec(nn.Embedding, V, H), torch.tanh, nn.Tanh(), LayerSpec(nn.Linear, H, V)],
        "fails on one rank": [LayerSpec(nn.Embedding, V, H), LayerSpec(nn.Linear, H, H), LayerSpec(Indivisible),
                              LayerSpec(nn.Linear, H, V)],
        "one name twice": [LayerSpec(Named), LayerSpec(nn.Linear, H, H), LayerSpec(nn.Linear, H, H), LayerSpec(Named)],
    }
    if kind == "shared":
        layers[kind].insert(1, LayerSpec(nn.Linear, H, H))
        layers[kind][3:3] = [nn.Tanh(), nn.Tanh(), nn.Tanh()]
    try:
        build(Job(lambda: layers[kind], 4))
    except ConfigError as error:
        return str(error)
    return "no error"


class Indivisible(nn.Linear):
    def __init__(self) -> None:
        super().__init__(H, H)

    def set_expert_parallel(self, experts: Any) -> None:
        experts.expert_range(3) if experts.size > 1 else _refuse()


def _refuse() -> None:
    raise ConfigError("layer", 3, "cannot be")


class Named(nn.Linear):
    canonical_name = "twins"

    def __init__(self) -> None:
        super().__init__(H, H)


@pytest.mark.parametrize("kind, text", [
    ("shared", "layers = [2, 6]: share a parameter and lie on different pipeline ranks; make both TiedLayerSpecs"),
    ("nothing to train", "layers = [0, 1, 2, 3, 4]: stages [1, 2] have no trainable parameters"),
    ("fails on one rank", "layer = 3: cannot be"),
    ("one name twice", "layers = 'twins': is the name of two layers"),
])
def test_models_that_cannot_be_built_end_on_every_rank(pool4: WorkerPool, kind: str, text: str) -> None:
    for found in pool4.run(build_error, kind):
        assert found.startswith(text)


class Attention(nn.Module):
    """A module given ready-made whose attributes look like those of a spec."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.build = nn.Linear(H, H), nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.build(self.key(x).tanh())


def ready_made() -> list[Any]:
    torch.manual_seed(SEED)
    layers = [nn.Embedding(V, H), Attention(), Attention(), nn.Linear(H, V)]
    return list(nn.Sequential(*layers))


def test_modules_given_ready_made(pools: dict[int, WorkerPool]) -> None:
    check(Job(ready_made, 4), pools)
