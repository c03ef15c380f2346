"""Small models out of layers that nobody wrote for this project, trained by the engine and by a plain loop.

A model is a function that returns a fresh list of what `PipelineModule` takes. The loop shares with the engine the
seeds and nothing else.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import Tensor, nn

import megatron_ext
from megatron_ext.pipeline.choice import PLACEMENTS
from megatron_ext.pipeline.random import RandomKey
from megatron_ext.pipeline.schedules import placement_of
from tests.distributed.equality import gather

SEED = 4321
V, H = 13, 8


# -- layers


class Embed(nn.Module):
    """Tokens [B, T] -> what travels on: hidden [B, T, H], the tokens (int), a mask (bool), a scale without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, H)

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return self.embedding(tokens), tokens, tokens % 3 > 0, tokens.float().mean(-1)


class Mix(nn.Module):
    """Adds a tensor of another shape to the tuple, [B, H], which skips a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(H), nn.Linear(H, H)

    def forward(self, value: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, tokens, mask, scale, *skipping = value
        y = self.norm(x) + self.linear(x) * mask[..., None]
        return (y, tokens, mask, scale, *(skipping or [x.mean(1)]))


class Join(nn.Module):
    """The end of the tuple: [B, T, H]."""

    def forward(self, value: tuple[Tensor, ...]) -> Tensor:
        x, tokens, mask, scale, mean = value
        return (x + mean[:, None] * scale[:, None, None] + (tokens % 2)[..., None]).masked_fill(~mask[..., None], 0.5)


class Frozen(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.requires_grad_(False)


class HalfUsed(nn.Linear):
    """A layer with a matrix that no output depends on."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.unused = nn.Linear(3, 3)


class Loss(nn.Module):
    """A last layer that returns the loss; the targets travel with the activations."""

    def forward(self, value: tuple[Tensor, Tensor]) -> Tensor:
        return (value[0] - value[1]).square().mean()


class Both(nn.Module):
    """Applies a layer to the first of two tensors."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(*sizes)

    def forward(self, value: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.linear(value[0]).tanh(), value[1]


class Widen(nn.Linear):
    """One tensor becomes two."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x.mean(1)


