# ruff: noqa: I001  (two files that differ in two lines keep one order of imports)
"""DeepSpeed's pipeline tutorial in small: a list of LayerSpecs, a loss, train_batch. Predicts the next byte of a text.

    deepspeed --num_gpus 2 examples/stock_pipeline.py --deepspeed_config examples/stock_pipeline.json
    deepspeed --num_gpus 2 examples/ported_pipeline.py --deepspeed_config examples/stock_pipeline.json

The first runs stock DeepSpeed (1F1B). The second is the same file with two lines changed and runs DualPipe.
"""

import argparse
import inspect
from pathlib import Path

import deepspeed
from deepspeed.pipe import PipelineModule
from deepspeed.pipe import LayerSpec
import torch
from torch import nn

WINDOW, BYTES, WIDTH = 16, 256, 256


class NextByte(torch.utils.data.Dataset):
    """Windows of the source code of argparse, each with the byte that follows it."""

    def __init__(self):
        self.text = torch.tensor(list(inspect.getsource(argparse).encode()))

    def __len__(self):
        return len(self.text) - WINDOW

    def __getitem__(self, index):
        return self.text[index : index + WINDOW], self.text[index + WINDOW]


def layers():
    """One embedding, four hidden layers, a classifier."""
    specs = [LayerSpec(nn.Embedding, BYTES, 32), LayerSpec(nn.Flatten)]
    for width in (32 * WINDOW, WIDTH, WIDTH, WIDTH):
        specs += [LayerSpec(nn.Linear, width, WIDTH), LayerSpec(nn.GELU)]
    return [*specs, LayerSpec(nn.Linear, WIDTH, BYTES)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(Path(__file__).parent / "stock_pipeline.json"))
    parser.add_argument("--stages", type=int, default=2, help="pipeline ranks")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--local_rank", type=int, default=0, help="given by the launcher")
    args = parser.parse_args()

    deepspeed.init_distributed()
    net = PipelineModule(layers=layers(), num_stages=args.stages, loss_fn=nn.CrossEntropyLoss())
    engine, _, _, _ = deepspeed.initialize(args=args, model=net, model_parameters=list(net.parameters()),
                                           training_data=NextByte())
    losses = []
    for step in range(1, args.steps + 1):
        losses.append(float(engine.train_batch()))
        if engine.global_rank == 0 and (step == 1 or step % 20 == 0):
            print(f"step {step:4d}  loss {losses[-1]:.3f}", flush=True)
    return losses


if __name__ == "__main__":
    main()
