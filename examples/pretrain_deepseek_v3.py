"""Pre-trains a DeepSeek-V3 with the whole recipe: DualPipe, MLA, bias-balanced experts, FP8, BF16 moments on the CPU.

    deepspeed --num_gpus 4 examples/pretrain_deepseek_v3.py --deepspeed_config examples/pretrain_deepseek_v3.json

That is what `make train` runs: a small model on the source code of Python's standard library, byte by byte, on 2 pipeline
ranks x 2 replicas with experts split over the replicas. The same script takes your own ds_config, a Hugging Face
config.json, and your own text or Megatron .bin/.idx data. It writes to --out: metrics.csv, the resolved config, a
checkpoint, and pictures of the loss, the experts' load and the pipeline as it ran. `--resume` goes on from the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megatron_ext
from megatron_ext.config import load_config
from megatron_ext.data import (ByteTokenizer, GPTDataset, IndexedDataset, JsonTokenizer, standard_library_files, text_files,
                               text_stream)
from megatron_ext.engine.agreement import agree, user_errors_on_one_line
from megatron_ext.models import DeepSeekV3Config, cross_entropy, deepseek_v3

sys.path.insert(0, str(Path(__file__).parent))
from run_record import RunRecord  # noqa: E402


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
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--eval-every", type=int, default=25)
    parser.add_argument("--save-every", type=int, default=0, help="0: at the end only")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--local_rank", type=int, default=0, help="given by the launcher")
    return parser.parse_args()


def open_data(args: argparse.Namespace, vocab_size: int) -> tuple[GPTDataset, GPTDataset | None]:
    """The training set and the held-out set, ids checked against the vocabulary."""
    tokenizer = JsonTokenizer(args.tokenizer) if args.tokenizer else ByteTokenizer()

    def dataset(sources: list[str] | None, split: str) -> GPTDataset:
        if sources is None:
            stream = text_stream(standard_library_files(split), tokenizer)
        elif len(sources) == 1 and sources[0].endswith((".idx", ".bin")):
            stream = IndexedDataset(sources[0])
        else:
            stream = text_stream(text_files(sources), tokenizer, skip_empty=True)
        stream.check_ids(vocab_size)
        return GPTDataset(stream, args.sequence_length)

    held_out = None if args.data is not None and args.held_out is None else dataset(args.held_out, "held_out")
    return dataset(args.data, "train"), held_out


def shard(data: GPTDataset, engine: Any, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's shard of a fixed part of the held-out data, always from the start."""
    k = 0
    while True:
        first = (k * engine.data_parallel_world_size + engine.data_parallel_rank) * batch
        rows = [data[(first + i) % len(data)] for i in range(batch)]
        yield torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])
        k += 1


def main() -> None:
    args = arguments()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    megatron_ext.init_distributed()
    with user_errors_on_one_line():
        config = load_config(args.deepspeed_config)
        section = config.setdefault("megatron_ext", {}).setdefault("pipeline", {})
        section["stages"] = args.stages or section.get("stages") or max(2, dist.get_world_size() // 2)
        model_config = DeepSeekV3Config.from_hf(args.model)
        model = megatron_ext.PipelineModule(layers=deepseek_v3(model_config), loss_fn=cross_entropy, config=config)
        error, training, held_out = None, None, None
        try:
            training, held_out = open_data(args, model_config.vocab_size)
        except megatron_ext.UserError as found:
            error = found
        agree(error, model.groups.control)
        engine, _, loader, _ = megatron_ext.initialize(model=model, training_data=training, config=config)
        if args.resume:
            engine.load_checkpoint(str(args.out / "checkpoint"))
        train(args, config, engine, loader, held_out)


def train(args: argparse.Namespace, config: dict[str, Any], engine: Any, loader: Any, held_out: GPTDataset | None) -> None:
    record = RunRecord(args.out, engine, config, json.loads(args.model.read_text()), resumed=args.resume,
                       total_steps=args.steps)
    tokens_per_step = engine.train_batch_size() * args.sequence_length

    def evaluate() -> float | None:
        if held_out is None:
            return None
        data = shard(held_out, engine, engine.train_micro_batch_size_per_gpu())
        return float(engine.eval_batch(data, num_micro_batches=8))

    if not args.resume:
        record.start(evaluate())
    for step in range(engine.global_steps, args.steps):
        if step == args.steps // 2:
            engine.record_next_batch()
        start = time.perf_counter()
        engine.train_batch()
        seconds = time.perf_counter() - start
        done = step + 1
        due = held_out is not None and (done % args.eval_every == 0 or done == args.steps)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        record.step(done, evaluate() if due else None, tokens_per_step / seconds, memory)
        if args.save_every and done % args.save_every == 0 and done < args.steps:
            engine.save_checkpoint(str(args.out / "checkpoint"))
    engine.save_checkpoint(str(args.out / "checkpoint"))
    record.finish()


if __name__ == "__main__":
    main()
