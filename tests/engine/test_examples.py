"""DeepSpeed's own kind of pipeline script: two changed lines, and both files train."""

from __future__ import annotations

import difflib
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
STOCK, PORTED = EXAMPLES / "stock_pipeline.py", EXAMPLES / "ported_pipeline.py"
# As the launcher starts it, but nothing is compiled first (30 s): no operator of DeepSpeed counts as compatible.
START = """
import deepspeed.ops, runpy, sys, torch
torch.set_num_threads(1)
deepspeed.ops.__compatible_ops__ = {}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(script: Path, steps: int, ranks: int = 2) -> dict[int, float]:
    """Runs a script on some ranks; returns the losses that rank 0 prints, by step."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "RANK": str(rank), "LOCAL_RANK": str(rank),
                       "WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
                       "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, "-c", START, str(script), f"--local_rank={rank}", "--steps", str(steps)]
        processes.append(subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE,
                                          stderr=subprocess.STDOUT))
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(output[-3000:] for output in outputs)
    return {int(step): float(loss) for step, loss in re.findall(r"^step +(\d+)  loss ([\d.]+)$", outputs[0], re.M)}


def changed_lines() -> list[str]:
    lines = difflib.ndiff(STOCK.read_text().splitlines(), PORTED.read_text().splitlines())
    return [line for line in lines if line[0] in "+-"]


def test_two_lines_differ():
    changed = changed_lines()
    assert sorted(line[0] for line in changed) == ["+", "+", "-", "-"]
    assert all("megatron_ext" in line for line in changed if line[0] == "+")


def test_readme_shows_the_diff():
    readme = (EXAMPLES.parent / "README.md").read_text().splitlines()
    for line in changed_lines():
        assert f"{line[0]}{line[2:]}" in readme


@pytest.mark.parametrize("script", [STOCK, PORTED], ids=lambda path: path.stem)
def test_trains(script: Path):
    losses = run(script, 20)
    assert list(losses) == [1, 20]
    assert 5.3 < losses[1] < 5.8, "untrained: ln 256 = 5.55"
    assert losses[20] < 4
