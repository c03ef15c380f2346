"""DeepEP as the transport of dispatch and combine, on NVIDIA GPUs where it is installed.

Unproven on hardware: written from the documentation of `deep_ep.Buffer` (its "normal" kernels) and tested against a
stand-in of the same face; no machine with DeepEP was at hand. Results differ from collective.py's by the rounding of
sums only: DeepEP sums what ranks send in an order of its own.

Its semantics are ours: a token goes once to each rank that has one of its experts, over NVLink inside a node and once
over RDMA to each other node; what comes back is summed on the way. So two hops, and their counting, are its own affair,
and `advance` has nothing to do. It moves BF16, or E4M3 with FP32 scales, and combines BF16. Its dispatch waits on the
host for the numbers of rows, the one such wait of a micro-batch in a layer; backward reuses its handle.

Ranks that disagree are not found out here: use it for models that torch.distributed has taken through a step.

Shape letters: T tokens here, k experts of a token, C copies here, h hidden size.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext import fp8
from megatron_ext.comm.copies import Copies
from megatron_ext.comm.route import Terms
from megatron_ext.comm.wire import TILE
from megatron_ext.parallel.expert_parallel import ExpertParallel

_log = logging.getLogger("megatron_ext")


def _everywhere(ready: bool, ep: ExpertParallel) -> bool:
    found: list[Any] = [None] * ep.size
    dist.all_gather_object(found, ready, group=ep.group)
    return all(found)


def connect(ep: ExpertParallel, hidden: int, dtype: torch.dtype, device: torch.device, *,
            everywhere: Callable[[bool, ExpertParallel], bool] = _everywhere) -> Any | None:
    """A `deep_ep.Buffer` for all layers of this expert group; collective over the group.

    Args:
        everywhere: whether all ranks of the group are ready; the constructor of a buffer is collective, so a rank
            without the package would leave the others waiting in it.

    Returns:
        None where it cannot serve; one line in the log then says why, and that torch.distributed is used.
    """
    reason = None
    if ep.group is None:
        reason = "experts are not split over ranks"
    elif device.type != "cuda":
        reason = f"it needs CUDA, not {device.type}"
    elif dtype != torch.bfloat16 or hidden % TILE:
        reason = f"it needs a BF16 model with a hidden size divisible by {TILE}, not {dtype} with {hidden}"
    else:
        try:
            kind = importlib.import_module("deep_ep").Buffer
        except Exception as error:  # a wheel for another CUDA fails in whatever way it likes
            reason = f"deep_ep cannot be imported ({error})"
        if not everywhere(reason is None, ep):
            reason = reason or "another rank of the expert group cannot import it"
    if reason is None:
        buffer = None
        try:
            settings = kind.get_dispatch_config(ep.size), kind.get_combine_config(ep.size)
            width = hidden * dtype.itemsize
            nvl = max(setting.get_nvl_buffer_size_hint(width, ep.size) for setting in settings)
            rdma = max(setting.get_rdma_buffer_size_hint(width, ep.size) for setting in settings)
            buffer = kind(ep.group, nvl, rdma)
        except (AssertionError, AttributeError, RuntimeError) as error:
            reason = f"deep_ep refuses {ep.size} ranks ({type(error).__name__}: {error})"
        if everywhere(buffer is not None, ep):
            return buffer
        reason = reason or "it refuses another rank of the expert group"
    (_log.warning if ep.rank == 0 else _log.debug)("expert dispatch over torch.distributed, not DeepEP: %s", reason)
    return None


class DeepEP:
    """One micro-batch's way through one layer, with the face of `Collective`.

    Args:
        experts: [T, k] int64.
        buffer: of the expert group, made by `connect`.
        backend: of the kernels that quantise.
    """

    def __init__(self, experts: Tensor, terms: Terms, ep: ExpertParallel, buffer: Any, backend: str):
        assert terms.chunks == 1, "DeepEP sends a token's copies all at once"
        self.terms, self.buffer, self.backend = terms, buffer, backend
        self.first_expert, _ = ep.expert_range(terms.num_experts)
        self._experts = experts
        *self._layout, self._event = buffer.get_dispatch_layout(experts, terms.num_experts, async_finish=True)
        self._came: tuple[Any, ...] = ()

    def start_dispatch(self, tokens: Tensor, weights: Tensor) -> list[int]:
        """[T, h] and [T, k] FP32; returns the rows of each expert here."""
        per_rank, per_node, per_expert, in_rank = self._layout
        x, experts, numbers, groups, self._handle, self._event = self.buffer.dispatch(
            self._sent(tokens), num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank, num_tokens_per_expert=per_expert, topk_idx=self._experts,
            topk_weights=weights.float().contiguous(), previous_event=self._event, async_finish=True,
            allocate_on_comm_stream=True)
        self.copies, self._came = len(experts), (x, experts, numbers)
        self._layout, self._experts = [], experts.new_empty(0)
        return list(groups)

    def finish_dispatch(self, chunk: int) -> Copies:
        x, experts, weights = self._wait()
        # Local numbers, -1 for experts elsewhere. Copies come by rank and token, so where they lie is their order.
        return Copies(self._received(x), weights, experts + self.first_expert,
                      torch.arange(self.copies, device=experts.device))

    def start_combine(self, sums: Tensor) -> None:
        *came, self._event = self.buffer.combine(sums.to(torch.bfloat16), self._handle, async_finish=True)
        self._came = tuple(came)

    def finish_combine(self) -> Tensor:
        combined, _ = self._wait()
        return combined

    def start_combine_backward(self, dy: Tensor) -> None:
        x, *_, self._event = self.buffer.dispatch(self._sent(dy), handle=self._handle, async_finish=True)
        self._came = (x,)

    def finish_combine_backward(self, chunk: int) -> Tensor:
        return self._received(*self._wait())

    def start_dispatch_backward(self, sums: Tensor, weights: Tensor) -> None:
        *came, self._event = self.buffer.combine(sums.to(torch.bfloat16), self._handle, topk_weights=weights,
                                                 async_finish=True)
        self._came = tuple(came)

    def finish_dispatch_backward(self) -> tuple[Tensor, Tensor]:
        dtokens, dweights = self._wait()
        return dtokens, dweights

    def advance(self) -> None:
        """DeepEP forwards inside a node by itself."""

    def _wait(self) -> tuple[Any, ...]:
        """The current stream, not the host, waits for what was started."""
        self._event.current_stream_wait()
        came, self._came = self._came, ()
        return came

    def _sent(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """[T, h] as DeepEP takes it."""
        if self.terms.dispatch != "fp8":
            return x.contiguous()
        quantized = fp8.quantize(x, block=(1, TILE), power_of_two=True, backend=self.backend)
        return quantized.data, quantized.scale.contiguous()

    def _received(self, x: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """[C, h] in BF16."""
        if isinstance(x, Tensor):
            return x
        return fp8.QuantizedTensor(*x, block=(1, TILE)).dequantize(torch.bfloat16, backend=self.backend)