class Narrow(nn.Linear):
    """And one again."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)

    def forward(self, value: tuple[Tensor, Tensor]) -> Tensor:
        return super().forward(value[0]) + value[1][:, None]


def transpose(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


# -- models; the sizes fit `partition_method="uniform"` on two and on four ranks


def zoo() -> list[Any]:
    """At P = 4 the stages are cut where a tuple, and where a tensor that is not contiguous travels."""
    return [LayerSpec(Embed), LayerSpec(Mix), LayerSpec(Mix),
            Join(), LayerSpec(nn.Dropout, 0.2), LayerSpec(nn.Linear, H, 16),
            transpose, LayerSpec(nn.Conv1d, 16, 16, 3, padding=1), lambda x: F.gelu(x).transpose(1, 2),
            LayerSpec(nn.LayerNorm, 16), LayerSpec(nn.Linear, 16, V)]


def drops() -> list[Any]:
    """Dropout all over: 8 layers."""
    return [LayerSpec(nn.Embedding, V, H), LayerSpec(nn.Dropout, 0.3), LayerSpec(nn.Linear, H, H), nn.Tanh(),
            LayerSpec(nn.Linear, H, H), LayerSpec(nn.Dropout, 0.3), LayerSpec(HalfUsed, H, H),
            LayerSpec(nn.Linear, H, V)]


def bare_stage() -> list[Any]:
    """At P = 4 the second stage has no parameters."""
    return [LayerSpec(nn.Embedding, V, H), LayerSpec(nn.Linear, H, H), LayerSpec(nn.Dropout, 0.2), torch.tanh,
            LayerSpec(nn.Linear, H, H), nn.Tanh(), LayerSpec(nn.LayerNorm, H), LayerSpec(nn.Linear, H, V)]


def frozen_start() -> list[Any]:
    """The first stage passes on what needs no gradient; at P = 4 the second is half frozen."""
    return [lambda tokens: F.one_hot(tokens, V).float(), LayerSpec(Frozen, V, H), LayerSpec(Frozen, H, H),
            LayerSpec(nn.Linear, H, H), nn.Tanh(), LayerSpec(nn.Linear, H, H), LayerSpec(nn.Linear, H, H),
            LayerSpec(nn.Linear, H, V)]


def _add_again(embedding: nn.Embedding, x: Tensor) -> Tensor:
    return x + embedding.weight[: x.shape[1]].tanh()


def _logits(embedding: nn.Embedding, x: Tensor) -> Tensor:
    return x @ embedding.weight.t()


def tied() -> list[Any]:
    """One matrix in the stages 0, 1 and 3 of four (two pairs), another in 1 and 2 (one pair)."""
    table = (nn.Embedding, V, H)
    return [TiedLayerSpec("table", *table), LayerSpec(nn.Linear, H, H),
            TiedLayerSpec("table", *table, forward_fn=_add_again), TiedLayerSpec("inner", nn.Linear, H, H),
            TiedLayerSpec("inner", nn.Linear, H, H), nn.Tanh(),
            LayerSpec(nn.Linear, H, H), TiedLayerSpec("table", *table, forward_fn=_logits)]


def own_loss() -> list[Any]:
    return [LayerSpec(Both, 5, H), LayerSpec(Both, H, H), LayerSpec(Both, H, 3), Loss()]


def deep() -> list[Any]:
    """16 layers, for many chunks: tuples, dropout, a matrix of no use, and one at both ends."""
    table = (nn.Embedding, V, H)
    return [TiedLayerSpec("table", *table), LayerSpec(nn.Dropout, 0.2), LayerSpec(Widen, H), LayerSpec(Both, H, H),
            LayerSpec(Both, H, H), LayerSpec(Narrow, H), LayerSpec(nn.LayerNorm, H), LayerSpec(nn.Linear, H, H),
            LayerSpec(nn.Dropout, 0.2), LayerSpec(nn.Linear, H, 16), nn.Tanh(), LayerSpec(nn.Linear, 16, H),
            LayerSpec(HalfUsed, H, H), LayerSpec(nn.LayerNorm, H), LayerSpec(nn.Linear, H, H),
            TiedLayerSpec("table", *table, forward_fn=_logits)]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


# -- data


def text(step: int, number: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels [2, T]; T changes between micro-batches and between steps."""
    g = torch.Generator().manual_seed(1000 * step + number)
    length = 4 + (number + step) % 3
    tokens = torch.randint(0, V, (2, length), generator=g)
    return tokens, torch.randint(0, V, (2, length), generator=g)


def vectors(step: int, number: int) -> tuple[Any, Tensor]:
    """Inputs of two tensors; the labels are for nobody."""
    g = torch.Generator().manual_seed(1000 * step + number)
    return (torch.randn(4, 5, generator=g), torch.randn(4, 3, generator=g)), torch.zeros(())


# -- training


@dataclass(frozen=True)
class Job:
    """What to train, how. `micro_batches` is m, of all directions of a pipeline together."""

    model: Callable[[], list[Any]] = zoo
    stages: int = 2
    zero: int = 1
    micro_batches: int = 4
    steps: int = 3
    data: Callable[[int, int], Any] = text
    loss_fn: Callable[..., Tensor] | None = cross_entropy
    interval: int = 0
    checkpoint: Callable[..., Any] | None = None
    clip: float = 0.1
    schedule: str | None = "dualpipe"  # None: as the section says
    chunks: int = 1
    replicas: int = 1
    section: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def directions(self) -> int:
        if "placement" in self.section:
            return len(PLACEMENTS[self.section["placement"]](self.stages, 1))
        return 2 if self.schedule == "auto" else len(placement_of(self.schedule, self.stages, self.chunks))


