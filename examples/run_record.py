"""What a run leaves behind: a progress line per step, metrics.csv, the resolved config, and three pictures.

    metrics.csv       step, loss, held_out_loss (where measured), grad_norm, lr, tokens_per_second, max_violation
    config.json       the ds_config with the megatron_ext section's defaults filled in, the model, versions, and the
                      optimizer state of every rank in bytes, counted from its tensors after a step
    expert_load.jsonl tokens per expert and layer, a line a step
    loss.png          training and held-out loss
    expert_load.png   share of the tokens per expert and layer, and how far the busiest is above its share
    schedule.png      one step of the pipeline as it ran (schedule.json holds the times)
"""

from __future__ import annotations

import csv
import json
import platform
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

import megatron_ext
from megatron_ext.layers.balancing import max_violation
from megatron_ext.optimizer import optimizer_state_bytes
from megatron_ext.pipeline.drawing import draw

COLUMNS = ("step", "loss", "held_out_loss", "grad_norm", "lr", "tokens_per_second", "max_violation")
LOAD_ROWS = 400  # of a longer run, only so many steps of the experts' load are kept
SMOOTHING = 10


class RunRecord:
    """Keeps and writes the record on rank 0; other ranks only take part in what is collective.

    Args:
        folder: made if it is not there.
        engine: after `initialize`, and after `load_checkpoint` if resumed.
        config, model: what the engine was made from.
        resumed: keep what the folder holds up to the checkpoint's step.
        total_steps: of the whole run.
        unit: what a token is, for axes.
    """

    def __init__(self, folder: Path, engine: Any, config: dict[str, Any], model: dict[str, Any], resumed: bool,
                 total_steps: int, unit: str = "token"):
        self.folder, self.engine, self.unit, self.writes = folder, engine, unit, dist.get_rank() == 0
        self.load_every = max(1, total_steps // LOAD_ROWS)
        self.measured = False
        if not self.writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.resolved = {"ds_config": {**config, "megatron_ext": engine.section.resolved()}, "model": model,
                         "versions": {"megatron_ext": megatron_ext.__version__, "deepspeed": deepspeed.__version__,
                                      "torch": torch.__version__, "python": platform.python_version()},
                         "ranks": dist.get_world_size(), "train_batch_size": engine.train_batch_size()}
        self._write_config()
        self._open_files(resumed)
        self.console = Console()
        self.progress = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                                 TimeElapsedColumn(), TimeRemainingColumn(), console=self.console,
                                 disable=not self.console.is_terminal)
        self.task = self.progress.add_task("training", total=total_steps, completed=engine.global_steps)
        self.progress.start()

    def _write_config(self) -> None:
        (self.folder / "config.json").write_text(json.dumps(self.resolved, indent=1))

    def _open_files(self, resumed: bool) -> None:
        """A resumed run keeps the rows up to its checkpoint and writes on after them."""
        metrics, load = self.folder / "metrics.csv", self.folder / "expert_load.jsonl"
        self.rows: list[dict[str, Any]] = []
        self.load: list[dict[str, Any]] = []
        if resumed and metrics.is_file():
            with open(metrics, newline="") as old:
                self.rows = [row for row in csv.DictReader(old) if int(row["step"]) <= self.engine.global_steps]
        if resumed and load.is_file():
            rows = (json.loads(line) for line in load.read_text().splitlines())
            self.load = [row for row in rows if row["step"] <= self.engine.global_steps]
        self.metrics_file = open(metrics, "w", newline="")  # noqa: SIM115  closed by finish
        self.load_file = open(load, "w")  # noqa: SIM115
        self.writer = csv.DictWriter(self.metrics_file, COLUMNS)
        self.writer.writeheader()
        self.writer.writerows(self.rows)
        self.load_file.writelines(json.dumps(row) + "\n" for row in self.load)

    def start(self, held_out: float | None) -> None:
        """Before the first step: the loss of the untrained model."""
        if self.writes and held_out is not None:
            self._print(f"held-out loss of the untrained model: {held_out:.3f} nats per {self.unit}")
            self._write({"step": 0, "held_out_loss": held_out})

    def step(self, step: int, held_out: float | None, lr: float, tokens_per_second: float, gigabytes: float) -> None:
        """After every step; collective.

        Args:
            step: counted from 1.
            held_out: loss, where it was measured.
            lr: learning rate that the step took.
            gigabytes: memory of this process.
        """
        counts = {name.removesuffix(".mlp.gate"): c for name, c in self.engine.gather_expert_counts().items()}
        if not self.measured:
            self._measure_optimizer()
        if not self.writes:
            return
        m = self.engine.metrics
        worst = max((max_violation(c) for c in counts.values()), default=None)
        self._write({"step": step, "loss": m["loss"], "held_out_loss": held_out, "grad_norm": m["grad_norm"], "lr": lr,
                     "tokens_per_second": round(tokens_per_second, 1), "max_violation": worst})
        if counts and step % self.load_every == 0:
            self.load.append({"step": step, **{name: c.tolist() for name, c in counts.items()}})
            self.load_file.write(json.dumps(self.load[-1]) + "\n")
            self.load_file.flush()
        line = f"step {step:4d}  loss {m['loss']:.4f}  {tokens_per_second:6.0f} tokens/s"
        line += "" if worst is None else f"  MaxVio {worst:5.2f}"
        line += f"  {gigabytes:.2f} GB" + ("" if held_out is None else f"  held out {held_out:.4f}")
        self._print(line)
        self.progress.update(self.task, completed=step)

    def _print(self, line: str) -> None:
        self.progress.console.print(line, highlight=False, soft_wrap=True)

    def _write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.writer.writerow(row)
        self.metrics_file.flush()

    def _measure_optimizer(self) -> None:
        """Bytes of optimizer state on every rank, once there are moments; collective."""
        self.measured = True
        mine = (optimizer_state_bytes(self.engine.optimizer), sum(p.numel() for p in self.engine.module.parameters()))
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine, group=self.engine.process_groups.control)
        if not self.writes:
            return
        self.resolved["optimizer_bytes"] = [
            {"weights_held": held, "parameters": s.parameters, "master": dict(s.master), "moments": dict(s.moments)}
            for s, held in found]
        self._write_config()
        (state, held), (master, moments) = found[0], found[0][0].per_parameter
        places = " and ".join(sorted({*state.master, *state.moments}))
        self._print(f"optimizer of rank 0: {state.parameters:,} parameters, its shard of the {held:,} held here; "
                    f"{master:.1f} bytes of master weights and {moments:.1f} of moments each, on {places}")

    def finish(self) -> None:
        """Pictures, and where everything is."""
        if not self.writes:
            return
        self.progress.stop()
        self.metrics_file.close()
        self.load_file.close()
        self._print(f"record: {self.folder / 'metrics.csv'}\npicture: {self._draw_loss()}")
        if self.load:
            self._print(f"picture: {self._draw_load()}")
        if self.engine.timeline is not None:
            self.engine.timeline.save(self.folder / "schedule.json")
            self._print(f"picture: {draw(self.engine.timeline, self.folder / 'schedule.png')}")
        if self.load:
            dead = [f"{name} expert {e}" for name, counts in self._loads().items()
                    for e, total in enumerate(counts[-50:].sum(0).tolist()) if total == 0]
            self._print(f"experts without a token in the last {min(50, len(self.load))} recorded steps: "
                        f"{', '.join(dead) if dead else 'none'}")
        measured = [row for row in self.rows if row.get("held_out_loss") not in (None, "")]
        if measured:
            self._print(f"held-out loss: {float(measured[0]['held_out_loss']):.3f} -> "
                        f"{float(measured[-1]['held_out_loss']):.3f} nats per {self.unit}")

    def _loads(self) -> dict[str, torch.Tensor]:
        """Tokens per expert [steps, E] of every layer that has experts."""
        return {name: torch.tensor([row[name] for row in self.load]) for name in self.load[0] if name != "step"}

    def _draw_loss(self) -> Path:
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        steps, losses = self._points("loss")
        if losses:
            axes.plot(steps, losses, color="#a9cbee", linewidth=1, label="training, each step")
        if len(losses) >= 2 * SMOOTHING:
            kernel = torch.ones(1, 1, SMOOTHING) / SMOOTHING
            smooth = torch.nn.functional.conv1d(torch.tensor(losses).view(1, 1, -1), kernel).flatten().tolist()
            middle = steps[SMOOTHING // 2:][:len(smooth)]
            axes.plot(middle, smooth, color="#2f6db3", linewidth=1.8, label=f"mean of {SMOOTHING} around it")
        steps, losses = self._points("held_out_loss")
        if losses:
            axes.plot(steps, losses, "o-", color="#d9682b", markersize=4, linewidth=1.5, label="held out")
            for k, offset in {0: (7, -3), len(losses) - 1: (-10, 8)}.items():
                axes.annotate(f"{losses[k]:.2f}", (steps[k], losses[k]), offset, textcoords="offset points",
                              color="#d9682b")
        axes.set(xlabel="step", ylabel=f"loss [nats per {self.unit}]", title="Loss")
        axes.margins(x=0.04)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        return self._save(figure, "loss.png")

    def _points(self, column: str) -> tuple[list[int], list[float]]:
        rows = [row for row in self.rows if row.get(column) not in (None, "")]
        return [int(row["step"]) for row in rows], [float(row[column]) for row in rows]

    def _draw_load(self) -> Path:
        loads, steps = self._loads(), [row["step"] for row in self.load]
        figure = Figure(figsize=(9, 2.8 + 1.7 * len(loads)), layout="constrained")
        *maps, curves = figure.subplots(len(loads) + 1, 1, sharex=True)
        image = None
        for axes, (name, counts) in zip(maps, loads.items(), strict=True):
            share = counts.double() * counts.shape[1] / counts.sum(1, keepdim=True)  # 1 is the fair share
            extent = (steps[0] - 0.5, steps[-1] + 0.5, counts.shape[1] - 0.5, -0.5)
            image = axes.imshow(share.T, aspect="auto", extent=extent, cmap="RdBu_r", vmin=0, vmax=2,
                                interpolation="nearest")
            axes.set_ylabel("expert")
            axes.set_title(name, fontsize=9, loc="left")
            curves.plot(steps, [max_violation(c) for c in counts], linewidth=1.2, label=name)
        figure.colorbar(image, ax=maps, label="tokens / fair share", extend="max", ticks=(0, 0.5, 1, 1.5, 2))
        curves.set(xlabel="step", ylabel="MaxVio", ylim=(0, None))
        curves.set_title("how far the busiest expert is above its fair share (0 is perfect)", fontsize=9, loc="left")
        curves.grid(alpha=0.3)
        if len(loads) <= 8:
            curves.legend(frameon=False, fontsize=8)
        figure.suptitle("Load of the experts")
        return self._save(figure, "expert_load.png")

    def _save(self, figure: Figure, name: str) -> Path:
        figure.savefig(self.folder / name, dpi=130)
        return self.folder / name
