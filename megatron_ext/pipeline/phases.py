"""From the phases of a layer to the durations of F, I, W and their pair.

A mixture-of-experts block runs attention, dispatch, MLP, combine; its backward runs combine, MLP, dispatch, attention,
each of the two computations as input gradient and weight gradient. Dispatch and combine are all-to-alls. A forward or
backward alone waits for them. A pair (DeepSeek-V3 report, section 3.2.1, figure 4) has a computation of the other
micro-batch for each: with F of one and B of the other micro-batch, block by block,

    computation     attention F, MLP I, MLP W, MLP F, attention I, attention W
    communication   combine B, dispatch F, dispatch B, combine F

Both run in this order, each phase as soon as what it needs is there.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import pairwise

from megatron_ext.pipeline.simulator import Times

Phase = tuple[str, str, int]  # ("F", "I" or "W", name, block)


@dataclass(frozen=True)
class Phases:
    """Durations of one block's phases for one micro-batch; from them those of a rank's share of the model.

    Attributes:
        attention, mlp: forward.
        dispatch, combine: the all-to-alls, as long forward as backward.
        attention_input_grad, mlp_input_grad, attention_weight_grad, mlp_weight_grad: None: as the forward.
        blocks: in a rank's share.
        split: whether a backward in a pair sends its input gradient on before its weight gradient has run.
    """

    attention: float
    dispatch: float
    mlp: float
    combine: float
    attention_input_grad: float | None = None
    mlp_input_grad: float | None = None
    attention_weight_grad: float | None = None
    mlp_weight_grad: float | None = None
    blocks: int = 1
    split: bool = True

    def times(self, message: float = 0.0) -> Times:
        """Durations of a rank's whole share, for `schedule` and `simulate`."""
        length = self._length
        blocks = range(self.blocks)
        forward = sum(length("F", name) for name in ("attention", "dispatch", "mlp", "combine") for _ in blocks)
        input_grad = sum(length("I", name) for name in ("attention", "dispatch", "mlp", "combine") for _ in blocks)
        weight_grad = sum(length("W", name) for name in ("attention", "mlp") for _ in blocks)
        return Times(forward, input_grad, weight_grad, self.pair, message)

    @property
    def communication(self) -> float:
        """All-to-all of a forward and a backward."""
        return 2 * (self.dispatch + self.combine) * self.blocks

    @property
    def exposed(self) -> float:
        """Communication of a pair that no computation hides."""
        kinds = [(kind, name) for kind in "FIW" for name in ("attention", "mlp")]
        return max(0.0, self.pair - self.blocks * sum(self._length(kind, name) for kind, name in kinds))

    @property
    def pair(self) -> float:
        """How long a forward and a full backward take as a pair."""
        last = self.blocks - 1
        computation: deque[Phase] = deque()
        communication: deque[Phase] = deque()
        needs: dict[Phase, Phase] = {}
        for block in range(self.blocks):
            back = last - block
            computation += [("F", "attention", block), ("I", "mlp", back), ("W", "mlp", back), ("F", "mlp", block),
                            ("I", "attention", back), ("W", "attention", back)]
            communication += [("I", "combine", back), ("F", "dispatch", block), ("I", "dispatch", back),
                              ("F", "combine", block)]
            chain = ("attention", "dispatch", "mlp", "combine")
            for before, after in pairwise(chain):
                needs["F", after, block] = ("F", before, block)
                needs["I", before, block] = ("I", after, block)
            if block:
                needs["F", "attention", block] = ("F", "combine", block - 1)
                needs["I", "combine", block - 1] = ("I" if self.split else "W", "attention", block)
            if not self.split:
                needs["I", "dispatch", block] = ("W", "mlp", block)
            needs["W", "mlp", block], needs["W", "attention", block] = ("I", "mlp", block), ("I", "attention", block)
        return self._run((computation, communication), needs)

    def _run(self, streams: tuple[deque[Phase], ...], needs: dict[Phase, Phase]) -> float:
        """When the last phase ends; a stream runs its phases in order, each after the one that it needs."""
        end: dict[Phase, float] = {}
        clocks = [0.0] * len(streams)
        while any(streams):
            for index, stream in enumerate(streams):
                while stream and (stream[0] not in needs or needs[stream[0]] in end):
                    phase = stream.popleft()
                    start = max(clocks[index], end[needs[phase]] if phase in needs else 0.0)
                    clocks[index] = end[phase] = start + self._length(phase[0], phase[1])
        return max(clocks)

    def _length(self, kind: str, name: str) -> float:
        forward: float = getattr(self, name)
        if kind == "F" or name in ("dispatch", "combine"):
            return forward
        gradient: float | None = getattr(self, f"{name}_{'input' if kind == 'I' else 'weight'}_grad")
        return forward if gradient is None else gradient
