"""Checkpoint conversion against the disk and the processor: resharding beside `cp`, FP8 to BF16, peak memory.

Synthetic FP8 shards of a DeepSeek-V3 with real matrix sizes. Copying and resharding take turns on the same disk, both
up to fsync; a ratio is the median over the turns. Peak memory is a worker's, over what it held before.

    python benchmarks/convert.py --gigabytes 8 --workers 4 --json runs/benchmarks/convert.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_ext.checkpoint.convert import Options, make_plan, named, open_checkpoint, run
from megatron_ext.checkpoint.convert import dtype as numbers
from megatron_ext.checkpoint.convert.formats.layout import pack
from megatron_ext.checkpoint.convert.model import Model
from megatron_ext.checkpoint.convert.names import scale_name
from megatron_ext.checkpoint.convert.tensors import Stored, renamed

SHARD = 700_000_000
CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3", "vocab_size": 32768, "hidden_size": 2048, "intermediate_size": 4096,
    "moe_intermediate_size": 2048, "num_hidden_layers": 3, "num_attention_heads": 16, "kv_lora_rank": 512,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "num_experts_per_tok": 4,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}


def write_source(folder: Path, gigabytes: float) -> int:
    """Shards of about that size in all, with an index and a config.

    Returns:
        Their bytes.
    """
    experts = max(4, int(gigabytes * 1e9 / 2 / (3 * 2048 * 2048)))
    config = CONFIG | {"n_routed_experts": experts}
    tensors: list[Stored] = []
    for tensor in Model.from_hf(config).table.values():
        name, row, shape = tensor.name, tensor.row, tensor.shape
        if row.optional:
            continue
        dtype = "F32" if row.fp32 else "F8_E4M3" if row.quantised else "BF16"
        tensors.append(renamed(name, name, "", -1, dtype, shape))
        if row.quantised:
            scale = scale_name(name)
            tensors.append(renamed(scale, scale, "", -1, "F32", tuple(-(-size // 128) for size in shape)))
    draw = np.random.default_rng(0)
    noise = {"F8_E4M3": draw.integers(0, 120, 1 << 24, dtype=np.uint8),
             "BF16": draw.integers(0x3000, 0x4000, 1 << 24, dtype=np.uint16), "F32": np.full(1 << 20, 0.01, np.float32)}
    files = pack(tensors, 500_000_000, "model.safetensors", "model-{number:05d}-of-{count:05d}.safetensors")
    folder.mkdir()
    for file in files:
        with open(folder / file.path, "wb") as out:
            for offset, content in file.literals:
                out.seek(offset)
                out.write(content)
            for stored in file.tensors:
                out.seek(stored.offset)
                out.write(np.resize(noise[stored.dtype].view(np.uint8), stored.nbytes).data)
            out.flush()
            os.fsync(out.fileno())
    placed = {stored.name: file.path for file in files for stored in file.tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    (folder / "config.json").write_text(json.dumps(config))
    return sum(file.size for file in files)


def copy(source: Path, destination: Path) -> None:
    subprocess.run(["cp", "-r", "--reflink=never", source, destination], check=True)
    for path in destination.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def convert(source: Path, destination: Path, to: str, dtype: str | None, workers: int, options: Options) -> None:
    run(make_plan(open_checkpoint(source), named(to), options, dtype), destination, workers)


def timed(call: Callable[..., None], source: Path, destination: Path, *args: Any) -> float:
    """Seconds of a call that makes `destination`, which is removed again."""
    os.sync()
    begin = time.perf_counter()
    call(source, destination, *args)
    seconds = time.perf_counter() - begin
    shutil.rmtree(destination)
    return seconds


def memory_of(source: Path, destination: Path, *args: Any) -> int:
    """Bytes that one worker takes beyond what it had before, at its peak."""
    def field(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(name + ":"))) * 1024

    def child(queue: Any) -> None:
        to, dtype, options = args
        plan = make_plan(open_checkpoint(source), named(to), options, dtype)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before = field("VmRSS")
        run(plan, destination)
        queue.put(field("VmHWM") - before)

    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    process.join()
    shutil.rmtree(destination)
    return int(queue.get())


def in_memory() -> float:
    """Bytes of BF16 per second that one core makes of FP8."""
    codes = np.random.default_rng(0).integers(0, 120, (2048, 7168), dtype=np.uint8)
    scale = np.full((16, 56), 0.01, np.float32).view(np.uint32)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        for row in range(0, 2048, 128):
            numbers.dequantise(codes[row:row + 128], scale[row // 128:row // 128 + 1], "BF16")
        seconds.append(time.perf_counter() - begin)
    return 2 * codes.size / statistics.median(seconds)


def row(name: str, value: float, unit: str, peer: str | None, peer_value: float | None, goal: str,
        holds: bool | None) -> dict[str, Any]:
    ratio = None if not peer_value else value / peer_value
    return {"name": name, "value": value, "unit": unit, "peer": peer, "peer_value": peer_value, "ratio": ratio,
            "goal": goal, "holds": holds}


def measure(folder: Path, gigabytes: float, workers: int, turns: int) -> list[dict[str, Any]]:
    source, out = folder / "source", folder / "out"
    size = write_source(source, gigabytes)
    shards, bf16 = Options(SHARD), 2 * size
    pairs = []
    for _ in range(turns):
        pairs.append((timed(copy, source, out), timed(convert, source, out, "hf", None, workers, shards)))
        print(f"cp {size / pairs[-1][0] / 1e6:.0f} MB/s, reshard {size / pairs[-1][1] / 1e6:.0f} MB/s", flush=True)
    copied, resharded = (statistics.median(size / seconds / 1e6 for seconds in column) for column in zip(*pairs,
                                                                                                         strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    rows = [row(f"reshard, {workers} workers", resharded, "MB/s", "cp --reflink=never, fsync", copied, ">= 0.8x",
                ratio >= 0.8)]
    rows[-1]["ratio"] = ratio
    speed = in_memory() / 1e6
    rows.append(row("FP8 to BF16 in memory, one core", speed, "MB/s out", None, None, ">= 300", speed >= 300))
    for count in sorted({1, workers}):
        speed = bf16 / timed(convert, source, out, "hf", "bf16", count, shards) / 1e6
        rows.append(row(f"FP8 to BF16 end to end, {count} workers", speed, "MB/s out", "cp --reflink=never, fsync",
                        copied, ">= 0.8x of the disk", speed >= 0.8 * copied))
    largest = 32768 * 2048 * 2
    for to, dtype in (("hf", None), ("hf", "bf16"), ("deepseek", None)):
        taken = memory_of(source, out, to, dtype, Options(SHARD) if to == "hf" else Options())
        rows.append(row(f"peak memory of a worker, {to} {dtype or 'as it is'}", taken / 1e6, "MB", "largest tensor",
                        largest / 1e6, "<= 2x", taken <= 2 * largest))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the FP8 checkpoint")
    parser.add_argument("--workers", type=int, default=min(8, len(os.sched_getaffinity(0))))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; three times the size is needed")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rows = measure(Path(folder), arguments.gigabytes, arguments.workers, arguments.turns)
    for each in rows:
        against = "" if each["ratio"] is None else f", {each['ratio']:.2f}x of {each['peer']}"
        print(f"{each['name']}: {each['value']:.0f} {each['unit']}{against} (goal {each['goal']}: "
              f"{'holds' if each['holds'] else 'missed'})")
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
