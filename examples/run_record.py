"""What a run leaves behind: a progress line per step, metrics.csv, the resolved config, and three pictures.

    metrics.csv     step, loss, held_out_loss (where measured), grad_norm, lr, tokens_per_second, max_violation
    config.json     the ds_config with the megatron_ext section's defaults filled in, the model, versions, optimizer state
    loss.png        training and held-out loss
    expert_load.png share of the tokens per expert and layer, over the steps
    schedule.png    one step of the pipeline as it ran (schedule.json holds the times)
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
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import megatron_ext
from megatron_ext.layers.balancing import max_violation
from megatron_ext.optimizer import optimizer_state_bytes
from megatron_ext.pipeline.drawing import draw

COLUMNS = ("step", "loss", "held_out_loss", "grad_norm", "lr", "tokens_per_second", "max_violation")


class RunRecord:
    """Keeps and writes the record on rank 0; other ranks only take part in what is collective."""

    def __init__(self, folder: Path, engine: Any, config: dict[str, Any], model: dict[str, Any], resumed: bool,
                 total_steps: int):
        self.folder, self.engine, self.writes = folder, engine, dist.get_rank() == 0
        self.rows: list[dict[str, Any]] = []
        self.load: dict[str, list[list[int]]] = {}
        self.load_steps: list[int] = []
        self.file = None
        self.console = Console()
        self.progress: Progress | None = None
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, optimizer_state_bytes(engine.optimizer), group=engine.process_groups.control)
        if not self.writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        resolved = {"ds_config": {**config, "megatron_ext": engine.section.resolved()}, "model": model,
                    "versions": {"megatron_ext": megatron_ext.__version__, "deepspeed": deepspeed.__version__,
                                 "torch": torch.__version__, "python": platform.python_version()},
                    "ranks": dist.get_world_size(), "train_batch_size": engine.train_batch_size(),
                    "optimizer_bytes": [{"parameters": s.parameters, "master": dict(s.master), "moments": dict(s.moments)}
                                        for s in states]}
        (folder / "config.json").write_text(json.dumps(resolved, indent=1))
        self._open_metrics(resumed)
        terminal = self.console.is_terminal
        self.progress = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                                 TimeRemainingColumn(), console=self.console, disable=not terminal)
        self.task = self.progress.add_task("training", total=total_steps, completed=engine.global_steps)
        self.progress.start()

    def _open_metrics(self, resumed: bool) -> None:
        """A resumed run keeps the rows up to its checkpoint and writes on after them."""
        path = self.folder / "metrics.csv"
        if resumed and path.is_file():
            with open(path, newline="") as old:
                self.rows = [row for row in csv.DictReader(old) if int(row["step"]) <= self.engine.global_steps]
        self.file = open(path, "w", newline="")
        self.writer = csv.DictWriter(self.file, COLUMNS)
        self.writer.writeheader()
        self.writer.writerows(self.rows)
        self.file.flush()

    def start(self, held_out: float | None) -> None:
        """Before the first step: the loss of the untrained model."""
        if self.writes and held_out is not None:
            self.console.print(f"held-out loss of the untrained model: {held_out:.3f}")
            self._write({"step": 0, "held_out_loss": held_out})

    def step(self, step: int, held_out: float | None, tokens_per_second: float, gigabytes: float) -> None:
        """After every step; collective."""
        counts = self.engine.gather_expert_counts()
        if not self.writes:
            return
        m = self.engine.metrics
        worst = max((max_violation(c) for c in counts.values()), default=None)
        self.load_steps.append(step)
        for name, c in counts.items():
            self.load.setdefault(name, []).append(c.tolist())
        self._write({"step": step, "loss": m["loss"], "held_out_loss": held_out, "grad_norm": m["grad_norm"], "lr": m["lr"],
                     "tokens_per_second": round(tokens_per_second, 1), "max_violation": worst})
        line = f"step {step:5d}  loss {m['loss']:.4f}  {tokens_per_second:8.0f} tokens/s"
        line += "" if worst is None else f"  MaxVio {worst:5.2f}"
        line += f"  {gigabytes:.2f} GB" + ("" if held_out is None else f"  held-out {held_out:.4f}")
        assert self.progress is not None
        self.progress.console.print(line, highlight=False)
        self.progress.update(self.task, completed=step)

    def _write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        assert self.file is not None
        self.writer.writerow(row)
        self.file.flush()

    def finish(self) -> None:
        """Pictures, and where everything is."""
        if not self.writes:
            return
        assert self.progress is not None and self.file is not None
        self.progress.stop()
        self.file.close()
        pictures = [self._draw_loss()]
        if self.load:
            pictures.append(self._draw_load())
        if self.engine.timeline is not None:
            self.engine.timeline.save(self.folder / "schedule.json")
            pictures.append(draw(self.engine.timeline, self.folder / "schedule.png"))
        dead = [f"{name} expert {e}" for name, rows in self.load.items()
                for e, total in enumerate(torch.tensor(rows[-50:]).sum(0).tolist()) if total == 0]
        self.console.print(f"experts without a token in the last 50 steps: {', '.join(dead) if dead else 'none'}")
        for picture in pictures:
            self.console.print(f"picture: {picture}")

    def _draw_loss(self) -> Path:
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(8, 4.5))
        for column, label, style in (("loss", "training", "-"), ("held_out_loss", "held out", "o-")):
            points = [(int(r["step"]), float(r[column])) for r in self.rows if r.get(column) not in (None, "")]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
        axes.set(xlabel="step", ylabel="loss, nats per token", title="Loss")
        axes.grid(alpha=0.3)
        axes.legend()
        return _save(figure, self.folder / "loss.png")

    def _draw_load(self) -> Path:
        from matplotlib import pyplot

        figure, all_axes = pyplot.subplots(len(self.load), 1, figsize=(9, 1.2 + 1.9 * len(self.load)), sharex=True,
                                           squeeze=False, layout="constrained")
        image = None
        for axes, (name, rows) in zip(all_axes[:, 0], self.load.items(), strict=True):
            counts = torch.tensor(rows, dtype=torch.float64)
            share = counts * counts.shape[1] / counts.sum(1, keepdim=True)  # 1 is the fair share
            extent = (self.load_steps[0] - 0.5, self.load_steps[-1] + 0.5, counts.shape[1] - 0.5, -0.5)
            image = axes.imshow(share.T, aspect="auto", extent=extent, cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
            axes.set(ylabel="expert")
            axes.set_title(f"{name.removesuffix('.mlp.gate')}", fontsize=9, loc="left")
        all_axes[-1, 0].set_xlabel("step")
        figure.colorbar(image, ax=all_axes, label="tokens / fair share", extend="max")
        figure.suptitle("Load of the experts")
        return _save(figure, self.folder / "expert_load.png")


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
    return path
