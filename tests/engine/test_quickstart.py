"""The main job: what it leaves behind, what it holds in memory, and that it goes on after it was stopped."""

from __future__ import annotations

import csv
import json
import runpy
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from matplotlib import image

from megatron_ext.checkpoint import native
from megatron_ext.models import DeepSeekV3, DeepSeekV3Config
from tests.distributed.pool import WorkerPool

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
COLUMNS = ["step", "loss", "held_out_loss", "grad_norm", "lr", "tokens_per_second", "max_violation"]
PICTURES = ("loss.png", "expert_load.png", "schedule.png")


def run_main_job(*arguments: str) -> None:
    """The script as the launcher runs it."""
    script = EXAMPLES / "pretrain_deepseek_v3.py"
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script))["main"]()


@pytest.fixture(scope="module")
def folder(pool4: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps, evaluated after each second."""
    folder = tmp_path_factory.mktemp("quickstart")
    pool4.run(run_main_job, "--steps", "3", "--eval-every", "2", "--out", str(folder))
    return folder


def metrics(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_metrics(folder: Path):
    assert (folder / "metrics.csv").read_text().splitlines()[0].split(",") == COLUMNS
    rows = metrics(folder)
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    measured = {row["step"]: float(row["held_out_loss"]) for row in rows if row["held_out_loss"]}
    assert list(measured) == ["0", "2", "3"], "before the first step, every second one, and at the end"
    assert 5.3 < measured["0"] < 6.2, "an untrained model of 260 tokens: ln 260 = 5.56"
    assert measured["3"] < measured["0"] - 0.05
    for row in rows[1:]:
        assert all(row[column] for column in COLUMNS if column != "held_out_loss")
        assert 0 <= float(row["max_violation"]) <= 7
    rates = [float(row["lr"]) for row in rows[1:]]
    assert max(rates) <= 0.001 and len(set(rates)) > 1, "the scheduler follows --steps"


def test_pictures_are_not_blank(folder: Path):
    for name in PICTURES:
        picture = image.imread(folder / name)[..., :3]
        assert picture.shape[0] > 300 and picture.shape[1] > 600, name
        assert picture.std() > 0.05 and len({tuple(p) for p in picture[::7, ::7].reshape(-1, 3).tolist()}) > 20, name


def test_config_is_resolved(folder: Path):
    found = json.loads((folder / "config.json").read_text())
    section = found["ds_config"]["megatron_ext"]
    assert section["pipeline"] == {"schedule": "dualpipe", "stages": 2, "chunks": 1, "placement": None,
                                   "memory_limit": None, "overlap": True, "trace": None}
    assert section["kernels"] == {"backend": "auto"}
    assert found["ds_config"]["scheduler"]["params"]["total_num_steps"] == 3
    assert found["model"]["model_type"] == "deepseek_v3" and found["ranks"] == 4
    assert found["versions"]["torch"] == torch.__version__


def test_optimizer_state(folder: Path):
    """4 + 4 bytes a parameter on the CPU, and one copy of it in all although the weights are there twice."""
    ranks = json.loads((folder / "config.json").read_text())["optimizer_bytes"]
    assert len(ranks) == 4
    for rank in ranks:
        assert rank["master"] == {"cpu": 4 * rank["parameters"]}
        assert rank["moments"] == {"cpu": 4 * rank["parameters"]}
    with torch.device("meta"):
        model = DeepSeekV3(DeepSeekV3Config.from_hf(EXAMPLES / "deepseek_v3_tiny.json"))
    sizes = {"experts": 0, "dense": 0}
    for name, p in model.named_parameters():
        sizes["experts" if ".experts." in name else "dense"] += p.numel()
    whole = sum(sizes.values())
    # Two of the ranks hold one half of the experts, two the other, and every rank all the rest.
    assert sum(rank["weights_held"] for rank in ranks) == 4 * sizes["dense"] + 2 * sizes["experts"]
    assert whole <= sum(rank["parameters"] for rank in ranks) < whole * 1.001, "but for the padding of the shards"


def test_resume_goes_on(pool4: WorkerPool, folder: Path):
    """From the checkpoint, although the run had got further before it was killed."""
    checkpoint = folder / "checkpoint" / "global_step3"
    assert native.read_latest(folder / "checkpoint") == "global_step3" and (checkpoint / native.MANIFEST).is_file()
    before = metrics(folder)
    with open(folder / "metrics.csv", "a") as file:
        file.write("4,9.9,,1,1,1,1\n5,9.9,,1,1,1,1\n")
    with open(folder / "expert_load.jsonl", "a") as file:
        file.write('{"step": 4}\n')
    pool4.run(run_main_job, "--steps", "5", "--eval-every", "5", "--out", str(folder), "--resume")
    after = metrics(folder)
    assert [row["step"] for row in after] == ["0", "1", "2", "3", "4", "5"]
    assert after[:4] == before and all(float(row["loss"]) < 6 for row in after[4:])
    load = [json.loads(line) for line in (folder / "expert_load.jsonl").read_text().splitlines()]
    assert [row["step"] for row in load] == [1, 2, 3, 4, 5]
    tokens = 32 * 128 * 2
    assert all(sum(counts) == tokens for row in load for name, counts in row.items() if name != "step")
    assert native.read_latest(folder / "checkpoint") == "global_step5"
    assert all(int(a["step"]) < int(b["step"]) for a, b in pairwise(after))
