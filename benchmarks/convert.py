"""Checkpoint conversion against the disk and the processor: resharding beside `cp`, FP8 to BF16, peak memory.

Synthetic FP8 shards of a DeepSeek-V3 with real matrix sizes. Converting takes turns with `cp` on the same disk, both up
to fsync: resharding with a copy of the source, FP8 to BF16 with a copy of its result, which is what the disk allows. A
ratio is the median over the turns. Peak memory is a worker's, over what it held before. Then the same small checkpoint
goes through us, torch's reader and transformers, as far as they can.

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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader

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
    sync(destination)


def sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
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


def in_child(work: Callable[[], Any]) -> tuple[Any, int]:
    """What a call gives in a process of its own, and the bytes that it took there at its peak, beyond what was there.

    What it raises comes back as a line of text.
    """
    def field(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(name + ":"))) * 1024

    def child(queue: Any) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before = field("VmRSS")
        try:
            found = work()
        except Exception as error:
            found = f"{type(error).__name__}: {error}".split("\n")[0][:150]
        queue.put((found, field("VmHWM") - before))

    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    found: tuple[Any, int] = queue.get()
    process.join()
    return found


def memory_of(source: Path, destination: Path, to: str, dtype: str | None, options: Options) -> int:
    """Bytes that one worker takes beyond what it had when the plan was made, at its peak."""
    plan = make_plan(open_checkpoint(source), named(to), options, dtype)
    taken = in_child(lambda: run(plan, destination))[1]
    shutil.rmtree(destination)
    return taken


def by_torch(source: Path, destination: Path) -> None:
    """FP8 to BF16 with torch's own reader: all of it in memory, then written by the safetensors library."""
    reader = QuantizedHuggingFaceStorageReader(str(source), target_dtype=torch.bfloat16)
    state = {name: torch.empty(described.size, dtype=torch.float32 if name.endswith("bias") else torch.bfloat16)
             for name, described in reader.read_metadata().state_dict_metadata.items()
             if not name.endswith("_scale_inv")}
    dcp.load(state, storage_reader=QuantizedHuggingFaceStorageReader(str(source), target_dtype=torch.bfloat16),
             no_dist=True)
    destination.mkdir()
    save_file(state, destination / "model.safetensors")
    sync(destination)


def by_transformers(source: Path, destination: Path) -> None:
    """FP8 to BF16 with transformers, as its documentation says."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=transformers.FineGrainedFP8Config(dequantize=True))
    model.save_pretrained(destination)
    sync(destination)


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


def turns_of(count: int, size: int, *calls: Callable[[], float]) -> list[tuple[float, ...]]:
    """MB/s of calls that take turns."""
    found = []
    for _ in range(count):
        found.append(tuple(size / call() / 1e6 for call in calls))
        print("  ".join(f"{speed:.0f}" for speed in found[-1]), "MB/s", flush=True)
    return found


def against(name: str, unit: str, peer: str, pairs: list[tuple[float, ...]], column: int,
            goal: float) -> dict[str, Any]:
    """A row of medians: column 0 is the peer's, `column` ours; the ratio is the median of those of each turn."""
    ours, theirs = (statistics.median(pair[n] for pair in pairs) for n in (column, 0))
    ratio = statistics.median(pair[column] / pair[0] for pair in pairs)
    return row(name, ours, unit, peer, theirs, f">= {goal}x", ratio >= goal) | {"ratio": ratio}


def measure(folder: Path, gigabytes: float, workers: int, turns: int) -> list[dict[str, Any]]:
    source, out, bf16 = folder / "source", folder / "out", folder / "bf16"
    size, shards = write_source(source, gigabytes), Options(SHARD)
    pairs = turns_of(turns, size, lambda: timed(copy, source, out),
                     lambda: timed(convert, source, out, "hf", None, workers, shards))
    rows = [against(f"reshard, {workers} workers", "MB/s", "cp --reflink=never of the source, fsync", pairs, 1, 0.8)]
    speed = in_memory() / 1e6
    rows.append(row("FP8 to BF16 in memory, one core", speed, "MB/s out", None, None, ">= 300", speed >= 300))
    convert(source, bf16, "hf", "bf16", workers, shards)
    written = sum(path.stat().st_size for path in bf16.iterdir())
    counts = sorted({1, workers})
    pairs = turns_of(turns, written, lambda: timed(copy, bf16, out),
                     *(partial(timed, convert, source, out, "hf", "bf16", count, shards) for count in counts))
    rows += [against(f"FP8 to BF16 end to end, {count} worker{'s' * (count > 1)}", "MB/s out",
                     "cp --reflink=never of the result, fsync", pairs, column, 0.8)
             for column, count in enumerate(counts, start=1)]
    shutil.rmtree(bf16)
    largest = CONFIG["vocab_size"] * CONFIG["hidden_size"] * 2
    for to, dtype in (("hf", None), ("hf", "bf16"), ("deepseek", None)):
        taken = memory_of(source, out, to, dtype, shards if to == "hf" else Options())
        rows.append(row(f"peak memory of a worker, {to} {dtype or 'as it is'}", taken / 1e6, "MB", "largest tensor",
                        largest / 1e6, "<= 2x", taken <= 2 * largest))
    shutil.rmtree(source)
    return rows


def measure_peers(folder: Path, gigabytes: float) -> list[dict[str, Any]]:
    """FP8 to BF16 end to end with one process each, of a checkpoint that fits in memory twice."""
    source, out = folder / "small", folder / "out"
    size = write_source(source, gigabytes)
    peers: dict[str, Callable[[], Any]] = {
        "ours": partial(timed, convert, source, out, "hf", "bf16", 1, Options()),
        "torch's QuantizedHuggingFaceStorageReader": partial(timed, by_torch, source, out),
        "transformers": partial(timed, by_transformers, source, out)}
    rows = []
    for name, call in peers.items():
        seconds, memory = in_child(call)
        shutil.rmtree(out, ignore_errors=True)
        title = f"FP8 to BF16 of {size / 1e9:.1f} GB, one process, {name}"
        if isinstance(seconds, str):
            rows.append(row(title, 0.0, f"cannot: {seconds}", None, None, "none", None))
        else:
            rows.append(row(title, 2 * size / seconds / 1e6, "MB/s out", None, None, "none", None) |
                        {"peak_memory_MB": memory / 1e6})
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
        rows += measure_peers(Path(folder), min(arguments.gigabytes, 1.0))
    for each in rows:
        peer = "" if each["ratio"] is None else f", {each['ratio']:.2f}x of {each['peer']}"
        memory = f", {each['peak_memory_MB']:.0f} MB of memory at the peak" if "peak_memory_MB" in each else ""
        verdict = "" if each["holds"] is None else f" (goal {each['goal']}: {'holds' if each['holds'] else 'missed'})"
        print(f"{each['name']}: {each['value']:.0f} {each['unit']}{peer}{memory}{verdict}")
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
