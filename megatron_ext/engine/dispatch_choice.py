"""How tokens travel to experts in this job: one hop or two, in how many chunks; chosen by measuring, on the job itself.

`"two_hop": "auto"` is settled before the first step, by timing both ways with random tokens over the real links;
afterwards it stays, for sums inside a node round otherwise than sums over ranks. `"dispatch_chunks": "auto"` is settled
in the first steps, which run every candidate in turn: chunks change no result, so trying them costs nothing. Both are
decided from times gathered from all ranks, by the same arithmetic on each; checkpoints keep the choice, and a resumed
job does not measure again.

Letters: N ranks of an expert group on G nodes, E experts of a layer, T tokens.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.comm import deep_ep
from megatron_ext.comm.dispatch import Dispatcher
from megatron_ext.comm.traffic import Traffic
from megatron_ext.config import ConfigError
from megatron_ext.layers.router import Router
from megatron_ext.parallel import agreed

TRIES = 3  # of each way
TOKENS = 512  # per rank, that are sent to see which way is faster
CANDIDATES = (1, 2, 4)  # chunks
VECTORS = 32  # elements of two AVX-512 vectors of FP32, which torch takes at a time
WORTH = 0.02  # more chunks must save this share of the pipeline's time, or they are not worth their messages


class DispatchMixin:
    """The part of the engine that knows how tokens travel."""

    def _start_dispatch(self) -> None:
        section, ep = self.section.expert_parallel, self.process_groups.expert_placement()
        self.traffic = Traffic()
        self._moe = [layer for layer in self.module.children_with("set_dispatch") if layer.dispatcher is not None]
        self._tuned: dict[str, Any] = {}
        with agreed(self.process_groups.control):
            if section.two_hop is True and ep.size > 1 and ep.layout is None:
                raise ConfigError("megatron_ext.expert_parallel.two_hop", True, "needs to know which ranks share a "
                                  "node, and neither LOCAL_SIZE nor LOCAL_WORLD_SIZE is set",
                                  "set megatron_ext.expert_parallel.ranks_per_node")
        self._set_dispatch(traffic=self.traffic, two_hop=section.two_hop is True and ep.layout is not None,
                           chunks=1 if section.dispatch_chunks == "auto" else section.dispatch_chunks)
        if section.transport == "deep_ep" and self._moe:
            layer = self._moe[0]
            buffer = deep_ep.connect(ep, layer.hidden_size, next(layer.parameters()).dtype, self.device)
            self._set_dispatch(buffer=buffer)
        if type(section.dispatch_chunks) is int:
            used = {layer.dispatcher.parts for layer in self._moe}
            if used - {section.dispatch_chunks}:
                self._say_dispatch(f"experts in {max(used)} chunks, not {section.dispatch_chunks}, which must divide "
                                   "the experts of a rank")
        if section.two_hop is True and self.process_groups.inter_node is None:
            self._say_dispatch("two_hop makes no difference: an expert group is in one node, or has one rank on each")
        self._trials: list[tuple[int, float]] = []
        warnings = [w for r in self.routers.values() if (w := node_limit_warning(r, ep.size, ep.layout)) is not None]
        own_transport = any(layer.dispatcher.buffer is not None for layer in self._moe)
        mine = max((self._most_chunks(layer) for layer in self._moe), default=1), warnings[:1], own_transport
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine, group=self.process_groups.control)
        # What follows is collective over the job, also where a rank has no experts.
        own_transport = any(own for *_, own in found)
        most = max(chunks for chunks, *_ in found) if ep.size > 1 and self._tunes_chunks() and not own_transport else 1
        self._candidates = [c for c in CANDIDATES if c <= most] if most > 1 else []
        self._hops_chosen = section.two_hop != "auto" or own_transport
        for warning in [w for _, rank, _ in found for w in rank][:1]:
            self._say_dispatch(warning)

    def _most_chunks(self, layer: Any) -> int:
        """1 where chunks would change results: torch's SiLU on CPUs rounds the end of a tensor that does not fill whole
        vectors otherwise than the rest, and what lies there depends on chunks."""
        if self.device.type == "cpu" and layer.expert_width % VECTORS:
            return 1
        return layer.dispatcher.num_experts // layer.dispatcher.ep.size

    def _set_dispatch(self, **changes: Any) -> None:
        self._tuned |= {key: value for key, value in changes.items() if key in ("chunks", "two_hop")}
        for layer in self._moe:
            layer.set_dispatch(**changes)
        self.module.forget_phases()

    def _tunes_chunks(self) -> bool:
        return self.section.expert_parallel.dispatch_chunks == "auto"

    # -- hops

    def _choose_hops(self) -> None:
        """Before the first step; collective over the job, and over all expert groups at once."""
        if self._hops_chosen:
            return
        self._hops_chosen = True
        if self.process_groups.inter_node is None:
            return
        mine = [self._time_way(layer) for layer in self._moe[:1]]
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine, group=self.process_groups.control)
        times = [way for rank in found for way in rank]
        if not times:
            return
        one, two = (max(way[hops] for way in times) for hops in (False, True))  # all ranks have the same numbers
        self._set_dispatch(two_hop=two < one)
        self._say_dispatch(f"tokens travel in {'two hops' if two < one else 'one hop'}: there and back took "
                           f"{1000 * one:.1f} ms in one, {1000 * two:.1f} ms in two")

    def _time_way(self, layer: Any) -> dict[bool, float]:
        """Seconds that random tokens take through one layer's experts and back, in one hop and in two."""
        dispatcher: Dispatcher = layer.dispatcher
        generator = torch.Generator().manual_seed(self.process_groups.rank)
        # Chosen as the router would, groups and all, for the number of nodes that a token visits decides.
        experts = layer.choose(torch.rand(TOKENS, dispatcher.num_experts, generator=generator).to(self.device))
        tokens = torch.zeros(TOKENS, layer.hidden_size, dtype=next(layer.parameters()).dtype, device=self.device)
        weights = torch.ones(experts.shape, device=self.device)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(TRIES + 1):
            for two_hop, found in seconds.items():
                dist.barrier(self.process_groups.expert_parallel)
                began = time.perf_counter()
                way = replace(dispatcher, two_hop=two_hop, traffic=None, chunks=1).announce(experts, tokens)
                way.start_dispatch(tokens, weights)
                rows, row_weights = way.finish_dispatch(0)
                way.start_combine([rows], [row_weights])
                way.finish_combine()
                self.executor.synchronize()
                if turn:  # the first opens connections
                    found.append(time.perf_counter() - began)
        return {two_hop: statistics.median(found) for two_hop, found in seconds.items()}

    # -- chunks

    def _next_chunks(self) -> bool:
        """Sets the number of chunks to try in this step; returns whether the step is a trial."""
        if not self._candidates or self._measuring():
            return False
        turn = len(self._trials)
        self._set_dispatch(chunks=self._candidates[turn % len(self._candidates)])
        return True

    def _after_trial(self, seconds: float) -> None:
        """Keeps what a trial took; decides when there are enough; collective then."""
        self._trials.append((self._tuned["chunks"], seconds))
        if len(self._trials) < (TRIES + 1) * len(self._candidates):
            return
        counted = self._trials[len(self._candidates):]  # without the first round
        mine = {c: statistics.median(s for chunks, s in counted if chunks == c) for c in self._candidates}
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine, group=self.process_groups.control)
        slowest = {c: max(rank[c] for rank in found) for c in self._candidates}
        best = 1
        for chunks in self._candidates:  # the same numbers, and so the same choice, on every rank
            if slowest[chunks] < (1 - WORTH) * slowest[best]:
                best = chunks
        self._candidates = []
        self._set_dispatch(chunks=best)
        self._say_dispatch(f"experts in {best} chunk{'s' * (best > 1)}; the pipeline took "
                           + ", ".join(f"{1000 * s:.1f} ms with {c}" for c, s in slowest.items()))

    # -- checkpoints

    def _dispatch_state(self) -> dict[str, Any]:
        """The choices as a checkpoint keeps them; those that are not made yet are left out."""
        return {key: self._tuned[key] for key, settled in
                (("chunks", not self._candidates), ("two_hop", self._hops_chosen)) if settled}

    def _restore_dispatch(self, state: dict[str, Any] | None) -> None:
        """Goes on with what the checkpoint's job had chosen, where this config leaves the choice."""
        state = state or {}
        if self._tunes_chunks() and "chunks" in state:
            self._candidates = []
            self._set_dispatch(chunks=state["chunks"])
        if self.section.expert_parallel.two_hop == "auto" and "two_hop" in state:
            possible = self.process_groups.inter_node is not None
            if state["two_hop"] and not possible:
                self._say_dispatch("tokens travelled in two hops when the checkpoint was saved; here there is one node")
            self._hops_chosen = True
            self._set_dispatch(two_hop=state["two_hop"] and possible)

    def _say_dispatch(self, text: str) -> None:
        if self.process_groups.rank == 0:
            print(f"megatron_ext: dispatch: {text}", flush=True)


def node_limit_warning(router: Router, expert_parallel: int, layout: Any) -> str | None:
    """What is odd about the router's groups of experts, seen from the nodes they lie on; None if nothing is.

    Node-limited routing (DeepSeek-V3 report, section 2.1.2: a token visits at most M nodes) is the router's group
    limit: groups that lie within nodes, of which a token can reach `topk_group`.
    """
    nodes = 1 if layout is None else expert_parallel // layout.ranks_per_node
    if nodes == 1 or router.method == "greedy":  # which knows no groups
        return None
    groups, reached = router.groups, router.groups_per_token
    if groups % nodes:
        return (f"n_group = {groups} does not divide over the {nodes} nodes of an expert group, so groups straddle "
                "nodes and topk_group does not limit how many a token visits; a multiple of the nodes would")
    if reached >= nodes:
        return (f"a token may visit all {nodes} nodes of an expert group (topk_group = {reached} of n_group = "
                f"{groups}); less than {nodes} would limit what crosses between nodes")
    return None
