"""Expert dispatch and combine over two classes of links: one hop or two, BF16 or FP8, on emulated nodes.

Three clusters (emulation/cluster.py), links inside a node 3.2 times faster than between nodes: two nodes of two ranks,
two of four, and four of two where a token visits at most two nodes, by the router's own limit. The router sends random
tokens to 8 of 32 experts, all on different ranks or not, as it happens. Four ways take turns: rows in BF16 (the fair
baseline: one copy for each rank that needs the token, not for each expert) or in FP8, straight to these ranks or in two
hops; results come back in BF16. Timed apart:

    dispatch            from the announcement of a routing to the experts' rows
    the whole exchange  that, and from the experts' results to the tokens' sums; a stand-in for the experts is not timed

Times are medians over rounds, from the start of the first rank to the end of the last. Links are so slow that the wire
takes most of the time, as on a real machine, whose memory is some sixty times faster than its network; beside each time
stands what the wire alone would have taken, at the rates measured in the same run.

Bytes are compared with a closed form counted here, straight from the routing: exactly with what the library counts,
and within OVERHEAD, for headers and acknowledgements, with what leaves the nodes by the kernel's counters, once the
exchange of counts and the barriers around a measurement have been taken off. Every result is checked: rows at the
experts against the tokens they should be, sums against the experts' stand-ins applied to those.

    python benchmarks/dispatch.py --json runs/benchmarks/dispatch.json      # as root, about 4 minutes
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from emulation.cluster import UPLINK, Cluster, Shape, link_rates, sent_bytes

EXPERTS, PER_TOKEN, HIDDEN = 32, 8, 2048
FASTER_INSIDE = 3.2
OVERHEAD = 0.02
"""How much more than the closed form may leave the nodes: 1 % of it are headers, the rest acknowledgements."""
ROW_BYTES = {"bf16": 2 * HIDDEN + 8 + 6 * PER_TOKEN, "fp8": HIDDEN + HIDDEN // 128 + 8 + 6 * PER_TOKEN}
"""A token's row on its way: numbers, scales, where it comes from, and for each expert a weight and a number."""
RESULT_BYTES = 2 * HIDDEN
BF16_ROUNDING = 1.01 * 2**-8
"""At most so much of a number; a hundredth for what adds up of it."""


@dataclass(frozen=True)
class Setting:
    """A cluster, and how many nodes a token may visit."""

    shape: Shape
    nodes_per_token: int

    def __str__(self) -> str:
        limit = f", {self.nodes_per_token} for a token" if self.nodes_per_token < self.shape.nodes else ""
        return f"{self.shape}{limit}"


def setting(nodes: int, ranks_per_node: int, nodes_per_token: int, megabits: float) -> Setting:
    return Setting(Shape(nodes, ranks_per_node, megabits, FASTER_INSIDE * megabits), nodes_per_token)


SETTINGS = [setting(2, 2, 2, megabits=60), setting(2, 4, 2, megabits=60), setting(4, 2, 2, megabits=60)]


@dataclass(frozen=True)
class Way:
    """How tokens travel out; back they travel in BF16 by as many hops."""

    hops: int
    wire: str

    def __str__(self) -> str:
        return f"{('one hop', 'two hops')[self.hops - 1]}, {self.wire.upper()}"


BASELINE, BEST = Way(1, "bf16"), Way(2, "fp8")
WAYS = [BASELINE, Way(1, "fp8"), Way(2, "bf16"), BEST]
DISPATCH_GOAL, WHOLE_GOAL = 2.0, 1.5


class Batch(NamedTuple):
    """What one rank sends: tokens [T, h] BF16, experts [T, k] int64, weights [T, k] FP32."""

    tokens: Tensor
    experts: Tensor
    weights: Tensor