OPTIMIZER = {"lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.1}


def build(job: Job) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": job.micro_batches // job.directions,
        "gradient_clipping": job.clip, "steps_per_print": 10**6, "zero_optimization": {"stage": job.zero},
        "optimizer": {"type": "AdamW", "params": copy.deepcopy(OPTIMIZER)},
        "megatron_ext": {"pipeline": copy.deepcopy(job.section)}}
    model = megatron_ext.PipelineModule(
        job.model(), num_stages=job.stages, loss_fn=job.loss_fn, base_seed=SEED, partition_method="uniform",
        activation_checkpoint_interval=job.interval, activation_checkpoint_func=job.checkpoint,
        schedule=job.schedule, chunks=job.chunks if job.schedule else None, config=None if job.schedule else config)
    return megatron_ext.initialize(model=model, config=config)[0]


def batches(engine: Any, job: Job, step: int = 0) -> Iterator[Any]:
    """This rank's shard, endless."""
    while True:
        for k in range(job.micro_batches // job.directions):
            yield job.data(step, k * engine.data_parallel_world_size + engine.data_parallel_rank)
        step += 1


def train(job: Job) -> dict[str, Any]:
    """On every rank; rank 0 returns what happened."""
    engine = build(job)
    data = batches(engine, job)
    losses, norms = [], []
    for _ in range(job.steps):
        losses.append(float(engine.train_batch(data)))
        norms.append(float(engine.get_global_grad_norm()))
        assert engine.weights.waiting == [] and engine.executor.messenger.under_way == 0
    state = gather(engine)
    return {"losses": losses, "norms": norms, "state": state} if dist.get_rank() == 0 else {}


class Plain:
    """The same model in one process; parameters under the engine's names."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.layers: list[Callable[[Any], Any]] = []
        self.root = nn.Module()
        shared: dict[str, nn.Module] = {}
        for index, spec in enumerate(job.model()):
            torch.manual_seed(SEED + index)
            if isinstance(spec, TiedLayerSpec):
                new = spec.key not in shared
                layer = shared.setdefault(spec.key, spec.build() if new else nn.Module())
                forward = spec.forward_fn
                self.layers.append(layer if forward is None else lambda x, f=forward, m=layer: f(m, x))
            else:
                new = True
                layer = spec.build() if isinstance(spec, LayerSpec) else spec
                self.layers.append(layer)
            if new and isinstance(layer, nn.Module):
                self.root.add_module(str(index), layer)

    def run(self, step: int, number: int, value: Any) -> Any:
        for index, layer in enumerate(self.layers):
            RandomKey(SEED, step, number).seed_layer(index)
            value = layer(value)
        return value

    def loss(self, step: int, number: int) -> Tensor:
        inputs, labels = self.job.data(step, number)
        output = self.run(step, number, inputs)
        return output if self.job.loss_fn is None else self.job.loss_fn(output, labels)

    def state(self) -> dict[str, Tensor]:
        return {f"layers.{name}": value.detach().clone() for name, value in self.root.state_dict().items()}


def reference(job: Job) -> dict[str, Any]:
    """The same training in one process; only the global batch matters, not the layout."""
    plain = Plain(job)
    parameters = [p for p in plain.root.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, **OPTIMIZER)  # type: ignore[arg-type]
    losses, norms = [], []
    for step in range(job.steps):
        optimizer.zero_grad()
        mean = 0.0
        total = job.micro_batches * job.replicas
        for number in range(total):
            loss = plain.loss(step, number)
            (loss / total).backward()
            mean += loss.item() / total
        for p in parameters:  # without use: a gradient of zero, as ZeRO has it, and not a parameter that is passed over
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        norms.append(float(nn.utils.clip_grad_norm_(parameters, job.clip or math.inf)))
        optimizer.step()
        losses.append(mean)
    return {"losses": losses, "norms": norms, "state": plain.state()}
