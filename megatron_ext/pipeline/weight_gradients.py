"""Weight gradients: FP32 accumulation, and the queue that separates W from I.

Every trainable parameter gets an FP32 `main_grad`, into which the gradients of all micro-batches of a step are summed
whatever the parameter's dtype (DeepSeek-V3 report, section 3.3.2). They arrive by two ways:

* matrix products that can be split put a closure into the parameter's sink (layers/linear.py). In a full backward "B"
  it runs at once; in an input-grad "I" it is queued under (direction, stage, micro-batch) and runs in the "W" of that
  key. The queue holds the operands, never a gradient of the parameter's size;
* everything else goes through autograd into `.grad`, which is folded into `main_grad` after each backward. The user's
  hooks on parameters fire as always, for a parameter with hooks gets no sink.

Sinks are there only while a backward of the pipeline runs: what a layer does with `torch.autograd.grad` in its
forward is none of its business.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Key = tuple[int, int, int]
"""(direction, stage, micro-batch)"""


class WeightGradients:
    """The FP32 gradients of this rank's parameters, and the queue of weight gradients not yet taken.

    Args:
        parameters: the rank's parameters; those that do not require a gradient are skipped.
        hooked: ids of those that carry hooks of the user (`hooked_parameters`). Hooks on others are DeepSpeed's, unless
            they come after now.

    Attributes:
        clock: seconds on the device; set while a step is recorded, so that `taken` counts.
        taken: seconds that the weight gradients of full backwards took since it was last set to 0.
        whole: parameters whose gradient has come through autograd, so that it is part of I and not of W.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], hooked: Container[int] = ()):
        self.parameters: list[Any] = [p for p in parameters if p.requires_grad]  # Any: they are given attributes
        self.whole: set[nn.Parameter] = set()
        self.clock: Callable[[], float] | None = None
        self.taken = 0.0
        self._foreign_hooks = {id(p): -1 if id(p) in hooked else _count_hooks(p) for p in self.parameters}
        self._split: list[Any] = []
        self._queue: dict[Key, list[tuple[Any, Callable[[Tensor], None]]]] = {}

    def begin(self) -> None:
        """Zeroes the gradients for a new step, and finds out which parameters the user has hooks on."""
        for p in self.parameters:
            if getattr(p, "main_grad", None) is None:
                p.main_grad = torch.zeros_like(p, dtype=torch.float32, memory_format=torch.contiguous_format)
            else:
                p.main_grad.zero_()
            p.grad = None
        self._split = [p for p in self.parameters if _count_hooks(p) == self._foreign_hooks[id(p)]]
        self._queue.clear()  # what a step that failed has left

    def backward(self, roots: Sequence[object], gradients: Sequence[Tensor | None], defer: Key | None) -> None:
        """Runs autograd from `roots`; weight gradients are taken at once, or queued under `defer`."""
        waiting = None if defer is None else self._queue.setdefault(defer, [])

        def sink(parameter: Any, accumulate: Callable[[Tensor], None]) -> None:
            if waiting is not None:
                waiting.append((parameter, accumulate))
                return
            began = self.clock() if self.clock is not None else 0.0
            with torch.no_grad():
                accumulate(parameter.main_grad)
            if self.clock is not None:
                self.taken += self.clock() - began

        for p in self._split:
            p.weight_grad_sink = sink
        try:
            if roots:
                torch.autograd.backward(roots, gradients)  # type: ignore[arg-type]
        finally:
            for p in self._split:
                p.weight_grad_sink = None
        for p in self.parameters:
            if p.grad is not None:
                p.main_grad.add_(p.grad)
                p.grad = None
                self.whole.add(p)

    def open(self, key: Key) -> None:
        """Begins the queue of an "I"."""
        self._queue[key] = []

    def take(self, key: Key) -> None:
        """The "W" of a micro-batch: runs what its "I" queued. Nothing, if the stage could not be split."""
        with torch.no_grad():
            for parameter, accumulate in self._queue.pop(key):
                accumulate(parameter.main_grad)

    def take_queued(self, key: Key) -> None:
        """Within a full backward: runs what is queued so far, which fills the wait for an exchange."""
        if self._queue.get(key):
            began = self.clock() if self.clock is not None else 0.0
            self.take(key)
            if self.clock is not None:
                self.taken += self.clock() - began
        self._queue.pop(key, None)

    @property
    def waiting(self) -> list[Key]:
        """Micro-batches whose "I" ran and whose "W" did not."""
        return sorted(self._queue)


def _count_hooks(p: nn.Parameter) -> int:
    return len(p._backward_hooks or ()) + len(getattr(p, "_post_accumulate_grad_hooks", None) or ())


def hooked_parameters(module: nn.Module) -> set[int]:
    """Ids of the parameters that carry gradient hooks."""
    return {id(p) for p in module.parameters() if _count_hooks(p)}
