"""Pre-trains a DeepSeek-V3 with the whole recipe: DualPipe, MLA, bias-balanced experts, FP8, BF16 moments on the CPU.

    deepspeed --num_gpus 4 examples/pretrain_deepseek_v3.py --deepspeed_config examples/pretrain_deepseek_v3.json

That is what `make train` runs: a small model on the source code of Python's standard library, byte by byte, on 2
pipeline ranks x 2 replicas with experts split over the replicas. The same script takes your own ds_config, a Hugging
Face config.json, and your own text or Megatron .bin/.idx data. It writes to --out: metrics.csv, the resolved config, a
checkpoint, and pictures of the loss, the experts' load and the pipeline as it ran. `--resume` goes on from the
checkpoint.

Where the small run differs from the paper: the routers' biases move by 0.02 a step (`bias_update_speed`), for at the
paper's 0.001 they would cross the gap between two experts' scores (about 0.3 here) only after 300 steps; and weights
start from N(0, 0.06) (`initializer_range`), which is to 128 channels what the paper's 0.006 is to 7168.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megatron_ext
from megatron_ext.config import load_config
from megatron_ext.data import (
    ByteTokenizer,
    GPTDataset,
    IndexedDataset,
    JsonTokenizer,
    standard_library_files,
    text_files,
    text_stream,
)
from megatron_ext.engine.agreement import agree, user_errors_on_one_line
from megatron_ext.models import DeepSeekV3Config, cross_entropy, deepseek_v3

sys.path.insert(0, str(Path(__file__).parent))
from run_record import RunRecord

HELD_OUT_SEQUENCES = 128


def arguments() -> argparse.Namespace:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=here / "pretrain_deepseek_v3.json", type=Path)
    parser.add_argument("--model", default=here / "deepseek_v3_tiny.json", type=Path, help="a Hugging Face config.json")
    parser.add_argument("--stages", type=int, help="pipeline ranks; the config's if left out, else half of the ranks")
    parser.add_argument("--data", nargs="*", help="text files, folders, or one .idx; the standard library if left out")
    parser.add_argument("--held-out", nargs="*", help="the same, to evaluate on; needed with --data to evaluate at all")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json; bytes if left out")
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=160, help="also what the scheduler's \"auto\" numbers follow")
    parser.add_argument("--eval-every", type=int, default=20, help="0: before and after only")
    parser.add_argument("--save-every", type=int, default=0, help="0: at the end only")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--local_rank", type=int, default=0, help="given by the launcher")
    return parser.parse_args()


def fill_config(args: argparse.Namespace) -> dict[str, Any]:
    """The ds_config, with what this script knows: the scheduler's "auto" steps, and the stages if nobody says."""
    config = load_config(args.deepspeed_config)
    section = config.setdefault("megatron_ext", {}).setdefault("pipeline", {})
    section["stages"] = args.stages or section.get("stages") or max(2, dist.get_world_size() // 2)
    scheduler = config.get("scheduler", {}).get("params", {})
    for key, steps in (("total_num_steps", args.steps), ("warmup_num_steps", max(2, args.steps // 8))):
        if scheduler.get(key) == "auto":
            scheduler[key] = steps
    return config


def is_indexed(sources: list[str] | None) -> bool:
    """Whether the data are one Megatron .bin/.idx pair: tokens already."""
    return sources is not None and len(sources) == 1 and sources[0].endswith((".idx", ".bin"))


def open_data(args: argparse.Namespace, vocab_size: int) -> tuple[GPTDataset, GPTDataset | None]:
    """The training set and the held-out set, ids checked against the vocabulary."""
    tokenizer = JsonTokenizer(args.tokenizer) if args.tokenizer else ByteTokenizer()

    def dataset(sources: list[str] | None, split: str) -> GPTDataset:
        if sources is None:
            stream = text_stream(standard_library_files(split), tokenizer)
        elif not is_indexed(sources) and any(source.endswith((".idx", ".bin")) for source in sources):
            raise megatron_ext.UserError(f"--data {' '.join(sources)}: a .bin/.idx pair stands alone, as one argument")
        elif is_indexed(sources):
            stream = IndexedDataset(sources[0])
        else:
            stream = text_stream(text_files(sources), tokenizer, skip_empty=True)
        stream.check_ids(vocab_size)
        return GPTDataset(stream, args.sequence_length)

    held_out = None if args.data is not None and args.held_out is None else dataset(args.held_out, "held_out")
    return dataset(args.data, "train"), held_out


def evenly_spaced(data: GPTDataset, engine: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's shard of HELD_OUT_SEQUENCES sequences from all over the held-out data, the same at every call."""
    size, shards = engine.train_micro_batch_size_per_gpu(), engine.data_parallel_world_size
    sequences = micro_batches(engine) * shards * size
    for k in range(micro_batches(engine)):
        first = (k * shards + engine.data_parallel_rank) * size
        rows = [data[(first + i) * len(data) // sequences] for i in range(size)]
        yield torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])


def micro_batches(engine: Any) -> int:
    """Per direction, of an evaluation."""
    return max(1, HELD_OUT_SEQUENCES // (engine.train_micro_batch_size_per_gpu() * engine.data_parallel_world_size))


def main() -> None:
    args = arguments()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    # DeepSpeed 0.19's own call, once per rank; nothing that a user of this script could change.
    warnings.filterwarnings("ignore", message=r".*all_gather_into_tensor. is deprecated", category=FutureWarning)
    megatron_ext.init_distributed()
    with user_errors_on_one_line():
        config = fill_config(args)
        model_config = DeepSeekV3Config.from_hf(args.model)
        model = megatron_ext.PipelineModule(layers=deepseek_v3(model_config), loss_fn=cross_entropy, config=config)
        error, training, held_out = None, None, None
        try:
            training, held_out = open_data(args, model_config.vocab_size)
        except megatron_ext.UserError as found:
            error = found
        agree(error, model.groups.control)
        engine, *_ = megatron_ext.initialize(model=model, training_data=training, config=config)
        if args.resume:
            engine.load_checkpoint(str(args.out / "checkpoint"))
            if engine.global_steps >= args.steps:
                rule = f"the checkpoint is at step {engine.global_steps} already"
                raise megatron_ext.ConfigError("--steps", args.steps, rule, "give a larger number to go on")
        train(args, config, engine, held_out)


def train(args: argparse.Namespace, config: dict[str, Any], engine: Any, held_out: GPTDataset | None) -> None:
    record = RunRecord(args.out, engine, config, json.loads(args.model.read_text()), resumed=args.resume,
                       total_steps=args.steps, unit="token" if args.tokenizer or is_indexed(args.data) else "byte")
    tokens_per_step = engine.train_batch_size() * args.sequence_length

    def evaluate() -> float | None:
        if held_out is None:
            return None
        return float(engine.eval_batch(evenly_spaced(held_out, engine), num_micro_batches=micro_batches(engine)))

    if not args.resume:
        record.start(evaluate())
    for step in range(engine.global_steps + 1, args.steps + 1):
        if step == args.steps // 2 + 1:
            engine.record_next_batch()
        lr, start = engine.get_lr()[0], time.perf_counter()
        engine.train_batch()
        seconds = time.perf_counter() - start
        due = held_out is not None and (step == args.steps or (args.eval_every > 0 and step % args.eval_every == 0))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        record.step(step, evaluate() if due else None, lr, tokens_per_step / seconds, memory)
        if args.save_every and step % args.save_every == 0 and step < args.steps:
            engine.save_checkpoint(str(args.out / "checkpoint"))
    engine.save_checkpoint(str(args.out / "checkpoint"))
    record.finish()


if __name__ == "__main__":
    main()
