"""DeepSpeed's own kind of pipeline script: two changed lines, and both files train."""

from __future__ import annotations

import difflib
import os
import runpy
import sys
from pathlib import Path

import pytest

from tests.distributed.pool import WorkerPool

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
STOCK, PORTED = EXAMPLES / "stock_pipeline.py", EXAMPLES / "ported_pipeline.py"


def run_script(script: str, steps: int) -> list[float]:
    """Losses of a script run as the launcher does."""
    sys.argv = [script, f"--local_rank={os.environ['LOCAL_RANK']}", "--steps", str(steps)]
    return runpy.run_path(script)["main"]()


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
def test_trains(pool2: WorkerPool, script: Path):
    losses = pool2.run(run_script, str(script), 30)
    assert losses[0] == losses[1], "every rank returns the loss of the global batch"
    assert losses[0][0] > 5 and sum(losses[0][-5:]) / 5 < 3.7