@cache
def batches(setting: Setting, tokens: int) -> list[Batch]:
    """Of every rank, the same for whoever asks."""
    from megatron_ext.layers.router import Router

    torch.manual_seed(0)
    router = Router(SimpleNamespace(
        n_routed_experts=EXPERTS, num_experts_per_tok=PER_TOKEN, n_group=setting.shape.nodes,
        topk_group=setting.nodes_per_token, topk_method="noaux_tc", hidden_size=HIDDEN, scoring_func="sigmoid",
        norm_topk_prob=True, routed_scaling_factor=1.0, initializer_range=0.02)).eval()
    found = []
    for _ in range(setting.shape.ranks):
        x = torch.randn(tokens, HIDDEN).bfloat16()
        with torch.no_grad():
            routing = router(x)
        found.append(Batch(x, routing.experts, routing.weights))
    return found


def copies(setting: Setting, tokens: int, hops: int) -> list[Tensor]:
    """The closed form: for each hop [N, N] int64, the rows that rank i sends to rank j in a dispatch. In a combine, as
    many go from j to i."""
    ranks, local = setting.shape.ranks, setting.shape.ranks_per_node
    straight, across, within = (torch.zeros(ranks, ranks, dtype=torch.int64) for _ in range(3))
    for source, batch in enumerate(batches(setting, tokens)):
        for chosen in batch.experts.tolist():
            visited = {expert * ranks // EXPERTS for expert in chosen}
            for rank in visited:
                entry = rank // local * local + source % local
                straight[source, rank] += 1
                within[entry, rank] += 1
            for node in {rank // local for rank in visited}:
                across[source, node * local + source % local] += 1
    return [straight] if hops == 1 else [across, within]


def on_link(rows: Tensor, setting: Setting, link: str) -> Tensor:
    """[N, N] -> [N], the rows that each rank sends over the `fabric` or inside its `node`."""
    node = torch.arange(setting.shape.ranks) // setting.shape.ranks_per_node
    between = node[:, None] != node
    taken = between if link == "fabric" else ~between & ~torch.eye(len(rows), dtype=torch.bool)
    return (rows * taken).sum(1)


def wire_seconds(setting: Setting, hops: list[Tensor], row_bytes: int, rates: dict[str, float]) -> float:
    """What the links alone need if hops follow each other and each keeps its busiest link busy."""
    def busiest(rows: Tensor, link: str) -> int:
        return int(on_link(rows, setting, link).unflatten(0, (setting.shape.nodes, -1)).sum(1).max())

    return 8e-6 * row_bytes * sum(max(busiest(rows, "fabric") / rates["uplink"],
                                      busiest(rows.T, "fabric") / rates["uplink"],
                                      busiest(rows, "node") / rates["inside"]) for rows in hops)


def factor(expert: Tensor) -> Tensor:
    """What the stand-in of an expert multiplies its rows with: distinct, and exact in BF16."""
    return 1 + expert / EXPERTS


def check_rows(rank: int, setting: Setting, tokens: int, wire: str, rows: Tensor, weights: Tensor) -> None:
    """Those at the experts are the tokens that chose them, by expert, then rank, then token, rounded like `wire`."""
    sent = batches(setting, tokens)
    own = EXPERTS // setting.shape.ranks
    expected, expected_weights = [], []
    for expert in range(rank * own, (rank + 1) * own):
        for batch in sent:
            token, slot = (batch.experts == expert).nonzero(as_tuple=True)
            expected.append(batch.tokens[token])
            expected_weights.append(batch.weights[token, slot])
    if not torch.equal(weights, torch.cat(expected_weights)):
        raise SystemExit(f"{wire}: wrong weights at the experts of rank {rank}")
    check_rounding(f"{wire}: rows at the experts of rank {rank}", rows, torch.cat(expected), wire)


def check_rounding(what: str, rows: Tensor, exact: Tensor, wire: str) -> None:
    """BF16 is what the tokens are in; E4M3 keeps three bits, fewer far below the largest of a tile."""
    exact = exact.float()
    bound = torch.zeros_like(exact)
    if wire == "fp8":
        largest = exact.unflatten(-1, (-1, 128)).abs().amax(-1).repeat_interleave(128, -1)
        bound = torch.maximum(exact.abs() * 2**-4, largest * 2**-17)
    if rows.shape != exact.shape or bool(((rows.float() - exact).abs() > bound).any()):
        raise SystemExit(f"{what} are not what was sent")


def check_sums(rank: int, setting: Setting, tokens: int, way: Way, sums: Tensor) -> None:
    """Those that came back are the experts' stand-ins of a token, weighed: rounded to FP8 going out, at the stand-in to
    BF16, and coming back up to three times to BF16 (a rank's sum, a node's, the token's)."""
    batch = batches(setting, tokens)[rank]
    scale = (batch.weights * factor(batch.experts)).sum(1, keepdim=True)
    exact = batch.tokens.float() * scale
    bound = exact.abs() * 4 * BF16_ROUNDING
    if way.wire == "fp8":
        largest = exact.unflatten(-1, (-1, 128)).abs().amax(-1).repeat_interleave(128, -1)
        bound += torch.maximum(exact.abs() * 2**-4, largest * 2**-17)
    if sums.dtype != torch.bfloat16 or bool(((sums.float() - exact).abs() > bound).any()):
        raise SystemExit(f"{way}: the sums of rank {rank} are not those of its tokens")


class Exchange(NamedTuple):
    """One exchange as one rank saw it: times of one clock, and bytes that left its node."""

    start: float
    dispatched: float
    restart: float
    end: float
    dispatch_bytes: int
    combine_bytes: int


def exchange(dispatcher: Any, batch: Batch, first_expert: int) -> tuple[Exchange, Tensor, Tensor, Tensor]:
    """There and back; also the experts' rows with their weights, and the sums."""
    own = EXPERTS // dispatcher.ep.size
    dist.barrier()
    bytes_before = sent_bytes(UPLINK)
    dist.barrier()
    start = time.perf_counter()
    transit = dispatcher.announce(batch.experts, batch.tokens)
    transit.start_dispatch(batch.tokens, batch.weights)
    parts = [transit.finish_dispatch(chunk) for chunk in range(transit.chunks)]
    dispatched = time.perf_counter()
    dist.barrier()
    bytes_between = sent_bytes(UPLINK)

    results = []
    for chunk, (rows, _) in enumerate(parts):
        sizes = torch.tensor(transit.group_sizes(chunk))
        factors = factor(torch.arange(first_expert, first_expert + own)).repeat_interleave(sizes)
        results.append(rows * factors[:, None].bfloat16())
    weights = [weights for _, weights in parts]
    dist.barrier()
    restart = time.perf_counter()
    transit.start_combine(results, weights)
    sums = transit.finish_combine()
    end = time.perf_counter()
    dist.barrier()
    taken = Exchange(start, dispatched, restart, end, bytes_between - bytes_before, sent_bytes(UPLINK) - bytes_between)
    return taken, torch.cat([rows for rows, _ in parts]), torch.cat(weights), sums


def barrier_bytes() -> int:
    """What the two barriers around a measured part of `exchange` send from this node."""
    dist.barrier()
    before = sent_bytes(UPLINK)
    dist.barrier()
    dist.barrier()
    return sent_bytes(UPLINK) - before


def measure(rank: int, setting: Setting, tokens: int, rounds: int, chunks: int) -> dict[str, Any]:
    """One rank: what the links carry, and for each way its exchanges and what the library counted in the last one."""
    from megatron_ext.comm.dispatch import Dispatcher
    from megatron_ext.comm.traffic import Traffic

    shape = setting.shape
    rates = link_rates(rank, shape, size=2_000_000)
    ep = placement(rank, shape)
    dispatchers = {way: Dispatcher(EXPERTS, ep, dispatch_dtype=way.wire, combine_dtype="bf16", chunks=chunks,
                                   two_hop=way.hops == 2, traffic=Traffic()) for way in WAYS}
    batch, (first_expert, _) = batches(setting, tokens)[rank], ep.expert_range(EXPERTS)
    found: dict[str, Any] = {"rates": rates, "exchanges": {way: [] for way in WAYS}, "traffic": {},
                             "barriers": statistics.median(barrier_bytes() for _ in range(5))}
    by_wire: dict[str, tuple[Tensor, Tensor]] = {}
    by_way: dict[Way, Tensor] = {}
    for turn in range(rounds + 1):
        for way, dispatcher in dispatchers.items():
            taken, rows, weights, sums = exchange(dispatcher, batch, first_expert)
            found["traffic"][way] = dispatcher.traffic.take()
            if turn:  # the first opens connections, and is the one that is checked in full
                found["exchanges"][way].append(taken)
            else:
                check_rows(rank, setting, tokens, way.wire, rows, weights)
                check_sums(rank, setting, tokens, way, sums)
            same_rows, near_sums = by_wire.setdefault(way.wire, (rows, sums))
            if not torch.equal(same_rows, rows):
                raise SystemExit(f"{way}: the experts of rank {rank} get other rows than by another number of hops")
            if bool(((near_sums.float() - sums).abs() > 4 * BF16_ROUNDING * near_sums.abs()).any()):
                raise SystemExit(f"{way}: the sums of rank {rank} differ from those by another number of hops")
            if not torch.equal(by_way.setdefault(way, sums), sums):
                raise SystemExit(f"{way}: the sums of rank {rank} differ from those of the first round")
    return found


def placement(rank: int, shape: Shape) -> Any:
    """All ranks as one expert group that knows its nodes."""
    from megatron_ext.parallel.expert_parallel import ExpertParallel
    from megatron_ext.parallel.layout import check_layout

    layout, everyone = check_layout(shape.ranks, shape.ranks_per_node), range(shape.ranks)
    groups = {}
    for name, members in (("inter", layout.across(everyone)), ("intra", layout.within(everyone))):
        made = {tuple(ranks): dist.new_group(ranks) for ranks in members}
        [groups[name]] = [group for ranks, group in made.items() if rank in ranks]
    return ExpertParallel(dist.group.WORLD, shape.ranks, rank, layout=layout, **groups)


def row(name: str, value: float, unit: str, peer: str, peer_value: float, ratio: float, goal: str = "none",
        holds: bool | None = None) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "peer": peer, "peer_value": peer_value, "ratio": ratio,
            "goal": goal, "holds": holds}


def link_rows(setting: Setting, rates: dict[str, float]) -> Iterator[dict[str, Any]]:
    ratio = rates["inside"] / rates["uplink"]
    yield row(f"links inside a node, {setting}", rates["inside"], "Mbit/s", "between nodes", rates["uplink"], ratio,
              f"{FASTER_INSIDE} within 5 %", abs(ratio / FASTER_INSIDE - 1) <= 0.05)


def byte_rows(setting: Setting, tokens: int, found: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What was sent, against the closed form; rank by rank, and what left the nodes."""
    local = setting.shape.ranks_per_node
    for way in WAYS:
        hops = copies(setting, tokens, way.hops)
        for kind, row_bytes, sent in (("dispatch", ROW_BYTES[way.wire], hops),
                                      ("combine", RESULT_BYTES, [rows.T for rows in hops])):
            name = f"{way}, {kind}, {setting}"
            expected = {link: row_bytes * torch.stack([on_link(rows, setting, link) for rows in sent]).sum(0)
                        for link in ("fabric", "node")}
            counted = {link: torch.tensor([rank["traffic"][way][kind][link] for rank in found]) for link in expected}
            same = all(torch.equal(counted[link], expected[link]) for link in expected)
            total = int(expected["fabric"].sum())
            yield row(f"bytes between nodes as counted, {name}", int(counted["fabric"].sum()), "bytes", "closed form",
                      total, int(counted["fabric"].sum()) / total, "equal, on each rank, inside nodes too", same)
            left = statistics.median(sum(getattr(e, f"{kind}_bytes") for e in exchanges)
                                     for exchanges in zip(*(rank["exchanges"][way] for rank in found[::local]),
                                                          strict=True))
            barriers = sum(rank["barriers"] for rank in found[::local])
            counts = sum(rank["traffic"][way]["counts"]["fabric"] for rank in found) if kind == "dispatch" else 0
            left -= barriers + counts
            besides = f"besides {barriers:.0f} of barriers" + (f" and {counts:.0f} of counts" if counts else "")
            yield row(f"bytes that left the nodes, {besides}, {name}", left, "bytes", "closed form", total,
                      left / total, f"1 to {1 + OVERHEAD}", 1 <= left / total <= 1 + OVERHEAD)


def time_rows(setting: Setting, tokens: int, found: list[dict[str, Any]],
              rates: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Every way against the baseline, and each time against the wire's."""
    times: dict[Way, tuple[float, float]] = {}
    for way in WAYS:
        turns = list(zip(*(rank["exchanges"][way] for rank in found), strict=True))
        out = [max(e.dispatched for e in turn) - min(e.start for e in turn) for turn in turns]
        back = [max(e.end for e in turn) - min(e.restart for e in turn) for turn in turns]
        times[way] = statistics.median(out), statistics.median(a + b for a, b in zip(out, back, strict=True))
    for what, index, goal in (("dispatch", 0, DISPATCH_GOAL), ("whole exchange", 1, WHOLE_GOAL)):
        base = times[BASELINE][index]
        for way in WAYS[1:]:
            value = times[way][index]
            yield row(f"{what}, {way}, {setting}", 1000 * value, "ms", str(BASELINE), 1000 * base, base / value,
                      f"{goal} or more" if way == BEST else "none", base / value >= goal if way == BEST else None)
    for way in WAYS:
        hops = copies(setting, tokens, way.hops)
        wire = wire_seconds(setting, hops, ROW_BYTES[way.wire], rates)
        whole = wire + wire_seconds(setting, [rows.T for rows in hops], RESULT_BYTES, rates)
        for what, value, alone in (("dispatch", times[way][0], wire), ("whole exchange", times[way][1], whole)):
            yield row(f"{what}, {way}, {setting}", 1000 * value, "ms", "the wire alone", 1000 * alone, alone / value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=256, help="of each rank")
    parser.add_argument("--rounds", type=int, default=9, help="that count")
    parser.add_argument("--chunks", type=int, default=1, help="that a dispatch is cut into")
    parser.add_argument("--setting", type=int, choices=range(len(SETTINGS)), help="one of them only")
    args = parser.parse_args()
    torch.set_num_threads(1)  # as in the ranks, so that the router's sums, and its choice among near equals, are theirs
    table = [row("FP8 row with scales and routing", ROW_BYTES["fp8"], "bytes", "BF16 payload", RESULT_BYTES,
                 ROW_BYTES["fp8"] / RESULT_BYTES, "at most 0.53", ROW_BYTES["fp8"] <= 0.53 * RESULT_BYTES)]
    for setting in SETTINGS if args.setting is None else [SETTINGS[args.setting]]:
        with Cluster(setting.shape) as cluster:
            found = cluster.run(measure, setting, args.tokens, args.rounds, args.chunks)
        rates = found[0]["rates"]
        table += [*link_rows(setting, rates), *byte_rows(setting, args.tokens, found),
                  *time_rows(setting, args.tokens, found, rates)]
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(table, indent=1) + "\n")
    for entry in table:
        print(f"{entry['name']}: {entry['value']:.0f} {entry['unit']}; {entry['peer']} {entry['peer_value']:.0f}; "
              f"{entry['ratio']:.3f} ({entry['goal']})" + {True: "", False: "  MISSED", None: ""}[entry["holds"]])


if __name__ == "__main__":
    main()
