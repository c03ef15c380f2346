"""Weight gradients: FP32 accumulation, and the queue that separates W from I.

Every trainable parameter gets an FP32 `main_grad`, into which the gradients of all micro-batches of a step are summed
whatever the parameter's dtype (DeepSeek-V3 report, section 3.3.2). They arrive by two ways:

* matrix products that can be split put a closure into the parameter's sink (layers/linear.py). In a full backward "B" it
  runs at once; in an input-grad "I" it is queued under (direction, stage, micro-batch) and runs in the "W" of that key. The
  queue holds the operands, never a gradient of the parameter's size;
* everything else goes through autograd into `.grad`, which is folded into `main_grad` after each backward. The user's
  hooks on parameters fire as always, for a parameter with hooks is never split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

Key = tuple[int, int, int]
"""(direction, stage, micro-batch)"""


class WeightGradients:
    """The FP32 gradients of this rank's parameters, and the queue of weight gradients not yet taken.

    Args:
        parameters: the rank's parameters; those that do not require a gradient are skipped.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.parameters: list[nn.Parameter] = [p for p in parameters if p.requires_grad]
        self._hooks = {id(p): _count_hooks(p) for p in self.parameters}
        self._queue: dict[Key, list[tuple[nn.Parameter, Callable[[Tensor], None]]]] = {}
        self._recording: Key | None = None
        self._hooked_by_user: set[int] = set()

    def note_hooks(self, by_user: set[int]) -> None:
        """Fixes which hooks are not the user's: all present now, except on the parameters in `by_user` (ids)."""
        self._hooked_by_user = by_user
        self._hooks = {id(p): _count_hooks(p) for p in self.parameters}

    def begin(self) -> None:
        """Zeroes the gradients for a new step, and installs or removes sinks as the user's hooks demand."""
        assert not self._queue, f"weight gradients left over from the last step: {sorted(self._queue)}"
        for p in self.parameters:
            if getattr(p, "main_grad", None) is None or p.main_grad.device != p.device:
                p.main_grad = torch.zeros_like(p, dtype=torch.float32, memory_format=torch.contiguous_format)
            else:
                p.main_grad.zero_()
            p.grad = None
            hooked = id(p) in self._hooked_by_user or _count_hooks(p) != self._hooks[id(p)]
            p.weight_grad_sink = None if hooked else self._sink

    def end(self) -> None:
        """Removes the sinks, so that the layers are ordinary autograd outside a step."""
        for p in self.parameters:
            p.weight_grad_sink = None
        self._queue.clear()
        self._recording = None

    def _sink(self, parameter: nn.Parameter, accumulate: Callable[[Tensor], None]) -> None:
        if self._recording is None:
            with torch.no_grad():
                accumulate(parameter.main_grad)
        else:
            self._queue.setdefault(self._recording, []).append((parameter, accumulate))

    def backward(self, roots: Sequence[object], gradients: Sequence[Tensor | None], defer: Key | None) -> None:
        """Runs autograd from `roots`; weight gradients are taken at once, or queued under `defer`."""
        self._recording = defer
        try:
            if roots:
                torch.autograd.backward(roots, gradients)  # type: ignore[arg-type]
        finally:
            self._recording = None
        for p in self.parameters:
            if p.grad is not None:
                p.main_grad.add_(p.grad)
                p.grad = None

    def take(self, key: Key) -> None:
        """The "W" of a micro-batch: runs what its "I" queued. Nothing, if the stage could not be split."""
        with torch.no_grad():
            for parameter, accumulate in self._queue.pop(key, ()):
                accumulate(parameter.main_grad)

    @property
    def waiting(self) -> int:
        """Micro-batches whose weight gradients are queued."""
        return len(self._queue)


def _count_hooks(p: nn.Parameter) -> int:
    return len(p._backward_hooks or ()) + len(getattr(p, "_post_accumulate_grad_hooks", None) or ())


def hooked_parameters(module: nn.Module) -> set[int]:
    """Ids of the parameters that carry gradient hooks."""
    return {id(p) for p in module.parameters() if _count_hooks(p)}
