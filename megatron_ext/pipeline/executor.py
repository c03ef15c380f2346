"""Runs a plan on this rank: the instructions of a schedule become computations and messages.

The executor knows nothing of any schedule. It walks the rank's list; a computation waits for the messages it needs
and nothing else, a send starts right after the computation that made its data, and receives are posted ahead by the
messenger. An activation lives from its forward to its input-grad (stage.py): what is kept of a stage's output is the
edge into its graph, so the output itself is freed as soon as it is sent, unless autograd needs it. Weight gradients
wait in a queue of operands (weight_gradients.py) until their W. Where a stage and the next lie on one rank, what passes
between them is handed over without a message: the same memory, as between any two layers.

A forward-backward pair is one instruction, and one micro-batch's communication hides behind the other's computation
(DeepSeek-V3 report, section 3.2.1, figure 4): the two take turns, the backward first, each going on until it would have
to wait for an exchange. For blocks of experts that is

    computation     sum B | attention F, shared F | MLP B, W | MLP F | attention B, sum B, W | sum F, attention F, ...
    communication   combine B       dispatch F    dispatch B   combine F      combine B            dispatch F

Where they have unlike numbers of blocks, the rest of the longer one runs alone. Every rank of an expert group runs the
same instructions and takes the same turns, so their exchanges meet in the same order. A layer of the forward's stage
may offer to run the halves together itself (`PipelineModule.paired_step`).
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_ext.comm.messages import Key, MessageError, Spec, check_sendable
from megatron_ext.comm.point_to_point import Messenger
from megatron_ext.config.errors import UserError
from megatron_ext.layers.phases import Phase
from megatron_ext.pipeline.instructions import Compute, Message, Pair, Plan, Transfer
from megatron_ext.pipeline.module import PipelineModule
from megatron_ext.pipeline.random import RandomKey, preserved_generators
from megatron_ext.pipeline.stage import Gradients, StageLayer, StageRun, Value
from megatron_ext.pipeline.timeline import Span
from megatron_ext.pipeline.weight_gradients import WeightGradients

Batches = dict[int, Iterator[Any]]
"""Per direction whose first stage is here: an iterator over (inputs, labels)."""


_Input = tuple[list[Tensor], Spec] | None
"""What another stage made for a computation, or None where it needs nothing."""


class BatchError(UserError):
    """The data iterator gave something that is not (inputs, labels), or ended early."""


@dataclass
class _Held:
    """What is kept of a forward until its backward."""

    run: StageRun
    inputs: list[Tensor]  # what came from the stage before
    outputs: Spec  # what was sent on, or the loss


@dataclass
class Outcome:
    """Of one step on this rank.

    Attributes:
        losses: of the micro-batches whose last stage is here, detached, in the order they ran.
        outputs: of the last stage per (direction, micro-batch), if asked for.
        spans: when every computation ran, seconds of the host's monotonic clock, if asked for.
        weight_grads: by stage, what the weight gradients inside each full backward took, in seconds, if asked for.
    """

    losses: list[Tensor] = field(default_factory=list)
    outputs: dict[tuple[int, int], Value] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    weight_grads: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))


class Executor:
    """One rank's engine room.

    Args:
        module: the rank's stages.
        messenger: channels to the other ranks of this pipeline.
        weights: where weight gradients go.
        device: where the stages compute.
        cast: dtype that floating-point model inputs are cast to; None leaves them.
        set_counting: called with True around forwards of a training step and False otherwise, so that routers count
            every token once, however often it is recomputed.
        synchronize: waits for the device; used only while a timeline is recorded.
        overlap: whether the halves of a pair take turns, and weight gradients fill the waits of a backward; if not,
            nothing is computed while an exchange is waited for.
        recompute: names of phases that keep their inputs only and run again in backward.
    """

    def __init__(self, module: PipelineModule, messenger: Messenger, weights: WeightGradients, device: torch.device,
                 cast: torch.dtype | None = None, set_counting: Callable[[bool], None] = lambda _: None,
                 synchronize: Callable[[], None] = lambda: None, overlap: bool = True,
                 recompute: Collection[str] = ()):
        self.module, self.messenger, self.weights, self.device = module, messenger, weights, device
        self.cast, self.set_counting, self.synchronize = cast, set_counting, synchronize
        self.overlap, self.recompute = overlap, recompute
        self.topology = module.topology
        self.replica = self.topology.replica(module.groups.rank)

    def run(self, plan: Plan, batches: Batches, step: int, training: bool = True, keep_outputs: bool = False,
            record: bool = False, compute_loss: bool = True,
            stage_done: Callable[[int], None] | None = None) -> Outcome:
        """One step (or one evaluation) of `plan`.

        Args:
            plan: its `stages` must be the module's.
            batches: data for the directions that start here.
            step: number of optimizer steps so far; keys the random numbers.
            training: False runs the forwards of a plan without graphs.
            keep_outputs: keep what the last stages returned.
            record: time every computation, waiting for the device around each.
            compute_loss: False leaves the labels where they are and the losses out.
            stage_done: called with a stage of this rank once its last backward of the plan has run, of all its
                micro-batches in all directions: its gradients are complete, but for what other stages add to tied ones.

        Raises:
            BatchError: unusable data.
            MessageError: a peer sent something that the plan does not have.
        """
        run = _Run(self, plan, batches, step, training, keep_outputs, record, compute_loss)
        self.weights.clock = self._clock if record else None
        try:
            run.expect()
            left = Counter(_backwards(plan.compute(self.module.stage_rank))) if stage_done is not None else Counter()
            for instruction in plan.instructions[self.module.stage_rank]:
                if isinstance(instruction, Transfer):
                    run.transfer(instruction)
                else:
                    run.compute(instruction)
                    for stage in _backwards([instruction]) if stage_done is not None else []:
                        left[stage] -= 1
                        if stage_done is not None and not left[stage]:
                            stage_done(stage)
            self.messenger.finish()
        finally:
            self.set_counting(False)
            self.weights.clock = None
        assert not run.handed, f"handed over and never used: {sorted(run.handed)}"
        assert not run.held, f"activations left over: {sorted(run.held)}"
        assert not self.weights.waiting, f"weight gradients left over: {self.weights.waiting}"
        return run.outcome

    def _clock(self) -> float:
        self.synchronize()
        return time.perf_counter()


class _Run:
    """State of one step."""

    def __init__(self, executor: Executor, plan: Plan, batches: Batches, step: int, training: bool, keep_outputs: bool,
                 record: bool, compute_loss: bool):
        self.x, self.plan, self.batches, self.step = executor, plan, batches, step
        self.training, self.keep_outputs, self.record = training, keep_outputs, record
        self.loss_fn, self.compute_loss = executor.module.loss_fn, compute_loss
        self.needs_labels = compute_loss and self.loss_fn is not None
        self.rank = executor.module.stage_rank
        self.last = [len(stages) - 1 for stages in plan.placement]
        self.held: dict[tuple[int, int, int], _Held] = {}
        self.outgoing: dict[Message, Value] = {}
        self.handed: dict[Key, Value] = {}  # to another stage of this rank
        self.labels: dict[tuple[int, int], Any] = {}
        self.outcome = Outcome()

    # -- messages

    def _peer(self, stage_rank: int) -> int:
        return self.x.topology.rank_of(stage_rank, self.x.replica)

    def expect(self) -> None:
        """Announces what this rank will receive, in the order of each channel."""
        keys = []
        for instruction in self.plan.instructions[self.rank]:
            if isinstance(instruction, Transfer) and instruction.kind[0] == "R":
                keys.append((Key(*instruction.message[:4]), self._peer(instruction.message.source)))
        for direction, ranks in enumerate(self.plan.placement):
            if ranks[-1] == self.rank and ranks[0] != self.rank and self.needs_labels:
                keys += [(Key("L", direction, 0, k), self._peer(ranks[0]))
                         for k in range(self.plan.micro_batches_of(direction))]
        self.x.messenger.expect(keys)

    def transfer(self, instruction: Transfer) -> None:
        if instruction.kind[0] == "R":
            return  # posted by the messenger as soon as the message before it in the channel is here
        m = instruction.message
        self.x.messenger.send(Key(*m[:4]), self._peer(m.destination), self.outgoing.pop(m))

    # -- computations

    def compute(self, instruction: Compute | Pair) -> None:
        if self.record:
            ready = [self._prefetch(part) for part in instruction.parts]
            self.x.synchronize()
            start = time.perf_counter()
            self._run_parts(instruction, ready)
            self.x.synchronize()
            self.outcome.spans.append(Span(start, time.perf_counter(), instruction))
        else:
            self._run_parts(instruction, [self._prefetch(part) for part in instruction.parts])

    def _run_parts(self, instruction: Compute | Pair, ready: list[_Input]) -> None:
        halves = [self._half(part, received) for part, received in zip(instruction.parts, ready, strict=True)]
        if isinstance(instruction, Pair):
            together = self.x.module.paired_step(instruction.stage)
            forward, backward = halves
            if together is not None:
                together(forward.finish, backward.finish, instruction.backward.kind == "B")
                return
            if self.x.overlap:
                _take_turns(backward, forward)
                return
        for half in halves:
            half.finish()

    def _half(self, part: Compute, received: _Input) -> _Half:
        """A computation, ready to run up to its first wait."""
        half = _Half(self.x.device)
        if part.kind == "W":
            half.steps = self._take(part)
        else:
            # Loaded outside of the steps, which leave the generators of random numbers as they were.
            value = self._load(part.direction, part.micro_batch) if part.kind == "F" and part.stage == 0 else None
            half.steps = (self._forward(part, received, value, half) if part.kind == "F" else
                          self._backward(part, received, half))
        return half

    def _take(self, part: Compute) -> Generator[None, None, None]:
        self.x.weights.take((part.direction, part.stage, part.micro_batch))
        yield from ()

    def _prefetch(self, part: Compute) -> _Input:
        """Waits for what a computation needs from another stage."""
        for m in self.plan.needs(part):  # one at most
            return self.x.messenger.receive(Key(*m[:4]), self._peer(m.source))
        d, stage, k = part.direction, part.stage, part.micro_batch
        maker = Key("F", d, stage - 1, k) if part.kind == "F" else Key("B", d, stage + 1, k)
        if part.kind == "W" or maker not in self.handed:
            return None
        value = self.handed.pop(maker)
        tensors = _tensors(value)
        return [t.detach() for t in tensors], Spec.of(tensors, isinstance(value, tuple))

    def _give(self, part: Compute, value: Value) -> None:
        """Puts aside what a computation made for another stage, here or elsewhere."""
        messages = self.plan.gives(part)
        for message in messages:
            self.outgoing[message] = value
        if not messages and (part.stage < self.last[part.direction] if part.kind == "F" else part.stage > 0):
            key = Key("F" if part.kind == "F" else "B", part.direction, part.stage, part.micro_batch)
            check_sendable(key, value)  # the same rule wherever the next stage is
            self.handed[key] = value

    def _forward(self, part: Compute, received: _Input, value: Any, half: _Half) -> Generator[None, None, None]:
        d, stage, k = part.direction, part.stage, part.micro_batch
        inputs: list[Tensor] = []
        if received is not None:
            inputs, spec = received
            for tensor, t in zip(inputs, spec.tensors, strict=True):
                tensor.requires_grad_(t.requires_grad and self.training)
            value = tuple(inputs) if spec.is_tuple else inputs[0]
        layers = self.x.module.stage_layers(stage)
        if stage == self.last[d] and (self.keep_outputs or self.compute_loss):
            layers = [*layers, self._end(d, k)]
        half.run = StageRun(layers, self._random_key(d, k), self.training, self.x.recompute, self.x.set_counting)
        output = yield from half.run.forward(value)
        if self.training:
            self.held[d, stage, k] = _Held(half.run, inputs, Spec.of(_tensors(output), isinstance(output, tuple)))
        self._give(part, output)

    def _end(self, direction: int, micro_batch: int) -> StageLayer:
        """What follows the last layer: the loss."""
        def end(_: Any, output: Any) -> Any:
            if self.keep_outputs:
                self.outcome.outputs[direction, micro_batch] = output
            if not self.compute_loss:
                return output
            return self._loss(direction, micro_batch, output) / self.plan.micro_batches_of(direction)

        return StageLayer([Phase("loss", ("x",), ("x",), end)])

    def _loss(self, direction: int, micro_batch: int, output: Any) -> Tensor:
        loss = output if self.loss_fn is None else self.loss_fn(output, self._labels(direction, micro_batch))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise BatchError(f"the loss of direction {direction}, micro-batch {micro_batch} must be one number, "
                             f"not {tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__}")
        self.outcome.losses.append(loss.detach().float().reshape(()))
        return loss

    def _backward(self, part: Compute, received: _Input, half: _Half) -> Generator[None, None, None]:
        d, stage, _ = where = part.direction, part.stage, part.micro_batch
        held = self.held.pop(where)
        half.run = held.run
        gradients: Gradients
        if stage == self.last[d]:
            [loss] = held.outputs.tensors
            gradients = [torch.ones(loss.shape, dtype=loss.dtype, device=self.x.device)]
        else:
            assert received is not None
            arrived = iter(self._check_gradients(part, received[0], held.outputs))
            gradients = [next(arrived) if t.requires_grad else None for t in held.outputs.tensors]
        weights = self.x.weights
        weights.taken = 0.0
        # Where there is something to wait for, weight gradients fill the time, also in a full backward.
        fills = part.kind == "B" and self.x.overlap and self.x.module.overlaps(stage)
        defer = where if part.kind == "I" or fills else None

        def fill() -> None:
            if half.other is not None:
                half.other.advance()
            if fills:
                weights.take_queued(where)
                held.run.advance()

        if part.kind == "I":
            weights.open(where)  # its W will come, whether anything is queued for it or not
        found = yield from held.run.backward(
            gradients, lambda roots, values: weights.backward(roots, values, defer), fill)
        if fills:
            weights.take_queued(where)
        if self.record and part.kind == "B":
            self.outcome.weight_grads[stage].append(weights.taken)
        if stage:
            found = found or [None] * len(held.inputs)
            self._give(part, tuple(torch.zeros_like(t) if gradient is None else gradient
                                   for t, gradient in zip(held.inputs, found, strict=True) if t.requires_grad))

    def _check_gradients(self, part: Compute, found: list[Tensor], outputs: Spec) -> list[Tensor | None]:
        wanted = [t for t in outputs.tensors if t.requires_grad]
        if [(tuple(g.shape), g.dtype) for g in found] != [(t.shape, t.dtype) for t in wanted]:
            raise MessageError(f"gradient of direction {part.direction}, stage {part.stage}, micro-batch "
                               f"{part.micro_batch}: got {[(tuple(g.shape), g.dtype) for g in found]}, but the outputs "
                               f"were {[(t.shape, t.dtype) for t in wanted]}")
        return list(found)

    # -- data

    def _random_key(self, direction: int, micro_batch: int) -> RandomKey:
        grid = self.x.topology
        shard = grid.shard(direction, self.x.replica)
        number = micro_batch * grid.data_parallel_size + shard
        return RandomKey(self.x.module.base_seed, self.step if self.training else -1, number)

    def _load(self, direction: int, micro_batch: int) -> Value:
        """The inputs of a micro-batch; its labels set off to the last stage."""
        try:
            batch = next(self.batches[direction])
        except StopIteration:
            raise BatchError(f"the data iterator ended at micro-batch {micro_batch} of "
                             f"{self.plan.micro_batches_of(direction)} that a step needs") from None
        if not self.needs_labels:
            return self._on_device(batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else batch, True)
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise BatchError(f"a batch must be (inputs, labels), not {type(batch).__name__}"
                             + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""))
        labels = self._on_device(batch[1], False)
        destination = self.plan.placement[direction][-1]
        if destination == self.rank:
            self.labels[direction, micro_batch] = labels
        else:
            self.x.messenger.send(Key("L", direction, 0, micro_batch), self._peer(destination), labels)
        return self._on_device(batch[0], True)

    def _labels(self, direction: int, micro_batch: int) -> Value:
        source = self.plan.placement[direction][0]
        if source == self.rank:
            return self.labels.pop((direction, micro_batch))
        tensors, spec = self.x.messenger.receive(Key("L", direction, 0, micro_batch), self._peer(source))
        return tuple(tensors) if spec.is_tuple else tensors[0]

    def _on_device(self, value: Any, cast: bool) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(self._on_device(v, cast) for v in value)
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            raise BatchError(f"a batch must hold tensors or tuples of tensors, not {type(value).__name__}") from None
        dtype = self.x.cast if cast and value.is_floating_point() else None
        # A copy in any case: it is read again in backward, when the iterator may have filled its buffer anew.
        return value.detach().to(self.x.device, dtype, non_blocking=True, copy=True)


class _Half:
    """A computation under way: half of a pair, or one alone."""

    def __init__(self, device: torch.device):
        self.device = device
        self.steps: Iterator[None] = iter(())
        self.run: StageRun | None = None
        self.other: _Half | None = None  # the one it takes turns with

    def go_on(self) -> bool:
        """Runs up to the next wait; returns whether there is one."""
        with preserved_generators(self.device):
            return next(self.steps, self) is not self

    def finish(self) -> None:
        while self.go_on():
            pass

    def advance(self) -> None:
        """Moves on the exchanges under way, behind which the other has computed something."""
        if self.run is not None:
            self.run.advance()


def _take_turns(first: _Half, second: _Half) -> None:
    first.other, second.other = second, first
    while first.go_on():
        second.advance()
        first, second = second, first
    second.finish()


def _backwards(instructions: Sequence[Compute | Pair]) -> list[int]:
    """The stages whose weight gradients these take, once for each micro-batch."""
    return [part.stage for i in instructions for part in i.parts if part.kind in ("B", "W")]


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in (value if isinstance(value, tuple) else (value,)) if isinstance(t, Tensor)]
